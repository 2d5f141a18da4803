"""examples/m3_inference.py and the options of `folovllm generate` that came with M3, as a reader uses them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from folovllm import LLM, SamplingParams
from folovllm.course.glossary import default_prompts, load_glossary
from folovllm.engine.trace import RequestStep, StepTrace
from folovllm.entrypoints.cli import app
from folovllm.entrypoints.terminal import make_prompts
from folovllm.kv_cache.interface import KVUsage

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "m3_inference.py"
ENV = {"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
ANSWERS = {entry.question: entry.answer for entry in load_glossary()}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("m3_inference", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENV.items():
        monkeypatch.setenv(name, value)


def flat(text: str) -> str:
    """Output without the line breaks that a terminal's width puts in."""
    return " ".join(text.split())


def rows(output: str, names: tuple[str, ...]) -> dict[str, str]:
    """The last cell of the table rows that begin with these names."""
    return {
        name: line.strip().removeprefix(name).strip()
        for line in output.splitlines()
        for name in names
        if line.startswith(f" {name} ")
    }


POOL_ROWS = (
    "size",
    "memory",
    "most blocks held at once",
    "empty slots in held blocks, mean over steps",
    "K/V saved by sharing, at most",
    "K/V recomputed",
    "blocks that M1 or M2 would reserve per request",
)
STATS_ROWS = ("preemptions", "blocks swapped to the host", "blocks swapped back", "blocks copied on write")


def run(example: ModuleType, capsys: pytest.CaptureFixture[str], *args: str) -> tuple[str, dict[str, str]]:
    """What the example prints, and the rows of its last two tables."""
    example.main(["--dtype", "float32", *args])
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80
    return output, rows(output, POOL_ROWS + STATS_ROWS)


# --- running it -------------------------------------------------------------------------------------------


def test_in_a_process_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--num-prompts", "3", "--max-tokens", "24", "--watch"],
        env={**os.environ, **ENV, "PYTHONPATH": str(ROOT)}, capture_output=True, encoding="utf-8", timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for question in default_prompts(3):
        assert flat(f"> {question} {ANSWERS[question][:30]}") in flat(done.stdout)
    assert "3 of 3 finished" in done.stdout and "\x1b" not in done.stdout
    found = rows(done.stdout, POOL_ROWS)
    assert set(found) == set(POOL_ROWS) and found["size"] == "64 blocks of 16 tokens"
    assert found["K/V saved by sharing, at most"] == "0.0%" and found["K/V recomputed"] == "0 tokens"


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_too_few_blocks_change_no_answer(example: ModuleType, capsys: pytest.CaptureFixture[str], mode: str) -> None:
    args = ("--num-prompts", "6", "--max-tokens", "40", "--block-size", "4", "--watch")
    roomy, roomy_rows = run(example, capsys, *args)
    tight, tight_rows = run(example, capsys, *args, "--num-kv-blocks", "32", "--preemption-mode", mode)

    def answers(output: str) -> str:
        return output[output.index("> ") : output.index("Requests")]

    assert answers(tight) == answers(roomy)
    assert "preemptions" not in roomy_rows and int(tight_rows["preemptions"]) > 0
    assert roomy_rows["size"] == "256 blocks of 4 tokens" and tight_rows["size"] == "32 blocks of 4 tokens"
    assert int(tight_rows["most blocks held at once"]) <= 32 < int(roomy_rows["most blocks held at once"])
    assert tight_rows.get("blocks swapped to the host") == tight_rows.get("blocks swapped back")
    assert ("blocks swapped back" in tight_rows) == (mode == "swap")
    assert (tight_rows["K/V recomputed"] == "0 tokens") == (mode == "swap")


