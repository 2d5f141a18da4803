"""Online softmax on one row of scores, in plain tensors (Milakov and Gimelshein, 2018; FlashAttention, 2022).

A stable softmax needs the maximum of all scores before it can weigh the first one. Online softmax uses the maximum so
far, and rescales its sums when a larger score appears. After each tile of keys it holds

    maximum    m  = the largest score so far
    total      s  = sum of e^(score - m)
    output     o  = sum of e^(score - m) * value           the attention so far is o / s

and a tile that raises the maximum from m to m' multiplies s and o by e^(m - m'). This is `attend_keys` in
`triton_kernels` for a single query, without blocks and masks. It returns the state after every tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SoftmaxState:
    """The running values after a tile."""

    maximum: float
    total: float
    output: Tensor  # [D]
    rescale: float  # the factor e^(old maximum - maximum) that the tile caused

    @property
    def attention(self) -> Tensor:
        """The attention over the keys so far: [D]."""
        return self.output / self.total


def online_softmax(scores: Tensor, values: Tensor, tile: int, *, rescale: bool = True) -> list[SoftmaxState]:
    """The states after each tile of `tile` keys: scores [S] of one query, values [S, D].

    rescale=False omits the rescaling, as a control: terms of different scales are added. Raises ValueError for no
    scores, other shapes, and a tile below 1.
    """
    if scores.dim() != 1 or values.dim() != 2 or len(scores) != len(values) or len(scores) == 0:
        raise ValueError(
            f"scores={list(scores.shape)}, values={list(values.shape)} are not valid; allowed: [S] and [S, D], S >= 1"
        )
    if tile < 1:
        raise ValueError(f"tile={tile} is not valid; allowed: a number of keys >= 1")
    maximum, total, output = -math.inf, 0.0, torch.zeros_like(values[0])  # output: [D]
    states = []
    for start in range(0, len(scores), tile):
        part = scores[start : start + tile]  # [tile]
        new_maximum = max(maximum, float(part.max()))
        weights = torch.exp(part - new_maximum)  # [tile]
        factor = math.exp(maximum - new_maximum) if rescale else 1.0
        total = total * factor + float(weights.sum())
        output = output * factor + weights @ values[start : start + tile]  # [D]
        maximum = new_maximum
        states.append(SoftmaxState(maximum, total, output, factor))
    return states
