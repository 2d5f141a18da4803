"""generation_config.json: the parameters of requests that have none, at all milestones; or a refusal by name.

The right tokens are those of transformers' `generate`, which obeys the file.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from folovllm import LLM, SamplingParams
from folovllm.config import MILESTONES
from folovllm.engine.generation_defaults import CHANGE_GREEDY_TEXT, CHANGE_SAMPLES, COUNTERPARTS
from folovllm.models.loader import resolve_model
from tests.oracle import OracleStats, assert_same_tokens, hf_greedy, random_prompt, tiny_model

PROMPT = random_prompt(9, seed=1)  # greedy text repeats tokens of this prompt and of its own
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
SAMPLED: dict[str, Any] = {"do_sample": True, "max_new_tokens": 12}
HALF = list(range(1, 128, 2))  # so many EOS ids that a random model soon samples one


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model("qwen3").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    shutil.copytree(checkpoint, tmp_path / "model")
    return tmp_path / "model"


def write(folder: Path, name: str = "generation_config.json", **fields: Any) -> None:
    (folder / name).write_text(json.dumps(fields))


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def hf_tokens(model: PreTrainedModel, prompt: list[int] = PROMPT, **kwargs: Any) -> list[int]:
    """What `generate` makes of the prompt with the model's own generation_config."""
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **kwargs)[0, len(prompt) :].tolist()


def make_llm(folder: Path, milestone: str, **kwargs: Any) -> LLM:
    options = {"dtype": "float32", "device": "cpu", "num_kv_blocks": 40, "max_model_len": 128} | kwargs
    return LLM(str(folder), milestone=milestone, **options)


def tokens_of(llm: LLM, params: SamplingParams | None = None, prompt: list[int] = PROMPT) -> list[int]:
    return llm.generate([prompt, prompt[:3]], params, use_tqdm=False)[0].outputs[0].token_ids


# --- requests without parameters ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        GREEDY,
        {**GREEDY, "repetition_penalty": 1.5},
        {**GREEDY, "repetition_penalty": 0.7},
        {**GREEDY, "eos_token_id": HALF},
        {**GREEDY, "eos_token_id": HALF, "min_new_tokens": 7},
        {**GREEDY, "eos_token_id": HALF, "min_new_tokens": 5, "min_length": 99, "repetition_penalty": 1.2},
        {**GREEDY, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.5},  # of no effect
        {**SAMPLED, "top_k": 1},  # samples, from one token
        {**SAMPLED, "top_p": 1e-6},
        {**SAMPLED, "min_p": 1.0, "temperature": 1.5},
        {**SAMPLED, "top_k": 1, "repetition_penalty": 1.5},
        {**GREEDY, **{name: values[0] for name, values in CHANGE_GREEDY_TEXT.items() if values and values[0] != []}},
        {**GREEDY, "max_length": 5, "renormalize_logits": True, "length_penalty": 3.0, "use_cache": False},
    ],
    ids=lambda fields: ", ".join(f"{k}={v}" for k, v in fields.items() if k not in ("max_new_tokens", "eos_token_id"))[
        :80
    ],
)
def test_without_parameters_all_milestones_generate_what_hugging_face_does(
    folder: Path, fields: dict[str, Any], oracle_stats: OracleStats
) -> None:
    write(folder, **fields)
    model = loaded(folder)
    expected = hf_tokens(model)
    for milestone in MILESTONES:
        assert_same_tokens(tokens_of(make_llm(folder, milestone)), expected, model, PROMPT, oracle_stats)


def test_without_the_file_config_json_counts(folder: Path, oracle_stats: OracleStats) -> None:
    (folder / "generation_config.json").unlink()
    write(folder, "config.json", **json.loads((folder / "config.json").read_text()), **GREEDY, repetition_penalty=1.5)
    model = loaded(folder)
    assert model.generation_config.repetition_penalty == 1.5
    expected = hf_tokens(model)
    for milestone in MILESTONES:
        assert_same_tokens(tokens_of(make_llm(folder, milestone)), expected, model, PROMPT, oracle_stats)


