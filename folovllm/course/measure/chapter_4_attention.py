"""The second measurement of chapter 4, attention alone: `python -m folovllm.course.measure attention` writes
`results/m3-attention-qwen3-0.6b.json`.

One decode step of a layer of Qwen3-0.6B's shape: each of `requests` has one new token and `length` tokens of K/V in
blocks of `block_size`, anywhere in a pool of its own per layer. A round runs each way over `layers` such layers, so
that K/V comes from memory and not from the processor's caches, in an order that turns.

summary, rounds    length -> way -> `seconds` of one layer, `over_gather` (times those of `gather` in that round) and
                   `kv_bytes_per_s`
  gather           per request: its K/V copied out of the blocks, then `scaled_dot_product_attention` with enable_gqa
  gather_grouped   the same, with the query heads of a KV head as rows of one head, so that they share a pass over it
  torch            `attention_backend="torch"`, blocks in random order
  torch_neighbours the same, blocks that lie side by side, as in an engine that has just started
difference         of each way, the largest from a float64 reference, at the first length
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from folovllm.attention.backend import AttentionParams, LayerKV
from folovllm.attention.metadata import AttentionMetadata
from folovllm.attention.reference import ReferenceBackend
from folovllm.attention.torch_backend import TorchBackend
from folovllm.course.bench.rounds import in_turn, spreads
from folovllm.course.measure.measuring import describe, in_rounds, seconds

MODEL = "qwen3-0.6b"
NUM_REQUESTS, BLOCK_SIZE, LENGTHS = 16, 16, (512, 128, 2048)
LAYERS = 8


def attention(console: Console, rounds: int, _: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Ways to attend over blocks, side by side."""
    config, dtype, header = describe(MODEL, "auto")
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    params = AttentionParams(config.head_dim**-0.5)
    measured: list[dict[str, Any]] = [{} for _ in range(rounds)]
    difference: dict[str, float] = {}
    for length in LENGTHS:
        layers = [pool(length, heads, dtype, layer) for layer in range(LAYERS)]
        query = torch.randn(NUM_REQUESTS, heads[0], heads[2]).to(dtype)  # [R, Hq, D]
        ways = ways_to_attend(query, length, params)
        if not difference:
            difference = differences(ways, query, layers[0], length, params)
        for index in range(-1, rounds):  # the first is a warm-up
            took = in_turn(
                {name: partial(seconds, partial(over, way, layers)) for name, way in ways.items()}, index + 1
            )
            if index >= 0:
                per_layer = {name: spent / LAYERS for name, spent in took.items()}
                measured[index][str(length)] = numbers(per_layer, length, heads, dtype)
        summary = spreads([current[str(length)] for current in measured])
        shown = {name: round(way["over_gather"]["median"], 2) for name, way in summary.items()}
        console.print(f"{NUM_REQUESTS} x {length}: of gather + SDPA {shown}", highlight=False)
    data = in_rounds(
        header,
        f"attention --rounds {rounds} --threads {torch.get_num_threads()}",
        measured,
        requests=NUM_REQUESTS,
        block_size=BLOCK_SIZE,
        layers=LAYERS,
        heads=dict(zip(("query", "kv", "dim"), heads, strict=True)),
        difference=difference,
    )
    return [(f"m3-attention-{MODEL}", data)]


def numbers(took: dict[str, float], length: int, heads: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    """What one round says of each way."""
    kv_bytes = 2 * NUM_REQUESTS * length * heads[1] * heads[2] * dtype.itemsize
    return {
        name: {"seconds": t, "over_gather": t / took["gather"], "kv_bytes_per_s": kv_bytes / t}
        for name, t in took.items()
    }


def ways_to_attend(query: Tensor, length: int, params: AttentionParams) -> dict[str, Callable[[LayerKV], Tensor]]:
    """Each way as a function of a layer's K/V."""
    scattered, neighbours = metadata(length, scattered=True), metadata(length, scattered=False)
    backend = TorchBackend()
    return {
        "gather": lambda kv: gather_and_attend(query, kv, scattered, params, grouped=False),
        "gather_grouped": lambda kv: gather_and_attend(query, kv, scattered, params, grouped=True),
        "torch": lambda kv: backend.attend(query, kv, scattered, params),
        "torch_neighbours": lambda kv: backend.attend(query, kv, neighbours, params),
    }


def differences(
    ways: dict[str, Callable[[LayerKV], Tensor]], query: Tensor, kv: LayerKV, length: int, params: AttentionParams
) -> dict[str, float]:
    """The largest difference of each way from the same in float64."""
    reference = ReferenceBackend(torch.float64)
    found = {}
    for name, way in ways.items():
        scattered = name != "torch_neighbours"
        exact = reference.attend(query.double(), kv, metadata(length, scattered=scattered), params)
        found[name] = float((way(kv) - exact).abs().max())
    return found


def gather_and_attend(
    query: Tensor, kv: LayerKV, meta: AttentionMetadata, params: AttentionParams, *, grouped: bool
) -> Tensor:
    """What one writes first: per request, copy its K/V out of the blocks and call torch."""
    out = torch.empty_like(query)  # [R, Hq, D]
    num_heads, num_kv_heads = query.shape[1], kv.keys.shape[2]
    for row, table in enumerate(meta.tables):
        blocks = torch.tensor(table)  # [B]
        keys, values = (t[blocks].flatten(0, 1).transpose(0, 1)[None] for t in (kv.keys, kv.values))  # [1, Hkv, S, D]
        heads = num_kv_heads if grouped else num_heads
        rows = query[row].view(1, heads, num_heads // heads, -1)  # [1, Hkv, G, D] or [1, Hq, 1, D]
        part = scaled_dot_product_attention(rows, keys, values, scale=params.scale, enable_gqa=not grouped)
        out[row] = part.view(num_heads, -1)
    return out


def over(way: Callable[[LayerKV], Tensor], layers: Sequence[LayerKV]) -> None:
    """One step: every layer once."""
    for kv in layers:
        way(kv)


def pool(length: int, heads: tuple[int, int, int], dtype: torch.dtype, seed: int) -> LayerKV:
    """Random K/V for all requests, and the null block."""
    shape = (1 + NUM_REQUESTS * length // BLOCK_SIZE, BLOCK_SIZE, heads[1], heads[2])
    draw = torch.Generator().manual_seed(seed)
    return LayerKV(torch.randn(shape, generator=draw).to(dtype), torch.randn(shape, generator=draw).to(dtype))


def metadata(length: int, *, scattered: bool) -> AttentionMetadata:
    """One decode row per request, each with `length` tokens of K/V."""
    each = length // BLOCK_SIZE
    blocks = list(range(1, 1 + NUM_REQUESTS * each))
    if scattered:
        random.Random(0).shuffle(blocks)
    tables = [tuple(blocks[i * each : (i + 1) * each]) for i in range(NUM_REQUESTS)]
    return AttentionMetadata(
        torch.arange(NUM_REQUESTS + 1, dtype=torch.int32),
        torch.full((NUM_REQUESTS,), length, dtype=torch.int32),
        torch.zeros(NUM_REQUESTS, dtype=torch.long),
        torch.tensor(tables, dtype=torch.int32),
        BLOCK_SIZE,
        [1] * NUM_REQUESTS,
        [length] * NUM_REQUESTS,
        tables,
    )
