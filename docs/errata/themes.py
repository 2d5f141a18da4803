"""The themes of the errata, in the order of the page."""

from __future__ import annotations

from types import ModuleType

from errata import attention, batches, blocks, cache, publications, ragged, right
from errata.finding import Erratum

THEMES: tuple[ModuleType, ...] = (attention, cache, batches, blocks, ragged, publications, right)


def all_errata() -> dict[str, Erratum]:
    """Every claim by its name, in the order of the page. Raises ValueError for a name that is used twice."""
    found: dict[str, Erratum] = {}
    for theme in THEMES:
        for erratum in theme.ERRATA:
            if erratum.name in found:
                raise ValueError(f"{theme.__name__}: the name {erratum.name!r} is in use")
            found[erratum.name] = erratum
    return found
