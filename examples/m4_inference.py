"""M4: chunked prefill mixed with decode, and prefix caching. The same requests on M1, M2, M3 and M4.

python examples/m4_inference.py                  # a table of M1 to M4, and whether they agree
python examples/m4_inference.py --watch          # first show the chunks and cache hits of M4 as they happen
python examples/m4_inference.py --milestones m4 --watch --num-kv-blocks 212    # a small pool: blocks are evicted
python examples/m4_inference.py --milestones m4 --watch --max-num-batched-tokens 64
python examples/m4_inference.py --model Qwen/Qwen3-0.6B --max-tokens 32

All questions have the same system prompt. Some of them arrive at the start. While they are being answered, more of them
arrive, one of which has a much longer system prompt: a document.

    M1  computes every prompt from its first token, and runs one request at a time.
    M2  runs all requests at once. While it computes the document, the others wait; prompts are padded to its length.
    M3  does the same without padding, with K/V in blocks.
    M4  computes the document in chunks beside the decodes, and the shared system prompt once.

Their answers are the same, which is checked token by token, in float32 unless --dtype is given. The milestones are
measured in turn, round by round, and the table has the fastest round of each. If other programs used the processor in
the meantime, a line below the table says so.
"""

from __future__ import annotations

from folovllm.entrypoints.start import prepare

if __name__ == "__main__":  # the imports below take seconds, and Ctrl-C should print one line then as well
    prepare()

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.status import Status
from rich.table import Table

from folovllm import LLM, EngineConfig, LLMEngine, RequestOutput, SamplingParams
from folovllm.checks import check_choice, check_float, check_int
from folovllm.config import MILESTONES
from folovllm.course.glossary import default_prompts, load_prose
from folovllm.course.viz.live import watching
from folovllm.engine.factory import build_engine
from folovllm.engine.input_processor import Prompt
from folovllm.entrypoints.cli import clean_exit, load_llm
from folovllm.entrypoints.tables import milliseconds, new_table, request_table, stats_table, step_table
from folovllm.entrypoints.terminal import print_samples, show_ids
from folovllm.runner.hf.hf_runner import HFRunner

