"""The results that `folovllm grade` saves: the state of each exercise, and the hash of the file with the answers.

They are in one small file, `.folovllm/progress.json` in the repository (or the file that `FOLOVLLM_PROGRESS` names)::

    {"version": 1,
     "milestones": {"m1": {"apply_top_k": {"status": "failed", "passed": 2, "checks": 6,
                                           "file": "milestones/m1_engine/exercise.py", "sha256": "9f86d0..."}}}}

A result is valid for the file with that hash. If the file has changed, passed exercises are marked as changed since,
because an exercise may use any other part of the file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from folovllm.course.grading.runner import Exercise, Milestone
from folovllm.course.paths import ROOT

VERSION = 1
VARIABLE = "FOLOVLLM_PROGRESS"
STATUSES = ("passed", "failed", "not started")

# The state of an exercise now.
PASSED, CHANGED, FAILED, WRITTEN, LEFT = "passed", "changed since it passed", "tried", "written, not checked", "left"


@dataclass(frozen=True)
class Result:
    """The result of an exercise."""

    status: str
    passed: int  # checks that passed
    checks: int  # all checks
    file: str  # the answers' path, relative to the repository
    sha256: str  # of that file


Progress = dict[str, dict[str, Result]]  # milestone -> exercise -> its newest result


def progress_file() -> Path:
    """The path of the saved results."""
    return Path(os.environ.get(VARIABLE) or ROOT / ".folovllm" / "progress.json")


def load_progress(path: Path) -> Progress:
    """The saved results; {} if there is no file.

    Raises ValueError, with the way to fix it, for a file that cannot be read, is not JSON, has another version, or was
    not written by this module.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise _unreadable(path, error.strerror or type(error).__name__) from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise _unreadable(path, f"it is not JSON ({error})") from None
    if not isinstance(content, dict) or "version" not in content:
        raise _unreadable(path, "it has no version")
    if content["version"] != VERSION:
        raise _unreadable(path, f"its version is {content['version']!r}, not {VERSION}")
    try:
        return {m: {e: _result(r) for e, r in results.items()} for m, results in content["milestones"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _unreadable(path, f"it is damaged ({error})") from None


def _unreadable(path: Path, why: str) -> ValueError:
    return ValueError(
        f"progress={os.fspath(path)!r} is not a progress file of folovllm: {why}. `folovllm grade --reset` starts a "
        "new one and keeps the old one beside it; your answers are in other files"
    )


def _result(record: dict[str, Any]) -> Result:
    result = Result(**record)
    for field in fields(Result):
        if type(getattr(result, field.name)).__name__ != field.type:
            raise ValueError(f"{field.name}={getattr(result, field.name)!r}")
    if result.status not in STATUSES:
        raise ValueError(f"status={result.status!r}")
    return result


def save_progress(progress: Progress, path: Path) -> None:
    """Write the file atomically: an interrupt leaves the old file unchanged. Raises OSError."""
    milestones = {m: {e: asdict(r) for e, r in results.items()} for m, results in progress.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        new.write_text(json.dumps({"version": VERSION, "milestones": milestones}, indent=1) + "\n", encoding="utf-8")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def record(milestone: Milestone, answers: Path, exercises: Sequence[Exercise], path: Path) -> None:
    """Save the results of a run. Exercises that it did not reach keep their older result. A run on the milestone's
    `solution.py` is not saved. Raises ValueError for an unreadable progress file, OSError if it cannot be written."""
    if answers.resolve() == (milestone.folder / "solution.py").resolve():
        return
    progress, digest = load_progress(path), sha256_of(answers)
    results = progress.setdefault(milestone.name, {})
    for exercise in exercises:
        if exercise.status in STATUSES:
            results[exercise.name] = Result(
                exercise.status, exercise.passed, len(exercise.checks), _name_of(answers), digest
            )
    save_progress(progress, path)


def reset(path: Path, milestone: str | None = None) -> str:
    """Delete all results, or those of one milestone. Returns a message. Answers are not touched.

    A file that is not a progress file is kept under another name. Raises OSError.
    """
    try:
        progress = load_progress(path)
    except ValueError:
        if milestone is not None:
            raise
        kept = path.with_name(f"{path.name}.old")
        path.replace(kept)
        return f"Started a new progress file. The old file is now {kept}."
    known = progress if milestone is None else {milestone: progress.get(milestone, {})}
    count = sum(map(len, known.values()))
    if milestone is None:
        path.unlink(missing_ok=True)
    elif count:
        del progress[milestone]
        save_progress(progress, path)
    return f"Deleted {count} result{'s' * (count != 1)}. Your answers are unchanged."


def sha256_of(file: Path) -> str:
    """The digest of a file, or "" if it cannot be read."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return ""


def _name_of(file: Path) -> str:
    """The path relative to the repository, or the absolute path of a file outside it."""
    file = file.resolve()
    return file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else os.fspath(file)


# --- states of exercises --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExerciseState:
    """The state of an exercise now."""

    name: str
    state: str  # one of the five above
    optional: bool
    file: Path  # of its answer
    result: Result | None

    @property
    def is_new(self) -> bool:
        """Whether the file of the answer has changed since the last check, or the answer was never checked."""
        if self.result is None or self.result.status == "not started":
            return self.state == WRITTEN
        return self.result.sha256 != sha256_of(self.file) != ""


def exercise_states(milestone: Milestone, results: dict[str, Result]) -> list[ExerciseState]:
    """Every exercise of a milestone, in the order of its page."""
    files = {result.file for result in results.values()}
    usual = ROOT / files.pop() if len(files) == 1 else milestone.exercise_file  # of answers without a result
    optional, written, found = milestone.optional(), milestone.written(usual), []
    for name in milestone.exercises():
        result = results.get(name)
        file = usual if result is None else ROOT / result.file
        state = WRITTEN if name in written else LEFT
        if result is not None and result.sha256 == sha256_of(file):
            state = {"passed": PASSED, "failed": FAILED, "not started": LEFT}[result.status]
        elif result is not None and result.status != "not started":
            state = CHANGED if result.status == "passed" else FAILED
        found.append(ExerciseState(name, state, name in optional, file, result))
    return found
