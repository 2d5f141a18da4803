"""The tensors of the pool: zeroes that cost no memory before they are written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

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
    assert storage.device_pool.nbytes > 10**9
    assert resident_bytes() - before < 10**8
    storage.device_pool[0, 0, :8192] = 1
    written = storage.device_pool[0, 0, :8192].nbytes
    assert written <= resident_bytes() - before < written + 10**8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_never_written_is_zero(dtype: torch.dtype) -> None:
    made = lazy_zeros((3, 5, 7), dtype)
    assert made.dtype == dtype and torch.equal(made, torch.zeros(3, 5, 7, dtype=dtype))
    made[1] = 2
    assert torch.equal(made[0], torch.zeros(5, 7, dtype=dtype)) and bool((made[1] == 2).all())
