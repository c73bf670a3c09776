"""Code that lies in a model's folder does not run, whatever stands on standard input."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="an extra: pip install bird-kernels[language]")

from bird.lab.language.models import load_network
from tests.bird.tiny import saved

CODE = """
from pathlib import Path
Path({mark!r}).write_text("it ran")
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize("head", ["causal", "encoder"])
def test_code_of_a_folder_does_not_run(head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, mark = tmp_path / "own", tmp_path / "mark"
    folder.mkdir()
    for path in Path(saved("decoder")).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(ValueError, match="wants to run code of its own, which is not done here"):
        load_network(str(folder), head)
    assert not mark.exists()
