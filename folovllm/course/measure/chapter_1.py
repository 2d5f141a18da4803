"""The measurement of chapter 1, `python -m folovllm.course.measure cache`: M0 with and without a KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from rich.console import Console
from transformers import DynamicCache, PreTrainedModel

from folovllm.baseline import BaselineResult, generate_cached, generate_recompute
from folovllm.course.bench.rounds import in_turn
from folovllm.course.measure.measuring import feed, in_rounds, load, random_tokens, seconds

PROMPT_LEN = 16
CACHE_LENGTHS = {"folo-tiny": (16, 32, 64, 128, 256), "qwen3-0.6b": (16, 32, 64)}
EXACT_LEN = 32  # tokens of the text on which logits are compared


def cache(console: Console, rounds: int, models: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Both loops of M0 from the same prompt; the times of n tokens for growing n, out of one run to the largest."""
    return [(f"m0-cache-{name}", cache_of(console, name, rounds)) for name in models]


def cache_of(console: Console, name: str, rounds: int) -> dict[str, Any]:
    """One model's file."""
    model, header = load(name, "float32" if name == "folo-tiny" else "auto")
    prompt = random_tokens(PROMPT_LEN, model.config.vocab_size)
    lengths = CACHE_LENGTHS[name]
    loops: dict[str, Callable[..., BaselineResult]] = {"recompute": generate_recompute, "cached": generate_cached}
    for loop in loops.values():
        loop(model, prompt, 4)  # warm-up
    measured: list[dict[str, Any]] = []
    same = True
    kv_bytes = 0
    for index in range(rounds):
        runs = in_turn({key: partial(loop, model, prompt, lengths[-1]) for key, loop in loops.items()}, index)
        same = same and runs["recompute"].token_ids == runs["cached"].token_ids
        kv_bytes = runs["cached"].kv_bytes
        sums = {key: list(accumulate(run.token_times)) for key, run in runs.items()}
        measured.append(
            {
                str(n): {
                    "recompute_seconds_per_token": sums["recompute"][n - 1] / n,
                    "cached_seconds_per_token": sums["cached"][n - 1] / n,
                    "time_ratio": sums["recompute"][n - 1] / sums["cached"][n - 1],
                }
                for n in lengths
            }
        )
        measured[-1]["lm_head"] = lm_head_seconds(model)
        console.print(f"{name}, round {index + 1}: {sums['recompute'][-1]:.2f} s, {sums['cached'][-1]:.2f} s")
    data = in_rounds(
        header, "cache", measured, prompt_len=PROMPT_LEN, new_tokens=list(lengths), same_tokens=same, kv_bytes=kv_bytes
    )
    if name == "folo-tiny":
        data["logit_differences"] = logit_differences(model)
    return data


def lm_head_seconds(model: PreTrainedModel) -> dict[str, float]:
    """The LM head on the last position of a prompt, as a slice of the hidden states and as a copy by index."""
    hidden = torch.zeros(1, 4 * PROMPT_LEN, model.config.hidden_size, dtype=model.dtype)  # [1, L, D]
    head = model.get_output_embeddings()
    rows = {"slice": hidden[:, -1:], "index": hidden[:, torch.tensor([hidden.shape[1] - 1])]}  # each [1, 1, D]
    with torch.inference_mode():
        took = {f"{key}_seconds": min(seconds(partial(head, row)) for _ in range(3)) for key, row in rows.items()}
    return {**took, "slice_over_index": took["slice_seconds"] / took["index_seconds"]}


def logit_differences(model: PreTrainedModel) -> dict[str, float]:
    """The largest difference of any logit from one plain forward, for ways that should and should not agree with it.

    Only `upper_triangular`, `decode_sees_itself_only` and `decode_one_position_late` are mistakes.
    """
    tokens = random_tokens(EXACT_LEN, model.config.vocab_size)
    ids = torch.tensor([tokens])  # [1, T]
    plain = model(input_ids=ids, use_cache=False).logits  # [1, T, V]
    triangle = torch.ones(1, 1, EXACT_LEN, EXACT_LEN, dtype=torch.bool).tril()  # [1, 1, T, T]

    def from_plain(logits: torch.Tensor) -> float:
        return float((logits - plain[:, -logits.shape[1] :]).abs().max())

    one_by_one = DynamicCache()
    stepwise = torch.cat([feed(model, [token], one_by_one) for token in tokens], dim=1)  # [1, T, V]

    def decode(**inputs: torch.Tensor) -> torch.Tensor:
        before = DynamicCache()
        feed(model, tokens[:-1], before)
        logits: torch.Tensor = model(input_ids=ids[:, -1:], past_key_values=before, use_cache=True, **inputs).logits
        return logits

    only_itself = torch.zeros(1, 1, 1, EXACT_LEN, dtype=torch.bool)  # [1, 1, 1, T]
    only_itself[..., -1] = True
    late = torch.tensor([[EXACT_LEN]])  # [1, 1]; right would be EXACT_LEN - 1
    return {
        "token_by_token_with_cache": from_plain(stepwise),
        "lower_triangular": from_plain(model(input_ids=ids, attention_mask=triangle, use_cache=False).logits),
        "upper_triangular": from_plain(
            model(input_ids=ids, attention_mask=triangle.transpose(2, 3), use_cache=False).logits
        ),
        "decode_sees_all": from_plain(decode(attention_mask=torch.ones_like(only_itself))),
        "decode_sees_itself_only": from_plain(decode(attention_mask=only_itself)),
        "decode_one_position_late": from_plain(decode(position_ids=late)),
        "logits_standard_deviation": float(plain.std()),
    }
