"""What a paged engine is configured with: refusals by name, how large the pool becomes, and what the trace keeps."""

from __future__ import annotations

import builtins
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from folovllm import LLM, CacheConfig, EngineConfig, LLMEngine, ModelConfig, SamplingParams, SchedulerConfig
from folovllm.attention.reference import ReferenceBackend
from folovllm.attention.torch_backend import TorchBackend
from folovllm.kv_cache.interface import BlockSnapshot
from folovllm.messages import ScheduledRequest
from folovllm.runner import memory
from folovllm.runner.paged_runner import PagedRunner
from tests.m3.helpers import check_all_free, manager_of
from tests.oracle import random_prompt, tiny_model

GIB = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Qwen3: 2 layers, 2 KV heads of 32 numbers, at most 256 tokens."""
    path = tmp_path_factory.mktemp("model")
    tiny_model("qwen3", seed=3).save_pretrained(path)
    return str(path)


def make(folder: str, **kwargs: Any) -> LLM:
    return LLM(folder, milestone="m3", device="cpu", **{"dtype": "float32", **kwargs})


def block_bytes(block_size: int, number: int = 4) -> int:
    """Keys and values, 2 layers, 2 heads, 32 numbers of so many bytes, for each token of a block."""
    return 2 * 2 * block_size * 2 * 32 * number


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("milestone", ["m1", "m2"])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"attention_backend": "torch"},
            "attention_backend='torch' is not valid; allowed: 'auto' with milestone {}, which has Hugging Face's own",
        ),
        (
            {"attention_backend": "reference"},
            "attention_backend='reference' is not valid; allowed: 'auto' with milestone {}",
        ),
        (
            {"preemption_mode": "swap"},
            "preemption_mode='swap' is not valid; allowed: 'recompute' with milestone {}, which reserves and never",
        ),
        (
            {"trace_blocks": True},
            "trace_blocks=True is not valid; allowed: False with milestone {}, which has no blocks",
        ),
    ],
)
def test_what_needs_blocks_is_refused_without_them(milestone: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        LLM("folo-tiny", milestone=milestone, **kwargs)
    assert message.format(milestone) in str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"attention_backend": "flash"},
            "attention_backend='flash' is not valid; allowed: 'auto', 'reference', 'torch'",
        ),
        ({"preemption_mode": "drop"}, "preemption_mode='drop' is not valid; allowed: 'recompute', 'swap'"),
        ({"batching": "padded"}, "batching='padded' is not valid; allowed: None with milestone m3"),
        ({"enable_chunked_prefill": True}, "enable_chunked_prefill=True is not valid; allowed: False or None"),
        ({"enable_prefix_caching": True}, "enable_prefix_caching=True is not valid; allowed: False or None"),
        ({"block_size": 0}, "block_size=0 is not valid; allowed: an integer >= 1 and <= 256"),
        ({"block_size": 257}, "block_size=257 is not valid"),
        ({"block_size": 16.0}, "block_size=16.0 is not valid"),
        ({"num_kv_blocks": 0}, "num_kv_blocks=0 is not valid; allowed: an integer >= 1"),
        ({"num_kv_blocks": True}, "num_kv_blocks=True is not valid"),
        ({"swap_space": -1}, "swap_space=-1 is not valid; allowed: a number >= 0"),
        ({"swap_space": "4"}, "swap_space='4' is not valid"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization=0 is not valid; allowed: a number > 0 and <= 1"),
        ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization=1.1 is not valid"),
        ({"trace_blocks": "yes"}, "trace_blocks='yes' is not valid; allowed: True or False"),
        ({"block_sise": 16}, "LLM has no field 'block_sise' (did you mean 'block_size'?)"),
    ],
)
def test_bad_values_are_refused_with_field_value_and_what_is_allowed(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        LLM("folo-tiny", milestone="m3", **kwargs)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind"), [("auto", TorchBackend), ("torch", TorchBackend), ("reference", ReferenceBackend)]
)
def test_the_backend_is_the_one_that_was_asked_for(name: str, kind: type, folder: str) -> None:
    runner = make(folder, attention_backend=name).engine.core.runner
    assert isinstance(runner, PagedRunner) and type(runner.backend) is kind


def test_an_engine_from_configurations_is_the_same_engine(folder: str) -> None:
    engine = LLMEngine(
        engine_config=EngineConfig(
            model=ModelConfig(folder, dtype="float32", device="cpu", max_model_len=100),
            scheduler=SchedulerConfig(max_num_seqs=3, max_num_batched_tokens=120, preemption_mode="swap"),
            cache=CacheConfig(block_size=8, num_kv_blocks=20, swap_space=100 * block_bytes(8) / GIB),
            milestone="m3",
        )
    )
    manager, scheduler = manager_of(engine), engine.core.scheduler
    assert (manager.block_size, manager.pool.num_blocks, manager.host_pool.num_blocks) == (8, 20, 100)
    assert (scheduler.max_num_running_reqs, scheduler.max_num_batched_tokens, scheduler.swaps) == (3, 120, True)


# ---------------------------------------------------------------------- how large the pool becomes


@pytest.mark.parametrize("block_size", [1, 16, 256])
@pytest.mark.parametrize(("dtype", "number"), [("float32", 4), ("bfloat16", 2)])
def test_a_quarter_of_the_free_memory_of_a_cpu(
    block_size: int, dtype: str, number: int, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 10_000_000
    monkeypatch.setattr(memory, "free_cpu_bytes", lambda: free)
    llm = make(folder, dtype=dtype, block_size=block_size)
    blocks = manager_of(llm.engine).pool.num_blocks
    assert memory.CPU_MEMORY_SHARE == 0.25
    assert blocks == free // 4 // block_bytes(block_size, number)
    runner = llm.engine.core.runner
    assert isinstance(runner, PagedRunner)
    null = block_bytes(block_size, number)  # one more block, which padding is written to
    assert runner.storage.num_bytes == blocks * block_bytes(block_size, number) + null
    assert runner.storage.layers[1].keys.shape == (blocks + 1, block_size, 2, 32)


def test_more_than_can_ever_be_used_is_not_taken(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that run at their longest, and as much again for those who are held."""
    monkeypatch.setattr(memory, "free_cpu_bytes", lambda: 1000 * GIB)
    llm = make(folder, max_num_seqs=5, max_model_len=100, block_size=16)
    assert manager_of(llm.engine).pool.num_blocks == 2 * 5 * 7
    llm = make(folder, max_num_seqs=500, max_num_batched_tokens=100, max_model_len=100, block_size=16)
    assert manager_of(llm.engine).pool.num_blocks == 2 * 100 * 7  # no more run than the budget has tokens


