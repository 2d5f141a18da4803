"""The page that `folovllm grade` shows: every exercise of the course, how it stands, and what to do next."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from folovllm.course.grading.progress import CHANGED, FAILED, LEFT, PASSED, WRITTEN, Progress, Standing, standings
from folovllm.course.grading.runner import Milestone

BAR_WIDTH = 24

# What says a state without a colour, and the colour.
LOOKS = {
    PASSED: ("■", "green"),
    CHANGED: ("▣", "yellow"),
    FAILED: ("x", "red"),
    WRITTEN: ("?", "yellow"),
    LEFT: ("·", "dim"),
}
WORDS = {PASSED: "passes", CHANGED: "passed, file changed since", FAILED: "fails", WRITTEN: "not checked", LEFT: "left"}


def near(path: Path) -> str:
    """A path as one would type it here: relative if it lies below the working directory."""
    try:
        return os.fspath(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return os.fspath(path)


def progress_page(milestones: Mapping[str, Milestone], progress: Progress) -> RenderableType:
    """All milestones, a mark per exercise, and the next step. Nothing is run: it shows what is remembered."""
    course = {name: standings(milestone, progress.get(name, {})) for name, milestone in milestones.items()}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("milestone", no_wrap=True)
    table.add_column("a mark per exercise", no_wrap=True)
    for name in ("pass", "tried", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, own in course.items():
        title = milestones[name].title.partition(": ")[2]
        passed, left = (sum(s.state in states for s in own) for states in ((PASSED, CHANGED), (LEFT,)))
        tried = len(own) - passed - left
        counts = [Text(str(count or "-"), "" if count else "dim") for count in (passed, tried, left)]
        table.add_row(Text.assemble(name, "\n", (title, "dim")), marks(own), *counts)
    everyone = [standing for own in course.values() for standing in own]
    done = sum(s.state in (PASSED, CHANGED) for s in everyone)
    heading = Text.assemble(("Your exercises  ", "bold"), bar(done, len(everyone)), f"  {done} of {len(everyone)} pass")
    return Group(heading, "", table, "", legend(everyone), "", what_next(milestones, course))


def bar(done: int, total: int) -> Text:
    """How much of something is done, as a bar."""
    width = BAR_WIDTH * done // total
    return Text.assemble(("━" * width, "green"), ("─" * (BAR_WIDTH - width), "dim"))


def marks(own: list[Standing]) -> Text:
    """A milestone's exercises as a row of marks, the optional ones in brackets."""
    row = Text()
    for standing in own:
        mark, style = LOOKS[standing.state]
        row.append(f"({mark})" if standing.optional else mark, style)
        row.append(" ")
    return row


def legend(everyone: list[Standing]) -> Text:
    """What the marks say that are on the page."""
    seen = {standing.state for standing in everyone}
    parts = [(f"{mark} {WORDS[state]}   ", style) for state, (mark, style) in LOOKS.items() if state in seen]
    return Text.assemble(*parts, ("( ) optional", "dim"))


def what_next(milestones: Mapping[str, Milestone], course: Mapping[str, list[Standing]]) -> RenderableType:
    """The first exercise that is not done, and the commands for it; then what should be checked again."""
    again = [name for name, own in course.items() if any(s.is_new for s in own)]
    parts: list[RenderableType] = []
    open_ones = [(name, s) for name, own in course.items() for s in own if s.state not in (PASSED, CHANGED)]
    required = [(name, s) for name, s in open_ones if not s.optional]
    if open_ones:
        name, standing = (required or open_ones)[0]
        parts += [next_exercise(milestones[name], standing, only_optional=not required)]
    elif not again:
        parts += ["All exercises pass. There is a museum of real bugs, too: folovllm museum"]
    if again:
        parts += ["", Text(f"Written or changed since the last check: {', '.join(again)}. Check: folovllm grade all")]
    return Group(*parts)


def next_exercise(milestone: Milestone, standing: Standing, only_optional: bool) -> RenderableType:
    """One exercise: where to write, what to read, how to check it and how to get a hint."""
    result, file = standing.result, near(standing.file)
    why = {
        FAILED: f"{result.passed} of {result.checks} checks passed" if result is not None else "",
        WRITTEN: "written, and not checked yet",
        LEFT: "optional: all the others pass" if only_optional else "not written yet",
    }[standing.state]
    line = line_of(standing)
    option = "" if standing.file.resolve() == milestone.exercise_file.resolve() else f" --impl {file}"
    rows = {
        "open": file if line is None else f"{file}, line {line}",
        "read": ", ".join(near(chapter) for chapter in milestone.chapters(standing.name)),
        "check": f"folovllm grade {milestone.name} --only {standing.name}{option}",
        "hint": f"folovllm grade {milestone.name} --hint {standing.name}",
    }
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, text in rows.items():
        table.add_row(Text(f"  {name}", "dim"), Text(text, overflow="fold"))
    return Group(Text.assemble("Next: ", (standing.name, "bold"), f" of {milestone.name}, {why}"), table)


def line_of(standing: Standing) -> int | None:
    """Where the exercise begins in its file, counted from 1; None where it does not stand there."""
    try:
        lines = standing.file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    begins = re.compile(rf"(?:def|class) {standing.name}\b")
    return next((number for number, line in enumerate(lines, 1) if begins.match(line)), None)
