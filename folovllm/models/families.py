"""What a config says about a model that no milestone could run right, read before any weight.

Every milestone calls `check_family`, so that none takes a model which another one refuses for the same reason.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from folovllm.models.config_fields import without_unread_windows

# K/V per token, of which all or the last ones are attended to. Other layers keep a running state, or start again at
# some position, and have no list of tokens to keep in blocks, to pad, or to account for.
LAYER_TYPES = ("full_attention", "sliding_attention")


def check_family(hf_config: PretrainedConfig, max_model_len: int) -> None:
    """Raise ValueError for a model that no milestone runs, or not with requests of that length."""
    text = without_unread_windows(hf_config)
    others = set(getattr(text, "layer_types", None) or LAYER_TYPES) - set(LAYER_TYPES)
    if others:
        raise ValueError(
            f"model_type={hf_config.model_type!r} cannot run at any milestone: it has layers of type {sorted(others)}; "
            f"allowed: {', '.join(LAYER_TYPES)}"
        )
    for rope in rope_parameters(text):
        longest = longest_with(rope, text)
        if longest is not None and max_model_len > longest:
            raise ValueError(
                f"max_model_len={max_model_len} is not valid for model_type={hf_config.model_type!r} with "
                f"rope_type={rope['rope_type']!r}, which rotates all requests of a forward in another way once one is "
                f"longer than {longest}; allowed: at most {longest}, at every milestone"
            )


def longest_with(rope: dict[str, Any], text: PretrainedConfig) -> int | None:
    """Up to how many tokens a RoPE is the same for short and long requests; None if it always is.

    transformers computes the frequencies of these two kinds from the longest position in a forward, for all its tokens.
    """
    kind = str(rope.get("rope_type"))
    if kind == "longrope":
        return rope.get("original_max_position_embeddings")
    return getattr(text, "max_position_embeddings", None) if "dynamic" in kind else None


def length_with_rope(text: PretrainedConfig) -> int | None:
    """The tokens that a RoPE of type "linear" or "yarn" stretches a model to; None for others.

    Other types do not stretch `max_position_embeddings`: "llama3" and "longrope" have it included, and "dynamic" is the
    same for all requests only up to it (`longest_with`). Nor do settings per type of layer, which not all layers share.
    """
    rope = getattr(text, "rope_parameters", None) or {}
    original = text.max_position_embeddings
    if rope.get("rope_type") == "yarn":
        original = rope.get("original_max_position_embeddings") or original
    elif rope.get("rope_type") != "linear":
        return None
    return int(original * (rope.get("factor") or 1.0))


def rope_parameters(text: PretrainedConfig) -> list[dict[str, Any]]:
    """The RoPE settings of a config: one, or one per type of layer, or none."""
    given = getattr(text, "rope_parameters", None) or {}
    return [given, *(value for value in given.values() if isinstance(value, dict))]
