"""Programs that tests start."""

from __future__ import annotations

import signal


def can_be_interrupted() -> None:
    """For `preexec_fn`: Ctrl-C works in the child, even where this run ignores it, as jobs in the background do."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
