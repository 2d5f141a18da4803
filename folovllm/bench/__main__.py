"""`python -m folovllm.bench` is the command `folovllm bench`."""

from __future__ import annotations

import typer

from folovllm.bench.cli import bench

if __name__ == "__main__":
    typer.run(bench)
