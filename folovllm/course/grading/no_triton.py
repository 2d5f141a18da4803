"""A stub of Triton for systems without it (macOS, Windows): kernels can be defined, but not launched.

So a file with kernels and plain functions can be loaded everywhere, and its plain functions can be graded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

MISSING = (
    "Triton is not installed, and it has packages for Linux only. Run this exercise on Linux (a virtual machine, a "
    "container or WSL will do, no GPU is needed). The exercises in plain Python run here."
)


class Kernel:
    """A kernel that cannot be launched."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn, self.__name__, self.__doc__ = fn, fn.__name__, fn.__doc__

    def __getitem__(self, grid: object) -> NoReturn:
        """Raises RuntimeError, which says what is missing."""
        raise RuntimeError(MISSING)

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        """Raises RuntimeError, which says what is missing."""
        raise RuntimeError(MISSING)


class triton:  # named as the module that it replaces
    """The part of `triton` that a file of kernels uses at import."""

    jit = Kernel


class tl:  # named as the module that it replaces
    """`triton.language`: its names are used only inside kernels."""
