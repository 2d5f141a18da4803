"""One decoder for Llama, Mistral, Qwen2 and Qwen3, on flattened tokens (vLLM: `vllm/model_executor/models/llama.py`).

`DecoderConfig` holds the differences between the four: biases (Qwen2), a norm on queries and keys (Qwen3), a sliding
window (Mistral), a scaled RoPE (Llama 3). The tokens of all requests of a step share one axis:

    token ids [T] -> embedding [T, E] -> layers -> norm [T, E] -> the rows that sample [N, E] -> logits [N, V]

Only attention distinguishes requests, by the metadata, which is an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import PretrainedConfig

from folovllm.attention.backend import AttentionBackend, AttentionParams, LayerKV
from folovllm.attention.metadata import AttentionMetadata
from folovllm.checks import invalid
from folovllm.kv_cache.formulas import head_dim_of
from folovllm.models.layers import (
    Linear,
    RMSNorm,
    RotaryEmbedding,
    empty_parameter,
    rms_norm,
    rope_frequencies,
    rotate,
)
from folovllm.models.paged_model import KVShape

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class DecoderConfig(KVShape):
    """The fields of a Hugging Face config that the decoder uses."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    norm_eps: float
    rope: dict[str, Any]
    tied_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]  # per layer: tokens that a token attends to, itself included; None: all

    @classmethod
    def from_hf(cls, hf: PretrainedConfig) -> DecoderConfig:
        """Raises ValueError for a model type or an activation that this decoder does not have."""
        if hf.model_type not in MODEL_TYPES:
            raise invalid("model_type", hf.model_type, ", ".join(MODEL_TYPES))
        if hf.hidden_act != "silu":
            raise invalid("hidden_act", hf.hidden_act, "'silu'")
        # A field counts only for the model types whose Hugging Face code reads it: others may hold it unused.
        has_bias = hf.model_type in ("llama", "qwen3") and bool(hf.attention_bias)
        return cls(
            vocab_size=hf.vocab_size,
            hidden_size=hf.hidden_size,
            intermediate_size=hf.intermediate_size,
            num_layers=hf.num_hidden_layers,
            num_heads=hf.num_attention_heads,
            num_kv_heads=hf.num_key_value_heads,
            head_dim=head_dim_of(hf),
            norm_eps=hf.rms_norm_eps,
            rope=dict(hf.rope_parameters),
            tied_embeddings=hf.tie_word_embeddings,
            qkv_bias=hf.model_type == "qwen2" or has_bias,
            out_bias=has_bias,
            mlp_bias=hf.model_type == "llama" and bool(hf.mlp_bias),
            qk_norm=hf.model_type == "qwen3",
            windows=windows_of(hf),
        )


def windows_of(hf: PretrainedConfig) -> tuple[int | None, ...]:
    """The window of each layer: Llama has none, Mistral one for all, Qwen as `layer_types` says.

    Raises ValueError for a kind of layer that Qwen does not have.
    """
    if hf.model_type == "llama":
        return (None,) * hf.num_hidden_layers
    if hf.model_type == "mistral":
        return (hf.sliding_window,) * hf.num_hidden_layers
    unknown = sorted(set(hf.layer_types) - set(LAYER_TYPES))
    if unknown:
        raise ValueError(f"layer_types={unknown} is not valid; allowed: {', '.join(LAYER_TYPES)}")
    return tuple(hf.sliding_window if kind == "sliding_attention" else None for kind in hf.layer_types)


class Attention(nn.Module):
    """Project to queries, keys and values, write K/V to the pool, attend, project back.

    Queries and keys are adjacent in the fused projection, so norm and RoPE are applied to all Hq + Hkv heads at once.
    """

    def __init__(self, config: DecoderConfig, layer: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.sizes = [config.num_heads * config.head_dim, *2 * [config.num_kv_heads * config.head_dim]]
        self.qkv = Linear(config.hidden_size, sum(self.sizes), config.qkv_bias, dtype, device)
        self.out = Linear(self.sizes[0], config.hidden_size, config.out_bias, dtype, device)
        self.q_norm = empty_parameter(config.head_dim, dtype=dtype, device=device) if config.qk_norm else None
        self.k_norm = empty_parameter(config.head_dim, dtype=dtype, device=device) if config.qk_norm else None
        self.eps = config.norm_eps
        self.params = AttentionParams(config.head_dim**-0.5, config.windows[layer])

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], kv: LayerKV, meta: AttentionMetadata, backend: AttentionBackend
    ) -> Tensor:
        heads = self.qkv(x).view(len(x), -1, self.head_dim)  # [T, Hq + 2 Hkv, D]
        query_key, value = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            weights = [self.q_norm.expand(self.num_heads, -1), self.k_norm.expand(self.num_kv_heads, -1)]
            query_key = rms_norm(query_key, torch.cat(weights), self.eps)
        query_key = rotate(query_key, *rope)
        query, key = query_key.split([self.num_heads, self.num_kv_heads], dim=1)  # [T, Hq, D], [T, Hkv, D]
        # Write all K/V of the step before attending: a request may read blocks that another one writes in this step.
        backend.write(kv, key, value, meta)
        mixed = backend.attend(query, kv, meta, self.params)  # [T, Hq, D]
        return self.out(mixed.flatten(1))


class MLP(nn.Module):
    """silu(gate(x)) * up(x), then down (SwiGLU, Shazeer, 2020)."""

    def __init__(self, config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, config.mlp_bias, dtype, device)
        self.down = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # each [T, I]
        return self.down(silu(gate) * up)


class DecoderLayer(nn.Module):
    """Attention and an MLP, each after a norm and with a residual connection."""

    def __init__(self, config: DecoderConfig, layer: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype, device)
        self.attention = Attention(config, layer, dtype, device)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype, device)
        self.mlp = MLP(config, dtype, device)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], kv: LayerKV, meta: AttentionMetadata, backend: AttentionBackend
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, kv, meta, backend)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """The whole model. `folovllm.models.weights` fills its weights."""

    layers: Sequence[DecoderLayer]

    def __init__(self, config: DecoderConfig, max_positions: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config, self.dtype, self.device = config, dtype, device
        self.max_positions = max_positions
        self.embedding = empty_parameter(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        layers = [DecoderLayer(config, i, dtype, device) for i in range(config.num_layers)]
        self.layers = nn.ModuleList(layers)  # type: ignore[assignment]
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, dtype, device)
        self.head = Linear(config.hidden_size, config.vocab_size, False, dtype, device)
        if config.tied_embeddings:
            self.head.weight = self.embedding
        self.rotary = RotaryEmbedding(rope_frequencies(config.rope, config.head_dim), max_positions, dtype, device)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv: list[LayerKV],
        meta: AttentionMetadata,
        backend: AttentionBackend,
    ) -> Tensor:
        x = self.embedding[token_ids]  # [T, E]
        rope = self.rotary(positions)
        for layer, layer_kv in zip(self.layers, kv, strict=True):
            x = layer(x, rope, layer_kv, meta, backend)
        return self.norm(x)

    def pack(self) -> None:
        """Reorder the weights of linear layers for a CPU in bfloat16. Elsewhere a no-op."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)
