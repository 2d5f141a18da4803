"""Claims of chapter 8: one workload on every milestone, the same tokens, and what a latency target asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from claims.chapter_4 import over
from claims.forms import digits, mib, ms, percent, plain, share, times
from claims.ledger import Claim, Derived, Table, at, measured_table, over_rounds, ratio, result
from folovllm.course.grading.latency import COST, ITL_TARGET, LONG_TTFT_TARGET, MS, SHORT_TTFT_TARGET

WATERFALL = "m4-waterfall-qwen3-0.6b"  # w3 on every milestone, hf:sequential (M0's way) and hf:static
WHOLE = "m4-whole-folo-tiny"  # by `python -m folovllm.course.measure whole`
LATENCY = "m4-latency-target"  # by `python -m folovllm.course.measure latency`
TINY_ARMS = f"{WHOLE}/summary/arms"
HERE = "docs/claims/chapter_8.py"
W3 = {"hf:sequential": "M0", "m1": "M1", "m2:loop": "M2, loop", "m2:padded": "M2, padded", "m3": "M3", "m4": "M4"}
ARMS = {
    "m0-recompute": "M0, no cache",
    "m0": "M0",
    "m1": "M1",
    "m2-loop": "M2, loop",
    "m2-padded": "M2, padded",
    "m3": "M3",
    "m4": "M4",
}
STATIC = "hf:static"
MIB = 2**-20
Spread = Mapping[str, float]

# --- one workload -------------------------------------------------------------------------------------------


def before(arm: str, names: Mapping[str, str]) -> str | None:
    """The rung below an arm; None for the first."""
    order = list(names)
    return order[order.index(arm) - 1] if order.index(arm) else None


def w3_over_before(system: str) -> Spread | None:
    """A system's tokens per second over those of the rung before it, on w3."""
    below = before(system, W3) if system in W3 else None
    return None if below is None else over(WATERFALL, "w3", system, below)


def gain_or_dash(gain: Spread | None) -> str:
    """The median of a gain; a dash for the first rung."""
    return "-" if gain is None else times(gain)


def used_share(numbers: Mapping[str, Spread]) -> float:
    """Of the K/V that was set aside, the share that requests needed."""
    return numbers["kv_used_bytes"]["median"] / numbers["kv_reserved_bytes"]["median"]


def tiny_over(arm: str, other: str) -> Spread:
    """An arm's tokens per second over another's on the chapter's own workload, taken inside of each round."""
    return ratio(WHOLE, f"arms/{arm}/output_tokens_per_s", f"arms/{other}/output_tokens_per_s")


# --- the same tokens ----------------------------------------------------------------------------------------


def cells() -> list[dict[str, Any]]:
    """The settings of the matrix."""
    found: list[dict[str, Any]] = result(WHOLE)["matrix"]["cells"]
    return found


def compared() -> int:
    """Answers compared with `generate`'s, over all settings."""
    return len(cells()) * int(result(WHOLE)["matrix"]["total"])


def same_answers() -> int:
    """Of these, the ones with its tokens."""
    return sum(cell["same"] for cell in cells())


def crowded() -> int:
    """Settings in which a request was preempted."""
    return sum(cell["preemptions"] > 0 for cell in cells())


# --- a request through the layers ---------------------------------------------------------------------------

FOLLOWED = "1"  # the second request of the trace: it has the first one's prefix


def request_rows() -> list[list[str]]:
    """The steps of one request: what the runtime gave it, and what the model made of it."""
    rows: list[list[str]] = []
    for step in result(WHOLE)["trace"]["steps"]:
        share = next((r for r in step["requests"] if r["request_id"] == FOLLOWED), None)
        if share is None and rows and rows[-1][1] != "waiting":
            break  # it is done
        spent = {name: end - start for name, (start, end) in step["phases"].items()}
        runtime = sum(spent.values()) - spent["forward"]
        times = [digits(2, "", 1e3)(runtime), digits(2, "", 1e3)(spent["forward"])]
        if share is None:
            rows.append([plain(step["step"]), "waiting", "-", "-", "0", "-", "-", *times])
            continue
        table = step["blocks"]["tables"].get(FOLLOWED, [])
        rows.append(
            [
                plain(step["step"]),
                "done" if share["status"].startswith("FINISHED") else share["status"].lower(),
                plain(share["num_cached"]),
                plain(share["num_scheduled"]),
                plain(share["num_computed"]),
                ", ".join(map(str, table[:2])) + (f", ... {table[-1]}" if len(table) > 2 else "") if table else "freed",
                " ".join(map(str, share["sampled_ids"])) or "-",
                *times,
            ]
        )
    return rows


def layer_rows() -> list[list[str]]:
    """Of M4's time, the shares of the interface, the runtime and the model's forward, by workload."""
    shares = result(WHOLE)["summary"]["layers"]
    return [
        ["folo-tiny, this chapter's", *(percent(1)(shares[layer]) for layer in LAYERS)],
        ["Qwen3-0.6B, w3", *(percent(2)(w3_layer(layer)) for layer in LAYERS)],
    ]


LAYERS = ("interface", "runtime", "forward")


def w3_layer(layer: str) -> float:
    """A layer's share of M4's time on w3, the median of the rounds."""

    def part(current: dict[str, Any]) -> float:
        run = current["runs"]["w3"]["m4"]
        spent, wall = run["engine"]["phase_s"], run["wall_s"]
        runtime = sum(spent.values()) - spent["forward"]
        parts = {"forward": spent["forward"], "runtime": runtime, "interface": wall - sum(spent.values())}
        return float(parts[layer] / wall)

    return over_rounds(WATERFALL, part)["median"]


