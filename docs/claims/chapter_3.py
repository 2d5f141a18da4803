"""Claims of chapter 3: what batches waste, what sharing a pass gains, and what requests wait."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from statistics import fmean

from claims.forms import NOT_TOLD, Form, ms, percent, plain, share, three, times, times_range
from claims.ledger import Claim, Derived, Measured, Table, at, measured_table, result

TINY, QWEN = "m2-batching-folo-tiny", "m2-batching-qwen3-0.6b"
W2 = "m2-w2-qwen3-0.6b"  # by `folovllm bench`, with m1 as the base
HERE = "docs/claims/chapter_3.py"

# --- padding ----------------------------------------------------------------------------------------------

UNEQUAL, NEARLY_EQUAL = (12, 300, 40), (36, 37, 36)  # prompts of a batch, in tokens
ONE_PROMPT_SEVEN_DECODES = (100, *[1] * 7)
EXERCISE = (2, 5, 10)


def cells(lengths: Sequence[int]) -> int:
    """Cells of the rectangle that holds rows of these lengths."""
    return len(lengths) * max(lengths)


def padding_share(lengths: Sequence[int]) -> float:
    """The share of them that is padding."""
    return 1 - sum(lengths) / cells(lengths)


def w2_prompts() -> list[int]:
    """Prompt lengths of w2 as it was measured."""
    return [prompt for prompt, *_ in result(W2)["workloads"]["w2"]["requests"]]


# --- steps ------------------------------------------------------------------------------------------------

SEATS = 4
OUTPUTS = {"10, 20, 30, 100": (10, 20, 30, 100), "these, 4 times": (10, 20, 30, 100) * 4, "40, 16 times": (40,) * 16}


def static_steps(outputs: Sequence[int], seats: int) -> int:
    """Steps of batches that start together and end with their longest output."""
    return sum(max(outputs[i : i + seats]) for i in range(0, len(outputs), seats))


def continuous_steps(outputs: Sequence[int], seats: int) -> int:
    """Steps when a seat that comes free is taken in the next step."""
    waiting, running, steps = deque(outputs), list[int](), 0
    while waiting or running:
        while waiting and len(running) < seats:
            running.append(waiting.popleft())
        running = [left - 1 for left in running if left > 1]
        steps += 1
    return steps


def step_rows() -> list[list[str]]:
    """The same outputs one at a time, in static batches, and with seats that are refilled."""
    rows = []
    for name, outputs in OUTPUTS.items():
        static, continuous = static_steps(outputs, SEATS), continuous_steps(outputs, SEATS)
        used = sum(outputs) / (SEATS * static)
        counts = [plain(sum(outputs)), plain(static), share(used), plain(continuous)]
        rows.append([name, *counts, times(static / continuous)])
    return rows


# --- reservations -----------------------------------------------------------------------------------------

CAPACITY, MAX_MODEL_LEN, PROMPT, ANSWER = 4096, 1024, 100, 50  # tokens


def reserved_and_used() -> tuple[int, int]:
    """Tokens that a request sets aside, and those that it has K/V for when it is done."""
    return MAX_MODEL_LEN, PROMPT + ANSWER - 1


# --- w2 on Qwen3-0.6B -------------------------------------------------------------------------------------


def forwards(system: str) -> int | None:
    """Forward passes that a system makes for w2, the same in every round; None where it cannot be known."""
    outputs = [max_tokens for _, max_tokens, *_ in result(W2)["workloads"]["w2"]["requests"]]
    engine = result(W2)["rounds"][0]["runs"]["w2"][system].get("engine")
    if engine is not None:
        return int(engine["stats"]["forwards"])
    if system == "hf:sequential":
        return sum(outputs)
    batch = re.fullmatch(r"hf:static(?::(\d+))?", system)
    return None if batch is None else static_steps(outputs, int(batch[1] or len(outputs)))


def padded_kv_share() -> float:
    """The share of K/V columns that are padding in m2:padded's batches, over all its passes."""
    stats = result(W2)["rounds"][0]["runs"]["w2"]["m2:padded"]["engine"]["stats"]
    # A request's K/V is read in the pass of each of its tokens, and has grown by one in each.
    requests = result(W2)["workloads"]["w2"]["requests"]
    held = sum(sum(range(prompt, prompt + output)) for prompt, output, *_ in requests)
    return float(stats["padding_kv_tokens"] / (stats["padding_kv_tokens"] + held))


