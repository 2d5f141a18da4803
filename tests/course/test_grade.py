"""The grader: it catches wrong answers, says so in plain words, and survives whatever an answer does."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from folovllm.course.grading import command, runner
from folovllm.course.grading.checks import Call, WrongAnswer, difference
from folovllm.course.grading.runner import (
    Exercise,
    Milestone,
    Report,
    environment,
    find_milestones,
    pytest_arguments,
    read_log,
    run_checks,
)
from folovllm.entrypoints.cli import app
from tests.course.wrong_answers import ALIASES, WRONG_ANSWERS

MILESTONES = find_milestones()


def invoke(*args: str, columns: int = 80) -> Result:
    return CliRunner().invoke(app, ["grade", *args], env={"COLUMNS": str(columns), "TERM": "dumb", "NO_COLOR": "1"})


def flat(text: str) -> str:
    """Output without the line breaks and borders that a terminal's width puts in."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


# --- wrong answers ----------------------------------------------------------------------------------------

# One process for all rounds of a milestone: it loads torch once. Round i has the i-th wrong answer to each exercise.
ROUNDS = "import json, sys, pytest\nfor arguments in json.load(sys.stdin): pytest.main(arguments)"
RAISING = {"None is no number", "no more than the vocabulary"}
CASES = [(m, e, name) for m, exercises in WRONG_ANSWERS.items() for e, answers in exercises.items() for name in answers]


RIGHT = "the right answer"  # the last round: what is wrong with the others is the answers, not the rounds
Graded = dict[tuple[str, str, str], Exercise]


def run_rounds(folder: Path, name: str) -> Graded:
    """Every wrong answer to the exercises of a milestone, graded, and at last the right ones."""
    milestone, wrong = MILESTONES[name], WRONG_ANSWERS[name]
    solution = (milestone.folder / "solution.py").read_text(encoding="utf-8") + "\nREPLACEMENT = chr(0xFFFD)\n"
    solution += "".join(f"{alias} = {right}\n" for alias, right in ALIASES[name].items())
    rounds: list[dict[str, str]] = []  # per round, exercise -> name of the answer
    for i in range(max(map(len, wrong.values()))):
        rounds.append({exercise: list(answers)[i] for exercise, answers in wrong.items() if i < len(answers)})
    rounds.append(dict.fromkeys(wrong, RIGHT))
    runs = []
    for i, chosen in enumerate(rounds):
        code = [wrong[exercise].get(answer, "") for exercise, answer in chosen.items()]
        impl = folder / f"{name}_{i}.py"
        impl.write_text(solution + "".join(map(textwrap.dedent, code)), encoding="utf-8")
        options = [f"--impl={impl}", f"--grade-log={impl.with_suffix('.jsonl')}", "--timeout=60"]
        runs.append([*pytest_arguments(milestone), *options, *(f"--only={exercise}" for exercise in chosen)])
    done = subprocess.run(
        [sys.executable, "-c", ROUNDS], input=json.dumps(runs), env=environment(), capture_output=True, text=True,
        timeout=280,
    )  # fmt: skip
    found: Graded = {}
    for i, chosen in enumerate(rounds):
        log = folder / f"{name}_{i}.jsonl"
        assert log.exists(), done.stdout + done.stderr
        report = read_log([json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()], "?")
        found |= {(name, exercise.name, chosen[exercise.name]): exercise for exercise in report.exercises}
    return found


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Graded]:
    """From a milestone to what its rounds gave. The first test of each runs them."""
    folder = tmp_path_factory.mktemp("answers")
    return functools.cache(lambda name: run_rounds(folder, name))


@pytest.mark.slow
@pytest.mark.parametrize("milestone", WRONG_ANSWERS)
def test_the_right_answers_pass_in_the_same_rounds(graded: Callable[[str], Graded], milestone: str) -> None:
    right = {key: exercise for key, exercise in graded(milestone).items() if key[2] == RIGHT}
    assert len(right) == len(WRONG_ANSWERS[milestone])
    assert {key: exercise.status for key, exercise in right.items()} == dict.fromkeys(right, "passed")


