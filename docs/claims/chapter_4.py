"""Claims of chapter 4: what memory is lost to, what blocks lose and share, what preemption costs, what M3 gains."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from claims import chapter_3
from claims.forms import digits, mib, ms, percent, plain, share, times
from claims.ledger import Cited, Claim, Derived, Table, at, grouped_table, measured_table, ratio, result
from claims.models import BYTES_16_BIT, LLAMA_2_7B, LLAMA_2_13B
from folovllm.course.lessons.allocators import Buddy
from folovllm.course.lessons.formulas import linear_flops_per_token
from folovllm.course.lessons.fragmentation import capacity_of, num_blocks, paged_waste, region_waste, translate
from folovllm.kv_cache.block_manager import WATERMARK
from folovllm.kv_cache.formulas import kv_bytes_per_token

ATTENTION = "m3-attention-qwen3-0.6b"  # by `python -m folovllm.course.measure attention`
W2 = "m4-qwen3-0.6b"  # by `folovllm bench`, workloads w1 and w2
BLOCKS = "m3-blocks-folo-tiny"  # by `python -m folovllm.course.measure blocks`
HERE = "docs/claims/chapter_4.py"
FRAGMENTATION = "folovllm/course/lessons/fragmentation.py"

PAPER = ("Kwon et al. 2023, arXiv:2309.06180", "https://arxiv.org/abs/2309.06180")
PAPER_FIG_2 = {  # share of K/V memory that holds tokens
    "max": ("Orca (Max)", 0.204),
    "pow2": ("Orca (Pow2)", 0.268),
    "oracle": ("Orca (Oracle)", 0.382),
    "vllm": ("vLLM", 0.963),
}
BLOG = ("vLLM blog, June 2023", "https://blog.vllm.ai/2023/06/20/vllm.html")

# --- one request ------------------------------------------------------------------------------------------

BLOCK_SIZE, REGION = 16, 4096  # tokens
LENGTHS = (100, 500, 1000, 2000)
LAYER_TOKEN_BYTES = 2 * 32 * 128 * 4  # K and V of one layer with 32 heads of 128, in float32
BATCH, BATCH_LEN = 32, 500
LLAMA_2_7B_TOKEN = kv_bytes_per_token(LLAMA_2_7B, BYTES_16_BIT)


def slots(num_tokens: int) -> int:
    """Slots of the blocks that hold so many tokens."""
    return BLOCK_SIZE * num_blocks(num_tokens, BLOCK_SIZE)


def waste_rows() -> list[list[str]]:
    """One request of each length, in blocks and in a region."""
    return [
        [
            plain(n),
            plain(num_blocks(n, BLOCK_SIZE)),
            plain(slots(n) - n),
            percent(2)(paged_waste(n, BLOCK_SIZE)),
            percent(1)(region_waste(n, REGION)),
        ]
        for n in LENGTHS
    ]


# --- a card of 40 GB --------------------------------------------------------------------------------------

CARD = capacity_of(12 * 2**30, kv_bytes_per_token(LLAMA_2_13B, BYTES_16_BIT), 2048, BLOCK_SIZE, BATCH_LEN)

# --- the buddy allocator of a textbook's example -------------------------------------------------------------


def buddy_example() -> tuple[Buddy, Buddy]:
    """128 MB of which A takes 32, B 16 and C 8, and A gives its part back; the same after 64 more are taken."""
    states = []
    for more in ((), (64,)):
        memory = Buddy(128)
        first, *_ = (memory.allocate(size) for size in (32, 16, 8))
        memory.release(first or 0)
        for size in more:
            memory.allocate(size)
        states.append(memory)
    return states[0], states[1]


# --- address translation ----------------------------------------------------------------------------------

ADDRESS, PAGE_SIZE, FRAMES = 10_000, 4096, {2: 3}
POSITION, TABLE = 37, (7, 2, 9)

# --- replays ----------------------------------------------------------------------------------------------


def simulated() -> dict[str, Any]:
    """The replays without a model."""
    found: dict[str, Any] = result(BLOCKS)["simulator"]
    return found


def empty_share(block_size: int) -> float:
    """Of the slots that requests hold in blocks of this size, those that are empty."""
    return float(next(run["empty_share"] for run in simulated()["block_sizes"] if run["block_size"] == block_size))


# --- the same memory in regions and in blocks -----------------------------------------------------------------


def longest_together() -> int:
    """Tokens with K/V if all requests of w2 were at their longest at once."""
    return sum(prompt + output - 1 for prompt, output in result(BLOCKS)["capacity"]["requests"])


def used_of_held(milestone: str) -> float:
    """Of the slots that requests hold, those that are written, over all steps."""
    run = result(BLOCKS)["capacity"][milestone]
    return float(sum(run["used"]) / sum(run["reserved"]))


# --- sharing ----------------------------------------------------------------------------------------------


def sharing_rows() -> list[list[str]]:
    """The largest share of blocks that sharing saved in any step: samples of one prompt, beams on four."""
    found = result(BLOCKS)["sharing"]
    return [
        [size, width, share(found["parallel_sampling"][size][width]), share(fmean(saved))]
        for size, widths in found["beam_search"].items()
        for width, saved in widths.items()
    ]


# --- preemption -------------------------------------------------------------------------------------------

ARMS = {"roomy": "enough blocks", "recompute": "too few, recompute", "swap": "too few, swap"}


def blocks_moved(arm: str) -> str:
    """Blocks that were swapped out or in."""
    return plain(sum(at(f"{BLOCKS}/summary/{arm}/swapped_{way}_blocks/median") for way in ("out", "in")))


def swap_bytes() -> int:
    """What crosses the bus per token of Llama-2-7B that is swapped out and in again."""
    return 2 * LLAMA_2_7B_TOKEN


# --- time ------------------------------------------------------------------------------------------------

SYSTEMS = {name: name for name in ("m3", "hf:static", "hf:continuous")}
PEER = "hf:static"  # of one request, a plain `generate`


def over(file: str, workload: str, system: str, peer: str = PEER) -> dict[str, float]:
    """A system's output tokens per second over another's, taken inside of each round: median and ends."""
    return ratio(file, *(f"runs/{workload}/{name}/output_tokens_per_s" for name in (system, peer)))


ATTENTION_WAYS = {
    "gather": "gather, then `scaled_dot_product_attention`",
    "gather_grouped": "the same, query heads of a KV head together",
    "torch": "`torch`",
    "torch_neighbours": "`torch`, blocks side by side",
}


def attention_over_grouped() -> dict[str, float]:
    """The torch backend's time over that of the second way, taken inside of each round."""
    return ratio(ATTENTION, "512/torch/seconds", "512/gather_grouped/seconds")


