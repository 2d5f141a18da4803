"""M2: continuous batching. Requests queue, and at every step a scheduler decides which of them run.

python examples/m2_inference.py                                              # 8 questions at once, the bundled model
python examples/m2_inference.py --num-prompts 16 --max-num-seqs 4 --watch    # watch requests wait, run and finish
python examples/m2_inference.py --num-prompts 5 --compare-sequential         # compare with M1, one request at a time
python examples/m2_inference.py --prompts "Hello" "How are you?" "Tell me a joke" --max-tokens 50

--compare-sequential runs the same prompts on three engines over the same weights:
  M1         one request at a time.
  M2 loop    M2's scheduler, with a separate forward for each request of a step: scheduling without batching.
             The requests of a step share everything else, such as the call of the sampler.
  M2 padded  the same, but the requests of a step share forwards: batching.
So M2 loop against M1 is the gain of scheduling, and M2 padded against M2 loop is the gain of batching.
"""

from __future__ import annotations

from folovllm.entrypoints.start import prepare

if __name__ == "__main__":  # the imports below take seconds, and Ctrl-C should print one line then as well
    prepare()

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from folovllm import EngineConfig, LLMEngine, RequestOutput, SamplingParams
from folovllm.checks import check_float, check_int
from folovllm.course.viz.live import watch
from folovllm.engine.factory import build_engine
from folovllm.entrypoints.cli import clean_exit, load_llm
from folovllm.entrypoints.tables import milliseconds, new_table, phase_table, request_table, stats_table, step_table
from folovllm.entrypoints.terminal import make_prompts, print_samples, show_ids
from folovllm.runner.hf.hf_runner import HFRunner


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Values are checked where `LLM` checks them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [options]"
    )
    add = parser.add_argument
    add("--prompts", nargs="+", metavar="TEXT", help="questions; default: some from the glossary")
    add("--num-prompts", type=int, default=8, help="how many glossary questions to ask")
    add("--max-tokens", type=int, default=256, help="most tokens per answer")
    add("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    add("--seed", type=int, help="makes drawn tokens repeatable")
    add("--compare-sequential", action="store_true", help="compare with M1 and with scheduling without batching")
    add("--rounds", type=int, default=3, help="how often --compare-sequential measures each engine")
    add("--watch", action="store_true", help="show every step as it happens")
    add("--pace", type=float, default=0.1, help="minimum seconds per step of --watch; 0: full speed")
    add("--max-num-seqs", type=int, help="requests that may run at once")
    add("--max-num-batched-tokens", type=int, help="tokens that one step may compute")
    add("--batching", help="padded: requests share a forward; loop: each has its own")
    add("--scheduling-policy", default="fcfs", help="fcfs, priority or sjf (shortest job first)")
    add("--model", default="folo-tiny", help="bundled name, local folder or hub id")
    add("--dtype", help="auto, float32, bfloat16 or float16; default: auto, and float32 to compare")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--load-format", default="auto", help="auto, safetensors or dummy (random weights)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Answer the prompts and print tables of latencies and counts, or compare three engines."""
    args = parse_args(argv)
    console = Console()
    with clean_exit(console):
        check_int("num_prompts", args.num_prompts, 1)
        check_int("rounds", args.rounds, 1)
        check_float("pace", args.pace, 0, 60)
        params = SamplingParams(temperature=args.temperature, seed=args.seed, max_tokens=args.max_tokens)
        if args.compare_sequential:
            compare(console, args, params)
        else:
            run(console, args, params)


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """The dtype, the device and the load format."""
    default = "float32" if args.compare_sequential else "auto"
    return {"dtype": args.dtype or default, "device": args.device, "load_format": args.load_format}


def scheduler_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the scheduler."""
    return {
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "scheduling_policy": args.scheduling_policy,
    }


def run(console: Console, args: argparse.Namespace, params: SamplingParams) -> None:
    """Answer all prompts at once."""
    options = {"milestone": "m2", "batching": args.batching, **model_options(args), **scheduler_options(args)}
    llm = load_llm(console, args.model, **options)
    titles, prompts = make_prompts(llm, args.prompts, args.num_prompts, raw=False)
    if args.watch:
        ids = llm.enqueue(prompts, params)
        outputs = watch(console, llm.engine, ids, dict(zip(ids, titles, strict=True)), args.pace)
    else:
        outputs = llm.generate(prompts, params)
    for title, output in zip(titles, outputs, strict=True):
        print_samples(console, title, output, show_ids(llm))
    trace = llm.engine.trace
    console.print(request_table(outputs), step_table(trace), phase_table(trace), stats_table(llm.engine.stats))


# ---------------------------------------------------------------------- the comparison


@dataclass(frozen=True)
class Round:
    """One engine, all prompts once. Times are in seconds; TTFT and end-to-end latency are means over the requests."""

    seconds: float
    forwards: int
    in_forwards: float
    ttft: float
    e2e: float
    token_ids: list[list[int]]

    @property
    def tokens(self) -> int:
        """Tokens generated."""
        return sum(map(len, self.token_ids))

    @property
    def outside(self) -> float:
        """Seconds outside the forwards."""
        return self.seconds - self.in_forwards

    @property
    def speed(self) -> float:
        """Generated tokens per second."""
        return self.tokens / self.seconds


@dataclass
class Arm:
    """One of the compared engines, and its rounds."""

    name: str
    engine: LLMEngine
    rounds: list[Round] = field(default_factory=list)

    def median(self, quantity: str) -> float:
        """The median of a quantity over the rounds."""
        return median(getattr(r, quantity) for r in self.rounds)

    def ratios(self, base: Arm) -> list[float]:
        """Throughput as a multiple of the base's in the same round, so that both met the same load of the machine."""
        return [mine.speed / its.speed for mine, its in zip(self.rounds, base.rounds, strict=True)]


def compare(console: Console, args: argparse.Namespace, params: SamplingParams) -> None:
    """The same prompts on M1, M2 loop and M2 padded: throughput, latencies, and whether the tokens are the same."""
    if args.watch or args.batching is not None:
        raise ValueError("--compare-sequential runs M1 and both ways of batching; allowed: no --watch, no --batching")
    if params.temperature and params.seed is None:
        raise ValueError(
            f"temperature={params.temperature} without a seed samples other tokens in each run; allowed: --seed"
        )
    model = model_options(args)
    configs = {  # checked before any weight is read
        f"M2 {batching}": EngineConfig.from_kwargs(
            model=args.model, milestone="m2", batching=batching, **model, **scheduler_options(args)
        )
        for batching in ("loop", "padded")
    }
    m1 = load_llm(console, args.model, milestone="m1", max_num_batched_tokens=args.max_num_batched_tokens, **model)
    titles, prompts = make_prompts(m1, args.prompts, args.num_prompts, raw=False)
    weights = loaded_model(m1.engine)
    arms = [Arm("M1", m1.engine)]
    for name, config in configs.items():
        arms.append(Arm(name, LLMEngine(engine_config=config, parts=build_engine(config, weights))))

    warm_up = SamplingParams(temperature=0, max_tokens=min(4, args.max_tokens))
    with console.status("Warming up ...") as status:
        for arm in arms:
            arm.engine.generate_batch(prompts, warm_up)
        for number in range(args.rounds):
            for arm in arms:
                status.update(f"Round {number + 1} of {args.rounds}: {arm.name} ...")
                outputs = measure(arm, prompts, params)
    for title, output in zip(titles, outputs, strict=True):
        print_samples(console, title, output, show_ids(m1))

    dtype, device = str(weights.dtype).removeprefix("torch."), weights.device
    threads = f", threads: {torch.get_num_threads()}" if device.type == "cpu" else ""
    console.print(f"{args.model}, {dtype} on {device}{threads}; {len(prompts)} prompts", markup=False, highlight=False)
    console.print(comparison_table(arms))
    for line in (*same_tokens(arms, dtype), *reading(*arms)):
        console.print(line, markup=False, highlight=False)


def measure(arm: Arm, prompts: Sequence[Any], params: SamplingParams) -> list[RequestOutput]:
    """Run all prompts on an arm, add the round to it, and return the outputs."""
    engine = arm.engine
    engine.stats.reset()
    engine.trace.clear()
    start = time.perf_counter()
    outputs = list(engine.generate_batch(prompts, params).values())
    seconds = time.perf_counter() - start
    phases = (
        ("forward", "sample") if loaded_model(engine).device.type == "cuda" else ("forward",)
    )  # on a GPU, sampling waits for the forward
    in_forwards = sum(step.phases[phase][1] - step.phases[phase][0] for step in engine.trace for phase in phases)
    ttft = fmean(output.metrics.ttft or 0.0 for output in outputs)
    e2e = fmean(output.metrics.e2e_latency or 0.0 for output in outputs)
    token_ids = [output.outputs[0].token_ids for output in outputs]
    arm.rounds.append(Round(seconds, engine.stats.forwards, in_forwards, ttft, e2e, token_ids))
    return outputs


def loaded_model(engine: LLMEngine) -> PreTrainedModel:
    """The model of an engine."""
    return cast(HFRunner, engine.core.runner).model


def comparison_table(arms: Sequence[Arm]) -> Table:
    """One row per engine: medians over the rounds."""
    rounds = len(arms[0].rounds)
    title = f"Medians of {rounds} round{'s' * (rounds > 1)}; against M1 with the least and the greatest"
    table = new_table(title, gap=1)
    table.add_column("engine", no_wrap=True)
    for head in (
        "tokens",
        "seconds",
        "tokens/s",
        "tokens/s\nagainst M1",
        "for-\nwards",
        "mean\nTTFT ms",
        "mean end\nto end ms",
    ):
        table.add_column(head, justify="right")
    for arm in arms:
        table.add_row(
            arm.name,
            f"{arm.median('tokens'):.0f}",
            significant(arm.median("seconds")),
            significant(arm.median("speed")),
            "1" if arm is arms[0] else spread(arm.ratios(arms[0])),
            f"{arm.median('forwards'):.0f}",
            milliseconds(arm.median("ttft")),
            milliseconds(arm.median("e2e")),
        )
    return table


def significant(number: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def spread(ratios: Sequence[float]) -> str:
    """A median with the least and the greatest: "2.9x (2.7-3.1)"."""
    return f"{median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"


def same_tokens(arms: Sequence[Arm], dtype: str) -> list[str]:
    """Whether each engine's tokens are M1's, in every round and for every prompt."""
    base = arms[0].rounds[0].token_ids
    lines = []
    for arm in arms[1:]:
        equal = [all(r.token_ids[i] == base[i] for r in arm.rounds) for i in range(len(base))]
        verdict = "yes" if all(equal) else "no"
        lines.append(f"{arm.name}: same tokens as M1: {verdict} ({sum(equal)} of {len(equal)})")
    if dtype != "float32":
        lines.append(f"In {dtype}, sums in another order are rounded differently, so tokens may differ.")
    return lines


def reading(m1: Arm, loop: Arm, padded: Arm) -> list[str]:
    """The gains of scheduling and of batching in words. A gain counts if every round shows it."""
    parts = {"scheduling": loop.ratios(m1), "batching": padded.ratios(loop)}
    faster = [name for name, ratios in parts.items() if min(ratios) > 1]
    if len(faster) == 2:
        gain = "Both made it faster in every round."
    elif faster:
        other = next(name for name in parts if name not in faster)
        gain = f"The gain is {faster[0]}'s: {other} {verdict(parts[other])}."
    else:
        gain = "Neither made it faster in every round."
    total = spread(padded.ratios(m1))
    return [
        f"Scheduling alone (M2 loop against M1): {spread(parts['scheduling'])} the throughput, with "
        f"{loop.median('forwards'):.0f} forwards against {m1.median('forwards'):.0f} and "
        f"{loop.median('outside'):.2g} s outside of them against {m1.median('outside'):.2g}. Mean TTFT went from "
        f"{milliseconds(m1.median('ttft'))} to {milliseconds(loop.median('ttft'))} ms, mean end-to-end latency from "
        f"{milliseconds(m1.median('e2e'))} to {milliseconds(loop.median('e2e'))} ms.",
        f"Batching (M2 padded against M2 loop): {spread(parts['batching'])} the throughput, with "
        f"{padded.median('forwards'):.0f} forwards against {loop.median('forwards'):.0f}.",
        f"Together (M2 padded against M1): {total} the throughput. {gain}",
    ]


def verdict(ratios: Sequence[float]) -> str:
    """What all ratios of throughput, one per round, show."""
    if min(ratios) > 1:
        return "made it faster in every round"
    return "made it slower in every round" if max(ratios) < 1 else "made no difference that every round shows"


if __name__ == "__main__":
    main()
