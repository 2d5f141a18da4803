"""The public API: what it takes, what it gives, and one clear error for everything it refuses."""

from __future__ import annotations

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import MambaConfig

import folovllm.entrypoints.llm as llm_module
from folovllm import LLM, CacheConfig, EngineConfig, LLMEngine, ModelConfig, SamplingParams, SchedulerConfig
from folovllm.course.glossary import default_prompts, load_glossary
from folovllm.models.loader import resolve_model
from tests.mock import mock_engine

GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("folo-tiny", milestone="m1", dtype="float32", device="cpu", max_model_len=512)


# ---------------------------------------------------------------------- what is refused

CONFIG_ERRORS = [
    (lambda: LLM("no-such-model"), "model='no-such-model' is unknown; bundled models are folo-tiny"),
    (lambda: LLM("./no/such/folder"), r"no such folder; .*hf download"),
    (lambda: LLM(""), "model='' is not valid"),
    (lambda: LLM(model=7), "model=7 is not valid"),
    (lambda: LLM("qwen3-0.6b"), "pass load_format='dummy'"),
    (lambda: LLM("Some-Org/Some-Model"), "cannot get config.json of 'Some-Org/Some-Model'.*hf download"),
    (lambda: LLM(milestone="m9"), "milestone='m9' is not valid; allowed: 'm1'"),
    (lambda: LLM(milestone=["m1"]), r"milestone=\['m1'\] is not valid"),
    (lambda: LLM(milestone="m0"), "'m0' is the module folovllm.baseline"),
    (lambda: LLM(dtype="int8"), "dtype='int8' is not valid; allowed: 'auto', 'float32'"),
    (lambda: LLM(device="tpu"), "device='tpu' is not valid; allowed: 'auto', 'cpu', 'cuda'"),
    (lambda: LLM(device="cuda:77"), "device='cuda:77' is not available"),
    (lambda: LLM(load_format="gguf"), "load_format='gguf' is not valid; allowed: 'auto', 'safetensors', 'dummy'"),
    (lambda: LLM(max_model_len=0), "max_model_len=0 is not valid; allowed: an integer >= 1"),
    (lambda: LLM(max_model_len=10**9), "max_model_len=1000000000 is not valid; allowed: at most"),
    (lambda: LLM(max_model_len=12.5), "max_model_len=12.5 is not valid; allowed: an integer"),
    (lambda: LLM(max_num_seqs=0), "max_num_seqs=0 is not valid; allowed: an integer >= 1"),
    (lambda: LLM(max_num_seqs=True), "max_num_seqs=True is not valid"),
    (lambda: LLM(milestone="m1", max_num_seqs=2), "max_num_seqs=2 is not valid; allowed: 1 with milestone m1"),
    (lambda: LLM(max_num_batched_tokens=-1), "max_num_batched_tokens=-1 is not valid"),
    (lambda: LLM(block_size=0), "block_size=0 is not valid; allowed: an integer >= 1 and <= 256"),
    (lambda: LLM(block_size=257), "block_size=257 is not valid"),
    (lambda: LLM(num_kv_blocks=0), "num_kv_blocks=0 is not valid"),
    (lambda: LLM(gpu_memory_utilization=0), "gpu_memory_utilization=0 is not valid; allowed: a number > 0 and <= 1"),
    (lambda: LLM(gpu_memory_utilization=1.5), "gpu_memory_utilization=1.5 is not valid"),
    (lambda: LLM(swap_space=-1), "swap_space=-1 is not valid"),
    (lambda: LLM(swap_space=float("nan")), "swap_space=nan is not valid"),
    (
        lambda: LLM(milestone="m1", enable_prefix_caching=True),
        "enable_prefix_caching=True is not valid; allowed: False or None",
    ),
    (
        lambda: LLM(milestone="m1", enable_chunked_prefill=True),
        "enable_chunked_prefill=True is not valid; allowed: False or None",
    ),
    (
        lambda: LLM(enable_prefix_caching="yes"),
        "enable_prefix_caching='yes' is not valid; allowed: True, False or None",
    ),
    (lambda: LLM(milestone="m1", preemption_mode="swap"), "preemption_mode='swap' is not valid; allowed: 'recompute'"),
    (lambda: LLM(preemption_mode="kill"), "preemption_mode='kill' is not valid; allowed: 'recompute', 'swap'"),
    (lambda: LLM(scheduling_policy="random"), "scheduling_policy='random' is not valid; allowed: 'fcfs'"),
    (lambda: LLM(attention_backend="flash"), "attention_backend='flash' is not valid; allowed: 'auto'"),
    (lambda: LLM(seed=-1), "seed=-1 is not valid"),
    (lambda: LLM(max_trace_steps=-1), "max_trace_steps=-1 is not valid"),
    (lambda: LLM(blok_size=16), r"LLM has no field 'blok_size' \(did you mean 'block_size'\?\); allowed: model"),
    (lambda: ModelConfig(modle="x"), r"ModelConfig has no field 'modle' \(did you mean 'model'\?\)"),
    (lambda: SchedulerConfig(max_seqs=8), "SchedulerConfig has no field 'max_seqs'"),
    (lambda: CacheConfig(blocks=8), "CacheConfig has no field 'blocks'"),
    (lambda: EngineConfig(model="folo-tiny"), "model='folo-tiny' is not valid; allowed: a ModelConfig"),
    (
        lambda: LLMEngine(ModelConfig(), engine_config=EngineConfig()),
        "engine_config was given with other configurations",
    ),
    (
        lambda: LLM(max_model_len=64, num_kv_blocks=1).generate([[1] * 10]),
        r"can never run: it may grow to 26 tokens \(10 of prompt",
    ),
]


