"""Runs tests on the engine and on mutants of it, each in its own process and in its own copy of the package::

    repository   folovllm/  tests/  ...        read, never written
    copy         folovllm/  tests/             with one line changed; pytest runs here, and Python imports from here;
                                               deleted when the run ends, however it ends

The results are read from pytest's report (`--junitxml`).
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from folovllm.course.grading.museum import Exhibit
from folovllm.course.grading.runner import PLUGINS, START_SECONDS, STOPPED, check_source, check_tools, environment
from folovllm.course.paths import ROOT

COPIED = ("folovllm", "tests", "examples", "pyproject.toml")
WHOLE_SUITE = tuple(f"tests/m{number}" for number in range(5))
TEST_SECONDS = 30.0  # after which a single test is stopped
KILLED, SURVIVED, NOT_RUN = "killed", "survived", "did not run"
WRONG_ON_THE_ENGINE = "fails on the correct engine"


@dataclass(frozen=True)
class Ran:
    """The result of one test."""

    name: str  # as in "tests.m1.test_cli.test_info[x]"
    kind: str  # passed, failed, skipped, or error (outside the test itself, such as in a fixture or at import)
    message: str = ""  # what went wrong, on one line

    @property
    def short(self) -> str:
        """The name of the function."""
        return self.name.partition("[")[0].rpartition(".")[2]

    def is_one_of(self, test: str) -> bool:
        """Whether this is the test with the id "tests/m1/test_cli.py::test_info", or a case of it."""
        return self.name == dotted(test) or self.name.startswith(f"{dotted(test)}[")


def dotted(test: str) -> str:
    """A test's id with dots, as in reports."""
    return test.replace(".py::", ".").replace("::", ".").replace("/", ".")


@dataclass(frozen=True)
class Job:
    """Tests to run on a mutant, or on the unchanged engine (exhibit=None)."""

    exhibit: Exhibit | None
    tests: tuple[str, ...]  # pytest ids relative to the repository's root, or any file
    options: tuple[str, ...] = ()
    seconds: float = START_SECONDS  # for the whole run


@dataclass(frozen=True)
class Outcome:
    """The result of a job."""

    status: int | None  # exit status of the process, or None if it had to be stopped
    tests: tuple[Ran, ...] | None  # None without a report
    end: str  # the end of its output
    seconds: float

    def of_kind(self, *kinds: str) -> list[Ran]:
        """The tests with one of these kinds of result."""
        return [test for test in self.tests or () if test.kind in kinds]

    @property
    def broke_off(self) -> str | None:
        """Why there is no report (stopped, timeout, crash); None if there is one."""
        if self.tests is not None:
            return None
        if self.status is None:
            return "the run did not end"
        if STOPPED in self.end:
            return f"a test took more than {TEST_SECONDS:g} seconds"
        return f"Python ended with status {self.status}"


@dataclass
class Running:
    """A process that runs a job in `folder`."""

    job: Job
    folder: Path
    process: subprocess.Popen[bytes]
    started: float


# --- one process per job ------------------------------------------------------------------------------------


def run_jobs(
    jobs: Sequence[Job],
    at_once: int = 2,
    on_done: Callable[[int, Outcome], None] = lambda index, outcome: None,
    root: Path = ROOT,
) -> list[Outcome]:
    """Run jobs, `at_once` in parallel, and call `on_done` as each ends. Returns outcomes in the order of the jobs.

    After an interrupt, no process and no file is left. Raises ValueError if a package is missing or a mutant cannot be
    made.
    """
    check_tools()
    outcomes: dict[int, Outcome] = {}
    running: dict[int, Running] = {}
    with tempfile.TemporaryDirectory(prefix="folovllm-museum-") as folder:
        try:
            while len(outcomes) < len(jobs):
                started = len(outcomes) + len(running)
                if started < len(jobs) and len(running) < at_once:
                    running[started] = start(jobs[started], Path(folder, str(started)), root)
                    continue
                for index in [i for i, run in running.items() if is_over(run)]:
                    outcomes[index] = finish(running.pop(index))
                    on_done(index, outcomes[index])
                time.sleep(0.02)
        finally:
            for run in running.values():
                stop(run.process)
    return [outcomes[index] for index in range(len(jobs))]


