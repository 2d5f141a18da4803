"""Claims about inference engines that sound right, and what refutes them, one module per theme.

`python docs/errata/run.py NAME` prints the numbers of one claim; the page `docs/errata.md` explains them.
"""

from __future__ import annotations

import claims  # noqa: F401  first of all: the ledger takes over what is computed here, and the themes use the ledger

from errata.themes import THEMES, all_errata

__all__ = ["THEMES", "all_errata"]
