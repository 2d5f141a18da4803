"""Exercises of M0: what generating text computes and keeps (chapter 0), and the KV cache (chapter 1).

Write your answers in place of the lines that raise NotImplementedError, in any order, and run `folovllm grade m0`.
Each docstring says all there is to know; the README has a folded hint for each. Helper functions of your own are
welcome. Few answers need more than a dozen lines.

Letters in shapes: B texts in a batch, T tokens in a text, L tokens fed to one forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

# --- chapter 0: work and bytes ----------------------------------------------------------------------------


def linear_flops(num_weights: int, prompt_len: int, n: int, *, cached: bool) -> int:
    """FLOPs of the linear layers in generating `n` tokens from a prompt of `prompt_len` tokens.

    num_weights: weights of all linear layers together. A token that is fed passes every weight once, and each costs a
        multiply and an add: 2 FLOPs. (The LM head is left out here.)
    cached: False feeds the whole text so far at every step. True, with a KV cache, feeds the prompt in the first step
        and in every later step only the newest token.

    The model runs n times. The n-th token is chosen and never fed.

    Example: from a prompt of 4 tokens, 3 tokens. Without a cache the steps feed 4, 5 and 6 tokens, with one 4, 1 and 1:
        linear_flops(1000, 4, 3, cached=False) == 30_000
        linear_flops(1000, 4, 3, cached=True) == 12_000

    n may be 0: then the model does not run. Raises ValueError for prompt_len < 1 and for n < 0.
    """
    raise NotImplementedError("linear_flops")


def attention_flops(num_layers: int, num_heads: int, head_dim: int, prompt_len: int, n: int, *, cached: bool) -> int:
    """FLOPs of attention in generating `n` tokens from a prompt of `prompt_len` tokens.

    In each layer, each of the `num_heads` query heads takes every fed token as a query and every token of the text so
    far as a key. Such a pair costs 4 * head_dim FLOPs: 2 * head_dim for the score q.k, and as many for adding p * v
    to the output. Pairs that the causal mask hides count too: a kernel that does not skip them computes them.

    cached and n: as in `linear_flops`. With a cache fewer tokens are fed, and each still meets all keys.

    Example: 1 layer, 1 head of size 1, a prompt of 2, 3 tokens. The texts are 2, 3 and 4 tokens long, so there are
    2*2 + 3*3 + 4*4 = 29 pairs without a cache and 2*2 + 1*3 + 1*4 = 11 with one:
        attention_flops(1, 1, 1, 2, 3, cached=False) == 116
        attention_flops(1, 1, 1, 2, 3, cached=True) == 44

    n may be 0. Raises ValueError for prompt_len < 1 and for n < 0.
    """
    raise NotImplementedError("attention_flops")


def arithmetic_intensity(m: int, k: int, n: int, dtype_bytes: int) -> float:
    """FLOPs per byte of a linear layer on m tokens: x [m, k] times w [k, n] gives y [m, n].

    Count a multiply and an add for each of the m * k * n products, and each of the three matrices moved through memory
    once, at `dtype_bytes` bytes per number.

    Example: 2 FLOPs per product and 2 bytes per number, one token, a layer of 1000 x 1000. The FLOPs are 2,000,000 and
    the bytes 2 * (1000 + 1,000,000 + 1000), so the weights are nearly all of it:
        arithmetic_intensity(1, 1000, 1000, 2) == 0.998...
        arithmetic_intensity(64, 1000, 1000, 2) == 56.7...

    Raises ValueError if any argument is less than 1.
    """
    raise NotImplementedError("arithmetic_intensity")


def kv_bytes_per_token(config: Mapping[str, int | None], dtype_bytes: int) -> int:
    """Bytes that one token takes in the KV cache, all layers together.

    config: numbers as in a model's config.json:
        num_hidden_layers       layers
        num_attention_heads     query heads
        num_key_value_heads     heads of keys and values; missing in older models: as many as query heads
        hidden_size             width of the model
        head_dim                numbers in one head's key, and in its value; missing or None means
                                hidden_size // num_attention_heads
        kv_lora_rank            only with latent attention (MLA, as in DeepSeek-V2): numbers in the compressed vector
        qk_rope_head_dim        only with MLA: numbers in the key that carries the position
    Other keys may be there and do not matter.

    A layer caches a key and a value per KV head. With MLA (`kv_lora_rank` is there and not None) it caches one
    compressed vector and one position key per token instead, whatever the number of heads: keys and values are
    computed from it again when they are needed.

    Example: 2 layers, 8 query heads, 2 KV heads of 64 numbers, 2 bytes each:
        kv_bytes_per_token({"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
                            "hidden_size": 512, "head_dim": 64}, 2) == 1024

    Raises ValueError for dtype_bytes < 1, and for a num_key_value_heads that does not divide num_attention_heads.
    """
    raise NotImplementedError("kv_bytes_per_token")


# --- chapter 1: the mask, and positions in a padded batch -------------------------------------------------


def causal_mask(start: int, length: int) -> torch.Tensor:
    """Which keys may each query see, when `length` tokens are fed and `start` tokens are in the cache already.

    Returns a bool tensor [length, start + length]: row i is the query at position start + i, column j is the key at
    position j, True means "may look". A token sees itself and everything before it.

    Example: causal_mask(0, 3) is a prompt of 3 tokens, causal_mask(3, 2) the next 2 after it:
        T F F        T T T T F
        T T F        T T T T T
        T T T

    Raises ValueError for start < 0 and for length < 1.
    """
    raise NotImplementedError("causal_mask")


def left_pad(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompts of different lengths as one rectangular batch, padded on the left.

    Returns (input_ids, attention_mask, position_ids), each int64 [B, T] with T the longest prompt's length.
        input_ids: `pad_token_id` on the left, then the prompt, so that every prompt ends in the last column.
        attention_mask: 0 on padding, 1 on the prompt's tokens.
        position_ids: 0, 1, 2, ... on the prompt's tokens, as if it stood alone, and 0 on padding.

    A prompt may contain pad_token_id as a token of its own: that one is no padding.

    Example: left_pad([[5, 6, 7], [8]], pad_token_id=0):
        input_ids    attention_mask    position_ids
        5 6 7        1 1 1             0 1 2
        0 0 8        0 0 1             0 0 0

    Raises ValueError for no prompts at all and for a prompt without tokens.
    """
    raise NotImplementedError("left_pad")


