"""`folovllm museum`: show real bugs, try the learner's tests on them, and run our own."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.markdown import Markdown
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from folovllm.course.grading.museum import (
    Exhibit,
    answer_file,
    choose_exhibit,
    load_exhibits,
    load_progress,
    save_progress,
)
from folovllm.course.grading.progress_page import bar, near
from folovllm.course.grading.trials import (
    KILLED,
    NOT_RUN,
    SURVIVED,
    WRONG_ON_THE_ENGINE,
    Hunt,
    Ran,
    Trial,
    dotted,
    hunt,
    try_test,
)
from folovllm.entrypoints.terminal import clean_exit

COLOURS = {KILLED: "green", SURVIVED: "red", WRONG_ON_THE_ENGINE: "red", NOT_RUN: "yellow"}
WORDS = {
    KILLED: "Killed: your test passes on the engine and fails on the mutant.",
    SURVIVED: "Survived: your test passes on the engine and on the mutant.",
    WRONG_ON_THE_ENGINE: "Your test fails on the correct engine, so it proves nothing.",
    NOT_RUN: "Your test did not run.",
}
SHOWN_KILLERS = 8  # tests listed per exhibit

HELP = """Real bugs of small engines, each as one changed line of this one: write the test that finds it.

Start with `folovllm museum`, then `folovllm museum show half-a-character`."""

museum = typer.Typer(add_completion=False, rich_markup_mode="markdown")
ExhibitName = Annotated[str, typer.Argument(metavar="EXHIBIT", help="The exhibit's id, as `folovllm museum` lists it.")]


@contextmanager
def ends_in_order() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C, so that processes and temporary files are cleaned up."""

    def end(signum: int, frame: object) -> None:
        sys.exit(128 + signum)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@museum.callback(invoke_without_command=True, help=HELP)
def enter(context: typer.Context) -> None:
    """Without a subcommand: list the exhibits."""
    if context.invoked_subcommand is None:
        show_all()


@museum.command("list")
def show_all() -> None:
    """List all exhibits, and which of them your tests have killed so far."""
    console = Console()
    with clean_exit(console):
        console.print(overview(list(load_exhibits().values()), load_progress()))


@museum.command()
def show(
    exhibit: ExhibitName,
    hint: Annotated[bool, typer.Option("--hint", help="Show how a test could find it.")] = False,
    answer: Annotated[bool, typer.Option("--answer", help="Show which of our tests find it.")] = False,
) -> None:
    """Show one exhibit: the changed line, and what a user would notice."""
    console = Console()
    with clean_exit(console):
        console.print(exhibit_view(choose_exhibit(load_exhibits(), exhibit), hint, answer))


@museum.command("try")
def try_(
    exhibit: ExhibitName,
    test: Annotated[
        Path | None,
        typer.Option(help="The file with your test. Default: folovllm/course/museum/answers/test_EXHIBIT.py."),
    ] = None,
) -> None:
    """Run your test on the engine, where it must pass, and on the mutant, where it must fail.

    The exit status is 0 if the mutant is killed, 1 if not, and 2 for a usage error.
    """
    console = Console()
    with clean_exit(console):
        chosen = choose_exhibit(load_exhibits(), exhibit)
        file = answer_file(chosen) if test is None else test
        if not file.is_file():
            raise ValueError(f"the file {near(file)} with your test does not exist; write it, or use --test")
        status = Text(f"Running {near(file)} on the engine and on the mutant ...")
        with ends_in_order(), console.status(status):
            trial = try_test(chosen, file)
        save_progress(chosen, trial.verdict)
    console.print(trial_view(chosen, trial))
    raise typer.Exit(0 if trial.verdict == KILLED else 1)


@museum.command()
def run(
    only: Annotated[list[str] | None, typer.Option(help="Try only this exhibit. Can be repeated.")] = None,
    whole_suite: Annotated[
        bool,
        typer.Option("--all", help="Find every test of M0 to M4 that fails on a mutant. Takes minutes per exhibit."),
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Number of parallel processes.")] = min(2, os.cpu_count() or 1),
) -> None:
    """Run our own tests on every mutant. Each test that the catalogue names must kill its mutant.

    The exit status is 0 if all mutants are killed, 1 if one survives or a test fails on the unchanged engine, and 2 for
    a usage error.
    """
    console = Console()
    with clean_exit(console):
        exhibits = load_exhibits()
        chosen = [choose_exhibit(exhibits, name) for name in only or exhibits]
        start = time.monotonic()
        columns = (TextColumn("Mutants"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with ends_in_order(), Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=len(chosen) + 1)
            failing, hunts = hunt(chosen, jobs, whole_suite, lambda: progress.advance(task))
        console.print(hunt_view(failing, hunts, time.monotonic() - start, whole_suite))
    raise typer.Exit(0 if all(h.killed for h in hunts) and (whole_suite or not failing) else 1)


# --- views ------------------------------------------------------------------------------------------------------


def plain_table() -> Table:
    """A table without lines."""
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))


