"""Paged attention as GPU kernels in Triton (vLLM: `vllm/v1/attention/ops/triton_unified_attention.py`).

A kernel is a function that runs many times in parallel, as *programs* that share nothing. A program selects its part of
the work by `tl.program_id` and processes it in tiles, small arrays in registers: `tl.load` fetches a tile from an array
of pointers, `tl.dot` multiplies two tiles, `tl.max` reduces one. A `tl.constexpr` argument is known at compile time, so
an `if` on it costs nothing at run time. Tile sizes are powers of two; surplus elements are masked.

There are four kernels, each with a drawing of its work::

    write_kernel       new K/V to their slots               one program per token and chunk of its elements
    attention_kernel   all queries of a ragged batch        one per block of queries, KV head and segment of the keys
    reduce_kernel      merges the segments of the keys      one per token and query head
    copy_kernel        whole blocks, for copy-on-write      one per block, layer and chunk of the block

A layer's pool is [blocks, block_size, Hkv, D] for keys, and [blocks, block_size, Hkv, Dv] for values. Token j of a
request is in block `table[j // block_size]` at offset `j % block_size`; its slot is block * block_size + offset. The
size of a tile of keys does not depend on the block size, because each row of the tile looks up its own block.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)  # e^x = 2^(x * LOG2_E), and powers of 2 are what a GPU computes


@triton.jit
def write_kernel(
    key: tl.tensor,  # [T, Hkv * D]
    value: tl.tensor,  # [T, Hkv * Dv]
    keys: tl.tensor,  # [slots, Hkv * D]
    values: tl.tensor,  # [slots, Hkv * Dv]
    slot_mapping: tl.tensor,  # [T]
    stride_key: tl.tensor,
    stride_value: tl.tensor,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Store K and V of new tokens at their slots. Program (t, c) takes chunk c of token t.

    Slots may be anywhere in the pool. The elements of one token are contiguous, so neighbouring threads access
    neighbouring addresses, which is fast::

        key     token 0  [ chunk 0 | chunk 1 ]  ──>  keys[slot_mapping[0]]  [ chunk 0 | chunk 1 ]
                token 1  [ chunk 0 | chunk 1 ]  ──>  keys[slot_mapping[1]]  [ chunk 0 | chunk 1 ]
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)  # [CHUNK]
    mask, value_mask = columns < WIDTH, columns < VALUE_WIDTH
    slot = tl.load(slot_mapping + token)
    new_key = tl.load(key + token * stride_key + columns, mask=mask)  # [CHUNK]
    new_value = tl.load(value + token * stride_value + columns, mask=value_mask)  # [CHUNK]
    tl.store(keys + slot * WIDTH + columns, new_key, mask=mask)
    tl.store(values + slot * VALUE_WIDTH + columns, new_value, mask=value_mask)


@triton.jit
def find_request(query_start_loc: tl.tensor, q_block: tl.tensor, num_requests: tl.tensor, BLOCK_Q: tl.constexpr) -> int:
    """The request that block `q_block` of queries belongs to, by binary search.

    Request i owns the blocks from query_start_loc[i] // BLOCK_Q + i on. The + i allows each request one more block, for
    rounding up. There may be a block without work, but never a block too few::

        BLOCK_Q = 4          request 0    request 1    request 2
        new tokens           5            1            7
        query_start_loc      0            5            6            13
        first block          0            2            3            6
        blocks               0, 1         2            3, 4, 5      5 would hold token 8 of 7: it has no work
    """
    low, high = 0, num_requests
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) // BLOCK_Q + middle <= q_block:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def attend_keys(
    out: tl.tensor,  # [ROWS, PADDED_VALUE]
    maximum: tl.tensor,  # [ROWS]
    total: tl.tensor,  # [ROWS]
    q: tl.tensor,  # [ROWS, PADDED_DIM]
    positions: tl.tensor,  # [ROWS]: of each row's token in its request
    keys: tl.tensor,  # [slots, Hkv, D], from this KV head on
    values: tl.tensor,  # [slots, Hkv, Dv], from this KV head on
    table: tl.tensor,  # [B]: the request's blocks
    first: tl.tensor,
    last: tl.tensor,
    stride_key: tl.tensor,
    stride_value: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_VALUE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    WIDEN: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Online softmax over keys first <= j < last, tile by tile (Milakov and Gimelshein, 2018; FlashAttention, 2022).

    The scores of a row are never all in memory. Three values are carried from tile to tile instead::

                keys   first     + TILE    + 2 TILE     last
        ROWS of        ┌─────────┬─────────┬─────────┬───┐      maximum [ROWS]     of the scores so far
        queries        │ [ROWS,  │         │         │ / │      total   [ROWS]     sum of 2^(score - maximum)
                       │   TILE] │         │         │ / │      out     [ROWS, D]  sum of 2^(score - maximum) * value
                       └─────────┴─────────┴─────────┴───┘      / is masked

    When a tile raises a row's maximum from old to new, the sums so far are too large by 2^(new - old), so both are
    multiplied by 2^(old - new). Without this rescale they would add values of different scales.

    MASKED: some row does not see some key of the range. If every row sees every key, no mask is computed.
    """
    dims = tl.arange(0, PADDED_DIM)  # [PADDED_DIM]
    value_dims = tl.arange(0, PADDED_VALUE)  # [PADDED_VALUE]
    for start in range(first, last, TILE):
        tokens = start + tl.arange(0, TILE)  # [TILE]
        k_mask = (dims < HEAD_DIM)[:, None]
        v_mask = (value_dims < VALUE_DIM)[None, :]
        if MASKED:
            # Masked elements are 0. Slots after the request's last token are masked: they may hold NaN, and 0 * NaN is
            # NaN.
            in_range = tokens < last  # [TILE]
            k_mask = k_mask & in_range[None, :]
            v_mask = v_mask & in_range[:, None]
            blocks = tl.load(table + tokens // BLOCK_SIZE, mask=in_range, other=0)  # [TILE]
        else:
            blocks = tl.load(table + tokens // BLOCK_SIZE)  # [TILE]
        # In a large pool, offsets of elements exceed 32 bits.
        slots = blocks.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE  # [TILE]
        k_rows = keys + slots[None, :] * stride_key  # [1, TILE]
        v_rows = values + slots[:, None] * stride_value  # [TILE, 1]
        k = tl.load(k_rows + dims[:, None], mask=k_mask, other=0.0)  # [PADDED_DIM, TILE]
        v = tl.load(v_rows + value_dims[None, :], mask=v_mask, other=0.0)  # [TILE, PADDED_VALUE]
        if WIDEN:
            k, v = k.to(tl.float32), v.to(tl.float32)

        # "ieee" matters for float32, which tensor cores would round to 10 bits. 16-bit formats are exact there.
        scores = tl.dot(q, k, input_precision="ieee")  # [ROWS, TILE]
        if SOFTCAP:
            # tanh(x) = 1 - 2 / (e^2x + 1), which is right even if e^2x overflows.
            ratio = tl.exp2(scores * (2.0 * LOG2_E * scale / softcap))
            scores = (softcap - 2.0 * softcap / (ratio + 1.0)) * LOG2_E
        else:
            scores = scores * (scale * LOG2_E)
        if MASKED:
            visible = in_range[None, :] & (tokens[None, :] <= positions[:, None])  # [ROWS, TILE]
            if WINDOW > 0:
                visible = visible & (tokens[None, :] > positions[:, None] - WINDOW)
            scores = tl.where(visible, scores, float("-inf"))

        new_maximum = tl.maximum(maximum, tl.max(scores, 1))  # [ROWS]
        # The maximum of a row without visible keys so far is -inf. With 0 instead, its weights are 2^-inf = 0.
        reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores - reference[:, None])  # [ROWS, TILE]
        rescale = tl.exp2(maximum - reference)  # [ROWS]
        total = total * rescale + tl.sum(weights, 1)
        out = tl.dot(weights.to(v.dtype), v, out * rescale[:, None], input_precision="ieee")
        maximum = new_maximum
    return out, maximum, total


@triton.jit(do_not_specialize=["num_requests"])  # else separate kernels for 1, multiples of 16, and others
def attention_kernel(
    query: tl.tensor,  # [T, Hq, D]
    keys: tl.tensor,  # [slots, Hkv, D]
    values: tl.tensor,  # [slots, Hkv, Dv]
    out: tl.tensor,  # [T, Hq, Dv]
    sinks: tl.tensor,  # [Hq]; only with SINKS
    block_table: tl.tensor,  # [R, B]
    seq_lens: tl.tensor,  # [R]
    query_start_loc: tl.tensor,  # [R + 1]
    partial_out: tl.tensor,  # [T, Hq, SEGMENTS, PADDED_VALUE]; the partial_* only with SEGMENTS > 1
    partial_max: tl.tensor,  # [T, Hq, SEGMENTS]
    partial_sum: tl.tensor,  # [T, Hq, SEGMENTS]
    num_requests: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    stride_query: tl.tensor,  # between tokens; the heads of a token are contiguous, as in all tensors here
    stride_key: tl.tensor,
    stride_value: tl.tensor,
    stride_table: tl.tensor,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_VALUE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    TWO_LOOPS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """Attention of one block of queries of one request, with the heads of one KV head, over one segment of its keys.

    Packing. GROUP query heads read the same KV head. They become rows of one tile, so each key is loaded once for all
    of them, and even one token fills several rows. With GROUP = 2 and ROWS = 8, a tile holds BLOCK_Q = 4 tokens::

        row      0      1      2      3      4      5      6      7
        token    0      0      1      1      2      2      3      3
        head     2 kv   2 kv+1 2 kv   2 kv+1 2 kv   2 kv+1 2 kv   2 kv+1

    A group with more heads than rows is split into chunks of HEADS = ROWS heads, each with its own programs. Prefills
    and decodes differ only in the number of rows.

    Visibility. The new tokens are the last of their request. Their rows see a staircase of its keys::

        keys        0                      whole           last
        token 0     ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ │ ■ · · · · · │          up to `whole` every row sees every tile, so no mask
        token 1     ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ │ ■ ■ · · · · │          is needed; from `last` on no row sees any key, so
        token 2     ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ │ ■ ■ ■ · · · │          nothing is loaded

    With TWO_LOOPS the first loop runs up to `whole` without masks, which saves time if products are fast. Otherwise,
    and with a window, which also hides keys on the left, one loop masks all tiles.

    Segments. With SEGMENTS > 1 the keys are split into that many segments, with a program for each, and `reduce_kernel`
    merges them. Otherwise a decode with a long past would be the work of one program per head, on a GPU that runs
    hundreds in parallel (Flash-Decoding, 2023).

    Sinks. A sink is the score of a token without a value. So a row with one starts as if that token had been seen: its
    maximum is the sink and its sum is 1 (in the first segment only, or it would count several times).
    """
    BLOCK_Q: tl.constexpr = ROWS // HEADS
    CHUNKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    q_block = tl.program_id(0)
    kv_head = tl.program_id(1) // CHUNKS
    first_head = tl.program_id(1) % CHUNKS * HEADS  # of this chunk, in the group
    segment = tl.program_id(2)

    request = find_request(query_start_loc, q_block, num_requests, BLOCK_Q)
    start = tl.load(query_start_loc + request)
    query_len = tl.load(query_start_loc + request + 1) - start
    first_token = (q_block - start // BLOCK_Q - request) * BLOCK_Q  # of this block, among the request's new ones
    if first_token >= query_len:
        return
    kv_len = tl.load(seq_lens + request)
    past = kv_len - query_len  # tokens before the new ones

    rows = tl.arange(0, ROWS)  # [ROWS]
    tokens = first_token + rows // HEADS  # [ROWS]
    head_in_group = first_head + rows % HEADS  # [ROWS]
    row_mask = (rows < BLOCK_Q * HEADS) & (tokens < query_len) & (head_in_group < GROUP)  # [ROWS]
    heads = kv_head * GROUP + head_in_group  # [ROWS]
    dims = tl.arange(0, PADDED_DIM)  # [PADDED_DIM]
    mask = row_mask[:, None] & (dims < HEAD_DIM)[None, :]  # [ROWS, PADDED_DIM]
    steps = (start + tokens).to(tl.int64)  # [ROWS]: rows of the batch's token axis
    q = tl.load(query + (steps * stride_query + heads * HEAD_DIM)[:, None] + dims[None, :], mask=mask, other=0.0)
    if WIDEN:
        q = q.to(tl.float32)

    first = 0
    last = tl.minimum(past + first_token + BLOCK_Q, kv_len)
    if WINDOW > 0:
        first = tl.maximum(past + first_token - WINDOW + 1, 0) // TILE * TILE
    if SEGMENTS > 1:
        length = tl.cdiv(tl.cdiv(last - first, SEGMENTS), TILE) * TILE
        first = first + segment * length
        last = tl.minimum(last, first + length)
    whole = first
    if TWO_LOOPS:
        seen_by_all = tl.minimum(past + first_token + 1, last)
        whole = first + tl.maximum(seen_by_all - first, 0) // TILE * TILE

    acc = tl.zeros([ROWS, PADDED_VALUE], tl.float32)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SINKS and segment == 0:
        maximum = tl.load(sinks + heads, mask=row_mask, other=float("-inf")).to(tl.float32) * LOG2_E
        total = tl.where(maximum == float("-inf"), 0.0, 1.0)
    positions = past + tokens  # [ROWS]
    keys += kv_head * HEAD_DIM
    values += kv_head * VALUE_DIM
    table = block_table + request.to(tl.int64) * stride_table
    if TWO_LOOPS:
        acc, maximum, total = attend_keys(
            acc, maximum, total, q, positions, keys, values, table, first, whole,
            stride_key, stride_value, scale, softcap, HEAD_DIM, VALUE_DIM, PADDED_DIM, PADDED_VALUE,
            BLOCK_SIZE, TILE, WINDOW, SOFTCAP, False, WIDEN,
        )  # fmt: skip
    acc, maximum, total = attend_keys(
        acc, maximum, total, q, positions, keys, values, table, whole, last,
        stride_key, stride_value, scale, softcap, HEAD_DIM, VALUE_DIM, PADDED_DIM, PADDED_VALUE,
        BLOCK_SIZE, TILE, WINDOW, SOFTCAP, True, WIDEN,
    )  # fmt: skip

    row = steps * NUM_HEADS + heads  # [ROWS]: of [T, Hq]
    value_dims = tl.arange(0, PADDED_VALUE)  # [PADDED_VALUE]
    if SEGMENTS == 1:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # padding rows have no keys
        value_mask = row_mask[:, None] & (value_dims < VALUE_DIM)[None, :]  # [ROWS, PADDED_VALUE]
        tl.store(out + row[:, None] * VALUE_DIM + value_dims[None, :], acc.to(out.dtype.element_ty), mask=value_mask)
    else:
        place = row * SEGMENTS + segment  # [ROWS]
        tl.store(partial_out + place[:, None] * PADDED_VALUE + value_dims[None, :], acc, mask=row_mask[:, None])
        tl.store(partial_max + place, maximum, mask=row_mask)
        tl.store(partial_sum + place, total, mask=row_mask)


@triton.jit(do_not_specialize=["num_requests"])
def reduce_kernel(
    out: tl.tensor,  # [T, Hq, Dv]
    partial_out: tl.tensor,  # [T, Hq, SEGMENTS, PADDED_VALUE]
    partial_max: tl.tensor,  # [T, Hq, SEGMENTS]
    partial_sum: tl.tensor,  # [T, Hq, SEGMENTS]
    query_start_loc: tl.tensor,  # [R + 1]
    num_requests: tl.tensor,
    NUM_HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_VALUE: tl.constexpr,
    SEGMENTS: tl.constexpr,
) -> None:
    """Merge the segments of one token and head. This is the rescale between tiles again::

        segment    0        1        2                 m    = the largest of m0, m1, m2
        maximum    m0       m1       m2                sum  = s0 * 2^(m0 - m) + s1 * 2^(m1 - m) + s2 * 2^(m2 - m)
        sum        s0       s1       s2                out  = (o0 * 2^(m0 - m) + o1 * 2^(m1 - m) + ...) / sum
        out        o0 [Dv]   o1 [D]   o2 [D]

    A segment without keys has the maximum -inf, and so the factor 0. Padding rows, for which `attention_kernel` stores
    nothing, become 0.
    """
    row = tl.program_id(0).to(tl.int64)  # of [T, Hq]
    segments = tl.arange(0, SEGMENTS)  # [SEGMENTS]
    dims = tl.arange(0, PADDED_VALUE)  # [PADDED_VALUE]
    if row >= tl.load(query_start_loc + num_requests) * NUM_HEADS:
        tl.store(out + row * VALUE_DIM + dims, tl.zeros([PADDED_VALUE], out.dtype.element_ty), mask=dims < VALUE_DIM)
        return
    place = row * SEGMENTS + segments  # [SEGMENTS]
    maxima = tl.load(partial_max + place)  # [SEGMENTS]
    sums = tl.load(partial_sum + place)  # [SEGMENTS]
    outs = tl.load(partial_out + place[:, None] * PADDED_VALUE + dims[None, :])  # [SEGMENTS, PADDED_VALUE]
    maximum = tl.max(maxima, 0)
    factors = tl.exp2(maxima - tl.where(maximum == float("-inf"), 0.0, maximum))  # [SEGMENTS]
    total = tl.sum(sums * factors, 0)
    result = tl.sum(outs * factors[:, None], 0) / tl.where(total == 0.0, 1.0, total)  # [PADDED_VALUE]
    tl.store(out + row * VALUE_DIM + dims, result.to(out.dtype.element_ty), mask=dims < VALUE_DIM)


@triton.jit
def copy_kernel(
    pool: tl.tensor,  # [layers, blocks, BLOCK_NUMBERS]: keys and values in one pool count as two layers
    pairs: tl.tensor,  # [pairs, 2]: from, to
    stride_layer: tl.tensor,
    BLOCK_NUMBERS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Copy blocks within the pool. Program (p, l, c) takes chunk c of pair p in layer l.

    Programs run in any order, so no block that one pair writes may be read or written by another pair::

        pairs   [[1, 5], [2, 6]]

        layer 0    block 1 [ chunk 0 | chunk 1 | chunk 2 ]  ──>  block 5      block 2  ──>  block 6
        layer 1    block 1 [ chunk 0 | chunk 1 | chunk 2 ]  ──>  block 5      block 2  ──>  block 6
    """
    pair = tl.program_id(0)
    columns = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)  # [CHUNK]
    mask = columns < BLOCK_NUMBERS
    source = tl.load(pairs + 2 * pair).to(tl.int64)
    target = tl.load(pairs + 2 * pair + 1).to(tl.int64)
    layer = pool + tl.program_id(1).to(tl.int64) * stride_layer
    numbers = tl.load(layer + source * BLOCK_NUMBERS + columns, mask=mask)  # [CHUNK]
    tl.store(layer + target * BLOCK_NUMBERS + columns, numbers, mask=mask)
