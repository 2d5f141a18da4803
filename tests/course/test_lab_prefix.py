"""Lab 7: what its prose says, the committed outputs have to show. (What holds for every lab: `test_notebooks`.)"""

from __future__ import annotations

import re

from tests.course.test_notebooks import outputs_as_text, table

LAB = "07_prefix_caching"


def test_lab_7_has_a_key_per_beginning() -> None:
    shown = outputs_as_text(LAB)
    keys = {name: re.findall(r"'(\w+)'", rest) for name, rest in re.findall(r"^([a-d]) \[(.*)\]$", shown, re.MULTILINE)}
    assert keys["a"] == keys["b"]
    assert keys["a"][0] == keys["c"][0] and keys["a"][1] != keys["c"][1]
    assert keys["d"][0] != keys["a"][0] and keys["d"][1] != keys["a"][1]  # the same words after another beginning
    assert "full blocks: 8 keys: 5" in shown


def test_lab_7_breaks_keys_and_comparison_one_after_the_other() -> None:
    chained, no_parent, careless = table(LAB, "keys | found by the third")
    assert chained[1:] == ["16", "32", "8"]
    assert no_parent[1:] == ["16", "16", "8"]  # finds less, and is right
    assert careless[1] == "32" and int(careless[3]) < 8  # finds too much, and is wrong


def test_lab_7_computes_a_block_of_a_full_hit() -> None:
    rows = table(LAB, "tokens | found the second time")
    assert [row[0] for row in rows] == ["15", "16", "17", "32", "33"]
    assert [row[1] for row in rows] == ["0", "0", "16", "16", "32"]
    assert {row[3] for row in rows} == {"yes"}


def test_lab_7_computes_a_system_prompt_twenty_times_ten_times_and_once() -> None:
    rows = {(row[0], row[1]): [int(cell) for cell in row[2:4]] for row in table(LAB, "engine | budget")}
    assert "same tokens everywhere: True" in outputs_as_text(LAB)
    (lengths,) = re.findall(r"^tokens: \[(.*)\]$", outputs_as_text(LAB), re.MULTILINE)
    total = sum(map(int, lengths.split(", ")))
    assert all(sum(counts) == total for counts in rows.values())
    assert sum(map(int, lengths.split(", ")[:9])) < 2048 < sum(map(int, lengths.split(", ")[:10]))
    shared = rows["M4", "2048"][1] // 19  # the full blocks that all have in common
    assert shared % 16 == 0
    assert rows["M4", "2048"] == rows["M4", "8192"] == [total - 19 * shared, 19 * shared]
    assert rows["finds what is written", "2048"] == [total - 10 * shared, 10 * shared]
    assert rows["finds what is written", "8192"] == rows["no cache", "8192"] == rows["no cache", "2048"] == [total, 0]


def test_lab_7_keeps_heads_and_loses_tails() -> None:
    tail_first, head_first = table(LAB, "order | blocks in the cache")
    assert (tail_first[2], head_first[2]) == ("4", "0")


def test_lab_7_finds_what_was_said_and_nothing_of_a_stranger() -> None:
    assert table(LAB, "prompt | tokens | found") == [
        ["turn 1", "20", "0"],
        ["turn 2", "38", "24"],  # 27 tokens have K/V
        ["turn 3", "56", "44"],  # 38 + 7
        ["the stranger", "20", "0"],
    ]
    without, with_it = table(LAB, "engine | gave way")
    assert int(without[1]) > 0 and int(with_it[1]) > 0
    assert int(with_it[2]) < int(without[2])
