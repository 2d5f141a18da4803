"""The checks behind `folovllm grade m3-kernels`. Reading them is allowed: they say what, never how.

Kernels run in Triton's interpreter, which has to be asked for before Triton is imported. What they return is held
against float64. Around everything that they may touch lies memory that they may not: around inputs it holds NaN, which
no result survives, and around outputs a number that must be the same afterwards.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from folovllm.course.grading.checks import Call, WrongAnswer, show

NEAR = {"rtol": 1e-4, "atol": 1e-5}  # of float32 sums, taken in any order
NOT_YOURS = -7777.0  # around outputs, where a copy of the NaN around an input would be seen
BORDER = 1024  # numbers of foreign memory on both sides: what goes astray lands here, and not in Python's own
few = settings(max_examples=12)


# --- what a step says of its tokens -----------------------------------------------------------------------


@pytest.mark.exercise("query_start_loc")
class TestQueryStartLoc:
    def test_the_examples(self, impl: ModuleType) -> None:
        """3, 1 and 4 new tokens begin at 0, 3 and 4, and end at 8."""
        Call(impl.query_start_loc, [3, 1, 4]).must_return([0, 3, 4, 8], "One number more than requests.")
        Call(impl.query_start_loc, []).must_return([0], "No request has tokens, and they end where they begin.")

    def test_only_decodes(self, impl: ModuleType) -> None:
        """In a step of decodes every request has one row."""
        Call(impl.query_start_loc, [1, 1, 1]).must_return([0, 1, 2, 3])

    @given(lengths=st.lists(st.integers(1, 20), max_size=6))
    def test_any(self, impl: ModuleType, lengths: list[int]) -> None:
        """Any lengths: against counting rows one by one."""
        owners = [i for i, length in enumerate(lengths) for _ in range(length)]
        want = [owners.index(i) for i in range(len(lengths))] + [len(owners)]
        Call(impl.query_start_loc, lengths).must_return(want)

    def test_refusals(self, impl: ModuleType) -> None:
        """A request without new tokens is refused."""
        Call(impl.query_start_loc, [3, 0, 4]).must_refuse("The second request has no new token.")
        Call(impl.query_start_loc, [-1]).must_refuse("Less than none.")


@pytest.mark.exercise("ragged_mask")
class TestRaggedMask:
    def test_one_prefill(self, impl: ModuleType) -> None:
        """A prompt alone has the causal mask: its lower triangle."""
        why = "Row i is the query, column j the key: j <= i."
        Call(impl.ragged_mask, [3], [3]).must_return(torch.ones(3, 3).tril().bool(), why)

    def test_one_decode(self, impl: ModuleType) -> None:
        """A decode has one row, all True."""
        why = "The new token is the last one: it sees all that came before it, and itself."
        Call(impl.ragged_mask, [1], [4]).must_return(torch.ones(1, 4).bool(), why)

    def test_prefills_do_not_see_each_other(self, impl: ModuleType) -> None:
        """Two prompts in one row of tokens: two triangles, and nothing between them."""
        want = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1]]).bool()
        Call(impl.ragged_mask, [2, 1], [2, 1]).must_return(want, "Another request's keys are no past of one's own.")

    def test_a_mixed_step(self, impl: ModuleType) -> None:
        """A decode beside a prefill: the columns of a request are as many as it has keys, not rows."""
        want = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]).bool()
        Call(impl.ragged_mask, [1, 2], [3, 2]).must_return(want, "T = 3 rows, S = 5 columns.")

    @given(requests=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=4))
    def test_pair_by_pair(self, impl: ModuleType, requests: list[tuple[int, int]]) -> None:
        """Any step: every pair of a token and a key by itself."""
        rows = [(r, past + i) for r, (new, past) in enumerate(requests) for i in range(new)]
        columns = [(r, j) for r, (new, past) in enumerate(requests) for j in range(past + new)]
        want = torch.tensor([[mine == other and j <= i for other, j in columns] for mine, i in rows])
        new_lens, lens = [new for new, _ in requests], [new + past for new, past in requests]
        Call(impl.ragged_mask, new_lens, lens).must_return(want)

    def test_refusals(self, impl: ModuleType) -> None:
        """Lengths that do not belong together are refused."""
        Call(impl.ragged_mask, [1], [2, 3]).must_refuse("One request or two?")
        Call(impl.ragged_mask, [0], [2]).must_refuse("A request without new tokens.")
        Call(impl.ragged_mask, [3], [2]).must_refuse("The new tokens have K/V as well: 3 of 2 cannot be.")


@pytest.mark.exercise("step_slots")
class TestStepSlots:
    def test_the_example(self, impl: ModuleType) -> None:
        """A prompt of three in block 7, and token 5 of a second request in block 2."""
        why = "Token 5 is number 1 of the second entry of its table, block 2: 2 * 4 + 1."
        Call(impl.step_slots, [3, 1], [3, 6], [[7, 0], [5, 2]], 4).must_return([28, 29, 30, 9], why)

    def test_a_token_at_a_border(self, impl: ModuleType) -> None:
        """The first token of a block has offset 0 in the next entry of the table."""
        Call(impl.step_slots, [2], [9], [[3, 1, 6]], 4).must_return([7, 24], "7 is the last slot of block 1.")

    def test_blocks_of_one(self, impl: ModuleType) -> None:
        """With blocks of one token the table is the mapping."""
        Call(impl.step_slots, [2, 1], [4, 1], [[9, 4, 7, 5], [2, 0, 0, 0]], 1).must_return([7, 5, 2])

    @given(data=st.data())
    def test_any(self, impl: ModuleType, data: st.DataObject) -> None:
        """Any step: against a pool in which each slot knows its block and its offset."""
        size = data.draw(st.integers(1, 5), label="block_size")
        shapes = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9)), min_size=1, max_size=3))
        counts = [-(-(new + past) // size) for new, past in shapes]
        free = data.draw(st.permutations(range(1, sum(counts) + 1)))
        tables = [[free.pop() for _ in range(count)] + [0] * (max(counts) - count) for count in counts]
        pool = [(block, offset) for block in range(sum(counts) + 1) for offset in range(size)]
        want = []
        for (new, past), table in zip(shapes, tables, strict=True):
            homes = [(block, offset) for block in table for offset in range(size)]
            want += [pool.index(home) for home in homes[past : past + new]]
        Call(impl.step_slots, [n for n, _ in shapes], [n + p for n, p in shapes], tables, size).must_return(want)

    def test_refusals(self, impl: ModuleType) -> None:
        """A token without a block is refused: its K/V would land in somebody else's."""
        Call(impl.step_slots, [1], [5], [[3]], 4).must_refuse("Token 4 needs a second block.")
        Call(impl.step_slots, [1], [5], [[3, 0]], 4).must_refuse("Block 0 is padding of the table.")


