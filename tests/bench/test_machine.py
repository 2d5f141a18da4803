"""What a result says of where it comes from."""

from __future__ import annotations

import getpass
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from folovllm.course.bench import machine


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one commit, whoever runs the tests and wherever."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "a.py").write_text("1\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "--quiet", "-m", "one")
    return tmp_path


def git(folder: Path, *args: str) -> str:
    return subprocess.run(("git", *args), cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_git_state_is_the_commit_and_whether_the_source_differs(repository):
    commit = git(repository, "rev-parse", "HEAD")
    assert machine.git_state(repository / "package") == {"commit": commit, "dirty": False}
    # A results file that the bench itself has just written makes no difference.
    (repository / "results").mkdir()
    (repository / "results" / "bench.json").write_text("{}")
    assert machine.git_state(repository / "package") == {"commit": commit, "dirty": False}
    (repository / "package" / "a.py").write_text("2\n")
    assert machine.git_state(repository / "package") == {"commit": commit, "dirty": True}
    git(repository, "checkout", "--quiet", ".")
    (repository / "b.py").write_text("untracked, outside of the folder that was asked from\n")
    assert machine.git_state(repository / "package") == {"commit": commit, "dirty": True}


def test_outside_of_git_nothing_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("GIT_DIR", raising=False)
    assert machine.git_state(tmp_path) == {"commit": None, "dirty": None}
    monkeypatch.setenv("PATH", "")
    assert machine.git_state(tmp_path) == {"commit": None, "dirty": None}


def test_hardware_and_versions_name_what_matters_and_nobody():
    found = {"hardware": machine.hardware(torch.device("cpu")), "versions": machine.versions()}
    assert found["hardware"]["threads"] == torch.get_num_threads()
    assert found["hardware"]["gpu"] is None and found["hardware"]["cpu"]
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(found["versions"]) == {"python", "folovllm", "torch", "transformers", "triton"}
    text = json.dumps(found)
    for secret in (socket.gethostname(), str(Path.home()), getpass.getuser() + "@"):
        assert secret not in text


def test_the_share_of_others_by_hand():
    # 4 s on 2 cores are 8 CPU seconds; 5 were used, 3 of them by us.
    before, after = machine.CpuTime(100.0, 10.0, 0.0), machine.CpuTime(105.0, 13.0, 4.0)
    assert before.share_of_others(after, cores=2) == 0.25
    # The two counters tick at different moments: never less than nothing.
    assert before.share_of_others(machine.CpuTime(102.0, 13.0, 4.0), cores=2) == 0.0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the counters are Linux's")
def test_our_own_work_is_not_others():
    before = machine.CpuTime.now()
    while time.process_time() - before.own < 0.3:
        pass
    after = machine.CpuTime.now()
    assert after.own - before.own >= 0.3
    assert after.everything - before.everything >= 0.25  # the machine has seen it too, to a tick or two
    assert 0 <= before.share_of_others(after, os.cpu_count()) <= 1.01


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(machine, "PACKAGES", ("torch", "no-such-package"))
    assert machine.versions()["no-such-package"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_probe_counts_bytes_and_flops(monkeypatch, dtype):
    # A clock that gives every call of the work one second: rates are then plain counts.
    monkeypatch.setattr(machine, "_best_seconds", lambda work, device: 1.0)
    monkeypatch.setattr(machine, "READ_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(machine, "GEMM_SIZE", 64)
    probed = machine.probe(torch.device("cpu"), dtype)
    assert probed["read_bytes_per_s"] == 2**20
    assert probed["gemm_flops_per_s"] == {str(m): 2 * m * 64 * 64 for m in (1, 8, 64, 512)}


def test_a_probe_cycles_through_more_weights_than_the_caches_hold(monkeypatch):
    counts = []
    monkeypatch.setattr(machine, "_best_seconds", lambda work, device: counts.append(work) or 1.0)
    monkeypatch.setattr(machine, "READ_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(machine, "GEMM_SIZE", 64)
    machine.probe(torch.device("cpu"), torch.float32)
    cycle = counts[-1]
    used = set()
    for _ in range(100):
        cycle()
        used.add(cycle.weights[cycle.turn].data_ptr())
    assert len(used) == 2**20 // (64 * 64 * 4)


def test_best_seconds_takes_the_shortest(monkeypatch):
    monkeypatch.setattr(machine, "MIN_SECONDS", 0.0)
    now = [0.0]
    durations = iter([9.0, 5.0, 4.0, 3.0, 2.0, 6.0, 7.0])  # a warm-up, a trial, five measurements
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])

    def work() -> None:
        now[0] += next(durations)

    assert machine._best_seconds(work, torch.device("cpu")) == 2.0
