"""The real models with prompts that share prefixes, worked out once for all files."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.m3.cases import MODELS
from tests.m4.cases import SharedCase


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices: a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SharedCase]:
    """By model; ten prompts, and ten tokens that Hugging Face has for each."""
    return {name: SharedCase(name, tmp_path_factory.mktemp(name), new_tokens=10) for name in MODELS}
