"""Measure what chapters 0 to 8 say about time and memory, and write it to `results/`.

    python -m folovllm.course.measure workloads    # chapter 0: what the machine can do, and prefill and decode on it
    python -m folovllm.course.measure cache        # chapter 1: with and without a KV cache, and what breaks one
    python -m folovllm.course.measure engine       # chapter 2: a trace of M1, and the engine beside the bare loop
    python -m folovllm.course.measure batching     # chapter 3: M2's two ways, M1, static batches, and waits
    python -m folovllm.course.measure blocks       # chapter 4: where KV memory goes, preemption, sharing
    python -m folovllm.course.measure attention    # chapter 4: ways to attend over blocks, at the shape of Qwen3-0.6B
    python -m folovllm.course.measure ragged       # chapter 5: padded and ragged, and what packing does to HF's logits
    python -m folovllm.course.measure chunks       # chapter 6: decodes beside a long prompt (bundled model)
    python -m folovllm.course.measure prefixes     # chapter 7: requests with one system prompt (bundled model)
    python -m folovllm.course.measure whole        # chapter 8: one workload on every milestone, and the same tokens
    python -m folovllm.course.measure latency      # chapter 8: policies for a latency target, on a made-up machine
    python -m folovllm.course.measure families     # the page on families: a tiny model of each, at each milestone

Each part runs the models it is about, in rounds: see `folovllm.course.bench.rounds`. Run it while nothing else
does. The chapters show these files.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: on a busy machine, spinning threads cost 2x

import torch
from rich.console import Console

from folovllm.course.bench import machine
from folovllm.course.measure.chapter_0 import workloads
from folovllm.course.measure.chapter_1 import cache
from folovllm.course.measure.chapter_2 import engine
from folovllm.course.measure.chapter_3 import batching
from folovllm.course.measure.chapter_4 import blocks
from folovllm.course.measure.chapter_4_attention import attention
from folovllm.course.measure.chapter_5 import ragged
from folovllm.course.measure.chapter_6 import chunks
from folovllm.course.measure.chapter_7 import prefixes
from folovllm.course.measure.chapter_8 import whole
from folovllm.course.measure.chapter_8_latency import latency
from folovllm.course.measure.families import families
from folovllm.course.measure.measuring import as_text
from folovllm.course.paths import RESULTS

Part = Callable[[Console, int, Sequence[str]], list[tuple[str, dict[str, Any]]]]
PARTS: dict[str, Part] = {
    part.__name__: part
    for part in (
        *(workloads, cache, engine, batching, blocks, attention, ragged, chunks, prefixes, whole, latency),
        families,
    )
}
ROUNDS = 5


def main() -> None:
    """Run the parts named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=sorted(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"how often each measurement is made ({ROUNDS})")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1: one core gives the steadiest times)")
    parser.add_argument("--models", nargs="+", default=["folo-tiny", "qwen3-0.6b"], help="of all parts but `workloads`")
    args = parser.parse_args()
    console = Console()
    if machine.git_state()["commit"] is None:
        console.print(machine.NO_COMMIT, style="yellow")
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    for part in args.parts:
        for name, data in PARTS[part](console, args.rounds, args.models):
            path = RESULTS / f"{name}.json"
            path.write_text(as_text(data) + "\n", encoding="utf-8")
            console.print(f"wrote {path.relative_to(RESULTS.parent)}", highlight=False)


if __name__ == "__main__":
    main()
