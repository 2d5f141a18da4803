"""Sampling parameters: how a request's tokens are chosen, and when its output ends.

The fields have vLLM's names, defaults and meanings (`vllm/sampling_params.py`). The constructor checks what can be
checked without a model; `check_vocab` checks the rest.
"""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import KW_ONLY
from typing import Any

from folovllm.checks import as_int, as_list, check_bool, check_float, check_int, invalid, request_params

logger = logging.getLogger(__name__)

GREEDY_BELOW = 1e-5  # vLLM's _SAMPLING_EPS: a smaller temperature means argmax
MIN_TEMPERATURE = 1e-2  # vLLM's _MAX_TEMP: dividing by less could overflow
MAX_N = 16384  # vLLM's default bound
# Lowest, highest, and the description in errors. 2 is OpenAI's bound, which vLLM enforces too (its pull request 44965).
TEMPERATURES = (0.0, 2.0, "a number in [0, 2]; 0 is greedy")

# The sampler works in float32, where a number outside this range would become 0 or inf.
FLOAT32_TINY = 2.0**-126
FLOAT32_MAX = (2.0 - 2.0**-23) * 2.0**127


def _is_token_id(value: object) -> bool:
    number = as_int(value)
    return number is not None and number >= 0


def _stop_strings(value: object) -> list[str]:
    strings = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(strings, (list, tuple)) or not all(isinstance(s, str) and s for s in strings):
        raise invalid("stop", value, "None, a string or a list of strings, none of them empty")
    return list(strings)


def _stop_token_ids(value: object) -> list[int]:
    ids = () if value is None else as_list(value)
    if not isinstance(ids, (list, tuple, set, frozenset)) or not all(map(_is_token_id, ids)):
        raise invalid("stop_token_ids", value, "None or a list of token ids (integers >= 0)")
    return list(dict.fromkeys(map(int, ids)))  # as in vLLM: each id once, in the order given


def _logit_bias(value: object) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(map(_is_token_id, value)):
        raise invalid("logit_bias", value, "None or a dict from token ids (integers >= 0) to numbers")
    biases = {}
    for token_id, bias in value.items():
        # -inf bans the token. +inf and NaN would leave no distribution to sample from.
        if bias != -math.inf:
            name = f"logit_bias[{token_id}]"
            bias = check_float(name, bias, -FLOAT32_MAX, FLOAT32_MAX, "a finite (float32) number or -inf")
        biases[int(token_id)] = bias
    return biases


