"""Checkpoints of the four tiny families, written once per run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.oracle import tiny_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A function from a family to the folder of its tiny checkpoint, `tiny_model(family, seed=3)`."""

    @cache
    def path_of(family: str) -> str:
        folder: Path = tmp_path_factory.mktemp(family)
        tiny_model(family, seed=3).save_pretrained(folder)
        return str(folder)

    return path_of
