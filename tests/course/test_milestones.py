"""The milestone pages and their exercises: what they say is so, what they tell a reader to run runs."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig
from typer.testing import CliRunner

from folovllm.course.grading import command
from folovllm.course.grading.runner import Milestone, Report, find_milestones, run_checks
from folovllm.course.lessons.formulas import (
    attention_flops_per_token,
    attention_ratio,
    linear_params,
    linear_ratio,
)
from folovllm.entrypoints.cli import app
from folovllm.kv_cache.formulas import kv_bytes, kv_bytes_per_token

ROOT = Path(__file__).resolve().parents[2]
MILESTONES = find_milestones()
each_milestone = pytest.mark.parametrize("milestone", MILESTONES.values(), ids=MILESTONES)

SECTIONS = [
    "What it adds, and why",
    "Files, in reading order",
    "Run it",
    "Measured result",
    "Exercises",
    "Checklist",
    "Self-check",
    "Further reading",
]


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{file.parent.name}_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def section(page: str, title: str) -> str:
    return re.split(r"^## ", page.partition(f"\n## {title}\n")[2], flags=re.MULTILINE)[0]


# --- exercises --------------------------------------------------------------------------------------------


def has_answers(milestone: Milestone) -> bool:
    """Whether a learner has changed the exercise file since it was committed."""
    diff = ["git", "diff", "--quiet", "HEAD", "--", str(milestone.exercise_file)]
    return subprocess.run(diff, cwd=ROOT, capture_output=True).returncode == 1


@functools.cache
def graded(name: str, file: str) -> Report:
    """The report on a milestone's `solution.py` or `exercise.py`."""
    return run_checks(MILESTONES[name], MILESTONES[name].folder / file)


@pytest.mark.slow
@each_milestone
def test_the_solution_passes(milestone: Milestone) -> None:
    report = graded(milestone.name, "solution.py")
    failures = {e.name: e.first_failure for e in report.exercises if e.status != "passed"}
    assert failures == {} and report.all_passed
    assert [e.name for e in report.exercises] == milestone.exercises()


@pytest.mark.slow
@each_milestone
def test_the_untouched_exercises_fail(milestone: Milestone) -> None:
    if has_answers(milestone):
        pytest.skip("somebody has written answers in it")
    assert milestone.written() == []
    report = graded(milestone.name, "exercise.py")
    assert {e.name: e.status for e in report.exercises} == dict.fromkeys(milestone.exercises(), "not started")
    assert all(check.kind == "not started" for e in report.exercises for check in e.checks)
    assert not report.all_passed


@each_milestone
def test_a_solution_has_the_tasks_signature(milestone: Milestone) -> None:
    task, solution = load(milestone.exercise_file), load(milestone.folder / "solution.py")
    for name in milestone.exercises():
        asked, answered = getattr(task, name), getattr(solution, name)
        pairs = [(asked, answered)]
        if inspect.isclass(asked):
            methods = [m for m in vars(asked) if inspect.isfunction(getattr(asked, m))]
            pairs = [(getattr(asked, m), getattr(answered, m)) for m in methods]
        for a, b in pairs:
            a, b = getattr(a, "fn", a), getattr(b, "fn", b)  # what `triton.jit` has wrapped
            assert inspect.signature(a) == inspect.signature(b), name
        assert len(inspect.getdoc(asked) or "") > 200, f"the docstring of {name} has to state the whole task"


@each_milestone
def test_a_solution_is_a_little_implementation_of_its_own(milestone: Milestone) -> None:
    tree = ast.parse((milestone.folder / "solution.py").read_text(encoding="utf-8"))
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    imported |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    imported -= {"folovllm.course.grading.no_triton"}  # where there is no Triton: what refuses to be launched
    assert {name.partition(".")[0] for name in imported if name} <= {
        "__future__",
        "collections",
        "torch",
        "transformers",
        "triton",
    }


@each_milestone
def test_the_files_that_solutions_point_to_hold_what_they_name(milestone: Milestone) -> None:
    source = (milestone.folder / "solution.py").read_text(encoding="utf-8")
    paths = re.findall(r"folovllm/[\w/]+\.py", source)
    assert len(paths) >= 4
    assert [path for path in paths if not (ROOT / path).is_file()] == []
    # `name` beside a path names something in that file
    named = re.findall(r"`(\w+)` in (folovllm/[\w/]+\.py)", source)
    named += [(name, path) for path, name in re.findall(r"(folovllm/[\w/]+\.py): `(\w+)`", source)]
    assert named
    lost = [(n, path) for n, path in named if not re.search(rf"(def|class) {n}\b", (ROOT / path).read_text("utf-8"))]
    assert lost == []


# --- pages ------------------------------------------------------------------------------------------------


@each_milestone
def test_a_page_has_its_sections(milestone: Milestone) -> None:
    assert re.findall(r"^## (.*)$", milestone.readme, re.MULTILINE) == SECTIONS
    assert milestone.title.startswith(f"{milestone.folder.name.partition('_')[0].upper()}: ")


@each_milestone
def test_every_exercise_is_described_and_has_a_folded_hint(milestone: Milestone) -> None:
    assert milestone.exercises()
    for name in milestone.exercises():
        text = milestone.readme.partition(f"### `{name}`\n\n")[2]
        assert re.match(r"\S.*\.\n\n<details>\n<summary>Hint</summary>\n\n", text), name
        assert len(milestone.hint(name)) > 60
        assert "<" not in re.sub(r"`[^`]*`", "", milestone.hint(name)), "HTML would show in the terminal"


