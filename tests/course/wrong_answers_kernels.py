"""Wrong answers to the exercises of M3's second part. Each is the solution with one mistake."""

from __future__ import annotations

from pathlib import Path

SOLUTION = Path(__file__).resolve().parents[2] / "milestones" / "m3_kernels" / "solution.py"


def changed(name: str, *replacements: tuple[str, str]) -> str:
    """The solution's function with other text in it. Raises ValueError where there is nothing to replace."""
    source = SOLUTION.read_text(encoding="utf-8")
    start = source.index(f"def {name}(")
    start = source.rfind("\n\n\n", 0, start) + 3  # with its decorator
    end = source.find("\n\n\n", start)
    code = source[start:] if end == -1 else source[start:end]
    for old, new in replacements:
        if old not in code:
            raise ValueError(f"{name} does not contain {old!r}")
        code = code.replace(old, new)
    return f"\n\n\n{code}\n"


MASK_V = "v = tl.load(values + places, mask=mask[:, None], other=0.0)"
M3_KERNELS = {
    "query_start_loc": {
        "without the end": changed("query_start_loc", ("return starts", "return starts[:-1]")),
        "lengths, not sums": changed("query_start_loc", ("starts[-1] + length", "length")),
        "empty requests let through": changed("query_start_loc", ("length < 1", "length < 0")),
    },
    "ragged_mask": {
        "everybody sees everybody before": changed(
            "ragged_mask", ("column : column + length] = causal[length - new :]", ": column + length] = True")
        ),
        "columns counted by new tokens": changed("ragged_mask", ("column + length\n", "column + new\n")),
        "anti-causal": changed("ragged_mask", (".tril()", ".triu()")),
        "the first rows of the triangle": changed("ragged_mask", ("causal[length - new :]", "causal[:new]")),
    },
    "step_slots": {
        "new tokens begin at 0": changed("step_slots", ("range(length - new, length)", "range(new)")),
        "offset forgotten": changed("step_slots", ("* block_size + offset", "* block_size")),
        "padding of the table taken": changed("step_slots", (" or table[entry] == 0", "")),
    },
    "copy_kernel": {
        "no mask on the store": changed("copy_kernel", (", mask=mask), mask=mask)", ", mask=mask, other=7.0))")),
        "one number too many": changed("copy_kernel", ("places < n", "places <= n")),
        "every program the first": changed("copy_kernel", ("tl.program_id(0) * BLOCK + ", "")),
        "the last number left out": changed("copy_kernel", ("places < n", "places < n - 1")),
    },
    "row_sum_kernel": {
        "no mask": changed("row_sum_kernel", ("mask=places < columns, other=0.0", "mask=places < BLOCK")),
        "rows side by side": changed("row_sum_kernel", ("row * stride", "row * columns")),
        "ones where nothing is": changed("row_sum_kernel", ("other=0.0", "other=1.0")),
    },
    "softmax_kernel": {
        "zeros where nothing is": changed("softmax_kernel", ('other=float("-inf")', "other=0.0")),
        "no maximum": changed("softmax_kernel", (" - tl.max(numbers, 0)", "")),
        "not divided": changed("softmax_kernel", (" / tl.sum(weights, 0)", "")),
        "stores beyond the row": changed("softmax_kernel", ("tl.sum(weights, 0), mask=mask", "tl.sum(weights, 0)")),
    },
    "online_softmax_kernel": {
        "no rescale": changed("online_softmax_kernel", ("so_far * tl.exp(largest - reference)", "so_far")),
        "rescaled the other way": changed("online_softmax_kernel", ("largest - reference)", "reference - largest)")),
        "nothing for a tile of nothing": changed(
            "online_softmax_kernel", ('tl.where(new_largest == float("-inf"), 0.0, new_largest)', "new_largest")
        ),
        "only the first tile": changed("online_softmax_kernel", ("range(0, columns, TILE)", "range(0, TILE, TILE)")),
    },
    "attention_kernel": {
        "output not rescaled": changed("attention_kernel", ("acc * rescale", "acc")),
        "sum not rescaled": changed("attention_kernel", ("total * rescale", "total")),
        "scores of 0 where nothing is": changed("attention_kernel", ('float("-inf"))  # [TILE]', "0.0)  # [TILE]")),
        "values beyond the end": changed("attention_kernel", (MASK_V, "v = tl.load(values + places)")),
        "no scale": changed("attention_kernel", (" * scale", "")),
        "every head the first": changed("attention_kernel", ("(head * length + tokens)", "tokens")),
    },
    "paged_decode_kernel": {
        "no table": changed(
            "paged_decode_kernel", ("blocks * BLOCK_SIZE + tokens % BLOCK_SIZE", "BLOCK_SIZE + tokens")
        ),
        "one table for all": changed("paged_decode_kernel", ("request * max_blocks + ", "")),
        "one block per tile": changed(
            "paged_decode_kernel", ("+ tokens // BLOCK_SIZE, mask", "+ (start + 0 * tokens) // BLOCK_SIZE, mask")
        ),
        "heads outside of slots": changed(
            "paged_decode_kernel", ("(slots * NUM_HEADS + head)", "(head * BLOCK_SIZE + slots)")
        ),
        "unused slots read": changed("paged_decode_kernel", (MASK_V, "v = tl.load(values + places)")),
    },
    "packed_decode_kernel": {
        "groups in turns": changed(
            "packed_decode_kernel", ("kv_head) * GROUP + rows)", "0) * GROUP + rows * NUM_KV_HEADS + kv_head)")
        ),
        "rows of nobody stored": changed("packed_decode_kernel", ("total[:, None], mask=row_mask", "total[:, None]")),
        "one maximum for all rows": changed(
            "packed_decode_kernel", ("acc * rescale[:, None]", "acc * tl.max(rescale, 0)")
        ),
    },
    "merge_kernel": {
        "plain mean": changed("merge_kernel", ("tl.sum(found * factors[:, None], 0)", "tl.sum(found, 0)")),
        "no common maximum": changed("merge_kernel", ("largest - tl.max(largest, 0)", "largest")),
        "zeros for maxima": changed("merge_kernel", ('other=float("-inf")', "other=1000.0")),
    },
}