# --- how kernels are checked ------------------------------------------------------------------------------


@dataclass
class Sheet:
    """A tensor for a kernel to write, in the middle of memory that is not its own. rows `stride` numbers apart."""

    memory: Tensor  # 1-D
    rows: int
    columns: int
    stride: int

    @property
    def pointer(self) -> Tensor:
        """The first number."""
        return self.memory[BORDER:]

    def content(self) -> Tensor:
        """[rows, columns]."""
        return self.memory.as_strided((self.rows, self.columns), (self.stride, 1), BORDER)

    def foreign(self) -> Tensor:
        """Everything around, and between rows."""
        own = torch.zeros(len(self.memory), dtype=torch.bool)
        own.as_strided((self.rows, self.columns), (self.stride, 1), BORDER)[:] = True
        return self.memory[~own]


def sheet(rows: int, columns: int, stride: int | None = None, content: Tensor | None = None) -> Sheet:
    """An input with content in it, and NaN around it; or an output of NaN, with `NOT_YOURS` around it."""
    stride = columns if stride is None else stride
    around = NOT_YOURS if content is None else math.nan
    made = Sheet(torch.full((rows * stride + 2 * BORDER,), around), rows, columns, stride)
    made.content()[:] = math.nan if content is None else content
    return made


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run a kernel. What goes wrong in it is raised as it is, and not as the interpreter wraps it."""
    try:
        kernel[grid](*args, **constants)
    except Exception as error:
        if type(error).__name__ == "InterpreterError" and error.__cause__ is not None:
            raise error.__cause__ from None
        raise


def check(what: str, outs: Sequence[tuple[str, Sheet, Tensor]], why: str = "") -> None:
    """Every output holds what it should, to rounding, and what is around it is as before."""
    for name, out, want in outs:
        got = out.content().double()  # [rows, columns]
        problem = ""
        wrong = ~torch.isclose(got, want.double().view_as(got), **NEAR)
        if bool(wrong.any()):
            row, column = wrong.nonzero()[0].tolist()
            shown, right = float(got[row, column]), float(want.reshape(got.shape)[row, column])
            problem = (
                f"First difference in {name} at row {row}, column {column}: {shown:.6g}, it should be {right:.6g}."
            )
            if math.isnan(shown):
                problem += "\nNaN: it was never written, or what lies beyond the end, or unused, was read."
        elif not bool((out.foreign() == NOT_YOURS).all()):
            problem = f"{name} is right, and memory beside it that is somebody else's was written. Is there a mask?"
        if problem:
            small = got.numel() <= 24
            parts = [what, f"{name} is\n{show(got)}" if small else "", f"expected\n{show(want.view_as(got))}" * small]
            raise WrongAnswer("\n".join(part for part in (*parts, problem, why) if part))


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Random numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


# --- the first rungs --------------------------------------------------------------------------------------


def check_copy(impl: ModuleType, n: int, block: int, why: str = "") -> None:
    x = sheet(1, n, content=numbers(1, n))
    out = sheet(1, n)
    grid = (-(-n // block),)
    launch(impl.copy_kernel, grid, out.pointer, x.pointer, n, BLOCK=block)
    check(f"copy_kernel[{grid}] with n={n}, BLOCK={block}", [("out", out, x.content())], why)


@pytest.mark.exercise("copy_kernel")
class TestCopy:
    def test_one_program(self, impl: ModuleType) -> None:
        """Four numbers, one program."""
        check_copy(impl, 4, 4)

    def test_several_programs(self, impl: ModuleType) -> None:
        """Twelve numbers, three programs."""
        check_copy(impl, 12, 4, "Program i begins at i * BLOCK.")

    def test_the_last_one_has_less_to_do(self, impl: ModuleType) -> None:
        """Ten numbers, three programs of four: the last two places are not ours."""
        check_copy(impl, 10, 4, "Numbers 10 and 11 do not exist.")

    @few
    @given(n=st.integers(1, 70), power=st.integers(0, 6))
    def test_any(self, impl: ModuleType, n: int, power: int) -> None:
        """Any number of numbers, and blocks of any power of two."""
        check_copy(impl, n, 2**power)


def check_row_sum(impl: ModuleType, rows: int, columns: int, stride: int, block: int, why: str = "") -> None:
    x = sheet(rows, columns, stride, numbers(rows, columns))
    out = sheet(1, rows)
    launch(impl.row_sum_kernel, (rows,), out.pointer, x.pointer, columns, stride, BLOCK=block)
    what = f"row_sum_kernel[({rows},)] with columns={columns}, stride={stride}, BLOCK={block}"
    check(what, [("out", out, x.content().double().sum(1))], why)


@pytest.mark.exercise("row_sum_kernel")
class TestRowSum:
    def test_rows_as_long_as_the_tile(self, impl: ModuleType) -> None:
        """Three rows of eight numbers, in tiles of eight."""
        check_row_sum(impl, 3, 8, 8, 8)

    def test_rows_shorter_than_the_tile(self, impl: ModuleType) -> None:
        """Rows of five numbers in tiles of eight: the other three are not the row's."""
        check_row_sum(impl, 3, 5, 5, 8, "What is masked should be 0, which changes no sum.")

    def test_rows_with_gaps(self, impl: ModuleType) -> None:
        """Rows of five numbers that begin nine apart, with NaN between them."""
        check_row_sum(impl, 4, 5, 9, 8, "Row i begins at i * stride.")

    @few
    @given(rows=st.integers(1, 4), columns=st.integers(1, 20), gap=st.integers(0, 3))
    def test_any(self, impl: ModuleType, rows: int, columns: int, gap: int) -> None:
        """Any matrix."""
        check_row_sum(impl, rows, columns, columns + gap, 32)


