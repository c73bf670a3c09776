"""WordNet's definitions and words: its files by hand, parts that share nothing, and every arm of their recipe."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from pathlib import Path
from statistics import fmean

import pytest

from bird.lab.language.data import glosses
from bird.lab.language.data.glosses import COMMAND, FOLDER, KINDS, Synset, asked, parts
from bird.lab.language.data.questions import questions

LICENCE = "  1 This software and database is being provided to you  \n  2 by Princeton University.  \n"
# A lexicographer file, a type, what stands between the type and the gloss, and the gloss.
BY_HAND = {
    "data.noun": [
        (
            "05",
            "n",
            "02 domestic_dog 0 Canis_familiaris 0 001 @ 02083346 n 0000",
            'a member of the genus Canis; "it barked"  ',
        ),
        ("06", "n", "01 kennel 1 000", "outbuilding; shelter for one or several dogs"),
    ],
    "data.verb": [
        (
            "30",
            "v",
            "01 age 0 002 + 00000000 n 0101 ! 00000001 v 0000 02 + 01 00 + 02 01",
            'grow old; "she aged"; "we age"',
        ),
        ("43", "v", f"0a {' '.join(f'rain{c} {c}' for c in '0123456789')} 000 01 + 01 00", "precipitate"),
    ],
    "data.adj": [
        ("00", "s", "02 awake(p) 0 alert(ip) f 000", '"he lay awake"'),
        ("44", "a", "01 aged 0 000", "grown old (of a dog)"),
    ],
    "data.adv": [("02", "r", "01 loudly 0 000", "with a bark:")],
}


def write_wordnet(root: Path, synsets: dict[str, list[tuple[str, str, str, str]]]) -> Path:
    """The package's files below a data folder; a synset begins with its place in its file."""
    folder = root / FOLDER
    folder.mkdir(parents=True)
    for name in KINDS:
        text = LICENCE
        for file, kind, middle, gloss in synsets.get(name, []):
            text += f"{len(text):08} {file} {kind} {middle} | {gloss}\n"
        (folder / name).write_bytes(text.encode())
    return folder


def many(count: int = 400) -> dict[str, list[tuple[str, str, str, str]]]:
    """Synsets of two nouns or a verb; word and definition say which, and the definition its lexicographer file."""
    nouns = [
        (f"{5 + k % 2:02}", "n", f"02 {letters(k)}x 0 {letters(k)}y 0 000", f"what {letters(k)} is of {5 + k % 2}")
        for k in range(count)
    ]
    verbs = [
        ("30", "v", f"01 {letters(k)}x 0 000 01 + 01 00", f"to {letters(k)} of 30") for k in range(count, count + 200)
    ]
    return {"data.noun": nouns, "data.verb": verbs}


def letters(number: int) -> str:
    return "".join(chr(ord("a") + int(digit)) for digit in f"{number:04}")


