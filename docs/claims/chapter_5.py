"""Claims of chapter 5: what padding costs beside one row, what a step says of its tokens, and online softmax."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from claims.forms import fixed, ms, plain, power
from claims.ledger import Claim, Derived, Measured, Table, result
from claims.models import bundled
from folovllm.attention.reference import visible_tokens
from folovllm.attention.triton_configs import choose_configs
from folovllm.course.lessons.fragmentation import num_blocks, translate
from folovllm.course.lessons.online_softmax import online_softmax
from folovllm.course.viz.ragged import tile_kinds
from folovllm.math_utils import cdiv

RAGGED = "m3-ragged-folo-tiny"  # by `python -m folovllm.course.measure ragged`
HERE = "docs/claims/chapter_5.py"
SOFTMAX = "folovllm/course/lessons/online_softmax.py:online_softmax"
TILES = "folovllm/course/viz/ragged.py:tile_kinds"
NAMES = "abc"

# --- padded and ragged ------------------------------------------------------------------------------------

UNEQUAL, NEARLY_EQUAL = (12, 300, 40), (36, 37, 36)


def score_cells(lengths: Sequence[int]) -> dict[str, int]:
    """Pairs of a query and a key per head: of a padded and of a packed dense mask, and those that see each other."""
    return {
        "padded": len(lengths) * max(lengths) ** 2,
        "packed": sum(lengths) ** 2,
        "needed": sum(n * (n + 1) // 2 for n in lengths),
    }


def prefill(lengths: str) -> dict[str, Any]:
    """The summary of one set of lengths."""
    found: dict[str, Any] = result(RAGGED)["summary"][lengths]
    return found


WAYS = {
    "padded": "padded rectangle, Hugging Face",
    "packed": "one row and a 4-D mask, Hugging Face",
    "one_by_one": "a forward per text, Hugging Face",
    "m3": "one row, M3",
}


def prefill_rows() -> list[list[str]]:
    """Both sets of lengths in every way."""
    rows = []
    for key, lengths in (("unequal", UNEQUAL), ("nearly_equal", NEARLY_EQUAL)):
        numbers = prefill(key)
        for way, name in WAYS.items():
            cells = len(lengths) * max(lengths) if way == "padded" else sum(lengths)
            rows.append([", ".join(map(str, lengths)), name, plain(cells), ms(numbers[way])])
    return rows


# --- the trap ---------------------------------------------------------------------------------------------

PACKINGS = {
    "mask": "4-D mask, positions that begin again",
    "mask_with_cache": "the same, use_cache=True",
    "mask_counted_through": "4-D mask, positions counted through",
    "positions": "positions that begin again, no mask, use_cache=False",
    "positions_with_cache": "the same, use_cache=True",
    "nothing": "neither",
}


def difference(number: float) -> str:
    """A difference of logits: rounding as a power of ten that bounds it."""
    return power(number) if number < 0.1 else fixed(1)(number)


def packing_rows() -> list[list[str]]:
    """Per way, the largest difference of a logit from the text alone, for each of the three."""
    found = result(RAGGED)["packing"]["differences"]
    return [[name, *map(difference, found[way])] for way, name in PACKINGS.items()]


def packing(way: str) -> float:
    """The largest difference over the three texts."""
    return float(max(result(RAGGED)["packing"]["differences"][way]))


# --- what a step says of its tokens -----------------------------------------------------------------------

BLOCK_SIZE = 4
MIXED = ((3, 1, 1), (3, 6, 9))  # new tokens and K/V lengths: a prefill of three beside two decodes
BLOCK_TABLES = ((7,), (5, 2), (1, 6, 4))
LONG_STEP = ((1, 1, 1, 1, 1, 1, 1, 200), (500, 500, 500, 500, 500, 500, 500, 200))


def query_start_loc(query_lens: Sequence[int]) -> list[int]:
    """Where each request's tokens begin, and the end."""
    return [0, *accumulate(query_lens)]


def slot_mapping(
    query_lens: Sequence[int], seq_lens: Sequence[int], tables: Sequence[Sequence[int]], block_size: int
) -> list[int]:
    """The slot of every new token."""
    return [
        translate(position, block_size, table)
        for new, length, table in zip(query_lens, seq_lens, tables, strict=True)
        for position in range(length - new, length)
    ]


