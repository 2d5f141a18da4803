"""The kernels against the formula in float64, on batches in which every slot that is not theirs holds NaN."""

from __future__ import annotations

import math
import random

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import interpreter_builder

from folovllm.attention import triton_backend
from folovllm.attention.backend import AttentionParams, LayerKV
from folovllm.attention.metadata import AttentionMetadata
from folovllm.attention.triton_backend import TritonBackend, independent
from folovllm.attention.triton_configs import KernelConfig, KernelConfigs, choose_configs
from folovllm.attention.triton_kernels import find_request
from tests.m3.ragged import Ragged, attend, expected_attention, make_ragged

CPU = torch.device("cpu")
MIXED = [(0, 5), (16, 1), (3, 1), (15, 1), (7, 9), (0, 1), (31, 2), (0, 33)]  # prefills, decodes, chunks
DECODES = [(0, 1), (14, 1), (15, 1), (16, 1), (17, 1), (63, 1), (100, 1)]


def backend(rows: int = 16, tile: int = 16, segments: int = 4) -> TritonBackend:
    """Small tiles, so that small batches have several of them, full ones and others."""
    prefill = KernelConfig(rows, tile, 4, 2, two_loops=True)
    decode = KernelConfig(rows, tile, 4, 2, segments, two_loops=segments % 4 == 0)
    return TritonBackend(CPU, KernelConfigs(prefill, decode))


def close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float = 5e-6) -> None:
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)


def check(batch: Ragged, params: AttentionParams, ours: TritonBackend | None = None, tolerance: float = 5e-6) -> None:
    close(attend(ours or backend(), batch, params), expected_attention(batch, params), tolerance)


# ---------------------------------------------------------------------- attention


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 60), st.sampled_from([1, 1, 2, 5, 17])), min_size=1, max_size=4),
    block_size=st.sampled_from([1, 2, 3, 7, 8, 16, 32, 256]),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    head_dim=st.sampled_from([16, 24, 40, 80]),
    layout=st.sampled_from(["scattered", "contiguous", "reversed"]),
    shared_blocks=st.integers(0, 2),
    spare_blocks=st.integers(0, 2),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    window=st.one_of(st.none(), st.integers(1, 50)),
    softcap=st.sampled_from([None, None, 3.0]),
    tiles=st.tuples(st.sampled_from([16, 32]), st.sampled_from([16, 32]), st.sampled_from([1, 2, 8])),
    seed=st.integers(0, 99),
)
def test_any_ragged_batch_is_as_the_formula_says(
    lengths: list[tuple[int, int]],
    block_size: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    layout: str,
    shared_blocks: int,
    spare_blocks: int,
    padding: tuple[int, int],
    window: int | None,
    softcap: float | None,
    tiles: tuple[int, int, int],
    seed: int,
) -> None:
    heads = (kv_heads * group, kv_heads)
    batch = make_ragged(lengths, block_size, heads, head_dim, layout, shared_blocks, spare_blocks, padding, seed=seed)
    check(batch, AttentionParams(head_dim**-0.5, window, softcap), backend(*tiles))


@pytest.mark.parametrize("block_size", [1, 8, 16, 64, 256])
def test_lengths_at_the_borders_of_blocks(block_size: int) -> None:
    """One less than a block, a block, one more; decodes and chunks."""
    edges = sorted({1, max(1, block_size - 1), block_size, block_size + 1, min(2 * block_size, 300)})
    lengths = [(length - 1, 1) for length in edges]
    check(make_ragged(lengths, block_size, (2, 1)), AttentionParams(0.25), backend(16, 32))
    lengths += [(0, length) for length in edges if length < 40] + [(length, 3) for length in edges if length < 70]
    check(make_ragged(lengths, block_size, (2, 1)), AttentionParams(0.25), backend(16, 32))


@pytest.mark.parametrize("group", [1, 3, 4, 7])
def test_groups_of_query_heads(group: int) -> None:
    for lengths in ([(9, 1), (20, 1)], [(9, 1), (0, 7)]):
        check(make_ragged(lengths, 4, (3 * group, 3)), AttentionParams(0.25), backend(segments=2))


