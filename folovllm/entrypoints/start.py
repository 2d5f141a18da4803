"""What a command does first, before its imports: they take seconds. Imports nothing heavy itself."""

from __future__ import annotations

import io
import os
import signal
import sys
from contextlib import suppress

INTERRUPTED = 128 + signal.SIGINT  # exit status, as shells count it


def prepare() -> None:
    """Ctrl-C ends with one line from now on, and a character that the terminal or file lacks is replaced."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not in a job that ignores it
        signal.signal(signal.SIGINT, interrupted)
    for stream in (sys.stdin, sys.stdout):  # stderr replaces anyway
        if isinstance(stream, io.TextIOWrapper):  # None if it is closed
            with suppress(io.UnsupportedOperation):  # stdin that something has read from
                stream.reconfigure(errors="replace")


def interrupted(*_: object) -> None:
    """A handler for where nothing has to be put away: at once, so that no import can swallow it."""
    with suppress(OSError):
        os.write(2, b"\ninterrupted\n")
    os._exit(INTERRUPTED)
