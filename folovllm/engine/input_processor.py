"""What may be given as a prompt, and how it becomes token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict, cast

from transformers import PreTrainedTokenizerBase

from folovllm.sampling_params import SamplingParams


class TokensPrompt(TypedDict):
    """A prompt given as token ids. cache_salt: only prompts with the same one share cached prefixes."""

    prompt_token_ids: list[int]
    cache_salt: NotRequired[str]


class TextPrompt(TypedDict):
    """A prompt given as text. cache_salt: as in `TokensPrompt`."""

    prompt: str
    cache_salt: NotRequired[str]


Prompt = str | list[int] | TokensPrompt | TextPrompt


@dataclass(frozen=True)
class GivenPrompt:
    """A prompt in its one form."""

    text: str | None  # None where token ids were given
    token_ids: list[int]
    cache_salt: str


def read_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> GivenPrompt:
    """A prompt in any of its forms. Raises ValueError for what is none, has no tokens or not the model's."""
    content, cache_salt = cast(Any, prompt), ""
    if isinstance(prompt, dict):
        given = dict(cast("dict[str, Any]", prompt))
        cache_salt = given.pop("cache_salt", "")
        if len(given) != 1 or not set(given) <= {"prompt", "prompt_token_ids"}:
            raise ValueError(
                f"prompt={prompt!r} is not valid; allowed: a dict with one key of ['prompt', 'prompt_token_ids'], and "
                "'cache_salt' if wanted"
            )
        if not isinstance(cache_salt, str):
            raise ValueError(f"cache_salt={cache_salt!r} is not valid; allowed: a string")
        check_text("cache_salt", cache_salt)
        (content,) = given.values()
    if isinstance(content, str):
        if tokenizer is None:
            raise ValueError(f"prompt={content!r} is text and the model has no tokenizer; allowed: token ids")
        token_ids = encode(tokenizer, "prompt", content)
        if not token_ids:
            raise ValueError(f"prompt={content!r} has no tokens; allowed: at least 1")
        return GivenPrompt(content, token_ids, cache_salt)
    return GivenPrompt(None, check_token_ids(content, vocab_size), cache_salt)


def check_token_ids(token_ids: Any, vocab_size: int) -> list[int]:
    """The same as a list. Raises ValueError for no list, an empty one, or what is no token id."""
    if not isinstance(token_ids, (list, tuple)):
        raise ValueError(f"prompt={token_ids!r} is not valid; allowed: a string or a list of token ids")
    if not token_ids:
        raise ValueError(f"prompt={token_ids!r} has no tokens; allowed: at least 1")
    for i, token_id in enumerate(token_ids):
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            raise ValueError(f"prompt_token_ids[{i}]={token_id!r} is not valid; allowed: integers in [0, {vocab_size})")
    return list(token_ids)


def encode(tokenizer: PreTrainedTokenizerBase, name: str, value: str, add_special_tokens: bool = True) -> list[int]:
    """Text as token ids. Raises ValueError, naming the argument, for text that is not valid Unicode."""
    check_text(name, value)
    return list(cast("list[int]", tokenizer(value, add_special_tokens=add_special_tokens)["input_ids"]))


def check_text(name: str, value: str) -> None:
    """Raise ValueError for text that is not valid Unicode, which has no bytes."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}={value!r} is not valid; allowed: text without lone surrogates") from error


def as_prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, in any form, as a list. A flat list of integers is one prompt."""
    if isinstance(prompts, (str, dict)):
        return [cast(Prompt, prompts)]
    if not isinstance(prompts, (list, tuple)):
        raise ValueError(
            f"prompts={prompts!r} is not valid; allowed: text, token ids, a prompt dict, or a list of them"
        )
    if prompts and all(isinstance(p, int) for p in prompts):
        return [cast(Prompt, list(prompts))]
    return list(cast("Sequence[Prompt]", prompts))


def broadcast_params(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams | None]:
    """One SamplingParams per prompt, from one for all or a list of as many. Raises ValueError for another length."""
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, (list, tuple)) or len(params) != count:
        raise ValueError(f"sampling_params={params!r} is not valid; allowed: one SamplingParams or a list of {count}")
    return list(params)
