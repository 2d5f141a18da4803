"""The order of the runs, and what happens when one of them goes wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from folovllm.course.bench import runner
from folovllm.course.bench.one_run import Job
from folovllm.course.bench.runner import Plan, RunFailed, Step, execute_in_process, failure_kind, run_rounds
from folovllm.course.bench.systems import System
from folovllm.course.bench.workloads import WORKLOADS

A, B, C = System("a", peer="continuous"), System("b", milestone="m1"), System("c", peer="static")
TEMPLATE = Job(None, "w1", "folo-tiny", "float32", "cpu", "auto")


def plan(*systems: System, workloads: tuple[str, ...] = ("w1", "w2"), rounds: int = 3) -> Plan:
    return Plan(systems, [WORKLOADS[w] for w in workloads], rounds, TEMPLATE)


class Recorder:
    """Executes jobs by writing them down. `answers`: what to raise for the n-th job (from 1)."""

    def __init__(self, **answers: BaseException) -> None:
        self.jobs: list[str] = []
        self.answers = {int(key.removeprefix("job")): value for key, value in answers.items()}

    def __call__(self, job: Job) -> dict[str, Any]:
        self.jobs.append("machine" if job.system is None else f"{job.workload}/{job.system.name}")
        if (error := self.answers.get(len(self.jobs))) is not None:
            raise error
        return {"job": len(self.jobs)}


def test_rounds_are_interleaved_and_the_order_turns():
    execute = Recorder()
    done = run_rounds(plan(A, B, C, rounds=4), execute)
    assert [" ".join(execute.jobs[i : i + 7]) for i in range(0, 28, 7)] == [
        "machine w1/a w1/b w1/c w2/a w2/b w2/c",
        "machine w1/b w1/c w1/a w2/b w2/c w2/a",
        "machine w1/c w1/a w1/b w2/c w2/a w2/b",
        "machine w1/a w1/b w1/c w2/a w2/b w2/c",
    ]
    assert len(execute.jobs) == plan(A, B, C, rounds=4).num_jobs
    # Each result stands in its round, under its workload and system.
    assert done.rounds[1].machine == {"job": 8}
    assert done.rounds[1].runs == {
        "w1": {"b": {"job": 9}, "c": {"job": 10}, "a": {"job": 11}},
        "w2": {"b": {"job": 12}, "c": {"job": 13}, "a": {"job": 14}},
    }


def test_what_does_not_apply_is_left_out_with_a_reason():
    execute = Recorder()
    mixed = plan(A, B, C, workloads=("mixed",), rounds=1)
    done = run_rounds(mixed, execute)
    assert execute.jobs == ["machine", "mixed/a", "mixed/b"]
    assert mixed.num_jobs == 3
    assert list(done.left_out["mixed"]) == ["c"] and "arrives" in done.left_out["mixed"]["c"]


def test_a_system_that_fails_is_not_run_again_and_its_rounds_stay():
    execute = Recorder(job5=RunFailed("OutOfMemoryError", "the last lines"))  # b in the second of three rounds
    seen: list[Step] = []
    done = run_rounds(plan(A, B, workloads=("w1",)), execute, seen.append)
    assert execute.jobs == ["machine", "w1/a", "w1/b", "machine", "w1/b", "w1/a", "machine", "w1/a"]
    assert done.left_out == {"w1": {"b": "failed in round 2: OutOfMemoryError"}}
    assert [sorted(r.runs["w1"]) for r in done.rounds] == [["a", "b"], ["a"], ["a"]]
    assert [step.failure for step in seen if step.failure] == ["OutOfMemoryError\nthe last lines"]
    assert not done.interrupted


def test_an_interrupt_keeps_complete_rounds_only():
    done = run_rounds(plan(A, B, workloads=("w1",)), Recorder(job5=KeyboardInterrupt()))
    assert done.interrupted
    assert [r.machine for r in done.rounds] == [{"job": 1}]


def test_a_job_that_cannot_work_ends_the_bench():
    execute = Recorder(job2=ValueError("max_model_len=1"))
    with pytest.raises(ValueError, match="max_model_len=1"):
        run_rounds(plan(A, B), execute)
    assert len(execute.jobs) == 2


def test_watchers_hear_of_each_job_before_and_after():
    seen: list[Step] = []
    run_rounds(plan(A, workloads=("w1",), rounds=1), Recorder(), seen.append)
    assert [(s.system, s.workload, s.result) for s in seen] == [
        (None, None, None),
        (None, None, {"job": 1}),
        ("a", "w1", None),
        ("a", "w1", {"job": 2}),
    ]


def test_a_job_survives_its_file(tmp_path: Path):
    for system in (
        System("m2:loop@4", milestone="m2", variant="loop", max_num_seqs=4),
        System("hf:dynamic:4:0.25", peer="dynamic", batch_size=4, window=0.25),
    ):
        job = Job(system, "w2", "x", "float32", "cpu", "dummy", 1, 0.5, 64, 8.0)
        job.save(tmp_path / "job.json")
        assert Job.load(tmp_path / "job.json") == job
    TEMPLATE.save(tmp_path / "job.json")
    assert Job.load(tmp_path / "job.json") == TEMPLATE


@pytest.mark.parametrize(
    ("stderr", "kind"),
    [
        ("Traceback (most recent call last):\n  ...\ntorch.OutOfMemoryError: CUDA out of memory", "OutOfMemoryError"),
        ("ValueError: a\n\nDuring handling of the above ...\n\nRuntimeError: b/c", "RuntimeError"),
        ("Killed", "exit status -9"),
        ("", "exit status -9"),
    ],
)
def test_a_failure_is_named_without_its_message(stderr, kind):
    assert failure_kind(-9, stderr) == kind


@pytest.mark.parametrize("own", [None, "active"])
def test_threads_of_a_run_do_not_spin_unless_the_user_says_so(monkeypatch, tmp_path, own):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "policy is $OMP_WAIT_POLICY" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(runner.sys, "executable", str(python))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if own is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", own)
    with pytest.raises(RunFailed, match=f"policy is {own or 'passive'}"):
        execute_in_process(TEMPLATE)


def test_a_process_that_dies_is_a_failed_run(monkeypatch, tmp_path):
    # An interpreter that fails at once stands for a run that is killed.
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'MemoryError' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(runner.sys, "executable", str(python))
    with pytest.raises(RunFailed) as failed:
        execute_in_process(TEMPLATE)
    assert failed.value.kind == "MemoryError"
