"""The figures of chapter 7."""

from __future__ import annotations

from claims import chapter_7
from claims.ledger import result
from matplotlib.figure import Figure
from traces import steps_of

from figures.chapter_6 import compositions
from folovllm.course.viz import chunks, prefix
from folovllm.kv_cache.block_manager import BlockManager
from folovllm.kv_cache.prefix_cache import PrefixCache
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams


def draw_hash_tree() -> Figure:
    """Four prompts in the engine's own block manager; a word is a token."""
    numbers: dict[str, int] = {}
    size = chapter_7.TREE_BLOCK
    manager = BlockManager(16, size, cache=PrefixCache(size))
    texts: dict[int, str] = {}
    tails: dict[str, str] = {}
    for name, prompt in chapter_7.TREE_PROMPTS.items():
        words = prompt.split()
        ids = [numbers.setdefault(word, len(numbers)) for word in words]
        request = Request(name, ids, SamplingParams(), (), max_model_len=64)
        plan = manager.allocate_slots(request, len(ids) - manager.get_computed_blocks(request))
        if plan is None:
            raise RuntimeError(f"no blocks for {name!r}")
        manager.cache_blocks(plan)
        for index, block in enumerate(plan.block_table):
            part = words[index * size : (index + 1) * size]
            if len(part) == size:
                texts[block] = " ".join(part)
            else:
                tails[name] = " ".join(part)
    return prefix.hash_tree(manager.snapshot(), texts, tails)


def draw_hit_rates() -> Figure:
    """The share of prompt tokens found over the length of what prompts have in common."""
    data = result(chapter_7.PREFIXES)["hit_rate"]
    rates = {int(size): measured for size, measured in data["rates"].items()}
    return prefix.hit_rate_by_prefix(data["shared"], rates, data["prompt_len"], data["number"])


def draw_sharing_rules() -> Figure:
    """Twenty requests with one system prompt, under three rules of what may be found."""
    names = {"none": "no cache", "written": "finds what is written", "forward": "M4: and what this forward writes"}
    return chunks.step_composition(compositions(result(chapter_7.PREFIXES)["fills"], names), share_scale=True)


def draw_lru_order() -> Figure:
    """The queue of free blocks while five requests come and go."""
    labels = dict(zip("01234", chapter_7.LRU_NAMES, strict=True))
    return prefix.lru_order(steps_of(result(chapter_7.PREFIXES)["trace"]), labels=labels)


FIGURES = {
    "hash-tree": draw_hash_tree,
    "hit-rates": draw_hit_rates,
    "sharing-rules": draw_sharing_rules,
    "lru-order": draw_lru_order,
}
