"""The modules of a decoder layer, on flattened tokens: no batch axis, no padding, shapes [T, ...]."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from folovllm.checks import invalid


def empty_parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """A weight to be filled by a loader, without gradients."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = empty_parameter(size, dtype=dtype, device=device)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale the last axis of x, [..., size], to a mean square of 1, then by `weight`, [size] or broadcast over x."""
    wide = x.float()
    # The mean square from the norm: one pass, and on a CPU twice as fast as squaring and taking the mean.
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1]  # [..., 1]
    return weight * (wide * torch.rsqrt(mean_square + eps)).to(x.dtype)


class Linear(nn.Module):
    """y = x W^T + b, with W of [out, in].

    On a CPU in bfloat16, `pack` keeps the weight in the CPU library's own layout. Otherwise torch reorders it in every
    call.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight: Tensor | None = empty_parameter(outputs, inputs, dtype=dtype, device=device)
        self.bias = empty_parameter(outputs, dtype=dtype, device=device) if bias else None
        self.packed: Tensor | None = None

    def pack(self) -> None:
        """Reorder the weight, if this CPU supports it, and drop the original."""
        weight = self.weight
        if weight is not None and weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and packing_works():
            self.packed, self.weight = packed_weight(weight.data), None

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return packed_linear(x, self.packed, self.bias)
        if self.weight is None:
            raise RuntimeError("this linear layer has no weight")
        return linear(x, self.weight, self.bias)


PACK_ROWS = 16  # the batch size that the packed layout is optimised for: a decode step of a small batch


@cache
def packing_works() -> bool:
    """Whether packed and plain weights give the same product: packing calls functions that are not public API."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 96, generator=generator).bfloat16()  # [out, in]
    rows = torch.randn(5, 96, generator=generator).bfloat16()  # [T, in]
    try:
        product = packed_linear(rows, packed_weight(weight), None)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.allclose(product.float(), linear(rows.float(), weight.float()), rtol=2e-2, atol=2e-1)


def packed_weight(weight: Tensor) -> Tensor:
    """A weight in the CPU library's layout, which only `packed_linear` can read."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` with a packed weight."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


class RotaryEmbedding(nn.Module):
    """Rotates queries and keys by an angle proportional to the position (RoPE, Su et al., 2021).

    Pairs are (i, i + D/2), as in Hugging Face's code. The tables hold the cosine and sine of every position,
    [positions, D] each; the sine carries the sign of its half:

        (a, b) -> (a cos - b sin, b cos + a sin)   =   (a, b) * (cos, cos) + (b, a) * (-sin, sin)
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, inv_freq: Tensor, max_positions: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        positions = torch.arange(max_positions, dtype=torch.float32)
        angles = torch.outer(positions, inv_freq)  # [positions, D/2]
        cos, sin = angles.cos(), angles.sin()
        self.register_buffer("cos", torch.cat([cos, cos], dim=-1).to(device, dtype), persistent=False)
        self.register_buffer("sin", torch.cat([-sin, sin], dim=-1).to(device, dtype), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for positions [T], each [T, 1, D]. All heads and layers of a step use the same."""
        return self.cos[positions, None], self.sin[positions, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to [T, H, D], with the cosines and signed sines of `RotaryEmbedding`."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def rope_frequencies(rope: dict[str, Any], head_dim: int) -> Tensor:
    """Inverse frequencies, [D/2], for the rope types "default" and "llama3".

    Raises ValueError for other types: a wrong rotation would give plausible but wrong text.
    """
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise invalid("rope_type", kind, "'default', 'llama3'")
    # Without scaling, none of the four models reads this field.
    if kind != "default" and rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise invalid("partial_rotary_factor", rope["partial_rotary_factor"], "1.0")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inv_freq = 1.0 / (float(rope["rope_theta"]) ** exponents)
    return llama3_scaling(inv_freq, rope) if kind == "llama3" else inv_freq


def llama3_scaling(inv_freq: Tensor, rope: dict[str, Any]) -> Tensor:
    """Llama 3.1's longer context: divide low frequencies by `factor`, keep high ones, interpolate between."""
    factor, original = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    wavelengths = 2 * math.pi / inv_freq  # in positions
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)  # 0: slow, 1: fast
    return inv_freq * (smooth + (1 - smooth) / factor)