def test_every_exercise_leads_to_its_chapter() -> None:
    led_to = {e: [file.name for file in m.chapters(e)] for m in MILESTONES.values() for e in m.exercises()}
    assert all(len(names) == 1 for names in led_to.values())
    assert led_to["linear_flops"] == ["00_two_workloads.md"] and led_to["causal_mask"] == ["01_kv_cache.md"]


@each_milestone
def test_every_question_has_a_folded_answer(milestone: Milestone) -> None:
    part = section(milestone.readme, "Self-check")
    # GitHub renders Markdown inside <details> only after an empty line.
    answers = re.findall(r"<details>\n<summary>([^<]+\?)[^<]*</summary>\n\n(.+?)\n\n</details>", part, re.DOTALL)
    assert part.count("<details>") == part.count("</details>") == len(answers)
    assert 5 <= len(answers) <= 7
    assert all(len(answer) > 150 for _, answer in answers)


@each_milestone
def test_files_to_read_are_linked_and_exist(milestone: Milestone) -> None:
    # That links arrive is checked for every page in test_docs.py.
    part = section(milestone.readme, "Files, in reading order")
    numbers = re.findall(r"^(\d+)\. \[", part, re.MULTILINE)
    assert numbers == [str(i + 1) for i in range(len(numbers))] and len(numbers) >= 5
    named = re.findall(r"\[`([^`]+)`\]\(([^)]+)\)", part)
    assert [name for name, link in named if not link.endswith(name)] == []


@each_milestone
def test_results_that_are_cited_are_there(milestone: Milestone) -> None:
    part = section(milestone.readme, "Measured result")
    cited = re.findall(r"^<!-- result: ([\w.-]+) -->$", part, re.MULTILINE)
    for name in cited:
        file = ROOT / "results" / f"{name}.json"
        command_line = json.loads(file.read_text(encoding="utf-8"))["command"]
        assert f"`{command_line}`" in " ".join(part.split()) and f"results/{name}.json" in part
    assert cited or "make bench" in part


def test_the_numbers_in_the_pages_follow_from_the_formulas() -> None:
    m0 = " ".join(re.sub(r"<!-- /?claim.*?-->", "", MILESTONES["m0"].readme).split())
    llama = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    layer = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=1, num_attention_heads=32)
    linear, attention = 2 * linear_params(layer), attention_flops_per_token(layer, 1000)
    share, halved = 100 * attention / (linear + attention), 100 * attention / (2 * linear + attention)
    derived = [
        f"(n+1)/2 = {linear_ratio(100)} times",
        f"(2n+1)/3 = {attention_ratio(100):.0f} times",
        f"{kv_bytes_per_token(llama, 2):,} bytes = {kv_bytes_per_token(llama, 2) // 2**10} KiB per token",
        f"{kv_bytes(llama, 1000, 2) // 2**20} MiB",
        f"{kv_bytes(llama, 500, 2, 10) / 2**30:.2f} GiB",
        f"= {linear / 1e6:.1f} million FLOPs per token",
        f"At n = 1000 that is {attention / 1e6:.1f} million, {share:.1f} % of the whole",
        f"or {halved:.1f} % if the kernel skips",
        f"equal at {linear / (attention / 1000):,.0f} keys",
    ]
    assert [text for text in derived if text not in m0] == []


# --- commands ---------------------------------------------------------------------------------------------


def commands() -> list[tuple[str, str]]:
    blocks = [
        (m.name, block) for m in MILESTONES.values() for block in re.findall(r"```bash\n(.*?)```", m.readme, re.DOTALL)
    ]
    return [(name, line) for name, block in blocks for line in block.splitlines()]


def test_pages_show_commands() -> None:
    for name in MILESTONES:
        shown = [line for owner, line in commands() if owner == name]
        assert len(shown) >= 6 and f"folovllm grade {name}" in shown


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small models on a busy machine: threads that wait for each other take many times as long as one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("milestone", "line"), commands())
def test_a_command_of_a_page_runs(
    milestone: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In a folder of its own, because a command may write files, and in this process, which has loaded torch.
    monkeypatch.chdir(tmp_path)
    for name in ("examples", "milestones"):
        (tmp_path / name).symlink_to(ROOT / name, target_is_directory=True)
    # The files that grading commands grade have been graded above.
    monkeypatch.setattr(command, "run_checks", lambda m, path, *_: graded(m.name, path.name))
    program, *args = shlex.split(line)
    if program == "python":
        if "m4_inference" in args[0]:
            args += ["--rounds", "1"]  # the last one counts
        monkeypatch.setattr(sys, "argv", args)
        runpy.run_path(args[0], run_name="__main__")
        assert "tokens" in capsys.readouterr().out
        return
    assert program == "folovllm"
    result = CliRunner().invoke(app, args, env={"COLUMNS": "100", "TERM": "dumb"})
    own_answers = args[0] == "grade" and not {"--impl", "--hint"} & set(args)
    allowed = {0, 1} if own_answers and has_answers(MILESTONES[milestone]) else {int(own_answers)}
    assert result.exit_code in allowed, result.output
    if "--trace" in args:
        assert (tmp_path / "trace.json").is_file()
