"""The machine of a result: hardware, versions, the state of the source, and the speed of memory and GEMMs."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import folovllm
from folovllm.math_utils import cdiv

NO_COMMIT = "The package was imported from outside a git repository: the result will not record a commit."
PACKAGES = ("torch", "transformers", "triton")
GEMM_ROWS = (1, 8, 64, 512)
GEMM_ROWS_GPU = (*GEMM_ROWS, 4096)  # 512 rows do not fill a large GPU
GEMM_SIZE = 2048  # the matrices are [m, 2048] x [2048, 2048]; 4096 on a GPU

# Larger than the caches, so that reads come from memory.
READ_BYTES = {"cpu": 512 * 2**20, "cuda": 4 * 2**30}
MIN_REPEATS, MIN_SECONDS, MEASUREMENT_SECONDS = 5, 0.25, 0.02


# ------------------------------------------------------------------ hardware and source


def hardware(device: torch.device) -> dict[str, Any]:
    """CPU, cores, threads, memory and GPU. No host or user name."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "ram_bytes": ram_bytes(),
        "gpu": None if gpu is None else gpu.name,
        "gpu_memory_bytes": None if gpu is None else gpu.total_memory,
        "system": platform.system(),
        "machine": platform.machine(),
    }


def cpu_model() -> str:
    """The processor's name, or its architecture if the name is unknown."""
    try:
        if sys.platform.startswith("linux"):
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
            if names:
                return names[0]
        elif sys.platform == "darwin":
            return _output("sysctl", "-n", "machdep.cpu.brand_string")
    except (OSError, subprocess.SubprocessError):
        pass  # a name is nice to have
    return platform.processor() or platform.machine()


def ram_bytes() -> int | None:
    """Main memory; None if unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def versions() -> dict[str, str | None]:
    """Python and the packages that affect speed; None for a package that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "folovllm": folovllm.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def git_state(folder: Path | None = None) -> dict[str, str | bool | None]:
    """Commit of the source and whether files differ from it (results aside); None where unknown.

    The source is the folder that this package was imported from. A copy without its `.git` has no commit, whatever the
    working directory: measure from a clone or a worktree.
    """
    where = Path(__file__).resolve().parent if folder is None else folder
    git = ("git", "-C", str(where), "--no-optional-locks")
    state: dict[str, str | bool | None] = {"commit": None, "dirty": None}
    try:
        state["commit"] = _output(*git, "rev-parse", "--verify", "--quiet", "HEAD")
        state["dirty"] = bool(_output(*git, "status", "--porcelain", "--", ":/", ":(top,exclude)results"))
    except (OSError, subprocess.SubprocessError):
        pass  # no git, no repository, or a repository that git refuses to read as this user
    return state


@dataclass(frozen=True)
class CpuTime:
    """Counters of CPU seconds: of the whole machine, and of this process with all its threads."""

    everything: float
    own: float
    wall: float

    @classmethod
    def now(cls) -> CpuTime | None:
        """The current counters; None on systems without them (not Linux)."""
        try:
            fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, _, _, irq, softirq, steal = map(int, fields)
        ticks = user + nice + system + irq + softirq + steal  # steal: time of other virtual machines
        return cls(ticks / os.sysconf("SC_CLK_TCK"), time.process_time(), time.perf_counter())

    def share_of_others(self, later: CpuTime, cores: int) -> float:
        """The share of all CPU time between this reading and `later` that other processes used."""
        others = (later.everything - self.everything) - (later.own - self.own)
        return max(0.0, others / (cores * (later.wall - self.wall)))


def _output(*command: str) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    return done.stdout.strip()


# ------------------------------------------------------------------ speed


def probe(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Ceilings of this machine, with torch's own kernels and as many threads as the runs have.

    read_bytes_per_s: the best rate of a sum, a maximum or a matrix-vector product over memory. gemm_flops_per_s: for
    each number of rows m, of [m, n] x [n, n] in `dtype`, cycling through more matrices than fit the caches, as with a
    model's weights. The best of several measurements counts: a ceiling is what can be reached.
    """
    read_bytes = READ_BYTES[device.type]
    on_gpu = device.type == "cuda"
    data = torch.ones(read_bytes // 4, dtype=torch.float32, device=device)
    vector = torch.ones(8192, device=device)
    times_vector = partial(torch.mv, data.view(-1, 8192), vector)  # [N, 8192] x [8192]
    read = max(read_bytes / _best_seconds(reader, device) for reader in (data.sum, data.max, times_vector))
    del data, times_vector

    n = 2 * GEMM_SIZE if on_gpu else GEMM_SIZE
    first = torch.randn(n, n, device=device).to(dtype)  # [n, n]
    weights = [first.clone() for _ in range(cdiv(read_bytes, first.nbytes))]
    gemm = {}
    for m in GEMM_ROWS_GPU if on_gpu else GEMM_ROWS:
        x = torch.randn(m, n, device=device).to(dtype)  # [m, n]
        gemm[str(m)] = 2 * m * n * n / _best_seconds(_Cycle(x, weights), device)
    # A product with one row reads every weight once, so its rate is a read bandwidth too.
    weights_per_s = gemm["1"] / 2 * dtype.itemsize
    return {"read_bytes_per_s": max(read, weights_per_s), "gemm_flops_per_s": gemm, "gemm_size": n}


class _Cycle:
    """x times the weights in turn, one per call."""

    def __init__(self, x: torch.Tensor, weights: list[torch.Tensor]) -> None:
        self.x, self.weights, self.turn = x, weights, 0

    def __call__(self) -> torch.Tensor:
        self.turn = (self.turn + 1) % len(self.weights)
        return torch.nn.functional.linear(self.x, self.weights[self.turn])  # [m, n]


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The shortest time of one call, over at least `MIN_REPEATS` measurements and `MIN_SECONDS`.

    A measurement is the mean over as many calls as fill `MEASUREMENT_SECONDS`: a single short call is noise, and on a
    GPU mostly launch overhead.
    """

    def mean_seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / calls

    with torch.inference_mode():
        mean_seconds(1)
        calls = max(1, math.ceil(MEASUREMENT_SECONDS / mean_seconds(1)))
        times: list[float] = []
        while len(times) < MIN_REPEATS or sum(times) * calls < MIN_SECONDS:
            times.append(mean_seconds(calls))
    return min(times)
