"""Reference answers to the exercises of M1. The tasks are in `exercise.py`; each answer names its place in folovllm.

The engine's sampler does the same for a batch of requests at once, on logits [R, V].
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch

# --- the sampler ------------------------------------------------------------------------------------------

NEG_INF = float("-inf")


def apply_repetition_penalty(logits: torch.Tensor, token_ids: Sequence[int], penalty: float) -> torch.Tensor:
    """Each token that has occurred, once (folovllm/sampling/logits.py: `apply_penalties`)."""
    if penalty <= 0:
        raise ValueError(f"penalty={penalty}: must be greater than 0")
    penalised = logits.clone()
    for token_id in set(token_ids):
        logit = logits[token_id]
        penalised[token_id] = logit / penalty if logit > 0 else logit * penalty
    return penalised


def apply_temperature(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits over temperature (folovllm/sampling/logits.py)."""
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: must be greater than 0")
    return logits / temperature


def apply_min_p(logits: torch.Tensor, min_p: float) -> torch.Tensor:
    """A threshold relative to the likeliest token (folovllm/sampling/logits.py)."""
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p={min_p}: must be in [0, 1]")
    probs = logits.softmax(dim=0)  # [V]
    return torch.where(probs >= min_p * probs.max(), logits, NEG_INF)


def apply_top_k(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Everything from the k-th largest logit up (folovllm/sampling/logits.py)."""
    if top_k < 1:
        raise ValueError(f"top_k={top_k}: must be at least 1")
    kth_largest = sorted(logits.tolist(), reverse=True)[:top_k][-1]
    return torch.where(logits >= kth_largest, logits, NEG_INF)


def apply_top_p(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Take tokens from the likeliest down until top_p is reached (folovllm/sampling/logits.py goes from below)."""
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be in (0, 1]")
    if top_p == 1:
        return logits.clone()  # sums of rounded probabilities may reach 1 before the last token
    probs, order = logits.softmax(dim=0).sort(descending=True)  # [V] each
    before = probs.cumsum(dim=0) - probs  # [V]  the mass of all likelier tokens
    kept = order[before < top_p]  # the token that crosses top_p starts below it
    filtered = torch.full_like(logits, NEG_INF)
    filtered[kept] = logits[kept]
    return filtered


# --- when to stop -----------------------------------------------------------------------------------------


def check_stop(
    prompt_len: int,
    output_token_ids: Sequence[int],
    *,
    eos_token_ids: Collection[int],
    max_model_len: int,
    max_tokens: int | None = None,
    min_tokens: int = 0,
    ignore_eos: bool = False,
    stop_token_ids: Collection[int] = (),
) -> tuple[str | None, int | None]:
    """The same rules on a Request: folovllm/scheduler/stop.py (vLLM: `vllm/v1/core/sched/utils.py`)."""
    newest, count = output_token_ids[-1], len(output_token_ids)
    if count >= min_tokens:
        if newest in eos_token_ids and not ignore_eos:
            return "stop", None
        if newest in stop_token_ids:
            return "stop", newest
    if count == max_tokens or prompt_len + count == max_model_len:
        return "length", None
    return None, None


# --- from tokens to text ----------------------------------------------------------------------------------


class TextStream:
    """Decodes everything at every token, for clarity; the work grows with the square of the output's length.

    folovllm/engine/detokenizer.py: `IncrementalDecoder` decodes a short window instead.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.decode = decode
        self.token_ids: list[int] = []
        self.returned = ""

    def push(self, token_id: int) -> str:
        """Text that ends in U+FFFD waits for the token that completes its last character."""
        self.token_ids.append(token_id)
        text = self.decode(self.token_ids)
        return "" if text.endswith("\ufffd") else self._return(text)

    def finish(self) -> str:
        """What waits, without the half character at its end."""
        return self._return(self.decode(self.token_ids).rstrip("\ufffd"))

    def _return(self, text: str) -> str:
        new = text[len(self.returned) :]
        self.returned += new
        return new


class StopStrings:
    """Text goes character by character through `held`, where a stop string is found when its last character comes in.

    folovllm/engine/detokenizer.py: `Detokenizer` searches each new piece of text at once.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        if not all(stop):
            raise ValueError(f"stop={stop!r}: no stop string may be empty")
        self.stop = list(stop)
        self.matched: str | None = None
        self.held = ""  # an end of the text that is the beginning of a stop string

    def feed(self, text: str) -> str:
        """A character at a time: then two stop strings can be complete together only at the same character."""
        shown = ""
        for character in text:
            if self.matched is None:
                shown += self._feed_one(character)
        return shown

    def _feed_one(self, character: str) -> str:
        text = self.held + character
        for stop in self.stop:
            if text.endswith(stop):
                self.matched, self.held = stop, ""
                return text[: -len(stop)]
        start = 0
        while not any(stop.startswith(text[start:]) for stop in self.stop) and start < len(text):
            start += 1
        self.held = text[start:]
        return text[:start]

    def finish(self) -> str:
        """What was held back turned out to be text."""
        shown, self.held = self.held, ""
        return shown