def check_softmax(impl: ModuleType, x: Tensor, stride: int, block: int, why: str = "") -> None:
    rows, columns = x.shape
    given_x, out = sheet(rows, columns, stride, x), sheet(rows, columns, stride)
    launch(impl.softmax_kernel, (rows,), out.pointer, given_x.pointer, columns, stride, BLOCK=block)
    what = f"softmax_kernel[({rows},)] with columns={columns}, stride={stride}, BLOCK={block}"
    check(what, [("out", out, x.double().softmax(1))], why)


@pytest.mark.exercise("softmax_kernel")
class TestSoftmax:
    def test_whole_tiles(self, impl: ModuleType) -> None:
        """Two rows of eight, in tiles of eight."""
        check_softmax(impl, numbers(2, 8), 8, 8)

    def test_rows_shorter_than_the_tile(self, impl: ModuleType) -> None:
        """Rows of five in tiles of eight: what is masked must get no share of the sum."""
        check_softmax(impl, numbers(2, 5), 5, 8, "exp(0) is 1. What has to be loaded for exp to give 0?")

    def test_negative_rows(self, impl: ModuleType) -> None:
        """Rows of negative numbers: what is masked must not be the largest."""
        check_softmax(impl, numbers(2, 5) - 200, 5, 8, "With m = 0, all exp(x - m) are 0, and 0 / 0 is NaN.")

    def test_large_numbers(self, impl: ModuleType) -> None:
        """exp(200) is no float32, and softmax does not need it."""
        check_softmax(impl, numbers(2, 8) + 200, 8, 8, "Take the row's largest number off first.")

    def test_rows_with_gaps(self, impl: ModuleType) -> None:
        """Rows of three numbers, six apart."""
        check_softmax(impl, numbers(3, 3), 6, 4, "The stride is that of x and of out.")

    @few
    @given(rows=st.integers(1, 3), columns=st.integers(1, 16), seed=st.integers(0, 99))
    def test_any(self, impl: ModuleType, rows: int, columns: int, seed: int) -> None:
        """Any rows."""
        check_softmax(impl, numbers(rows, columns, seed=seed, scale=5.0), columns + 1, 16)