def make_copy(exhibit: Exhibit | None, folder: Path, root: Path = ROOT) -> None:
    """Copy the package and its tests to `folder`, with the exhibit's line if there is one."""
    for name in COPIED:
        source, ignored = root / name, shutil.ignore_patterns(".*")
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    if exhibit is not None:
        mutant = folder / exhibit.file
        mutant.write_text(exhibit.mutate(exhibit.source(root)), encoding="utf-8")
        for compiled in mutant.parent.glob(f"__pycache__/{mutant.stem}.*"):
            compiled.unlink()


def start(job: Job, folder: Path, root: Path = ROOT) -> Running:
    """Start a job in a folder that does not exist yet."""
    make_copy(job.exhibit, folder, root)
    (folder / "scratch").mkdir()
    command = [
        sys.executable, "-m", "pytest", *PLUGINS, "-c", "pyproject.toml", "--rootdir=.", "--basetemp=scratch/pytest",
        "--junitxml=report.xml", "-o", "junit_family=xunit2", f"--timeout={TEST_SECONDS:g}", "--tb=short", "-q",
        *job.options, *job.tests,
    ]  # fmt: skip
    env, scratch = environment(), str(folder / "scratch")
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), env.get("PYTHONPATH")]))}
    env |= {"TMPDIR": scratch, "HYPOTHESIS_STORAGE_DIRECTORY": scratch}
    env |= {"CI": "true"}  # hypothesis then draws the same cases in every run
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    return Running(job, folder, process, time.monotonic())


def is_over(run: Running) -> bool:
    """Whether a process has ended, or has exceeded its time limit."""
    return run.process.poll() is not None or time.monotonic() - run.started > run.job.seconds


def finish(run: Running) -> Outcome:
    """The outcome of a run that is over. Its folder is deleted."""
    status = run.process.poll()
    stop(run.process)
    report = run.folder / "report.xml"
    tests = tuple(read_report(report)) if report.is_file() else None
    end = (run.folder / "output.txt").read_text(encoding="utf-8", errors="replace")[-4000:]
    shutil.rmtree(run.folder, ignore_errors=True)
    return Outcome(status, tests, end, time.monotonic() - run.started)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the leader of a session of its own
    else:
        process.kill()
    process.wait()


def read_report(file: Path) -> list[Ran]:
    """The tests in a pytest report."""
    tests = []
    for case in ElementTree.parse(file).iter("testcase"):
        name = f"{case.get('classname', '')}.{case.get('name', '')}".strip(".")
        kind, message = "passed", ""
        for tag, found_kind in (("skipped", "skipped"), ("failure", "failed"), ("error", "error")):
            found = case.find(tag)
            if found is not None:
                kind, message = found_kind, one_line(found.get("message") or "", found.text or "")
        tests.append(Ran(name, kind, message))
    return tests


def one_line(message: str, details: str) -> str:
    """The message on one line; if it names only the phase, the error itself."""
    errors: list[str] = re.findall(r"^E +(\S.*)$", details, re.MULTILINE)
    if errors and message.startswith("collection failure"):
        return errors[-1]
    if errors and message.startswith("failed on"):
        return errors[0]
    return next((line.strip() for line in message.splitlines() if line.strip()), "")


# --- the learner's tests, and our own -----------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """The verdict on a learner's test."""

    verdict: str
    reason: str = ""
    test: str = ""  # the test that killed the mutant


def try_test(exhibit: Exhibit, test: Path, root: Path = ROOT) -> Trial:
    """Run a file of tests on the engine and on the exhibit's mutant. Raises ValueError if there is no such file."""
    broken = check_source(test)
    if broken is not None:
        where = f"{test.name}, line {broken.line}: " if broken.line else ""
        return Trial(NOT_RUN, where + broken.message)
    tests, options = (str(test.resolve()),), ("--import-mode=importlib",)
    engine, mutant = run_jobs([Job(None, tests, options), Job(exhibit, tests, options)], root=root)
    wrong = judge_on_the_engine(engine)
    return wrong or judge_on_the_mutant(mutant)


