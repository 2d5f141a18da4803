"""The checks behind `folovllm grade m3`. Reading them is allowed: they say what, never how."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from types import ModuleType
from typing import Any, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from folovllm import LLM, CacheConfig, EngineConfig, LLMEngine, ModelConfig, SamplingParams, SchedulerConfig
from folovllm.course.glossary import default_prompts
from folovllm.course.grading.checks import Call, WrongAnswer
from folovllm.kv_cache.interface import BlockCopy, BlockPlan, KVCacheManager, KVPlan, KVUsage
from folovllm.outputs import RequestOutput
from folovllm.request import Request
from folovllm.scheduler.scheduler import Scheduler

# --- what blocks waste ------------------------------------------------------------------------------------

sizes = st.integers(1, 9)


@pytest.mark.exercise("blocks_and_waste")
class TestBlocksAndWaste:
    def test_the_example(self, impl: ModuleType) -> None:
        """100 tokens take 7 blocks of 16, and 12 of their 112 slots stay empty."""
        Call(impl.blocks_and_waste, 100, 16).must_return((7, 12 / 112), "6 blocks hold 96 tokens: 4 are left.")

    def test_whole_blocks(self, impl: ModuleType) -> None:
        """2000 tokens fill 125 blocks: nothing is wasted."""
        Call(impl.blocks_and_waste, 2000, 16).must_return((125, 0.0), "125 * 16 is 2000.")

    def test_blocks_of_one_token(self, impl: ModuleType) -> None:
        """Blocks of one slot waste nothing, and a sequence takes as many as it has tokens."""
        Call(impl.blocks_and_waste, 37, 1).must_return((37, 0.0))

    def test_a_block_that_is_hardly_used(self, impl: ModuleType) -> None:
        """The largest waste is in a sequence of one token."""
        Call(impl.blocks_and_waste, 1, 256).must_return((1, 255 / 256), "1 of 256 slots.")

    def test_nothing(self, impl: ModuleType) -> None:
        """No tokens take no blocks, in which nothing is wasted."""
        Call(impl.blocks_and_waste, 0, 16).must_return((0, 0.0), "There is no slot: 0 of 0 would be no number.")

    @given(num_tokens=st.integers(0, 60), block_size=sizes)
    def test_token_by_token(self, impl: ModuleType, num_tokens: int, block_size: int) -> None:
        """Any length: against blocks that are filled one token after the other."""
        blocks: list[int] = []
        for _ in range(num_tokens):
            if not blocks or blocks[-1] == block_size:
                blocks.append(0)
            blocks[-1] += 1
        slots = len(blocks) * block_size
        waste = float(Fraction(slots - num_tokens, slots)) if slots else 0.0
        Call(impl.blocks_and_waste, num_tokens, block_size).must_return((len(blocks), waste))

    def test_refusals(self, impl: ModuleType) -> None:
        """Less than nothing, and blocks without slots, are refused."""
        Call(impl.blocks_and_waste, -1, 16).must_refuse("num_tokens < 0.")
        Call(impl.blocks_and_waste, 5, 0).must_refuse("block_size < 1.")


@pytest.mark.exercise("blocks_of_samples")
class TestBlocksOfSamples:
    def test_the_examples(self, impl: ModuleType) -> None:
        """Two samples of 10 + 3 tokens share two blocks of 4; three of 9 tokens share two as well."""
        why = "Blocks 0 and 1 hold tokens 0 to 7, which both read. Each sample has blocks 2 and 3 of its own."
        Call(impl.blocks_of_samples, 10, 3, 2, 4).must_return((6, 8), why)
        why = "Tokens 0 to 7 are shared. The last prompt token, 8, is computed by each sample for itself."
        Call(impl.blocks_of_samples, 9, 0, 3, 4).must_return((5, 9), why)

    def test_the_last_prompt_token_is_not_shared(self, impl: ModuleType) -> None:
        """A prompt of exactly two blocks shares one: each sample writes its last token itself."""
        why = "Token 7, the last of the prompt, goes into the second block, and each sample writes it for itself."
        Call(impl.blocks_of_samples, 8, 0, 3, 4).must_return((1 + 3, 6), why)

    def test_one_sample(self, impl: ModuleType) -> None:
        """One sample has nobody to share with."""
        Call(impl.blocks_of_samples, 10, 3, 1, 4).must_return((4, 4))

    def test_a_prompt_shorter_than_a_block(self, impl: ModuleType) -> None:
        """A prompt that does not fill a block shares nothing for long."""
        Call(impl.blocks_of_samples, 3, 20, 4, 16).must_return((8, 8), "Every sample writes into the first block.")

    def test_a_long_prompt(self, impl: ModuleType) -> None:
        """The longer the prompt, the more is saved: 8 samples of 1000 + 24 tokens."""
        why = "999 // 16 = 62 blocks are shared, and each sample has 64 - 62 of its own."
        Call(impl.blocks_of_samples, 1000, 24, 8, 16).must_return((62 + 8 * 2, 512), why)

    @given(prompt_len=st.integers(1, 30), output_len=st.integers(0, 12), n=st.integers(1, 4), block_size=sizes)
    def test_block_by_block(self, impl: ModuleType, prompt_len: int, output_len: int, n: int, block_size: int) -> None:
        """Any lengths: a block is a sample's own if it writes a token into it, and else it is the first sample's."""
        held = {
            (sample if token >= prompt_len - 1 else 0, token // block_size)
            for sample in range(n)
            for token in range(prompt_len + output_len)
        }
        own = {(sample, block) for sample, block in held if any(
            token // block_size == block for token in range(prompt_len - 1, prompt_len + output_len)
        )}  # fmt: skip
        shared = {block for _, block in held} - {block for _, block in own}
        want = (len(shared) + n * len({block for _, block in own}), n * len({block for _, block in held}))
        Call(impl.blocks_of_samples, prompt_len, output_len, n, block_size).must_return(want)

    def test_refusals(self, impl: ModuleType) -> None:
        """No prompt, no samples, blocks without slots and outputs below nothing are refused."""
        Call(impl.blocks_of_samples, 0, 3, 2, 4).must_refuse("prompt_len < 1.")
        Call(impl.blocks_of_samples, 5, 3, 0, 4).must_refuse("n < 1.")
        Call(impl.blocks_of_samples, 5, 3, 2, 0).must_refuse("block_size < 1.")
        Call(impl.blocks_of_samples, 5, -1, 2, 4).must_refuse("output_len < 0.")


# --- where a token's K/V stands ---------------------------------------------------------------------------


@pytest.mark.exercise("slot_mapping")
class TestSlotMapping:
    def test_the_example(self, impl: ModuleType) -> None:
        """Three tokens over the border of two blocks."""
        why = "Position 3 is the last slot of block 7: 7 * 4 + 3. Positions 4 and 5 stand at the start of block 2."
        Call(impl.slot_mapping, [7, 2, 9], 3, 3, 4).must_return([31, 8, 9], why)

    def test_a_prefill(self, impl: ModuleType) -> None:
        """A whole prompt of 6 tokens, in two blocks."""
        why = "Block 5 has the slots 20 to 23, block 3 the slots 12 to 15."
        Call(impl.slot_mapping, [5, 3], 0, 6, 4).must_return([20, 21, 22, 23, 12, 13], why)

    def test_a_decode(self, impl: ModuleType) -> None:
        """One token, in the first slot of a new block."""
        Call(impl.slot_mapping, [5, 3, 8], 8, 1, 4).must_return([32], "Position 8 is the first of the third block.")

    def test_blocks_of_one_token(self, impl: ModuleType) -> None:
        """With blocks of one slot, slots are the block numbers."""
        Call(impl.slot_mapping, [4, 1, 6], 1, 2, 1).must_return([1, 6])

    def test_no_tokens(self, impl: ModuleType) -> None:
        """No tokens are no slots, even behind a full table."""
        Call(impl.slot_mapping, [4], 2, 0, 2).must_return([])

    @given(data=st.data(), block_size=st.integers(1, 5))
    def test_what_is_written_is_read_again(self, impl: ModuleType, data: st.DataObject, block_size: int) -> None:
        """Any table: a pool written slot by slot and read block by block holds the tokens in their order."""
        table = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=5, unique=True), "block_table")
        start = data.draw(st.integers(0, len(table) * block_size), "start")
        num_tokens = data.draw(st.integers(0, len(table) * block_size - start), "num_tokens")
        call = Call(impl.slot_mapping, table, start, num_tokens, block_size)
        slots = call.result()
        pool = {slot: start + i for i, slot in enumerate(slots)} if isinstance(slots, list) else {}
        text = [pool.get(block * block_size + offset) for block in table for offset in range(block_size)]
        want = [i if start <= i < start + num_tokens else None for i in range(len(text))]
        if len(pool) != num_tokens or text != want:
            call.fail(slots, why=f"{num_tokens} tokens from position {start}, read through the table: {text}")

    def test_refusals(self, impl: ModuleType) -> None:
        """Positions below 0, and a token without a block, are refused."""
        Call(impl.slot_mapping, [7, 2], 7, 2, 4).must_refuse("Two blocks have the positions 0 to 7; 8 is on no page.")
        Call(impl.slot_mapping, [7, 2], -1, 1, 4).must_refuse("start < 0. A list takes -1 for its last entry.")
        Call(impl.slot_mapping, [7, 2], 0, -1, 4).must_refuse("num_tokens < 0.")
        Call(impl.slot_mapping, [7, 2], 0, 1, 0).must_refuse("block_size < 1.")


# --- who owns which block: a memory beside the books -------------------------------------------------------

ERRORS = (ValueError, KeyError)


class Session:
    """A learner's manager, beside a memory in which every token is written where the manager says.

    Each operation is carried out on the manager, and then all that can be known about it is checked: what it returned,
    every table, every count, and that each sequence still reads its own tokens. A failure shows the last operations.
    """

    def __init__(self, impl: ModuleType, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.lines = [f"pool = BlockManager({num_blocks}, {block_size})"]
        self.why = ""
        self.pool = impl.BlockManager(num_blocks, block_size)
        self.texts: dict[str, list[str]] = {}  # the tokens of each sequence; no two tokens are alike
        self.tables: dict[str, list[int]] = {}
        self.memory: dict[tuple[int, int], str] = {}  # (block, slot) -> token
        self.written = 0
        self.check()

    def fail(self, says: str) -> NoReturn:
        raise WrongAnswer("\n".join([*self.lines[-9:], says, *([self.why] if self.why else [])]))

    def attempt(self, name: str, *arguments: Any) -> Any:
        """Call a method of the manager; what it gives, or the class of the exception that the task names."""
        self.lines.append(f"pool.{name}({', '.join(map(repr, arguments))})")
        try:
            return getattr(self.pool, name)(*arguments)
        except ERRORS as error:
            return type(error)

    def expect_error(self, got: Any, *errors: type[Exception]) -> None:
        """One of these was raised, and nothing has changed. Where two things are wrong, either may be named."""
        if got not in errors:
            self.fail(f"{told(got)}; it should raise {' or '.join(error.__name__ for error in errors)}")
        self.check()

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    @property
    def counts(self) -> Counter[int]:
        """How many tables name each block."""
        return Counter(block for table in self.tables.values() for block in table)

    @property
    def num_free(self) -> int:
        return self.num_blocks - len(self.counts)

    # the operations

    def allocate(self, seq_id: str, num_tokens: int) -> None:
        got = self.attempt("allocate", seq_id, num_tokens)
        if seq_id in self.texts or num_tokens < 1:
            return self.expect_error(got, ValueError)
        fits = self.blocks_for(num_tokens) <= self.num_free
        if got is not fits:
            self.fail(
                f"{told(got)}; it should return {fits}: {num_tokens} tokens need {self.blocks_for(num_tokens)} blocks, "
                f"and {self.num_free} are free"
            )
        if fits:
            self.tables[seq_id], self.texts[seq_id] = self.table_of(seq_id, num_tokens), []
            self.write(seq_id, num_tokens)
        return self.check()

    def append(self, seq_id: str, num_tokens: int) -> None:
        got = self.attempt("append", seq_id, num_tokens)
        errors = [KeyError] * (seq_id not in self.texts) + [ValueError] * (num_tokens < 1)
        if errors:
            return self.expect_error(got, *errors)
        table, length = self.tables[seq_id], len(self.texts[seq_id])
        copy = length % self.block_size > 0 and self.counts[table[-1]] > 1
        needed = self.blocks_for(length + num_tokens) - len(table) + copy
        if needed > self.num_free:
            if got is not None:
                self.fail(f"{told(got)}; it should return None: {needed} blocks needed, free: {self.num_free}")
            return self.check()
        if not isinstance(got, list) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in got):
            self.fail(f"{told(got)}; it should return a list of pairs: {needed} blocks needed, free: {self.num_free}")
        new = self.table_of(seq_id, length + num_tokens)
        want = [(table[-1], new[len(table) - 1])] if copy else []
        if copy and (got != want or new[len(table) - 1] == table[-1]):
            self.fail(
                f"{told(got)}; it should return [({table[-1]}, the block in its place)]: {self.counts[table[-1]]} "
                f"tables name block {table[-1]}, and the next token would go into it. The table is {new} now"
            )
        if got != want:
            self.fail(f"{told(got)}; it should return []: no block that others name is written")
        for source, target in got:
            for slot in range(self.block_size):
                self.memory[target, slot] = self.memory.get((source, slot), "?")
        self.tables[seq_id] = new
        self.write(seq_id, num_tokens)
        return self.check()

    def fork(self, parent_id: str, child_id: str, num_tokens: int) -> None:
        got = self.attempt("fork", parent_id, child_id, num_tokens)
        longest = len(self.texts.get(parent_id, [""] * num_tokens))
        wrong = child_id in self.texts or not 1 <= num_tokens <= longest
        errors = [KeyError] * (parent_id not in self.texts) + [ValueError] * wrong
        if errors:
            return self.expect_error(got, *errors)
        if isinstance(got, type):
            self.fail(f"{told(got)}; {parent_id!r} has {len(self.texts[parent_id])} tokens to fork")
        table = self.table_of(child_id, num_tokens)
        want = self.tables[parent_id][: len(table)]
        if table != want:
            self.fail(f"the table of {child_id!r} is {table}; it should be {want}, the blocks of {parent_id!r}")
        self.tables[child_id], self.texts[child_id] = table, self.texts[parent_id][:num_tokens]
        return self.check()

    def free(self, seq_id: str) -> None:
        got = self.attempt("free", seq_id)
        if seq_id not in self.texts:
            return self.expect_error(got, KeyError)
        if isinstance(got, type):
            self.fail(f"{told(got)}; {seq_id!r} has a table")
        del self.tables[seq_id], self.texts[seq_id]
        return self.check()

    def write(self, seq_id: str, num_tokens: int) -> None:
        """The K/V of the next tokens, each different from every other."""
        for _ in range(num_tokens):
            position = len(self.texts[seq_id])
            token = f"{seq_id}{self.written}"
            self.written += 1
            self.texts[seq_id].append(token)
            block = self.tables[seq_id][position // self.block_size]
            self.memory[block, position % self.block_size] = token

    # what must hold

    def table_of(self, seq_id: str, num_tokens: int) -> list[int]:
        """The manager's table, if it has the right number of blocks that there are."""
        got, needed = self.pool.table(seq_id), self.blocks_for(num_tokens)
        blocks = range(1, self.num_blocks + 1)
        if not isinstance(got, list) or any(type(block) is not int or block not in blocks for block in got):
            self.fail(f"table({seq_id!r}) is {got!r}; it should be a list of numbers from 1 to {self.num_blocks}")
        if len(got) != needed or len(set(got)) != needed:
            self.fail(f"table({seq_id!r}) is {got}; {num_tokens} tokens need {needed} different blocks")
        return list(got)

    def check(self) -> None:
        """The books agree with the tables, and every sequence reads its own tokens."""
        for seq_id, text in self.texts.items():
            table = self.table_of(seq_id, len(text))
            if table != self.tables[seq_id]:
                self.fail(f"table({seq_id!r}) is {table}; it was {self.tables[seq_id]}, and nothing should change it")
            for position, token in enumerate(text):
                block, slot = table[position // self.block_size], position % self.block_size
                found = self.memory[block, slot]
                if found != token:
                    self.fail(
                        f"slot {slot} of block {block} holds token {found}; {seq_id!r}, whose table is {table}, wrote "
                        f"{token} there and would read that of another sequence"
                    )
        for block in range(1, self.num_blocks + 1):
            got, want = self.pool.ref_count(block), self.counts[block]
            if got != want:
                self.fail(f"ref_count({block}) is {got!r}; it should be {want}, with the tables {self.tables}")
        got = self.pool.num_free()
        if got != self.num_free:
            self.fail(
                f"num_free() is {got!r}; it should be {self.num_free}: of {self.num_blocks} blocks, "
                f"{len(self.counts)} stand in a table"
            )


def told(value: Any) -> str:
    """ "it returned True", "it raised KeyError"."""
    return f"it raised {value.__name__}" if isinstance(value, type) else f"it returned {value!r}"


def play(impl: ModuleType, num_blocks: int, block_size: int, *operations: tuple[Any, ...], why: str = "") -> Session:
    """Carry out operations, the last of which the sentence `why` is about."""
    session = Session(impl, num_blocks, block_size)
    for i, (name, *arguments) in enumerate(operations):
        session.why = why if i == len(operations) - 1 else ""
        getattr(session, name)(*arguments)
    return session


def any_sequence_of_operations(impl: ModuleType) -> type[RuleBasedStateMachine]:
    """A machine that calls the methods in any order: mostly with ids that fit, and at times with any id at all."""
    names = "abcdef"
    any_id, which = st.sampled_from(names), st.integers(0, len(names) - 1)

    class AnyOperations(RuleBasedStateMachine):
        @initialize(num_blocks=st.integers(1, 14), block_size=st.integers(1, 4))
        def start(self, num_blocks: int, block_size: int) -> None:
            self.session = Session(impl, num_blocks, block_size)

        def live(self, which: int) -> str:
            """An id that has a table."""
            return list(self.session.texts)[which % len(self.session.texts)]

        def new(self) -> str:
            """An id that has none."""
            return next(name for name in names if name not in self.session.texts)

        @precondition(lambda self: len(self.session.texts) < len(names))
        @rule(num_tokens=st.integers(1, 9))
        def allocate(self, num_tokens: int) -> None:
            self.session.allocate(self.new(), num_tokens)

        @precondition(lambda self: self.session.texts)
        @rule(which=which, num_tokens=st.integers(1, 5))
        def append(self, which: int, num_tokens: int) -> None:
            self.session.append(self.live(which), num_tokens)

        @precondition(lambda self: 0 < len(self.session.texts) < len(names))
        @rule(which=which, part=st.integers(1, 9), all_of_it=st.booleans())
        def fork(self, which: int, part: int, all_of_it: bool) -> None:
            parent_id = self.live(which)
            length = len(self.session.texts[parent_id])
            self.session.fork(parent_id, self.new(), length if all_of_it else min(part, length))

        @precondition(lambda self: self.session.texts)
        @rule(which=which)
        def free(self, which: int) -> None:
            self.session.free(self.live(which))

        @rule(name=st.sampled_from(["allocate", "append"]), seq_id=any_id, num_tokens=st.integers(0, 2))
        def grow_anything(self, name: str, seq_id: str, num_tokens: int) -> None:
            getattr(self.session, name)(seq_id, num_tokens)

        @rule(parent_id=any_id, child_id=any_id, num_tokens=st.integers(0, 9))
        def fork_anything(self, parent_id: str, child_id: str, num_tokens: int) -> None:
            self.session.fork(parent_id, child_id, num_tokens)

        @rule(seq_id=any_id)
        def free_anything(self, seq_id: str) -> None:
            if seq_id not in self.session.texts:
                self.session.free(seq_id)

    return AnyOperations


@pytest.mark.exercise("BlockManager")
class TestBlockManager:
    def test_a_new_pool(self, impl: ModuleType) -> None:
        """At first all blocks are free, and none has a count."""
        play(impl, 5, 4)

    def test_allocate(self, impl: ModuleType) -> None:
        """Sequences get blocks of their own, as many as they need and no more."""
        play(impl, 6, 4, ("allocate", "a", 5), ("allocate", "b", 4), ("allocate", "c", 1))

    def test_the_whole_pool(self, impl: ModuleType) -> None:
        """The last free block can be had, and then the pool is full. A refusal changes nothing."""
        operations = [("allocate", "a", 9), ("allocate", "b", 5), ("allocate", "b", 4), ("allocate", "c", 1)]
        play(impl, 4, 4, *operations)

    def test_append(self, impl: ModuleType) -> None:
        """Tokens fill the last block first. Only then a new one is taken."""
        operations = [("append", "a", 1)] * 5
        play(impl, 4, 4, ("allocate", "a", 3), *operations, ("append", "a", 5))

    def test_append_to_a_full_pool(self, impl: ModuleType) -> None:
        """Where no block is free, a token may still go into the last block. Else it is None, and nothing changes."""
        operations = [("allocate", "a", 3), ("allocate", "b", 4), ("append", "b", 1), ("append", "a", 1)]
        play(impl, 2, 4, *operations, ("append", "a", 1))
        why = "6 more tokens need two blocks, and one is free: all or nothing."
        play(impl, 2, 4, ("allocate", "a", 4), ("append", "a", 6), why=why)

    def test_free(self, impl: ModuleType) -> None:
        """What is given back can be had again, and the id, too."""
        play(impl, 2, 4, ("allocate", "a", 8), ("free", "a"), ("allocate", "a", 5), ("free", "a"), ("allocate", "b", 8))

    def test_fork(self, impl: ModuleType) -> None:
        """A fork names the parent's blocks and takes none, even in a full pool."""
        play(impl, 2, 4, ("allocate", "a", 8), ("fork", "a", "b", 8), ("fork", "b", "c", 8))
        why = "4 tokens stand in the first block: the second is none of the child's business."
        play(impl, 2, 4, ("allocate", "a", 8), ("fork", "a", "b", 4), why=why)

    def test_sharers_leave(self, impl: ModuleType) -> None:
        """A shared block is free when the last of those that name it has gone, whoever that is."""
        shared = [("allocate", "a", 8), ("fork", "a", "b", 8)]
        play(impl, 2, 4, *shared, ("free", "a"), why="b still reads both blocks.")
        play(impl, 2, 4, *shared, ("free", "a"), ("free", "b"), ("allocate", "c", 8))
        play(impl, 2, 4, *shared, ("free", "b"), ("append", "a", 1))

    def test_copy_on_write(self, impl: ModuleType) -> None:
        """Who writes into a shared block gets a copy of it first. The other one keeps the block."""
        why = "b writes its token 6 into the second block, which a names as well."
        play(impl, 4, 4, ("allocate", "a", 6), ("fork", "a", "b", 6), ("append", "b", 1), why=why)
        why = "a writes its token 6 into the second block, which b names as well."
        play(impl, 4, 4, ("allocate", "a", 6), ("fork", "a", "b", 6), ("append", "a", 1), why=why)

    def test_the_last_reader_writes_in_place(self, impl: ModuleType) -> None:
        """Once the others have their copies, or have gone, the block is written without one."""
        forks = [("allocate", "a", 6), ("fork", "a", "b", 6), ("fork", "a", "c", 6)]
        why = "b and c have copies of their own: only a names the old block."
        play(impl, 5, 4, *forks, ("append", "b", 1), ("append", "c", 1), ("append", "a", 1), why=why)
        play(impl, 5, 4, *forks, ("free", "a"), ("append", "b", 1), ("append", "c", 1), why="Only c names it now.")

    def test_full_blocks_are_never_copied(self, impl: ModuleType) -> None:
        """The next token after full blocks goes into a new one, however many share the full ones."""
        why = "The second block is full: nothing is written into it, so it stays shared."
        play(impl, 4, 4, ("allocate", "a", 8), ("fork", "a", "b", 8), ("append", "b", 2), why=why)

    def test_a_part_of_a_block(self, impl: ModuleType) -> None:
        """A child may share a part of a block that the parent has filled: where it goes on, it needs a copy."""
        why = "b has 5 tokens and writes the next into the second block, where a has its own token 5."
        play(impl, 4, 4, ("allocate", "a", 8), ("fork", "a", "b", 5), ("append", "b", 1), why=why)

    def test_a_copy_needs_a_free_block(self, impl: ModuleType) -> None:
        """The copy counts: without a free block for it the answer is None, and nothing changes."""
        shared = [("allocate", "a", 6), ("fork", "a", "b", 6)]
        play(impl, 2, 4, *shared, ("append", "b", 1), why="Both blocks are held, and the copy needs a third.")
        why = "Of 3 tokens two fit the copy, and the third needs one more block: two in all, and one is free."
        play(impl, 3, 4, *shared, ("append", "b", 3), why=why)
        play(impl, 4, 4, *shared, ("append", "b", 3), ("append", "a", 2))

    def test_what_is_refused(self, impl: ModuleType) -> None:
        """Ids that are in use or unknown, and counts that make no sense, each have their exception."""
        play(impl, 4, 4, ("append", "a", 1), ("free", "a"), ("fork", "a", "b", 1), ("allocate", "a", 0))
        play(impl, 4, 4, ("allocate", "a", 5), ("allocate", "a", 1), ("append", "a", 0), ("fork", "a", "a", 5))
        play(impl, 4, 4, ("allocate", "a", 5), ("fork", "a", "b", 6), ("fork", "a", "b", 0), ("fork", "a", "b", 5))
        play(impl, 4, 4, ("allocate", "a", 5), ("free", "a"), ("free", "a"), ("append", "a", 1))
        for arguments in ((0, 4), (4, 0)):
            Call(impl.BlockManager, *arguments).must_refuse("num_blocks and block_size must be at least 1.")
        session = play(impl, 4, 4, ("allocate", "a", 5))
        session.expect_error(session.attempt("table", "b"), KeyError)

    def test_a_table_is_the_callers_own(self, impl: ModuleType) -> None:
        """Whoever changes the list that `table` gave does not change the books."""
        session = play(impl, 4, 4, ("allocate", "a", 5))
        session.lines.append("pool.table('a').clear()")
        session.pool.table("a").clear()
        session.check()

    @pytest.mark.late
    def test_any_operations(self, impl: ModuleType) -> None:
        """Any operations in any order, with a memory beside the books: no token is ever lost."""
        run_state_machine_as_test(
            any_sequence_of_operations(impl), settings=settings(max_examples=100, stateful_step_count=30)
        )

    @pytest.mark.late
    def test_in_the_real_engine(self, impl: ModuleType) -> None:
        """Your class keeps the blocks of the real engine: every answer is M1's."""
        engine = engine_with(impl, num_blocks=80)
        prompts, params = questions()
        must_be_the_same(run(engine, prompts, params), answers_of_m1())
        must_be_free(engine)

    @pytest.mark.late
    def test_in_the_real_engine_in_too_few_blocks(self, impl: ModuleType) -> None:
        """In a pool for hardly two of six requests, they give way, come back, and say what M1 says."""
        engine = engine_with(impl, num_blocks=18)
        prompts, params = questions()
        must_be_the_same(run(engine, prompts, params), answers_of_m1())
        if not engine.stats.preemptions:
            raise WrongAnswer("Nobody had to give way, though six requests do not fit 18 blocks. Is `append` refusing?")
        must_be_free(engine)

    @pytest.mark.late
    def test_in_the_real_engine_with_samples(self, impl: ModuleType) -> None:
        """Four samples of each prompt share its blocks and part by copies, in too few blocks: all are M1's."""
        engine = engine_with(impl, num_blocks=26)
        prompts, params = sampled()
        must_be_the_same(run(engine, prompts, [params] * len(prompts)), samples_of_m1())
        if not engine.stats.copied_blocks:
            raise WrongAnswer("No block was ever copied, though samples part within one.")
        if not engine.stats.preemptions:
            raise WrongAnswer("Nobody had to give way, though eight samples do not fit 26 blocks.")
        must_be_free(engine)


# --- who owns which block: in the real engine --------------------------------------------------------------

BLOCK_SIZE = 4
MAX_STEPS = 1000


@functools.cache
def questions() -> tuple[list[str], list[SamplingParams]]:
    """Six questions, and answers of different lengths."""
    lengths = [24, 6, 17, 30, 9, 21]
    return default_prompts(6), [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]


@functools.cache
def sampled() -> tuple[list[str], SamplingParams]:
    """A long question and a short one, and how to draw four answers to each."""
    prompts = [" ".join(default_prompts(4)), default_prompts(4)[3]]
    return prompts, SamplingParams(n=4, temperature=0.8, seed=7, max_tokens=14, ignore_eos=True)


@functools.cache
def m1() -> LLM:
    """The bundled model, one request at a time, without blocks."""
    return LLM("folo-tiny", milestone="m1", dtype="float32", device="cpu")


@functools.cache
def answers_of_m1() -> list[RequestOutput]:
    return m1().generate(*questions(), use_tqdm=False)


@functools.cache
def samples_of_m1() -> list[RequestOutput]:
    return m1().generate(*sampled(), use_tqdm=False)


def run(engine: LLMEngine, prompts: Sequence[str], params: Sequence[SamplingParams]) -> list[RequestOutput]:
    """All prompts to completion, in their order. Raises WrongAnswer for an engine that gets nowhere."""
    for i, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
        engine.add_request(str(i), prompt, wanted)
    done: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        if engine.stats.steps == MAX_STEPS:
            free = engine.core.scheduler.kv.usage().free // BLOCK_SIZE
            raise WrongAnswer(
                f"After {MAX_STEPS} steps {len(prompts) - len(done)} of {len(prompts)} requests are not done, "
                f"{len(engine.core.scheduler.running)} run, and {free} blocks stand in no table. Are blocks lost?"
            )
        done |= {output.request_id: output for output in engine.step() if output.finished}
    return [done[str(i)] for i in range(len(prompts))]


def must_be_the_same(got: Sequence[RequestOutput], want: Sequence[RequestOutput]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        for sample, other in zip(ours.outputs, theirs.outputs, strict=True):
            if sample.token_ids != other.token_ids:
                raise WrongAnswer(
                    f"Another answer than M1's, to: {theirs.prompt!r}\nreturned  {sample.text!r}\n"
                    f"expected  {other.text!r}\nIts K/V was overwritten, or not copied."
                )


def must_be_free(engine: LLMEngine) -> None:
    kv = engine.core.scheduler.kv
    if not isinstance(kv, YourBlockManager):
        raise RuntimeError(f"the engine has a {type(kv).__name__}")
    if kv.answer.num_free() != kv.num_blocks:
        raise WrongAnswer(f"All requests are done, and {kv.answer.num_free()} of {kv.num_blocks} blocks are free.")


class YourBlockManager(KVCacheManager):
    """The engine's interface to the learner's class. It counts which tokens are computed; all blocks are the learner's.

    There is no host pool: a request that gives way computes its K/V again.
    """

    can_share = True

    def __init__(self, make: Callable[[int, int], Any], num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.answer = make(num_blocks, block_size)
        self.computed: dict[str, int] = {}  # of every request with a table

    @property
    def longest_request(self) -> int:
        """All blocks full, and a last token that needs no slot."""
        return self.num_blocks * self.block_size + 1

    def why_never_fits(self, request: Request) -> str | None:
        """None, or why the request is larger than the pool."""
        needed = -(-request.max_total_tokens // self.block_size)
        return None if needed <= self.num_blocks else f"it needs {needed} of {self.num_blocks} blocks"

    def get_computed_blocks(self, request: Request) -> int:
        """The tokens of a fork that waits; nothing is kept of a preempted request."""
        return self.computed.get(request.request_id, 0)

    def allocate_slots(self, request: Request, num_new_tokens: int, spare: bool = False) -> KVPlan | None:
        """`allocate` for a newcomer, `append` for one that runs."""
        name = request.request_id
        if name in self.computed:
            copies = self.answer.append(name, num_new_tokens)
        else:
            copies = [] if self.answer.allocate(name, num_new_tokens) else None
        if copies is None:
            return None
        start = self.computed.setdefault(name, 0)
        ops = tuple(BlockCopy(source, target) for source, target in copies)
        return BlockPlan(name, start, num_new_tokens, ops, tuple(self.answer.table(name)))

    def fork(self, src: Request, dst: Request, num_tokens: int) -> None:
        """`fork`."""
        self.answer.fork(src.request_id, dst.request_id, num_tokens)
        self.computed[dst.request_id] = num_tokens

    def can_reclaim(self, idle: Sequence[Request], request: Request) -> bool:
        """Forks that wait are freed as long as there are any."""
        return bool(idle)

    def cache_blocks(self, plan: KVPlan) -> None:
        """The K/V that `append` made room for is written."""
        self.computed[plan.request_id] += plan.num_tokens

    def free(self, request: Request) -> None:
        """`free`."""
        if self.computed.pop(request.request_id, None) is not None:
            self.answer.free(request.request_id)

    def usage(self) -> KVUsage:
        """Counted from the tables."""
        tables = {name: self.answer.table(name) for name in self.computed}
        slots = {
            (block, slot)
            for name, table in tables.items()
            for i, block in enumerate(table)
            for slot in range(min(self.block_size, self.computed[name] - i * self.block_size))
        }
        held = {block for table in tables.values() for block in table}
        named, size = sum(map(len, tables.values())), self.block_size
        return KVUsage(self.num_blocks * size, len(held) * size, len(slots), named * size)


def engine_with(impl: ModuleType, num_blocks: int) -> LLMEngine:
    """An M3 engine on the bundled model, whose blocks the learner's class hands out."""
    config = EngineConfig(
        model=ModelConfig("folo-tiny", dtype="float32", device="cpu"),
        cache=CacheConfig(block_size=BLOCK_SIZE, num_kv_blocks=num_blocks),
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=256),
        milestone="m3",
    )
    engine = LLMEngine(engine_config=config)
    kv = YourBlockManager(impl.BlockManager, num_blocks, BLOCK_SIZE)
    engine.core.scheduler = Scheduler(kv, config.max_num_seqs, config.max_num_batched_tokens(engine.max_model_len))
    return engine


# --- who gives way ----------------------------------------------------------------------------------------

RUNNING = [("a", 0), ("b", 0), ("c", 0)]
TABLES = {"a": [1, 2], "b": [3, 4], "c": [2, 5]}


def asked(
    impl: ModuleType,
    request_id: str,
    needed: int,
    num_free: int,
    running: Sequence[tuple[str, int]] = RUNNING,
    tables: Mapping[str, Sequence[int]] = TABLES,
) -> Call:
    """A call with lists of its own."""
    own = {name: list(table) for name, table in tables.items()}
    return Call(impl.give_way, request_id, needed, list(running), own, num_free)


@st.composite
def any_pool(draw: st.DrawFn) -> tuple[str, int, list[tuple[str, int]], dict[str, list[int]], int]:
    """Requests with priorities and tables that share blocks, and one of them that needs some."""
    names = draw(st.permutations("abcde"))[: draw(st.integers(1, 5))]
    priorities = draw(st.sampled_from([[0], [0, 1], [-1, 0, 2]]))
    running = [(name, draw(st.sampled_from(priorities))) for name in names]
    table = st.lists(st.integers(1, 9), max_size=4, unique=True)
    tables = {name: draw(table) for name in names}
    return draw(st.sampled_from(names)), draw(st.integers(1, 6)), running, tables, draw(st.integers(0, 3))


@pytest.mark.exercise("give_way")
class TestGiveWay:
    def test_the_last_admitted(self, impl: ModuleType) -> None:
        """Among equals the last admitted gives way."""
        call = asked(impl, "a", 1, 0)
        call.must_return(["c"], "c came last. Its block 5 is free then; 2 is not, since a names it.")

    def test_until_it_is_enough(self, impl: ModuleType) -> None:
        """One after the other, until enough blocks are free."""
        call = asked(impl, "a", 2, 0)
        call.must_return(["c", "b"], "c leaves one free block, b two more.")

    def test_enough_is_free(self, impl: ModuleType) -> None:
        """Where enough blocks are free, nobody gives way; free ones count."""
        asked(impl, "a", 2, 2).must_return([], "2 are needed and 2 are free.")
        asked(impl, "a", 2, 1).must_return(["c"], "1 was free, and c leaves 1 more.")

    def test_shared_blocks(self, impl: ModuleType) -> None:
        """A block that two of them share comes free when both have gone."""
        tables = {"a": [1], "b": [2, 3], "c": [2, 3]}
        call = asked(impl, "a", 1, 0, tables=tables)
        call.must_return(["c", "b"], "c leaves nothing: b names 2 and 3, too. Then b goes, and both are free.")

    def test_the_least_urgent(self, impl: ModuleType) -> None:
        """The largest priority value gives way first, whenever it was admitted."""
        call = asked(impl, "b", 1, 0, [("a", 5), ("b", 0), ("c", 0)])
        call.must_return(["a"], "a has priority 5, the others 0. Its block 1 comes free.")
        call = asked(impl, "b", 3, 0, [("a", 2), ("b", 0), ("c", 2)])
        call.must_return(["c", "a"], "a and c are equal, and c came later. Both together leave 1, 2 and 5.")

    def test_the_one_that_asks(self, impl: ModuleType) -> None:
        """Who is least urgent itself gives way, and that ends it: no more urgent one ever does."""
        asked(impl, "c", 1, 0).must_return(["c"], "c asks, and c came last.")
        call = asked(impl, "b", 3, 0)
        call.must_return(["c", "b"], "c leaves 1 block, which is not enough. b is next, and asks itself: a stays.")

    @given(pool=any_pool())
    def test_against_a_pool_that_is_emptied(
        self, impl: ModuleType, pool: tuple[str, int, list[tuple[str, int]], dict[str, list[int]], int]
    ) -> None:
        """Any tables: the shortest beginning of the line that leaves enough blocks, or ends with who asks."""
        request_id, needed, running, tables, num_free = pool
        line = [name for name, _ in sorted(reversed(running), key=lambda place: -place[1])]
        for count in range(len(line) + 1):
            left, gone = line[count:], line[:count]
            kept = {block for name in left for block in tables[name]}
            came_free = {block for name in gone for block in tables[name]} - kept
            if num_free + len(came_free) >= needed or request_id in gone:
                break
        asked(impl, request_id, needed, num_free, running, tables).must_return(gone)

    def test_nothing_is_changed(self, impl: ModuleType) -> None:
        """The tables and the line of those that run are the engine's: they are left as they are."""
        running, tables = list(RUNNING), {name: list(table) for name, table in TABLES.items()}
        call = Call(impl.give_way, "a", 2, running, tables, 0)
        result = call.result()
        if running != RUNNING or tables != TABLES:
            call.fail(result, why=f"Afterwards, running is {running} and tables is {tables}.")

    def test_refusals(self, impl: ModuleType) -> None:
        """Who does not run, and a need for nothing, are refused."""
        asked(impl, "d", 1, 0).must_refuse("d does not run.")
        asked(impl, "a", 0, 0).must_refuse("needed < 1.")


# --- what it costs ----------------------------------------------------------------------------------------


def machine(**changes: float) -> dict[str, Any]:
    """The numbers of the example in the task."""
    numbers = {
        "kv_bytes_per_token": 100_000, "num_weights": 10**9, "flops_per_second": 10**12,
        "copy_bytes_per_second": 10**10, "seconds_per_copy": 10**-5,
    }  # fmt: skip
    return numbers | changes


@pytest.mark.exercise("preemption_seconds")
class TestPreemptionSeconds:
    def test_the_example(self, impl: ModuleType) -> None:
        """100 tokens in blocks of 16."""
        why = "Recompute: 2 * 10^9 * 100 / 10^12. Swap: 7 blocks of 1.6 MB, each 0.00016 + 0.00001 s, there and back."
        Call(impl.preemption_seconds, 100, 16, **machine()).must_return((0.2, 14 * 0.00017), why)

    def test_blocks_are_copied_whole(self, impl: ModuleType) -> None:
        """One token costs a swap as much as a full block."""
        why = "Value 2 is the same for 1 token and for 16: one block, there and back."
        for num_tokens in (1, 16):
            want = (num_tokens * 0.002, 2 * 0.00017)
            Call(impl.preemption_seconds, num_tokens, 16, **machine()).must_return(want, why)

    def test_small_blocks_make_many_copies(self, impl: ModuleType) -> None:
        """In blocks of one token, the start of each copy costs as much as its bytes."""
        why = "100 copies of 0.00001 + 0.00001 s, there and back."
        Call(impl.preemption_seconds, 100, 1, **machine()).must_return((0.2, 0.004), why)

    def test_copies_that_start_at_once(self, impl: ModuleType) -> None:
        """Where a copy takes no time to start, only the bytes count."""
        call = Call(impl.preemption_seconds, 32, 16, **machine(seconds_per_copy=0))
        call.must_return((0.064, 4 * 0.00016), "2 blocks of 1.6 MB at 10 GB/s, there and back.")

    @given(num_tokens=st.integers(1, 300), block_size=sizes, weights=st.integers(1, 10**9), start=st.integers(0, 50))
    def test_copy_by_copy(self, impl: ModuleType, num_tokens: int, block_size: int, weights: int, start: int) -> None:
        """Any lengths: the copies are made one by one, in exact fractions."""
        options = machine(num_weights=weights, seconds_per_copy=start * 1e-6)
        swap, left = Fraction(0), num_tokens
        while left > 0:
            left -= block_size
            swap += 2 * (Fraction(block_size * 100_000, 10**10) + Fraction(start, 10**6))
        want = (float(Fraction(2 * weights * num_tokens, 10**12)), float(swap))
        Call(impl.preemption_seconds, num_tokens, block_size, **options).must_return(want)

    def test_refusals(self, impl: ModuleType) -> None:
        """Nothing to move, and speeds that are none, are refused."""
        Call(impl.preemption_seconds, 0, 16, **machine()).must_refuse("num_tokens < 1.")
        Call(impl.preemption_seconds, 5, 0, **machine()).must_refuse("block_size < 1.")
        for name in ("kv_bytes_per_token", "num_weights", "flops_per_second", "copy_bytes_per_second"):
            Call(impl.preemption_seconds, 5, 16, **machine(**{name: 0})).must_refuse(f"{name} is 0.")
        call = Call(impl.preemption_seconds, 5, 16, **machine(seconds_per_copy=-1e-6))
        call.must_refuse("seconds_per_copy < 0.")
