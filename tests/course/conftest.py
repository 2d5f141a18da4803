"""What the tests of the course share: a progress file of their own, so that nobody's progress is touched."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which `folovllm grade` remembers results during a test. It is not there at first."""
    file = tmp_path / "remembered" / "progress.json"
    monkeypatch.setenv("FOLOVLLM_PROGRESS", str(file))
    return file
