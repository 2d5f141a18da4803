"""The `folovllm` command. Options with the name of an argument of `LLM` have the same meaning."""

from __future__ import annotations

import platform
import shlex
import sys
from contextlib import nullcontext
from dataclasses import fields
from typing import Annotated, Any, cast

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from folovllm.checks import check_float, check_int
from folovllm.config import (
    MILESTONES,
    NEWEST_MILESTONE,
    CacheConfig,
    EngineConfig,
    ModelConfig,
    SchedulerConfig,
)
from folovllm.engine.factory import step_threads
from folovllm.engine.recording import recording
from folovllm.entrypoints.llm import LLM, Message
from folovllm.entrypoints.model_info import check_decoder, number, shape_rows, text_config
from folovllm.entrypoints.options import (
    Batching,
    BlockSize,
    ChunkedPrefill,
    Device,
    Dtype,
    Generation,
    LoadFormat,
    LongPrefill,
    MaxModelLen,
    MaxNumBatchedTokens,
    MaxNumSeqs,
    MaxTokens,
    MilestoneName,
    MinP,
    Model,
    NumKVBlocks,
    Policy,
    Preemption,
    PrefixCaching,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    TracePath,
)
from folovllm.entrypoints.tables import phase_table, request_table, stats_table, step_table
from folovllm.entrypoints.terminal import (
    by_name,
    check_writable,
    clean_exit,
    is_installed,
    make_prompts,
    print_samples,
    print_stream,
    show_ids,
)
from folovllm.models.loader import BUNDLED, load_config, load_tokenizer, resolve_device, resolve_dtype, resolve_model
from folovllm.sampling_params import SamplingParams

# Commands of the course, by name: imported on use.
COURSE_COMMANDS = {
    "replay": "folovllm.course.replay.command:replay",
    "bench": "folovllm.course.bench.cli:bench",
    "grade": "folovllm.course.grading.command:grade",
    "museum": "folovllm.course.grading.museum_command:museum",
}
WATCH = "folovllm.course.viz.live:watch"


class Commands(TyperGroup):
    """The engine's commands, then those of the course if it is installed."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *(name for name, place in COURSE_COMMANDS.items() if is_installed(place))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        place = COURSE_COMMANDS.get(cmd_name)
        if place is None or not is_installed(place):
            return super().get_command(ctx, cmd_name)
        found = by_name(place)
        if not isinstance(found, typer.Typer):
            group = typer.Typer(add_completion=False, rich_markup_mode="markdown")
            group.command(cmd_name)(found)
            found = group
        command = typer.main.get_command(found)
        command.name = cmd_name
        return command


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help=(
        "An LLM inference engine that teaches how it works.\n\n"
        "Start with `folovllm generate`: it answers questions with a bundled model. "
        "Then add `--trace trace.json`: `folovllm replay trace.json` makes a page from it that shows every step."
    ),
)


def load_llm(console: Console, model: str, **options: Any) -> LLM:
    """Load a model with a spinner."""
    with console.status(f"Loading {model} ..."):
        return LLM(model, **options)


def llm_and_params(console: Console, options: dict[str, Any]) -> tuple[LLM, SamplingParams]:
    """From a command's options: those named as a field of `SamplingParams`, and those named as an argument of `LLM`."""
    sampling = {f.name for f in fields(cast(Any, SamplingParams))}
    configs: tuple[Any, ...] = (ModelConfig, CacheConfig, SchedulerConfig, EngineConfig)
    engine = {f.name for kind in configs for f in fields(kind)} - sampling
    params = SamplingParams(**{name: value for name, value in options.items() if name in sampling})
    return load_llm(console, **{name: value for name, value in options.items() if name in engine}), params


