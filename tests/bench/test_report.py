"""Rounds of made-up numbers, and what has to come out of them."""

from __future__ import annotations

import copy
import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import LlamaConfig

from folovllm.course.bench.plot import plot
from folovllm.course.bench.record import Measured, distribution, percentile, token_hash
from folovllm.course.bench.report import add_roofline, build_report, save_report, spread, summarize
from folovllm.course.bench.roofline import least_seconds
from folovllm.course.bench.runner import Measurements, Round
from folovllm.course.bench.tables import TABLE_WIDTH, tables
from folovllm.course.bench.workloads import BenchRequest


def run(rate: float, **other: Any) -> dict[str, Any]:
    """A run's result, as `Measured.to_json` gives it."""
    result: dict[str, Any] = {
        "wall_s": 64 / rate,
        "output_tokens": 64,
        "output_tokens_per_s": rate,
        "ttft_s": {"p50": 0.1, "p99": 0.2, "max": 0.3},
        "itl_s": {"p50": 0.01, "p99": 0.02, "max": 0.03},
        "kv_capacity_bytes": 8 * 2**20,
        "kv_reserved_bytes": 4 * 2**20,
        "kv_used_bytes": 2**20,
        "padding_share": 0.25,
        "kv_padding_share": 0.375,
        "overhead_share": 0.05,
        "token_hashes": ["a", "b"],
        "peak_memory_bytes": 600 * 2**20,
        "other_cpu_share": 0.02,
    }
    return result | other


def rounds_of(**rates: list[float]) -> list[Round]:
    """Rounds of workload w1, one rate per system and round."""
    machine = {"read_bytes_per_s": 40e9, "gemm_flops_per_s": {"1": 20e9, "512": 200e9}, "gemm_size": 2048}
    count = len(next(iter(rates.values())))
    return [
        Round(copy.deepcopy(machine), {"w1": {system: run(values[i]) for system, values in rates.items()}})
        for i in range(count)
    ]


def report_of(rounds: list[Round], systems: list[str], base: str) -> dict[str, Any]:
    left_out = {"w1": {"hf:static": "a reason"}}
    header = {
        "hardware": {"cpu": "A CPU", "threads": 2, "gpu": None},
        "model": "folo-tiny",
        "dtype": "float32",
        "load_format": "auto",
        "scale": 1.0,
        "workloads": {"w1": {"about": "one request"}, "w2": {"about": "some arriving at 4/s"}},
        "roofline_left_out": None,
    }
    return build_report(header, Measurements(rounds, left_out), systems, base)


# ------------------------------------------------------------------ one run


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentile_is_numpys(values, q):
    assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)), abs=1e-6)


def test_percentile_refuses_what_has_none():
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 50)
    with pytest.raises(ValueError, match="q=101"):
        percentile([1.0], 101)
    assert distribution(None) is None and distribution([]) is None


def test_a_run_by_hand():
    measured = Measured(
        arrivals=[10.0, 11.0],
        finished=14.0,
        token_ids=[[1, 2, 3], [4]],
        token_times=[[11.0, 11.5, 13.5], [14.0]],
        kv_reserved_tokens=100,
        forward_seconds=3.0,
        extra={"note": "x"},
    )
    result = measured.to_json(kv_bytes_per_token=8)
    assert result["wall_s"] == 4.0
    assert (result["output_tokens"], result["output_tokens_per_s"]) == (4, 1.0)
    assert result["ttft_s"] == {"p50": 2.0, "p99": pytest.approx(2.98), "max": 3.0}  # 1 and 3
    assert result["itl_s"] == {"p50": 1.25, "p99": pytest.approx(1.985), "max": 2.0}  # 0.5 and 2
    assert result["overhead_share"] == 0.25
    assert (result["kv_reserved_bytes"], result["kv_used_bytes"], result["note"]) == (800, None, "x")
    assert result["token_hashes"] == [token_hash([1, 2, 3]), token_hash([4])]
    assert json.loads(json.dumps(result)) == result
    assert measured.to_json(None)["kv_reserved_bytes"] is None


