"""The regression on properties, against other least squares and refits; tables and pictures with known figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bird.lab.vision.candidates import regression_table, teachers_table
from bird.lab.vision.figures import scatter
from bird.lab.vision.regression import Properties, Regression, TeacherRow, regress

linear_model = pytest.importorskip("sklearn.linear_model", reason="the truth here: pip install bird-kernels[vision]")


def observed(n: int, seed: int = 0) -> tuple[list[TeacherRow], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 5)) * [0.1, 0.02, 2, 1, 4] + [0.8, 0.05, -1, 0.3, 20]
    y = 0.5 + 0.1 * x[:, 2] + 0.3 * x[:, 0] + 0.05 * rng.normal(size=n)
    return [TeacherRow(f"t{i}", Properties(*x[i].tolist()), float(y[i])) for i in range(n)], x, y


def loo(x: np.ndarray, y: np.ndarray) -> float:
    """Refit without each row, with an intercept."""
    errors = []
    for i in range(len(y)):
        rest = np.arange(len(y)) != i
        design = np.column_stack([np.ones(len(y)), x])
        w = np.linalg.lstsq(design[rest], y[rest], rcond=None)[0]
        errors.append(y[i] - design[i] @ w)
    return 1 - np.sum(np.square(errors)) / np.sum((y - y.mean()) ** 2)


def predicted(found: Regression, row: TeacherRow) -> float:
    """As the fields of a regression say that they are meant."""
    standard = {p: (getattr(row.properties, p) - found.centre[p]) / found.scale[p] for p in found.coefficients}
    return found.accuracy + found.deviation * sum(c * standard[p] for p, c in found.coefficients.items())


@pytest.mark.parametrize("n", [5, 6, 40])
def test_the_regression_is_least_squares(n: int) -> None:
    rows, x, y = observed(n)
    found, x = regress(rows), x[:, :3]
    truth = linear_model.LinearRegression().fit(x, y)
    assert found.n == n
    assert list(found.coefficients) == ["probe_accuracy", "complementary_knowledge", "usefulness_min"]
    assert list(found.coefficients.values()) == pytest.approx(truth.coef_ * x.std(axis=0) / y.std())
    assert [predicted(found, row) for row in rows] == pytest.approx(truth.predict(x))
    assert found.fit.r2 == pytest.approx(truth.score(x, y))
    assert found.fit.r2_loo == pytest.approx(loo(x, y))
    for i, alone in enumerate(found.alone.values()):
        column = x[:, [i]]
        assert alone.r2 == pytest.approx(linear_model.LinearRegression().fit(column, y).score(column, y))
        assert alone.r2_loo == pytest.approx(loo(column, y))
    assert found.fit.r2_loo < found.fit.r2


def test_the_predictors_can_be_chosen() -> None:
    rows, x, y = observed(12)
    found = regress(rows, predictors=["usefulness_mean", "probe_accuracy"])
    truth = linear_model.LinearRegression().fit(x[:, [3, 0]], y)
    assert predicted(found, rows[4]) == pytest.approx(truth.predict(x[4:5, [3, 0]])[0])
    assert list(found.alone) == ["usefulness_mean", "probe_accuracy"]


def test_an_exact_law_is_explained_and_noise_is_not() -> None:
    rows, x, _ = observed(20)
    exact = regress([TeacherRow(row.name, row.properties, float(2 - 3 * v[1])) for row, v in zip(rows, x, strict=True)])
    assert exact.fit.r2 == pytest.approx(1)
    assert exact.fit.r2_loo == pytest.approx(1)
    assert list(exact.coefficients.values()) == pytest.approx([0, -1, 0])
    noise = np.random.default_rng(5).normal(size=20)
    blind = regress([TeacherRow(row.name, row.properties, float(v)) for row, v in zip(rows, noise, strict=True)])
    assert blind.fit.r2 > 0
    assert blind.fit.r2_loo < 0


def test_a_row_that_alone_decides_cannot_be_left_out() -> None:
    rows = [
        TeacherRow(str(i), Properties(float(i == 4), i / 10, i * i, 0, 1), 0.1 * i + 0.02 * (i % 3)) for i in range(7)
    ]
    found = regress(rows)
    assert np.isnan(found.alone["probe_accuracy"].r2_loo)
    assert np.isnan(found.fit.r2_loo)
    assert not np.isnan(found.alone["usefulness_min"].r2_loo)


def test_no_regression_from_too_little() -> None:
    rows, _, _ = observed(6)

    def changed(of: Callable[[int, TeacherRow], Any]) -> list[TeacherRow]:
        return [TeacherRow(row.name, of(i, row), row.accuracy) for i, row in enumerate(rows)]

    for given, said in (
        (rows[:4], "3 predictors need at least 5 rows, got 4"),
        ([rows[0], TeacherRow("t1", rows[1].properties), *rows[2:]], r"no accuracy after the transfer for \['t1'\]"),
        ([TeacherRow(row.name, row.properties, 0.5) for row in rows], "all rows have the same accuracy"),
        (
            changed(lambda i, row: Properties(0.5, 0.1 * i, i**2, 0, 1)),
            r"\['probe_accuracy'\] are the same in all rows",
        ),
        (changed(lambda i, row: Properties(i, 2 * i + 1, i**2, 0, 1)), "linear functions of each other"),
        (changed(lambda i, row: Properties(float("nan"), 0, 0, 0, 1)), "must be finite"),
    ):
        with pytest.raises(ValueError, match=said):
            regress(given)


# Tables and pictures


ROWS = (
    TeacherRow("strong", Properties(0.914, 0.0625, -0.722, 0.36, 11.25), 0.8125),
    TeacherRow("weak", Properties(0.5, 0.01, -1.5, 0.1, 3)),
)


def cells(table: str) -> list[list[str]]:
    lines = table.splitlines()
    assert len(set(map(len, lines))) == 1
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "--" not in line]


def test_teachers_as_a_table() -> None:
    columns = "teacher|probe accuracy|complementary knowledge|usefulness, worst corruption|usefulness, mean corruption"
    columns += "|effective rank"
    strong = ["strong", "91.4", "6.2", "-0.72", "0.36", "11.25"]
    weak = ["weak", "50.0", "1.0", "-1.50", "0.10", "3.00"]
    known = [[*columns.split("|"), "accuracy after transfer"], [*strong, "81.2"], [*weak, ""]]
    assert cells(teachers_table(ROWS)) == known
    assert cells(teachers_table(ROWS[1:])) == [columns.split("|"), weak]


def test_the_regression_as_a_table() -> None:
    rows, _, _ = observed(12)
    found = regress(rows)
    table = cells(regression_table(found))
    assert table[0] == ["property", "coefficient", "R² alone", "R² alone, left out"]
    usefulness, alone = found.coefficients["usefulness_min"], found.alone["usefulness_min"]
    assert table[3] == [
        "usefulness, worst corruption",
        f"{usefulness:+.2f}",
        f"{100 * alone.r2:.1f}",
        f"{100 * alone.r2_loo:.1f}",
    ]
    assert table[4] == ["all, 12 rows", "", f"{100 * found.fit.r2:.1f}", f"{100 * found.fit.r2_loo:.1f}"]


def test_the_picture_draws_points_where_accuracies_are_known_and_bars_where_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = pytest.importorskip("matplotlib.figure", reason="pictures are an extra: pip install bird-kernels[vision]")
    drawn = []
    real = figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: drawn.append(self) or real(self, *a, **k))
    rows, x, y = observed(6)
    kinds = ["a", "b", "a", "a", "b", "b"]
    rows = [replace(row, kind=kind) for row, kind in zip(rows, kinds, strict=True)]
    scatter(rows, tmp_path / "points.png", title="T", baseline=0.3, regression=regress(rows))
    assert len(drawn[0].axes) == 3
    for axes, column in zip(drawn[0].axes, x.T, strict=False):
        *points, baseline = axes.lines
        assert [line.get_label() for line in points] == ["a", "b"]
        for line in points:
            own = [i for i, kind in enumerate(kinds) if kind == line.get_label()]
            assert line.get_xdata() == pytest.approx(column[own])
            assert line.get_ydata() == pytest.approx(100 * y[own])
        assert baseline.get_ydata()[0] == 30
        assert "R² alone" in axes.get_title(loc="left")
    scatter([TeacherRow(row.name, row.properties) for row in rows], tmp_path / "bars.png", title="T")
    for axes, column in zip(drawn[1].axes, x.T, strict=False):
        assert [bar.get_width() for bar in axes.patches] == pytest.approx(column)
    scatter([replace(row, kind=kind) for row, kind in zip(ROWS, "ab", strict=True)], tmp_path / "some.png", title="T")
    assert [[line.get_label() for line in axes.lines] for axes in drawn[2].axes] == [["a"]] * 3  # "b" was not tried
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bars.png", "points.png", "some.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n") for path in tmp_path.iterdir())