def of_row(text: str) -> tuple[str, int, str]:
    """The number in the definition, in letters, its lexicographer file, and the number in the word."""
    definition, word = text.split("\n")
    *_, number, _, file = definition.replace(" is", "").split()
    return number, int(file), word.removeprefix("Word: ")[:-1]


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No WordNet is installed."""
    monkeypatch.setattr(glosses, "INSTALLED", tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------- its files


def test_synsets_are_read_as_the_manual_says(tmp_path: Path) -> None:
    assert glosses._synsets(write_wordnet(tmp_path, BY_HAND)) == [
        Synset(5, ("domestic_dog", "Canis_familiaris"), "a member of the genus Canis"),
        Synset(6, ("kennel",), "outbuilding; shelter for one or several dogs"),
        Synset(30, ("age",), "grow old"),
        Synset(43, tuple(f"rain{c}" for c in "0123456789"), "precipitate"),
        Synset(0, ("awake", "alert"), '"he lay awake"'),
        Synset(44, ("aged",), "grown old (of a dog)"),
        Synset(2, ("loudly",), "with a bark:"),
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("02 domestic_dog 0 Canis_familiaris 0 001", "03 domestic_dog 0 Canis_familiaris 0 001", "words are not as"),
        ("02 domestic_dog 0 Canis_familiaris 0 001", "01 domestic_dog 0 Canis_familiaris 0 001", "number of pointers"),
        ("@ 02083346 n 0000", "@ 02083346 n 000g", "pointers are not as"),
        ("001 @ 02083346 n 0000", "002 @ 02083346 n 0000", "pointers are not as"),
        ("001 @ 02083346 n 0000", "000 @ 02083346 n 0000", "more than 000 pointers"),
        (" 05 n ", " 05 v ", "type 'v' in a file of 'n'"),
        (" | a member", " , a member", "no synset as of wndb"),
        ("domestic_dog", "domestic_dög", "ascii"),
        ("00000089", "00000090", "at byte 90, and is at 89"),
        ("it barked", "it barked a lot", "at byte 207, and is at 213"),
        ("02 + 01 00 + 02 01", "03 + 01 00 + 02 01", "frames are not as"),
        ("000 01 + 01 00", "000 1 + 01 00", "number of frames"),
    ],
)
def test_malformed_files_are_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    folder = write_wordnet(tmp_path, BY_HAND)
    path = folder / ("data.verb" if "frames" in message else "data.noun")
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{re.escape(path.name)}, line (?s:.)*{message}"):
        questions("wordnet-glosses", 0, tmp_path)


@pytest.mark.usefixtures("nowhere")
def test_where_there_is_none_the_error_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no root needed") as raised:
        questions("wordnet-glosses", 0, tmp_path)
    assert COMMAND in str(raised.value)
    (write_wordnet(tmp_path, BY_HAND) / "data.adv").unlink()
    with pytest.raises(FileNotFoundError, match="no root needed"):
        questions("wordnet-glosses", 0, tmp_path)


# ---------------------------------------------------------------------------------------------- the questions


def test_no_definition_and_no_sense_is_in_two_parts(tmp_path: Path) -> None:
    """Of right and of wrong words, which are of the same lexicographer file and of another synset."""
    write_wordnet(tmp_path, many())
    for seed in (0, 1):
        made = questions("wordnet-glosses", seed, tmp_path)
        assert [len(part) for part in (made.weak, made.strong, made.validation, made.test)] == [240, 240, 60, 60]
        senses: Counter[str] = Counter()
        for part in (made.weak, made.strong, made.validation, made.test):
            rows = [of_row(row.text) for row in part]
            assert len({number for number, *_ in rows}) == len(rows)
            senses.update({number for number, _, word in rows for number in (number, word)})
            for row, (number, file, word) in zip(part, rows, strict=True):
                assert (number == word) == row.label
                assert file == (30 if number_of(word) >= 400 else 5 + number_of(word) % 2)
            for whole in (part, part[:30]):
                assert sum(row.label for row in whole) == len(whole) / 2
        assert len(senses) == 600
        assert set(senses.values()) == {1}


def number_of(word: str) -> int:
    return int("".join(str(ord(c) - ord("a")) for c in word))


def test_the_seed_draws_halves_and_words_of_training(tmp_path: Path) -> None:
    write_wordnet(tmp_path, many())
    first, again, other = (questions("wordnet-glosses", seed, tmp_path) for seed in (0, 0, 1))
    assert first == again
    assert (first.test, first.validation) == (other.test, other.validation)
    halves = [[{of_row(row.text)[0] for row in half} for half in (made.weak, made.strong)] for made in (first, other)]
    assert halves[0][0] != halves[1][0]
    assert set.union(*halves[0]) == set.union(*halves[1])
    pairs = [{of_row(row.text)[::2] for row in made.weak + made.strong} for made in (first, other)]
    assert pairs[0] != pairs[1]


def test_what_gives_an_answer_away_is_left_out(tmp_path: Path) -> None:
    rows = many()
    rows["data.adv"] = [
        ("02", "r", f"03 Name{k} 0 two_words 0 {letters(k)}z 0 000", "the same definition for all") for k in range(9)
    ]
    rows["data.adj"] = [
        ("00", "a", "02 small 0 tiny 0 000", "Tiny things are this"),
        ("00", "a", "01 named 0 000", "said to be named so"),
        ("00", "a", "01 Welsh 0 000", "of Wales"),
        ("00", "a", "01 seen 0 000", '"it was shown"'),
        ("00", "a", "01 long 0 000", " ".join(["word"] * 8)),
        *(("00", "a", f"01 {letters(k)}w 0 000", f"nice {letters(k)}") for k in range(8)),
    ]
    write_wordnet(tmp_path, rows)
    kept = {synset.definition: synset for part in parts(tmp_path, 10) for synset in part}
    assert kept["Tiny things are this"].words == ("small",)
    assert not {"said to be named so", "of Wales", '"it was shown"', " ".join(["word"] * 8)} & kept.keys()
    assert " ".join(["word"] * 8) in {synset.definition for part in parts(tmp_path, 11) for synset in part}
    assert "the same definition for all" not in kept  # one of nine, so the only one of its lexicographer file: rare
    assert Counter(synset.file for synset in kept.values()) == {5: 200, 6: 200, 30: 200, 0: 9}


def test_words_say_nothing_by_themselves() -> None:
    """The wrong words are distributed as the right ones are, of synsets with few and with many words."""
    synsets = [
        Synset(5, (f"lone{k}",) if k % 2 else tuple(f"one{k}of{j}" for j in range(8)), f"{k}") for k in range(4000)
    ]
    random.Random(0).shuffle(synsets)
    rows = asked(synsets, 3)
    lone = [sum("lone" in row.text for row in rows if row.label == label) / 2000 for label in (0, 1)]
    assert lone == pytest.approx([0.5, 0.5], abs=0.04)


def test_a_lexicographer_file_of_one_synset_has_no_wrong_word() -> None:
    with pytest.raises(ValueError, match="file 07 has too few synsets: no other word for 'b'"):
        asked([Synset(5, ("a",), "first"), Synset(7, ("b",), "second")], 0)


# ---------------------------------------------------------------------------------------------- a whole run


def test_every_arm_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl", reason="the experiments need its extra")
    from bird.lab import cli
    from bird.lab.language import recipe as recipes
    from bird.lab.recipe import parsed
    from tests.bird.tiny import saved

    shipped = parsed("language/weak-to-strong-glosses", recipes.parse)
    assert shipped.seeds == 8
    teacher, student = saved("encoder"), saved("decoder")
    arms = {
        name: {"methods": list(change.methods or shipped.methods), "alpha": change.alpha, "beta": change.beta}
        for name, change in shipped.variants.items()
    }
    text = f"""
