"""`api.md`, the reference of the public names: written from the package before each build (git ignores it).

The engine's folders come in the order in which a request meets them, then the course's. Every module with a public name
of its own is in it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from sources import ROOT

PACKAGE = ROOT / "folovllm"
TITLES = {  # folder of the package -> heading
    "": "Asking, and what is said in a step",
    "entrypoints": "The interface",
    "engine": "The engine",
    "scheduler": "The scheduler",
    "kv_cache": "The KV cache's state",
    "runner": "The runner",
    "runner/hf": "The runner of M1 and M2",
    "models": "The model",
    "attention": "Attention over blocks",
    "sampling": "The sampler",
    "contrib/transformers": "Any other Hugging Face decoder",
    "course": "The course: what all of it uses",
    "course/viz": "Seeing it",
    "course/replay": "The replay",
    "course/lessons": "Lessons",
    "course/bench": "The bench",
    "course/grading": "The grader",
}
# Methods that another library puts into a class of ours, with docstrings for its own site.
NOT_OURS = {"folovllm.course.viz.style": "set"}
LEFT_OUT = ("course/measure", "course/training")  # programs, not a library
HEAD = """# Reference

The public names of the package. What `folovllm` itself exports can be imported from there:
`from folovllm import LLM, SamplingParams`. The course's folders are at the end; the engine imports none of them.
"""


def modules(folder: str) -> Iterator[str]:
    """The modules of a folder of the package that define a public name, as dotted names."""
    for file in sorted((PACKAGE / folder).glob("*.py")):
        if file.name.startswith("__"):
            continue
        body = ast.parse(file.read_text(encoding="utf-8")).body
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        if any(isinstance(node, kinds) and not node.name.startswith("_") for node in body):
            yield ".".join(file.relative_to(ROOT).with_suffix("").parts)


def reference() -> str:
    """The page as Markdown. Raises LookupError for a folder with modules that has no heading."""
    parents = {file.parent.relative_to(PACKAGE) for file in PACKAGE.rglob("*.py")}
    folders = {"" if folder == Path() else folder.as_posix() for folder in parents}
    if lost := {f for f in folders - set(TITLES) - set(LEFT_OUT) if any(modules(f))}:
        raise LookupError(f"{', '.join(sorted(lost))}: no heading in docs/reference.py")
    parts = [HEAD]
    for folder, title in TITLES.items():
        parts.append(f"## {title}\n")
        for module in modules(folder):
            name = module.removeprefix("folovllm.")
            options = "   :members:\n"
            if module in NOT_OURS:
                options += f"   :exclude-members: {NOT_OURS[module]}\n"
            parts.append(f"### `{name}`\n\n```{{eval-rst}}\n.. automodule:: {module}\n{options}```\n")
    return "\n".join(parts)
