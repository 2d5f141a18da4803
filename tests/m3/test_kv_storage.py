"""The tensors of the pool: zeroes that cost no memory before they are written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from folovllm.attention.reference import ReferenceBackend
from folovllm.kv_cache.interface import BlockCopy, SwapIn, SwapOut
from folovllm.models.paged_model import KVShape
from folovllm.runner.kv_storage import KVStorage, lazy_zeros

CPU = torch.device("cpu")


def resident_bytes() -> int:
    """Memory that this process really has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells how much memory is resident")
def test_a_pool_takes_memory_as_it_is_written() -> None:
    before = resident_bytes()
    storage = KVStorage(KVShape(4, 4, 64), torch.bfloat16, CPU, 16, 16_384, 1024)  # 1.07 GB, and 67 MB for the host
    assert storage.num_bytes > 10**9
    assert resident_bytes() - before < 10**8
    storage.device_pools[0][0, 0, :8192] = 1
    written = storage.device_pools[0][0, 0, :8192].nbytes
    assert written <= resident_bytes() - before < written + 10**8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_never_written_is_zero(dtype: torch.dtype) -> None:
    made = lazy_zeros((3, 5, 7), dtype)
    assert made.dtype == dtype and torch.equal(made, torch.zeros(3, 5, 7, dtype=dtype))
    made[1] = 2
    assert torch.equal(made[0], torch.zeros(5, 7, dtype=dtype)) and bool((made[1] == 2).all())


@pytest.mark.parametrize(("key_dim", "value_dim"), [(6, None), (6, 6), (6, 4), (3, 5)])
def test_keys_and_values_are_copied_and_swapped_in_whatever_size(key_dim: int, value_dim: int | None) -> None:
    """DeepSeek's keys are larger than its values: a block holds each in its own size, and no more."""
    storage = KVStorage(KVShape(2, 3, key_dim, v_head_dim=value_dim), torch.float32, CPU, 4, 7, 2)
    sizes = key_dim, value_dim or key_dim
    assert [(kv.keys.shape, kv.values.shape) for kv in storage.layers] == [
        ((8, 4, 3, sizes[0]), (8, 4, 3, sizes[1]))
    ] * 2
    assert storage.num_bytes == 4 * 2 * 8 * 4 * 3 * sum(sizes)
    generator = torch.Generator().manual_seed(0)
    tensors = [x for kv in storage.layers for x in (kv.keys, kv.values)]
    for x in tensors:
        x.copy_(torch.randn(x.shape, generator=generator))
    before = [x.clone() for x in tensors]
    storage.apply([BlockCopy(1, 5), SwapOut(2, 1), BlockCopy(5, 2), SwapIn(1, 6)], ReferenceBackend())
    for x, then in zip(tensors, before, strict=True):
        for block, source in enumerate([0, 1, 1, 3, 4, 1, 2, 7]):
            assert torch.equal(x[block], then[source])