@pytest.mark.slow
@pytest.mark.parametrize(("milestone", "exercise", "answer"), CASES, ids=lambda value: value.replace(" ", "-"))
def test_a_wrong_answer_is_caught(graded: Callable[[str], Graded], milestone: str, exercise: str, answer: str) -> None:
    result = graded(milestone)[milestone, exercise, answer]
    assert result.status == "failed"
    failure = result.first_failure
    # A wrong answer should not fail for what it does not get wrong: only those that raise may show an exception.
    assert failure is not None and failure.kind == ("raised" if answer in RAISING else "wrong")
    assert failure.message and failure.title.endswith(".")


def test_every_exercise_has_two_wrong_answers() -> None:
    for name, wrong in WRONG_ANSWERS.items():
        assert list(wrong) == MILESTONES[name].exercises()
        assert all(len(answers) >= 2 for answers in wrong.values())


@pytest.mark.slow
def test_a_wrong_answer_is_explained(graded: Callable[[str], Graded]) -> None:
    failure = graded("m0")["m0", "causal_mask", "a decode row that sees only itself"].first_failure
    assert failure is not None
    assert failure.title == "A decode step has one row, and it is all True."
    assert failure.message == (
        "causal_mask(4, 1)\nreturned  [F F F F T]\nexpected  [T T T T T]\n"
        "First difference at [0, 0]: F, it should be T.\n"
        "The newest token stands at position 4: it sees the 4 cached tokens and itself."
    )
    stops = graded("m1")["m1", "StopStrings", "cut too late"].first_failure
    assert stops is not None
    assert "StopStrings(['</a>'])\nfeed('one ') returned 'one '\nfeed('two<') returned 'two<'" in stops.message
    fourth = graded("m3")["m3", "BlockManager", "the fourth to share is not counted"].first_failure
    assert fourth is not None and fourth.title.startswith("Any operations in any order")
    assert "pool = BlockManager(1, 1)\npool.allocate('a', 1)\npool.fork(" in fourth.message
    assert "ref_count(1) is 3; it should be 4" in fourth.message


@pytest.mark.slow
def test_a_long_check_is_left_out_where_a_plain_one_fails(graded: Callable[[str], Graded]) -> None:
    checks = graded("m3")["m3", "BlockManager", "no copy on write"].checks
    assert checks[-4].title.startswith("Any operations in any order")
    assert {check.kind for check in checks[-4:]} == {"skipped"} != {check.kind for check in checks[:-4]}


# --- whatever an answer does ------------------------------------------------------------------------------


def answers(folder: Path, **replaced: str) -> Path:
    """A file with m1's exercises, some of them written: the code of a body for each name."""
    text = (MILESTONES["m1"].folder / "solution.py").read_text(encoding="utf-8")
    for name, body in replaced.items():
        arguments = "logits, value" if name != "check_stop" else "*args, **kwargs"
        text += f"\n\ndef {name}({arguments}):\n" + textwrap.indent(textwrap.dedent(body).strip(), "    ") + "\n"
    file = folder / "my_file.py"
    file.write_text(text, encoding="utf-8")
    return file


def test_loops_without_end_are_stopped(tmp_path: Path) -> None:
    file = answers(
        tmp_path,
        apply_temperature="while True:\n    pass",
        # Only for longer rows, which only hypothesis draws.
        apply_top_k="""
            while len(logits) > 4:
                pass
            return logits.masked_fill(logits < sorted(logits.tolist())[-min(value, len(logits))], -float("inf"))
        """,
    )
    only = ["apply_temperature", "apply_top_k", "check_stop"]
    report = run_checks(MILESTONES["m1"], file, only, time_limit=2)
    temperature, top_k, stop = report.exercises
    assert [check.kind for check in temperature.checks] == ["too slow", "skipped", "skipped", "skipped"]
    assert temperature.checks[0].message == "stopped after 2 seconds"
    assert [check.kind for check in top_k.checks] == ["passed"] * 3 + ["too slow", "skipped", "skipped"]
    assert stop.status == "passed"  # the run goes on
    text = flat(render(report, file))
    assert "Your answer was stopped after 2 seconds. Is there an infinite loop?" in text
    assert "my_file.py, line" in text


