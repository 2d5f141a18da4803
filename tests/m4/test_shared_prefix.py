"""A prefix that is read once for several requests: the result is that of the formula, for each of them alone."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from folovllm.attention.backend import AttentionParams, LayerKV
from folovllm.attention.cascade import (
    MIN_SHARED_TOKENS,
    CascadeGroup,
    attend_part,
    cascade_groups,
    common_blocks,
    merge_parts,
    parts_work,
    stack_rows,
    unstack_rows,
)
from folovllm.attention.metadata import AttentionMetadata
from folovllm.attention.torch_backend import StepLayout, TorchBackend

NUM_BLOCKS = 600


def formula(query: Tensor, kv: LayerKV, meta: AttentionMetadata, params: AttentionParams) -> Tensor:
    """softmax(q k^T * scale) v in float64, token by token and head by head, without any of our code."""
    out = torch.zeros_like(query, dtype=torch.float64)
    row = 0
    group = query.shape[1] // kv.keys.shape[2]
    for table, query_len, kv_len in zip(meta.tables, meta.query_lens, meta.kv_lens, strict=True):
        keys = torch.stack([kv.keys[table[j // meta.block_size], j % meta.block_size] for j in range(kv_len)]).double()
        values = torch.stack(
            [kv.values[table[j // meta.block_size], j % meta.block_size] for j in range(kv_len)]
        ).double()
        for position in range(kv_len - query_len, kv_len):
            first = 0 if params.sliding_window is None else max(0, position + 1 - params.sliding_window)
            for head in range(query.shape[1]):
                seen = slice(first, position + 1)
                scores = keys[seen, head // group] @ query[row, head].double() * params.scale
                out[row, head] = scores.softmax(0) @ values[seen, head // group]
            row += 1
    return out


def batch(seed: int) -> tuple[Tensor, LayerKV, AttentionMetadata]:
    """Requests with one or two prefixes among them, whole or in part, decodes and prefills. Unused slots hold NaN."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    block_size, num_kv_heads = rng.choice([4, 16, 64]), rng.choice([1, 2])
    group, dim = rng.choice([1, 2, 5]), rng.choice([8, 24])
    free = list(range(1, NUM_BLOCKS))
    if seed % 2:
        rng.shuffle(free)

    def take(count: int) -> list[int]:
        taken = free[:count]
        del free[:count]
        return taken

    prefixes = [take(rng.randint(1, 160 // block_size)) for _ in range(rng.randint(1, 2))]
    tables, query_lens, kv_lens = [], [], []
    for _ in range(rng.randint(2, 6)):
        prefix = rng.choice(prefixes)
        shared = rng.randint(0, len(prefix)) if rng.random() < 0.3 else len(prefix)
        table = (*prefix[:shared], *take(rng.randint(1, 2)))
        kv_len = (len(table) - 1) * block_size + rng.randint(1, block_size)
        tables.append(table)
        kv_lens.append(kv_len)
        query_lens.append(rng.choice([1, 1, rng.randint(1, min(12, kv_len - shared * block_size))]))
    shape = (NUM_BLOCKS, block_size, num_kv_heads, dim)
    kv = LayerKV(torch.full(shape, math.nan), torch.full(shape, math.nan))
    for table, kv_len in zip(tables, kv_lens, strict=True):
        for j in range(kv_len):
            for x in (kv.keys, kv.values):
                x[table[j // block_size], j % block_size] = torch.randn(num_kv_heads, dim, generator=generator)
    total = sum(query_lens)
    width = max(map(len, tables))
    meta = AttentionMetadata(
        torch.tensor([0, *query_lens]).cumsum(0).int(),
        torch.tensor(kv_lens, dtype=torch.int32),
        torch.zeros(total, dtype=torch.int64),
        torch.tensor([[*table, *[0] * (width - len(table))] for table in tables], dtype=torch.int32),
        block_size,
        query_lens,
        kv_lens,
        tables,
    )
    return torch.randn(total, num_kv_heads * group, dim, generator=generator), kv, meta


def test_this_torch_has_what_it_takes() -> None:
    assert parts_work()


def test_the_result_is_the_formulas_with_groups_and_without() -> None:
    grouped = mixed = 0
    for seed in range(40):
        query, kv, meta = batch(seed)
        params = AttentionParams(query.shape[-1] ** -0.5, 9 if seed % 5 == 0 else None)
        out = TorchBackend().attend(query, kv, meta, params)
        torch.testing.assert_close(out.double(), formula(query, kv, meta, params), atol=1e-5, rtol=0)
        grouped += bool(StepLayout(meta).groups) and params.sliding_window is None
        members = [i for group in StepLayout(meta).groups for i in group.requests]
        mixed += {meta.query_lens[i] > 1 for i in members} == {True, False}
    assert grouped >= 15 and mixed >= 5


def test_two_layers_and_two_steps_do_not_disturb_each_other() -> None:
    """The places for copies are used again and again, by steps of other sizes."""
    backend = TorchBackend()
    for seed in (1, 7, 3, 1, 11):
        query, kv, meta = batch(seed)
        other = LayerKV(kv.values, kv.keys)
        params = AttentionParams(0.3)
        for layer in (kv, other, kv):
            out = backend.attend(query, layer, meta, params)
            torch.testing.assert_close(out.double(), formula(query, layer, meta, params), atol=1e-5, rtol=0)


def test_without_the_private_function_every_request_is_computed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("folovllm.attention.torch_backend.parts_work", lambda: False)
    query, kv, meta = batch(1)
    assert StepLayout(meta).groups
    params = AttentionParams(0.3)
    out = TorchBackend().attend(query, kv, meta, params)
    torch.testing.assert_close(out.double(), formula(query, kv, meta, params), atol=1e-5, rtol=0)


def test_groups_share_what_all_members_have_and_no_new_token() -> None:
    size = 16
    many = MIN_SHARED_TOKENS // size
    common = tuple(range(1, many + 3))
    tables = [(*common, 90), (*common, 91), (*common[:many], 92, 93), (95, 96)]
    kv_lens = [len(table) * size - 3 for table in tables]
    assert cascade_groups(tables, [1, 1, 1, 1], kv_lens, size) == [CascadeGroup((0, 1, 2), many)]
    assert cascade_groups(tables, [1, 1, size + 4, 1], kv_lens, size) == [CascadeGroup((0, 1, 2), many)]
    # The second one is still computing the prefix itself, or nearly all of it is new: it is no member.
    assert cascade_groups(tables[:2], [1, kv_lens[1]], kv_lens[:2], size) == []
    assert cascade_groups(tables[:2], [1, kv_lens[1] - MIN_SHARED_TOKENS + 1], kv_lens[:2], size) == []
    # Too short to be worth it.
    short = [(*common[: many - 1], 90), (*common[: many - 1], 91)]
    assert cascade_groups(short, [1, 1], [many * size, many * size], size) == []
    assert cascade_groups(tables[:1], [1], kv_lens[:1], size) == []


@pytest.mark.parametrize(
    ("one", "other", "count"),
    [((1, 2, 3), (1, 2, 4), 2), ((1, 2), (1, 2, 3), 2), ((1, 2, 3), (1, 2), 2), ((1,), (2,), 0), ((), (1,), 0)],
)
def test_common_blocks(one: tuple[int, ...], other: tuple[int, ...], count: int) -> None:
    assert common_blocks(one, other) == count


def test_a_softmax_over_a_union_is_the_mean_of_its_parts() -> None:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(5, 4, 8, generator=generator)  # [L, Hq, D]
    keys, values = (torch.randn(1, 2, 11, 8, generator=generator) * 3 for _ in range(2))  # [1, Hkv, S, D]
    rows = stack_rows(query, 2)  # [1, Hkv, G * L, D]
    parts = [attend_part(rows, keys[:, :, s], values[:, :, s], 0.7) for s in (slice(0, 4), slice(4, 11))]
    (out, lse), (other, other_lse) = [(unstack_rows(o, 5), unstack_rows(part_lse, 5)) for o, part_lse in parts]
    scores = torch.einsum("lhd,hsd->hls", query.double(), keys[0].repeat_interleave(2, 0).double()) * 0.7
    expected = torch.einsum("hls,hsd->lhd", scores.softmax(-1), values[0].repeat_interleave(2, 0).double())
    torch.testing.assert_close(merge_parts(out, lse, other, other_lse).double(), expected, atol=1e-5, rtol=0)
