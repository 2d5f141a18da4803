"""The memory of the host: what is free to this process, and what it gives back when an engine ends."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from typing import Any

GIB = 2**30
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3), from <malloc.h>
LARGEST_HEAP_BLOCK = 32 * 2**20  # bytes; glibc's upper bound for M_MMAP_THRESHOLD
# By version of cgroups: files with a limit, the file with what is used, and what of it the kernel drops when asked.
CGROUP_FILES = {
    1: (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
    2: (("memory.max", "memory.high"), "memory.current", "inactive_file"),
}


def free_cpu_bytes() -> int:
    """What the machine has free and what the process's control groups (a container, a batch job) leave of it.

    MemAvailable on Linux; total memory where that is unknown.
    """
    return min([_free_of_machine(), *cgroup_free_bytes()])


def cgroup_free_bytes(root: str = "") -> list[int]:
    """What each limit on the control groups of this process leaves, cgroups v1 and v2; empty without any.

    The limits of all groups around the process's own count, as far as they can be seen. root: for tests.
    """
    found = []
    for folder, version in _cgroup_folders(root):
        limits, usage, droppable = CGROUP_FILES[version]
        try:
            used = int(_read(f"{folder}/{usage}"))
            stat = dict(line.split(maxsplit=1) for line in _read(f"{folder}/memory.stat").splitlines())
        except (OSError, ValueError):
            continue  # the topmost group has no limit and no such files
        used -= min(used, int(stat.get(droppable, 0)))
        for name in limits:
            try:
                found.append(max(0, int(_read(f"{folder}/{name}")) - used))
            except (OSError, ValueError):
                continue  # "max" is no limit
    return found


def _cgroup_folders(root: str) -> Iterator[tuple[str, int]]:
    """The folders of the process's memory groups, innermost first, each with the version of cgroups."""
    try:
        groups = [line.split(":", 2) for line in _read(f"{root}/proc/self/cgroup").splitlines()]
        mounts = [line.split() for line in _read(f"{root}/proc/self/mountinfo").splitlines()]
    except OSError:
        return
    for _, controllers, group in groups:
        version = 2 if controllers == "" else 1
        if version == 1 and "memory" not in controllers.split(","):
            continue
        for mount in mounts:
            top, folder = mount[3:5]
            kind, _, options = mount[mount.index("-") + 1 :][:3]
            if kind != ("cgroup2" if version == 2 else "cgroup"):
                continue
            if version == 1 and "memory" not in options.split(","):
                continue
            # A container may see its own group alone, mounted as if it were the topmost.
            inside = group == top or group.startswith(top.rstrip("/") + "/")
            below = group[len(top.rstrip("/")) :].strip("/") if inside else ""
            while True:
                yield f"{root}{folder}/{below}".rstrip("/"), version
                if not below:
                    break
                below = below.rpartition("/")[0]


def _free_of_machine() -> int:
    try:
        fields = dict(line.split(":") for line in _read("/proc/meminfo").splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return 8 * GIB  # Windows: unknown without a package


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


class HostHeap:
    """The C library's heap, for as long as an engine lives: then what the engine has freed goes back to the system.

    keep: hold freed memory until then, see `keep_freed_memory`.
    """

    def __init__(self, keep: bool) -> None:
        if keep:
            keep_freed_memory()
        self._trim = _glibc("malloc_trim")

    def __del__(self) -> None:
        if self._trim is not None:
            self._trim(0)


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the next tensor, in the whole process. Returns whether that worked.

    A long prefill allocates and frees tensors of tens of megabytes in every layer. By default glibc returns such memory
    to the system at once, which then zeroes every page again: over a tenth of such a step here. vLLM's manual advises
    another allocator for the same reason. Other C libraries are not changed.
    """
    mallopt = _glibc("mallopt")
    return mallopt is not None and bool(
        mallopt(M_MMAP_THRESHOLD, LARGEST_HEAP_BLOCK) and mallopt(M_TRIM_THRESHOLD, GIB)
    )


def _glibc(name: str) -> Any:
    """A function of glibc; None with another C library."""
    try:
        return getattr(ctypes.CDLL(None), name) if sys.platform.startswith("linux") else None
    except (OSError, AttributeError):
        return None
