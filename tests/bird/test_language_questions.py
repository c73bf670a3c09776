"""Questions and answers as rows with labels: SciQ, BoolQ, CosmosQA, and sentences by their sentiment."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bird.lab.language.data import Labelled
from bird.lab.language.data.questions import questions
from tests.bird.test_language_data import write_lines, write_snippets


def sciq(k: int) -> dict[str, str]:
    wrong = {f"distractor{j}": f"wrong{k}.{j}" for j in (1, 2, 3)}
    return {"question": f"what{k}?", "correct_answer": f"right{k}", "support": "s"} | wrong


def boolq(k: int) -> dict[str, Any]:
    return {"passage": f"passage {k}", "question": f"is it {k}", "answer": k % 3 == 0}


def cosmos(k: int) -> dict[str, Any]:
    answers = {f"answer{j}": f"a{k}.{j}" for j in range(4)} | {"answer3": "None of the above choices ."}
    return {"id": f"{k}", "context": f"story {k}", "question": f"why {k}?", "label": k % 4} | answers


def answers_of(rows: list[Labelled], begin: str) -> dict[int, tuple[str, int]]:
    found = {}
    for row in rows:
        head, text = row.text.split("\nAnswer: ")
        assert head.startswith(begin)
        found[int(head.removesuffix("?").split(begin)[1])] = (text, row.label)
    return found


def write_questions(root: Path) -> None:
    for name, make, part in (
        ("sciq", sciq, "test"),
        ("boolq", boolq, "validation"),
        ("cosmos_qa", cosmos, "validation"),
    ):
        write_lines(root / name / "train.jsonl", [make(k) for k in range(60)])
        write_lines(root / name / f"{part}.jsonl", [make(k) for k in range(100, 120)])


def test_sciq_asks_each_question_once(tmp_path: Path) -> None:
    write_questions(tmp_path)
    made = questions("sciq", 1, tmp_path)
    assert (len(made.weak), len(made.strong), len(made.test)) == (30, 30, 20)
    train = answers_of(made.weak + made.strong, "Question: what")
    test = answers_of(made.test, "Question: what")
    assert set(train) == set(range(60))
    assert set(test) == set(range(100, 120))
    for k, (text, label) in (train | test).items():
        assert text == f"right{k}" if label else text in {f"wrong{k}.{j}" for j in (1, 2, 3)}
    assert sum(label for _, label in train.values()) == 30
    assert sum(label for _, label in test.values()) == 10
    assert 0 < sum(train[k][1] for k in range(0, 60, 2)) < 30, "the place in the file gives the label away"
    assert len({text[-1] for text, label in train.values() if not label}) == 3, "always the same distractor"


def test_boolq_drops_the_surplus(tmp_path: Path) -> None:
    write_questions(tmp_path)
    made = questions("boolq", 0, tmp_path)
    train = made.weak + made.strong
    assert (len(made.weak), len(made.strong)) == (20, 20)
    assert Counter(row.label for row in train) == {0: 20, 1: 20}
    for row in train + made.test:
        k = int(row.text.removesuffix("?").split()[-1])
        assert row == Labelled(f"Passage: passage {k}\nQuestion: is it {k}?", int(k % 3 == 0))


def test_cosmos_qa_never_answers_that_no_answer_is_right(tmp_path: Path) -> None:
    write_questions(tmp_path)
    made = questions("cosmos_qa", 0, tmp_path)
    rows = made.weak + made.strong
    assert Counter(row.label for row in rows)[0] == len(rows) / 2 > 15
    for row in rows + made.test:
        head, text = row.text.split("\nAnswer: ")
        context, question = head.split("\nQuestion: ")
        k = int(context.removeprefix("Context: story "))
        assert question == f"why {k}?"
        assert text in {f"a{k}.{j}" for j in range(3)}
        assert row.label == (text == f"a{k}.{k % 4}")


@pytest.mark.parametrize("name", ["sciq", "boolq", "cosmos_qa", "sentiment"])
def test_the_seed_changes_the_halves_and_not_the_test(name: str, tmp_path: Path) -> None:
    write_questions(tmp_path)
    write_snippets(tmp_path, "\n".join(f"{k}\t{(k % 5) - 2.2:.1f}\treview {k}" for k in range(200)))
    first, again, other = (questions(name, seed, tmp_path) for seed in (0, 0, 1))
    assert first == again
    assert first.test == other.test
    assert {row.text for row in first.weak} != {row.text for row in other.weak}
    texts = [row.text for row in first.weak + first.strong + first.test]
    assert len(texts) == len(set(texts))


def test_sentiment_leaves_the_neutral_out(tmp_path: Path) -> None:
    scores = (-2.2, -1.2, -0.2, 0.8, 1.8)
    write_snippets(tmp_path, "\n".join(f"{k}\t{scores[k % 5]}\treview {k}" for k in range(200)))
    made = questions("sentiment", 0, tmp_path)
    assert len(made.test) >= 20
    rows = made.weak + made.strong + made.test
    assert len(rows) > 130
    for row in rows:
        text = row.text.removeprefix("Movie review: ").removesuffix("\nSentiment:")
        score = scores[int(text.removeprefix("review ")) % 5]
        assert abs(score) > 0.5
        assert row.label == (score > 0)
    for part in (made.weak + made.strong, made.test):
        assert sum(row.label for row in part) == len(part) / 2


def test_long_questions_are_left_out_before_the_classes_are_balanced(tmp_path: Path) -> None:
    # Negative sentences are longer, and half of them too long.
    rows = [f"{k}\t{-2 + 4 * (k % 2)}\tword {'more ' * (k % 4 == 2)}{k}" for k in range(200)]
    write_snippets(tmp_path, "\n".join(rows))
    short = questions("sentiment", 0, tmp_path, words=5)
    texts = [row.text for row in short.weak + short.strong + short.test]
    assert len(texts) < 110
    assert all(len(text.split()) == 5 for text in texts)
    for part in (short.weak + short.strong, short.test):
        assert sum(row.label for row in part) == len(part) / 2
    everything = questions("sentiment", 0, tmp_path, words=6)
    assert everything == questions("sentiment", 0, tmp_path)


def test_questions_that_are_not_as_published_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no questions 'mmlu'; there are sciq, boolq, cosmos_qa, sentiment"):
        questions("mmlu")
    for name, row, change, message in (
        ("sciq", sciq(1), {"distractor2": None}, "distractor2 must be of type str"),
        ("sciq", sciq(1), {"question": " "}, "question must be of type str and not empty"),
        ("boolq", boolq(1), {"answer": "yes"}, "answer must be of type bool"),
        ("cosmos_qa", cosmos(1), {"label": -1}, "label must be 0, 1, 2 or 3, got -1"),
        ("cosmos_qa", cosmos(1), {"label": True}, "label must be of type int"),
    ):
        write_lines(tmp_path / name / "train.jsonl", [row, row | change])
        with pytest.raises(ValueError, match=rf"{name}, train row 1: {message}"):
            questions(name, 0, tmp_path)