@pytest.mark.parametrize(("make", "message"), CONFIG_ERRORS, ids=[m[:45] for _, m in CONFIG_ERRORS])
def test_a_bad_configuration_is_one_clear_value_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


REQUEST_ERRORS = [
    ("", "prompt='' has no tokens; allowed: at least 1"),
    ([[]], r"prompt=\[\] has no tokens"),
    ({"prompt_token_ids": []}, r"prompt=\[\] has no tokens"),
    ({"prompt_ids": [1]}, "allowed: a dict with one key of"),
    ({"prompt": "a", "prompt_token_ids": [1]}, "allowed: a dict with one key of"),
    ([[1, -1]], r"prompt_token_ids\[1\]=-1 is not valid; allowed: integers in \[0, \d+\)"),
    ([[10**6]], r"prompt_token_ids\[0\]=1000000 is not valid"),
    ([[1, 2.0]], r"prompt_token_ids\[1\]=2.0 is not valid"),
    ([[True, 2]], r"prompt_token_ids\[0\]=True is not valid"),
    ([["a"]], r"prompt_token_ids\[0\]='a' is not valid"),
    (None, "prompts=None is not valid"),
    (3.5, "prompts=3.5 is not valid"),
    ([None], "prompt=None is not valid"),
    (["\ud800"], "prompt=.* is not valid; allowed: text without lone surrogates"),
    ([[1] * 512], "the prompt has 512 tokens, which leaves none for output; allowed: at most 511"),
]


@pytest.mark.parametrize(("prompts", "message"), REQUEST_ERRORS, ids=[m[:45] for _, m in REQUEST_ERRORS])
def test_a_bad_prompt_is_refused_and_nothing_is_queued(llm, prompts, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, GREEDY, use_tqdm=False)
    assert not llm.engine.has_unfinished_requests()


@pytest.mark.parametrize(("bad", "message"), [r for r in REQUEST_ERRORS if isinstance(r[0], list)], ids=str)
def test_one_bad_prompt_in_a_list_queues_none_of_it(llm, bad, message):
    before = llm.engine.stats.steps
    for call in (llm.generate, llm.stream, llm.enqueue, llm.engine.generate_batch):
        with pytest.raises(ValueError, match=message):
            call(["fine", *bad, "fine too"], GREEDY)
    assert not llm.engine.has_unfinished_requests() and llm.engine.stats.steps == before
    assert llm.engine.core.scheduler.requests == {}


