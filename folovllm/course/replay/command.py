"""`folovllm replay`: a recorded run as a page for the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from folovllm.course.replay.load import load_recording
from folovllm.course.replay.page import write_page
from folovllm.entrypoints.terminal import check_writable, clean_exit


def replay(
    trace: Annotated[Path, typer.Argument(help="A file that `folovllm generate --trace` wrote.")],
    out: Annotated[Path | None, typer.Option(help="The page to write. Default: the trace's path with .html.")] = None,
) -> None:
    """Write a page that replays a recorded run step by step: one file that needs no network.

    Record one first: `folovllm generate --num-prompts 6 --max-num-batched-tokens 32 --num-kv-blocks 48 --trace t.json`.
    Then `folovllm replay t.json`, and open t.html in a browser.
    """
    console = Console()
    with clean_exit(console):
        page = trace.with_suffix(".html") if out is None else out
        check_writable("out", page)
        if page.resolve() == trace.resolve():
            raise ValueError(f"out={str(page)!r} is the trace itself; allowed: another file")
        recording = load_recording(trace)
        try:
            write_page(recording, page)
        except OSError as error:
            raise ValueError(f"out={str(page)!r} cannot be written: {error.strerror}") from None
        size = f"{page.stat().st_size / 1000:,.0f} kB"
        console.print(
            f"{len(recording['steps'])} steps in {page} ({size}). Open it in a browser.", markup=False, highlight=False,
            soft_wrap=True,
        )  # fmt: skip
