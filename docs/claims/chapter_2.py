"""Claims of chapter 2: what the engine costs, and what a trace of it shows."""

from __future__ import annotations

from functools import cache

from transformers import PreTrainedTokenizerBase

from claims.forms import Form, digits, ms, named, plain
from claims.ledger import Claim, Derived, Table, at, result
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


OVERHEAD: dict[str, tuple[str, Form]] = {
    "loop, ms per token": ("loop_seconds_per_token", ms),
    "engine, ms per token": ("engine_seconds_per_token", ms),
    "engine over loop": ("engine_over_loop", "range .2f"),
    "of a decode step, not forward": ("decode_share_outside_forward", ".1%"),
}


def overhead_rows() -> list[list[str]]:
    """The engine beside the bare loop on both models."""
    return [
        [at(f"{file}/model"), *(named(form)(at(f"{file}/summary/{key}")) for key, form in OVERHEAD.values())]
        for file in (TINY, QWEN)
    ]


TABLES: dict[str, Table] = {
    "m1-requests": Table(
        "three requests that arrive together at M1",
        ("request", "prompt tokens", "output tokens", "finish", "queue ms", "TTFT ms", "TPOT ms", "end to end ms"),
        request_rows,
        files=(TINY,),
    ),
    "m1-overhead": Table("M1 beside the bare loop", ("model", *OVERHEAD), overhead_rows, files=(TINY, QWEN)),
}

CLAIMS: dict[str, Claim] = {
    "stream-tokens": Derived(
        f"tokens of {STREAMED!r} in the bundled model's vocabulary",
        lambda: len(tokenizer().encode(STREAMED)),
        by=f"{HERE}:STREAMED",
    ),
    "stream-replacement-characters": Derived(
        "replacement characters when each of them is decoded alone",
        lambda: decoded_one_by_one(STREAMED).count("\ufffd"),
        by=decoded_one_by_one,
    ),
    "stop-string-tokens": Derived(
        f"tokens of {STOP!r} in the bundled model's vocabulary",
        lambda: len(tokenizer().encode(STOP)),
        by=f"{HERE}:STOP",
    ),
}
