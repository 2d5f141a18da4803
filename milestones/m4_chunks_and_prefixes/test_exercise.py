"""The checks behind `folovllm grade m4`. Reading them is allowed: they say what, never how."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from folovllm import LLM, CacheConfig, EngineConfig, LLMEngine, ModelConfig, SamplingParams, SchedulerConfig
from folovllm.course.glossary import default_prompts, load_prose
from folovllm.course.grading.checks import Call, WrongAnswer
from folovllm.kv_cache.block_manager import BlockManager
from folovllm.kv_cache.prefix_cache import CachedBlock, PrefixCache
from folovllm.outputs import RequestOutput
from folovllm.request import Request

# --- the budget of a step ---------------------------------------------------------------------------------

RUNNING = [("a", 1), ("b", 900), ("c", 1)]
WAITING = [("d", 5), ("e", 40)]
places = st.lists(st.integers(1, 12), max_size=5)


@pytest.mark.exercise("split_budget")
class TestSplitBudget:
    def test_the_examples(self, impl: ModuleType) -> None:
        """Decodes first, then the prompt that has begun, then those that wait."""
        call = Call(impl.split_budget, list(RUNNING), list(WAITING), 256)
        call.must_return([("a", 1), ("c", 1), ("b", 254)], "c decodes, so it comes before b. b takes all that is left.")
        call = Call(impl.split_budget, list(RUNNING), list(WAITING), 256, 128)
        why = "Nobody gets more than 128, so there is room for d and e beside b."
        call.must_return([("a", 1), ("c", 1), ("b", 128), ("d", 5), ("e", 40)], why)
        call = Call(impl.split_budget, list(RUNNING), list(WAITING), 150, 128)
        why = "150 - 2 - 128 - 5 = 15 tokens are left for e, which starts with a chunk."
        call.must_return([("a", 1), ("c", 1), ("b", 128), ("d", 5), ("e", 15)], why)

    def test_more_than_one_prompt(self, impl: ModuleType) -> None:
        """A prompt that is nearly done leaves room for the next one in the same step."""
        call = Call(impl.split_budget, [("a", 30), ("b", 1), ("c", 500)], [], 64)
        call.must_return([("b", 1), ("a", 30), ("c", 33)], "b decodes. a needs 30, and 33 of 64 are left for c.")

    def test_a_prompt_of_one_token_waits_its_turn(self, impl: ModuleType) -> None:
        """Who waits comes after all that run, even if it lacks one token only."""
        call = Call(impl.split_budget, [("a", 9)], [("b", 1)], 8)
        call.must_return([("a", 8)], "b is new: it does not decode, and a has begun.")

    def test_nobody_is_in_the_step_with_nothing(self, impl: ModuleType) -> None:
        """Whoever gets no token is not in the step."""
        call = Call(impl.split_budget, [("a", 1), ("b", 1), ("c", 1)], [("d", 7)], 2)
        call.must_return([("a", 1), ("b", 1)], "The budget is used up: c and d take no part.")

    def test_the_longest_piece_bounds_everybody(self, impl: ModuleType) -> None:
        """The longest piece is for those that wait as well."""
        call = Call(impl.split_budget, [("a", 1)], [("b", 50), ("c", 50)], 64, 20)
        call.must_return([("a", 1), ("b", 20), ("c", 20)], "20 each, and 23 of the budget stay unused.")

    def test_nobody_is_there(self, impl: ModuleType) -> None:
        """An empty step."""
        Call(impl.split_budget, [], [], 64).must_return([])

    @given(running=places, waiting=places, budget=st.integers(1, 40), long_prefill_token_threshold=st.integers(0, 6))
    def test_token_by_token(
        self, impl: ModuleType, running: list[int], waiting: list[int], budget: int, long_prefill_token_threshold: int
    ) -> None:
        """Any requests: against a step into which tokens are put one after the other."""
        names = iter("abcdefghij")
        first, later = [(next(names), n) for n in running], [(next(names), n) for n in waiting]
        line = [place for place in first if place[1] == 1] + [place for place in first if place[1] > 1] + later
        given_tokens: dict[str, int] = {}
        for name, missing in line:
            for _ in range(missing):
                full = sum(given_tokens.values()) == budget
                if full or (long_prefill_token_threshold and given_tokens.get(name, 0) == long_prefill_token_threshold):
                    break
                given_tokens[name] = given_tokens.get(name, 0) + 1
        Call(impl.split_budget, first, later, budget, long_prefill_token_threshold).must_return(
            list(given_tokens.items())
        )

    def test_nothing_is_changed(self, impl: ModuleType) -> None:
        """Both lists are the engine's: they are left as they are."""
        running, waiting = list(RUNNING), list(WAITING)
        call = Call(impl.split_budget, running, waiting, 256, 128)
        got = call.result()
        if running != RUNNING or waiting != WAITING:
            call.fail(got, why=f"Afterwards, running is {running} and waiting is {waiting}.")

    def test_refusals(self, impl: ModuleType) -> None:
        """A budget for nobody, and pieces shorter than nothing, are refused."""
        Call(impl.split_budget, [("a", 1)], [], 0).must_refuse("budget < 1.")
        Call(impl.split_budget, [("a", 1)], [], 8, -1).must_refuse("long_prefill_token_threshold < 0.")


