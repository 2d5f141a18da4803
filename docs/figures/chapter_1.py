"""The figures of chapter 1."""

from __future__ import annotations

import torch
from claims import chapter_1
from claims.ledger import result
from claims.models import BYTES_16_BIT, bundled
from matplotlib.figure import Figure

from folovllm.course.viz.flow import shape_flow
from folovllm.course.viz.kv import cache_timing, kv_bytes_bars, kv_cells
from folovllm.course.viz.masks import attention_masks
from folovllm.kv_cache.formulas import attention_kind, kv_bytes_per_token


def draw_masks() -> Figure:
    """The causal mask, its transpose, and the row of one decode step."""
    square = torch.ones(5, 5, dtype=torch.bool)
    masks = {
        "causal: lower triangle": square.tril().numpy(),
        "wrong: upper triangle": square.triu().numpy(),
        "decode: the last row": square.tril()[-1:].numpy(),
    }
    return attention_masks(masks)


def draw_kv_cells() -> Figure:
    """A prompt of 4 and 6 new tokens: what each step computes and what it finds."""
    prompt, n = 4, 6
    ends = [prompt + step for step in range(n)]
    return kv_cells(
        {
            "without a cache": [(0, end) for end in ends],
            "with a cache": [(0, prompt), *((end - 1, end) for end in ends[1:])],
        }
    )


def draw_shapes() -> Figure:
    """Shapes in Qwen3-0.6B for a prompt of 12 tokens and for the decode step after it."""
    config = bundled("qwen3-0.6b")
    heads, kv_heads, size, width = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.hidden_size,
    )

    def flow(fed: int, total: int) -> list[tuple[str, list[int]]]:
        return [
            ("input_ids", [1, fed]),
            ("position_ids", [1, fed]),
            ("embeddings", [1, fed, width]),
            ("queries", [1, heads, fed, size]),
            ("new keys", [1, kv_heads, fed, size]),
            ("keys in the cache", [1, kv_heads, total, size]),
            ("scores", [1, heads, fed, total]),
            ("layer output", [1, fed, width]),
            ("logits kept", [1, 1, config.vocab_size]),
        ]

    return shape_flow({"prefill of 12": flow(12, 12), "decode step": flow(1, 13)})


def draw_kv_bytes() -> Figure:
    """Bytes per token of the models in the table."""
    return kv_bytes_bars(
        [
            (name, attention_kind(config), kv_bytes_per_token(config, BYTES_16_BIT))
            for name, config in chapter_1.SIZES.items()
        ]
    )


def draw_cache_timing() -> Figure:
    """M0 on the bundled model with and without a cache."""
    data = result(chapter_1.TINY)
    lengths = data["new_tokens"]
    times = {
        loop: [1e3 * data["summary"][str(n)][f"{loop}_seconds_per_token"]["median"] for n in lengths]
        for loop in ("recompute", "cached")
    }
    ratios = [chapter_1.flop_ratio(chapter_1.TINY, n) for n in lengths]
    time_ratios = [data["summary"][str(n)]["time_ratio"]["median"] for n in lengths]
    return cache_timing(lengths, times["recompute"], times["cached"], ratios, time_ratio=time_ratios)


FIGURES = {
    "causal-masks": draw_masks,
    "kv-cells": draw_kv_cells,
    "tensor-shapes": draw_shapes,
    "kv-bytes": draw_kv_bytes,
    "cache-timing": draw_cache_timing,
}
