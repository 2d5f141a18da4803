"""Claims of chapter 2: what the engine costs, and what a trace of it shows."""

from __future__ import annotations

from functools import cache

from transformers import PreTrainedTokenizerBase

from claims.forms import digits, ms, percent, plain, times_range
from claims.ledger import Claim, Derived, Table, result
from folovllm.models.loader import load_tokenizer, resolve_model

HERE = "docs/claims/chapter_2.py"
TINY, QWEN = "m1-engine-folo-tiny", "m1-engine-qwen3-0.6b"
AGAINST_HF = "m1-vs-hf-qwen3-0.6b"  # by `folovllm bench`, with hf:sequential as the base

STREAMED, STOP = "café 5€<b></s>", "</s>"  # what the chapter streams, and where it should stop


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """The bundled model's."""
    found = load_tokenizer(resolve_model("folo-tiny"))
    if found is None:
        raise LookupError("folo-tiny has no tokenizer")
    return found


def decoded_one_by_one(text: str) -> str:
    """A text as a stream that decodes each token alone would show it."""
    return "".join(str(tokenizer().decode([token_id])) for token_id in tokenizer().encode(text))


def request_rows() -> list[list[str]]:
    """The three traced requests."""
    rows = []
    for output in result(TINY)["trace"]["outputs"]:
        times, arrival = output["token_times"], output["arrival_time"]
        latencies = (
            output["first_scheduled_time"] - arrival,
            times[0] - arrival,
            (times[-1] - times[0]) / (len(times) - 1),
            output["finished_time"] - arrival,
        )
        rows.append(
            [
                output["request_id"],
                plain(output["prompt_len"]),
                plain(len(times)),
                output["finish_reason"],
                *(digits(3 if latency > 1e-3 else 1, "", 1e3)(latency) for latency in latencies),
            ]
        )
    return rows


def overhead_rows() -> list[list[str]]:
    """The engine beside the bare loop on both models."""
    rows = []
    for file in (TINY, QWEN):
        summary = result(file)["summary"]
        rows.append(
            [
                result(file)["model"],
                ms(summary["loop_seconds_per_token"]),
                ms(summary["engine_seconds_per_token"]),
                times_range(summary["engine_over_loop"]),
                percent(1)(summary["decode_share_outside_forward"]),
            ]
        )
    return rows


TABLES: dict[str, Table] = {
    "m1-requests": Table(
        "three requests that arrive together at M1",
        ("request", "prompt tokens", "output tokens", "finish", "queue ms", "TTFT ms", "TPOT ms", "end to end ms"),
        request_rows,
        source="folovllm/outputs.py:RequestMetrics",
        files=(TINY,),
    ),
    "m1-overhead": Table(
        "M1 beside the bare loop",
        ("model", "loop, ms per token", "engine, ms per token", "engine over loop", "of a decode step, not forward"),
        overhead_rows,
        source="folovllm/course/measure/chapter_2.py:engine_of",
        files=(TINY, QWEN),
    ),
}

CLAIMS: dict[str, Claim] = {
    "stream-tokens": Derived(
        f"tokens of {STREAMED!r} in the bundled model's vocabulary",
        lambda: len(tokenizer().encode(STREAMED)),
        plain,
        f"{HERE}:STREAMED",
    ),
    "stream-replacement-characters": Derived(
        "replacement characters when each of them is decoded alone",
        lambda: decoded_one_by_one(STREAMED).count("\ufffd"),
        plain,
        f"{HERE}:decoded_one_by_one",
    ),
    "stop-string-tokens": Derived(
        f"tokens of {STOP!r} in the bundled model's vocabulary",
        lambda: len(tokenizer().encode(STOP)),
        plain,
        f"{HERE}:STOP",
    ),
}
