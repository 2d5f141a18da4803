"""The figures of chapter 5."""

from __future__ import annotations

import torch
from claims import chapter_5
from claims.chapter_5 import NAMES
from matplotlib.figure import Figure

from folovllm.course.lessons.online_softmax import online_softmax
from folovllm.course.viz import ragged


def draw_padded_and_ragged() -> Figure:
    """Texts of unequal lengths as a rectangle and as a row."""
    return ragged.padded_and_ragged(chapter_5.UNEQUAL, NAMES)


def draw_masks() -> Figure:
    """A prefill of three texts, and a later step with two decodes."""
    prefill = (3, 6, 4)
    return ragged.ragged_masks({"a prefill of three": (prefill, prefill), "a mixed step": chapter_5.MIXED}, NAMES)


def draw_slot_arrows() -> Figure:
    """Where the K/V of the mixed step's tokens goes."""
    query_lens, seq_lens = chapter_5.MIXED
    starts = chapter_5.query_start_loc(query_lens)
    slots = chapter_5.slot_mapping(query_lens, seq_lens, chapter_5.BLOCK_TABLES, chapter_5.BLOCK_SIZE)
    return ragged.slot_arrows(starts, seq_lens, slots, chapter_5.BLOCK_TABLES, chapter_5.BLOCK_SIZE, 9, NAMES)


def draw_online_softmax() -> Figure:
    """One row of scores in tiles of four, with the rescale and without."""
    scores = torch.tensor(chapter_5.SCORES, dtype=torch.float64)
    values = torch.tensor(chapter_5.VALUES, dtype=torch.float64)[:, None]  # [S, 1]
    right, wrong = (online_softmax(scores, values, chapter_5.TILE, rescale=rescale) for rescale in (True, False))
    exact = float((scores.softmax(0) @ values)[0])
    return ragged.online_softmax_steps(chapter_5.SCORES, chapter_5.TILE, right, wrong, exact)


def draw_kernel_tiles() -> Figure:
    """Which tiles of keys the Triton kernel loads for a prefill, a chunk and a decode."""
    return ragged.kernel_tiles(*chapter_5.KERNEL_STEP, chapter_5.BLOCK_Q, chapter_5.KEY_TILE, NAMES)


FIGURES = {
    "padded-and-ragged": draw_padded_and_ragged,
    "ragged-masks": draw_masks,
    "slot-arrows": draw_slot_arrows,
    "online-softmax": draw_online_softmax,
    "kernel-tiles": draw_kernel_tiles,
}
