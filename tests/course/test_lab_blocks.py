"""Lab 4: what its prose says, the committed outputs have to show. (What holds for every lab: `test_notebooks`.)"""

from __future__ import annotations

import re

from folovllm.course.lessons.fragmentation import SHARES, draw_requests, replay
from tests.course.test_notebooks import outputs_as_text, prose, table

LAB = "04_blocks"


def test_lab_4_shows_the_textbooks_numbers_put_right() -> None:
    assert table(LAB, "tokens | blocks of 16") == [
        ["100", "7", "10.71%", "97.6%"],
        ["500", "32", "2.34%", "87.8%"],
        ["1000", "63", "0.79%", "75.6%"],
        ["2000", "125", "0.00%", "51.2%"],
    ]
    shown = outputs_as_text(LAB)
    for line in (
        "800 KiB per token, room for 15,728 tokens",
        "7 requests at once in regions of 2048",
        "30 requests of 500 tokens in 983 blocks",
        "gaps (start: MB): {0: 32, 56: 8, 64: 64} free: 104",
        "64 MB at: 64",
        "33 MB at: None",
        "address 10,000 lies at 14096",
        "token 37 lies in slot 149",
    ):
        assert line in shown


def test_lab_4_ranks_the_policies_as_a_replay_now_does() -> None:
    rows = {row[0]: row[1:] for row in table(LAB, "policy | used")}
    assert list(rows) == ["max", "pow2", "oracle", "paged"]
    for policy, (used, running, steps, gave_way) in rows.items():
        run = replay(draw_requests(200, seed=0), policy)
        assert set(run.shares) == set(SHARES)
        assert [used, running, steps, gave_way] == [
            *(f"{run.shares['used']:.1%}", f"{run.mean_running:.1f}", str(len(run.steps)), str(run.preemptions))
        ]
    shares = [float(row[0].rstrip("%")) for row in rows.values()]
    assert shares == sorted(shares)
    assert 45 < shares[2] < 55  # "about half of the memory holds nothing"
    assert int(rows["paged"][3]) > 0  # "somebody gives way"


def test_lab_4_shares_blocks_and_copies_one_per_fork() -> None:
    shown = outputs_as_text(LAB)
    samples = re.findall(r"^sample \d: (.*)$", shown, re.MULTILINE)
    assert len(samples) == len(set(samples)) == 3
    assert "blocks copied: 2" in shown
    (forks,) = re.findall(r"sharing saves up to (\d+)% of the blocks", shown)
    (beams,) = re.findall(r"with a beam search of width 4: up to (\d+)%", shown)
    assert 0 < int(forks) < int(beams) < 75  # four that share everything would save three quarters


def test_lab_4_breaks_tables_in_two_ways_of_four() -> None:
    rows = {row[0]: row[1:] for row in table(LAB, "first wrong token")}
    assert rows["renamed"] == rows["full blocks shuffled"] == ["none"] * 4
    # A table of blocks of 8 grows at the first multiple of 8 that is not in the prompt.
    (lengths,) = re.findall(r"prompt tokens: \[(.*)\]", outputs_as_text(LAB))
    earliest = [-(-int(n) // 8) * 8 - int(n) + 1 for n in lengths.split(", ")]
    assert earliest == [1, 8, 4, 8]
    assert "number 1 (16 - 16 + 1), 8, 4 and 8, counted from 0" in prose(LAB)
    assert all(int(found) >= least for found, least in zip(rows["reversed"], earliest, strict=True))
    assert sum(int(found) == least for found, least in zip(rows["reversed"], earliest, strict=True)) >= 3
    assert all(1 <= int(found) <= 3 for found in rows["a neighbour's block"])
    right, wrong = re.findall(r"^(?:right|reversed): +(.*)$", outputs_as_text(LAB), re.MULTILINE)
    assert right != wrong and right[:10] == wrong[:10]


def test_lab_4_gives_way_in_two_modes_and_changes_no_token() -> None:
    recompute, swap = table(LAB, "mode | same tokens")
    assert recompute[1] == swap[1] == "yes"
    assert recompute[2:4] == swap[2:4] == ["2", "56"]  # "the steps are the same in both modes"
    assert int(recompute[4]) > int(swap[4]) == 16 + 17 + 21 + 17
    assert recompute[5] == "0" and int(swap[5]) > 0
    blocks = [-(-(n + 32 - 1) // 8) for n in (16, 17, 21, 17)]
    assert f"need {sum(blocks)} blocks of 8 in the end" in prose(LAB)


def test_lab_4_runs_four_times_as_many_in_the_same_memory() -> None:
    m2, m3 = table(LAB, "milestone | requests at once")
    assert (m2[:2], m3[:2]) == (["m2", "4"], ["m3", "16"])
    assert int(m2[2]) > 2 * int(m3[2])
    assert m2[3] == "4096" and int(m2[4]) < 0.3 * 4096  # "most of the reserved room stays empty"
    assert int(m3[4]) > 0.9 * int(m3[3])
    assert "same tokens: True" in outputs_as_text(LAB)