def judge_on_the_engine(engine: Outcome) -> Trial | None:
    """None if the learner's tests ran on the engine and passed, else the verdict."""
    if engine.broke_off is not None:
        return Trial(WRONG_ON_THE_ENGINE, engine.broke_off)
    if bad := engine.of_kind("failed"):
        return Trial(WRONG_ON_THE_ENGINE, f"{bad[0].short}: {bad[0].message}")
    if bad := engine.of_kind("error"):
        return Trial(NOT_RUN, bad[0].message)
    if engine.status == 0 and engine.of_kind("passed"):
        return None
    skipped = engine.of_kind("skipped")
    return Trial(NOT_RUN, f"skipped: {skipped[0].message}" if skipped else "there is no test in the file")


def judge_on_the_mutant(mutant: Outcome) -> Trial:
    """The verdict on tests that pass on the engine."""
    if mutant.broke_off is not None:
        return Trial(KILLED, f"On the mutant, {mutant.broke_off}.")
    if killers := mutant.of_kind("failed"):
        return Trial(KILLED, killers[0].message, killers[0].short)
    if bad := mutant.of_kind("error"):
        return Trial(NOT_RUN, f"on the mutant, the setup of the test fails: {bad[0].message}")
    return Trial(SURVIVED)


@dataclass(frozen=True)
class Hunt:
    """The results of our own tests on a mutant."""

    exhibit: Exhibit
    killers: list[str]  # tests that fail on it
    silent: list[str]  # named tests that do not
    seconds: float
    broke_off: str | None = None

    @property
    def killed(self) -> bool:
        """Whether every test that the catalogue names fails on the mutant."""
        return bool(self.killers) and not self.silent and self.broke_off is None


def named_tests(exhibits: Sequence[Exhibit]) -> tuple[str, ...]:
    """All tests named for these exhibits, without duplicates."""
    return tuple(dict.fromkeys(test for exhibit in exhibits for test in exhibit.killed_by))


def hunt(
    exhibits: Sequence[Exhibit],
    at_once: int = 2,
    whole_suite: bool = False,
    on_done: Callable[[], None] = lambda: None,
    root: Path = ROOT,
) -> tuple[list[Ran], list[Hunt]]:
    """Run the named tests, or all of M0 to M4, on every mutant.

    Returns the tests that fail on the unchanged engine, which are ignored, and a `Hunt` per exhibit. Raises ValueError
    if the tests cannot run on the unchanged engine.
    """
    tests = WHOLE_SUITE if whole_suite else named_tests(exhibits)
    options = ("-m", "not gpu", "--timeout=120") if whole_suite else ()
    seconds = 3600.0 if whole_suite else START_SECONDS + TEST_SECONDS
    jobs = [Job(None, tests, options, seconds)]
    jobs += [Job(e, tests if whole_suite else e.killed_by, options, seconds) for e in exhibits]
    engine, *mutants = run_jobs(jobs, at_once, lambda index, outcome: on_done(), root)
    if engine.broke_off is not None or engine.status not in (0, 1):
        raise ValueError(f"the tests do not run on the unchanged engine: {engine.broke_off or ''}\n{engine.end}")
    failing = engine.of_kind("failed", "error")
    known = {test.name for test in failing}
    return failing, [judge(e, m, known) for e, m in zip(exhibits, mutants, strict=True)]


def judge(exhibit: Exhibit, mutant: Outcome, known: set[str]) -> Hunt:
    """Which tests fail on a mutant. known: tests that fail on the unchanged engine as well."""
    killers = [test for test in mutant.of_kind("failed") if test.name not in known]
    silent = [test for test in exhibit.killed_by if not any(killer.is_one_of(test) for killer in killers)]
    broke_off = mutant.broke_off
    if broke_off is None and mutant.status not in (0, 1):
        broke_off = next((test.message for test in mutant.of_kind("error")), mutant.end[-500:])
    return Hunt(exhibit, [killer.name for killer in killers], silent, mutant.seconds, broke_off)
