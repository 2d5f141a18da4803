"""Online softmax in plain tensors: against softmax over all keys so far, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from folovllm.course.lessons.online_softmax import online_softmax

rows = st.lists(st.floats(-50, 50), min_size=1, max_size=20)


@given(rows, st.integers(1, 8))
def test_every_state_is_the_attention_over_the_keys_so_far(row: list[float], tile: int) -> None:
    scores = torch.tensor(row, dtype=torch.float64)
    values = torch.arange(2.0 * len(row), dtype=torch.float64).view(-1, 2).cos()
    states = online_softmax(scores, values, tile)
    assert len(states) == -(-len(row) // tile)
    for index, state in enumerate(states):
        seen = slice(0, (index + 1) * tile)
        torch.testing.assert_close(state.attention, scores[seen].softmax(0) @ values[seen])
        assert state.maximum == max(row[seen])
        assert math.log(state.total) + state.maximum == pytest.approx(float(scores[seen].logsumexp(0)))
    assert states[0].rescale == 0 and all(state.rescale <= 1 for state in states)


@given(rows, st.integers(1, 8))
def test_without_the_rescale_it_is_right_if_and_only_if_the_first_tile_has_the_maximum(
    row: list[float], tile: int
) -> None:
    scores = torch.tensor(row, dtype=torch.float64)
    values = torch.ones(len(row), 1, dtype=torch.float64)
    right, wrong = (online_softmax(scores, values, tile, rescale=rescale)[-1] for rescale in (True, False))
    if max(row[:tile]) == max(row):
        assert wrong.total == pytest.approx(right.total)
    elif max(row) - max(row[:tile]) > 0.01:
        assert wrong.total > 1.0001 * right.total or right.total > 100


def test_what_is_no_row_is_refused() -> None:
    row, values = torch.zeros(3), torch.zeros(3, 2)
    for scores, others in ((torch.zeros(0), torch.zeros(0, 2)), (row, values[:2]), (row[None], values), (row, row)):
        with pytest.raises(ValueError, match=r"scores=\[.*\], values=\[.*\] are not valid; allowed"):
            online_softmax(scores, others, 2)
    with pytest.raises(ValueError, match=r"tile=0 is not valid; allowed: a number of keys >= 1"):
        online_softmax(row, values, 0)
