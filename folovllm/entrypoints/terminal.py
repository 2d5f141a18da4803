"""Prompts from the command line, and outputs in the terminal: what the commands and the examples share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from folovllm.entrypoints.llm import LLM
from folovllm.glossary import default_prompts
from folovllm.outputs import RequestOutput


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
    titles = prompts or default_prompts(num_prompts)
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
