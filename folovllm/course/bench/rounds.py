"""Rounds of a measurement: an order that turns, spreads over the rounds, and the head of a results file.

A machine's speed drifts, and a number of one run means little on a machine that others use as well. What is compared
runs within one round, in an order that turns by one from round to round, so that none always runs first. What is quoted
is the median over the rounds, with the least and the greatest. A ratio is taken inside each round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from statistics import median
from typing import Any, TypeVar

import torch

from folovllm.course.bench import machine

T = TypeVar("T")


def turned(items: Sequence[T], index: int) -> list[T]:
    """The items in the order of round `index` (from 0): the first goes to the end, once per round."""
    cut = index % len(items)
    return [*items[cut:], *items[:cut]]


def in_turn(jobs: Mapping[str, Callable[[], T]], index: int) -> dict[str, T]:
    """What each job returns; they run in the order of round `index`."""
    done = {name: jobs[name]() for name in turned(list(jobs), index)}
    return {name: done[name] for name in jobs}


def spread(values: Iterable[float | None]) -> dict[str, float | int] | None:
    """Median, least, greatest and count of the numbers that are there; None if none is."""
    present = [v for v in values if v is not None]
    if not present:
        return None
    return {"median": median(present), "min": min(present), "max": max(present), "rounds": len(present)}


def spreads(rounds: Sequence[Any]) -> Any:
    """Dicts of one shape to one dict of that shape, with the `spread` of the numbers in place of each number."""
    if isinstance(rounds[0], dict):
        return {key: spreads([current[key] for current in rounds]) for key in rounds[0]}
    return spread(rounds)


def provenance(device: torch.device) -> dict[str, Any]:
    """Now, the state of the source, the hardware and the versions."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": machine.git_state(),
        "hardware": machine.hardware(device),
        "versions": machine.versions(),
    }
