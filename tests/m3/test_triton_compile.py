"""The kernels as compiled for GPUs that are not here: that they fit, and that these checks notice when they do not.

Compiling takes a second or so per kernel, so this takes a choice of them. All that is shipped:

    FOLOVLLM_COMPILE_ALL=1 python -m pytest tests/m3/test_triton_compile.py
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from folovllm.attention.triton_configs import KernelConfig, choose_configs
from tests.needs import is_there

if not is_there("triton"):
    pytest.skip("needs the package triton", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets here and compiles nothing", allow_module_level=True)

import triton

from folovllm.course.lessons import triton_compile
from folovllm.course.lessons.triton_compile import (
    Compiled,
    compile_attention,
    compile_copy,
    compile_reduce,
    compile_write,
)

ROOT = Path(__file__).resolve().parents[2]
ALL = os.environ.get("FOLOVLLM_COMPILE_ALL") == "1"
CAPABILITIES = (80, 90)
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
Kernel = tuple[str, torch.dtype, int, dict[str, Any]]  # prefill or decode, format, head size, what else differs

CHOSEN: list[Kernel] = [
    ("prefill", FLOAT16, 64, {}),
    ("prefill", BFLOAT16, 128, {"heads": (32, 8)}),
    ("prefill", BFLOAT16, 256, {"softcap": 50.0}),
    ("prefill", FLOAT32, 256, {}),
    ("prefill", BFLOAT16, 192, {"value_dim": 128}),
    ("prefill", BFLOAT16, 64, {"sinks": True, "sliding_window": 128}),
    ("decode", BFLOAT16, 64, {"sinks": True, "heads": (64, 8)}),
    ("decode", BFLOAT16, 128, {}),
    ("decode", FLOAT16, 256, {"sliding_window": 4096}),
    ("decode", FLOAT32, 128, {}),
]
EVERYTHING: list[Kernel] = [
    (kind, dtype, dim, extra)
    for kind in ("prefill", "decode")
    for dtype in (FLOAT16, BFLOAT16, FLOAT32)
    for dim in (24, 64, 80, 128, 192, 256)
    for extra in (
        {},
        {"heads": (5, 1), "block_size": 1},
        {"heads": (71, 1), "block_size": 256},
        {"sliding_window": 512, "softcap": 50.0},
        {"sinks": True, "value_dim": 64},
    )
]


def name_of(kernel: Kernel) -> str:
    kind, dtype, dim, extra = kernel
    return f"{kind}-{str(dtype).removeprefix('torch.')}-{dim}-{'-'.join(f'{k}={v}' for k, v in extra.items())}"


def shipped(kind: str, dtype: torch.dtype, dim: int, capability: int) -> KernelConfig:
    configs = choose_configs(dtype, dim, (capability // 10, capability % 10))
    return configs.prefill if kind == "prefill" else configs.decode


# ---------------------------------------------------------------------- what is shipped fits


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernel", EVERYTHING if ALL else CHOSEN, ids=name_of)
def test_the_attention_kernel_fits(kernel: Kernel, capability: int) -> None:
    kind, dtype, dim, extra = kernel
    config = shipped(kind, dtype, dim, capability)
    ways = {config.segments, 1} if ALL and not extra else {config.segments}
    for segments in ways:
        compiled = compile_attention(dataclasses.replace(config, segments=segments), capability, dtype, dim, **extra)
        assert compiled.problems(tensor_cores=dtype != FLOAT32) == []
        assert compiled.threads == 32 * config.warps and compiled.registers > 16
        if capability == 80:  # the same table serves cards with less
            assert dataclasses.replace(compiled, capability=86).problems() == []


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_other_kernels_fit(capability: int) -> None:
    for dtype in (FLOAT32, BFLOAT16):
        for dim in (24, 256):
            decode = shipped("decode", dtype, dim, capability)
            assert compile_reduce(decode, capability, dtype, dim).problems() == []
        assert compile_write(capability, dtype, 8 * 128).problems() == []
        assert compile_copy(capability, dtype, 256 * 8 * 128).problems() == []


def test_where_a_row_begins_is_worked_out_in_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large pool has more numbers than 32 bits can count. Within a row they do."""
    written: list[str] = []
    compile_it = triton.compile

    def watched(*args: Any, **kwargs: Any) -> Any:
        compiled = compile_it(*args, **kwargs)
        written.append(compiled.asm["ttir"])
        return compiled

    monkeypatch.setattr(triton_compile.triton, "compile", watched)
    compile_attention(KernelConfig(64, 32, 4, 2, two_loops=True), 80, BFLOAT16, 64)
    compile_attention(KernelConfig(16, 32, 4, 2, segments=8), 80, BFLOAT16, 64)
    compile_write(80, BFLOAT16, 1024)
    compile_copy(80, BFLOAT16, 4096)
    rows, one = r"tensor<(?:\d+x1|1x\d+)x!tt\.ptr<\w+>>, tensor<\w+x(i\d+)>", r"!tt\.ptr<bf16>, (i\d+)"
    found = [
        re.findall(rf"= tt\.addptr .* : {kind}", text)
        for kind, text in zip((rows, rows, one, one), written, strict=True)
    ]
    # Queries, keys and values in two loops, and the output; queries, keys, values and parts; four; from and to.
    assert found == [["i64"] * 6, ["i64"] * 4, ["i64"] * 4, ["i64"] * 2]