TABLES: dict[str, Table] = {
    "paging-waste": Table(
        "a request's empty slots, in blocks of 16 and in a region of 4,096",
        ("tokens", "blocks", "empty slots in them", "share of the blocks", "share of a region of 4,096"),
        waste_rows,
    ),
    "fragmentation": measured_table(
        "what slots are under four policies, over the steps in which a request waits",
        f"{BLOCKS}/simulator/policies",
        "policy",
        {
            **{name: (f"shares/{name}", percent(1)) for name in ("used", "reserved", "internal", "external")},
            "at once": ("mean_running", ".1f"),
            "steps": ("steps", plain),
            "preempted": ("preemptions", plain),
        },
    ),
    "m3-sharing": Table(
        "blocks that sharing saves, at most in any step",
        ("block size", "samples or beams", "samples save", "beams save"),
        sharing_rows,
        files=(BLOCKS,),
    ),
    "m3-preemption": measured_table(
        "w2 with enough blocks and with a quarter of them",
        f"{BLOCKS}/summary",
        "blocks",
        {
            "preempted": ("preemptions", plain),
            "steps": ("steps", plain),
            "prompt tokens computed": ("prompt_tokens_computed", plain),
            "blocks moved": blocks_moved,
            "time over enough": ("over_roomy", "range .2f"),
        },
        ARMS,
    ),
    "m3-time": grouped_table(
        "workload",
        {workload: f"{W2}/summary/{workload}" for workload in ("w1", "w2")},
        "system",
        lambda workload: {
            "tokens/s": ("output_tokens_per_s", ".3g"),
            f"over {PEER}": lambda system: times(over(W2, workload, system)),
            "TTFT, s": ("ttft_p50_s", ".3g"),
            "ITL, ms": ("itl_p50_s", ms),
            "K/V held, MiB": ("kv_reserved_bytes", mib),
        },
        "one request (w1) and sixteen (w2) on M3 and on Hugging Face's ways",
        SYSTEMS,
    ),
    "m3-attention": grouped_table(
        "tokens each",
        {length: f"{ATTENTION}/summary/{length}" for length in ("128", "512", "2048")},
        "way",
        lambda _: {
            "ms": ("seconds", ms),
            "over gather": ("over_gather", "range .2f"),
            "GB of K/V per second": ("kv_bytes_per_s", digits(2, "", 1e-9)),
        },
        "a layer of Qwen3-0.6B attends for sixteen decodes at once",
        ATTENTION_WAYS,
    ),
}


