"""The left-padded K/V of several requests, against a plain dictionary of tensors without any padding."""

from __future__ import annotations

import gc
import weakref

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from folovllm.runner.hf.padded_cache import PaddedBatch, PaddedCaches, layers

LAYERS, HEADS, DIM = 2, 2, 3
PADDING = 7.0  # what a forward leaves in the columns of nobody: anything finite


def write(batch: PaddedBatch, new: list[list[Tensor]]) -> None:
    """What a forward does: append columns, in which row i's newest tokens stand on the right.

    new: per layer and row, keys and values as one tensor [2, Hkv, L_i, D].
    """
    columns = max(row.shape[2] for row in new[0])
    for layer in range(LAYERS):
        block = torch.full((2, len(new[layer]), HEADS, columns, DIM), PADDING)  # [2, B, Hkv, L, D]
        for i, row in enumerate(new[layer]):
            block[:, i, :, columns - row.shape[2] :] = row
        batch.cache.update(block[0], block[1], layer)
    batch.lengths = [length + row.shape[2] for length, row in zip(batch.lengths, new[0], strict=True)]


def random_tokens(length: int) -> Tensor:
    """K/V of `length` tokens in every layer, [layers, 2, Hkv, length, D]."""
    return torch.randn(LAYERS, 2, HEADS, length, DIM)


def stacked(caches: PaddedCaches, request_id: str) -> Tensor:
    """A request's rows as `random_tokens` has them."""
    rows = caches._home[request_id].rows(request_id)
    return torch.stack([torch.stack(pair) for pair in rows])  # [layers, 2, Hkv, length, D]


class CacheMachine(RuleBasedStateMachine):
    """Prompts come, requests decode in any company and order, and go. Nobody's K/V ever changes by it."""

    @initialize()
    def start(self) -> None:
        torch.manual_seed(0)
        self.caches = PaddedCaches()
        self.expected: dict[str, Tensor] = {}
        self.last: tuple[list[str], PaddedBatch] | None = None  # the last decode, while everyone in it stays
        self.made = 0

    def new_id(self) -> str:
        self.made += 1
        return str(self.made)

    @precondition(lambda self: len(self.expected) < 6)
    @rule(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3))
    def prefill(self, lengths: list[int]) -> None:
        request_ids = [self.new_id() for _ in lengths]
        batch = self.caches.add(request_ids)
        assert batch.width == 0 and batch.request_ids == request_ids
        tokens = [random_tokens(length) for length in lengths]
        write(batch, [[t[layer] for t in tokens] for layer in range(LAYERS)])
        self.expected |= dict(zip(request_ids, tokens, strict=True))

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), steps=st.integers(1, 3))
    def decode(self, data: st.DataObject, steps: int) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.expected)), min_size=1, unique=True), "chosen")
        for step in range(steps):
            batch = self.caches.gather(chosen)
            assert batch.request_ids == chosen
            assert batch.lengths == [self.expected[i].shape[3] for i in chosen]
            if step or (self.last is not None and self.last[0] == chosen):
                assert self.last is not None and batch is self.last[1]  # the same requests: nothing is copied
            self.last = (chosen, batch)
            tokens = [random_tokens(1) for _ in chosen]
            write(batch, [[t[layer] for t in tokens] for layer in range(LAYERS)])
            for i, t in zip(chosen, tokens, strict=True):
                self.expected[i] = torch.cat([self.expected[i], t], dim=3)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        victim = data.draw(st.sampled_from(sorted(self.expected)), "victim")
        del self.expected[victim]
        self.caches.drop(victim)
        self.caches.drop(victim)  # twice does no harm
        if self.last is not None and victim in self.last[0]:
            self.last = None

    @invariant()
    def everybody_has_their_own_tokens(self) -> None:
        assert len(self.caches) == len(self.expected)
        for request_id, tokens in self.expected.items():
            assert torch.equal(stacked(self.caches, request_id), tokens)

    @invariant()
    def a_batch_is_as_wide_as_the_longest_it_was_made_for(self) -> None:
        for batch in self.caches._home.values():
            assert batch.width == max(batch.lengths)
            assert all(keys.shape == values.shape for keys, values in layers(batch.cache))

    def teardown(self) -> None:
        if hasattr(self, "caches"):
            batches = [weakref.ref(batch) for batch in self.caches._home.values()]
            for request_id in self.expected:
                self.caches.drop(request_id)
            self.last = None
            assert len(self.caches) == 0 and all(batch() is None for batch in batches)


