"""Claims about memory: blocks, fragmentation, sharing, and what fits."""

from __future__ import annotations

from claims.chapter_4 import BATCH, BATCH_LEN, BLOCK_SIZE, LAYER_TOKEN_BYTES, LENGTHS, REGION
from claims.chapter_7 import ALIKE, tokens_in_common
from claims.forms import digits
from claims.ledger import ROOT, Derived

from errata.batches import imported
from errata.finding import Erratum, Evidence, claims_of
from folovllm.course.lessons.fragmentation import mean_empty_slots, num_blocks, paged_waste, region_waste
from folovllm.kv_cache.block_manager import BlockManager
from folovllm.kv_cache.prefix_cache import PrefixCache
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams

GIGABYTE = 1e9


def request(name: str, tokens: list[int]) -> Request:
    """A request with these prompt tokens."""
    return Request(name, tokens, SamplingParams(max_tokens=64), (), max_model_len=1024)


def computed(manager: BlockManager, new: Request) -> None:
    """The request's whole prompt, as the engine would compute it in one step."""
    plan = manager.allocate_slots(new, new.num_tokens - manager.get_computed_blocks(new))
    if plan is not None:
        manager.cache_blocks(plan)


# --- how many bytes, and which share is empty ---------------------------------------------------------------


def two_units() -> Evidence:
    """The claim's region in both units: its "GB" are 10^9 bytes here and 2^30 there."""
    region = REGION * LAYER_TOKEN_BYTES
    return {
        "gb": Derived("that region in units of 10⁹ bytes", region / GIGABYTE, digits(3, "GB")),
        "gib": Derived("and in units of 2³⁰ bytes", region / 2**30, digits(3, "GiB")),
        "waste": Derived("empty share of 63 blocks of 16 with 1,000 tokens", paged_waste(1000, BLOCK_SIZE), ".2%"),
    }


def shares() -> Evidence:
    """The empty shares of both ways to hold one request."""
    found = {}
    for n in LENGTHS:
        found[f"paged-{n}"] = Derived(f"{n:,} tokens in blocks of 16, empty", paged_waste(n, BLOCK_SIZE), ".2%")
        found[f"region-{n}"] = Derived(f"{n:,} tokens in a region of {REGION:,}, empty", region_waste(n, REGION), ".1%")
    return found


def batch_in_gigabytes() -> Evidence:
    """The claim's batch in units of 10^9 bytes, where its numbers come from."""
    slots = BLOCK_SIZE * num_blocks(BATCH_LEN, BLOCK_SIZE)
    return {
        "region-gb": Derived(
            "regions, one layer, in 10⁹ bytes", BATCH * REGION * LAYER_TOKEN_BYTES / GIGABYTE, digits(3, "GB")
        ),
        "blocks-gb": Derived(
            "blocks, one layer, in 10⁹ bytes", BATCH * slots * LAYER_TOKEN_BYTES / GIGABYTE, digits(3, "GB")
        ),
    }


def last_block() -> Evidence:
    """What paging leaves empty in a request's last block."""
    worst = max(BLOCK_SIZE * num_blocks(n, BLOCK_SIZE) - n for n in range(1, 4 * BLOCK_SIZE))
    return {
        "most": Derived("empty slots of a request in blocks of 16, at most", worst),
        "mean": Derived(
            "empty slots on average, if all remainders are equally likely", mean_empty_slots(BLOCK_SIZE), ".1f"
        ),
    }


# --- sharing ------------------------------------------------------------------------------------------------


class TablesWithoutCounts:
    """Blocks that are shared by copying tables, with a set of free blocks and no counts."""

    def __init__(self, num_blocks: int) -> None:
        self.free = list(range(num_blocks, 0, -1))
        self.tables: dict[str, list[int]] = {}

    def take(self, name: str, count: int) -> None:
        """A request takes blocks."""
        self.tables[name] = [self.free.pop() for _ in range(count)]

    def fork(self, source: str, name: str) -> None:
        """Another beam: a copy of the table."""
        self.tables[name] = list(self.tables[source])

    def end(self, name: str) -> None:
        """A beam is done: its blocks are free."""
        self.free += reversed(self.tables.pop(name))


