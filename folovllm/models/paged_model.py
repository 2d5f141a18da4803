"""What the paged runner asks of a model. Our own decoder and `contrib/transformers` answer it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from folovllm.attention.backend import AttentionBackend, LayerKV
from folovllm.attention.metadata import AttentionMetadata


class ModelShape(Protocol):
    """What the pool must know of a model: the same in all layers."""

    @property
    def num_layers(self) -> int:
        """Layers with K/V."""

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""

    @property
    def head_dim(self) -> int:
        """Numbers per head."""


class PagedModel(Protocol):
    """A model on flattened tokens and K/V in blocks.

    max_positions: tokens that a request may have. dtype, device: of its weights, its hidden states and its K/V.
    """

    max_positions: int
    dtype: torch.dtype
    device: torch.device

    @property
    def config(self) -> ModelShape:
        """Its shape."""

    def __call__(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv: list[LayerKV],
        meta: AttentionMetadata,
        backend: AttentionBackend,
    ) -> Tensor:
        """Token ids and positions, [T] each, in; hidden states [T, E] out. K/V of all tokens is written to `kv`."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states of the rows that sample, [N, E], as logits, [N, V]."""
