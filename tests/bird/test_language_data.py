"""Text sets, from tiny files in their published layouts: values, parts that share nothing, refusals."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bird.lab.language.data import Labelled, Preference, balance, random_halves, random_parts
from bird.lab.language.data.files import read_rows
from bird.lab.language.data.positivity import LEAD, opening, positivity
from bird.lab.language.data.snippets import Snippet, snippets

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"


def tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def write_snippets(folder: Path, text: str, source: str = "movieReviewSnippets", name: str = ARCHIVE) -> None:
    inner = tar({f"hutto_ICWSM_2014/{source}_GroundTruth.txt": text.encode(), "hutto_ICWSM_2014/_README_.txt": b"x"})
    (folder / name).write_bytes(tar({"vaderSentiment-3.3.2/setup.py": b"raise SystemExit", INNER: inner}))


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", [ARCHIVE, ARCHIVE.lower()])
def test_snippets_hold_what_people_scored(name: str, tmp_path: Path) -> None:
    rows = (
        "1\t2.5\tA ''new''  clich\u00e9, isn't it.\r\n"
        "2_1\t-1.25\tR&amp;B of Meagher &amp;amp; Flom\r\n"
        "3\t0.5\ta NEW cliche\u0301? isn't it\r\n"  # a combining accent: another text
        "4\t1.5\ta new clich\u00e9 -- isn't it?\r\n"  # the first again
        "5\t0\t:)\r\n"
        "6\t1\t:(\r\n"
        "7\t3\ttwo\u2028lines"
    )
    write_snippets(tmp_path, rows, name=name)
    assert snippets(tmp_path) == [
        Snippet('A "new" clich\u00e9, isn\'t it.', 2.0),
        Snippet("R&B of Meagher & Flom", -1.25),
        Snippet("a NEW cliche\u0301? isn't it", 0.5),
        Snippet(":)", 0.0),
        Snippet(":(", 1.0),
        Snippet("two lines", 3.0),
    ]
    assert [path.name for path in tmp_path.iterdir()] == [name], "something was unpacked"


def test_missing_and_broken_snippets_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = r"pip download --no-deps --no-binary :all: vaderSentiment==3\.3\.2 -d \$BIRD_DATA"
    monkeypatch.setenv("BIRD_DATA", str(tmp_path / "sets"))
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/sets/{ARCHIVE} is not there .*\n.*{command}"):
        snippets()

    def refuses(message: str) -> None:
        with pytest.raises(ValueError, match=rf"(?s){ARCHIVE} is broken: .*{message}.*{command}"):
            snippets(tmp_path)

    for rows, message in (
        ("1\t2.5", "line 1 has 2 cells"),
        ("1\t1\tx\n\n2\t1\ttab\tin text", "line 3 has 4 cells"),
        ("1\tgood\tx", "line 1: the score 'good' is no number"),
        ("1\t4.5\tx", r"line 1: the score 4\.5 is not between"),
        ("1\tnan\tx", "line 1: the score nan is not between"),
        ("\n", "no rows"),
    ):
        write_snippets(tmp_path, rows)
        refuses(message)
    write_snippets(tmp_path, "1\t1\tx", source="tweets")
    refuses("movieReviewSnippets_GroundTruth.txt' not found")
    whole = (tmp_path / ARCHIVE).read_bytes()
    (tmp_path / ARCHIVE).write_bytes(whole[: len(whole) // 2])
    refuses("")
    (tmp_path / ARCHIVE).write_bytes(b"no archive")
    refuses("not a gzip file")


def reviews() -> list[Snippet]:
    """40 openings with 6 texts each, half of them positive; 300 texts of one opening; some near-neutral ones."""
    draw = random.Random(0)
    rows = []
    for k in range(540):
        words = f"Kind{k % 40} of" if k < 240 else "The film"
        score = draw.uniform(0.6, 4) * (1 if k // 40 % 2 else -1)
        rows.append(Snippet(f"{words} text number w{k}.", score))
    rows += [Snippet(f"The film seems neutral n{k}.", 0.4 * (-1) ** k) for k in range(50)]
    rows += [Snippet("... a text that begins with dots.", 3), Snippet("The end.", -3), Snippet("Kind0 of text.", 1)]
    draw.shuffle(rows)
    return rows


def test_positivity_parts_share_no_text() -> None:
    rows = reviews()
    score = {row.text: row.score for row in rows}
    parts = positivity(rows, 3, held_out=10, taught=0.3, judged=0.1)
    good, bad = ([p.prompt[len(LEAD) + 1 :] + getattr(p, side) for p in parts.pairs] for side in ("chosen", "rejected"))
    assert {prompt for prompt, *_ in parts.taught} == {""}
    teacher = [Labelled(str(text), label) for _, text, label in parts.taught]
    labelled = teacher + parts.judged
    texts = [row.text for row in labelled] + good + bad + parts.texts
    assert len(texts) == len(set(texts))
    assert set(texts) <= set(score)
    for row in labelled:
        assert row.label == (score[row.text] > 0)
        assert abs(score[row.text]) > 0.5
    assert min(score[text] for text in good) > 0.5
    assert max(score[text] for text in bad) < -0.5
    assert {row.label for row in teacher} == {row.label for row in parts.judged} == {0, 1}
    left = sum(abs(row.score) > 0.5 and row.text not in set(parts.texts) for row in rows)
    assert (len(teacher), len(parts.judged)) == (round(0.3 * left), round(0.1 * left))
    assert len(parts.pairs) > 0.7 * (left - len(labelled)) / 2

    assert len(parts.prompts) == len(set(parts.prompts)) == 10
    held = [prompt.removeprefix(f"{LEAD} ") for prompt in parts.prompts]
    assert all(name.startswith("Kind") for name in held), "the frequent opening belongs to training"
    assert sorted(parts.texts) == sorted(text for text in score if " ".join(text.split()[:2]) in held)
    assert not [text for text in [row.text for row in labelled] + good + bad if text.startswith(tuple(held))]


def test_positivity_pairs_by_the_longest_opening() -> None:
    texts = {
        "It's a fine small film.": 1,
        "It's a bad long film.": -1,
        "It's so very well done.": 2,
        "It's too silly for me.": -2,
    }
    parts = positivity([Snippet(*row) for row in texts.items()], held_out=0, taught=0.0, judged=0.0)
    assert sorted(parts.pairs, key=lambda pair: pair.prompt) == [
        Preference(f"{LEAD} It's", " so very well done.", " too silly for me."),
        Preference(f"{LEAD} It's a", " fine small film.", " bad long film."),
    ]
    assert opening("One two three four five", 2) == "One two"
    assert opening("One two three four", 2) is None
    assert opening("One ... three four five", 2) is None
    assert opening("1 two three four five", 1) is None


def test_positivity_follows_its_seed() -> None:
    rows = reviews()
    first, again, other = (positivity(rows, seed, held_out=5) for seed in (0, 0, 1))
    assert first == again
    for part in ("taught", "judged", "pairs", "prompts"):
        assert set(map(str, getattr(first, part))) != set(map(str, getattr(other, part)))
    with pytest.raises(ValueError, match=r"have 40 openings of two words .*; 41 cannot be held out"):
        positivity(rows, held_out=41)


def test_random_parts_and_halves() -> None:
    rows = list(range(101))
    first, others = random_parts(rows, 30, 5)
    assert (len(first), sorted(first + others)) == (30, rows)
    assert random_parts(rows, 30, 5) == (first, others)
    assert random_parts(rows, 30, 6) != (first, others)
    weak, strong = random_halves(rows, 0)
    assert (len(weak), len(strong), sorted(weak + strong)) == (50, 51, rows)


def test_balance_drops_the_surplus_only() -> None:
    rows = [Labelled(f"{i}", int(i % 4 == 0)) for i in range(40)]
    kept = balance(rows, 0)
    assert Counter(row.label for row in kept) == {0: 10, 1: 10}
    assert [int(row.text) for row in kept] == sorted(int(row.text) for row in kept)
    assert balance(rows, 0) == kept != balance(rows, 1)


ROWS = [{"a": 1, "text": "x\u2028y"}, {"a": 2, "text": "z"}]


def test_rows_come_from_every_kind_of_file(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    write_lines(tmp_path / "lines.jsonl", ROWS).write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n", encoding="utf-8"
    )
    (tmp_path / "array.json").write_text(json.dumps(ROWS), encoding="utf-8")
    Dataset.from_list(ROWS).to_parquet(tmp_path / "table.parquet")
    for name in ("lines.jsonl", "array.json", "table.parquet"):
        assert read_rows(tmp_path / name, "train") == ROWS
        with pytest.raises(ValueError, match=f"{name} is the split 'train', not 'test'"):
            read_rows(tmp_path / name, "test")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    DatasetDict(train=Dataset.from_list(ROWS[:1]), valid=Dataset.from_list(ROWS[1:])).save_to_disk(tmp_path / "both")
    assert read_rows(tmp_path / "saved", "train") == ROWS
    assert read_rows(str(tmp_path / "both"), "train") == ROWS[:1]
    assert read_rows(str(tmp_path / "both"), "validation") == ROWS[1:]
    with pytest.raises(ValueError, match=r"holds the splits \['train', 'valid'\], not 'test'"):
        read_rows(tmp_path / "both", "test")


def test_rows_are_what_is_written(tmp_path: Path) -> None:
    """No field is filled in, and a text that looks like a time stays a text."""
    rows = [{"a": "2020-01-01T00:00:00"}, {"a": "2021-01-01 00:00:00", "b": None}, {"b": [{"c": 1}]}, {"b": "x"}]
    assert read_rows(write_lines(tmp_path / "train.jsonl", rows), "train") == rows
    (tmp_path / "array.json").write_text(json.dumps(rows), encoding="utf-8")
    assert read_rows(tmp_path / "array.json", "train") == rows


def test_rows_of_a_folder_go_by_the_names_of_its_files(tmp_path: Path) -> None:
    write_lines(tmp_path / "data" / "B" / "train.jsonl", ROWS[1:])
    write_lines(tmp_path / "data" / "A" / "train.jsonl", ROWS[:1])
    write_lines(tmp_path / "dev-00000-of-00001.jsonl", [{"a": 3}])
    write_lines(tmp_path / "training_notes.jsonl", [{"a": 9}])
    assert read_rows(tmp_path, "train") == ROWS
    assert read_rows(tmp_path, "validation") == [{"a": 3}]
    assert read_rows(tmp_path / "dev-00000-of-00001.jsonl", "validation") == [{"a": 3}]
    with pytest.raises(FileNotFoundError, match=r"holds no 'test' files; expected is .* a folder with test\.jsonl"):
        read_rows(tmp_path, "test")


def test_broken_and_missing_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content, message in (
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"a\.jsonl, line 2: not JSON"),
        ("b.jsonl", '{"a": 1}\n[1]\n', r"b\.jsonl must hold objects"),
        ("c.jsonl", "\n", r"c\.jsonl holds no rows"),
        ("d.json", '{"a": 1}', r"d\.json must hold objects"),
        ("e.json", "[", r"e\.json: not JSON"),
        ("f.parquet", "PAR", r"f\.parquet: not a parquet file"),
        ("g.pkl", "x", r"g\.pkl: only \.jsonl, \.json, \.parquet files are read"),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_rows(tmp_path / name, "train")
    for name in (str(tmp_path / "no"), "no.jsonl"):
        with pytest.raises(FileNotFoundError, match=r"is not there; expected is a \.jsonl"):
            read_rows(name, "train")


def test_the_hub_is_asked_for_data_never_for_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[dict[str, Any]] = []

    def load_dataset(name: str, **options: Any) -> list[dict[str, int]]:
        asked.append(options)
        if name == "some/gone":
            raise ConnectionError("Couldn't reach 'some/gone' on the Hub")
        if name == "some/script" and "revision" not in options:
            raise RuntimeError("Dataset scripts are no longer supported, but found script.py")
        return [{"a": 1}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_rows("some/set", "test") == [{"a": 1}]
    assert read_rows("some/script", "test") == [{"a": 1}]
    assert asked == [{"split": "test"}] * 2 + [{"split": "test", "revision": "refs/convert/parquet"}]
    with pytest.raises(
        FileNotFoundError, match=r"'some/gone' is no file or folder here .*Couldn't reach.*train\.jsonl"
    ):
        read_rows("some/gone", "train")
