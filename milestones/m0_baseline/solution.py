"""Reference answers to the exercises of M0. The tasks are in `exercise.py`; each answer names its place in folovllm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

# --- chapter 0: work and bytes ----------------------------------------------------------------------------


def tokens_fed(prompt_len: int, n: int, cached: bool) -> list[int]:
    """How many tokens each of the n forward passes gets."""
    if prompt_len < 1 or n < 0:
        raise ValueError(f"prompt_len={prompt_len}, n={n}: at least 1 and 0 are needed")
    return [1 if cached and step > 0 else prompt_len + step for step in range(n)]


def linear_flops(num_weights: int, prompt_len: int, n: int, *, cached: bool) -> int:
    """FLOPs of the linear layers (closed form: `linear_tokens_cached` in folovllm/course/lessons/formulas.py)."""
    return 2 * num_weights * sum(tokens_fed(prompt_len, n, cached))


def attention_flops(num_layers: int, num_heads: int, head_dim: int, prompt_len: int, n: int, *, cached: bool) -> int:
    """FLOPs of attention (closed form: `attention_pairs_cached` in folovllm/course/lessons/formulas.py)."""
    fed = tokens_fed(prompt_len, n, cached)
    pairs = sum(queries * (prompt_len + step) for step, queries in enumerate(fed))
    return 4 * head_dim * num_heads * num_layers * pairs


def arithmetic_intensity(m: int, k: int, n: int, dtype_bytes: int) -> float:
    """FLOPs per byte of a matrix product; the roofline of Williams et al. 2009 puts it on its horizontal axis."""
    if min(m, k, n, dtype_bytes) < 1:
        raise ValueError(f"m={m}, k={k}, n={n}, dtype_bytes={dtype_bytes}: each must be at least 1")
    return 2 * m * k * n / (dtype_bytes * (m * k + k * n + m * n))


def kv_bytes_per_token(config: Mapping[str, int | None], dtype_bytes: int) -> int:
    """Bytes of KV cache per token (for any HF config: folovllm/kv_cache/formulas.py)."""
    if dtype_bytes < 1:
        raise ValueError(f"dtype_bytes={dtype_bytes}: must be at least 1")
    numbers = {name: value for name, value in config.items() if value is not None}
    if "kv_lora_rank" in numbers:
        per_layer = numbers["kv_lora_rank"] + numbers["qk_rope_head_dim"]
    else:
        heads = numbers["num_attention_heads"]
        kv_heads = numbers.get("num_key_value_heads", heads)
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"num_key_value_heads={kv_heads}: must divide num_attention_heads={heads}")
        head_dim = numbers["head_dim"] if "head_dim" in numbers else numbers["hidden_size"] // heads
        per_layer = 2 * kv_heads * head_dim
    return numbers["num_hidden_layers"] * per_layer * dtype_bytes


# --- chapter 1: the mask, and positions in a padded batch -------------------------------------------------


def causal_mask(start: int, length: int) -> torch.Tensor:
    """A query at position p sees the keys at positions 0..p.

    Nothing in folovllm builds this mask yet: M0 and M1 leave it to Hugging Face, which derives the same one from the
    cache's length (`transformers/masking_utils.py`).
    """
    if start < 0 or length < 1:
        raise ValueError(f"start={start}, length={length}: at least 0 and 1 are needed")
    queries = torch.arange(start, start + length)[:, None]  # [L, 1]
    keys = torch.arange(start + length)[None]  # [1, T]
    return keys <= queries  # [L, T]


def left_pad(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-aligned rows. Lengths make the mask: a comparison with pad_token_id would hide such a token in a prompt."""
    if not prompts or not all(prompts):
        raise ValueError("prompts: at least one is needed, and each must have at least one token")
    lengths = torch.tensor([len(prompt) for prompt in prompts])  # [B]
    width = int(lengths.max())
    ids = torch.tensor([[pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])  # [B, T]
    positions = torch.arange(width)[None] - (width - lengths)[:, None]  # [B, T]  negative on padding
    return ids, (positions >= 0).long(), positions.clamp(min=0)


def decode_inputs(
    attention_mask: torch.Tensor, tokens: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One new column. With one text and no padding this is what folovllm/runner/hf/hf_runner.py feeds: position T."""
    input_ids = torch.tensor(tokens)[:, None]  # [B, 1]
    position_ids = attention_mask.sum(dim=1, keepdim=True)  # [B, 1]
    return input_ids, torch.cat([attention_mask, torch.ones_like(input_ids)], dim=1), position_ids


# --- optional: all of it, around a real model -------------------------------------------------------------


@torch.inference_mode()
def generate_greedy(model: PreTrainedModel, prompt: Sequence[int], n: int) -> list[int]:
    """Greedy decoding with a cache (with sampling, EOS and times: `generate_cached` in folovllm/baseline.py)."""
    cache = DynamicCache()
    fed, output = list(prompt), list[int]()
    for _ in range(n):
        logits = model(input_ids=torch.tensor([fed]), past_key_values=cache, use_cache=True).logits  # [1, L, V]
        output.append(int(logits[0, -1].argmax()))
        fed = output[-1:]
    return output