# --- what a chunk may see ---------------------------------------------------------------------------------


def mask(*rows: str) -> torch.Tensor:
    """A mask from rows such as "TTF"."""
    return torch.tensor([[cell == "T" for cell in row] for row in rows])


@pytest.mark.exercise("chunk_mask")
class TestChunkMask:
    def test_the_examples(self, impl: ModuleType) -> None:
        """A chunk in the middle of a prompt, and a decode beside a prompt."""
        why = "Token 2 sees 0, 1 and itself; 4 sees all five. What comes later stays hidden inside of the chunk, too."
        Call(impl.chunk_mask, [(2, 3)]).must_return(mask("TTTFF", "TTTTF", "TTTTT"), why)
        why = "The decode sees its own four keys, and nothing of the prompt beside it."
        Call(impl.chunk_mask, [(3, 1), (0, 2)]).must_return(mask("TTTTFF", "FFFFTF", "FFFFTT"), why)

    def test_a_whole_prompt(self, impl: ModuleType) -> None:
        """A prompt in one piece is a triangle."""
        Call(impl.chunk_mask, [(0, 3)]).must_return(mask("TFF", "TTF", "TTT"))

    def test_decodes(self, impl: ModuleType) -> None:
        """Decodes are single rows, each over its own keys."""
        Call(impl.chunk_mask, [(2, 1), (0, 1), (1, 1)]).must_return(mask("TTTFFF", "FFFTFF", "FFFFTT"))

    def test_chunks_are_rows_of_the_whole(self, impl: ModuleType) -> None:
        """The chunks of a prompt, one below the other, are the mask of the prompt in one piece."""
        rows = []
        for start, count in ((0, 3), (3, 3), (6, 2)):
            call = Call(impl.chunk_mask, [(start, count)])
            part = call.must_be_tensor([count, start + count], torch.bool, "A row per token, a column per key so far.")
            rows.append(torch.nn.functional.pad(part, (0, 8 - start - count)))
        whole, want = torch.cat(rows), torch.arange(8) <= torch.arange(8)[:, None]
        if not torch.equal(whole, want):
            text = "\n".join("".join("T" if cell else "F" for cell in row) for row in whole.tolist())
            raise WrongAnswer(f"chunk_mask of (0, 3), (3, 3) and (6, 2), put below each other:\n{text}")

    @given(shares=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), min_size=1, max_size=4))
    def test_pair_by_pair(self, impl: ModuleType, shares: list[tuple[int, int]]) -> None:
        """Any requests: who may see whom, decided for each pair of tokens."""
        queries = [(r, start + i) for r, (start, count) in enumerate(shares) for i in range(count)]
        keys = [(r, i) for r, (start, count) in enumerate(shares) for i in range(start + count)]
        want = torch.tensor([[owner == r and j <= i for owner, j in keys] for r, i in queries])
        Call(impl.chunk_mask, shares).must_return(want)

    def test_refusals(self, impl: ModuleType) -> None:
        """No requests, positions below 0 and shares of nothing are refused."""
        Call(impl.chunk_mask, []).must_refuse("No shares.")
        Call(impl.chunk_mask, [(0, 2), (-1, 2)]).must_refuse("start < 0.")
        Call(impl.chunk_mask, [(3, 0)]).must_refuse("count < 1.")


# --- who samples ------------------------------------------------------------------------------------------


