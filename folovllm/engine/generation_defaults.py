"""What a model's generation_config.json says about sampling (vLLM: `ModelConfig.get_diff_sampling_param`).

transformers' `generate` obeys the whole file. `SamplingParams` has a counterpart for some of its fields, and those are
the parameters of requests that come without any. An explicit `SamplingParams` is taken unchanged, as in vLLM. Fields
that change even greedy text and have no counterpart are refused: the engine's promise is Hugging Face's tokens.

`generation_config="vllm"` leaves all of them unread, and a folder's file may take the place of the model's own.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import GenerationConfig

from folovllm.sampling_params import SamplingParams

# transformers' name -> that of SamplingParams. `do_sample` False is temperature 0.
COUNTERPARTS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
}
# Without a counterpart, and the values that change nothing (None never does). From transformers' `GenerationConfig`,
# `_get_logits_processor`, `_get_stopping_criteria` and `get_generation_mode`. `max_length` is not here: it only says
# when to stop, which `max_tokens` always does.
CHANGE_GREEDY_TEXT: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "sequence_bias": ([], {}),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "min_length": (0,),
    "max_time": (),
    "exponential_decay_length_penalty": (),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "guidance_scale": (1,),
    "token_healing": (False,),
    "watermarking_config": (),
}
CHANGE_SAMPLES: dict[str, tuple[Any, ...]] = {  # the same, for fields that count with do_sample=True only
    "top_h": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling parameters of requests without any, and which of them a generation_config.json gave."""

    params: SamplingParams = field(default_factory=SamplingParams)
    given: dict[str, str] = field(default_factory=dict)  # field of SamplingParams -> "name=value" in the file

    def overridden_by(self, params: SamplingParams) -> list[str]:
        """What the file says and explicit parameters say otherwise, as "name=value"."""
        return [text for name, text in self.given.items() if getattr(params, name) != getattr(self.params, name)]


def generation_defaults(
    config: GenerationConfig | None, special_token_ids: Mapping[str, int] | None = None
) -> GenerationDefaults:
    """The defaults of a generation_config.json; None: those of `SamplingParams`.

    special_token_ids: by name. To `generate` they may be stop strings, but the text does not show them: they become
    stop_token_ids.

    Raises ValueError that names a field which cannot be followed, or whose value `SamplingParams` does not allow.
    """
    values = {} if config is None else {name: value for name, value in config.to_dict().items() if value is not None}
    check_counterparts(values)
    given = {ours: (name, values[name]) for name, ours in COUNTERPARTS.items() if name in values}
    if values.get("do_sample") is False:
        given["temperature"] = ("do_sample", False)
    chosen: dict[str, Any] = {ours: 0.0 if name == "do_sample" else value for ours, (name, value) in given.items()}
    least = chosen.get("min_tokens", 0)
    if "max_tokens" not in chosen and isinstance(least, int):
        chosen["max_tokens"] = max(SamplingParams.max_tokens or 0, least)
    try:
        params = SamplingParams(**chosen)
    except ValueError as error:
        raise refused(str(error)) from error
    ids = {name: i for name, i in (special_token_ids or {}).items() if name in (params.stop or ())}
    if ids:
        params = replace(params, stop=[s for s in params.stop or () if s not in ids], stop_token_ids=list(ids.values()))
    return GenerationDefaults(params, {ours: f"{name}={value!r}" for ours, (name, value) in given.items()})


def check_counterparts(values: dict[str, Any]) -> None:
    """Raise ValueError for a field that changes the text of `generate` and that `SamplingParams` does not have."""
    watched = CHANGE_GREEDY_TEXT | (CHANGE_SAMPLES if values.get("do_sample") else {})
    if "min_new_tokens" in values:  # it overrides min_length
        watched.pop("min_length")
    for name, neutral in watched.items():
        if name in values and values[name] not in neutral:
            shown = textwrap.shorten(repr(values[name]), width=100, placeholder=" …")
            raise refused(f"{name}={shown} changes the text of generate(), and SamplingParams has no such field")
    if values.get("cache_implementation") == "quantized":
        raise refused("cache_implementation='quantized' changes the text of generate(); allowed: any other")


def refused(reason: str) -> ValueError:
    """The error for a file that cannot be followed."""
    return ValueError(
        f"the model's generation_config.json cannot be followed: {reason}; "
        "generation_config='vllm' leaves all of the file unread but its EOS ids"
    )
