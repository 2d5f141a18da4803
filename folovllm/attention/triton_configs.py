"""Tile sizes of the attention kernel, per kind of step, GPU, number format and head size.

A tile that is too small wastes tensor cores and loads; one that is too large does not fit. The limits are:

- *Registers*: 255 of 32 bits per thread. They hold the queries [rows, D], the output so far [rows, D] and the scores
  [rows, tile], spread over the 32 threads of each warp. What does not fit is *spilled*: written to memory and read
  back, in the innermost loop.
- *Shared memory*: 99 KiB per program on most cards, 163 KiB on an A100, 227 KiB on an H100. It holds tiles of keys and
  of values, [tile, D] each: the one being multiplied, and those being fetched.

Tensor cores multiply at least 16 rows. A decode has one row per query head of a KV head, padded to 16: it waits for
memory anyway. A prefill has enough tokens for 64 or 128 rows. float32 does not use tensor cores (they would round its
inputs to 10 bits), so its products are slow and its tiles are small.

The tables hold sizes that compile without a spill for every head size. Tests check that without a GPU, for the pinned
Triton; other releases allocate registers differently. Which of them is fastest has to be measured on a GPU:
`python -m folovllm.course.measure.sweep_kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from folovllm.checks import check_int, invalid

MAX_HEAD_DIM = 256
ENOUGH_PROGRAMS = 256  # fewer leave multiprocessors of a large GPU idle (an A100 has 108, an H100 132)


@dataclass(frozen=True)
class KernelConfig:
    """Tile sizes of the attention kernel. Raises ValueError for sizes that the kernel does not support."""

    rows: int  # query tokens times packed heads in a tile
    tile: int  # keys in a tile
    warps: int  # per program, of 32 threads each
    # How far ahead the compiler may fetch. A tile's block table entries are fetched before its K/V, so 2 fetches one
    # tile ahead, 3 also the next tile's table entries, and only 5 two tiles.
    stages: int
    segments: int = 1  # into which K/V is split if there are too few programs; 1: never split
    # A loop without masks for the tiles that every row sees, then one with masks. This doubles the code, and pays off
    # if tensor cores make the products fast.
    two_loops: bool = False

    def __post_init__(self) -> None:
        for name, least, most in (("rows", 16, 256), ("tile", 16, 256), ("warps", 1, 16), ("segments", 1, 256)):
            value = getattr(self, name)
            if value < least or value > most or value & (value - 1):
                raise invalid(name, value, f"powers of two from {least} to {most}")
        check_int("stages", self.stages, 1)


@dataclass(frozen=True)
class KernelConfigs:
    """Tile sizes for one head size on one kind of GPU."""

    prefill: KernelConfig  # for steps in which some request has several new tokens
    decode: KernelConfig  # for steps in which every request has one new token


# Largest head size -> tile sizes.
AMPERE = {  # 16-bit formats, from sm_80 on: 99 KiB of shared memory or more
    64: KernelConfigs(KernelConfig(128, 64, 8, 3, two_loops=True), KernelConfig(16, 64, 4, 3, 16)),
    128: KernelConfigs(KernelConfig(128, 32, 8, 3, two_loops=True), KernelConfig(16, 32, 4, 3, 16)),
    256: KernelConfigs(KernelConfig(64, 32, 8, 3, two_loops=True), KernelConfig(16, 32, 4, 3, 16)),
}
HOPPER = {  # 16-bit formats on data centre cards with 227 KiB (sm_90, sm_100)
    64: KernelConfigs(KernelConfig(128, 64, 4, 3, two_loops=True), KernelConfig(16, 64, 4, 3, 16)),
    128: KernelConfigs(KernelConfig(128, 64, 8, 3, two_loops=True), KernelConfig(16, 64, 4, 3, 16)),
    256: KernelConfigs(KernelConfig(64, 64, 8, 3, two_loops=True), KernelConfig(16, 32, 4, 3, 16)),
}
FLOAT32 = {
    64: KernelConfigs(KernelConfig(32, 32, 8, 2), KernelConfig(16, 16, 8, 2, 16)),
    128: KernelConfigs(KernelConfig(16, 32, 8, 1), KernelConfig(16, 16, 8, 1, 16)),
    256: KernelConfigs(KernelConfig(16, 32, 8, 1), KernelConfig(16, 32, 8, 1, 16)),
}


@cache
def choose_configs(dtype: torch.dtype, head_dim: int, capability: tuple[int, int]) -> KernelConfigs:
    """Tile sizes for a number format, a head size and a GPU's compute capability, (9, 0) for an H100.

    Raises ValueError for a head size above `MAX_HEAD_DIM` and a format other than float32, float16 and bfloat16.
    """
    where = "with attention_backend='triton'"
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim={head_dim} is not valid {where}; allowed: <= {MAX_HEAD_DIM}")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype={dtype} is not valid {where}; allowed: float32, float16, bfloat16")
    hopper = capability[0] in (9, 10)
    table = FLOAT32 if dtype == torch.float32 else HOPPER if hopper else AMPERE
    return next(configs for largest, configs in table.items() if head_dim <= largest)
