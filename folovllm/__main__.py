"""The `folovllm` command, also as `python -m folovllm`."""

from __future__ import annotations

import os


def main() -> None:
    """Run the command in a process whose waiting threads leave their processor to other programs.

    OpenMP reads that setting when torch is loaded, so it stands before any other import of ours.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from folovllm.entrypoints.cli import app

    app()


if __name__ == "__main__":
    main()
