"""M3, second part: ragged batches and kernels. Write your answers here, and check them: `folovllm grade m3-kernels`.

The first three exercises are plain Python: what a step tells attention about its tokens. The others are Triton kernels,
a ladder whose last rung is paged decode. They run in Triton's interpreter, on the CPU: no GPU is needed, `print` works
inside of a kernel, and so does a debugger.

A kernel is run by many *programs* at once, and each does a piece of the work. What you need of `tl`:

    tl.program_id(axis)               which program this is, along that axis of the grid
    tl.arange(0, N)                   0 to N - 1 as a tile; N is a power of two
    tl.load(pointers, mask, other)    a tile from memory; where mask is False: `other`, and memory is not touched
    tl.store(pointers, tile, mask)    a tile to memory; where mask is False, nothing is written
    tl.sum(x, axis), tl.max(x, axis), tl.exp(x), tl.maximum(x, y), tl.where(condition, x, y), tl.zeros([N], tl.float32)

A pointer plus a tile of numbers is a tile of pointers: `x + tl.arange(0, 4)` points to the first four numbers of x, and
`x + rows[:, None] * stride + columns[None, :]` to a rectangle. Names in CAPITALS are constants of the kernel. All
numbers here are float32, except for tables and lengths, which are int32.

The same kernels, grown up, are in `folovllm/attention/triton_kernels.py`.
"""

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
    """Where the tokens of each request begin in a step's one row of tokens, and where the last ones end.

    query_lens: new tokens per request, in order; each at least 1. The result has one number more than there are
    requests: request i owns the rows from result[i] up to, but not including, result[i + 1].

    Examples: query_start_loc([3, 1, 4]) is [0, 3, 4, 8]; query_start_loc([]) is [0].

    Raises ValueError for a request without new tokens: it has no business in the step.
    """
    raise NotImplementedError("query_start_loc")


def ragged_mask(query_lens: Sequence[int], seq_lens: Sequence[int]) -> torch.Tensor:
    """Who sees whom in a step: a bool tensor [T, S], with T = sum(query_lens) and S = sum(seq_lens).

    query_lens: new tokens per request. seq_lens: its tokens with K/V, the new ones included, which are the last of
    them. Rows are the new tokens of all requests, one request behind the other; columns are their keys, in the same
    order. True: this token may attend to this key, which is of its own request, and not after it.

    Examples: ragged_mask([2, 1], [2, 1]) is
        [[T, F, F],
         [T, T, F],
         [F, F, T]]
        and ragged_mask([1, 2], [3, 2]), a decode beside a prefill, is
        [[T, T, T, F, F],
         [F, F, F, T, F],
         [F, F, F, T, T]]

    An engine never makes this tensor. It is what its metadata means.
    Raises ValueError for lists of different lengths, and for a request with query_len < 1 or seq_len < query_len.
    """
    raise NotImplementedError("ragged_mask")


def step_slots(
    query_lens: Sequence[int], seq_lens: Sequence[int], block_table: Sequence[Sequence[int]], block_size: int
) -> list[int]:
    """The slot of the pool for the K/V of each new token of a step: `slot_mapping`, one number per token.

    query_lens, seq_lens: as in `ragged_mask`. block_table: per request its blocks, in the order of its tokens. Rows are
    padded to one length with block 0, in which nobody's K/V may be written. Block b has the slots b * block_size to
    b * block_size + block_size - 1.

    Example: step_slots([3, 1], [3, 6], [[7, 0], [5, 2]], block_size=4) is [28, 29, 30, 9]: three tokens of a prompt at
        the beginning of block 7; and token 5 of the second request, at offset 1 of block 2.

    Raises ValueError for a token for which the table has no block, or only padding.
    """
    raise NotImplementedError("step_slots")


# --- kernels: the first rungs -----------------------------------------------------------------------------