PARAM_ERRORS = [
    (dict(sampling_params="greedy"), "sampling_params='greedy' is not valid"),
    (dict(sampling_params=[GREEDY]), "allowed: one SamplingParams or a list of 2"),
    (dict(sampling_params=SamplingParams(stop_token_ids=[10**7])), r"stop_token_ids=\[10000000\] is not valid"),
    (dict(sampling_params=SamplingParams(logit_bias={10**7: 1.0})), "logit_bias"),
    (dict(priority=3), "priority=3 is not valid; allowed: 0"),
    (dict(priority=[0]), r"priority=\[0\] is not valid; allowed: one integer or a list of 2"),
    (dict(priority=None), "priority=None is not valid; allowed: an integer"),
    (dict(priority=1.5), "priority=1.5 is not valid; allowed: an integer"),
    (dict(priority=[0, "high"]), "priority='high' is not valid; allowed: an integer"),
]


@pytest.mark.parametrize(("kwargs", "message"), PARAM_ERRORS, ids=[m[:45] for _, m in PARAM_ERRORS])
def test_bad_parameters_of_a_call_are_refused(llm, kwargs, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(["a", "b"], use_tqdm=False, **kwargs)
    assert not llm.engine.has_unfinished_requests()


CHAT_ERRORS = [
    ("hello", "messages='hello' is not valid|messages="),
    ([{"role": "user"}], r"messages\[0\]=.* is not valid; allowed: a non-empty list"),
    ([{"role": "user", "content": 5}], r"messages\[0\]=.* is not valid"),
    ([{"role": "user", "content": "x", "mood": "y"}], r"messages\[0\]\['mood'\]='y' is not valid; allowed: no other"),
    ([[]], r"messages=\[\] is not valid"),
    (None, "messages=None is not valid; allowed: a list of messages"),
    (5, "messages=5 is not valid"),
    ([{"role": "banana", "content": "x"}], r"messages\[0\]=.* is not valid; allowed: .*assistant"),
    ([{"role": "user", "content": "\ud800"}], "messages=.* is not valid; allowed: text without lone surrogates"),
]


@pytest.mark.parametrize(("messages", "message"), CHAT_ERRORS)
def test_a_malformed_conversation_is_refused(llm, messages, message):
    with pytest.raises(ValueError, match=message):
        llm.chat(messages, GREEDY, use_tqdm=False)
    assert not llm.engine.has_unfinished_requests()


def test_request_ids_must_be_new_non_empty_strings(llm):
    engine = llm.engine
    for bad in ("", None, 5):
        with pytest.raises(ValueError, match=r"request_id=.* is not valid; allowed: a non-empty string"):
            engine.add_request(bad, [1], GREEDY)
    engine.add_request("a", [1], GREEDY)
    with pytest.raises(ValueError, match="request_id='a' is in use"):
        engine.add_request("a", [1], GREEDY)
    engine.add_request("p", [1], SamplingParams(n=2, max_tokens=2))
    with pytest.raises(ValueError, match="request_id='p/1' is in use"):
        engine.add_request("p/1", [1], GREEDY)
    engine.abort_request(["a", "p", "unknown"])
    assert not engine.has_unfinished_requests()


def corrupt(folder: Path, what: str) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    if what == "cut short":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif what == "no weights":
        weights.unlink()
    elif what == "not json":
        config.write_text("{")
    elif what == "no config":
        config.unlink()
    elif what == "another shape":
        config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 96}))
    elif what == "a layer more":
        fields = json.loads(config.read_text())
        fields["num_hidden_layers"] += 1
        fields.pop("layer_types", None)
        config.write_text(json.dumps(fields))


