"""Students tuned on preferences: what they and their teacher read, TRL's own result, kills, refusals."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="the experiments are run by its trainers")
from trl import DPOConfig, DPOTrainer

from bird.lab.language import training as runs
from bird.lab.language.data import Preference
from bird.lab.language.data.positivity import LEAD
from bird.lab.language.models import load_network
from bird.lab.language.policies import log_probabilities, train_policy
from bird.lab.language.preference import _material, _read, spoken
from bird.lab.language.recipe import Data, Training
from bird.lab.language.training import restore
from bird.language import Guidance
from tests.bird.tiny import bytes_tokenizer, guidance, letters_tokenizer, saved, student

PAIRS = [Preference(f"film {i} is", " good" + "!" * (i % 3), " bad" + "?" * (i % 2)) for i in range(12)]
TRAINING = Training(epochs=2, batch_size=4, micro_batch=2, lr=1e-3, max_length=60)


def test_safety_reads_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PKU-SafeRLHF as local files, below BIRD_DATA."""
    rows = [
        {
            "prompt": f"how {i}?", "response_0": f"so {i}", "response_1": f"never {i}", "is_response_0_safe": False,
            "is_response_1_safe": True, "better_response_id": 0, "safer_response_id": 1,
        }
        for i in range(3)
    ]  # fmt: skip
    folder = tmp_path / "pku-saferlhf"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.setenv("BIRD_DATA", str(tmp_path))
    found = _material(Data("pku-saferlhf", held_out=2), 0, None)
    assert [prompt[0]["content"] for prompt in found.prompts] == ["how 0?", "how 1?"]
    assert found.pairs[0].chosen == [{"role": "assistant", "content": "never 0"}]
    assert found.texts == ["never 0", "never 1"]
    assert {label for *_, label in found.taught} == {0, 1}


def test_conversations_are_read_as_the_student_speaks_them() -> None:
    _, tokenizer = load_network(saved("decoder"), "causal")
    prompt, response = [{"role": "user", "content": "how?"}], [{"role": "assistant", "content": "so."}]
    asked, said = spoken(tokenizer, prompt, response)
    assert "how?" in asked
    assert "so." in said
    ids = tokenizer.apply_chat_template([*prompt, *response], tokenize=True, return_dict=True)["input_ids"]
    assert asked + said == tokenizer.decode(ids, skip_special_tokens=True)
    assert spoken(tokenizer, "as it ", "stands") == ("as it ", "stands")


def test_the_teacher_reads_the_end_without_the_lead() -> None:
    tokenizer = letters_tokenizer()
    assert _read(tokenizer, 100, f"{LEAD} it is", " so good") == "it is so good"
    assert _read(tokenizer, 6, "it is", " so good") == "o good"
    assert _read(tokenizer, 13, "it is", " so good") == "it is so good"


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], tolerance: float = 0) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("clipped", [None, 0.0, 1e-9])
def test_a_policy_is_what_trls_trainer_makes(clipped: float | None, tmp_path: Path) -> None:
    from datasets import Dataset

    model, reference, training = student(), student(), replace(TRAINING, max_grad_norm=clipped)
    history = train_policy(model, bytes_tokenizer(), PAIRS, training, tmp_path / "ours", seed=3)
    arguments = DPOConfig(
        str(tmp_path / "theirs"), per_device_train_batch_size=4, num_train_epochs=2, learning_rate=1e-3, beta=0.1,
        lr_scheduler_type="cosine", max_length=60, seed=3, use_cpu=True, report_to="none", save_strategy="no",
        bf16=False, disable_tqdm=True, logging_steps=1, **({} if clipped is None else {"max_grad_norm": clipped}),
    )  # fmt: skip
    rows = Dataset.from_list([vars(pair) for pair in PAIRS])
    plain = student()
    trainer = DPOTrainer(plain, reference, args=arguments, train_dataset=rows, processing_class=bytes_tokenizer())
    trainer.train()
    assert_equal(weights(model), weights(plain), 2e-6)
    assert [row["loss"] for row in history["train"]] == pytest.approx(
        [row["loss"] for row in trainer.state.log_history if "loss" in row], rel=1e-4
    )
    assert len(history["train"]) == 6
    again = student(seed=9)
    restore(again, tmp_path / "ours/policy.safetensors")
    assert_equal(weights(again), weights(model))
    assert not list((tmp_path / "ours").glob("checkpoint-*"))