# --- rows of any length -----------------------------------------------------------------------------------


def check_online(impl: ModuleType, x: Tensor, tile: int, why: str = "") -> None:
    rows, columns = x.shape
    given_x = sheet(rows, columns, columns + 2, x)
    maximum, total = sheet(1, rows), sheet(1, rows)
    launch(impl.online_softmax_kernel, (rows,), maximum.pointer, total.pointer, given_x.pointer, columns, columns + 2,
           TILE=tile)  # fmt: skip
    largest = x.double().max(1).values
    sums = torch.exp(x.double() - largest[:, None]).sum(1)
    what = f"online_softmax_kernel[({rows},)] with columns={columns}, stride={columns + 2}, TILE={tile}"
    check(what, [("maximum", maximum, largest), ("total", total, sums)], why)


@pytest.mark.exercise("online_softmax_kernel")
class TestOnlineSoftmax:
    def test_one_tile(self, impl: ModuleType) -> None:
        """Rows that fit into one tile."""
        check_online(impl, numbers(2, 6), 8)

    def test_a_maximum_that_falls(self, impl: ModuleType) -> None:
        """The largest number stands in the first tile: nothing has to be corrected."""
        check_online(impl, torch.tensor([[5.0, 1, 0, 2, 3, 1, 0, 0, 2, 1]]), 4)

    def test_a_maximum_that_rises(self, impl: ModuleType) -> None:
        """Every tile raises the maximum: what was summed before is a sum of another scale."""
        why = "From old to new, all of exp(x - old) becomes exp(x - new) = exp(x - old) * ..."
        check_online(impl, torch.arange(12.0)[None], 4, why)

    def test_a_tile_of_nothing(self, impl: ModuleType) -> None:
        """A first tile of -inf alone, as a mask leaves it."""
        row = torch.tensor([[-math.inf, -math.inf, -math.inf, -math.inf, 1.0, 2.0]])
        check_online(impl, row, 4, "-inf - -inf is NaN. What may stand in for a maximum that is not there yet?")

    @few
    @given(columns=st.integers(1, 40), power=st.integers(1, 4), seed=st.integers(0, 99))
    def test_any(self, impl: ModuleType, columns: int, power: int, seed: int) -> None:
        """Rows and tiles of any length."""
        check_online(impl, numbers(2, columns, seed=seed, scale=4.0), 2**power)


