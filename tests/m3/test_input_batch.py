"""A step as tensors: the layout against a plain loop, padding that changes nothing, memory that stays where it is."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm import LLM, SamplingParams
from folovllm.attention.metadata import AttentionMetadata
from folovllm.attention.torch_backend import StepLayout
from folovllm.engine.factory import GPU_SIZES
from folovllm.kv_cache.interface import BlockPlan, KVPlan
from folovllm.messages import ScheduledRequest
from folovllm.runner.input_batch import InputBatch, ModelInput
from folovllm.runner.paged_runner import PagedRunner
from tests.m3.helpers import check_all_free
from tests.oracle import OracleStats, assert_same_tokens, hf_greedy, random_prompt, tiny_model

CPU = torch.device("cpu")
MAX_TOKENS, MAX_REQUESTS, MAX_BLOCKS = 64, 8, 24


@st.composite
def steps(draw: st.DrawFn, sizes: tuple[int, ...] = (1, 2, 3, 16, 256)) -> tuple[int, list[ScheduledRequest]]:
    """A block size and the shares of a step, each with blocks of its own in any order."""
    size = draw(st.sampled_from(sizes))
    shares = []
    for index in range(draw(st.integers(1, MAX_REQUESTS))):
        start, count = draw(st.integers(0, 12)), draw(st.sampled_from([1, 1, 1, 2, 5, 8]))
        needed = -(-(start + count) // size)
        table = draw(st.lists(st.integers(1, 999), min_size=needed, max_size=MAX_BLOCKS, unique=True))
        tokens = draw(st.lists(st.integers(0, 99), min_size=count, max_size=count))
        plan = BlockPlan(str(index), start, count, (), tuple(table))
        shares.append(ScheduledRequest(str(index), tokens, start, draw(st.booleans()), plan))
    return size, shares


def spoil(buffers: InputBatch) -> None:
    """What a longer step before this one might have left."""
    for buffer in vars(buffers).values():
        if hasattr(buffer, "array"):
            buffer.array[...] = 12345


def check_layout(batch: ModelInput, size: int, shares: list[ScheduledRequest], padded: tuple[int, int]) -> None:
    """Token by token and request by request. padded: the lengths of the axes of tokens and of requests."""
    meta = batch.metadata
    tokens, positions, slots, starts, lens, rows, samples = [], [], [], [0], [], [], []
    for share in shares:
        assert isinstance(share.plan, BlockPlan)
        for i, token in enumerate(share.token_ids):
            tokens.append(token)
            positions.append(share.start + i)
            slots.append(share.plan.block_table[(share.start + i) // size] * size + (share.start + i) % size)
        starts.append(len(tokens))
        lens.append(share.start + len(share.token_ids))
        rows.append([*share.plan.block_table, *[0] * (MAX_BLOCKS - len(share.plan.block_table))])
        if share.samples:
            samples.append(len(tokens) - 1)
    more_tokens, more_requests = padded[0] - len(tokens), padded[1] - len(shares)
    assert more_tokens == batch.padding_tokens >= 0 and more_requests >= 0
    assert batch.token_ids.tolist() == tokens + [0] * more_tokens
    assert batch.positions.tolist() == positions + [0] * more_tokens
    assert meta.slot_mapping.tolist() == slots + [0] * more_tokens  # the first slot of the null block
    assert meta.query_start_loc.tolist() == starts + [len(tokens)] * more_requests
    assert meta.seq_lens.tolist() == lens + [0] * more_requests
    assert meta.block_table.tolist() == rows + [[0] * MAX_BLOCKS] * more_requests
    assert batch.sample_rows.tolist() == samples
    # The same on the host.
    assert meta.query_lens == [len(share.token_ids) for share in shares] and meta.kv_lens == lens
    assert meta.tables == [share.plan.block_table for share in shares] and meta.block_size == size
    for tensor, kind in (
        (batch.token_ids, torch.int64),
        (batch.positions, torch.int64),
        (meta.slot_mapping, torch.int64),
        (meta.query_start_loc, torch.int32),
        (meta.seq_lens, torch.int32),
        (meta.block_table, torch.int32),
    ):
        assert tensor.dtype == kind and tensor.is_contiguous()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(steps())
def test_the_layout_is_the_loops(step: tuple[int, list[ScheduledRequest]]) -> None:
    size, shares = step
    buffers = InputBatch(MAX_TOKENS, MAX_REQUESTS, MAX_BLOCKS, size, CPU)
    spoil(buffers)
    buffers.query_start_loc.array[0] = 0  # nobody ever writes there
    check_layout(buffers.fill(shares), size, shares, (sum(s.num_tokens for s in shares), len(shares)))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(steps(), st.lists(st.integers(1, 70), max_size=6, unique=True).map(sorted))
def test_padded_to_sizes_the_rest_belongs_to_nobody(step: tuple[int, list[ScheduledRequest]], sizes: list[int]) -> None:
    size, shares = step
    buffers = InputBatch(MAX_TOKENS, MAX_REQUESTS, MAX_BLOCKS, size, CPU, sizes)
    spoil(buffers)
    buffers.query_start_loc.array[0] = 0

    def padded(count: int) -> int:
        return min([s for s in sizes if s >= count], default=count)

    tokens = sum(share.num_tokens for share in shares)
    check_layout(buffers.fill(shares), size, shares, (padded(tokens), padded(len(shares))))


def test_the_sizes_for_a_gpu_are_the_small_powers_of_two_and_multiples_of_8() -> None:
    assert GPU_SIZES[:5] == (1, 2, 4, 8, 16) and GPU_SIZES[-1] == 512 and list(GPU_SIZES) == sorted(set(GPU_SIZES))
    assert all(size % 8 == 0 for size in GPU_SIZES[3:]) and len(GPU_SIZES) == 3 + 64
    buffers = InputBatch(2048, 256, 4, 16, CPU, GPU_SIZES)
    assert [buffers.padded(n) for n in (1, 2, 3, 5, 9, 511, 512, 513, 2048)] == [1, 2, 4, 8, 16, 512, 512, 513, 2048]
    assert len(InputBatch(16, 4, 4, 16, CPU, GPU_SIZES).token_ids.host) == 512  # there is room for the largest size


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(steps(sizes=(16,)), min_size=2, max_size=5), st.booleans())
def test_every_step_is_laid_out_in_the_same_memory(
    many: list[tuple[int, list[ScheduledRequest]]], padded: bool
) -> None:
    """A recorded graph is replayed on the addresses it was recorded with."""
    buffers = InputBatch(MAX_TOKENS, MAX_REQUESTS, MAX_BLOCKS, 16, CPU, GPU_SIZES if padded else ())
    addresses = set()
    for _, shares in many:
        batch = buffers.fill(shares)
        meta = batch.metadata
        tensors = (batch.token_ids, batch.positions, batch.sample_rows, *vars(meta).values())
        addresses.add(tuple(t.data_ptr() for t in tensors if isinstance(t, torch.Tensor) and t.numel()))
        lengths = (sum(share.num_tokens for share in shares), len(shares))
        if padded:
            lengths = tuple(min(s for s in GPU_SIZES if s >= n) for n in lengths)  # type: ignore[assignment]
        check_layout(batch, 16, shares, lengths)
    assert len({found[:2] for found in addresses}) == 1
    assert len({found[-4:] for found in addresses}) == 1


def test_a_plan_without_blocks_is_not_for_this_runner() -> None:
    buffers = InputBatch(MAX_TOKENS, MAX_REQUESTS, MAX_BLOCKS, 16, CPU)
    with pytest.raises(RuntimeError, match="request 'r' has a plan without blocks"):
        buffers.fill([ScheduledRequest("r", [1], 0, True, KVPlan("r", 0, 1))])


# ---------------------------------------------------------------------- where K/V can be read in one piece


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    size=st.sampled_from([1, 2, 16]),
    requests=st.lists(
        st.tuples(
            st.one_of(
                st.lists(st.integers(1, 40), min_size=1, max_size=6, unique=True),
                st.tuples(st.integers(1, 40), st.integers(1, 6)).map(lambda t: list(range(t[0], t[0] + t[1]))),
            ),
            st.integers(1, 200),
        ),
        min_size=1,
        max_size=5,
    ),
)
def test_places_lead_to_every_slot_in_order(size: int, requests: list[tuple[list[int], int]]) -> None:
    tables = [tuple(table) for table, _ in requests]
    kv_lens = [1 + length % (len(table) * size) for table, length in requests]
    nothing = torch.zeros(0, dtype=torch.int64)
    meta = AttentionMetadata(nothing, nothing, nothing, nothing, size, [1] * len(tables), kv_lens, tables)
    places = StepLayout(meta).places
    pool = np.arange(50 * size)  # a slot holds its own number
    blocks = [] if places.scattered_blocks is None else places.scattered_blocks.tolist()
    copied = np.concatenate([np.arange(b * size, (b + 1) * size) for b in blocks]) if blocks else pool[:0]
    for table, length, in_pool, slots in zip(tables, kv_lens, places.in_pool, places.slots, strict=True):
        expected = [table[i // size] * size + i % size for i in range(length)]
        assert (pool if in_pool else copied)[slots].tolist() == expected
        used = table[: -(-length // size)]
        assert in_pool == all(b - a == 1 for a, b in pairwise(used))


# ---------------------------------------------------------------------- through a real model


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_padding_as_on_a_gpu_changes_no_token(
    family: str, backend: str, tmp_path: Path, oracle_stats: OracleStats
) -> None:
    torch.set_num_threads(1)
    model = tiny_model(family, seed=3)
    model.save_pretrained(tmp_path)
    prompts = [random_prompt(n, seed=n) for n in (1, 7, 9, 33, 60)]
    sampled = SamplingParams(n=3, seed=11, max_tokens=12)
    seen = []
    for sizes in ((), GPU_SIZES):
        llm = LLM(
            str(tmp_path),
            milestone="m3",
            dtype="float32",
            device="cpu",
            attention_backend=backend,
            max_num_seqs=4,
            num_kv_blocks=20,
            block_size=8,
        )
        runner = llm.engine.core.runner
        assert isinstance(runner, PagedRunner)
        runner.buffers = InputBatch(2048, 4, 32, 8, CPU, sizes)
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
        for prompt, output in zip(prompts, outputs, strict=True):
            expected = hf_greedy(model, prompt, 16)
            assert_same_tokens(output.outputs[0].token_ids, expected, model, prompt, oracle_stats)
        padding = [step.padding_tokens for step in llm.engine.trace]
        tokens = [step.num_scheduled_tokens for step in llm.engine.trace]
        expected_padding = [min(s for s in sizes if s >= n) - n if sizes else 0 for n in tokens]
        assert padding == expected_padding and llm.engine.stats.padding_tokens == sum(padding)
        assert (sum(padding) > 0) == bool(sizes)
        seen.append([c.token_ids for c in llm.generate([prompts[2]], sampled, use_tqdm=False)[0].outputs])
        check_all_free(llm.engine)
    assert seen[0] == seen[1]


def test_the_runners_inputs_stay_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("qwen3", seed=3).save_pretrained(tmp_path)
    llm = LLM(str(tmp_path), milestone="m3", dtype="float32", device="cpu", max_num_seqs=4)
    runner = llm.engine.core.runner
    assert isinstance(runner, PagedRunner)
    fill: Callable[..., ModelInput] = runner.buffers.fill
    addresses = []

    def watched(scheduled: list[ScheduledRequest]) -> ModelInput:
        batch = fill(scheduled)
        meta = batch.metadata
        tensors = (batch.token_ids, batch.positions, meta.slot_mapping, meta.query_start_loc, meta.block_table)
        addresses.append(tuple(tensor.data_ptr() for tensor in tensors))
        return batch

    monkeypatch.setattr(runner.buffers, "fill", watched)
    layers = [layer.keys.data_ptr() for layer in runner.storage.layers]
    prompts = [random_prompt(n, seed=n) for n in (1, 7, 9, 33, 60)]
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    assert len(addresses) == llm.engine.stats.forwards > 8 and len(set(addresses)) == 1
    assert layers == [layer.keys.data_ptr() for layer in runner.storage.layers]