@pytest.mark.exercise("rows_to_sample")
class TestRowsToSample:
    def test_the_example(self, impl: ModuleType) -> None:
        """A decode, a chunk that ends too early, and the last chunk of a prompt."""
        why = "Row 0 is the decode. Rows 1 to 4 are a chunk that ends before token 5. Rows 5 and 6 reach the end."
        Call(impl.rows_to_sample, [(9, 1, 10), (0, 4, 6), (3, 2, 5)]).must_return([0, 6], why)

    def test_one_token_short(self, impl: ModuleType) -> None:
        """A chunk that lacks a single token samples nothing: its logits predict a token that the prompt has."""
        Call(impl.rows_to_sample, [(0, 7, 8)]).must_return([], "Token 7 of the prompt is known, and not computed yet.")
        Call(impl.rows_to_sample, [(7, 1, 8)]).must_return([0], "Now it is: this was the last chunk.")

    def test_a_whole_prompt(self, impl: ModuleType) -> None:
        """A prompt in one piece samples from its last row."""
        Call(impl.rows_to_sample, [(0, 5, 5), (0, 3, 3)]).must_return([4, 7])

    def test_a_request_that_comes_back(self, impl: ModuleType) -> None:
        """Who gave way computes its output again as well, and samples only behind all of it."""
        why = "It knows 12 tokens, prompt and output. Rows 0 to 7 are the tokens 0 to 7: four are still missing."
        Call(impl.rows_to_sample, [(0, 8, 12)]).must_return([], why)
        Call(impl.rows_to_sample, [(8, 4, 12)]).must_return([3], "The token that follows token 11 is new.")

    def test_no_shares(self, impl: ModuleType) -> None:
        """An empty step has no rows."""
        Call(impl.rows_to_sample, []).must_return([])

    @given(shares=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4), st.integers(0, 2)), max_size=5))
    def test_row_by_row(self, impl: ModuleType, shares: list[tuple[int, int, int]]) -> None:
        """Any requests: of all rows, those whose token is the newest that its request knows."""
        full = [(start, count, start + count + more) for start, count, more in shares]
        newest = [position + 1 == known for start, count, known in full for position in range(start, start + count)]
        Call(impl.rows_to_sample, full).must_return([row for row, is_newest in enumerate(newest) if is_newest])

    def test_refusals(self, impl: ModuleType) -> None:
        """Positions below 0, shares of nothing, and tokens that nobody knows are refused."""
        Call(impl.rows_to_sample, [(-1, 2, 4)]).must_refuse("start < 0.")
        Call(impl.rows_to_sample, [(2, 0, 4)]).must_refuse("count < 1.")
        Call(impl.rows_to_sample, [(2, 3, 4)]).must_refuse("Token 4 is computed, and only 0 to 3 are known.")


# --- keys of blocks ---------------------------------------------------------------------------------------


def hash_block(parent: bytes, tokens: tuple[int, ...], cache_salt: str) -> bytes:
    """Not a hash at all: the key says what went into it."""
    if not isinstance(parent, bytes) or not isinstance(tokens, tuple) or not isinstance(cache_salt, str):
        kinds = ", ".join(type(value).__name__ for value in (parent, tokens, cache_salt))
        raise WrongAnswer(f"hash_block was given ({kinds}); it takes (bytes, tuple, str).")
    return parent + f"({','.join(map(str, tokens))}{cache_salt})".encode()


def keys_of(impl: ModuleType, tokens: Sequence[int], block_size: int, *more: str) -> Call:
    return Call(impl.block_keys, list(tokens), block_size, hash_block, b"s", *more)