def check_attention(impl: ModuleType, heads: int, length: int, dim: int, tile: int, why: str = "") -> None:
    q = numbers(heads, dim, seed=1, scale=2.0)
    k, v = numbers(heads, length, dim, seed=2), numbers(heads, length, dim, seed=3)
    keys, values = (sheet(1, t.numel(), content=t.reshape(1, -1)) for t in (k, v))
    out = sheet(heads, dim)
    scale = 1 / math.sqrt(dim)
    launch(impl.attention_kernel, (heads,), out.pointer, q, keys.pointer, values.pointer, length, scale,
           DIM=dim, TILE=tile)  # fmt: skip
    weights = (torch.einsum("hd,hsd->hs", q.double(), k.double()) * scale).softmax(1)  # [H, S]
    want = torch.einsum("hs,hsd->hd", weights, v.double())
    what = f"attention_kernel[({heads},)] with length={length}, scale={scale:.4g}, DIM={dim}, TILE={tile}"
    check(what, [("out", out, want)], why)


@pytest.mark.exercise("attention_kernel")
class TestAttention:
    def test_one_key(self, impl: ModuleType) -> None:
        """With a single key, the result is its value."""
        check_attention(impl, 1, 1, 4, 4, "Its weight is 1, whatever its score.")

    def test_one_tile(self, impl: ModuleType) -> None:
        """Seven keys in a tile of eight."""
        check_attention(impl, 1, 7, 4, 8, "A key that is not there has the score -inf, not 0.")

    def test_several_tiles(self, impl: ModuleType) -> None:
        """Nineteen keys in tiles of four."""
        check_attention(impl, 1, 19, 8, 4, "The weighted sum of values needs the same rescale as the sum of weights.")

    def test_several_heads(self, impl: ModuleType) -> None:
        """Three heads, each with keys of its own."""
        check_attention(impl, 3, 10, 4, 4, "Head h's keys begin at h * length * DIM.")

    @few
    @given(heads=st.integers(1, 3), length=st.integers(1, 24), power=st.integers(1, 4))
    def test_any(self, impl: ModuleType, heads: int, length: int, power: int) -> None:
        """Any lengths and tiles."""
        check_attention(impl, heads, length, 8, 2**power)


# --- through a block table --------------------------------------------------------------------------------


@dataclass
class Paged:
    """A decode step: q [R, Hq, D], a pool [blocks, block_size, Hkv, D], tables, and what should come out [R, Hq, D]."""

    q: Tensor
    keys: Tensor
    values: Tensor
    table: Tensor
    seq_lens: Tensor
    scale: float
    want: Tensor