# --- 16 requests on folo-tiny -----------------------------------------------------------------------------

ARMS = {
    "m1": "M1",
    "m2-loop-4": "loop, 4",
    "static-4": "static, 4",
    "m2-padded-4": "padded, 4",
    "m2-loop-16": "loop, 16",
    "static-16": "static, 16",
    "m2-padded-16": "padded, 16",
}


def urgent_wait(policy: str) -> str:
    """The mean wait of the requests with priority 0, in steps."""
    policies = at(f"{TINY}/policies")
    waits = zip(policies[policy]["waited_steps"], policies["priorities"], strict=True)
    return three(fmean(steps for steps, priority in waits if priority == 0))


def steps_in_all(policy: str) -> int:
    """Steps until all requests are done under a policy."""
    return len(result(TINY)["policies"][policy]["waiting_running"])


TABLES: dict[str, Table] = {
    "batching-steps": Table(
        f"steps with {SEATS} seats",
        ("outputs", "one at a time", "static", "seats in use", "continuous", "static over continuous"),
        step_rows,
    ),
    "m2-decode-step": measured_table(
        "a decode step of several texts, in one pass and in one pass each",
        f"{QWEN}/summary/decode_step",
        "texts",
        {
            "one pass, ms": ("padded_seconds", ms),
            "a pass each, ms": ("loop_seconds", ms),
            "a pass each over one pass": ("loop_over_padded", "range .2g"),
            "tokens/s in one pass": ("padded_tokens_per_s", ".3g"),
        },
    ),
    "m2-attribution": measured_table(
        "w2 on every system: 16 requests that arrive together",
        f"{W2}/summary/w2",
        "system",
        {
            "passes": lambda system: NOT_TOLD if (passes := forwards(system)) is None else plain(passes),
            "tokens/s": ("output_tokens_per_s", ".3g"),
            "over m1": ("ratio_to_base", ".2f"),
            "TTFT, s": ("ttft_p50_s", ".3g"),
            "ITL, ms": ("itl_p50_s", ms),
            "m1's tokens": ("same_tokens_as_base", "{0[0]}/{0[1]}".format),
        },
    ),
    "m2-arms": measured_table(
        "16 requests on the bundled model, with few seats and with enough",
        f"{TINY}/summary/arms",
        "arm, seats",
        {
            "passes": ("forwards", plain),
            "over M1": ("ratio_to_m1", ".2f"),
            "first, ms": ("mean_ttft_s", ms),
            "last, ms": ("mean_e2e_s", ms),
            "rows": ("padding_share", ".0%"),
            "K/V": ("kv_padding_share", ".0%"),
        },
        ARMS,
    ),
    "m2-policies": measured_table(
        "waits for a seat in steps, 16 requests that arrive together, 4 seats",
        f"{TINY}/summary/policies",
        "policy",
        {
            "mean wait": ("mean_wait_steps", ".3g"),
            "longest wait": ("longest_wait_steps", plain),
            "mean wait of the urgent": urgent_wait,
            "steps until all are done": lambda policy: plain(steps_in_all(policy)),
        },
    ),
}


def _w2(says: str, system: str, number: str, form: Form) -> Claim:
    return Measured(f"{says}, {system}, w2 on Qwen3-0.6B", f"{W2}/summary/w2/{system}/{number}", form)


