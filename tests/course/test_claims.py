"""The ledger: every number on a page has an id, every id a source, and every derived value is the one expected here."""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import sources  # noqa: E402
from claims import chapter_4, forms, ledger, registry  # noqa: E402
from errata.themes import all_errata  # noqa: E402

from folovllm.course.measure.measuring import LINE, as_text  # noqa: E402
from folovllm.course.viz.blocks import PAPER_FIG_2  # noqa: E402

CHAPTERS = sorted((ROOT / "docs" / "chapters").glob("*.md"))
BESIDE = [
    ROOT / "docs" / f"{name}.md"
    for name in ("errata", "interview", "vllm_map", "compatibility_families", "open_questions")
]
each_chapter = pytest.mark.parametrize("chapter", [*CHAPTERS, *BESIDE], ids=lambda chapter: chapter.stem)

# Written down by hand, from papers and arithmetic on paper; the ledger computes them.
EXPECTED = {
    "llama2-serving-break-even": "6",
    "llama2-7b-linear-params": "6.48",  # 32 x (4 x 4096^2 + 3 x 4096 x 11008) = 6,476,005,376
    "llama2-7b-layer-params": "202",
    "llama2-7b-layer-flops-1000": "405",
    "llama2-7b-decode-bytes": "13.2 GB",  # 2 x (6,476,005,376 + 4096 x 32,000)
    "h100-ridge": "295",
    "llama2-7b-decode-floor-h100": "3.9 ms",
    "decode-attention-intensity-mha": "1",
    "decode-attention-intensity-group-4": "4",
    "attention-share-1000-causal": "2.0 %",
    "attention-share-1000-full": "3.9 %",
    "attention-crossing-full": "24,704",
    "attention-crossing-causal": "49,407",
    "budget-scheduled": "810",
    "budget-filled": "81 %",
    "budget-c-claimed": "690",
    "linear-ratio-10": "5.5",
    "linear-ratio-100": "50.5",
    "attention-ratio-10": "7",
    "attention-ratio-100": "67",
    "kv-bytes-llama2-7b": "512 KiB",
    "kv-bytes-llama2-7b-exact": "524,288",
    "kv-bytes-llama2-13b": "800 KiB",
    "kv-bytes-qwen3-06b": "114,688",
    "kv-bytes-qwen25-05b": "12,288",
    "kv-1000-llama2-7b": "500 MiB",
    "kv-10x500-llama2-7b": "2.44 GiB",
    "kv-values-mla": "576",
    "kv-values-mqa": "256",
    "kv-values-mha": "32,768",
    "logits-of-a-prompt": "580 MiB",  # 1000 x 151,936 x 4
    "m0-kv-bytes-tiny-derived": "555,008",  # 271 x 4 layers x 2 x 2 heads x 32 x 4
    "causal-cells-4": "10",
    "stream-tokens": "17",
    "stream-replacement-characters": "5",  # two bytes of e acute, three of the euro sign
    "stop-string-tokens": "4",
    "padding-unequal-cells": "900",  # 3 x 300
    "padding-unequal-tokens": "352",
    "padding-unequal": "60.9 %",
    "padding-nearly-equal": "1.8 %",  # 2 of 111
    "padding-mixed-cells": "800",
    "padding-mixed-tokens": "107",
    "padding-mixed": "86.6 %",  # 99 x 7 of 800
    "padding-exercise-cells": "13",
    "padding-exercise-used": "56.7 %",  # 17 of 30
    "reservation": "1,024",
    "reservation-admitted": "4",
    "reservation-used": "14.6 %",  # 149 of 1024: the last token of an answer is never fed
    "reservation-by-use": "27",
    "blocks-100": "7",
    "slots-100": "112",
    "empty-100": "12",
    "paged-waste-100": "10.7 %",  # 12 of 112
    "region-waste-2048": "95.1 %",  # 1948 of 2048
    "blocks-1000": "63",
    "paged-waste-1000": "0.79 %",  # 8 of 1008
    "layer-region": "128 MiB",  # 4096 x 2 x 32 x 128 x 4 = 4096 x 32 KiB, that is 0.125 GiB
    "layer-used": "31.2 MiB",  # 1000 x 32 KiB
    "layer-blocks": "31.5 MiB",  # 1008 x 32 KiB
    "batch-layer-region": "4 GiB",  # 32 x 4096 x 32 KiB
    "batch-layer-blocks": "512 MiB",  # 32 x 512 x 32 KiB
    "batch-region": "64 GiB",  # 32 x 4096 x 512 KiB
    "batch-blocks": "8 GiB",  # 32 x 512 x 512 KiB
    "batch-saved": "87.5 %",  # 512 of 4096 are left
    "card-tokens": "15,728",  # 12 GiB / 800 KiB
    "card-regions": "7",
    "card-blocks": "983",
    "card-requests": "30",  # 32 blocks each
    "buddy-free": "104 MB",  # 32 + 8 + 64
    "buddy-largest": "64 MB",
    "buddy-left": "40 MB",
    "buddy-left-largest": "32 MB",
    "page-number": "2",
    "page-offset": "1,808",
    "page-physical": "14,096",  # 3 x 4096 + 1808
    "slot-of-37": "149",  # 9 x 16 + 5
    "watermark": "1 %",
    "recompute-flops": "13.0 GFLOPs",  # 2 x 6,476,005,376
    "swap-bytes": "1 MiB",
    "ragged-tokens": "352",
    "padded-cells": "900",
    "score-cells-padded": "270,000",  # 3 x 300^2
    "score-cells-packed": "123,904",  # 352^2
    "score-cells-needed": "46,048",  # 12 x 13 / 2 + 300 x 301 / 2 + 40 x 41 / 2
    "mixed-slot": "9",  # 2 x 4 + 1
    "long-step-tokens": "207",
    "long-step-keys": "3,700",
    "long-step-cells": "765,900",
    "long-step-visible": "3.1 %",  # 7 x 500 + 200 x 201 / 2 = 23,600
    "long-step-integers": "894",  # 3 x 207 + 9 + 8 + 8 x 32
    "tiles-loaded": "13",  # 1 + 1 + 2, 3 + 3, 3
    "tiles-unmasked": "7",  # 0 + 0 + 1, 2 + 2, 2
    "qwen3-group": "2",
    "qwen3-programs": "8",
    "qwen3-programs-split": "64",
    "prefill-block-tokens": "64",  # 128 rows, two heads each
    "prefill-blocks": "63",  # 4000 / 64 = 62.5
    "prefill-programs": "504",
    "recompute-over-swap": "12,400",  # 12,952,010,752 / 1,048,576 = 12,352
    "chunk-64-left": "56",
    "kv-100k": "48.8 GiB",  # 100,000 x 512 KiB
    "kv-of-a-chunk": "2 GiB",
    "chunks-100k": "25",  # 24.4
    "mlp-100k": "4.1 GiB",  # 100,000 x 2 x 11,008 x 2 = 4,403,200,000
    "mlp-of-a-chunk": "172 MiB",  # 4096 x 44,032
    "alike-tokens": "6",
    "hit-of-64": "48",  # three blocks: the fourth ends with the last token
    "left-of-64": "16",
    "left-of-65": "1",
    "collision-chance": "below 1e-26",  # 5e11 pairs of 3.4e38 values
    "w3-alone": "6,400",  # 16 x (384 + 16)
    "w3-shared": "640",  # 384 + 16 x 16
    "speculative-tokens": "3.36",  # 1 + 0.8 + 0.64 + 0.512 + 0.4096
    "target-itl": "42 ms",
    "target-ttft": "1,200 ms",
    "target-short": "100 ms",
    "late-token-cost": "3.2",  # 4000 x 40 ns over 50,000 ns
}
EXPECTED_TABLES = {
    "step-metadata": [
        ["query_start_loc", "R + 1", "[0, 3, 4, 5]", "where each request's tokens begin, and the end"],
        ["seq_lens", "R", "[3, 6, 9]", "keys of each request, the new ones included"],
        ["slot_mapping", "T", "[28, 29, 30, 9, 16]", "where K/V is written"],
        ["block_table", "R x B", "[[7], [5, 2], [1, 6, 4]]", "where K/V is read"],
    ],
    # With the rescale: softmax over the keys so far. Without it: weights e^(score - maximum when its tile came).
    "online-softmax": [
        ["1", "1.0", "-", "2.328", "0.860", "2.328", "0.860"],
        ["2", "1.2", "0.819", "4.429", "0.758", "4.851", "0.766"],
        ["3", "2.8", "0.202", "2.698", "0.321", "6.655", "0.587"],
        ["4", "2.8", "1.000", "3.473", "0.292", "7.430", "0.546"],
    ],
    "recompute-ratios": [["10", "5.5", "7"], ["100", "50.5", "67"], ["1,000", "500.5", "667"]],
    "kv-sizes": [
        ["Llama-2-7B", "MHA", "32", "32", "32", "128", "524,288"],
        ["Llama-2-13B", "MHA", "40", "40", "40", "128", "819,200"],
        ["Llama-2-70B", "GQA", "80", "64", "8", "128", "327,680"],
        ["Llama-3.2-1B", "GQA", "16", "32", "8", "64", "32,768"],
        ["Qwen3-0.6B", "GQA", "28", "16", "8", "128", "114,688"],
        ["Qwen2.5-0.5B", "GQA", "24", "14", "2", "64", "12,288"],
        ["Gemma-2B", "MQA", "18", "8", "1", "256", "18,432"],
        ["DeepSeek-V2", "MLA", "60", "128", "latent", "512 + 64", "69,120"],
    ],
    "paging-waste": [
        ["100", "7", "12", "10.71 %", "97.6 %"],
        ["500", "32", "12", "2.34 %", "87.8 %"],
        ["1,000", "63", "8", "0.79 %", "75.6 %"],
        ["2,000", "125", "0", "0.00 %", "51.2 %"],
    ],
    "intensity": [
        ["1", "33", "1.00", "0.500"],
        ["8", "268", "7.97", "3.98"],
        ["64", "2,147", "62.1", "31.0"],
        ["512", "17,179", "410", "205"],
        ["4,096", "137,438", "1,370", "683"],
    ],
    "chunk-reads": [  # 112 KiB of K/V per token; 440,401,920 weights in linear layers
        ["2,048", "1", "2,048", "0.219", "0.820"],
        ["1,024", "2", "3,072", "0.328", "1.64"],  # 1024 + 2048
        ["512", "4", "5,120", "0.547", "3.28"],
        ["256", "8", "9,216", "0.984", "6.56"],  # 256 x (1 + ... + 8)
        ["128", "16", "17,408", "1.86", "13.1"],
        ["64", "32", "33,792", "3.61", "26.2"],
    ],
    "budget-split": [
        ["1,000", "1", "10", "100", "200", "500", "810"],
        ["600", "1", "10", "100", "200", "290", "600"],
        ["600", "2", "12", "0", "0", "210", "222"],
    ],
    "full-hits": [
        ["15", "0", "0", "15"],
        ["16", "1", "0", "16"],
        ["17", "1", "1", "1"],
        ["63", "3", "3", "15"],
        ["64", "4", "3", "16"],
        ["65", "4", "4", "1"],
    ],
    # By a program of its own, without an engine: see also `test_latency_target`.
    "latency-policies": [
        ["budget 64", "32", "2,072", "1,946"],
        ["budget 108", "41", "1,396", "1,272"],
        ["budget 160", "52", "1,111", "989"],
        ["budget 256", "71", "912", "762"],
        ["budget 4,096", "559", "613", "463"],
        ["by cost, shortest first", "42", "1,108", "79"],
    ],
    "batching-steps": [
        ["10, 20, 30, 100", "160", "100", "40 %", "100", "1.00"],
        # The long ones start in steps 0, 30, 70 and 110.
        ["these, 4 times", "640", "400", "40 %", "210", "1.90"],
        ["40, 16 times", "640", "160", "100 %", "160", "1.00"],
    ],
}
# Derived from what stands in a results file: the prompt's length, the ceilings, requests, counts of passes and steps.
FROM_RESULTS = {"m0-flop-ratio-tiny", "m0-flop-ratio-qwen3", "machine-ridge", "w2-prefill-padding", "w2-kv-padding"}
FROM_RESULTS |= {"packed-right", "packed-wrong"}
FROM_RESULTS |= {"m1-w2-passes", "m2-loop-passes", "m2-padded-passes", "m2-fcfs-steps", "m2-sjf-steps"}
FROM_RESULTS |= {"w2-longest", "m2-used-of-held", "m3-used-of-held", "empty-share-16", "empty-share-256"}
FROM_RESULTS |= {"m3-over-static-w1", "m3-over-static-w2", "m3-over-continuous-w2", "m2-over-static-w2"}
FROM_RESULTS |= {"sharers-hit-rate", "m3-attention-over-grouped"}
FROM_RESULTS |= {"m4-over-static-w3", "m4-over-m3-w3", "m4-over-m3-w2", "m4-prompt-tokens-w3"}
FROM_RESULTS |= {"m4-longest-itl", "m4-late-ttft"}
FROM_RESULTS |= {"w3-m1-gain", "w3-loop-gain", "w3-padded-gain", "w3-m3-gain", "w3-m4-gain", "w3-m4-over-static"}
FROM_RESULTS |= {"w3-m2-used", "tiny-m2-used", "tiny-m4-over-m0", "w3-forward-share"}
FROM_RESULTS |= {"matrix-settings", "matrix-compared", "matrix-same", "matrix-crowded"}


