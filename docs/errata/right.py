"""Claims that were checked and are right, and the exercises of the texts, solved."""

from __future__ import annotations

from claims.chapter_3 import EXERCISE
from claims.ledger import Derived

from errata.finding import Erratum, Evidence, claims_of
from errata.layers import through_the_layers


def block_diagonal() -> Evidence:
    """Cells of one mask over three texts in a row, and those that are True."""
    total = sum(EXERCISE)
    return {
        "cells": Derived(f"cells of the mask over {EXERCISE} tokens in one row", total**2),
        "true": Derived("of these True: a triangle per text", sum(n * (n + 1) // 2 for n in EXERCISE)),
    }


ERRATA = (
    Erratum(
        "address",
        "Address ten thousand lies on page 2; in frame 3 it is 14,096",
        ("page-number", "page-offset", "page-physical", "slot-of-37"),
    ),
    Erratum(
        "seven-blocks",
        "A hundred tokens take seven blocks, of which a tenth is empty",
        ("blocks-100", "slots-100", "empty-100", "paged-waste-100"),
    ),
    Erratum(
        "exercise-5-1",
        "Exercise: the K/V of one token, of a thousand, and of ten requests",
        ("kv-bytes-llama2-7b", "kv-1000-llama2-7b", "kv-10x500-llama2-7b"),
    ),
    Erratum(
        "exercise-5-2",
        "Exercise: three texts, padded and in one row",
        ("padding-exercise-cells", "padding-exercise-used"),
        formula=block_diagonal,
    ),
    Erratum("exercise-5-3", "Exercise: follow a request through the layers", experiment=through_the_layers),
)

CLAIMS = claims_of(ERRATA)
