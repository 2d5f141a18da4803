"""What requests ask of the sampler, as rows of tables (vLLM: `gpu_input_batch.py`, `v1/sample/metadata.py`).

A request gets a row when it first samples and keeps it until it has finished; the row is used again. A step selects the
rows that it samples, in the order of its logits, and that selection is good until other requests sample. So a step that
samples for the same requests as the one before builds nothing and sends the device nothing but their output lengths.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from folovllm.sampling.noise import to_int64
from folovllm.sampling_params import SamplingParams

NO_LOGPROBS = -2  # 0 is the chosen token's alone, -1 the whole vocabulary's
FOREVER = 2**62
# One row per request. Numbers that the sampler computes with are float32, as its logits are.
FIELDS = np.dtype(
    [(name, np.float32) for name in ("temperature", "min_p", "top_p", "repetition", "frequency", "presence")]
    + [(name, np.int64) for name in ("top_k", "seed", "logprobs")]
)


@dataclass
class SamplingState:
    """One request as the sampler sees it when it first samples."""

    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int] = ()
    stop_token_ids: frozenset[int] = frozenset()  # EOS and params.stop_token_ids, banned for params.min_tokens tokens
    seed: int = 0  # of its random numbers; of any size, modulo 2 ** 64


@dataclass(frozen=True)
class Asked:
    """The rows that use a parameter, and its values."""

    rows: Tensor | None  # [N], or None: all
    values: Tensor  # [N, 1]


@dataclass(frozen=True)
class Edits:
    """Numbers to add to single logits: bans, for the first tokens of an output, and biases."""

    rows: Tensor  # [E], as the other three
    token_ids: Tensor
    bias: Tensor  # -inf for a ban
    until: Tensor  # while the output is shorter than this
    last: int  # the largest of `until`: from there on nothing is to be done


@dataclass(frozen=True)
class Penalties:
    """The rows with penalties, and what has occurred in their requests."""

    rows: Tensor  # [P]
    slots: Tensor  # [P], their rows of `counts`
    counts: TokenCounts
    repetition: Tensor  # [P, 1], as the other two
    frequency: Tensor
    presence: Tensor


@dataclass(frozen=True)
class SamplingMetadata:
    """A step's rows: what each asks for (vLLM's name). Fields are None where no row asks."""

    num_rows: int
    random_rows: Tensor | None  # [N], those that are not greedy; None: all, if `seeds` says that there are any
    seeds: Tensor | None  # [N]; the filters below count among these N rows, too
    temperature: Asked | None
    min_p: Asked | None
    top_k: Asked | None
    top_p: Asked | None
    edits: Edits | None
    penalties: Penalties | None
    num_logprobs: dict[int, int]  # of the rows that ask: how many of the likeliest, -1 for all


class TokenCounts:
    """Which tokens have occurred in a request, and how often in its output; a table row per request, on the device.

    A row lists each token once, so its length is that of the request and not of the vocabulary.
    """

    def __init__(self, device: torch.device) -> None:
        self.token_ids = torch.zeros(0, 0, dtype=torch.int64, device=device)  # [S, L]
        self.output_counts = torch.zeros(0, 0, dtype=torch.float32, device=device)  # [S, L]
        self.used = torch.zeros(0, dtype=torch.int64, device=device)  # [S], columns in use
        self.bound = 0  # no row uses more columns than this; known without asking the device

    def set(self, slot: int, prompt: Sequence[int], output: Sequence[int], vocab_size: int) -> None:
        """Start a row. Ids without a logit are left out: some models embed tokens that they cannot generate."""
        counts = Counter(dict.fromkeys(prompt, 0))
        counts.update(output)
        kept = [(token_id, count) for token_id, count in counts.items() if token_id < vocab_size]
        self.bound = max(self.bound, len(kept))
        self._reserve(slot + 1, self.bound)
        self.used[slot] = len(kept)
        if kept:
            table = torch.tensor(kept, device=self.used.device)  # [len(kept), 2]
            self.token_ids[slot, : len(kept)], self.output_counts[slot, : len(kept)] = table.T

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids and output counts, `[P, L]`, of some rows, and how many are in use, `[P, 1]`.

        Rows that are shorter than the longest repeat their first token.
        """
        used = self.used[slots][:, None]
        columns = torch.arange(self.bound, device=used.device)
        columns = columns.where(columns < used, 0)  # [P, L]
        return self.token_ids[slots[:, None], columns], self.output_counts[slots[:, None], columns], used

    def add(self, slots: Tensor, token_ids: Tensor) -> None:
        """Count one more output token in each of some rows; both are `[P]`."""
        self.bound += 1
        if self.bound > self.token_ids.shape[1]:  # rare: the widths double
            self.bound = int(self.used.max()) + 1
            self._reserve(0, 2 * self.bound)
        used = self.used[slots]
        columns = torch.arange(self.bound, device=slots.device)
        found = (self.token_ids[slots, : self.bound] == token_ids[:, None]) & (columns < used[:, None])  # [P, L]
        is_new = ~found.any(dim=1)
        cells = (slots, used.where(is_new, found.int().argmax(dim=1)))
        self.token_ids[cells] = token_ids
        self.output_counts[cells] = self.output_counts[cells].where(~is_new, 0) + 1
        self.used[slots] += is_new

    def _reserve(self, slots: int, columns: int) -> None:
        """Make the tables at least so large."""
        old_slots, old_columns = self.token_ids.shape
        more_slots = max(slots, 2 * old_slots) - old_slots if slots > old_slots else 0
        more_columns = max(0, columns - old_columns)
        if more_slots or more_columns:
            self.token_ids = F.pad(self.token_ids, (0, more_columns, 0, more_slots))
            self.output_counts = F.pad(self.output_counts, (0, more_columns, 0, more_slots))
            self.used = F.pad(self.used, (0, more_slots))


