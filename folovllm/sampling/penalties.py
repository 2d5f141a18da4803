"""Repetition, frequency and presence penalties.

Read beside vLLM's `apply_penalties` in `model_executor/layers/utils.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from folovllm.sampling.sampler import SamplingState


def count_tokens(lists: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> torch.Tensor:
    """How often each token id occurs in each of R lists: int64 `[R, V]`.

    An id without a logit is not counted: some models embed tokens that they cannot generate.
    """
    width = vocab_size + 1  # the last column collects the ids without a logit
    lengths = torch.tensor([len(ids) for ids in lists])  # [R]
    ids = torch.tensor(list(chain.from_iterable(lists)), dtype=torch.int64)  # [sum of lengths]
    rows = torch.arange(len(lists)).repeat_interleave(lengths)
    cells = (rows * width + ids.clamp(max=vocab_size)).to(device)
    return torch.bincount(cells, minlength=len(lists) * width).view(-1, width)[:, :vocab_size]


def apply_penalties(logits: torch.Tensor, states: Sequence[SamplingState]) -> None:
    """Penalise, in place, what each request has already seen or said. logits: float32 `[R, V]`.

    Repetition (arXiv 1909.05858): tokens in prompt or output; positive logits are divided, others multiplied.
    Frequency and presence (OpenAI API): tokens in the output only; subtracted per occurrence, and once.
    """
    rows = [row for row, state in enumerate(states) if state.params.has_penalties]
    if not rows:
        return
    device, vocab_size = logits.device, logits.shape[-1]
    asking = [states[row] for row in rows]
    repetition, frequency, presence = (
        torch.tensor(values, dtype=torch.float32, device=device)[:, None]  # [P, 1]
        for values in (
            [state.params.repetition_penalty for state in asking],
            [state.params.frequency_penalty for state in asking],
            [state.params.presence_penalty for state in asking],
        )
    )
    said = count_tokens([state.output_token_ids for state in asking], vocab_size, device)  # [P, V]
    read = count_tokens([state.prompt_token_ids for state in asking], vocab_size, device)  # [P, V]

    index = torch.tensor(rows, device=device)
    x = logits[index]  # [P, V]
    x = torch.where((said > 0) | (read > 0), torch.where(x > 0, x / repetition, x * repetition), x)
    x -= frequency * said
    x -= presence * (said > 0)
    logits[index] = x