@pytest.mark.parametrize("group", [16, 17, 33])
def test_a_group_with_more_heads_than_a_tile_has_rows(group: int) -> None:
    for heads in ((2 * group, 2), (group, 1)):
        for lengths in ([(20, 1)], [(3, 2)]):
            check(make_ragged(lengths, 8, heads), AttentionParams(0.25), backend(segments=2))


@pytest.mark.parametrize("group", [3, 5])
def test_programs_may_run_in_any_order(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU keeps to none. So no program may write a row of another one, not even if that one puts it right later."""
    in_order = interpreter_builder.set_grid_idx

    def backwards(*index: int) -> None:
        in_order(*(size - 1 - i for i, size in zip(index, interpreter_builder.grid_dim, strict=True)))

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", backwards)
    for lengths in ([(9, 1), (0, 23), (5, 7)], [(40, 1), (9, 1)]):
        check(make_ragged(lengths, 4, (2 * group, 2)), AttentionParams(0.25), backend(segments=2))


@pytest.mark.parametrize("head_dim", [1, 24, 64, 72, 128, 256])
def test_head_sizes(head_dim: int) -> None:
    for lengths in ([(20, 1)], [(9, 1), (0, 7)]):
        check(make_ragged(lengths, 4, (6, 3), head_dim), AttentionParams(head_dim**-0.5))


@pytest.mark.parametrize("window", [1, 8, 15, 16, 17])
def test_a_sliding_window_in_prefills_chunks_and_decodes(window: int) -> None:
    for lengths in (MIXED, DECODES):
        check(make_ragged(lengths, 8, (2, 1)), AttentionParams(0.25, window))


@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_a_softcap(softcap: float) -> None:
    for lengths, window in ((MIXED, None), (DECODES, 9)):
        batch = make_ragged(lengths, 8, (2, 1))
        check(batch, AttentionParams(0.7, window, softcap))
        without = expected_attention(batch, AttentionParams(0.7, window))
        assert (expected_attention(batch, AttentionParams(0.7, window, softcap)) - without).abs().max() > 1e-4


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, None), (9, 2.0)])
@pytest.mark.parametrize("segments", [1, 4])
def test_sinks(window: int | None, softcap: float | None, segments: int) -> None:
    """A head may attend to nothing: one more term in the sum of weights, however many segments its keys have."""
    for lengths in (MIXED, DECODES):
        batch = make_ragged(lengths, 8, (4, 2))
        for sinks in (torch.tensor([-2.0, 0.5, 3.0, 1.0]), torch.tensor([-math.inf, -200.0, 200.0, 3.0])):
            check(batch, AttentionParams(0.7, window, softcap, sinks), backend(16, 16, segments))


@pytest.mark.parametrize(("head_dim", "value_dim"), [(24, 16), (16, 40), (192, 128), (8, 1)])
def test_keys_and_values_of_two_sizes(head_dim: int, value_dim: int) -> None:
    for lengths in ([(9, 1), (20, 1)], [(9, 1), (0, 7), (30, 5)]):
        batch = make_ragged(lengths, 4, (6, 3), head_dim, padding=(3, 2), value_dim=value_dim)
        for params in (AttentionParams(0.2), AttentionParams(0.2, 9, 3.0, torch.linspace(-2, 2, 6))):
            check(batch, params)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_large_scores_do_not_overflow(softcap: float | None) -> None:
    for lengths in (DECODES[-2:], [(10, 1), (0, 8), (5, 40)]):
        check(make_ragged(lengths, 4, (2, 1)), AttentionParams(50.0, None, softcap), tolerance=2e-4)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("past", "new"), [(100, 1), (50, 50)])
def test_scores_that_rise_or_fall_from_tile_to_tile(sign: float, past: int, new: int) -> None:
    """Every tile raises the maximum, or only the first does: what was summed before is rescaled, or kept."""
    batch = make_ragged([(past, new)], 8, (2, 1))
    batch.query.fill_(1.0)
    batch.keys[0] += sign * torch.arange(past + new)[:, None, None] / 20
    for position in range(past):
        batch.kv.keys[batch.meta.tables[0][position // 8], position % 8] = batch.keys[0][position]
    for segments in (1, 4):
        check(batch, AttentionParams(0.25), backend(16, 16, segments))


@pytest.mark.parametrize("segments", [2, 4, 16])
@pytest.mark.parametrize("window", [None, 20])
def test_keys_in_segments_of_which_some_or_most_are_empty(segments: int, window: int | None) -> None:
    """One token of K/V in 16 segments, and 101 tokens in two."""
    lengths = [(0, 1), (16, 1), (31, 1), (100, 1)]
    check(make_ragged(lengths, 16, (3, 1)), AttentionParams(0.25, window), backend(16, 16, segments))


def test_enough_programs_are_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of a decode are taken, depending on how many programs there are without a split."""
    launched: list[int] = []
    kernel = triton_backend.attention_kernel

    class Watched:
        def __getitem__(self, grid: tuple[int, int, int]) -> object:
            launched.append(grid[2])
            return kernel[grid]

    monkeypatch.setattr(triton_backend, "attention_kernel", Watched())
    for enough, segments in ((10**9, 4), (1, 1)):
        monkeypatch.setattr(triton_backend, "ENOUGH_PROGRAMS", enough)
        check(make_ragged(DECODES, 16), AttentionParams(0.25))
        assert launched.pop() == segments


@pytest.mark.parametrize(
    ("lengths", "padding", "enough"),
    [
        (MIXED, (1, 0), 1),
        (MIXED, (11, 4), 10**9),
        (DECODES, (1, 0), 10**9),
        (DECODES, (11, 4), 1),
        (DECODES, (11, 4), 10**9),
    ],
)
def test_padding_changes_no_result_and_comes_out_as_zeros(
    lengths: list[tuple[int, int]], padding: tuple[int, int], enough: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_backend, "ENOUGH_PROGRAMS", enough)
    batch = make_ragged(lengths, 8, padding=padding)
    backend().write(batch.kv, batch.new(batch.keys), batch.new(batch.values), batch.meta)
    # Memory that is not cleared holds anything: here it holds NaN.
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: torch.full(*as_shape(args), math.nan, **kwargs))
    out = backend().attend(batch.query, batch.kv, batch.meta, AttentionParams(0.25))
    num_tokens = sum(new for _, new in lengths)
    close(out[:num_tokens], expected_attention(batch, AttentionParams(0.25)))
    assert (out[num_tokens:] == 0).all()


