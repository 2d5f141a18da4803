"""Tests that need more than Python: skipped where it is missing, and failed where CI has promised to bring it."""

from __future__ import annotations

import importlib.util
import os
import shutil

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def find(*commands: str) -> str | None:
    """The path of the first of these commands that is installed."""
    return next(filter(None, map(shutil.which, commands)), None)


def is_there(module: str) -> bool:
    """Whether a Python package is installed. With CI=true it has to be."""
    found = importlib.util.find_spec(module) is not None
    need(f"the package {module}", found)
    return found


def need(what: str, found: bool) -> pytest.MarkDecorator:
    """A mark that skips where `what` was not found. With CI=true the run fails instead: `.ci/run` installs it."""
    if not found and os.environ.get("CI") == "true":
        pytest.fail(f"{what} is missing, and with CI=true no test may be skipped for want of it", pytrace=False)
    return pytest.mark.skipif(not found, reason=f"needs {what}")


def need_module(module: str) -> pytest.MarkDecorator:
    """As `need`, for a Python package."""
    return need(f"the package {module}", is_there(module))