def test_stop_strings(tmp_path: Path, oracle_stats: OracleStats) -> None:
    shutil.copytree(resolve_model("folo-tiny").path_or_id, tmp_path / "model")
    write(tmp_path / "model", do_sample=False, max_new_tokens=60, stop_strings=["memory", "cach"], eos_token_id=[2, 0])
    model, tokenizer = loaded(tmp_path / "model"), AutoTokenizer.from_pretrained(tmp_path / "model")
    prompt = tokenizer("The KV")["input_ids"]
    expected = hf_tokens(model, prompt, tokenizer=tokenizer)
    assert len(expected) < 60
    for milestone in MILESTONES:
        llm = make_llm(tmp_path / "model", milestone)
        assert_same_tokens(tokens_of(llm, prompt=prompt), expected, model, prompt, oracle_stats)


def test_a_stop_string_that_is_a_special_token(tmp_path: Path, oracle_stats: OracleStats) -> None:
    """`generate` finds it, and the text does not show it."""
    shutil.copytree(resolve_model("folo-tiny").path_or_id, tmp_path / "model")
    write(tmp_path / "model", do_sample=False, max_new_tokens=150, stop_strings=["<|im_end|>", "zzz"], eos_token_id=[0])
    model, tokenizer = loaded(tmp_path / "model"), AutoTokenizer.from_pretrained(tmp_path / "model")
    talk = [{"role": "user", "content": "What is a KV cache?"}]
    prompt = tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
    expected = hf_tokens(model, prompt, tokenizer=tokenizer)
    assert expected[-1] == 2 and len(expected) < 150
    for milestone in MILESTONES:
        llm = make_llm(tmp_path / "model", milestone)
        params = llm.get_default_sampling_params()
        assert (params.stop, params.stop_token_ids) == (["zzz"], [2])
        assert_same_tokens(tokens_of(llm, prompt=prompt), expected, model, prompt, oracle_stats)


def test_the_bundled_model_has_the_defaults_of_sampling_params() -> None:
    assert make_llm(Path("folo-tiny"), "m4").get_default_sampling_params() == SamplingParams()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, SamplingParams()),
        ({"temperature": 0.6, "top_p": 0.9}, SamplingParams(temperature=0.6, top_p=0.9)),  # as in vLLM: no do_sample
        ({"do_sample": True, "top_k": 20}, SamplingParams(top_k=20)),
        ({"do_sample": False}, SamplingParams(temperature=0)),
        ({"min_new_tokens": 30}, SamplingParams(min_tokens=30, max_tokens=30)),
        ({"min_new_tokens": 3}, SamplingParams(min_tokens=3)),
        ({"max_new_tokens": 300}, SamplingParams(max_tokens=300)),
    ],
)
def test_the_defaults_of_a_file(folder: Path, fields: dict[str, Any], expected: SamplingParams) -> None:
    write(folder, **fields)
    assert make_llm(folder, "m4").get_default_sampling_params() == expected
    assert make_llm(folder, "m4", generation_config="vllm").get_default_sampling_params() == SamplingParams()


# --- explicit parameters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("milestone", MILESTONES)
def test_explicit_parameters_are_taken_as_they_stand_with_one_warning(
    folder: Path, milestone: str, caplog: pytest.LogCaptureFixture, oracle_stats: OracleStats
) -> None:
    write(folder, **GREEDY, repetition_penalty=1.5, top_p=0.9)
    model = loaded(folder)
    llm = make_llm(folder, milestone)
    with caplog.at_level(logging.WARNING, "folovllm"):
        for _ in range(2):
            found = tokens_of(llm, SamplingParams(temperature=0, max_tokens=10))
            assert_same_tokens(found, hf_greedy(model, PROMPT, 10), model, PROMPT, oracle_stats)
    (record,) = [r for r in caplog.records if r.name.startswith("folovllm")]
    assert "override repetition_penalty=1.5, max_new_tokens=12 of the generation_config.json" in record.getMessage()


