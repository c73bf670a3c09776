"""Files that are cut or changed end in one ValueError that names them, or change nothing: 300 mutations of each."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bird import files
from bird.lab import cli, tensors
from bird.lab.stages import Lines, Stage
from bird.lab.tensors import load_tensors, save_tensors
from bird_kernels import Statistics

MUTATIONS = 300
RESULT = {
    "clean": 0.5,
    "corrupted": {"fog": [0.25, 1e-7]},
    "right": [1, 0, 1],
    "responses": ["a\n", "\u2028"],
    "n": None,
}


def mutated(data: bytes, seed: int) -> bytes:
    """Cut, or with some bytes flipped, overwritten, left out, doubled or put in."""
    draw = random.Random(seed)
    out, kind = bytearray(data), seed % 6
    if kind == 0:
        return bytes(out[: draw.randrange(len(out))])
    for _ in range(draw.choice((1, 1, 1, 4))):
        # Headers stand first, and are most of what can go wrong.
        at = draw.randrange(min(len(out), 200)) if draw.random() < 0.5 else draw.randrange(len(out))
        if kind == 1:
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 2:
            out[at] = draw.randrange(256)
        elif kind == 3:
            del out[at : at + draw.randint(1, 9)]
            out = out or bytearray(b"\0")
        elif kind == 4:
            out[at:at] = out[at : at + draw.randint(1, 9)]
        else:
            out[at:at] = bytes([draw.choice(b'{}[]",:0e-\\\xff\0')])
    return bytes(out)


def complaint(read: Callable[[], Any], kinds: tuple[type[Exception], ...] = (ValueError,)) -> str | None:
    """What is said of a file, in an error of one of the kinds; None if it is read."""
    try:
        read()
    except kinds as error:
        return str(error)
    return None


def survives(path: Path, read: Callable[[], Any], truth: Any = None) -> int:
    """How many mutations of a file are refused; each is, by name, or is read as what was written."""
    whole, refused = path.read_bytes(), 0
    for seed in range(MUTATIONS):
        path.write_bytes(mutated(whole, seed))
        said = complaint(read)
        assert said is None or path.name in said, f"mutation {seed}"
        refused += said is not None
        assert said is not None or truth is None or read() == truth, f"mutation {seed}"
    path.write_bytes(whole)
    read()
    return refused


def test_what_a_stage_came_to(tmp_path: Path) -> None:
    stage = Stage("score", {"lr": 0.1}, lambda folder: RESULT)
    stage.folder(tmp_path).mkdir()
    stage._complete(tmp_path)
    for name, read in (
        ("result.json", lambda: stage.result(tmp_path)),
        ("stage.json", lambda: tensors.read_checked(stage.folder(tmp_path) / "stage.json", "delete it")),
    ):
        path = stage.folder(tmp_path) / name
        assert survives(path, read, read()) > 0.8 * MUTATIONS
    path = stage.folder(tmp_path) / "result.json"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"score-\w+/result\.json is damaged .*: delete it, and it is made again"):
        stage.result(tmp_path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"result\.json is damaged"):
        stage.result(tmp_path)


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    Lines(path).append(RESULT, {"index": 1, "text": "x" * 300})
    assert survives(path, lambda: Lines(path)) > 0.3 * MUTATIONS
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(ValueError, match=r"lines\.jsonl: line 1 is not a JSON object"):
        Lines(path)


def test_rows_of_text(tmp_path: Path) -> None:
    read_rows = pytest.importorskip("bird.lab.language.data.files", reason="an extra: bird-kernels[language]").read_rows
    for name in ("train.jsonl", "train.json"):
        path = tmp_path / name
        rows = [{"prompt": "p ä", "chosen": "c" * 90, "rejected": "r"}] * 4
        text = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows)
        path.write_text(text)
        assert survives(path, lambda path=path: read_rows(path, "train")) > 0.3 * MUTATIONS  # type: ignore[misc]
        path.write_bytes(text.encode().replace(b"ppp", b"\xff\xfe"))
        path.write_bytes(b'{"a": "\xff"}')
        with pytest.raises(ValueError, match=rf"{name}.*not JSON"):
            read_rows(path, "train")


def test_shapes_that_a_run_has_noted(tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    files.write_json([[64, 128, 512, "float32"], [64, 128, 512, "bfloat16"]], path)
    assert survives(path, lambda: cli._shapes_of(tmp_path)) > 0.3 * MUTATIONS
    for text in (
        "{}",
        "3",
        "[[1, 2, 3]]",
        '[[1, 2, "3", "float32"]]',
        "[[1, 2, 3, 4]]",
        "[[1, 2, true, []]]",
        "[null]",
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"shapes\.json is damaged"):
            cli._shapes_of(tmp_path)


def test_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    save_tensors({"w": torch.arange(200.0)}, path)
    assert survives(path, lambda: load_tensors(path)["w"].tolist(), list(range(200))) > 0.5 * MUTATIONS


class Pair(nn.Module):
    """Two matrices, one of them shared."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8, bias=False)
        self.two = nn.Linear(8, 8, bias=False)
        self.two.weight = self.one.weight


