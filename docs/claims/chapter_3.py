"""Claims of chapter 3: what batches waste, what sharing a pass gains, and who waits."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from typing import Any

from claims.ledger import (
    Claim,
    Derived,
    Form,
    Measured,
    Table,
    binary,
    digits,
    fixed,
    median,
    percent,
    plain,
    result,
    with_range,
)

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
OUTPUTS = {
    "10, 20, 30, 100": (10, 20, 30, 100),
    "these, 4 times": (10, 20, 30, 100) * 4,
    "40, 16 times": (40,) * 16,
}


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
        counts = [plain(sum(outputs)), plain(static), percent()(used), plain(continuous)]
        rows.append([name, *counts, fixed(2)(static / continuous)])
    return rows


# --- reservations -----------------------------------------------------------------------------------------

CAPACITY, MAX_MODEL_LEN, PROMPT, ANSWER = 4096, 1024, 100, 50  # tokens


def reserved_and_used() -> tuple[int, int]:
    """Tokens that a request sets aside, and those that it has K/V for when it is done."""
    return MAX_MODEL_LEN, PROMPT + ANSWER - 1


# --- w2 on Qwen3-0.6B -------------------------------------------------------------------------------------

NOT_TOLD = "–"  # noqa: RUF001  an en dash, as in print


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


def attribution_rows() -> list[list[str]]:
    """Every system of the measurement, in the order of the file; medians of the rounds."""
    rows = []
    for system, numbers in result(W2)["summary"]["w2"].items():
        passes = forwards(system)
        rows.append(
            [
                system,
                NOT_TOLD if passes is None else plain(passes),
                shown(numbers["output_tokens_per_s"], digits(3)),
                shown(numbers["ratio_to_base"], fixed(2)),
                shown(numbers["ttft_p50_s"], digits(3)),
                shown(numbers["itl_p50_s"], digits(3, "", 1e3)),
                "/".join(map(str, numbers["same_tokens_as_base"] or [NOT_TOLD])),
            ]
        )
    return rows


def shown(spread: Any, form: Form) -> str:
    """The median of a spread, or a dash where the system does not tell."""
    return NOT_TOLD if spread is None else median(form)(spread)


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


def arm_rows() -> list[list[str]]:
    """The arms with 4 and with 16 seats, beside M1."""
    rows = []
    for arm, name in ARMS.items():
        numbers = result(TINY)["summary"]["arms"][arm]
        rows.append(
            [
                name,
                median(plain)(numbers["forwards"]),
                median(fixed(2))(numbers["ratio_to_m1"]),
                median(digits(3, "", 1e3))(numbers["mean_ttft_s"]),
                median(digits(3, "", 1e3))(numbers["mean_e2e_s"]),
                median(percent())(numbers["padding_share"]),
                median(percent())(numbers["kv_padding_share"]),
            ]
        )
    return rows


def steps_in_all(policy: str) -> int:
    """Steps until all requests are done under a policy."""
    return len(result(TINY)["policies"][policy]["waiting_running"])


def policy_rows() -> list[list[str]]:
    """Waits under each policy; the wait of urgent requests is that of those with priority 0."""
    data = result(TINY)
    urgent = [i for i, priority in enumerate(data["policies"]["priorities"]) if priority == 0]
    rows = []
    for policy, numbers in data["summary"]["policies"].items():
        steps = data["policies"][policy]["waited_steps"]
        rows.append(
            [
                policy,
                median(digits(3))(numbers["mean_wait_steps"]),
                median(plain)(numbers["longest_wait_steps"]),
                digits(3)(sum(steps[i] for i in urgent) / len(urgent)),
                plain(steps_in_all(policy)),
            ]
        )
    return rows


# --- forwards of Qwen3-0.6B -------------------------------------------------------------------------------


def decode_rows() -> list[list[str]]:
    """A decode step of B texts: in one pass, and in B passes."""
    rows = []
    for count, numbers in result(QWEN)["summary"]["decode_step"].items():
        rows.append(
            [
                count,
                median(digits(3, "", 1e3))(numbers["padded_seconds"]),
                median(digits(3, "", 1e3))(numbers["loop_seconds"]),
                with_range(digits(2))(numbers["loop_over_padded"]),
                median(digits(3))(numbers["padded_tokens_per_s"]),
            ]
        )
    return rows


TABLES: dict[str, Table] = {
    "batching-steps": Table(
        f"steps with {SEATS} seats",
        ("outputs", "one at a time", "static", "seats in use", "continuous", "static over continuous"),
        step_rows,
        source=f"{HERE}:continuous_steps",
    ),
    "m2-decode-step": Table(
        "a decode step of several texts, in one pass and in one pass each",
        ("texts", "one pass, ms", "a pass each, ms", "a pass each over one pass", "tokens/s in one pass"),
        decode_rows,
        source="folovllm/course/measure/batching.py:forwards_of",
        files=(QWEN,),
    ),
    "m2-attribution": Table(
        "w2 on every system: 16 requests that arrive together",
        ("system", "passes", "tokens/s", "over m1", "TTFT, s", "ITL, ms", "m1's tokens"),
        attribution_rows,
        source=f"{HERE}:forwards",
        files=(W2,),
    ),
    "m2-arms": Table(
        "16 requests on the bundled model, with few seats and with enough",
        ("arm, seats", "passes", "over M1", "first, ms", "last, ms", "rows", "K/V"),
        arm_rows,
        source="folovllm/course/measure/batching.py:serving_of",
        files=(TINY,),
    ),
    "m2-policies": Table(
        "waits for a seat in steps, 16 requests that arrive together, 4 seats",
        ("policy", "mean wait", "longest wait", "mean wait of the urgent", "steps until all are done"),
        policy_rows,
        source="folovllm/course/measure/batching.py:waits_under",
        files=(TINY,),
    ),
}


def _derived(says: str, number: float, form: Form, name: str) -> Claim:
    return Derived(says, lambda: number, form, f"{HERE}:{name}")


def _w2(says: str, system: str, number: str, form: Form) -> Claim:
    return Measured(f"{says}, {system}, w2 on Qwen3-0.6B", W2, ("summary", "w2", system, number), form)


CLAIMS: dict[str, Claim] = {
    # --- padding
    "padding-unequal-cells": _derived(
        f"cells of a batch of prompts of {UNEQUAL} tokens", cells(UNEQUAL), plain, "cells"
    ),
    "padding-unequal-tokens": _derived("tokens in it", sum(UNEQUAL), plain, "UNEQUAL"),
    "padding-unequal": _derived("share of it that is padding", padding_share(UNEQUAL), percent(1), "padding_share"),
    "padding-nearly-equal": _derived(
        f"share of a batch of prompts of {NEARLY_EQUAL} tokens that is padding",
        padding_share(NEARLY_EQUAL),
        percent(1),
        "padding_share",
    ),
    "padding-mixed-cells": _derived(
        "cells of a batch of a prompt of 100 tokens and 7 decodes", cells(ONE_PROMPT_SEVEN_DECODES), plain, "cells"
    ),
    "padding-mixed-tokens": _derived("tokens in it", sum(ONE_PROMPT_SEVEN_DECODES), plain, "ONE_PROMPT_SEVEN_DECODES"),
    "padding-mixed": _derived(
        "share of it that is padding", padding_share(ONE_PROMPT_SEVEN_DECODES), percent(1), "padding_share"
    ),
    "padding-exercise-cells": _derived(
        f"padding cells of a batch of prompts of {EXERCISE} tokens",
        cells(EXERCISE) - sum(EXERCISE),
        plain,
        "cells",
    ),
    "padding-exercise-used": _derived(
        "share of it that holds tokens", 1 - padding_share(EXERCISE), percent(1), "padding_share"
    ),
    "w2-prefill-padding": Derived(
        "padding in one prefill of all prompts of w2",
        lambda: padding_share(w2_prompts()),
        percent(),
        f"{HERE}:w2_prompts",
    ),
    "w2-kv-padding": Derived(
        "padding among the K/V columns that m2:padded reads on w2, over all its passes",
        padded_kv_share,
        percent(),
        f"{HERE}:padded_kv_share",
    ),
    # --- the problem, and what w2 shows
    "m1-w2-ttft": _w2("median TTFT", "m1", "ttft_p50_s", median(digits(2, "s"))),
    "m1-w2-itl": _w2("median ITL", "m1", "itl_p50_s", median(digits(2, "ms", 1e3))),
    "m2-loop-ttft": _w2("median TTFT", "m2:loop", "ttft_p50_s", median(digits(2, "s"))),
    "m2-loop-itl": _w2("median ITL", "m2:loop", "itl_p50_s", median(digits(2, "ms", 1e3))),
    "m2-padded-ttft": _w2("median TTFT", "m2:padded", "ttft_p50_s", median(digits(2, "s"))),
    "m2-padded-itl": _w2("median ITL", "m2:padded", "itl_p50_s", median(digits(2, "ms", 1e3))),
    "m2-loop-over-m1": _w2("output tokens per second over M1's", "m2:loop", "ratio_to_base", with_range(fixed(2))),
    "m2-padded-over-m1": _w2("output tokens per second over M1's", "m2:padded", "ratio_to_base", with_range(fixed(2))),
    "m1-w2-roofline": _w2("least time on the roofline over time", "m1", "roofline_share", median(percent(1))),
    "m2-loop-roofline": _w2("least time on the roofline over time", "m2:loop", "roofline_share", median(percent(1))),
    "m2-padded-roofline": _w2(
        "least time on the roofline over time", "m2:padded", "roofline_share", median(percent(1))
    ),
    "m2-reserved": _w2("most K/V set aside", "m2:padded", "kv_reserved_bytes", median(binary)),
    "m2-used": _w2("most K/V that requests needed", "m2:padded", "kv_used_bytes", median(binary)),
}
CLAIMS |= {
    f"{name}-passes": Derived(
        f"forward passes of {system} for w2", lambda system=system: forwards(system), plain, f"{HERE}:forwards"
    )
    for name, system in {"m1-w2": "m1", "m2-loop": "m2:loop", "m2-padded": "m2:padded"}.items()
}
CLAIMS |= {
    # --- what sharing a pass gains, forward by forward
    "m2-step-16-over-1": Measured(
        "time of a decode step of 16 texts in one pass over one of 1 text, Qwen3-0.6B",
        QWEN,
        ("summary", "decode_step", "16", "padded_over_one_row"),
        with_range(digits(2)),
    ),
    "m2-prefill-loop-over-padded": Measured(
        "time of four prefills of 128, 64, 32 and 16 tokens in a pass each over one padded pass, Qwen3-0.6B",
        QWEN,
        ("summary", "prefill", "loop_over_padded"),
        with_range(fixed(2)),
    ),
    "m2-prefill-cells": Measured("cells of that padded pass", QWEN, ("prefill_cells", "padded"), plain),
    "m2-prefill-tokens": Measured("tokens in it", QWEN, ("prefill_cells", "needed"), plain),
    # --- room
    "reservation": Derived(
        f"tokens set aside for a prompt of {PROMPT} with max_model_len={MAX_MODEL_LEN}",
        lambda: reserved_and_used()[0],
        plain,
        f"{HERE}:reserved_and_used",
    ),
    "reservation-admitted": Derived(
        f"such requests that a cache of {CAPACITY} tokens admits",
        lambda: CAPACITY // reserved_and_used()[0],
        plain,
        f"{HERE}:CAPACITY",
    ),
    "reservation-used": Derived(
        f"of what is set aside, what holds K/V after an answer of {ANSWER} tokens",
        lambda: reserved_and_used()[1] / reserved_and_used()[0],
        percent(1),
        f"{HERE}:reserved_and_used",
    ),
    "reservation-by-use": Derived(
        "requests of that size for which the cache has room",
        lambda: CAPACITY // reserved_and_used()[1],
        plain,
        f"{HERE}:CAPACITY",
    ),
    # --- policies
    **{
        f"m2-{policy}-steps": Derived(
            f"steps until all 16 requests are done with {SEATS} seats, {policy}",
            lambda policy=policy: steps_in_all(policy),
            plain,
            f"{HERE}:steps_in_all",
        )
        for policy in ("fcfs", "sjf")
    },
    # --- few seats
    "m2-tiny-static-4-passes": Measured(
        "forward passes of static batches of 4, folo-tiny",
        TINY,
        ("summary", "arms", "static-4", "forwards"),
        median(plain),
    ),
    "m2-tiny-static-4-over-m1": Measured(
        "output tokens per second over M1's, static batches of 4, folo-tiny",
        TINY,
        ("summary", "arms", "static-4", "ratio_to_m1"),
        with_range(fixed(2)),
    ),
    "m2-tiny-padded-4-passes": Measured(
        "forward passes of M2 padded with 4 seats, folo-tiny",
        TINY,
        ("summary", "arms", "m2-padded-4", "forwards"),
        median(plain),
    ),
    "m2-tiny-padded-4-over-m1": Measured(
        "output tokens per second over M1's, M2 padded with 4 seats, folo-tiny",
        TINY,
        ("summary", "arms", "m2-padded-4", "ratio_to_m1"),
        with_range(fixed(2)),
    ),
}