def test_not_a_single_block_is_an_error_with_the_numbers(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = block_bytes(16)
    monkeypatch.setattr(memory, "free_cpu_bytes", lambda: 4 * needed - 1)
    with pytest.raises(ValueError) as caught:
        make(folder)
    message = str(caught.value)
    assert f"the model leaves {needed - 1:,} bytes for K/V and a block takes {needed:,}" in message
    assert "allowed: a smaller block_size" in message and "num_kv_blocks of your choice" in message
    assert manager_of(make(folder, num_kv_blocks=3).engine).pool.num_blocks == 3  # nobody asks for the memory then
    monkeypatch.setattr(memory, "free_cpu_bytes", lambda: 4 * needed)
    assert manager_of(make(folder).engine).pool.num_blocks == 1


def test_the_free_memory_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    free = memory.free_cpu_bytes()
    assert free > 0
    if hasattr(os, "sysconf"):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert free <= total

    def nothing_there(*args: Any, **kwargs: Any) -> Any:
        raise OSError

    monkeypatch.setattr(builtins, "open", nothing_there)
    if hasattr(os, "sysconf"):
        assert memory.free_cpu_bytes() == total
        monkeypatch.delattr(os, "sysconf")
    assert memory.free_cpu_bytes() == 8 * GIB


def test_a_gpu_gives_what_the_longest_step_leaves_of_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 80 GiB 10 are taken by others and 3 by the model, and a step takes 2 more for a while: 67 - 2 are free."""
    ran = []
    monkeypatch.setattr(memory, "profile_run", lambda *args: ran.append(args))
    for name, value in (
        ("synchronize", None),
        ("reset_peak_memory_stats", None),
        ("empty_cache", None),
        ("mem_get_info", (67 * GIB, 80 * GIB)),
        ("memory_allocated", 3 * GIB),
        ("max_memory_allocated", 5 * GIB),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    model = SimpleNamespace(device=torch.device("cuda"))
    for utilization, left in ((0.9, 65 * GIB), (1.0, 65 * GIB), (0.1, 3 * GIB), (0.05, 0)):
        config = EngineConfig(cache=CacheConfig(gpu_memory_utilization=utilization), milestone="m3")
        assert memory.determine_available_memory(config, model, None, None, None) == left  # type: ignore[arg-type]
    assert len(ran) == 4


@pytest.mark.parametrize("max_model_len", [16, 20, 31, 256])
def test_the_longest_step_is_one_that_can_be(max_model_len: int, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token of the budget, in requests as long as the model allows, also where that is not whole blocks."""
    llm = make(folder, max_model_len=max_model_len, max_num_batched_tokens=300, max_num_seqs=40)
    runner = llm.engine.core.runner
    assert isinstance(runner, PagedRunner)
    steps: list[list[ScheduledRequest]] = []
    fill = runner.buffers.fill

    def watched(scheduled: list[ScheduledRequest]) -> Any:
        steps.append(scheduled)
        return fill(scheduled)

    monkeypatch.setattr(runner.buffers, "fill", watched)
    memory.profile_run(runner.model, runner.buffers, runner.states.sampler, runner.backend)
    ((*shares,),) = steps
    assert sum(share.num_tokens for share in shares) == 300
    assert max(share.num_tokens for share in shares) == min(300, max_model_len)
    assert all(share.samples for share in shares)


def test_swap_space_is_host_memory_in_gib_and_only_for_swapping(folder: str) -> None:
    kwargs = {"num_kv_blocks": 8, "block_size": 4, "swap_space": 0.001}
    swaps, recomputes = make(folder, preemption_mode="swap", **kwargs), make(folder, **kwargs)
    blocks = int(0.001 * GIB) // block_bytes(4)
    for llm, expected in ((swaps, blocks), (recomputes, 0)):
        runner = llm.engine.core.runner
        assert isinstance(runner, PagedRunner)
        assert manager_of(llm.engine).host_pool.num_blocks == expected
        assert runner.storage.host_pools[0].nbytes == (expected + 1) * block_bytes(4)
        assert runner.storage.host_pools[0].device.type == "cpu"


def test_a_pool_smaller_than_the_model_serves_what_fits_and_refuses_the_rest(folder: str) -> None:
    llm = make(folder, num_kv_blocks=5, block_size=8, max_model_len=256)
    params = SamplingParams(temperature=0, max_tokens=8)
    prompts = [random_prompt(n, seed=n) for n in (3, 33, 34)]
    message = r"may grow to 42 tokens \(34 of prompt and 8 of output\), all but the last .* 6 blocks of 8, .* has 5"
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, params, use_tqdm=False)
    assert llm.engine.stats.steps == 0 and not llm.engine.has_unfinished_requests()
    outputs = llm.generate(prompts[:2], params, use_tqdm=False)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [8, 8]
    check_all_free(llm.engine)


