"""What `folovllm info` says of a config: of any that transformers has, whether an engine of ours runs it or not."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from folovllm.kv_cache.formulas import attention_kind, head_dim_of, held_bytes_per_token, num_kv_heads

# What a config raises that lacks a field, or has another kind of value in it, such as a list of one per layer.
UNREADABLE = (ValueError, TypeError, AttributeError, NotImplementedError, ZeroDivisionError, KeyError)

# Where is_decoder counts. GPT-NeoX has the field, too, and is a decoder whatever it says.
ENCODERS = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation"}


def check_decoder(config: PretrainedConfig) -> None:
    """Raise ValueError for an encoder-decoder, whose K/V is that of two texts."""
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model_type={config.model_type!r} is an encoder-decoder; allowed: decoders, such as llama")


def shape_rows(config: PretrainedConfig, dtype: torch.dtype) -> dict[str, str]:
    """The rows of a table, by name: "not known" for what the config does not say, with the reason for K/V."""
    text = text_config(config)
    longest = number(text, "max_position_embeddings")
    per_token, reason = kv_bytes_or_reason(config, dtype)
    return {
        "architecture": ", ".join(config.architectures or [config.model_type]),
        "layers": shown(number(text, "num_hidden_layers")),
        "hidden size": shown(number(text, "hidden_size"), ""),
        "attention": attention(config),
        "vocabulary": shown(number(text, "vocab_size")),
        "longest sequence": "not known" if longest is None else f"{longest:,} tokens",
        "KV cache per token": reason if per_token is None else f"{per_token:,} bytes",
        "KV cache of the longest": "not known"
        if per_token is None or longest is None
        else f"{per_token * longest / 2**20:,.1f} MiB",
    }


def kv_bytes_or_reason(config: PretrainedConfig, dtype: torch.dtype) -> tuple[int | None, str]:
    """Bytes of K/V of one token, or None and "not known", with the reason."""
    try:
        text = config.get_text_config(decoder=True)
        names = (config.model_type, text.model_type)
        if not any(name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES for name in names):
            raise ValueError(f"model_type={config.model_type!r} is no decoder of text to transformers")
        if getattr(text, "is_decoder", None) is False and text.model_type in ENCODERS:
            raise ValueError(f"model_type={config.model_type!r} is an encoder without is_decoder=True")
        return held_bytes_per_token(config, dtype.itemsize), ""
    except UNREADABLE as error:
        return None, f"not known: {error}"


def attention(config: PretrainedConfig) -> str:
    """The kind, and the heads."""
    try:
        text = config.get_text_config(decoder=True)
        kind, heads = attention_kind(config), text.num_attention_heads
        if kind == "MLA":
            return f"{kind}: {heads} query heads, a latent of {text.kv_lora_rank} + {text.qk_rope_head_dim}"
        return f"{kind}: {heads} query heads, {num_kv_heads(text)} KV heads of {head_dim_of(text)}"
    except UNREADABLE:
        return "not known"


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a config that describes its text; the config itself if it has several."""
    try:
        return config.get_text_config(decoder=True)
    except ValueError:
        return config


def number(config: Any, name: str) -> int | None:
    """A positive integer of a config; None if it has none of that name."""
    try:
        value = getattr(config, name)
    except UNREADABLE:
        return None
    return value if isinstance(value, int) and value > 0 else None


def shown(value: int | None, form: str = ",") -> str:
    """A number, or that it is not known."""
    return "not known" if value is None else format(value, form)