@pytest.mark.parametrize(("claim_id", "text"), EXPECTED.items())
def test_a_derived_claim_has_the_value_that_was_derived_by_hand(claim_id: str, text: str) -> None:
    assert registry.claim_text(claim_id) == text


@pytest.mark.parametrize(("table_id", "rows"), EXPECTED_TABLES.items())
def test_a_derived_table_has_the_values_that_were_derived_by_hand(table_id: str, rows: list[list[str]]) -> None:
    assert registry.get_table(table_id).rows() == rows


def test_every_derived_value_is_expected_here() -> None:
    derived = {i for i, claim in registry.all_claims().items() if isinstance(claim, ledger.Derived)}
    derived = {i for i in derived if not i.startswith("erratum-")}  # those are expected in test_errata.py
    assert derived - EXPECTED.keys() == FROM_RESULTS
    tables = {i for i, table in registry.all_tables().items() if not table.files}
    assert tables | {"latency-policies"} == EXPECTED_TABLES.keys()


def test_flop_ratios_of_the_measured_runs() -> None:
    # folo-tiny: 4 layers, width 256, 8 and 2 heads of 32, MLP 832, vocabulary 2048; 16 + 256 tokens.
    weights = 4 * (2 * 256 * 256 + 2 * 256 * 64 + 3 * 256 * 832)
    head, per_pair = 256 * 2048, 4 * 4 * 8 * 32
    tokens, pairs = sum(range(16, 272)), sum(length**2 for length in range(16, 272))
    without = 2 * weights * tokens + 2 * head * 256 + per_pair * pairs
    cached = 2 * weights * 271 + 2 * head * 256 + per_pair * (16**2 + sum(range(17, 272)))
    assert registry.claim_text("m0-flop-ratio-tiny") == f"{without / cached:.0f}"


