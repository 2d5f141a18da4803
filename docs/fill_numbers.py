"""Write the ledger's numbers into the files that show them as they are: `python docs/fill_numbers.py [--check]`.

`docs/claims/marks.py` says how a number is marked. With --check nothing is written, and the exit status is 1 if a file
differs from the ledger.
"""

from __future__ import annotations

import argparse
import sys

from claims import marks
from claims.ledger import ROOT, ClaimError


def main() -> int:
    """Fill or check all files; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a number differs")
    check = parser.parse_args().check
    differ = 0
    for path in marks.files():
        name = path.relative_to(ROOT)
        text = path.read_text(encoding="utf-8")
        try:
            filled = marks.fill(text)
        except (ClaimError, ValueError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 2
        if filled != text:
            differ += 1
            print(f"{name} {'differs from the ledger' if check else 'filled'}")
            if not check:
                path.write_text(filled, encoding="utf-8")
    return 1 if check and differ else 0


if __name__ == "__main__":
    sys.exit(main())