def test_explicit_parameters_that_say_the_same_need_no_warning(
    folder: Path, caplog: pytest.LogCaptureFixture, oracle_stats: OracleStats
) -> None:
    write(folder, **GREEDY, repetition_penalty=1.5, stop_strings=None)
    model = loaded(folder)
    with caplog.at_level(logging.WARNING, "folovllm"):
        llm = make_llm(folder, "m4")
        found = tokens_of(llm, SamplingParams(temperature=0, max_tokens=12, repetition_penalty=1.5))
        tokens_of(llm)
    assert_same_tokens(found, hf_tokens(model), model, PROMPT, oracle_stats)
    assert [r for r in caplog.records if r.name.startswith("folovllm")] == []


# --- what has no counterpart --------------------------------------------------------------------------------

FIRST = 6  # of greedy text
NO_COUNTERPART: dict[str, Any] = {
    "num_beams": 8,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[FIRST]],
    "sequence_bias": [[[FIRST], -50.0]],
    "suppress_tokens": [FIRST],
    "begin_suppress_tokens": [FIRST],
    "forced_eos_token_id": 5,
    "min_length": 25,
    "exponential_decay_length_penalty": [1, 50.0],
    "encoder_repetition_penalty": 3.0,
    "encoder_no_repeat_ngram_size": 1,
    "guidance_scale": 3.0,
    "watermarking_config": {"bias": 50.0, "seeding_scheme": "lefthash"},
}
UNSEEN = {"forced_bos_token_id": 5, "max_time": 1.0, "penalty_alpha": 0.6, "dola_layers": "high", "token_healing": True}
UNSEEN |= {"cache_implementation": "quantized", "force_words_ids": [[5]], "constraints": [5], "num_beam_groups": 2}


@pytest.mark.parametrize(("name", "value"), NO_COUNTERPART.items())
def test_what_changes_hugging_faces_greedy_text_is_refused(
    folder: Path, name: str, value: Any, oracle_stats: OracleStats
) -> None:
    eos = {"min_length": HALF, "exponential_decay_length_penalty": [3]}.get(name, [])
    write(folder, **GREEDY, eos_token_id=eos or None, **{name: value})
    model = loaded(folder)
    plain = hf_greedy(model, PROMPT, 12, eos)
    assert (plain[0], hf_tokens(model) == plain) == (FIRST, False)  # the refusal is not for nothing
    (folder / "model.safetensors").rename(folder / "later")  # no weight is read before
    for milestone in MILESTONES:
        with pytest.raises(ValueError, match=r"generation_config\.json cannot be followed: ") as caught:
            make_llm(folder, milestone)
        assert f"{name}={value!r} changes the text" in str(caught.value) or name == "watermarking_config"
        assert f" {name}=" in str(caught.value) and "generation_config='vllm' leaves" in str(caught.value)
    (folder / "later").rename(folder / "model.safetensors")
    params = SamplingParams(temperature=0, max_tokens=12)
    for milestone in MILESTONES:
        found = tokens_of(make_llm(folder, milestone, generation_config="vllm"), params)
        assert_same_tokens(found, plain, model, PROMPT, oracle_stats)


@pytest.mark.parametrize(("name", "value"), UNSEEN.items())
def test_so_is_what_this_model_cannot_show(folder: Path, name: str, value: Any) -> None:
    write(folder, **{name: value})
    with pytest.raises(ValueError, match=f"cannot be followed: {name}="):
        make_llm(folder, "m4")
    make_llm(folder, "m4", generation_config="vllm")


