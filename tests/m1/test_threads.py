"""Threads of the CPU: a step uses its own number, and the process around it keeps what it had."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from folovllm import LLM, EngineConfig, SamplingParams
from folovllm.runner import threads
from folovllm.runner.threads import choose_num_threads, cpu_threads

ROOT = Path(__file__).resolve().parents[2]

# A program that has set nothing: its threads before, those of the forwards, and its threads afterwards.
PROGRAM = """
import torch
from folovllm import LLM, SamplingParams
llm, during = LLM("folo-tiny"), []
before = torch.get_num_threads()
llm.engine.core.runner.model.layers[0].register_forward_pre_hook(lambda *_: during.append(torch.get_num_threads()))
llm.generate("Hello", SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
print(before, *during, torch.get_num_threads())
"""


def test_in_a_program_of_its_own() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    before, *during, after = map(int, done.stdout.split())
    assert set(during) == {1} and before == after


@pytest.fixture
def caller_threads() -> Iterator[Callable[[int], None]]:
    """`torch.set_num_threads` for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("milestone", ["m1", "m4"])
@pytest.mark.parametrize(
    ("caller", "asked", "omp", "used"),
    [(2, None, None, 1), (2, 3, None, 3), (2, 3, "2", 3), (7, 3, None, 3), (2, None, "2", 2), (7, None, None, 7)],
    ids=["nothing", "num_threads", "num_threads and OMP", "num_threads and caller", "OMP_NUM_THREADS", "caller"],
)
def test_a_setting_of_the_user_wins(
    monkeypatch: pytest.MonkeyPatch,
    caller_threads: Callable[[int], None],
    milestone: str,
    caller: int,
    asked: int | None,
    omp: str | None,
    used: int,
) -> None:
    """On a machine where torch starts with two threads. A step that fails restores the caller's number, too."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    monkeypatch.setattr(threads, "default_thread_counts", lambda current: {2})
    caller_threads(caller)
    llm = LLM("folo-tiny", milestone=milestone, num_threads=asked, max_model_len=64)
    runner = llm.engine.core.runner
    during: list[int] = []

    def forward(*args: Any, **kwargs: Any) -> None:
        during.append(torch.get_num_threads())
        raise RuntimeError("a failure")

    runner.model.register_forward_pre_hook(forward)  # type: ignore[attr-defined]
    output = llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)[0].outputs[0]
    assert (output.finish_reason, output.stop_reason) == ("error", "RuntimeError: a failure")
    assert (during, torch.get_num_threads()) == ([used, used], caller)  # it is tried once more


@pytest.fixture
def by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the environment, and torch with the threads that it starts with."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "default_thread_counts", lambda current: {current})


@pytest.mark.parametrize(("hidden_size", "count"), [(64, 1), (512, 1), (513, None), (1024, None)])
def test_the_size_of_the_model_decides(by_itself: None, hidden_size: int, count: int | None) -> None:
    assert choose_num_threads(None, hidden_size)[0] == count


def test_processors_that_share_a_core_are_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four processors on two cores: torch starts with four threads, or with two where MKL decides."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 4, 5})
    monkeypatch.setattr(threads, "_core_of", lambda processor: f"{processor % 4},{processor % 4 + 4}")
    assert threads.default_thread_counts(3) == {2, 4}
    monkeypatch.setattr(sys, "platform", "darwin")
    assert threads.default_thread_counts(3) == {3}


def test_threads_are_restored_by_an_interrupt() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt), cpu_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyboardInterrupt
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", 100_000])
def test_a_number_that_cannot_be_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="num_threads=.*allowed: an integer >= 1"):
        EngineConfig.from_kwargs(num_threads=value)


def test_the_tokens_do_not_depend_on_it() -> None:
    prompt = list(range(100, 140))
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    answers = [
        LLM("folo-tiny", dtype="float32", num_threads=count).generate(prompt, params, use_tqdm=False)[0]
        for count in (1, 2)
    ]
    assert answers[0].outputs[0].token_ids == answers[1].outputs[0].token_ids