def test_unknown_times_stay_unknown():
    result = Measured([0.0], 1.0, [[1, 2]], None).to_json(1)
    assert [result[k] for k in ("ttft_s", "itl_s", "overhead_share", "padding_share")] == [None] * 4


def test_token_hashes_tell_outputs_apart():
    outputs = [[], [1], [12], [1, 2], [2, 1], [1, 2, 0]]
    assert len({token_hash(o) for o in outputs}) == len(outputs)


# ------------------------------------------------------------------ over the rounds


def test_spread():
    assert spread([3.0, None, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "rounds": 3}
    assert spread([None]) is None is spread([])


def test_a_ratio_is_taken_inside_a_round():
    # The ratio of the medians would be 1.5; a machine that got twice as fast each round explains most of it.
    rounds = rounds_of(m1=[30, 20, 40], base=[10, 20, 40])
    summary = summarize(rounds, ["m1", "base"], "base")["w1"]
    assert summary["m1"]["ratio_to_base"] == {"median": 1.0, "min": 1.0, "max": 3.0, "rounds": 3}
    assert summary["base"]["ratio_to_base"] == {"median": 1.0, "min": 1.0, "max": 1.0, "rounds": 3}
    assert summary["m1"]["output_tokens_per_s"] == {"median": 30, "min": 20, "max": 40, "rounds": 3}
    assert summary["m1"]["ttft_p99_s"]["median"] == 0.2
    assert summary["m1"]["itl_max_s"]["median"] == 0.03


def test_a_round_without_the_base_gives_no_ratio():
    rounds = rounds_of(m1=[30, 20], base=[10, 20])
    del rounds[0].runs["w1"]["base"]
    summary = summarize(rounds, ["m1", "base"], "base")["w1"]
    assert summary["m1"]["ratio_to_base"] == {"median": 1.0, "min": 1.0, "max": 1.0, "rounds": 1}
    assert summary["m1"]["output_tokens_per_s"]["rounds"] == 2
    without = summarize(rounds[:1], ["m1", "base"], "base")["w1"]
    assert without["m1"]["ratio_to_base"] is None is without["m1"]["same_tokens_as_base"]
    assert "base" not in without


def test_tokens_are_compared_with_the_bases():
    rounds = rounds_of(m1=[1.0], base=[1.0])
    rounds[0].runs["w1"]["m1"]["token_hashes"] = ["a", "c"]
    assert summarize(rounds, ["m1", "base"], "base")["w1"]["m1"]["same_tokens_as_base"] == [1, 2]


def test_the_roofline_uses_the_ceilings_of_its_own_round():
    config = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
    requests = {"w1": [BenchRequest([1, 2, 3], 4)]}
    rounds = rounds_of(m1=[30, 20])
    rounds[1].machine["read_bytes_per_s"] = 10e9
    assert add_roofline(rounds, config, 2, requests) is None
    for current, bytes_per_s in zip(rounds, (40e9, 10e9), strict=True):
        result = current.runs["w1"]["m1"]
        # The best GEMM of any number of rows is the ceiling of the FLOPs.
        assert result["least_s"] == least_seconds(config, requests["w1"], 2, bytes_per_s, 200e9)
        assert result["roofline_share"] == result["least_s"] / result["wall_s"]
    shares = [r.runs["w1"]["m1"]["roofline_share"] for r in rounds]
    assert summarize(rounds, ["m1"], "m1")["w1"]["m1"]["roofline_share"]["max"] == max(shares)


def test_arrivals_of_their_own_leave_no_roofline():
    rounds = rounds_of(m1=[30])
    config = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
    coming = {"w1": [BenchRequest([1, 2], 4), BenchRequest([1, 2], 4, arrival=0.5)]}
    assert "arrive over time" in str(add_roofline(rounds, config, 2, coming))
    assert rounds[0].runs["w1"]["m1"]["roofline_share"] is None


def test_a_model_without_formulas_has_no_roofline():
    rounds = rounds_of(m1=[30])
    config = LlamaConfig(hidden_size=64, num_attention_heads=4)
    config.model_type = "unheard_of"
    assert "unheard_of" in str(add_roofline(rounds, config, 2, {"w1": [BenchRequest([1], 2)]}))
    assert rounds[0].runs["w1"]["m1"]["roofline_share"] is None
    assert summarize(rounds, ["m1"], "m1")["w1"]["m1"]["roofline_share"] is None


# ------------------------------------------------------------------ what is shown and kept


def test_the_tables_fit_their_width_and_cut_nothing():
    rates = {
        "m1": [12345.6, 23456.7],
        "m2:padded@16": [1.23, 2.34],
        "hf:dynamic:16:0.25": [120.0, 130.0],
        "hf:sequential": [801, 1234.5],
    }
    rounds = rounds_of(**rates)
    for current in rounds:
        for system, values in rates.items():
            slow = {"p50": 12.3456, "p99": 123.456, "max": 1234.56}
            current.runs["w1"][system] |= {"ttft_s": slow, "kv_reserved_bytes": 70_000 * 2**20}
            current.runs["w1"][system]["roofline_share"] = 1 / values[0]
    console = Console(width=TABLE_WIDTH, record=True, force_terminal=False, file=io.StringIO())
    console.print(tables(report_of(rounds, list(rates), "hf:sequential")))
    text = console.export_text()
    assert "…" not in text and max(map(len, text.splitlines())) <= TABLE_WIDTH
    for expected in (
        "w1: one request",
        "m2:padded@16",
        "hf:dynamic:16 ",
        ":0.25 ",
        "38%",
        "17,901",
        "12,346-23,457",
        "17.21",
        "15.41-19.00",
        "70,000",
        "1,234,560",
        "0.1%",
        "a reason",
    ):
        assert expected in text, expected


def test_a_busy_machine_is_called_one():
    def shown(rounds: list[Round]) -> str:
        console = Console(width=TABLE_WIDTH, file=io.StringIO(), record=True)
        console.print(tables(report_of(rounds, ["m1"], "m1")))
        return " ".join(console.export_text().split())

    rounds = rounds_of(m1=[30.0, 20.0, 10.0])
    assert "Other programs" not in shown(rounds)
    rounds[1].runs["w1"]["m1"]["other_cpu_share"] = 0.48  # one run of three: the medians hide it
    assert "Other programs used up to 48% of the CPU during a run of w1" in shown(rounds)
    for current in rounds:
        current.runs["w1"]["m1"]["other_cpu_share"] = None
    assert "Other programs" not in shown(rounds)


def test_the_plot_shows_every_system_of_every_workload():
    rounds = rounds_of(m1=[30.0, 20.0], base=[10.0, 20.0])
    for current in rounds:
        current.runs["w2"] = {"m1": run(5.0, ttft_s=None, itl_s=None)}
    figure = plot(report_of(rounds, ["m1", "base"], "base"))
    left = [axes for axes in figure.axes if axes.patches]
    assert [[label.get_text() for label in axes.get_yticklabels()] for axes in left] == [["m1", "base"], ["m1"]]
    assert [[bar.get_width() for bar in axes.patches] for axes in left] == [[25.0, 15.0], [5.0]]
    assert [axes.get_title(loc="left") for axes in left] == ["w1: one request", "w2: some arriving at 4/s"]
    with pytest.raises(ValueError, match="no results"):
        plot(report_of([], ["m1"], "m1"))


def test_a_report_is_written_whole(tmp_path):
    report = report_of(rounds_of(m1=[30.0]), ["m1"], "m1")
    path = tmp_path / "new" / "a.json"
    save_report(report, path)
    assert json.loads(path.read_text()) == report
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]
