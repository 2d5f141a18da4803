"""What the paged runner requires of a model. Our own decoder and `contrib/transformers` implement it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from folovllm.attention.backend import AttentionBackend, LayerKV
from folovllm.attention.metadata import AttentionMetadata


@dataclass(frozen=True)
class KVShape:
    """The K/V of one token, the same in all layers."""

    num_layers: int
    num_kv_heads: int
    head_dim: int  # of a key
    v_head_dim: int | None = field(default=None, kw_only=True)  # of a value; None: as of a key

    @property
    def head_dims(self) -> tuple[int, int]:
        """Head sizes of keys and of values."""
        return self.head_dim, self.v_head_dim or self.head_dim


class PagedModel(Protocol):
    """A model on flattened tokens and K/V in blocks."""

    max_positions: int  # tokens that a request may have
    dtype: torch.dtype  # of weights, hidden states and K/V
    device: torch.device

    @property
    def config(self) -> KVShape: ...

    def __call__(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv: list[LayerKV],
        meta: AttentionMetadata,
        backend: AttentionBackend,
    ) -> Tensor:
        """Token ids and positions, [T] each, to hidden states [T, E]. Writes the K/V of all tokens to `kv`."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states of the rows that sample, [N, E], to logits, [N, V]."""
