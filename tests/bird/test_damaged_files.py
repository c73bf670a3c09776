"""Files that are cut or changed end in one ValueError that names them, or change nothing: mutations of each kind."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from bird import files
from bird.lab import cli, tensors
from bird.lab.stages import Lines, Stage
from bird.lab.tensors import load_array, load_tensors, save_tensors
from bird.lab.vision.datasets.batches import read_binary, read_dicts
from bird.lab.vision.datasets.folders import read_tiny_imagenet
from bird.lab.vision.datasets.grey import read_idx
from bird.lab.vision.datasets.unpickling import load_batch
from bird_kernels import Statistics
from tests.bird.damage import complaint, mutated

RESULT = {
    "clean": 0.5,
    "corrupted": {"fog": [0.25, 1e-7]},
    "right": [1, 0, 1],
    "responses": ["a\n", "\u2028"],
    "n": None,
}
LANGUAGE = "an extra: bird-kernels[language]"


class Artefact(NamedTuple):
    """A file as it is written, and its reader; the share of mutations that is refused at least."""

    path: Path
    read: Callable[[], Any]
    least: float
    exact: bool = False  # what is read is what was written
    whose: Path | None = None  # transformers' own errors may speak of the folder
    count: int = 300


def result(folder: Path) -> Artefact:
    stage = Stage("score", {"lr": 0.1}, lambda folder: RESULT)
    stage.folder(folder).mkdir()
    stage._complete(folder)
    return Artefact(stage.folder(folder) / "result.json", lambda: stage.result(folder), 0.8, True)


def stage(folder: Path) -> Artefact:
    path = result(folder).path.with_name("stage.json")
    return Artefact(path, lambda: tensors.read_checked(path, "delete it"), 0.8, True)


def lines(folder: Path) -> Artefact:
    path = folder / "lines.jsonl"
    Lines(path).append(RESULT, {"index": 1, "text": "x" * 300})
    return Artefact(path, lambda: Lines(path), 0.3)


def rows(folder: Path, name: str = "train.json") -> Artefact:
    read_rows = pytest.importorskip("bird.lab.language.data.files", reason=LANGUAGE).read_rows
    path, written = folder / name, [{"prompt": "p ä", "chosen": "c" * 90, "rejected": "r"}] * 4
    path.write_text("\n".join(map(json.dumps, written)) if name.endswith("l") else json.dumps(written))
    return Artefact(path, lambda: read_rows(path, "train"), 0.3)


def rows_by_lines(folder: Path) -> Artefact:
    return rows(folder, "train.jsonl")


def shapes(folder: Path) -> Artefact:
    path = folder / "shapes.json"
    files.write_json([[64, 128, 512, "float32"], [64, 128, 512, "bfloat16"]], path)
    return Artefact(path, lambda: cli._noted_shapes(folder), 0.3)


def tensor(folder: Path) -> Artefact:
    path = folder / "model.pt"
    save_tensors({"w": torch.arange(200.0)}, path)
    return Artefact(path, lambda: load_tensors(path)["w"].tolist(), 0.5, True)


def array(folder: Path) -> Artefact:
    np.save(folder / "a.npy", np.arange(60, dtype=np.uint8).reshape(5, 12))
    return Artefact(folder / "a.npy", lambda: [load_array(folder / "a.npy", mode) for mode in (None, "r")], 0.3)


class Pair(nn.Module):
    """Two matrices, one of them shared."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8, bias=False)
        self.two = nn.Linear(8, 8, bias=False)
        self.two.weight = self.one.weight


def weights(folder: Path) -> Artefact:
    """Without their checksum damage has a name where it shows."""
    runs: Any = pytest.importorskip("bird.lab.language.training", reason=LANGUAGE)
    from safetensors.torch import save_model

    model, path = Pair(), folder / "policy.safetensors"
    save_model(model, str(path))
    return Artefact(path, lambda: (runs.restore(model, path), model.two.weight.tolist())[1], 0.0)


def weights_with_checksum(folder: Path) -> Artefact:
    runs: Any = pytest.importorskip("bird.lab.language.training", reason=LANGUAGE)
    model, path = Pair(), folder / "policy.safetensors"
    runs.finish_run(model, path, {"train": []})
    return Artefact(path, lambda: (runs.restore(model, path), model.two.weight.tolist())[1], 0.9, True)


def history(folder: Path) -> Artefact:
    runs: Any = pytest.importorskip("bird.lab.language.training", reason=LANGUAGE)
    model, path = Pair(), weights_with_checksum(folder).path
    return Artefact(path.with_name("history.json"), lambda: runs.finished_run(model, path, "cpu"), 0.5, True)


def network(folder: Path) -> Artefact:
    models: Any = pytest.importorskip("bird.lab.language.models", reason=LANGUAGE)
    pytest.importorskip("transformers", reason=LANGUAGE)
    from tests.bird.tiny import saved

    path = Path(shutil.copytree(saved("encoder"), folder / "network"))
    read = lambda: models.load_network(str(path), "encoder")  # noqa: E731
    return Artefact(path / "model.safetensors", read, 0.3, whose=path, count=60)