def _card(says: str, number: int) -> Claim:
    return Derived(f"{says}: Llama-2-13B in 16 bits with 12 GiB for K/V", number, by=capacity_of)


def _buddy(says: str, number: int) -> Claim:
    return Derived(f"{says}, in the example", number, digits(3, "MB"), buddy_example)


def _over(says: str, file: str, workload: str, system: str, peer: str = PEER) -> Claim:
    return Derived(
        f"output tokens per second of {says} over {peer}'s in the same round, {workload} on Qwen3-0.6B",
        lambda: over(file, workload, system, peer),
        "range .2f",
        over,
    )


CLAIMS: dict[str, Claim] = {
    # --- the problem, and what becomes of it
    "w2-longest": Derived(
        "tokens with K/V if all sixteen requests of w2 were at their longest at once", longest_together
    ),
    "m2-used-of-held": Derived(
        "of the slots that M2 sets aside for w2, those with K/V, over all steps",
        lambda: used_of_held("m2"),
        ".0%",
        used_of_held,
    ),
    "m3-used-of-held": Derived(
        "of the slots in blocks that requests hold in M3 on w2, those with K/V, over all steps",
        lambda: used_of_held("m3"),
        ".0%",
        used_of_held,
    ),
    # --- the paper
    **{
        f"paper-{name}-used": Cited(
            f"share of K/V memory that holds tokens, {system}", used, ".1%", f"{PAPER[0]}, Fig. 2", PAPER[1]
        )
        for name, (system, used) in PAPER_FIG_2.items()
    },
    "paper-throughput": Cited(
        "vLLM's throughput over FasterTransformer's and Orca's at the same latency",
        "2 to 4 times",
        plain,
        f"{PAPER[0]}, abstract",
        PAPER[1],
    ),
    "paper-samples-save": Cited(
        "blocks that parallel sampling saves, Alpaca", "6.1 to 9.8 %", plain, f"{PAPER[0]}, section 6.3", PAPER[1]
    ),
    "paper-beams-save": Cited(
        "blocks that beam search saves, Alpaca", "37.6 to 55.2 %", plain, f"{PAPER[0]}, section 6.3", PAPER[1]
    ),
    "blog-waste": Cited("memory that existing systems waste", "60 to 80 %", plain, *BLOG),
    "blog-waste-vllm": Cited("memory that vLLM wastes", "under 4 %", plain, *BLOG),
    "blog-throughput": Cited(
        "vLLM's throughput over that of Hugging Face Transformers, at most", "24 times", plain, *BLOG
    ),
    "empty-share-16": Derived(
        "of the slots that requests hold in blocks of 16, those that are empty",
        lambda: empty_share(16),
        ".1%",
        empty_share,
    ),
    "empty-share-256": Derived(
        "of the slots that requests hold in blocks of 256, those that are empty",
        lambda: empty_share(256),
        ".0%",
        empty_share,
    ),
    # --- one request
    "blocks-100": Derived("blocks of 16 for 100 tokens", num_blocks(100, 16), by=num_blocks),
    "slots-100": Derived("slots in them", slots(100), by=slots),
    "empty-100": Derived("empty slots in them", slots(100) - 100, by=slots),
    "paged-waste-100": Derived("share of them that is empty", paged_waste(100, 16), ".1%", paged_waste),
    "region-waste-2048": Derived(
        "empty share of a region of 2,048 with 100 tokens", region_waste(100, 2048), ".1%", region_waste
    ),
    "blocks-1000": Derived("blocks of 16 for 1,000 tokens", num_blocks(1000, 16), by=num_blocks),
    "paged-waste-1000": Derived("share of them that is empty", paged_waste(1000, 16), ".2%", paged_waste),
    "layer-region": Derived(
        "K/V of 4,096 tokens in one float32 layer with 32 heads of 128",
        REGION * LAYER_TOKEN_BYTES,
        "binary",
        f"{HERE}:LAYER_TOKEN_BYTES",
    ),
    "layer-used": Derived("of 1,000 tokens", 1000 * LAYER_TOKEN_BYTES, "binary", f"{HERE}:LAYER_TOKEN_BYTES"),
    "layer-blocks": Derived(
        "of 1,000 tokens in blocks of 16", slots(1000) * LAYER_TOKEN_BYTES, "binary", f"{HERE}:LAYER_TOKEN_BYTES"
    ),
    "batch-layer-region": Derived(
        "the layer's K/V for 32 requests with a region of 4,096 each",
        BATCH * REGION * LAYER_TOKEN_BYTES,
        "binary",
        f"{HERE}:BATCH",
    ),
    "batch-layer-blocks": Derived(
        "the same for 500 tokens each in blocks of 16",
        BATCH * slots(BATCH_LEN) * LAYER_TOKEN_BYTES,
        "binary",
        f"{HERE}:BATCH",
    ),
    "batch-region": Derived(
        "K/V of Llama-2-7B in 16 bits, 32 requests with a region of 4,096 each",
        BATCH * REGION * LLAMA_2_7B_TOKEN,
        "binary",
        f"{HERE}:BATCH",
    ),
    "batch-blocks": Derived(
        "the same for 500 tokens each in blocks of 16",
        BATCH * slots(BATCH_LEN) * LLAMA_2_7B_TOKEN,
        "binary",
        f"{HERE}:BATCH",
    ),
    "batch-saved": Derived("what that saves", 1 - slots(BATCH_LEN) / REGION, ".1%", f"{HERE}:BATCH"),
    # --- a card of 40 GB
    "card-tokens": _card("tokens that fit", CARD.tokens),
    "card-regions": _card("regions of 2,048 that fit", CARD.regions),
    "card-blocks": _card("blocks of 16 that fit", CARD.blocks),
    "card-requests": _card("requests of 500 tokens in blocks that fit", CARD.requests),
    # --- buddies
    "buddy-free": _buddy("free memory", buddy_example()[0].num_free),
    "buddy-largest": _buddy("the largest free part", buddy_example()[0].largest_free),
    "buddy-left": _buddy("free memory after 64 MB more are taken", buddy_example()[1].num_free),
    "buddy-left-largest": _buddy("the largest free part after that", buddy_example()[1].largest_free),
    # --- addresses
    "page-number": Derived("page of address 10,000", ADDRESS // PAGE_SIZE, by=translate),
    "page-offset": Derived("offset of address 10,000 in it", ADDRESS % PAGE_SIZE, by=translate),
    "page-physical": Derived(
        "physical address, if the page lies in frame 3", translate(ADDRESS, PAGE_SIZE, FRAMES), by=translate
    ),
    "slot-of-37": Derived(
        "slot of token 37 with the block table 7, 2, 9 and blocks of 16",
        translate(POSITION, BLOCK_SIZE, TABLE),
        by=translate,
    ),
    # --- preemption
    "watermark": Derived(
        "share of the pool that an admission leaves free",
        WATERMARK,
        ".0%",
        "folovllm/kv_cache/block_manager.py:WATERMARK",
    ),
    "recompute-flops": Derived(
        "FLOPs in the linear layers to compute a token of Llama-2-7B again",
        linear_flops_per_token(LLAMA_2_7B),
        ".3g GFLOPs",
        linear_flops_per_token,
    ),
    "swap-bytes": Derived(
        "bytes to move a token's K/V of Llama-2-7B in 16 bits to the host and back", swap_bytes(), "binary", swap_bytes
    ),
    "recompute-over-swap": Derived(
        "FLOPs per byte at which both take as long",
        linear_flops_per_token(LLAMA_2_7B) / swap_bytes(),
        ".3g",
        swap_bytes,
    ),
    # --- time
    "m3-over-static-w1": _over("M3", W2, "w1", "m3"),
    "m3-over-static-w2": _over("M3", W2, "w2", "m3"),
    "m3-over-continuous-w2": _over("M3", W2, "w2", "m3", "hf:continuous"),
    "m2-over-static-w2": _over("M2 padded", chapter_3.W2, "w2", "m2:padded"),
    "m3-attention-over-grouped": Derived(
        "time of the torch backend over gather and SDPA with grouped heads, 16 requests of 512 tokens",
        attention_over_grouped,
        ".2f",
    ),
}
