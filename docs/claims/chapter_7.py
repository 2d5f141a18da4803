"""Claims of chapter 7: what a prefix cache finds, what it cannot find, and what the order of arrival changes."""

from __future__ import annotations

import math
from typing import Any

from claims.chapter_2 import tokenizer
from claims.ledger import (
    Claim,
    Derived,
    Form,
    Measured,
    Table,
    digits,
    fixed,
    median,
    percent,
    plain,
    result,
    with_range,
)
from folovllm.course.bench.workloads import get_workload
from folovllm.course.viz.prefix import hit_tokens

PREFIXES = "m4-prefixes-folo-tiny"  # by `folovllm/course/measure/course.py prefixes`
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
    """Prompt tokens of w3 that have to be computed, if the prefix is computed once or by everybody."""
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


def arm_rows() -> list[list[str]]:
    """Tokens and times of every arm; medians of the rounds."""
    rows = []
    for arm, name in ARMS.items():
        numbers = result(PREFIXES)["summary"]["arms"][arm]
        rows.append(
            [
                name,
                median(plain)(numbers["prompt_tokens_computed"]),
                median(plain)(numbers["cached_tokens"]),
                median(plain)(numbers["steps"]),
                median(digits(3, "", 1e3))(numbers["mean_ttft_s"]),
                median(fixed(2))(numbers["over_no_cache"]),
            ]
        )
    return rows


def rule_rows() -> list[list[str]]:
    """Prompt tokens computed under each rule, by budget and longest piece."""
    rows = []
    for limits, computed in result(PREFIXES)["rules"].items():
        budget, piece = map(int, limits.split("/"))
        rows.append([plain(budget), plain(piece) if piece else "no limit", *map(plain, computed.values())])
    return rows


TABLES: dict[str, Table] = {
    "full-hits": Table(
        "a prompt that was computed before, in blocks of 16",
        ("tokens", "full blocks", "blocks found", "tokens to compute"),
        full_hit_rows,
        source=HITS,
    ),
    "m4-prefix-arms": Table(
        "20 requests with a system prompt of 400 tokens and 24 of their own",
        ("arm", "prompt tokens computed", "found", "steps", "mean TTFT, ms", "time over no cache"),
        arm_rows,
        source="folovllm/course/measure/chunks.py:prefixes",
        files=(PREFIXES,),
    ),
    "m4-sharing-rules": Table(
        "prompt tokens computed for the same requests, all of which arrive together",
        ("budget", "of one request", "no cache", "what is written", "and this forward's", "and following"),
        rule_rows,
        source="folovllm/course/measure/chunks.py:by_rule",
        files=(PREFIXES,),
    ),
}


def _derived(says: str, number: Any, form: Form, source: str) -> Claim:
    return Derived(says, lambda: number, form, source)


def _arm(says: str, arm: str, number: str, form: Form) -> Claim:
    return Measured(
        f"{says}, {ARMS[arm]}, 20 requests with one system prompt", PREFIXES, ("summary", "arms", arm, number), form
    )


def _rule(says: str, limits: str, rule: str) -> Claim:
    return Measured(f"prompt tokens computed, {says}", PREFIXES, ("rules", limits, rule), plain)


CLAIMS: dict[str, Claim] = {
    # --- twenty requests with one system prompt
    "sharers-m3": _arm("prompt tokens computed", "m3", "prompt_tokens_computed", median(plain)),
    "sharers-together": _arm("prompt tokens computed", "together", "prompt_tokens_computed", median(plain)),
    "sharers-again": _arm("prompt tokens computed", "again", "prompt_tokens_computed", median(plain)),
    "sharers-time": _arm("time over that without the cache", "together", "over_no_cache", with_range(fixed(2))),
    "sharers-ttft-none": _arm("mean TTFT", "no_cache", "mean_ttft_s", median(digits(2, "ms", 1e3))),
    "sharers-ttft": _arm("mean TTFT", "together", "mean_ttft_s", median(digits(2, "ms", 1e3))),
    "sharers-hit-rate": Derived(
        "the largest share of these prompt tokens that can be found", best_hit_rate, percent(1), f"{HERE}:best_hit_rate"
    ),
    "rule-written-large": _rule("a budget of 16,384, only what is written is found", "16384/0", "written"),
    "rule-written-pieces": _rule(
        "a budget of 512 in pieces of 128, only what is written is found", "512/128", "written"
    ),
    "rule-forward-pieces": _rule("the same, and what this forward writes", "512/128", "forward"),
    # --- one prompt
    "alike-tokens": Derived(
        f"tokens that {ALIKE[0]!r} and {ALIKE[1]!r} begin with, folo-tiny",
        lambda: tokens_in_common(*ALIKE),
        plain,
        f"{HERE}:tokens_in_common",
    ),
    "hit-of-64": _derived(
        "tokens found of a prompt of 64 that was computed before", hit_tokens(64, 64, BLOCK), plain, HITS
    ),
    "left-of-64": _derived("tokens of it that are computed", 64 - hit_tokens(64, 64, BLOCK), plain, HITS),
    "left-of-65": _derived(
        "tokens that are computed of a prompt of 65 that was computed before",
        65 - hit_tokens(65, 65, BLOCK),
        plain,
        HITS,
    ),
    "collision-chance": _derived(
        "the chance of equal keys among a million blocks, 128 bits",
        chance_of_a_collision(10**6, 128),
        tiny,
        f"{HERE}:chance_of_a_collision",
    ),
    # --- w3
    "w3-alone": _derived(
        "prompt tokens of w3, if everybody computes all of theirs", w3_tokens(False), plain, f"{HERE}:w3_tokens"
    ),
    "w3-shared": _derived(
        "prompt tokens of w3, if the prefix is computed once", w3_tokens(True), plain, f"{HERE}:w3_tokens"
    ),
    # --- giving way
    "tight-preemptions": Measured(
        "requests of w2 that gave way in 64 blocks", PREFIXES, ("preemption", "cache", "preemptions"), plain
    ),
    "tight-without": Measured(
        "tokens computed for w2 in 64 blocks without the cache",
        PREFIXES,
        ("preemption", "no_cache", "tokens_scheduled"),
        plain,
    ),
    "tight-with": Measured("the same with it", PREFIXES, ("preemption", "cache", "tokens_scheduled"), plain),
}