def test_the_ridge_is_the_quotient_of_the_ceilings_on_the_page() -> None:
    machine = ledger.result("two-workloads-qwen3-0.6b")["summary"]["machine"]
    peak, bandwidth = machine["gemm_flops_per_s"]["512"]["median"], machine["read_bytes_per_s"]["median"]
    assert float(registry.claim_text("machine-ridge")) == pytest.approx(peak / bandwidth, rel=0.01)


def test_what_chapters_6_and_7_say_of_qwen3_holds_in_its_results() -> None:
    data = ledger.result("m4-qwen3-0.6b")
    runs = [current["runs"] for current in data["rounds"]]
    for current in runs:
        # The prefix once, and everybody's own: 384 + 16 * 16. M3 computes everybody's whole prompt.
        assert current["w3"]["m4"]["engine"]["stats"]["prompt_tokens_computed"] == 384 + 16 * 16
        assert current["w3"]["m3"]["engine"]["stats"]["prompt_tokens_computed"] == 16 * (384 + 16)
        assert current["w3"]["m4"]["wall_s"] < current["w3"]["m3"]["wall_s"]
        assert current["w3"]["m4"]["kv_reserved_bytes"] < current["w3"]["m3"]["kv_reserved_bytes"]
    assert registry.claim_text("m4-prompt-tokens-w3") == registry.claim_text("w3-shared")
    ratios = [current["w3"]["hf:static"]["wall_s"] / current["w3"]["m4"]["wall_s"] for current in runs]
    assert float(registry.claim_text("m4-over-static-w3")) == pytest.approx(statistics.median(ratios), rel=0.01)

    mixed = [current["runs"]["mixed"] for current in ledger.result("m4-mixed-qwen3-0.6b")["rounds"]]
    small, large = "m4:budget=256", "m4:budget=4096"
    pauses = [run[large]["itl_s"]["max"] / run[small]["itl_s"]["max"] for run in mixed]
    assert float(registry.claim_text("m4-longest-itl")) == pytest.approx(statistics.median(pauses), rel=0.05)
    waits = [run[small]["ttft_s"]["max"] / run[large]["ttft_s"]["max"] for run in mixed]
    assert float(registry.claim_text("m4-late-ttft")) == pytest.approx(statistics.median(waits), rel=0.01)


