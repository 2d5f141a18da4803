"""The block manager against books kept by hand: tables, counts, free lists and the tokens that stand in the blocks.

`Books` is a second bookkeeper that works token by token on plain lists. The machine makes every call on both and asks
them the same questions after each. The books also hold what a runner would: a cell per slot, moved by the operations
that the manager hands out. So a token that is lost, overwritten or read from a stranger's block is seen as such.
"""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from folovllm import SamplingParams
from folovllm.kv_cache.block_manager import BlockManager
from folovllm.kv_cache.interface import BlockCopy, BlockPlan, KVOp, SwapIn, SwapOut
from folovllm.request import Request

MAX_LEN = 40  # tokens of a request, at most


def make_request(
    request_id: str = "r", prompt: int = 1, max_tokens: int | None = 16, max_model_len: int = 64
) -> Request:
    return Request(request_id, [7] * prompt, SamplingParams(max_tokens=max_tokens), (), max_model_len)


@dataclass
class Books:
    """What the manager's answers should be. Tokens are (request, position) as they were first written."""

    num_blocks: int
    size: int
    num_host: int
    tables: dict[str, list[int]] = field(default_factory=dict)
    host_tables: dict[str, list[int]] = field(default_factory=dict)
    tokens: dict[str, list[Any]] = field(default_factory=dict)  # that are computed, by request
    cells: dict[tuple[int, int], Any] = field(default_factory=dict)  # (block, offset) -> the token there
    host_cells: dict[tuple[int, int], Any] = field(default_factory=dict)
    known: dict[int, set[int]] = field(default_factory=dict)  # per held block, the offsets that were written

    def __post_init__(self) -> None:
        self.free = list(range(1, self.num_blocks + 1))
        self.host_free = list(range(1, self.num_host + 1))

    def holders(self, block: int) -> int:
        return sum(table.count(block) for table in self.tables.values())

    def take(self) -> int:
        block = self.free.pop(0)
        self.known[block] = set()
        return block

    def drop(self, request_id: str) -> None:
        """Give up the request's blocks, the last first."""
        table = self.tables[request_id]
        while table:
            block = table.pop()
            if self.holders(block) == 0:
                self.free.append(block)
                del self.known[block]

    def slot(self, request_id: str, position: int) -> tuple[int, int]:
        return self.tables[request_id][position // self.size], position % self.size

    def write(self, request_id: str, position: int, token: Any) -> None:
        slot = self.slot(request_id, position)
        self.cells[slot] = token
        self.known[slot[0]].add(slot[1])

    def apply(self, ops: tuple[KVOp, ...]) -> None:
        """What a runner does: whole blocks are copied, whatever is in them."""
        for op in ops:
            for offset in range(self.size):
                if isinstance(op, BlockCopy):
                    self.cells[op.dst, offset] = self.cells.get((op.src, offset))
                elif isinstance(op, SwapOut):
                    self.host_cells[op.host_block, offset] = self.cells.get((op.block, offset))
                else:
                    assert isinstance(op, SwapIn)
                    self.cells[op.block, offset] = self.host_cells.get((op.host_block, offset))


def state(manager: BlockManager) -> tuple[Any, ...]:
    """Everything that a refused call must leave as it was."""
    pools = [(p.free_list(), list(p.ref_cnt)) for p in (manager.pool, manager.host_pool)]
    return deepcopy(manager._tables), manager.snapshot(), manager.usage(), pools


class ManagerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.one_of(st.integers(1, 12), st.sampled_from([100, 250])),
        size=st.sampled_from([1, 2, 3, 4, 8]),
        num_host=st.integers(0, 8),
    )
    def start(self, num_blocks: int, size: int, num_host: int) -> None:
        self.manager = BlockManager(num_blocks, size, num_host)
        self.books = Books(num_blocks, size, num_host)
        self.not_run: set[str] = set()  # forks that have not run
        self.requests: dict[str, Request] = {}
        self.plans: dict[str, BlockPlan] = {}  # that no forward has run yet
        self.made = 0
        if num_blocks >= 100:  # all but a few are taken, so that the watermark is felt
            hog = self.new_request()
            plan = self.manager.allocate_slots(hog, (num_blocks - 5) * size)
            self.manager.cache_blocks(plan)
            self.books.tables["q0"] = [self.books.take() for _ in range(num_blocks - 5)]
            self.books.tokens["q0"] = [("q0", i) for i in range((num_blocks - 5) * size)]
            for i, token in enumerate(self.books.tokens["q0"]):
                self.books.write("q0", i, token)

    def new_request(self) -> Request:
        request = make_request(f"q{self.made}")
        self.requests[request.request_id] = request
        self.made += 1
        return request

    def some(self, data: st.DataObject) -> Request:
        return self.requests[data.draw(st.sampled_from(sorted(self.requests)), "request")]

    # ------------------------------------------------------------------ calls

    @rule(tokens=st.integers(1, 17), spare=st.booleans(), new=st.booleans(), data=st.data())
    def reserve(self, tokens: int, spare: bool, new: bool, data: st.DataObject) -> None:
        request = self.new_request() if new or not self.requests else self.some(data)
        i, books = request.request_id, self.books
        done = books.tokens.get(i, [])
        tokens = max(1, min(tokens, MAX_LEN - len(done)))
        table, host = books.tables.get(i, []), books.host_tables.get(i, [])

        # By hand: the blocks of all its tokens, less those it has, and one more where it may not write.
        missing = max(0, ceil((len(done) + tokens) / books.size) - len(table))
        next_block = table[len(done) // books.size] if len(done) // books.size < len(table) else None
        shared = next_block is not None and books.holders(next_block) > 1
        needed = missing + shared
        spared = int(0.01 * books.num_blocks) if spare else 0

        before = state(self.manager)
        plan = self.manager.allocate_slots(request, tokens, spare)
        if needed and needed > len(books.free) - spared:
            assert plan is None and state(self.manager) == before
            if i not in books.tokens:
                del self.requests[i]
            return
        ops: list[KVOp] = []
        self.not_run.discard(i)
        books.tokens.setdefault(i, done)
        table = books.tables.setdefault(i, [])
        if shared:
            copy = books.take()
            books.known[copy] = set(range(len(done) % books.size))
            table[len(done) // books.size] = copy
            ops.append(BlockCopy(next_block, copy))
        table += [books.take() for _ in range(missing)]
        if host:
            ops += [SwapIn(h, b) for h, b in zip(host, table, strict=False)]
            for position in range(len(done)):
                books.known[table[position // books.size]].add(position % books.size)
            books.host_free += host
            del books.host_tables[i]
        assert plan == BlockPlan(i, len(done), tokens, tuple(ops), tuple(table))
        for position in range(len(done), len(done) + tokens):  # whoever writes into a block holds it alone
            assert books.holders(books.slot(i, position)[0]) == 1
        books.apply(plan.ops)
        self.plans[i] = plan

    @precondition(lambda self: self.plans)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        i = data.draw(st.sampled_from(sorted(self.plans)), "request")
        plan = self.plans.pop(i)
        if tuple(self.books.tables[i]) != plan.block_table:
            return  # somebody forked it meanwhile and it has a newer plan: a scheduler makes one plan per step
        self.manager.cache_blocks(plan)
        for position in range(plan.start, plan.start + plan.num_tokens):
            token = (i, position)
            self.books.write(i, position, token)
            self.books.tokens[i].append(token)
        with pytest.raises(RuntimeError, match="does not continue"):
            self.manager.cache_blocks(plan)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        request = self.some(data)
        i = request.request_id
        self.manager.free(request)
        self.manager.free(request)  # who holds nothing may be released, too
        self.books.drop(i)
        self.books.host_free += reversed(self.books.host_tables.pop(i, []))
        del self.books.tables[i], self.books.tokens[i], self.requests[i]
        self.plans.pop(i, None)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), spoil=st.booleans())
    def fork(self, data: st.DataObject, spoil: bool) -> None:
        source = self.some(data)
        i, books = source.request_id, self.books
        done = books.tokens[i]
        count = data.draw(st.integers(1, len(done) + 1), "tokens")
        possible = count <= len(done) and i not in books.host_tables
        child = self.new_request()
        before = state(self.manager)
        if not possible:
            with pytest.raises(RuntimeError, match=f"'{i}' has no K/V for {count} tokens to fork"):
                self.manager.fork(source, child, count)
            assert state(self.manager) == before
            del self.requests[child.request_id]
            return
        self.manager.fork(source, child, count)
        assert self.manager.pool.free_list() == books.free  # a fork costs nothing
        self.not_run.add(child.request_id)
        books.tables[child.request_id] = books.tables[i][: ceil(count / books.size)]
        books.tokens[child.request_id] = done[:count]

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def swap_out(self, data: st.DataObject) -> None:
        request = self.some(data)
        i, books = request.request_id, self.books
        if i in books.host_tables:
            return
        count = ceil(len(books.tokens[i]) / books.size)
        before = state(self.manager)
        ops = self.manager.swap_out(request)
        if count == 0 or count > len(books.host_free):
            assert ops is None and state(self.manager) == before
            return
        host, books.host_free = books.host_free[:count], books.host_free[count:]
        assert ops == tuple(SwapOut(b, h) for b, h in zip(books.tables[i], host, strict=False))
        books.apply(ops)
        books.drop(i)
        books.host_tables[i] = host
        self.plans.pop(i, None)

    # ------------------------------------------------------------------ what has to hold

    @invariant()
    def the_manager_says_what_the_books_say(self) -> None:
        if not hasattr(self, "books"):
            return
        manager, books = self.manager, self.books
        manager.check()
        counts = Counter(block for table in books.tables.values() for block in table)
        assert manager.pool.ref_cnt == [counts[block] for block in range(books.num_blocks + 1)]
        assert manager.pool.free_list() == books.free
        assert manager.host_pool.free_list() == books.host_free
        assert len(books.free) + len(counts) == books.num_blocks and not set(books.free) & set(counts)
        assert 0 not in counts and 0 not in books.free

        usage = manager.usage()
        assert usage.capacity == books.num_blocks * books.size
        assert usage.reserved == len(counts) * books.size
        assert usage.free == len(books.free) * books.size
        ran = [table for i, table in books.tables.items() if i not in self.not_run]
        assert usage.unshared == sum(map(len, ran)) * books.size
        assert usage.used == sum(len(offsets) for offsets in books.known.values()) <= usage.reserved
        if any(ran):
            assert usage.sharing_saves == max(0, 1 - len(counts) / sum(map(len, ran)))
        else:
            assert usage.sharing_saves == 0

        snapshot = manager.snapshot()
        assert snapshot.block_size == books.size and snapshot.num_free == len(books.free)
        assert snapshot.tables == {i: tuple(t) for i, t in books.tables.items() if t}
        assert snapshot.host_tables == {i: tuple(t) for i, t in books.host_tables.items()}
        assert snapshot.ref_cnt == tuple(manager.pool.ref_cnt)
        assert snapshot.filled == tuple(len(books.known.get(block, ())) for block in range(books.num_blocks + 1))

    @invariant()
    def every_computed_token_stands_where_its_table_says(self) -> None:
        if not hasattr(self, "books"):
            return
        books = self.books
        for i, tokens in books.tokens.items():
            assert self.manager.get_computed_blocks(self.requests[i]) == len(tokens)
            table, cells = books.tables[i], books.cells
            if i in books.host_tables:
                table, cells = books.host_tables[i], books.host_cells
            assert [cells.get((table[p // books.size], p % books.size)) for p in range(len(tokens))] == tokens

    @invariant()
    def no_slot_is_promised_twice(self) -> None:
        if not hasattr(self, "books"):
            return
        promised = Counter(
            self.books.slot(i, position)
            for i, plan in self.plans.items()
            if tuple(self.books.tables[i]) == plan.block_table
            for position in range(plan.start, plan.start + plan.num_tokens)
        )
        assert not promised or max(promised.values()) == 1


TestManager = ManagerMachine.TestCase
TestManager.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)


# ---------------------------------------------------------------------- by name


def computed(manager: BlockManager, request: Request, num_tokens: int) -> BlockPlan:
    """Reserve and commit."""
    plan = manager.allocate_slots(request, num_tokens)
    assert plan is not None
    manager.cache_blocks(plan)
    return plan


def test_blocks_are_taken_when_a_token_needs_them() -> None:
    manager, request = BlockManager(8, 4), make_request()
    tables = [computed(manager, request, n).block_table for n in (1, 3, 1, 7)]
    assert tables == [(1,), (1,), (1, 2), (1, 2, 3)]
    assert manager.usage().reserved - manager.usage().used == 0


@pytest.mark.parametrize("size", [1, 2, 5, 16, 256])
def test_only_the_last_block_has_empty_room(size: int) -> None:
    manager, request = BlockManager(600 // size + 1, size), make_request()
    for num_tokens in (1, size, size + 1, 3, 1):
        computed(manager, request, num_tokens)
        usage = manager.usage()
        assert 0 <= usage.reserved - usage.used < size


def test_a_reservation_is_all_or_nothing() -> None:
    manager, first, second = BlockManager(4, 2), make_request("a"), make_request("b")
    computed(manager, first, 5)
    computed(manager, second, 1)
    before = state(manager)
    assert manager.allocate_slots(second, 2) is None and state(manager) == before
    assert manager.allocate_slots(make_request("c"), 1) is None and state(manager) == before
    assert manager.allocate_slots(first, 1) is not None  # its last block has room
    assert manager.allocate_slots(second, 1) is not None


def test_a_tail_is_taken_by_others_before_its_head() -> None:
    manager, old, new = BlockManager(4, 1), make_request("old"), make_request("new")
    computed(manager, old, 4)
    manager.free(old)
    assert manager.pool.free_list() == [4, 3, 2, 1]
    assert computed(manager, new, 2).block_table == (4, 3)


def test_a_writer_copies_a_block_that_others_hold_and_only_then() -> None:
    manager = BlockManager(8, 4)
    leader, child, other = (make_request(i) for i in ("leader", "child", "other"))
    computed(manager, leader, 6)
    manager.fork(leader, child, 5)
    manager.fork(leader, other, 4)  # whole blocks: nothing to copy
    assert computed(manager, other, 1).ops == ()
    plan = computed(manager, child, 1)
    assert plan.ops == (BlockCopy(2, 4),) and plan.block_table == (1, 4)
    assert computed(manager, leader, 1).ops == ()  # it holds its last block alone again
    assert manager.usage().used == 4 + 3 + 2 + 1


def test_the_last_holder_writes_without_a_copy() -> None:
    manager, leader, child = BlockManager(3, 4), make_request("leader"), make_request("child")
    computed(manager, leader, 3)
    manager.fork(leader, child, 2)
    manager.free(leader)
    assert computed(manager, child, 1) == BlockPlan("child", 2, 1, (), (1,))


def test_of_three_holders_two_copy() -> None:
    manager = BlockManager(3, 4)
    requests = [make_request(i) for i in "abc"]
    computed(manager, requests[0], 3)
    for child in requests[1:]:
        manager.fork(requests[0], child, 3)
    assert [computed(manager, r, 1).ops for r in requests] == [(BlockCopy(1, 2),), (BlockCopy(1, 3),), ()]


def test_a_copy_needs_a_free_block_and_is_refused_without_one() -> None:
    manager, leader, child = BlockManager(1, 4), make_request("leader"), make_request("child")
    computed(manager, leader, 2)
    manager.fork(leader, child, 2)
    before = state(manager)
    assert (
        manager.allocate_slots(child, 1) is None
        and manager.allocate_slots(leader, 1) is None
        and state(manager) == before
    )


def test_operations_come_in_an_order_that_loses_nothing() -> None:
    """A victim's blocks are moved out before they are given away, and those that come back are copied after that."""
    manager = BlockManager(3, 2, num_host_blocks=3)
    victim, writer, child = make_request("victim"), make_request("writer"), make_request("child")
    computed(manager, victim, 4)
    computed(manager, writer, 1)
    assert manager.swap_out(victim) == (SwapOut(1, 1), SwapOut(2, 2))
    assert computed(manager, writer, 3).block_table == (3, 2)
    manager.free(writer)
    plan = manager.allocate_slots(victim, 1)
    assert plan is not None
    assert plan.ops == (SwapIn(1, 1), SwapIn(2, 2)) and plan.start == 4
    assert manager.host_pool.num_held == 0
    manager.cache_blocks(plan)
    manager.fork(victim, child, 3)
    assert manager.allocate_slots(child, 1) is None  # the pool is full
    manager.free(victim)
    assert computed(manager, child, 1).ops == ()


def test_swapping_out_frees_what_was_reserved_too_and_moves_only_what_was_computed() -> None:
    manager, request = BlockManager(8, 2, num_host_blocks=2), make_request()
    computed(manager, request, 3)
    manager.allocate_slots(request, 6)
    assert manager.pool.num_held == 5
    assert manager.swap_out(request) == (SwapOut(1, 1), SwapOut(2, 2))
    assert manager.pool.num_held == 0 and manager.host_pool.num_held == 2 and manager.get_computed_blocks(request) == 3
    with pytest.raises(RuntimeError, match="no K/V for 1 tokens to fork"):
        manager.fork(request, make_request("child"), 1)
    manager.free(request)
    assert manager.host_pool.num_free == 2 and manager.get_computed_blocks(request) == 0


@pytest.mark.parametrize("host_blocks", [0, 1])
def test_without_room_on_the_host_nothing_is_swapped(host_blocks: int) -> None:
    manager, request = BlockManager(8, 2, host_blocks), make_request()
    computed(manager, request, 3)
    before = state(manager)
    assert manager.swap_out(request) is None and state(manager) == before


@pytest.mark.parametrize(("num_blocks", "kept_free"), [(99, 0), (100, 1), (250, 2), (1000, 10)])
def test_the_watermark_is_for_those_who_come_and_not_for_those_who_run(num_blocks: int, kept_free: int) -> None:
    manager = BlockManager(num_blocks, 1)
    computed(manager, make_request("runs"), num_blocks - kept_free - 1)
    comes = make_request("comes")
    assert manager.allocate_slots(comes, 2, spare=True) is None
    assert manager.allocate_slots(comes, kept_free + 2, spare=False) is None
    assert manager.allocate_slots(comes, 1, spare=True) is not None
    assert manager.pool.num_free == kept_free
    assert manager.allocate_slots(comes, kept_free + 1) is not None and manager.pool.num_free == 0


def test_who_needs_no_block_is_not_held_up_by_the_watermark() -> None:
    manager, request = BlockManager(100, 2), make_request()
    computed(manager, request, 199)
    assert manager.pool.num_free == 0 and manager.allocate_slots(request, 1, spare=True) is not None


def test_usage_counts_shared_blocks_once_and_says_what_sharing_saves() -> None:
    """Two blocks for the prompt; three children share them, and each copies the last one: 5 blocks instead of 8."""
    manager = BlockManager(10, 4)
    leader = make_request("leader")
    computed(manager, leader, 7)
    assert manager.usage().sharing_saves == 0
    children = [make_request(f"child {i}") for i in range(3)]
    for child in children:
        manager.fork(leader, child, 6)
        computed(manager, child, 1)
    usage = manager.usage()
    assert (usage.capacity, usage.reserved, usage.unshared, usage.used) == (40, 20, 32, 4 + 4 * 3)
    assert usage.free == 20 and usage.sharing_saves == 1 - 5 / 8
    for request in (leader, *children):
        manager.free(request)
    assert (manager.usage().reserved, manager.usage().used, manager.usage().unshared) == (0, 0, 0)
    assert manager.usage().sharing_saves == 0


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "max_model_len", "fits"),
    [
        (25, 8, 64, True),  # 33 tokens, of which 32 have K/V in 8 blocks
        (26, 8, 64, False),  # 34 tokens, 9 blocks
        (26, 8, 33, True),  # the model ends it at 33
        (32, None, 33, True),
        (32, None, 34, False),
        (1, 1, 64, True),
    ],
)
def test_never_fits_is_judged_on_the_whole_pool(
    prompt: int, max_tokens: int | None, max_model_len: int, fits: bool
) -> None:
    manager = BlockManager(8, 4)
    computed(manager, make_request("somebody else"), 32)
    reason = manager.why_never_fits(make_request("r", prompt, max_tokens, max_model_len))
    if fits:
        assert reason is None
    else:
        assert reason == (
            f"it may grow to 34 tokens ({prompt} of prompt and {34 - prompt} of output), all but the last of which "
            "take 9 blocks of 4, and the whole KV cache has 8"
        )


@pytest.mark.parametrize(("num_blocks", "size"), [(0, 4), (-1, 4), (4, 0)])
def test_sizes_are_checked(num_blocks: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"num_blocks={num_blocks}, block_size={size}; allowed: integers >= 1"):
        BlockManager(num_blocks, size)


def test_a_plan_is_committed_once_and_in_its_place() -> None:
    manager, request = BlockManager(8, 4), make_request()
    plan = computed(manager, request, 3)
    with pytest.raises(RuntimeError, match="does not continue 3 tokens in 1 blocks"):
        manager.cache_blocks(plan)
    with pytest.raises(RuntimeError, match="does not continue 3 tokens in 1 blocks"):
        manager.cache_blocks(BlockPlan("r", 3, 2, (), plan.block_table))
    manager.cache_blocks(BlockPlan("r", 3, 1, (), plan.block_table))


def corrupt_count(manager: BlockManager) -> None:
    manager.pool.ref_cnt[1] += 1


def corrupt_free_list(manager: BlockManager) -> None:
    manager.pool._free[1] = None


def lose_a_block(manager: BlockManager) -> None:
    manager.pool._free.popitem()


def name_the_null_block(manager: BlockManager) -> None:
    manager._tables["a"].blocks.append(0)
    manager.pool.ref_cnt[0] += 1


def hold_both_kinds(manager: BlockManager) -> None:
    manager._tables["a"].host_blocks = manager.host_pool.get_new_blocks(1)


def forget_a_block(manager: BlockManager) -> None:
    manager.pool.free_blocks([manager._tables["a"].blocks.pop()])


def hold_too_many_host_blocks(manager: BlockManager) -> None:
    manager._tables["b"].host_blocks += manager.host_pool.get_new_blocks(1)


def miscount_used(manager: BlockManager) -> None:
    manager.pool.num_used_slots += 1


def empty_a_held_block(manager: BlockManager) -> None:
    manager.pool.filled[1] = 0


@pytest.mark.parametrize(
    "corrupt",
    [
        corrupt_count,
        corrupt_free_list,
        lose_a_block,
        name_the_null_block,
        hold_both_kinds,
        forget_a_block,
        hold_too_many_host_blocks,
        miscount_used,
        empty_a_held_block,
    ],
)
def test_the_check_finds_every_kind_of_damage(corrupt: Any) -> None:
    """It stands behind many tests, so it has to be one that can fail."""
    manager = BlockManager(4, 2, num_host_blocks=4)
    computed(manager, make_request("a"), 3)
    computed(manager, make_request("b"), 3)
    manager.swap_out(make_request("b"))
    manager.check()
    corrupt(manager)
    with pytest.raises(RuntimeError):
        manager.check()