def test_a_loop_that_catches_everything_is_ended(tmp_path: Path) -> None:
    loop = "while True:\n    try:\n        while True:\n            value = value\n    except:\n        pass"
    file = answers(tmp_path, apply_min_p=loop)
    report = run_checks(MILESTONES["m1"], file, ["apply_temperature", "apply_min_p", "check_stop"], time_limit=1)
    assert [e.status for e in report.exercises] == ["passed", "failed", "not reached"]
    assert report.exercises[1].checks[0].kind == "too slow"


def render(report: Report, file: Path, columns: int = 80) -> str:
    console = command.Console(width=columns, color_system=None)
    with console.capture() as capture:
        console.print(command.report_view(MILESTONES["m1"], file, report))
    return capture.get()


def test_a_crash_ends_the_run_and_is_named(tmp_path: Path) -> None:
    file = answers(tmp_path, apply_min_p="import os\nos._exit(7)")
    report = run_checks(MILESTONES["m1"], file, ["apply_temperature", "apply_min_p", "check_stop"])
    assert [e.status for e in report.exercises] == ["passed", "failed", "not reached"]
    failure = report.exercises[1].first_failure
    assert failure is not None and failure.kind == "crashed" and "Python ended with status 7" in failure.message


def test_an_exception_shows_the_line_and_what_was_printed(tmp_path: Path) -> None:
    file = answers(tmp_path, apply_top_k="print('k is', value)\nreturn logits[value + 100]")
    report = run_checks(MILESTONES["m1"], file, ["apply_top_k"])
    text = render(report, file)
    assert "IndexError: index 102 is out of bounds" in flat(text)
    assert "return logits[value + 100]" in text and "k is 2" in text
    line = next(n for n, source in enumerate(file.read_text().splitlines(), 1) if "value + 100" in source)
    assert f"my_file.py, line {line}" in text


@pytest.mark.parametrize("columns", [80, 120])
def test_the_report_fits_the_terminal(tmp_path: Path, columns: int) -> None:
    checks = [runner.Check("A long sentence about what is checked, " * 4, "wrong", "x" * 300 + "\nreturned  1", 3, "y")]
    report = Report([Exercise("apply_repetition_penalty", True, checks)])
    assert all(len(line) <= columns for line in render(report, tmp_path / "a.py", columns).splitlines())


def test_a_file_that_cannot_be_imported(tmp_path: Path) -> None:
    file = tmp_path / "my_file.py"
    file.write_text("import torch\n\nlimit = undefined + 1\n")
    result = invoke("m1", "--impl", str(file))
    assert result.exit_code == 1
    assert "my_file.py cannot be loaded" in result.output and "name 'undefined' is not defined" in flat(result.output)
    assert "my_file.py, line 3" in flat(result.output) and "limit = undefined + 1" in result.output


