"""The number of CPU threads of a step, independent of the rest of the process.

Two threads that share a small matrix product wait longer for each other than they compute, and much longer on a busy
machine. So a small model gets one thread, unless the user chooses otherwise.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

SMALL_HIDDEN_SIZE = 512  # up to this width a matrix product ends before a second thread is awake


def choose_num_threads(asked: int | None, hidden_size: int) -> tuple[int | None, str]:
    """The threads of a step (None: as many as the process uses), and the reason.

    In order: `asked`, which is the engine's `num_threads`; OMP_NUM_THREADS; the caller's `torch.set_num_threads`, if it
    can be detected; the size of the model.
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
    """The numbers of threads that torch may start with: the usable processors, or their physical cores.

    Outside of Linux these are unknown, and `current` is taken for the default.
    """
    if not sys.platform.startswith("linux"):
        return {current}
    usable = os.sched_getaffinity(0)
    cores = {_core_of(processor) for processor in usable}
    return {len(usable), len(cores)}


def _core_of(processor: int) -> str:
    """A name for the physical core of a processor."""
    siblings = Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
    try:
        return siblings.read_text(encoding="ascii").strip()
    except OSError:
        return str(processor)


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Use `count` threads inside (None: no change), and restore the number afterwards."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
