"""The options of the benchmarks, and what becomes of their rows at the end of a run."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from benchmarks.kernels import providers, tables
from benchmarks.kernels.problems import Case
from benchmarks.kernels.session import Session

SESSION = pytest.StashKey[Session]()
MINUTES = 8.0  # a GPU that is lent for ten minutes a call has time for them


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernel benchmarks")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption("--device", choices=["cpu", "cuda"], default=default, help=f"default here: {default}")
    group.addoption("--problem", help="cases whose name holds this or matches it as a glob: llm, 'llm*bfloat16*'")
    group.addoption("--provider", help="only these providers, as a glob")
    group.addoption("--save", action="store_true", help="keep the results in benchmarks/kernels/results/")
    group.addoption("--minutes", type=float, default=MINUTES, help="begin no case after this long (%(default)s)")


def pytest_configure(config: pytest.Config) -> None:
    option = config.getoption
    device = torch.device(option("device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: PyTorch sees no CUDA device here")
    config.stash[SESSION] = Session(device, option("provider"), option("save"), option("minutes"))


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Which of our backends have no part in this run, and why."""
    device = config.stash[SESSION].device
    case = Case("", 128, 512, 512)
    reasons = {p.name: p.why_not(case, device) for p in providers.PROVIDERS if p.ours}
    return [f"not measured on {device.type}: {name}, {reason}" for name, reason in reasons.items() if reason]


@pytest.fixture(scope="session")
def session(pytestconfig: pytest.Config) -> Session:
    """What this run measures, and has measured."""
    return pytestconfig.stash[SESSION]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:
    machine_info.update(asdict(config.stash[SESSION].origin))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = config.stash[SESSION]
    if session.rows:
        terminalreporter.section("results")
        terminalreporter.write_line(tables.page(session.rows))
        if session.saves:
            terminalreporter.write_line("saved " + ", ".join(map(str, session.finish())))
    if session.left_out:
        count = len(session.left_out)
        terminalreporter.write_line(f"{count} cases were not begun for want of --minutes; ask for them with --problem")
