"""One way to solve the exercises of M3's second part. Try them first: `folovllm grade m3-kernels --hint NAME` helps.

In the package these are `fill` in folovllm/runner/input_batch.py (`query_start_loc`, `step_slots`), `visible_tokens`
in folovllm/attention/reference.py (`ragged_mask` of one request), `online_softmax` in
folovllm/course/lessons/online_softmax.py, and, with prefills, windows and softcaps,
folovllm/attention/triton_kernels.py: `attend_keys` (`online_softmax_kernel`, `attention_kernel`),
folovllm/attention/triton_kernels.py: `attention_kernel` (`paged_decode_kernel`, `packed_decode_kernel`) and
folovllm/attention/triton_kernels.py: `reduce_kernel` (`merge_kernel`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the first three exercises can be graded there, too
    from folovllm.course.grading.no_triton import tl, triton


# --- what a step says of its tokens -----------------------------------------------------------------------


def query_start_loc(query_lens: Sequence[int]) -> list[int]:
    if any(length < 1 for length in query_lens):
        raise ValueError(f"query_lens={list(query_lens)}: every request needs a new token")
    starts = [0]
    for length in query_lens:
        starts.append(starts[-1] + length)
    return starts


def ragged_mask(query_lens: Sequence[int], seq_lens: Sequence[int]) -> torch.Tensor:
    if len(query_lens) != len(seq_lens):
        raise ValueError(f"{len(query_lens)} query_lens and {len(seq_lens)} seq_lens: one of each per request")
    if any(not 1 <= new <= length for new, length in zip(query_lens, seq_lens, strict=True)):
        raise ValueError(f"query_lens={list(query_lens)}, seq_lens={list(seq_lens)}: 1 <= query_len <= seq_len")
    mask = torch.zeros(sum(query_lens), sum(seq_lens), dtype=torch.bool)  # [T, S]
    row = column = 0
    for new, length in zip(query_lens, seq_lens, strict=True):
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        mask[row : row + new, column : column + length] = causal[length - new :]
        row, column = row + new, column + length
    return mask


def step_slots(
    query_lens: Sequence[int], seq_lens: Sequence[int], block_table: Sequence[Sequence[int]], block_size: int
) -> list[int]:
    slots = []
    for new, length, table in zip(query_lens, seq_lens, block_table, strict=True):
        for position in range(length - new, length):
            entry, offset = divmod(position, block_size)
            if entry >= len(table) or table[entry] == 0:
                raise ValueError(f"no block for position {position} in the table {list(table)}")
            slots.append(table[entry] * block_size + offset)
    return slots


# --- kernels: the first rungs -----------------------------------------------------------------------------


@triton.jit
def copy_kernel(out: tl.tensor, x: tl.tensor, n: tl.tensor, BLOCK: tl.constexpr) -> None:
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = places < n
    tl.store(out + places, tl.load(x + places, mask=mask), mask=mask)


@triton.jit
def row_sum_kernel(out: tl.tensor, x: tl.tensor, columns: tl.tensor, stride: tl.tensor, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0)
    places = tl.arange(0, BLOCK)  # [BLOCK]
    numbers = tl.load(x + row * stride + places, mask=places < columns, other=0.0)  # [BLOCK]
    tl.store(out + row, tl.sum(numbers, 0))


@triton.jit
def softmax_kernel(out: tl.tensor, x: tl.tensor, columns: tl.tensor, stride: tl.tensor, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0)
    places = tl.arange(0, BLOCK)  # [BLOCK]
    mask = places < columns
    numbers = tl.load(x + row * stride + places, mask=mask, other=float("-inf"))  # [BLOCK]
    weights = tl.exp(numbers - tl.max(numbers, 0))  # [BLOCK]
    tl.store(out + row * stride + places, weights / tl.sum(weights, 0), mask=mask)


# --- kernels: rows of any length --------------------------------------------------------------------------


@triton.jit
def online_softmax_kernel(
    maximum: tl.tensor, total: tl.tensor, x: tl.tensor, columns: tl.tensor, stride: tl.tensor, TILE: tl.constexpr
) -> None:
    row = tl.program_id(0)
    largest = float("-inf")
    so_far = 0.0
    for start in range(0, columns, TILE):
        places = start + tl.arange(0, TILE)  # [TILE]
        numbers = tl.load(x + row * stride + places, mask=places < columns, other=float("-inf"))  # [TILE]
        new_largest = tl.maximum(largest, tl.max(numbers, 0))
        # While nothing but -inf has been seen, -inf - -inf would be NaN.
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        so_far = so_far * tl.exp(largest - reference) + tl.sum(tl.exp(numbers - reference), 0)
        largest = new_largest
    tl.store(maximum + row, largest)
    tl.store(total + row, so_far)


@triton.jit
def attention_kernel(
    out: tl.tensor,
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    length: tl.tensor,
    scale: tl.tensor,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    head = tl.program_id(0)
    dims = tl.arange(0, DIM)  # [DIM]
    query = tl.load(q + head * DIM + dims)  # [DIM]
    largest = float("-inf")
    total = 0.0
    acc = tl.zeros([DIM], tl.float32)
    for start in range(0, length, TILE):
        tokens = start + tl.arange(0, TILE)  # [TILE]
        mask = tokens < length
        places = (head * length + tokens)[:, None] * DIM + dims[None, :]  # [TILE, DIM]
        k = tl.load(keys + places, mask=mask[:, None], other=0.0)  # [TILE, DIM]
        v = tl.load(values + places, mask=mask[:, None], other=0.0)  # [TILE, DIM]
        scores = tl.where(mask, tl.sum(k * query[None, :], 1) * scale, float("-inf"))  # [TILE]
        new_largest = tl.maximum(largest, tl.max(scores, 0))
        weights = tl.exp(scores - new_largest)  # [TILE]
        rescale = tl.exp(largest - new_largest)
        total = total * rescale + tl.sum(weights, 0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, 0)
        largest = new_largest
    tl.store(out + head * DIM + dims, acc / total)


# --- kernels: through a block table -----------------------------------------------------------------------


@triton.jit
def paged_decode_kernel(
    out: tl.tensor,
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    block_table: tl.tensor,
    seq_lens: tl.tensor,
    max_blocks: tl.tensor,
    scale: tl.tensor,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    request = tl.program_id(0)
    head = tl.program_id(1)
    length = tl.load(seq_lens + request)
    dims = tl.arange(0, DIM)  # [DIM]
    row = (request * NUM_HEADS + head) * DIM + dims  # [DIM]
    query = tl.load(q + row)  # [DIM]
    largest = float("-inf")
    total = 0.0
    acc = tl.zeros([DIM], tl.float32)
    for start in range(0, length, TILE):
        tokens = start + tl.arange(0, TILE)  # [TILE]
        mask = tokens < length
        blocks = tl.load(block_table + request * max_blocks + tokens // BLOCK_SIZE, mask=mask, other=0)  # [TILE]
        slots = blocks * BLOCK_SIZE + tokens % BLOCK_SIZE  # [TILE]
        places = (slots * NUM_HEADS + head)[:, None] * DIM + dims[None, :]  # [TILE, DIM]
        k = tl.load(keys + places, mask=mask[:, None], other=0.0)  # [TILE, DIM]
        v = tl.load(values + places, mask=mask[:, None], other=0.0)  # [TILE, DIM]
        scores = tl.where(mask, tl.sum(k * query[None, :], 1) * scale, float("-inf"))  # [TILE]
        new_largest = tl.maximum(largest, tl.max(scores, 0))
        weights = tl.exp(scores - new_largest)  # [TILE]
        rescale = tl.exp(largest - new_largest)
        total = total * rescale + tl.sum(weights, 0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, 0)
        largest = new_largest
    tl.store(out + row, acc / total)


# --- optional: what makes it fast -------------------------------------------------------------------------


@triton.jit
def packed_decode_kernel(
    out: tl.tensor,
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    block_table: tl.tensor,
    seq_lens: tl.tensor,
    max_blocks: tl.tensor,
    scale: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    request = tl.program_id(0)
    kv_head = tl.program_id(1)
    length = tl.load(seq_lens + request)
    rows = tl.arange(0, ROWS)  # [ROWS]
    dims = tl.arange(0, DIM)  # [DIM]
    places = ((request * NUM_KV_HEADS + kv_head) * GROUP + rows)[:, None] * DIM + dims[None, :]  # [ROWS, DIM]
    row_mask = (rows < GROUP)[:, None]
    queries = tl.load(q + places, mask=row_mask, other=0.0)  # [ROWS, DIM]
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    for start in range(0, length, TILE):
        tokens = start + tl.arange(0, TILE)  # [TILE]
        mask = tokens < length
        blocks = tl.load(block_table + request * max_blocks + tokens // BLOCK_SIZE, mask=mask, other=0)  # [TILE]
        slots = blocks * BLOCK_SIZE + tokens % BLOCK_SIZE  # [TILE]
        pool_places = (slots * NUM_KV_HEADS + kv_head)[:, None] * DIM + dims[None, :]  # [TILE, DIM]
        k = tl.load(keys + pool_places, mask=mask[:, None], other=0.0)  # [TILE, DIM]
        v = tl.load(values + pool_places, mask=mask[:, None], other=0.0)  # [TILE, DIM]
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale  # [ROWS, TILE]
        scores = tl.where(mask[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))  # [ROWS]
        weights = tl.exp(scores - new_largest[:, None])  # [ROWS, TILE]
        rescale = tl.exp(largest - new_largest)  # [ROWS]
        total = total * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None] + tl.dot(weights, v, input_precision="ieee")
        largest = new_largest
    tl.store(out + places, acc / total[:, None], mask=row_mask)


@triton.jit
def merge_kernel(
    out: tl.tensor,
    outputs: tl.tensor,
    maxima: tl.tensor,
    totals: tl.tensor,
    segments: tl.tensor,
    SEGMENTS: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    parts = tl.arange(0, SEGMENTS)  # [SEGMENTS]
    dims = tl.arange(0, DIM)  # [DIM]
    mask = parts < segments
    places = row * segments + parts  # [SEGMENTS]
    largest = tl.load(maxima + places, mask=mask, other=float("-inf"))  # [SEGMENTS]
    sums = tl.load(totals + places, mask=mask, other=0.0)  # [SEGMENTS]
    found = tl.load(outputs + places[:, None] * DIM + dims[None, :], mask=mask[:, None], other=0.0)  # [SEGMENTS, DIM]
    factors = tl.exp(largest - tl.max(largest, 0))  # [SEGMENTS]
    tl.store(out + row * DIM + dims, tl.sum(found * factors[:, None], 0) / tl.sum(sums * factors, 0))
