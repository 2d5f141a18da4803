"""`folovllm bench`, as a user types it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from folovllm.course.bench import cli
from folovllm.course.bench.one_run import Job
from folovllm.course.bench.record import token_hash
from folovllm.course.bench.runner import RunFailed, execute_in_process
from folovllm.course.bench.systems import parse_milestones
from folovllm.course.bench.workloads import WORKLOADS, draw
from folovllm.entrypoints.cli import app
from folovllm.models.loader import load_hf_model, resolve_model
from tests.bench.test_report import run
from tests.oracle import hf_greedy, tiny_config

ENV = {"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}
README = (Path(__file__).parents[2] / "results" / "README.md").read_text(encoding="utf-8")


def invoke(*args: str) -> Any:
    return CliRunner().invoke(app, ["bench", *args], env=ENV)


def strings_in(data: Any) -> list[str]:
    if isinstance(data, dict):
        return [s for key, value in data.items() for s in [key, *strings_in(value)]]
    if isinstance(data, list):
        return [s for value in data for s in strings_in(value)]
    return [data] if isinstance(data, str) else []


def test_a_whole_bench_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "a.json"
    options = "--milestones m1 --peers sequential --workloads w1 --rounds 1 --dtype float32 --device cpu --scale 0.2"
    result = invoke(*options.split(), "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "round 1/1  w1  hf:sequential" in result.output and "GEMM" in result.output
    assert "…" not in result.output
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    report = json.loads(out.read_text())
    assert report["schema"] == 1
    assert report["command"] == f"python -m folovllm.course.bench {options} --out a.json"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", report["date"])
    assert (report["model"], report["dtype"], report["device"]) == ("folo-tiny", "float32", "cpu")
    assert report["workloads"]["w1"]["requests"] == [[26, 13, 0]]
    assert report["systems"] == ["m1", "hf:sequential"] and report["base"] == "hf:sequential"

    (measured,) = report["rounds"]
    own, peer = measured["runs"]["w1"]["m1"], measured["runs"]["w1"]["hf:sequential"]
    assert own["token_hashes"] == peer["token_hashes"] and len(own["token_hashes"]) == 1
    summary = report["summary"]["w1"]["m1"]
    assert summary["same_tokens_as_base"] == [1, 1]
    assert summary["ratio_to_base"]["median"] == own["output_tokens_per_s"] / peer["output_tokens_per_s"]
    for result_of_one in (own, peer):
        assert result_of_one["output_tokens"] == 13
        assert result_of_one["least_s"] > 0
        assert result_of_one["ttft_s"]["max"] < result_of_one["wall_s"]
        assert result_of_one["peak_memory_bytes"] > 2**20
    assert own["engine"]["stats"]["generated_tokens"] == 13
    # Qwen3 of 4 layers, 2 KV heads: 26 + 13 tokens are reserved, of which at most 26 + 11 were fed and not yet freed.
    per_token = own["kv_reserved_bytes"] / (26 + 13)
    assert own["kv_used_bytes"] == per_token * (26 + 11)
    assert peer["kv_used_bytes"] == per_token * (26 + 12)

    # Nothing that names this machine's files, and nothing that the README does not explain.
    assert [s for s in strings_in(report) if str(tmp_path) in s or str(Path.home()) in s or s.startswith("/")] == []
    for name in {*report, *own, *report["hardware"], *report["versions"]}:
        assert re.search(rf"\b{name}\b", README), f"results/README.md does not explain {name}"


def test_a_run_gives_the_tokens_of_generate(monkeypatch: pytest.MonkeyPatch):
    # The whole way through a process and two files, against Hugging Face in this one.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (system,) = parse_milestones("m1")
    job = Job(system, "w1", "folo-tiny", "float32", "cpu", "auto", seed=5, scale=0.1)
    model = load_hf_model(resolve_model("folo-tiny"), torch.float32, torch.device("cpu"))
    (request,) = draw(WORKLOADS["w1"], int(model.config.vocab_size), seed=5, scale=0.1)
    expected = hf_greedy(model, request.prompt_token_ids, request.max_tokens)
    assert execute_in_process(job)["token_hashes"] == [token_hash(expected)]


def test_a_job_that_cannot_work_says_why_through_its_process():
    job = Job(None, "w1", "no-such-model", "float32", "cpu", "auto")
    with pytest.raises(ValueError, match="'no-such-model' is unknown"):
        execute_in_process(job)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--rounds", "0"], "rounds=0"),
        (["--milestones", "m1,m9"], "milestone='m9'"),
        (["--milestones", "m1:loop"], "no variants"),
        (["--milestones", "m1@2"], "max_num_seqs='2'"),
        (["--max-num-seqs", "0"], "max_num_seqs=0"),
        (["--arrival-rate", "0"], "arrival_rate=0.0"),
        (["--peers", "dynamic:4"], "dynamic:N:S"),
        (["--milestones", "m2@4,m2@04"], "each system once"),
        (["--peers", "vllm"], "peer='vllm'"),
        (["--peers", "", "--milestones", ""], "nothing to run"),
        (["--base", "hf:static", "--peers", "sequential"], "base='hf:static'"),
        (["--workloads", "w7"], "workload='w7'"),
        (["--workloads", ","], "workloads=','"),
        (["--workloads", "w1,w1"], "workloads='w1,w1'"),
        (["--scale", "2"], "scale=2.0"),
        (["--dtype", "int8"], "dtype='int8'"),
        (["--device", "tpu"], "device='tpu'"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--model", "qwen3-0.6b"], "load_format='auto'"),
    ],
)
def test_mistakes_are_one_line_and_start_nothing(args: list[str], message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "execute_in_process", lambda job: pytest.fail("a process was started"))
    result = invoke(*args)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split()), result.output
    assert "Traceback" not in result.output


def test_a_workload_that_the_model_is_too_short_for(tmp_path: Path):
    tiny_config("llama", max_position_embeddings=100).save_pretrained(tmp_path)
    result = invoke("--model", str(tmp_path), "--load-format", "dummy", "--workloads", "w1")
    assert result.exit_code == 2
    assert "needs 192 tokens; allowed: 100" in " ".join(result.output.split())


class Fake:
    """Stands for the processes: measures nothing, and raises `error` at job number `at`."""

    def __init__(self, error: BaseException, at: int) -> None:
        self.error, self.at, self.jobs = error, at, 0

    def __call__(self, job: Job) -> dict[str, Any]:
        self.jobs += 1
        if self.jobs == self.at:
            raise self.error
        if job.system is None:
            return {"read_bytes_per_s": 4e10, "gemm_flops_per_s": {"1": 2e10}, "gemm_size": 2048}
        return run(100.0)


def test_ctrl_c_shows_what_there_is_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "execute_in_process", Fake(KeyboardInterrupt(), at=6))
    out = tmp_path / "a.json"
    out.write_text("what an earlier bench wrote")
    result = invoke("--milestones", "m1", "--peers", "sequential", "--workloads", "w1", "--out", str(out))
    assert result.exit_code == 130
    assert "interrupted after 1 complete round;" in result.output and "hf:sequential" in result.output
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert out.read_text() == "what an earlier bench wrote"


def test_a_failed_system_does_not_lose_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "execute_in_process", Fake(RunFailed("OutOfMemoryError", "in /some/file"), at=3))
    out = tmp_path / "a.json"
    result = invoke("--milestones", "m1", "--peers", "sequential", "--workloads", "w1", "--out", str(out))
    assert result.exit_code == 1
    assert "in /some/file" in result.output  # on the screen, not in the file
    report = json.loads(out.read_text())
    assert report["left_out"] == {"w1": {"hf:sequential": "failed in round 1: OutOfMemoryError"}}
    assert list(report["summary"]["w1"]) == ["m1"] and report["summary"]["w1"]["m1"]["wall_s"]["rounds"] == 3


def test_without_an_out_the_file_says_what_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "execute_in_process", Fake(RuntimeError(), at=-1))
    for other in ((), ("--scale", "0.5"), ("--arrival-rate", "4")):
        result = invoke("--dtype", "float32", "--device", "cpu", "--rounds", "1", *other)
        assert result.exit_code == 0, result.output
    assert {p.name for p in (tmp_path / "results").glob("*.json")} == {
        "bench-folo-tiny-float32-cpu.json",
        "bench-folo-tiny-float32-cpu-scale0.5.json",
        "bench-folo-tiny-float32-cpu-rate4.json",
    }


def test_batch_sizes_and_arrivals_reach_the_runs_and_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    jobs: list[Job] = []
    fake = Fake(RuntimeError(), at=-1)
    monkeypatch.setattr(cli, "execute_in_process", lambda job: jobs.append(job) or fake(job))
    options = "--milestones m1,m2:loop,m2:padded@2 --peers static:4 --workloads w2 --rounds 1 --dtype float32"
    more = f"--device cpu --max-num-seqs 8 --arrival-rate 2.5 --out {tmp_path}/a.json"
    result = invoke(*options.split(), *more.split())
    assert result.exit_code == 0, result.output
    assert "w2: 16 arriving at 2.5/s, 32-256 in" in result.output
    assert "no roofline: the requests arrive over time" in " ".join(result.output.split())
    assert [(job.system.name, job.system.max_num_seqs) for job in jobs if job.system] == [
        ("m1", None),
        ("m2:loop", 8),
        ("m2:padded@2", 2),
        ("hf:static:4", None),
    ]
    assert {job.arrival_rate for job in jobs} == {2.5}
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["arrival_rate"] == 2.5
    assert report["workloads"]["w2"]["arrivals"] == [r.arrival for r in draw(WORKLOADS["w2"], 100, arrival_rate=2.5)]
    assert "--max-num-seqs 8 --arrival-rate 2.5" in report["command"]


def test_a_result_without_a_commit_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "execute_in_process", Fake(RuntimeError(), at=-1))
    for commit in (None, "0" * 40):
        monkeypatch.setattr(cli.machine, "git_state", lambda commit=commit: {"commit": commit, "dirty": None})
        result = invoke("--workloads", "w1", "--rounds", "1", "--out", str(tmp_path / "a.json"))
        assert ("outside a git repository" in " ".join(result.output.split())) == (commit is None)


def test_the_command_in_the_file_repeats_it_without_naming_folders():
    options = cli.Options(model="/somewhere/my model", rounds=5, base="m1", out=Path("/elsewhere/b.json"), peers="")
    assert cli.command_line(options, "my model") == (
        "python -m folovllm.course.bench --model 'my model' --peers '' --rounds 5 --base m1 --out b.json"
    )
