"""What every test run shares: no network, one thread in each process, and one count of excused near ties."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: the hub library reads it once
# The models of the tests are tiny, and the suite runs in several processes. Before torch is imported, and for children.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest

from tests.oracle import OracleStats

_STATS_KEY = pytest.StashKey[OracleStats]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_STATS_KEY] = OracleStats()


@pytest.fixture(scope="session")
def oracle_stats(request: pytest.FixtureRequest) -> Iterator[OracleStats]:
    """The run's one `OracleStats`: pass it to `assert_same_tokens`. The 1 % cap is checked at the end of the run."""
    yield request.config.stash[_STATS_KEY]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object | None) -> None:
    """Of pytest-xdist, in the process that leads: add what a worker has compared."""
    counted = getattr(node, "workeroutput", {}).get("oracle_stats")
    if counted is not None:
        node.config.stash[_STATS_KEY].add(OracleStats(**counted))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker reports what it has compared; the leading process, or the only one, checks the cap over all of it."""
    stats = session.config.stash[_STATS_KEY]
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["oracle_stats"] = asdict(stats)
    elif stats.excused_too_many():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    stats = config.stash.get(_STATS_KEY, None)
    if stats is not None and stats.sequences:
        terminalreporter.write_line(str(stats), red=stats.excused_too_many())
