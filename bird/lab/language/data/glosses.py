"""Definitions and words of WordNet 3.0: is this word the one that is defined?

Fellbaum, "WordNet: An Electronic Lexical Database" (MIT Press, 1998). Its data files come with Debian's package
wordnet-base; their format is that of the manual page wndb(5WN).
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ...recipe import data_root
from . import Labelled

FOLDER = "wordnet-base/usr/share/wordnet"  # below the data folder
INSTALLED = Path("/usr/share/wordnet")
COMMAND = "apt-get download wordnet-base && dpkg -x wordnet-base_*.deb $BIRD_DATA/wordnet-base"
KINDS = {"data.noun": "n", "data.verb": "v", "data.adj": "as", "data.adv": "r"}  # a file's types of synsets
SYNSET = re.compile(r"(\d{8}) (\d\d) ([nvasr]) ([0-9a-f]{2}) (.+?) \| (.+)")
WORDS = re.compile(r"(?:\S+ [0-9a-f] )+")
POINTERS = re.compile(r"(?:\S+ \d{8} [nvasr] [0-9a-f]{4} )*")
FRAMES = re.compile(r"(?:\+ \d\d [0-9a-f]{2} )*")
PLAIN = re.compile("[a-z]+")  # one word, and no name
SHARE = 0.1  # of the synsets that test, and of those that validate
RARE = 0.003  # of the synsets; a lexicographer file with fewer may have no other word in a part
SPLIT_SEED = 0


@dataclass(frozen=True)
class Synset:
    """A sense.

    Args:
        file: the number of its lexicographer file: a part of speech and a field, such as nouns of animals.
        words: those that have it, without marks of syntax, spaces as underscores.
        definition: its gloss up to the first example.
    """

    file: int
    words: tuple[str, ...]
    definition: str


def asked(synsets: Sequence[Synset], seed: int) -> list[Labelled]:
    """A row for each synset: its definition, with a word of it and with another synset's in turn, labelled 1 and 0.

    The wrong word has a sense of the same lexicographer file among ``synsets``. It is drawn as the right ones are, a
    synset and then one of its words, so that the word by itself says nothing.

    Args:
        synsets: as of `parts`.
        seed: draws the words.

    Raises:
        ValueError: a lexicographer file in which no other word was found.
    """
    draw, same = random.Random(seed), defaultdict(list)
    for synset in synsets:
        same[synset.file].append(synset)
    return [
        Labelled(
            _text(synset.definition, _wrong(synset, same[synset.file], draw) if i % 2 else draw.choice(synset.words)),
            1 - i % 2,
        )
        for i, synset in enumerate(synsets)
    ]


def _text(definition: str, word: str) -> str:
    return f"Definition: {definition}\nWord: {word}"  # the word comes last: its state tells whether it fits


def _wrong(synset: Synset, others: Sequence[Synset], draw: random.Random) -> str:
    for _ in range(100):
        word = draw.choice(draw.choice(others).words)
        if word not in synset.words and not _names(synset.definition, word):
            return word
    raise ValueError(f"lexicographer file {synset.file:02} has too few synsets: no other word for {synset.words[0]!r}")


@lru_cache(maxsize=2)
def parts(root: Path | str | None = None, words: int | None = None) -> tuple[list[Synset], list[Synset], list[Synset]]:
    """The synsets to train on, to validate on and to test on, in random order, the same for every seed.

    Left out are names and words of other than lower-case letters, words that their definition names, synsets without
    another word, those whose gloss begins with an example, all but the first of one definition, and rare lexicographer
    files.

    Args:
        root: the data folder (None: ``BIRD_DATA``, else ``data``), with the unpacked package in ``wordnet-base``; else
            the installed one is read.
        words: leave out synsets whose rows would have more words; None for none.

    Raises:
        FileNotFoundError: a file was not found; says the command that downloads it.
        ValueError: a line is not as the format has it; the error names it.
    """
    kept: dict[str, Synset] = {}
    for synset in _synsets(_folder(data_root(root))):
        plain = tuple(w for w in synset.words if PLAIN.fullmatch(w) and not _names(synset.definition, w))
        if (
            plain
            and '"' not in synset.definition
            and (words is None or len(_text(synset.definition, plain[0]).split()) <= words)
        ):
            kept.setdefault(synset.definition.casefold(), Synset(synset.file, plain, synset.definition))
    count = Counter(synset.file for synset in kept.values())
    rows = [synset for synset in kept.values() if count[synset.file] >= RARE * len(kept)]
    random.Random(SPLIT_SEED).shuffle(rows)
    size = round(SHARE * len(rows))
    return rows[2 * size :], rows[size : 2 * size], rows[:size]


def _names(definition: str, word: str) -> bool:
    return word in re.findall("[a-z]+", definition.casefold())


def _folder(root: Path) -> Path:
    for folder in (root / FOLDER, INSTALLED):
        if all((folder / name).is_file() for name in KINDS):
            return folder
    raise FileNotFoundError(
        f"{root / FOLDER} does not hold {', '.join(KINDS)} (--data or root=, or the environment variable BIRD_DATA), "
        f"and neither does {INSTALLED}\nto get them (6.5 MB, WordNet 3.0 licence; no root needed): {COMMAND}"
    )


def _synsets(folder: Path) -> list[Synset]:
    """All synsets, file by file."""
    found = []
    for name, kinds in KINDS.items():
        offset = 0
        for number, line in enumerate((folder / name).read_bytes().splitlines(keepends=True), 1):
            if not line.startswith(b"  "):  # the licence's lines do
                try:
                    synset = _parse(line.decode("ascii").rstrip("\n"), offset, kinds)
                except ValueError as error:  # of ASCII, too
                    raise ValueError(f"{folder / name}, line {number}: {error}; to get it anew: {COMMAND}") from error
                found.append(synset)
            offset += len(line)
    return found


def _parse(line: str, offset: int, kinds: str) -> Synset:
    match = SYNSET.fullmatch(line)
    if match is None:
        raise ValueError(f"no synset as of wndb(5WN): {line[:60]!r}")
    place, file, kind, count, rest, gloss = match.groups()
    if int(place) != offset:
        raise ValueError(f"the synset says that it is at byte {int(place)}, and is at {offset}")
    if kind not in kinds:
        raise ValueError(f"a synset of type {kind!r} in a file of {kinds!r}")
    cells, wide = rest.split(" "), 2 * int(count, 16)
    words, (pointers, *more) = cells[:wide], cells[wide:] or [""]
    _require("words", words, WORDS, wide)
    if not re.fullmatch(r"\d{3}", pointers):
        raise ValueError(f"{wide // 2} words must be followed by the number of pointers, not {pointers!r}")
    split = 4 * int(pointers)
    _require("pointers", more[:split], POINTERS, split)
    if kind == "v" and split < len(more):
        frames = more[split:]
        if not re.fullmatch(r"\d\d", frames[0]):
            raise ValueError(f"the pointers must be followed by the number of frames, not {frames[0]!r}")
        _require("frames", frames[1:], FRAMES, 3 * int(frames[0]))
    elif more[split:]:
        raise ValueError(f"more than {pointers} pointers: {' '.join(more[split:])[:60]!r}")
    definition = re.split(r'; ?"', gloss)[0].strip()
    return Synset(int(file), tuple(re.sub(r"\((?:a|p|ip)\)$", "", word) for word in words[::2]), definition)


def _require(what: str, cells: Sequence[str], pattern: re.Pattern[str], count: int) -> None:
    if len(cells) != count or not pattern.fullmatch("".join(f"{cell} " for cell in cells)):
        raise ValueError(f"the {what} are not as of wndb(5WN): {' '.join(cells)[:60]!r}")
