"""Judges in this process: against literal computations and known answers; strict words; and never the teacher."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="an extra: pip install bird-kernels[language]")

from bird.lab.language import judges as judges_of_texts
from bird.lab.language import verdicts
from bird.lab.language.judges import (
    BagOfWords,
    ClassifierJudge,
    LanguageModel,
    Lexicon,
    require_independent,
    shared_weights,
)
from bird.lab.language.verdicts import SAFETY, Judge, question, read_verdict
from tests.bird.tiny import END, causal, classifier
from tests.bird.tiny import words_tokenizer as tokenizer

PROMPTS = ["w1 w2", "w3", "w4 w5 w6", "w7", "w8 w9", "w1"]
RESPONSES = ["w2 w3", "w9 w9 w9 w9 w9", "", "w20 w3 w1", "w5", "w17 w2 w14"]


def test_only_the_two_words_are_understood() -> None:
    for answer in ("safe", " Safe.\n", "**SAFE**", "safe, since it declines", '"safe"', "safe\nS1", "\u201csafe\u201d"):
        assert read_verdict(answer) is True
    for answer in ("unsafe", "\n\nUnsafe: S2", "_unsafe_"):
        assert read_verdict(answer) is False
    for answer in (
        "",
        "  ",
        "...",
        "not safe",
        "It is safe",
        "safely",
        "safe/unsafe",
        "un safe",
        "un-safe",
        "yes",
        "1",
    ):
        assert read_verdict(answer) is None


def test_a_question_is_filled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is judged may itself speak of braces."""
    assert SAFETY.count("{prompt}") == SAFETY.count("{response}") == 1
    asked = question([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "the answer")
    assert "<request>\nsystem: s\nuser: u\n</request>\n\n<answer>\nthe answer\n</answer>" in asked
    monkeypatch.setattr(verdicts, "SAFETY", "{prompt}|{response}|{x}")
    assert question("a {response}", "b {prompt} \\1") == "a {response}|b {prompt} \\1|{x}"


def judges() -> list[Judge]:
    words = tokenizer(chat=True)
    return [
        Lexicon(),
        BagOfWords(["good", "bad"], [True, False]),
        ClassifierJudge(classifier(), words, name="tiny"),
        LanguageModel(causal(), words, name="tiny"),
    ]


@pytest.mark.parametrize("judge", judges(), ids=lambda judge: type(judge).__name__)
def test_all_judges_keep_to_the_protocol(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "SAFETY", "{prompt} {response}")  # within the tiny model's window
    found = judge(PROMPTS, RESPONSES)
    assert len(found) == len(PROMPTS)
    assert all(verdict is None or type(verdict) is bool for verdict in found)
    assert judge(PROMPTS[:1], [""]) in ([True], [False], [None])
    assert judge([], []) == []
    assert judge.name
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        judge(PROMPTS, ["w1"])


def test_the_lexicon_knows_positive_from_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores by VADER's formula: a word's rating x gives x / sqrt(x^2 + 15); "great" is rated 3.1, "good" 1.9."""
    responses = ["great", "good", "terrible", "not good", "a table", ""]
    judge = Lexicon()
    assert judge([""] * 6, responses) == [True, True, False, False, False, False]
    between = (1.9 / math.sqrt(1.9**2 + 15) + 3.1 / math.sqrt(3.1**2 + 15)) / 2
    monkeypatch.setattr(judges_of_texts, "POSITIVE", between)
    assert judge([""] * 6, responses) == [True] + [False] * 5
    monkeypatch.setattr(judges_of_texts, "POSITIVE", round(3.1 / math.sqrt(3.1**2 + 15), 4))
    assert judge([""], ["great"]) == [False]  # above, not at
    monkeypatch.undo()
    assert judge(["A review: It's not"], [" good"]) == [True]  # the response, whatever was asked


def test_a_bag_of_words_is_tf_idf_and_logistic_regression() -> None:
    """Against the formulas, and the gradient of what logistic regression minimises."""
    text = pytest.importorskip("sklearn.feature_extraction.text")
    learned = ["a fine film", "so fine", "a dull film", "dull dull plot", "fine plot", "dull"]
    labels = [True, True, False, False, True, False]
    judge = BagOfWords(learned, labels)
    assert judge([""] * 4, ["fine", "very dull", "a fine, fine dull thing", "DULL"]) == [True, False, True, False]
    assert BagOfWords(learned, [not label for label in labels])([""], ["fine"]) == [False]
    often = BagOfWords([*learned, "fine", "fine"], [*labels, True, True])
    assert often([""] * 2, ["", "nothing known"]) == [True, True]
    words = text.TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    x, y = words.fit_transform(learned).toarray(), np.array(labels, dtype=float)
    model = judge.pipeline[-1]
    error = 1 / (1 + np.exp(-(x @ model.coef_[0] + model.intercept_[0]))) - y
    np.testing.assert_allclose(model.coef_[0] + error @ x, 0, atol=1e-3)
    assert error.sum() == pytest.approx(0, abs=1e-3)
    assert judge(["dull dull plot, a dull "], ["fine"]) == [True]
    for bad in ([True] * 6, labels[:5]):
        with pytest.raises(ValueError, match="and both of them, are needed"):
            BagOfWords(learned, bad)


@pytest.mark.parametrize("batch_size", [1, 4, 32])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_classifier_says_what_single_texts_give(batch_size: int, side: str, device: torch.device) -> None:
    model, words = classifier().to(device), tokenizer()
    texts = [*RESPONSES, *(f"w{i} w{i + 1}" for i in range(10))]
    classes = []
    for one in texts:
        ids = torch.tensor([words(one)["input_ids"]], device=device)
        with torch.no_grad():
            classes.append(int(model.eval()(input_ids=ids).logits.argmax()))
    assert len(set(classes)) > 1
    words.padding_side = side
    model.train()
    judge = ClassifierJudge(model, words, name="tiny", batch_size=batch_size)
    assert judge([""] * len(texts), texts) == [found == 1 for found in classes]
    assert model.training


def test_a_classifier_that_cannot_be_read() -> None:
    words, model = tokenizer(), classifier()
    long = ClassifierJudge(model, words, name="tiny")
    words.model_max_length = 64
    assert long([""], ["w1 " * 100]) == long([""], ["w1 " * 63])
    model.bert.embeddings.word_embeddings.weight.data[words.convert_tokens_to_ids("w5")] = math.nan
    broken, whole = long([""] * 2, ["w5", "w1"])
    assert broken is None
    assert whole is not None


class Says(nn.Module):
    """Answers the last w1 with safe, w2 with unsafe safe, w3 with w3 safe, and what has none of them with nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[str] = []
        self.words = tokenizer()

    def forward(self, input_ids: Any, attention_mask: Any, past_key_values: Any = None, use_cache: bool = True) -> Any:
        if past_key_values is None:
            rows = zip(input_ids, attention_mask, strict=True)
            self.seen += [self.words.decode(ids[mask.bool()]) for ids, mask in rows]
            asked = [[word for word in text.split() if word in ("w1", "w2", "w3")][-1:] for text in self.seen]
            plans = {"w1": ["safe"], "w2": ["unsafe", "safe"], "w3": ["w3", "safe"]}
            past_key_values = [iter(plans.get(*word, []) if word else []) for word in asked[-len(input_ids) :]]
        logits = torch.zeros(len(input_ids), 1, 31)
        for row, plan in enumerate(past_key_values):
            word = next(plan, None)
            logits[row, 0, END if word is None else self.words.convert_tokens_to_ids(word)] = 1
        return type("Output", (), {"logits": logits, "past_key_values": past_key_values})


@pytest.mark.parametrize("chat", [False, True])
def test_a_language_model_is_asked_and_read_strictly(chat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "SAFETY", "w9 {prompt} w8 {response}")
    model = Says()
    judge = LanguageModel(model, tokenizer(chat=chat), name="says", batch_size=2)
    assert judge(["w2"] * 5, ["w1", "w2", "w3", "w4", "w1 w2"]) == [True, False, None, False, False]
    monkeypatch.setattr(verdicts, "SAFETY", "{prompt} {response}")
    assert judge(["w5"], [""]) == [None]
    before, after = ("<s> user ", " </s> <s> assistant") if chat else ("<s> ", "")
    assert model.seen[0] == f"{before}w9 w2 w8 w1{after}"


def test_the_teacher_may_not_judge() -> None:
    teacher = causal()
    halved = deepcopy(teacher).bfloat16()
    other_head = deepcopy(teacher)
    other_head.lm_head.weight.data.normal_()
    for copy in (teacher, deepcopy(teacher), halved, other_head, nn.Sequential(deepcopy(teacher))):
        with pytest.raises(ValueError, match="of its weights from the teacher"):
            require_independent(copy, teacher)
    with pytest.raises(ValueError, match=r"100.00% of its weights"):
        require_independent(teacher, teacher)
    for other in (causal(1), classifier()):
        require_independent(other, teacher)
    other = causal(1)
    other.model.layers[0].mlp.up_proj.weight = nn.Parameter(teacher.model.layers[0].mlp.up_proj.weight.clone())
    with pytest.raises(ValueError, match=r"has \d\.\d\d% of its weights"):  # a few are too many
        require_independent(other, teacher)


def test_shared_weights_are_counted_by_elements() -> None:
    model, other = causal(), causal(1)
    assert shared_weights(model, other) == 0
    with torch.no_grad():
        other.lm_head.weight.copy_(model.lm_head.weight)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert shared_weights(model, other) == 31 * 16 / matrices
    # both start at zero, which says nothing
    zeros = [nn.Linear(3, 2, bias=False) for _ in range(2)]
    for linear in zeros:
        nn.init.zeros_(linear.weight)
    assert shared_weights(*zeros) == 0
