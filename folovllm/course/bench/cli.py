"""`folovllm bench`: the source of every speed that the course quotes."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PretrainedConfig

from folovllm.checks import check_int
from folovllm.config import BATCHINGS, MILESTONES
from folovllm.course.bench import machine
from folovllm.course.bench.one_run import Job
from folovllm.course.bench.report import add_roofline, build_report, save_report
from folovllm.course.bench.rounds import provenance
from folovllm.course.bench.runner import Measurements, Plan, Step, execute_in_process, run_rounds
from folovllm.course.bench.systems import (
    BATCHED_PEERS,
    PEERS,
    choose_base,
    parse_milestones,
    parse_peers,
    with_max_num_seqs,
)
from folovllm.course.bench.tables import TABLE_WIDTH, count, number, tables
from folovllm.course.bench.workloads import WORKLOADS, BenchRequest, draw, get_workload, longest
from folovllm.entrypoints.terminal import check_writable, clean_exit
from folovllm.models.loader import load_config, resolve_device, resolve_dtype, resolve_model


@dataclass(frozen=True)
class Options:
    """The command's options, as typed."""

    model: str = "folo-tiny"
    milestones: str = "all"
    peers: str = "sequential,static"
    workloads: str = "w1,w2"
    rounds: int = 3
    base: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    load_format: str = "auto"
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    seed: int = 0
    scale: float = 1.0
    arrival_rate: float | None = None
    out: Path | None = None


@dataclass(frozen=True)
class Bench:
    """A checked bench: the plan, the base of the ratios, and the report's settings."""

    plan: Plan
    base: str
    config: PretrainedConfig
    dtype: torch.dtype
    requests: dict[str, list[BenchRequest]]
    header: dict[str, Any]
    out: Path


def bench(
    model: Annotated[str, typer.Option(help="A bundled name, a local folder, or a hub id.")] = Options.model,
    milestones: Annotated[
        str,
        typer.Option(
            help=f"Comma-separated: {', '.join(MILESTONES)}, or all. A variant follows a colon "
            f"({', '.join(BATCHINGS)}, where a milestone has them), max_num_seqs an @: "
            "m2:padded@1,m2:padded@4 measures two batch sizes side by side, m4:budget=256,m4:budget=4096 two token "
            "budgets."
        ),
    ] = Options.milestones,
    peers: Annotated[
        str,
        typer.Option(
            help=f"Hugging Face systems to compare with, comma-separated: {', '.join(PEERS)}, all (of these), or ''. "
            + "; ".join(f"{name}: {about}" for name, about in BATCHED_PEERS.items())
            + ", for example static:4,dynamic:4:0.25."
        ),
    ] = Options.peers,
    workloads: Annotated[
        str,
        typer.Option(help="Comma-separated. " + "; ".join(f"{w.name}: {w.about}" for w in WORKLOADS.values()) + "."),
    ] = Options.workloads,
    rounds: Annotated[int, typer.Option(help="How often every system runs.")] = Options.rounds,
    base: Annotated[
        str | None, typer.Option(help="The base of all ratios. None: the first peer, else the first system.")
    ] = Options.base,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = Options.dtype,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = Options.device,
    load_format: Annotated[
        str, typer.Option(help="auto, safetensors, or dummy: random weights from config.json alone.")
    ] = Options.load_format,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(help="max_num_seqs of milestones without an @. None: as many as a workload has. m1: always 1."),
    ] = Options.max_num_seqs,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Token budget of a step, for milestones with chunked prefill.")
    ] = Options.max_num_batched_tokens,
    seed: Annotated[int, typer.Option(help="Seed of the workloads' lengths and tokens.")] = Options.seed,
    scale: Annotated[
        float, typer.Option(help="Multiplies every length, for a quick run. Do not compare results of two scales.")
    ] = Options.scale,
    arrival_rate: Annotated[
        float | None,
        typer.Option(help="Requests per second of a Poisson process. None: all arrive at the start."),
    ] = Options.arrival_rate,
    out: Annotated[
        Path | None,
        typer.Option(help="Path of the JSON, with a plot beside it. None: results/bench-MODEL-DTYPE-DEVICE.json."),
    ] = Options.out,
) -> None:
    """Measure milestones, Hugging Face peers and the machine itself, side by side.

    Every run has its own process. Systems are interleaved over several rounds; ratios are taken within a round.
    results/README.md says what each number means.
    """
    console = Console()
    if console.width < TABLE_WIDTH:
        console = Console(width=TABLE_WIDTH)  # a terminal wraps long lines, where rich would cut numbers
    options = Options(
        model, milestones, peers, workloads, rounds, base, dtype, device, load_format, max_num_seqs,
        max_num_batched_tokens, seed, scale, arrival_rate, out,
    )  # fmt: skip
    with clean_exit(console):
        checked = check(options)
        if checked.header["git"]["commit"] is None:
            console.print(machine.NO_COMMIT, style="yellow")
        measurements = measure(console, checked)
        report = report_of(checked, measurements)
        if measurements.rounds:
            console.print(tables(report))
        if measurements.interrupted:
            complete = count(len(measurements.rounds), "complete round")
            console.print(f"interrupted after {complete}; nothing was written", highlight=False)
            raise typer.Exit(130)
        write(console, report, checked.out)
    if any(reason.startswith("failed") for reasons in measurements.left_out.values() for reason in reasons.values()):
        raise typer.Exit(1)