@pytest.mark.parametrize(
    ("milestone", "source", "says"),
    [
        ("m2", "class PriorityQueue:\n    def add(self, request_id, priority): ...\n", "`add` is `add_request`"),
        (
            "m4",
            "def split_budget(running, waiting, budget, longest_piece=0): ...\n",
            "`longest_piece` is `long_prefill_token_threshold`",
        ),
    ],
)
def test_a_saved_answer_with_an_old_name_is_told_the_new_one(
    tmp_path: Path, milestone: str, source: str, says: str
) -> None:
    file = tmp_path / "answers.py"
    file.write_text(source)
    report = run_checks(MILESTONES[milestone], file)
    assert report.not_loaded is not None and says in report.not_loaded.message and not report.exercises


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def f(:\n    pass\n", ["SyntaxError: invalid syntax", "my_file.py, line 1", "def f(:", "^"]),
        ("x = 1\n  y = 2\n", ["IndentationError: unexpected indent", "my_file.py, line 2"]),
        ("x = 1\nreturn x\n", ["SyntaxError: 'return' outside function", "line 2", "return x"]),
        ("x = '\0'\n", ["null bytes"]),
    ],
)
def test_a_syntax_error_is_shown_as_such(tmp_path: Path, source: str, words: list[str]) -> None:
    file = tmp_path / "my_file.py"
    file.write_text(source)
    result = invoke("m1", "--impl", str(file))
    assert result.exit_code == 1
    assert "my_file.py cannot be loaded" in result.output
    assert all(word in flat(result.output) for word in words), result.output


def test_an_answer_in_another_file_may_be_the_only_one(tmp_path: Path) -> None:
    file = tmp_path / "one.py"
    file.write_text(
        "def apply_temperature(logits, temperature):\n"
        "    if temperature <= 0:\n        raise ValueError\n    return logits / temperature\n"
    )
    result = invoke("m1", "--impl", str(file), "--only", "apply_temperature", "--only", "apply_top_k")
    assert result.exit_code == 1
    assert re.search(r"apply_temperature +passed +4/4", result.output)
    assert re.search(r"apply_top_k +not started +0/6", result.output)
    assert "1 of 2 exercises pass" in result.output
    assert "Read: " in result.output and "02_engine.md" in flat(result.output)
    assert "Hint: folovllm grade m1 --hint apply_top_k" in flat(result.output)


# --- the command ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["m9"], "milestone='m9' has no exercises; allowed: m0, m1, m2, m3, m3-kernels, m4, m4-latency-target"),
        (["m1", "--impl", "nowhere.py"], "nowhere.py' is not an existing Python file"),
        (["m1", "--impl", "milestones"], "is not an existing Python file"),
        (["m1", "--only", "nothing"], "m1 has no exercise 'nothing'; allowed: apply_repetition_penalty"),
        (["m0", "--hint", "nothing"], "m0 has no exercise 'nothing'; allowed: linear_flops"),
        (["m1", "--time-limit", "0"], "time_limit=0.0 is not valid; allowed: seconds > 0"),
        (["m1", "--time-limit", "nan"], "time_limit=nan is not valid"),
        (
            ["--hint", "causal_mask"],
            "--impl, --only and --hint need a milestone; allowed: m0, m1, m2, m3, m3-kernels, m4, m4-latency-target",
        ),
    ],
)
def test_a_mistake_is_one_line_and_status_2(args: list[str], words: str) -> None:
    result = invoke(*args, columns=200)
    assert result.exit_code == 2, result.output
    assert words in flat(result.output) and result.output.startswith("error: ")


def test_a_hint_is_shown_only_when_asked_for() -> None:
    result = invoke("M1_engine", "--hint", "apply_top_p")
    assert result.exit_code == 0
    assert "Sort the probabilities" in flat(result.output) and "set(token_ids)" not in result.output


def test_without_the_repository_it_says_where_the_exercises_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "find_milestones", lambda: find_milestones(tmp_path))
    result = invoke("m1")
    assert result.exit_code == 2
    assert 'Clone the repository and run `pip install -e ".[test]"` in it' in flat(result.output)


def test_without_pytest_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "find_spec", lambda name: None if name == "pytest" else object())
    result = invoke("m1")
    assert result.exit_code == 2
    assert flat(result.output).startswith("error: grading needs pytest, which is not installed")
    assert 'pip install -e ".[test]"' in flat(result.output)


def copy_of(folder: Path, exercise: str, monkeypatch: pytest.MonkeyPatch) -> Milestone:
    """m1 with another exercise file, as the only milestone."""
    monkeypatch.setattr(Milestone, "exercise_file", property(lambda self: folder / "exercise.py"))
    (folder / "exercise.py").write_text(exercise, encoding="utf-8")
    milestone = MILESTONES["m1"]
    monkeypatch.setattr(command, "find_milestones", lambda: {"m1": milestone})
    return milestone


