"""Whole models on a GPU: the same tokens in float32 as Hugging Face, and a bench that runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from folovllm import LLM, SamplingParams
from folovllm.entrypoints.cli import app
from folovllm.runner.paged_runner import PagedRunner
from tests.m3.cases import MODELS, Case
from tests.m3.helpers import check_all_free
from tests.oracle import OracleStats

LENGTHS, NEW_TOKENS = (1, 2, 15, 16, 17, 60, 8, 33), 32


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Hugging Face's tokens, computed on the CPU in float32."""
    return {name: Case(name, tmp_path_factory.mktemp(name), LENGTHS, NEW_TOKENS, ignore_eos=True) for name in MODELS}


def make(case: Case, **kwargs: Any) -> LLM:
    given = {"num_kv_blocks": 100, "max_model_len": 128, "dtype": "float32", **kwargs}
    return LLM(case.path, milestone="m3", device="cuda", **given)


def backend_of(llm: LLM) -> str:
    assert isinstance(llm.engine.core.runner, PagedRunner)
    return llm.engine.core.runner.backend.name


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("block_size", [1, 16])
def test_the_same_tokens_in_float32(
    name: str, block_size: int, cases: dict[str, Case], oracle_stats: OracleStats
) -> None:
    llm = make(cases[name], block_size=block_size, num_kv_blocks=1000 // block_size)
    assert backend_of(llm) == "triton"
    cases[name].check(llm, oracle_stats)


@pytest.mark.parametrize("mode", ["recompute", "swap"])
@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_the_same_tokens_under_preemption(
    name: str, mode: str, cases: dict[str, Case], oracle_stats: OracleStats
) -> None:
    llm = make(cases[name], block_size=4, num_kv_blocks=24, preemption_mode=mode, swap_space=0.01)
    cases[name].check(llm, oracle_stats)
    assert llm.engine.stats.preemptions > 0


def test_forks_are_what_each_seed_gives_alone(cases: dict[str, Case]) -> None:
    case = cases["qwen2"]
    wishes = {"max_tokens": 12, "temperature": 0.8, "ignore_eos": True}
    llm = make(case, block_size=4)
    (shared,) = llm.generate([case.prompts[4]], SamplingParams(n=4, seed=3, **wishes), use_tqdm=False)
    assert llm.engine.stats.copied_blocks > 0
    params = [SamplingParams(seed=3 + i, **wishes) for i in range(4)]
    alone = make(case).generate([case.prompts[4]] * 4, params, use_tqdm=False)
    assert [c.token_ids for c in shared.outputs] == [o.outputs[0].token_ids for o in alone]
    check_all_free(llm.engine)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_log_probabilities_are_the_references(dtype: str, cases: dict[str, Case]) -> None:
    """The first token's, within what 16-bit numbers leave of them."""
    case, found = cases["llama"], []
    for backend in ("triton", "reference"):
        llm = make(case, dtype=dtype, attention_backend=backend)
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=5, ignore_eos=True)
        outputs = llm.generate(case.prompts, params, use_tqdm=False)
        found.append([{t: e.logprob for t, e in o.outputs[0].logprobs[0].items()} for o in outputs])
    for ours, theirs in zip(*found, strict=True):
        both = set(ours) & set(theirs)
        assert len(both) >= 4 and all(abs(ours[t] - theirs[t]) < 0.3 for t in both)


def test_the_pool_takes_its_share_of_the_card() -> None:
    llm = LLM("folo-tiny", milestone="m3", device="cuda", gpu_memory_utilization=0.3)
    outputs = llm.generate(["A block is"], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    assert outputs[0].finished and backend_of(llm) == "triton"


def bench(arguments: Sequence[str], out: Path) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["bench", *arguments, "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return report


def test_the_bench_runs(tmp_path: Path) -> None:
    typed = ["--milestones", "m3", "--peers", "sequential", "--workloads", "w2", "--rounds", "1", "--scale", "0.25"]
    report = bench([*typed, "--device", "cuda", "--dtype", "float32"], tmp_path / "bench.json")
    assert report["hardware"]["gpu"] == torch.cuda.get_device_name()
    numbers = report["summary"]["w2"]["m3"]
    assert numbers["output_tokens_per_s"]["median"] > 0
    assert numbers["same_tokens_as_base"] == [16, 16]
