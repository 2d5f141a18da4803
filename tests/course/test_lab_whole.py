"""Lab 8: what its prose says, the committed outputs have to show. (What holds for every lab: `test_notebooks`.)"""

from __future__ import annotations

import re

from tests.course.test_notebooks import outputs_as_text, table

LAB = "08_the_whole_engine"


def test_lab_8_serves_the_same_requests_everywhere() -> None:
    shown = outputs_as_text(LAB)
    assert "same tokens everywhere: True" in shown
    (prompts, outputs) = (
        [int(n) for n in found.split(", ")]
        for found in re.findall(r"prompt tokens: \[(.*)\] output tokens: \[(.*)\]", shown)[0]
    )
    arms = {row[0]: row[1:] for row in table(LAB, "arm | forwards")}
    assert list(arms) == ["M1", "M2, loop", "M2, padded", "M3", "M4"]
    assert arms["M1"][0] == arms["M2, loop"][0] == str(sum(outputs))  # one forward per token
    assert int(arms["M2, padded"][0]) < sum(outputs) / 2
    for arm in ("M1", "M2, loop", "M2, padded", "M3"):
        assert int(arms[arm][1]) == sum(prompts) and arms[arm][2] == "0"
    computed, found = (int(cell) for cell in arms["M4"][1:3])
    assert computed + found == sum(prompts) and found > 0
    padding = {arm: cells[3] for arm, cells in arms.items()}
    assert padding["M2, padded"] != "0%" and {padding[a] for a in ("M1", "M2, loop", "M3", "M4")} == {"0%"}
    pause = {arm: int(cells[4].split()[0]) for arm, cells in arms.items()}
    assert pause["M4"] < pause["M3"] and pause["M1"] < pause["M3"]


def test_lab_8_finds_no_setting_that_changes_a_token() -> None:
    assert "settings: 24 all the same: True" in outputs_as_text(LAB)


def test_lab_8_follows_a_follower() -> None:
    shown = outputs_as_text(LAB)
    rows = table(LAB, "step | the second request")
    states = [row[1] for row in rows]
    first = states.index("running")
    assert first > 0 and set(states[:first]) == {"not in the step"}
    lengths = [int(n) for n in re.findall(r"prompt tokens: \[(\d+), (\d+), (\d+)\]", shown)[0]]
    found = int(rows[first][2])
    assert found > 0 and found % 16 == 0
    prompt = 0
    for row in rows[first:]:
        prompt += int(row[3] or 0)
        if row[5] != "0":
            break
    assert found + prompt == lengths[1]
    assert any(state == "finished_length_capped" for state in states)


def test_lab_8_fits_its_machine_and_finds_no_budget() -> None:
    shown = outputs_as_text(LAB)
    (error,) = re.findall(r"median error of the other half: (\d+)%", shown)
    assert int(error) < 50
    decode, *_ = table(LAB, "step | fixed, ms")
    fixed, tokens, pairs = map(float, decode[1:])
    assert fixed > tokens and fixed > pairs  # "the fixed part is most of a decode step"
    rows = {int(row[0]): [float(cell.split()[0]) for cell in row[1:]] for row in table(LAB, "budget | passes")}
    passes, first, longest, pause, ttft = rows[108]
    assert 25.5 < first < 26.5 and 40.5 < longest < 41.5 and pause == longest and passes == 41
    assert ttft > 1200
    assert not any(itl <= 42 and long <= 1200 for *_, itl, long in rows.values())


def test_lab_8_breaks_two_tables_and_one_of_them_in_vain() -> None:
    (found,) = re.findall(r"^\{'M3, .*\}$", outputs_as_text(LAB), re.MULTILINE)
    same = dict(re.findall(r"['\"](M3, [^:]*)['\"]: (\d+)", found))
    assert same["M3, blocks of 4"] == same["M3, blocks of 16"] == same["M3, first two swapped"] == "9"
    assert int(same["M3, somebody else's block"]) < 9