CLAIMS: dict[str, Claim] = {
    # --- padding
    "padding-unequal-cells": Derived(f"cells of a batch of prompts of {UNEQUAL} tokens", cells(UNEQUAL), by=cells),
    "padding-unequal-tokens": Derived("tokens in it", sum(UNEQUAL), by=f"{HERE}:UNEQUAL"),
    "padding-unequal": Derived("share of it that is padding", padding_share(UNEQUAL), ".1%", padding_share),
    "padding-nearly-equal": Derived(
        f"share of a batch of prompts of {NEARLY_EQUAL} tokens that is padding",
        padding_share(NEARLY_EQUAL),
        ".1%",
        padding_share,
    ),
    "padding-mixed-cells": Derived(
        "cells of a batch of a prompt of 100 tokens and 7 decodes", cells(ONE_PROMPT_SEVEN_DECODES), by=cells
    ),
    "padding-mixed-tokens": Derived(
        "tokens in it", sum(ONE_PROMPT_SEVEN_DECODES), by=f"{HERE}:ONE_PROMPT_SEVEN_DECODES"
    ),
    "padding-mixed": Derived(
        "share of it that is padding", padding_share(ONE_PROMPT_SEVEN_DECODES), ".1%", padding_share
    ),
    "padding-exercise-cells": Derived(
        f"padding cells of a batch of prompts of {EXERCISE} tokens", cells(EXERCISE) - sum(EXERCISE), by=cells
    ),
    "padding-exercise-used": Derived(
        "share of it that holds tokens", 1 - padding_share(EXERCISE), ".1%", padding_share
    ),
    "w2-prefill-padding": Derived(
        "padding in one prefill of all prompts of w2", lambda: padding_share(w2_prompts()), ".0%", w2_prompts
    ),
    "w2-kv-padding": Derived(
        "padding among the K/V columns that m2:padded reads on w2, over all its passes", padded_kv_share, ".0%"
    ),
    # --- the problem, and what w2 shows
    "m2-loop-over-m1": _w2("output tokens per second over M1's", "m2:loop", "ratio_to_base", times_range),
    "m2-padded-over-m1": _w2("output tokens per second over M1's", "m2:padded", "ratio_to_base", times_range),
    "m1-w2-roofline": _w2("least time on the roofline over time", "m1", "roofline_share", percent(1)),
    "m2-loop-roofline": _w2("least time on the roofline over time", "m2:loop", "roofline_share", percent(1)),
    "m2-padded-roofline": _w2("least time on the roofline over time", "m2:padded", "roofline_share", percent(1)),
}
CLAIMS |= {
    f"{name}-passes": Derived(f"forward passes of {system} for w2", lambda system=system: forwards(system), by=forwards)
    for name, system in {"m1-w2": "m1", "m2-loop": "m2:loop", "m2-padded": "m2:padded"}.items()
}
CLAIMS |= {
    # --- reservations
    "reservation": Derived(
        f"tokens set aside for a prompt of {PROMPT} with max_model_len={MAX_MODEL_LEN}",
        lambda: reserved_and_used()[0],
        by=reserved_and_used,
    ),
    "reservation-admitted": Derived(
        f"such requests that a cache of {CAPACITY} tokens admits",
        lambda: CAPACITY // reserved_and_used()[0],
        by=f"{HERE}:CAPACITY",
    ),
    "reservation-used": Derived(
        f"of what is set aside, what holds K/V after an answer of {ANSWER} tokens",
        lambda: reserved_and_used()[1] / reserved_and_used()[0],
        ".1%",
        reserved_and_used,
    ),
    "reservation-by-use": Derived(
        "requests of that size whose tokens the cache can hold",
        lambda: CAPACITY // reserved_and_used()[1],
        by=f"{HERE}:CAPACITY",
    ),
    # --- policies
    **{
        f"m2-{policy}-steps": Derived(
            f"steps until all 16 requests are done with {SEATS} seats, {policy}",
            lambda policy=policy: steps_in_all(policy),
            by=steps_in_all,
        )
        for policy in ("fcfs", "sjf")
    },
}