@pytest.mark.exercise("block_keys")
class TestBlockKeys:
    def test_the_example(self, impl: ModuleType) -> None:
        """Two full blocks have keys, each made of the one before it. The token after them has none."""
        why = "The second key contains the first one. Token 9 begins a block that is not full."
        keys_of(impl, [5, 6, 7, 8, 9], 2).must_return([b"s(5,6)", b"s(5,6)(7,8)"], why)

    def test_the_same_tokens_elsewhere(self, impl: ModuleType) -> None:
        """The same tokens behind another beginning have another key."""
        why = "Both blocks hold (5, 6). The K/V of the second one depends on the first, so its key has to."
        keys_of(impl, [5, 6, 5, 6], 2).must_return([b"s(5,6)", b"s(5,6)(5,6)"], why)

    def test_a_full_last_block(self, impl: ModuleType) -> None:
        """A text of whole blocks has a key for every one, and a text without one has none."""
        keys_of(impl, [1, 2, 3, 4, 5, 6], 3).must_return([b"s(1,2,3)", b"s(1,2,3)(4,5,6)"])
        keys_of(impl, [1, 2], 3).must_return([], "There is no full block.")
        keys_of(impl, [], 3).must_return([])

    def test_the_salt(self, impl: ModuleType) -> None:
        """The salt goes into every key."""
        keys_of(impl, [1, 2, 3, 4], 2, "!").must_return([b"s(1,2!)", b"s(1,2!)(3,4!)"])

    def test_blocks_of_one_token(self, impl: ModuleType) -> None:
        """With blocks of one token, every token has a key."""
        keys_of(impl, [7, 8], 1).must_return([b"s(7)", b"s(7)(8)"])

    @given(tokens=st.lists(st.integers(0, 3), max_size=12), block_size=st.integers(1, 4))
    def test_any_text(self, impl: ModuleType, tokens: list[int], block_size: int) -> None:
        """Any text: a key says all that its block depends on, and each block is hashed once."""
        calls = 0

        def counted(parent: bytes, block: tuple[int, ...], cache_salt: str) -> bytes:
            nonlocal calls
            calls += 1
            return hash_block(parent, block, cache_salt)

        whole = tokens[: len(tokens) // block_size * block_size]
        parts = [f"({','.join(map(str, whole[i : i + block_size]))})" for i in range(0, len(whole), block_size)]
        want = ["".join(["s", *parts[: i + 1]]).encode() for i in range(len(parts))]
        call = Call(impl.block_keys, tokens, block_size, counted, b"s")
        call.must_return(want)
        if calls != len(want):
            call.fail(want, why=f"hash_block was called {calls} times for {len(want)} blocks. Each key is the next's.")

    def test_refusals(self, impl: ModuleType) -> None:
        """Blocks without tokens are refused."""
        keys_of(impl, [1, 2], 0).must_refuse("block_size < 1.")


# --- what is left to compute ------------------------------------------------------------------------------


@pytest.mark.exercise("reusable_tokens")
class TestReusableTokens:
    def test_a_part_is_cached(self, impl: ModuleType) -> None:
        """Three blocks of a request of 14 tokens are in the cache."""
        Call(impl.reusable_tokens, 14, 4, [True] * 3).must_return(12, "The last two tokens are computed.")

    def test_a_gap(self, impl: ModuleType) -> None:
        """What comes after the first missing block helps nobody."""
        call = Call(impl.reusable_tokens, 14, 4, [True, False, True])
        call.must_return(4, "Block 1 has to be computed. K/V is taken over from the front only, without a gap.")
        Call(impl.reusable_tokens, 14, 4, [False, True, True]).must_return(0)

    def test_all_is_cached(self, impl: ModuleType) -> None:
        """A full hit still computes: somebody has to know the logits of the last token."""
        call = Call(impl.reusable_tokens, 12, 4, [True] * 3)
        call.must_return(
            8, "12 would leave nothing to compute, and no logits to sample from: the last block is redone."
        )

    def test_one_block(self, impl: ModuleType) -> None:
        """A request of exactly one cached block computes all of it, one with a token more computes only that."""
        Call(impl.reusable_tokens, 4, 4, [True]).must_return(0)
        Call(impl.reusable_tokens, 5, 4, [True]).must_return(4)

    def test_blocks_of_one_token(self, impl: ModuleType) -> None:
        """In blocks of one token, exactly the last one is left."""
        Call(impl.reusable_tokens, 6, 1, [True] * 6).must_return(5)

    def test_nothing_is_cached(self, impl: ModuleType) -> None:
        """With nothing in the cache, or no full block to ask for, all is computed."""
        Call(impl.reusable_tokens, 9, 4, [False, False]).must_return(0)
        Call(impl.reusable_tokens, 3, 4, []).must_return(0)

    @given(data=st.data(), num_tokens=st.integers(1, 30), block_size=st.integers(1, 6))
    def test_any_request(self, impl: ModuleType, data: st.DataObject, num_tokens: int, block_size: int) -> None:
        """Any request: the most whole blocks such that all of them are there and a token is left."""
        count = num_tokens // block_size
        in_cache = data.draw(st.lists(st.booleans(), min_size=count, max_size=count), "in_cache")
        fits = [n for n in range(count + 1) if all(in_cache[:n]) and n * block_size < num_tokens]
        Call(impl.reusable_tokens, num_tokens, block_size, in_cache).must_return(max(fits) * block_size)

    def test_refusals(self, impl: ModuleType) -> None:
        """No tokens, blocks without tokens, and a list of another length are refused."""
        Call(impl.reusable_tokens, 0, 4, []).must_refuse("num_tokens < 1.")
        Call(impl.reusable_tokens, 5, 0, [True]).must_refuse("block_size < 1.")
        Call(impl.reusable_tokens, 9, 4, [True]).must_refuse("9 tokens have two full blocks of 4.")
        Call(impl.reusable_tokens, 9, 4, [True] * 3).must_refuse("9 tokens have two full blocks of 4.")


# --- who is evicted ---------------------------------------------------------------------------------------

Event = tuple[str, list[int]]


def line_by_time(num_blocks: int, events: Sequence[Event]) -> list[int]:
    """The same from times alone: a free block's place is when it came free, and how near to its table's end it was."""
    places: list[tuple[int, int, int]] = []
    for block in range(1, num_blocks + 1):
        holders, came_free = 0, (-1, block)
        for time, (what, blocks) in enumerate(events):
            if block in blocks:
                holders += 1 if what == "hold" else -1
                came_free = (time, -blocks.index(block))
        if not holders:
            places.append((*came_free, block))
    return [block for _, _, block in sorted(places)]


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[Event]]:
    """A pool, and requests that come with any blocks of it and go in any order."""
    num_blocks = draw(st.integers(1, 7))
    tables: list[list[int]] = []
    events: list[Event] = []
    for _ in range(draw(st.integers(0, 8))):
        if tables and draw(st.booleans()):
            events.append(("release", tables.pop(draw(st.integers(0, len(tables) - 1)))))
        else:
            tables.append(draw(st.lists(st.integers(1, num_blocks), min_size=1, max_size=4, unique=True)))
            events.append(("hold", tables[-1]))
    return num_blocks, events