@request_params
class SamplingParams:
    """Sampling parameters of one request. Immutable: `dataclasses.replace` makes a changed (and checked) copy.

    Raises ValueError that names the field, the value and what is allowed.
    """

    _: KW_ONLY
    n: int = 1  #: samples from one prompt. Greedy samples would all be equal, so with temperature 0 only 1 is allowed.
    presence_penalty: float = 0.0  #: subtracted from the logit of each token in the output; in [-2, 2], 0 is off
    frequency_penalty: float = 0.0  #: the same, times the number of occurrences; in [-2, 2], 0 is off
    #: Divides the positive and multiplies the negative logits of tokens in prompt and output; > 0, 1 is off
    repetition_penalty: float = 1.0
    #: Divides the logits; in [0, 2]. 0 takes the likeliest token and switches top_p, top_k and min_p off. A value in
    #: (0, 0.01) becomes 0.01.
    temperature: float = 1.0
    #: Sample from the smallest set of likeliest tokens with this much probability; in (0, 1], 1 is off
    top_p: float = 1.0
    top_k: int = 0  #: sample from the k likeliest tokens and those that tie with the k-th; 0 or -1 is off
    min_p: float = 0.0  #: drop tokens less likely than min_p times the likeliest; in [0, 1], 0 is off
    #: Of the request's random numbers, so its tokens do not depend on the batch. None (or -1, as in vLLM): the engine
    #: gives each request one of its own, made from the engine's seed.
    seed: int | None = None
    #: Strings that end the output when its text contains one; a list after construction
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None  #: ids that end the output, besides EOS; a list after construction
    ignore_eos: bool = False  #: EOS does not end the output
    max_tokens: int | None = 16  #: the most output tokens; None leaves only the model's length as a bound
    min_tokens: int = 0  #: nothing but the model's length ends the output before this many tokens
    #: How many of the likeliest tokens to report log probabilities for, beside the chosen token's; 0 is the chosen
    #: one alone, -1 the whole vocabulary. They are of the raw logits: before bias, penalties, temperature, filters.
    logprobs: int | None = None
    #: The same of every token of the prompt but the first. Such a request does not read the prefix cache.
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False  #: the text keeps the stop string
    skip_special_tokens: bool = True  #: the text, in which stop strings are looked for, is without special tokens
    #: With skip_special_tokens=False: False removes the space that some tokenizers put between two added tokens
    spaces_between_special_tokens: bool = True
    #: Use only the last tokens of the prompt, this many; -1 is as many as leave one token for output. A text
    #: keeps the special tokens that the tokenizer puts before it.
    truncate_prompt_tokens: int | None = None
    logit_bias: dict[int, float] | None = None  #: what to add to the logits of some token ids; -inf bans a token

    def __post_init__(self) -> None:
        check_int("n", self.n, 1, MAX_N)
        self._set_float("presence_penalty", -2.0, 2.0, "a number in [-2, 2]; 0 is off")
        self._set_float("frequency_penalty", -2.0, 2.0, "a number in [-2, 2]; 0 is off")
        self._set_float("repetition_penalty", FLOAT32_TINY, FLOAT32_MAX, "a finite (float32) number > 0; 1 is off")
        self._set_float("temperature", *TEMPERATURES)
        # ulp(0) is the least float above 0, so this is the half-open interval.
        self._set_float("top_p", math.ulp(0.0), 1.0, "a number in (0, 1]; 1 is off")
        check_int("top_k", self.top_k, -1)
        self._set_float("min_p", 0.0, 1.0, "a number in [0, 1]; 0 is off")
        if self.seed is not None:
            check_int("seed", self.seed, -(2**63), 2**63 - 1)
        self._set("seed", None if self.seed == -1 else self.seed)
        self._set("stop", _stop_strings(self.stop))
        self._set("stop_token_ids", _stop_token_ids(self.stop_token_ids))
        check_bool("ignore_eos", self.ignore_eos)
        if self.max_tokens is not None:
            check_int("max_tokens", self.max_tokens, 1)
        check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), -1)
        check_bool("include_stop_str_in_output", self.include_stop_str_in_output)
        check_bool("skip_special_tokens", self.skip_special_tokens)
        check_bool("spaces_between_special_tokens", self.spaces_between_special_tokens)
        if self.truncate_prompt_tokens is not None:
            check_int("truncate_prompt_tokens", self.truncate_prompt_tokens, -1)
            if self.truncate_prompt_tokens == 0:
                raise invalid("truncate_prompt_tokens", 0, "None, -1 or an integer >= 1")
        self._set("logit_bias", _logit_bias(self.logit_bias))

        if 0.0 < self.temperature < MIN_TEMPERATURE:
            logger.warning("temperature=%s was raised to %s", self.temperature, MIN_TEMPERATURE)
            self._set("temperature", MIN_TEMPERATURE)
        if self.is_greedy:
            if self.n > 1:
                raise invalid("n", self.n, "1 with temperature=0, because greedy samples are all equal")
            self._set("top_p", 1.0)
            self._set("top_k", 0)
            self._set("min_p", 0.0)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _set_float(self, name: str, low: float, high: float, allowed: str) -> None:
        self._set(name, check_float(name, getattr(self, name), low, high, allowed))

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)

    def check_vocab(self, vocab_size: int) -> None:
        """Raise ValueError for token ids >= `vocab_size`, and for more logprobs than that."""
        for name in ("stop_token_ids", "logit_bias"):
            outside = [token_id for token_id in getattr(self, name) or () if token_id >= vocab_size]
            if outside:
                raise invalid(name, outside, f"token ids <= {vocab_size - 1}, the model's last")
        banned = [bias for bias in (self.logit_bias or {}).values() if bias == -math.inf]
        if len(banned) == vocab_size:
            raise invalid("logit_bias", "-inf for every token", "at least one token that is not banned")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(self, name) or 0) > vocab_size:
                raise invalid(name, getattr(self, name), f"at most {vocab_size}, the vocabulary (-1 is all of it)")

    def prompt_limit(self, max_model_len: int) -> int | None:
        """The number of tokens that `truncate_prompt_tokens` keeps. Raises ValueError for more than the model takes."""
        kept = self.truncate_prompt_tokens
        if kept is not None and kept >= max_model_len:
            raise invalid(
                "truncate_prompt_tokens", kept, f"at most {max_model_len - 1} (max_model_len is {max_model_len})"
            )
        return max_model_len - 1 if kept == -1 else kept

    def child(self, index: int) -> SamplingParams:
        """The parameters of sample `index` of `n`: one sequence, seeded `seed + index` if there is a seed."""
        check_int("index", index, 0, self.n - 1)
        child = copy.copy(self)  # not replace(): it would take a sum of -1 for "no seed"
        child._set("n", 1)
        child._set("seed", None if self.seed is None else self.seed + index)
        return child


@request_params
class BeamSearchParams:
    """Beam search: keep the `beam_width` best sequences after every step (vLLM: `vllm/sampling_params.py`)."""

    beam_width: int
    max_tokens: int  #: the most output tokens
    _: KW_ONLY
    temperature: float = 0.0  #: no effect, as in vLLM V1: beams are scored by raw log probabilities
    #: A beam's score is its log probability / length ** length_penalty: a larger value favours longer beams
    length_penalty: float = 1.0
    ignore_eos: bool = False  #: EOS does not finish a beam
    stop_token_ids: list[int] | None = None  #: ids that finish a beam, besides EOS; a list after construction
    include_stop_str_in_output: bool = False  #: the text keeps the stop token

    def __post_init__(self) -> None:
        check_int("beam_width", self.beam_width, 1)
        check_int("max_tokens", self.max_tokens, 1)
        check_float("temperature", self.temperature, *TEMPERATURES)
        check_float("length_penalty", self.length_penalty, -FLOAT32_MAX, FLOAT32_MAX, "a finite number")
        check_bool("ignore_eos", self.ignore_eos)
        object.__setattr__(self, "stop_token_ids", _stop_token_ids(self.stop_token_ids))
        check_bool("include_stop_str_in_output", self.include_stop_str_in_output)