# --- a latency target ---------------------------------------------------------------------------------------


TABLES: dict[str, Table] = {
    "whole-w3": measured_table(
        "w3 on every milestone, on the shape of Qwen3-0.6B",
        f"{WATERFALL}/summary/w3",
        "milestone",
        {
            "tokens/s": ("output_tokens_per_s", ".3g"),
            "over the row above": lambda system: gain_or_dash(w3_over_before(system)),
            "TTFT p50, s": ("ttft_p50_s", ".3g"),
            "longest ITL, ms": ("itl_max_s", ms),
            "K/V, MiB": ("kv_reserved_bytes", mib),
            "of it used": lambda system: share(used_share(at(f"{WATERFALL}/summary/w3/{system}"))),
        },
        {**W3, STATIC: STATIC},
    ),
    "whole-tiny": measured_table(
        "questions, a document and a shared system prompt on every milestone, on folo-tiny",
        TINY_ARMS,
        "milestone",
        {
            "tokens/s": ("output_tokens_per_s", ".3g"),
            "over the row above": lambda arm: times(at(f"{TINY_ARMS}/{arm}/over_before")) if before(arm, ARMS) else "-",
            "mean TTFT, ms": ("mean_ttft_s", ms),
            "longest ITL, ms": ("max_itl_s", ms),
            "K/V, MiB": ("kv_reserved_bytes", mib),
            "of it used": lambda arm: "-" if arm == "m0-recompute" else share(used_share(at(f"{TINY_ARMS}/{arm}"))),
            "prompt tokens computed": ("prompt_tokens_computed", ".0f"),
            "forwards": ("forwards", ".0f"),
        },
        ARMS,
    ),
    "one-request": Table(
        "one request, step by step",
        ("step", "status", "found", "computed", "K/V", "its blocks", "sampled", "runtime", "model"),
        request_rows,
        files=(WHOLE,),
    ),
    "layer-shares": Table(
        "where M4's time goes",
        ("workload", "interface", "runtime", "forward of the model"),
        layer_rows,
        files=(WHOLE, WATERFALL),
    ),
    "latency-policies": measured_table(
        "eight readers, a long prompt and five short ones on the exercise's machine: milliseconds",
        f"{LATENCY}/policies",
        "policy",
        {
            "longest ITL": ("longest_itl_ms", ".0f"),
            "TTFT of the long prompt": ("long_ttft_ms", ".0f"),
            "longest TTFT of a short one": ("short_ttft_ms", ".0f"),
        },
        {str(b): f"budget {b:,}" for b in (64, 108, 160, 256, 4096)} | {"solution": "by cost, shortest first"},
    ),
}


def _w3_gain(says: str, system: str) -> Claim:
    return Derived(f"{says}, w3 on Qwen3-0.6B", lambda: w3_over_before(system), ".2f", w3_over_before)


def _target(says: str, nanoseconds: int) -> Claim:
    return Derived(f"the exercise's target for {says}", lambda: nanoseconds, digits(4, "ms", 1 / MS), STEP_COST)


STEP_COST = "folovllm/course/grading/latency.py:step_cost"

CLAIMS: dict[str, Claim] = {
    # --- w3
    "w3-m1-gain": _w3_gain("M1 over M0", "m1"),
    "w3-loop-gain": _w3_gain("M2's loop over M1", "m2:loop"),
    "w3-padded-gain": _w3_gain("M2's padded batch over its loop", "m2:padded"),
    "w3-m3-gain": _w3_gain("M3 over M2's padded batch", "m3"),
    "w3-m4-gain": _w3_gain("M4 over M3", "m4"),
    "w3-m4-over-static": Derived(
        "M4's tokens per second over a static batch's, w3 on Qwen3-0.6B",
        lambda: over(WATERFALL, "w3", "m4", STATIC),
        ".3g",
        over,
    ),
    "w3-m2-used": Derived(
        "of what M2 set aside, the share that was used, w3",
        lambda: used_share(result(WATERFALL)["summary"]["w3"]["m2:padded"]),
        ".0%",
        used_share,
    ),
    # --- this chapter's workload
    "tiny-m4-over-m0": Derived(
        "M4's tokens per second over M0's, folo-tiny", lambda: tiny_over("m4", "m0"), "range .2g", tiny_over
    ),
    "tiny-m2-used": Derived(
        "of what M2 set aside, the share that was used, folo-tiny",
        lambda: used_share(result(WHOLE)["summary"]["arms"]["m2-padded"]),
        ".0%",
        used_share,
    ),
    # --- the matrix
    "matrix-settings": Derived("settings of the same-token matrix", lambda: len(cells()), by=cells),
    "matrix-compared": Derived("answers compared with generate's", compared),
    "matrix-same": Derived("answers with generate's tokens", same_answers),
    "matrix-crowded": Derived("settings in which a request was preempted", crowded),
    # --- layers
    "w3-forward-share": Derived(
        "share of M4's time inside the model's forward, w3 on Qwen3-0.6B", lambda: w3_layer("forward"), ".1%", w3_layer
    ),
    # --- the latency target
    "target-itl": _target("the longest time between two tokens", ITL_TARGET),
    "target-ttft": _target("the long prompt's time to first token", LONG_TTFT_TARGET),
    "target-short": _target("a short prompt's time to first token", SHORT_TTFT_TARGET),
    "late-token-cost": Derived(
        "nanoseconds for the pairs of a token behind 4,000 others over those for everything else of it, the exercise's "
        "machine",
        lambda: 4000 * COST.per_pair / COST.per_token,
        ".2g",
        STEP_COST,
    ),
}