# ---------------------------------------------------------------------- what the trace keeps


def test_snapshots_are_kept_when_asked_for(folder: str, tmp_path: Path) -> None:
    """After each step, so without what finished in it. Every table is as long as its request's K/V, and block 0 is
    in none of them."""
    llm = make(folder, num_kv_blocks=12, block_size=4, preemption_mode="swap", swap_space=0.01, trace_blocks=True)
    params = SamplingParams(n=3, seed=1, max_tokens=12, ignore_eos=True)
    llm.generate([random_prompt(n, seed=n) for n in (6, 11)], params, use_tqdm=False)
    # A sample that waits as a fork holds the blocks of its prompt without the last token.
    computed = {f"{prompt}/{k}": n - 1 for prompt, n in enumerate((6, 11)) for k in range(3)}
    hosts = shared = 0
    ran: set[str] = set()
    for step in llm.engine.trace:
        snapshot = step.blocks
        assert isinstance(snapshot, BlockSnapshot) and snapshot.block_size == 4
        computed |= {r.request_id: r.num_computed for r in step.requests}
        ran |= {r.request_id for r in step.requests}
        live = {r.request_id for r in step.requests} - set(step.finished)
        assert live <= set(snapshot.tables) and not set(snapshot.tables) & set(snapshot.host_tables)
        for tables in (snapshot.tables, snapshot.host_tables):
            for request_id, table in tables.items():
                assert len(table) == -(-computed[request_id] // 4) and 0 not in table
        named = [block for table in snapshot.tables.values() for block in table]
        assert list(snapshot.ref_cnt) == [named.count(block) for block in range(13)]
        assert snapshot.num_free == 12 - len(set(named)) and sum(snapshot.filled) == step.kv.used
        assert step.kv.reserved == 4 * len(set(named))
        assert step.kv.unshared == 4 * sum(len(table) for i, table in snapshot.tables.items() if i in ran)
        hosts += bool(snapshot.host_tables)
        shared += max(snapshot.ref_cnt) > 1
    assert hosts > 0 and shared > 0
    assert llm.engine.trace[-1].blocks.tables == {}
    saved = json.loads(llm.engine.trace.save(tmp_path / "trace.json").read_text())
    assert saved["steps"][0]["blocks"]["num_free"] == llm.engine.trace[0].blocks.num_free


def test_without_asking_there_are_none(folder: str) -> None:
    llm = make(folder)
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2), use_tqdm=False)
    assert [step.blocks for step in llm.engine.trace] == [None, None]


