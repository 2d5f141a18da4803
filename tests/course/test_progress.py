"""What `folovllm grade` remembers, and the page it makes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result as Invoked
from typer.testing import CliRunner

from folovllm.course.grading import command
from folovllm.course.grading.progress import (
    Progress,
    Result,
    exercise_states,
    load_progress,
    record,
    save_progress,
    sha256_of,
)
from folovllm.course.grading.runner import Check, Exercise, Milestone, Report, find_milestones
from folovllm.entrypoints.cli import app

MILESTONES = find_milestones()
RIGHT = "def apply_temperature(logits, temperature):\n    return logits / temperature\n"


def invoke(*args: str, columns: int = 80) -> Invoked:
    return CliRunner().invoke(app, ["grade", *args], env={"COLUMNS": str(columns), "TERM": "dumb", "NO_COLOR": "1"})


def flat(text: str) -> str:
    return " ".join(text.split())


def exercise(name: str, passed: int, kind: str = "wrong", checks: int = 4, optional: bool = False) -> Exercise:
    """An exercise of which so many checks passed, and the others went as `kind` says."""
    return Exercise(name, optional, [Check("It is so.", "passed" if i < passed else kind) for i in range(checks)])


@pytest.fixture
def graded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, str, tuple[str, ...]]]]:
    """Let runs of the checks end with these exercises; returns a list to which every run is written."""

    def ends_with(*exercises: Exercise, not_loaded: Check | None = None) -> list[tuple[str, str, tuple[str, ...]]]:
        runs: list[tuple[str, str, tuple[str, ...]]] = []

        def run(milestone: Milestone, path: Path, only: tuple[str, ...], time_limit: float) -> Report:
            runs.append((milestone.name, path.name, tuple(only)))
            chosen = [e for e in exercises if e.name in milestone.exercises() and (not only or e.name in only)]
            return Report([] if not_loaded else chosen, not_loaded)

        monkeypatch.setattr(command, "run_checks", run)
        return runs

    return ends_with


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(RIGHT, encoding="utf-8")
    return file


def marks_of(page: str, milestone: str) -> list[str]:
    """The row of a milestone: its marks, then the three counts."""
    (row,) = re.findall(rf"^{milestone} .*$", page, re.MULTILINE)
    return row.split()[1:]


# --- the file ---------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "down.json"
    known: Progress = {
        "m1": {"a": Result("passed", 4, 4, "b.py", "0f"), "c": Result("failed", 0, 3, "ü.py", "")},
        "m9": {},
    }
    assert load_progress(file) == {}
    save_progress(known, file)
    assert load_progress(file) == known
    assert [path.name for path in file.parent.iterdir()] == ["down.json"]
    assert json.loads(file.read_text(encoding="utf-8"))["version"] == 1


GOOD = {"status": "passed", "passed": 1, "checks": 1, "file": "a.py", "sha256": "0"}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is not JSON"),
        (b'{"version": 1, "mil', "it is not JSON"),
        (b"\xff\xfe\x00", "it is not JSON"),
        (b"[1, 2]", "it has no version"),
        (b'{"name": "somebody\'s package"}', "it has no version"),
        (b'{"version": 2, "milestones": {}}', "its version is 2, not 1"),
        (b'{"version": 1}', "it is damaged"),
        (b'{"version": 1, "milestones": [3]}', "it is damaged"),
        (b'{"version": 1, "milestones": {"m1": {"a": 5}}}', "it is damaged"),
        (b'{"version": 1, "milestones": {"m1": {"a": {"status": "passed"}}}}', "it is damaged"),
        *(
            (json.dumps({"version": 1, "milestones": {"m1": {"a": GOOD | wrong}}}).encode(), "it is damaged")
            for wrong in ({"status": "wonderful"}, {"passed": "1"}, {"checks": True}, {"file": None}, {"more": 1})
        ),
    ],
)
def test_a_file_that_is_none_is_named_and_nothing_crashes(
    content: bytes, why: str, progress: Path, answers: Path, graded: Callable[..., list[object]]
) -> None:
    progress.parent.mkdir()
    progress.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(why)):
        load_progress(progress)
    page = invoke(columns=300)
    assert page.exit_code == 2 and page.output.startswith("error: progress=") and why in page.output
    assert "folovllm grade --reset" in page.output
    graded(exercise("apply_temperature", 4))
    result = invoke("m1", "--impl", str(answers), "--only", "apply_temperature", columns=300)
    assert result.exit_code == 0 and "apply_temperature  passed" in result.output  # the grade itself stands
    assert "Results not saved: progress=" in result.output and why in result.output
    assert progress.read_bytes() == content
    reset = invoke("--reset", columns=300)
    assert reset.exit_code == 0 and "Started a new progress file" in reset.output
    assert progress.with_name("progress.json.old").read_bytes() == content
    assert invoke().exit_code == 0


def test_a_folder_in_its_place_is_a_message(progress: Path) -> None:
    progress.mkdir(parents=True)
    result = invoke(columns=300)
    assert result.exit_code == 2 and result.output.startswith("error: progress=")


def test_a_file_that_cannot_be_written_is_a_message(
    progress: Path, answers: Path, graded: Callable[..., list[object]]
) -> None:
    progress.parent.write_text("a file where a folder should be")
    graded(exercise("apply_temperature", 4))
    result = invoke("m1", "--impl", str(answers), "--only", "apply_temperature", columns=300)
    assert result.exit_code == 0 and "Results not saved: " in result.output


# --- what is remembered -----------------------------------------------------------------------------------


def test_a_run_is_remembered_with_the_state_of_its_file(
    progress: Path, answers: Path, graded: Callable[..., list[object]]
) -> None:
    graded(
        exercise("apply_temperature", 4),
        exercise("apply_top_k", 2, checks=6),
        exercise("apply_min_p", 0, "not started"),
    )
    assert invoke("m1", "--impl", str(answers)).exit_code == 1
    results = load_progress(progress)["m1"]
    assert {name: (r.status, r.passed, r.checks) for name, r in results.items()} == {
        "apply_temperature": ("passed", 4, 4),
        "apply_top_k": ("failed", 2, 6),
        "apply_min_p": ("not started", 0, 4),
    }
    assert {(r.file, r.sha256) for r in results.values()} == {(str(answers), sha256_of(answers))}


def test_a_part_of_the_exercises_leaves_the_rest_and_what_was_not_reached_as_they_were(
    progress: Path, answers: Path, graded: Callable[..., list[object]]
) -> None:
    graded(exercise("apply_temperature", 4), exercise("apply_top_k", 4), exercise("apply_min_p", 4))
    invoke("m1", "--impl", str(answers))
    graded(exercise("apply_top_k", 1), exercise("apply_min_p", 0, "skipped"))
    invoke("m1", "--impl", str(answers), "--only", "apply_top_k", "--only", "apply_min_p")
    states = {name: r.status for name, r in load_progress(progress)["m1"].items()}
    assert states == {"apply_temperature": "passed", "apply_top_k": "failed", "apply_min_p": "passed"}


def test_the_solution_is_nobodys_progress(progress: Path, graded: Callable[..., list[object]]) -> None:
    graded(exercise("apply_temperature", 4))
    invoke("m1", "--impl", str(MILESTONES["m1"].folder / "solution.py"))
    assert not progress.exists()


def test_answers_in_the_repository_are_named_from_there(progress: Path) -> None:
    milestone = MILESTONES["m1"]
    record(milestone, milestone.exercise_file, [exercise("apply_top_k", 0, "not started")], progress)
    assert load_progress(progress)["m1"]["apply_top_k"].file == "milestones/m1_engine/exercise.py"


def test_results_are_forgotten_on_demand(progress: Path, answers: Path, graded: Callable[..., list[object]]) -> None:
    assert "Deleted 0 results" in invoke("--reset").output
    graded(exercise("apply_temperature", 4), exercise("causal_mask", 4), exercise("left_pad", 4))
    invoke("m0", "--impl", str(answers))
    invoke("m1", "--impl", str(answers))
    assert "Deleted 1 result. Your answers are unchanged." in invoke("m1", "--reset").output
    assert list(load_progress(progress)) == ["m0"]
    assert "Deleted 2 results" in invoke("--reset").output
    assert not progress.exists() and answers.read_text(encoding="utf-8") == RIGHT
    assert invoke("--reset", "--hint", "causal_mask").exit_code == 2


# --- the page ---------------------------------------------------------------------------------------------


def test_every_milestone_and_every_exercise_is_on_the_page() -> None:
    page = invoke()
    assert page.exit_code == 0
    for name, milestone in MILESTONES.items():
        *marks, passed, _tried, left = marks_of(page.output, name)
        assert len(marks) == len(milestone.exercises()) == int(left) if not milestone.written() else True
        assert passed == "-"
    total = sum(len(m.exercises()) for m in MILESTONES.values())
    assert f"0 of {total} pass" in page.output
    assert max(map(len, page.output.splitlines())) <= 80


def test_marks_and_counts_say_how_it_went(answers: Path, graded: Callable[..., list[object]]) -> None:
    graded(exercise("apply_temperature", 4), exercise("apply_top_k", 2), exercise("apply_min_p", 0, "not started"))
    invoke("m1", "--impl", str(answers))
    page = invoke().output
    # penalty, temperature, min_p, top_k, top_p, check_stop, TextStream, StopStrings
    assert marks_of(page, "m1") == ["·", "■", "·", "x", *["·"] * 4, "1", "1", "6"]
    assert "■ passes" in page and "x fails" in page and "▣" not in page
    answers.write_text(RIGHT + "\n# more\n", encoding="utf-8")
    page = invoke().output
    assert marks_of(page, "m1")[1] == "▣" and "▣ passed, changed since" in flat(page)
    assert "changed since the last check: m1. Check: folovllm grade all" in flat(page)
    answers.write_text(RIGHT, encoding="utf-8")
    assert marks_of(invoke().output, "m1")[1] == "■"  # as it was when it passed


def test_an_answer_that_was_never_checked_is_shown_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = MILESTONES["m1"].exercise_file.read_text(encoding="utf-8")
    raises = '    raise NotImplementedError("apply_temperature")'
    assert raises in source
    file = tmp_path / "exercise.py"
    file.write_text(source.replace(raises, "    return logits / temperature"), encoding="utf-8")
    monkeypatch.setattr(Milestone, "exercise_file", property(lambda self: file))
    milestone = MILESTONES["m1"]
    assert milestone.written() == ["apply_temperature"]
    states = {s.name: s.state for s in exercise_states(milestone, {})}
    assert {name for name, state in states.items() if state == "written, not checked"} == {"apply_temperature"}
    file.write_text("def (", encoding="utf-8")
    assert milestone.written() == milestone.exercises()


def test_what_comes_next_is_the_first_that_is_not_done(
    answers: Path, monkeypatch: pytest.MonkeyPatch, graded: Callable[..., list[object]]
) -> None:
    monkeypatch.setattr(command, "find_milestones", lambda: {"m1": MILESTONES["m1"]})
    first = flat(invoke(columns=120).output)
    line = source_line(MILESTONES["m1"].exercise_file, "apply_repetition_penalty")
    assert "Next: apply_repetition_penalty of m1" in first and f"exercise.py, line {line}" in first
    assert "folovllm grade m1 --only apply_repetition_penalty hint folovllm grade m1 --hint apply_rep" in first
    assert "02_engine.md" in first
    graded(exercise("apply_repetition_penalty", 4), exercise("apply_temperature", 1))
    invoke("m1", "--impl", str(answers))
    second = flat(invoke(columns=200).output)
    assert "Next: apply_temperature of m1, 1 of 4 checks passed" in second
    assert f"{answers}, line 1" in second and f"--only apply_temperature --impl {answers}" in second


def source_line(file: Path, name: str) -> int:
    return next(i for i, text in enumerate(file.read_text("utf-8").splitlines(), 1) if text.startswith(f"def {name}("))


def test_optional_exercises_come_last_and_then_the_museum(
    answers: Path, monkeypatch: pytest.MonkeyPatch, graded: Callable[..., list[object]]
) -> None:
    milestone = MILESTONES["m0"]
    monkeypatch.setattr(command, "find_milestones", lambda: {"m0": milestone})
    names = milestone.exercises()
    assert milestone.optional() == names[-1:] == ["generate_greedy"]
    graded(*(exercise(name, 4) for name in names[:-1]))
    invoke("m0", "--impl", str(answers))
    page = invoke().output
    assert marks_of(page, "m0")[-4] == "(·)" and "Next: generate_greedy of m0, optional" in flat(page)
    graded(exercise("generate_greedy", 4))
    invoke("m0", "--impl", str(answers))
    page = invoke().output
    assert "Next:" not in page and "folovllm museum" in page


def test_optional_on_the_page_is_optional_in_the_checks() -> None:
    for milestone in MILESTONES.values():
        tests = (milestone.folder / "test_exercise.py").read_text(encoding="utf-8")
        assert milestone.optional() == re.findall(r'exercise\("(\w+)", optional=True\)', tests)


def test_all_checks_what_is_new_and_nothing_else(
    answers: Path, monkeypatch: pytest.MonkeyPatch, graded: Callable[..., list[object]]
) -> None:
    monkeypatch.setattr(Milestone, "written", lambda self, file=None: [])
    runs = graded(exercise("apply_temperature", 4), exercise("causal_mask", 4))
    assert invoke("all").exit_code == 0 and runs == []  # nobody has begun
    invoke("m0", "--impl", str(answers))
    other = answers.with_name("other.py")
    other.write_text(RIGHT, encoding="utf-8")
    invoke("m1", "--impl", str(other))
    runs.clear()
    assert invoke("all").exit_code == 0 and runs == []  # nothing is new
    other.write_text(RIGHT * 2, encoding="utf-8")
    result = invoke("all")
    assert [run[:2] for run in runs] == [("m1", "other.py")] and "apply_temperature" in runs[0][2]
    assert marks_of(result.output, "m1")[1] == "■" and "▣" not in result.output
    graded(not_loaded=Check("", "raised", "SyntaxError: invalid syntax", 1, "def ("))
    other.write_text("def (", encoding="utf-8")
    result = invoke("all")
    assert "other.py cannot be loaded" in flat(result.output) and "▣" in result.output


def test_a_file_that_is_gone_is_no_crash(answers: Path, graded: Callable[..., list[object]]) -> None:
    runs = graded(exercise("apply_temperature", 4), exercise("apply_top_k", 1))
    invoke("m1", "--impl", str(answers))
    answers.unlink()
    runs.clear()
    assert marks_of(invoke("all").output, "m1")[1] == "▣" and runs == []


def test_results_of_exercises_that_are_no_more_are_left_alone(progress: Path) -> None:
    result = Result("passed", 1, 1, "a.py", "0")
    known: Progress = {"m1": {"gone": result}, "m9": {"x": result}}
    save_progress(known, progress)
    page = invoke()
    assert page.exit_code == 0 and "gone" not in page.output and "m9" not in page.output
    assert load_progress(progress) == known
