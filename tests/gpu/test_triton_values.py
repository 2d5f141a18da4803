"""The kernels on a GPU against the formula in float64, in three formats, on batches in which unused slots hold NaN."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch

from folovllm.attention.backend import AttentionParams, LayerKV
from folovllm.attention.metadata import AttentionMetadata
from tests.m3.ragged import Ragged, expected_attention, make_ragged

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from folovllm.attention import triton_backend
from folovllm.attention.triton_backend import TritonBackend

GPU = torch.device("cuda")
MIXED = [(0, 5), (16, 1), (3, 1), (15, 1), (7, 9), (0, 1), (31, 2), (0, 200), (333, 70)]
DECODES = [(0, 1), (14, 1), (15, 1), (16, 1), (17, 1), (63, 1), (900, 1)]
# Output has 24, 11 or 8 bits; in 16-bit formats the weights are rounded to as many on the way.
TOLERANCES = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
each_format = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
each_step = pytest.mark.parametrize("lengths", [MIXED, DECODES], ids=["mixed", "decodes"])


def on_gpu(batch: Ragged) -> tuple[LayerKV, AttentionMetadata]:
    fields = {f.name: getattr(batch.meta, f.name) for f in dataclasses.fields(batch.meta)}
    moved = {name: value.to(GPU) if isinstance(value, torch.Tensor) else value for name, value in fields.items()}
    return LayerKV(batch.kv.keys.to(GPU), batch.kv.values.to(GPU)), AttentionMetadata(**moved)


def check(batch: Ragged, params: AttentionParams) -> None:
    backend, (kv, meta) = TritonBackend(GPU), on_gpu(batch)
    backend.write(kv, batch.new(batch.keys).to(GPU), batch.new(batch.values).to(GPU), meta)
    there = params if params.sinks is None else dataclasses.replace(params, sinks=params.sinks.to(GPU))
    out = backend.attend(batch.query.to(GPU), kv, meta, there).cpu()
    expected, tolerance = expected_attention(batch, params), TOLERANCES[out.dtype]
    torch.testing.assert_close(out[: len(expected)].double(), expected, rtol=tolerance, atol=tolerance)
    assert (out[len(expected) :] == 0).all()


@each_format
@each_step
@pytest.mark.parametrize("head_dim", [16, 24, 64, 80, 96, 128, 192, 256])
def test_head_sizes(dtype: torch.dtype, lengths: list[tuple[int, int]], head_dim: int) -> None:
    check(make_ragged(lengths, 16, (4, 2), head_dim, dtype=dtype), AttentionParams(head_dim**-0.5))


@each_format
@each_step
@pytest.mark.parametrize("group", [1, 2, 3, 5, 7, 8, 71])
def test_groups(dtype: torch.dtype, lengths: list[tuple[int, int]], group: int) -> None:
    heads = (group, 1) if group > 8 else (3 * group, 3)
    check(make_ragged(lengths, 16, heads, 64, dtype=dtype), AttentionParams(0.125))


@each_format
@each_step
@pytest.mark.parametrize("block_size", [1, 3, 8, 32, 256])
def test_block_sizes_with_padding(dtype: torch.dtype, lengths: list[tuple[int, int]], block_size: int) -> None:
    check(make_ragged(lengths, block_size, (4, 2), 64, padding=(11, 4), dtype=dtype), AttentionParams(0.125))


@each_format
@each_step
@pytest.mark.parametrize(("window", "softcap"), [(1, None), (17, None), (100, 2.0), (None, 30.0)])
def test_windows_and_softcaps(
    dtype: torch.dtype, lengths: list[tuple[int, int]], window: int | None, softcap: float | None
) -> None:
    check(make_ragged(lengths, 16, (8, 2), 128, dtype=dtype), AttentionParams(128**-0.5, window, softcap))


@each_format
@each_step
def test_sinks_and_values_of_another_size(dtype: torch.dtype, lengths: list[tuple[int, int]]) -> None:
    for head_dim, value_dim, window in ((64, 64, 17), (192, 128, None)):
        batch = make_ragged(lengths, 16, (8, 2), head_dim, dtype=dtype, value_dim=value_dim)
        sinks = torch.linspace(-3, 3, 8, dtype=dtype)
        check(batch, AttentionParams(head_dim**-0.5, window, None, sinks))


@each_format
@pytest.mark.parametrize("enough", [1, 10**9])
def test_decodes_whole_and_in_segments(dtype: torch.dtype, enough: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "ENOUGH_PROGRAMS", enough)
    check(make_ragged(DECODES, 16, (8, 2), 128, padding=(3, 3), dtype=dtype), AttentionParams(128**-0.5))


@each_format
def test_copies(dtype: torch.dtype) -> None:
    pool = torch.randn(3, 2, 9, 16, 4, 80, device=GPU).to(dtype)
    expected = pool.clone()
    pairs = [(1, 5), (2, 6), (5, 7), (8, 1)]
    for source, target in pairs:
        expected[:, :, target] = expected[:, :, source].clone()
    TritonBackend(GPU).copy_blocks(pool, pairs)
    assert torch.equal(pool, expected)


def test_a_pool_that_32_bits_cannot_address() -> None:
    """Slots beyond 2^31 numbers; 10 GB for keys and values together."""
    block = 16 * 8 * 128
    blocks = 2**31 // block + 10
    if torch.cuda.mem_get_info()[0] < 6 * blocks * block:
        pytest.skip("the GPU has no room for it")
    batch = make_ragged([(40, 1), (0, 30)], 16, (16, 8), 128, dtype=torch.bfloat16)
    small, meta = on_gpu(batch)
    shift = blocks - len(small.keys)
    kv = LayerKV(*(torch.zeros(blocks, *small.keys.shape[1:], dtype=torch.bfloat16, device=GPU) for _ in range(2)))
    kv.keys[shift:], kv.values[shift:] = small.keys, small.values
    meta.block_table += shift
    meta.slot_mapping += shift * 16
    backend = TritonBackend(GPU)
    backend.write(kv, batch.new(batch.keys).to(GPU), batch.new(batch.values).to(GPU), meta)
    out = backend.attend(batch.query.to(GPU), kv, meta, AttentionParams(0.09)).cpu()
    torch.testing.assert_close(out.double(), expected_attention(batch, AttentionParams(0.09)), rtol=1.6e-2, atol=1.6e-2)


@each_step
def test_a_recorded_graph_serves_other_lengths(lengths: list[tuple[int, int]]) -> None:
    """The grid follows from shapes: recorded for a full step, replayed for one of the same size with padding in it."""
    backend, params = TritonBackend(GPU), AttentionParams(0.125)
    first = make_ragged([*lengths, (0, 1), (3, 1)], 16, (4, 2), 64, seed=1)
    other = make_ragged(lengths[::-1], 16, (4, 2), 64, padding=(2, 2), seed=2)
    kv, meta = on_gpu(first)
    query, key, value = (x.to(GPU) for x in (first.query, first.new(first.keys), first.new(first.values)))

    def step() -> torch.Tensor:
        backend.write(kv, key, value, meta)
        return backend.attend(query, kv, meta, params)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    other_kv, other_meta = on_gpu(other)
    num_blocks = len(other_kv.keys)
    for ours, theirs in (
        (kv.keys[:num_blocks], other_kv.keys),
        (kv.values[:num_blocks], other_kv.values),
        (query, other.query),
        (key, other.new(other.keys)),
        (value, other.new(other.values)),
        (meta.slot_mapping, other_meta.slot_mapping),
        (meta.query_start_loc, other_meta.query_start_loc),
        (meta.seq_lens, other_meta.seq_lens),
        (meta.block_table, other_meta.block_table),
    ):
        ours.copy_(theirs)
    graph.replay()
    expected = expected_attention(other, params)
    torch.testing.assert_close(out[: len(expected)].cpu().double(), expected, rtol=5e-6, atol=5e-6)
    assert (out[len(expected) :] == 0).all()
