"""Promise 1 with the Triton backend: whole tiny models on interpreted kernels, token by token Hugging Face's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from folovllm import LLM, BeamSearchParams, SamplingParams
from folovllm.attention import triton_backend
from folovllm.attention.triton_backend import TritonBackend
from folovllm.attention.triton_configs import KernelConfig, KernelConfigs
from folovllm.course.measure.families import build
from folovllm.runner.paged_runner import PagedRunner
from tests.m3.cases import Case
from tests.m3.helpers import check_all_free
from tests.oracle import FAMILIES, OracleStats, assert_same_tokens, hf_greedy, random_prompt

LENGTHS, NEW_TOKENS = (3, 17, 8), 6


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def case(name: str) -> Case:
        if name not in made:
            made[name] = Case(name, tmp_path_factory.mktemp(name), LENGTHS, NEW_TOKENS, ignore_eos=True)
        return made[name]

    return case


def make(case: Case, **kwargs: Any) -> LLM:
    llm = case.llm(attention_backend="triton", **{"block_size": 4, **kwargs})
    runner = llm.engine.core.runner
    assert isinstance(runner, PagedRunner) and isinstance(runner.backend, TritonBackend)
    # Smaller than what is shipped: these models are small, and 16 segments of next to nothing take their time here.
    runner.backend.configs = KernelConfigs(KernelConfig(32, 32, 4, 2), KernelConfig(16, 16, 4, 2, 2))
    return llm


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_says_what_hugging_face_says(
    name: str, cases: Callable[[str], Case], oracle_stats: OracleStats
) -> None:
    """Among them heads of 24 numbers with a window of 8 tokens, and heads of 32 that are not hidden_size / heads."""
    llm = make(cases(name), block_size=4 if name in ("qwen2", "mistral") else 16)
    cases(name).check(llm, oracle_stats)
    assert llm.engine.stats.forwards < sum(map(len, cases(name).expected))


# Who gives way and what is swapped is not the kernels' business: a case of each.
@pytest.mark.parametrize(("mode", "block_size", "num_kv_blocks"), [("recompute", 1, 24), ("swap", 4, 6)])
def test_under_preemption(
    mode: str, block_size: int, num_kv_blocks: int, cases: Callable[[str], Case], oracle_stats: OracleStats
) -> None:
    """The pool holds one of the three at its longest."""
    case, pool = cases("llama"), {"block_size": block_size, "num_kv_blocks": num_kv_blocks}
    llm = make(case, **pool, preemption_mode=mode, swap_space=0.01)
    case.check(llm, oracle_stats)
    assert llm.engine.stats.preemptions > 0 and (llm.engine.stats.swapped_in_blocks > 0) == (mode == "swap")


def test_forks_copy_their_last_block_and_say_what_each_seed_says_alone(
    cases: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copies are the kernel's. Alone, and without paging, M1 with the same seeds gives the same."""
    case, copied = cases("qwen2"), []
    kernel = triton_backend.copy_kernel

    class Watched:
        def __getitem__(self, grid: tuple[int, int, int]) -> object:
            copied.append(grid[0])
            return kernel[grid]

    monkeypatch.setattr(triton_backend, "copy_kernel", Watched())
    wishes = {"max_tokens": 5, "temperature": 0.8, "ignore_eos": True}
    llm = make(case)
    copied.clear()  # the trial of the backend has copied, too
    shared = llm.generate([case.prompts[2]], SamplingParams(n=3, seed=11, **wishes), use_tqdm=False)[0].outputs
    assert sum(copied) == llm.engine.stats.copied_blocks > 0
    check_all_free(llm.engine)
    params = [SamplingParams(seed=11 + i, **wishes) for i in range(3)]
    alone = case.llm("m1").generate([case.prompts[2]] * 3, params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in alone] == [c.token_ids for c in shared]
    assert len({tuple(c.token_ids) for c in shared}) > 1


def test_beams(cases: Callable[[str], Case]) -> None:
    """Forked and copied in every round, and the same beams as with torch's attention, which is held against HF's."""
    case = cases("llama")
    llms = (make(case), case.llm(block_size=4, attention_backend="torch"))
    ours, theirs = (llm.beam_search([case.prompts[0]], BeamSearchParams(3, 5)) for llm in llms)
    assert [s.tokens for s in ours[0].sequences] == [s.tokens for s in theirs[0].sequences]
    for one, other in zip(ours[0].sequences, theirs[0].sequences, strict=True):
        assert one.cum_logprob == pytest.approx(other.cum_logprob, abs=1e-4)


def test_bfloat16_runs_to_the_end(tmp_path: Path, cases: Callable[[str], Case]) -> None:
    """Its first token has room for rounding, and a wrong product of bfloat16 would not be a matter of rounding."""
    case = cases("llama")
    logits = []
    for backend in ("triton", "reference"):
        llm = LLM(case.path, milestone="m3", dtype="bfloat16", device="cpu", attention_backend=backend, num_kv_blocks=9)
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=5, ignore_eos=True)
        (output,) = llm.generate([case.prompts[1]], params, use_tqdm=False)
        found = output.outputs[0].logprobs
        assert found is not None
        logits.append({token: entry.logprob for token, entry in found[0].items()})
    both = set(logits[0]) & set(logits[1])
    assert len(both) >= 4
    assert all(abs(logits[0][token] - logits[1][token]) < 0.3 for token in both)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "deepseek_v3"])
def test_caps_sinks_and_two_sizes_of_heads(name: str, tmp_path: Path, oracle_stats: OracleStats) -> None:
    """Families whose attention has more to it, on Hugging Face's code around the kernels."""
    model = build(name)
    model.save_pretrained(tmp_path)
    llm = LLM(str(tmp_path), attention_backend="triton", dtype="float32", device="cpu", num_kv_blocks=30, block_size=4)
    runner = llm.engine.core.runner
    assert isinstance(runner, PagedRunner) and isinstance(runner.backend, TritonBackend)
    runner.backend.configs = KernelConfigs(KernelConfig(32, 32, 4, 2), KernelConfig(16, 16, 4, 2, 2))
    prompts = [random_prompt(n, seed=n) for n in (9, 4)]
    params = SamplingParams(temperature=0, max_tokens=3)
    for prompt, output in zip(prompts, llm.generate(prompts, params, use_tqdm=False), strict=True):
        assert_same_tokens(output.outputs[0].token_ids, hf_greedy(model, prompt, 3), model, prompt, oracle_stats)
