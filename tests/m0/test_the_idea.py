"""M0 in nine tests: a language model writes one token after the other, and a KV cache lets it compute each token once.

A key and a value of a past token never change, because no token sees a later one: so they can be kept. This file is
what to read first. The others check it in depth: `test_baseline.py` both loops, token by token, and what they feed the
model; `test_formulas.py` the bytes and the work; `test_loader.py`, `test_folo_tiny.py` and `test_glossary.py` the
model that all of this runs on.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from folovllm.baseline import generate_cached, generate_recompute
from tests.oracle import hf_greedy, tiny_model

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
LAYERS, KV_HEADS, HEAD_SIZE = 2, 2, 32


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Two layers of random weights, 4 query heads on 2 KV heads."""
    return tiny_model("qwen3")


@pytest.fixture
def fed(model: PreTrainedModel) -> Iterator[list[list[int]]]:
    """The positions of the tokens that each forward is given."""
    calls: list[list[int]] = []
    spy = model.register_forward_pre_hook(
        lambda _, __, given: calls.append(given["position_ids"][0].tolist()), with_kwargs=True
    )
    yield calls
    spy.remove()


def run(model: PreTrainedModel, tokens: list[int], **kwargs: object) -> tuple[torch.Tensor, DynamicCache]:
    """Hugging Face's own forward: the logits after the last token, and the keys and values of all."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        output = model(input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True, **kwargs)
    return output.logits[0, -1], cache


def test_with_and_without_a_cache_the_text_is_that_of_hugging_face(model: PreTrainedModel) -> None:
    expected = hf_greedy(model, PROMPT, 20)
    assert generate_recompute(model, PROMPT, 20).token_ids == expected
    assert generate_cached(model, PROMPT, 20).token_ids == expected


def test_keys_and_values_of_the_past_do_not_change_when_the_text_grows(model: PreTrainedModel) -> None:
    (_, short), (_, long) = run(model, PROMPT), run(model, [*PROMPT, 5, 3, 5])
    for before, after in zip(short.layers, long.layers, strict=True):
        torch.testing.assert_close(after.keys[:, :, : len(PROMPT)], before.keys)
        torch.testing.assert_close(after.values[:, :, : len(PROMPT)], before.values)


def test_they_would_change_if_a_token_could_see_later_ones(model: PreTrainedModel) -> None:
    everyone_sees_everyone = torch.ones(1, 1, len(PROMPT) + 1, len(PROMPT) + 1, dtype=torch.bool)
    (_, short), (_, long) = (
        run(model, text, attention_mask=everyone_sees_everyone[:, :, : len(text), : len(text)])
        for text in (PROMPT, [*PROMPT, 5])
    )
    # The first layer's keys come from the tokens alone, the second layer's from what the first has seen.
    assert not torch.allclose(long.layers[1].keys[:, :, : len(PROMPT)], short.layers[1].keys, atol=1e-2)


def test_a_cached_step_computes_one_token_and_gives_the_same_logits(model: PreTrainedModel) -> None:
    _, cache = run(model, PROMPT[:-1])
    with torch.inference_mode():
        step = model(input_ids=torch.tensor([PROMPT[-1:]]), past_key_values=cache).logits[0, -1]
    torch.testing.assert_close(step, run(model, PROMPT)[0], atol=1e-4, rtol=1e-4)


def test_with_a_cache_n_steps_compute_n_tokens(model: PreTrainedModel, fed: list[list[int]]) -> None:
    generate_cached(model, [7], 10)
    assert sum(map(len, fed)) == 10


def test_without_a_cache_n_steps_compute_n_times_n_plus_1_over_2(model: PreTrainedModel, fed: list[list[int]]) -> None:
    generate_recompute(model, [7], 10)
    assert sum(map(len, fed)) == 10 * 11 // 2


def test_the_first_new_token_stands_right_behind_the_prompt(model: PreTrainedModel, fed: list[list[int]]) -> None:
    generate_cached(model, PROMPT, 3)
    assert fed == [[0, 1, 2, 3, 4, 5, 6, 7], [8], [9]]


def test_a_token_keeps_a_key_and_a_value_per_layer_and_kv_head(model: PreTrainedModel) -> None:
    result = generate_cached(model, PROMPT, 5)
    tokens = len(PROMPT) + 5 - 1  # the last one was never fed back
    assert result.kv_bytes == tokens * 2 * LAYERS * KV_HEADS * HEAD_SIZE * 4  # 4 bytes in float32


def test_a_text_ends_with_the_first_eos(model: PreTrainedModel) -> None:
    free = generate_cached(model, PROMPT, 20).token_ids
    eos = free[6]
    assert generate_cached(model, PROMPT, 20, eos_token_ids=[eos]).token_ids == free[: free.index(eos) + 1]
