"""Prompts that share prefixes, for the real models, and what Hugging Face makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from folovllm import LLM
from folovllm.course.glossary import load_prose
from tests.m3.cases import Case
from tests.m4.helpers import cache_of
from tests.oracle import hf_greedy, random_prompt

# Which of two documents, how many tokens of it, and how many of their own come after: prefixes that end within blocks
# of any size and at their ends, the same prompt twice, one that is the beginning of another, and strangers.
SHAPES = (
    (0, 48, 3),
    (0, 48, 5),
    (0, 32, 4),
    (1, 33, 2),
    (0, 48, 0),
    (0, 48, 0),
    (1, 16, 9),
    (0, 0, 7),
    (1, 33, 0),
    (0, 1, 1),
)


class SharedCase(Case):
    """A model, and prompts that begin with parts of two documents."""

    def __init__(self, name: str, folder: Path, new_tokens: int) -> None:
        super().__init__(name, folder, (), new_tokens, ignore_eos=True)
        if name == "folo-tiny":
            tokenizer = LLM(name, milestone="m1", dtype="float32", device="cpu").engine.tokenizer
            assert tokenizer is not None
            ids = tokenizer("\n\n".join(load_prose().values()))["input_ids"]
            documents, own = [ids[:60], ids[500:560]], [ids[1000 + 10 * i :] for i in range(len(SHAPES))]
        else:
            documents = [random_prompt(60, seed=i) for i in (1, 2)]
            own = [random_prompt(20, seed=50 + i) for i in range(len(SHAPES))]
        self.prompts = [
            [*documents[which][:shared], *rest[:count]]
            for (which, shared, count), rest in zip(SHAPES, own, strict=True)
        ]
        self.expected = [hf_greedy(self.model, prompt, new_tokens) for prompt in self.prompts]

    def llm(self, milestone: str = "m4", **kwargs: Any) -> LLM:
        """An engine with this model in float32. K/V for 1200 tokens if nothing else is said."""
        if milestone in ("m3", "m4"):
            kwargs = {"num_kv_blocks": 1200 // kwargs.get("block_size", 16), **kwargs}
        return super().llm(milestone, **kwargs)

    def computed_at_least(self, block_size: int) -> int:
        """Prompt tokens that have to be computed if no prefix of whole blocks is computed twice."""
        blocks: set[tuple[int, ...]] = set()
        computed = 0
        for prompt in self.prompts:
            hits = 0
            while (end := (hits + 1) * block_size) < len(prompt) and tuple(prompt[:end]) in blocks:
                hits += 1
            computed += len(prompt) - hits * block_size
            blocks |= {tuple(prompt[: (i + 1) * block_size]) for i in range(len(prompt) // block_size)}
        return computed


def forget_nothing(llm: LLM) -> None:
    """The cache holds no promise of anybody who is gone."""
    cache = cache_of(llm.engine)
    assert (cache._pending, cache._keys) == ({}, {})
