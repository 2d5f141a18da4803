"""Who runs: the milestones of this engine and Hugging Face's ways to serve, by names that say everything about them.

    m2                    a milestone, with room for all requests of the workload at once
    m2:loop               a variant of it: its `batching`
    m2:padded@4           at most 4 requests at once (`max_num_seqs`)
    m4:budget=256         a step computes at most 256 tokens, where prompts can be split (`max_num_batched_tokens`)
    hf:sequential         a peer
    hf:static:4           a peer that forms batches: at most 4 requests each
    hf:dynamic:4:0.25     and starts a batch 0.25 s after its first request came, full or not

So throughput against batch size is one bench, in which all sizes take turns in the same rounds:

    folovllm bench --workloads w2 --milestones m2:padded@1,m2:padded@2,m2:padded@4,m2:padded@8,m2:padded@16 --peers ''
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from folovllm.config import MILESTONES
from folovllm.course.bench.workloads import Workload

PEERS: dict[str, str] = {
    "sequential": "`generate`, one request after the other",
    "static": "`generate`, one left-padded batch that runs to its longest output",
    "continuous": "`generate_batch`'s manager, a length per request",
}
BATCHED_PEERS: dict[str, str] = {
    "static:N": "`generate`, batches of N that wait until N requests have come",
    "dynamic:N:S": "`generate`, batches of N that wait S seconds at most",
}
BUDGET = "budget="
_PEERS_ALLOWED = ", ".join([*PEERS, *BATCHED_PEERS])


@dataclass(frozen=True)
class System:
    """One competitor. Exactly one of `milestone` and `peer` is set."""

    name: str
    milestone: str | None = None
    variant: str | None = None  # the milestone's `batching`
    max_num_batched_tokens: int | None = None  # of the milestone; None is the bench's
    # Of the milestone; None is as many as the workload has requests. batch_size and window (seconds): of a peer that
    # forms batches.
    max_num_seqs: int | None = None
    peer: str | None = None
    batch_size: int | None = None
    window: float | None = None


def parse_milestones(text: str) -> list[System]:
    """Systems from "m1,m2:loop,m2:padded@4"; "all" is every milestone there is, "" none.

    Raises ValueError for a milestone, a variant or a limit that does not exist; the message lists those that do.
    """
    names = list(MILESTONES) if text.strip() == "all" else _names(text)
    return [_milestone(name) for name in names]


def _milestone(name: str) -> System:
    choice, at, size = name.partition("@")
    milestone, colon, variant = choice.partition(":")
    if milestone not in MILESTONES:
        raise ValueError(f"milestone={milestone!r} is not valid; allowed: {', '.join(MILESTONES)}")
    existing, budget = variants_of(milestone), None
    if variant.startswith(BUDGET) and MILESTONES[milestone].chunked_prefill:
        budget = _whole(f"milestone={name!r}: max_num_batched_tokens", variant.removeprefix(BUDGET))
    elif colon and variant not in existing:
        names = ", ".join(f"{milestone}:{v}" for v in existing) or f"{milestone} alone, which has no variants"
        raise ValueError(f"milestone={name!r} is not valid; allowed: {names}")
    system = System(
        choice,
        milestone=milestone,
        variant=variant if variant in existing else None,
        max_num_batched_tokens=budget,
    )
    if not at:
        return system
    limit = MILESTONES[milestone].max_num_seqs_limit
    max_num_seqs = _whole(f"milestone={name!r}: max_num_seqs", size, limit)
    return replace(system, name=f"{choice}@{max_num_seqs}", max_num_seqs=max_num_seqs)


def parse_peers(text: str) -> list[System]:
    """Systems from "sequential,static:4,dynamic:4:0.25"; "all" is every peer that needs no numbers, "" none.

    Raises ValueError for a peer or a number that cannot be; the message says what can.
    """
    names = list(PEERS) if text.strip() == "all" else [n.removeprefix("hf:") for n in _names(text)]
    return [_peer(name) for name in names]


def _peer(name: str) -> System:
    peer, *numbers = name.split(":")
    if peer in PEERS and not numbers:
        return System(f"hf:{peer}", peer=peer)
    if (peer, len(numbers)) not in (("static", 1), ("dynamic", 2)):
        raise ValueError(f"peer={name!r} is not valid; allowed: {_PEERS_ALLOWED}")
    batch_size = _whole(f"peer={name!r}: batch_size", numbers[0])
    if peer == "static":
        return System(f"hf:static:{batch_size}", peer=peer, batch_size=batch_size)
    window = _seconds(f"peer={name!r}: window", numbers[1])
    return System(f"hf:dynamic:{batch_size}:{window:g}", peer=peer, batch_size=batch_size, window=window)


def _whole(what: str, text: str, limit: int | None = None) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1 or (limit is not None and number > limit):
        most = "" if limit is None else f" and <= {limit}"
        raise ValueError(f"{what}={text!r} is not valid; allowed: an integer >= 1{most}")
    return number


def _seconds(what: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"{what}={text!r} is not valid; allowed: a number >= 0, in seconds")
    return number


def with_max_num_seqs(systems: Sequence[System], max_num_seqs: int | None) -> list[System]:
    """The systems, those of them limited that are milestones, can run several requests and name no limit themselves."""

    def takes_it(system: System) -> bool:
        preset = MILESTONES.get(system.milestone or "")
        return preset is not None and preset.max_num_seqs_limit is None and system.max_num_seqs is None

    return [replace(s, max_num_seqs=max_num_seqs) if takes_it(s) else s for s in systems]


def variants_of(milestone: str) -> tuple[str, ...]:
    """The values of `batching` that the milestone tells apart; () where there is nothing to choose."""
    return MILESTONES[milestone].batchings


def choose_base(name: str | None, systems: Sequence[System]) -> str:
    """The system that ratios are taken to: the one named, else the first peer, else the first system.

    Raises ValueError for no systems, for two of one name, and for a name that is not among them.
    """
    names = [s.name for s in systems]
    if not names:
        raise ValueError("milestones='' and peers='' leave nothing to run; allowed: at least one of either")
    if len(set(names)) < len(names):
        raise ValueError(f"systems={','.join(names)!r} is not valid; allowed: each system once")
    if name is None:
        return next((s.name for s in systems if s.peer is not None), names[0])
    if name not in names:
        raise ValueError(f"base={name!r} is not valid; allowed: one of the systems that run: {', '.join(names)}")
    return name


def not_applicable(system: System, workload: Workload) -> str | None:
    """Why a system cannot run a workload, or None if it can."""
    if workload.late is not None and system.peer in ("sequential", "static", "dynamic"):
        return "`generate` takes no request that arrives while it runs"
    return None


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