@pytest.mark.parametrize(
    ("name", "value"), [("typical_p", 0.5), ("top_h", 0.5), ("epsilon_cutoff", 1e-3), ("eta_cutoff", 1e-3)]
)
def test_what_changes_samples_is_refused_where_the_file_samples(folder: Path, name: str, value: float) -> None:
    write(folder, do_sample=True, **{name: value})
    with pytest.raises(ValueError, match=f"cannot be followed: {name}={value}"):
        make_llm(folder, "m4")
    write(folder, do_sample=False, **{name: value})
    assert make_llm(folder, "m4").get_default_sampling_params() == SamplingParams(temperature=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 3.0}, "temperature=3.0 is not valid; allowed: a number in [0, 2]"),
        ({"top_p": 0.0}, "top_p=0.0 is not valid"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 is not valid"),
        ({"max_new_tokens": 5, "min_new_tokens": 6}, "min_tokens=6 is not valid"),
    ],
)
def test_a_value_that_sampling_params_refuses_is_named(folder: Path, fields: dict[str, Any], message: str) -> None:
    write(folder, **fields)
    with pytest.raises(ValueError) as caught:
        make_llm(folder, "m4")
    assert message in str(caught.value) or "cannot load generation_config.json" in str(caught.value)


NO_CHANGE = {
    # ids and lengths, which the engine takes from elsewhere
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_length", "num_return_sequences",
    # of beams alone
    "early_stopping", "length_penalty", "diversity_penalty", "low_memory",
    # of drafts, which a greedy model accepts only where it agrees
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "assistant_early_exit", "assistant_lookbehind", "assistant_ensemble_weight", "target_lookbehind",
    "prompt_lookup_num_tokens", "max_matching_ngram_size", "speculation_type", "use_mtp",
    # how it is computed, and what is returned beside the text
    "use_cache", "cache_config", "cache_implementation", "max_cache_len", "prefill_chunk_size", "compile_config",
    "disable_compile", "continuous_batching_config", "output_attentions", "output_hidden_states", "output_scores",
    "output_logits", "return_dict_in_generate", "remove_invalid_values", "renormalize_logits", "transformers_version",
}  # fmt: skip


def test_every_field_of_transformers_is_judged() -> None:
    judged = {*COUNTERPARTS, *CHANGE_GREEDY_TEXT, *CHANGE_SAMPLES, *NO_CHANGE, "do_sample"}
    assert {name for name in vars(GenerationConfig()) if not name.startswith("_")} - judged == set()
    assert set(NO_COUNTERPART) | set(UNSEEN) - {"cache_implementation"} == set(CHANGE_GREEDY_TEXT)


# --- the option ---------------------------------------------------------------------------------------------


def test_a_folder_takes_the_place_of_the_models_file(folder: Path, tmp_path: Path, oracle_stats: OracleStats) -> None:
    write(folder, **GREEDY, no_repeat_ngram_size=2)
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", **GREEDY, repetition_penalty=1.3, eos_token_id=HALF)
    model = loaded(folder)
    model.generation_config = GenerationConfig.from_pretrained(tmp_path / "other")
    for milestone in MILESTONES:
        llm = make_llm(folder, milestone, generation_config=str(tmp_path / "other"))
        assert_same_tokens(tokens_of(llm), hf_tokens(model), model, PROMPT, oracle_stats)


def test_eos_ids_are_the_files_in_any_case(folder: Path) -> None:
    write(folder, eos_token_id=[7, 9])
    for option in ("auto", "vllm"):
        assert make_llm(folder, "m4", generation_config=option).engine.eos_token_ids == (7, 9)


@pytest.mark.parametrize("value", ["", None, 5, "/no/such/folder", "folovllm"])
def test_another_value_is_refused(folder: Path, value: Any) -> None:
    with pytest.raises(ValueError, match=r"generation_config=.* is not valid; allowed: 'auto', 'vllm' or a folder"):
        make_llm(folder, "m4", generation_config=value)


def test_a_damaged_file_of_another_folder_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config=.* is not valid; allowed: a file that can be read"):
        make_llm(folder, "m4", generation_config=str(tmp_path))
