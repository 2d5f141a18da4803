"""The FLOPs that a KV cache saves, computed from a Hugging Face config.

Two groups, each pure arithmetic:

1. Work of a whole generation in model-independent units: token passes through the linear layers
   (`linear_tokens_*`), query-key pairs of one attention head (`attention_pairs_*`), and their ratios.
2. The same in FLOPs of a given model: `linear_params`, `lm_head_params`, `linear_flops_per_token`,
   `attention_flops_per_token`, `generation_flops`.

A ratio of FLOPs is not a ratio of times. `folovllm.course.lessons.baseline_report` puts a measured time beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from folovllm.kv_cache.formulas import attention_kind, check_at_least, head_dim_of, num_kv_heads, text_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Families whose linear layers are q, k, v, o and gate, up, down. `linear_params` is checked for each of them.
DENSE_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


# --- work in model-independent units ---------------------------------------------------------------------
#
# To generate n tokens from a prompt of p, a model runs n times. The n-th token is never fed back.
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

    A text of L tokens counts L * L pairs: the causal mask hides about half of them, but a kernel without
    block skipping computes them. A kernel that skips masked pairs computes S1(L) = L(L+1)/2.
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
    check_at_least("n", n, 1)
    return linear_tokens_recompute(prompt_len, n) / linear_tokens_cached(prompt_len, n)


def attention_ratio(n: int, prompt_len: int = 1) -> float:
    """Work of attention without a cache over the work with one, for n >= 1 generated tokens.

    For a prompt of one: S2(n) / S1(n) = (2n + 1) / 3, which is 7, 67, 667 at n = 10, 100, 1000.
    """
    check_at_least("n", n, 1)
    return attention_pairs_recompute(prompt_len, n) / attention_pairs_cached(prompt_len, n)


# --- FLOPs of a model ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """Floating-point operations, a multiply and an add counted as two."""

    linear: int
    attention: int

    @property
    def total(self) -> int:
        return self.linear + self.attention


def linear_params(config: PretrainedConfig) -> int:
    """Weights in the linear layers that every token passes: q, k, v, o and gate, up, down of all layers.

    Embedding (a lookup), biases, norms and the LM head (`lm_head_params`) are not counted.
    Raises ValueError for a model type outside `DENSE_MODEL_TYPES`: a mixture of experts or another MLP has
    other shapes.
    """
    config = text_config(config)
    if config.model_type not in DENSE_MODEL_TYPES:
        allowed = ", ".join(DENSE_MODEL_TYPES)
        raise ValueError(f"model_type={config.model_type!r}: linear layers are counted for {allowed} only")
    hidden, head_dim = config.hidden_size, head_dim_of(config)
    query_and_output = 2 * hidden * config.num_attention_heads * head_dim
    key_and_value = 2 * hidden * num_kv_heads(config) * head_dim
    gate_up_down = 3 * hidden * config.intermediate_size
    return int(config.num_hidden_layers * (query_and_output + key_and_value + gate_up_down))


def lm_head_params(config: PretrainedConfig) -> int:
    """Weights of the LM head, hidden_size * vocab_size, tied to the embedding or not."""
    config = text_config(config)
    return int(config.hidden_size * config.vocab_size)


def linear_flops_per_token(config: PretrainedConfig) -> int:
    """FLOPs of one token in the linear layers without the LM head: a multiply and an add per weight."""
    return 2 * linear_params(config)


def attention_flops_per_token(config: PretrainedConfig, context: int) -> int:
    """FLOPs of one query token's attention over `context` keys, all heads and layers.

    4 * head_dim per head and key: 2 * head_dim for the score q.k, and 2 * head_dim for adding p * v to the output.
    Query heads count, not KV heads: GQA saves bytes, not these FLOPs. A masked key counts if it is computed.
    """
    check_at_least("context", context, 0)
    config = text_config(config)
    if attention_kind(config) == "MLA":
        raise ValueError(f"model_type={config.model_type!r}: FLOPs of latent attention are not counted")
    return int(4 * config.num_hidden_layers * config.num_attention_heads * head_dim_of(config) * context)


def generation_flops(config: PretrainedConfig, prompt_len: int, n: int, *, cached: bool) -> Flops:
    """FLOPs of the matrix products in generating n tokens from a prompt of `prompt_len`.

    - linear: `linear_flops_per_token` for every token fed, and 2 per LM-head weight for every token
      generated: the head is applied to the last position only (`logits_to_keep=1`).
    - attention: `attention_flops_per_token` over all query-key pairs, the masked ones of a prompt included.

    Norms, RoPE, softmax and activations are not counted.
    Raises ValueError as `linear_params` does, and for a text longer than a sliding window, where a query
    no longer sees all keys.
    """
    config = text_config(config)
    window = getattr(config, "sliding_window", None)
    if window is not None and prompt_len + n - 1 > window:
        raise ValueError(
            f"prompt_len={prompt_len} and n={n} exceed sliding_window={window}: "
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


def _sum_of_integers(m: int) -> int:
    return m * (m + 1) // 2


def _sum_of_squares(m: int) -> int:
    return m * (m + 1) * (2 * m + 1) // 6


def _check_lengths(prompt_len: int, n: int) -> None:
    check_at_least("prompt_len", prompt_len, 1)
    check_at_least("n", n, 0)
