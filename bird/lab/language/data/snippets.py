"""Sentences with sentiment scores by people, read from the source distribution of vaderSentiment (MIT).

Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text" (ICWSM 2014):
each score is a mean over about 20 people, from -4 to 4. The package's wheel does not hold them, its source does.
"""

from __future__ import annotations

import html
import io
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

from ...recipe import data_root

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
COMMAND = "pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 -d $BIRD_DATA"


@dataclass(frozen=True)
class Snippet:
    """A sentence.

    Args:
        text: on one line, single spaces.
        score: how positive people found it, -4 to 4.
    """

    text: str
    score: float


def snippets(root: Path | str | None = None) -> list[Snippet]:
    """The sentences of movie reviews, in the published order, no text twice; nothing is unpacked on disk.

    HTML entities are resolved (some were escaped twice), two apostrophes become the quotation mark that they stand for,
    and white space becomes single spaces. Texts that then differ in case, spaces and punctuation only count as one: the
    first, with the mean of their scores. That leaves 10,603 of 10,605 rows of movie reviews.

    Args:
        root: the folder where the archive lies. None: ``BIRD_DATA``, else ``data`` in the working directory.

    Raises:
        FileNotFoundError: the archive was not found; says the command that downloads it.
        ValueError: the archive, or a row in it, is damaged.
    """
    folder = data_root(root)
    path = _find(folder)
    try:
        with tarfile.open(path) as outer, tarfile.open(fileobj=io.BytesIO(_member(outer, INNER))) as inner:
            lines = _member(inner, MEMBER).decode("utf-8").split("\n")
        rows = [_parse(line, i) for i, line in enumerate(lines, 1) if line.strip()]
        if not rows:
            raise ValueError("no rows")
    except (tarfile.TarError, OSError, EOFError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is broken: {MEMBER} in {INNER}: {error}\nto get it anew, remove it, then: {COMMAND}"
        ) from error
    return _once(rows)


def _find(folder: Path) -> Path:
    # Package indices differ in how they write the name.
    found = sorted(path for path in folder.glob("*.tar.gz") if path.name.lower() == ARCHIVE.lower())
    if not found:
        raise FileNotFoundError(
            f"{folder / ARCHIVE} is not there (--data or root=, or the environment variable BIRD_DATA)\n"
            f"to get it (2.4 MB, MIT licence): {COMMAND}"
        )
    return found[0]


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise ValueError(f"{name} is not a file")
    return file.read()


def _parse(line: str, number: int) -> Snippet:
    cells = line.rstrip("\r").split("\t")
    if len(cells) != 3:
        raise ValueError(f"line {number} has {len(cells)} cells, not id, score and text: {line[:60]!r}")
    try:
        score = float(cells[1])
    except ValueError as error:
        raise ValueError(f"line {number}: the score {cells[1]!r} is no number") from error
    if not -4 <= score <= 4:
        raise ValueError(f"line {number}: the score {score} is not between -4 and 4")
    return Snippet(clean(cells[2]), score)


def clean(text: str) -> str:
    """A text with entities resolved, two apostrophes as a quotation mark, and single spaces."""
    while (resolved := html.unescape(text)) != text:
        text = resolved
    return " ".join(text.replace("''", '"').split())


def _once(rows: list[Snippet]) -> list[Snippet]:
    copies: dict[str, list[Snippet]] = {}
    for row in rows:
        key = re.sub(r"\W+", "", row.text.casefold()) or row.text  # a text of punctuation alone is its own key
        if row.text:
            copies.setdefault(key, []).append(row)
    return [Snippet(same[0].text, sum(row.score for row in same) / len(same)) for same in copies.values()]
