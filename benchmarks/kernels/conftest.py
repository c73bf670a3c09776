"""``--save``, the rows that the benchmarks fill, and the table at the end of a run."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels import results
from benchmarks.kernels.results import Row

ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--save", action="store_true", help="keep the results in benchmarks/kernels/results/")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture(scope="session")
def rows(pytestconfig: pytest.Config) -> list[Row]:
    """The rows of this run; a benchmark adds its own."""
    return pytestconfig.stash[ROWS]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:
    machine_info.update(results.origin())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    terminalreporter.section("; ".join(f"{key} {value}" for key, value in results.origin().items()))
    terminalreporter.write_line(results.table(rows))
    if config.getoption("--save"):
        terminalreporter.write_line(f"saved {results.save(rows)}")
