"""Paths of the repository."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the repository, if the package is imported from one
RESULTS = ROOT / "results"
