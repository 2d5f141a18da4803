"""M3: K/V in blocks. Requests share one pool, allocate a block when they need one, and are preempted if none is free.

python examples/m3_inference.py                                                # 8 questions, the bundled model
python examples/m3_inference.py --watch                                        # show every block of the pool
python examples/m3_inference.py --watch --num-kv-blocks 24                     # too few: requests are preempted
python examples/m3_inference.py --watch --num-kv-blocks 24 --preemption-mode swap
python examples/m3_inference.py --watch --num-prompts 2 --num-samples 4        # samples share their prompt's blocks
python examples/m3_inference.py --watch --num-prompts 2 --beam-width 4 --max-tokens 32

The answers are those of M1 and M2, whatever the pool's size: blocks change where K/V is stored, never its values. In
float32 (--dtype float32) every token is the same.
"""

from __future__ import annotations

from folovllm.entrypoints.start import prepare

if __name__ == "__main__":  # the imports below take seconds, and Ctrl-C should print one line then as well
    prepare()

import argparse
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import cast

from rich.console import Console
from rich.table import Table

from folovllm import LLM, BeamSearchParams, RequestOutput, SamplingParams
from folovllm.checks import check_float, check_int
from folovllm.course.viz.live import watch, watching
from folovllm.engine.trace import StepTrace
from folovllm.entrypoints.cli import clean_exit, load_llm
from folovllm.entrypoints.tables import new_table, phase_table, request_table, stats_table, step_table
from folovllm.entrypoints.terminal import make_prompts, print_samples, show_ids
from folovllm.math_utils import cdiv
from folovllm.outputs import BeamSearchOutput
from folovllm.runner.paged_runner import PagedRunner