def test_a_snapshot_knows_of_a_stop_string_that_ended_a_request() -> None:
    """The text side ends it after the step was recorded. The record's blocks and its usage must say the same."""
    llm = LLM("folo-tiny", milestone="m3", dtype="float32", device="cpu", num_kv_blocks=9, trace_blocks=True)
    params = SamplingParams(temperature=0, max_tokens=20, stop=["e"])
    (output,) = llm.generate(["A block is"], params, use_tqdm=False)
    assert output.outputs[0].stop_reason == "e"
    last = llm.engine.trace[-1]
    assert last.finished == ["0"] and last.kv.used == 0
    assert last.blocks is not None and last.blocks.tables == {} and sum(last.blocks.filled) == 0


def test_stats_are_the_sums_of_the_steps(folder: str) -> None:
    llm = make(folder, num_kv_blocks=12, block_size=4, preemption_mode="swap", swap_space=0.01)
    prompts = [random_prompt(n, seed=n) for n in (6, 11, 9)]
    llm.generate(prompts, SamplingParams(n=2, seed=1, max_tokens=12, ignore_eos=True), use_tqdm=False)
    stats, steps = llm.engine.stats, list(llm.engine.trace)
    assert stats.steps == stats.forwards == len(steps)
    assert stats.generated_tokens == 6 * 12 == sum(r.num_sampled for step in steps for r in step.requests)
    assert stats.prompt_tokens_computed == sum(r.num_prompt for step in steps for r in step.requests)
    assert stats.preemptions == sum(len(step.preempted) for step in steps) > 0
    assert stats.max_running == max(len(step.requests) for step in steps)
    kinds = [type(op).__name__ for step in steps for op in step.kv_ops]
    counted = (stats.copied_blocks, stats.swapped_out_blocks, stats.swapped_in_blocks)
    assert counted == tuple(kinds.count(kind) for kind in ("BlockCopy", "SwapOut", "SwapIn"))
    assert stats.swapped_out_blocks > 0 and stats.padding_tokens == 0
    stats.reset()
    assert vars(stats) == dict.fromkeys(vars(stats), 0)
