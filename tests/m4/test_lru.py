"""Which cached block goes first: the manager against a plain model of blocks, and each rule by name."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from folovllm import SamplingParams
from folovllm.kv_cache.block_manager import BlockManager
from folovllm.kv_cache.prefix_cache import PrefixCache
from folovllm.request import Request


def request(name: str, tokens: Sequence[int]) -> Request:
    return Request(name, list(tokens), SamplingParams(), (), 10_000)


def manager(num_blocks: int, block_size: int) -> BlockManager:
    made = BlockManager(num_blocks, block_size, cache=PrefixCache(block_size))
    made.watermark = 0
    return made


def compute(books: BlockManager, r: Request) -> bool:
    """Find what is cached, compute the rest in one step; False if there is no room."""
    plan = books.allocate_slots(r, r.num_tokens - (r.num_computed_tokens or books.get_computed_blocks(r)))
    if plan is None:
        return False
    books.cache_blocks(plan)
    r.num_computed_tokens = plan.start + plan.num_tokens
    books.check()
    return True


def admit(books: BlockManager, name: str, tokens: Sequence[int]) -> Request:
    r = request(name, tokens)
    assert compute(books, r)
    return r


def blocks(books: BlockManager, r: Request) -> list[int]:
    return books._tables[r.request_id].blocks


# ---------------------------------------------------------------------- by name


def test_a_tail_goes_before_its_head() -> None:
    """Five blocks of one prompt are free. A newcomer takes the last ones, and the prompt finds the rest again."""
    books = manager(5, 2)
    books.free(admit(books, "old", range(10)))
    assert books.pool.free_list() == [5, 4, 3, 2, 1]
    assert blocks(books, admit(books, "new", range(50, 54))) == [5, 4]
    assert books.get_computed_blocks(request("again", range(10))) == 6


def test_the_least_recently_used_goes_first() -> None:
    books = manager(6, 2)
    for name, first in (("a", 0), ("b", 10), ("c", 20)):
        books.free(admit(books, name, [first, first + 1, first + 2]))
    books.free(admit(books, "a again", [0, 1, 9]))  # used last now
    admit(books, "new", range(50, 55))  # takes three: the end of "b", of "c" ... in the order in which they came back
    found = {
        name: books.get_computed_blocks(request(name, [first, first + 1, 7]))
        for name, first in (("a", 0), ("b", 10), ("c", 20))
    }
    assert found == {"a": 2, "b": 0, "c": 2}


def test_hits_are_touched_before_free_blocks_are_taken() -> None:
    """The prompt's two cached blocks stand at the front of the free list. A request that took new blocks first would be
    given one of those that it has found."""
    books = manager(4, 2)
    books.free(admit(books, "old", range(4)))
    admit(books, "other", range(90, 94))  # takes 3 and 4
    assert books.pool.free_list() == [2, 1]
    r = request("new", [0, 1, 7, 8])
    assert books.get_computed_blocks(r) == 2 and compute(books, r)
    assert blocks(books, r) == [1, 2]  # block 1 found; block 2 was another prompt's end
    assert books.get_computed_blocks(request("x", range(5))) == 2


def test_hits_that_are_free_count_as_room_that_is_taken() -> None:
    """Two blocks are free, and both are hits: there is no third one for what is to be computed."""
    books = manager(3, 2)
    r = admit(books, "old", range(5))
    books.free(r)
    admit(books, "other", [90])
    assert books.get_computed_blocks(request("new", range(6))) == 4 and books.pool.num_free == 2
    before = books.snapshot()
    assert books.allocate_slots(request("new", range(6)), 2) is None
    assert books.snapshot() == before


def test_hits_that_others_hold_cost_nothing() -> None:
    books = manager(3, 2)
    admit(books, "old", range(5))
    assert books.pool.num_free == 0
    books = manager(4, 2)
    first = admit(books, "old", range(5))
    second = admit(books, "new", [0, 1, 2, 3, 9])
    assert blocks(books, second)[:2] == blocks(books, first)[:2] and books.pool.num_free == 0
    assert books.usage().reserved == 8 and books.usage().unshared == 12


def test_free_blocks_stay_in_the_cache_until_they_are_taken() -> None:
    books = manager(4, 2)
    books.free(admit(books, "old", range(9 - 2)))
    assert books.pool.num_free == 4 and books.usage().used == 0
    assert books.get_computed_blocks(request("new", range(7))) == 6
    r = admit(books, "new", range(7))
    assert books.usage().used == 7  # what was found counts as written
    books.free(r)
    books.free(admit(books, "others", range(50, 57)))
    assert books.get_computed_blocks(request("new", range(7))) == 0


def test_a_shared_block_is_free_when_the_last_one_leaves() -> None:
    books = manager(5, 2)
    first, second = admit(books, "a", [1, 2, 3]), admit(books, "b", [1, 2, 4])
    shared = blocks(books, first)[0]
    books.free(first)
    assert shared not in books.pool.free_list()
    own = blocks(books, second)[1]
    books.free(second)
    assert books.pool.free_list()[-2:] == [own, shared]  # the last one's own end before what it shared


def test_a_swapped_out_requests_blocks_stay_in_the_cache_too() -> None:
    books = BlockManager(4, 2, 4, PrefixCache(2))
    r = admit(books, "r", range(5))
    assert books.swap_out(r) is not None
    assert books.pool.free_list() == [4, 3, 2, 1]
    assert books.get_computed_blocks(request("new", range(9))) == 4
    admit(books, "new", [0, 1, 2, 3, 9])
    assert books.allocate_slots(r, 1) is None  # it needs three of its own
    books.check()


# ---------------------------------------------------------------------- against a plain model


class Plain:
    """Blocks as a list of what stands in them. No hashes, no chains: a prefix is its tokens."""

    def __init__(self, num_blocks: int, size: int) -> None:
        self.size = size
        self.free = OrderedDict.fromkeys(range(1, num_blocks + 1))
        self.index: dict[tuple[int, ...], int] = {}  # all tokens up to the end of a block -> the block
        self.tables: dict[str, list[int]] = {}

    def find(self, tokens: Sequence[int]) -> list[int]:
        found: list[int] = []
        while (end := (len(found) + 1) * self.size) < len(tokens) and tuple(tokens[:end]) in self.index:
            found.append(self.index[tuple(tokens[:end])])
        return found

    def compute(self, name: str, tokens: Sequence[int]) -> bool:
        """Admit a request, or let it grow."""
        table = self.tables.get(name)
        hits = self.find(tokens) if table is None else table
        missing = -(-len(tokens) // self.size) - len(hits)
        if missing > len([block for block in self.free if block not in hits]):
            return False
        for block in hits:
            self.free.pop(block, None)
        taken = [self.free.popitem(last=False)[0] for _ in range(missing)]
        self.index = {prefix: block for prefix, block in self.index.items() if block not in taken}
        self.tables[name] = [*hits, *taken]
        for i, block in enumerate(self.tables[name][: len(tokens) // self.size], 1):
            self.index.setdefault(tuple(tokens[: i * self.size]), block)
        return True

    def leave(self, name: str) -> None:
        table = self.tables.pop(name)
        for block in reversed(table):
            if not any(block in other for other in self.tables.values()):
                self.free[block] = None


class LRUMachine(RuleBasedStateMachine):
    """Prompts from a small tree of prefixes come, grow and go. What grows says what nobody else has said: no two
    requests compute the same. Then the order of blocks alone decides what is found, and it has to be the same."""

    seen: ClassVar[Counter[str]] = Counter()

    @initialize(num_blocks=st.integers(3, 14), size=st.integers(1, 4))
    def start(self, num_blocks: int, size: int) -> None:
        self.size, self.made = size, 0
        self.books, self.plain = manager(num_blocks, size), Plain(num_blocks, size)
        self.live: dict[str, Request] = {}
        self.said: list[list[int]] = []  # by those who are gone

    @rule(tree=st.lists(st.integers(0, 1), min_size=1, max_size=6), again=st.integers(0, 9))
    def admit(self, tree: list[int], again: int) -> None:
        """Whole blocks of one number each and, where others may have the same block, one token more: or it would be
        computed twice, so as to leave something to compute."""
        self.made += 1
        tokens = [number for number in tree for _ in range(self.size)]
        if again < len(self.said):
            tokens = self.said[-1 - again][: len(self.said[-1 - again]) // self.size * self.size]
        tokens = [*tokens, 100 + self.made]
        r = request(f"r{self.made}", tokens)
        hits = self.plain.find(tokens)
        assert self.books.get_computed_blocks(r) == len(hits) * self.size
        free, order = set(self.plain.free), list(self.plain.free)
        if self.take(r):
            self.live[r.request_id] = r
            self.seen["hit"] += bool(hits)
            self.seen["hit what nobody held"] += bool(free & set(hits))
            self.seen["hit what would have been taken next"] += bool(hits) and order[0] in hits

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.integers(1, 5))
    def grow(self, data: st.DataObject, count: int) -> None:
        r = self.live[data.draw(st.sampled_from(sorted(self.live)), "grows")]
        for _ in range(count):
            self.made += 1
            r.output_token_ids.append(100 + self.made)
            if not self.take(r):
                r.output_token_ids.pop()
                return

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.live)), "leaves")
        r = self.live.pop(name)
        self.books.free(r)
        self.plain.leave(name)
        self.said.append(r.tokens(0, r.num_tokens))

    def take(self, r: Request) -> bool:
        cached = len(self.plain.index)
        done = self.plain.compute(r.request_id, r.tokens(0, r.num_tokens))
        assert compute(self.books, r) == done
        self.seen["no room"] += not done
        self.seen["evicted"] += len(self.plain.index) < cached
        if not done and r.request_id not in self.live:
            self.books.free(r)
        return done

    @invariant()
    def both_have_the_same_blocks_in_the_same_order(self) -> None:
        if not hasattr(self, "books"):
            return
        self.books.check()
        snapshot = self.books.snapshot()
        assert {name: list(table) for name, table in snapshot.tables.items()} == self.plain.tables
        assert list(snapshot.free) == list(self.plain.free)
        assert set(snapshot.cached) == set(self.plain.index.values())


def test_lru_order_is_that_of_a_plain_model() -> None:
    LRUMachine.seen.clear()
    limits = settings(max_examples=150, stateful_step_count=30, deadline=None, derandomize=True)
    run_state_machine_as_test(LRUMachine, settings=limits)
    seen = {name for name, times in LRUMachine.seen.items() if times > 20}
    assert seen == {"hit", "hit what nobody held", "hit what would have been taken next", "no room", "evicted"}
