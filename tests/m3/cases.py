"""Models, prompts for them, and what Hugging Face makes of them: worked out once for all the tests of a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from folovllm import LLM, SamplingParams
from folovllm.course.glossary import load_prose
from tests.m3.helpers import check_all_free
from tests.oracle import FAMILIES, OracleStats, assert_same_tokens, hf_greedy, random_prompt, tiny_model

MODELS = ("folo-tiny", *FAMILIES)


class Case:
    """A model, and prompts of the given lengths with Hugging Face's `new_tokens` greedy tokens for each."""

    def __init__(
        self, name: str, folder: Path, lengths: Sequence[int], new_tokens: int, ignore_eos: bool = False
    ) -> None:
        if name == "folo-tiny":
            llm = LLM(name, milestone="m1", dtype="float32", device="cpu")
            self.path, eos = name, llm.engine.eos_token_ids
            self.model: PreTrainedModel = llm.engine.core.runner.model
            prose = llm.engine.tokenizer("\n\n".join(load_prose().values()))["input_ids"]
            self.prompts = [prose[100 * i : 100 * i + n] for i, n in enumerate(lengths)]
        else:
            self.path, eos = str(folder), ()
            self.model = tiny_model(name, seed=3)
            self.model.save_pretrained(folder)
            self.prompts = [random_prompt(n, seed=n) for n in lengths]
        self.params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=ignore_eos)
        eos = () if ignore_eos else eos
        self.expected = [hf_greedy(self.model, prompt, new_tokens, eos=eos) for prompt in self.prompts]

    def llm(self, milestone: str = "m3", **kwargs: Any) -> LLM:
        """An engine with this model in float32."""
        if milestone == "m3":
            kwargs = {"num_kv_blocks": 600 // kwargs.get("block_size", 16), **kwargs}
        return LLM(self.path, milestone=milestone, dtype="float32", device="cpu", max_model_len=128, **kwargs)

    def compare(self, outputs: Sequence[Sequence[int]], stats: OracleStats) -> None:
        """Token ids of every prompt's output against Hugging Face's."""
        for prompt, expected, tokens in zip(self.prompts, self.expected, outputs, strict=True):
            assert_same_tokens(tokens, expected, self.model, prompt, stats)

    def check(self, llm: LLM, stats: OracleStats, priority: Sequence[int] | int = 0) -> None:
        """Run all prompts at once, compare every token, and see that nothing is left."""
        outputs = llm.generate(self.prompts, self.params, use_tqdm=False, priority=priority)
        self.compare([output.outputs[0].token_ids for output in outputs], stats)
        check_all_free(llm.engine)
