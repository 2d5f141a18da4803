"""`python -m folovllm` is the `folovllm` command."""

from folovllm.entrypoints.cli import app

app()