@pytest.mark.parametrize("what", ["cut short", "no weights", "not json", "no config", "another shape", "a layer more"])
def test_a_corrupt_checkpoint_is_one_clear_value_error(tmp_path, what):
    folder = tmp_path / "model"
    shutil.copytree(resolve_model("folo-tiny").path_or_id, folder)
    corrupt(folder, what)
    expected = {
        "cut short": "model.safetensors",
        "no weights": "no weight files",
        "not json": "config.json",
        "no config": "without config.json",
        "another shape": "another shape than config.json says",
        "a layer more": "lacks model.layers",
    }[what]
    with pytest.raises(ValueError, match=expected):
        LLM(str(folder))


def test_a_model_without_positions_is_refused_by_name(tmp_path):
    MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a mamba without max_position_embeddings"):
        LLM(str(tmp_path), load_format="dummy")


def test_a_chat_template_that_refuses_is_a_value_error(llm, monkeypatch):
    monkeypatch.setattr(llm.engine.tokenizer, "chat_template", "{{ raise_exception('no system role') }}")
    with pytest.raises(ValueError, match="refused by the chat template: no system role"):
        llm.chat([{"role": "system", "content": "x"}], GREEDY, use_tqdm=False)


def test_a_bad_id_to_abort_is_refused(llm):
    with pytest.raises(ValueError, match="request_id=5 is not valid; allowed: a string or a list"):
        llm.engine.abort_request(5)


def test_a_model_without_a_tokenizer_refuses_text_and_stop_strings():
    engine = mock_engine()
    with pytest.raises(ValueError, match="prompt='hi' is text and the model has no tokenizer; allowed: token ids"):
        engine.add_request("a", "hi")
    with pytest.raises(ValueError, match=r"stop=\['x'\] is not valid; allowed: none"):
        engine.add_request("a", [1], SamplingParams(stop="x"))


# ---------------------------------------------------------------------- what is given


def test_no_prompts_give_no_outputs(llm):
    assert llm.generate([]) == []
    assert llm.engine.generate_batch([]) == {}


def test_every_form_of_a_prompt_gives_the_same_output_in_order(llm):
    text = "A KV cache"
    ids = llm.engine.tokenizer(text)["input_ids"]
    forms = [text, ids, {"prompt": text}, {"prompt_token_ids": ids}]
    outputs = llm.generate(forms, GREEDY, use_tqdm=False)
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 1
    assert [o.prompt for o in outputs] == [text, None, text, None]
    assert all(o.prompt_token_ids == ids and o.finished for o in outputs)
    assert len(llm.generate(text, GREEDY, use_tqdm=False)) == len(llm.generate(ids, GREEDY, use_tqdm=False)) == 1
    assert [int(o.request_id) for o in outputs] == sorted(int(o.request_id) for o in outputs)


def test_chat_answers_a_glossary_question_word_for_word(llm):
    entry = next(e for e in load_glossary() if e.term == "KV cache")
    messages = [{"role": "user", "content": entry.question}]
    (one,) = llm.chat(messages, SamplingParams(temperature=0, max_tokens=256), use_tqdm=False)
    both = llm.chat([messages, messages], SamplingParams(temperature=0, max_tokens=256), use_tqdm=False)
    assert [one.outputs[0].text] * 2 == [o.outputs[0].text for o in both]
    assert one.outputs[0].text == entry.answer
    assert one.outputs[0].finish_reason == "stop" and one.outputs[0].stop_reason is None
    assert one.outputs[0].token_ids[-1] in llm.engine.eos_token_ids


def test_stream_yields_growing_outputs_that_end_like_generate(llm):
    prompts = llm.chat_prompts([[{"role": "user", "content": q}] for q in default_prompts(2)])
    params = SamplingParams(temperature=0, max_tokens=32)
    whole = llm.generate(prompts, params, use_tqdm=False)
    seen: dict[str, list[str]] = {}
    counts: dict[str, list[int]] = {}
    for output in llm.stream(prompts, params):
        seen.setdefault(output.request_id, []).append(output.outputs[0].text)
        counts.setdefault(output.request_id, []).append(len(output.outputs[0].token_ids))
    for texts in seen.values():
        assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert [texts[-1] for texts in seen.values()] == [o.outputs[0].text for o in whole]
    assert [c for c in counts.values()] == [list(range(1, len(o.outputs[0].token_ids) + 1)) for o in whole]


