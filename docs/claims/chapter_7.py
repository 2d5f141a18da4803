"""Claims of chapter 7: what a prefix cache finds, what it cannot find, and what the order of arrival changes."""

from __future__ import annotations

import math

from claims.chapter_2 import tokenizer
from claims.chapter_4 import over
from claims.forms import NOT_TOLD, ms, plain, times_range
from claims.ledger import Claim, Derived, Table, grouped_table, measured_table, result
from folovllm.course.bench.workloads import get_workload
from folovllm.course.viz.prefix import hit_tokens

PREFIXES = "m4-prefixes-folo-tiny"  # by `python -m folovllm.course.measure prefixes`
BENCH = "m4-qwen3-0.6b"  # by `folovllm bench`: w1, w2 and w3 on m3, m4, hf:static and hf:continuous
HERE = "docs/claims/chapter_7.py"
HITS = "folovllm/course/viz/prefix.py:hit_tokens"

# --- the tree -----------------------------------------------------------------------------------------------

TREE_BLOCK = 4  # words; in this picture a word is a token
TREE_PROMPTS = {
    "a": "You are a helpful poet . Sing of rain",
    "b": "You are a helpful poet . Sing of the sea .",
    "c": "You are a helpful cook . How do I boil",
    "d": "Write as a drunken poet . Sing of gin",
}

# --- one prompt ---------------------------------------------------------------------------------------------

BLOCK = 16
ALIKE = ("Explain quantum computing.", "Explain quantum physics.")


def tokens_in_common(one: str, other: str) -> int:
    """Tokens with which both texts begin, in the bundled model's tokenizer."""
    pairs = zip(tokenizer().encode(one), tokenizer().encode(other), strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), 0)