@pytest.mark.exercise("eviction_order")
class TestEvictionOrder:
    def test_a_new_pool(self, impl: ModuleType) -> None:
        """At first, the line is the pool."""
        Call(impl.eviction_order, 5, []).must_return([1, 2, 3, 4, 5])

    def test_a_request_comes_and_goes(self, impl: ModuleType) -> None:
        """What is set free goes to the end of the line, the tail of the table first."""
        why = "2 is the tail: it goes to the end first, and 1 behind it."
        Call(impl.eviction_order, 5, [("hold", [1, 2]), ("release", [1, 2])]).must_return([3, 4, 5, 2, 1], why)

    def test_order_in_the_table(self, impl: ModuleType) -> None:
        """The tail is the end of the table, whatever the numbers are."""
        events = [("hold", [4, 1, 3]), ("release", [4, 1, 3])]
        Call(impl.eviction_order, 4, events).must_return([2, 3, 1, 4], "3 holds the last tokens, 4 the first ones.")

    def test_a_block_that_two_hold(self, impl: ModuleType) -> None:
        """A shared block comes free with the last of its holders."""
        events = [("hold", [1, 2]), ("hold", [1, 3]), ("release", [1, 2])]
        Call(impl.eviction_order, 5, events).must_return([4, 5, 2], "The second request still holds block 1.")
        events += [("release", [1, 3])]
        Call(impl.eviction_order, 5, events).must_return([4, 5, 2, 3, 1], "2 was free before 3 and 1 were.")

    def test_a_hit_is_a_use(self, impl: ModuleType) -> None:
        """A free block that is found again leaves the line, and goes to its end when it is set free again."""
        events = [("hold", [1]), ("release", [1]), ("hold", [2]), ("release", [2]), ("hold", [1])]
        Call(impl.eviction_order, 3, events).must_return([3, 2], "Block 1 is held again.")
        why = "Block 1 was used last, so it is lost last, though it was there first."
        Call(impl.eviction_order, 3, [*events, ("release", [1])]).must_return([3, 2, 1], why)

    def test_all_are_held(self, impl: ModuleType) -> None:
        """In a pool that is full nothing is free."""
        Call(impl.eviction_order, 2, [("hold", [2, 1])]).must_return([])

    @given(history=histories())
    def test_any_history(self, impl: ModuleType, history: tuple[int, list[Event]]) -> None:
        """Any requests: by the time at which each block came free, and its place in the table that let go of it."""
        num_blocks, events = history
        want = line_by_time(num_blocks, events)
        Call(impl.eviction_order, num_blocks, [(what, list(blocks)) for what, blocks in events]).must_return(want)

    def test_refusals(self, impl: ModuleType) -> None:
        """A pool of nothing, blocks that it does not have, and the release of what nobody holds are refused."""
        Call(impl.eviction_order, 0, []).must_refuse("num_blocks < 1.")
        Call(impl.eviction_order, 3, [("hold", [4])]).must_refuse("There are blocks 1 to 3.")
        Call(impl.eviction_order, 3, [("hold", [0])]).must_refuse("There are blocks 1 to 3.")
        Call(impl.eviction_order, 3, [("release", [2])]).must_refuse("Nobody holds block 2.")
        twice = [("hold", [2]), ("release", [2]), ("release", [2])]
        Call(impl.eviction_order, 3, twice).must_refuse("Nobody holds block 2 any more.")


# --- the index: beside all beginnings, written out ---------------------------------------------------------


class WrittenOut:
    """An index that keeps every beginning as it is, in full."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.block_of: dict[tuple[str, tuple[int, ...]], int] = {}

    def beginnings(self, token_ids: Sequence[int], cache_salt: str) -> list[tuple[str, tuple[int, ...]]]:
        """All that end with a full block."""
        ends = range(self.block_size, len(token_ids) + 1, self.block_size)
        return [(cache_salt, tuple(token_ids[:end])) for end in ends]

    def insert(self, token_ids: Sequence[int], blocks: Sequence[int], cache_salt: str = "") -> None:
        """See the task."""
        for beginning, block in zip(self.beginnings(token_ids, cache_salt), blocks, strict=False):
            self.block_of.setdefault(beginning, block)

    def find(self, token_ids: Sequence[int], cache_salt: str = "") -> list[int]:
        """See the task."""
        found = []
        for beginning in self.beginnings(token_ids, cache_salt):
            if beginning not in self.block_of:
                break
            found.append(self.block_of[beginning])
        return found

    def evict(self, block: int) -> None:
        """See the task."""
        self.block_of = {beginning: b for beginning, b in self.block_of.items() if b != block}

    def __len__(self) -> int:
        return len(self.block_of)


class Session:
    """A learner's index beside one that writes everything out. A failure shows the last operations."""

    def __init__(self, impl: ModuleType, block_size: int) -> None:
        self.lines = [f"index = PrefixIndex({block_size})"]
        self.why = ""
        self.index = impl.PrefixIndex(block_size)
        self.truth = WrittenOut(block_size)
        self.next_block = 1

    def fail(self, says: str) -> NoReturn:
        raise WrongAnswer("\n".join([*self.lines[-9:], says, *([self.why] if self.why else [])]))

    def insert(self, token_ids: Sequence[int], blocks: Sequence[int], *salt: str) -> None:
        self.lines.append(f"index.insert({', '.join(map(repr, (list(token_ids), list(blocks), *salt)))})")
        self.index.insert(list(token_ids), list(blocks), *salt)
        self.truth.insert(token_ids, blocks, *salt)
        self.check_len()

    def evict(self, block: int) -> None:
        self.lines.append(f"index.evict({block})")
        self.index.evict(block)
        self.truth.evict(block)
        self.check_len()

    def find(self, token_ids: Sequence[int], *salt: str) -> list[int]:
        call = f"index.find({', '.join(map(repr, (list(token_ids), *salt)))})"
        got, want = self.index.find(list(token_ids), *salt), self.truth.find(token_ids, *salt)
        if got != want or not isinstance(got, list):
            self.fail(f"{call} returned {got!r}; it should return {want}")
        self.lines.append(f"{call}  # {got}")
        return want

    def serve(self, token_ids: Sequence[int], *salt: str) -> None:
        """What an engine does with a text: find, compute the rest in blocks that were free, insert all."""
        found = self.find(token_ids, *salt)
        count = len(token_ids) // self.truth.block_size - len(found)
        new = list(range(self.next_block, self.next_block + count))
        self.next_block += count
        self.insert(token_ids, [*found, *new], *salt)

    def check_len(self) -> None:
        got, want = len(self.index), len(self.truth)
        if got != want:
            self.fail(f"len(index) is {got}; it should be {want}")


