"""M4: prompts in chunks beside the decodes, and no prefix computed twice. Then the same on M1, M2, M3 and M4.

python examples/m4_inference.py                  # a table of M1 to M4, and whether they agree
python examples/m4_inference.py --watch          # before it, see the newest one's chunks and cache hits as they happen
python examples/m4_inference.py --milestones m4 --watch --num-kv-blocks 212    # a small pool: blocks are evicted
python examples/m4_inference.py --milestones m4 --watch --max-num-batched-tokens 64
python examples/m4_inference.py --model Qwen/Qwen3-0.6B --max-tokens 32

All questions have the same system prompt. Some of them are there at the start. While they are being answered, more of
them come, and among them one with a system prompt that goes on for pages: a long document.

    M1  computes every prompt from its first token on, and runs one request at a time.
    M2  runs all at once. While it computes the document, the others wait, and prompts are padded to its length.
    M3  does the same without padding, in blocks of K/V.
    M4  computes the document in chunks beside the decodes, and the shared system prompt once.

Their answers are the same, which is checked token by token, in float32 unless --dtype says otherwise. The milestones
take turns, round by round, and the table has the fastest round of each. If other programs need the processor meanwhile,
a line below the table says so.
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":  # the imports below take seconds, in which Ctrl-C should be one line as well

    def interrupted(*_: object) -> None:
        """What `clean_exit` does from then on."""
        print("\ninterrupted")
        sys.exit(130)

    signal.signal(signal.SIGINT, interrupted)

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
BUSY = 0.1  # a round is disturbed if it had to wait for a processor for more of its time than this


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Values are checked where `LLM` checks them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [options]"
    )
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--milestones", nargs="+", default=list(MILESTONES), metavar="M", help="which ones to compare; default: all")
    add("--num-prompts", type=int, default=11, help="how many short questions to ask beside the document")
    add("--late", type=int, default=4, help="how many of them come with the document")
    add("--late-after", type=int, default=64, help="they come when this many tokens have been generated")
    add("--system-paragraphs", type=int, default=12, help="length of the shared system prompt")
    add("--document-paragraphs", type=int, default=32, help="length of the document, the system prompt included")
    add("--max-tokens", type=int, default=256, help="most tokens per answer")
    add("--rounds", type=int, default=3, help="how often to measure each milestone; the table has the fastest round")
    add("--watch", action="store_true", help="first of all, see every step of the newest milestone")
    add("--pace", type=float, default=0.05, help="seconds that --watch shows a step at least; 0: full speed")
    add("--max-num-seqs", type=int, default=16, help="requests that may run at once, from M2 on")
    add("--max-num-batched-tokens", type=int, default=256, help="tokens that one step of M4 may compute")
    add("--long-prefill-token-threshold", type=int, default=0, help="tokens of one prompt in a step of M4; 0: any")
    add("--enable-chunked-prefill", action=flag, default=True, help="M4: prompts in chunks")
    add("--enable-prefix-caching", action=flag, default=True, help="M4: take over K/V of the same beginnings")
    add("--block-size", type=int, default=16, help="tokens per block, from M3 on")
    add("--num-kv-blocks", type=int, default=896, help="blocks in the pool, from M3 on")
    add("--max-model-len", type=int, default=4096, help="tokens of prompt and answer together")
    add("--model", default="folo-tiny", help="bundled name, local folder or hub id")
    add("--dtype", default="float32", help="auto, float32, bfloat16 or float16")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--load-format", default="auto", help="auto, safetensors or dummy (random weights)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Serve the same requests on every milestone, and compare what came of it."""
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
        configs = {  # before any weight is read: what cannot work is refused
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
    """The engine of a milestone. M1 and M2 share a Hugging Face model, and it is loaded once."""
    runners = [arm.engine.core.runner for arm in arms]
    model = next((runner.model for runner in runners if isinstance(runner, HFRunner)), None)
    return LLMEngine(engine_config=config, parts=build_engine(config, model))


def newest_of(names: Iterable[str]) -> str:
    """The newest of some milestones."""
    return max(names, key=list(MILESTONES).index)


def options(args: argparse.Namespace, milestone: str) -> dict[str, Any]:
    """What `LLM` is told for a milestone. Each gets what it knows."""
    shared = ("dtype", "device", "load_format", "max_model_len")
    names = [*shared, *(["max_num_seqs"] if milestone != "m1" else [])]
    if MILESTONES[milestone].paged:
        names += ["block_size", "num_kv_blocks"]
    if MILESTONES[milestone].chunked_prefill:
        names += ["enable_chunked_prefill", "enable_prefix_caching"]
        if args.enable_chunked_prefill:  # else a step must have room for the document
            names += ["max_num_batched_tokens", "long_prefill_token_threshold"]
    return {name: getattr(args, name) for name in names}


# ---------------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class Ask:
    """A request. late: it comes while others are being answered."""

    request_id: str
    title: str
    prompt: Prompt
    late: bool


def make_asks(llm: LLM, args: argparse.Namespace) -> list[Ask]:
    """Short questions under the shared system prompt, and one under the document, in the middle of the late ones."""
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
    """Token ids with the same structure: all prompts begin alike, and the last one is long."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        ids: list[int] = torch.randint(vocab_size, (length,), generator=generator).tolist()  # [length]
        return ids

    shared = draw(SHARED_IDS)
    lengths = [OWN_IDS] * count + [DOCUMENT_IDS]
    prompts: list[Prompt] = [shared + draw(length) for length in lengths]
    return [f"{SHARED_IDS} shared and {length} own random token ids" for length in lengths], prompts


# ---------------------------------------------------------------------- serving it


@dataclass(frozen=True)
class Round:
    """All requests once. Times in seconds; kv_reserved: the most tokens of K/V set aside after any step.

    waited: how long the engine had work to do and no processor to do it on, because other programs had them.
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
    """A milestone: the rounds that were measured, and the outputs of every run, a watched one included."""

    name: str
    engine: LLMEngine
    rounds: list[Round] = field(default_factory=list)
    runs: list[list[RequestOutput]] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Its name as it is shown."""
        return self.name.upper()

    @property
    def best(self) -> Round:
        """The fastest round: the one that other programs disturbed least."""
        return min(self.rounds, key=lambda r: r.seconds)


def serve(
    engine: LLMEngine,
    asks: Sequence[Ask],
    params: SamplingParams,
    late_after: int,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[RequestOutput]:
    """Run all requests to completion; their outputs in order. on_done: is told how many are complete.

    The late ones come when `late_after` tokens have been generated, or when nothing else is left to do.
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
    """Serve the requests in view."""
    engine = arm.engine
    fresh(engine)
    with watching(console, engine, {ask.request_id: ask.title for ask in asks}, args.pace):
        arm.runs.append(serve(engine, asks, params, args.late_after))
    console.print(request_table(arm.runs[-1]), step_table(engine.trace), stats_table(engine.stats))


def measure_all(
    console: Console, args: argparse.Namespace, arms: Sequence[Arm], asks: Sequence[Ask], params: SamplingParams
) -> None:
    """Warm all engines up, and let them take turns: each is measured once in every round.

    So what slows the machine down for a while slows all of them, and each gets `rounds` chances to be undisturbed.
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
    """Say how many requests of the running round are complete."""
    status.update(f"{head}: {count} of {total} answered ...")


def measure(
    arm: Arm, asks: Sequence[Ask], params: SamplingParams, late_after: int, on_done: Callable[[int], None]
) -> None:
    """Serve the requests once more, and add to the arm what it took and what came out.

    This thread has work all the time (while a GPU computes, it polls), so whenever it does not run, another program has
    the processor.
    """
    fresh(arm.engine)
    on_done(0)
    start, ran = time.perf_counter(), time.thread_time()
    outputs = serve(arm.engine, asks, params, late_after, on_done)
    seconds, ran = time.perf_counter() - start, time.thread_time() - ran
    arm.rounds.append(make_round(arm.engine, outputs, seconds, max(0.0, seconds - ran)))
    arm.runs.append(outputs)


def fresh(engine: LLMEngine) -> None:
    """Nothing is cached, counted or recorded."""
    engine.core.scheduler.kv.reset_prefix_cache()
    engine.stats.reset()
    engine.trace.clear()


def make_round(engine: LLMEngine, outputs: Sequence[RequestOutput], seconds: float, waited: float) -> Round:
    """What a run took."""
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


# ---------------------------------------------------------------------- what came of it


def report(console: Console, args: argparse.Namespace, arms: Sequence[Arm], asks: Sequence[Ask], as_ids: bool) -> None:
    """The answers, the table, whether its times can be trusted, and whether the milestones agree.

    as_ids: there is no text, only token ids.
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
    """What was asked, in numbers."""
    lengths = {output.request_id: len(output.prompt_token_ids) for output in outputs}
    document = lengths.pop(DOCUMENT)
    low, high = min(lengths.values()), max(lengths.values())
    return f"{len(lengths)} short prompts of {low} to {high} tokens, and one of {document:,} with the document"


def comparison_table(arms: Sequence[Arm]) -> Table:
    """One row per milestone: its fastest round, from which all numbers of the row are."""
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
    """What a reader must know before believing the table's times; nothing if they are as they should be.

    defaults: see `with_defaults`. Then M4 is the fastest, unless something disturbed it.
    """
    waited = max(arm.best.waited / arm.best.seconds for arm in arms)
    busy, lines = waited > BUSY, []
    if busy:
        lines.append(
            f"The machine was busy: other programs had the processor for up to {waited:.0%} of a round. Times are "
            "longer than on a quiet machine; compare the counts, such as prompt tokens computed."
        )
    fastest, newest = min(arms, key=lambda arm: arm.best.seconds), newest_of(arm.name for arm in arms)
    if newest == "m4" and fastest.name != newest:
        first = f"{fastest.title} was faster than M4"
        if busy or defaults:
            lines.append(
                f"{first}, so this run was disturbed: do not read its times. Close other programs and run it again, or "
                "with more --rounds. The counts are right in any case."
            )
        else:
            lines.append(f"{first} with these options. With the default options, on a CPU, M4 is the fastest.")
    return lines


def same_tokens(arms: Sequence[Arm], dtype: str) -> list[str]:
    """Whether every milestone said what the first one said, in every run; and where they part, if not."""
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
        lines.append(f"In {dtype}, sums in another order round to other numbers, so tokens may differ.")
    return lines


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
