"""Where the course's files are."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the repository, if the package lies in one
RESULTS = ROOT / "results"
