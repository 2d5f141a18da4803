"""M0: generate text with Hugging Face, first without a KV cache, then with one.

A language model maps token ids to logits: for every entry of the vocabulary, a score of being the next token. To
generate, choose a token, append it, and run the model again: `_generate` below. The two functions after it
differ only in how they get the logits of the last position.

`generate_recompute` runs the model on the whole text at every step. Each step repeats the work of all steps before it,
and adds one position.

That work can be kept. Attention is causal: position i attends to positions 0..i only. So what a layer computes at i
never changes when the text grows, and later tokens need only its key and its value. A **KV cache** keeps these two, per
layer and position. `generate_cached` feeds the model only the tokens that are not in the cache: the prompt once
(prefill), then one token per step (decode).

    step               1                2                    3
    recompute feeds    [p0 p1 p2]       [p0 p1 p2 t0]        [p0 p1 p2 t0 t1]
    cached feeds       [p0 p1 p2]       [t0] + K/V of 0..2   [t1] + K/V of 0..3
    and chooses        t0               t1                   t2

Both choose the same tokens. `course/lessons/baseline_report.py` computes what the cache saves.

Shapes: T tokens in the text, L tokens fed, V vocabulary, Hkv key/value heads, D head size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import transformers
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from folovllm.models.config_fields import without_unread_windows
from folovllm.models.families import check_family

MIN_TEMPERATURE = 0.01  # vLLM's limit: logits divided by less may overflow


@dataclass(frozen=True)
class BaselineResult:
    """What one loop generated, with times and memory."""

    prompt_len: int
    token_ids: list[int]  # the new tokens, with the EOS
    token_times: list[float]  # seconds per new token; the first is the prefill
    kv_bytes: int = 0  # K and V of prompt_len + len(token_ids) - 1 tokens: the last one is not fed to the model


def _generate(
    next_logits: Callable[[list[int]], torch.Tensor],
    prompt: list[int],
    max_new_tokens: int,
    eos_token_ids: Iterable[int],
    temperature: float,
    generator: torch.Generator,
    on_token: Callable[[int], None] | None,
) -> BaselineResult:
    """The loop of every language model: logits of the text so far, one token from them, append, again."""
    eos = set(eos_token_ids)
    text = list(prompt)
    token_times: list[float] = []
    with torch.inference_mode():
        while len(text) < len(prompt) + max_new_tokens:
            start = time.perf_counter()
            token = choose_token(next_logits(text), temperature, generator)
            token_times.append(time.perf_counter() - start)
            text.append(token)
            if on_token is not None:
                on_token(token)
            if token in eos:
                break
    return BaselineResult(len(prompt), text[len(prompt) :], token_times)


def generate_recompute(
    model: transformers.PreTrainedModel,
    prompt_token_ids: Sequence[int],
    max_new_tokens: int,
    eos_token_ids: Iterable[int] = (),
    temperature: float = 0.0,
    seed: int | None = None,
    on_token: Callable[[int], None] | None = None,
) -> BaselineResult:
    """Generate without a cache: every step runs the model on the whole text.

    Stops after `max_new_tokens` or after a token in `eos_token_ids`. Temperature 0 takes the highest logit; above 0, a
    token is drawn from softmax(logits / temperature), the same for the same seed (None: a new seed each time).
    `on_token` is called with each new token, outside the measured time.
    Raises ValueError for a prompt that is empty or outside the vocabulary, for a text longer than the model's
    positions, and for a max_new_tokens or temperature out of range.
    """
    prompt = _checked_prompt(model, prompt_token_ids, max_new_tokens, temperature)

    def next_logits(text: list[int]) -> torch.Tensor:
        input_ids = torch.tensor([text], device=model.device)  # [1, T]
        position_ids = torch.arange(len(text), device=model.device)[None]  # [1, T]  0, 1, ..., T-1
        # The LM head runs on the last position only. The position is given by its index: logits_to_keep=1 would make a
        # slice, and torch multiplies a slice of bfloat16 far slower on a CPU.
        last = torch.tensor([len(text) - 1], device=model.device)  # [1]
        output = model(input_ids=input_ids, position_ids=position_ids, use_cache=False, logits_to_keep=last)
        return output.logits[0, -1]  # [V], of [1, 1, V]

    generator = _make_generator(model.device, seed)
    return _generate(next_logits, prompt, max_new_tokens, eos_token_ids, temperature, generator, on_token)


def generate_cached(
    model: transformers.PreTrainedModel,
    prompt_token_ids: Sequence[int],
    max_new_tokens: int,
    eos_token_ids: Iterable[int] = (),
    temperature: float = 0.0,
    seed: int | None = None,
    on_token: Callable[[int], None] | None = None,
) -> BaselineResult:
    """Generate with a KV cache: every step runs the model on the tokens that are not in the cache.

    Arguments, errors and tokens are those of `generate_recompute`. (Sums are taken in another order, so the tokens may
    differ where two logits are equal up to rounding. In float32 that is rare.)
    """
    prompt = _checked_prompt(model, prompt_token_ids, max_new_tokens, temperature)
    # Per layer: keys and values, each [1, Hkv, T, D], growing in T, or up to the sliding window if the model has one.
    cache = DynamicCache(config=without_unread_windows(model.config))

    def next_logits(text: list[int]) -> torch.Tensor:
        past = cache.get_seq_length()  # tokens whose K and V are in the cache: 0, then T - 1
        input_ids = torch.tensor([text[past:]], device=model.device)  # [1, L]  the prompt, then one token
        # The cache ends at position past - 1, so the fed tokens have positions past, past + 1, ...: the first decode
        # token's position is the prompt's length. With an offset of one, every later logit would be slightly wrong.
        position_ids = torch.arange(past, len(text), device=model.device)[None]  # [1, L]
        last = torch.tensor([len(text) - past - 1], device=model.device)  # [1]
        output = model(
            input_ids=input_ids,
            position_ids=position_ids,
            past_key_values=cache,  # each layer appends its new K and V to it, then attends to all of them
            use_cache=True,
            logits_to_keep=last,
        )
        return output.logits[0, -1]  # [V], of [1, 1, V]

    generator = _make_generator(model.device, seed)
    result = _generate(next_logits, prompt, max_new_tokens, eos_token_ids, temperature, generator, on_token)
    return replace(result, kv_bytes=cache_bytes(cache))


def choose_token(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    """The next token's id from logits [V]: the highest at temperature 0, else a draw.

    `item()` waits for the device, so that the measured time is that of the whole step, on a GPU too.
    """
    if temperature == 0:
        return int(logits.argmax().item())
    probs = torch.softmax(logits.float() / temperature, dim=-1)  # [V]
    return int(torch.multinomial(probs, num_samples=1, generator=generator).item())


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of all keys and values in the cache, counted from its tensors."""
    layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    return sum(kv.nbytes for layer in layers for kv in (layer.keys, layer.values) if kv is not None)


