"""Runs the graded tests of a milestone on a learner's file, in a separate process, and reads the results.

The tests are pytest's, in `milestones/mN_*/test_exercise.py`. `milestones/conftest.py` logs each result as it is known,
so that no result is lost if an answer hangs, crashes or exits.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from folovllm.course.paths import ROOT

PLUGINS = ("-p", "pytest_timeout", "-p", "no:cacheprovider")  # of pytest: only those that the tests need
STOPPED = "+ Timeout +"  # pytest-timeout writes this when it cannot interrupt a test and ends the process
NEEDED = {"pytest": "pytest", "pytest_timeout": "pytest-timeout", "hypothesis": "hypothesis"}
MAX_TIME_LIMIT = 3600
# Renamed parts of exercises: class or function -> old name -> new name. Saved answers with old names get a message.
RENAMED = {
    "PriorityQueue": {name: f"{name}_request" for name in ("add", "peek", "pop", "remove")},
    "split_budget": {"longest_piece": "long_prefill_token_threshold"},
}
START_SECONDS = 120.0  # for the process to start and load torch, on a slow machine


@dataclass(frozen=True)
class Milestone:
    """A folder of exercises."""

    name: str  # "m1", or "m3-kernels" for a second folder of a milestone
    folder: Path

    @property
    def exercise_file(self) -> Path:
        return self.folder / "exercise.py"

    @property
    def readme(self) -> str:
        return (self.folder / "README.md").read_text(encoding="utf-8")

    @property
    def title(self) -> str:
        """The heading of the README."""
        return self.readme.partition("\n")[0].lstrip("# ")

    def exercises(self) -> list[str]:
        """The exercises' names, in the order of the README: functions and classes of the exercise file."""
        return re.findall(r"^### `(\w+)`", self.readme, re.MULTILINE)

    def optional(self) -> list[str]:
        """The exercises whose text in the README begins with "Optional"."""
        return [name for name in self.exercises() if re.match(r"\s*Optional\b", self.section(name))]

    def written(self, file: Path | None = None) -> list[str]:
        """The exercises that do more in a file than raise NotImplementedError.

        file: the answers; None: the exercise file. All exercises if it is not valid Python, since it was edited.
        """
        try:
            tree = ast.parse((self.exercise_file if file is None else file).read_bytes())
        except OSError:
            return []
        except (SyntaxError, ValueError):
            return self.exercises()
        parts = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        return [name for name in self.exercises() if name in parts and not _only_raises(parts[name])]

    def section(self, exercise: str) -> str:
        """The README's text on one exercise, as Markdown. Raises ValueError for an unknown exercise."""
        if exercise not in self.exercises():
            raise unknown_exercise(self, exercise)
        return re.split(r"^#{2,3} ", self.readme.partition(f"### `{exercise}`")[2], flags=re.MULTILINE)[0]

    def hint(self, exercise: str) -> str:
        """The folded hint of one exercise, as Markdown. Raises ValueError for an unknown exercise."""
        hints = re.findall(r"<summary>Hint</summary>\s*(.*?)\s*</details>", self.section(exercise), re.DOTALL)
        return "\n\n".join(hints) or "There is no hint for this exercise."

    def chapters(self, exercise: str | None = None) -> list[Path]:
        """The chapters that the README links to, or those that one exercise names. Without any: the README itself."""
        links = re.findall(r"\]\((\.\./\.\./docs/chapters/[^)#]+)", self.readme)
        chapters = [(self.folder / link).resolve() for link in dict.fromkeys(links)]
        numbers = re.findall(r"\(chapter (\d+)\)", self.section(exercise)) if exercise else []
        named = [file for file in chapters if any(file.name.startswith(f"{int(n):02}_") for n in numbers)]
        return named or chapters or [self.folder / "README.md"]


@dataclass(frozen=True)
class Check:
    """One graded test."""

    title: str  # what it checks, in a sentence
    kind: str  # passed, wrong, raised, too slow, crashed, not started, or skipped (never reached)
    message: str = ""  # what went wrong
    # line, source: of an exception, the innermost line of the learner's file
    line: int | None = None
    source: str = ""
    printed: str = ""  # output of the answer


