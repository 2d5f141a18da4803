"""`folovllm info` on every config of transformers: K/V as large as its cache, or "not known" by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from typer.testing import CliRunner

from folovllm.entrypoints.cli import app
from folovllm.entrypoints.model_info import check_decoder, shape_rows

GPT = {"n_layer": 3, "n_head": 4, "n_embd": 64}
USUAL = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
TINY: dict[str, dict[str, Any]] = {  # names of fields differ, and which of them there are
    "gpt2": GPT,
    "gptj": {**GPT, "rotary_dim": 8},
    "codegen": {**GPT, "rotary_dim": 8},
    "gpt_bigcode": {**GPT, "multi_query": True},
    "opt": {**USUAL, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt_neox": USUAL,
    "bloom": {"n_layer": 3, "n_head": 4, "hidden_size": 64},
    "mpt": {"n_layers": 3, "n_heads": 4, "d_model": 64},
    "phi": USUAL,
    "gemma2": {**USUAL, "num_key_value_heads": 2, "head_dim": 24},
    "qwen2": {**USUAL, "num_key_value_heads": 1},
}
NOT_KNOWN = {
    "mamba": "linear_attention", "falcon_mamba": "linear_attention", "jamba": "linear_attention",
    "qwen3_next": "linear_attention", "falcon": "no num_key_value_heads", "rwkv": "num_attention_heads",
    "mllama": "do not all cache the same", "gemma3n": "do not all cache the same", "bert": "is an encoder",
    "bert-generation": "is an encoder", "roberta": "is an encoder",
    "clip": "no decoder of text", "vit": "no decoder of text",
}  # fmt: skip


def info(folder: Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["info", str(folder), "--dtype", "float32"], env={"COLUMNS": "200"})
    assert "Traceback" not in result.output and (result.exception is None or isinstance(result.exception, SystemExit))
    return result.exit_code, " ".join(result.output.split())


def cached_bytes_per_token(config: PretrainedConfig) -> int:
    """What transformers' own cache holds for a token, in float32."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([[1, 2, 3, 4, 5]]), use_cache=True).past_key_values
    return sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values)) // 5


@pytest.mark.parametrize("kind", TINY)
def test_bytes_per_token_are_those_of_the_cache(kind: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(kind, **TINY[kind], vocab_size=128)
    config.save_pretrained(tmp_path)
    status, output = info(tmp_path)
    assert status == 0, output
    assert f"{cached_bytes_per_token(config):,} bytes" in output
    assert re.search(r"layers\W+3 ", output) and re.search(r"hidden size\W+64 ", output) and " 4 query heads" in output


def test_a_latent_is_held_as_keys_and_values_of_every_head(tmp_path: Path) -> None:
    """That M4's pool has as many bytes is tested in tests/m4/test_families.py; transformers' cache holds the latent."""
    latent = {"kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 20}
    AutoConfig.for_model("deepseek_v2", **USUAL, **latent).save_pretrained(tmp_path)
    status, output = info(tmp_path)
    assert status == 0 and f"{3 * 4 * (8 + 12 + 20) * 4:,} bytes" in output
    assert "MLA: 4 query heads, a latent of 16 + 8" in output


def test_the_text_of_a_model_with_images_is_what_counts(tmp_path: Path) -> None:
    text = AutoConfig.for_model("qwen2", **TINY["qwen2"], vocab_size=128)
    AutoConfig.for_model("llava", text_config=text.to_dict()).save_pretrained(tmp_path)
    status, output = info(tmp_path)
    assert status == 0 and f"{cached_bytes_per_token(text):,} bytes" in output


@pytest.mark.parametrize("kind", NOT_KNOWN)
def test_what_no_formula_describes_is_not_known_by_name(kind: str, tmp_path: Path) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    status, output = info(tmp_path)
    assert status == 0, output
    assert "not known: " in output and NOT_KNOWN[kind] in output


@pytest.mark.parametrize("kind", ["t5", "bart", "whisper", "encoder-decoder"])
def test_an_encoder_decoder_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "encoder-decoder", "is_encoder_decoder": true, "encoder": {"model_type": "bert"}, '
        '"decoder": {"model_type": "bert"}}'
        if kind == "encoder-decoder"
        else f'{{"model_type": "{kind}"}}'
    )
    status, output = info(tmp_path)
    assert status == 2 and f"error: model_type='{kind}' is an encoder-decoder" in output


def test_every_config_of_transformers_has_a_table_or_one_line() -> None:
    shown = 0
    for kind in CONFIG_MAPPING_NAMES:
        try:
            config = AutoConfig.for_model(kind)
        except Exception:  # some need more than their name
            continue
        try:
            check_decoder(config)
        except ValueError as error:
            assert str(error).startswith(f"model_type={config.model_type!r} ")
            continue
        rows = shape_rows(config, torch.float32)
        assert re.match(r"[\d,]+ bytes|not known: .", rows["KV cache per token"]), kind
        shown += 1
    assert shown > 100
