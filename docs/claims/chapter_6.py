"""Claims of chapter 6: what a chunk costs, what it bounds, and what it does not."""

from __future__ import annotations

from claims.forms import digits, ms, plain, power
from claims.ledger import Claim, Derived, Table, measured_table, ratio, result
from claims.models import BYTES_16_BIT, LLAMA_2_7B, bundled
from folovllm.course.lessons.formulas import linear_params
from folovllm.kv_cache.block_manager import BlockManager
from folovllm.kv_cache.formulas import kv_bytes, kv_bytes_per_token
from folovllm.math_utils import cdiv
from folovllm.messages import ModelRunnerOutput
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams
from folovllm.scheduler.scheduler import Scheduler

CHUNKS = "m4-chunks-folo-tiny"  # by `python -m folovllm.course.measure chunks`
MIXED = "m4-mixed-qwen3-0.6b"  # by `folovllm bench`: `mixed`, with two token budgets
SMALL, LARGE = "m4:budget=256", "m4:budget=4096"
HERE = "docs/claims/chapter_6.py"

# --- a prompt of 100,000 tokens -----------------------------------------------------------------------------

LONG, CHUNK = 100_000, 4096  # tokens


def num_chunks(num_tokens: int, size: int) -> int:
    """Passes that compute a prompt in chunks of at most so many tokens."""
    return cdiv(num_tokens, size)


def mlp_bytes(num_tokens: int) -> int:
    """What one MLP of Llama-2-7B holds at its widest in 16 bits: gate and up of all tokens of a pass."""
    return 2 * num_tokens * int(LLAMA_2_7B.intermediate_size) * BYTES_16_BIT


# --- what a chunk reads -------------------------------------------------------------------------------------

PROMPT, CHUNK_SIZES = 2048, (2048, 1024, 512, 256, 128, 64)


def kv_tokens_read(num_tokens: int, size: int) -> int:
    """Tokens whose K/V a prefill in chunks reads: each pass reads all up to its own end."""
    return sum(min(end, num_tokens) for end in range(size, num_tokens + size, size))


def chunk_rows() -> list[list[str]]:
    """What a prompt reads from memory on Qwen3-0.6B, computed in chunks of several sizes."""
    config = bundled("qwen3-0.6b")
    rows = []
    for size in CHUNK_SIZES:
        passes, read = num_chunks(PROMPT, size), kv_tokens_read(PROMPT, size)
        weights = passes * linear_params(config) * BYTES_16_BIT
        kv = read * kv_bytes_per_token(config, BYTES_16_BIT)
        rows.append([plain(size), plain(passes), plain(read), *(digits(3, "", 2**-30)(b) for b in (kv, weights))])
    return rows


# --- the budget of an example -------------------------------------------------------------------------------

DECODES, PROMPTS = 10, {"A": 100, "B": 200, "C": 500}


def steps_of_example(budget: int) -> list[dict[str, int]]:
    """What the engine's own scheduler gives to ten decodes and to prompts A, B and C, until C is complete."""
    scheduler = Scheduler(BlockManager(256, 16), 32, budget, chunked_prefill=True)

    def add(name: str, prompt_len: int) -> None:
        scheduler.add_request(Request(name, [1] * prompt_len, SamplingParams(max_tokens=50), (), max_model_len=1024))

    def step() -> dict[str, int]:
        plan = scheduler.schedule()
        sampled = [[1] if share.samples else [] for share in plan.scheduled]
        scheduler.update_from_output(plan, ModelRunnerOutput(sampled, [None] * len(sampled)))
        return {share.request_id: share.num_tokens for share in plan.scheduled}

    for number in range(DECODES):
        add(str(number), 1)
    step()
    for name, prompt_len in PROMPTS.items():
        add(name, prompt_len)
    steps = []
    while scheduler.requests["C"].num_output_tokens == 0:
        steps.append(step())
    return steps


def example_rows() -> list[list[str]]:
    """The steps of that example with its budget, and with a smaller one."""
    rows = []
    for budget in (1000, 600):
        for number, step in enumerate(steps_of_example(budget), start=1):
            prompts = [step.get(name, 0) for name in PROMPTS]
            decodes = [tokens == 1 for tokens in prompts]
            own = [0 if decode else tokens for decode, tokens in zip(decodes, prompts, strict=True)]
            total = sum(step.values())
            rows.append([plain(n) for n in (budget, number, total - sum(own), *own, total)])
    return rows


# --- eight streams and a long prompt ------------------------------------------------------------------------

STREAMS = 8
ARMS = {"m3": "M3, in one chunk"} | {str(b): f"M4, {b:,}" for b in (4096, 1024, 512, 256, 128, 64)}


