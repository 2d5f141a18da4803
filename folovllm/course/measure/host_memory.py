"""What `keep_freed_memory` gains: `python -m folovllm.course.measure.host_memory`.

The option changes the C library's allocator for a whole process, so each arm is a process of its own. Both read the
same 16 prompts of 167 tokens, with one thread; a round is one process of each arm, and an arm's figures are medians of
its prefills. CPU time rather than wall time: other programs slow it down less. The page faults are counts.

rounds, summary: for each arm cpu_seconds, system_seconds, page_faults of a prefill, and peak_bytes; gain: off over on.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from rich.console import Console

from folovllm import LLM, SamplingParams
from folovllm.course.bench.rounds import spreads
from folovllm.course.measure.measuring import as_text, describe
from folovllm.course.paths import RESULTS

MODEL, DTYPE = "qwen3-0.6b", "bfloat16"
NUM_PROMPTS, PROMPT_TOKENS, REPEATS = 16, 167, 3


def main() -> None:
    """Run the rounds, or, with --arm, one process of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arm", choices=["on", "off"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(prefills(keep=args.arm == "on")))
        return
    console, rounds = Console(), []
    for number in range(args.rounds):
        order = ("on", "off") if number % 2 == 0 else ("off", "on")
        arms: dict[str, Any] = {}
        for arm in order:
            with console.status(f"round {number + 1} of {args.rounds}: {arm} ..."):
                command = [sys.executable, __file__, "--arm", arm]
                arms[arm] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        rounds.append({**arms, "gain": arms["off"]["cpu_seconds"] / arms["on"]["cpu_seconds"]})
        console.print(f"round {number + 1}: off takes {rounds[-1]['gain']:.2f} times the CPU time of on")
    header = describe(MODEL, DTYPE)[2]
    header["hardware"]["threads"] = 1
    data = {
        **header,
        "command": "python -m folovllm.course.measure.host_memory",
        "summary": spreads(rounds),
        "rounds": rounds,
    }
    (RESULTS / "host-memory-qwen3-0.6b.json").write_text(as_text(data) + "\n", encoding="utf-8")


def prefills(keep: bool) -> dict[str, float]:
    """Medians over `REPEATS` prefills in this process, after one that is not counted."""
    llm = LLM(MODEL, load_format="dummy", dtype=DTYPE, num_kv_blocks=400, max_model_len=1024, num_threads=1,
              enable_prefix_caching=False, keep_freed_memory=keep)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_PROMPTS, PROMPT_TOKENS)
    prompts = torch.randint(llm.engine.vocab_size, shape, generator=generator).tolist()
    measured: list[tuple[float, float, int]] = []
    for _ in range(1 + REPEATS):
        cpu, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF)
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True), use_tqdm=False)
        cpu, after = time.process_time() - cpu, resource.getrusage(resource.RUSAGE_SELF)
        measured.append((cpu, after.ru_stime - before.ru_stime, after.ru_minflt - before.ru_minflt))
    cpus, systems, faults = zip(*measured[1:], strict=True)
    return {
        "cpu_seconds": statistics.median(cpus),
        "system_seconds": statistics.median(systems),
        "page_faults": statistics.median(faults),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    main()
