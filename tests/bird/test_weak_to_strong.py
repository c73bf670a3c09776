"""Weak-to-strong: training against a plain loop, pooling against single texts, and a teacher that stays as it is."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from bird.lab.language import classifiers
from bird.lab.language import training as runs
from bird.lab.language.classifiers import (
    Classifier,
    certain,
    class_probabilities,
    tokenize,
    train_classifier,
)
from bird.lab.language.data import padded_batch
from bird.lab.language.recipe import Training
from bird.language import Guidance
from bird.language.guidance import Guide, Sequences
from tests.bird.tiny import WINDOW, bert, bytes_tokenizer, gpt2, letters_tokenizer, llama

BYTES, LETTERS = bytes_tokenizer(), letters_tokenizer(special=True)


def snippets(count: int, seed: int = 0) -> tuple[list[str], Tensor]:
    """Texts of 2 to 12 letters, and soft labels, none alike."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 13, (count,), generator=generator).tolist()
    texts = ["".join("abcdefghijklm"[i] for i in torch.randint(13, (n,), generator=generator)) for n in lengths]
    first = torch.rand(count, generator=generator)
    return texts, torch.stack([first, 1 - first], 1)


def weak() -> Classifier:
    return Classifier(bert(3), "mean", seed=5).double()


def guided(teacher: nn.Module, **changes: Any) -> Guidance:
    return Guidance(teacher, LETTERS, **(dict(alpha=0.3, beta=0.7, teacher_pooling="mean") | changes))


def literal_distance(x: Tensor, y: Tensor) -> Tensor:
    """1 - CKA, biased: centred features, Frobenius norms (Kornblith et al., 2019)."""
    x, y = x - x.mean(0), y - y.mean(0)
    return 1 - (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())


SEED = 7


def plain_loop(
    model: Classifier,
    texts: list[str],
    targets: Tensor,
    training: Training,
    distance: Callable[[list[str]], Any] | None,
) -> None:
    """Adam and a cosine, each text by itself, without padding."""
    optimizer = torch.optim.Adam(model.parameters(), lr=training.lr)
    steps, step = training.epochs * math.ceil(len(texts) / training.batch_size), 0
    for epoch in range(training.epochs):
        generator = torch.Generator().manual_seed(SEED + 1_000_003 * epoch)
        for batch in torch.randperm(len(texts), generator=generator).split(training.batch_size):
            hidden = [model.backbone(torch.tensor([BYTES(texts[i])["input_ids"]]))[0][0, -1] for i in batch]
            chances = [model.head(h).softmax(0) for h in hidden]
            loss = -sum((targets[i] * p.log()).sum() for i, p in zip(batch, chances, strict=True)) / len(batch)
            if distance is not None:
                rows = distance([texts[i] for i in batch])
                loss = 0.3 * loss + 0.7 * literal_distance(torch.stack(hidden), rows)
            optimizer.param_groups[0]["lr"] = training.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1


def gap(ours: nn.Module, theirs: nn.Module) -> float:
    """The largest difference between two networks' weights."""
    both = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    return max((x - y).abs().max().item() for x, y in both)