def check(options: Options) -> Bench:
    """Check all options before anything runs. Raises ValueError that names the option and the allowed values."""
    check_int("rounds", options.rounds, 1)
    check_int("seed", options.seed, 0)
    if options.max_num_seqs is not None:
        check_int("max_num_seqs", options.max_num_seqs, 1)
    milestones = with_max_num_seqs(parse_milestones(options.milestones), options.max_num_seqs)
    systems = [*milestones, *parse_peers(options.peers)]
    base = choose_base(options.base, systems)
    names = [name.strip() for name in options.workloads.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"workloads={options.workloads!r} is not valid; allowed: some of {', '.join(WORKLOADS)}, once")
    chosen = [get_workload(name) for name in names]

    source = resolve_model(options.model)
    if not source.has_weights and options.load_format != "dummy":
        raise ValueError(
            f"load_format={options.load_format!r} is not valid for {source.name!r}, which has no weights here; "
            "allowed: 'dummy', random weights from its config.json"
        )
    config = load_config(source)
    text = config.get_text_config()
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, config, device)
    rate = options.arrival_rate
    requests = {w.name: draw(w, int(text.vocab_size), options.seed, options.scale, arrival_rate=rate) for w in chosen}
    for name, drawn in requests.items():
        if longest(drawn) > text.max_position_embeddings:
            raise ValueError(
                f"workload={name!r} needs {longest(drawn)} tokens; allowed: {text.max_position_embeddings}, the "
                "model's max_position_embeddings"
            )
    dtype_name = str(dtype).removeprefix("torch.")
    file_name = f"bench-{source.name.replace('/', '-')}-{dtype_name}-{device.type}"
    if options.scale != 1:
        file_name += f"-scale{options.scale:g}"
    if rate is not None:
        file_name += f"-rate{rate:g}"
    template = Job(
        system=None,
        workload=names[0],
        model=options.model,
        dtype=dtype_name,
        device=str(device),
        load_format=options.load_format,
        seed=options.seed,
        scale=options.scale,
        max_num_batched_tokens=options.max_num_batched_tokens,
        arrival_rate=rate,
    )
    header = {
        "command": command_line(options, source.name),
        **provenance(device),
        "model": source.name,
        "dtype": dtype_name,
        "device": device.type,
        "load_format": options.load_format,
        "seed": options.seed,
        "scale": options.scale,
        "arrival_rate": rate,
        "workloads": {
            w.name: {
                "about": w.describe(rate),
                "requests": [[r.num_prompt_tokens, r.max_tokens, r.start_after] for r in requests[w.name]],
                "arrivals": [r.arrival for r in requests[w.name]],
            }
            for w in chosen
        },
    }
    out = options.out or Path("results", file_name + ".json")
    there = next(folder for folder in out.absolute().parents if folder.exists())  # the others will be made
    check_writable("out", out if there == out.absolute().parent else there / out.name)
    return Bench(Plan(systems, chosen, options.rounds, template), base, config, dtype, requests, header, out)


def command_line(options: Options, model_name: str) -> str:
    """The command with the options that differ from their defaults, without folder names."""
    shown = {"model": model_name, "out": options.out.name if options.out else None}
    words = ["python", "-m", "folovllm.course.bench"]
    for name, default in vars(Options()).items():
        if getattr(options, name) != default:
            words += [f"--{name.replace('_', '-')}", str(shown.get(name, getattr(options, name)))]
    return shlex.join(words)


def measure(console: Console, checked: Bench) -> Measurements:
    """Run all rounds, with a line per run and a progress bar."""
    plan = checked.plan
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=plan.num_jobs)

        def watch(step: Step) -> None:
            what = f"{step.workload}  {step.system}" if step.system else "machine"
            label = f"round {step.round + 1}/{plan.rounds}  {what}"
            if step.result is None and step.failure is None:
                progress.update(task, description=label)
                return
            progress.advance(task)
            if step.failure is not None:
                console.print(f"{label}  failed: {step.failure}", markup=False, highlight=False)
            elif step.result is not None and step.system:
                rate, seconds = step.result["output_tokens_per_s"], step.result["wall_s"]
                console.print(f"{label}  {number(rate)} tokens/s in {number(seconds)} s", highlight=False)

        return run_rounds(plan, execute_in_process, watch)


def report_of(checked: Bench, measurements: Measurements) -> dict[str, Any]:
    """The report of the measurements."""
    reason = add_roofline(measurements.rounds, checked.config, checked.dtype.itemsize, checked.requests)
    header = {**checked.header, "roofline_left_out": reason}
    return build_report(header, measurements, [s.name for s in checked.plan.systems], checked.base)


def write(console: Console, report: dict[str, Any], path: Path) -> None:
    """The JSON and, beside it, the plot."""
    save_report(report, path)
    written = [path]
    if report["summary"]:
        from folovllm.course.bench.plot import save_plot  # matplotlib takes a moment, and nothing else needs it

        written.append(path.with_suffix(".png"))
        save_plot(report, written[-1])
    console.print(f"wrote {' and '.join(map(str, written))}", markup=False, highlight=False)
