"""KV bytes and FLOPs against published shapes, real Hugging Face caches and models, and brute-force sums."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    DynamicCache,
    FalconConfig,
    Gemma3nTextConfig,
    GPT2Config,
    GPTBigCodeConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from folovllm.course.lessons.formulas import (
    DENSE_MODEL_TYPES,
    attention_flops_per_token,
    attention_pairs_cached,
    attention_pairs_recompute,
    attention_ratio,
    generation_flops,
    linear_flops_per_token,
    linear_params,
    linear_ratio,
    linear_tokens_cached,
    linear_tokens_recompute,
    lm_head_params,
)
from folovllm.kv_cache.formulas import (
    attention_kind,
    kv_bytes,
    kv_bytes_per_token,
    kv_values_per_layer,
)
from tests.oracle import FAMILIES, tiny_config

KIB, MIB, GIB = 2**10, 2**20, 2**30

# Shapes as in the models' published config.json files.
LLAMA_2_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
)
LLAMA_2_13B = LlamaConfig(
    hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, vocab_size=32000
)
LLAMA_2_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=32000,
)
QWEN_25_05B = Qwen2Config(
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    vocab_size=151936,
    tie_word_embeddings=True,
)
QWEN_3_06B = Qwen3Config(
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    tie_word_embeddings=True,
)
MISTRAL_7B = MistralConfig(hidden_size=4096, intermediate_size=14336, num_key_value_heads=8, vocab_size=32000)


# --- bytes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "kind", "bytes_in_fp16"),
    [
        (LLAMA_2_7B, "MHA", 524_288),
        (LLAMA_2_13B, "MHA", 800 * KIB),
        (LLAMA_2_70B, "GQA", 320 * KIB),
        (QWEN_25_05B, "GQA", 12_288),
        (QWEN_3_06B, "GQA", 114_688),
    ],
    ids=["llama-2-7b", "llama-2-13b", "llama-2-70b", "qwen2.5-0.5b", "qwen3-0.6b"],
)
def test_bytes_per_token_of_known_models(config: PretrainedConfig, kind: str, bytes_in_fp16: int) -> None:
    assert attention_kind(config) == kind
    assert kv_bytes_per_token(config, dtype_bytes=2) == bytes_in_fp16
    assert kv_bytes_per_token(config, dtype_bytes=4) == 2 * bytes_in_fp16


def test_bytes_of_llama_2_7b_texts() -> None:
    assert kv_bytes_per_token(LLAMA_2_7B, 2) == 512 * KIB
    assert kv_bytes(LLAMA_2_7B, 1000, 2) == 500 * MIB
    assert round(kv_bytes(LLAMA_2_7B, 500, 2, num_sequences=10) / GIB, 2) == 2.44
    assert round(kv_bytes(LLAMA_2_7B, 100_000, 2) / GIB, 1) == 48.8


def test_an_mla_entry_is_larger_than_an_mqa_entry_and_far_below_mha() -> None:
    """DeepSeek-V2 (arXiv:2405.04434): 128 heads of 128, a latent of 512, a rotary key of 64."""
    mla = DeepseekV2Config(num_attention_heads=128, kv_lora_rank=512, qk_rope_head_dim=64)
    mqa = LlamaConfig(num_attention_heads=128, num_key_value_heads=1, head_dim=128, hidden_size=128 * 128)
    mha = LlamaConfig(num_attention_heads=128, head_dim=128, hidden_size=128 * 128)
    assert [attention_kind(config) for config in (mla, mqa, mha)] == ["MLA", "MQA", "MHA"]
    assert [kv_values_per_layer(config) for config in (mla, mqa, mha)] == [576, 256, 32_768]


@pytest.mark.parametrize(("kv_heads", "kind"), [(4, "MHA"), (2, "GQA"), (1, "MQA")])
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_equal_those_of_a_real_cache(family: str, kv_heads: int, kind: str) -> None:
    config = tiny_config(family, num_key_value_heads=kv_heads, num_hidden_layers=3)
    if family == "mistral":
        config.sliding_window = None
    assert attention_kind(config) == kind
    for dtype in (torch.float32, torch.bfloat16):
        assert kv_bytes(config, 11, dtype.itemsize, num_sequences=2) == cached_bytes(config, dtype)


@pytest.mark.parametrize("config_class", [DeepseekV2Config, DeepseekV3Config])
def test_mla_bytes_equal_those_of_a_real_cache(config_class: type[PretrainedConfig]) -> None:
    config = config_class(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=24,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=2,
    )
    assert kv_bytes(config, 11, 4, num_sequences=2) == cached_bytes(config, torch.float32)


def cached_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes that Hugging Face caches for a batch of two texts of 11 tokens."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(input_ids=torch.zeros(2, 11, dtype=torch.long), past_key_values=cache, use_cache=True)
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_a_nested_text_config_is_found() -> None:
    nested = LlavaConfig(text_config=QWEN_3_06B.to_dict() | {"model_type": "qwen3"})
    assert attention_kind(nested) == "GQA"
    assert kv_values_per_layer(nested) == 2 * 8 * 128
    assert kv_bytes_per_token(nested, 2) == 114_688
    assert linear_params(nested) == linear_params(QWEN_3_06B)
    assert lm_head_params(nested) == lm_head_params(QWEN_3_06B)
    assert generation_flops(nested, 3, 5, cached=True) == generation_flops(QWEN_3_06B, 3, 5, cached=True)


def test_a_config_without_kv_heads_is_multi_head() -> None:
    config = GPT2Config(n_layer=12, n_head=12, n_embd=768)
    assert attention_kind(config) == "MHA"
    assert kv_bytes_per_token(config, 2) == 2 * 12 * 768 * 2
    assert attention_kind(GPTBigCodeConfig(multi_query=True)) == "MQA"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Qwen3NextConfig(), "linear_attention"),
        (Gemma3nTextConfig(), "do not all cache the same"),
        (FalconConfig(), "no num_key_value_heads"),
        (LlamaConfig(per_layer_config={1: {"num_key_value_heads": 8}}), "do not all cache the same"),
        (LlamaConfig(num_attention_heads=32, num_key_value_heads=5), "num_key_value_heads=5"),
        (LlamaConfig(num_attention_heads=4, hidden_size=64, num_key_value_heads=8), "num_key_value_heads=8"),
    ],
    ids=["linear-attention", "shared-layers", "falcon", "per-layer", "not-a-divisor", "more-kv-heads"],
)
def test_configs_that_the_formula_does_not_describe_are_refused(config: PretrainedConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kv_bytes_per_token(config, 2)


def test_bad_counts_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="dtype_bytes=0"):
        kv_bytes_per_token(LLAMA_2_7B, 0)
    with pytest.raises(ValueError, match="num_tokens=-1"):
        kv_bytes(LLAMA_2_7B, -1, 2)
    with pytest.raises(ValueError, match="num_sequences=-1"):
        kv_bytes(LLAMA_2_7B, 1, 2, num_sequences=-1)
    with pytest.raises(ValueError, match="prompt_len=0"):
        linear_tokens_cached(0, 1)
    with pytest.raises(ValueError, match="n=-1"):
        attention_pairs_recompute(1, -1)
    with pytest.raises(ValueError, match="n=0"):
        linear_ratio(0)
    with pytest.raises(ValueError, match="n=0"):
        attention_ratio(0)
    with pytest.raises(ValueError, match="context=-1"):
        attention_flops_per_token(LLAMA_2_7B, -1)


# --- work: closed forms against sums over the runs --------------------------------------------------------


@given(prompt_len=st.integers(1, 60), n=st.integers(0, 60))
def test_closed_forms_equal_a_walk_through_every_run(prompt_len: int, n: int) -> None:
    tokens_recompute = tokens_cached = pairs_recompute = pairs_cached = 0
    in_cache = 0
    for run in range(n):
        text = prompt_len + run
        tokens_recompute += text
        pairs_recompute += sum(text for _query in range(text))
        fed = text - in_cache
        tokens_cached += fed
        pairs_cached += sum(text for _query in range(fed))
        in_cache = text
    assert linear_tokens_recompute(prompt_len, n) == tokens_recompute
    assert linear_tokens_cached(prompt_len, n) == tokens_cached
    assert attention_pairs_recompute(prompt_len, n) == pairs_recompute
    assert attention_pairs_cached(prompt_len, n) == pairs_cached
    if n:
        assert linear_ratio(n, prompt_len) == pytest.approx(tokens_recompute / tokens_cached)
        assert attention_ratio(n, prompt_len) == pytest.approx(pairs_recompute / pairs_cached)


@pytest.mark.parametrize(("n", "linear", "attention"), [(10, 5.5, 7), (100, 50.5, 67), (1000, 500.5, 667)])
def test_ratios_for_a_prompt_of_one(n: int, linear: float, attention: float) -> None:
    assert linear_ratio(n) == linear == (n + 1) / 2
    assert attention_ratio(n) == attention == (2 * n + 1) / 3


# --- FLOPs of a model ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        LLAMA_2_7B,
        LLAMA_2_70B,
        QWEN_25_05B,
        QWEN_3_06B,
        MISTRAL_7B,
        *(tiny_config(family) for family in FAMILIES),
    ],
    ids=["llama-2-7b", "llama-2-70b", "qwen2.5-0.5b", "qwen3-0.6b", "mistral-7b", *FAMILIES],
)
def test_parameter_counts_equal_those_of_the_model(config: PretrainedConfig) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears = {n: m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert lm_head_params(config) == linears.pop("lm_head")
    assert linear_params(config) == sum(linears.values())


def test_every_dense_family_is_checked_above() -> None:
    assert sorted(DENSE_MODEL_TYPES) == sorted(tiny_config(family).model_type for family in FAMILIES)


def test_attention_is_a_small_share_of_llama_2_7b_until_a_long_context() -> None:
    """At 1000 tokens 2-4 % of a layer (a causal mean of 500 keys, or all 1000); equal near 24.7k keys."""
    linear = linear_flops_per_token(LLAMA_2_7B)
    shares = []
    for context in (500, 1000):
        attention = attention_flops_per_token(LLAMA_2_7B, context)
        shares.append(round(100 * attention / (attention + linear)))
    assert shares == [2, 4]
    crossing = linear / attention_flops_per_token(LLAMA_2_7B, 1)
    assert round(crossing / 1000, 1) == 24.7
    assert round(2 * crossing / 1000) == 49


def test_generation_flops_of_llama_2_7b_by_hand() -> None:
    """Prompt of 3, 2 new tokens. A layer has 4 * 4096^2 + 3 * 4096 * 11008 = 202,375,168 weights."""
    layers, head = 32 * 202_375_168, 4096 * 32000
    recompute = generation_flops(LLAMA_2_7B, 3, 2, cached=False)
    assert recompute.linear == 2 * layers * (3 + 4) + 2 * head * 2
    assert recompute.attention == 4 * 32 * 4096 * (3 * 3 + 4 * 4)
    cached = generation_flops(LLAMA_2_7B, 3, 2, cached=True)
    assert cached.linear == 2 * layers * (3 + 1) + 2 * head * 2
    assert cached.attention == 4 * 32 * 4096 * (3 * 3 + 4)
    assert cached.total == cached.linear + cached.attention


@pytest.mark.parametrize(
    ("config", "message"),
    [(Qwen3MoeConfig(), "qwen3_moe"), (GPT2Config(), "gpt2"), (DeepseekV2Config(), "deepseek_v2")],
    ids=["moe", "gpt2", "mla"],
)
def test_flops_of_other_shapes_are_refused(config: PretrainedConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_params(config)
    with pytest.raises(ValueError, match=message):
        generation_flops(config, 1, 1, cached=True)


def test_grouped_queries_save_bytes_and_not_attention_flops() -> None:
    grouped = LlamaConfig(num_attention_heads=32, num_key_value_heads=8)
    assert kv_bytes_per_token(grouped, 2) * 4 == kv_bytes_per_token(LLAMA_2_7B, 2)
    assert attention_flops_per_token(grouped, 100) == attention_flops_per_token(LLAMA_2_7B, 100)


def test_latent_attention_flops_are_refused() -> None:
    with pytest.raises(ValueError, match="latent attention"):
        attention_flops_per_token(DeepseekV2Config(), 1)


def test_flops_are_refused_where_a_text_outgrows_the_sliding_window() -> None:
    config = tiny_config("mistral", sliding_window=8)
    assert generation_flops(config, 5, 4, cached=True).total > 0  # the last query sees 8 keys
    with pytest.raises(ValueError, match="exceed sliding_window=8"):
        generation_flops(config, 5, 5, cached=True)
