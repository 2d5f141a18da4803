"""The command line, as a user types it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from folovllm import CompletionOutput, RequestMetrics, RequestOutput, SamplingParams
from folovllm.course.glossary import load_glossary
from folovllm.entrypoints.cli import app
from folovllm.entrypoints.terminal import by_name, is_installed, print_stream
from tests.mock import mock_engine
from tests.processes import can_be_interrupted

ROOT = Path(__file__).parents[2]
ENTRY = next(e for e in load_glossary() if e.term == "KV cache")
ENV = {"COLUMNS": "120", "TERM": "dumb", "NO_COLOR": "1"}


def invoke(*args: str, stdin: str | None = None):
    return CliRunner().invoke(app, list(args), input=stdin, env=ENV)


def flat(text: str) -> str:
    """Output without the line breaks that a terminal's width puts in."""
    return " ".join(text.split())


def test_generate_streams_an_answer_and_shows_what_it_took(tmp_path):
    trace = tmp_path / "trace.json"
    result = invoke("generate", ENTRY.question, "--dtype", "float32", "--trace", str(trace))
    assert result.exit_code == 0, result.output
    assert f"> {ENTRY.question}" in result.output
    assert flat(ENTRY.answer) in flat(result.output)
    assert "TTFT" in result.output and "forward" in result.output and "tokens generated" in result.output
    assert json.loads(trace.read_text())["traceEvents"]


def test_generate_without_streaming_shows_every_sample():
    result = invoke(
        "generate",
        ENTRY.question,
        "--no-stream",
        "--temperature",
        "0.7",
        "--seed",
        "1",
        "--n",
        "2",
        "--max-tokens",
        "8",
    )
    assert result.exit_code == 0, result.output
    assert "[0] " in result.output and "[1] " in result.output


def test_generate_completes_raw_text():
    result = invoke("generate", "A block", "--raw", "--max-tokens", "4")
    assert result.exit_code == 0 and "length" in result.output


def test_chat_remembers_resets_and_leaves():
    result = invoke("chat", "--dtype", "float32", stdin=f"{ENTRY.question}\n/reset\n{ENTRY.question}\n/quit\nnever\n")
    assert result.exit_code == 0, result.output
    assert flat(result.output).count(flat(ENTRY.answer)) == 2
    assert "never" not in result.output


def test_chat_ends_with_its_input():
    assert invoke("chat", stdin="").exit_code == 0


def test_info_reads_a_config_alone():
    result = invoke("info", "qwen3-0.6b", "--dtype", "bfloat16")
    assert result.exit_code == 0
    assert re.search(r"CPU threads of a step\W+\d+ \(", result.output)
    assert "114,688 bytes" in result.output and "GQA: 16 query heads, 8 KV heads of 128" in result.output