def a_beam_ends() -> Evidence:
    """A request forks, its first beam ends, and another request takes blocks; with and without counts."""
    tables_only = TablesWithoutCounts(8)
    tables_only.take("a", 4)
    tables_only.fork("a", "a's beam")
    tables_only.end("a")
    tables_only.take("b", 4)
    lost = set(tables_only.tables["b"]) & set(tables_only.tables["a's beam"])

    manager, a, beam, b = BlockManager(8, 4), *(request(name, [7] * 16) for name in ("a", "a's beam", "b"))
    computed(manager, a)
    manager.fork(a, beam, 16)
    manager.free(a)
    computed(manager, b)
    tables = manager.snapshot().tables
    kept = set(tables["b"]) & set(tables["a's beam"])
    return {
        "without": Derived("blocks of the living beam that b was given, tables copied without counts", len(lost)),
        "with": Derived("the same with reference counts", len(kept)),
    }


def by_hash() -> Evidence:
    """What the second of two prompts finds in the prefix cache, if their first tokens are alike."""
    alike = tokens_in_common(*ALIKE)
    found = {}
    for size in (BLOCK_SIZE, 4):
        manager = BlockManager(64, size, cache=PrefixCache(size, secret=b"any"))
        computed(manager, request("first", [*range(alike), *range(100, 140)]))
        second = request("second", [*range(alike), *range(200, 240)])
        found[f"blocks-of-{size}"] = Derived(
            f"tokens that the second finds in blocks of {size}", manager.get_computed_blocks(second)
        )
    return found


def same_key() -> Evidence:
    """Two different prompts whose blocks all have the same key, looked up by key alone and by our cache."""
    key = b"the same for all"
    cache = PrefixCache(BLOCK_SIZE, secret=b"any", hash_block=lambda *_: key)
    manager = BlockManager(64, BLOCK_SIZE, cache=cache)
    first, other = (request(name, [token] * 40) for name, token in (("first", 7), ("other", 8)))
    computed(manager, first)
    blocks = {key: first.prompt_token_ids[:BLOCK_SIZE]}
    taken = blocks.get(cache.hash_block(b"", other.prompt_token_ids[:BLOCK_SIZE], ""), [])
    return {
        "trusting": Derived("tokens of another text that a lookup by key alone takes over", len(taken)),
        "comparing": Derived(
            "tokens that our cache takes over under the same keys", manager.get_computed_blocks(other)
        ),
    }


def who_looks_up() -> Evidence:
    """Which folders of the package import the prefix cache: those with tensors, and the accounting."""
    with_tensors = [file for folder in ("runner", "attention", "models") for file in importers(folder)]
    return {
        "tensors": Derived("files of runner/, attention/ and models/ that import the prefix cache", len(with_tensors)),
        "books": Derived("files of kv_cache/ that do", ", ".join(importers("kv_cache"))),
    }


def importers(folder: str) -> list[str]:
    """Files of a folder of the package that import the prefix cache."""
    files = sorted((ROOT / "folovllm" / folder).rglob("*.py"))
    return [file.name for file in files if "folovllm.kv_cache.prefix_cache" in imported(file)]


ERRATA = (
    Erratum(
        "bytes-of-a-layer",
        "In blocks, a thousand tokens waste more than six percent",
        ("layer-region", "layer-used", "layer-blocks"),
        formula=two_units,
    ),
    Erratum("paged-waste", "Blocks waste nothing for short texts, and the same for all others", formula=shares),
    Erratum(
        "one-layer",
        "A batch's K/V is what one layer of it takes",
        ("batch-layer-region", "batch-layer-blocks", "batch-region", "batch-blocks", "batch-saved"),
        formula=batch_in_gigabytes,
    ),
    Erratum(
        "paging-removes-internal",
        "Paging removes internal fragmentation",
        ("blocks-100", "slots-100", "empty-100", "paged-waste-100"),
        formula=last_block,
    ),
    Erratum(
        "buddy",
        "Enough memory is free, and a large request does not fit",
        ("buddy-free", "buddy-largest", "buddy-left", "buddy-left-largest"),
    ),
    Erratum(
        "waste-counted-twice",
        "Seven requests fit in theory, and fragmentation leaves two or three",
        ("kv-bytes-llama2-13b", "card-tokens", "card-regions", "region-waste-2048", "card-blocks", "card-requests"),
    ),
    Erratum("sharing-without-counts", "To share blocks, copy the block table", formula=a_beam_ends),
    Erratum("short-prefix", "Requests that begin alike share their blocks", ("alike-tokens",), formula=by_hash),
    Erratum("hash-is-identity", "The hash identifies the block", ("collision-chance",), formula=same_key),
    Erratum("lookup-on-the-worker", "The cache engine on the worker finds blocks by their hash", formula=who_looks_up),
    Erratum(
        "chunks-fit",
        "Chunks make a prompt fit that is too long for the card",
        ("chunks-100k", "kv-of-a-chunk", "kv-100k", "mlp-100k", "mlp-of-a-chunk"),
    ),
)

CLAIMS = claims_of(ERRATA)