def play(impl: ModuleType, block_size: int, *operations: tuple[Any, ...], why: str = "") -> None:
    """Carry out operations, the last of which the sentence `why` is about."""
    session = Session(impl, block_size)
    for i, (name, *arguments) in enumerate(operations):
        session.why = why if i == len(operations) - 1 else ""
        getattr(session, name)(*arguments)


def any_operations(impl: ModuleType) -> type[RuleBasedStateMachine]:
    """A machine that calls the methods in any order, with texts that often begin alike."""
    texts = st.lists(st.integers(0, 1), max_size=9)
    salts = st.sampled_from(["", "", "a"])

    class AnyOperations(RuleBasedStateMachine):
        @initialize(block_size=st.integers(1, 3))
        def start(self, block_size: int) -> None:
            self.session = Session(impl, block_size)

        @rule(text=texts, salt=salts)
        def serve(self, text: list[int], salt: str) -> None:
            self.session.serve(text, salt)

        @rule(text=texts, salt=salts)
        def compute_again(self, text: list[int], salt: str) -> None:
            """Two that came together have both computed it."""
            count = len(text) // self.session.truth.block_size
            first = self.session.next_block
            self.session.next_block += count
            self.session.insert(text, list(range(first, first + count)), salt)

        @rule(text=texts, salt=salts)
        def find(self, text: list[int], salt: str) -> None:
            self.session.find(text, salt)

        @rule(which=st.integers(0, 30))
        def evict(self, which: int) -> None:
            held = sorted(self.session.truth.block_of.values())
            self.session.evict(held[which % len(held)] if held else which)

        @rule(block=st.integers(1, 20))
        def evict_anything(self, block: int) -> None:
            self.session.evict(block)

    return AnyOperations


