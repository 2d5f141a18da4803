"""Answers on the terminal, as they grow."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console

from folovllm.outputs import RequestOutput


def print_stream(
    console: Console, outputs: Iterable[RequestOutput], titles: dict[str, str], show_ids: bool = False
) -> list[RequestOutput]:
    """Print growing outputs one after another, each under its title, and return the final ones.

    outputs: what `LLM.stream` yields. titles: by request id, in the order to print. While one request is on show, what
    comes of the others is kept and printed in its turn. Only a request's first sequence is shown: its text, or its
    token ids with `show_ids`, for a model without a tokenizer.
    """
    done: list[RequestOutput] = []
    latest: dict[str, RequestOutput] = {}
    line = list(titles)
    shown = -1  # characters of line[0] on the screen; -1: not even its title
    for output in outputs:
        latest[output.request_id] = output
        while line and line[0] in latest:
            current = latest[line[0]]
            if shown < 0:
                console.print("> " + titles[line[0]], style="bold cyan", markup=False, highlight=False)
                shown = 0
            text = shown_text(current, show_ids)
            console.out(text[shown:], end="", highlight=False)
            shown = len(text)
            if not current.finished:
                break
            console.out("\n", highlight=False)
            done.append(current)
            line.pop(0)
            shown = -1
    return done


def shown_text(output: RequestOutput, show_ids: bool) -> str:
    """The first sequence as text, or as token ids."""
    completion = output.outputs[0]
    return "".join(f"{token_id} " for token_id in completion.token_ids) if show_ids else completion.text