POOL = 1024  # tokens in the pool by default: in blocks of 16, few enough to draw every block


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Values are checked where `LLM` checks them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [options]"
    )
    add = parser.add_argument
    add("--prompts", nargs="+", metavar="TEXT", help="questions; default: some from the glossary")
    add("--num-prompts", type=int, default=8, help="how many glossary questions to ask")
    add("--max-tokens", type=int, default=256, help="most tokens per answer")
    add("--temperature", type=float, help="0: always the likeliest token; default: 0, or 0.8 for several samples")
    add("--seed", type=int, help="makes drawn tokens repeatable")
    add("--num-samples", type=int, default=1, help="answers to each prompt, which share its blocks")
    add("--beam-width", type=int, help="beam search with that many beams, which share blocks")
    add("--watch", action="store_true", help="show every step, and every block, as it happens")
    add("--pace", type=float, default=0.1, help="minimum seconds per step of --watch; 0: full speed")
    add("--block-size", type=int, default=16, help="tokens per block")
    add("--num-kv-blocks", type=int, help=f"blocks in the pool; default: those of {POOL} tokens")
    add(
        "--preemption-mode",
        default="recompute",
        help="recompute or swap: what happens to the K/V of a preempted request",
    )
    add("--swap-space", type=float, default=0.25, help="GiB of host memory for --preemption-mode swap")
    add("--max-num-seqs", type=int, default=16, help="requests that may run at once")
    add("--max-num-batched-tokens", type=int, help="tokens that one step may compute")
    add("--scheduling-policy", default="fcfs", help="fcfs, priority or sjf (shortest job first)")
    add("--attention-backend", default="auto", help="auto, reference, torch or triton")
    add("--model", default="folo-tiny", help="bundled name, local folder or hub id")
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--load-format", default="auto", help="auto, safetensors or dummy (random weights)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Answer the prompts, and print how the blocks were used."""
    args = parse_args(argv)
    console = Console()
    with clean_exit(console):
        check_int("num_prompts", args.num_prompts, 1)
        check_float("pace", args.pace, 0, 60)
        if args.beam_width is not None and (args.num_samples != 1 or args.temperature):
            raise ValueError("beam_width cannot be combined with num_samples or a temperature; allowed: one of them")
        params = BeamSearchParams(args.beam_width, args.max_tokens) if args.beam_width is not None else sampling(args)
        llm = load(console, args)
        if isinstance(params, BeamSearchParams):
            search(console, llm, args, params)
        else:
            answer(console, llm, args, params)
        trace, stats = llm.engine.trace, llm.engine.stats
        console.print(step_table(trace), phase_table(trace), stats_table(stats), pool_table(llm))


def sampling(args: argparse.Namespace) -> SamplingParams:
    """The sampling parameters of the options."""
    temperature = args.temperature
    if temperature is None:
        temperature = 0.8 if args.num_samples > 1 else 0.0
    return SamplingParams(n=args.num_samples, temperature=temperature, seed=args.seed, max_tokens=args.max_tokens)


def load(console: Console, args: argparse.Namespace) -> LLM:
    """The engine that the options describe."""
    same = (
        "dtype",
        "device",
        "load_format",
        "block_size",
        "num_kv_blocks",
        "preemption_mode",
        "swap_space",
        "max_num_seqs",
        "max_num_batched_tokens",
        "scheduling_policy",
        "attention_backend",
    )
    options = {name: getattr(args, name) for name in same}
    if args.num_kv_blocks is None:
        check_int("block_size", args.block_size, 1, 256)
        options["num_kv_blocks"] = POOL // args.block_size
    return load_llm(console, args.model, milestone="m3", **options)


def answer(console: Console, llm: LLM, args: argparse.Namespace, params: SamplingParams) -> None:
    """Answer all prompts at once."""
    titles, prompts = make_prompts(llm, args.prompts, args.num_prompts, raw=False)
    outputs: list[RequestOutput]
    if args.watch:
        ids = llm.enqueue(prompts, params)
        outputs = watch(console, llm.engine, ids, dict(zip(ids, titles, strict=True)), args.pace)
    else:
        outputs = llm.generate(prompts, params)
    for title, output in zip(titles, outputs, strict=True):
        print_samples(console, title, output, show_ids(llm))
    console.print(request_table(outputs))


def search(console: Console, llm: LLM, args: argparse.Namespace, params: BeamSearchParams) -> None:
    """A beam search for each prompt."""
    titles, prompts = make_prompts(llm, args.prompts, args.num_prompts, raw=False)
    if args.watch:
        with watching(console, llm.engine, pace=args.pace):
            outputs = llm.beam_search(prompts, params)
    else:
        outputs = llm.beam_search(prompts, params, use_tqdm=True)
    for title, prompt, output in zip(titles, prompts, outputs, strict=True):
        prompt_len = len(llm.engine.prepare("length", prompt).user.prompt_token_ids)
        print_beams(console, llm, title, prompt_len, output)


def print_beams(console: Console, llm: LLM, title: str, prompt_len: int, output: BeamSearchOutput) -> None:
    """A prompt and its beams, best first, each with the score that ranks it."""
    console.print("> " + title, style="bold cyan", markup=False, highlight=False)
    for beam in output.sequences:
        ids = beam.tokens[prompt_len:]
        tokenizer = llm.engine.tokenizer
        text = str(ids) if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=True)
        console.print(f"[{beam.score:.3f}] {text}", markup=False, highlight=False)
    console.print(f"Sharing blocks saved up to {output.kv_saved:.0%} of the beams' K/V.\n", highlight=False)


# ---------------------------------------------------------------------- the pool


def pool_table(llm: LLM) -> Table:
    """How the pool's memory was used, from the trace of every step."""
    engine = llm.engine
    steps = [step for step in engine.trace if step.kv.reserved]
    size, num_blocks = engine.config.cache.block_size, engine.trace[-1].kv.capacity // engine.config.cache.block_size
    most = max((step.kv.reserved for step in steps), default=0) // size
    table = new_table("Pool", head=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    rows = [
        ("size", f"{num_blocks:,} blocks of {size} tokens"),
        ("memory", f"{storage_bytes(llm) / 2**20:.1f} MiB"),
        ("most blocks held at once", f"{most:,}"),
        ("empty slots in held blocks, mean over steps", f"{mean_empty(steps):.1%}"),
        ("K/V saved by sharing, at most", f"{max((s.kv.sharing_saves for s in steps), default=0.0):.1%}"),
        ("K/V recomputed", f"{computed_again(engine.trace):,} tokens"),
        ("blocks that M1 or M2 would reserve per request", f"{region_blocks(llm):,}"),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def storage_bytes(llm: LLM) -> int:
    """Bytes of the pool on the device, including its null block."""
    return cast(PagedRunner, llm.engine.core.runner).storage.num_bytes


def mean_empty(steps: Sequence[StepTrace]) -> float:
    """The share of held slots without K/V: the waste of blocks."""
    return fmean(1 - step.kv.used / step.kv.reserved for step in steps) if steps else 0.0


def region_blocks(llm: LLM) -> int:
    """The model's maximum length in blocks: M1 and M2 reserve that much for each running request."""
    return cdiv(llm.engine.max_model_len, llm.engine.config.cache.block_size)


def computed_again(trace: Iterable[StepTrace]) -> int:
    """Tokens whose K/V was dropped when their request was preempted, and recomputed."""
    computed: dict[str, int] = {}  # request id -> the most tokens computed so far
    again = 0
    for step in trace:
        for share in step.requests:
            start = share.num_computed - share.num_scheduled
            again += max(0, min(share.num_computed, computed.get(share.request_id, 0)) - start)
            computed[share.request_id] = max(share.num_computed, computed.get(share.request_id, 0))
    return again


if __name__ == "__main__":
    main()