def gguf(folder: Path) -> Artefact:
    """Of a file that is short of a network, too: each mutation of it is refused."""
    writers = pytest.importorskip("gguf", reason=LANGUAGE)
    models: Any = pytest.importorskip("bird.lab.language.models", reason=LANGUAGE)
    path = folder / "network.gguf"
    writer = writers.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(8)
    writer.add_tensor("token_embd.weight", torch.ones(8, 8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def read() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(models, "locate_network", lambda name: path)
            return models.load_network("smollm2-135m", "causal")

    return Artefact(path, read, 1.0, whose=folder, count=60)


ARTEFACTS = (result, stage, lines, rows, rows_by_lines, shapes, tensor, array, weights, weights_with_checksum, history)


@pytest.mark.parametrize("make", [*ARTEFACTS, network, gguf], ids=lambda make: make.__name__)
def test_damage_is_named_or_changes_nothing(make: Callable[[Path], Artefact], tmp_path: Path) -> None:
    made = make(tmp_path)
    whole, refused = made.path.read_bytes(), 0
    truth = made.read() if made.exact else None
    kinds = (ValueError, FileNotFoundError) if made.whose else (ValueError,)
    for seed in range(made.count):
        made.path.write_bytes(mutated(whole, seed))
        said = complaint(made.read, kinds)
        assert said is None or (made.path.name if made.whose is None else str(made.whose)) in said, f"mutation {seed}"
        assert said is not None or not made.exact or made.read() == truth, f"mutation {seed}"
        refused += said is not None
    assert refused >= made.least * made.count
    if made.whose is None:
        made.path.write_bytes(whole)
        made.read()


@pytest.mark.parametrize(
    ("make", "content", "said"),
    [
        (result, '{"clean": 0.', r"score-\w+/result\.json is damaged .*: delete it, and it is made again"),
        (result, "[" * 100_000, r"result\.json is damaged"),
        (lines, "[" * 100_000 + "\n", r"lines\.jsonl: line 1 is not a JSON object"),
        (rows, b'{"a": "\xff"}', r"train\.json.*not JSON"),
        (rows_by_lines, b'{"a": "\xff"}', r"train\.jsonl.*not JSON"),
        *[
            (shapes, text, r"shapes\.json is damaged")
            for text in ("{}", "3", "[[1, 2, 3]]", '[[1, 2, "3", "float32"]]', "[[1, 2, 3, 4]]", "[[1, 2, true, []]]")
        ],
        (shapes, "[null]", r"shapes\.json is damaged"),
    ],
)
def test_what_is_said_of_chosen_damage(make: Any, content: str | bytes, said: str, tmp_path: Path) -> None:
    made = make(tmp_path)
    made.path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=said):
        made.read()


def test_missing_weights_are_no_damage(tmp_path: Path) -> None:
    made = weights_with_checksum(tmp_path)
    made.path.unlink()
    with pytest.raises(FileNotFoundError):
        made.read()


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
    for _ in range(300):
        broken: dict[Any, Any] = dict(state)
        name = draw.choice(list(state))
        if draw.random() < 0.2:
            broken.pop(name)
        else:
            broken[name] = draw.choice(changes)(broken[name])
        said = complaint(lambda broken=broken: Statistics.from_state_dict(broken).cka("unbiased"))  # type: ignore[misc]
        assert said is None or "tate of Statistics" in said
        refused += said is not None
    assert refused > 0.8 * 300
    assert Statistics.from_state_dict(state).cka() == statistics.cka()
    for odd in ({"xx": -state["xx"]}, {"yy": -state["yy"]}, {"xy": state["xy"].float()}):
        with pytest.raises(ValueError, match="damaged state of Statistics"):
            Statistics.from_state_dict(state | odd)
    for eps, n in ((float("nan"), 9.0), (1e-7, float("inf")), (1e-7, 2.5), (1e-7, float("nan"))):
        values = {"eps": torch.tensor(eps, dtype=torch.float64), "n": torch.tensor(n, dtype=torch.float64)}
        with pytest.raises(ValueError, match="damaged state of Statistics"):
            Statistics.from_state_dict(state | values)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are of POSIX")
def test_a_pipe_is_refused_unopened(tmp_path: Path) -> None:
    readers: dict[str, Callable[[Path], object]] = {
        "x-ubyte": read_idx,
        "x-ubyte.gz": read_idx,
        "x_batch": load_batch,
        "x.npz": lambda path: read_dicts([path], (1, 1)),
        "x.bin": lambda path: read_binary([path], (1, 1), label_bytes=1),
        "x.txt": lambda path: read_tiny_imagenet([path] * 4, (1, 1)),
    }
    for name, read in readers.items():
        path = tmp_path / name
        os.mkfifo(path)
        with open(path, "r+b", buffering=0) as end:  # noqa: PTH123
            rescue = threading.Timer(2, end.close)  # of a reader that opens the pipe, which would wait for ever
            rescue.start()
            with pytest.raises(ValueError, match=rf"{name} is no file"):
                read(path)
            rescue.cancel()