def step_rows() -> list[list[str]]:
    """The metadata of the mixed step."""
    query_lens, seq_lens = MIXED
    values = {
        "query_start_loc": ("R + 1", query_start_loc(query_lens), "where each request's tokens begin, and the end"),
        "seq_lens": ("R", list(seq_lens), "keys of each request, the new ones included"),
        "slot_mapping": ("T", slot_mapping(query_lens, seq_lens, BLOCK_TABLES, BLOCK_SIZE), "where K/V is written"),
        "block_table": ("R x B", [list(table) for table in BLOCK_TABLES], "where K/V is read"),
    }
    return [[name, shape, str(numbers), about] for name, (shape, numbers, about) in values.items()]


def visible_pairs(query_lens: Sequence[int], seq_lens: Sequence[int]) -> int:
    """Pairs of a new token and a key that see each other."""
    return sum(int(visible_tokens(new, n, None).sum()) for new, n in zip(query_lens, seq_lens, strict=True))


def step_integers(query_lens: Sequence[int], seq_lens: Sequence[int], block_size: int) -> int:
    """Numbers in all arrays of a step: three per token, and per request a length, a start and a row of the table."""
    width = max(num_blocks(length, block_size) for length in seq_lens)
    return 3 * sum(query_lens) + 2 * len(seq_lens) + 1 + len(seq_lens) * width


# --- online softmax ---------------------------------------------------------------------------------------

SCORES = [0.2, 1.0, 0.5, -0.3, 1.2, 0.1, 0.4, 0.9, 2.8, 1.5, 0.3, 2.0, 0.6, 1.1, 1.9, 0.2]
VALUES = [0.9, 0.8, 1.0, 0.7, 0.6, 0.9, 0.5, 0.8, 0.1, 0.2, 0.4, 0.0, 0.3, 0.2, 0.1, 0.5]
TILE = 4


def softmax_rows() -> list[list[str]]:
    """The states after each tile, with the rescale, and the sum and the attention without it."""
    scores = torch.tensor(SCORES, dtype=torch.float64)
    values = torch.tensor(VALUES, dtype=torch.float64)[:, None]
    right, wrong = (online_softmax(scores, values, TILE, rescale=rescale) for rescale in (True, False))
    three = fixed(3)
    return [
        [
            plain(index + 1),
            fixed(1)(state.maximum),
            "-" if index == 0 else three(state.rescale),
            three(state.total),
            three(float(state.attention[0])),
            three(other.total),
            three(float(other.attention[0])),
        ]
        for index, (state, other) in enumerate(zip(right, wrong, strict=True))
    ]


# --- the kernel -------------------------------------------------------------------------------------------

KERNEL_STEP = ((12, 7, 1), (12, 23, 17))
BLOCK_Q, KEY_TILE = 4, 8


def tiles(code: int | None = None) -> int:
    """Tiles that the kernel loads in that step, or those of one kind (1: with a mask, 2: without)."""
    kinds = [tile_kinds(new, length, BLOCK_Q, KEY_TILE) for new, length in zip(*KERNEL_STEP, strict=True)]
    return sum(int((k == code).sum() if code is not None else (k > 0).sum()) for k in kinds)


QWEN = bundled("qwen3-0.6b")
GROUP = QWEN.num_attention_heads // QWEN.num_key_value_heads
SEGMENTS = 8
H100 = choose_configs(torch.bfloat16, QWEN.head_dim, (9, 0)).prefill
PROMPT = 4000