DOCUMENT = "document"  # the id of the request with the long prompt
SHARED_IDS, OWN_IDS, DOCUMENT_IDS = 928, 16, 1664  # tokens of random prompts, for a model without a tokenizer
BUSY = 0.1  # a round is disturbed if it waited for a processor for a larger share of its time


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Values are checked where `LLM` checks them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [options]"
    )
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--milestones", nargs="+", default=list(MILESTONES), metavar="M", help="milestones to compare; default: all")
    add("--num-prompts", type=int, default=11, help="number of short questions, besides the document")
    add("--late", type=int, default=4, help="how many of them arrive with the document")
    add("--late-after", type=int, default=64, help="they arrive when this many tokens have been generated")
    add("--system-paragraphs", type=int, default=12, help="length of the shared system prompt")
    add("--document-paragraphs", type=int, default=32, help="length of the document, the system prompt included")
    add("--max-tokens", type=int, default=256, help="most tokens per answer")
    add("--rounds", type=int, default=3, help="how often to measure each milestone; the table has the fastest round")
    add("--watch", action="store_true", help="first show every step of the newest milestone")
    add("--pace", type=float, default=0.05, help="minimum seconds per step of --watch; 0: full speed")
    add("--max-num-seqs", type=int, default=16, help="requests that may run at once, from M2 on")
    add("--max-num-batched-tokens", type=int, default=256, help="tokens that one step of M4 may compute")
    add(
        "--long-prefill-token-threshold",
        type=int,
        default=0,
        help="maximum tokens of one prompt in a step of M4; 0: no limit",
    )
    add("--enable-chunked-prefill", action=flag, default=True, help="M4: prompts in chunks")
    add("--enable-prefix-caching", action=flag, default=True, help="M4: reuse K/V of shared prefixes")
    add("--block-size", type=int, default=16, help="tokens per block, from M3 on")
    add("--num-kv-blocks", type=int, default=896, help="blocks in the pool, from M3 on")
    add("--max-model-len", type=int, default=4096, help="tokens of prompt and answer together")
    add("--model", default="folo-tiny", help="bundled name, local folder or hub id")
    add("--dtype", default="float32", help="auto, float32, bfloat16 or float16")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--load-format", default="auto", help="auto, safetensors or dummy (random weights)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Serve the same requests on every milestone, and compare the results."""
    args = parse_args(argv)
    console = Console()
    with clean_exit(console):
        check_int("num_prompts", args.num_prompts, 1)
        check_int("late", args.late, 0, args.num_prompts)
        check_int("late_after", args.late_after, 0)
        check_int("system_paragraphs", args.system_paragraphs, 1)
        check_int("document_paragraphs", args.document_paragraphs, args.system_paragraphs + 1)
        check_int("rounds", args.rounds, 1)
        check_float("pace", args.pace, 0, 60)
        for name in args.milestones:
            check_choice("milestones", name, list(MILESTONES))
        params = SamplingParams(temperature=0, max_tokens=args.max_tokens)
        configs = {  # checked before any weight is read
            name: EngineConfig.from_kwargs(model=args.model, milestone=name, **options(args, name))
            for name in args.milestones
        }
        newest = newest_of(configs)
        llm = load_llm(console, args.model, milestone=newest, **options(args, newest))
        asks, first = make_asks(llm, args), Arm(newest, llm.engine)
        if args.watch:
            watch(console, args, first, asks, params)
        arms: list[Arm] = []
        for name, config in configs.items():
            with console.status(f"{name.upper()}: loading {args.model} ..."):
                arms.append(first if name == newest else Arm(name, load(config, arms)))
        measure_all(console, args, arms, asks, params)
        report(console, args, arms, asks, show_ids(llm))


def load(config: EngineConfig, arms: Sequence[Arm]) -> LLMEngine:
    """The engine of a milestone. M1 and M2 share one Hugging Face model, which is loaded once."""
    runners = [arm.engine.core.runner for arm in arms]
    model = next((runner.model for runner in runners if isinstance(runner, HFRunner)), None)
    return LLMEngine(engine_config=config, parts=build_engine(config, model))


def newest_of(names: Iterable[str]) -> str:
    """The newest of some milestones."""
    return max(names, key=list(MILESTONES).index)


def options(args: argparse.Namespace, milestone: str) -> dict[str, Any]:
    """The keywords of `LLM` that a milestone accepts."""
    shared = ("dtype", "device", "load_format", "max_model_len")
    names = [*shared, *(["max_num_seqs"] if milestone != "m1" else [])]
    if MILESTONES[milestone].paged:
        names += ["block_size", "num_kv_blocks"]
    if MILESTONES[milestone].chunked_prefill:
        names += ["enable_chunked_prefill", "enable_prefix_caching"]
        if args.enable_chunked_prefill:  # otherwise the document must fit into one step
            names += ["max_num_batched_tokens", "long_prefill_token_threshold"]
    return {name: getattr(args, name) for name in names}


# ---------------------------------------------------------------------- requests


@dataclass(frozen=True)
class Ask:
    """A request. late: it arrives while others are running."""

    request_id: str
    title: str
    prompt: Prompt
    late: bool


def make_asks(llm: LLM, args: argparse.Namespace) -> list[Ask]:
    """Short questions with the shared system prompt, and one with the document, in the middle of the late ones."""
    tokenizer, count = llm.engine.tokenizer, args.num_prompts
    if tokenizer is None:
        titles, prompts = random_prompts(llm.engine.vocab_size, count)
    else:
        paragraphs = [part.strip() for text in load_prose().values() for part in text.split("\n\n")]
        if args.document_paragraphs > len(paragraphs):
            raise ValueError(
                f"document_paragraphs={args.document_paragraphs} is not valid; allowed: at most {len(paragraphs)}"
            )
        short = "\n\n".join(paragraphs[: args.system_paragraphs])
        systems = [short] * count + ["\n\n".join(paragraphs[: args.document_paragraphs])]
        titles = default_prompts(count + 1)
        if tokenizer.chat_template:
            prompts = llm.chat_prompts(
                [
                    [{"role": "system", "content": system}, {"role": "user", "content": title}]
                    for system, title in zip(systems, titles, strict=True)
                ]
            )
        else:
            prompts = [f"{system}\n\n{title}\n" for system, title in zip(systems, titles, strict=True)]
        titles[-1] += " (with the document)"
    first_late = count - args.late
    asks = [Ask(str(i), titles[i], prompts[i], late=i >= first_late) for i in range(count)]
    asks.insert(first_late + args.late // 2, Ask(DOCUMENT, titles[-1], prompts[-1], late=True))
    return asks


def random_prompts(vocab_size: int, count: int) -> tuple[list[str], list[Prompt]]:
    """Random token ids of the same structure: all prompts share a prefix, and the last one is long."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        ids: list[int] = torch.randint(vocab_size, (length,), generator=generator).tolist()  # [length]
        return ids

    shared = draw(SHARED_IDS)
    lengths = [OWN_IDS] * count + [DOCUMENT_IDS]
    prompts: list[Prompt] = [shared + draw(length) for length in lengths]
    return [f"{SHARED_IDS} shared and {length} own random token ids" for length in lengths], prompts


