"""Claims of chapters 6 and 7 about speed on the shape of Qwen3-0.6B, by `folovllm bench`."""

from __future__ import annotations

from claims.chapter_3 import NOT_TOLD
from claims.ledger import Claim, Derived, Measured, Table, digits, fixed, median, plain, result, with_range
from claims.m3_bench import over
from folovllm.course.bench.report import spread

BENCH = "m4-qwen3-0.6b"  # w1, w2 and w3 on m3, m4, hf:static and hf:continuous
MIXED = "m4-mixed-qwen3-0.6b"  # mixed, with two token budgets
HERE = "docs/claims/m4_bench.py"
SMALL, LARGE = "m4:budget=256", "m4:budget=4096"


def prompt_tokens(workload: str, system: str) -> int:
    """Prompt tokens that an engine computed, the same in every round. Raises ValueError if they differ."""
    rounds = result(BENCH)["rounds"]
    counts = {current["runs"][workload][system]["engine"]["stats"]["prompt_tokens_computed"] for current in rounds}
    if len(counts) != 1:
        raise ValueError(f"{system} computed {sorted(counts)} prompt tokens of {workload} in different rounds")
    return int(counts.pop())


def bench_rows() -> list[list[str]]:
    """Every system on the workloads without and with a common prefix; medians of the rounds."""
    rows = []
    for workload in ("w2", "w3"):
        for system, numbers in result(BENCH)["summary"][workload].items():
            engine = system in ("m3", "m4")
            rows.append(
                [
                    workload,
                    system,
                    median(digits(3))(numbers["output_tokens_per_s"]),
                    with_range(fixed(2))(over(BENCH, workload, system)),
                    median(digits(3))(numbers["ttft_p50_s"]),
                    median(digits(3, "", 1e3))(numbers["itl_p50_s"]),
                    plain(prompt_tokens(workload, system)) if engine else NOT_TOLD,
                ]
            )
    return rows


def longest_itl_ratio() -> dict[str, float]:
    """The longest time between two tokens of anybody with the large budget over that with the small one, per round."""
    ratios = []
    for current in result(MIXED)["rounds"]:
        runs = current["runs"]["mixed"]
        ratios.append(runs[LARGE]["itl_s"]["max"] / runs[SMALL]["itl_s"]["max"])
    return spread(ratios)


def late_ttft_ratio() -> dict[str, float]:
    """The time to first token of the long prompt, the longest of all, with the small budget over the large one."""
    ratios = []
    for current in result(MIXED)["rounds"]:
        runs = current["runs"]["mixed"]
        ratios.append(runs[SMALL]["ttft_s"]["max"] / runs[LARGE]["ttft_s"]["max"])
    return spread(ratios)


def mixed_rows() -> list[list[str]]:
    """Both budgets on `mixed`; medians of the rounds."""
    rows = []
    for system in (LARGE, SMALL):
        numbers = result(MIXED)["summary"]["mixed"][system]
        rows.append(
            [
                system.removeprefix("m4:budget="),
                median(digits(3, "", 1e3))(numbers["itl_p50_s"]),
                median(digits(3, "", 1e3))(numbers["itl_max_s"]),
                median(digits(3))(numbers["ttft_max_s"]),
                median(digits(3))(numbers["output_tokens_per_s"]),
            ]
        )
    return rows


TABLES: dict[str, Table] = {
    "m4-bench": Table(
        "without (w2) and with (w3) a common prefix: M3, M4 and Hugging Face's ways",
        ("workload", "system", "tokens/s", "over hf:static", "TTFT, s", "ITL, ms", "prompt tokens computed"),
        bench_rows,
        source=f"{HERE}:bench_rows",
        files=(BENCH,),
    ),
    "m4-mixed": Table(
        "eight streams and a prompt of 2,048 tokens, with two token budgets",
        ("budget", "ITL p50, ms", "longest ITL, ms", "TTFT of the long prompt, s", "tokens/s"),
        mixed_rows,
        source=f"{HERE}:mixed_rows",
        files=(MIXED,),
    ),
}

CLAIMS: dict[str, Claim] = {
    "m4-over-static-w3": Derived(
        "M4's tokens per second over a static batch's on w3",
        lambda: over(BENCH, "w3", "m4")["median"],
        digits(3),
        "docs/claims/m3_bench.py:over",
    ),
    "m4-over-m3-w3": Derived(
        "M4's tokens per second over M3's on w3",
        lambda: over(BENCH, "w3", "m4", "m3")["median"],
        digits(3),
        "docs/claims/m3_bench.py:over",
    ),
    "m4-over-m3-w2": Derived(
        "M4's tokens per second over M3's on w2",
        lambda: over(BENCH, "w2", "m4", "m3")["median"],
        fixed(2),
        "docs/claims/m3_bench.py:over",
    ),
    "m4-prompt-tokens-w3": Derived(
        "prompt tokens that M4 computed on w3", lambda: prompt_tokens("w3", "m4"), plain, f"{HERE}:prompt_tokens"
    ),
    "m4-longest-itl": Derived(
        "longest ITL with a budget of 4096 over that with 256, mixed",
        lambda: longest_itl_ratio()["median"],
        digits(2),
        f"{HERE}:longest_itl_ratio",
    ),
    "m4-late-ttft": Derived(
        "TTFT of the long prompt with a budget of 256 over that with 4096, mixed",
        lambda: late_ttft_ratio()["median"],
        fixed(2),
        f"{HERE}:late_ttft_ratio",
    ),
    "m4-held-w3": Measured(
        "most K/V set aside, M4, w3 on Qwen3-0.6B",
        BENCH,
        ("summary", "w3", "m4", "kv_reserved_bytes"),
        median(digits(3, "MiB", 2**-20)),
    ),
    "m3-held-w3": Measured(
        "most K/V set aside, M3, w3 on Qwen3-0.6B",
        BENCH,
        ("summary", "w3", "m3", "kv_reserved_bytes"),
        median(digits(3, "MiB", 2**-20)),
    ),
}
