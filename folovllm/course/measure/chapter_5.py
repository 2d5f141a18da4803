"""The measurements of chapter 5: `python -m folovllm.course.measure ragged` writes `results/m3-ragged-folo-tiny.json`.

packing            three texts of `lengths` tokens, one behind the other, in one forward of Hugging Face's model
  differences      per way to tell it so: the largest difference of any logit from the text alone, per text. Ways:
                   mask (4-D, block-diagonal and causal), mask_with_cache, mask_counted_through (positions 0 to T - 1
                   in place of positions that begin again at every text), positions (that begin again, no mask, no
                   cache), positions_with_cache, nothing
  logits_standard_deviation, same_top_token (per way and text: the share of its tokens whose largest logit is the same)
generate_batch     same_tokens: whether Hugging Face's own continuous batching gives the tokens of each text alone
prefill            unequal, nearly_equal -> lengths, and cells: rows of tokens of a padded and of a packed forward. In
                   summary and rounds: seconds of one forward that reads the last logits of all three texts: padded
                   (a left-padded rectangle), packed (one row, a 4-D mask), one_by_one (a forward each), m3 (our
                   decoder); and padded_over_packed, one_by_one_over_packed, padded_over_m3, out of the same round
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from folovllm import LLM, SamplingParams
from folovllm.attention.reference import visible_tokens
from folovllm.course.bench.peers import run_continuous, run_sequential
from folovllm.course.bench.rounds import in_turn
from folovllm.course.bench.workloads import BenchRequest
from folovllm.course.measure.measuring import in_rounds, load, random_tokens, seconds

MODEL = "folo-tiny"
LENGTHS = {"unequal": (12, 300, 40), "nearly_equal": (36, 37, 36)}
REPEATS = 3  # forwards per round and way, the fastest of which counts
BATCH_TOKENS = 8  # output tokens per text of `generate_batch`


def ragged(console: Console, rounds: int, _: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """What packing changes in Hugging Face's logits, and what padding costs beside it."""
    model, header = load(MODEL, "float32")
    measured = []
    jobs = {name: forwards(model, lengths) for name, lengths in LENGTHS.items()}
    for ways in jobs.values():
        for way in ways.values():
            way()  # warm-up
    for index in range(rounds):
        numbers = {name: timed(ways, index) for name, ways in jobs.items()}
        measured.append(numbers)
        console.print(f"round {index + 1}: {numbers}", highlight=False)
    data = in_rounds(
        header,
        "ragged",
        measured,
        packing=packing(model, LENGTHS["unequal"]),
        generate_batch={"same_tokens": batch_says_the_same(model, LENGTHS["unequal"])},
        prefill={
            name: {"lengths": list(lens), "cells": {"padded": len(lens) * max(lens), "packed": sum(lens)}}
            for name, lens in LENGTHS.items()
        },
    )
    return [(f"m3-ragged-{MODEL}", data)]


def timed(ways: dict[str, Callable[[], object]], index: int) -> dict[str, float]:
    """Seconds of each way, in an order that turns, and their ratios."""
    took = in_turn({name: partial(fastest, way) for name, way in ways.items()}, index)
    return {
        **took,
        "padded_over_packed": took["padded"] / took["packed"],
        "one_by_one_over_packed": took["one_by_one"] / took["packed"],
        "padded_over_m3": took["padded"] / took["m3"],
    }


def fastest(way: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls."""
    return min(seconds(way) for _ in range(REPEATS))


def texts_of(lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    """Random tokens, so many per text."""
    tokens = random_tokens(sum(lengths), vocab_size)
    return [tokens[end - length : end] for end, length in zip(accumulate(lengths), lengths, strict=True)]


def block_diagonal(lengths: Sequence[int]) -> Tensor:
    """Which query sees which key if the texts are one behind the other: [1, 1, T, T] bool."""
    return torch.block_diag(*(visible_tokens(length, length, None) for length in lengths)).bool()[None, None]


def begin_again(lengths: Sequence[int]) -> Tensor:
    """Positions that begin at 0 in each text: [1, T]."""
    return torch.cat([torch.arange(length) for length in lengths])[None]


def packing(model: PreTrainedModel, lengths: Sequence[int]) -> dict[str, Any]:
    """Logits of packed texts beside those of each alone."""
    texts = texts_of(lengths, model.config.vocab_size)
    alone = [model(input_ids=torch.tensor([text]), use_cache=False).logits[0] for text in texts]  # each [L, V]
    ids = torch.tensor([[token for text in texts for token in text]])  # [1, T]
    mask, positions = block_diagonal(lengths), begin_again(lengths)
    ways: dict[str, dict[str, Any]] = {
        "mask": {"attention_mask": mask, "position_ids": positions, "use_cache": False},
        "mask_with_cache": {"attention_mask": mask, "position_ids": positions, "use_cache": True},
        "mask_counted_through": {"attention_mask": mask, "use_cache": False},
        "positions": {"position_ids": positions, "use_cache": False},
        "positions_with_cache": {"position_ids": positions, "use_cache": True},
        "nothing": {"use_cache": False},
    }
    differences, same = {}, {}
    for name, inputs in ways.items():
        parts = model(input_ids=ids, **inputs).logits[0].split(list(lengths))
        pairs = list(zip(parts, alone, strict=True))
        differences[name] = [float((part - right).abs().max()) for part, right in pairs]
        same[name] = [float((part.argmax(-1) == right.argmax(-1)).float().mean()) for part, right in pairs]
    return {
        "lengths": list(lengths),
        "differences": differences,
        "same_top_token": same,
        "logits_standard_deviation": float(torch.cat(alone).std()),
    }


def forwards(model: PreTrainedModel, lengths: Sequence[int]) -> dict[str, Callable[[], object]]:
    """The ways to get the last logits of every text."""
    texts = texts_of(lengths, model.config.vocab_size)
    longest = max(lengths)
    rectangle = torch.tensor([[0] * (longest - len(text)) + text for text in texts])  # [B, L]
    present = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])  # [B, L]
    columns = (present.cumsum(1) - 1).clamp(min=0)  # [B, L]
    row, mask, positions = (
        torch.tensor([[token for text in texts for token in text]]),
        block_diagonal(lengths),
        begin_again(lengths),
    )
    ends = torch.tensor(lengths).cumsum(0) - 1  # [B]
    last = torch.tensor([longest - 1])
    llm = LLM(MODEL, milestone="m3", dtype="float32", max_model_len=1024, num_kv_blocks=128)
    one_token = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)

    def one_by_one() -> list[Tensor]:
        return [
            model(input_ids=torch.tensor([text]), use_cache=False, logits_to_keep=torch.tensor([len(text) - 1])).logits
            for text in texts
        ]

    return {
        "padded": lambda: (
            model(
                input_ids=rectangle, attention_mask=present, position_ids=columns, use_cache=False, logits_to_keep=last
            ).logits
        ),
        "packed": lambda: (
            model(
                input_ids=row, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=ends
            ).logits
        ),
        "one_by_one": one_by_one,
        "m3": lambda: llm.generate(texts, one_token, use_tqdm=False),  # a whole step: with schedule, K/V and sampling
    }


def batch_says_the_same(model: PreTrainedModel, lengths: Sequence[int]) -> bool:
    """Greedy tokens of Hugging Face's continuous batching and of `generate`, text by text."""
    texts = texts_of(lengths, model.config.vocab_size)
    requests = [BenchRequest(text, BATCH_TOKENS) for text in texts]
    return run_continuous(model, requests).token_ids == run_sequential(model, requests).token_ids
