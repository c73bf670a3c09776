"""Preferences in TRL's formats and of PKU-SafeRLHF: values and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bird.lab.language.data import Labelled, Material, Preference
from bird.lab.language.data.preferences import pku_material, preference_material, preferences
from tests.bird.test_language_data import write_lines


def say(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def answer(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


def test_preferences_in_all_of_their_formats(tmp_path: Path) -> None:
    rows = [
        {"prompt": "It is", "chosen": " good", "rejected": " bad", "score": 1},
        {"prompt": None, "chosen": "Human: hi Assistant: yes", "rejected": "Human: hi Assistant: no"},
        {"prompt": say("hi"), "chosen": answer("yes"), "rejected": answer("no")},
        {"chosen": say("hi", "ho", "who?", "you"), "rejected": say("hi", "ho", "who?", "me")},
        {"prompt": "hi", "chosen": say("hi", "yes"), "rejected": say("hi", "no")},
    ]
    assert preferences(write_lines(tmp_path / "train.jsonl", rows)) == [
        Preference("It is", " good", " bad"),
        Preference("Human: hi Assistant:", " yes", " no"),
        Preference(say("hi"), answer("yes"), answer("no")),
        Preference(say("hi", "ho", "who?"), answer("you"), answer("me")),
        Preference(say("hi"), answer("yes"), answer("no")),
    ]


GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}
NOTHING = [
    (GOOD | {"rejected": "a"}, "chosen and rejected are equal"),
    (GOOD | {"rejected": " "}, "rejected is empty"),
    (GOOD | {"chosen": []}, "chosen is empty"),
    (GOOD | {"prompt": ""}, "prompt is empty"),
    ({"chosen": "a", "rejected": "b"}, "chosen and rejected share no beginning"),
    ({"prompt": [], "chosen": answer("a"), "rejected": answer("b")}, "prompt is empty"),
    ({"chosen": say("q", ""), "rejected": say("q", "b")}, "chosen is empty"),
]
WRONG = [
    ({"prompt": "p", "chosen": "a"}, r"there is no 'rejected'; it has \['chosen', 'prompt'\]"),
    (GOOD | {"chosen": 3}, "chosen must be a string or a list of messages"),
    (GOOD | {"chosen": [{"content": "x"}]}, "chosen must be a string or a list of messages"),
    (GOOD | {"rejected": answer("b")}, "chosen and rejected must both be strings"),
    (GOOD | {"prompt": say("q")}, "the prompt is a list of messages, chosen and rejected are strings"),
]


@pytest.mark.parametrize(("row", "message"), NOTHING)
def test_rows_that_prefer_nothing_are_left_out(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    if row.get("chosen") == []:
        row = row | {"prompt": say("q"), "rejected": answer("b")}
    path = write_lines(tmp_path / "train.jsonl", [GOOD, row])
    with pytest.warns(UserWarning, match=f"1 of 2 rows dropped, the first row 1: {message}"):
        assert preferences(path) == [Preference("p", "a", "b")]


@pytest.mark.parametrize(("row", "message"), WRONG)
def test_rows_that_are_no_preferences_are_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", [GOOD, row])
    with pytest.raises(ValueError, match=rf"train\.jsonl, train row 1:? {message}"):
        preferences(path)


def pku(prompt: str, responses: tuple[str, str], safe: tuple[bool, bool], better: int, safer: int) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "response_0": responses[0],
        "response_1": responses[1],
        "prompt_source": "x",
        "is_response_0_safe": safe[0],
        "is_response_1_safe": safe[1],
        "better_response_id": better,
        "safer_response_id": safer,
    }


def test_pku(tmp_path: Path) -> None:
    rows = [
        pku("q1", ("harm", "help"), (False, True), 0, 1),
        pku("q2", ("fine", "finer"), (True, True), 1, 0),
        pku("q2", ("fine", "harm"), (True, False), 0, 0),
        pku("q3", ("same", "same "), (False, False), 0, 1),
        pku("q1", ("help", "harm"), (True, True), 0, 0),  # judges who disagree about "harm"
    ]
    write_lines(tmp_path / "data" / "Alpaca-7B" / "train.jsonl", rows)
    write_lines(tmp_path / "data" / "Alpaca-7B" / "test.jsonl", rows[1:2])

    def taught(prompt: str, response: str, label: int) -> tuple[Any, Any, int]:
        return say(prompt), answer(response), label

    safer = [("q1", "help", "harm"), ("q2", "fine", "finer"), ("q2", "fine", "harm"), ("q1", "help", "harm")]
    assert pku_material(tmp_path, None) == Material(
        pairs=[Preference(say(prompt), answer(good), answer(bad)) for prompt, good, bad in safer],
        prompts=[say("q2")],
        texts=["fine", "finer"],
        taught=[
            taught("q1", "help", 1),
            taught("q2", "fine", 1),
            taught("q2", "finer", 1),
            taught("q2", "harm", 0),
            taught("q3", "same", 0),
            taught("q3", "same ", 0),
        ],
        judged=[],
        tested=[Preference(say("q2"), answer("fine"), answer("finer"))],
    )
    assert pku_material(tmp_path, 1).texts == ["fine"]
    for change, message in (
        ({"safer_response_id": -1}, "safer_response_id must be 0 or 1, got -1"),
        ({"safer_response_id": True}, "safer_response_id must be of type int and not empty, got True"),
        ({"response_1": None}, "response_1 must be of type str and not empty, got None"),
        ({"is_response_1_safe": 1}, "is_response_1_safe must be of type bool and not empty, got 1"),
    ):
        write_lines(tmp_path / "train.jsonl", [rows[0], rows[0] | change])
        with pytest.raises(ValueError, match=f"train row 6: {message}"):  # after the five of the other file
            pku_material(tmp_path, None)


def test_material_of_any_preferences(tmp_path: Path) -> None:
    """The teacher learns what was chosen, from pairs that no student gets; what is held out is the test split's."""
    for split, count in (("train", 9), ("test", 4)):
        rows = [{"prompt": f"{split}{i}:", "chosen": f" a{i}", "rejected": f" b{i}"} for i in range(count)]
        write_lines(tmp_path / f"{split}.jsonl", rows)
    made = preference_material(tmp_path, 0, 3)
    assert made.prompts == ["test0:", "test1:", "test2:"]
    assert made.texts == ["test0: a0", "test1: a1", "test2: a2"]
    assert [pair.prompt for pair in made.tested] == ["test0:", "test1:", "test2:", "test3:"]
    assert len(made.pairs) == 5
    shown = {str(prompt) for prompt, *_ in made.taught}
    assert shown | {str(pair.prompt) for pair in made.pairs} == {f"train{i}:" for i in range(9)}
    assert len(shown) == 4
    assert all(label == (" a" in str(text)) for _, text, label in made.taught)
    assert made.judged == [Labelled(str(text), label) for _, text, label in made.taught]
    assert preference_material(tmp_path, 1, None).pairs != made.pairs