@pytest.mark.slow
def test_all_milestones_with_new_answers_are_graded_for_the_overview(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    untouched = (MILESTONES["m1"].folder / "solution.py").with_name("exercise.py").read_text(encoding="utf-8")
    raises = '    raise NotImplementedError("apply_temperature")'
    assert raises in untouched
    written = "    if temperature <= 0:\n        raise ValueError\n    return logits / temperature"
    copy_of(tmp_path, untouched.replace(raises, written), monkeypatch)
    assert "? not checked" in flat(invoke().output)
    result = invoke("all")
    assert result.exit_code == 0
    assert "an engine" in result.output and "1 of 8 pass" in result.output


def test_the_overview_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "run_checks", lambda *_: pytest.fail("the checks were run"))
    template = "def {0}():\n    '''What to do.'''\n    raise NotImplementedError('{0}')\n"
    copy_of(tmp_path, "".join(template.format(name) for name in MILESTONES["m1"].exercises()), monkeypatch)
    for args in ((), ("all",)):
        result = invoke(*args)
        assert result.exit_code == 0 and "0 of 8 pass" in result.output


# --- plain words ------------------------------------------------------------------------------------------


def returns(value: object) -> Call:
    def answer(x: int) -> object:
        return value

    return Call(answer, 5)


@pytest.mark.parametrize(
    ("got", "want", "words"),
    [
        (3, 4, ["answer(5)", "returned  3", "expected  4"]),
        (None, 4, ["returned  None", "Is there a `return`?"]),
        (12_287, 12_288, ["returned  12,287", "expected  12,288"]),
        (0.5, 0.25, ["returned  0.5", "expected  0.25"]),
        ([1, 0], torch.tensor([1, 0]), ["A tensor was expected, not a list."]),
        (torch.tensor([1]), 1, ["A plain int was expected, not a tensor."]),
        (torch.zeros(2), torch.zeros(3), ["The shape is [2], it should be [3]."]),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int64), ["The dtype is torch.float32, it should be torch.int64."]),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, -float("inf")]), ["[1 -inf]", "at [1]: 2, it should be -inf"]),
        (torch.eye(2) > 0, torch.ones(2, 2) > 0, ["returned  [T F]\n          [F T]", "at [0, 1]: F, it should be T"]),
        ((1, 2), (1, 3), ["Value 2 of 2 differs."]),
        ((1,), (1, 3), ["2 values were expected."]),
    ],
)
def test_a_difference_in_plain_words(got: object, want: object, words: list[str]) -> None:
    with pytest.raises(WrongAnswer) as error:
        returns(got).must_return(want, "Because.")
    assert all(word in str(error.value) for word in words), str(error.value)
    assert str(error.value).endswith("Because.")


def test_equal_is_equal() -> None:
    for value in (3, 0.1 + 0.2, "a", (1, torch.ones(2)), torch.tensor([1.0, -float("inf")])):
        returns(value).must_return(value)
    assert difference(0.30000000001, 0.3) is None
    assert difference([1, 2], (1, 2)) is None


def test_a_refusal_has_to_come() -> None:
    def refuses(x: int) -> None:
        raise ValueError

    Call(refuses, 5).must_refuse("")
    with pytest.raises(WrongAnswer, match="expected  a ValueError"):
        returns(3).must_refuse("5 is odd.")
    with pytest.raises(WrongAnswer, match="2 tensors were expected"):
        returns(torch.zeros(1)).must_be_tensors([[1], [1]], torch.float32)
    with pytest.raises(WrongAnswer, match=r"Value 2 of 2: The shape is \[1\]"):
        returns((torch.zeros(1), torch.zeros(1))).must_be_tensors([[1], [2]], torch.float32)
