"""Claims of chapter 4 about time: M3 on the shape of Qwen3-0.6B, and attention over blocks alone."""

from __future__ import annotations

from claims.chapter_3 import W2 as M2_W2
from claims.chapter_3 import shown
from claims.ledger import (
    Claim,
    Derived,
    Measured,
    Table,
    binary,
    digits,
    fixed,
    median,
    percent,
    result,
    with_range,
)
from folovllm.course.bench.report import spread

ATTENTION = "m3-attention-qwen3-0.6b"  # by `folovllm/course/measure/course.py attention`
W2 = "m4-qwen3-0.6b"  # by `folovllm bench`, workloads w1 and w2
HERE = "docs/claims/m3_bench.py"

PEER = "hf:static"  # of one request, a plain `generate`


def over(file: str, workload: str, system: str, peer: str = PEER) -> dict[str, float]:
    """A system's output tokens per second over another's, taken inside of each round: median and ends."""
    ratios = []
    for current in result(file)["rounds"]:
        runs = current["runs"][workload]
        ratios.append(runs[system]["output_tokens_per_s"] / runs[peer]["output_tokens_per_s"])
    return spread(ratios)


def time_rows() -> list[list[str]]:
    """Every system on w1 and on w2; medians of the rounds."""
    rows = []
    for workload in ("w1", "w2"):
        for system, numbers in result(W2)["summary"][workload].items():
            if system == "m4":
                continue  # its numbers are in chapter 7
            rows.append(
                [
                    workload,
                    system,
                    median(digits(3))(numbers["output_tokens_per_s"]),
                    median(fixed(2))(over(W2, workload, system)),
                    median(digits(3))(numbers["ttft_p50_s"]),
                    median(digits(3, "", 1e3))(numbers["itl_p50_s"]),
                    shown(numbers["kv_reserved_bytes"], digits(3, "", 2**-20)),
                ]
            )
    return rows


WAYS = {
    "gather": "gather, then `scaled_dot_product_attention`",
    "gather_grouped": "the same, query heads of a KV head together",
    "torch": "`torch`",
    "torch_neighbours": "`torch`, blocks side by side",
}


def attention_rows() -> list[list[str]]:
    """Each way to attend over blocks, for contexts of each length; medians of the rounds."""
    rows = []
    for length, ways in sorted(result(ATTENTION)["summary"].items(), key=lambda item: int(item[0])):
        for way, label in WAYS.items():
            numbers = ways[way]
            rows.append(
                [
                    length,
                    label,
                    median(digits(3, "", 1e3))(numbers["seconds"]),
                    with_range(fixed(2))(numbers["over_gather"]),
                    median(digits(2, "", 1e-9))(numbers["kv_bytes_per_s"]),
                ]
            )
    return rows


def attention_over_grouped() -> dict[str, float]:
    """The torch backend's time over that of the second way, taken inside of each round."""
    rounds = [current["512"] for current in result(ATTENTION)["rounds"]]
    return spread([ways["torch"]["seconds"] / ways["gather_grouped"]["seconds"] for ways in rounds])


TABLES: dict[str, Table] = {
    "m3-time": Table(
        "one request (w1) and sixteen (w2) on M3 and on Hugging Face's ways",
        ("workload", "system", "tokens/s", f"over {PEER}", "TTFT, s", "ITL, ms", "K/V held, MiB"),
        time_rows,
        source=f"{HERE}:over",
        files=(W2,),
    ),
    "m3-attention": Table(
        "a layer of Qwen3-0.6B attends for sixteen decodes at once",
        ("tokens each", "way", "ms", "over gather", "GB of K/V per second"),
        attention_rows,
        source=f"{HERE}:attention_rows",
        files=(ATTENTION,),
    ),
}


def _over(says: str, file: str, workload: str, system: str, peer: str = PEER) -> Claim:
    return Derived(
        f"output tokens per second of {says} over {peer}'s in the same round, {workload} on Qwen3-0.6B",
        lambda: over(file, workload, system, peer),
        with_range(fixed(2)),
        f"{HERE}:over",
    )


CLAIMS: dict[str, Claim] = {
    "m3-over-static-w1": _over("M3", W2, "w1", "m3"),
    "m3-over-static-w2": _over("M3", W2, "w2", "m3"),
    "m3-over-continuous-w2": _over("M3", W2, "w2", "m3", "hf:continuous"),
    "m2-over-static-w2": _over("M2 padded", M2_W2, "w2", "m2:padded"),
    "static-rows": Measured(
        "token rows that hf:static computes for nobody, w2",
        W2,
        ("summary", "w2", PEER, "padding_share"),
        median(percent()),
    ),
    "static-columns": Measured(
        "K/V columns that hf:static reads for nobody, w2",
        W2,
        ("summary", "w2", PEER, "kv_padding_share"),
        median(percent()),
    ),
    "m3-reserved": Measured(
        "most K/V set aside, M3, w2 on Qwen3-0.6B", W2, ("summary", "w2", "m3", "kv_reserved_bytes"), median(binary)
    ),
    "m3-used": Measured(
        "most K/V that requests needed, M3, w2 on Qwen3-0.6B",
        W2,
        ("summary", "w2", "m3", "kv_used_bytes"),
        median(binary),
    ),
    "m3-attention-over-gather": Measured(
        "time of the torch backend over gather and SDPA, 16 requests of 512 tokens",
        ATTENTION,
        ("summary", "512", "torch", "over_gather"),
        median(fixed(2)),
    ),
    "m3-attention-over-grouped": Derived(
        "time of the torch backend over gather and SDPA with grouped heads, 16 requests of 512 tokens",
        lambda: attention_over_grouped()["median"],
        fixed(2),
        f"{HERE}:attention_over_grouped",
    ),
}