def _make_generator(device: torch.device, seed: int | None) -> torch.Generator:
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()  # a new torch.Generator has a fixed seed; this takes one from the system
    else:
        generator.manual_seed(seed)
    return generator


def _checked_prompt(
    model: transformers.PreTrainedModel, prompt_token_ids: Sequence[int], max_new_tokens: int, temperature: float
) -> list[int]:
    """The prompt as a list. Raises ValueError for invalid arguments."""
    config = model.config.get_text_config(decoder=True)
    prompt = list(prompt_token_ids)
    if not prompt:
        raise ValueError("prompt_token_ids is empty: at least one token is needed")
    unknown = [token for token in prompt if not 0 <= token < config.vocab_size]
    if unknown:
        raise ValueError(f"prompt_token_ids holds {unknown[0]}: allowed are 0 to {config.vocab_size - 1}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 0")
    if temperature != 0 and not MIN_TEMPERATURE <= temperature < math.inf:
        raise ValueError(f"temperature={temperature}: must be 0 (greedy) or at least {MIN_TEMPERATURE}")
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and len(prompt) + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens and max_new_tokens={max_new_tokens} need "
            f"{len(prompt) + max_new_tokens} positions: the model has {limit}"
        )
    check_family(model.config, len(prompt) + max_new_tokens)
    return prompt
