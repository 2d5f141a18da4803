"""The systems of a bench: milestones of this engine and Hugging Face peers. A name has all of a system's options.

    m2                    a milestone; max_num_seqs is the number of requests of the workload
    m2:loop               with `batching` "loop"
    m2:padded@4           with `max_num_seqs` 4
    m4:budget=256         with `max_num_batched_tokens` 256, for milestones with chunked prefill
    hf:sequential         a peer
    hf:static:4           a peer that forms batches of at most 4 requests
    hf:dynamic:4:0.25     the same, but starts a batch at the latest 0.25 s after its first request arrived

So throughput over batch size is one bench, in which all sizes are interleaved in the same rounds:

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
    "static:N": "`generate`, batches of N that wait for N requests",
    "dynamic:N:S": "`generate`, batches of N that wait at most S seconds",
}
BUDGET = "budget="
_PEERS_ALLOWED = ", ".join([*PEERS, *BATCHED_PEERS])


@dataclass(frozen=True)
class System:
    """A system that is measured. Exactly one of `milestone` and `peer` is set."""

    name: str
    milestone: str | None = None
    variant: str | None = None  # the milestone's `batching`
    max_num_batched_tokens: int | None = None  # of the milestone; None: the bench's
    # max_num_seqs: of the milestone; None: the workload's number of requests. batch_size, window (seconds): of a peer
    # that forms batches.
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

    Raises ValueError for a peer or a number that is not valid; the message says what is allowed.
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
    """The systems, with this limit on each milestone that runs several requests and has no limit in its name."""

    def takes_it(system: System) -> bool:
        preset = MILESTONES.get(system.milestone or "")
        return preset is not None and preset.max_num_seqs_limit is None and system.max_num_seqs is None

    return [replace(s, max_num_seqs=max_num_seqs) if takes_it(s) else s for s in systems]


def variants_of(milestone: str) -> tuple[str, ...]:
    """The values of `batching` that the milestone accepts; () if it has no such option."""
    return MILESTONES[milestone].batchings


def choose_base(name: str | None, systems: Sequence[System]) -> str:
    """The base of the ratios: the named system, else the first peer, else the first system.

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