@triton.jit
def copy_kernel(out: tl.tensor, x: tl.tensor, n: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Copy the n numbers of x to out. Program i copies numbers i * BLOCK to i * BLOCK + BLOCK - 1.

    x, out: [n]. The grid has as many programs as are needed, so that the last one may have less to do. Behind the end
    of both there is memory of somebody else: do not read it, do not write it.

    With n = 10 and BLOCK = 4:    program 0: 0 1 2 3    program 1: 4 5 6 7    program 2: 8 9 / /
    """
    raise NotImplementedError("copy_kernel")


@triton.jit
def row_sum_kernel(out: tl.tensor, x: tl.tensor, columns: tl.tensor, stride: tl.tensor, BLOCK: tl.constexpr) -> None:
    """The sum of each row of a matrix. Program i takes row i, as one tile.

    x: [rows, columns]; row i begins `stride` numbers behind row i - 1, and stride may be larger than columns: what is
    between two rows is not part of either, and may be anything, NaN included. out: [rows]. BLOCK is a power of two,
    and not less than columns.
    """
    raise NotImplementedError("row_sum_kernel")


@triton.jit
def softmax_kernel(out: tl.tensor, x: tl.tensor, columns: tl.tensor, stride: tl.tensor, BLOCK: tl.constexpr) -> None:
    """The softmax of each row. Program i takes row i, as one tile.

    softmax(x)[j] = exp(x[j] - m) / sum over k of exp(x[k] - m), with m the largest number of the row. (Any m gives the
    same in theory. With another one, exp overflows for rows of large numbers.)

    x, out: [rows, columns], both with rows that begin `stride` numbers apart, as in `row_sum_kernel`. What is between
    two rows of out must stay as it is.
    """
    raise NotImplementedError("softmax_kernel")


# --- kernels: rows of any length --------------------------------------------------------------------------


@triton.jit
def online_softmax_kernel(
    maximum: tl.tensor, total: tl.tensor, x: tl.tensor, columns: tl.tensor, stride: tl.tensor, TILE: tl.constexpr
) -> None:
    """The largest number m of each row, and the sum of exp(x - m) over it, in one pass over tiles.

    A row may be longer than any tile, and each number may be loaded only once. So m is not known before the end. Go
    through the row with `for start in range(0, columns, TILE)`, and keep the largest number so far and the sum so far.
    When a tile raises the maximum from old to new, the sum so far is one of exp(x - old), and has to become one of
    exp(x - new).

    x: [rows, columns], rows `stride` apart. maximum, total: [rows]. Program i takes row i. A row may hold -inf, but not
    in all of its numbers; a tile may hold nothing else.
    """
    raise NotImplementedError("online_softmax_kernel")


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
    """Attention of one query per head over contiguous K/V. Program h takes head h.

    out[h] = sum over j of softmax(q[h] . keys[h] * scale)[j] * values[h, j]

    q, out: [heads, DIM]. keys, values: [heads, length, DIM], without gaps. DIM is a power of two. `length` may be
    larger than TILE: go through the keys in tiles, as in `online_softmax_kernel`, and keep a third thing, the weighted
    sum of values so far [DIM]. Behind the last key there may be anything.

    A tile of keys is [TILE, DIM], and its scores are tl.sum(k * query[None, :], 1).
    """
    raise NotImplementedError("attention_kernel")


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
    """A decode step: every request has one query per head, and its K/V in blocks. Program (r, h): request r, head h.

    q, out: [requests, NUM_HEADS, DIM]. keys, values: [blocks, BLOCK_SIZE, NUM_HEADS, DIM], the pool of all requests.
    block_table: [requests, max_blocks]. seq_lens: [requests], at least 1.

    Token j of request r stands in block block_table[r, j // BLOCK_SIZE], at offset j % BLOCK_SIZE. BLOCK_SIZE and TILE
    need not be multiples of each other: let every key of a tile look up its own block. Entries of the table beyond the
    last token name blocks of other requests, or none at all; slots beyond the last token may hold NaN. Do not load
    either.
    """
    raise NotImplementedError("paged_decode_kernel")


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
    """Paged decode with grouped queries: GROUP query heads read one KV head. Program (r, g): request r, KV head g.

    q, out: [requests, NUM_KV_HEADS * GROUP, DIM]; query head i reads KV head i // GROUP. keys, values: [blocks,
    BLOCK_SIZE, NUM_KV_HEADS, DIM]. The rest is as in `paged_decode_kernel`.

    Every program loads each key and value once, for the whole group: its queries are the rows of a tile [ROWS, DIM].
    ROWS is a power of two, not less than GROUP and at least 16; rows from GROUP on are nobody's. tl.dot(a, b,
    input_precision="ieee") multiplies two tiles, and tl.trans(k) turns one. DIM and TILE are at least 16, as tl.dot
    wants.
    """
    raise NotImplementedError("packed_decode_kernel")


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
    """Split-KV: put together what several programs found in segments of one row's keys. Program i takes row i.

    Segment s of row i has looked at its own keys alone. maxima[i, s] is their largest score m; totals[i, s] is the sum
    of exp(score - m); outputs[i, s] is the sum of exp(score - m) * value, not yet divided by anything. A segment
    without keys has the maximum -inf, the total 0 and an output of zeros. At least one segment has keys.

    out: [rows, DIM], the attention over all keys. outputs: [rows, segments, DIM]. maxima, totals: [rows, segments].
    SEGMENTS is a power of two, not less than segments. DIM is a power of two.
    """
    raise NotImplementedError("merge_kernel")
