"""The forms of a prompt, and their conversion to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

from transformers import PreTrainedTokenizerBase

from folovllm.checks import invalid
from folovllm.sampling_params import SamplingParams


class PromptDict(TypedDict, total=False):
    """A prompt as text or as token ids: one of the first two keys."""

    prompt: str
    prompt_token_ids: list[int]
    cache_salt: str  # only prompts with the same salt share cached prefixes


Prompt = str | list[int] | PromptDict


@dataclass(frozen=True)
class GivenPrompt:
    """A prompt as token ids."""

    text: str | None  # None if given as token ids
    token_ids: list[int]
    cache_salt: str


def read_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> GivenPrompt:
    """Convert a prompt. Raises ValueError for another type, an empty prompt, and ids outside of the vocabulary."""
    content, cache_salt = cast(Any, prompt), ""
    if isinstance(prompt, dict):
        given = dict(cast("dict[str, Any]", prompt))
        cache_salt = given.pop("cache_salt", "")
        if len(given) != 1 or not set(given) <= {"prompt", "prompt_token_ids"}:
            allowed = "a dict with one key of ['prompt', 'prompt_token_ids'], and optionally 'cache_salt'"
            raise invalid("prompt", prompt, allowed)
        if not isinstance(cache_salt, str):
            raise invalid("cache_salt", cache_salt, "a string")
        check_text("cache_salt", cache_salt)
        (content,) = given.values()
    if isinstance(content, str):
        if tokenizer is None:
            raise ValueError(f"prompt={content!r} is text and the model has no tokenizer; allowed: token ids")
        token_ids = encode(tokenizer, "prompt", content)
        if not token_ids:
            raise ValueError(f"prompt={content!r} has no tokens; allowed: at least 1")
        for token_id in token_ids:
            if token_id >= vocab_size:  # a tokenizer with tokens that the model was not trained with
                token = tokenizer.convert_ids_to_tokens(token_id)
                allowed = f"text of tokens below {vocab_size}, the model's vocab_size"
                raise invalid("prompt", content, f"{allowed}, and it has the tokenizer's {token!r}, id {token_id}")
        return GivenPrompt(content, token_ids, cache_salt)
    return GivenPrompt(None, check_token_ids(content, vocab_size), cache_salt)


def check_token_ids(token_ids: Any, vocab_size: int) -> list[int]:
    """Token ids as a list. Raises ValueError for another type, an empty list, or ids outside of the vocabulary."""
    if not isinstance(token_ids, (list, tuple)):
        raise invalid("prompt", token_ids, "a string or a list of token ids")
    if not token_ids:
        raise ValueError(f"prompt={token_ids!r} has no tokens; allowed: at least 1")
    for i, token_id in enumerate(token_ids):
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            raise invalid(f"prompt_token_ids[{i}]", token_id, f"integers in [0, {vocab_size})")
    return list(token_ids)


def encode(tokenizer: PreTrainedTokenizerBase, name: str, value: str, add_special_tokens: bool = True) -> list[int]:
    """Text as token ids. Raises ValueError, with `name`, for text that is not valid Unicode."""
    check_text(name, value)
    return list(cast("list[int]", tokenizer(value, add_special_tokens=add_special_tokens)["input_ids"]))


def check_text(name: str, value: str) -> None:
    """Raise ValueError for text that is not valid Unicode."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise invalid(name, value, "text without lone surrogates") from error


def as_prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several as a list. A flat list of integers is one prompt."""
    if isinstance(prompts, (str, dict)):
        return [cast(Prompt, prompts)]
    if not isinstance(prompts, (list, tuple)):
        raise invalid("prompts", prompts, "text, token ids, a prompt dict, or a list of them")
    if prompts and all(isinstance(p, int) for p in prompts):
        return [cast(Prompt, list(prompts))]
    return list(cast("Sequence[Prompt]", prompts))


def broadcast_params(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams | None]:
    """A list of `count` parameters, from one for all or a list. Raises ValueError for another length."""
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, (list, tuple)) or len(params) != count:
        raise invalid("sampling_params", params, f"one SamplingParams or a list of {count}")
    return list(params)
