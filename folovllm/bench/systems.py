"""Who runs: the milestones of this engine ("m1", "m2:loop") and Hugging Face's ways to serve ("hf:static")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from folovllm.bench.workloads import Workload
from folovllm.config import MILESTONES

PEERS: dict[str, str] = {
    "sequential": "`generate`, one request after the other",
    "static": "`generate`, one left-padded batch that runs to its longest output",
    "continuous": "`generate_batch`'s manager, a length per request",
}


@dataclass(frozen=True)
class System:
    """One competitor. Exactly one of `milestone` and `peer` is set; `variant` is the milestone's `batching`."""

    name: str
    milestone: str | None = None
    variant: str | None = None
    peer: str | None = None


def parse_milestones(text: str) -> list[System]:
    """Systems from "m1,m2:loop"; "all" is every milestone there is, "" none.

    Raises ValueError for a milestone or a variant that does not exist; the message lists those that do.
    """
    if text.strip() == "all":
        return [System(name, milestone=name) for name in MILESTONES]
    systems = []
    for name in _names(text):
        milestone, colon, variant = name.partition(":")
        if milestone not in MILESTONES:
            raise ValueError(f"milestone={milestone!r} is not valid; allowed: {', '.join(MILESTONES)}")
        existing = variants_of(milestone)
        if colon and variant not in existing:
            names = ", ".join(f"{milestone}:{v}" for v in existing) or f"{milestone} alone, which has no variants"
            raise ValueError(f"milestone={name!r} is not valid; allowed: {names}")
        systems.append(System(name, milestone=milestone, variant=variant or None))
    return systems


def parse_peers(text: str) -> list[System]:
    """Systems from "sequential,static"; "all" is every peer, "" none. Raises ValueError that lists those there are."""
    names = list(PEERS) if text.strip() == "all" else [n.removeprefix("hf:") for n in _names(text)]
    for name in names:
        if name not in PEERS:
            raise ValueError(f"peer={name!r} is not valid; allowed: {', '.join(PEERS)}")
    return [System(f"hf:{name}", peer=name) for name in names]


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
    if workload.late is not None and system.peer in ("sequential", "static"):
        return "`generate` takes no request that arrives while it runs"
    return None


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