# --- sources ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("claim_id", registry.all_claims())
def test_every_claim_has_a_source(claim_id: str) -> None:
    claim = registry.get_claim(claim_id)
    assert ledger.text(claim)
    if isinstance(claim, ledger.Measured):
        assert (ROOT / "results" / f"{claim.file}.json").is_file()
    elif isinstance(claim, ledger.Cited):
        assert claim.url.startswith("https://")
    else:
        path, _, name = claim.source.partition(":")
        assert sources.line_of(path, name)


@pytest.mark.parametrize("name", [name for names in registry.measured_numbers().values() for name in names])
def test_every_measured_number_of_a_page_is_in_its_file(name: str) -> None:
    assert ledger.text(ledger.measured(name))


@pytest.mark.parametrize("table_id", registry.all_tables())
def test_every_table_has_a_source(table_id: str) -> None:
    table = registry.get_table(table_id)
    rows = table.rows()
    assert rows
    assert {len(row) for row in rows} == {len(table.header)}
    assert table.files or table.rows.__module__.startswith("claims.")


def test_the_figure_of_the_paper_is_drawn_as_it_is_cited() -> None:
    cited = {system: 100 * used for system, used in chapter_4.PAPER_FIG_2.values()}
    assert cited == pytest.approx(dict(PAPER_FIG_2))


