"""The memory of a CPU: how much of it is free, and how to keep what torch has had before."""

from __future__ import annotations

import ctypes
import os
import sys

GIB = 2**30
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3), from <malloc.h>
LARGEST_HEAP_BLOCK = 32 * 2**20  # bytes; the most that glibc takes for M_MMAP_THRESHOLD


def free_cpu_bytes() -> int:
    """Memory that is free without taking it from others, as the system sees it; of all memory where it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":") for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return 8 * GIB  # Windows does not tell without a package


def keep_freed_memory() -> bool:
    """Ask the C library to keep freed memory for the next tensor; whether it does. For the whole process.

    A long prefill makes and drops tensors of tens of megabytes in every layer. By default glibc gives such memory back
    to the system at once, and the system hands out every page anew, zeroed: a good tenth of such a step here. vLLM's
    manual asks its users to load another allocator for the same reason. Other C libraries are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False  # a C library without it
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_HEAP_BLOCK) and mallopt(M_TRIM_THRESHOLD, GIB))
