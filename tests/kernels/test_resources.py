"""The table of resources notices what differs, whatever compiled it; nothing is compiled here."""

from __future__ import annotations

import pytest

from tests.kernels import resources

Rows = list[dict[str, str]]


@pytest.fixture(params=[("triton", "90"), ("native", "80")], ids=" ".join)
def rows(request: pytest.FixtureRequest) -> Rows:
    """A part of the table, as if it had just been found."""
    return [row for row in resources.committed() if (row["source"], row["capability"]) == request.param]


def changed(rows: Rows, place: int, **values: str) -> Rows:
    """The same with other values in one row."""
    return [row | values if i == place else row for i, row in enumerate(rows)]


def by_another_compiler(rows: Rows) -> Rows:
    numbers = dict.fromkeys(("registers", "spilled", "shared"), "999")
    return [row | numbers | {"compiler": "0.1"} for row in rows]


def test_the_table_is_itself(rows: Rows) -> None:
    assert len(rows) > 8
    assert resources.differences(rows) == []
    assert resources.differences(rows[::-1]) == []


@pytest.mark.parametrize("column", ["registers", "spilled", "shared", "variants", "matrix"])
def test_every_number_counts(rows: Rows, column: str) -> None:
    found = changed(rows, 3, **{column: "7777"})
    assert resources.differences(found) == [(rows[3], found[3])]


def test_another_compiler_has_other_numbers(rows: Rows) -> None:
    assert resources.differences(by_another_compiler(rows)) == []


@pytest.mark.parametrize("column", ["variants", "matrix"])
def test_but_the_same_variants_and_matrix_instructions(rows: Rows, column: str) -> None:
    found = changed(by_another_compiler(rows), 3, **{column: "7777"})
    ((known, other),) = resources.differences(found)
    assert known is not None
    assert other == known | {column: "7777"}
    assert known[column] == rows[3][column]


@pytest.mark.parametrize("compiler", ["the table's", "another"])
def test_rows_that_are_gone_or_new(rows: Rows, compiler: str) -> None:
    found = rows if compiler == "the table's" else by_another_compiler(rows)
    ((known, other),) = resources.differences(found[1:])
    assert known is not None
    assert (known["kernel"], other) == (rows[0]["kernel"], None)
    ((known, other),) = resources.differences([*found, found[0] | {"kernel": "new_kernel"}])
    assert other is not None
    assert (known, other["kernel"]) == (None, "new_kernel")


def test_a_summary_takes_the_most(rows: Rows) -> None:
    """Of two variants in one row; matrix instructions in one are enough."""
    common = dict(kernel="k", dtype="float32", precision="")
    variants = [dict(registers=9, spilled=0, shared=80, matrix=0), dict(registers=10, spilled=4, shared=7, matrix=2)]
    (row,) = resources.summary("triton", "1.0", 90, [common | variant for variant in variants])
    assert row == dict(
        source="triton", capability="90", **common, compiler="1.0", variants="2", registers="10", spilled="4",
        shared="80", matrix="yes",
    )  # fmt: skip