def test_what_leads_nowhere_is_an_error() -> None:
    with pytest.raises(ledger.ClaimError, match="'no-such-id'"):
        registry.claim_text("no-such-id")
    with pytest.raises(ledger.ClaimError, match="'no-such-table'"):
        registry.get_table("no-such-table")
    with pytest.raises(ledger.ClaimError, match=r"results/gone\.json does not exist"):
        ledger.text(ledger.measured("gone/x|,"))
    with pytest.raises(ledger.ClaimError, match=r"m0-cache-folo-tiny\.json has no summary/16/gone"):
        ledger.text(ledger.measured("m0-cache-folo-tiny/summary/16/gone|,"))
    for form in ("", ".2", ".2f parsecs", ".1% ms", "median"):
        with pytest.raises(ledger.ClaimError, match="does not exist"):
            ledger.measured(f"m0-cache-folo-tiny/kv_bytes|{form}")


def test_an_id_belongs_to_one_chapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.CHAPTERS[1], "CLAIMS", dict(registry.CHAPTERS[0].CLAIMS))
    with pytest.raises(ValueError, match="in use by another chapter"):
        registry.all_claims()


def results_of_the_course() -> list[str]:
    measured = {claim.file for claim in registry.all_claims().values() if isinstance(claim, ledger.Measured)}
    measured |= {ledger.measured(name).file for names in registry.measured_numbers().values() for name in names}
    return sorted(measured | {file for table in registry.all_tables().values() for file in table.files})


@pytest.mark.parametrize("file", results_of_the_course())
def test_a_results_file_says_where_it_was_measured_and_sums_up_its_rounds(file: str) -> None:
    data = json.loads((ROOT / "results" / f"{file}.json").read_text(encoding="utf-8"))
    of_the_bench = data["command"].startswith("python -m folovllm.course.bench ")
    assert of_the_bench or data["command"].startswith("python -m folovllm.course.measure")
    assert data["hardware"]["cpu"] and data["hardware"]["threads"]
    assert data["versions"]["torch"] and data["versions"]["transformers"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]+\+00:00", data["date"])
    if file in ("m4-latency-target", "families"):
        return  # on a machine that counts its own time, or without times: no rounds
    assert len(data["rounds"]) >= 2  # a single round has no spread to speak of
    assert data.get("same_tokens", True) or data["dtype"] != "float32"

    def check(summary: Any, rounds: list[Any]) -> None:
        if isinstance(rounds[0], dict):
            assert summary.keys() == rounds[0].keys()
            for key in summary:
                check(summary[key], [current[key] for current in rounds])
        else:
            spread = {"median": statistics.median(rounds), "min": min(rounds), "max": max(rounds)}
            assert summary == {**spread, "rounds": len(rounds)}

    if not of_the_bench:
        check(data["summary"], data["rounds"])
        return
    for workload, systems in data["summary"].items():
        rounds = [current["runs"][workload] for current in data["rounds"]]
        for system, numbers in systems.items():
            check(numbers["wall_s"], [runs[system]["wall_s"] for runs in rounds])
            speeds = [[runs[name]["output_tokens_per_s"] for name in (system, data["base"])] for runs in rounds]
            check(numbers["ratio_to_base"], [own / base for own, base in speeds])


def test_what_chapter_3_says_of_passes_and_arms_holds_in_its_results() -> None:
    data = ledger.result("m2-w2-qwen3-0.6b")
    assert data["base"] == "m1"
    tokens = sum(max_tokens for _, max_tokens, *_ in data["workloads"]["w2"]["requests"])
    assert registry.claim_text("m1-w2-passes") == registry.claim_text("m2-loop-passes") == f"{tokens:,}"
    assert int(registry.claim_text("m2-padded-passes").replace(",", "")) < tokens / 4
    tiny = ledger.result("m2-batching-folo-tiny")
    arms = {arm: numbers["forwards"]["median"] for arm, numbers in tiny["summary"]["arms"].items()}
    outputs = [output for _, output in tiny["requests"]]
    assert arms["m1"] == arms["m2-loop-4"] == arms["m2-loop-16"] == sum(outputs)
    assert arms["static-4"] == sum(max(outputs[i : i + 4]) for i in range(0, 16, 4))
    assert arms["m2-padded-4"] < arms["static-4"]
    waits = {policy: tiny["policies"][policy]["waited_steps"] for policy in ("fcfs", "priority", "sjf")}
    assert sum(waits["sjf"]) < sum(waits["fcfs"])
    urgent = [i for i, priority in enumerate(tiny["policies"]["priorities"]) if priority == 0]
    assert max(waits["priority"][i] for i in urgent) < min(waits["fcfs"][-1], waits["sjf"][-1])
    assert waits["fcfs"] == sorted(waits["fcfs"])
    assert tiny["starvation"]["sjf"] == sorted(set(tiny["starvation"]["sjf"]))
    assert len(set(tiny["starvation"]["fcfs"])) == 1


