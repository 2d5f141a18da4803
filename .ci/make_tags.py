"""Set the tags m0 to m4 from the history: `make tags`.

A commit that completes a milestone says so in a trailer of its message::

    Milestone: m1

The newest such commit reachable from HEAD gets the annotated tag. Running this again changes nothing, and the
tag objects come out the same in every clone, because tagger and date are those of the tagged commit.
Needs git and Python's standard library only.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

MILESTONES = ("m0", "m1", "m2", "m3", "m4")
# The fields of one commit in `git log`'s output, parted by bytes that no subject or name contains.
FORMAT = "%H%x1f%s%x1f%cn%x1f%ce%x1f%cI%x1f%(trailers:key=Milestone,valueonly,separator=%x20)%x1e"


@dataclass(frozen=True)
class Commit:
    """A commit: who made it, when (ISO 8601), and the values of its `Milestone:` trailers, parted by spaces."""

    id: str
    subject: str
    name: str
    email: str
    date: str
    milestones: str


def git(*args: str, **environment: str) -> str:
    """The output of a git command in the current directory. Raises CalledProcessError where git fails."""
    env = {**os.environ, **environment}
    return subprocess.run(("git", *args), check=True, capture_output=True, text=True, encoding="utf-8", env=env).stdout


def history() -> list[Commit]:
    """Every commit that HEAD stands on, children before parents."""
    records = git("log", "--topo-order", f"--format={FORMAT}", "HEAD").split("\x1e")
    return [Commit(*record.strip("\n").split("\x1f")) for record in records if record.strip()]


def newest_by_milestone(commits: list[Commit]) -> dict[str, Commit]:
    """The commit that each milestone's tag belongs to. A trailer that names no milestone is reported."""
    found: dict[str, Commit] = {}
    for commit in commits:
        for milestone in commit.milestones.split():
            if milestone not in MILESTONES:
                known = ", ".join(MILESTONES)
                print(f"{commit.id[:10]}: ignoring 'Milestone: {milestone}'; known: {known}", file=sys.stderr)
            found.setdefault(milestone, commit)
    return {milestone: found[milestone] for milestone in MILESTONES if milestone in found}


def set_tag(tag: str, commit: Commit) -> None:
    """Put an annotated tag on a commit, or move the one there is."""
    git(
        *("tag", "--annotate", "--force", "--no-sign", "-m", f"{tag}: {commit.subject}", tag, commit.id),
        GIT_COMMITTER_NAME=commit.name,
        GIT_COMMITTER_EMAIL=commit.email,
        GIT_COMMITTER_DATE=commit.date,
    )


def main() -> int:
    """Set the tags and print where each stands. The exit status is 0 also where no commit has a trailer."""
    try:
        tagged = newest_by_milestone(history())
        for milestone, commit in tagged.items():
            set_tag(milestone, commit)
            print(f"{milestone}  {commit.id[:10]}  {commit.subject}")
    except subprocess.CalledProcessError as error:
        print(f"git: {error.stderr.strip()}", file=sys.stderr)
        return 1
    if not tagged:
        print("No commit has a 'Milestone:' trailer, so there is nothing to tag.")
        print("In a shallow clone, fetch the history first: git fetch --unshallow")
    return 0


if __name__ == "__main__":
    sys.exit(main())