@app.command()
def generate(
    ctx: typer.Context,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Questions or texts. None: some from the glossary.")
    ] = None,
    model: Model = "folo-tiny",
    milestone: MilestoneName = NEWEST_MILESTONE,
    dtype: Dtype = "auto",
    device: Device = "auto",
    load_format: LoadFormat = "auto",
    generation_config: Generation = "auto",
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    batching: Batching = None,
    scheduling_policy: Policy = "fcfs",
    block_size: BlockSize = 16,
    num_kv_blocks: NumKVBlocks = None,
    preemption_mode: Preemption = "recompute",
    enable_chunked_prefill: ChunkedPrefill = None,
    long_prefill_token_threshold: LongPrefill = 0,
    enable_prefix_caching: PrefixCaching = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    stop: Stop = None,
    n: Annotated[int, typer.Option("--n", "-n", help="Samples per prompt; more than 1 needs a temperature.")] = 1,
    num_prompts: Annotated[int, typer.Option(help="How many glossary questions to ask when no prompt is given.")] = 3,
    raw: Annotated[bool, typer.Option("--raw", help="Complete the text as it is, without the chat template.")] = False,
    stream: Annotated[bool, typer.Option(help="Show answers as they grow, or at the end.")] = True,
    watch_steps: Annotated[
        bool,
        typer.Option(
            "--watch",
            help="Show every step as it happens: queue, running requests, blocks. Answers follow.",
        ),
    ] = False,
    pace: Annotated[float, typer.Option(help="Least seconds per step with --watch; 0 is full speed.")] = 0.1,
    trace: TracePath = None,
) -> None:
    """Answer prompts, and show latencies and steps.

    Try: `folovllm generate "What is a KV cache?"`, then the same with `--temperature 0.8 --seed 1 -n 3 --no-stream`.
    To see requests queue, join and leave: `folovllm generate --num-prompts 12 --max-num-seqs 4 --watch`.
    To see preemption: `folovllm generate --num-prompts 12 --num-kv-blocks 32 --watch`.
    To see prompts computed in chunks: `folovllm generate --num-prompts 6 --max-num-batched-tokens 16 --watch`.
    """
    console = Console()
    with clean_exit(console):
        if trace is not None:
            check_writable("trace", trace)
        check_int("num_prompts", num_prompts, 1)
        check_float("pace", pace, 0, 60)
        llm, params = llm_and_params(console, ctx.params)
        titles, inputs = make_prompts(llm, prompts, num_prompts, raw)
        stream = stream and n == 1 and not watch_steps
        with nullcontext() if trace is None else recording(llm.engine) as recorder:
            if stream or watch_steps:
                ids = llm.enqueue(inputs, params)
                by_id = dict(zip(ids, titles, strict=True))
                if stream:
                    outputs = print_stream(console, llm.follow(ids), by_id, show_ids(llm))
                else:
                    outputs = by_name(WATCH)(console, llm.engine, ids, by_id, pace)
            else:
                outputs = llm.generate(inputs, params)
        if not stream:
            for title, output in zip(titles, outputs, strict=True):
                print_samples(console, title, output, show_ids(llm))
        steps, stats = llm.engine.trace, llm.engine.stats
        console.print(request_table(outputs), step_table(steps), phase_table(steps), stats_table(stats))
        if trace is not None and recorder is not None:
            try:
                recorder.save(trace)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(trace)) from None  # a full disk has no file name
            console.print(f"Trace of {len(steps)} steps: {trace}", markup=False, highlight=False, soft_wrap=True)
            console.print(
                f"To see them: folovllm replay {shlex.quote(str(trace))}", markup=False, highlight=False, soft_wrap=True
            )


@app.command()
def chat(
    ctx: typer.Context,
    model: Model = "folo-tiny",
    milestone: MilestoneName = NEWEST_MILESTONE,
    dtype: Dtype = "auto",
    device: Device = "auto",
    generation_config: Generation = "auto",
    max_model_len: MaxModelLen = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    system: Annotated[str | None, typer.Option(help="A system prompt for all answers.")] = None,
) -> None:
    """Talk to a model. Each answer sees the whole conversation; `/reset` clears it, `/quit` or Ctrl-D ends it."""
    console = Console()
    with clean_exit(console):
        llm, params = llm_and_params(console, ctx.params)
        opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        llm.chat_prompts([[*opening, {"role": "user", "content": "?"}]])  # raises now if there is no chat template
        console.print(
            f"[bold]{model}[/] with milestone {milestone}. /reset clears it, /quit ends it.",
            highlight=False,
        )
        messages = list(opening)
        while (line := read_line(console)) is not None:
            if line == "/quit":
                break
            if line == "/reset":
                messages = list(opening)
            elif line:
                asked: list[Message] = [*messages, {"role": "user", "content": line}]
                try:
                    messages = [*asked, {"role": "assistant", "content": answer(console, llm, asked, params)}]
                except ValueError as error:  # such as a conversation longer than max_model_len
                    console.print(f"{error}. /reset starts again.", markup=False, highlight=False)


def read_line(console: Console) -> str | None:
    """A line of input; None at the end of input, or without any."""
    if sys.stdin is None:
        return None
    try:
        return console.input("[bold cyan]> [/]").strip()
    except EOFError:
        console.print()
        return None


def answer(console: Console, llm: LLM, messages: list[Message], params: SamplingParams) -> str:
    """Stream the next assistant turn. Ctrl-C ends the answer, not the conversation."""
    text = ""
    stream = llm.stream(llm.chat_prompts(messages), params)
    try:
        for output in stream:
            grown = output.outputs[0].text
            console.out(grown[len(text) :], end="", highlight=False)
            text = grown
    except KeyboardInterrupt:
        console.out(" ...", end="", highlight=False)
    finally:
        stream.close()
    console.print()
    return text


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="A bundled name, a local folder, or a hub id.")] = "folo-tiny",
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Show a model's shape and the size of its KV cache, from its config; no weights are loaded."""
    console = Console()
    with clean_exit(console):
        source = resolve_model(model)
        config = load_config(source)
        check_decoder(config)
        text = text_config(config)
        where = resolve_device(device)
        kind = resolve_dtype(dtype, config if config.dtype is not None else text, where)
        threads, reason = None, "torch's default"
        if number(text, "hidden_size") is not None:
            threads, reason = step_threads(EngineConfig(), text, where)
        tokenizer = load_tokenizer(source)
        rows = {
            "model": f"{source.name} ({source.kind})",
            **shape_rows(config, kind),
            "tokenizer": "none (token ids in, token ids out)" if tokenizer is None else type(tokenizer).__name__,
            "CPU threads of a step": f"{threads or torch.get_num_threads()} ({reason})",
            "would run in": f"{str(kind).removeprefix('torch.')} on {where}",
            "torch, transformers": f"{torch.__version__}, {transformers.__version__}",
            "Python": platform.python_version(),
        }
        table = Table(show_header=False)
        for name, value in rows.items():
            table.add_row(name, Text(value))
        console.print(table)
        console.print(f"Bundled models: {', '.join(BUNDLED)}", highlight=False)
        for milestone in MILESTONES.values():
            console.print(f"Milestone {milestone.name}: {milestone.adds}", highlight=False)
