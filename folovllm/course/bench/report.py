"""From rounds to a report: medians, spreads, ratios, and the JSON file.

See `rounds`. The share of the roofline, too, is taken inside each round, against ceilings that the round measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from folovllm.course.bench.roofline import least_seconds
from folovllm.course.bench.rounds import spread
from folovllm.course.bench.runner import Measurements, Round
from folovllm.course.bench.workloads import BenchRequest

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SCHEMA = 1  # of the JSON; results/README.md describes it

# Numbers of a run that are summarised unchanged: name -> path in the run's data.
PLAIN = {
    "output_tokens_per_s": ("output_tokens_per_s",),
    "wall_s": ("wall_s",),
    **{f"{name}_{q}_s": (f"{name}_s", q) for name in ("ttft", "itl") for q in ("p50", "p99", "max")},
    "kv_capacity_bytes": ("kv_capacity_bytes",),
    "kv_reserved_bytes": ("kv_reserved_bytes",),
    "kv_used_bytes": ("kv_used_bytes",),
    "padding_share": ("padding_share",),
    "kv_padding_share": ("kv_padding_share",),
    "overhead_share": ("overhead_share",),
    "peak_memory_bytes": ("peak_memory_bytes",),
    "other_cpu_share": ("other_cpu_share",),
}


def add_roofline(
    rounds: Sequence[Round], config: PretrainedConfig, itemsize: int, requests: Mapping[str, Sequence[BenchRequest]]
) -> str | None:
    """Add `least_s` and `roofline_share` to each run, from its own round's ceilings. Returns a reason if impossible."""
    reason = None
    for current in rounds:
        bytes_per_s = current.machine["read_bytes_per_s"]
        flops_per_s = max(current.machine["gemm_flops_per_s"].values())
        for workload, runs in current.runs.items():
            try:
                least: float | None = least_seconds(config, requests[workload], itemsize, bytes_per_s, flops_per_s)
            except ValueError as error:
                least, reason = None, str(error)
            for run in runs.values():
                run["least_s"] = least
                run["roofline_share"] = None if least is None else least / run["wall_s"]
    return reason


def summarize(rounds: Sequence[Round], systems: Sequence[str], base: str) -> dict[str, dict[str, dict[str, Any]]]:
    """workload -> system -> number -> `spread` over the rounds.

    ratio_to_base is output_tokens_per_s over the base's, round by round. same_tokens_as_base is [requests with the
    base's tokens, requests] in the first round that has both; None if the base has not run.
    """
    workloads = dict.fromkeys(name for current in rounds for name in current.runs)
    return {
        workload: {
            system: _summary([current.runs.get(workload, {}) for current in rounds], system, base)
            for system in systems
            if any(system in current.runs.get(workload, {}) for current in rounds)
        }
        for workload in workloads
    }


def _summary(rounds: Sequence[dict[str, dict[str, Any]]], system: str, base: str) -> dict[str, Any]:
    own = [runs[system] for runs in rounds if system in runs]
    both = [(runs[system], runs[base]) for runs in rounds if system in runs and base in runs]
    summary: dict[str, Any] = {name: spread(_at(run, where) for run in own) for name, where in PLAIN.items()}
    summary["roofline_share"] = spread(run.get("roofline_share") for run in own)
    summary["ratio_to_base"] = spread(a["output_tokens_per_s"] / b["output_tokens_per_s"] for a, b in both)
    summary["same_tokens_as_base"] = same_tokens(*both[0]) if both else None
    return summary


def same_tokens(run: dict[str, Any], base: dict[str, Any]) -> list[int]:
    """[requests with the same output, requests]."""
    pairs = list(zip(run["token_hashes"], base["token_hashes"], strict=True))
    return [sum(a == b for a, b in pairs), len(pairs)]


def _at(run: dict[str, Any], where: Sequence[str]) -> float | None:
    value: Any = run
    for key in where:
        value = None if value is None else value[key]
    return value


def build_report(
    header: dict[str, Any], measurements: Measurements, systems: Sequence[str], base: str
) -> dict[str, Any]:
    """The report of a bench as plain data: see results/README.md."""
    return {
        "schema": SCHEMA,
        **header,
        "base": base,
        "systems": list(systems),
        "left_out": measurements.left_out,
        "summary": summarize(measurements.rounds, systems, base),
        "machine": {
            "read_bytes_per_s": spread(r.machine["read_bytes_per_s"] for r in measurements.rounds),
            "gemm_flops_per_s": {
                m: spread(r.machine["gemm_flops_per_s"][m] for r in measurements.rounds)
                for m in (measurements.rounds[0].machine["gemm_flops_per_s"] if measurements.rounds else ())
            },
        },
        "rounds": [{"machine": r.machine, "runs": r.runs} for r in measurements.rounds],
    }


def save_report(report: dict[str, Any], path: Path) -> None:
    """Write JSON atomically: an interrupt leaves an older file unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)
