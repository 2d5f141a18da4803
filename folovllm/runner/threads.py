"""The CPU threads of a step: a step may use its own number, and the process around it keeps its own.

Two threads that share a small product wait for each other longer than they compute, and on a busy machine many times
longer. So a small model gets one thread, unless the user has said otherwise.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

SMALL_HIDDEN_SIZE = 512  # up to this width a product with a weight is over before a second thread is awake


def choose_num_threads(asked: int | None, hidden_size: int) -> tuple[int | None, str]:
    """The threads that a step should use, None for as many as the process does, and why.

    asked: the engine's `num_threads`. It wins; then OMP_NUM_THREADS, then the caller's `torch.set_num_threads`, where
    that can be seen; then the size of the model.
    """
    if asked is not None:
        return asked, "num_threads"
    if os.environ.get("OMP_NUM_THREADS"):
        return None, "OMP_NUM_THREADS"
    current = torch.get_num_threads()
    if current not in default_thread_counts(current):
        return None, "torch.set_num_threads"
    if hidden_size <= SMALL_HIDDEN_SIZE:
        return 1, "a small model"
    return None, "torch's default"


def default_thread_counts(current: int) -> set[int]:
    """The numbers of threads that torch may start with here: the usable processors, or the cores they belong to.

    Where the system does not tell (outside of Linux) `current` counts as such a number.
    """
    if not sys.platform.startswith("linux"):
        return {current}
    usable = os.sched_getaffinity(0)
    cores = {_core_of(processor) for processor in usable}
    return {len(usable), len(cores)}


def _core_of(processor: int) -> str:
    """A name for the physical core of a processor; two that share a core have the same."""
    siblings = Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
    try:
        return siblings.read_text(encoding="ascii").strip()
    except OSError:
        return str(processor)


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Compute with `count` threads (None: as many as before), and then as before."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
