"""The errors that a program may want to tell apart. Whatever a user can mend is a ValueError, as everywhere in Python.

::

    ValueError                what was asked for cannot be: the message names the field, its value and what is allowed
      ConfigError             about an engine: its settings, its model, its tokenizer. Raised before a weight is read
                              where that can be known
      InvalidRequestError     about a request: its prompt, its messages, its sampling parameters. Nothing was queued
    RuntimeError              what was asked for was right, and could not be done
      EngineGenerateError     a request was ended by no fault of its own. The engine goes on
      EngineDeadError         no request can run any more. A new engine is needed

The last two have vLLM's names (`vllm/v1/engine/exceptions.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """An engine cannot be made with these settings, or of this model."""


class InvalidRequestError(ValueError):
    """A request is refused."""


class EngineGenerateError(RuntimeError):
    """A request was ended from outside. The same request may be sent again."""


class EngineDeadError(RuntimeError):
    """The engine can run no request any more."""


@contextmanager
def errors_as(kind: type[ValueError]) -> Iterator[None]:
    """Raise a plain ValueError of the block as `kind`, with its message, its traceback and its cause."""
    try:
        yield
    except ValueError as error:
        if type(error) is not ValueError:  # it has a kind already
            raise
        raise kind(*error.args).with_traceback(error.__traceback__) from error.__cause__