def test_what_chapter_4_says_of_blocks_holds_in_its_results() -> None:
    data = ledger.result("m3-blocks-folo-tiny")
    policies = data["simulator"]["policies"]
    for run in policies.values():
        assert sum(run["shares"].values()) == pytest.approx(1)
    used = [policies[policy]["shares"]["used"] for policy in ("max", "pow2", "oracle", "paged")]
    assert used == sorted(used)
    assert policies["oracle"]["shares"]["internal"] == 0  # "makes no mistake about any length"
    assert policies["max"]["shares"]["external"] == policies["paged"]["shares"]["external"] == 0
    sizes = {run["block_size"]: run for run in data["simulator"]["block_sizes"]}
    assert all(run["formula"] == (size - 1) / 2 for size, run in sizes.items())
    assert all(run["empty_slots"] == pytest.approx(run["formula"], rel=0.1, abs=0.1) for run in sizes.values())

    room = data["capacity"]
    assert room["same_tokens"] and room["kv_tokens"] == 4096 and room["max_model_len"] == 1024
    assert int(registry.claim_text("w2-longest").replace(",", "")) <= room["kv_tokens"]  # "everybody would fit"
    for run in (room["m2"], room["m3"]):
        assert len(run["running"]) == len(run["reserved"]) == len(run["used"]) == run["steps"]
        assert (max(run["running"]), max(run["reserved"])) == (run["max_running"], run["most_reserved"])
        held_and_written = zip(run["reserved"], run["used"], strict=True)
        assert all(written <= held <= room["kv_tokens"] for held, written in held_and_written)
    assert (room["m2"]["max_running"], room["m3"]["max_running"]) == (4, 16)
    assert room["m2"]["most_reserved"] == room["kv_tokens"]
    assert 2 * room["m3"]["forwards"] < room["m2"]["forwards"]

    arms = data["summary"]
    assert data["preemption"]["same_tokens"]
    assert 4 * data["preemption"]["num_kv_blocks"] == data["preemption"]["roomy_blocks"]  # "a quarter of the blocks"
    assert arms["roomy"]["preemptions"]["max"] == 0 < arms["swap"]["preemptions"]["min"]
    assert arms["recompute"]["steps"] == arms["swap"]["steps"]  # "the steps of both the same"
    assert arms["roomy"]["prompt_tokens_computed"] == arms["swap"]["prompt_tokens_computed"]
    assert arms["recompute"]["prompt_tokens_computed"]["min"] > arms["swap"]["prompt_tokens_computed"]["max"]
    assert set(data["sharing"]["parallel_sampling"]["16"].values()) == {0.0}  # "save nothing at all"
    assert data["sharing"]["prompt_lens"][0] == 16


def test_what_chapter_4_says_of_attention_holds_in_its_results() -> None:
    data = ledger.result("m3-attention-qwen3-0.6b")
    assert max(data["difference"].values()) < 0.004  # bfloat16, on outputs that are means of hundreds of values
    for current in data["rounds"]:
        for length, ways in current.items():
            kv_bytes = 2 * data["requests"] * int(length) * data["heads"]["kv"] * data["heads"]["dim"] * 2
            assert all(way["kv_bytes_per_s"] * way["seconds"] == pytest.approx(kv_bytes) for way in ways.values())
            assert ways["torch"]["seconds"] < ways["gather"]["seconds"]  # "takes ... of that time"
            assert ways["torch"]["over_gather"] == ways["torch"]["seconds"] / ways["gather"]["seconds"]


def test_what_chapter_5_says_of_packing_and_padding_holds_in_its_results() -> None:
    data = ledger.result("m3-ragged-folo-tiny")
    found = data["packing"]["differences"]
    wrong = {"positions_with_cache", "nothing"}
    assert data["packing"]["lengths"] == data["prefill"]["unequal"]["lengths"] == [12, 300, 40]
    for way, differences in found.items():
        assert differences[0] < 1e-3  # the first text is right in every line
        for difference in differences[1:]:
            assert difference > data["packing"]["logits_standard_deviation"] if way in wrong else difference < 1e-3
    assert data["generate_batch"]["same_tokens"]
    assert data["prefill"]["unequal"]["cells"] == {"padded": 900, "packed": 352}
    unequal, alike = data["summary"]["unequal"], data["summary"]["nearly_equal"]
    assert unequal["padded_over_packed"]["min"] > 1.5 and unequal["padded_over_m3"]["min"] > 1.5
    assert alike["padded_over_packed"]["min"] < 1.1  # "there is nothing to save"
    assert unequal["one_by_one_over_packed"]["median"] > 1


def test_the_forward_of_chapter_4_makes_as_many_passes_as_steps() -> None:
    for run in ledger.result("m4-qwen3-0.6b")["rounds"][0]["runs"].values():
        stats = run["m3"]["engine"]["stats"]
        assert stats["forwards"] == stats["steps"]
        assert stats["padding_tokens"] == stats["padding_kv_tokens"] == stats["preemptions"] == 0


