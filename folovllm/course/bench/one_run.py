"""The process of one measurement: a system on a workload, or a probe of the machine. A job in, a result out, as JSON.

Every run has its own process, so that it starts with an empty heap, unmodified weights, and nothing compiled or cached
by another system. `python -m folovllm.course.bench.one_run JOB RESULT` reads the job from one file and writes the
result to another, so that the output of libraries cannot corrupt it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from folovllm.course.bench import machine
from folovllm.course.bench.engines import EngineServer, engine_kwargs
from folovllm.course.bench.peers import run_peer
from folovllm.course.bench.record import Measured
from folovllm.course.bench.systems import System
from folovllm.course.bench.workloads import BenchRequest, draw, get_workload
from folovllm.entrypoints.llm import LLM
from folovllm.kv_cache.formulas import kv_bytes_per_token
from folovllm.models.loader import load_config, load_hf_model, resolve_device, resolve_dtype, resolve_model

USAGE_ERROR = 2  # exit status: the job is not valid; `error` in the result says why


@dataclass(frozen=True)
class Job:
    """One measurement. `system` None: the machine itself. Names and values as in `LLM` and `folovllm bench`."""

    system: System | None
    workload: str
    model: str
    dtype: str
    device: str
    load_format: str
    seed: int = 0
    scale: float = 1.0
    max_num_batched_tokens: int | None = None
    arrival_rate: float | None = None

    def save(self, path: Path) -> None:
        """Write the job as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Job:
        """Read what `save` wrote."""
        data = json.loads(path.read_text(encoding="utf-8"))
        system = data.pop("system")
        return cls(system=None if system is None else System(**system), **data)


class Run(Protocol):
    """Serves requests and measures the run."""

    def __call__(self, requests: list[BenchRequest]) -> Measured:
        """Serve all requests."""


def run_job(job: Job) -> dict[str, Any]:
    """Run a job and return its result as plain data.

    Raises ValueError for a model, device, dtype or workload that is not valid.
    """
    source = resolve_model(job.model)
    config = load_config(source)
    device = resolve_device(job.device)
    dtype = resolve_dtype(job.dtype, config, device)
    if job.system is None:
        return machine.probe(device, dtype)

    vocab_size = int(config.get_text_config().vocab_size)
    workload = get_workload(job.workload)
    requests = draw(workload, vocab_size, job.seed, job.scale, arrival_rate=job.arrival_rate)
    warm_up = draw(workload, vocab_size, job.seed, job.scale, warm_up=True)
    started = time.perf_counter()
    run: Run
    if job.system.peer is not None:
        run = partial(run_peer, job.system, load_hf_model(source, dtype, device, job.load_format))
    else:
        kwargs = engine_kwargs(job.system, requests, job.max_num_batched_tokens)
        llm = LLM(
            job.model,
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            load_format=job.load_format,
            **kwargs,
        )
        run = EngineServer(llm, device.type).run
    loaded = time.perf_counter()

    run(warm_up)
    gc.collect()
    reset_peak = start_peak_memory(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    before = machine.CpuTime.now()
    measured = run(requests)
    after = machine.CpuTime.now()
    check_complete(requests, measured)
    result = measured.to_json(_kv_bytes_per_token(config, dtype))
    cores = os.cpu_count() or 1
    others = before.share_of_others(after, cores) if before is not None and after is not None else None
    return {**result, **peak_memory(device, reset_peak), "other_cpu_share": others, "load_s": loaded - started}


def check_complete(requests: list[BenchRequest], measured: Measured) -> None:
    """Raise RuntimeError unless every request got exactly `max_tokens` tokens: rates must not count missing tokens."""
    for i, (request, ids) in enumerate(zip(requests, measured.token_ids, strict=True)):
        if len(ids) != request.max_tokens:
            raise RuntimeError(f"request {i} asked for {request.max_tokens} tokens and got {len(ids)}")


def start_peak_memory(device: torch.device) -> bool:
    """Reset the peak. Returns False where the system cannot: the peak is then that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM
    except OSError:
        return False
    return True


def peak_memory(device: torch.device, reset: bool) -> dict[str, Any]:
    """Peak memory in bytes and its kind: tensors on the GPU, or resident memory of the process."""
    if device.type == "cuda":
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(device), "peak_memory_of": "GPU tensors, run"}
    if reset:
        status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        kibibytes = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
        return {"peak_memory_bytes": kibibytes * 1024, "peak_memory_of": "process, run"}
    try:
        import resource
    except ImportError:  # Windows
        return {"peak_memory_bytes": None, "peak_memory_of": None}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_bytes": peak * unit, "peak_memory_of": "process, loading and run"}


def _kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int | None:
    try:
        return kv_bytes_per_token(config, dtype.itemsize)
    except ValueError:  # a model that the formulas do not describe
        return None


def main(job_path: str, result_path: str) -> int:
    """Run a job from its file. Returns the exit status. A usage error goes to the result, without a traceback."""
    result = Path(result_path)
    try:
        data = run_job(Job.load(Path(job_path)))
    except ValueError as error:
        result.write_text(json.dumps({"error": str(error)}), encoding="utf-8")
        return USAGE_ERROR
    result.write_text(json.dumps(data), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
