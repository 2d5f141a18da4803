"""`attention_backend="torch-compiled"`: traced by torch's compiler and counted by it, with nothing compiled.

What the compiler makes of a graph is the compiler's business, takes it seconds, and needs a C++ compiler.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from folovllm.attention import torch_compiled
from folovllm.attention.backend import AttentionParams
from folovllm.attention.torch_compiled import TorchCompiledBackend
from folovllm.runner.paged_runner import PagedRunner
from tests.m3.cases import Case
from tests.m3.ragged import Ragged, attend, expected_attention, make_ragged
from tests.oracle import OracleStats

MOST_GRAPHS = 3


@pytest.fixture(autouse=True)
def a_compiler_without_memory() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours.double(), expected, rtol=5e-6, atol=5e-6)


def finite(*args: Any) -> Ragged:
    """A batch with numbers instead of NaN where nobody may look: the function multiplies them by 0."""
    batch = make_ragged(*args)
    for pool in (batch.kv.keys, batch.kv.values):
        pool.nan_to_num_(3.0)
    return batch


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    pasts=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    block_size=st.sampled_from([1, 3, 16, 256]),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([16, 24, 80]),
    window=st.one_of(st.none(), st.integers(1, 50)),
)
def test_decodes_are_as_the_formula_says(
    pasts: list[int], block_size: int, kv_heads: int, group: int, head_dim: int, window: int | None
) -> None:
    """The function as it is written."""
    batch = finite([(past, 1) for past in pasts], block_size, (kv_heads * group, kv_heads), head_dim)
    params, backend = AttentionParams(head_dim**-0.5, window), TorchCompiledBackend()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_compiled, "compiled", lambda compiler: torch_compiled.decode_attention)
        patch.setattr(backend, "eager", None)
        close(attend(backend, batch, params), expected_attention(batch, params))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_somebody_else_left_in_the_pool_does_no_harm(bad: float) -> None:
    """In the rest of the last block, in blocks beyond, in the null block."""
    batch, params = make_ragged([(5, 1), (9, 1), (0, 1)], 4, spare_blocks=2), AttentionParams(0.25)
    for pool in (batch.kv.keys, batch.kv.values):
        pool.masked_fill_(pool.isnan(), bad)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_compiled, "compiled", lambda compiler: torch_compiled.decode_attention)
        close(attend(TorchCompiledBackend(), batch, params), expected_attention(batch, params))


def test_a_few_graphs_serve_every_step() -> None:
    """One request and several, one block and many, layers with a window and without, and of another scale.

    Sizes that happen to be equal, requests and blocks, or either and heads, are no reason for a graph of their own.
    """
    graphs = CompileCounter()
    backend = TorchCompiledBackend(graphs)
    for pasts in ((0,), (0, 2), (3,), (9, 1), (40,), (7, 63, 0, 12), (200,), (5, 5, 5), (9, 9)):
        for window, scale in ((None, 0.25), (5, 0.25), (40, 0.125)):
            batch, params = finite([(past, 1) for past in pasts], 4), AttentionParams(scale, window)
            close(attend(backend, batch, params), expected_attention(batch, params))
    assert 1 <= graphs.frame_count <= MOST_GRAPHS


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_a_whole_model_says_what_hugging_face_says(name: str, tmp_path: Path, oracle_stats: OracleStats) -> None:
    """Steps that only decode are traced, others are not, and all of them together take few graphs."""
    case = Case(name, tmp_path, (3, 17, 8, 30), 12, ignore_eos=True)
    graphs = CompileCounter()
    traced: list[int] = []

    def watched(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        forward = graphs(module, inputs)

        def run(*args: Any) -> Any:
            traced.append(1)
            return forward(*args)

        return run

    llm = case.llm(attention_backend="torch-compiled", block_size=4)
    runner = llm.engine.core.runner
    assert isinstance(runner, PagedRunner) and isinstance(runner.backend, TorchCompiledBackend)
    assert runner.backend.compiler == "inductor"
    runner.backend.compiler = watched
    case.check(llm, oracle_stats)
    decodes = sum(step.num_prefills == 0 for step in llm.engine.trace)
    layers = len(runner.storage.layers)
    assert len(traced) == decodes * layers > 8 * layers
    assert 1 <= graphs.frame_count <= MOST_GRAPHS