def mixed_ratio(over: str, under: str, number: str) -> dict[str, float]:
    """The largest of a latency with one budget over that with the other, taken inside of each round."""
    return ratio(MIXED, f"runs/mixed/{over}/{number}/max", f"runs/mixed/{under}/{number}/max")


# --- chunks and logits ------------------------------------------------------------------------------------

WAYS = {
    "chunks_of_16": "chunks of 16",
    "chunks_of_12": "chunks of 12",
    "token_by_token": "token by token",
    "rectangle_of_the_mask": "chunks of 16, the mask's rows given by hand",
    "sees_its_own_chunk_only": "wrong: a chunk sees itself only",
    "whole_rectangle": "wrong: no triangle at the end of the rectangle",
    "positions_begin_again": "wrong: positions begin at 0 in each chunk",
}


def logit_rows() -> list[list[str]]:
    """How far logits are from those of one pass, done right and done wrong."""
    found = result(CHUNKS)["logit_differences"]
    return [[name, power(found[way]) if found[way] < 1e-3 else digits(2)(found[way])] for way, name in WAYS.items()]


TABLES: dict[str, Table] = {
    "chunk-reads": Table(
        f"what a prompt of {PROMPT:,} tokens reads on Qwen3-0.6B in 16 bits",
        ("tokens per pass", "passes", "K/V read, tokens", "K/V read, GiB", "weights read, GiB"),
        chunk_rows,
    ),
    "budget-split": Table(
        "ten decodes and prompts of 100, 200 and 500 tokens",
        ("budget", "step", "decodes", "of A", "of B", "of C", "tokens"),
        example_rows,
    ),
    "m4-chunks": measured_table(
        "8 streams and a prompt of 2,048 tokens that comes in among them, milliseconds",
        f"{CHUNKS}/summary/arms",
        "budget",
        {
            "passes": ("chunks", plain),
            "ITL p50": ("itl_p50_s", ms),
            "ITL p95": ("itl_p95_s", ms),
            "ITL max": ("itl_max_s", ms),
            "ITL p95, whole run": ("run_itl_p95_s", ms),
            "TTFT p50": ("ttft_p50_s", ms),
            "TTFT p95": ("ttft_p95_s", ms),
        },
        ARMS,
    ),
    "chunk-logits": Table(
        "the logits of a prompt's last chunk, against one pass over all of it",
        ("way", "largest difference"),
        logit_rows,
        files=(CHUNKS,),
    ),
    "m4-mixed": measured_table(
        "eight streams and a prompt of 2,048 tokens, with two token budgets",
        f"{MIXED}/summary/mixed",
        "budget",
        {
            "ITL p50, ms": ("itl_p50_s", ms),
            "longest ITL, ms": ("itl_max_s", ms),
            "TTFT of the long prompt, s": ("ttft_max_s", ".3g"),
            "tokens/s": ("output_tokens_per_s", ".3g"),
        },
        {system: system.removeprefix("m4:budget=") for system in (LARGE, SMALL)},
    ),
}


CLAIMS: dict[str, Claim] = {
    # --- eight streams and a long prompt
    "chunk-64-left": Derived("tokens that 8 decodes leave of a budget of 64", 64 - STREAMS, by=f"{HERE}:STREAMS"),
    # --- a prompt of 100,000 tokens
    "kv-100k": Derived(
        "K/V of 100,000 tokens, Llama-2-7B in 16 bits", kv_bytes(LLAMA_2_7B, LONG, BYTES_16_BIT), "binary", kv_bytes
    ),
    "kv-of-a-chunk": Derived(
        "K/V that a chunk of 4,096 tokens adds", kv_bytes(LLAMA_2_7B, CHUNK, BYTES_16_BIT), "binary", kv_bytes
    ),
    "chunks-100k": Derived("passes for 100,000 tokens in chunks of 4,096", num_chunks(LONG, CHUNK), by=num_chunks),
    "mlp-100k": Derived(
        "gate and up of one MLP of Llama-2-7B in 16 bits, 100,000 tokens", mlp_bytes(LONG), "binary", mlp_bytes
    ),
    "mlp-of-a-chunk": Derived("the same for 4,096 tokens", mlp_bytes(CHUNK), "binary", mlp_bytes),
    # --- two budgets on Qwen3-0.6B
    "m4-longest-itl": Derived(
        "longest ITL with a budget of 4096 over that with 256, mixed",
        lambda: mixed_ratio(LARGE, SMALL, "itl_s"),
        ".2g",
        mixed_ratio,
    ),
    "m4-late-ttft": Derived(  # the long prompt's is the longest of all
        "TTFT of the long prompt with a budget of 256 over that with 4096, mixed",
        lambda: mixed_ratio(SMALL, LARGE, "ttft_s"),
        ".2f",
        mixed_ratio,
    ),
}
