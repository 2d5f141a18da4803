"""What a KV cache costs in bytes and saves in floating-point operations, from a Hugging Face config alone.

Three groups, each pure arithmetic:

1. Bytes: `kv_values_per_layer`, `kv_bytes_per_token`, `kv_bytes`.
2. Work of a whole generation, in units that depend on no model: token passes through the linear layers
   (`linear_tokens_*`), query-key pairs of one attention head (`attention_pairs_*`), and their ratios.
3. The same in FLOPs of a given model: `linear_params`, `lm_head_params`, `linear_flops_per_token`,
   `attention_flops_per_token`, `generation_flops`.

A ratio of FLOPs is not a ratio of times. `folovllm.baseline.compare` puts a measured time beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PretrainedConfig

AttentionKind = Literal["MHA", "GQA", "MQA", "MLA"]

# Layers that store one K and one V (or one latent) per token. Others (linear attention, convolutions) hold a
# state that does not grow with the text, and no formula here describes them.
_GROWING_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}

# Families whose linear layers are q, k, v, o and gate, up, down. `linear_params` is checked for each of them.
DENSE_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


# --- bytes -----------------------------------------------------------------------------------------------


def attention_kind(config: PretrainedConfig) -> AttentionKind:
    """How the query heads share keys and values.

    - MHA, multi-head: every query head has K and V of its own.
    - GQA, grouped-query (Ainslie et al. 2023, arXiv:2305.13245): a group of query heads shares one K/V head.
    - MQA, multi-query (Shazeer 2019, arXiv:1911.02150): all query heads share one.
    - MLA, multi-head latent (DeepSeek-V2, arXiv:2405.04434): what is cached is one compressed vector per
      token, from which each head's K and V are computed again, and one small key that carries the position.

    `config` may hold a nested text config. Raises ValueError for a config that these four do not describe.
    """
    config = _text_config(config)
    if getattr(config, "kv_lora_rank", None) is not None:
        return "MLA"
    heads, kv_heads = config.num_attention_heads, _kv_heads(config)
    if kv_heads == heads:
        return "MHA"
    return "MQA" if kv_heads == 1 else "GQA"


def kv_values_per_layer(config: PretrainedConfig) -> int:
    """Numbers that one layer caches for one token.

    K and V for each KV head: 2 * kv_heads * head_dim. With MLA the latent and the shared rotary key, once,
    with no factor 2: kv_lora_rank + qk_rope_head_dim (DeepSeek-V2: 512 + 64 = 576, more than the 256 of
    an MQA layer of head_dim 128: MLA is small beside MHA, not beside MQA).
    """
    config = _text_config(config)
    if attention_kind(config) == "MLA":
        return int(config.kv_lora_rank + config.qk_rope_head_dim)
    return 2 * _kv_heads(config) * _head_dim(config)


def kv_bytes_per_token(config: PretrainedConfig, dtype_bytes: int) -> int:
    """Bytes of KV cache that one token takes, all layers together (`dtype_bytes`: 4 for float32)."""
    _at_least("dtype_bytes", dtype_bytes, 1)
    config = _text_config(config)
    return int(config.num_hidden_layers * kv_values_per_layer(config) * dtype_bytes)


def kv_bytes(config: PretrainedConfig, num_tokens: int, dtype_bytes: int, num_sequences: int = 1) -> int:
    """Bytes of KV cache of `num_sequences` texts of `num_tokens` each, when every layer keeps every token.

    A cache that drops what a sliding window can no longer see (`DynamicCache` does) takes less.
    """
    _at_least("num_tokens", num_tokens, 0)
    _at_least("num_sequences", num_sequences, 0)
    return num_sequences * num_tokens * kv_bytes_per_token(config, dtype_bytes)


# --- work, in units that depend on no model --------------------------------------------------------------
#
# To generate n tokens from a prompt of p, a model runs n times; the last of the n is chosen, never fed back.
#
#   run             1st    2nd    ...   n-th
#   text length     p      p+1    ...   p+n-1
#   recomputed      p      p+1    ...   p+n-1     tokens in the forward pass
#   cached          p      1      ...   1
#
# Below S1(m) = 1 + 2 + ... + m = m(m+1)/2 and S2(m) = 1 + 4 + ... + m^2 = m(m+1)(2m+1)/6.


def linear_tokens_recompute(prompt_len: int, n: int) -> int:
    """Tokens through the linear layers without a cache: p + (p+1) + ... + (p+n-1) = n p + S1(n-1)."""
    _check_lengths(prompt_len, n)
    return n * prompt_len + n * (n - 1) // 2


def linear_tokens_cached(prompt_len: int, n: int) -> int:
    """Tokens through the linear layers with a cache: the prompt once, then n-1 times one: p + n - 1."""
    _check_lengths(prompt_len, n)
    return prompt_len + n - 1 if n else 0


def attention_pairs_recompute(prompt_len: int, n: int) -> int:
    """Query-key pairs per head without a cache: p^2 + ... + (p+n-1)^2 = S2(p+n-1) - S2(p-1).

    A text of L tokens counts L * L pairs: the causal mask hides about half of them, but a kernel that does
    not skip what is hidden computes it all the same. One that skips it computes S1(L) = L(L+1)/2.
    """
    _check_lengths(prompt_len, n)
    return _sum_of_squares(prompt_len + n - 1) - _sum_of_squares(prompt_len - 1)


def attention_pairs_cached(prompt_len: int, n: int) -> int:
    """Query-key pairs per head with a cache: p^2 for the prompt, then one query against all keys of the text.

    p^2 + (p+1) + (p+2) + ... + (p+n-1) = p^2 + S1(p+n-1) - S1(p).
    """
    _check_lengths(prompt_len, n)
    if n == 0:
        return 0
    return prompt_len**2 + _sum_of_integers(prompt_len + n - 1) - _sum_of_integers(prompt_len)


def linear_ratio(n: int, prompt_len: int = 1) -> float:
    """Work of the linear layers without a cache over the work with one, for n >= 1 generated tokens.

    For a prompt of one: S1(n) / n = (n + 1) / 2, which is 5.5, 50.5, 500.5 at n = 10, 100, 1000.
    """
    _at_least("n", n, 1)
    return linear_tokens_recompute(prompt_len, n) / linear_tokens_cached(prompt_len, n)


def attention_ratio(n: int, prompt_len: int = 1) -> float:
    """Work of attention without a cache over the work with one, for n >= 1 generated tokens.

    For a prompt of one: S2(n) / S1(n) = (2n + 1) / 3, which is 7, 67, 667 at n = 10, 100, 1000.
    """
    _at_least("n", n, 1)
    return attention_pairs_recompute(prompt_len, n) / attention_pairs_cached(prompt_len, n)


# --- FLOPs of a model ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """Floating-point operations, a multiply and an add counted as two."""

    linear: int
    attention: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.linear + self.attention


def linear_params(config: PretrainedConfig) -> int:
    """Weights in the linear layers that every token passes: q, k, v, o and gate, up, down of all layers.

    Embedding (a lookup), biases, norms and the LM head (`lm_head_params`) are not in it.
    Raises ValueError for a model type outside `DENSE_MODEL_TYPES`: a mixture of experts or another MLP has
    other shapes.
    """
    config = _text_config(config)
    if config.model_type not in DENSE_MODEL_TYPES:
        allowed = ", ".join(DENSE_MODEL_TYPES)
        raise ValueError(f"model_type={config.model_type!r}: linear layers are counted for {allowed} only")
    hidden, head_dim = config.hidden_size, _head_dim(config)
    query_and_output = 2 * hidden * config.num_attention_heads * head_dim
    key_and_value = 2 * hidden * _kv_heads(config) * head_dim
    gate_up_down = 3 * hidden * config.intermediate_size
    return int(config.num_hidden_layers * (query_and_output + key_and_value + gate_up_down))


def lm_head_params(config: PretrainedConfig) -> int:
    """Weights of the LM head, hidden_size * vocab_size, tied to the embedding or not."""
    config = _text_config(config)
    return int(config.hidden_size * config.vocab_size)


def linear_flops_per_token(config: PretrainedConfig) -> int:
    """FLOPs of one token in the linear layers, LM head aside: a multiply and an add per weight."""
    return 2 * linear_params(config)


def attention_flops_per_token(config: PretrainedConfig, context: int) -> int:
    """FLOPs of one query token's attention over `context` keys, all heads and layers.

    4 * head_dim per head and key: 2 * head_dim for the score q.k, as much for adding p * v to the output.
    Query heads count, not KV heads: GQA saves bytes, not these FLOPs. A masked key counts if it is computed.
    """
    _at_least("context", context, 0)
    config = _text_config(config)
    if attention_kind(config) == "MLA":
        raise ValueError(f"model_type={config.model_type!r}: FLOPs of latent attention are not counted")
    return int(4 * config.num_hidden_layers * config.num_attention_heads * _head_dim(config) * context)


def generation_flops(config: PretrainedConfig, prompt_len: int, n: int, *, cached: bool) -> Flops:
    """FLOPs of the matrix products in generating n tokens from a prompt of `prompt_len`.

    - linear: `linear_flops_per_token` for every token fed, and 2 per LM-head weight for every token
      generated: the head is applied to the last position only (`logits_to_keep=1`).
    - attention: `attention_flops_per_token` over all query-key pairs, the masked ones of a prompt included.

    Norms, RoPE, softmax and activations are left out.
    Raises ValueError as `linear_params` does, and where the text outgrows a sliding window, past which a
    query no longer sees all keys.
    """
    config = _text_config(config)
    window = getattr(config, "sliding_window", None)
    if window is not None and prompt_len + n - 1 > window:
        raise ValueError(
            f"prompt_len={prompt_len} and n={n} outgrow sliding_window={window}: "
            "attention FLOPs are counted for texts inside the window only"
        )
    tokens, pairs = (
        (linear_tokens_cached(prompt_len, n), attention_pairs_cached(prompt_len, n))
        if cached
        else (linear_tokens_recompute(prompt_len, n), attention_pairs_recompute(prompt_len, n))
    )
    return Flops(
        linear=linear_flops_per_token(config) * tokens + 2 * lm_head_params(config) * n,
        attention=attention_flops_per_token(config, context=pairs),
    )


# --- reading configs, checking numbers -------------------------------------------------------------------


def _text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The decoder's own config, out of a nested one if need be; refused where the formulas would be wrong."""
    config = config.get_text_config(decoder=True)
    unusual = set(getattr(config, "layer_types", None) or ()) - _GROWING_LAYERS
    if unusual:
        raise ValueError(f"layer_types holds {sorted(unusual)}: allowed are {sorted(_GROWING_LAYERS)}")
    if getattr(config, "num_kv_shared_layers", 0) or getattr(config, "is_heterogeneous", False):
        raise ValueError(f"model_type={config.model_type!r}: its layers do not all cache the same K and V")
    return config


def _kv_heads(config: PretrainedConfig) -> int:
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if kv_heads is None:
        if getattr(config, "num_kv_heads", None) is not None:  # Falcon, where it counts on some variants only
            raise ValueError(f"model_type={config.model_type!r}: its config has no num_key_value_heads")
        kv_heads = heads  # configs older than grouped-query attention do not name it
    if not 1 <= kv_heads <= heads or heads % kv_heads:
        raise ValueError(f"num_key_value_heads={kv_heads}: must divide num_attention_heads={heads}")
    return int(kv_heads)


def _head_dim(config: PretrainedConfig) -> int:
    head_dim = getattr(config, "head_dim", None)
    return int(head_dim or config.hidden_size // config.num_attention_heads)


def _sum_of_integers(m: int) -> int:
    return m * (m + 1) // 2


def _sum_of_squares(m: int) -> int:
    return m * (m + 1) * (2 * m + 1) // 6


def _check_lengths(prompt_len: int, n: int) -> None:
    _at_least("prompt_len", prompt_len, 1)
    _at_least("n", n, 0)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}={value}: must be at least {least}")