@dataclass(frozen=True)
class Exercise:
    """An exercise and its checks in the order of the tests: from simple cases to random ones."""

    name: str
    optional: bool
    checks: list[Check]

    @property
    def passed(self) -> int:
        """The number of checks that passed."""
        return sum(check.kind == "passed" for check in self.checks)

    @property
    def status(self) -> str:
        """passed, failed, not started, or not reached (the run ended before)."""
        kinds = {check.kind for check in self.checks}
        names = {"passed": "passed", "not started": "not started", "skipped": "not reached"}
        return names[kinds.pop()] if len(kinds) == 1 and kinds <= names.keys() else "failed"

    @property
    def first_failure(self) -> Check | None:
        """The first check that did not pass."""
        return next((c for c in self.checks if c.kind not in ("passed", "skipped")), None)


@dataclass(frozen=True)
class Report:
    """The result of one run."""

    exercises: list[Exercise]
    not_loaded: Check | None = None  # why the learner's file could not be imported

    @property
    def all_passed(self) -> bool:
        """Whether all required exercises passed, and no optional one that was started failed."""
        done = all(e.status == "passed" or (e.optional and e.status == "not started") for e in self.exercises)
        return done and self.not_loaded is None


def _only_raises(part: ast.FunctionDef | ast.ClassDef) -> bool:
    functions = [node for node in ast.walk(part) if isinstance(node, ast.FunctionDef)]
    return all(ast.unparse(f.body[-1]).startswith("raise NotImplementedError(") for f in functions)


def find_milestones(root: Path | None = None) -> dict[str, Milestone]:
    """The milestones with exercises by name, from the repository of this package (or from `root`).

    Raises ValueError where the package is installed without its repository.
    """
    root = ROOT if root is None else root
    folders = sorted(root.glob("milestones/m[0-9]_*/test_exercise.py"))
    if not folders:
        raise ValueError(
            "the exercises are not installed: they are in folovllm's repository, not in the package. "
            'Clone the repository and run `pip install -e ".[test]"` in it'
        )
    found: dict[str, Milestone] = {}
    for folder in (file.parent for file in folders):
        number = folder.name.partition("_")[0]  # further folders of the same milestone have their whole names
        name = folder.name.replace("_", "-") if number in found else number
        found[name] = Milestone(name, folder)
    return found


def unknown_exercise(milestone: Milestone, name: str) -> ValueError:
    """The error for an exercise that the milestone does not have."""
    return ValueError(f"{milestone.name} has no exercise {name!r}; allowed: {', '.join(milestone.exercises())}")


def check_tools() -> None:
    """Raises ValueError unless the packages that the graded tests need are installed."""
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise ValueError(
            f"grading needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            'run `pip install -e ".[test]"` in the repository'
        )


def check_source(impl: Path) -> Check | None:
    """None, or why the learner's file is not valid Python.

    Raises ValueError if there is no such file.
    """
    if not impl.is_file() or impl.suffix != ".py":
        raise ValueError(f"impl={str(impl)!r} is not an existing Python file; allowed: the path of your answers")
    source = impl.read_bytes()
    try:
        compile(source, str(impl), "exec", dont_inherit=True)
    except SyntaxError as error:
        number = error.lineno or 0
        lines = source.decode(errors="replace").splitlines()[number - 1 : number] if number else []
        if lines and error.text and error.offset:
            lines = [error.text.rstrip(), " " * (error.offset - 1) + "^"]
        return Check("", "raised", f"{type(error).__name__}: {error.msg}", error.lineno, "\n".join(lines))
    except ValueError as error:  # null bytes, before Python 3.12
        return Check("", "raised", f"ValueError: {error}")
    return None


def check_names(impl: Path) -> Check | None:
    """None, or the names of `RENAMED` that the file still has."""
    for node in ast.parse(impl.read_bytes()).body:
        if isinstance(node, ast.ClassDef):
            named = [(part.name, part.lineno) for part in node.body if isinstance(part, ast.FunctionDef)]
        elif isinstance(node, ast.FunctionDef):
            named = [(argument.arg, argument.lineno) for argument in node.args.args]
        else:
            continue
        old = [(name, line) for name, line in named if name in RENAMED.get(node.name, {})]
        if old:
            says = ", ".join(f"`{name}` is `{RENAMED[node.name][name]}`" for name, _ in old)
            return Check("", "raised", f"`{node.name}` now has vLLM's names: {says}. Rename them.", old[0][1])
    return None


