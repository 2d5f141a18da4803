"""What the paged runner asks of a model, and which of the two kinds answers (vLLM: `--model-impl`).

Our own decoder is the one to read, and the faster one. All other models, and those of its own four families that are
built in another way, run in Hugging Face's code with our attention.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig

from folovllm.attention.backend import AttentionBackend, LayerKV
from folovllm.attention.metadata import AttentionMetadata
from folovllm.models.decoder import DecoderConfig
from folovllm.models.hf_check import load_hf_paged
from folovllm.models.layers import rope_frequencies
from folovllm.models.loader import ModelSource
from folovllm.models.weights import load_decoder


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


def load_paged_model(
    source: ModelSource,
    hf_config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    backend: AttentionBackend,
    model_impl: str = "auto",
    load_format: str = "auto",
    seed: int = 0,
    max_positions: int | None = None,
) -> PagedModel:
    """The model of a checkpoint, ready for inference.

    model_impl: "folovllm" is our decoder, "transformers" Hugging Face's model, "auto" ours where it has all that the
    config asks for. Raises ValueError for what the chosen one does not have, by name, and for weights as `load_decoder`
    and `load_hf_paged` do.
    """
    lacks = None if model_impl == "transformers" else what_decoder_lacks(hf_config)
    if model_impl == "folovllm" and lacks is not None:
        raise ValueError(f"model_impl='folovllm' is not valid for this model: {lacks}; or model_impl='auto'")
    if model_impl == "transformers" or lacks is not None:
        return load_hf_paged(source, hf_config, dtype, device, backend, load_format, seed, max_positions)
    return load_decoder(source, hf_config, dtype, device, load_format, seed, max_positions)


def what_decoder_lacks(hf_config: PretrainedConfig) -> str | None:
    """What our decoder does not have and this config asks for; None if it has everything."""
    try:
        config = DecoderConfig.from_hf(hf_config)
        rope_frequencies(config.rope, config.head_dim)
    except ValueError as error:
        return str(error)
    return None
