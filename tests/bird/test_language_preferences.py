"""Preferences in TRL's formats and of PKU-SafeRLHF: values and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bird.lab.language.data import Preference, columns
from bird.lab.language.data.preferences import Answer, pku_answers, pku_preferences, preferences
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
    assert columns([Preference("a", "b", "c")]) == {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}


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
    ({"prompt": "p", "chosen": "a"}, r"has no 'rejected'; it has \['chosen', 'prompt'\]"),
    (GOOD | {"chosen": 3}, "chosen must be a string or a list of messages"),
    (GOOD | {"chosen": [{"content": "x"}]}, "chosen must be a string or a list of messages"),
    (GOOD | {"rejected": answer("b")}, "chosen and rejected must both be strings"),
    (GOOD | {"prompt": say("q")}, "the prompt is a list of messages, chosen and rejected are strings"),
]


@pytest.mark.parametrize(("row", "message"), NOTHING)
def test_rows_that_prefer_nothing_are_refused_or_dropped(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    if row.get("chosen") == []:
        row = row | {"prompt": say("q"), "rejected": answer("b")}
    path = write_lines(tmp_path / "train.jsonl", [GOOD, row])
    with pytest.raises(ValueError, match=rf"train\.jsonl, train row 1: {message} \(drop=True"):
        preferences(path)
    with pytest.warns(UserWarning, match=f"1 of 2 rows dropped, the first row 1: {message}"):
        assert preferences(path, drop=True) == [Preference("p", "a", "b")]


@pytest.mark.parametrize(("row", "message"), WRONG)
def test_rows_that_are_no_preferences_are_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", [GOOD, row])
    for drop in (False, True):
        with pytest.raises(ValueError, match=rf"train\.jsonl, train row 1:? {message}"):
            preferences(path, drop=drop)


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

    def pair(prompt: str, chosen: str, rejected: str) -> Preference:
        return Preference(say(prompt), answer(chosen), answer(rejected))

    safer = [("q1", "help", "harm"), ("q2", "fine", "finer"), ("q2", "fine", "harm"), ("q1", "help", "harm")]
    assert pku_preferences(tmp_path) == [pair(*row) for row in safer]
    assert pku_preferences(tmp_path, by="better")[:2] == [pair("q1", "harm", "help"), pair("q2", "finer", "fine")]
    assert pku_preferences(tmp_path, "test") == [pair("q2", "fine", "finer")]
    assert pku_answers(tmp_path) == [
        Answer("q1", "help", True),
        Answer("q2", "fine", True),
        Answer("q2", "finer", True),
        Answer("q2", "harm", False),
        Answer("q3", "same", False),
        Answer("q3", "same ", False),
    ]
    with pytest.raises(ValueError, match="by must be 'safer' or 'better', got 'best'"):
        pku_preferences(tmp_path, by="best")
    for change, message in (
        ({"safer_response_id": -1}, "safer_response_id must be 0 or 1, got -1"),
        ({"safer_response_id": True}, "safer_response_id must be 0 or 1, got True"),
        ({"response_1": None}, "response_1 must be a text, got None"),
    ):
        path = write_lines(tmp_path / "train.jsonl", [rows[0], rows[0] | change])
        with pytest.raises(ValueError, match=f"train row 1: {message}"):
            pku_preferences(path)
    path = write_lines(tmp_path / "train.jsonl", [rows[0] | {"is_response_1_safe": 1}])
    with pytest.raises(ValueError, match="train row 0: is_response_1_safe must be true or false, got 1"):
        pku_answers(path)
