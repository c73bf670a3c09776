"""Responses and perplexity: against transformers, literal loops and closed forms."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from scipy import stats

pytest.importorskip("transformers", reason="an extra: pip install bird-kernels[language]")

from bird.lab.language.data import as_text, padded_batch
from bird.lab.language.generation import generate, perplexity, sample
from tests.bird.tiny import END, WORDS, Calls, absolute, causal
from tests.bird.tiny import words_tokenizer as tokenizer

PROMPTS = ["w1", "w2 w3 w4 w5 w6 w7 w8", "w9 w1", "w10 w11 w12 w13", "w4 w4 w4", "w20 w2 w19 w3 w18"]


@pytest.fixture(autouse=True)
def no_default_generator() -> Any:
    """Nothing here draws from PyTorch's global generator."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture(scope="module")
def model(device: torch.device) -> Any:
    made = causal().to(device)
    made.generation_config.repetition_penalty = 5.0  # comes with some models, and is not asked for here
    return made


def literal(model: Any, words: Any, ids: list[int], count: int) -> str:
    """Greedy, one prompt, the whole text again for each token."""
    model.eval()
    new: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + new], device=model.device)).logits[0, -1]
        new.append(int(logits.argmax()))
        if new[-1] == END:
            break
    return words.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_greedy_responses_are_those_of_transformers(model: Any, batch_size: int) -> None:
    words = tokenizer()
    model.train()
    found = generate(model, words, PROMPTS, max_new_tokens=12, batch_size=batch_size, greedy=True)
    assert model.training
    model.eval()
    for prompt, response in zip(PROMPTS, found, strict=True):
        ids = words(prompt, return_tensors="pt")["input_ids"].to(model.device)
        options = {"do_sample": False, "max_new_tokens": 12, "repetition_penalty": 1.0}
        tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        assert response == words.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
        assert response == literal(model, words, ids[0].tolist(), 12)
    assert len(set(found)) == len(found)
    lengths = {len(response.split()) for response in found}
    assert len(lengths) > 1, "none of these responses ends early, so ends were not tested"


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_p": 0.8}])
def test_a_prompts_response_does_not_depend_on_its_batch(model: Any, options: dict[str, float]) -> None:
    words = tokenizer()
    found = generate(model, words, PROMPTS, max_new_tokens=20, batch_size=6, seed=3, **options)
    alone = [generate(model, words, [prompt], max_new_tokens=20, batch_size=1, seed=3, **options) for prompt in PROMPTS]
    assert [one for (one,) in alone] == found
    order = [4, 0, 5, 2, 1, 3]
    turned = generate(model, words, [PROMPTS[i] for i in order], max_new_tokens=20, batch_size=4, seed=3, **options)
    assert turned == [found[i] for i in order]
    other = generate(model, words, PROMPTS, max_new_tokens=20, batch_size=6, seed=4, **options)
    assert sum(a != b for a, b in zip(other, found, strict=True)) >= 5


def test_the_tokenizers_padding_does_not_matter_and_stays(model: Any) -> None:
    found = []
    for side, pad in (("left", "</s>"), ("right", "w3"), ("right", None)):
        words = tokenizer()
        words.padding_side, words.pad_token = side, pad
        responses = generate(model, words, PROMPTS, max_new_tokens=9, batch_size=6, seed=1)
        found.append([*responses, perplexity(model, words, PROMPTS)])
        assert (words.padding_side, words.pad_token) == (side, pad)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("kind", [causal, absolute])
def test_positions_and_ends_of_text_within_a_prompt(kind: Any, device: torch.device) -> None:
    """The end of text is the token that pads, and a mask by token would hide it; positions may be embedded."""
    model, words, prompts = kind().to(device).eval(), tokenizer(), ["w1 </s> w2", "w1 w2", *PROMPTS]
    found = generate(model, words, prompts, max_new_tokens=8, greedy=True)
    assert found == [literal(model, words, words(p)["input_ids"], 8) for p in prompts]
    assert found[0] != found[1]


