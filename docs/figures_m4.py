"""The figures of chapters 6 and 7; what `figures` says of its own holds for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from claims import chapter_6, chapter_7
from claims.ledger import result
from matplotlib.figure import Figure
from traces import steps_of

from folovllm.course.viz import chunks, prefix
from folovllm.kv_cache.block_manager import BlockManager
from folovllm.kv_cache.prefix_cache import PrefixCache
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams

# --- chapter 6 --------------------------------------------------------------------------------------------


def draw_chunked_mask() -> Figure:
    """A prompt of ten tokens in one pass, and in chunks of at most four."""
    return chunks.chunked_mask([4, 4, 2])


def compositions(fills: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, chunks.Composition]:
    """Runs of a results file, under other names."""
    return {name: chunks.Composition(**fills[key]) for key, name in names.items()}


def draw_chunk_steps() -> Figure:
    """What fills the steps of eight streams and a long prompt, in one piece and in chunks."""
    names = {"m3": "M3, in one piece", "256": "M4, a budget of 256", "64": "M4, a budget of 64"}
    return chunks.step_composition(compositions(result(chapter_6.CHUNKS)["fills"], names))


def draw_chunk_latency() -> Figure:
    """ITL of the streams and TTFT of the long prompt over the budget."""
    arms = result(chapter_6.CHUNKS)["summary"]["arms"]
    budgets = sorted(int(arm) for arm in arms if arm.isdigit())

    def over(key: str) -> list[dict[str, float]]:
        return [arms[str(budget)][key] for budget in budgets]

    panels = {
        "ITL of the streams": {
            "p50, while the prompt is computed": over("itl_p50_s"),
            "p95, while the prompt is computed": over("itl_p95_s"),
            "p95, whole run": over("run_itl_p95_s"),
        },
        "TTFT of the long prompt": {"p50": over("ttft_p50_s"), "p95": over("ttft_p95_s")},
    }
    return chunks.latency_by_chunk(budgets, panels, labels={budgets[-1]: "all"})


# --- chapter 7 --------------------------------------------------------------------------------------------


def draw_hash_tree() -> Figure:
    """Four prompts in the engine's own books; a word is a token."""
    numbers: dict[str, int] = {}
    size = chapter_7.TREE_BLOCK
    books = BlockManager(16, size, cache=PrefixCache(size))
    texts: dict[int, str] = {}
    tails: dict[str, str] = {}
    for name, prompt in chapter_7.TREE_PROMPTS.items():
        words = prompt.split()
        ids = [numbers.setdefault(word, len(numbers)) for word in words]
        request = Request(name, ids, SamplingParams(), (), max_model_len=64)
        plan = books.allocate_slots(request, len(ids) - books.get_computed_blocks(request))
        if plan is None:
            raise RuntimeError(f"no room for {name!r}")
        books.cache_blocks(plan)
        for index, block in enumerate(plan.block_table):
            part = words[index * size : (index + 1) * size]
            if len(part) == size:
                texts[block] = " ".join(part)
            else:
                tails[name] = " ".join(part)
    return prefix.hash_tree(books.snapshot(), texts, tails)


def draw_hit_rates() -> Figure:
    """The share of prompt tokens found over the length of what prompts have in common."""
    data = result(chapter_7.PREFIXES)["hit_rate"]
    rates = {int(size): measured for size, measured in data["rates"].items()}
    return prefix.hit_rate_by_prefix(data["shared"], rates, data["prompt_len"], data["number"])


def draw_sharing_rules() -> Figure:
    """Twenty requests with one system prompt, under three rules of what may be found."""
    names = {"none": "no cache", "written": "finds what is written", "follow": "M4: and what this forward writes"}
    return chunks.step_composition(compositions(result(chapter_7.PREFIXES)["fills"], names), share_scale=True)


def draw_lru_order() -> Figure:
    """The line of free blocks while five requests come and go."""
    labels = dict(zip("01234", chapter_7.LRU_NAMES, strict=True))
    return prefix.lru_order(steps_of(result(chapter_7.PREFIXES)["trace"]), labels=labels)


FIGURES: dict[str, Callable[[], Figure]] = {
    "chunked-mask": draw_chunked_mask,
    "chunk-steps": draw_chunk_steps,
    "chunk-latency": draw_chunk_latency,
    "hash-tree": draw_hash_tree,
    "hit-rates": draw_hit_rates,
    "sharing-rules": draw_sharing_rules,
    "lru-order": draw_lru_order,
}
