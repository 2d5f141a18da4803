"""What is missing skips a test at home and fails the run in CI."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = """
from tests.needs import find, is_there, need, need_module

@need("a teapot", find("no-such-teapot") is not None)
def test_tea(): raise AssertionError

@need_module("no_such_module")
def test_module(): raise AssertionError

@need_module("pytest")
def test_that_runs(): assert is_there("pytest")
"""


@pytest.mark.parametrize(("ci", "status", "says"), [("", 0, "1 passed, 2 skipped"), ("true", 2, "a teapot is missing")])
def test_skipped_at_home_and_failed_in_ci(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ci: str, status: int, says: str
) -> None:
    (tmp_path / "test_kitchen.py").write_text(TESTS)
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == status and says in done.stdout, done.stdout + done.stderr
