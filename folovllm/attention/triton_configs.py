"""How the attention kernel is cut, per kind of step, GPU, number format and head size.

A tile that is too small wastes tensor cores and loads; one that is too large does not fit. What it has to fit into:

- *Registers*: 255 of 32 bits per thread. The queries [rows, D], the output so far [rows, D] and the scores
  [rows, tile] lie there, spread over 32 threads per warp. What does not fit is *spilled*: written to memory and read
  back, in the innermost loop.
- *Shared memory*: 99 KiB for a program on most cards, 163 KiB on an A100, 227 KiB on an H100. Tiles of keys and of
  values lie there, [tile, D] each: one that is multiplied, and those that are on their way meanwhile.

Tensor cores multiply at least 16 rows. A decode has as many rows as heads share a KV head and is padded to 16: it
waits for memory anyway. A prefill has tokens enough for 64 or 128. float32 has no tensor cores here (they would round
its inputs to 10 bits), so its products are made one by one and its tiles are small.

The tables hold what compiles for every head size without a spill, which tests check without a GPU, for the pinned
Triton: another release places registers differently. Which of those that fit is fastest, only a GPU can tell:
`python -m folovllm.course.measure.sweep_kernels` tries them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

MAX_HEAD_DIM = 256
ENOUGH_PROGRAMS = 256  # with fewer, parts of a large GPU (an A100 has 108, an H100 132) have nothing or little to do


@dataclass(frozen=True)
class KernelConfig:
    """One way to cut the attention kernel. Raises ValueError for a number that it cannot be cut with."""

    rows: int  # query tokens times packed heads in a tile
    tile: int  # keys in a tile
    warps: int  # of 32 threads, per program
    # How far ahead of the products the compiler may fetch. Where K/V is must be fetched before K/V itself, so 2 fetches
    # one tile ahead, 3 also what the block table says of the next, and only 5 two tiles.
    stages: int
    segments: int = 1  # pieces that K/V is split into where there would be too few programs; 1 for never
    # One for the tiles that every row sees, one for those that need a mask. That is twice the code, and pays where
    # tensor cores make a mask seem long.
    two_loops: bool = False

    def __post_init__(self) -> None:
        for name, least, most in (("rows", 16, 256), ("tile", 16, 256), ("warps", 1, 16), ("segments", 1, 256)):
            value = getattr(self, name)
            if value < least or value > most or value & (value - 1):
                raise ValueError(f"{name}={value} is not valid; allowed: powers of two from {least} to {most}")
        if self.stages < 1:
            raise ValueError(f"stages={self.stages} is not valid; allowed: an integer >= 1")


@dataclass(frozen=True)
class KernelConfigs:
    """The cuts for one kind of head on one kind of GPU."""

    prefill: KernelConfig  # for steps in which some request has several new tokens
    decode: KernelConfig  # for those in which each has one


# Largest head size -> configurations. For 16-bit formats on cards with 99 KiB of shared memory or more (from sm_80 on),
AMPERE = {
    64: KernelConfigs(KernelConfig(128, 64, 8, 3, two_loops=True), KernelConfig(16, 64, 4, 3, 16)),
    128: KernelConfigs(KernelConfig(128, 32, 8, 3, two_loops=True), KernelConfig(16, 32, 4, 3, 16)),
    256: KernelConfigs(KernelConfig(64, 32, 8, 3, two_loops=True), KernelConfig(16, 32, 4, 3, 16)),
}
# on data centre cards with 227 KiB (sm_90, sm_100),
HOPPER = {
    64: KernelConfigs(KernelConfig(128, 64, 4, 3, two_loops=True), KernelConfig(16, 64, 4, 3, 16)),
    128: KernelConfigs(KernelConfig(128, 64, 8, 3, two_loops=True), KernelConfig(16, 64, 4, 3, 16)),
    256: KernelConfigs(KernelConfig(64, 64, 8, 3, two_loops=True), KernelConfig(16, 32, 4, 3, 16)),
}
# and for float32 on any.
FLOAT32 = {
    64: KernelConfigs(KernelConfig(32, 32, 8, 2), KernelConfig(16, 16, 8, 2, 16)),
    128: KernelConfigs(KernelConfig(16, 32, 8, 1), KernelConfig(16, 16, 8, 1, 16)),
    256: KernelConfigs(KernelConfig(16, 32, 8, 1), KernelConfig(16, 32, 8, 1, 16)),
}


@cache
def choose_configs(dtype: torch.dtype, head_dim: int, capability: tuple[int, int]) -> KernelConfigs:
    """The configurations for a number format, a head size and a GPU's compute capability, (9, 0) for an H100.

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