def test_weights_that_a_run_left(tmp_path: Path) -> None:
    """With their checksum nothing else than what was written is read; without, damage has a name where it shows."""
    runs: Any = pytest.importorskip("bird.lab.language.training", reason="an extra: bird-kernels[language]")
    from safetensors.torch import save_model

    path, model = tmp_path / "policy.safetensors", Pair()
    save_model(model, str(path))
    truth = model.one.weight.tolist()

    def read() -> Any:
        runs.restore(model, path)
        return model.two.weight.tolist()

    survives(path, read)
    runs.finish_run(model, path, {"train": []})
    assert survives(path, read, truth) > 0.9 * MUTATIONS
    history = tmp_path / "history.json"
    assert survives(history, lambda: runs.finished_run(model, path, "cpu"), {"train": []}) > 0.5 * MUTATIONS
    path.unlink()
    with pytest.raises(FileNotFoundError):
        runs.restore(model, path)


def test_published_networks(tmp_path: Path) -> None:
    models: Any = pytest.importorskip("bird.lab.language.models", reason="an extra: bird-kernels[language]")
    pytest.importorskip("transformers", reason="an extra: bird-kernels[language]")
    import shutil

    from tests.bird.tiny import saved

    shutil.copytree(saved("encoder"), tmp_path / "network")
    path = tmp_path / "network/model.safetensors"
    assert unloadable(path, lambda: models.load_network(str(path.parent), "encoder")) > 0.3 * MUTATIONS


def test_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file that is short of a network, too: each mutation of it is refused by name."""
    gguf = pytest.importorskip("gguf", reason="an extra: bird-kernels[language]")
    models: Any = pytest.importorskip("bird.lab.language.models", reason="an extra: bird-kernels[language]")
    path = tmp_path / "network.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(8)
    writer.add_tensor("token_embd.weight", torch.ones(8, 8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(models, "locate_network", lambda name: path)
    assert unloadable(path, lambda: models.load_network("smollm2-135m", "causal")) == MUTATIONS


def unloadable(path: Path, read: Callable[[], Any]) -> int:
    """The same of what transformers loads, whose own errors may speak of the folder."""
    whole, refused = path.read_bytes(), 0
    for seed in range(MUTATIONS):
        path.write_bytes(mutated(whole, seed))
        said = complaint(read, (ValueError, FileNotFoundError))
        assert said is None or str(path.parent) in said, f"mutation {seed}"
        refused += said is not None
    return refused


def test_statistics() -> None:
    torch.manual_seed(0)
    statistics = Statistics()
    statistics.update(torch.randn(9, 3), torch.randn(9, 4))
    state, draw = statistics.state_dict(), random.Random(0)
    changes: list[Callable[[Any], Any]] = [
        lambda t: t[..., None], lambda t: torch.cat([t.reshape(-1)] * 2), lambda t: t.reshape(-1)[:0],
        lambda t: t.to(torch.complex128), lambda t: t.tolist(), lambda t: None, lambda t: "x", lambda t: t.half(),
        lambda t: t.to("meta"), lambda t: t.reshape(-1)[:1].expand(3, 5), lambda t: t.numpy(), lambda t: t.long(),
    ]  # fmt: skip
    refused = 0
    for _ in range(MUTATIONS):
        broken: dict[Any, Any] = dict(state)
        name = draw.choice(list(state))
        if draw.random() < 0.2:
            broken.pop(name)
        else:
            broken[name] = draw.choice(changes)(broken[name])
        said = complaint(lambda broken=broken: Statistics.from_state_dict(broken).cka("unbiased"))  # type: ignore[misc]
        assert said is None or "tate of Statistics" in said
        refused += said is not None
    assert refused > 0.8 * MUTATIONS
    assert Statistics.from_state_dict(state).cka() == statistics.cka()
    for eps, n in ((float("nan"), 9.0), (1e-7, float("inf")), (1e-7, 2.5), (1e-7, float("nan"))):
        values = {"eps": torch.tensor(eps, dtype=torch.float64), "n": torch.tensor(n, dtype=torch.float64)}
        with pytest.raises(ValueError, match="damaged state of Statistics"):
            Statistics.from_state_dict(state | values)
