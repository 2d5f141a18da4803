"""The Triton kernels without a GPU: each file of `tests/m3/interpreted` in a process that interprets them.

Triton decides when it is imported whether it interprets or compiles, so one process cannot test both.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.needs import need_module

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "tests" / "m3" / "interpreted").glob("test_*.py"))
pytestmark = need_module("triton")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_under_the_interpreter(file: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "--tb=short", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    output = f"{done.stdout}\n{done.stderr}"
    if done.returncode != 0:
        pytest.fail(f"TRITON_INTERPRET=1 python -m pytest {file.relative_to(ROOT)}\n{output}", pytrace=False)
    summary = done.stdout.strip().splitlines()[-1]
    assert re.search(r"\d+ passed", summary) and "skipped" not in summary, output


def test_there_is_something_to_interpret() -> None:
    assert {file.stem for file in FILES} >= {"test_kernels", "test_engine"}
