"""What chapter 8 says: of its results, of the layers, and of the rooms that are not built."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from folovllm.course.measure.chapter_8_latency import latency

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))

from claims import chapter_8, ledger, registry  # noqa: E402

PAGE = (ROOT / "docs" / "chapters" / "08_the_whole_engine.md").read_text(encoding="utf-8")


# --- one workload -------------------------------------------------------------------------------------------------


def test_what_it_says_of_w3_holds_in_its_results() -> None:
    data = ledger.result(chapter_8.WATERFALL)
    assert data["base"] == "hf:sequential" and len(data["rounds"]) >= 3
    requests = data["workloads"]["w3"]["requests"]
    assert len(requests) == 16 and {tuple(r[:2]) for r in requests} == {(400, 32)}
    summary = data["summary"]["w3"]
    gains = {system: chapter_8.w3_over_before(system) for system in chapter_8.W3}
    assert gains["hf:sequential"] is None
    medians = {system: gain["median"] for system, gain in gains.items() if gain is not None}
    assert all(0.75 < medians[system] < 1.35 for system in ("m1", "m2:loop"))  # "two of them have a factor of about 1"
    assert medians["m2:padded"] > 1.5 and medians["m4"] > 1.5
    assert summary["m4"]["ratio_to_base"]["median"] > max(
        summary[system]["ratio_to_base"]["median"] for system in chapter_8.W3 if system != "m4"
    )
    # "M3's is hardly less", "on this workload paging saves nothing"
    held = {system: numbers["kv_reserved_bytes"]["median"] for system, numbers in summary.items()}
    assert held["m2:padded"] >= held["m3"] > 0.95 * held["m2:padded"]
    assert held["m4"] < held["m3"] / 3
    assert held["hf:sequential"] < held["m2:padded"] / 10
    assert chapter_8.used_share(summary["m2:padded"]) > 0.95
    assert summary["m2:padded"]["padding_share"]["median"] == 0  # "on w3 they do not [differ]"
    prompts = {current["runs"]["w3"]["m4"]["engine"]["stats"]["prompt_tokens_computed"] for current in data["rounds"]}
    assert prompts == {384 + 16 * 16}


def test_what_it_says_of_its_own_workload_holds_in_its_results() -> None:
    data = ledger.result(chapter_8.WHOLE)
    assert data["same_tokens"]
    requests, arms = data["requests"], data["summary"]["arms"]
    assert len(requests) == 11 and sum(late for *_, late in requests) == 4  # the document, and three with it
    prompts, outputs = sum(r[0] for r in requests), sum(r[1] for r in requests)
    for arm in ("m0", "m1", "m2-loop", "m2-padded", "m3"):
        computed = arms[arm]["prompt_tokens_computed"]
        assert computed["median"] == computed["min"] == computed["max"] == prompts
    for arm in ("m0-recompute", "m0", "m1", "m2-loop"):
        assert arms[arm]["forwards"]["median"] == outputs
    m4 = arms["m4"]
    assert m4["prompt_tokens_computed"]["median"] + m4["cached_tokens"]["median"] == prompts
    assert m4["cached_tokens"]["median"] > 0
    assert arms["m0-recompute"]["prompt_tokens_computed"]["median"] == sum(r[0] * r[1] for r in requests)
    assert arms["m3"]["padding_share"]["median"] == m4["padding_share"]["median"] == 0
    assert arms["m2-padded"]["padding_share"]["median"] > 0.1
    # Memory: a region of max_model_len for each, blocks for what is there, and shared ones once.
    held = {arm: numbers["kv_reserved_bytes"]["median"] for arm, numbers in arms.items()}
    assert held["m2-padded"] > 3 * held["m3"] > 3 * held["m4"]
    assert chapter_8.used_share(arms["m2-padded"]) < 0.5 and chapter_8.used_share(arms["m3"]) > 0.9
    # Time: the longest pause is what chunks are for.
    assert m4["max_itl_s"]["median"] < arms["m3"]["max_itl_s"]["median"]
    assert arms["m0"]["over_before"]["median"] > 1.5
    assert arms["m3"]["over_before"]["median"] > 1.3  # "the same batch without the padding"
    assert arms["m2-padded"]["padding_share"]["median"] > 0.4  # "half of all rows"


def test_in_every_setting_everybody_says_what_generate_says() -> None:
    matrix = ledger.result(chapter_8.WHOLE)["matrix"]
    cells = matrix["cells"]
    assert len(cells) == 5 + 3 * 2 + 3 * 2 * 2 * 3 == len({tuple(c[k] for k in KEYS) for c in cells})
    assert {cell["same"] for cell in cells} == {matrix["total"]}
    assert registry.claim_text("matrix-same") == registry.claim_text("matrix-compared")
    longest = max(prompt + output for prompt, output, _ in ledger.result(chapter_8.WHOLE)["requests"])
    assert longest < matrix["pool_tokens"] < 2 * longest
    for cell in cells:
        assert not cell["preemptions"] or cell["small"]
        assert (cell["cached_tokens"] > 0) == cell["cache"]
    assert sum(cell["preemptions"] > 0 for cell in cells) > 5
    whole = {c["chunks"] for c in cells if c["milestone"] == "m4" and not c["small"] and c["chunk"] == 0}
    pieces = {c["chunks"] for c in cells if c["milestone"] == "m4" and not c["small"] and c["chunk"] == 64}
    assert max(whole) < min(pieces)


KEYS = ("milestone", "batching", "block_size", "chunk", "cache", "small")


def test_the_second_request_waits_finds_and_computes_the_rest() -> None:
    trace = ledger.result(chapter_8.WHOLE)["trace"]
    rows = chapter_8.request_rows()
    assert rows[0][1] == "waiting" and rows[-1][1] == "done"
    admitted = next(row for row in rows if row[1] == "running")
    prompt_len = trace["outputs"][1]["prompt_len"]
    assert int(admitted[2]) > 0 and int(admitted[2]) % 16 == 0
    computed = sum(int(row[3]) for row in rows if row[3] != "-" and row[6] == "-") + int(
        next(row for row in rows if row[6] != "-")[3]
    )
    assert int(admitted[2]) + computed == prompt_len
    # "Look at its blocks: the first ones are the other's."
    step = trace["steps"][int(admitted[0])]
    tables, shared = step["blocks"]["tables"], int(admitted[2]) // 16
    assert tables["0"][:shared] == tables["1"][:shared] and tables["0"][shared] != tables["1"][shared]
    # "After the last token the request's blocks are free."
    assert rows[-1][5] == "freed"


def test_the_interface_and_the_runtime_are_a_small_part_with_a_real_model() -> None:
    shares = [chapter_8.w3_layer(layer) for layer in chapter_8.LAYERS]
    assert sum(shares) == pytest.approx(1, abs=0.01)
    assert shares[2] > 0.9
    tiny = ledger.result(chapter_8.WHOLE)["summary"]["layers"]
    assert tiny["runtime"]["median"] > shares[1]


def test_the_results_of_the_latency_exercise_are_those_of_its_solution() -> None:
    ((name, data),) = latency(Console(), 1, [])
    assert name == chapter_8.LATENCY
    assert json.loads(json.dumps(data["policies"])) == ledger.result(name)["policies"]


# --- the layers ---------------------------------------------------------------------------------------------------


def test_every_box_of_the_map_is_there() -> None:
    from figures import chapter_8 as figures

    figure = figures.draw_layers()
    (ax,) = figure.axes
    files = [text.get_text() for text in ax.texts if re.fullmatch(r"[\w/]+(/|\.py)", text.get_text())]
    assert len(files) >= 14
    assert [name for name in files if not (ROOT / "folovllm" / name).exists()] == []
    stops = [text.get_text() for text in ax.texts if text.get_text().isdigit()]
    assert sorted(set(stops)) == [str(number) for number in range(1, 9)]
    listed = re.findall(r"^(\d)\. \*(?:Interface|Runtime|Model authoring)", PAGE, re.MULTILINE)
    assert listed == [str(number) for number in range(1, 9)]