def prefill_blocks(num_tokens: int) -> int:
    """Blocks of queries that a prompt is cut into on an H100."""
    return cdiv(num_tokens, H100.rows // GROUP)


TABLES: dict[str, Table] = {
    "padded-and-ragged": Table(
        "one forward that reads the last logits of three texts, padded and in one row",
        ("tokens", "way", "rows of tokens", "ms"),
        prefill_rows,
        files=(RAGGED,),
    ),
    "packing": Table(
        "three packed texts: the largest difference of any logit from the text alone",
        ("what the model is told", "a", "b", "c"),
        packing_rows,
        files=(RAGGED,),
    ),
    "step-metadata": Table(
        "what attention is told of a prefill of three tokens beside two decodes, in blocks of four",
        ("name", "shape", "here", "says"),
        step_rows,
    ),
    "online-softmax": Table(
        "sixteen scores in tiles of four: what is carried from tile to tile",
        ("tile", "maximum", "rescale", "sum", "attention so far", "sum without it", "attention without it"),
        softmax_rows,
    ),
}

CLAIMS: dict[str, Claim] = {
    # --- padded and ragged
    "ragged-tokens": Derived("tokens of 12, 300 and 40", sum(UNEQUAL), by=f"{HERE}:UNEQUAL"),
    "padded-cells": Derived("cells of these as a rectangle", len(UNEQUAL) * max(UNEQUAL), by=f"{HERE}:UNEQUAL"),
    "score-cells-padded": Derived("pairs of a query and a key, padded", score_cells(UNEQUAL)["padded"], by=score_cells),
    "score-cells-packed": Derived("pairs in a mask over the whole row", score_cells(UNEQUAL)["packed"], by=score_cells),
    "score-cells-needed": Derived("pairs that see each other", score_cells(UNEQUAL)["needed"], by=score_cells),
    # --- the trap
    "packed-right": Derived("largest difference of a logit with a 4-D mask", lambda: packing("mask"), "power", packing),
    "packed-wrong": Derived(
        "largest difference of a logit with positions that begin again and a cache",
        lambda: packing("positions_with_cache"),
        ".1f",
        packing,
    ),
    "packed-spread": Measured(
        "standard deviation of these logits", f"{RAGGED}/packing/logits_standard_deviation", ".1f"
    ),
    # --- a step
    "mixed-slot": Derived(
        "slot of token 5 with the table 5, 2 in blocks of 4", translate(5, BLOCK_SIZE, BLOCK_TABLES[1]), by=translate
    ),
    "long-step-tokens": Derived(
        "new tokens of a prompt of 200 beside seven decodes", sum(LONG_STEP[0]), by=f"{HERE}:LONG_STEP"
    ),
    "long-step-keys": Derived("keys of that step", sum(LONG_STEP[1]), by=f"{HERE}:LONG_STEP"),
    "long-step-cells": Derived("cells of its mask", sum(LONG_STEP[0]) * sum(LONG_STEP[1]), by=f"{HERE}:LONG_STEP"),
    "long-step-visible": Derived(
        "share of them that is True",
        visible_pairs(*LONG_STEP) / (sum(LONG_STEP[0]) * sum(LONG_STEP[1])),
        ".1%",
        visible_pairs,
    ),
    "long-step-integers": Derived(
        "integers in the six arrays of that step, in blocks of 16", step_integers(*LONG_STEP, 16), by=step_integers
    ),
    # --- the kernel
    "tiles-loaded": Derived("tiles of keys that the kernel loads in the figure's step", tiles(), by=TILES),
    "tiles-unmasked": Derived("of these without a mask", tiles(2), by=TILES),
    "qwen3-group": Derived("query heads per KV head of Qwen3-0.6B", GROUP, by=f"{HERE}:GROUP"),
    "qwen3-programs": Derived(
        "programs of a decode of one request of Qwen3-0.6B", QWEN.num_key_value_heads, by=f"{HERE}:QWEN"
    ),
    "qwen3-programs-split": Derived(
        "programs with eight segments", QWEN.num_key_value_heads * SEGMENTS, by=f"{HERE}:SEGMENTS"
    ),
    "prefill-block-tokens": Derived(
        "tokens of Qwen3-0.6B in a block of queries, as shipped for an H100", H100.rows // GROUP, by=f"{HERE}:H100"
    ),
    "prefill-blocks": Derived("blocks of queries of a prompt of 4000", prefill_blocks(PROMPT), by=prefill_blocks),
    "prefill-programs": Derived(
        "programs of its prefill", prefill_blocks(PROMPT) * QWEN.num_key_value_heads, by=prefill_blocks
    ),
}
