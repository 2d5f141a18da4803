"""`folovllm grade`: check the answers to a milestone's exercises and show the first failure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.markdown import Markdown
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from folovllm.course.grading.progress import exercise_states, load_progress, progress_file, record, reset
from folovllm.course.grading.progress_page import bar, near, progress_page
from folovllm.course.grading.runner import Check, Exercise, Milestone, Report, find_milestones, run_checks
from folovllm.entrypoints.terminal import clean_exit

COLOURS = {"passed": "green", "failed": "red", "not started": "dim", "not reached": "yellow"}
PRINTED_LINES = 8  # shown of the output of an answer in a failed check


def grade(
    milestone: Annotated[
        str | None,
        typer.Argument(help="m0, m1, ..., or all: every milestone with new answers. Default: show your progress."),
    ] = None,
    impl: Annotated[
        Path | None, typer.Option(help="The file with your answers. Default: the milestone's exercise.py.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Check only this exercise. Can be repeated.")] = None,
    hint: Annotated[str | None, typer.Option(help="Show the hint for this exercise, without checking it.")] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds after which a check is stopped.")] = 20.0,
    forget: Annotated[
        bool, typer.Option("--reset", help="Forget the results so far (of one milestone, if named), not the answers.")
    ] = False,
) -> None:
    """Check your answers to the exercises of a milestone, or show your progress.

    Write them in `milestones/mN_*/exercise.py`, or in a copy of it that you name with `--impl`. The exit status is 0 if
    all exercises pass, 1 if not, and 2 for a usage error. Optional exercises may be skipped.

    Results are saved in `.folovllm/progress.json` in the repository; FOLOVLLM_PROGRESS names another file.
    """
    console = Console()
    with clean_exit(console):
        try:
            found = find_milestones()
            if forget:
                if impl is not None or only or hint is not None:
                    raise ValueError("--impl, --only and --hint cannot be combined with --reset")
                console.print(reset(progress_file(), None if milestone is None else choose(found, milestone).name))
                return
            if milestone is None or milestone == "all":
                if impl is not None or only or hint is not None:
                    raise ValueError(f"--impl, --only and --hint need a milestone; allowed: {', '.join(found)}")
                if milestone == "all":
                    check_what_is_new(console, found, time_limit)
                console.print(progress_page(found, load_progress(progress_file())))
                return
            chosen = choose(found, milestone)
            if hint is not None:
                text = chosen.hint(hint)
                console.print(Panel(Markdown(text), title=f"Hint for {hint}", title_align="left"))
                return
            path = chosen.exercise_file if impl is None else impl
            with console.status(Text(f"Checking {near(path)} ...")):
                report = run_checks(chosen, path, only or (), time_limit)
        except BrokenPipeError:
            raise
        except (RuntimeError, OSError) as error:
            raise ValueError(str(error)) from None
        console.print(report_view(chosen, path, report, whole=not only))
        remember(console, chosen, path, report)
        raise typer.Exit(0 if report.all_passed else 1)


def remember(console: Console, milestone: Milestone, path: Path, report: Report) -> None:
    """Save the results. If that fails, print the reason: the grade is still valid."""
    try:
        record(milestone, path, report.exercises, progress_file())
    except (ValueError, OSError) as error:
        console.print(Text(f"Results not saved: {error}", "yellow"), highlight=False)


def check_what_is_new(console: Console, found: dict[str, Milestone], time_limit: float) -> None:
    """Grade every milestone with new answers, or answers changed since the last check."""
    progress = load_progress(progress_file())
    for milestone in found.values():
        own = exercise_states(milestone, progress.get(milestone.name, {}))
        for path in dict.fromkeys(s.file for s in own if s.is_new):
            only = [s.name for s in own if s.file == path]
            with console.status(Text(f"Checking {near(path)} ...")):
                report = run_checks(milestone, path, only, time_limit)
            if report.not_loaded is not None:
                console.print(failure_view(f"{path.name} cannot be loaded", report.not_loaded, path))
            remember(console, milestone, path, report)


def choose(found: dict[str, Milestone], name: str) -> Milestone:
    """The milestone called `name` ("m1", "M1" or its folder). Raises ValueError for another name."""
    for milestone in found.values():
        if name.lower() in (milestone.name, milestone.folder.name):
            return milestone
    raise ValueError(f"milestone={name!r} has no exercises; allowed: {', '.join(found)}")


def report_view(milestone: Milestone, path: Path, report: Report, whole: bool = True) -> RenderableType:
    """The result of a run: a row per exercise, the first failure in full, and what to do next.

    whole: all exercises of the milestone were checked.
    """
    heading = Text.assemble((milestone.title, "bold"), "\n", (near(path), "dim"))
    if report.not_loaded is not None:
        return Group(heading, failure_view(f"{path.name} cannot be loaded", report.not_loaded, path))
    parts: list[RenderableType] = [heading, "", exercise_table(report.exercises), ""]
    stuck = next((e for e in report.exercises if e.status == "failed"), None)
    if stuck is not None and stuck.first_failure is not None:
        parts += [failure_view(stuck.name, stuck.first_failure, path), ""]
    parts.append(progress_line(report.exercises))
    parts.append(advice(milestone, report, stuck, whole))
    return Group(*parts)


def exercise_table(exercises: list[Exercise]) -> Table:
    """One row per exercise: its state, and the title of its first failing check."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("exercise", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("checks", justify="right", no_wrap=True)
    some_fail = any(e.status == "failed" for e in exercises)
    if some_fail:
        table.add_column("first failing check")
    for exercise in exercises:
        name = Text(exercise.name)
        if exercise.optional:
            name.append("\n  optional", "dim")
        failure = exercise.first_failure if exercise.status == "failed" else None
        row: list[RenderableType] = [
            name,
            Text(exercise.status, COLOURS[exercise.status]),
            f"{exercise.passed}/{len(exercise.checks)}",
        ]
        if some_fail:
            row.append(Text("" if failure is None else failure.title))
        table.add_row(*row)
    return table