kind = "weak-to-strong"
title = "Tiny"
seeds = 2
data = {{ source = "wordnet-glosses", limit = 24, held_out = 30 }}
teacher = {{ epochs = 1, batch_size = 8, lr = 1e-3 }}
transfer = {{ epochs = 1, batch_size = 8, lr = 1e-3, frozen = 1 }}
networks.tiny = {{ teacher = "{teacher}", student = "{student}" }}
"""
    for name, arm in arms.items():
        settings = ", ".join(f"{key} = {json.dumps(value)}" for key, value in arm.items())
        text += f'variants."{name}" = {{ {settings} }}\n'
    rising = shipped.claims["mistakes repeated rise with beta to alpha"]
    claim = {"method": "bird", "over": "naive", "variants": [*arms], "at": [1, 10, 90], "measure": "repeated"}
    assert claim == {key: list(of) if isinstance(of := getattr(rising, key), tuple) else of for key in claim}
    text += "claims.rising = { " + ", ".join(f"{key} = {json.dumps(value)}" for key, value in claim.items()) + " }\n"
    write_wordnet(tmp_path / "data", many())
    found = {}
    for name, said in (("test", text), ("validation", text.replace("held_out", 'part = "validation", held_out'))):
        path = tmp_path / f"{name}.toml"
        path.write_text(said, encoding="utf-8")
        folder = tmp_path / f"runs-{name}"
        options = ("--out", str(folder), "--data", str(tmp_path / "data"), "--jobs", "1", "--device", "cpu")
        assert cli.main(["run", str(path), *options]) == 0, capsys.readouterr().err
        capsys.readouterr()
        found[name] = json.loads((folder / "reports" / name / "results.json").read_text(encoding="utf-8"))
    results = found["test"]["results"]
    assert {name.removeprefix("tiny, "): [*of] for name, of in results.items()} == {
        n: a["methods"] for n, a in arms.items()
    }
    cells = {(cell["variant"], cell["method"]): cell for cell in found["test"]["cells"] if cell["seed"] == 0}
    losses = {}
    for (variant, method), cell in cells.items():
        assert 0 <= cell["test"]["accuracy"] <= 1
        if method != "weak":
            repeated = results[f"tiny, {variant}"][method]["mistakes_repeated"]
            assert len(repeated) == 2
            assert all(0 <= share <= 1 for share in repeated)
        if method.startswith("bird"):
            late = cell["training"]["second_half"]
            weights = arms[variant]
            losses[variant, method] = late["cka_loss"]
            wanted = weights["alpha"] * late["task_loss"] + weights["beta"] * late["cka_loss"]
            assert late["loss"] == pytest.approx(wanted, rel=1e-5)
    more = [
        [b - n for b, n in zip(*(of[method]["mistakes_repeated"] for method in ("bird", "naive")), strict=True)]
        for of in results.values()
    ]
    x = [math.log2(at) for at in claim["at"]]
    slopes = [sum((a - fmean(x)) * y for a, y in zip(x, of, strict=True)) for of in zip(*more, strict=True)]
    wanted = [slope / sum((a - fmean(x)) ** 2 for a in x) for slope in slopes]
    assert found["test"]["claims"][0]["differences"] == pytest.approx(wanted)
    assert len(losses) == 6
    assert len(set(losses.values())) == 6  # no arm is another one by mistake
    assert losses["1 to 1", "bird-anchored"] < 0.01  # at its start a student is what it was before its task
    assert min(loss for arm, loss in losses.items() if arm[1] != "bird-anchored") > 0.01


def test_a_claim_of_repeated_mistakes_is_their_slope() -> None:
    """By hand: of two seeds and four mistakes of the weak model, two more repeated at each step of the weights."""
    pytest.importorskip("matplotlib")
    from bird.lab.language import recipe as recipes
    from bird.lab.language import report
    from bird.lab.recipe import parsed

    shipped = parsed("language/weak-to-strong-glosses", recipes.parse)

    def of(*rights: list[int]) -> dict[int, dict[str, dict[str, object]]]:
        return {seed: {"test": {"right": right, "accuracy": 0.5}} for seed, right in enumerate(rights)}

    groups: dict[tuple[str, str], report.Results] = {
        ("minilm-smollm2", variant): {
            "weak": of([1, 0, 0, 0, 0], [0, 0, 0, 0, 1]),
            "naive": of([0, 1, 1, 1, 1], [1, 1, 1, 1, 1]),
            "bird": of([1] * (5 - 2 * step) + [0] * 2 * step, [1, 1, 0, 0, 1]),
        }
        for step, variant in enumerate(shipped.variants)
    }
    _, rows = report._claims(shipped, groups)
    row = next(row for row in rows if row["claim"] == "mistakes repeated rise with beta to alpha")
    x = [math.log2(at) - (math.log2(10) + math.log2(90)) / 3 for at in (1, 10, 90)]
    slope = sum(a * share for a, share in zip(x, (0, 0.5, 1), strict=True)) / sum(a * a for a in x)
    assert row["differences"] == pytest.approx([slope, 0], abs=1e-9)
