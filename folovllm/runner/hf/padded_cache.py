"""The K/V of several requests as one left-padded batch (M2).

Hugging Face's forward takes a rectangle, so requests of different lengths need padding. It goes to the left: then every
row ends in the same column, where its logits are read and behind which its next token goes.

    request a, 3 tokens   . . a0 a1 a2 | a3
    request b, 5 tokens   b0 b1 b2 b3 b4 | b5        . padding, which the mask hides
    request c, 1 token    . . .  .  c0 | c1        | the next step's column

While the same requests run, a step appends a column. When one leaves or joins, rows are copied into a new rectangle.

Invariants:
  1. Every request with K/V is one row of one batch, its home; its K/V is in the row's last `length` columns.
  2. A batch is as wide as the longest of the requests it was made for.
  3. Padding is finite: a masked value is multiplied by a weight of 0, and 0 times NaN would be NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def empty_cache() -> DynamicCache:
    """A cache that keeps every token.

    It is given no config on purpose: with one, sliding-window layers keep only their window, and the layers of a batch
    would differ in width. The attention mask still applies the window.
    """
    return DynamicCache()


@dataclass
class PaddedBatch:
    """K/V of requests side by side: `cache` holds [B, Hkv, width, D] per layer, row i that of `request_ids[i]`."""

    request_ids: list[str]
    lengths: list[int]
    cache: DynamicCache = field(default_factory=empty_cache)

    @property
    def width(self) -> int:
        """Columns, padding included."""
        return self.cache.get_seq_length()

    def cut(self, lengths: list[int]) -> None:
        """Take away what a forward that failed has appended to some layers or to all: these were the lengths before."""
        width, self.lengths = max(lengths), lengths
        if width == 0:
            self.cache = empty_cache()
        for layer in self.cache.layers:
            if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = layer.keys[:, :, :width], layer.values[:, :, :width]

    def rows(self, request_id: str) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of one request per layer, [Hkv, length, D]: views, without its padding."""
        row = self.request_ids.index(request_id)
        start = self.width - self.lengths[row]
        return [(keys[row, :, start:], values[row, :, start:]) for keys, values in layers(self.cache)]


class PaddedCaches:
    """The batch that each unfinished request is a row of."""

    def __init__(self) -> None:
        self._home: dict[str, PaddedBatch] = {}

    def __len__(self) -> int:
        return len(self._home)

    def add(self, request_ids: Sequence[str]) -> PaddedBatch:
        """A new batch of requests that have no K/V yet."""
        return self._settle(PaddedBatch(list(request_ids), [0] * len(request_ids)))

    def gather(self, request_ids: Sequence[str]) -> PaddedBatch:
        """These requests, in this order, as one batch: their present one, or a new one with copies of their rows."""
        home = self._home[request_ids[0]]
        if home.request_ids == list(request_ids) and all(self._home[i] is home for i in request_ids):
            return home
        rows = [self._home[i].rows(i) for i in request_ids]
        lengths = [row[0][0].shape[1] for row in rows]
        batch = PaddedBatch(list(request_ids), lengths)
        for index in range(len(rows[0])):
            keys = pad_left([row[index][0] for row in rows])  # [B, Hkv, width, D]
            values = pad_left([row[index][1] for row in rows])  # [B, Hkv, width, D]
            batch.cache.update(keys, values, index)
        return self._settle(batch)

    def drop(self, request_id: str) -> None:
        """Forget a request. Its row is freed when all requests of its batch have left it. Unknown ids are ignored."""
        self._home.pop(request_id, None)

    def _settle(self, batch: PaddedBatch) -> PaddedBatch:
        self._home.update(dict.fromkeys(batch.request_ids, batch))
        return batch


def layers(cache: DynamicCache) -> Iterable[tuple[Tensor, Tensor]]:
    """Keys and values of every layer, each [B, Hkv, T, D]. Raises RuntimeError for a layer that does not keep them."""
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
            raise RuntimeError(f"layer {index} is a {type(layer).__name__} without keys and values")
        yield layer.keys, layer.values


def pad_left(rows: Sequence[Tensor]) -> Tensor:
    """Tensors of [Hkv, length, D] on top of each other, zeros to the left of the shorter ones: [B, Hkv, width, D]."""
    heads, _, dim = rows[0].shape
    width = max(row.shape[1] for row in rows)
    if all(row.shape[1] == width for row in rows):
        return torch.stack(list(rows))
    out = rows[0].new_zeros(len(rows), heads, width, dim)
    for target, row in zip(out, rows, strict=True):
        target[:, width - row.shape[1] :] = row
    return out