def overview(exhibits: list[Exhibit], progress: dict[str, str]) -> RenderableType:
    """The exhibits by topic, and the learner's progress."""
    table = plain_table()
    table.add_column("exhibit", no_wrap=True)
    table.add_column("title")
    table.add_column("your test", no_wrap=True)
    for topic, group in groupby(exhibits, key=lambda e: e.topic):
        table.add_row(Text(topic, "bold"), "", "")
        for exhibit in group:
            verdict = progress.get(exhibit.id, "")
            table.add_row(f"  {exhibit.id}", exhibit.title, Text(verdict, COLOURS.get(verdict, "dim")))
    killed = sum(progress.get(exhibit.id) == KILLED for exhibit in exhibits)
    done = Text.assemble(bar(killed, len(exhibits)), f"  {killed} of {len(exhibits)} killed")
    return Group(table, "", done, Text("More: folovllm museum show EXHIBIT", "dim"))


def exhibit_view(exhibit: Exhibit, hint: bool = False, answer: bool = False) -> RenderableType:
    """The description of an exhibit."""
    line = exhibit.line_in(exhibit.source())
    parts: list[RenderableType] = [
        Text.assemble((exhibit.title, "bold"), f"  ({exhibit.id})"),
        Text(f"{exhibit.file}, line {line}", "dim"),
        "",
        Text(textwrap.indent(textwrap.dedent(exhibit.old), "- "), "red"),
        Text(textwrap.indent(textwrap.dedent(exhibit.new), "+ "), "green"),
        "",
        Markdown(exhibit.symptom),
        Panel(Markdown(exhibit.seen), title="Where it was seen", title_align="left", border_style="dim"),
    ]
    if hint:
        parts.append(Panel(Markdown(exhibit.hint), title="Hint", title_align="left"))
    if answer:
        parts.append(Panel(Text("\n".join(exhibit.killed_by)), title="Our tests that find it", title_align="left"))
    file = near(answer_file(exhibit))
    parts.append(Text(f"Write your test in {file}, then: folovllm museum try {exhibit.id}", "dim"))
    if not hint:
        parts.append(Text(f"Stuck? folovllm museum show {exhibit.id} --hint", "dim"))
    return Group(*parts)


def trial_view(exhibit: Exhibit, trial: Trial) -> RenderableType:
    """The verdict on the learner's test, and the next command."""
    lines = [Text(WORDS[trial.verdict], f"bold {COLOURS[trial.verdict]}")]
    if trial.test:
        lines.append(Text(f"{trial.test} failed on the mutant:"))
    if trial.reason:
        lines.append(Text(trial.reason))
    if trial.verdict == KILLED:
        lines.append(Text(f"Compare with ours: folovllm museum show {exhibit.id} --answer", "dim"))
    else:
        lines.append(Text(f"Hint: folovllm museum show {exhibit.id} --hint", "dim"))
    return Group(*lines)


def hunt_view(failing: list[Ran], hunts: list[Hunt], seconds: float, whole_suite: bool) -> RenderableType:
    """A row per mutant with the tests that kill it, and any problems."""
    table = plain_table()
    table.add_column("mutant", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("killed by")
    for h in hunts:
        verdict = KILLED if h.killed else (NOT_RUN if h.broke_off else SURVIVED)
        table.add_row(h.exhibit.id, Text(verdict, COLOURS[verdict]), Text("\n".join(killer_lines(h, whole_suite))))
    parts: list[RenderableType] = [table, ""]
    if failing:
        names = "\n".join(f"  {test.name}: {test.message}" for test in failing)
        parts.append(Text(f"These tests fail on the unchanged engine and prove nothing:\n{names}", "red"))
    killed = sum(h.killed for h in hunts)
    words = f"{killed} of {len(hunts)} mutants are killed by all tests named for them, in {seconds:.0f} s."
    parts.append(Text(words, "green" if killed == len(hunts) else "red"))
    return Group(*parts)


def killer_lines(h: Hunt, whole_suite: bool) -> list[str]:
    """The cell of a mutant's row: the tests that kill it, and the named tests that do not."""
    if h.broke_off is not None:
        return [h.broke_off]
    killers = h.killers if whole_suite else [test for test in h.exhibit.killed_by if test not in h.silent]
    lines = list(dict.fromkeys(map(in_words, killers)))
    if len(lines) > SHOWN_KILLERS:
        lines[SHOWN_KILLERS:] = [f"and {len(lines) - SHOWN_KILLERS} more"]
    return [*lines, *(f"not by {in_words(test)}" for test in h.silent)]


def in_words(test: str) -> str:
    """A test's file and name with spaces for underscores, so that lines can wrap."""
    file, _, name = dotted(test).partition("[")[0].rpartition(".")
    return f"{file.removeprefix('tests.').replace('.', '/')}: {name.removeprefix('test_').replace('_', ' ')}"