def test_what_chapter_6_says_of_chunks_holds_in_its_results() -> None:
    data = ledger.result("m4-chunks-folo-tiny")
    assert data["same_tokens"]
    streams, long, room = data["streams"], data["long"]["prompt_len"], {}
    for arm, numbers in data["summary"]["arms"].items():
        room[arm] = long if arm == "m3" else min(long, int(arm) - streams["number"])
        assert numbers["chunks"]["median"] == -(-long // room[arm])
        fill = data["fills"][arm]
        beside = [i for i, tokens in enumerate(fill["prefills"]) if tokens and fill["decodes"][i] == streams["number"]]
        assert sum(fill["prefills"][i] for i in beside) == long  # the streams decode from its first chunk to its last
        assert len(beside) == numbers["chunks"]["median"]
        assert max(map(sum, zip(fill["decodes"], fill["prefills"], strict=True))) <= fill["budget"]
    arms = data["summary"]["arms"]
    pauses = [arms[arm]["itl_max_s"]["median"] for arm in ("64", "128", "256", "512", "1024")]
    assert pauses == sorted(pauses)
    assert arms["256"]["max_itl_below_m3"]["min"] > 2
    # "It ranks them the wrong way round": over the whole run, M3's p95 is the lower one.
    assert arms["m3"]["run_itl_p95_s"]["median"] < arms["256"]["run_itl_p95_s"]["median"]
    assert arms["m3"]["itl_max_s"]["median"] > 10 * arms["m3"]["run_itl_p95_s"]["median"]
    found = data["logit_differences"]
    right = ("chunks_of_16", "chunks_of_12", "token_by_token", "rectangle_of_the_mask")
    assert max(found[way] for way in right) < 1e-3
    wrong = ("sees_its_own_chunk_only", "whole_rectangle", "positions_begin_again")
    assert min(found[way] for way in wrong) > found["logits_standard_deviation"]


def test_what_chapter_7_says_of_prefixes_holds_in_its_results() -> None:
    data = ledger.result("m4-prefixes-folo-tiny")
    assert data["same_tokens"] and data["preemption"]["same_tokens"]
    of = data["requests"]
    number, prefix, own = of["number"], of["prefix_len"], of["own_len"]
    alone, once = number * (prefix + own), prefix + number * own
    counts = {
        arm: (numbers["prompt_tokens_computed"]["median"], numbers["cached_tokens"]["median"])
        for arm, numbers in data["summary"]["arms"].items()
    }
    last = (prefix + own) % 16  # of a full hit, the tokens after the last full block
    assert counts == {
        "m3": (alone, 0),
        "no_cache": (alone, 0),
        "together": (once, alone - once),
        "again": (number * last, alone - number * last),
    }
    for limits, row in data["rules"].items():
        assert row["none"] == alone
        assert once <= row["forward"] <= row["written"] <= row["none"]
        assert row["forward"] == once or not limits.endswith("/0")  # what a prompt in chunks computes twice
        if int(limits.split("/")[0]) >= alone:
            assert row["written"] == alone  # "finds nothing"
    hits = data["hit_rate"]
    for size, rates in hits["rates"].items():
        for shared, rate in zip(hits["shared"], rates, strict=True):
            found = min(shared, hits["prompt_len"] - 1) // int(size) * int(size)
            assert rate == pytest.approx((hits["number"] - 1) * found / (hits["number"] * hits["prompt_len"]))
    giving_way = data["preemption"]
    assert giving_way["cache"]["preemptions"] == giving_way["no_cache"]["preemptions"] > 0
    assert giving_way["cache"]["tokens_scheduled"] < giving_way["no_cache"]["tokens_scheduled"]


def test_the_mistakes_of_chapter_1_show_and_the_right_ways_agree() -> None:
    found = ledger.result("m0-cache-folo-tiny")["logit_differences"]
    right = ("token_by_token_with_cache", "lower_triangular", "decode_sees_all")
    wrong = ("upper_triangular", "decode_sees_itself_only", "decode_one_position_late")
    assert max(found[name] for name in right) < 1e-3
    assert min(found[name] for name in wrong) > 0.1


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
JSON = st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


@given(JSON)
def test_a_results_file_holds_what_was_measured(data: Any) -> None:
    assert json.loads(as_text(data)) == data


def test_a_results_file_has_a_line_for_what_belongs_together() -> None:
    row = list(range(100))  # longer than a line, but of plain values
    rounds = [{"seconds": 1.5, "steps": 7}] * 2
    text = as_text({"row": row, "short": rounds, "long": [{"name": "n" * LINE}, rounds]})
    assert text.splitlines() == [
        "{",
        f' "row": {row},',
        f' "short": {json.dumps(rounds)},',
        ' "long": [',
        "  {",
        f'   "name": "{"n" * LINE}"',
        "  },",
        f"  {json.dumps(rounds)}",
        " ]",
        "}",
    ]


# --- pages ------------------------------------------------------------------------------------------------


def text_of(chapter: Path) -> str:
    return chapter.read_text(encoding="utf-8")


def test_pages_use_known_ids_and_every_id_is_used() -> None:
    pages = "\n".join(map(text_of, [*CHAPTERS, *BESIDE]))
    assert set(re.findall(r"\{claim\}`([^`]*)`", pages)) - registry.all_claims().keys() == set()
    used = set(re.findall(r"\{claim\}`([^`]*)`", pages))
    for name in re.findall(r"^```\{evidence\} (\S+)$", pages, re.MULTILINE):
        used |= {*all_errata()[name].known, *all_errata()[name].claims}
    assert set(registry.all_claims()) - used == set()
    assert sorted(re.findall(r"^```\{claims-table\} (\S+)$", pages, re.MULTILINE)) == sorted(registry.all_tables())
    files = {text.partition("|")[0] for text in re.findall(r"\{provenance\}`([^`]*)`", pages)}
    assert files <= set(results_of_the_course())


def without_sources(text: str) -> str:
    """A page without what has a source of its own: roles, code, formulas, and links."""
    fence = re.compile(r"^```(\{drawn\})?[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    text = fence.sub(lambda found: found[2] if found[1] else " ", text)  # a caption is text
    text = re.sub(r"\{[a-z:-]+\}`[^`]*`|`[^`]*`", " ", text)
    text = re.sub(r"\$\$.*?\$\$|\$[^$\n]*\$", " ", text, flags=re.DOTALL)
    return re.sub(r"\]\([^)]*\)", "]", text)


UNITS = r"(?:ms|µs|seconds|%|percent|[KMGT]i?B|bytes|GB/s|[GT]?FLOPs?|tokens/s|x|times|fold|billion|million|trillion)"
A_MEASURE = re.compile(rf"(?<![\w.^-])\d[\d.,]*\s?{UNITS}(?![\w/-])")
# Quoted mistakes that stand in a title, where they are recognised; and what the reader is told to do.
ALLOWED = ("5.26x", "50.25x", "50 times", "3 to 5 times", "10 times", "0.6 billion")


@each_chapter
def test_a_number_with_a_unit_comes_from_the_ledger(chapter: Path) -> None:
    body = re.sub(r"^:alt:.*$", "", without_sources(text_of(chapter)), flags=re.MULTILINE)
    found = [match.group() for match in A_MEASURE.finditer(body)]
    assert [
        measure for measure in found if not any(measure in allowed or allowed in measure for allowed in ALLOWED)
    ] == []


@each_chapter
def test_a_table_on_a_page_holds_no_number_of_its_own(chapter: Path) -> None:
    rows = [line for line in without_sources(text_of(chapter)).splitlines() if line.startswith("|")]
    bare = [
        cell for row in rows for cell in row.split("|") if re.search(r"(?<![\w.])\d", re.sub(r"^\s*\d\. ", "", cell))
    ]
    assert bare == []


# --- how numbers are written ------------------------------------------------------------------------------


@given(st.floats(1e-6, 1e12), st.integers(1, 5))
def test_digits_keeps_as_many_as_asked(number: float, count: int) -> None:
    shown = forms.digits(count)(number)
    assert "e" not in shown
    assert float(shown.replace(",", "")) == pytest.approx(number, rel=0.501 * 10 ** (1 - count))
    assert len(re.sub(r"[.,]", "", shown).lstrip("0")) <= max(count, len(f"{number:.0f}") + 1)


@pytest.mark.parametrize(
    ("form", "number", "shown"),
    [
        (forms.digits(2), 6.999, "7.0"),
        (forms.digits(2), 7.0, "7"),
        (forms.digits(2), 9.99, "10"),
        (forms.digits(3), 1234.5, "1,230"),
        (forms.digits(2, "ms", 1e3), 0.0123, "12 ms"),
        (forms.fixed(1), 50.5, "50.5"),
        (forms.percent(1), 0.0391, "3.9 %"),
        (forms.binary, 524_288, "512 KiB"),
        (forms.binary, 2.44140625 * 2**30, "2.44 GiB"),
        (forms.plain, 114_688, "114,688"),
        (forms.power, 3e-7, "below 1e-6"),
        (forms.power, 0.0, "0"),
        (forms.named(".2g ms"), 0.0123, "12 ms"),
        (forms.named(".0f minutes"), {"median": 660.0, "min": 600.0, "max": 720.0}, "11 minutes"),
        (forms.named("of"), [3, 4], "3 of 4"),
        (forms.named("range .2g"), {"median": 4.9, "min": 4.6, "max": 5.3}, "4.9 (4.6 to 5.3)"),
        (forms.with_range(forms.digits(2)), {"median": 4.9, "min": 4.6, "max": 5.3}, "4.9 (4.6 to 5.3)"),
    ],
)
def test_how_numbers_are_written(form: forms.Form, number: Any, shown: str) -> None:
    assert form(number) == shown