TestPaddedCaches = CacheMachine.TestCase
TestPaddedCaches.settings = settings(max_examples=60, stateful_step_count=20, deadline=None, derandomize=True)


def filled(lengths: dict[str, int]) -> tuple[PaddedCaches, PaddedBatch]:
    caches = PaddedCaches()
    batch = caches.add(list(lengths))
    write(batch, [[torch.randn(2, HEADS, n, DIM) for n in lengths.values()] for _ in range(LAYERS)])
    return caches, batch


def test_rows_are_views_of_the_right_columns_without_padding():
    _, batch = filled({"a": 3, "b": 5, "c": 1})
    assert batch.width == 5
    for row, (request_id, length) in enumerate((("a", 3), ("b", 5), ("c", 1))):
        for (keys, values), (all_keys, all_values) in zip(batch.rows(request_id), layers(batch.cache), strict=True):
            assert keys.shape == values.shape == (HEADS, length, DIM)
            assert torch.equal(keys, all_keys[row, :, 5 - length :]) and not (keys == PADDING).any()
            assert torch.equal(values, all_values[row, :, 5 - length :]) and not (values == PADDING).any()
            assert keys.untyped_storage().data_ptr() == all_keys.untyped_storage().data_ptr()


def test_while_the_same_requests_run_nothing_is_copied():
    caches, batch = filled({"a": 3, "b": 5})
    assert caches.gather(["a", "b"]) is batch
    assert caches.gather(["b", "a"]) is not batch  # rows stand in the order of the step
    again = caches.gather(["b", "a"])
    assert caches.gather(["b", "a"]) is again


def test_a_rectangle_that_somebody_has_left_is_not_taken_for_theirs_again():
    """b goes on alone and comes back: what stands in the old rectangle is out of date."""
    caches, batch = filled({"a": 3, "b": 5})
    alone = caches.gather(["b"])
    write(alone, [[torch.randn(2, HEADS, 1, DIM)] for _ in range(LAYERS)])
    both = caches.gather(["a", "b"])
    assert both is not batch and both.lengths == [3, 6] and both.width == 6


def test_when_the_longest_leaves_its_columns_go_too():
    caches, batch = filled({"a": 3, "b": 5, "c": 1})
    caches.drop("b")
    smaller = caches.gather(["a", "c"])
    assert smaller is not batch and smaller.width == 3 and smaller.lengths == [3, 1]
    reference = weakref.ref(batch)
    del batch
    gc.collect()
    assert reference() is None  # the old rectangle is given back


def test_a_copied_rectangle_has_zeros_where_nobody_stands():
    """Whatever a forward has left there: a NaN in a masked column would reach every row, for 0 times NaN is NaN."""
    caches = PaddedCaches()
    batch = caches.add(["a", "b"])
    write(batch, [[torch.randn(2, HEADS, n, DIM) for n in (2, 4)] for _ in range(LAYERS)])
    for keys, values in layers(batch.cache):
        keys[0, :, :2] = values[0, :, :2] = float("nan")
    write(caches.add(["c"]), [[torch.randn(2, HEADS, 3, DIM)] for _ in range(LAYERS)])
    for keys, values in layers(caches.gather(["a", "b", "c"]).cache):
        assert keys.shape == values.shape == (3, HEADS, 4, DIM)
        for tensor in (keys, values):
            assert (tensor[0, :, :2] == 0).all() and (tensor[2, :, :1] == 0).all()
            assert tensor.isfinite().all() and (tensor[0, :, 2:] != 0).all()