def test_a_stream_closed_early_leaves_nothing_behind(llm):
    stream = llm.stream(["A", "B"], SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))
    next(stream)
    stream.close()
    assert not llm.engine.has_unfinished_requests()
    assert len(llm.engine.core.runner.states) == 0


def test_an_interrupt_during_generate_leaves_the_engine_usable(llm, monkeypatch):
    class Interrupted(llm_module.tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    monkeypatch.setattr(llm_module, "tqdm", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["A", "B"], GREEDY, use_tqdm=False)
    monkeypatch.undo()
    assert not llm.engine.has_unfinished_requests()
    assert llm.generate(["A"], GREEDY, use_tqdm=False)[0].finished


def test_a_stop_string_ends_the_output_and_names_itself(llm):
    entry = next(e for e in load_glossary() if e.term == "KV cache")
    prompts = llm.chat_prompts([{"role": "user", "content": entry.question}])
    word = entry.answer.split()[4]
    cut = entry.answer.index(word)
    for include in (False, True):
        params = SamplingParams(temperature=0, max_tokens=256, stop=[word], include_stop_str_in_output=include)
        (output,) = llm.generate(prompts, params, use_tqdm=False)
        completion = output.outputs[0]
        assert completion.text == entry.answer[: cut + len(word) if include else cut]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", word)
        assert len(completion.token_ids) == len(output.metrics.token_times)
    assert len(llm.engine.core.runner.states) == 0


def test_a_stop_string_in_the_very_token_that_reaches_max_tokens_is_a_stop(llm):
    (whole,) = llm.generate(["A block"], SamplingParams(temperature=0, max_tokens=6), use_tqdm=False)
    tail = whole.outputs[0].text[-3:]
    assert whole.outputs[0].text.count(tail) == 1
    (output,) = llm.generate(["A block"], SamplingParams(temperature=0, max_tokens=6, stop=tail), use_tqdm=False)
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", tail)
    assert output.outputs[0].text == whole.outputs[0].text[:-3]


def test_a_stop_token_is_in_the_ids_but_not_in_the_text(llm):
    (whole,) = llm.generate(["A block"], SamplingParams(temperature=0, max_tokens=6), use_tqdm=False)
    ids = whole.outputs[0].token_ids
    stop_id = ids[3]
    for include in (False, True):
        params = SamplingParams(
            temperature=0, max_tokens=6, stop_token_ids=[stop_id], include_stop_str_in_output=include
        )
        (output,) = llm.generate(["A block"], params, use_tqdm=False)
        completion, n = output.outputs[0], ids.index(stop_id) + 1
        assert completion.token_ids == ids[:n] and completion.stop_reason == stop_id
        assert completion.text == llm.engine.tokenizer.decode(ids[: n if include else n - 1])


def test_min_tokens_keeps_an_answer_going(llm):
    entry = min(load_glossary(), key=lambda e: len(e.answer))
    prompts = llm.chat_prompts([{"role": "user", "content": entry.question}])
    (short,) = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=200), use_tqdm=False)
    n = len(short.outputs[0].token_ids)
    (longer,) = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=200, min_tokens=n + 5), use_tqdm=False)
    assert len(longer.outputs[0].token_ids) >= n + 5
    assert longer.outputs[0].token_ids[: n - 1] == short.outputs[0].token_ids[: n - 1]


def test_logprobs_come_with_text_and_sum_up(llm):
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=3)
    (output,) = llm.generate(["A block"], params, use_tqdm=False)
    completion = output.outputs[0]
    assert completion.logprobs is not None and len(completion.logprobs) == 5
    total = 0.0
    for token_id, entries in zip(completion.token_ids, completion.logprobs, strict=True):
        assert len(entries) == 3 and next(iter(entries)) == token_id
        assert entries[token_id].rank == 1
        assert entries[token_id].decoded_token == llm.engine.tokenizer.decode([token_id])
        total += entries[token_id].logprob
    assert completion.cumulative_logprob == pytest.approx(total)
    (plain,) = llm.generate(["A block"], SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)
    assert plain.outputs[0].logprobs is None and plain.outputs[0].cumulative_logprob is None


