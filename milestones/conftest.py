"""What the graded tests need: the learner's file as the fixture `impl`, a time limit, and a log for the grader.

`folovllm grade` runs pytest with this file. By hand: `python -m pytest milestones/m1_engine --impl my_file.py`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from folovllm.course.grading.checks import WrongAnswer

# Every run draws the same cases, and a failure is shrunk to one small case.
settings.register_profile(
    "grade",
    derandomize=True,
    deadline=None,
    max_examples=60,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.differing_executors],  # of several runs in one process
)
settings.load_profile("grade")

HUNG = pytest.StashKey[set[str]]()  # exercises with a check that ran into the time limit
NOT_STARTED = pytest.StashKey[set[str]]()  # exercises that are not written
FAILED = pytest.StashKey[set[str]]()  # exercises with a check that failed


class TimeLimit(BaseException):
    """A check took too long. No Exception, so that neither the answer nor hypothesis takes it for one of its own."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("folovllm")
    group.addoption("--impl", type=Path, help="the file with the answers; default: exercise.py beside the tests")
    group.addoption("--only", action="append", default=[], metavar="EXERCISE", help="run the checks of this exercise")
    group.addoption("--grade-log", type=Path, help="write what happens to this file, one JSON object a line")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "exercise(name, optional=False): the exercise that these tests check")
    config.addinivalue_line("markers", "late: a long check, left out once a plain one of the same exercise has failed")
    config.stash[HUNG] = set()
    config.stash[NOT_STARTED] = set()
    config.stash[FAILED] = set()


@pytest.fixture(scope="module")
def impl(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The module with the answers."""
    path: Path = request.config.getoption("--impl") or request.path.parent / "exercise.py"
    spec = importlib.util.spec_from_file_location("impl", path.resolve())
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules["impl"] = module  # dataclasses look their module up
    sys.path.append(str(path.resolve().parent))  # for helper modules of the learner's own
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(path.resolve().parent))


# --- which checks run -------------------------------------------------------------------------------------


def exercise_of(item: pytest.Item) -> tuple[str, bool]:
    """The exercise's name and whether it is optional."""
    marker = item.get_closest_marker("exercise")
    if marker is None:
        raise pytest.UsageError(f"{item.nodeid}: a graded test needs @pytest.mark.exercise(name)")
    return marker.args[0], marker.kwargs.get("optional", False)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if only := config.getoption("--only"):
        items[:] = [item for item in items if exercise_of(item)[0] in only]
    for item in items:
        exercise, optional = exercise_of(item)
        title = " ".join((item.obj.__doc__ or item.name).split())  # type: ignore[attr-defined]
        log(config, event="planned", test=item.nodeid, exercise=exercise, optional=optional, title=title)


def pytest_runtest_setup(item: pytest.Item) -> None:
    stash, (exercise, _) = item.config.stash, exercise_of(item)
    if exercise in stash[HUNG]:
        pytest.skip("an earlier check of this exercise ran into the time limit")
    drawn = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
    late = drawn or item.get_closest_marker("late") is not None
    if late and exercise in stash[FAILED] and exercise not in stash[NOT_STARTED]:
        pytest.skip("a plain case fails: no need to look for another one among many")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    exercise, _ = exercise_of(pyfuncitem)
    not_started = pyfuncitem.config.stash[NOT_STARTED]
    if not hasattr(pyfuncitem.funcargs["impl"], exercise):
        not_started.add(exercise)
    if exercise in not_started:  # once is enough: hypothesis would look for the smallest case that is not written
        raise NotImplementedError(exercise)
    try:
        return (yield)
    except NotImplementedError:
        not_started.add(exercise)
        raise


# --- the time limit ---------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool | None:
    """In place of pytest-timeout's own timer, which raises what hypothesis would catch and try again."""
    if settings.method != "signal":
        return None  # Windows: pytest-timeout ends the process, and the grader says so

    def stop(signum: int, frame: FrameType | None) -> None:
        hung, (exercise, _) = item.config.stash[HUNG], exercise_of(item)
        message = f"stopped after {settings.timeout:g} seconds"
        if exercise not in hung:
            hung.add(exercise)
            raise TimeLimit(message)
        if in_the_answers(frame):  # its loop caught that: nothing but the end of the process ends it
            log(item.config, event="result", test=item.nodeid, kind="too slow", message=message)
            os._exit(1)

    def cancel() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    item.cancel_timeout = cancel  # type: ignore[attr-defined]  # pytest-timeout calls it
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, settings.timeout, 1.0)  # and again every second
    return True


def in_the_answers(frame: FrameType | None) -> bool:
    """Whether the learner's file is running, rather than pytest, which is already dealing with the first stop."""
    module = sys.modules.get("impl")
    while frame is not None and module is not None:
        if frame.f_code.co_filename == module.__file__:
            return True
        frame = frame.f_back
    return False


# --- the log ----------------------------------------------------------------------------------------------


def log(config: pytest.Config, **record: object) -> None:
    path: Path | None = config.getoption("--grade-log")
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    log(item.config, event="started", test=item.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "setup" and report.failed:
        log(item.config, event="not loaded", **describe(item, call.excinfo))
        item.session.shouldstop = "the answers cannot be loaded"
    elif call.when == "setup" and report.skipped:
        log(item.config, event="result", test=item.nodeid, kind="skipped")
    elif call.when == "call":
        if report.failed:
            item.config.stash[FAILED].add(exercise_of(item)[0])
        found = {"kind": "passed"} if report.passed else describe(item, call.excinfo)
        log(item.config, event="result", test=item.nodeid, printed=report.capstdout, **found)
    return report


def describe(item: pytest.Item, excinfo: pytest.ExceptionInfo[BaseException] | None) -> dict[str, Any]:
    """What went wrong, and the last line of the learner's file that was running."""
    if excinfo is None:
        raise RuntimeError(f"{item.nodeid} failed without an exception")
    error = excinfo.value
    kinds = {NotImplementedError: "not started", WrongAnswer: "wrong", TimeLimit: "too slow"}
    kind = next((name for kind, name in kinds.items() if isinstance(error, kind)), "raised")
    module = sys.modules.get("impl")
    entries = [e for e in excinfo.traceback if module is not None and str(e.path) == module.__file__]
    return {
        "kind": kind,
        "message": str(error) if kind != "raised" else f"{type(error).__name__}: {error}".rstrip(": "),
        "line": entries[-1].lineno + 1 if entries else None,
        "source": str(entries[-1].statement).strip() if entries else "",
    }
