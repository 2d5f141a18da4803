"""The figures of ragged batches: what is drawn, read back from the figures' own artists."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.patches import ConnectionPatch, Rectangle

from folovllm.course.lessons.online_softmax import online_softmax
from folovllm.course.viz import ragged
from tests.course.test_viz import cells, texts, x_labels, y_labels

requests = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=3)


@given(requests)
def test_a_mask_has_a_cell_for_each_pair_that_may_see_each_other(shapes: list[tuple[int, int]]) -> None:
    codes = ragged.ragged_codes([new for new, _ in shapes], [new + past for new, past in shapes])
    queries = [(r, past + i) for r, (new, past) in enumerate(shapes) for i in range(new)]
    keys = [(r, j) for r, (new, past) in enumerate(shapes) for j in range(new + past)]
    want = [[mine + 1 if mine == other and j <= i else 0 for other, j in keys] for mine, i in queries]
    assert codes.tolist() == want


def test_masks_are_labelled_where_requests_begin() -> None:
    figure = ragged.ragged_masks({"one": ((2, 1), (2, 3)), "two": ((1, 1), (4, 1))}, "ab")
    one, two = figure.axes
    assert cells(one).tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 2, 2, 2]]
    assert cells(two).tolist() == [[1, 1, 1, 1, 0], [0, 0, 0, 0, 2]]
    assert (y_labels(one), x_labels(one)) == (["0", "2", "3"], ["0", "2", "5"])
    assert (y_labels(two), x_labels(two)) == (["0", "1", "2"], ["0", "4", "5"])
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["within a", "within b", "masked"]


def test_padded_and_ragged_are_the_same_texts() -> None:
    above, below = ragged.padded_and_ragged((2, 4, 3), "abc").axes
    assert cells(above).tolist() == [[0, 0, 1, 1], [2, 2, 2, 2], [0, 3, 3, 3]]
    assert cells(below).tolist() == [[1, 1, 2, 2, 2, 2, 3, 3, 3]]
    assert above.get_title("left") == "padded [3, 4]: 12 cells, 25.0% padding"
    assert below.get_title("left") == "ragged [9]: 9 tokens"
    assert x_labels(below) == ["0", "2", "6", "9"]
    assert above.get_xlim() == below.get_xlim()  # cells of one width


def test_every_new_token_has_an_arrow_to_its_slot_and_older_ones_a_letter() -> None:
    (ax,) = ragged.slot_arrows([0, 2, 3], [2, 4], [6, 7, 3], [[3], [2, 1]], 2, 4, "ab").axes
    arrows = [patch for patch in ax.patches if isinstance(patch, ConnectionPatch)]
    assert [arrow.get_label() for arrow in arrows] == ["0 to 6", "1 to 7", "2 to 3"]
    assert [round(arrow.xy2[0]) for arrow in arrows] == [6, 7, 3]
    pool = {round(t.get_position()[0]): t.get_text() for t in ax.texts if t.get_position()[1] == 3.4 and t.get_text()}
    # b's first two tokens are in block 2, its third at the beginning of block 1, and its new one behind it.
    assert pool == {6: "0", 7: "1", 4: "b", 5: "b", 2: "b", 3: "3"}
    frames = [p for p in ax.patches if isinstance(p, Rectangle) and p.get_width() == 2]
    assert len(frames) == 4 and "null block" in texts(ax)


@given(st.integers(1, 12), st.integers(0, 20), st.sampled_from([1, 2, 4]), st.sampled_from([2, 4, 8]))
def test_a_tile_needs_a_mask_if_somebody_sees_a_part_of_it(new: int, past: int, block_q: int, tile: int) -> None:
    """Against the pairs themselves. A tile that all see may still be cut off by the end of the text."""
    kinds = ragged.tile_kinds(new, past + new, block_q, tile)
    for block in range(len(kinds)):
        rows = range(block * block_q, min((block + 1) * block_q, new))
        # The kernel's last block is a whole one, whose rows beyond the request are nobody's.
        last = min(past + (block + 1) * block_q, past + new)
        for column in range(kinds.shape[1]):
            keys = range(column * tile, (column + 1) * tile)
            seen = [j <= past + i for i in rows for j in keys]
            if kinds[block, column] == 0:
                assert not any(seen)
            else:
                assert any(seen) and column * tile < last
            assert (kinds[block, column] == 2) == (all(seen) and keys[-1] < past + new)


def test_tiles_are_drawn_with_crosses_on_hidden_pairs() -> None:
    first, second = ragged.kernel_tiles([4, 1], [4, 5], 2, 2, "ab").axes
    assert cells(first).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [2, 2, 1, 1], [2, 2, 1, 1]]
    (crosses,) = [c for c in first.collections if c.get_label() == ragged.UNSEEN]
    assert np.asarray(crosses.get_offsets()).tolist() == [[1.0, 0.0], [3.0, 2.0]]
    assert cells(second).tolist() == [[2, 2, 2, 2, 1]]


def test_online_softmax_ends_on_the_exact_lines_only_with_the_rescale() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.0], dtype=torch.float64)
    values = torch.tensor([[1.0], [2.0], [0.0], [1.0], [5.0]], dtype=torch.float64)
    arms = [online_softmax(scores, values, 2, rescale=rescale) for rescale in (True, False)]
    exact = float((scores.softmax(0) @ values)[0])
    top, middle, bottom = ragged.online_softmax_steps(scores.tolist(), 2, *arms, exact).axes
    assert [patch.get_height() for patch in top.patches[:5]] == scores.tolist()
    assert "rescale x 0.135" in texts(top)
    for ax, line_at in ((middle, float(torch.exp(scores - 3).sum())), (bottom, exact)):
        found = {line.get_label(): [float(y) for y in line.get_ydata()] for line in ax.lines}
        assert found["all keys at once"] == pytest.approx([line_at] * 2)
        assert found["with the rescale"][-1] == pytest.approx(line_at)
        assert abs(found["without it"][-1] - line_at) > 0.05


@pytest.mark.parametrize(
    "draw",
    [
        lambda: ragged.ragged_masks({"x": ((2,), (1,))}, "a"),
        lambda: ragged.padded_and_ragged((3, 0), "ab"),
        lambda: ragged.padded_and_ragged((3, 4), "a"),
        lambda: ragged.kernel_tiles([], [], 2, 2, ""),
        lambda: ragged.slot_arrows([0, 1], [0], [0], [[1]], 2, 2, "a"),
    ],
)
def test_lengths_that_do_not_belong_together_are_refused(draw: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="with 1 <= query_len <= kv_len"):
        draw()


def test_states_of_another_number_of_tiles_are_refused() -> None:
    state = online_softmax(torch.zeros(4), torch.zeros(4, 1), 2)
    with pytest.raises(ValueError, match=r"states=2, without_rescale=2 are not valid; allowed: 4"):
        ragged.online_softmax_steps([0.0] * 4, 1, state, state, 0.0)
