"""The rounds of `folovllm bench`: each measures the machine, then every workload on every system (see `rounds`)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from folovllm.course.bench.one_run import USAGE_ERROR, Job
from folovllm.course.bench.rounds import turned
from folovllm.course.bench.systems import System, not_applicable
from folovllm.course.bench.workloads import Workload


class RunFailed(RuntimeError):
    """A run's process died. `kind`: the exception it ended with, without its message, which may name files."""

    def __init__(self, kind: str, stderr: str) -> None:
        super().__init__(f"{kind}\n{stderr}".strip())
        self.kind = kind


@dataclass(frozen=True)
class Plan:
    """What to measure. `template` is a job whose system and workload are filled in for each run."""

    systems: Sequence[System]
    workloads: Sequence[Workload]
    rounds: int
    template: Job

    @property
    def num_jobs(self) -> int:
        """Processes that a full bench starts, the looks at the machine included."""
        runs = sum(not_applicable(s, w) is None for s in self.systems for w in self.workloads)
        return self.rounds * (1 + runs)


@dataclass
class Round:
    """What one round measured: the machine, and results by workload and system."""

    machine: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)


@dataclass
class Measurements:
    """The complete rounds; why a system has no (further) results of a workload: workload -> system -> reason."""

    rounds: list[Round] = field(default_factory=list)
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)
    interrupted: bool = False


@dataclass(frozen=True)
class Step:
    """A job that is about to start, or is done (`result` or `failure` is set). system None: a look at the machine."""

    round: int
    system: str | None = None
    workload: str | None = None
    result: dict[str, Any] | None = None
    failure: str | None = None


Execute = Callable[[Job], dict[str, Any]]
Watch = Callable[[Step], None]


def run_rounds(plan: Plan, execute: Execute, watch: Watch = lambda step: None) -> Measurements:
    """Run all rounds; `watch` hears of each job before and after it.

    A system that fails on a workload is not run on it again. Ctrl-C ends the bench; what was measured in complete
    rounds is kept. Raises ValueError for a job that cannot work, with the job's own message.
    """
    done = Measurements()
    for workload in plan.workloads:
        reasons = {s.name: not_applicable(s, workload) for s in plan.systems}
        done.left_out[workload.name] = {name: reason for name, reason in reasons.items() if reason is not None}
    try:
        for index in range(plan.rounds):
            done.rounds.append(_run_round(plan, index, done.left_out, execute, watch))
    except KeyboardInterrupt:
        done.interrupted = True
    return done


def _run_round(plan: Plan, index: int, left_out: dict[str, dict[str, str]], execute: Execute, watch: Watch) -> Round:
    watch(Step(index))
    current = Round(machine=execute(replace(plan.template, system=None)))
    watch(Step(index, result=current.machine))
    for workload in plan.workloads:
        results = current.runs.setdefault(workload.name, {})
        for system in turned(plan.systems, index):
            if system.name in left_out[workload.name]:
                continue
            step = Step(index, system.name, workload.name)
            watch(step)
            try:
                results[system.name] = execute(replace(plan.template, system=system, workload=workload.name))
            except RunFailed as failed:
                left_out[workload.name][system.name] = f"failed in round {index + 1}: {failed.kind}"
                watch(replace(step, failure=str(failed)))
                continue
            watch(replace(step, result=results[system.name]))
    return current


def execute_in_process(job: Job) -> dict[str, Any]:
    """Run a job in a process of its own.

    Raises ValueError with the job's message where it cannot work, RunFailed where it died. An interrupt ends the
    process too.
    """
    with tempfile.TemporaryDirectory(prefix="folovllm-bench-") as folder:
        job_path, result_path = Path(folder, "job.json"), Path(folder, "result.json")
        job.save(job_path)
        command = [sys.executable, "-m", "folovllm.course.bench.one_run", str(job_path), str(result_path)]
        # A thread that waits for another must not spin: where other programs want the cores, it spins against them.
        env = {"OMP_WAIT_POLICY": "passive", **os.environ}
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env)
        if done.returncode not in (0, USAGE_ERROR) or not result_path.exists():
            raise RunFailed(failure_kind(done.returncode, done.stderr), done.stderr[-2000:])
        result: dict[str, Any] = json.loads(result_path.read_text(encoding="utf-8"))
    if done.returncode == USAGE_ERROR:
        raise ValueError(result["error"])
    return result


def failure_kind(returncode: int, stderr: str) -> str:
    """The name of the exception that a traceback ends with, else the exit status (negative: a signal's number)."""
    names = re.findall(r"^(?:[\w.]+\.)?(\w+(?:Error|Exception|Interrupt|Failed))\b", stderr, re.MULTILINE)
    return names[-1] if names else f"exit status {returncode}"
