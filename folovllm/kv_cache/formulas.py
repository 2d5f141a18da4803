"""What a KV cache costs in bytes, from a Hugging Face config alone. What it saves: `course/lessons/formulas.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PretrainedConfig

AttentionKind = Literal["MHA", "GQA", "MQA", "MLA"]

# Layers that store one K and one V (or one latent) per token. Others (linear attention, convolutions) hold a
# state that does not grow with the text, and no formula here describes them.
GROWING_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


def attention_kind(config: PretrainedConfig) -> AttentionKind:
    """How the query heads share keys and values.

    - MHA, multi-head: every query head has K and V of its own.
    - GQA, grouped-query (Ainslie et al. 2023, arXiv:2305.13245): a group of query heads shares one K/V head.
    - MQA, multi-query (Shazeer 2019, arXiv:1911.02150): all query heads share one.
    - MLA, multi-head latent (DeepSeek-V2, arXiv:2405.04434): what is cached is one compressed vector per
      token, from which each head's K and V are computed again, and one small key that carries the position.

    `config` may hold a nested text config. Raises ValueError for a config that these four do not describe.
    """
    config = text_config(config)
    if getattr(config, "kv_lora_rank", None) is not None:
        return "MLA"
    heads, kv_heads = config.num_attention_heads, num_kv_heads(config)
    if kv_heads == heads:
        return "MHA"
    return "MQA" if kv_heads == 1 else "GQA"


def kv_values_per_layer(config: PretrainedConfig) -> int:
    """Numbers that one layer caches for one token.

    K and V for each KV head: 2 * kv_heads * head_dim. With MLA the latent and the shared rotary key, once,
    with no factor 2: kv_lora_rank + qk_rope_head_dim (DeepSeek-V2: 512 + 64 = 576, more than the 256 of
    an MQA layer of head_dim 128: MLA is small beside MHA, not beside MQA).
    """
    config = text_config(config)
    if attention_kind(config) == "MLA":
        return int(config.kv_lora_rank + config.qk_rope_head_dim)
    return 2 * num_kv_heads(config) * head_dim_of(config)


def held_bytes_per_token(config: PretrainedConfig, dtype_bytes: int) -> int:
    """Bytes of one token in this engine's cache, all layers together.

    As `kv_bytes_per_token`, except with MLA: transformers' code makes keys and values of every head from the latent
    before attention, and those are what is cached here. An engine with a kernel for it keeps the latent.
    """
    config = text_config(config)
    if attention_kind(config) != "MLA":
        return kv_bytes_per_token(config, dtype_bytes)
    check_at_least("dtype_bytes", dtype_bytes, 1)
    per_head = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    return int(config.num_hidden_layers * config.num_attention_heads * per_head * dtype_bytes)


def kv_bytes_per_token(config: PretrainedConfig, dtype_bytes: int) -> int:
    """Bytes of KV cache that one token takes, all layers together (`dtype_bytes`: 4 for float32)."""
    check_at_least("dtype_bytes", dtype_bytes, 1)
    config = text_config(config)
    return int(config.num_hidden_layers * kv_values_per_layer(config) * dtype_bytes)


def kv_bytes(config: PretrainedConfig, num_tokens: int, dtype_bytes: int, num_sequences: int = 1) -> int:
    """Bytes of KV cache of `num_sequences` texts of `num_tokens` each, when every layer keeps every token.

    A cache that drops what a sliding window can no longer see (`DynamicCache` does) takes less.
    """
    check_at_least("num_tokens", num_tokens, 0)
    check_at_least("num_sequences", num_sequences, 0)
    return num_sequences * num_tokens * kv_bytes_per_token(config, dtype_bytes)


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The decoder's own config, out of a nested one if need be; refused where the formulas would be wrong."""
    config = config.get_text_config(decoder=True)
    unusual = set(getattr(config, "layer_types", None) or ()) - GROWING_LAYERS
    if unusual:
        raise ValueError(f"layer_types holds {sorted(unusual)}: allowed are {sorted(GROWING_LAYERS)}")
    odd = ("num_kv_shared_layers", "is_heterogeneous", "cross_attention_layers")  # the last: K/V of an image
    if any(getattr(config, name, None) for name in odd):
        raise ValueError(f"model_type={config.model_type!r}: its layers do not all cache the same K and V")
    return config


def num_kv_heads(config: PretrainedConfig) -> int:
    """Heads of K and V in one layer."""
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if kv_heads is None:
        if getattr(config, "num_kv_heads", None) is not None:  # Falcon, where it counts on some variants only
            raise ValueError(f"model_type={config.model_type!r}: its config has no num_key_value_heads")
        kv_heads = heads  # configs older than grouped-query attention do not name it
    if not 1 <= kv_heads <= heads or heads % kv_heads:
        raise ValueError(f"num_key_value_heads={kv_heads}: must divide num_attention_heads={heads}")
    return int(kv_heads)


def head_dim_of(config: PretrainedConfig) -> int:
    """Numbers in one head's key."""
    head_dim = getattr(config, "head_dim", None)
    return int(head_dim or config.hidden_size // config.num_attention_heads)


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise ValueError, with the name, for a value below `least`."""
    if value < least:
        raise ValueError(f"{name}={value}: must be at least {least}")