def test_log_probabilities_of_responses(tmp_path: Path) -> None:
    """Against the model's own, one text at a time: the response's tokens, and the end that TRL adds."""
    model, tokenizer = student(), bytes_tokenizer()
    found = log_probabilities(model, tokenizer, PAIRS, TRAINING, tmp_path)
    for side in ("chosen", "rejected"):
        for pair, value in zip(PAIRS, found[side], strict=True):
            response = getattr(pair, side)
            ids = torch.tensor([tokenizer(f"{pair.prompt}{response}<end>")["input_ids"]])
            with torch.no_grad():
                each = model(ids).logits[0, :-1].log_softmax(1).gather(1, ids[0, 1:, None])
            assert value == pytest.approx(each[len(str(pair.prompt)) - 1 :].sum().item(), rel=1e-5)


@pytest.mark.parametrize("adapters", [0, 4])
def test_a_killed_policy_goes_on(adapters: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(epochs=2, batch_size=4, micro_batch=2, lr=1e-3, max_length=60, adapters=adapters)

    def train(folder: str, **more: Any) -> torch.nn.Module:
        model = student()
        options: dict[str, Any] = {"guidance": guidance(), "seed": 1, "save_every": 2}
        train_policy(model, bytes_tokenizer(), PAIRS, training, tmp_path / folder, **options | more)
        found = student(seed=8)
        restore(found, tmp_path / folder / "policy.safetensors")
        return found

    whole = train("whole")
    log = runs.Watch.on_log

    def killed(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        log(self, args, state, control, **more)
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.Watch, "on_log", killed)
        with pytest.raises(KeyboardInterrupt):
            train("parts")
    assert [path.name for path in (tmp_path / "parts").glob("checkpoint-*")] == ["checkpoint-4"]
    steps: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(runs.Watch, "on_log", lambda self, args, state, *_, **more: steps.append(state.global_step))
        assert_equal(weights(train("parts")), weights(whole))
    assert steps[0] == 5, "it went on, and did not begin again"
    if adapters:
        before = dict(student().named_parameters())
        assert any(not torch.equal(after, before[name]) for name, after in whole.named_parameters()), "merged"


def test_folders_of_other_runs_and_damaged_weights_are_refused(tmp_path: Path) -> None:
    train_policy(student(), bytes_tokenizer(), PAIRS[:4], TRAINING, tmp_path)
    with pytest.raises(ValueError, match=r"of another run \(seed was "):
        train_policy(student(), bytes_tokenizer(), PAIRS[:4], TRAINING, tmp_path, seed=1)
    with pytest.raises(ValueError, match=r"of another run \(guidance was "):
        train_policy(student(), bytes_tokenizer(), PAIRS[:4], TRAINING, tmp_path, guidance=guidance())
    path = tmp_path / "policy.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"policy\.safetensors is damaged.*delete its folder"):
        train_policy(student(), bytes_tokenizer(), PAIRS[:4], TRAINING, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    broken = student()
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="at step 1; a lower lr may help"):
        train_policy(broken, bytes_tokenizer(), PAIRS[:4], TRAINING, tmp_path)


def test_guidance_of_a_frozen_copy(tmp_path: Path) -> None:
    """A student may be guided by what it was; the copy stays."""
    model = student()
    teacher = copy.deepcopy(model)
    before = weights(teacher)
    history = train_policy(
        model, bytes_tokenizer(), PAIRS, TRAINING, tmp_path, guidance=Guidance(teacher, bytes_tokenizer(), 1.0, 1.0)
    )
    assert history["train"][0]["cka"] == pytest.approx(1, abs=1e-5)
    assert history["train"][-1]["cka"] < 1
    assert_equal(weights(teacher), before)