def test_dummy_weights_take_token_ids():
    result = invoke(
        "generate", "--model", "qwen3-0.6b", "--load-format", "dummy", "--num-prompts", "1", "--max-tokens", "2"
    )
    assert result.exit_code == 0, result.output
    assert "128 random token ids" in result.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "--model", "nope"], "model='nope' is unknown; bundled models are folo-tiny"),
        (["generate", "--temperature", "-1"], "temperature=-1.0 is not valid"),
        (["generate", "--milestone", "m9"], "milestone='m9' is not valid"),
        (["generate", ""], "prompts[0]='' is empty"),
        (["generate", "--trace", "missing/folder/t.json"], "allowed: a file in a folder that exists"),
        (["generate", "--num-prompts", "-1"], "num_prompts=-1 is not valid"),
        (["generate", "--generation-config", "x"], "generation_config='x' is not valid; allowed: 'auto', 'vllm' or a"),
        (["info", "./missing"], "no such folder"),
        (["chat", "--top-p", "0"], "top_p=0.0 is not valid"),
        (["generate", "hi", "--model", "qwen3-0.6b", "--load-format", "dummy", "--max-tokens", "1"], "no tokenizer"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(args, message):
    result = invoke(*args)
    assert result.exit_code == 2, result.output
    assert message in flat(result.output) and "Traceback" not in result.output


def test_what_the_course_adds_is_refused_by_name_where_it_is_not_installed(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"folovllm\.courses\.viz is not installed"):
        by_name("folovllm.courses.viz:watch")
    assert is_installed("folovllm.course.viz.live:watch") and not is_installed("folovllm.courses.viz:watch")
    # What a module that is there wants to import is another matter, and is not hidden.
    (tmp_path / "wants_more.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        by_name("wants_more:anything")


def test_help_teaches():
    for command, words in {"generate": ["--temperature", "Perfetto"], "chat": ["/reset"], "info": ["KV cache"]}.items():
        result = invoke(command, "--help")
        assert result.exit_code == 0
        assert all(word.lower() in flat(result.output).lower() for word in words)
    assert invoke().exit_code in (0, 2)  # no arguments show the help; click calls that 0 or 2 by version


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_ends_cleanly():
    """A real interrupt, in the middle of a long generation on a slow model."""
    command = [sys.executable, "-m", "folovllm", "generate", "--model", "qwen2.5-0.5b", "--load-format", "dummy"]
    process = subprocess.Popen(
        [*command, "--num-prompts", "1", "--max-tokens", "5000"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env={**os.environ, **ENV},
        preexec_fn=can_be_interrupted,
    )  # fmt: skip
    assert process.stdout is not None
    while "random token ids" not in (line := process.stdout.readline()):
        assert line, "the command ended before it generated anything"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in rest and "Traceback" not in rest


def example(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "examples/m1_inference.py", *args],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **ENV, "PYTHONPATH": str(ROOT)}, timeout=120,
    )  # fmt: skip


def test_the_example_answers_from_the_glossary():
    entries = load_glossary()
    done = example("--num-prompts", "2", "--stream", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    answered = [e for e in entries if flat(e.answer) in flat(done.stdout)]
    assert len(answered) >= 2 and "TTFT" in done.stdout


def test_the_example_takes_prompts_and_a_length():
    done = example("--prompts", "Hello", "Tell me a joke", "--max-tokens", "5", "--temperature", "0.5", "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert "> Hello" in done.stdout and "> Tell me a joke" in done.stdout
    assert example("--max-tokens", "0").returncode == 2


def test_streams_of_several_requests_are_printed_one_after_another(capsys):
    engine = mock_engine(max_num_seqs=2, capacity=192)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    engine.add_request("a", [1], params)
    engine.add_request("b", [2], params)

    def outputs():
        while engine.has_unfinished_requests():
            yield from engine.step()

    done = print_stream(Console(width=100), outputs(), {"b": "second [first]", "a": "first"}, show_ids=True)
    text = capsys.readouterr().out
    ids = {o.request_id: " ".join(map(str, o.outputs[0].token_ids)) for o in done}
    assert [o.request_id for o in done] == ["b", "a"]
    assert flat(text) == f"> second [first] {ids['b']} > first {ids['a']}"


def test_text_held_back_is_never_shown_as_ids_and_loses_nothing(capsys):
    """An answer may begin with half a character: then its text is empty for a while, which does not mean ids."""
    growing = ["", "", "🚀", "🚀 go"]
    metrics = RequestMetrics(0.0)
    outputs = [
        RequestOutput("a", None, [1], [CompletionOutput(0, t, list(range(i + 1)))], i == 3, metrics)
        for i, t in enumerate(growing)
    ]
    print_stream(Console(width=80), outputs, {"a": "a title that ends in \\"})
    assert flat(capsys.readouterr().out) == "> a title that ends in \\ 🚀 go"


def test_a_chat_that_outgrows_the_model_says_so_and_goes_on():
    long = " ".join(["block"] * 60)
    result = invoke("chat", "--max-model-len", "60", "--max-tokens", "8", stdin=f"{long}\nHello\n/quit\n")
    assert result.exit_code == 0 and "/reset starts again" in flat(result.output)
    assert flat(result.output).count("> ") >= 2
