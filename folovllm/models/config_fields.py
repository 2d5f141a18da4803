"""Which fields of a config count: those that the architecture's own code reads.

config.json may hold more: a field of the model it was made from, or of a later version. transformers keeps such a
field as an attribute, and its parts disagree about it. The code of Llama knows no window, but
`DynamicCache(config=...)` drops the tokens outside of a `sliding_window` that was left in a Llama's config.
"""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass
from typing import Any, cast

from transformers import PretrainedConfig

from folovllm.checks import invalid
from folovllm.models.decoder import MODEL_TYPES

WINDOW_FIELDS = ("sliding_window", "layer_types", "attention_chunk_size")  # what `DynamicCache` looks at


def reads(config: PretrainedConfig, field: str) -> bool:
    """Whether the architecture has this field: its config class declares it, or computes it."""
    kind = type(config)
    known = {f.name for f in fields(cast(Any, kind))} if is_dataclass(kind) else set(vars(config))
    return field in known or hasattr(kind, field)


def without_unread_windows(config: PretrainedConfig) -> PretrainedConfig:
    """The text config as it is, or a copy without windows and kinds of layers that its model does not read."""
    text = config.get_text_config(decoder=True)
    # What is not in `vars` is another name of a field that the architecture has.
    unread = [name for name in WINDOW_FIELDS if name in vars(text) and not reads(text, name)]
    if unread:
        text = copy.deepcopy(text)
        for name in unread:
            delattr(text, name)
    return text


def check_fields(config: PretrainedConfig) -> None:
    """Raise ValueError for a value that no milestone can follow, or that transformers refuses in the first forward."""
    text = config.get_text_config(decoder=True)
    if getattr(text, "is_causal", True) is False:
        raise invalid("is_causal", False, "True, because a token must not depend on the tokens after it")
    if text.model_type in MODEL_TYPES:
        padding = text.pad_token_id
        if padding is not None and not -text.vocab_size <= padding < text.vocab_size:
            raise invalid("pad_token_id", padding, f"an id below vocab_size={text.vocab_size}, or null")
        rope = text.rope_parameters or {}
        partial = rope.get("partial_rotary_factor", 1.0)
        if rope.get("rope_type", "default") != "default" and partial != 1.0:
            # Hugging Face's scaled frequencies read it, and their rotation of whole heads does not.
            raise invalid("partial_rotary_factor", partial, f"1.0 with rope_type={rope['rope_type']!r}")
    if not reads(text, "sliding_window"):
        return
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) if reads(text, "layer_types") else None
    slides = window is not None if kinds is None else "sliding_attention" in kinds
    if slides and (not isinstance(window, int) or window < 1):
        where = "" if kinds is None else " with layers of type 'sliding_attention'"
        raise invalid("sliding_window", window, f"an integer >= 1{where}")