def test_samples_share_blocks(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--num-prompts", "2", "--num-samples", "3", "--seed", "1", "--max-tokens", "20", "--block-size", "4")
    output, found = run(example, capsys, *args, "--watch")
    assert output.count("[0] ") == output.count("[2] ") == 2
    assert float(found["K/V saved by sharing, at most"].rstrip("%")) > 10
    # Each of two samples copies the block in which its prompt's last token stands, unless that begins a block.
    llm = LLM(milestone="m3", dtype="float32", num_kv_blocks=256, block_size=4)
    _, prompts = make_prompts(llm, None, 2, raw=False)
    partial = sum((len(prompt["prompt_token_ids"]) - 1) % 4 > 0 for prompt in prompts)
    assert int(found["blocks copied on write"]) == 2 * partial > 0


def test_beams_share_blocks(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--num-prompts", "2", "--beam-width", "3", "--max-tokens", "12", "--block-size", "4")
    plain, _ = run(example, capsys, *args)
    watched, found = run(example, capsys, *args, "--watch")
    scores = re.findall(r"^\[(-\d+\.\d+)\] ", watched, re.MULTILINE)
    assert len(scores) == 6 and scores == re.findall(r"^\[(-\d+\.\d+)\] ", plain, re.MULTILINE)
    assert all(float(a) >= float(b) for i in (0, 3) for a, b in zip(scores[i:], scores[i + 1 : i + 3], strict=False))
    assert len(re.findall(r"Sharing blocks saved up to \d+% of the beams' K/V\.", flat(watched))) == 2
    assert float(found["K/V saved by sharing, at most"].rstrip("%")) > 10
    for question in default_prompts(2):  # the best beam of a question that it knows by heart
        assert flat(ANSWERS[question])[:20] in flat(watched)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--num-kv-blocks", "0"], "num_kv_blocks=0 is not valid"),
        (["--num-kv-blocks", "2"], "and the whole KV cache has 2"),
        (["--block-size", "0"], "block_size=0 is not valid"),
        (["--block-size", "512"], "block_size=512 is not valid"),
        (["--preemption-mode", "forget"], "preemption_mode='forget' is not valid; allowed: 'recompute', 'swap'"),
        (["--swap-space", "-1"], "swap_space=-1.0 is not valid"),
        (["--attention-backend", "fast"], "attention_backend='fast' is not valid"),
        (["--num-samples", "0"], "n=0 is not valid"),
        (["--num-samples", "2", "--temperature", "0"], "n=2"),
        (["--beam-width", "0"], "beam_width=0 is not valid"),
        (
            ["--beam-width", "2", "--num-samples", "2"],
            "beam_width cannot be combined with num_samples",
        ),
        (
            ["--beam-width", "2", "--temperature", "0.5"],
            "beam_width cannot be combined with num_samples",
        ),
        (["--num-prompts", "0"], "num_prompts=0 is not valid"),
        (["--pace", "-1"], "pace=-1.0 is not valid"),
        (["--model", "nope"], "model='nope' is unknown"),
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


# --- what it counts ---------------------------------------------------------------------------------------


def step(*shares: tuple[str, int, int], kv: KVUsage) -> StepTrace:
    """A step of (id, tokens computed, tokens with K/V after it)."""
    requests = [RequestStep(i, n, 0, 0, computed, 1, 1, "RUNNING") for i, n, computed in shares]
    return StepTrace(0, {}, requests, 0, len(shares), 64, 1, 0, kv)


def test_tokens_computed_again(example: ModuleType) -> None:
    kv = KVUsage(64, 16, 12)
    steps = [
        step(("a", 6, 6), ("b", 5, 5), kv=kv),
        step(("a", 1, 7), kv=kv),  # b gave way with 5 tokens
        step(("a", 1, 8), ("b", 4, 4), kv=kv),  # and catches up in two pieces,
        step(("b", 2, 6), kv=kv),  # of which the last token is new
        step(("b", 1, 7), ("c", 1, 9), kv=kv),  # c is a fork: 8 tokens are somebody else's
    ]
    assert example.computed_again(steps) == 5


def test_empty_slots_are_a_mean_over_steps(example: ModuleType) -> None:
    steps = [step(kv=KVUsage(64, 16, 12)), step(kv=KVUsage(64, 32, 16))]
    assert example.mean_empty(steps) == pytest.approx((0.25 + 0.5) / 2) and example.mean_empty([]) == 0.0


# --- the command ------------------------------------------------------------------------------------------


def invoke(*args: str) -> Any:
    return CliRunner().invoke(app, list(args), env={**ENV, "COLUMNS": "120"})


def test_generate_takes_the_options_of_m3() -> None:
    result = invoke(
        *("generate", "--num-prompts", "4", "--max-tokens", "30", "--dtype", "float32", "--watch", "--pace", "0"),
        *("--block-size", "4", "--num-kv-blocks", "24", "--preemption-mode", "swap"),
    )
    assert result.exit_code == 0, result.output
    found = rows(result.output, STATS_ROWS)
    assert int(found["preemptions"]) > 0 and found["blocks swapped to the host"] == found["blocks swapped back"]
    llm = LLM(milestone="m1", dtype="float32")
    titles, prompts = make_prompts(llm, None, 4, raw=False)
    for title, output in zip(titles, llm.generate(prompts, SamplingParams(temperature=0, max_tokens=30)), strict=True):
        assert flat(f"> {title} {output.outputs[0].text}") in flat(result.output)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--milestone", "m2", "--preemption-mode", "swap"], "preemption_mode='swap' is not valid"),
        (["--block-size", "0"], "block_size=0 is not valid"),
        (["--num-kv-blocks", "0"], "num_kv_blocks=0 is not valid"),
        (["--num-kv-blocks", "3"], "and the whole KV cache has 3"),
    ],
)
def test_what_cannot_work_is_one_line_and_status_2(args: list[str], message: str) -> None:
    result = invoke("generate", *args)
    assert result.exit_code == 2, result.output
    assert message in flat(result.output) and "Traceback" not in result.output