def decode_inputs(
    attention_mask: torch.Tensor, tokens: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inputs of the next decode step of a left-padded batch whose K/V is in the cache.

    attention_mask: int64 [B, T], of everything that is in the cache: 0 on padding, 1 on tokens.
    tokens: the B tokens that were just chosen, one per row, to be fed now.

    Returns (input_ids [B, 1], attention_mask [B, T + 1], position_ids [B, 1]), all int64: one new column, in which
    every row has a token. Its position counts the tokens of its own row, not the columns of the batch.
    The attention_mask that was passed in stays as it is.

    Example: after left_pad([[5, 6, 7], [8]], 0), the tokens 9 and 4:
        decode_inputs(mask, [9, 4])
        input_ids    attention_mask    position_ids
        9            1 1 1 1           3
        4            0 0 1 1           1
    """
    raise NotImplementedError("decode_inputs")


# --- optional: all of it, around a real model -------------------------------------------------------------


def generate_greedy(model: PreTrainedModel, prompt: Sequence[int], n: int) -> list[int]:
    """The `n` tokens after `prompt` that `model` thinks likeliest, one after another, with a KV cache.

    model: a Hugging Face causal LM. `model(input_ids=..., past_key_values=cache, use_cache=True)` takes ids [1, L], has
        `.logits` [1, L, V] in its output and appends the L tokens' K/V to `cache`, a `transformers.DynamicCache()`.
    n: at least 1. There is no end-of-sequence token here: always exactly n.

    Feed the prompt once, then one token per step, and nothing that is not needed: n tokens take n forward passes.
    """
    raise NotImplementedError("generate_greedy")
