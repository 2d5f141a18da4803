"""The interface of an attention backend: a function of one layer's queries, its K/V pool and the metadata."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from folovllm.attention.metadata import AttentionMetadata


@dataclass(frozen=True)
class AttentionParams:
    """Attention parameters of one layer."""

    scale: float  # multiplies the scores
    sliding_window: int | None = None  # how many tokens a token attends to, itself included; None: all
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap); None: unchanged
    # [Hq], scores of a token without a value: a head may attend to nothing (gpt-oss; Xiao et al., StreamingLLM, 2024)
    sinks: Tensor | None = None


@dataclass
class LayerKV:
    """One layer's pool: keys [blocks, block_size, Hkv, D] and values [blocks, block_size, Hkv, Dv].

    Block 0 is the null block. Dv is D in most models; DeepSeek's keys are larger than its values.
    """

    keys: Tensor
    values: Tensor

    def flat(self) -> tuple[Tensor, Tensor]:
        """Keys [slots, Hkv, D] and values [slots, Hkv, Dv]: views."""
        return self.keys.flatten(0, 1), self.values.flatten(0, 1)


class AttentionBackend(ABC):
    """Computes attention of ragged queries over paged K/V."""

    name: str

    def write(self, kv: LayerKV, key: Tensor, value: Tensor, meta: AttentionMetadata) -> None:
        """Store the new tokens' K [T, Hkv, D] and V [T, Hkv, Dv] at their slots. Called before `attend`."""
        keys, values = kv.flat()
        keys.index_copy_(0, meta.slot_mapping, key)
        values.index_copy_(0, meta.slot_mapping, value)

    def copy_blocks(self, pool: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (from, to), in order, in all layers: a pool is [layers, parts, blocks, size, Hkv, D]."""
        for source, target in pairs:
            pool[:, :, target] = pool[:, :, source]

    @abstractmethod
    def attend(self, query: Tensor, kv: LayerKV, meta: AttentionMetadata, params: AttentionParams) -> Tensor:
        """Each token attends to its own request's K/V up to itself: queries [T, Hq, D] in, [T, Hq, Dv] out.

        Hq is a multiple of Hkv; query head h reads KV head h // (Hq // Hkv). Output rows of padding are finite.
        """
