"""The sweep of kernels on interpreted ones: that it runs, refuses wrong results, and picks the fastest."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from folovllm.attention.triton_configs import KernelConfig

CPU = torch.device("cpu")
PATH = Path(__file__).resolve().parents[3] / "folovllm" / "course" / "measure" / "sweep_kernels.py"
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


def entry(dim: int, **shares: float) -> dict[str, Any]:
    """What `pick` reads of an entry."""
    configs = {name: {"share": {"median": share}} for name, share in shares.items()}
    return {"shape": {"head_dim": dim}, "configs": configs}


def test_what_is_picked_is_the_best_over_all_shapes_of_a_head_size(tool: ModuleType) -> None:
    """The geometric mean: a is best once and poor once. And c, the best of all, could not be used everywhere."""
    entries = [entry(64, a=0.9, b=0.6, c=1.0), entry(64, a=0.3, b=0.6), entry(128, a=0.5, b=0.4)]
    picked = tool.pick(entries)
    assert picked["64"] == {"config": "b", "share": pytest.approx(0.6)}
    assert picked["128"] == {"config": "a", "share": pytest.approx(0.5)}
    assert list(picked) == ["64", "128"] and tool.pick([]) == {}


def test_large_numbers_may_be_a_step_of_bfloat16_apart(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between 4 and 8 two neighbours in bfloat16 are 1/32 apart: that is rounding and no mistake."""
    attend = tool.TritonBackend.attend
    shape = tool.Shape("tiny", 4, 2, 32)

    def rounded(self, *args):  # type: ignore[no-untyped-def]
        out = attend(self, *args)
        return torch.where(out.abs() >= 4, out + 1 / 32, out)

    make_batch = tool.make_batch

    def large(*args):  # type: ignore[no-untyped-def]
        query, (kv,), meta = make_batch(*args)
        kv.values *= 4
        return query, [kv], meta

    monkeypatch.setattr(tool, "make_batch", large)
    monkeypatch.setattr(tool.TritonBackend, "attend", rounded)
    found = tool.sweep_prefill(shape, (24,), CANDIDATES[:1], torch.float32, CPU, Clock(), 1)
    assert found["left_out"] == {} and len(found["configs"]) == 2


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ([], "there is no GPU that torch can see here"),
        (["--shapes", "llama-3-8b,gpt-5"], "--shapes llama-3-8b,gpt-5 is not valid; allowed: qwen2.5-0.5b, qwen3-0.6b"),
        (["--parts", "reduce"], "--parts reduce is not valid; allowed: prefill, decode"),
        (["--rounds", "0"], "--rounds 0 is not valid; allowed: an integer >= 1"),
        (["--calls", "-1"], "--calls -1 is not valid"),
    ],
)
def test_what_cannot_work_is_one_line(
    typed: list[str],
    message: str,
    tool: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["sweep_kernels.py", *typed])
    with pytest.raises(SystemExit) as ended:
        tool.main()
    assert ended.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


def test_the_command_from_end_to_end(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a CPU that says it is a GPU, with one small shape: the file that the next person would get."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Abacus 2 (80 GB)")
    monkeypatch.setattr(tool, "DEVICE", CPU)
    monkeypatch.setattr("folovllm.course.bench.machine.hardware", lambda device: {"gpu": "NVIDIA Abacus 2 (80 GB)"})
    monkeypatch.setattr(tool, "SHAPES", (tool.Shape("tiny", 4, 2, 16),))
    monkeypatch.setattr(tool, "PREFILLS", ((8,), (6, 6)))
    monkeypatch.setattr(tool, "DECODES", ((2, 5),))
    monkeypatch.setattr(tool.sweep_decode, "__defaults__", (1,))
    monkeypatch.setattr(tool, "prefill_candidates", lambda: CANDIDATES[:1])
    monkeypatch.setattr(tool, "decode_candidates", lambda: CANDIDATES[1:])
    monkeypatch.setattr(tool, "graph_timer", lambda calls: lambda works: float(calls))
    out = tmp_path / "kernels.json"
    monkeypatch.setattr(sys, "argv", ["sweep_kernels.py", "--rounds", "2", "--calls", "3", "--out", str(out)])
    tool.main()
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["hardware"]["gpu"] == "NVIDIA Abacus 2 (80 GB)" and report["dtype"] == "bfloat16"
    assert [e["lengths"] for e in report["prefill"]] == [[8], [6, 6]]
    assert [(e["requests"], e["kv_len"]) for e in report["decode"]] == [(2, 5)]
    assert all(len(e["configs"]) == 2 for e in report["prefill"] + report["decode"])
    assert set(report["picked"]) == {"prefill", "decode"} and set(report["picked"]["prefill"]) == {"16"}
    assert report["picked"]["decode"]["16"]["config"] in report["decode"][0]["configs"]
    again = "python -m folovllm.course.measure.sweep_kernels"
    again += " --parts prefill,decode --shapes tiny --dtype bfloat16 --rounds 2 --calls 3"
    assert report["command"] == again
