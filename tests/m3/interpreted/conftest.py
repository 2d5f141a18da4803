"""These tests run where Triton interprets its kernels, which has to be said before it is imported: see
`tests/m3/test_triton_interpreted.py`, which starts a process for each file. By hand:

    TRITON_INTERPRET=1 python -m pytest tests/m3/interpreted
"""

from __future__ import annotations

import os

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