@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize("guides", [False, True])
def test_training_is_the_plain_loop(guides: bool, micro: int | None, tmp_path: Path) -> None:
    """Soft cross-entropy, the cosine, whole batches of CKA: whatever the last batch and the accumulation."""
    texts, targets = snippets(15 if guides else 13)  # a last batch of 3 rows (2 and 1, accumulated), or of 1
    training = Training(epochs=2, batch_size=4, micro_batch=micro, lr=1e-3)
    ours, teacher = Classifier(llama()).double(), weak()
    theirs, before, start = copy.deepcopy(ours), copy.deepcopy(teacher), copy.deepcopy(ours)

    def rows(of: list[str]) -> Tensor:
        with torch.no_grad():
            return torch.stack([before.backbone.eval()(**LETTERS([t], return_tensors="pt"))[0][0].mean(0) for t in of])

    history = train_classifier(
        ours, BYTES, texts, targets, training, tmp_path, guidance=guided(teacher) if guides else None, seed=SEED
    )
    plain_loop(theirs, texts, targets.double(), training, rows if guides else None)
    assert gap(ours, start) > 1e-3
    assert gap(ours, theirs) < 1e-7
    assert gap(teacher, before) == 0
    assert not ours.training
    assert not any(module._forward_hooks for module in ours.modules())
    assert [row["step"] for row in history["train"]] == list(range(1, 9))
    assert ("cka" in history["train"][0]) == guides


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_accumulation_changes_nothing(estimator: str, tmp_path: Path) -> None:
    texts, targets = snippets(16)
    ends = []
    for micro in (8, 2, 1):
        model = Classifier(llama()).double()
        training = Training(epochs=1, batch_size=8, micro_batch=micro, lr=1e-3)
        guidance = guided(weak(), estimator=estimator)
        train_classifier(model, BYTES, texts, targets, training, tmp_path / str(micro), guidance=guidance)
        ends.append(model)
    assert gap(ends[0], ends[1]) < 1e-8
    assert gap(ends[0], ends[2]) < 1e-8


def test_guidance_without_weight_is_none(tmp_path: Path) -> None:
    """The arms see the same texts in the same order, and the same dropout."""
    texts, targets = snippets(12)
    training = Training(epochs=2, batch_size=4, lr=1e-3)
    plain, same, other = (Classifier(llama(dropout=0.3)) for _ in range(3))
    train_classifier(plain, BYTES, texts, targets, training, tmp_path / "plain")
    train_classifier(
        same, BYTES, texts, targets, training, tmp_path / "same", guidance=guided(weak().float(), alpha=1, beta=0)
    )
    train_classifier(other, BYTES, texts, targets, training, tmp_path / "other", guidance=guided(weak().float()))
    assert gap(plain, same) == 0
    assert gap(plain, other) > 1e-4