class SamplingBatch:
    """The tables. device: of the logits. vocab_size: their columns."""

    def __init__(self, device: torch.device | str, vocab_size: int) -> None:
        self.device = torch.device(device)
        self.vocab_size = vocab_size
        self.fields = np.zeros(0, FIELDS)  # [S]
        self.edits: dict[int, NDArray[np.float64]] = {}  # by row, of those that have any: [E, 3] token id, bias, until
        self.counts = TokenCounts(self.device)
        self._free: list[int] = []

    def add(self, state: SamplingState) -> int:
        """Give a request a row, and return its number."""
        if not self._free:
            size = len(self.fields)
            self.fields = np.concatenate([self.fields, np.zeros(max(size, 8), FIELDS)])
            self._free = list(range(len(self.fields) - 1, size - 1, -1))
        slot, p = self._free.pop(), state.params
        row = self.fields[slot]
        row["temperature"] = 0.0 if p.is_greedy else p.temperature
        row["min_p"], row["top_p"] = p.min_p, p.top_p
        row["top_k"] = p.top_k if 0 < p.top_k < self.vocab_size else self.vocab_size
        row["seed"] = to_int64(state.seed)
        row["logprobs"] = NO_LOGPROBS if p.logprobs is None else p.logprobs
        row["repetition"], row["frequency"] = p.repetition_penalty, p.frequency_penalty
        row["presence"] = p.presence_penalty
        edits = [(token_id, bias, FOREVER) for token_id, bias in (p.logit_bias or {}).items()]
        edits += [(token_id, -np.inf, p.min_tokens) for token_id in state.stop_token_ids if p.min_tokens > 0]
        self.edits.pop(slot, None)
        if edits:
            self.edits[slot] = np.array(edits, np.float64)
        if p.has_penalties:
            self.counts.set(slot, state.prompt_token_ids, state.output_token_ids, self.vocab_size)
        return slot

    def remove(self, slot: int) -> None:
        """Let another request have the row."""
        self._free.append(slot)

    def select(self, slots: Sequence[int]) -> SamplingMetadata:
        """What these rows ask for, on the device."""
        index = np.array(slots, np.int64)
        fields = self.fields[index]
        is_random = np.flatnonzero(fields["temperature"] > 0)
        chosen = fields[is_random]
        return SamplingMetadata(
            num_rows=len(index),
            random_rows=None if len(is_random) == len(index) else self._send(is_random),
            seeds=self._send(chosen["seed"]) if len(is_random) else None,
            temperature=self._asked(chosen["temperature"], 1.0),
            min_p=self._asked(chosen["min_p"], 0.0),
            top_k=self._asked(chosen["top_k"], self.vocab_size),
            top_p=self._asked(chosen["top_p"], 1.0),
            edits=self._select_edits(slots),
            penalties=self._select_penalties(index, fields),
            num_logprobs={
                int(row): int(fields["logprobs"][row]) for row in np.flatnonzero(fields["logprobs"] != NO_LOGPROBS)
            },
        )

    def _send(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _asked(self, values: NDArray[Any], off: float) -> Asked | None:
        rows = np.flatnonzero(values != off)
        if not len(rows):
            return None
        return Asked(None if len(rows) == len(values) else self._send(rows), self._send(values[rows])[:, None])

    def _select_edits(self, slots: Sequence[int]) -> Edits | None:
        found = [(row, self.edits[slot]) for row, slot in enumerate(slots) if slot in self.edits] if self.edits else []
        if not found:
            return None
        rows = np.repeat([row for row, _ in found], [len(edits) for _, edits in found])
        token_ids, bias, until = np.concatenate([edits for _, edits in found]).T
        return Edits(
            self._send(rows),
            self._send(token_ids.astype(np.int64)),
            self._send(bias.astype(np.float32)),
            self._send(until.astype(np.int64)),
            int(until.max()),
        )

    def _select_penalties(self, slots: NDArray[np.int64], fields: NDArray[Any]) -> Penalties | None:
        rows = np.flatnonzero((fields["repetition"] != 1) | (fields["frequency"] != 0) | (fields["presence"] != 0))
        if not len(rows):
            return None
        columns = (self._send(fields[name][rows])[:, None] for name in ("repetition", "frequency", "presence"))
        return Penalties(self._send(rows), self._send(slots[rows]), self.counts, *columns)
