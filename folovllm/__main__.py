"""The `folovllm` command, also as `python -m folovllm`."""

from __future__ import annotations

import os

from folovllm.entrypoints.start import prepare


def main() -> None:
    """Run the command with OpenMP threads that release the processor while they wait.

    OpenMP reads the setting when torch is loaded, so it is set before all other imports.
    """
    prepare()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from folovllm.entrypoints.cli import app

    app()


if __name__ == "__main__":
    main()
