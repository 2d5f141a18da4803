"""When Triton is chosen, and what is said where it cannot be. None of this needs Triton."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from folovllm import LLM
from folovllm.attention.torch_backend import TorchBackend
from folovllm.engine.factory import make_backend
from tests.needs import need_module

ROOT = Path(__file__).resolve().parents[2]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
needs_triton = need_module("triton")


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_where_it_is_not_installed_it_is_refused_by_name(without_triton: None) -> None:
    with pytest.raises(ValueError) as caught:
        LLM("folo-tiny", milestone="m3", device="cpu", attention_backend="triton")
    message = str(caught.value)
    assert message.startswith("attention_backend='triton' is not valid here, where Triton is not installed")
    assert message.endswith("allowed: 'auto', 'reference', 'torch'")


def test_auto_does_without_it(without_triton: None) -> None:
    assert isinstance(make_backend("auto", GPU), TorchBackend)
    assert isinstance(make_backend("auto", CPU), TorchBackend)


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets here")
def test_on_a_cpu_it_is_refused_with_the_way_to_have_it() -> None:
    with pytest.raises(ValueError) as caught:
        LLM("folo-tiny", milestone="m3", device="cpu", attention_backend="triton")
    message = str(caught.value)
    assert "attention_backend='triton' is not valid on device='cpu'" in message
    assert "TRITON_INTERPRET=1 set in the environment before the start" in message


@needs_triton
def test_auto_is_triton_on_a_gpu_and_torch_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from folovllm.attention.triton_backend import TritonBackend

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    backend = make_backend("auto", GPU)
    assert isinstance(backend, TritonBackend) and backend.capability == (9, 0)
    assert isinstance(make_backend("triton", GPU), TritonBackend)
    assert isinstance(make_backend("auto", CPU), TorchBackend)
    assert isinstance(make_backend("torch", GPU), TorchBackend)


@needs_triton
def test_switching_the_interpreter_on_too_late_is_noticed() -> None:
    """Triton was imported to compile. Its own functions stay compiled ones, whatever the environment says now."""
    code = """
import os, triton.language
os.environ["TRITON_INTERPRET"] = "1"
import torch
from folovllm.engine.factory import make_backend
try:
    make_backend("triton", torch.device("cpu"))
except ValueError as error:
    print(error)
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "is not valid on device='cpu'" in done.stdout, done.stderr


def test_an_engine_without_it_does_not_import_it() -> None:
    """Triton's import takes time, and settles whether it interprets."""
    code = """
import sys
from folovllm import LLM, SamplingParams
for backend in ("auto", "reference", "torch"):
    llm = LLM("folo-tiny", milestone="m3", device="cpu", num_kv_blocks=10, attention_backend=backend)
    llm.generate("A", SamplingParams(max_tokens=2), use_tqdm=False)
    found = [name for name in sys.modules if name.startswith(("folovllm.attention.triton", "triton."))]
    print(backend, sorted(found))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    said = [line for line in done.stdout.splitlines() if line.startswith(("auto ", "reference ", "torch "))]
    assert said == ["auto []", "reference []", "torch []"], (done.stdout[-300:], done.stderr[-300:])
