"""Claims of chapter 4: what memory is lost to, what blocks lose, who shares them, and who gives way."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from claims.ledger import (
    Cited,
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
from claims.models import BYTES_16_BIT, LLAMA_2_7B, LLAMA_2_13B
from folovllm.course.lessons.allocators import Buddy
from folovllm.course.lessons.formulas import linear_flops_per_token
from folovllm.course.lessons.fragmentation import capacity_of, num_blocks, paged_waste, region_waste, translate
from folovllm.course.viz.blocks import PAPER_FIG_2
from folovllm.kv_cache.block_manager import WATERMARK
from folovllm.kv_cache.formulas import kv_bytes_per_token

BLOCKS = "m3-blocks-folo-tiny"  # by `folovllm/course/measure/course.py blocks`
HERE = "docs/claims/chapter_4.py"
FRAGMENTATION = "folovllm/course/lessons/fragmentation.py"

PAPER = ("Kwon et al. 2023, arXiv:2309.06180", "https://arxiv.org/abs/2309.06180")
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


def fragmentation_rows() -> list[list[str]]:
    """What the slots were under each policy, and what that did to the requests."""
    rows = []
    for policy, run in simulated()["policies"].items():
        shares = [percent(1)(run["shares"][name]) for name in ("used", "reserved", "internal", "external")]
        rows.append([policy, *shares, fixed(1)(run["mean_running"]), plain(run["steps"]), plain(run["preemptions"])])
    return rows


def empty_share(block_size: int) -> float:
    """Of the slots that requests hold in blocks of this size, those that are empty."""
    return float(next(run["empty_share"] for run in simulated()["block_sizes"] if run["block_size"] == block_size))


# --- the same memory in regions and in blocks -----------------------------------------------------------------


def longest_together() -> int:
    """Tokens with K/V if all requests of w2 stood at their longest at once."""
    return sum(prompt + output - 1 for prompt, output in result(BLOCKS)["capacity"]["requests"])


def used_of_held(milestone: str) -> float:
    """Of the slots that requests hold, those that are written, over all steps."""
    run = result(BLOCKS)["capacity"][milestone]
    return float(sum(run["used"]) / sum(run["reserved"]))


def _capacity(milestone: str, says: str, number: str) -> Claim:
    return Measured(f"{says}, w2 in 4,096 slots, {milestone}", BLOCKS, ("capacity", milestone, number), plain)


# --- sharing ----------------------------------------------------------------------------------------------


def sharing_rows() -> list[list[str]]:
    """The largest share of blocks that sharing saved in any step: samples of one prompt, beams on four."""
    found = result(BLOCKS)["sharing"]
    return [
        [
            size,
            width,
            percent()(found["parallel_sampling"][size][width]),
            percent()(fmean(saved)),
        ]
        for size, widths in found["beam_search"].items()
        for width, saved in widths.items()
    ]


# --- giving way -------------------------------------------------------------------------------------------

ARMS = {"roomy": "enough blocks", "recompute": "too few, recompute", "swap": "too few, swap"}


def preemption_rows() -> list[list[str]]:
    """w2 with enough blocks and with too few, in both modes."""
    rows = []
    for arm, name in ARMS.items():
        numbers = result(BLOCKS)["summary"][arm]
        moved = numbers["swapped_out_blocks"]["median"] + numbers["swapped_in_blocks"]["median"]
        rows.append(
            [
                name,
                median(plain)(numbers["preemptions"]),
                median(plain)(numbers["steps"]),
                median(plain)(numbers["prompt_tokens_computed"]),
                plain(moved),
                with_range(fixed(2))(numbers["over_roomy"]),
            ]
        )
    return rows


def swap_bytes() -> int:
    """What crosses the bus per token of Llama-2-7B that is swapped out and in again."""
    return 2 * LLAMA_2_7B_TOKEN


TABLES: dict[str, Table] = {
    "paging-waste": Table(
        "a request's empty slots, in blocks of 16 and in a region of 4,096",
        ("tokens", "blocks", "empty slots in them", "share of the blocks", "share of a region of 4,096"),
        waste_rows,
        source=f"{FRAGMENTATION}:paged_waste",
    ),
    "fragmentation": Table(
        "what slots are under four policies, over the steps in which somebody waits",
        ("policy", "used", "reserved", "internal", "external", "at once", "steps", "gave way"),
        fragmentation_rows,
        source=f"{FRAGMENTATION}:replay",
        files=(BLOCKS,),
    ),
    "m3-sharing": Table(
        "blocks that sharing saves, at most in any step",
        ("block size", "samples or beams", "samples save", "beams save"),
        sharing_rows,
        source="folovllm/course/measure/blocks.py:sharing",
        files=(BLOCKS,),
    ),
    "m3-preemption": Table(
        "w2 with enough blocks and with a quarter of them",
        ("blocks", "gave way", "steps", "prompt tokens computed", "blocks moved", "time over enough"),
        preemption_rows,
        source="folovllm/course/measure/blocks.py:preemption_rounds",
        files=(BLOCKS,),
    ),
}


def _derived(says: str, number: Any, form: Form, source: str) -> Claim:
    return Derived(says, lambda: number, form, source)


def _card(says: str, number: int) -> Claim:
    return _derived(
        f"{says}: Llama-2-13B in 16 bits with 12 GiB for K/V", number, plain, f"{FRAGMENTATION}:capacity_of"
    )


def _buddy(says: str, number: int) -> Claim:
    return _derived(f"{says}, in the example", number, digits(3, "MB"), f"{HERE}:buddy_example")


CLAIMS: dict[str, Claim] = {
    # --- the problem, and what becomes of it
    "w2-longest": Derived(
        "tokens with K/V if all sixteen requests of w2 stood at their longest at once",
        longest_together,
        plain,
        f"{HERE}:longest_together",
    ),
    "m2-at-once": _capacity("m2", "requests that ran at once, at most", "max_running"),
    "m2-capacity-passes": _capacity("m2", "forward passes", "forwards"),
    "m2-most-held": _capacity("m2", "slots set aside, at most", "most_reserved"),
    "m2-most-used": _capacity("m2", "slots with K/V, at most", "most_used"),
    "m3-at-once": _capacity("m3", "requests that ran at once, at most", "max_running"),
    "m3-capacity-passes": _capacity("m3", "forward passes", "forwards"),
    "m3-most-held": _capacity("m3", "slots in blocks that requests hold, at most", "most_reserved"),
    "m3-most-used": _capacity("m3", "slots with K/V, at most", "most_used"),
    "m2-used-of-held": Derived(
        "of the slots that M2 sets aside for w2, those with K/V, over all steps",
        lambda: used_of_held("m2"),
        percent(),
        f"{HERE}:used_of_held",
    ),
    "m3-used-of-held": Derived(
        "of the slots in blocks that requests hold in M3 on w2, those with K/V, over all steps",
        lambda: used_of_held("m3"),
        percent(),
        f"{HERE}:used_of_held",
    ),
    # --- replays, and the paper
    **{
        f"replay-{policy}-used": Measured(
            f"share of the slots with K/V, {policy}",
            BLOCKS,
            ("simulator", "policies", policy, "shares", "used"),
            percent(1),
        )
        for policy in ("oracle", "paged")
    },
    "replay-oracle-external": Measured(
        "share of the slots lost to external fragmentation, oracle",
        BLOCKS,
        ("simulator", "policies", "oracle", "shares", "external"),
        percent(1),
    ),
    **{
        f"replay-{policy}-at-once": Measured(
            f"requests at once while somebody waits, {policy}",
            BLOCKS,
            ("simulator", "policies", policy, "mean_running"),
            fixed(1),
        )
        for policy in ("max", "paged")
    },
    **{
        f"paper-{name}-used": Cited(
            f"share of K/V memory that holds tokens, {system}", share / 100, percent(1), f"{PAPER[0]}, Fig. 2", PAPER[1]
        )
        for name, (system, share) in zip(("max", "pow2", "oracle", "vllm"), PAPER_FIG_2, strict=True)
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
        percent(1),
        f"{HERE}:empty_share",
    ),
    "empty-share-256": Derived(
        "of the slots that requests hold in blocks of 256, those that are empty",
        lambda: empty_share(256),
        percent(),
        f"{HERE}:empty_share",
    ),
    # --- one request
    "blocks-100": _derived("blocks of 16 for 100 tokens", num_blocks(100, 16), plain, f"{FRAGMENTATION}:num_blocks"),
    "slots-100": _derived("slots in them", slots(100), plain, f"{HERE}:slots"),
    "empty-100": _derived("empty slots in them", slots(100) - 100, plain, f"{HERE}:slots"),
    "paged-waste-100": _derived(
        "share of them that is empty", paged_waste(100, 16), percent(1), f"{FRAGMENTATION}:paged_waste"
    ),
    "region-waste-2048": _derived(
        "empty share of a region of 2,048 with 100 tokens",
        region_waste(100, 2048),
        percent(1),
        f"{FRAGMENTATION}:region_waste",
    ),
    "blocks-1000": _derived(
        "blocks of 16 for 1,000 tokens", num_blocks(1000, 16), plain, f"{FRAGMENTATION}:num_blocks"
    ),
    "paged-waste-1000": _derived(
        "share of them that is empty", paged_waste(1000, 16), percent(2), f"{FRAGMENTATION}:paged_waste"
    ),
    "layer-region": _derived(
        "K/V of 4,096 tokens in one float32 layer with 32 heads of 128",
        REGION * LAYER_TOKEN_BYTES,
        binary,
        f"{HERE}:LAYER_TOKEN_BYTES",
    ),
    "layer-used": _derived("of 1,000 tokens", 1000 * LAYER_TOKEN_BYTES, binary, f"{HERE}:LAYER_TOKEN_BYTES"),
    "layer-blocks": _derived(
        "of 1,000 tokens in blocks of 16", slots(1000) * LAYER_TOKEN_BYTES, binary, f"{HERE}:LAYER_TOKEN_BYTES"
    ),
    "batch-layer-region": _derived(
        "the layer's K/V for 32 requests with a region of 4,096 each",
        BATCH * REGION * LAYER_TOKEN_BYTES,
        binary,
        f"{HERE}:BATCH",
    ),
    "batch-layer-blocks": _derived(
        "the same for 500 tokens each in blocks of 16",
        BATCH * slots(BATCH_LEN) * LAYER_TOKEN_BYTES,
        binary,
        f"{HERE}:BATCH",
    ),
    "batch-region": _derived(
        "K/V of Llama-2-7B in 16 bits, 32 requests with a region of 4,096 each",
        BATCH * REGION * LLAMA_2_7B_TOKEN,
        binary,
        f"{HERE}:BATCH",
    ),
    "batch-blocks": _derived(
        "the same for 500 tokens each in blocks of 16",
        BATCH * slots(BATCH_LEN) * LLAMA_2_7B_TOKEN,
        binary,
        f"{HERE}:BATCH",
    ),
    "batch-saved": _derived("what that saves", 1 - slots(BATCH_LEN) / REGION, percent(1), f"{HERE}:BATCH"),
    # --- a card of 40 GB
    "card-tokens": _card("tokens that fit", CARD.tokens),
    "card-regions": _card("regions of 2,048 that fit", CARD.regions),
    "card-blocks": _card("blocks of 16 that fit", CARD.blocks),
    "card-requests": _card("requests of 500 tokens in blocks that fit", CARD.requests),
    # --- buddies
    "buddy-free": _buddy("free memory", buddy_example()[0].num_free),
    "buddy-largest": _buddy("the largest free piece", buddy_example()[0].largest_free),
    "buddy-left": _buddy("free memory after 64 MB more are taken", buddy_example()[1].num_free),
    "buddy-left-largest": _buddy("the largest free piece after that", buddy_example()[1].largest_free),
    # --- addresses
    "page-number": _derived("page of address 10,000", ADDRESS // PAGE_SIZE, plain, f"{FRAGMENTATION}:translate"),
    "page-offset": _derived("offset of address 10,000 in it", ADDRESS % PAGE_SIZE, plain, f"{FRAGMENTATION}:translate"),
    "page-physical": _derived(
        "physical address, if the page lies in frame 3",
        translate(ADDRESS, PAGE_SIZE, FRAMES),
        plain,
        f"{FRAGMENTATION}:translate",
    ),
    "slot-of-37": _derived(
        "slot of token 37 with the block table 7, 2, 9 and blocks of 16",
        translate(POSITION, BLOCK_SIZE, TABLE),
        plain,
        f"{FRAGMENTATION}:translate",
    ),
    # --- giving way
    "watermark": _derived(
        "share of the pool that an admission leaves free",
        WATERMARK,
        percent(),
        "folovllm/kv_cache/block_manager.py:WATERMARK",
    ),
    "recompute-flops": _derived(
        "FLOPs in the linear layers to compute a token of Llama-2-7B again",
        linear_flops_per_token(LLAMA_2_7B),
        digits(3, "GFLOPs", 1e-9),
        "folovllm/course/lessons/formulas.py:linear_flops_per_token",
    ),
    "swap-bytes": _derived(
        "bytes to move a token's K/V of Llama-2-7B in 16 bits to the host and back",
        swap_bytes(),
        binary,
        f"{HERE}:swap_bytes",
    ),
    "recompute-over-swap": _derived(
        "FLOPs per byte at which both take as long",
        linear_flops_per_token(LLAMA_2_7B) / swap_bytes(),
        digits(3),
        f"{HERE}:swap_bytes",
    ),
}