def test_ends_of_turns_that_only_the_generation_config_knows(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = tokenizer()
    (whole,) = generate(model, words, PROMPTS[1:2], max_new_tokens=12, greedy=True)
    third = whole.split()[2]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [END, words.convert_tokens_to_ids(third)])
    (cut,) = generate(model, words, PROMPTS[1:2], max_new_tokens=12, greedy=True)
    assert cut.split() == whole.split()[: whole.split().index(third)]


def test_conversations_go_through_the_chat_template(model: Any) -> None:
    prompt = [{"role": "user", "content": "w1 w2"}]
    words = tokenizer(chat=True)
    ids = words.convert_tokens_to_ids(["<s>", "user", "w1", "w2", "</s>", "<s>", "assistant"])  # no second <s> in front
    (found,) = generate(model, words, [prompt], max_new_tokens=8, greedy=True)
    assert found == literal(model, words, ids, 8)
    with pytest.raises(ValueError, match="needs a chat template, and the tokenizer has none"):
        generate(model, tokenizer(), [prompt], max_new_tokens=8)
    assert as_text(prompt) == "w1 w2"
    assert as_text([*prompt, {"role": "assistant", "content": "w3"}]) == "user: w1 w2\nassistant: w3"


def test_tokens_are_drawn_as_often_as_the_softmax_says(device: torch.device) -> None:
    """By inversion with equidistant draws, the counts are exact to one at either end of a token's stretch."""
    logits = torch.tensor([[2.0, -1.0, 0.5, -math.inf, 1.0, -math.inf]], device=device)
    n = 10_000
    draws = (torch.arange(n, dtype=torch.float64, device=device) + 0.5) / n
    for temperature, top_p, kept in ((1.0, 1.0, [0, 1, 2, 4]), (0.5, 1.0, [0, 1, 2, 4]), (2.0, 0.75, [0, 2, 4])):
        p = (logits[0].double() / temperature).exp().cpu()
        p = torch.stack([p[i] if i in kept else p[i] * 0 for i in range(6)])
        counts = torch.bincount(sample(logits.expand(n, -1), draws, temperature, top_p), minlength=6).cpu()
        assert (counts - n * p / p.sum()).abs().max() <= 1
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64, device=device)
    assert sample(logits.flip(1).expand(2, -1), edges).tolist() == [5, 1]


def test_the_nucleus_is_the_smallest_set_that_is_enough() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()[None]
    draws = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    for top_p, size in ((0.3, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.8, 3), (0.9, 4)):
        assert set(sample(logits.expand(64, -1), draws, 1.0, top_p).tolist()) == set(range(size))
    for top_p, size in ((0.25, 1), (0.5, 2), (0.75, 3)):  # quarters are exact: just enough is enough
        assert len(set(sample(torch.zeros(64, 4), draws, 1.0, top_p).tolist())) == size


def test_first_tokens_of_many_seeds_follow_the_model(model: Any) -> None:
    words, n = tokenizer(), 200
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([words("w7 w7")["input_ids"]], device=model.device)).logits[0, -1]
    p = logits.double().softmax(dim=0).cpu().numpy()
    options = {"max_new_tokens": 1, "progress": False}
    counts = Counter(generate(model, words, ["w7 w7"], seed=seed, **options)[0] for seed in range(n))
    ids = {word: words.convert_tokens_to_ids(word) for word in WORDS}
    likely = [word for word in WORDS if n * p[ids[word]] > 5]
    assert len(likely) > 3
    observed = [counts[word] for word in likely] + [n - sum(counts[word] for word in likely)]
    expected = [n * p[ids[word]] for word in likely]
    expected.append(n - sum(expected))
    assert stats.chisquare(observed, expected).pvalue > 0.01


