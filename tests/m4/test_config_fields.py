"""A field of config.json counts only if the architecture reads it: one answer at M0 to M4, or a refusal by name.

The right tokens are those of transformers' model without a cache. Not of its `generate`: that makes a cache from the
config, which drops tokens by a `sliding_window` that the model's own code does not know.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GemmaConfig, GPT2Config, PreTrainedModel

from folovllm import LLM, SamplingParams, baseline
from folovllm.config import MILESTONES
from tests.oracle import OracleStats, assert_same_tokens, random_prompt, randomize, tiny_config, tiny_model

PROMPT = random_prompt(30)
NUM_TOKENS = 8
WINDOW = {"sliding_window": 6}
ALL_SLIDE = {**WINDOW, "layer_types": ["sliding_attention"] * 2}
MIXED = {**WINDOW, "layer_types": ["full_attention", "sliding_attention"]}
ROPE: dict[str, Any] = {"rope_theta": 10000.0}
LINEAR = {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4.0}}
YARN = {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}
DYNAMIC = {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 4.0}}
DEFAULT = {"rope_parameters": {**ROPE, "rope_type": "default"}}

# family, what the model is made with, what is written into its config.json afterwards
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {}, WINDOW),
    ("llama", {}, ALL_SLIDE),
    ("llama", {}, {**WINDOW, "use_sliding_window": True, "max_window_layers": 0}),
    ("llama", {}, {"attention_chunk_size": 4}),
    ("llama", {}, {"attention_dropout": 0.5}),
    ("llama", {}, {"final_logit_softcapping": 1.0, "attn_logit_softcapping": 1.0, "logit_scale": 0.1}),
    ("llama", {}, {"query_pre_attn_scalar": 7, "use_qk_norm": True, "residual_multiplier": 0.5, "use_cache": False}),
    ("llama", DEFAULT, {"partial_rotary_factor": 0.5}),
    ("llama", {"attention_bias": True}, {}),
    ("llama", {"mlp_bias": True}, {}),
    ("llama", {"head_dim": 24}, {}),
    ("llama", {"num_key_value_heads": 4}, {}),
    ("llama", {"hidden_act": "gelu"}, {}),
    ("llama", LINEAR, {}),
    ("llama", YARN, {}),
    ("llama", DYNAMIC, {}),
    ("mistral", {}, {"attention_bias": True, "mlp_bias": True}),
    ("mistral", {}, {"layer_types": ["full_attention", "full_attention"]}),
    ("mistral", {"sliding_window": None}, {"use_sliding_window": True, "max_window_layers": 0}),
    ("mistral", {}, {"partial_rotary_factor": 0.5}),
    ("qwen2", {}, {"use_sliding_window": False, **WINDOW, "max_window_layers": 0}),
    ("qwen2", {}, {"use_sliding_window": True, **WINDOW, "max_window_layers": 1, "layer_types": None}),
    ("qwen2", {"use_sliding_window": True, **MIXED}, {}),
    ("qwen2", {}, {"attention_bias": False, "mlp_bias": True}),
    ("qwen2", {"head_dim": 24}, {}),
    ("qwen3", {}, {"mlp_bias": True, "partial_rotary_factor": 0.25}),
    ("qwen3", {"attention_bias": True}, {}),
    ("qwen3", {"use_sliding_window": True, **ALL_SLIDE}, {}),
    ("qwen3", {}, {"use_sliding_window": False, **WINDOW, "max_window_layers": 0}),
]


@cache
def shared_model(family: str, made_with: str) -> PreTrainedModel:
    return tiny_model(family, **json.loads(made_with))


def save(folder: Path, family: str, made_with: dict[str, Any], written: dict[str, Any]) -> None:
    """A checkpoint whose config.json then gets the fields `written`; layer_types=None takes them away."""
    shared_model(family, json.dumps(made_with)).save_pretrained(folder)
    file = folder / "config.json"
    fields = json.loads(file.read_text()) | written
    if fields.get("layer_types", ()) is None:
        del fields["layer_types"]
    file.write_text(json.dumps(fields))


def tokens_without_cache(model: PreTrainedModel) -> list[int]:
    text = list(PROMPT)
    with torch.no_grad():
        for _ in range(NUM_TOKENS):
            text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[len(PROMPT) :]


def make_llm(folder: Path, milestone: str, **kwargs: Any) -> LLM:
    return LLM(str(folder), milestone=milestone, dtype="float32", device="cpu", num_kv_blocks=20, **kwargs)


def name_of(case: tuple[str, dict[str, Any], dict[str, Any]]) -> str:
    values = {k: v["rope_type"] if isinstance(v, dict) else v for k, v in {**case[1], **case[2]}.items()}
    return f"{case[0]}: " + ", ".join(f"{k}={v}" for k, v in values.items())


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_all_milestones_read_a_config_as_the_model_does(
    tmp_path: Path, case: tuple[str, dict[str, Any], dict[str, Any]], oracle_stats: OracleStats
) -> None:
    save(tmp_path, *case)
    check(tmp_path, oracle_stats)


def check(folder: Path, oracle_stats: OracleStats) -> None:
    """M0 to M4 generate what the model without a cache does."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = tokens_without_cache(model)
    found = {"m0": baseline.generate_cached(model, PROMPT, NUM_TOKENS).token_ids}
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    for milestone in MILESTONES:
        # A shorter neighbour brings padding at M2, and a second request into M3's and M4's flat steps.
        llm = make_llm(folder, milestone)
        found[milestone] = llm.generate([PROMPT, PROMPT[:5]], params, use_tqdm=False)[0].outputs[0].token_ids
    for token_ids in found.values():
        assert_same_tokens(token_ids, expected, model, PROMPT, oracle_stats)


