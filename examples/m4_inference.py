"""M4: prompts in chunks beside the decodes, and no prefix computed twice. Then the same on M1, M2, M3 and M4.

python examples/m4_inference.py                  # a table of M1 to M4, and whether they agree
python examples/m4_inference.py --watch          # before it, see chunks and cache hits as they happen
python examples/m4_inference.py --milestones m4 --watch --num-kv-blocks 212    # a small pool: blocks are evicted
python examples/m4_inference.py --milestones m4 --watch --max-num-batched-tokens 64
python examples/m4_inference.py --model Qwen/Qwen3-0.6B --max-tokens 32

Everybody asks under the same system prompt. Some questions are there at the start. While they are being answered, more
of them come, and among them one under a system prompt that goes on for pages: a long document.

    M1  reads every prompt from its first token on, and answers one request at a time.
    M2  answers all at once. While it reads the document, everybody waits, and prompts are padded to its length.
    M3  does the same without padding, in blocks of K/V.
    M4  reads the document in chunks beside the answers, and the shared system prompt once.

What they say is the same, and is compared: token by token, in float32 unless --dtype says otherwise.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from folovllm import LLM, EngineConfig, LLMEngine, RequestOutput, SamplingParams
from folovllm.config import MILESTONES, check_choice, check_float, check_int
from folovllm.engine.prompts import Prompt
from folovllm.entrypoints.cli import clean_exit, load_llm
from folovllm.entrypoints.terminal import print_samples, show_ids
from folovllm.glossary import default_prompts, load_prose
from folovllm.viz.live import watching
from folovllm.viz.tables import milliseconds, new_table, request_table, stats_table, step_table

DOCUMENT = "document"  # the id of the request with the long prompt
SHARED_IDS, OWN_IDS, DOCUMENT_IDS = 416, 16, 2176  # tokens of random prompts, for a model without a tokenizer


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
    add("--system-paragraphs", type=int, default=5, help="length of the shared system prompt")
    add("--document-paragraphs", type=int, default=32, help="length of the document, the system prompt included")
    add("--max-tokens", type=int, default=256, help="most tokens per answer")
    add("--rounds", type=int, default=1, help="how often to measure each milestone; the table has medians")
    add("--watch", action="store_true", help="see every step of the last milestone before it is measured")
    add("--pace", type=float, default=0.05, help="seconds that --watch shows a step at least; 0: full speed")
    add("--max-num-seqs", type=int, default=16, help="requests that may run at once, from M2 on")
    add("--max-num-batched-tokens", type=int, default=256, help="tokens that one step of M4 may compute")
    add("--long-prefill-token-threshold", type=int, default=0, help="tokens of one prompt in a step of M4; 0: any")
    add("--enable-chunked-prefill", action=flag, default=True, help="M4: prompts in chunks")
    add("--enable-prefix-caching", action=flag, default=True, help="M4: take over K/V of the same beginnings")
    add("--block-size", type=int, default=16, help="tokens per block, from M3 on")
    add("--num-kv-blocks", type=int, default=512, help="blocks in the pool, from M3 on")
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
        for name in args.milestones:  # before any weight is read: what cannot work is refused
            EngineConfig.from_kwargs(model=args.model, milestone=name, **options(args, name))
        arms: list[Arm] = []
        for name in args.milestones:
            arms.append(measure(console, args, name, params, watched=args.watch and name == args.milestones[-1]))
        report(console, args, arms)


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
    """All requests once. Times in seconds; kv_reserved: the most tokens of K/V set aside after any step."""

    seconds: float
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


@dataclass(frozen=True)
class Arm:
    """A milestone, what it did in each round, and what it said, in the order of asking.

    agrees: whether it said the same in every round, and when it was watched. as_ids: there is no text, only token ids.
    """

    name: str
    rounds: list[Round]
    asks: list[Ask]
    outputs: list[RequestOutput]
    agrees: bool
    as_ids: bool = False

    def median(self, quantity: str) -> float:
        """The median of a quantity over the rounds."""
        return median(getattr(r, quantity) for r in self.rounds)


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


def measure(console: Console, args: argparse.Namespace, name: str, params: SamplingParams, watched: bool) -> Arm:
    """Load a milestone, warm it up, and serve the requests `rounds` times; before that once in view, if asked for."""
    llm = load_llm(console, args.model, milestone=name, **options(args, name))
    engine, asks = llm.engine, make_asks(llm, args)
    said: list[list[list[int]]] = []
    if watched:
        fresh(llm)
        titles = {ask.request_id: ask.title for ask in asks}
        with watching(console, engine, titles, args.pace):
            outputs = serve(engine, asks, params, args.late_after)
        said.append(tokens_of(outputs))
        console.print(request_table(outputs), step_table(engine.trace), stats_table(engine.stats))
    rounds: list[Round] = []
    status = console.status(f"{name}: warming up ...") if console.is_terminal else None
    with status or nullcontext():
        warm_up = SamplingParams(temperature=0, max_tokens=min(4, args.max_tokens))
        serve(engine, asks[:2], warm_up, 0)
        for number in range(args.rounds):

            def show(count: int, number: int = number) -> None:
                if status is not None:
                    status.update(f"{name}, round {number + 1} of {args.rounds}: {count} of {len(asks)} answered ...")

            show(0)
            fresh(llm)
            start = time.perf_counter()
            outputs = serve(engine, asks, params, args.late_after, show)
            rounds.append(make_round(engine, outputs, time.perf_counter() - start))
            said.append(tokens_of(outputs))
    line = f"{name}: {len(asks)} requests, {rounds[-1].tokens} tokens in {rounds[-1].seconds:.1f} s"
    console.print(line, highlight=False)
    return Arm(name, rounds, asks, outputs, all(tokens == said[0] for tokens in said), show_ids(llm))


def fresh(llm: LLM) -> None:
    """Nothing is cached, counted or recorded."""
    llm.reset_prefix_cache()
    llm.engine.stats.reset()
    llm.engine.trace.clear()


def make_round(engine: LLMEngine, outputs: Sequence[RequestOutput], seconds: float) -> Round:
    """What a run took."""
    return Round(
        seconds,
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


def report(console: Console, args: argparse.Namespace, arms: Sequence[Arm]) -> None:
    """The answers, the table, and whether the milestones agree."""
    newest = arms[-1]
    console.print()
    for ask, output in zip(newest.asks, newest.outputs, strict=True):
        print_samples(console, ask.title, output, newest.as_ids)
    console.print(workload_line(newest), highlight=False)
    console.print(comparison_table(arms))
    for line in same_tokens(arms, args.dtype):
        console.print(line, markup=False, highlight=False)


def workload_line(arm: Arm) -> str:
    """What was asked, in numbers."""
    lengths = {ask.request_id: len(output.prompt_token_ids) for ask, output in zip(arm.asks, arm.outputs, strict=True)}
    document = lengths.pop(DOCUMENT)
    low, high = min(lengths.values()), max(lengths.values())
    return f"{len(lengths)} short prompts of {low} to {high} tokens, and one of {document:,} with the document"


def comparison_table(arms: Sequence[Arm]) -> Table:
    """One row per milestone: medians over the rounds."""
    rounds = len(arms[0].rounds)
    table = new_table("The same requests on every milestone" + (f": medians of {rounds} rounds" * (rounds > 1)), gap=1)
    table.add_column("", no_wrap=True)
    heads = ("seconds", "tokens/s", "prompt tokens\ncomputed", "from a\ncache", "mean\nTTFT ms", "largest\nITL ms")
    for head in (*heads, "K/V reserved,\ntokens"):
        table.add_column(head, justify="right")
    for arm in arms:
        table.add_row(
            arm.name.upper(),
            f"{arm.median('seconds'):.2f}",
            f"{arm.median('speed'):.0f}",
            f"{arm.median('prompt_tokens_computed'):,.0f}",
            f"{arm.median('cached_tokens'):,.0f}",
            milliseconds(arm.median("ttft")),
            milliseconds(arm.median("max_itl")),
            f"{arm.median('kv_reserved'):,.0f}",
        )
    return table


def same_tokens(arms: Sequence[Arm], dtype: str) -> list[str]:
    """Whether every milestone said what the first one said, in each round; and where they part, if not."""
    base = tokens_of(arms[0].outputs)
    agree = all(arm.agrees and tokens_of(arm.outputs) == base for arm in arms)
    count = f"{len(base)} answers of {sum(map(len, base)):,} tokens, compared in {dtype}"
    lines = [f"same tokens at every milestone: {'yes' if agree else 'no'} ({count})"]
    lines += [f"{arm.name}: not the same tokens in each run" for arm in arms if not arm.agrees]
    for arm in arms[1:]:
        for ask, ids, expected in zip(arm.asks, tokens_of(arm.outputs), base, strict=True):
            if ids != expected:
                same = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), None)
                at = min(len(ids), len(expected)) if same is None else same
                ours, theirs = ids[at : at + 1] or "the end", expected[at : at + 1] or "the end"
                lines.append(
                    f"{arm.name}, request {ask.request_id}: token {at} is {ours}, and {theirs} in {arms[0].name}"
                )
    if dtype != "float32":
        lines.append(f"In {dtype}, sums in another order round to other numbers, so tokens may differ.")
    return lines


if __name__ == "__main__":
    main()
