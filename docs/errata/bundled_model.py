"""The model that experiments run on: folo-tiny in float32, as Hugging Face has it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from folovllm.models.loader import load_hf_model, resolve_device, resolve_model


@cache
def bundled_model() -> PreTrainedModel:
    """Loaded once. Experiments leave it as it was."""
    return load_hf_model(resolve_model("folo-tiny"), torch.float32, resolve_device("cpu"), "auto")


def some_tokens(count: int) -> list[int]:
    """The same ids at every call, from all over the vocabulary."""
    return [(7 + 613 * index) % bundled_model().config.vocab_size for index in range(count)]


def layer_of(cache: DynamicCache, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a layer, each [B, Hkv, T, D]."""
    layer: Any = cache.layers[index]
    return layer.keys, layer.values


def cache_after(tokens: list[int], **inputs: torch.Tensor) -> DynamicCache:
    """What one forward over these tokens leaves in a cache."""
    kept = DynamicCache(config=bundled_model().config)
    with torch.inference_mode():
        bundled_model()(input_ids=torch.tensor([tokens]), past_key_values=kept, use_cache=True, **inputs)
    return kept