def test_a_request_that_bans_all_it_could_say_ends_with_an_error_and_no_other_does(llm):
    """Everything but EOS banned by bias, and EOS by min_tokens: legal to ask, impossible to answer."""
    eos = set(llm.engine.eos_token_ids)
    ban = {i: -math.inf for i in range(llm.engine.vocab_size) if i not in eos}
    impossible = SamplingParams(temperature=0, min_tokens=1, logit_bias=ban, logprobs=1)
    first, second = llm.generate(["A", "A block"], [impossible, GREEDY], use_tqdm=False)
    assert first.outputs[0].finish_reason == "error" and "no token to choose" in str(first.outputs[0].stop_reason)
    assert first.outputs[0].token_ids == [] and first.finished
    assert second.outputs[0].finish_reason in ("stop", "length") and len(second.outputs[0].token_ids) > 0


def test_a_seed_repeats_and_unseeded_requests_follow_the_engines_seed(llm):
    seeded = SamplingParams(temperature=1.0, seed=5, max_tokens=20, ignore_eos=True)
    first, second = (llm.generate(["A"], seeded, use_tqdm=False)[0].outputs[0].token_ids for _ in range(2))
    assert first == second
    free = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)
    runs = []
    for _ in range(2):
        fresh = LLM("folo-tiny", milestone="m1", dtype="float32", device="cpu", seed=3)
        runs.append([o.outputs[0].token_ids for o in fresh.generate(["A", "A"], free, use_tqdm=False)])
    assert runs[0] == runs[1] and runs[0][0] != runs[0][1]


def test_outputs_are_snapshots(llm):
    outputs = list(llm.stream("A block", SamplingParams(temperature=0, max_tokens=4)))
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1, 2, 3, 4]
    assert [len(o.metrics.token_times) for o in outputs] == [1, 2, 3, 4]


def test_metrics_are_consistent_with_one_another(llm):
    outputs = llm.generate(
        ["A block", "A token"], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True), use_tqdm=False
    )
    for output in outputs:
        m = output.metrics
        assert m.arrival_time <= m.first_scheduled_time <= m.first_token_time <= m.finished_time
        assert len(m.token_times) == 6 and len(m.itls) == 5 and all(gap > 0 for gap in m.itls)
        assert m.ttft + sum(m.itls) == pytest.approx(m.token_times[-1] - m.arrival_time)
        assert m.tpot == pytest.approx(sum(m.itls) / 5)
        assert m.queue_time <= m.ttft <= m.e2e_latency
    assert outputs[1].metrics.first_scheduled_time >= outputs[0].metrics.finished_time - 1e-3


def test_the_engine_is_driven_by_hand(llm):
    engine = llm.engine
    engine.add_request("x", "A block", SamplingParams(temperature=0, max_tokens=3))
    engine.add_request("y", "A block", SamplingParams(temperature=0, max_tokens=3))
    seen = []
    while engine.has_unfinished_requests():
        seen += [(o.request_id, len(o.outputs[0].token_ids), o.finished) for o in engine.step()]
    assert seen == [("x", 1, False), ("x", 2, False), ("x", 3, True), ("y", 1, False), ("y", 2, False), ("y", 3, True)]
    assert engine.step() == []


def test_abort_returns_what_there_was(llm):
    engine = llm.engine
    engine.add_request("x", "A block", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    for _ in range(3):
        engine.step()
    (output,) = engine.abort_request("x")
    assert output.finished and output.outputs[0].finish_reason == "abort"
    assert len(output.outputs[0].token_ids) == 3
    assert engine.abort_request("x") == [] and not engine.has_unfinished_requests()
    assert engine.core.scheduler.kv.usage().reserved == 0 and len(engine.core.runner.states) == 0