def failure_view(title: str, check: Check, path: Path) -> Panel:
    """The details of a failed check."""
    parts: list[RenderableType] = []
    if check.title:
        parts += [Text(check.title, "bold"), ""]
    if check.kind == "too slow":
        parts.append(Text(f"Your answer was {check.message}. Is there an infinite loop?"))
    elif check.kind == "not started":
        parts.append(Text("The answer is not complete: this case raises NotImplementedError."))
    else:
        parts.append(Text(check.message))
    if check.line is not None and check.kind != "wrong":
        parts.append(Text(f"{path.name}, line {check.line}", "dim"))
        if check.source:
            parts.append(Text("    " + check.source.replace("\n", "\n    "), "cyan"))
    printed = check.printed.rstrip().splitlines()[-PRINTED_LINES:]
    if printed:
        parts.append(Text("The last lines that it printed:\n    " + "\n    ".join(printed), "dim"))
    return Panel(Group(*parts), title=Text(title), title_align="left", border_style="red")


def progress_line(exercises: list[Exercise]) -> Text:
    """A progress bar over the exercises that are not optional, and their count."""
    required = [e for e in exercises if not e.optional] or exercises
    passed = sum(e.status == "passed" for e in required)
    extra = sum(e.status == "passed" for e in exercises if e.optional and e not in required)
    words = f"{passed} of {len(required)} exercises pass" + (f", and {extra} optional" if extra else "")
    return Text.assemble(bar(passed, len(required)), f"  {words}")


def advice(milestone: Milestone, report: Report, stuck: Exercise | None, whole: bool) -> Text:
    """What to read and run next."""
    if report.all_passed:
        return Text(f"All done. Compare: {near(milestone.folder / 'solution.py')}" if whole else "Right.", "dim")
    open_one = stuck or next((e for e in report.exercises if e.status != "passed"), report.exercises[0])
    hint = f"folovllm grade {milestone.name} --hint {open_one.name}"
    chapters = ", ".join(near(file) for file in milestone.chapters(open_one.name))
    return Text(f"Read: {chapters}\nHint: {hint}", "dim")
