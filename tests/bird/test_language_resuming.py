"""Responses that are kept on the way: what a kill leaves is taken up, and what belongs to something else is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="an extra: pip install bird-kernels[language]")

from bird.lab.language.generation import generate
from bird.lab.stages import Lines
from tests.bird.tiny import Calls, causal
from tests.bird.tiny import words_tokenizer as tokenizer

PROMPTS = ["w1", "w2 w3 w4 w5 w6 w7 w8", "w9 w1", "w10 w11 w12 w13", "w4 w4 w4", "w20 w2 w19 w3 w18"]


@pytest.fixture(scope="module")
def model(device: torch.device) -> Any:
    return causal().to(device)


def test_an_interrupted_run_goes_on_and_repeats_nothing(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, path = tokenizer(), tmp_path / "deep" / "responses.jsonl"
    options: dict[str, Any] = {"max_new_tokens": 10, "batch_size": 2, "seed": 5}
    truth = generate(model, words, PROMPTS, **options)
    with monkeypatch.context() as patch:
        calls = Calls(model, patch, fail_after=2)
        with pytest.raises(KeyboardInterrupt):
            generate(model, words, PROMPTS, path=path, **options)
        assert calls.prefills == [2, 2]
    whole = path.read_bytes()
    assert whole.count(b"\n") == 4
    for torn in (b"", b'{"index": 4, "prompt": "', whole.splitlines()[-1]):  # the last one lacks its newline only
        path.write_bytes(whole + torn)
        with monkeypatch.context() as patch:
            calls = Calls(model, patch)
            assert generate(model, words, PROMPTS, path=path, **options) == truth
            assert calls.prefills == [2]
            assert generate(model, words, PROMPTS, path=path, **options | {"batch_size": 6}) == truth
            assert calls.prefills == [2], "what was kept is not generated again"
        assert path.read_bytes().startswith(whole)
        assert len(Lines(path).rows) == 6
    rows = Lines(path).rows
    rows[1]["response"] = "kept"  # what is there is taken, not made anew
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert generate(model, words, PROMPTS, path=path, **options) == [truth[0], "kept", *truth[2:]]


def test_a_torn_first_line_starts_over(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    path.write_text('{"ind')
    found = generate(model, tokenizer(), PROMPTS, path=path, max_new_tokens=3)
    assert generate(model, tokenizer(), PROMPTS, path=path, max_new_tokens=3) == found
    assert len(Lines(path).rows) == 6


def test_a_file_of_something_else_is_refused_and_stays(model: Any, tmp_path: Path) -> None:
    """Of other prompts, that is; other settings and weights have a stage of another name, and so another folder."""
    words, path = tokenizer(), tmp_path / "responses.jsonl"
    options: dict[str, Any] = {"max_new_tokens": 4, "path": path}
    truth = generate(model, words, PROMPTS, **options)
    path.write_bytes(path.read_bytes() + b'{"torn')
    before = path.read_bytes()
    for prompts in ([*PROMPTS[:-1], "w1 w1"], PROMPTS[:-1]):
        with pytest.raises(ValueError, match=r"responses\.jsonl is damaged, or answers other prompts: delete it"):
            generate(model, words, prompts, **options)
    assert path.read_bytes() == before
    for text, said in (
        ("notes\n", "line 1 is not a JSON object"),
        ("[1]\n", "line 1 is not a JSON object"),
        ('{"a": 1}\n', "answers other prompts"),
        ('{"index": 6}\n', "answers other prompts"),
        ('{"index": 1, "prompt": "x", "response": ""}\n', "answers other prompts"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            generate(model, words, PROMPTS, **options)
        assert path.read_text() == text
    path.write_text('{"responses": {"seed": 0}}\n' + before.decode().splitlines()[0] + "\n")  # as once they began
    assert generate(model, words, PROMPTS, **options) == truth


def test_lines_that_a_full_disk_cut_are_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines.jsonl"
    lines = Lines(path)
    lines.append({"a": "\u2028\n"})

    def full(descriptor: int) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="disk"):
            lines.append({"b": 2}, {"c": 3})
    lines.append({"d": 4})
    assert Lines(path).rows == [{"a": "\u2028\n"}, {"d": 4}]
