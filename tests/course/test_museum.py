"""The bug museum: every exhibit is one line of the engine as it is, and the verdicts are what they say."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from folovllm.course.grading import museum, museum_command, trials
from folovllm.course.grading.museum import ROOT, Exhibit, choose_exhibit, load_exhibits
from folovllm.course.grading.trials import Hunt, Job, Outcome, Ran, Trial, hunt, read_report, run_jobs, try_test
from folovllm.entrypoints.cli import app

EXHIBITS = load_exhibits()
each_exhibit = pytest.mark.parametrize("exhibit", EXHIBITS.values(), ids=EXHIBITS)
DETOKENIZER = EXHIBITS["half-a-character"]


# --- the catalogue ----------------------------------------------------------------------------------------------


@each_exhibit
def test_a_mutant_is_the_engine_but_for_one_line_and_compiles(exhibit: Exhibit) -> None:
    source = exhibit.source()
    mutant = exhibit.mutate(source)
    before, after = source.splitlines(), mutant.splitlines()
    assert len(before) == len(after)
    assert [(a, b) for a, b in zip(before, after, strict=True) if a != b] == [(exhibit.old, exhibit.new)]
    assert before[exhibit.line_in(source) - 1] == exhibit.old
    compile(mutant, exhibit.file, "exec")
    assert ast.dump(ast.parse(mutant)) != ast.dump(ast.parse(source))


@each_exhibit
def test_an_exhibit_is_labelled(exhibit: Exhibit) -> None:
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", exhibit.id)
    assert exhibit.file.startswith("folovllm/") and exhibit.title and exhibit.topic
    assert min(map(len, (exhibit.symptom, exhibit.seen, exhibit.hint))) > 60
    assert exhibit.killed_by
    for test in exhibit.killed_by:
        path, _, name = test.partition("[")[0].partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


def test_the_museum_has_topics_and_no_two_exhibits_are_one() -> None:
    assert len(EXHIBITS) >= 12
    topics = [exhibit.topic for exhibit in EXHIBITS.values()]
    assert topics == sorted(topics, key=topics.index)  # the exhibits of a topic are together
    assert len({(e.file, e.new) for e in EXHIBITS.values()}) == len(EXHIBITS)


@pytest.mark.parametrize(("source", "times"), [("a\nb\n", 0), ("  x = 1\na\n  x = 1\n", 2), ("x = 1\n", 0)])
def test_a_line_that_is_not_there_exactly_once_is_an_error(source: str, times: int) -> None:
    exhibit = Exhibit("x", "", "", "f.py", "  x = 1", "  x = 2", "", "", "", ())
    with pytest.raises(ValueError, match=rf"exhibit 'x': f\.py has this line {times} times; allowed: once"):
        exhibit.mutate(source)


def test_other_fields_and_other_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the museum is not installed"):
        load_exhibits(tmp_path)
    (tmp_path / "folovllm/course/museum").mkdir(parents=True)
    (tmp_path / "folovllm/course/museum/10_a.toml").write_text('topic = "a"\n[one]\ntitle = "x"\nlevel = "3"\n')
    with pytest.raises(ValueError, match=r"exhibit 'one' has the fields \['level', 'title'\]; allowed: \['file'"):
        load_exhibits(tmp_path)
    text = 'topic = "a"\n[one]\n' + "".join(f'{f} = "x"\n' for f in ("title", "file", "old", "new", "symptom", "seen"))
    for name in ("10_a", "20_b"):
        (tmp_path / f"folovllm/course/museum/{name}.toml").write_text(text + 'hint = "x"\nkilled_by = ["x"]\n')
    with pytest.raises(ValueError, match=r"20_b\.toml: \['one'\] are in another file of the catalogue as well"):
        load_exhibits(tmp_path)
    with pytest.raises(ValueError, match=r"exhibit='nothing' is not in the museum; allowed: first-decode-position"):
        choose_exhibit(EXHIBITS, "nothing")


# --- a small repository, on which everything is fast ---------------------------------------------------------------

PACKAGE = "def double(x):\n    return 2 * x\n"
OURS = """
    import pytest
    from folovllm.a import double

    def test_two():
        assert double(2) == 4

    @pytest.mark.parametrize("x", [0, 3])
    def test_each(x):
        assert double(x) == x + x