def as_shape(args: tuple[object, ...]) -> tuple[object, ...]:
    return args if isinstance(args[0], (tuple, torch.Size)) else (args,)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1.2e-2)])
def test_16_bit_formats_within_their_rounding(dtype: torch.dtype, tolerance: float) -> None:
    """The inputs are 16-bit numbers exactly. Output has 11 or 8 bits, and weights are rounded to as many on the way."""
    for lengths in (MIXED, DECODES):
        check(make_ragged(lengths, 16, (4, 1), 64, dtype=dtype), AttentionParams(0.125), tolerance=tolerance)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("dtype", "capability"), [(torch.float32, (8, 0)), (torch.float16, (8, 0)), (torch.float16, (9, 0))]
)
def test_the_configurations_that_are_shipped(head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> None:
    ours = TritonBackend(CPU, choose_configs(dtype, head_dim, capability))
    for lengths in ([(150, 1)], [(0, 70), (130, 3)]):
        batch = make_ragged(lengths, 16, (2, 1), head_dim, dtype=dtype)
        check(batch, AttentionParams(head_dim**-0.5), ours, 5e-6 if dtype == torch.float32 else 2e-3)


def test_queries_need_not_lie_side_by_side() -> None:
    """A view of a larger tensor, as what `split` returns, and one whose heads are apart as well."""
    batch = make_ragged(MIXED, 8)
    expected = expected_attention(batch, AttentionParams(0.25))
    plain = batch.query
    wide = torch.full((len(plain), 7, 16), math.nan)
    wide[:, 2:6] = plain
    for view in (wide[:, 2:6], plain.transpose(0, 1).contiguous().transpose(0, 1)):
        assert not view.is_contiguous()
        batch.query = view
        close(attend(backend(), batch, AttentionParams(0.25)), expected)


# ---------------------------------------------------------------------- which request a block belongs to


@triton.jit
def find_all(query_start_loc, found, num_requests, BLOCK_Q: tl.constexpr):  # type: ignore[no-untyped-def]
    block = tl.program_id(0)
    tl.store(found + block, find_request(query_start_loc, block, num_requests, BLOCK_Q))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([0, 1, 1, 2, 4, 5, 7, 16]), min_size=1, max_size=9), st.sampled_from([1, 3, 4, 16]))
