"""Log probabilities to report: those of the raw logits, before bias, penalties, temperature and filters."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, Mapping, Sequence, ValuesView
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from folovllm.outputs import Logprob


class WholeVocabulary(Mapping[int, Logprob]):
    """The log probabilities of all tokens. It behaves like a `dict[int, Logprob]`, and becomes one when it is read.

    The chosen token comes first, then all by rank. Among equals the lower id ranks first. A million objects take
    thousands of times as long to make as the array of numbers that the step computed.

    decode: what a token's `decoded_token` is.
    """

    def __init__(self, chosen: int, logprobs: NDArray[np.float32]) -> None:
        self._chosen = chosen
        self._logprobs = logprobs  # [V]
        self._entries: dict[int, Logprob] | None = None
        self.decode: Callable[[int], str | None] = _no_text

    def logprob(self, token_id: int) -> float:
        """One token's log probability, without reading the others."""
        return float(self._logprobs[token_id])

    def _read(self) -> dict[int, Logprob]:
        if self._entries is None:
            order = np.argsort(-self._logprobs, kind="stable").tolist()
            ranks = {token_id: rank for rank, token_id in enumerate(order, start=1)}
            values = self._logprobs.tolist()
            self._entries = {
                token_id: Logprob(values[token_id], ranks[token_id], self.decode(token_id))
                for token_id in dict.fromkeys([self._chosen, *order])
            }
        return self._entries

    def __getitem__(self, token_id: int) -> Logprob:
        return self._read()[token_id]

    def __iter__(self) -> Iterator[int]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._logprobs)

    def items(self) -> ItemsView[int, Logprob]:
        return self._read().items()

    def values(self) -> ValuesView[Logprob]:
        return self._read().values()

    def __eq__(self, other: object) -> bool:
        return self._read() == (other._read() if isinstance(other, WholeVocabulary) else other)

    __hash__ = None  # type: ignore[assignment]  # as a dict has none

    def __repr__(self) -> str:
        return repr(self._read())

    def __reduce__(self) -> tuple[Any, ...]:
        """Without texts it is pickled as the array it is; with them as a dict, because a tokenizer does not travel."""
        if self._entries is None and self.decode is _no_text:
            return WholeVocabulary, (self._chosen, self._logprobs)
        return dict, (self._read(),)


def logprob_of(entries: Mapping[int, Logprob], token_id: int) -> float:
    """The log probability of one token of a row."""
    return entries.logprob(token_id) if isinstance(entries, WholeVocabulary) else entries[token_id].logprob


def _no_text(token_id: int) -> None:
    return None


def gather_logprobs(
    logits: Tensor, asked: Mapping[int, int], token_ids: Sequence[int]
) -> dict[int, Mapping[int, Logprob]]:
    """The log probabilities of rows of `logits` `[R, V]`, by row: the chosen token's, then those of the likeliest.

    asked: how many of the likeliest for each row, -1 for all. token_ids: the chosen ones, `[R]`.
    One log-sum-exp and one top-k, of the rows that ask.
    """
    if not asked:
        return {}
    rows = list(asked)
    table = (logits if len(rows) == len(logits) else logits[rows]).float()  # [A, V]
    log_sum_exp = table.logsumexp(dim=-1, keepdim=True)  # [A, 1]
    entries: dict[int, Mapping[int, Logprob]] = {}
    whole = [i for i, row in enumerate(rows) if asked[row] == -1]
    some = [i for i, row in enumerate(rows) if asked[row] != -1]
    if whole:
        wide = table[whole] - log_sum_exp[whole] if some else table - log_sum_exp  # [W, V]
        for i, values in zip(whole, wide.cpu().numpy(), strict=True):
            entries[rows[i]] = WholeVocabulary(token_ids[rows[i]], values)
    if not some:
        return entries
    if whole:
        table, log_sum_exp = table[some], log_sum_exp[some]
    chosen = torch.tensor([token_ids[rows[i]] for i in some], device=table.device)[:, None]  # [S, 1]
    own = table.gather(1, chosen)  # [S, 1]
    num_top = [min(asked[rows[i]], table.shape[-1]) for i in some]
    top = table.topk(max(num_top), dim=-1)  # [S, K] values and indices
    top_values, top_ids = (top.values - log_sum_exp).tolist(), top.indices.tolist()
    own_values = (own - log_sum_exp).squeeze(1).tolist()
    # Where the chosen token is not among the likeliest, its rank has to be counted. As in vLLM, a tie counts against
    # it: as many tokens are at least as likely.
    outside = [j for j, i in enumerate(some) if token_ids[rows[i]] not in top_ids[j][: num_top[j]]]
    ranks = dict(zip(outside, (table[outside] >= own[outside]).sum(dim=-1).tolist() if outside else (), strict=True))
    for j, i in enumerate(some):
        # A dict keeps the position of a key that is written twice, so the chosen token stays first.
        entry = {token_ids[rows[i]]: Logprob(own_values[j], ranks.get(j, 0))}
        for rank in range(1, num_top[j] + 1):
            entry[top_ids[j][rank - 1]] = Logprob(top_values[j][rank - 1], rank)
        entries[rows[i]] = entry
    return entries