def full_hit_rows() -> list[list[str]]:
    """What is found, and what is left to compute, when the whole prompt was computed before."""
    rows = []
    for length in (15, 16, 17, 63, 64, 65):
        found = hit_tokens(length, length, BLOCK)
        rows.append([plain(length), plain(length // BLOCK), plain(found // BLOCK), plain(length - found)])
    return rows


def tiny(number: float) -> str:
    """A tiny number by the power of ten that bounds it."""
    return f"below 1e{math.ceil(math.log10(number))}"


def chance_of_a_collision(num_blocks: int, bits: int) -> float:
    """That any two of so many random keys are equal, from above: pairs over values."""
    return num_blocks * (num_blocks - 1) / 2 / 2**bits


# --- w3 -----------------------------------------------------------------------------------------------------


def w3_tokens(shared: bool) -> int:
    """Prompt tokens of w3 that have to be computed, if the prefix is computed once or by every request."""
    w3 = get_workload("w3")
    own = w3.prompt_len[0]
    prefix = w3.shared_prefix if shared else w3.num_requests * w3.shared_prefix
    return prefix + w3.num_requests * own


# --- twenty requests with one system prompt -----------------------------------------------------------------

LRU_NAMES = ("a", "b", "a'", "c", "d")
ARMS = {"m3": "M3", "no_cache": "M4 without the cache", "together": "M4, all at once", "again": "M4, the same again"}


def best_hit_rate() -> float:
    """The share of prompt tokens that all but the first of these requests can find."""
    of = result(PREFIXES)["requests"]
    length = of["prefix_len"] + of["own_len"]
    return float((of["number"] - 1) * hit_tokens(of["prefix_len"], length, BLOCK) / (of["number"] * length))


def rule_rows() -> list[list[str]]:
    """Prompt tokens computed under each rule, by budget and longest chunk."""
    rows = []
    for limits, computed in result(PREFIXES)["rules"].items():
        budget, longest = map(int, limits.split("/"))
        rows.append([plain(budget), plain(longest) if longest else "no limit", *map(plain, computed.values())])
    return rows


# --- w2 and w3 on Qwen3-0.6B -------------------------------------------------------------------------------


def prompt_tokens(workload: str, system: str) -> int:
    """Prompt tokens that an engine computed, the same in every round. Raises ValueError if they differ."""
    rounds = result(BENCH)["rounds"]
    counts = {current["runs"][workload][system]["engine"]["stats"]["prompt_tokens_computed"] for current in rounds}
    if len(counts) != 1:
        raise ValueError(f"{system} computed {sorted(counts)} prompt tokens of {workload} in different rounds")
    return int(counts.pop())


TABLES: dict[str, Table] = {
    "full-hits": Table(
        "a prompt that was computed before, in blocks of 16",
        ("tokens", "full blocks", "blocks found", "tokens to compute"),
        full_hit_rows,
    ),
    "m4-prefix-arms": measured_table(
        "20 requests with a system prompt of 400 tokens and 24 of their own",
        f"{PREFIXES}/summary/arms",
        "arm",
        {
            "prompt tokens computed": ("prompt_tokens_computed", plain),
            "found": ("cached_tokens", plain),
            "steps": ("steps", plain),
            "mean TTFT, ms": ("mean_ttft_s", ms),
            "time over no cache": ("over_no_cache", ".2f"),
        },
        ARMS,
    ),
    "m4-sharing-rules": Table(
        "prompt tokens computed for the same requests, all of which arrive together",
        ("budget", "of one request", "no cache", "what is written", "and this forward's"),
        rule_rows,
        files=(PREFIXES,),
    ),
    "m4-bench": grouped_table(
        "workload",
        {workload: f"{BENCH}/summary/{workload}" for workload in ("w2", "w3")},
        "system",
        lambda workload: {
            "tokens/s": ("output_tokens_per_s", ".3g"),
            "over hf:static": lambda system: times_range(over(BENCH, workload, system)),
            "TTFT, s": ("ttft_p50_s", ".3g"),
            "ITL, ms": ("itl_p50_s", ms),
            "prompt tokens computed": lambda system: (
                plain(prompt_tokens(workload, system)) if system in ("m3", "m4") else NOT_TOLD
            ),
        },
        "without (w2) and with (w3) a common prefix: M3, M4 and Hugging Face's ways",
    ),
}


CLAIMS: dict[str, Claim] = {
    # --- twenty requests with one system prompt
    "sharers-hit-rate": Derived("the largest share of these prompt tokens that can be found", best_hit_rate, ".1%"),
    # --- one prompt
    "alike-tokens": Derived(
        f"tokens that {ALIKE[0]!r} and {ALIKE[1]!r} begin with, folo-tiny",
        lambda: tokens_in_common(*ALIKE),
        by=tokens_in_common,
    ),
    "hit-of-64": Derived("tokens found of a prompt of 64 that was computed before", hit_tokens(64, 64, BLOCK), by=HITS),
    "left-of-64": Derived("tokens of it that are computed", 64 - hit_tokens(64, 64, BLOCK), by=HITS),
    "left-of-65": Derived(
        "tokens that are computed of a prompt of 65 that was computed before", 65 - hit_tokens(65, 65, BLOCK), by=HITS
    ),
    "collision-chance": Derived(
        "the chance of equal keys among a million blocks, 128 bits",
        chance_of_a_collision(10**6, 128),
        tiny,
        chance_of_a_collision,
    ),
    # --- w3
    "w3-alone": Derived(
        "prompt tokens of w3, if every request computes all of its own", w3_tokens(False), by=w3_tokens
    ),
    "w3-shared": Derived("prompt tokens of w3, if the prefix is computed once", w3_tokens(True), by=w3_tokens),
    # --- w2 and w3 on Qwen3-0.6B
    "m4-over-static-w3": Derived(
        "M4's tokens per second over a static batch's on w3", lambda: over(BENCH, "w3", "m4"), ".3g", over
    ),
    "m4-over-m3-w3": Derived(
        "M4's tokens per second over M3's on w3", lambda: over(BENCH, "w3", "m4", "m3"), ".3g", over
    ),
    "m4-over-m3-w2": Derived(
        "M4's tokens per second over M3's on w2", lambda: over(BENCH, "w2", "m4", "m3"), ".2f", over
    ),
    "m4-prompt-tokens-w3": Derived(
        "prompt tokens that M4 computed on w3", lambda: prompt_tokens("w3", "m4"), by=prompt_tokens
    ),
}