# ---------------------------------------------------------------------- and what does not is noticed


def test_a_tile_that_does_not_fit_into_registers_is_noticed() -> None:
    """The output alone is 128 rows of 256 numbers: 256 for each of 128 threads."""
    found = compile_attention(KernelConfig(128, 16, 4, 1), 80, FLOAT16, 256).problems()
    assert any("registers are spilled" in problem for problem in found)


def test_more_stages_than_shared_memory_holds_are_noticed() -> None:
    """A tile of keys and one of values take 32 KiB, and there are several of both."""
    found = compile_attention(KernelConfig(64, 64, 4, 17), 90, FLOAT16, 128).problems()
    assert any("bytes of shared memory" in problem for problem in found)


def test_products_without_tensor_cores_are_noticed() -> None:
    """float32 is multiplied number by number: exactly, and slowly."""
    compiled = compile_attention(KernelConfig(16, 16, 4, 1), 80, FLOAT32, 16)
    assert compiled.problems() == []
    assert compiled.problems(tensor_cores=True) == ["no tensor core instruction"]


def test_every_limit_has_its_words() -> None:
    fine = Compiled(capability=90, threads=256, registers=255, spilled=0, shared=227 * 1024, tensor_cores=1)
    assert fine.problems(tensor_cores=True) == []
    for change, word in (
        ({"registers": 256}, "registers per thread"),
        ({"threads": 512}, "registers, of 65536"),
        ({"spilled": 8}, "spilled"),
        ({"shared": 227 * 1024 + 1}, "shared memory"),
        ({"tensor_cores": 0}, "tensor core"),
        ({"capability": 80}, "shared memory"),
    ):
        (problem, *_) = dataclasses.replace(fine, **change).problems(tensor_cores=True)
        assert word in problem


def test_a_process_that_interprets_says_that_it_cannot_compile() -> None:
    code = """
import torch
from folovllm.course.lessons.triton_compile import compile_write
try:
    compile_write(80, torch.float32, 64)
except RuntimeError as error:
    print(error)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "kernels cannot be compiled: TRITON_INTERPRET=1" in done.stdout, done.stderr


# ---------------------------------------------------------------------- which configuration


@pytest.mark.parametrize("dim", [1, 16, 64, 65, 128, 129, 256])
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_every_size_and_card_has_configurations(dim: int, capability: tuple[int, int]) -> None:
    for dtype in (FLOAT32, FLOAT16, BFLOAT16):
        configs = choose_configs(dtype, dim, capability)
        assert configs.prefill.segments == 1 and configs.decode.segments > 1 and configs.decode.rows == 16


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rows": 8}, "rows=8 is not valid; allowed: powers of two from 16 to 256"),
        ({"rows": 48}, "rows=48 is not valid"),
        ({"tile": 512}, "tile=512 is not valid; allowed: powers of two from 16 to 256"),
        ({"warps": 3}, "warps=3 is not valid; allowed: powers of two from 1 to 16"),
        ({"stages": 0}, "stages=0 is not valid; allowed: an integer >= 1"),
        ({"segments": 6}, "segments=6 is not valid"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        KernelConfig(**{"rows": 16, "tile": 16, "warps": 4, "stages": 1, **kwargs})
    assert message in str(caught.value)