"""


def small_exhibit(new: str, *killed_by: str) -> Exhibit:
    tests = killed_by or ("tests/test_a.py::test_each",)
    return Exhibit("small", "", "", "folovllm/a.py", "    return 2 * x", f"    return {new}", "", "", "", tests)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package called folovllm, with one module and one file of tests; and a folder for temporary files."""
    root = tmp_path / "repository"
    files = {
        "folovllm/__init__.py": "",
        "folovllm/a.py": PACKAGE,
        "tests/__init__.py": "",
        "tests/test_a.py": textwrap.dedent(OURS),
        "examples/one.py": "",
        "pyproject.toml": "[tool.pytest.ini_options]\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return root


def tree_of(root: Path) -> dict[str, bytes]:
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def learner(root: Path, text: str) -> Path:
    file = root.parent / "mine.py"
    file.write_text(textwrap.dedent(text))
    return file


LEARNERS = {
    "it looks": ("from folovllm.a import double\ndef test_it():\n    assert double(3) == 6\n", "killed"),
    "it looks away": ("from folovllm.a import double\ndef test_it():\n    assert double(2) == 4\n", "survived"),
    "it raises": ("from folovllm.a import double\ndef test_it():\n    [0][double(3) - 6]\n", "killed"),
    "it is wrong": (
        "from folovllm.a import double\ndef test_it():\n    assert double(3) == 7\n",
        "fails on the correct engine",
    ),
    "no such name": ("from folovllm.a import triple\ndef test_it():\n    pass\n", "did not run"),
    "no such module": ("import nothing_of_that_name\ndef test_it():\n    pass\n", "did not run"),
    "no Python": ("def test_it(:\n", "did not run"),
    "no test": ("from folovllm.a import double\n", "did not run"),
    "skipped": ("import pytest\n@pytest.mark.skip('later')\ndef test_it():\n    pass\n", "did not run"),
    "no fixture": ("def test_it(something):\n    pass\n", "did not run"),
    "it crashes": ("import os\ndef test_it():\n    os._exit(3)\n", "fails on the correct engine"),
    "the mutant crashes": (
        "import os\nfrom folovllm.a import double\ndef test_it():\n    if double(3) != 6:\n        os._exit(3)\n",
        "killed",
    ),
    "one of two": (
        "from folovllm.a import double\ndef test_a():\n    pass\ndef test_b():\n    assert double(3) == 6\n",
        "killed",
    ),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_the_verdict_on_a_learners_test(name: str, repository: Path) -> None:
    text, verdict = LEARNERS[name]
    before = tree_of(repository)
    trial = try_test(small_exhibit("x * x if x == 3 else 2 * x"), learner(repository, text), repository)
    assert trial.verdict == verdict, trial
    words = {
        "it looks": "assert 9 == 6",
        "it is wrong": "test_it: assert 6 == 7",
        "no such name": "ImportError: cannot import name 'triple'",
        "no such module": "ModuleNotFoundError: No module named 'nothing_of_that_name'",
        "no Python": "mine.py, line 1: SyntaxError",
        "no test": "there is no test in the file",
        "skipped": "skipped: later",
        "no fixture": "fixture 'something' not found",
        "it crashes": "Python ended with status 3",
        "the mutant crashes": "Python ended with status 3",
    }
    assert words.get(name, "") in trial.reason
    assert trial.test == {"it looks": "test_it", "it raises": "test_it", "one of two": "test_b"}.get(name, "")
    assert tree_of(repository) == before and not list((repository.parent / "temporary").iterdir())


def test_a_test_without_end_is_stopped(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "TEST_SECONDS", 0.5)
    text = "from folovllm.a import double\ndef test_it():\n    while double(3) != 6:\n        pass\n"
    trial = try_test(small_exhibit("x"), learner(repository, text), repository)
    assert trial.verdict == "killed" and "Timeout" in trial.reason
    text = "def test_it():\n    while True:\n        pass\n"
    trial = try_test(small_exhibit("x"), learner(repository, text), repository)
    assert trial.verdict == "fails on the correct engine" and "Timeout" in trial.reason


def test_a_run_that_cannot_be_stopped_by_itself_is_ended(repository: Path) -> None:
    file = learner(repository, "import time\ndef test_it():\n    time.sleep(60)\n")
    start = time.monotonic()
    (outcome,) = run_jobs([Job(None, (str(file),), seconds=0.5)], root=repository)
    assert outcome.status is None and outcome.broke_off == "the run did not end" and time.monotonic() - start < 20
    assert not list((repository.parent / "temporary").iterdir())


def test_our_tests_against_mutants(repository: Path) -> None:
    both = ("tests/test_a.py::test_two", "tests/test_a.py::test_each")
    exhibits = [small_exhibit("x * x", *both), small_exhibit("x * x"), small_exhibit("2 * x + 0")]
    done: list[int] = []
    failing, (half, killed, survived) = hunt(exhibits, on_done=lambda: done.append(1), root=repository)
    assert failing == [] and len(done) == 4
    assert killed.killed and killed.killers == ["tests.test_a.test_each[3]"] and killed.silent == []
    assert not half.killed and half.silent == [both[0]]  # the other test that is named does fail
    assert not survived.killed and survived.silent == ["tests/test_a.py::test_each"] and survived.killers == []


def test_a_test_that_fails_anyway_kills_nothing(repository: Path) -> None:
    (repository / "tests/test_a.py").write_text("def test_two():\n    assert 0\n")
    failing, (found,) = hunt([small_exhibit("x", "tests/test_a.py::test_two")], root=repository)
    assert [test.name for test in failing] == ["tests.test_a.test_two"] and not found.killed


def test_a_named_test_that_is_gone_is_an_error(repository: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)do not run on the unchanged engine.*not found: .*test_gone"):
        hunt([small_exhibit("x", "tests/test_a.py::test_gone")], root=repository)


def test_a_mutant_that_cannot_be_imported_is_not_killed_by_that(repository: Path) -> None:
    broken = Exhibit("b", "", "", "folovllm/a.py", "def double(x):", "def triple(x):", "", "", "", ("tests/test_a.py",))
    _, (found,) = hunt([broken], root=repository)
    assert not found.killed and found.broke_off is not None and "cannot import name 'double'" in found.broke_off


SLEEPER = """
import sys, time
from pathlib import Path
from folovllm.course.grading.trials import Job, run_jobs
from folovllm.course.grading.museum_command import ends_in_order

root = Path(sys.argv[1])
(root / "tests/test_a.py").write_text("import time\\ndef test_it():\\n    time.sleep(60)\\n")
with ends_in_order():
    run_jobs([Job(None, ("tests/test_a.py",))] * 2, root=root)
"""


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_an_interrupted_run_leaves_no_file_and_no_process(repository: Path) -> None:
    temporary = repository.parent / "temporary"
    command, env = [sys.executable, "-c", SLEEPER, str(repository)], {**os.environ, "TMPDIR": str(temporary)}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(outputs := list(temporary.glob("*/*/output.txt"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(outputs) == 2
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert not list(temporary.iterdir())
    listed = subprocess.run(["ps", "-Ao", "args"], capture_output=True, text=True)
    if listed.returncode == 0:
        assert str(temporary) not in listed.stdout


def test_a_report_is_read(tmp_path: Path) -> None:
    file = tmp_path / "report.xml"
    file.write_text(
        """<testsuites><testsuite>
        <testcase classname="tests.a" name="test_x[1]"/>
        <testcase classname="tests.a" name="test_y"><failure message="assert 1 == 2&#10; + where">x</failure></testcase>
        <testcase classname="" name="tests.b"><error message="collection failure">E   first
E   ImportError: no name</error></testcase>
        <testcase classname="tests.a.TestC" name="runTest"><skipped message="later">x</skipped></testcase>
        </testsuite></testsuites>"""
    )
    assert read_report(file) == [
        Ran("tests.a.test_x[1]", "passed"),
        Ran("tests.a.test_y", "failed", "assert 1 == 2"),
        Ran("tests.b", "error", "ImportError: no name"),
        Ran("tests.a.TestC.runTest", "skipped", "later"),
    ]
    assert Ran("tests.a.test_x[1]", "failed").is_one_of("tests/a.py::test_x")
    assert Ran("tests.a.test_x[1]", "failed").is_one_of("tests/a.py::test_x[1]")
    assert Ran("tests.a.TestC.runTest", "failed").is_one_of("tests/a.py::TestC::runTest")
    assert not Ran("tests.a.test_xy", "failed").is_one_of("tests/a.py::test_x")
    assert Ran("tests.a.test_x[b.c]", "failed").short == "test_x"


# --- the command, and the engine itself ------------------------------------------------------------------------------


def invoke(*args: str, columns: int = 100) -> Result:
    return CliRunner().invoke(app, ["museum", *args], env={"COLUMNS": str(columns), "TERM": "dumb"})


def flat(text: str) -> str:
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another place for the learner's files and progress."""
    monkeypatch.setattr(museum, "ANSWERS", str(tmp_path))
    return tmp_path


def test_the_test_on_the_page_kills_its_mutant_and_that_is_remembered(own_folder: Path) -> None:
    page = (ROOT / "docs/museum.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(code) == 1
    museum.answer_file(DETOKENIZER).write_text(code[0], encoding="utf-8")
    result = invoke("try", "half-a-character")
    assert result.exit_code == 0, result.output
    assert "Killed: your test passes on the engine and fails on the mutant." in flat(result.output)
    assert "test_an_emoji_is_never_shown_in_halves failed on the mutant" in flat(result.output)
    assert museum.load_progress() == {"half-a-character": "killed"}
    museum.save_progress(DETOKENIZER, "survived")
    assert museum.load_progress() == {"half-a-character": "killed"}
    text = flat(invoke().output)
    assert "half-a-character Black diamonds killed" in text and f"1 of {len(EXHIBITS)} killed" in text


@pytest.mark.parametrize(
    ("trial", "words"),
    [
        (Trial("survived"), "Survived: your test passes on the engine and on the mutant."),
        (
            Trial("fails on the correct engine", "test_it: assert 6 == 7"),
            "it proves nothing. test_it: assert 6 == 7",
        ),
        (Trial("did not run", "there is no test in the file"), "did not run. there is no test in the file"),
    ],
)
def test_every_other_verdict_is_status_1(
    trial: Trial, words: str, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(museum_command, "try_test", lambda *_: trial)
    result = invoke("try", "half-a-character", "--test", __file__)
    assert result.exit_code == 1 and words in flat(result.output)
    assert "Hint: folovllm museum show half-a-character --hint" in flat(result.output)
    assert museum.load_progress() == {"half-a-character": trial.verdict}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["show", "nothing"], "error: exhibit='nothing' is not in the museum; allowed: first-decode-position"),
        (["try", "salt-ignored"], "test_salt_ignored.py with your test does not exist; write it, or use --test"),
        (["try", "salt-ignored", "--test", "nowhere.py"], "the file nowhere.py with your test does not exist"),
        (["run", "--only", "nothing"], "error: exhibit='nothing' is not in the museum"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(args: list[str], words: str, own_folder: Path) -> None:
    result = invoke(*args, columns=300)
    assert result.exit_code == 2, result.output
    assert words in flat(result.output)


def test_a_label_keeps_hint_and_answer_until_they_are_asked_for() -> None:
    plain = invoke("show", "full-hit").output
    line = DETOKENIZER.line_in(DETOKENIZER.source())
    assert f"{DETOKENIZER.file}, line {line}" in invoke("show", "half-a-character").output
    assert "- return self.cache.find(request, (request.num_tokens - 1) // self.block_size)" in plain
    assert "+ return self.cache.find(request, request.num_tokens // self.block_size)" in plain
    answer = EXHIBITS["full-hit"].killed_by[0].partition("::")[2]
    assert "a multiple of the block size" not in flat(plain) and answer not in plain
    assert "a multiple of the block size" in flat(invoke("show", "full-hit", "--hint").output)
    assert answer in invoke("show", "full-hit", "--answer").output


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_everything_fits_the_terminal(columns: int, own_folder: Path) -> None:
    for args in ([], *(["show", name, "--hint"] for name in ("counted-twice", "penalty-without-prompt"))):
        lines = invoke(*args, columns=columns).output.splitlines()
        assert lines and max(map(len, lines)) <= columns


def test_the_table_and_the_status_say_what_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = DETOKENIZER, EXHIBITS["full-hit"]
    good = Hunt(one, ["tests.m1.test_detokenizer.x"], [], 1.0)
    missed = Hunt(two, [], list(two.killed_by), 1.0)
    broken = Hunt(two, [], list(two.killed_by), 1.0, "Python ended with status -9")
    bad = Ran("tests.m1.test_x", "failed", "assert 0")

    def run(failing: list[Ran], hunts: list[Hunt]) -> Result:
        monkeypatch.setattr(museum_command, "hunt", lambda *args: (failing, hunts))
        return invoke("run", columns=200)

    result = run([], [good])
    words = "m1/test_detokenizer: emoji and chinese are split by the bundled tokenizer and never shown in halves"
    assert result.exit_code == 0 and words in result.output
    assert "1 of 1 mutants are killed" in result.output
    result = run([], [good, missed])
    assert result.exit_code == 1 and re.search(
        r"full-hit +survived +not by m4/test_scheduler_m4: a full hit", result.output
    )
    assert "1 of 2 mutants are killed" in result.output
    result = run([], [broken])
    assert result.exit_code == 1 and re.search(r"full-hit +did not run +Python ended with status -9", result.output)
    result = run([bad], [good])
    assert result.exit_code == 1
    assert "These tests fail on the unchanged engine and prove nothing:\n  tests.m1.test_x: assert 0" in result.output
    many = Hunt(one, [f"tests.m1.test_a.test_{i}[{j}]" for i in range(20) for j in "xy"], [], 1.0)
    monkeypatch.setattr(museum_command, "hunt", lambda *args: ([bad], [many]))
    result = invoke("run", "--all", columns=200)
    assert result.exit_code == 0 and "m1/test_a: 7" in result.output and "and 12 more" in result.output


def test_without_a_report_nothing_is_taken_for_granted() -> None:
    crashed, stopped = Outcome(1, None, "", 1.0), Outcome(None, None, "", 1.0)
    ended = Outcome(1, None, "+++++ Timeout +++++", 1.0)
    assert [o.broke_off for o in (crashed, stopped, ended)] == [
        "Python ended with status 1",
        "the run did not end",
        "a test took more than 30 seconds",
    ]
    assert Outcome(0, (), "", 1.0).broke_off is None