# ---------------------------------------------------------------------- serving


@dataclass(frozen=True)
class Round:
    """All requests once. Times in seconds; kv_reserved: peak of reserved K/V in tokens.

    waited: time in which the engine had work to do, but other programs used the processor.
    """

    seconds: float
    waited: float
    ttft: float
    max_itl: float
    prompt_tokens_computed: int
    cached_tokens: int
    kv_reserved: int
    tokens: int

    @property
    def speed(self) -> float:
        """Generated tokens per second."""
        return self.tokens / self.seconds


@dataclass
class Arm:
    """A milestone: its measured rounds, and the outputs of every run, including a watched one."""

    name: str
    engine: LLMEngine
    rounds: list[Round] = field(default_factory=list)
    runs: list[list[RequestOutput]] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The name to show."""
        return self.name.upper()

    @property
    def best(self) -> Round:
        """The fastest round, the one least disturbed by other programs."""
        return min(self.rounds, key=lambda r: r.seconds)


def serve(
    engine: LLMEngine,
    asks: Sequence[Ask],
    params: SamplingParams,
    late_after: int,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[RequestOutput]:
    """Run all requests to completion. Returns their outputs in order. on_done: called with the number of finished ones.

    The late ones arrive when `late_after` tokens have been generated, or when no request is left.
    """
    done: dict[str, RequestOutput] = {}
    late = [ask for ask in asks if ask.late]
    start = engine.stats.generated_tokens
    try:
        for ask in asks:
            if not ask.late:
                engine.add_request(ask.request_id, ask.prompt, params)
        while late or engine.has_unfinished_requests():
            if late and (engine.stats.generated_tokens - start >= late_after or not engine.has_unfinished_requests()):
                for ask in late:
                    engine.add_request(ask.request_id, ask.prompt, params)
                late = []
            finished = [output for output in engine.step() if output.finished]
            done |= {output.request_id: output for output in finished}
            if finished:
                on_done(len(done))
    finally:
        engine.abort_request([ask.request_id for ask in asks])
    return [done[ask.request_id] for ask in asks]


def watch(console: Console, args: argparse.Namespace, arm: Arm, asks: Sequence[Ask], params: SamplingParams) -> None:
    """Serve the requests and show every step."""
    engine = arm.engine
    fresh(engine)
    with watching(console, engine, {ask.request_id: ask.title for ask in asks}, args.pace):
        arm.runs.append(serve(engine, asks, params, args.late_after))
    console.print(request_table(arm.runs[-1]), step_table(engine.trace), stats_table(engine.stats))


def measure_all(
    console: Console, args: argparse.Namespace, arms: Sequence[Arm], asks: Sequence[Ask], params: SamplingParams
) -> None:
    """Warm up all engines, then measure each once per round.

    So a slow phase of the machine affects all of them, and each has `rounds` chances to be undisturbed.
    """
    with console.status("Warming up ...") as status:
        warm_up = SamplingParams(temperature=0, max_tokens=min(4, args.max_tokens))
        for arm in arms:
            status.update(f"{arm.title}: warming up ...")
            serve(arm.engine, asks[:2], warm_up, 0)
        for number in range(1, args.rounds + 1):
            for arm in arms:
                head = f"{arm.title}, round {number} of {args.rounds}"
                measure(arm, asks, params, args.late_after, partial(show_progress, status, head, len(asks)))
            took = ", ".join(f"{arm.title} {arm.rounds[-1].seconds:.2f}" for arm in arms)
            console.print(f"seconds in round {number} of {args.rounds}: {took}", highlight=False)


def show_progress(status: Status, head: str, total: int, count: int) -> None:
    """Show how many requests of the current round are finished."""
    status.update(f"{head}: {count} of {total} answered ...")


def measure(
    arm: Arm, asks: Sequence[Ask], params: SamplingParams, late_after: int, on_done: Callable[[int], None]
) -> None:
    """Serve the requests once more, and add the round and the outputs to the arm.

    This thread always has work (while a GPU computes, it polls), so whenever it does not run, another program uses the
    processor.
    """
    fresh(arm.engine)
    on_done(0)
    start, ran = time.perf_counter(), time.thread_time()
    outputs = serve(arm.engine, asks, params, late_after, on_done)
    seconds, ran = time.perf_counter() - start, time.thread_time() - ran
    arm.rounds.append(make_round(arm.engine, outputs, seconds, max(0.0, seconds - ran)))
    arm.runs.append(outputs)


def fresh(engine: LLMEngine) -> None:
    """Clear the prefix cache, the counts and the trace."""
    engine.core.scheduler.kv.reset_prefix_cache()
    engine.stats.reset()
    engine.trace.clear()


def make_round(engine: LLMEngine, outputs: Sequence[RequestOutput], seconds: float, waited: float) -> Round:
    """The measurements of a run."""
    return Round(
        seconds,
        waited,
        ttft=fmean(output.metrics.ttft or 0.0 for output in outputs),
        max_itl=max((gap for output in outputs for gap in output.metrics.itls), default=0.0),
        prompt_tokens_computed=engine.stats.prompt_tokens_computed,
        cached_tokens=engine.stats.cached_tokens,
        kv_reserved=max(step.kv.reserved for step in engine.trace),
        tokens=sum(len(ids) for ids in tokens_of(outputs)),
    )


def tokens_of(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    """The token ids of every answer."""
    return [output.outputs[0].token_ids for output in outputs]


# ---------------------------------------------------------------------- the report


def report(console: Console, args: argparse.Namespace, arms: Sequence[Arm], asks: Sequence[Ask], as_ids: bool) -> None:
    """Print the answers, the table, warnings about its times, and whether the milestones agree.

    as_ids: print token ids, for a model without a tokenizer.
    """
    console.print()
    outputs = arms[-1].runs[-1]
    for ask, output in zip(asks, outputs, strict=True):
        print_samples(console, ask.title, output, as_ids)
    console.print(workload_line(outputs), highlight=False)
    console.print(comparison_table(arms))
    for line in (*cautions(arms, with_defaults(args)), *same_tokens(arms, args.dtype)):
        console.print(line, markup=False, highlight=False)


def workload_line(outputs: Sequence[RequestOutput]) -> str:
    """The workload in one line."""
    lengths = {output.request_id: len(output.prompt_token_ids) for output in outputs}
    document = lengths.pop(DOCUMENT)
    low, high = min(lengths.values()), max(lengths.values())
    return f"{len(lengths)} short prompts of {low} to {high} tokens, and one of {document:,} with the document"


def comparison_table(arms: Sequence[Arm]) -> Table:
    """One row per milestone, with all numbers from its fastest round."""
    rounds = len(arms[0].rounds)
    table = new_table("The same requests on every milestone" + f": the best of {rounds} rounds" * (rounds > 1), gap=1)
    table.add_column("", no_wrap=True)
    heads = ("seconds", "tokens/s", "prompt tokens\ncomputed", "from a\ncache", "mean\nTTFT ms", "largest\nITL ms")
    for head in (*heads, "K/V reserved,\ntokens"):
        table.add_column(head, justify="right")
    for arm in arms:
        best = arm.best
        table.add_row(
            arm.title,
            f"{best.seconds:.2f}",
            f"{best.speed:.0f}",
            f"{best.prompt_tokens_computed:,}",
            f"{best.cached_tokens:,}",
            milliseconds(best.ttft),
            milliseconds(best.max_itl),
            f"{best.kv_reserved:,}",
        )
    return table


def with_defaults(args: argparse.Namespace) -> bool:
    """Whether the workload and the engines are those of the default options, on a CPU."""
    defaults = parse_args([])
    free = ("milestones", "rounds", "watch", "pace")
    same = all(value == getattr(defaults, name) for name, value in vars(args).items() if name not in free)
    return same and not torch.cuda.is_available()


def cautions(arms: Sequence[Arm], defaults: bool) -> list[str]:
    """Warnings about the table's times, if any.

    defaults: see `with_defaults`. Then M4 is the fastest, unless the run was disturbed.
    """
    waited = max(arm.best.waited / arm.best.seconds for arm in arms)
    busy, lines = waited > BUSY, []
    if busy:
        lines.append(
            f"The machine was busy: other programs used the processor for up to {waited:.0%} of a round. Times are "
            "longer than on a quiet machine; compare the counts, such as prompt tokens computed."
        )
    fastest, newest = min(arms, key=lambda arm: arm.best.seconds), newest_of(arm.name for arm in arms)
    if newest == "m4" and fastest.name != newest:
        first = f"{fastest.title} was faster than M4"
        if busy or defaults:
            lines.append(
                f"{first}, so this run was disturbed: ignore its times. Close other programs and run it again, or use "
                "more --rounds. The counts are valid in any case."
            )
        else:
            lines.append(f"{first} with these options. With the default options, on a CPU, M4 is the fastest.")
    return lines


def same_tokens(arms: Sequence[Arm], dtype: str) -> list[str]:
    """Whether every milestone gave the first one's tokens in every run; and the first difference, if not."""
    said = [[tokens_of(run) for run in arm.runs] for arm in arms]
    base = said[0][-1]
    agree = all(ids == base for runs in said for ids in runs)
    count = f"{len(base)} answers of {sum(map(len, base)):,} tokens, compared in {dtype}"
    lines = [f"same tokens at every milestone: {'yes' if agree else 'no'} ({count})"]
    for arm, runs in zip(arms, said, strict=True):
        lines += [f"{arm.name}: not the same tokens in each run"] * any(ids != runs[0] for ids in runs)
    for arm in arms[1:]:
        for output, ids, expected in zip(arm.runs[-1], tokens_of(arm.runs[-1]), base, strict=True):
            if ids != expected:
                same = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), None)
                at = min(len(ids), len(expected)) if same is None else same
                ours, theirs = ids[at : at + 1] or "the end", expected[at : at + 1] or "the end"
                lines.append(
                    f"{arm.name}, request {output.request_id}: token {at} is {ours}, and {theirs} in {arms[0].name}"
                )
    if dtype != "float32":
        lines.append(f"In {dtype}, sums in another order are rounded differently, so tokens may differ.")
    return lines


if __name__ == "__main__":
    main()