def paged(lengths: Sequence[int], block_size: int, kv_heads: int, group: int = 1, dim: int = 4, seed: int = 0) -> Paged:
    """Requests of these lengths in scattered blocks. All that belongs to nobody is NaN, and some table entries are."""
    counts = [-(-n // block_size) for n in lengths]
    num_blocks = sum(counts) + 2  # the null block, and one of nobody's
    order = torch.randperm(num_blocks - 2, generator=torch.Generator().manual_seed(seed)) + 1
    keys, values = (torch.full((num_blocks, block_size, kv_heads, dim), math.nan) for _ in range(2))
    table = torch.full((len(lengths), max(counts) + 1), num_blocks - 1, dtype=torch.int32)
    q = numbers(len(lengths), kv_heads * group, dim, seed=seed + 1, scale=2.0)
    want = torch.zeros(q.shape, dtype=torch.float64)
    scale, taken = 1 / math.sqrt(dim), 0
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        table[row, :count] = order[taken : taken + count]
        taken += count
        k, v = (numbers(length, kv_heads, dim, seed=seed + 10 * row + i) for i in (2, 3))
        for position in range(length):
            block, offset = int(table[row, position // block_size]), position % block_size
            keys[block, offset], values[block, offset] = k[position], v[position]
        k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))  # [S, Hq, D]
        weights = (torch.einsum("hd,shd->hs", q[row].double(), k) * scale).softmax(1)
        want[row] = torch.einsum("hs,shd->hd", weights, v)
    return Paged(q, keys, values, table, torch.tensor(lengths, dtype=torch.int32), scale, want)


def check_paged(
    impl: ModuleType, lengths: Sequence[int], block_size: int, heads: int, tile: int, why: str = "", seed: int = 0
) -> None:
    case = paged(lengths, block_size, heads, seed=seed)
    out = sheet(len(lengths) * heads, 4)
    launch(impl.paged_decode_kernel, (len(lengths), heads), out.pointer, case.q, case.keys, case.values, case.table,
           case.seq_lens, case.table.shape[1], case.scale, NUM_HEADS=heads, DIM=4, BLOCK_SIZE=block_size,
           TILE=tile)  # fmt: skip
    what = (
        f"paged_decode_kernel[({len(lengths)}, {heads})] with seq_lens={list(lengths)}, DIM=4, "
        f"BLOCK_SIZE={block_size}, TILE={tile}, block_table={case.table.tolist()}\n"
        "(a row of out is a head of a request)"
    )
    check(what, [("out", out, case.want.reshape(-1, 4))], why)


@pytest.mark.exercise("paged_decode_kernel")
class TestPagedDecode:
    def test_one_block(self, impl: ModuleType) -> None:
        """One request, one head, one block: contiguous, but at another place."""
        check_paged(impl, [4], 4, 1, 4, "Its keys begin at block * BLOCK_SIZE * NUM_HEADS * DIM.")

    def test_scattered_blocks(self, impl: ModuleType) -> None:
        """Eleven tokens in three blocks that are no neighbours, the last one not full."""
        check_paged(impl, [11], 4, 1, 4, "Token j: block_table[r, j // BLOCK_SIZE], offset j % BLOCK_SIZE.")

    def test_tiles_larger_than_blocks(self, impl: ModuleType) -> None:
        """Tiles of eight over blocks of three: every key of a tile looks up its own block."""
        check_paged(impl, [10], 3, 1, 8, "A tile has keys of several blocks.")

    def test_tiles_smaller_than_blocks(self, impl: ModuleType) -> None:
        """Tiles of two over blocks of five."""
        check_paged(impl, [9], 5, 1, 2)

    def test_several_heads(self, impl: ModuleType) -> None:
        """Three heads: in a slot, those of all heads lie side by side."""
        check_paged(impl, [7], 4, 3, 4, "The pool is [blocks, BLOCK_SIZE, NUM_HEADS, DIM], heads inside of slots.")

    def test_several_requests(self, impl: ModuleType) -> None:
        """Requests of 1, 9 and 4 tokens, whose tables are rows of one tensor."""
        check_paged(impl, [1, 9, 4], 4, 2, 4, "Row r of the table begins at r * max_blocks. Each has its own length.")

    @few
    @given(data=st.data())
    def test_any(self, impl: ModuleType, data: st.DataObject) -> None:
        """Any lengths, block sizes and tiles."""
        lengths = data.draw(st.lists(st.integers(1, 14), min_size=1, max_size=3), label="seq_lens")
        size, power = data.draw(st.integers(1, 6), label="BLOCK_SIZE"), data.draw(st.integers(1, 4), label="log2 TILE")
        check_paged(impl, lengths, size, data.draw(st.integers(1, 2), label="heads"), 2**power, seed=len(lengths))


# --- optional ---------------------------------------------------------------------------------------------


def check_packed(
    impl: ModuleType, lengths: Sequence[int], kv_heads: int, group: int, block_size: int = 4, why: str = ""
) -> None:
    case = paged(lengths, block_size, kv_heads, group, dim=16)
    heads = kv_heads * group
    out = sheet(len(lengths) * heads, 16)
    launch(impl.packed_decode_kernel, (len(lengths), kv_heads), out.pointer, case.q, case.keys, case.values, case.table,
           case.seq_lens, case.table.shape[1], case.scale, NUM_KV_HEADS=kv_heads, GROUP=group, ROWS=16, DIM=16,
           BLOCK_SIZE=block_size, TILE=16)  # fmt: skip
    what = (
        f"packed_decode_kernel[({len(lengths)}, {kv_heads})] with seq_lens={list(lengths)}, NUM_KV_HEADS={kv_heads}, "
        f"GROUP={group}, ROWS=16, DIM=16, BLOCK_SIZE={block_size}, TILE=16\n(a row of out is a query head of a request)"
    )
    check(what, [("out", out, case.want.reshape(-1, 16))], why)


@pytest.mark.exercise("packed_decode_kernel", optional=True)
class TestPackedDecode:
    def test_one_group(self, impl: ModuleType) -> None:
        """Four query heads over one KV head."""
        check_packed(impl, [7], 1, 4, why="Rows from GROUP on are nobody's: neither loaded nor stored.")

    def test_several_groups(self, impl: ModuleType) -> None:
        """Two KV heads, three query heads each."""
        check_packed(impl, [7], 2, 3, why="KV head g is read by query heads g * GROUP to g * GROUP + GROUP - 1.")

    def test_several_tiles_and_requests(self, impl: ModuleType) -> None:
        """Requests of 40, 1 and 17 tokens."""
        check_packed(impl, [40, 1, 17], 2, 2, 5, "Every row has a maximum and a sum of its own.")

    def test_no_group(self, impl: ModuleType) -> None:
        """Groups of one are the plain case, and a full tile of sixteen is one too."""
        check_packed(impl, [9], 3, 1)
        check_packed(impl, [9], 1, 16)


def check_merge(impl: ModuleType, scores: Tensor, cuts: Sequence[int], power_of_two: int, why: str = "") -> None:
    rows, length = scores.shape
    values = numbers(rows, length, 4, seed=5)
    bounds = [0, *cuts, length]
    parts = [(scores[:, a:b], values[:, a:b]) for a, b in pairwise(bounds)]
    maxima = torch.stack([s.max(1).values if s.shape[1] else torch.full((rows,), -math.inf) for s, _ in parts], 1)
    weights = [torch.exp(s - m[:, None]) if s.shape[1] else s for (s, _), m in zip(parts, maxima.T, strict=True)]
    totals = torch.stack([w.sum(1) for w in weights], 1)
    outputs = torch.stack([torch.einsum("rs,rsd->rd", w, v) for w, (_, v) in zip(weights, parts, strict=True)], 1)
    segments = len(parts)
    held = [sheet(1, t.numel(), content=t.reshape(1, -1)) for t in (outputs, maxima, totals)]
    out = sheet(rows, 4)
    launch(impl.merge_kernel, (rows,), out.pointer, *(h.pointer for h in held), segments, SEGMENTS=power_of_two, DIM=4)
    want = torch.einsum("rs,rsd->rd", scores.double().softmax(1), values.double())
    what = f"merge_kernel[({rows},)] with segments={segments}, SEGMENTS={power_of_two}, DIM=4"
    check(what, [("out", out, want)], why)


@pytest.mark.exercise("merge_kernel", optional=True)
class TestMerge:
    def test_one_segment(self, impl: ModuleType) -> None:
        """One segment only has to be divided by its sum."""
        check_merge(impl, numbers(1, 6), [], 1)

    def test_two_segments(self, impl: ModuleType) -> None:
        """Two segments with maxima far apart."""
        why = "Each has weights relative to its own maximum. Bring both to the larger one before you add."
        check_merge(impl, torch.tensor([[0.0, 1, 0, 6, 5, 4]]), [3], 2, why)

    def test_three_segments_in_four_places(self, impl: ModuleType) -> None:
        """Three segments: the fourth place is masked."""
        check_merge(impl, numbers(2, 9, scale=3.0), [2, 5], 4)

    def test_a_segment_without_keys(self, impl: ModuleType) -> None:
        """A short text leaves segments without keys: maximum -inf, sum 0."""
        check_merge(impl, numbers(2, 5), [3, 5], 4, "exp(-inf) is 0: such a segment counts for nothing.")

    def test_large_scores(self, impl: ModuleType) -> None:
        """Scores around 300, whose exp is no float32."""
        check_merge(impl, numbers(2, 8, scale=3.0) + 300, [4], 2, "Subtract the largest maximum, not 0.")
