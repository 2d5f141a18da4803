"""How long the tests take: `python -m folovllm.course.measure.suite` runs `make test` and writes a results file.

Run again on the same machine, it adds a round to the file, so that there is a spread; `--fresh` begins anew.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

from folovllm.course.bench.rounds import spreads
from folovllm.course.measure.measuring import as_text, describe
from folovllm.course.paths import RESULTS, ROOT

FILE = RESULTS / "test-suite.json"


def main(argv: list[str] | None = None) -> None:
    """Run the suite once, and write what it took. Exits with the suite's status if it fails, and writes nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="leave out the rounds that the file has")
    args = parser.parse_args(argv)
    before = {} if args.fresh or not FILE.is_file() else json.loads(FILE.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        start = time.perf_counter()
        done = subprocess.run(["make", "--no-print-directory", "test", f"PYTEST_ARGS=--junitxml={report}"], cwd=ROOT)
        seconds = time.perf_counter() - start
        if done.returncode != 0:
            raise SystemExit(done.returncode)
        this_round = {"seconds": seconds, **in_tests(report)}
    header = {"command": "python -m folovllm.course.measure.suite", **describe("folo-tiny", "float32")[2]}
    rounds = [*(before["rounds"] if before.get("hardware") == header["hardware"] else []), this_round]
    keys = ("seconds", "tests")
    data = {**header, "summary": spreads([{k: r[k] for k in keys} for r in rounds]), "rounds": rounds}
    FILE.write_text(as_text(data) + "\n", encoding="utf-8")
    print(f"{FILE.relative_to(ROOT)}: {seconds:.0f} s")


def in_tests(report: Path) -> dict[str, Any]:
    """How many tests there were, and the seconds that those of each folder took, summed over all processes."""
    cases = list(ET.parse(report).iter("testcase"))
    spent: Counter[str] = Counter()
    for case in cases:
        spent[case.get("classname", "").split(".")[1]] += float(case.get("time", 0))  # type: ignore[assignment]
    return {"tests": len(cases), "seconds_in": {folder: round(spent[folder], 1) for folder in sorted(spent)}}


if __name__ == "__main__":
    main()