@pytest.mark.exercise("PrefixIndex")
class TestPrefixIndex:
    def test_an_empty_index(self, impl: ModuleType) -> None:
        """Nothing is found where nothing was inserted."""
        play(impl, 2, ("find", [1, 2, 3, 4]), ("check_len",))

    def test_the_same_text(self, impl: ModuleType) -> None:
        """The blocks of a text are found for the same text, in its order."""
        play(impl, 2, ("insert", [1, 2, 3, 4], [8, 5]), ("find", [1, 2, 3, 4]))

    def test_the_same_beginning(self, impl: ModuleType) -> None:
        """As many blocks are found as two texts have in common, full blocks only."""
        inserted = ("insert", [1, 2, 3, 4, 5, 6], [8, 5, 7])
        play(impl, 2, inserted, ("find", [1, 2, 3, 4, 9, 9]))
        play(impl, 2, inserted, ("find", [1, 2, 3, 9]), why="The second block is (3, 9), and not (3, 4).")
        play(impl, 2, inserted, ("find", [1, 2, 3, 4, 5]), why="The third block of this text is not full.")
        play(impl, 2, inserted, ("find", [9, 2, 3, 4, 5, 6]), why="Everything comes after another first token.")

    def test_a_text_with_tokens_beyond_its_blocks(self, impl: ModuleType) -> None:
        """Only as many blocks are entered as were written."""
        play(impl, 2, ("insert", [1, 2, 3, 4, 5], [8]), ("find", [1, 2, 3, 4]), why="Only block 8 is written so far.")

    def test_the_same_tokens_behind_another_beginning(self, impl: ModuleType) -> None:
        """A block is found only behind the beginning that it was computed with."""
        why = "Block 5 holds (3, 4) behind (1, 2). Its K/V is another one behind (7, 7)."
        play(impl, 2, ("insert", [1, 2, 3, 4], [8, 5]), ("insert", [7, 7], [6]), ("find", [7, 7, 3, 4]), why=why)
        why = "(3, 4) stands at the beginning here."
        play(impl, 2, ("insert", [1, 2, 3, 4], [8, 5]), ("find", [3, 4]), why=why)
        play(impl, 2, ("insert", [1, 2, 1, 2, 1, 2], [3, 4, 5]), ("find", [1, 2, 1, 2, 1, 2, 1, 2]))

    def test_salts(self, impl: ModuleType) -> None:
        """Texts with different salts share nothing."""
        inserted = ("insert", [1, 2], [8], "mine")
        play(impl, 2, inserted, ("find", [1, 2], "yours"), ("find", [1, 2]), ("find", [1, 2], "mine"))
        play(impl, 2, inserted, ("insert", [1, 2], [9]), ("find", [1, 2], "mine"), ("find", [1, 2]))

    def test_a_second_copy(self, impl: ModuleType) -> None:
        """Where two have computed the same, the first copy stays, and the loss of the second changes nothing."""
        twice = [("insert", [1, 2, 3, 4], [8, 5]), ("insert", [1, 2, 3, 4], [6, 7])]
        play(impl, 2, *twice, ("find", [1, 2, 3, 4]), why="8 and 5 were there first.")
        play(impl, 2, *twice, ("evict", 6), ("find", [1, 2, 3, 4]), why="6 is a copy that was never entered.")
        why = "Both are gone. 6 and 7 are copies that were never entered."
        play(impl, 2, *twice, ("evict", 8), ("evict", 5), ("find", [1, 2, 3, 4]), why=why)

    def test_more_of_the_same_text(self, impl: ModuleType) -> None:
        """A text that has grown enters its new blocks behind the old ones."""
        grown = [("insert", [1, 2, 3], [8]), ("insert", [1, 2, 3, 4], [8, 5])]
        play(impl, 2, *grown, ("find", [1, 2, 3, 4]))

    def test_eviction(self, impl: ModuleType) -> None:
        """What is evicted is not found, and hides all that comes after it."""
        inserted = ("insert", [1, 2, 3, 4, 5, 6], [8, 5, 7])
        play(impl, 2, inserted, ("evict", 7), ("find", [1, 2, 3, 4, 5, 6]))
        why = "Without block 5, nothing leads to block 7, which is still in the index."
        play(impl, 2, inserted, ("evict", 5), ("find", [1, 2, 3, 4, 5, 6]), why=why)
        play(impl, 2, inserted, ("evict", 3), ("find", [1, 2, 3, 4, 5, 6]), why="Block 3 was never in the index.")

    def test_computed_again(self, impl: ModuleType) -> None:
        """What was evicted and is computed again is found again, in its new block, and leads to what comes after it."""
        evicted = [("insert", [1, 2, 3, 4], [8, 5]), ("evict", 8)]
        why = "Block 6 stands for (1, 2) now, and block 5 still for what comes after it."
        play(impl, 2, *evicted, ("insert", [1, 2], [6]), ("find", [1, 2, 3, 4]), why=why)

    def test_a_block_with_another_text(self, impl: ModuleType) -> None:
        """A block that was given to somebody else stands for that one's text, and leads nowhere that it once led."""
        evicted = [("insert", [1, 2, 3, 4], [8, 5]), ("evict", 8), ("insert", [7, 7], [8])]
        play(impl, 2, *evicted, ("find", [7, 7]))
        why = "Block 8 holds (7, 7) now. Block 5 was computed behind (1, 2), not behind whatever stands in block 8."
        play(impl, 2, *evicted, ("find", [7, 7, 3, 4]), why=why)
        play(impl, 2, *evicted, ("find", [1, 2, 3, 4]))

    def test_any_operations(self, impl: ModuleType) -> None:
        """Any operations in any order, beside an index that writes every beginning out."""
        run_state_machine_as_test(any_operations(impl), settings=settings(max_examples=60, stateful_step_count=30))

    def test_refusals(self, impl: ModuleType) -> None:
        """Blocks without tokens, and more blocks than a text fills, are refused."""
        Call(impl.PrefixIndex, 0).must_refuse("block_size < 1.")
        index = impl.PrefixIndex(2)
        Call(index.insert, [1, 2, 3], [4, 5]).must_refuse("3 tokens fill one block of 2.")

    def test_in_the_real_engine(self, impl: ModuleType) -> None:
        """Your class finds the prefixes of the real engine: every answer is M1's, and all that is there is found."""
        engine = engine_with(impl.PrefixIndex, 160)
        must_be_the_same(run(engine), answers_of_m1())
        must_have_found(engine, written_out(160))

    def test_in_the_real_engine_in_too_few_blocks(self, impl: ModuleType) -> None:
        """In a small pool, where cached blocks are evicted all the time, every answer is still M1's."""
        engine = engine_with(impl.PrefixIndex, 22)
        must_be_the_same(run(engine), answers_of_m1())
        must_have_found(engine, written_out(22))


# --- the index: in the real engine ------------------------------------------------------------------------

