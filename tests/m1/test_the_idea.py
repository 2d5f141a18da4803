"""M1 in ten tests: an engine takes requests, runs one at a time, and gives out text as it comes.

Around the model it adds what a user needs: sampling, stop rules, streaming, metrics, refusals, and a trace of every
step. This file is what to read first. The others check it in depth: `test_same_tokens.py` the text against Hugging
Face; `test_engine_mock.py` and `test_api.py` the life of a request; `test_detokenizer.py` stop strings and streaming;
`test_sampler.py`, `test_filters.py` and `test_sampling_params.py` the sampling; `test_trace.py` the record.
"""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from folovllm import LLM, SamplingParams
from folovllm.models.loader import resolve_model
from tests.oracle import hf_greedy

PROMPT = "A KV cache holds"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """The bundled model as Hugging Face loads it."""
    return AutoModelForCausalLM.from_pretrained(resolve_model("folo-tiny").path_or_id, dtype="float32")


@pytest.fixture
def llm() -> LLM:
    return LLM("folo-tiny", milestone="m1", dtype="float32", device="cpu")


def generate(llm: LLM, prompts: Any = PROMPT, **kwargs: Any) -> Any:
    """Greedy, if nothing else is asked for. One output for one prompt, a list for a list."""
    outputs = llm.generate(prompts, SamplingParams(**{"temperature": 0, **kwargs}), use_tqdm=False)
    return outputs if isinstance(prompts, list) else outputs[0]


def test_the_tokens_are_those_of_hugging_face_generate(llm: LLM, model: PreTrainedModel) -> None:
    output = generate(llm, max_tokens=30)
    assert output.outputs[0].token_ids == hf_greedy(model, output.prompt_token_ids, 30, eos=llm.engine.eos_token_ids)


def test_a_request_ends_at_its_length(llm: LLM) -> None:
    completion = generate(llm, max_tokens=7).outputs[0]
    assert (len(completion.token_ids), completion.finish_reason) == (7, "length")


def test_or_with_the_models_end_of_text(llm: LLM) -> None:
    question = [{"role": "user", "content": "What is a KV cache?"}]
    (output,) = llm.chat(question, SamplingParams(temperature=0, max_tokens=200), use_tqdm=False)
    completion = output.outputs[0]
    assert completion.token_ids[-1] in llm.engine.eos_token_ids and completion.finish_reason == "stop"


def test_or_before_a_string_that_it_must_not_say(llm: LLM) -> None:
    free = generate(llm, max_tokens=30).outputs[0].text
    word = free.split()[4]
    completion = generate(llm, max_tokens=30, stop=word).outputs[0]
    assert completion.text == free[: free.index(word)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", word)


def test_streaming_gives_out_text_that_is_never_taken_back(llm: LLM) -> None:
    whole = generate(llm, max_tokens=30).outputs[0].text
    word = whole.split()[6]
    seen = [""]
    for output in llm.stream(PROMPT, SamplingParams(temperature=0, max_tokens=30, stop=word)):
        assert output.outputs[0].text.startswith(seen[-1])
        seen.append(output.outputs[0].text)
    assert len(set(seen)) > 4 and seen[-1] == whole[: whole.index(word)]


def test_the_same_seed_gives_the_same_text_and_another_seed_another(llm: LLM) -> None:
    one, again, two = (
        generate(llm, temperature=1.5, seed=seed, max_tokens=20).outputs[0].token_ids for seed in (1, 1, 2)
    )
    assert one == again != two


def test_a_bad_request_is_refused_by_name_and_nothing_is_queued(llm: LLM) -> None:
    with pytest.raises(ValueError, match="temperature=-1"):
        SamplingParams(temperature=-1)
    with pytest.raises(ValueError, match="prompt"):
        generate(llm, ["a good prompt", ""])
    assert not llm.engine.has_unfinished_requests() and llm.engine.stats.steps == 0


def test_one_request_runs_at_a_time(llm: LLM) -> None:
    generate(llm, ["first", "second", "third"], max_tokens=2, ignore_eos=True)
    assert [[r.request_id for r in step.requests] for step in llm.engine.trace] == [
        ["0"], ["0"], ["1"], ["1"], ["2"], ["2"],
    ]  # fmt: skip


def test_the_trace_says_what_each_step_computed_and_chose(llm: LLM) -> None:
    output = generate(llm, max_tokens=4)
    prompt, tokens = output.prompt_token_ids, output.outputs[0].token_ids
    requests = [request for step in llm.engine.trace for request in step.requests]
    assert [r.num_scheduled for r in requests] == [len(prompt), 1, 1, 1]  # the prompt at once, then token by token
    assert [r.sampled_ids for r in requests] == [(token,) for token in tokens]
    assert (llm.engine.stats.prompt_tokens_computed, llm.engine.stats.generated_tokens) == (len(prompt), 4)


def test_the_metrics_add_up(llm: LLM) -> None:
    """Time to first token, and then the gaps between tokens: together they are the time to the last one."""
    metrics = generate(llm, max_tokens=5).metrics
    assert len(metrics.itls) == 4 and all(gap > 0 for gap in metrics.itls)
    assert 0 <= metrics.queue_time <= metrics.ttft <= metrics.e2e_latency
    assert metrics.ttft + sum(metrics.itls) == pytest.approx(metrics.token_times[-1] - metrics.arrival_time)