@pytest.mark.parametrize("family", ["gemma", "granite", "olmo2"])
def test_families_on_the_transformers_way_ignore_a_window_as_well(
    tmp_path: Path, family: str, oracle_stats: OracleStats
) -> None:
    fields = {k: v for k, v in tiny_config("llama").to_dict().items() if k not in ("model_type", "architectures")}
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields | DEFAULT))
    randomize(made)
    made.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | ALL_SLIDE))
    check(tmp_path, oracle_stats)


@pytest.mark.parametrize("milestone", ["m1", "m4"])
def test_a_padding_id_without_a_row_matters_only_to_families_that_look_it_up(tmp_path: Path, milestone: str) -> None:
    fields = {"vocab_size": 128, "pad_token_id": 128, "bos_token_id": None, "eos_token_id": None}
    GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, **fields).save_pretrained(tmp_path / "gpt2")
    (llm, params) = make_llm(tmp_path / "gpt2", milestone, load_format="dummy"), SamplingParams(max_tokens=3)
    assert len(llm.generate([PROMPT], params, use_tqdm=False)[0].outputs[0].token_ids) == 3
    gemma = GemmaConfig(hidden_size=32, num_hidden_layers=1, **fields | {"pad_token_id": 0})
    AutoModelForCausalLM.from_config(gemma).save_pretrained(tmp_path / "gemma")
    file = tmp_path / "gemma" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(ValueError, match="Padding_idx must be within num_embeddings"):
        make_llm(tmp_path / "gemma", milestone)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"is_causal": False}, "is_causal=False is not valid; allowed: True"),
    ("qwen3", {"is_causal": False}, "is_causal=False is not valid; allowed: True"),
    ("llama", {"pad_token_id": 128}, "pad_token_id=128 is not valid; allowed: an id below vocab_size=128"),
    ("mistral", {"sliding_window": 0}, "sliding_window=0 is not valid; allowed: an integer >= 1"),
    ("mistral", {"sliding_window": -1}, "sliding_window=-1 is not valid; allowed: an integer >= 1"),
    ("qwen2", {**ALL_SLIDE, "use_sliding_window": False}, "sliding_window=None is not valid; allowed: an integer >= 1"),
    ("qwen3", {**MIXED, "use_sliding_window": False}, "sliding_window=None is not valid; allowed: an integer >= 1"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 2}, "layers of type ['chunked_attention']"),
    (
        "llama",
        {"partial_rotary_factor": 0.5},
        "partial_rotary_factor=0.5 is not valid; allowed: 1.0 with rope_type='llama3'",
    ),
    ("llama", {**LINEAR, "partial_rotary_factor": 0.5}, "allowed: 1.0 with rope_type='linear'"),
    ("qwen2", {"head_dim": None}, "cannot load"),  # transformers takes the missing number for the head's size
    ("llama", {"rope_parameters": {**ROPE, "rope_type": "other"}}, "cannot load"),
]


@pytest.mark.parametrize("milestone", MILESTONES)
@pytest.mark.parametrize(("family", "written", "message"), REFUSED)
def test_all_milestones_refuse_a_field_that_none_can_follow(
    tmp_path: Path, family: str, written: dict[str, Any], message: str, milestone: str
) -> None:
    save(tmp_path, family, {}, written)
    with pytest.raises(ValueError, match=r".") as caught:
        make_llm(tmp_path, milestone)
    assert message in str(caught.value)
