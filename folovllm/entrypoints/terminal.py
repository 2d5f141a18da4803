"""Prompts from the command line, and outputs in the terminal: what the commands and the examples share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from folovllm.entrypoints.llm import LLM
from folovllm.outputs import RequestOutput

DEFAULT_PROMPTS = "folovllm.course.glossary:default_prompts"


def by_name(place: str) -> Any:
    """What "module:name" leads to. For what the course adds: the engine itself does not import it.

    Raises ValueError where the module is not installed.
    """
    module, _, name = place.partition(":")
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if not (error.name and module.startswith(error.name)):
            raise  # of something that the module itself wants to import
        raise ValueError(
            f"{module} is not installed; allowed: what works without the course, or its package"
        ) from error


def is_installed(place: str) -> bool:
    """Whether the module of "module:name" is there. Looking for it imports the package around it, and no more."""
    try:
        return find_spec(place.partition(":")[0]) is not None
    except ModuleNotFoundError:
        return False


@contextmanager
def clean_exit(console: Console) -> Iterator[None]:
    """One line for a mistake (status 2) or Ctrl-C (status 130) instead of a traceback."""
    try:
        yield
    except ValueError as error:
        console.print("[bold red]error:[/]", end=" ")
        console.print(str(error), markup=False, highlight=False)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        console.print("\ninterrupted")
        raise SystemExit(130) from None


def check_parent(name: str, path: Path) -> None:
    """Raise ValueError unless a file could be written at `path`: its folder is there, and it is no folder itself."""
    if not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"{name}={str(path)!r} is not valid; allowed: a file in a folder that exists")


def make_prompts(llm: LLM, prompts: list[str] | None, num_prompts: int, raw: bool) -> tuple[list[str], list[Any]]:
    """Titles to show and prompts to run.

    Questions go through the chat template where the model has one; a model without a tokenizer gets token ids.
    """
    tokenizer = llm.engine.tokenizer
    if tokenizer is None:
        if prompts:
            raise ValueError(
                f"prompts={prompts!r} are text and the model has no tokenizer; allowed: none, random ids are used"
            )
        generator = torch.Generator().manual_seed(0)
        length = min(128, llm.engine.max_model_len - 1)
        ids = torch.randint(llm.engine.vocab_size, (num_prompts, length), generator=generator).tolist()  # [N, length]
        return [f"{length} random token ids" for _ in ids], ids
    titles = prompts or by_name(DEFAULT_PROMPTS)(num_prompts)
    for i, title in enumerate(titles):
        if not title.strip():
            raise ValueError(f"prompts[{i}]={title!r} is empty; allowed: text")
    if raw or not tokenizer.chat_template:
        return titles, list(titles)
    return titles, llm.chat_prompts([[{"role": "user", "content": title}] for title in titles])


def show_ids(llm: LLM) -> bool:
    """Whether outputs have to be shown as token ids, because there is no text."""
    return llm.engine.tokenizer is None


def print_samples(console: Console, title: str, output: RequestOutput, as_ids: bool = False) -> None:
    """A prompt and all its samples."""
    console.print("> " + title, style="bold cyan", markup=False, highlight=False)
    for completion in output.outputs:
        prefix = f"[{completion.index}] " if len(output.outputs) > 1 else ""
        text = str(completion.token_ids) if as_ids else completion.text
        console.print(prefix + text, markup=False, highlight=False)
    console.print()


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
    order = list(titles)
    shown = -1  # characters of order[0] on the screen; -1: not even its title
    for output in outputs:
        latest[output.request_id] = output
        while order and order[0] in latest:
            current = latest[order[0]]
            if shown < 0:
                console.print("> " + titles[order[0]], style="bold cyan", markup=False, highlight=False)
                shown = 0
            text = shown_text(current, show_ids)
            console.out(text[shown:], end="", highlight=False)
            shown = len(text)
            if not current.finished:
                break
            console.out("\n", highlight=False)
            done.append(current)
            order.pop(0)
            shown = -1
    return done


def shown_text(output: RequestOutput, show_ids: bool) -> str:
    """The first sequence as text, or as token ids."""
    completion = output.outputs[0]
    return "".join(f"{token_id} " for token_id in completion.token_ids) if show_ids else completion.text