def test_every_block_of_every_request_is_found(lengths: list[int], block_q: int) -> None:
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    grid = starts[-1] // block_q + len(lengths)
    found = torch.full((grid,), -7, dtype=torch.int32)
    find_all[(grid,)](torch.tensor(starts, dtype=torch.int32), found, len(lengths), block_q)
    for request, length in enumerate(lengths):
        first = starts[request] // block_q + request
        needed = -(-length // block_q)
        assert found[first : first + needed].tolist() == [request] * needed
        assert first + needed <= grid


# ---------------------------------------------------------------------- writes and copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(2, 16), (3, 24), (5, 256), (1, 1)])
def test_the_new_tokens_are_written_to_their_slots_and_nothing_else_is(
    dtype: torch.dtype, kv_heads: int, head_dim: int
) -> None:
    batch = make_ragged(MIXED, 8, (kv_heads, kv_heads), head_dim, padding=(3, 2), dtype=dtype)
    slots = batch.meta.slot_mapping
    key, value = batch.new(batch.keys), batch.new(batch.values)
    expected = []
    for pool, new in ((batch.kv.keys, key), (batch.kv.values, value)):
        flat = pool.clone().flatten(0, 1)
        for token, slot in enumerate(slots.tolist()):
            flat[slot] = new[token]
        expected.append(flat.view(torch.uint8))
    # Keys in the middle of something larger, values with their heads apart.
    wide = torch.full((len(key), kv_heads + 3, head_dim), math.nan, dtype=dtype)
    wide[:, 2:-1] = key
    backend().write(batch.kv, wide[:, 2:-1], value.transpose(0, 1).contiguous().transpose(0, 1), batch.meta)
    for ours, theirs in zip((batch.kv.keys, batch.kv.values), expected, strict=True):
        assert torch.equal(ours.flatten(0, 1).view(torch.uint8), theirs)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=6), st.sampled_from([(1, 1, 1), (5, 3, 160)]))
def test_copies_happen_as_if_one_after_the_other(pairs: list[tuple[int, int]], block: tuple[int, int, int]) -> None:
    """Chains and rings included: 1 -> 2 and 2 -> 3 moves block 1 to block 3."""
    pool = torch.randn(2, 2, 7, *block, generator=torch.Generator().manual_seed(0))
    expected = pool.clone()
    for source, target in pairs:
        expected[:, :, target] = expected[:, :, source].clone()
    backend().copy_blocks(pool, pairs)
    assert torch.equal(pool, expected)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=8))
def test_what_is_copied_at_once_may_be_copied_in_any_order(pairs: list[tuple[int, int]]) -> None:
    runs = list(independent(pairs))
    assert [pair for run in runs for pair in run] == pairs and all(runs)
    for run in runs:
        shuffled = random.Random(0).sample(run, len(run))
        results = []
        for order in (run, shuffled):
            blocks = list(range(6))
            for source, target in order:
                blocks[target] = blocks[source]
            results.append(blocks)
        assert results[0] == results[1]


def test_independent_copies_are_one_run() -> None:
    assert list(independent([(1, 5), (1, 6), (2, 7)])) == [[(1, 5), (1, 6), (2, 7)]]
    assert list(independent([(1, 5), (5, 6)])) == [[(1, 5)], [(5, 6)]]
    assert list(independent([])) == []


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("dim", "dtype"), [(257, torch.float32), (16, torch.float64)])
def test_what_the_kernels_are_not_made_for_is_refused(dim: int, dtype: torch.dtype) -> None:
    kv = LayerKV(torch.zeros(2, 4, 1, dim, dtype=dtype), torch.zeros(2, 4, 1, dim, dtype=dtype))
    one = torch.ones(1, dtype=torch.int32)
    meta = AttentionMetadata(torch.tensor([0, 1]), one, one.long(), one[None], 4, [1], [1], [(1,)])
    message = "head_dim=257 .* allowed: <= 256" if dim == 257 else "dtype=torch.float64 .* allowed: float32, float16"
    with pytest.raises(ValueError, match=message):
        TritonBackend(CPU).attend(torch.zeros(1, 1, dim, dtype=dtype), kv, meta, AttentionParams(1.0))
