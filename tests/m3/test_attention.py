"""Attention over blocks against the formula in float64, on batches in which every slot that is not theirs holds NaN."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from folovllm.attention.backend import AttentionBackend, AttentionParams
from folovllm.attention.reference import ReferenceBackend, visible_tokens
from folovllm.attention.torch_backend import TorchBackend
from tests.m3.ragged import attend, expected_attention, make_ragged

BACKENDS: dict[str, Callable[[], AttentionBackend]] = {"reference": ReferenceBackend, "torch": TorchBackend}
backends = pytest.mark.parametrize("name", BACKENDS)
MIXED = [(0, 5), (16, 1), (3, 1), (15, 1), (7, 9), (0, 1), (31, 2), (0, 33)]  # prefills, decodes, chunks


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------- the reference itself


def test_the_formula_is_torchs_own_attention_in_float64() -> None:
    """Ties the token-by-token formula of these tests to a function that everybody knows."""
    batch = make_ragged([(0, 6), (4, 3)], block_size=4, heads=(4, 2), head_dim=8)
    for window in (None, 3):
        params = AttentionParams(0.3, window)
        ours, start = expected_attention(batch, params), 0
        for (past, new), keys, values in zip(batch.lengths, batch.keys, batch.values, strict=True):
            query = batch.query[start : start + new].double().transpose(0, 1)  # [Hq, L, D]
            k, v = (x.double().repeat_interleave(2, dim=1).transpose(0, 1) for x in (keys, values))  # [Hq, S, D]
            i, j = torch.arange(past, past + new)[:, None], torch.arange(past + new)[None]
            mask = (j <= i) & (j > i - (window or 99))
            expected = scaled_dot_product_attention(query, k, v, attn_mask=mask, scale=0.3).transpose(0, 1)
            close(ours[start : start + new], expected, 1e-12)
            start += new


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_reference_in_float64_is_the_formula(window: int | None, softcap: float | None) -> None:
    for block_size in (1, 4, 16):
        batch = make_ragged(MIXED, block_size, dtype=torch.float64)
        params = AttentionParams(0.7, window, softcap)
        close(attend(ReferenceBackend(torch.float64), batch, params), expected_attention(batch, params), 1e-12)


def test_the_reference_computes_in_the_precision_it_was_made_for() -> None:
    batch = make_ragged([(40, 20)], 16, dtype=torch.bfloat16)
    params = AttentionParams(0.25)
    exact = expected_attention(batch, params)
    wide = attend(ReferenceBackend(torch.float64), batch, params)
    torch.testing.assert_close(wide, exact.bfloat16(), rtol=0, atol=0)  # rounded once, at the end


@given(st.integers(1, 20), st.integers(0, 20), st.one_of(st.none(), st.integers(1, 25)))
def test_who_sees_whom(new: int, past: int, window: int | None) -> None:
    visible = visible_tokens(new, past + new, window)
    for row in range(new):
        for position in range(past + new):
            distance = past + row - position
            assert visible[row, position] == (0 <= distance < (window or math.inf))


# ---------------------------------------------------------------------- every backend


@backends
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.sampled_from([1, 1, 2, 5, 17])), min_size=1, max_size=5),
    block_size=st.sampled_from([1, 2, 3, 7, 8, 16, 32, 256]),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    head_dim=st.sampled_from([16, 24, 32, 40, 80, 128]),
    layout=st.sampled_from(["scattered", "contiguous", "reversed"]),
    shared_blocks=st.integers(0, 3),
    spare_blocks=st.integers(0, 2),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    window=st.one_of(st.none(), st.integers(1, 50)),
    seed=st.integers(0, 99),
)
def test_any_ragged_batch_is_as_the_formula_says(
    name: str,
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
    seed: int,
) -> None:
    batch = make_ragged(
        lengths,
        block_size,
        (kv_heads * group, kv_heads),
        head_dim,
        layout,
        shared_blocks,
        spare_blocks,
        padding,
        seed=seed,
    )
    params = AttentionParams(head_dim**-0.5, window)
    close(attend(BACKENDS[name](), batch, params), expected_attention(batch, params), 5e-6)


@backends
@pytest.mark.parametrize("block_size", [1, 8, 16, 64, 256])
@pytest.mark.parametrize("layout", ["scattered", "contiguous"])
def test_lengths_at_the_borders_of_blocks(name: str, block_size: int, layout: str) -> None:
    """One less than a block, a block, one more; decodes and chunks. One of 300 keys crosses many or few."""
    edges = sorted({1, max(1, block_size - 1), block_size, block_size + 1, min(2 * block_size, 300), 300})
    lengths = [(length - 1, 1) for length in edges] + [(0, length) for length in edges if length < 70]
    lengths += [(length, 3) for length in edges if length < 70]
    batch = make_ragged(lengths, block_size, (2, 1), 16, layout)
    params = AttentionParams(0.25)
    close(attend(BACKENDS[name](), batch, params), expected_attention(batch, params), 5e-6)


@backends
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("head_dim", [16, 64, 72, 96, 256])
def test_groups_and_head_sizes(name: str, group: int, head_dim: int) -> None:
    batch = make_ragged([(9, 1), (0, 7), (6, 3)], 4, (2 * group, 2), head_dim)
    params = AttentionParams(head_dim**-0.5)
    close(attend(BACKENDS[name](), batch, params), expected_attention(batch, params), 5e-6)


@backends
@pytest.mark.parametrize("window", [1, 2, 7, 8, 9, 15, 16, 17, 40])
def test_a_sliding_window_in_prefills_chunks_and_decodes(name: str, window: int) -> None:
    for layout in ("scattered", "contiguous"):
        batch = make_ragged(MIXED, 8, layout=layout)
        params = AttentionParams(0.25, window)
        close(attend(BACKENDS[name](), batch, params), expected_attention(batch, params), 5e-6)


@backends
def test_large_scores_do_not_overflow(name: str) -> None:
    batch = make_ragged([(10, 1), (0, 8), (5, 4)], 4)
    params = AttentionParams(50.0)
    close(attend(BACKENDS[name](), batch, params), expected_attention(batch, params), 2e-4)


@backends
def test_in_bfloat16_within_its_rounding(name: str) -> None:
    """The inputs are bfloat16 exactly. Output has 8 bits, and weights may be rounded to 8 bits on the way."""
    batch = make_ragged(MIXED, 16, (8, 2), 64, dtype=torch.bfloat16)
    params = AttentionParams(0.125)
    close(attend(BACKENDS[name](), batch, params), expected_attention(batch, params), 2e-2)


@backends
def test_the_new_tokens_are_written_to_their_slots_and_nothing_else_is(name: str) -> None:
    batch = make_ragged(MIXED, 8, padding=(3, 2))
    before = batch.kv.keys.clone(), batch.kv.values.clone()
    backend = BACKENDS[name]()
    backend.write(batch.kv, batch.new(batch.keys), batch.new(batch.values), batch.meta)
    slots = set()
    for (past, new), table, keys, values in zip(
        batch.lengths, batch.meta.tables, batch.keys, batch.values, strict=True
    ):
        for position in range(past, past + new):
            block, offset = table[position // 8], position % 8
            slots.add((block, offset))
            assert torch.equal(batch.kv.keys[block, offset], keys[position])
            assert torch.equal(batch.kv.values[block, offset], values[position])
    for block in range(1, len(batch.kv.keys)):
        for offset in range(8):
            if (block, offset) not in slots:
                for now, then in zip((batch.kv.keys, batch.kv.values), before, strict=True):
                    assert torch.equal(now[block, offset].isnan(), then[block, offset].isnan())
                    assert torch.equal(now[block, offset].nan_to_num(), then[block, offset].nan_to_num())
    padding = batch.kv.keys[0]  # of the null block only the first slot is written
    assert not padding[0].isnan().any() and padding[1:].isnan().all()


@backends
def test_padding_changes_no_result(name: str) -> None:
    params = AttentionParams(0.25)
    plain = attend(BACKENDS[name](), make_ragged(MIXED, 8), params)
    for padding in ((1, 1), (9, 0), (0, 5), (11, 4)):
        batch = make_ragged(MIXED, 8, padding=padding)
        batch.query[: len(plain)] = make_ragged(MIXED, 8).query
        close(attend(BACKENDS[name](), batch, params), plain.double(), 1e-6)


@backends
def test_a_request_gets_the_same_alone_and_in_company(name: str) -> None:
    params = AttentionParams(0.25)
    backend = BACKENDS[name]()
    batch = make_ragged(MIXED, 8)
    together, start = attend(backend, batch, params), 0
    for index, (past, new) in enumerate(MIXED):
        alone = make_ragged([(past, new)], 8)
        alone.keys, alone.values = [batch.keys[index]], [batch.values[index]]
        alone.query = batch.query[start : start + new]
        for position in range(past):
            block = alone.meta.tables[0][position // 8], position % 8
            alone.kv.keys[block], alone.kv.values[block] = batch.keys[index][position], batch.values[index][position]
        close(attend(backend, alone, params), together[start : start + new].double(), 1e-6)
        start += new


# Prefills, chunks and decodes, two of them behind one prefix: those are attended to as a group.
SHARING = [(64, 1), (70, 1), (64, 5), *MIXED]


def sinks(num_heads: int, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(num_heads, generator=torch.Generator().manual_seed(8)) * scale


@backends
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("softcap", [0.5, 2.0, 50.0])
def test_a_softcap(name: str, softcap: float, window: int | None) -> None:
    batch = make_ragged(SHARING, 8, shared_blocks=8)
    params = AttentionParams(0.7, window, softcap)
    close(attend(BACKENDS[name](), batch, params), expected_attention(batch, params), 5e-6)
    without = expected_attention(batch, AttentionParams(0.7, window))
    assert (expected_attention(batch, params) - without).abs().max() > 1e-4  # it does something


@backends
@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_sinks(name: str, softcap: float | None, window: int | None) -> None:
    """A head may attend to nothing: one more term in the sum of weights, which no window hides and no softcap caps."""
    batch = make_ragged(SHARING, 8, shared_blocks=8)
    params = AttentionParams(0.7, window, softcap, sinks(4))
    close(attend(BACKENDS[name](), batch, params), expected_attention(batch, params), 5e-6)
    without = expected_attention(batch, AttentionParams(0.7, window, softcap))
    assert (expected_attention(batch, params) - without).abs().max() > 0.1


@backends
def test_sinks_far_above_and_below_all_scores(name: str) -> None:
    batch = make_ragged(SHARING, 8, shared_blocks=8)
    params = AttentionParams(0.7, sinks=torch.tensor([-torch.inf, -200.0, 200.0, 3.0]))
    close(attend(BACKENDS[name](), batch, params), expected_attention(batch, params), 5e-6)


@backends
@pytest.mark.parametrize(("head_dim", "value_dim"), [(24, 16), (16, 24), (192, 128), (8, 1)])
def test_keys_and_values_of_two_sizes(name: str, head_dim: int, value_dim: int) -> None:
    """DeepSeek's heads: a key has a part for the position, which a value lacks."""
    for lengths, layout in ((SHARING, "scattered"), (MIXED, "contiguous")):
        batch = make_ragged(lengths, 8, (4, 2), head_dim, layout, shared_blocks=8, value_dim=value_dim)
        for params in (AttentionParams(0.2), AttentionParams(0.2, 9, 3.0, sinks(4))):
            close(attend(BACKENDS[name](), batch, params), expected_attention(batch, params), 5e-6)


def test_a_layer_of_two_sizes_after_one_of_one_size() -> None:
    """Buffers for gathered blocks are reused only in the same shape."""
    backend = TorchBackend()
    for value_dim in (16, 24, 16, 8):
        batch = make_ragged(SHARING, 8, shared_blocks=8, value_dim=value_dim)
        close(attend(backend, batch, AttentionParams(0.2)), expected_attention(batch, AttentionParams(0.2)), 5e-6)


@backends
def test_softcaps_and_sinks_in_bfloat16_within_its_rounding(name: str) -> None:
    batch = make_ragged(SHARING, 16, (8, 2), 64, dtype=torch.bfloat16, shared_blocks=4)
    params = AttentionParams(0.125, None, 5.0, sinks(8).bfloat16())
    close(attend(BACKENDS[name](), batch, params), expected_attention(batch, params), 2e-2)
