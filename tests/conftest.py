"""What every test run shares: no network, two threads, and one count of excused near ties."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: the hub library reads it once

from collections.abc import Iterator

import pytest
import torch

from tests.oracle import OracleStats

torch.set_num_threads(min(2, torch.get_num_threads()))  # OMP_NUM_THREADS=1 stays in force

_STATS_KEY = pytest.StashKey[OracleStats]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_STATS_KEY] = OracleStats()


@pytest.fixture(scope="session")
def oracle_stats(request: pytest.FixtureRequest) -> Iterator[OracleStats]:
    """The run's one `OracleStats`: pass it to `assert_same_tokens`. The 1 % cap is checked at the end."""
    stats = request.config.stash[_STATS_KEY]
    yield stats
    stats.check()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    stats = config.stash.get(_STATS_KEY, None)
    if stats is not None and stats.sequences:
        terminalreporter.write_line(str(stats))
