"""Prompts from the command line and outputs in the terminal, for the commands and the examples."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from rich.console import Console

from folovllm.checks import invalid
from folovllm.entrypoints.llm import LLM
from folovllm.entrypoints.start import INTERRUPTED, interrupted
from folovllm.outputs import RequestOutput

CLOSED_PIPE = 128 + 13  # exit status, as of a program that SIGPIPE ends
DEFAULT_PROMPTS = "folovllm.course.glossary:default_prompts"


def by_name(place: str) -> Any:
    """Import "module:name". For the course, which the engine does not import.

    Raises ValueError if the module is not installed.
    """
    module, _, name = place.partition(":")
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if not (error.name and module.startswith(error.name)):
            raise  # the module exists, but one of its own imports does not
        raise ValueError(f"{module} is not installed; allowed: commands that work without it") from error


def is_installed(place: str) -> bool:
    """Whether the module of "module:name" exists. Imports only its parent package."""
    try:
        return find_spec(place.partition(":")[0]) is not None
    except ModuleNotFoundError:
        return False


@contextmanager
def clean_exit(console: Console) -> Iterator[None]:
    """Exit with one line on stderr instead of a traceback, for what a user or the system does.

    Status 2 for a ValueError, 1 for an OSError such as a full disk, 130 for Ctrl-C, and 141, without a line, where
    the output is read no more (`| head`).
    """
    console.on_broken_pipe = _raise_again  # type: ignore[method-assign]
    early = signal.getsignal(signal.SIGINT) is interrupted
    if early:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # there is something to put away from now on
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except ValueError as error:
        _leave(2, str(error))
    except KeyboardInterrupt:
        _leave(INTERRUPTED)
    except BrokenPipeError:
        _leave(CLOSED_PIPE)
    except (OSError, MemoryError) as error:
        _leave(1, str(error) or "out of memory")
    finally:
        if early:
            signal.signal(signal.SIGINT, interrupted)


def _raise_again() -> None:
    raise


def _leave(status: int, message: str = "") -> NoReturn:
    """Exit. What cannot be written to stdout is dropped, so that the interpreter does not try once more."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        message = message and f"standard output cannot be written: {error.strerror}"
        _drop(sys.stdout)
    try:
        errors = Console(stderr=True, soft_wrap=True, highlight=False)
        errors.on_broken_pipe = _raise_again  # type: ignore[method-assign]
        if message:
            errors.print("[bold red]error:[/]", end=" ")
            errors.print(message, markup=False)
        elif status == INTERRUPTED:
            errors.print("\ninterrupted")
    except OSError:
        _drop(sys.stderr)
    raise SystemExit(status) from None


def _drop(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def check_writable(name: str, path: Path) -> None:
    """Raise ValueError unless a file can be written at `path`. What is there stays as it is."""
    try:
        in_folder = path.parent.is_dir() and not path.is_dir()
        is_new = not os.path.lexists(path)
        if in_folder and (is_new or path.is_file()):  # no device and no pipe, which may wait for a reader
            path.open("ab").close()
            if is_new:
                path.unlink()
    except (OSError, ValueError) as error:  # a ValueError for a null character
        raise invalid(name, str(path), f"a file that can be written ({error})") from None
    if not in_folder:
        raise invalid(name, str(path), "a file in a folder that exists")


def make_prompts(llm: LLM, prompts: list[str] | None, num_prompts: int, raw: bool) -> tuple[list[str], list[Any]]:
    """Titles to show, and prompts to run.

    Questions use the model's chat template if it has one. A model without a tokenizer gets random token ids.
    """
    tokenizer = llm.engine.tokenizer
    if tokenizer is None:
        if prompts:
            raise ValueError(
                f"prompts={prompts!r} are text and the model has no tokenizer; allowed: none, for random token ids"
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
    """Whether to show token ids, because the model has no tokenizer."""
    return llm.engine.tokenizer is None


def print_samples(console: Console, title: str, output: RequestOutput, as_ids: bool = False) -> None:
    """Print a prompt and all its samples."""
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

    outputs: from `LLM.stream`. titles: by request id, in the order to print. Outputs of later requests are kept until
    the earlier ones are printed. Only a request's first sequence is shown, as text or, with `show_ids`, as token ids.
    """
    done: list[RequestOutput] = []
    latest: dict[str, RequestOutput] = {}
    order = list(titles)
    shown = -1  # characters of order[0] that are printed; -1: its title is not printed yet
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
    """The first sequence, as text or as token ids."""
    completion = output.outputs[0]
    return "".join(f"{token_id} " for token_id in completion.token_ids) if show_ids else completion.text
