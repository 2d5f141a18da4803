"""Lab 6: what its prose says, the committed outputs have to show. (What holds for every lab: `test_notebooks`.)"""

from __future__ import annotations

import re

from tests.course.test_notebooks import outputs_as_text, prose, table

LAB = "06_chunked_prefill"


def test_lab_6_cuts_a_triangle_into_rectangles() -> None:
    shown = outputs_as_text(LAB)
    assert "[[4, 4], [4, 8], [2, 10]] [10, 26, 19]" in shown  # 1+2+3+4, 5+6+7+8, 9+10
    assert "together: 55" in shown
    assert "with 10, 26 and 19 True cells: 55 = 10 * 11 / 2" in prose(LAB)


def test_lab_6_tells_right_chunks_from_wrong_ones() -> None:
    right, same, *wrong = (float(row[1]) for row in table(LAB, "way | largest difference"))
    assert max(right, same) < 1e-4
    assert len(wrong) == 3 and min(wrong) > 3  # more than a standard deviation


def test_lab_6_samples_when_the_prompt_has_caught_up() -> None:
    rows = [[int(cell) for cell in row] for row in table(LAB, "step | of a")]
    assert [row[3] for row in rows] == [62, 62, 26, 1, 1, 1]
    assert [row[5] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert [row[4] for row in rows][:3] == [62, 124, 150]
    assert all(row[1:3] == [1, 1] for row in rows[:3])
    ((said, known),) = re.findall(r"the model would say (\d+); the prompt goes on with (\d+)", outputs_as_text(LAB))
    assert said != known


def test_lab_6_shows_who_pays_and_which_percentile_misleads() -> None:
    rows = [[float(cell.split()[0]) for cell in row] for row in table(LAB, "budget | largest ITL")]
    assert [row[0] for row in rows] == [64, 128, 256, 512, 2048]
    pauses, everywhere, ttfts = ([row[i] for row in rows] for i in (1, 2, 3))
    assert pauses == sorted(pauses) and pauses[-1] > 3 * pauses[0]
    assert ttfts[0] > ttfts[-1]
    assert max(everywhere[:-1]) > 2 * everywhere[-1]  # "it says that the largest budget is the best one"
    assert pauses[-1] > 5 * everywhere[-1]


def test_lab_6_lets_short_prompts_past_a_long_one() -> None:
    none, limited = table(LAB, "threshold | first token of long")
    assert none == ["none", "4", "5", "5", "5"]
    assert limited == ["64", "16", "1", "1", "1"]


def test_lab_6_refuses_what_no_chunk_can_make_fit() -> None:
    shown = outputs_as_text(LAB)
    assert "100,000 tokens: 48.8 GiB of K/V" in shown
    assert "can never run: it may grow to 604 tokens" in shown and "take 38 blocks of 16" in shown
