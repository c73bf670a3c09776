"""What the house must not outgrow."""

from __future__ import annotations

from tests.repo import count


def test_the_core_is_thin() -> None:
    files, lines = count.count("bird", ("bird/lab",))
    assert files >= 13, "the core was not found"
    # 2,010 before faults that users of other projects met: layouts, threads, second passes, texts, trainers, padding;
    # 2,530 before losses by name, the course of beta and measured gradients.
    assert lines <= 3030


def test_no_file_is_too_long() -> None:
    assert len(count.tracked()) > 250
    assert [str(path) for path in count.tracked() if count.lines_of(path) > count.LONGEST] == []
