"""The page that `folovllm grade` shows: the state of every exercise of the course, and what to do next."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from folovllm.course.grading.progress import (
    CHANGED,
    FAILED,
    LEFT,
    PASSED,
    WRITTEN,
    ExerciseState,
    Progress,
    exercise_states,
)
from folovllm.course.grading.runner import Milestone

BAR_WIDTH = 24

# The mark of a state, and its colour.
LOOKS = {
    PASSED: ("■", "green"),
    CHANGED: ("▣", "yellow"),
    FAILED: ("x", "red"),
    WRITTEN: ("?", "yellow"),
    LEFT: ("·", "dim"),
}
WORDS = {PASSED: "passes", CHANGED: "passed, changed since", FAILED: "fails", WRITTEN: "not checked", LEFT: "to do"}


def near(path: Path) -> str:
    """A path relative to the working directory if it is inside, else absolute."""
    try:
        return os.fspath(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return os.fspath(path)


def progress_page(milestones: Mapping[str, Milestone], progress: Progress) -> RenderableType:
    """All milestones, a mark per exercise, and what to do next, from the saved results. No test is run."""
    course = {name: exercise_states(milestone, progress.get(name, {})) for name, milestone in milestones.items()}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("milestone", no_wrap=True)
    table.add_column("a mark per exercise", no_wrap=True)
    for name in ("pass", "tried", "to do"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, own in course.items():
        title = milestones[name].title.partition(": ")[2]
        passed, left = (sum(s.state in states for s in own) for states in ((PASSED, CHANGED), (LEFT,)))
        tried = len(own) - passed - left
        counts = [Text(str(count or "-"), "" if count else "dim") for count in (passed, tried, left)]
        table.add_row(Text.assemble(name, "\n", (title, "dim")), marks(own), *counts)
    exercises = [exercise for own in course.values() for exercise in own]
    done = sum(s.state in (PASSED, CHANGED) for s in exercises)
    words = f"  {done} of {len(exercises)} pass"
    heading = Text.assemble(("Your exercises  ", "bold"), bar(done, len(exercises)), words)
    return Group(heading, "", table, "", legend(exercises), "", what_next(milestones, course))


def bar(done: int, total: int) -> Text:
    """A progress bar."""
    width = BAR_WIDTH * done // total
    return Text.assemble(("━" * width, "green"), ("─" * (BAR_WIDTH - width), "dim"))


def marks(own: list[ExerciseState]) -> Text:
    """A milestone's exercises as a row of marks, the optional ones in brackets."""
    row = Text()
    for exercise in own:
        mark, style = LOOKS[exercise.state]
        row.append(f"({mark})" if exercise.optional else mark, style)
        row.append(" ")
    return row


def legend(exercises: list[ExerciseState]) -> Text:
    """The meaning of the marks on the page."""
    seen = {exercise.state for exercise in exercises}
    parts = [(f"{mark} {WORDS[state]}   ", style) for state, (mark, style) in LOOKS.items() if state in seen]
    return Text.assemble(*parts, ("( ) optional", "dim"))


def what_next(milestones: Mapping[str, Milestone], course: Mapping[str, list[ExerciseState]]) -> RenderableType:
    """The first exercise that is not done, with its commands, and the milestones to check again."""
    again = [name for name, own in course.items() if any(s.is_new for s in own)]
    parts: list[RenderableType] = []
    open_ones = [(name, s) for name, own in course.items() for s in own if s.state not in (PASSED, CHANGED)]
    required = [(name, s) for name, s in open_ones if not s.optional]
    if open_ones:
        name, exercise = (required or open_ones)[0]
        parts += [next_exercise(milestones[name], exercise, only_optional=not required)]
    elif not again:
        parts += ["All exercises pass. There is a museum of real bugs as well: folovllm museum"]
    if again:
        parts += ["", Text(f"New or changed since the last check: {', '.join(again)}. Check: folovllm grade all")]
    return Group(*parts)


def next_exercise(milestone: Milestone, exercise: ExerciseState, only_optional: bool) -> RenderableType:
    """One exercise: the file to edit, the chapters to read, and the commands to check it and to get a hint."""
    result, file = exercise.result, near(exercise.file)
    why = {
        FAILED: f"{result.passed} of {result.checks} checks passed" if result is not None else "",
        WRITTEN: "written, not checked yet",
        LEFT: "optional: all others pass" if only_optional else "not written yet",
    }[exercise.state]
    line = line_of(exercise)
    option = "" if exercise.file.resolve() == milestone.exercise_file.resolve() else f" --impl {shlex.quote(file)}"
    rows = {
        "open": file if line is None else f"{file}, line {line}",
        "read": ", ".join(near(chapter) for chapter in milestone.chapters(exercise.name)),
        "check": f"folovllm grade {milestone.name} --only {exercise.name}{option}",
        "hint": f"folovllm grade {milestone.name} --hint {exercise.name}",
    }
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, text in rows.items():
        table.add_row(Text(f"  {name}", "dim"), Text(text, overflow="fold"))
    return Group(Text.assemble("Next: ", (exercise.name, "bold"), f" of {milestone.name}, {why}"), table)


def line_of(exercise: ExerciseState) -> int | None:
    """The line number, from 1, at which the exercise begins in its file; None if it is not there."""
    try:
        lines = exercise.file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    begins = re.compile(rf"(?:def|class) {exercise.name}\b")
    return next((number for number, line in enumerate(lines, 1) if begins.match(line)), None)