def test_each_module_is_given_back_in_its_mode(model: Any) -> None:
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    generate(model, tokenizer(), PROMPTS, max_new_tokens=2)
    perplexity(model, tokenizer(), PROMPTS)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_bad_input_is_refused_before_anything_runs(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, words = Calls(model, monkeypatch), tokenizer()
    with pytest.raises(ValueError, match="prompt 1 has 63 tokens with 2 new ones, and the model has 64 positions"):
        generate(model, words, ["w1", "w2 " * 62], max_new_tokens=2)
    with pytest.raises(ValueError, match="text 0 has 65 tokens, and the model has 64 positions"):
        perplexity(model, words, ["w2 " * 64])
    with pytest.raises(ValueError, match="'' has no tokens"):
        generate(model, tokenizer(start=False), ["w1", ""], max_new_tokens=2)
    with pytest.raises(ValueError, match="a text of at least two tokens"):
        perplexity(model, tokenizer(start=False), ["w1", ""])
    assert calls.prefills == []
    assert generate(model, words, [], max_new_tokens=3) == []


def test_broken_weights_say_so(device: torch.device) -> None:
    model = causal().to(device)
    model.lm_head.weight.data[3, 0] = math.nan
    with pytest.raises(FloatingPointError, match="logits are NaN"):
        generate(model, tokenizer(), PROMPTS, max_new_tokens=3)
    assert math.isnan(perplexity(model, tokenizer(), PROMPTS))


def test_adapters_get_the_positions_of_the_model_inside(model: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    with torch.random.fork_rng([]):
        adapted = peft.get_peft_model(causal().to(model.device), config).eval()
    for module in adapted.modules():
        for name in ("lora_A", "lora_B"):
            for linear in getattr(module, name, {}).values():
                linear.weight.data.copy_(torch.linspace(-1, 1, linear.weight.numel()).view_as(linear.weight))
    words = tokenizer()
    found = generate(adapted, words, PROMPTS, max_new_tokens=8, greedy=True)
    assert found == [literal(adapted, words, words(p)["input_ids"], 8) for p in PROMPTS]
    assert found != generate(model, words, PROMPTS, max_new_tokens=8, greedy=True)


def literal_perplexity(model: Any, rows: list[list[int]]) -> float:
    """One forward for each token."""
    losses = []
    for row in rows:
        for i in range(1, len(row)):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row[:i]], device=model.device)).logits[0, -1]
            losses.append(-logits.double().log_softmax(dim=0)[row[i]].item())
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("start", [True, False])
def test_perplexity_is_that_of_a_token_by_token_loop(model: Any, batch_size: int, start: bool) -> None:
    words = tokenizer(start=start)
    texts = [*PROMPTS, "w1 </s> w2 </s>", "w5"]  # the end of text counts like any token, though it pads as well
    model.train()
    found = perplexity(model, words, texts, batch_size=batch_size)
    model.eval()
    truth = literal_perplexity(model, [words(text)["input_ids"] for text in texts])
    assert found == pytest.approx(truth, rel=1e-5)


def test_each_token_of_each_prompt_has_its_own_draw(device: torch.device) -> None:
    """A model that knows nothing shows them."""
    model = causal().to(device)
    model.lm_head.weight.data.zero_()
    found = [text.split() for text in generate(model, tokenizer(), PROMPTS, max_new_tokens=50)]
    assert max(map(len, found)) > 20
    assert all(max(Counter(words).values()) < len(words) / 2 for words in found if len(words) > 20)
    starts = [text.split()[:1] for text in generate(model, tokenizer(), PROMPTS, max_new_tokens=1)]
    assert len({*map(tuple, starts)}) > 3


def test_padding_by_hand() -> None:
    left, right = (padded_batch([[5, 6, 7], [8]], left=side) for side in (True, False))
    assert left["input_ids"][0].tolist() == [5, 6, 7]
    assert left["input_ids"][1, 2] == right["input_ids"][1, 0] == 8
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
