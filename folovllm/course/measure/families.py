"""Which families of Hugging Face decoders run at which milestone, on a tiny model of each.

`python -m folovllm.course.measure families` writes `results/families.json`.

families: model_type -> milestone -> "same tokens" (as `generate`, for requests that run side by side), "other tokens",
or the refusal. The models have random weights and two layers; their shapes are chosen so that what a family has of its
own (windows, caps, sinks, keys and values of two sizes) is on, and changes tokens if it is forgotten.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from folovllm import LLM, SamplingParams
from folovllm.config import MILESTONES
from folovllm.course.bench.rounds import provenance
from folovllm.course.measure.measuring import CPU, random_tokens
from folovllm.runner.hf.check import generate_alone

SAME, OTHER = "same tokens", "other tokens"
PROMPTS = [random_tokens(100, 128)[:length] for length in (3, 9, 17)]
NEW_TOKENS = 6

FIELDS: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GQA = {"num_key_value_heads": 2, "intermediate_size": 96}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SLIDING_THEN_FULL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
MLA = {  # multi-head latent attention: keys of 24 numbers, values of 12
    "num_key_value_heads": 4, "intermediate_size": 96, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 12,
}  # fmt: skip
MLA_EXPERTS = {
    **MLA, **EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1
}  # fmt: skip
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # for configs that insist on them
# What each adds to `FIELDS`; all fields that only change numbers are set so that forgetting one changes tokens.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GQA,
    "mistral": {**GQA, "sliding_window": 6, "head_dim": 24},
    "qwen3": {**GQA, "head_dim": 24},
    "qwen2": {**GQA, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3_moe": {**GQA, **EXPERTS, "head_dim": 24},
    "qwen2_moe": {  # its window is in the mask only
        **GQA, **EXPERTS, **SLIDING_THEN_FULL, "use_sliding_window": True, "shared_expert_intermediate_size": 32
    },
    "mixtral": {**GQA, **EXPERTS, "sliding_window": None},
    "phimoe": {**GQA, **EXPERTS, "sliding_window": 6},  # its window is in the mask only
    "gemma": {**GQA, "head_dim": 24},
    "gemma2": {  # scores and logits are capped
        **GQA, **SLIDING_THEN_FULL, "head_dim": 24, "query_pre_attn_scalar": 13, "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {**GQA, **SLIDING_THEN_FULL, "head_dim": 24, "query_pre_attn_scalar": 13},  # two RoPEs
    "gpt_oss": {**GQA, **EXPERTS, **SLIDING_THEN_FULL, "head_dim": 16},  # sinks
    "deepseek_v2": MLA_EXPERTS,
    "deepseek_v3": MLA_EXPERTS,
    "phi": GQA,  # a part of each head is rotated; the head has a bias
    "phi3": GQA,
    "olmo2": GQA,
    "smollm3": {**GQA, "no_rope_layers": [1, 0]},  # the second layer knows no positions
    "granite": {  # everything is multiplied by something
        **GQA, "logits_scaling": 3.0, "attention_multiplier": 0.2, "embedding_multiplier": 5.0,
        "residual_multiplier": 0.6,
    },
    "glm4": {**GQA, "head_dim": 16},
    "cohere2": {**GQA, **SLIDING_THEN_FULL, "logit_scale": 0.3},  # attention beside the MLP, and no RoPE without window
    "starcoder2": {**GQA, "sliding_window": 6},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},  # learned positions
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False},  # learned, from 2 on
    "gpt_neox": {"intermediate_size": 96},
    "granite_swa": {**GQA, **SLIDING_THEN_FULL},  # sinks
    "ministral": {**GQA, "head_dim": 16, "sliding_window": 6},
    "minicpm3": {**MLA, "head_dim": 24},
    "youtu": MLA,
    "glm4_moe_lite": MLA_EXPERTS,
    "cwm": {**GQA, **IDS, "sliding_window": 6},
    "modernbert-decoder": {**IDS, "intermediate_size": 96, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 12},
    "helium": {**GQA, "head_dim": 16},
    "hunyuan_v1_dense": {**GQA, "head_dim": 16},
    "ctrl": {},
    "gpt_bigcode": {},
    # Their attention is not the replaceable one, or is not called once a layer with K/V of one shape.
    "bloom": {},
    "falcon": {"alibi": False},
    "mpt": {},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "xglm": {},
    "nemotron": {**GQA, "head_dim": 16},
    "stablelm": GQA,
    "diffllama": GQA,
    "mimo_v2_flash": {**GQA, **EXPERTS},
    "gemma4_unified_text": {**GQA, **EXPERTS},
    "hrm_text": GQA,
    "doge": {**GQA, "keep_window_size": 8},  # from 8 tokens on it attends to some, and padding would take their places
    # Layers with a running state, or that start again at some position, or select tokens.
    "llama4_text": {**GQA, **EXPERTS},
    "mamba": {},
    "falcon_h1": GQA,
    "qwen3_5_text": {**GQA, "num_hidden_layers": 4},
    "deepseek_v32": {**MLA_EXPERTS, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8},
    "rwkv": {},
    "openai-gpt": {},  # no KV cache
}  # fmt: skip
# Families that take the fields of any other one.
PLAIN = (
    "afmoe", "apertus", "arcee", "aria_text", "beam", "biogpt", "bitnet", "cohere", "cohere2_moe", "ernie4_5",
    "ernie4_5_moe", "exaone4", "exaone_moe", "flex_olmo", "flint", "glm", "glm4_moe", "granitemoe", "granitemoe_swa",
    "granitemoeshared", "hy_v3", "hyperclovax", "internlm3", "iquestcoder", "jais2", "jetmoe", "kolibri1", "laguna",
    "lfm2", "mellum", "minimax_m2", "ministral3", "nanochat", "olmo", "olmo3", "olmoe", "persimmon", "seed_oss",
    "solar_open", "vaultgemma",
)  # fmt: skip
FAMILIES |= {name: {**GQA, **EXPERTS, **FAMILIES.get(name, {})} for name in PLAIN}


def build(name: str, seed: int = 3, **overrides: Any) -> PreTrainedModel:
    """A tiny model of a family in float32, all of whose parameters are random: also biases, norms and sinks."""
    config = AutoConfig.for_model(name, **{**FIELDS, **FAMILIES.get(name, GQA), **overrides})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in sorted(model.named_parameters()):
        centre = float(parameter.dim() == 1 and key.endswith("weight"))  # of a norm's weight
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * FIELDS["initializer_range"] + centre)
    return model.eval()


def served(folder: Path, milestone: str) -> list[list[int]] | str:
    """The tokens of all prompts, side by side, or the refusal."""
    sizes: dict[str, Any] = {"block_size": 4, "num_kv_blocks": 32} if MILESTONES[milestone].paged else {}
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    try:
        llm = LLM(str(folder), milestone=milestone, dtype="float32", device="cpu", num_threads=1, **sizes)
    except ValueError as error:
        return str(error)
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, params, use_tqdm=False)]


def families(console: Console, _: int, __: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Each family at each milestone."""
    rows: dict[str, dict[str, str]] = {}
    for name in FAMILIES:
        model = build(name)
        expected = [generate_alone(model, prompt, NEW_TOKENS)[0] for prompt in PROMPTS]
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            found = {milestone: served(Path(folder), milestone) for milestone in MILESTONES}
        rows[name] = {
            milestone: tokens if isinstance(tokens, str) else SAME if tokens == expected else OTHER
            for milestone, tokens in found.items()
        }
        console.print(name, [row if row in (SAME, OTHER) else "refused" for row in rows[name].values()])
    return [
        ("families", {**provenance(CPU), "command": "python -m folovllm.course.measure families", "families": rows})
    ]
