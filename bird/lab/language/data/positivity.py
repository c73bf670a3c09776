"""Preferences for positive movie reviews, made of sentences that people have scored; no network is needed."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from . import Labelled, Material, Preference
from .snippets import Snippet

LEAD = "A movie review in one sentence:"
MARGIN = 0.5  # of 4: below it people do not agree which side a sentence is on
HELD_OUT = 200
MOST = 10  # texts of an opening that may be held out: the frequent ones make most of the pairs
SHARE = 0.18  # of the sentences, for the teacher, and once more for the judge
REST = 3  # words that must follow an opening


def positivity(
    snippets: Sequence[Snippet],
    seed: int = 0,
    *,
    held_out: int = HELD_OUT,
    taught: float = SHARE,
    judged: float = SHARE,
) -> Material:
    """Preference pairs with a common prompt, texts to train a teacher and a judge, and held-out prompts and texts.

    The first two words of a sentence are its opening. ``held_out`` openings are drawn first, and all sentences that
    begin with them are set aside: they are ``texts``, positive or not, and the openings are ``prompts``. Of the others,
    a share trains the teacher, a share the judge, and the rest is paired: a positive with a negative sentence of the
    same opening, each used once; sentences without a partner are paired by the first word alone. The prompt is the lead
    and the opening, the completions are the rests of the sentences.

    Args:
        snippets: no text twice. Those whose score is within `MARGIN` of 0 are in no part but ``texts``.
        seed: decides the parts and the pairs.
        held_out: how many prompts.
        taught: the share of the sentences that are not held out, for the teacher.
        judged: the same for the judge.

    Raises:
        ValueError: too few openings to hold out so many.
    """
    draw = random.Random(seed)
    openings, held, rest = _hold_out(snippets, held_out, draw)
    draw.shuffle(rest)
    clear = [row for row in rest if abs(row.score) > MARGIN]
    parts = [round(share * len(clear)) for share in (taught, judged)]
    start, end = parts[0], sum(parts)
    return Material(
        pairs=_pair(clear[end:], draw),
        prompts=[f"{LEAD} {opening}" for opening in openings],
        texts=[row.text for row in held],
        taught=[("", row.text, int(row.score > 0)) for row in clear[:start]],
        judged=[Labelled(row.text, int(row.score > 0)) for row in clear[start:end]],
    )


def opening(text: str, words: int) -> str | None:
    """The first words of a text; None if too few words follow, or if one of them has no letter (as an ellipsis)."""
    parts = text.split(" ")
    first = parts[:words]
    if len(parts) < words + REST or not all(re.search(r"[^\W\d_]", word) for word in first):
        return None
    return " ".join(first)


def _beginning(text: str) -> str:
    return " ".join(text.split(" ")[:2]).casefold()


def _hold_out(
    snippets: Sequence[Snippet], count: int, draw: random.Random
) -> tuple[list[str], list[Snippet], list[Snippet]]:
    """The openings that are held out, the snippets that begin with them in any case, and the other snippets."""
    groups: dict[str, list[Snippet]] = defaultdict(list)
    for row in snippets:
        groups[_beginning(row.text)].append(row)
    candidates = []
    for group in groups.values():
        signs = {row.score > 0 for row in group if abs(row.score) > MARGIN}
        name = opening(group[0].text, 2)
        if len(group) <= MOST and len(signs) == 2 and name is not None:
            candidates.append(name)
    if len(candidates) < count:
        raise ValueError(
            f"{len(snippets)} snippets have {len(candidates)} openings of two words that 2 to {MOST} of them share, "
            f"positive and negative ones; {count} cannot be held out"
        )
    chosen = draw.sample(candidates, count)
    keys = {name.casefold() for name in chosen}
    held = [row for row in snippets if _beginning(row.text) in keys]
    return chosen, held, [row for row in snippets if _beginning(row.text) not in keys]


def _group(rows: Iterable[Snippet], words: int) -> dict[str, list[Snippet]]:
    groups: dict[str, list[Snippet]] = defaultdict(list)
    for row in rows:
        first = opening(row.text, words)
        if first is not None:
            groups[first].append(row)
    return groups


def _pair(rows: list[Snippet], draw: random.Random) -> list[Preference]:
    pairs = []
    for words in (2, 1):
        used: set[str] = set()
        for first, group in _group(rows, words).items():
            positive = [row.text for row in group if row.score > 0]
            negative = [row.text for row in group if row.score < 0]
            for good, bad in zip(positive, negative, strict=False):  # they come shuffled
                pairs.append(Preference(f"{LEAD} {first}", good[len(first) :], bad[len(first) :]))
                used |= {good, bad}
        rows = [row for row in rows if row.text not in used]
    draw.shuffle(pairs)
    return pairs
