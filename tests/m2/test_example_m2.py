"""examples/m2_inference.py and the options of `folovllm generate` that came with M2, as a reader uses them."""

from __future__ import annotations

import importlib.util
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
from rich.console import Console
from typer.testing import CliRunner

from folovllm.course.glossary import default_prompts, load_glossary
from folovllm.entrypoints.cli import app
from tests.processes import can_be_interrupted

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "m2_inference.py"
ENV = {"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
ANSWERS = {entry.question: entry.answer for entry in load_glossary()}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("m2_inference", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENV.items():
        monkeypatch.setenv(name, value)


def flat(text: str) -> str:
    """Output without the line breaks that a terminal's width puts in."""
    return " ".join(text.split())


def rows(output: str, names: tuple[str, ...]) -> dict[str, list[str]]:
    """The cells of the table rows that begin with these names."""
    found = {}
    for line in output.splitlines():
        for name in names:
            if line.startswith(f" {name} "):
                found[name] = line.strip().removeprefix(name).split()
    return found


# --- running it -------------------------------------------------------------------------------------------


def test_prompts_of_ones_own_in_a_process_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--prompts", "Hello", "How are you?", "Tell me a joke", "--max-tokens", "50"],
        env={**os.environ, **ENV, "PYTHONPATH": str(ROOT)}, capture_output=True, encoding="utf-8", timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for question in ("Hello", "How are you?", "Tell me a joke"):
        assert f"> {question}\n" in done.stdout
    counts = rows(done.stdout, ("steps", "forward passes", "tokens generated", "most requests in a step"))
    assert counts["most requests in a step"] == ["3"]
    assert int(counts["forward passes"][0]) < int(counts["tokens generated"][0]) <= 150
    assert "masked K/V columns" in done.stdout and "padding tokens computed" in done.stdout
    assert "\x1b" not in done.stdout


COMPARED = ("M1", "M2 loop", "M2 padded")


def test_the_comparison(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    example.main(["--num-prompts", "5", "--compare-sequential", "--max-tokens", "20", "--rounds", "1"])
    output = capsys.readouterr().out
    for question in default_prompts(5):
        assert flat(f"> {question} {ANSWERS[question][:50]}") in flat(output)
    assert max(map(len, output.splitlines())) <= 80
    table = rows(output, COMPARED)
    tokens, seconds, speed = ({name: float(table[name][i]) for name in COMPARED} for i in range(3))
    assert len(set(tokens.values())) == 1
    ratios = {"M1": table["M1"][3], **{name: table[name][3] for name in COMPARED[1:]}}
    assert ratios["M1"] == "1"
    forwards = {name: float(table[name][-3]) for name in COMPARED}
    assert forwards["M1"] == tokens["M1"] == forwards["M2 loop"], "one forward for each token"
    assert forwards["M2 padded"] < forwards["M1"]
    for name in COMPARED:
        assert speed[name] == pytest.approx(tokens[name] / seconds[name], rel=0.02)  # both are rounded
    for name in COMPARED[1:]:
        assert f"{name}: same tokens as M1: yes (5 of 5)" in output
    for arm in ("Scheduling alone (M2 loop against M1)", "Batching (M2 padded against M2 loop)", "Together"):
        assert arm in flat(output)
    assert "folo-tiny, float32 on" in output and "1 round;" in output


def test_in_bfloat16_the_comparison_says_that_tokens_may_differ(
    example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    example.main(
        ["--num-prompts", "2", "--max-tokens", "4", "--compare-sequential", "--dtype", "bfloat16", "--rounds", "1"]
    )
    output = flat(capsys.readouterr().out)
    assert "folo-tiny, bfloat16 on" in output and "In bfloat16" in output and "tokens may differ" in output


def test_watching_into_a_pipe_prints_plain_lines(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    example.main(["--num-prompts", "4", "--max-num-seqs", "2", "--max-tokens", "5", "--watch"])
    output = capsys.readouterr().out
    assert "\x1b" not in output and "\r" not in output
    assert "0 of at most 2 running, 0 waiting, 4 of 4 finished, 20 tokens" in flat(output)
    assert rows(output, ("most requests in a step",))["most requests in a step"] == ["2"]


def test_the_loop_computes_no_padding(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    example.main(["--num-prompts", "2", "--max-tokens", "5", "--batching", "loop", "--dtype", "float32"])
    counts = rows(capsys.readouterr().out, ("steps", "forward passes", "padding", "masked"))
    assert counts == {"steps": ["5"], "forward passes": ["10"]}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batching", "ragged"], "batching='ragged' is not valid; allowed: 'padded', 'loop'"),
        (["--scheduling-policy", "lifo"], "scheduling_policy='lifo' is not valid; allowed: 'fcfs', 'priority', 'sjf'"),
        (["--scheduling-policy", "lifo", "--compare-sequential"], "scheduling_policy='lifo' is not valid"),
        (["--max-num-seqs", "0"], "max_num_seqs=0 is not valid"),
        (["--num-prompts", "0"], "num_prompts=0 is not valid"),
        (["--rounds", "0"], "rounds=0 is not valid"),
        (["--pace", "-1"], "pace=-1.0 is not valid"),
        (["--max-tokens", "0"], "max_tokens=0 is not valid"),
        (["--model", "nope"], "model='nope' is unknown"),
        (["--dtype", "int3"], "dtype='int3' is not valid"),
        (["--compare-sequential", "--watch"], "--compare-sequential runs M1 and both ways of batching"),
        (["--compare-sequential", "--batching", "loop"], "--compare-sequential runs M1 and both ways of batching"),
        (["--compare-sequential", "--temperature", "1"], "temperature=1.0 without a seed"),
        (["--max-num-batched-tokens", "4"], "a step computes at most 4"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(
    example: ModuleType, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        example.main(args)
    assert ended.value.code == 2
    output = flat(capsys.readouterr().err)
    assert output.startswith("error: ") and message in output and output.count("error") == 1


def test_an_unknown_option_is_named_without_a_page_of_usage(
    example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        example.main(["--nope"])
    assert ended.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.endswith("[options]") and error.endswith("error: unrecognized arguments: --nope")


# --- what it concludes ------------------------------------------------------------------------------------


def arm(example: ModuleType, name: str, seconds: list[float], forwards: int, tokens: list[list[int]]) -> Any:
    rounds = [example.Round(s, forwards, 0.8 * s, 0.1 * s, 0.5 * s, tokens) for s in seconds]
    return example.Arm(name, cast(Any, None), rounds)


@pytest.mark.parametrize(
    ("loop", "padded", "conclusion"),
    [
        ([10.0, 11.0, 9.0], [5.0, 5.0, 4.0], "The gain is batching's: scheduling made no difference that every round"),
        ([11.0, 12.0, 13.0], [5.0, 5.0, 4.0], "The gain is batching's: scheduling made it slower in every round."),
        ([8.0, 8.0, 9.0], [5.0, 5.0, 4.0], "Both made it faster in every round."),
        ([8.0, 8.0, 9.0], [9.0, 9.0, 10.0], "The gain is scheduling's: batching made it slower in every round."),
        ([11.0, 12.0, 13.0], [12.0, 13.0, 12.0], "Neither made it faster in every round."),
    ],
)
def test_the_conclusion_follows_from_the_numbers(
    example: ModuleType, loop: list[float], padded: list[float], conclusion: str
) -> None:
    tokens = [[1] * 50, [2] * 50]
    m1 = arm(example, "M1", [10.0, 10.0, 10.0], 100, tokens)
    arms = m1, arm(example, "M2 loop", loop, 100, tokens), arm(example, "M2 padded", padded, 50, tokens)
    scheduling, batching, together = example.reading(*arms)
    assert conclusion in together
    middle = sorted(10.0 / seconds for seconds in loop)
    assert f": {middle[1]:.2f}x ({middle[0]:.2f}-{middle[2]:.2f}) the throughput, with 100 forwards against 100" in (
        scheduling
    )
    assert "with 50 forwards against 100" in batching
    assert f"{0.2 * sorted(loop)[1]:.2g} s outside of them against 2. " in scheduling
    assert f"went from 1000 to {100 * sorted(loop)[1]:.0f} ms" in scheduling


def test_other_tokens_are_counted(example: ModuleType) -> None:
    same, other = [[1, 2], [3, 4]], [[1, 2], [3, 5]]
    m1, loop, padded = (arm(example, n, [1.0, 1.0], 4, t) for n, t in zip(COMPARED, (same, same, same), strict=True))
    padded.rounds[1] = example.Round(1.0, 4, 0.8, 0.1, 0.5, other)
    assert example.same_tokens([m1, loop, padded], "float32") == [
        "M2 loop: same tokens as M1: yes (2 of 2)",
        "M2 padded: same tokens as M1: no (1 of 2)",
    ]
    assert len(example.same_tokens([m1, loop, padded], "bfloat16")) == 3


def test_the_comparison_table_fits_on_80_columns_whatever_the_numbers(example: ModuleType) -> None:
    tokens = [[1] * 256] * 1000
    arms = [arm(example, name, [1234.5, 999.0, 2000.0], 256_000, tokens) for name in COMPARED]
    console = Console(record=True, width=80, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(example.comparison_table(arms))
    text = console.export_text()
    assert "…" not in text and text.count("1.00x (1.00-1.00)") == 2


# --- a real terminal --------------------------------------------------------------------------------------


# Standard input becomes the terminal that controls the process, so that the key reaches it.
IN_ITS_TERMINAL = """
import fcntl, runpy, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")
def test_ctrl_c_while_watching_leaves_the_terminal_as_it_was() -> None:
    import pty
    import termios

    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    environment = {**os.environ, **ENV, "TERM": "xterm-256color", "LINES": "30", "PYTHONPATH": str(ROOT)}
    options = ["--num-prompts", "6", "--max-num-seqs", "2", "--watch", "--pace", "0.2"]
    process = subprocess.Popen(
        [sys.executable, "-c", IN_ITS_TERMINAL, str(EXAMPLE), *options],
        stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
        preexec_fn=can_be_interrupted,
    )  # fmt: skip
    output, pressed, deadline = b"", False, time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if select.select([ours], [], [], 0.2)[0]:
            output += os.read(ours, 65_536)
        if not pressed and b" step 2 " in output:
            pressed = True
            os.write(ours, b"\x03")  # the key, not a signal
    while select.select([ours], [], [], 0.2)[0]:
        output += os.read(ours, 65_536)
    if process.poll() is None:
        process.kill()
    text = output.decode(errors="replace")
    assert process.wait() == 130, text[-2000:]
    assert termios.tcgetattr(theirs) == before
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l") and text.rstrip().endswith("interrupted")
    assert "Traceback" not in text and not re.search(r"step 2\d", text)
    os.close(ours)
    os.close(theirs)


# --- the command ------------------------------------------------------------------------------------------


def invoke(*args: str) -> Any:
    return CliRunner().invoke(app, list(args), env={**ENV, "COLUMNS": "120"})


def test_generate_takes_the_options_of_m2() -> None:
    result = invoke(
        *("generate", "--milestone", "m2", "--num-prompts", "4", "--max-tokens", "4"),
        *("--max-num-seqs", "2", "--batching", "loop"),
        *("--scheduling-policy", "sjf", "--max-num-batched-tokens", "64", "--watch", "--pace", "0"),
    )
    assert result.exit_code == 0, result.output
    assert "4 of 4 finished, 16 tokens" in flat(result.output)
    counts = rows(result.output, ("steps", "forward passes", "most requests in a step"))
    assert counts == {"steps": ["8"], "forward passes": ["16"], "most requests in a step": ["2"]}
    for question in default_prompts(4):
        assert f"> {question}" in result.output


def test_generate_watches_samples_of_one_prompt() -> None:
    result = invoke(
        "generate", "Hello", "--n", "3", "--temperature", "1", "--seed", "1", "--max-tokens", "3", "--watch"
    )
    assert result.exit_code == 0, result.output
    assert "3 of 3 finished" in flat(result.output) and "[2] " in result.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "--batching", "ragged"], "batching='ragged' is not valid; allowed: 'padded', 'loop'"),
        (["generate", "--milestone", "m1", "--max-num-seqs", "2"], "max_num_seqs=2 is not valid; allowed: 1 with"),
        (["generate", "--milestone", "m1", "--scheduling-policy", "sjf"], "scheduling_policy='sjf' is not valid"),
        (["generate", "--pace", "99"], "pace=99.0 is not valid"),
        (["chat", "--max-num-batched-tokens", "0"], "max_num_batched_tokens=0 is not valid"),
    ],
)
def test_what_a_milestone_cannot_do_is_one_line_and_status_2(args: list[str], message: str) -> None:
    result = invoke(*args)
    assert result.exit_code == 2, result.output
    assert message in flat(result.output) and "Traceback" not in result.output


def test_info_lists_the_milestones() -> None:
    output = invoke("info").output
    assert "m1: " in output and "m2: continuous batching" in output
