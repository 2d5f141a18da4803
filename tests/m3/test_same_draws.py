"""What is drawn does not depend on the milestone, on the batch, or on whether the engine or the user chose the seed."""

from __future__ import annotations

import pytest

from folovllm import LLM, SamplingParams

PROMPTS = ["What is a KV cache?", "a", "One two three"]


def texts(milestone: str, params: SamplingParams, seed: int = 3) -> list[list[int]]:
    llm = LLM("folo-tiny", milestone=milestone, dtype="float32", device="cpu", seed=seed, num_kv_blocks=64)
    return [c.token_ids for o in llm.generate(PROMPTS, params, use_tqdm=False) for c in o.outputs]


@pytest.mark.parametrize(
    "kwargs",
    [{"n": 2}, {"n": 2, "seed": 9}, {"top_p": 0.8, "top_k": 50, "repetition_penalty": 1.2, "logprobs": -1}],
    ids=str,
)
def test_every_milestone_draws_the_same(kwargs: dict[str, int]) -> None:
    params = SamplingParams(max_tokens=8, temperature=1.5, ignore_eos=True, **kwargs)  # type: ignore[arg-type]
    expected = texts("m1", params)
    assert len({tuple(ids) for ids in expected}) >= len(expected) - 1
    for milestone in ("m2", "m3", "m4"):
        assert texts(milestone, params) == expected
    assert (texts("m4", params, seed=4) == expected) == ("seed" in kwargs)
