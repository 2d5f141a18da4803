"""examples/m0_inference.py as a reader runs it, once in a process of its own, against Hugging Face `generate`."""

from __future__ import annotations

import importlib.util
import io
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from folovllm.course.glossary import default_prompts
from tests.oracle import hf_greedy, tiny_model

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "m0_inference.py"
FOLO_TINY = ROOT / "folovllm" / "assets" / "folo-tiny"


def run_example(*args: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "COLUMNS": "110"}
    command = [sys.executable, str(EXAMPLE), *args]
    return subprocess.run(command, env=env, capture_output=True, encoding="utf-8", timeout=240)


def rows(output: str, name: str) -> list[list[str]]:
    """The cells after the first of every table row that starts with `name`."""
    cells = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in output.splitlines()]
    return [row[1:] for row in cells if row[0] == name]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("m0_inference", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_model_without_a_tokenizer_takes_and_prints_token_ids(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path / "model")
    args = ["--model", str(tmp_path / "model"), "--num-prompts", "2", "--prompt-tokens", "5"]
    args += ["--max-tokens", "12", "--seed", "7", "--device", "cpu"]
    monkeypatch.setenv("COLUMNS", "110")
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *args])
    example.main()
    output = capsys.readouterr().out
    numbers = random.Random(7)
    for _ in range(2):
        prompt = [numbers.randrange(128) for _ in range(5)]
        text = " ".join(map(str, hf_greedy(model, prompt, 12)))
        assert f"without a cache: {text}" in output
        assert f"with a cache: {text}" in output
    assert [row[1] for row in rows(output, "tokens equal?")] == ["yes", "yes"]
    kv_bytes = (5 + 12 - 1) * 2 * 2 * 2 * 32 * 4  # tokens, layers, K and V, KV heads, head_dim, bytes
    assert [row[1] for row in rows(output, "KV cache at the end")] == [f"{kv_bytes:,} B"] * 2
    for name in ("first token (prefill)", "each of the first 8 decoded", "each of the last 8 decoded"):
        assert len(rows(output, name)) == 2
    assert len(rows(output, "all, measured")) == len(rows(output, "work, derived")) == 2


def test_the_bundled_model_answers_from_a_clean_checkout() -> None:
    done = run_example("--num-prompts", "2", "--max-tokens", "40", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert [row[1] for row in rows(done.stdout, "tokens equal?")] == ["yes", "yes"]
    tokenizer = AutoTokenizer.from_pretrained(FOLO_TINY)
    model = AutoModelForCausalLM.from_pretrained(FOLO_TINY, dtype=torch.float32)
    for question in default_prompts(2):
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        prompt = tokenizer.encode(chat, add_special_tokens=False)
        answer = hf_greedy(model, prompt, 40, eos=[tokenizer.eos_token_id])
        text = tokenizer.decode(answer, skip_special_tokens=True)
        assert question in done.stdout
        assert f"without a cache: {text}\n" in done.stdout
        assert f"with a cache: {text}\n" in done.stdout


def test_a_mistake_is_one_line_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--model", "no-such-model"])
    monkeypatch.setattr("folovllm.entrypoints.start.prepare", lambda: None)  # this process keeps its signals
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "no-such-model" in line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "qwen3-0.6b", "--load-format", "dummy", "--prompts", "Hello"], "has no tokenizer"),
        (["--model", "qwen3-0.6b", "--dtype", "int3"], "int3"),
    ],
)
def test_arguments_that_cannot_work_are_refused_before_anything_is_loaded(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["m0_inference.py", *args])
    monkeypatch.setattr(example, "load_hf_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=message):
        example.main()


@pytest.mark.parametrize("option", ["--max-tokens", "--num-prompts", "--prompt-tokens"])
def test_counts_below_one_are_refused(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["m0_inference.py", option, "0"])
    with pytest.raises(SystemExit):
        example.parse_args()
    assert f"{option}: 0 is less than 1" in capsys.readouterr().err


class BytesTokenizer:
    """One token per byte, so that a character outside ASCII spans several."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(token_ids).decode("utf-8", errors="replace")


def test_streamed_text_waits_for_the_rest_of_a_character(example: ModuleType) -> None:
    screen, shown = io.StringIO(), []
    stream = example.TextStream(Console(file=screen), BytesTokenizer())
    for byte in "né👋".encode():
        stream.put(byte)
        shown.append(screen.getvalue())
    assert shown == ["n", "n", "né", "né", "né", "né", "né👋"]
    stream.put("é".encode()[0])  # half a character, and then the text ends
    stream.end()
    assert screen.getvalue() == "né👋\N{REPLACEMENT CHARACTER}\n"
