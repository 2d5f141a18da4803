"""Claims about publications."""

from __future__ import annotations

from claims.chapter_4 import PAPER_FIG_2
from claims.ledger import Derived

from errata.finding import Erratum, Evidence, claims_of

TITLE = "Efficient Memory Management for Large Language Model Serving with PagedAttention"


def unused() -> Evidence:
    """What figure 2 of the paper leaves, when the used share is taken away."""
    left = [100 * (1 - used) for _, used in PAPER_FIG_2.values()]
    return {
        "orca": Derived("not used, the three variants of Orca", f"{min(left[:3]):.1f} to {max(left[:3]):.1f} %"),
        "vllm": Derived("not used, vLLM", f"{left[3]:.1f} %"),
    }


def systems() -> Evidence:
    """The systems in that figure."""
    return {"systems": Derived("systems in figure 2 of the paper", ", ".join(name for name, _ in PAPER_FIG_2.values()))}


def name() -> Evidence:
    """The paper's title."""
    return {"title": Derived("title of the paper", TITLE)}


USED = ("paper-max-used", "paper-pow2-used", "paper-oracle-used", "paper-vllm-used")
ERRATA = (
    Erratum(
        "paper-on-waste",
        "The PagedAttention paper measured that most memory is internal fragmentation",
        (*USED, "blog-waste", "blog-waste-vllm"),
        formula=unused,
    ),
    Erratum("table-of-systems", "Hugging Face wastes most, FasterTransformer less, DeepSpeed least", formula=systems),
    Erratum(
        "factor-of-24", "vLLM owes its factor of twenty-four to PagedAttention", ("blog-throughput", "paper-throughput")
    ),
    Erratum("the-name", "The technique is called PageAttention", formula=name),
)

CLAIMS = claims_of(ERRATA)
