"""Claims about batches, padding, budgets and policies."""

from __future__ import annotations

import ast
from pathlib import Path

from claims import chapter_3
from claims.chapter_6 import steps_of_example
from claims.forms import plain
from claims.ledger import ROOT, Cited, Claim, Derived

from errata.finding import Erratum, Evidence, claims_of
from folovllm import LLM, SamplingParams

PROMPT, ROWS = 100, 8  # a prompt of 100 tokens, and 7 decodes beside it
JOBS = (100, 1, 1, 1)  # steps of each, in the order in which they come


def padding_cells(tokens: int, rows: int) -> int:
    """Padding if one row brings `tokens` tokens and the others one each."""
    return (tokens - 1) * (rows - 1)


def twice_as_much() -> Evidence:
    """How padding grows with the rows, with the prompt, and with both."""
    once = padding_cells(PROMPT, ROWS)
    more = {"rows": (PROMPT, 2 * ROWS), "prompt": (2 * PROMPT, ROWS), "both": (2 * PROMPT, 2 * ROWS)}
    found = {"once": Derived(f"padding cells, {ROWS} rows and a prompt of {PROMPT}", once)}
    for key, (tokens, rows) in more.items():
        says = f"times as many with {rows} rows and a prompt of {tokens}"
        found[key] = Derived(says, padding_cells(tokens, rows) / once, ".2f")
    return found


def counted_nine() -> Evidence:
    """The claim's count, in which a request that brings the prompt decodes as well."""
    decodes, padded = ROWS, ROWS - 1
    return {
        "all": Derived("cells by the claim's own sum", PROMPT + decodes + padded * (PROMPT - 1)),
        "useful": Derived("useful ones by it", PROMPT + decodes),
    }


def forwards() -> Evidence:
    """Four requests on M1, on M2 with a forward per request, and on M2 in shared forwards."""
    prompts, found = ([5, 6, 7], [8, 9], [10, 11, 12, 13], [14]), {}
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    arms = {
        "m1": ("M1, one request at a time", LLM(milestone="m1", dtype="float32")),
        "loop": ("M2, scheduled together, a forward each", LLM(milestone="m2", batching="loop", dtype="float32")),
        "padded": ("M2, scheduled together, one forward", LLM(milestone="m2", batching="padded", dtype="float32")),
    }
    for key, (name, llm) in arms.items():
        llm.generate([list(prompt) for prompt in prompts], params, use_tqdm=False)
        found[key] = Derived(
            f"forwards for {len(prompts)} x {params.max_tokens} tokens: {name}", llm.engine.stats.forwards
        )
    return found


def second_chunk() -> Evidence:
    """What the engine's scheduler gives to C, with the claim's budget and with one that has to cut."""
    (only,), (first, second) = steps_of_example(1000), steps_of_example(600)
    return {
        "c-1000": Derived("tokens of C in the step, with a budget of 1,000", only["C"]),
        "c-600": Derived("tokens of C in both steps, with a budget of 600", f"{first['C']} and {second['C']}"),
    }


def waits(jobs: tuple[int, ...]) -> float:
    """The mean wait of jobs that run one after the other in this order."""
    return sum(sum(jobs[:index]) for index in range(len(jobs))) / len(jobs)


def shortest_first() -> Evidence:
    """Mean waits of a long job that comes first and three short ones behind it."""
    return {
        "fcfs": Derived(f"mean wait of jobs of {JOBS} steps, first come, first served", waits(JOBS), ".4g"),
        "sjf": Derived("the same jobs, the shortest first", waits(tuple(sorted(JOBS))), ".2g"),
    }


def bitten_off() -> Evidence:
    """Padding of three texts, of nearly equal and of unequal lengths."""
    lengths = chapter_3.NEARLY_EQUAL
    cells, used = chapter_3.cells(lengths), sum(lengths)
    return {"cells": Derived(f"padding cells of {lengths}, of all", f"{cells - used} of {cells}")}


def who_needs_a_model() -> Evidence:
    """Whether deciding needs tensors or models: the imports of the modules that decide, direct and indirect."""
    decide = ("scheduler", "kv_cache/block_manager.py", "kv_cache/block_pool.py", "kv_cache/prefix_cache.py")
    paths = [ROOT / "folovllm" / name for name in decide]
    files = [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    asking = [file.name for file in files if {"torch", "transformers", "folovllm.models"} & imported(file)]
    says = "files of scheduler, block manager, pool and prefix cache that import torch, transformers or our models"
    return {"asking": Derived(says, len(asking))}


def imported(file: Path, seen: set[str] | None = None) -> set[str]:
    """The modules that a file imports, directly or through others of ours, and the folders they are in.

    What is imported for type checkers alone does not count.
    """
    found = set[str]() if seen is None else seen
    body = [
        node
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    ]
    for node in (inner for statement in body for inner in ast.walk(statement)):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            parts, known = name.split("."), name in found
            found |= {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
            inner_file = (ROOT / Path(*parts)).with_suffix(".py")
            if not known and inner_file.is_file():
                imported(inner_file, found)
    return found


ERRATA = (
    Erratum(
        "padding-example",
        "Three prompts of nearly equal length show the waste of padding",
        ("padding-nearly-equal", "padding-unequal-cells", "padding-unequal-tokens", "padding-unequal"),
        formula=bitten_off,
    ),
    Erratum("padding-quadratic", "The cost of padding grows with the square of the batch", formula=twice_as_much),
    Erratum(
        "eight-rows",
        "Of the cells of such a batch, one in seven is useful",
        ("padding-mixed-cells", "padding-mixed-tokens", "padding-mixed"),
        formula=counted_nine,
    ),
    Erratum("continuous-no-padding", "Continuous batching has no padding", ("w2-prefill-padding", "w2-kv-padding")),
    Erratum(
        "loop-of-forwards",
        "Scheduling multiplies throughput, even at one forward per request",
        ("m1-w2-passes", "m2-loop-passes", "m2-padded-passes", "m2-loop-over-m1", "m2-padded-over-m1"),
        experiment=forwards,
    ),
    Erratum(
        "gpu-utilisation",
        "Continuous batching takes an idle GPU to a busy one",
        ("m1-w2-roofline", "m2-loop-roofline", "m2-padded-roofline"),
    ),
    Erratum(
        "full-budget",
        "The token budget is full, so the GPU is fully used",
        ("decode-share-of-peak", "decode-share-of-bandwidth"),
    ),
    Erratum(
        "second-chunk",
        "A second chunk of the last prompt fills the step",
        ("budget-scheduled", "budget-filled", "budget-c-claimed"),
        formula=second_chunk,
    ),
    Erratum(
        "scheduler-with-models", "Scheduler and block manager belong to the model layer", formula=who_needs_a_model
    ),
    Erratum("sjf-in-vllm", "Shortest job first is one of vLLM's policies", ("vllm-policies",), formula=shortest_first),
)

CLAIMS: dict[str, Claim] = {
    "vllm-policies": Cited(
        "policies of vLLM's scheduler",
        "fcfs and priority",
        plain,
        "vLLM API reference, vllm.config.scheduler",
        "https://docs.vllm.ai/en/v0.13.0/api/vllm/config/scheduler/",
    ),
    **claims_of(ERRATA),
}