@pytest.mark.parametrize("guides", [False, True])
def test_resumed_is_uninterrupted(guides: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of the second epoch, with dropout, and with half a checkpoint left behind."""
    texts, targets = snippets(16)
    training = Training(epochs=2, batch_size=4, micro_batch=2, lr=1e-3)

    def run(folder: str) -> tuple[Classifier, dict[str, Any]]:
        model = Classifier(llama(dropout=0.3))
        guidance = guided(weak().float()) if guides else None
        return model, train_classifier(
            model, BYTES, texts, targets, training, tmp_path / folder, guidance=guidance, save_every=2
        )

    whole, history = run("whole")
    watch = runs.Watch.on_log

    def killed(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 7:
            raise KeyboardInterrupt
        watch(self, args, state, control, **more)

    monkeypatch.setattr(runs.Watch, "on_log", killed)
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    monkeypatch.undo()
    (tmp_path / "killed/checkpoint-7").mkdir()
    first: list[int] = []
    monkeypatch.setattr(
        runs.Watch,
        "on_log",
        lambda self, args, state, control, **more: first.append(state.global_step),
    )
    model, resumed = run("killed")
    assert first[0] == 7  # it went on, and did not begin again
    assert gap(model, whole) == 0
    assert resumed == history
    names = {path.name for path in (tmp_path / "killed").iterdir()}
    assert names == {"classifier.safetensors", "history.json", "run.json"}

    monkeypatch.setattr(classifiers, "trained", None)  # a complete run is read, not trained
    again, kept = run("killed")
    assert gap(again, whole) == 0
    assert kept == history


def test_folder_of_another_run(tmp_path: Path) -> None:
    texts, targets = snippets(4)
    train_classifier(Classifier(llama()), BYTES, texts, targets, Training(epochs=1), tmp_path)
    for changed in (
        (texts, targets, Training(epochs=2), None),
        (texts, targets.flip(1), Training(epochs=1), None),
        ([*texts[:3], "other"], targets, Training(epochs=1), None),
        (texts, targets, Training(epochs=1), guided(weak())),
    ):
        *most, guidance = changed
        with pytest.raises(ValueError, match="another run"):
            train_classifier(Classifier(llama()), BYTES, *most, tmp_path, guidance=guidance)


def test_loss_that_is_not_finite(tmp_path: Path) -> None:
    texts, targets = snippets(16)
    training = Training(epochs=4, batch_size=4, lr=1e30)
    with pytest.raises(FloatingPointError, match="step"):
        train_classifier(Classifier(llama()), BYTES, texts, targets, training, tmp_path)


@pytest.mark.parametrize("backbone", [llama, gpt2])
def test_padding_changes_nothing(backbone: Callable[[], nn.Module]) -> None:
    """On either side, of any length, with any id; the id of padding inside of a text is a token like others."""
    model = Classifier(backbone()).eval()
    rows = [[5, 9, 3], [7, 0, 8, 0], [0, 0], [4, 0, 0, 0, 0, 6], [11]]
    with torch.no_grad():
        alone = torch.cat([model.head(model.backbone(torch.tensor([row]))[0][:, -1]) for row in rows])
        for width in (6, 11):
            for left in (False, True):
                for filler in (0, 13):
                    ids, mask = torch.full((5, width), filler), torch.zeros(5, width, dtype=torch.long)
                    for i, row in enumerate(rows):
                        place = slice(width - len(row), width) if left else slice(len(row))
                        ids[i, place], mask[i, place] = torch.tensor(row), 1
                    logits = model(ids, mask).logits
                    torch.testing.assert_close(logits, alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("backbone", "tokenizer", "pooling"), [(llama, BYTES, "last"), (bert, LETTERS, "mean")])
def test_predictions_keep_the_order(backbone: Any, tokenizer: Any, pooling: Any) -> None:
    texts = [*snippets(11)[0], "a<end>b<end>", "<end>"]
    model = Classifier(backbone(), pooling)
    if pooling == "last":
        for layer in model.backbone.layers:
            layer.self_attn.attention_dropout = 0.5
    model.head.weight.data.mul_(20)  # apart from 1/2
    with torch.no_grad():
        hidden = [model.backbone.eval()(**tokenizer([text], return_tensors="pt"))[0][0] for text in texts]
        rows = torch.stack([h[-1] if pooling == "last" else h.mean(0) for h in hidden])
        alone = (rows @ model.head.weight.T).softmax(1)
    model.train()
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        for batch_size in (1, 4, 64):
            chances = class_probabilities(model, tokenizer, texts, batch_size=batch_size)
            torch.testing.assert_close(chances, alone, atol=1e-5, rtol=1e-4)
    finally:
        tokenizer.padding_side = side
    assert model.training
    assert alone.std(0).min() > 0.005


def test_long_texts_are_cut_and_named(tmp_path: Path) -> None:
    model = Classifier(llama())
    with pytest.warns(UserWarning, match=r"texts \[1\] are longer than 3 tokens"):
        chances = class_probabilities(model, BYTES, ["abc", "abcdef"], max_length=3)
    torch.testing.assert_close(chances[0], chances[1])
    with pytest.warns(UserWarning, match=f"longer than {WINDOW} tokens"):
        rows, cut = tokenize(model, BYTES, ["a", "ab" * WINDOW])
    assert (list(map(len, rows)), cut) == ([1, WINDOW], [1])
    with pytest.warns(UserWarning, match="cut"):
        rows, _ = tokenize(Classifier(bert(), "mean"), LETTERS, ["abcdef"], 4)
    assert rows == [[2, 4, 5, 3]]  # [CLS] a b [SEP]
    with pytest.warns(UserWarning, match="cut"):
        history = train_classifier(
            model, BYTES, ["ab", "abcd"], certain([0, 1]), Training(epochs=1, max_length=3), tmp_path
        )
    assert history["cut"] == [1]


def test_guide_taps_the_final_hidden_state() -> None:
    """Of student and teacher, found without being told where."""
    student, teacher = Classifier(llama()).eval(), weak()
    truth = copy.deepcopy(teacher.backbone).eval()
    guide = Guide(guided(teacher), student, BYTES)
    texts = ["abc", "a", "bcdabc"]
    batch = padded_batch([BYTES(text)["input_ids"] for text in texts])
    guide.taps.listen()
    student(**batch)
    ours = guide.student_rows(Sequences(batch["input_ids"], batch["attention_mask"], None))
    theirs = guide.teacher_rows(Sequences(batch["input_ids"], batch["attention_mask"], None))
    for i, text in enumerate(texts):
        row = student.backbone(torch.tensor([BYTES(text)["input_ids"]])).last_hidden_state[0, -1]
        torch.testing.assert_close(ours[i], row, atol=1e-6, rtol=1e-5)
        row = truth(**LETTERS([text], return_tensors="pt")).last_hidden_state[0].mean(0)
        torch.testing.assert_close(theirs[i], row)


def test_the_head() -> None:
    backbone = bert()
    before = torch.get_rng_state()
    one, same, other = (Classifier(backbone, "first", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.head.weight, same.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)
    assert one.head.weight.dtype == torch.float32
    assert one.head.bias.count_nonzero() == 0
    assert Classifier(llama().bfloat16())(**padded_batch([[1, 2]])).logits.dtype == torch.float32
    with pytest.raises(ValueError, match="each token"):
        Classifier(backbone, "all")


def test_saved_and_restored(tmp_path: Path) -> None:
    model, other = Classifier(bert(1), "mean", seed=3), Classifier(bert(2), "mean")
    file = tmp_path / "classifier.safetensors"
    runs.finish_run(model, file, {"train": []})
    runs.restore(other, file)
    assert gap(model, other) == 0
    with pytest.raises(ValueError, match="architecture"):
        runs.restore(Classifier(llama()), file)
    with pytest.raises(FileNotFoundError):
        runs.restore(other, tmp_path / "nowhere")
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match="damaged"):
        runs.restore(other, file)


@pytest.mark.parametrize(
    ("texts", "targets", "message"),
    [
        (["a", " "], [[1.0, 0], [0, 1]], r"texts \[1\] are empty"),
        (["a", "b"], [[1.0, 0]], "2 texts need targets"),
        (["a"], [[0.2, 0.3, 0.5]], r"targets \[1, 2\]"),
        (["a", "b"], [[1.0, 0], [0.5, 0.6]], r"targets \[1\]"),
        (["a", "b"], [[1.5, -0.5], [0.5, 0.5]], r"targets \[0\]"),
        (["a"], [[math.nan, 0.5]], r"targets \[0\]"),
        ([], torch.empty(0, 2).tolist(), "targets|no texts"),
    ],
)
def test_bad_data_is_refused(texts: list[str], targets: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train_classifier(Classifier(llama()), BYTES, texts, torch.tensor(targets), Training(), tmp_path)
    assert not (tmp_path / "run.json").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"micro_batch": 5},
        {"micro_batch": 0},
        {"lr": 0},
        {"lr": math.nan},
        {"warmup": 1.0},
        {"adapters": -1},
    ],
)
def test_bad_trainings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Training(**wrong)


def test_a_window_is_not_widened() -> None:
    with pytest.raises(ValueError, match=f"1 to {WINDOW}"):
        class_probabilities(Classifier(llama()), BYTES, ["a"], max_length=WINDOW + 1)


def test_true_labels_as_targets() -> None:
    assert certain([1, 0]).tolist() == [[0, 1], [1, 0]]
    with pytest.raises(RuntimeError, match="smaller than num_classes"):
        certain([0, 2])