BLOCK_SIZE = 4
MAX_STEPS = 1000


class YourPrefixCache(PrefixCache):
    """The engine's interface to the learner's class. Blocks are entered when they are written, and not before."""

    def __init__(self, index: Any, block_size: int) -> None:
        super().__init__(block_size)
        self.index = index
        self.unwritten: dict[str, tuple[list[int], list[int], str]] = {}  # per request: tokens, blocks, salt

    def find(self, request: Request, num_blocks: int) -> list[CachedBlock]:
        """What the learner's index finds, as entries that nobody has yet to write."""
        tokens = list(request.tokens(0, num_blocks * self.block_size))
        found = self.index.find(tokens, request.cache_salt)
        if not isinstance(found, list) or len(found) > num_blocks:
            raise WrongAnswer(f"find returned {found!r} for {num_blocks} full blocks.")
        return [CachedBlock(b"", None, (), request.cache_salt, block) for block in found]

    def extend(self, request: Request, chain: list[CachedBlock], blocks: Sequence[int], num_blocks: int) -> None:
        """Remember what the coming forward writes."""
        tokens = list(request.tokens(0, num_blocks * self.block_size))
        self.unwritten[request.request_id] = (tokens, list(blocks[:num_blocks]), request.cache_salt)

    def commit(self, request_id: str) -> None:
        """Now it is written."""
        if request_id in self.unwritten:
            self.index.insert(*self.unwritten.pop(request_id))

    def forget(self, request_id: str) -> None:
        """What was not written is not entered."""
        self.unwritten.pop(request_id, None)

    def evict(self, block: int) -> None:
        """The block is given to somebody."""
        self.index.evict(block)


@functools.cache
def questions() -> tuple[list[str], list[SamplingParams]]:
    """Questions behind two texts, some of them twice, and a text that is another one's beginning."""
    guide, other = [text.split("\n\n")[2][:240] for text in list(load_prose().values())[:2]]
    asked = default_prompts(3)
    prompts = [f"{guide}\n{asked[0]}", f"{guide}\n{asked[1]}", f"{other}\n{asked[0]}", guide, f"{guide}\n{asked[0]}"]
    prompts += [f"{other}\n{asked[2]}", f"{guide}\n{asked[1]}", f"{other}\n{asked[0]}"]
    lengths = [4, 7, 3, 6, 2, 5, 4, 3]
    return prompts, [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]


@functools.cache
def answers_of_m1() -> list[RequestOutput]:
    llm = LLM("folo-tiny", milestone="m1", dtype="float32", device="cpu")
    return llm.generate(*questions(), use_tqdm=False)


def engine_with(make: Any, num_blocks: int) -> LLMEngine:
    """An M4 engine on the bundled model that finds prefixes by such an index. Two requests run at once."""
    config = EngineConfig(
        model=ModelConfig("folo-tiny", dtype="float32", device="cpu"),
        cache=CacheConfig(block_size=BLOCK_SIZE, num_kv_blocks=num_blocks),
        scheduler=SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=32),
        milestone="m4",
    )
    engine = LLMEngine(engine_config=config)
    kv = engine.core.scheduler.kv
    if not isinstance(kv, BlockManager):
        raise RuntimeError(f"the engine has a {type(kv).__name__}")
    kv.cache = YourPrefixCache(make(BLOCK_SIZE), BLOCK_SIZE)
    return engine


@functools.cache
def written_out(num_blocks: int) -> LLMEngine:
    """An engine that has answered all questions with an index that forgets nothing."""
    engine = engine_with(WrittenOut, num_blocks)
    must_be_the_same(run(engine), answers_of_m1())
    return engine


def run(engine: LLMEngine) -> list[RequestOutput]:
    """All questions to completion, in their order."""
    prompts, params = questions()
    for i, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
        engine.add_request(str(i), prompt, wanted)
    done: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        if engine.stats.steps == MAX_STEPS:
            raise WrongAnswer(f"After {MAX_STEPS} steps {len(prompts) - len(done)} requests are not done.")
        done |= {output.request_id: output for output in engine.step() if output.finished}
    return [done[str(i)] for i in range(len(prompts))]


def must_be_the_same(got: Sequence[RequestOutput], want: Sequence[RequestOutput]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        sample, other = ours.outputs[0], theirs.outputs[0]
        if sample.token_ids != other.token_ids:
            raise WrongAnswer(
                f"Another answer than M1's, to: {str(theirs.prompt)[-60:]!r}\nreturned  {sample.text!r}\n"
                f"expected  {other.text!r}\nIt began with {ours.num_cached_tokens} tokens of K/V that `find` named."
            )


def must_have_found(engine: LLMEngine, want: LLMEngine) -> None:
    got, expected = engine.stats.cached_tokens, want.stats.cached_tokens
    if got != expected:
        raise WrongAnswer(
            f"The engine took {got} prompt tokens from the cache; {expected} were there to be found, and "
            f"{want.stats.prompt_tokens_computed} had to be computed."
        )