def run_checks(
    milestone: Milestone, impl: Path | None = None, only: Sequence[str] = (), time_limit: float = 20.0
) -> Report:
    """Run the milestone's graded tests on `impl` (None: its exercise file).

    only: names of exercises; empty: all. time_limit: seconds per check. Raises ValueError for a file that does not
    exist, an unknown exercise, and missing packages; RuntimeError if the tests themselves cannot be run.
    """
    check_tools()
    impl = (milestone.exercise_file if impl is None else impl).resolve()
    for name in only:
        if name not in milestone.exercises():
            raise unknown_exercise(milestone, name)
    if not 0 < time_limit <= MAX_TIME_LIMIT:
        raise ValueError(f"time_limit={time_limit} is not valid; allowed: seconds > 0 and <= {MAX_TIME_LIMIT}")
    broken = check_source(impl) or check_names(impl)
    if broken is not None:
        return Report([], broken)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        log.touch()
        options = ["--impl", str(impl), "--grade-log", str(log), f"--timeout={time_limit:g}"]
        end = run_pytest(milestone, [*options, *(f"--only={name}" for name in only)], time_limit)
        records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    report = read_log(records, end)
    if not report.exercises and report.not_loaded is None:
        raise RuntimeError(f"the tests of {milestone.name} could not be run:\n{end}")
    return report


def run_pytest(milestone: Milestone, options: Sequence[str], time_limit: float) -> str:
    """Run pytest on the milestone's tests. Returns how it ended, and the end of its output."""
    command = [sys.executable, "-m", "pytest", *pytest_arguments(milestone), *options]
    limit = START_SECONDS + time_limit * (len(milestone.exercises()) + 1)
    try:
        done = subprocess.run(
            command, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8",
            errors="replace", timeout=limit,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "it did not end and could not be interrupted"
    if STOPPED in done.stderr:
        return f"it was stopped after {time_limit:g} seconds in one check"
    return f"Python ended with status {done.returncode}\n{(done.stdout + done.stderr)[-2000:]}".rstrip()


def pytest_arguments(milestone: Milestone) -> list[str]:
    """pytest's arguments for every run: the tests, and only the plugins that they need."""
    return [*PLUGINS, "--import-mode=importlib", "--tb=short", str(milestone.folder / "test_exercise.py")]


def environment() -> dict[str, str]:
    """The environment of a run: no outside pytest options, offline, one core, no files left behind."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS")}
    env |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    env |= {"HYPOTHESIS_STORAGE_DIRECTORY": os.path.join(tempfile.gettempdir(), "folovllm-hypothesis")}
    return env | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}


def read_log(records: Sequence[dict[str, Any]], end: str) -> Report:
    """The report from the log of a run. end: how it ended."""
    planned = {r["test"]: r for r in records if r["event"] == "planned"}
    results = {r["test"]: r for r in records if r["event"] == "result"}
    failed_to_load = next((r for r in records if r["event"] == "not loaded"), None)
    started = [r["test"] for r in records if r["event"] == "started"]
    if started and started[-1] not in results and failed_to_load is None:
        results[started[-1]] = {"kind": "crashed", "message": f"The run broke off here: {end.partition(chr(10))[0]}."}
    exercises: dict[str, Exercise] = {}
    for test, plan in planned.items():
        exercise = exercises.setdefault(plan["exercise"], Exercise(plan["exercise"], plan["optional"], []))
        exercise.checks.append(make_check(plan["title"], results.get(test, {"kind": "skipped"})))
    not_loaded = None if failed_to_load is None else make_check("", failed_to_load)
    return Report(list(exercises.values()), not_loaded)


def make_check(title: str, record: dict[str, Any]) -> Check:
    """A record of the log as a Check."""
    fields = {name: record[name] for name in ("kind", "message", "line", "source", "printed") if name in record}
    return Check(title, **fields)
