"""Lab 5: what its prose says, the committed outputs have to show. (What holds for every lab: `test_notebooks`.)"""

from __future__ import annotations

import ast
import re
from itertools import pairwise

from tests.course.test_notebooks import outputs_as_text, prose, table

LAB = "05_ragged_batching"


def test_lab_5_gains_where_lengths_differ() -> None:
    unequal, alike = table(LAB, "lengths | padded, ms")
    assert float(unequal[4]) > 2  # "well under half of the rectangle's time"
    assert 0.6 < float(alike[4]) < 1.5  # "about even"
    assert float(unequal[3]) > float(unequal[2]) and float(alike[3]) > float(alike[2])  # "What they lack is company"
    assert max(float(row[5]) for row in (unequal, alike)) < 1e-3
    assert f"{548 / 900:.1%}".replace("%", " %") in prose(LAB) and f"{2 / 111:.1%}".replace("%", " %") in prose(LAB)


def test_lab_5_springs_the_trap() -> None:
    rows = {int(row[0][0]): [float(x) for x in row[1:]] for row in table(LAB, "largest difference from the text alone")}
    (spread,) = re.findall(r"standard deviation of the logits: ([\d.]+)", outputs_as_text(LAB))
    assert all(apart[0] < 1e-3 for apart in rows.values())  # "The first text is right in all ways"
    assert all(max(rows[way]) < 1e-3 for way in (1, 2, 3))
    assert all(min(rows[way][1:]) > float(spread) for way in (4, 5, 6))
    assert f"standard deviation is about {float(spread):.0f}" in prose(LAB)


def test_lab_5_shows_a_step_of_the_engine() -> None:
    shown = dict(re.findall(r"^(\w+) +(\[.*\])$", outputs_as_text(LAB), re.MULTILINE))
    step = {name: ast.literal_eval(numbers) for name, numbers in shown.items()}
    starts, lens = step["query_start_loc"], step["seq_lens"]
    news = [end - start for start, end in pairwise(starts)]
    assert sorted(news) == [1, 1, 17] and starts[-1] == 19  # "T is 17 + 1 + 1 = 19"
    assert all(len(step[name]) == 19 for name in ("token_ids", "positions", "slot_mapping"))
    positions = [p for new, length in zip(news, lens, strict=True) for p in range(length - new, length)]
    assert step["positions"] == positions
    owners = [request for request, new in enumerate(news) for _ in range(new)]
    homes = [step["block_table"][r][p // 8] * 8 + p % 8 for r, p in zip(owners, positions, strict=True)]
    assert step["slot_mapping"] == homes
    pairs = sum(position + 1 for position in positions)
    assert f"T = 19 new tokens, S = {sum(lens)} keys: {pairs} of {19 * sum(lens)} pairs" in outputs_as_text(LAB)


def test_lab_5_scrambles_tables_and_a_decode_does_not_always_notice() -> None:
    rows = {int(row[0][0]): [cell == "same" for cell in row[1:]] for row in table(LAB, "change | a decode")}
    assert rows == {1: [True, False], 2: [True, True], 3: [False, False], 4: [False, False]}


def test_lab_5_needs_the_rescale_unless_scores_descend() -> None:
    rows = {tuple(row[:2]): (row[2], float(row[3])) for row in table(LAB, "order of the scores | rescale")}
    exact = rows["as above", "yes"][0]
    for (order, rescale), (total, apart) in rows.items():
        right = rescale == "yes" or order == "descending"
        assert (total == exact) == right and (apart < 1e-12) == right
    assert float(rows["as above", "no"][0]) > float(exact)  # "The sum is too large"


def test_lab_5_runs_the_kernel_and_merges_segments() -> None:
    shown = outputs_as_text(LAB)
    assert "backend: triton" in shown
    rows = table(LAB, "block size | query heads")
    assert len(rows) == 4 and all(float(row[2]) < 1e-5 for row in rows)
    (merged,) = re.findall(r"^merged: off by (\S+)$", shown, re.MULTILINE)
    (plain,) = re.findall(r"^the mean of the four results: off by (\S+)$", shown, re.MULTILINE)
    assert float(merged) < 1e-12 < 0.01 < float(plain)
