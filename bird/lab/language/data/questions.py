"""Binary questions for weak-to-strong learning, constructed as described by Burns et al. (arXiv 2312.09390).

A question and an answer to it are one text, and the label says whether the answer is right; both classes are equally
frequent. Two need no network: ``"sentiment"``, a sentence of a movie review, and whether people found it positive, and
``"wordnet-glosses"``, a definition and a word, and whether it is the word that is defined.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from . import Labelled, balance, glosses, random_halves, random_parts
from .files import Record, field_of, local_or_hub, read_each, read_rows
from .snippets import snippets

TEST_SEED = 0  # the test set is the same for every seed
MARGIN = 0.5  # of 4: sentences between -0.5 and 0.5 are left out of "sentiment"
SENTIMENT_TEST = 0.2
NONE_OF_THEM = "None of the above choices"  # an answer in Cosmos QA, which says nothing about the text


@dataclass(frozen=True)
class Questions:
    """Training rows in two halves, and a test set that the seed does not change.

    Args:
        weak: with true labels, for the weak teacher.
        strong: for the strong student, which learns the teacher's labels; the true ones give the upper bound.
        test: to evaluate all of them.
        validation: to choose settings by, as the test set apart from the others; empty where a set has none.
    """

    weak: list[Labelled]
    strong: list[Labelled]
    test: list[Labelled]
    validation: list[Labelled] = field(default_factory=list)


def questions(name: str, seed: int = 0, root: Path | str | None = None, *, words: int | None = None) -> Questions:
    """Balanced binary questions: one row for each published question, without the surplus of one class.

    Args:
        name: ``"sciq"``, ``"boolq"``, ``"cosmos_qa"``, ``"sentiment"`` or ``"wordnet-glosses"``.
        seed: decides the halves, and which answers the training questions get.
        root: the data folder (None: ``BIRD_DATA``, else ``data``). Its folder of that name, with ``train.jsonl`` and
            ``test.jsonl`` (``validation.jsonl`` for BoolQ and Cosmos QA, whose test labels are not public) of the
            published fields, is read if it is there, else the hub.
        words: leave out texts of more words, before the classes are balanced; None for none.

    Raises:
        FileNotFoundError: no such folder, and the hub cannot be reached.
        ValueError: an unknown name, or a row that is not as published (the error says which).
    """
    if name == "wordnet-glosses":
        train_senses, *held_out = glosses.parts(root, words)
        halves = random_halves(train_senses, seed)  # no sense of a half, right or wrong, is in another part
        weak, strong = (glosses.asked(half, seed) for half in halves)
        validation, test = (glosses.asked(senses, TEST_SEED) for senses in held_out)
        return Questions(weak, strong, test, validation)
    if name == "sentiment":
        train, test = _sentiment(root)
    elif name in SETS:
        hub, test_split, ask = SETS[name]
        source = local_or_hub(name, hub, root)
        train, test = (
            _ask_all(ask, read_rows(source, part), part_seed, f"{source}, {part}")
            for part, part_seed in (("train", seed), (test_split, TEST_SEED))
        )
    else:
        raise ValueError(
            f"there are no questions {name!r}; there are {', '.join([*SETS, 'sentiment', 'wordnet-glosses'])}"
        )
    if words is not None:
        train, test = ([row for row in rows if len(row.text.split()) <= words] for rows in (train, test))
    weak, strong = random_halves(balance(train, seed), seed)
    return Questions(weak, strong, balance(test, TEST_SEED))


def _sentiment(root: Path | str | None) -> tuple[list[Labelled], list[Labelled]]:
    # A decoder answers at the last token of the question. There SmolLM2-135M as it is, with logistic regression on 480
    # training rows, is right on 86 % of 400 others; on 84 % without the words around the sentence.
    rows = [
        Labelled(f"Movie review: {row.text}\nSentiment:", int(row.score > 0))
        for row in snippets(root)
        if abs(row.score) > MARGIN
    ]
    count = round(SENTIMENT_TEST * len(rows))
    return random_parts(rows, len(rows) - count, TEST_SEED)


def _ask_all(
    ask: Callable[[Record, bool, random.Random], Labelled], rows: list[Record], seed: int, where: str
) -> list[Labelled]:
    """Ask every question once; a random half of them gets its right answer."""
    draw = random.Random(seed)
    right = [i % 2 == 0 for i in range(len(rows))]
    draw.shuffle(right)
    turns = iter(right)
    return read_each(rows, where, lambda row: ask(row, next(turns), draw))


def _text(row: Record, name: str) -> str:
    return str(field_of(row, name, str)).strip()


def _sciq(row: Record, right: bool, draw: random.Random) -> Labelled:
    wrong = draw.choice([_text(row, f"distractor{k}") for k in (1, 2, 3)])
    answer = _text(row, "correct_answer") if right else wrong
    return Labelled(f"Question: {_text(row, 'question')}\nAnswer: {answer}", int(right))


def _boolq(row: Record, right: bool, draw: random.Random) -> Labelled:
    passage, question = _text(row, "passage"), _text(row, "question").rstrip("?")
    return Labelled(f"Passage: {passage}\nQuestion: {question}?", int(field_of(row, "answer", bool)))


def _cosmos_qa(row: Record, right: bool, draw: random.Random) -> Labelled:
    answers = [_text(row, f"answer{k}") for k in range(4)]
    label = field_of(row, "label", int)
    if not 0 <= label < 4:
        raise ValueError(f"label must be 0, 1, 2 or 3, got {label}")
    if answers[label].startswith(NONE_OF_THEM):
        right = False  # balanced later by dropping
    wrong = [answer for k, answer in enumerate(answers) if k != label and not answer.startswith(NONE_OF_THEM)]
    answer = answers[label] if right else draw.choice(wrong)
    text = f"Context: {_text(row, 'context')}\nQuestion: {_text(row, 'question')}\nAnswer: {answer}"
    return Labelled(text, int(right))


# Hub id, the split with labels that tests, and from a row and whether to answer it rightly to a text.
SETS: dict[str, tuple[str, str, Callable[[Record, bool, random.Random], Labelled]]] = {
    "sciq": ("allenai/sciq", "test", _sciq),
    "boolq": ("google/boolq", "validation", _boolq),
    "cosmos_qa": ("allenai/cosmos_qa", "validation", _cosmos_qa),
}
