"""The forms of a prompt, and their conversion to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

from transformers import PreTrainedTokenizerBase

from folovllm.checks import as_int, as_list, check_bool, invalid
from folovllm.sampling_params import SamplingParams


class PromptDict(TypedDict, total=False):
    """A prompt as text or as token ids: one of the first two keys."""

    prompt: str
    prompt_token_ids: list[int]
    add_special_tokens: bool  # to the text: those that the tokenizer puts around it, such as BOS; True by default
    cache_salt: str  # only prompts with the same salt share cached prefixes


# Token ids may also be a numpy array, a torch tensor, or what a Hugging Face tokenizer returns.
Prompt = str | list[int] | PromptDict | Any


@dataclass(frozen=True)
class GivenPrompt:
    """A prompt as token ids."""

    text: str | None  # None if given as token ids
    token_ids: list[int]
    cache_salt: str


def read_prompt(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, truncate: int | None = None
) -> GivenPrompt:
    """Convert a prompt. truncate: keep only the last tokens, this many.

    Raises ValueError for another type, an empty prompt, and ids outside of the vocabulary.
    """
    content, cache_salt, special = cast(Any, prompt), "", True
    if isinstance(prompt, Mapping):
        given = dict(prompt)
        cache_salt, special = given.pop("cache_salt", ""), given.pop("add_special_tokens", True)
        if "input_ids" in given:
            rows = tokenizer_rows(prompt)
            if len(rows) != 1:
                raise invalid("prompt", prompt, f"the ids of one prompt, not of {len(rows)}")
            given = {"prompt_token_ids": rows[0]}
        if len(given) != 1 or not set(given) <= {"prompt", "prompt_token_ids"}:
            allowed = "a dict with one key of ['prompt', 'prompt_token_ids'], and optionally 'cache_salt'"
            raise invalid("prompt", prompt, f"{allowed}; with 'prompt' also 'add_special_tokens'")
        if not isinstance(cache_salt, str):
            raise invalid("cache_salt", cache_salt, "a string")
        check_text("cache_salt", cache_salt)
        check_bool("add_special_tokens", special)
        (content,) = given.values()
        if "prompt_token_ids" in given and "add_special_tokens" in prompt:
            raise invalid("add_special_tokens", special, "leaving it out, because the prompt has token ids")
    if isinstance(content, str):
        if tokenizer is None:
            raise ValueError(f"prompt={content!r} is text and the model has no tokenizer; allowed: token ids")
        token_ids = encode(tokenizer, "prompt", content, special, truncate)
        if not token_ids:
            raise ValueError(f"prompt={content!r} has no tokens; allowed: at least 1")
        for token_id in token_ids:
            if token_id >= vocab_size:  # a tokenizer with tokens that the model was not trained with
                token = tokenizer.convert_ids_to_tokens(token_id)
                allowed = f"text of tokens below {vocab_size}, the model's vocab_size"
                raise invalid("prompt", content, f"{allowed}, and it has the tokenizer's {token!r}, id {token_id}")
        return GivenPrompt(content, token_ids, cache_salt)
    return GivenPrompt(None, check_token_ids(content, vocab_size)[-(truncate or 0) :], cache_salt)


def check_token_ids(token_ids: Any, vocab_size: int) -> list[int]:
    """Token ids as a list. Raises ValueError for another type, an empty list, or ids outside of the vocabulary."""
    given = as_list(token_ids)
    if not isinstance(given, (list, tuple)):
        raise invalid("prompt", token_ids, "a string or a list of token ids")
    if not given:
        raise ValueError(f"prompt={given!r} has no tokens; allowed: at least 1")
    numbers = []
    for i, token_id in enumerate(given):
        number = as_int(token_id)
        if number is None or not 0 <= number < vocab_size:
            raise invalid(f"prompt_token_ids[{i}]", token_id, f"integers in [0, {vocab_size})")
        numbers.append(number)
    return numbers


def tokenizer_rows(encoding: Mapping[str, Any]) -> list[Any]:
    """The prompts in what a Hugging Face tokenizer returned, each as token ids and without its padding."""
    ids, mask = as_list(encoding["input_ids"]), as_list(encoding.get("attention_mask"))
    if not isinstance(ids, (list, tuple)):
        raise invalid("input_ids", ids, "token ids of one prompt, or a list of such")
    if not ids or not isinstance(as_list(ids[0]), (list, tuple)):
        ids, mask = [ids], None if mask is None else [mask]
    if mask is None:
        return list(ids)
    try:
        pairs = [zip(as_list(row), as_list(shown), strict=True) for row, shown in zip(ids, mask, strict=True)]
        return [[token_id for token_id, shown in pair if shown] for pair in pairs]
    except (TypeError, ValueError) as error:
        raise invalid("attention_mask", mask, "a number for each of input_ids") from error


def encode(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    value: str,
    add_special_tokens: bool = True,
    truncate: int | None = None,
) -> list[int]:
    """Text as token ids. truncate: as in `read_prompt`; special tokens before the text are kept and counted.

    Raises ValueError, with `name`, for text that is not valid Unicode.
    """
    check_text(name, value)
    ids = cast("list[int]", tokenizer(value, add_special_tokens=add_special_tokens)["input_ids"])
    if truncate is None or len(ids) <= truncate:
        return list(ids)
    # Not the tokenizer's own truncation: that is a setting of it, which another thread may use at the same time.
    first = cast("list[int]", tokenizer("", add_special_tokens=add_special_tokens)["input_ids"])
    num_kept = next((i for i, (a, b) in enumerate(zip(ids, first, strict=False)) if a != b), min(len(ids), len(first)))
    kept = min(num_kept, truncate)
    return [*ids[:kept], *ids[len(ids) - (truncate - kept) :]]


def check_text(name: str, value: str) -> None:
    """Raise ValueError for text that is not valid Unicode."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise invalid(name, value, "text without lone surrogates") from error


def as_prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several as a list. A flat list of integers is one prompt."""
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        return list(tokenizer_rows(prompts))
    if isinstance(prompts, (str, Mapping)):
        return [cast(Prompt, prompts)]
    given = as_list(prompts)
    if not isinstance(given, (list, tuple)):
        raise invalid("prompts", prompts, "text, token ids, a prompt dict, or a list of them")
    if given and all(isinstance(p, int) or as_int(p) is not None for p in given):
        return [list(given)]
    return list(given)


def broadcast_params(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams | None]:
    """A list of `count` parameters, from one for all or a list. Raises ValueError for another length."""
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, (list, tuple)) or len(params) != count:
        raise invalid("sampling_params", params, f"one SamplingParams or a list of {count}")
    return list(params)
