"""Print what refutes a claim that sounds right.

    python docs/errata/run.py                    # the list
    python docs/errata/run.py upper-triangle     # one claim, or several
    python docs/errata/run.py --all

Everything is computed while you wait, or read from the results file that the line names. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))
SHORT = 24  # characters of a number that is set at the right of its column


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line names. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a claim; without one, all are listed")
    parser.add_argument("--all", action="store_true", help="every claim, one after the other")
    args = parser.parse_args(arguments)

    from errata.themes import all_errata

    errata = all_errata()
    if unknown := [name for name in args.names if name not in errata]:
        print(f"no claim is called {unknown[0]!r}; without a name, this lists them all", file=sys.stderr)
        return 2
    if not args.names and not args.all:
        width = max(map(len, errata))
        for name, erratum in errata.items():
            print(f"{name:{width}}  {erratum.claim}")
        return 0
    for name in errata if args.all else args.names:
        print("\n".join(lines_of(name)) + "\n")
    return 0


def lines_of(name: str) -> list[str]:
    """A claim, and the numbers that refute it with where they come from."""
    from claims import ledger, registry

    from errata.themes import all_errata

    erratum = all_errata()[name]
    shown: list[ledger.Claim] = []
    sources = []
    for claim_id in erratum.known:
        claim = registry.get_claim(claim_id)
        shown.append(claim)
        sources.append("from " + (f"results/{claim.file}.json" if isinstance(claim, ledger.Measured) else claim.source))
    for find, how in ((erratum.formula, "computed by"), (erratum.experiment, "run by")):
        if find is not None:
            shown += find().values()
            sources.append(f"{how} {Path(find.__code__.co_filename).relative_to(ROOT).as_posix()}:{find.__name__}")
    texts = [ledger.text(claim) for claim in shown]
    width = min(SHORT, max(map(len, texts)))
    numbers = [f"  {text:>{width}}  {claim.says}" for text, claim in zip(texts, shown, strict=True)]
    return [f'{name}: "{erratum.claim}"', *numbers, *(f"  {source}" for source in dict.fromkeys(sources))]


if __name__ == "__main__":
    sys.exit(main())
