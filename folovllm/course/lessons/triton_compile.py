"""Compile the kernels for GPUs that this machine does not have, and read the resources that they use.

Triton's compiler needs no GPU: for a given architecture it writes PTX, NVIDIA's virtual assembly, and its bundled
`ptxas` turns that into machine code, from which these can be read::

    registers        per thread; the threads of a program share the 65,536 of a multiprocessor
    spilled          bytes per thread that did not fit into registers: written to memory and read back
    shared           bytes of shared memory per program
    tensor_cores     tensor core instructions (`mma` on sm_80, `wgmma` too on sm_90), counted in PTX

So a test without a GPU can check that a kernel fits, though not its speed. A process with TRITON_INTERPRET=1 cannot
compile.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from folovllm.attention.backend import AttentionParams
from folovllm.attention.triton_backend import COPY_CHUNK, INTERPRETED, WRITE_CHUNK, attention_constants
from folovllm.attention.triton_configs import KernelConfig
from folovllm.attention.triton_kernels import attention_kernel, copy_kernel, reduce_kernel, write_kernel

MAX_REGISTERS, MAX_REGISTERS_PER_PROGRAM = 255, 65536
# Compute capability -> maximum bytes of shared memory per program (CUDA C++ Programming Guide, technical
# specifications per compute capability); FEWEST for all others.
MAX_SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
FEWEST = 99 * 1024
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


@dataclass(frozen=True)
class Compiled:
    """The resources of a kernel on the GPU it was compiled for."""

    capability: int
    threads: int
    registers: int
    spilled: int
    shared: int
    tensor_cores: int

    def problems(self, tensor_cores: bool = False) -> list[str]:
        """What would make it slow or impossible to launch. tensor_cores: it must use tensor cores."""
        limit, total = MAX_SHARED.get(self.capability, FEWEST), self.registers * self.threads
        found = {
            f"{self.spilled} bytes of each thread's registers are spilled": self.spilled > 0,
            f"{self.registers} registers per thread, of {MAX_REGISTERS}": self.registers > MAX_REGISTERS,
            f"{total} registers, of {MAX_REGISTERS_PER_PROGRAM}": total > MAX_REGISTERS_PER_PROGRAM,
            f"{self.shared} bytes of shared memory, of {limit}": self.shared > limit,
            "no tensor core instruction": tensor_cores and self.tensor_cores == 0,
        }
        return [problem for problem, is_there in found.items() if is_there]


def compile_attention(
    config: KernelConfig,
    capability: int,
    dtype: torch.dtype,
    head_dim: int,
    heads: tuple[int, int] = (8, 4),
    block_size: int = 16,
    sliding_window: int | None = None,
    softcap: float | None = None,
    value_dim: int | None = None,
    sinks: bool = False,
) -> Compiled:
    """`attention_kernel` in that configuration, with its number of segments. heads: query heads and KV heads.

    value_dim: the head size of values, if it is not that of keys.
    """
    params = AttentionParams(1.0, sliding_window, softcap, torch.zeros(heads[0]) if sinks else None)
    constants = attention_constants(config, *heads, (head_dim, value_dim or head_dim), block_size, params)
    constants |= {"SEGMENTS": config.segments}
    numbers, partial = POINTERS[dtype], "*fp32" if config.segments > 1 else POINTERS[dtype]
    types = {
        **dict.fromkeys(("query", "keys", "values", "out", "sinks"), numbers),
        **dict.fromkeys(("block_table", "seq_lens", "query_start_loc"), "*i32"),
        **dict.fromkeys(("partial_out", "partial_max", "partial_sum"), partial),
        **dict.fromkeys(("num_requests", "stride_query", "stride_key", "stride_value", "stride_table"), "i32"),
        **dict.fromkeys(("scale", "softcap"), "fp32"),
    }
    return compile_kernel(attention_kernel, types, constants, capability, config.warps, config.stages)


def compile_reduce(config: KernelConfig, capability: int, dtype: torch.dtype, head_dim: int) -> Compiled:
    """`reduce_kernel` for the segments of that configuration."""
    constants = attention_constants(config, 8, 4, (head_dim, head_dim), 16, AttentionParams(1.0))
    constants = {name: constants[name] for name in ("NUM_HEADS", "VALUE_DIM", "PADDED_VALUE")}
    types = {
        "out": POINTERS[dtype],
        **dict.fromkeys(("partial_out", "partial_max", "partial_sum"), "*fp32"),
        "query_start_loc": "*i32",
        "num_requests": "i32",
    }
    return compile_kernel(reduce_kernel, types, constants | {"SEGMENTS": config.segments}, capability)


def compile_write(capability: int, dtype: torch.dtype, width: int) -> Compiled:
    """`write_kernel` for tokens with `width` K elements."""
    types = {
        **dict.fromkeys(("key", "value", "keys", "values"), POINTERS[dtype]),
        "slot_mapping": "*i64",
        **dict.fromkeys(("stride_key", "stride_value"), "i32"),
    }
    return compile_kernel(write_kernel, types, {"WIDTH": width, "VALUE_WIDTH": width, "CHUNK": WRITE_CHUNK}, capability)


def compile_copy(capability: int, dtype: torch.dtype, block_numbers: int) -> Compiled:
    """`copy_kernel` for blocks of `block_numbers` K elements, in a pool with offsets beyond 32 bits."""
    types = {"pool": POINTERS[dtype], "pairs": "*i32", "stride_layer": "i64"}
    return compile_kernel(copy_kernel, types, {"BLOCK_NUMBERS": block_numbers, "CHUNK": COPY_CHUNK}, capability)


def compile_kernel(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    capability: int,
    warps: int = 4,
    stages: int = 3,
) -> Compiled:
    """Compile for sm_`capability` a kernel with arguments of the given types, and constants for all the others.

    Pointers and strides are declared divisible by 16, as they are at a launch with the usual shapes, so that Triton
    loads 16 bytes at a time. The defaults of warps and stages are Triton's. Raises RuntimeError in a process with
    TRITON_INTERPRET=1, or if Triton lacks NVIDIA's tools.
    """
    if INTERPRETED:
        raise RuntimeError("kernels cannot be compiled: TRITON_INTERPRET=1 was set when Triton was imported")
    index = kernel.arg_names.index
    aligned = [name for name, kind in types.items() if kind.startswith("*") or name.startswith("stride")]
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in kernel.arg_names},
        {(index(name),): value for name, value in constants.items()},
        {(index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    registers, spilled = read_usage(compiled.asm["cubin"])
    tensor_cores = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)", compiled.asm["ptx"]))
    return Compiled(capability, 32 * warps, registers, spilled, compiled.metadata.shared, tensor_cores)


def read_usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of stack per thread, which holds only spilled registers."""
    tool = triton.knobs.nvidia.cuobjdump
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        done = subprocess.run([tool.path, "-res-usage", str(file)], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no usage of the kernel: {done.stdout} {done.stderr}")
    return int(found[1]), int(found[2])
