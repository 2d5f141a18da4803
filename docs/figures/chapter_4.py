"""The figures of chapter 4."""

from __future__ import annotations

from claims import chapter_4
from claims.ledger import result
from matplotlib.figure import Figure
from traces import steps_of

from folovllm.course.viz import batching, blocks
from folovllm.kv_cache.block_manager import BlockManager
from folovllm.kv_cache.interface import BlockCopy, BlockPlan
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams


def draw_memory_shares() -> Figure:
    """What slots are under each policy, beside the paper's figure 2."""
    policies = chapter_4.simulated()["policies"]
    return blocks.memory_shares({policy: run["shares"] for policy, run in policies.items()})


def draw_block_sizes() -> Figure:
    """Empty slots over the block size."""
    runs = chapter_4.simulated()["block_sizes"]
    columns = ([run[key] for run in runs] for key in ("block_size", "empty_slots", "empty_share"))
    return blocks.waste_by_block_size(*columns)


def draw_block_tables() -> Figure:
    """A fork and its first write, in the engine's own block manager."""
    manager = BlockManager(num_blocks=6, block_size=4)
    a, b = (Request(name, [0] * 6, SamplingParams(), (), max_model_len=64) for name in "ab")
    text = ["the", "cat", "sat", "on", "the", "mat"]
    write(manager, a, 6)
    states = {"a has six tokens": blocks.TableState(manager.snapshot(), {"a": text})}
    manager.fork(a, b, num_tokens=5)
    states["b is forked from five of them"] = blocks.TableState(manager.snapshot(), {"a": text, "b": text[:5]})
    copies = [(op.src, op.dst) for op in write(manager, b, 1).ops if isinstance(op, BlockCopy)]
    texts = {"a": text, "b": [*text[:5], "hat"]}
    states["b writes a sixth token of its own"] = blocks.TableState(manager.snapshot(), texts, copies)
    return blocks.block_tables(states)


def write(manager: BlockManager, request: Request, num_tokens: int) -> BlockPlan:
    """Allocate slots for more tokens of a request, and count them as computed."""
    plan = manager.allocate_slots(request, num_tokens)
    if plan is None:
        raise RuntimeError(f"no blocks for {num_tokens} tokens")
    manager.cache_blocks(plan)
    return plan


LETTERS = {str(i): letter for i, letter in enumerate("abcd")}  # what figures call the requests of a trace


def draw_block_map() -> Figure:
    """Which request holds which block, with a host to swap to."""
    return blocks.block_map(steps_of(result(chapter_4.BLOCKS)["trace"]["swap"]), labels=LETTERS)


def draw_preemptions() -> Figure:
    """Which requests are preempted in both modes, and how they come back."""
    traces = {mode: steps_of(trace) for mode, trace in result(chapter_4.BLOCKS)["trace"].items()}
    return blocks.preemption_timeline(traces, list(LETTERS), labels=LETTERS)


def draw_slots() -> Figure:
    """w2 in the same memory, cut into regions and into blocks."""
    data = result(chapter_4.BLOCKS)["capacity"]
    ways = {"m2": f"M2, regions of {data['max_model_len']:,}", "m3": f"M3, blocks of {data['block_size']}"}
    arms = {}
    for milestone, name in ways.items():
        run = data[milestone]
        arms[f"{name}, {run['max_running']} requests at once"] = list(zip(run["reserved"], run["used"], strict=True))
    return blocks.slots_over_steps(arms, data["kv_tokens"])


def draw_m3_ratios() -> Figure:
    """Every system of w2 over a static batch of Hugging Face's `generate`."""
    peer = chapter_4.PEER
    systems = [name for name in result(chapter_4.W2)["summary"]["w2"] if name != peer]
    return batching.ratio_bars({name: chapter_4.over(chapter_4.W2, "w2", name) for name in systems}, peer)


FIGURES = {
    "memory-shares": draw_memory_shares,
    "waste-by-block-size": draw_block_sizes,
    "block-tables": draw_block_tables,
    "block-map": draw_block_map,
    "preemption-timeline": draw_preemptions,
    "slots-over-steps": draw_slots,
    "m3-ratio-bars": draw_m3_ratios,
}
