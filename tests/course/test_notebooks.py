"""The labs: both halves of a pair say the same, what is committed was run from top to bottom, and shows what it says.

The notebooks are run again by `make notebooks`. Here the committed files are read.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
LABS = sorted(path.stem for path in FOLDER.glob("*.py"))
each_lab = pytest.mark.parametrize("name", LABS)

# The figures that each lab has to draw, in order.
FIGURES = {
    "00_two_workloads": ["gemm_sweep", "roofline", "latency_timeline", "attention_share"],
    "01_kv_cache": [
        *("attention_masks", "attention_masks", "attention_masks", "kv_drift", "kv_cells", "cache_timing"),
        *("kv_bytes_bars", "kv_bytes_bars", "position_grid"),
    ],
    "02_engine": [
        *("shape_flow", "phase_times", "filter_stages", "slider_figure", "token_match", "text_release", "text_release"),
        "request_gantt",
    ],
    "03_continuous_batching": [
        *("batch_gantt", "batch_gantt", "padding_map", "padding_growth", "padding_map", "slider_figure"),
        "padding_over_steps",
        *("queue_depth", "waiting_times", "starvation", "throughput_by_batch", "ratio_bars"),
    ],
    "04_blocks": [
        *("memory_shares", "waste_by_block_size", "slider_figure", "block_tables", "block_map", "block_map"),
        "preemption_timeline",
    ],
    "05_ragged_batching": [
        *(
            "padded_and_ragged",
            "padded_and_ragged",
            "ragged_masks",
            "slot_arrows",
            "online_softmax_steps",
            "kernel_tiles",
        ),
    ],
    "06_chunked_prefill": ["chunked_mask", "slider_figure", "step_composition", "latency_by_chunk"],
    "07_prefix_caching": [
        "hash_tree",
        "hit_rate_by_prefix",
        "slider_figure",
        "step_composition",
        "lru_order",
    ],
    "08_the_whole_engine": ["speed_waterfall", "memory_waterfall", "same_token_matrix", "request_gantt", "step_costs"],
}


@dataclass
class Cell:
    kind: str  # "code" or "markdown"
    source: str


def cells_of_script(name: str) -> list[Cell]:
    """The cells of a script in the percent format, its header aside."""
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    header, *parts = re.split(r"^# %%", text, flags=re.MULTILINE)
    assert header.startswith("# ---\n# jupyter:\n") and header.rstrip().endswith("# ---")
    cells = []
    for part in parts:
        mark, _, body = part.partition("\n")
        if mark.strip() == "[markdown]":
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip("\n").split("\n")]
            cells.append(Cell("markdown", "\n".join(lines)))
        else:
            assert mark.strip() == "", f"a cell of an unknown kind: {mark!r}"
            cells.append(Cell("code", body.strip("\n")))
    return cells


def prose(name: str) -> str:
    """What a lab says in its cells of text, on one line."""
    return " ".join(" ".join(c.source for c in cells_of_script(name) if c.kind == "markdown").split())


def load(name: str) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    return notebook


def code_cells(name: str) -> list[dict[str, Any]]:
    return [cell for cell in load(name)["cells"] if cell["cell_type"] == "code"]


def outputs_as_text(name: str) -> str:
    """Everything the committed notebook shows as text, tables in Markdown."""
    shown = []
    for cell in code_cells(name):
        for output in cell["outputs"]:
            data = output.get("data", {})
            shown.append("".join(output.get("text", data.get("text/markdown", data.get("text/plain", "")))))
    return "\n\n".join(shown)


def table(name: str, header: str) -> list[list[str]]:
    """The rows of the committed table whose header begins with `header`."""
    blocks = outputs_as_text(name).split("| " + header, 1)[1].split("\n")
    rows = []
    for line in blocks[2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    assert rows
    return rows


def test_every_lab_is_a_pair() -> None:
    assert set(FIGURES) <= set(LABS)
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == LABS


@each_lab
def test_both_halves_of_a_pair_say_the_same(name: str) -> None:
    notebook = [Cell(cell["cell_type"], "".join(cell["source"])) for cell in load(name)["cells"]]
    assert notebook == cells_of_script(name)


@each_lab
def test_a_committed_notebook_was_run_from_top_to_bottom(name: str) -> None:
    cells = code_cells(name)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert kinds <= {"stream", "display_data", "execute_result"}
    assert [o["text"] for c in cells for o in c["outputs"] if o.get("name") == "stderr"] == []
    kernel = load(name)["metadata"]["kernelspec"]
    assert (kernel["name"], kernel["language"]) == ("python3", "python")


@each_lab
def test_outputs_know_nothing_of_the_machine_but_its_processor(name: str) -> None:
    shown = outputs_as_text(name)
    assert not re.search(r"site-packages|ipykernel_\d|Traceback|/(?:home|root|tmp|work|Users)/|0x[0-9a-f]{6,}", shown)


@each_lab
def test_a_lab_asks_before_it_answers(name: str) -> None:
    first_code = next(cell.source for cell in cells_of_script(name) if cell.kind == "code")
    assert first_code.startswith('MODEL = "folo-tiny"')
    prose = "\n\n".join(cell.source for cell in cells_of_script(name) if cell.kind == "markdown")
    assert prose.count("<details>") == prose.count("</details>") == prose.count("<summary>")
    assert prose.count("**Predict") == prose.count("<details>") >= 5
    # Markdown inside of an HTML block is read as such only between blank lines.
    assert not re.search(r"</summary>\n[^\n]", prose)
    last = prose.split("\n## ")[-1]
    assert last.startswith("Three things to try\n")
    assert re.findall(r"^(\d)\. ", last, re.MULTILINE) == ["1", "2", "3"]


def test_a_mark_of_the_ledger_stands_inside_of_a_line() -> None:
    # At the beginning of one it is a block of HTML: the paragraph ends, and what follows is shown as it is written.
    pages = [*FOLDER.glob("*.py"), *FOLDER.parent.glob("milestones/*/README.md"), FOLDER.parent / "README.md"]
    starts = re.compile(r"^(?:# )?<!-- /?claim.*$", re.MULTILINE)
    assert {page.name: starts.findall(page.read_text(encoding="utf-8")) for page in pages} == {
        page.name: [] for page in pages
    }


@each_lab
def test_a_lab_draws_the_figures_of_its_chapter(name: str) -> None:
    calls = re.compile(rf"^({'|'.join(set(FIGURES[name]))})\(", re.MULTILINE)
    drawn = []
    for cell in code_cells(name):
        called = calls.findall("".join(cell["source"]))
        pictures = [o for o in cell["outputs"] if "image/png" in o.get("data", {})]
        assert len(called) == len(pictures) <= 1
        assert [picture["metadata"]["image/png"]["width"] for picture in pictures] == [700] * len(pictures)
        drawn += called
    assert drawn == FIGURES[name]


# --- what the prose says, the committed outputs have to show --------------------------------------------------


def test_lab_0_finds_the_ridge_and_the_crossings() -> None:
    sweep = table("00_two_workloads", "m | ms per call")
    times = {int(row[0]): float(row[1]) for row in sweep}
    assert list(times) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert times[8] < 8 * times[1]  # small m: time does not grow with m
    assert times[512] > 2 * times[128]  # large m: it does
    shares = {row[0]: row[1:] for row in table("00_two_workloads", "context")}
    assert shares["24704"][0] == shares["49408"][1] == "50.0%"
    assert shares["1000"] == ["3.9%", "2.0%"]
    weights = {row[0]: row[3] for row in table("00_two_workloads", "model, 16-bit")}
    assert weights["Llama-2-7B"] == "512 KiB"
    assert weights["qwen2.5-0.5b"] == "12 KiB"
    assert weights["qwen3-0.6b"] == "112 KiB"


def test_lab_0_measures_that_company_makes_tokens_cheap() -> None:
    speed = {row[0]: float(row[1]) for row in table("00_two_workloads", " | tokens per second")}
    assert speed["answer token, batch 64"] > 3 * speed["answer token, batch 1"]
    assert speed["prompt token, 512 at once"] > 3 * speed["answer token, batch 1"]


def test_lab_1_tells_right_masks_and_positions_from_wrong_ones() -> None:
    assert "the measured pattern is the causal mask: True" in outputs_as_text("01_kv_cache")
    right, *wrong = [float(row[1]) for row in table("01_kv_cache", "mask | largest")]
    assert right < 1e-4
    assert min(wrong) > 1
    rows = {row[0][0]: [float(x) for x in f"{row[1]}, {row[2]}".split(", ")] for row in table("01_kv_cache", "variant")}
    assert max(rows["1"]) < 1e-4  # counted positions
    assert max(rows["2"]) < 1e-4  # RoPE sees differences only
    assert rows["3"][0] > 0.1  # attends to padding
    assert max(rows["4"][:3]) < 1e-4 < 0.1 < rows["4"][3]  # right at first, wrong one token later
    assert max(rows["5"][:3]) < 1e-4 < 0.1 < min(rows["5"][3:])


def test_lab_1_sets_the_ratio_of_times_beside_that_of_work() -> None:
    assert "same tokens: True" in outputs_as_text("01_kv_cache")
    rows = table("01_kv_cache", "tokens | ms without")
    assert [int(row[0]) for row in rows] == [16, 32, 64, 128, 256]
    for row in rows:
        assert float(row[3]) < float(row[4])  # "much smaller"
    assert float(rows[-1][3]) > float(rows[0][3]) > 1  # "grows with n"
    assert [row[1:] for row in table("01_kv_cache", "tokens | linear layers")] == [
        ["5.5", "7"],
        ["50.5", "67"],
        ["500.5", "667"],
    ]
    sizes = dict(table("01_kv_cache", "Llama-2-7B, 16-bit"))
    assert sizes["1 token"] == "512 KiB"
    assert sizes["1 text of 1000 tokens"] == "500 MiB"
    assert sizes["10 texts of 500 tokens"] == "2.441 GiB"
    assert sizes["1 text of 100,000 tokens"] == "48.83 GiB"


def test_lab_2_shows_an_engine_that_passes_and_a_control_arm_that_fails() -> None:
    rows = table("02_engine", "weights")
    assert len(rows) == 16
    assert {row[3] for row in rows} == {"none"}  # the engine, on both models
    control = {row[0]: [r[4] for r in rows if r[0] == row[0]] for row in rows}
    assert set(control["folo-tiny"]) == {"none"}  # known by heart: the mistake does not show
    assert all(first.isdigit() and int(first) >= 1 for first in control["random"])


def test_lab_2_draws_what_the_filters_left() -> None:
    rows = table("02_engine", "token | probability")
    for _, expected, drawn in rows:
        p = float(expected)
        assert abs(float(drawn) - p) < 5 * (p * (1 - p) / 20_000) ** 0.5 + 5e-4
    assert sum(float(row[2]) for row in rows) == pytest.approx(1, abs=5e-3)
    shown = outputs_as_text("02_engine")
    first, second = (int(n) for n in re.findall(r"tokens left by .*: +(\d+)", shown))
    assert first > second  # min-p before a temperature above 1 keeps fewer


def test_lab_2_ends_requests_in_four_ways_and_takes_no_text_back() -> None:
    shown = outputs_as_text("02_engine")
    assert "text: 'The unit a language model reads and writes:'  finish: stop, ' a piece'" in shown
    assert "\ufffd" in shown.split("one by one:")[1].split("\n")[0]
    endings = {row[0]: row[2] for row in table("02_engine", "request")}
    assert endings == {
        "length": "length",
        "end of text": "stop",
        "stop string": "stop (' a piece')",
        "user left": "abort",
    }
    texts = dict(table("02_engine", "parameters"))
    assert texts["temperature 0.8, seed 1"] == texts["temperature 0.8, seed 1, again"]
    assert texts["temperature 0.8, seed 1"] != texts["temperature 0.8, seed 2"]


def test_lab_3_needs_fewer_steps_and_lets_nobody_wait_for_others_to_end() -> None:
    shown = outputs_as_text("03_continuous_batching")
    least = int(re.findall(r"at least \d+ tokens / 4 seats = (\d+) steps", shown)[0])
    static, continuous = table("03_continuous_batching", "way | steps")
    assert least <= int(continuous[1]) < int(static[1])
    assert float(continuous[2]) < float(static[2])  # TTFT
    rows = {row[0]: [float(cell) for cell in row[1:]] for row in table("03_continuous_batching", "way | mean TTFT")}
    assert all(rows["continuous"][i] < min(rows["static"][i], rows["dynamic"][i]) for i in range(3))


def test_lab_3_has_a_control_arm_that_gains_nothing_from_its_scheduler() -> None:
    assert "same tokens everywhere: True" in outputs_as_text("03_continuous_batching")
    rows = table("03_continuous_batching", "arm | seats")
    forwards = {(arm, int(seats)): int(count) for arm, seats, count, *_ in rows}
    speed = {(arm, int(seats)): float(tokens) for arm, seats, *_, tokens in rows}
    ways = {arm: [key for key in forwards if key[0] == arm] for arm, _ in forwards}
    assert {forwards[key] for key in [("M1", 1), *ways["loop"]]} == {forwards["M1", 1]}
    padded = [forwards[key] for key in ways["padded"]]
    assert padded == sorted(padded, reverse=True) and padded[0] > 4 * padded[-1]
    assert 0.6 < speed["loop", 16] / speed["M1", 1] < 1.5
    assert speed["padded", 16] > 2 * speed["loop", 16]


def test_lab_3_tells_scheduling_from_batching() -> None:
    rows = {row[0]: [float(cell) for cell in row[1:]] for row in table("03_continuous_batching", "arm | mean TTFT")}
    ttft, whole, _, itl = zip(rows["M1"], rows["loop, 16"], rows["padded, 16"], strict=True)
    assert ttft[1] < ttft[0] and itl[1] > 3 * itl[0]  # taking turns: an early first token, then a slow rest
    assert whole[2] < min(whole[:2])
    loop, padded = table("03_continuous_batching", "arm | steps")
    assert loop[1:3] == padded[1:3]  # the same steps, filled alike
    assert float(padded[4]) > 1.5 * float(loop[4])
