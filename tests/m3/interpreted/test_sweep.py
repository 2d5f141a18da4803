"""`tools/sweep_kernels.py` on interpreted kernels: that it runs, refuses wrong results, and picks the fastest."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch

from folovllm.attention.triton_configs import KernelConfig

CPU = torch.device("cpu")
PATH = Path(__file__).resolve().parents[3] / "tools" / "sweep_kernels.py"
CANDIDATES = [KernelConfig(16, 16, 4, 2, 2), KernelConfig(64, 32, 4, 2, 4)]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sweep_kernels", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sweep_kernels"] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Clock:
    """Seconds that are known: 1 for the yardstick, which is timed first, then 8, 4, 2 for what follows."""

    def __init__(self) -> None:
        self.seen: list[object] = []
        self.calls = 0

    def __call__(self, works: Sequence[Callable[[], object]]) -> float:
        self.calls += 1
        if works not in self.seen:
            self.seen.append(works)
        for work in works:
            work()
        return [1.0, 8.0, 4.0, 2.0][self.seen.index(works)]


def test_prefill_is_timed_against_sdpa(tool: ModuleType) -> None:
    shape, clock = tool.Shape("tiny", 4, 2, 32), Clock()
    entry = tool.sweep_prefill(shape, (24, 24), CANDIDATES, torch.float32, CPU, clock, 1)
    names = [tool.label(config) for config in CANDIDATES]
    assert entry["best"] == names[1] and entry["shipped"] not in names and entry["left_out"] == {}
    assert list(entry["configs"]) == [names[1], names[0], entry["shipped"]]  # the fastest first
    assert [e["share"]["median"] for e in entry["configs"].values()] == [1 / 2, 1 / 4, 1 / 8]
    assert entry["sdpa_s"]["median"] == 1.0 and clock.calls == 4
    pairs = sum(range(1, 25)) * 2  # of a query and a key that it sees
    assert entry["flops"] == pairs * 4 * (2 * 32 + 2 * 32)


def test_decode_is_timed_against_a_copy_that_reads_and_writes(tool: ModuleType) -> None:
    shape = tool.Shape("tiny", 4, 2, 32)
    entry = tool.sweep_decode(shape, 2, 20, CANDIDATES, torch.float32, CPU, Clock(), 1, cold_bytes=30_000)
    assert entry["kv_bytes"] == 2 * 20 * 2 * (2 * 32) * 4
    assert entry["copy_s"]["median"] == 1.0
    # A copy of n bytes moves 2 n in one second; a decode reads n in 2, 4 and 8.
    assert [e["share"]["median"] for e in entry["configs"].values()] == [1 / 4, 1 / 8, 1 / 16]


def test_a_wrong_result_is_left_out_and_a_wrong_shipped_one_stops_the_sweep(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend, wrong = tool.TritonBackend.attend, set[int]()

    def sometimes_wrong(self, *args):  # type: ignore[no-untyped-def]
        return attend(self, *args) + (0.5 if self.configs.prefill.rows in wrong else 0.0)

    monkeypatch.setattr(tool.TritonBackend, "attend", sometimes_wrong)
    shape = tool.Shape("tiny", 4, 2, 32)
    arguments = (shape, (24,), CANDIDATES, torch.float32, CPU, Clock(), 1)
    wrong.add(64)
    shipped = tool.choose_configs(torch.float32, 32, (8, 0)).prefill
    assert shipped.rows not in (16, 64)
    entry = tool.sweep_prefill(*arguments)
    assert entry["left_out"] == {tool.label(CANDIDATES[1]): "its result is off by 0.5"}
    wrong.add(shipped.rows)
    with pytest.raises(RuntimeError, match="the configuration for tiny cannot be used here: its result is off by 0.5"):
        tool.sweep_prefill(*arguments)


def test_several_rounds_turn_the_order(tool: ModuleType) -> None:
    order: list[object] = []

    def timer(works: Sequence[Callable[[], object]]) -> float:
        order.append(works)
        return 1.0

    shape = tool.Shape("tiny", 2, 1, 16)
    entry = tool.sweep_prefill(shape, (5,), CANDIDATES[:1], torch.float32, CPU, timer, 3)
    assert len(order) == 9 and order[0] is not order[3] and {id(w) for w in order[:3]} == {id(w) for w in order[3:6]}
    assert entry["configs"][entry["best"]]["seconds"]["rounds"] == 3
