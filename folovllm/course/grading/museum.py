"""The bug museum: real mistakes of small engines, each as one changed line of this engine.

An engine with an exhibit's line is a *mutant*. A test *kills* a mutant if it passes on the engine as it is and fails on
the mutant; a mutant that no test kills *survives* (DeMillo, Lipton and Sayward, "Hints on Test Data Selection", 1978).
The learner writes tests that kill mutants; our own suite must kill all of them. The exhibits are described in
`folovllm/course/museum/*.toml`, one file per topic; `folovllm.course.grading.trials` runs tests on mutants.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from folovllm.course.paths import ROOT

CATALOGUE = "folovllm/course/museum/*.toml"
ANSWERS = "folovllm/course/museum/answers"


@dataclass(frozen=True)
class Exhibit:
    """A mistake: `file` has the line `old` exactly once, and the mutant has `new` in its place."""

    id: str
    topic: str
    title: str
    file: str
    old: str
    new: str
    symptom: str  # what a user notices
    seen: str  # where such a mistake is made
    hint: str  # how a test can find it; all three are Markdown
    killed_by: tuple[str, ...]  # ids of our tests that fail on the mutant

    def line_in(self, source: str) -> int:
        """The number of the line in the text of `file`. Raises ValueError unless it occurs exactly once."""
        found = [number for number, line in enumerate(source.splitlines(), 1) if line == self.old]
        if len(found) != 1:
            raise ValueError(
                f"exhibit {self.id!r}: {self.file} has this line {len(found)} times; allowed: once\n{self.old}"
            )
        return found[0]

    def mutate(self, source: str) -> str:
        """The text of `file` with the mistake. Raises ValueError unless the line occurs exactly once."""
        lines = source.splitlines(keepends=True)
        lines[self.line_in(source) - 1] = self.new + "\n"
        return "".join(lines)

    def source(self, root: Path = ROOT) -> str:
        """The text of `file` without the mistake."""
        return (root / self.file).read_text(encoding="utf-8")


def load_exhibits(root: Path = ROOT) -> dict[str, Exhibit]:
    """All exhibits by id, in the order of the catalogue.

    Raises ValueError where the package is installed without its repository, and for a catalogue with other fields.
    """
    files = sorted(root.glob(CATALOGUE))
    if not files:
        raise ValueError(
            "the museum is not installed: it is in folovllm's repository, not in the package. "
            'Clone the repository and run `pip install -e ".[test]"` in it'
        )
    exhibits: dict[str, Exhibit] = {}
    for file in files:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
        topic = tables.pop("topic")
        if twice := tables.keys() & exhibits.keys():
            raise ValueError(f"{file.name}: {sorted(twice)} are in another file of the catalogue as well")
        exhibits |= {name: make_exhibit(name, topic, table) for name, table in tables.items()}
    return exhibits


def make_exhibit(name: str, topic: str, table: dict[str, Any]) -> Exhibit:
    """An exhibit from its table in the catalogue. Raises ValueError for fields that are missing or unknown."""
    wanted = {field.name for field in fields(Exhibit)} - {"id", "topic"}
    if table.keys() != wanted:
        raise ValueError(f"exhibit {name!r} has the fields {sorted(table)}; allowed: {sorted(wanted)}")
    texts = {key: value.strip("\n") for key, value in table.items() if key != "killed_by"}
    return Exhibit(id=name, topic=topic, killed_by=tuple(table["killed_by"]), **texts)


def choose_exhibit(exhibits: dict[str, Exhibit], name: str) -> Exhibit:
    """The exhibit with that id. Raises ValueError for another name."""
    if name not in exhibits:
        raise ValueError(f"exhibit={name!r} is not in the museum; allowed: {', '.join(exhibits)}")
    return exhibits[name]


def answer_file(exhibit: Exhibit, root: Path = ROOT) -> Path:
    """The default path of the learner's test for an exhibit."""
    return root / ANSWERS / f"test_{exhibit.id.replace('-', '_')}.py"


def load_progress(root: Path = ROOT) -> dict[str, str]:
    """The verdict of each exhibit's newest trial, by id. An unreadable file counts as no trial."""
    try:
        progress = json.loads((root / ANSWERS / "progress.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(name): str(verdict) for name, verdict in progress.items()} if isinstance(progress, dict) else {}


def save_progress(exhibit: Exhibit, verdict: str, root: Path = ROOT) -> None:
    """Save the verdict of a trial. A killed mutant stays killed, whatever is tried later."""
    progress = load_progress(root)
    if progress.get(exhibit.id) == "killed":
        return
    folder = root / ANSWERS
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(progress | {exhibit.id: verdict}, indent=1) + "\n"
    (folder / "progress.json").write_text(text, encoding="utf-8")
