"""`python -m folovllm.course.bench` is the command `folovllm bench`."""

from __future__ import annotations

import typer

from folovllm.course.bench.cli import bench

if __name__ == "__main__":
    typer.run(bench)
