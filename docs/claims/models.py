"""The models whose sizes the course quotes: bundled configurations, and shapes as the models' papers give them."""

from __future__ import annotations

from functools import cache

from transformers import DeepseekV2Config, GemmaConfig, LlamaConfig, PretrainedConfig

from folovllm.models.loader import load_config, resolve_model

BYTES_16_BIT = 2


@cache
def bundled(name: str) -> PretrainedConfig:
    """The configuration that comes with the package under this name."""
    return load_config(resolve_model(name))


# Touvron et al. 2023 (arXiv:2307.09288) and the models' config.json.
LLAMA_2_7B = LlamaConfig(
    vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32
)
LLAMA_2_13B = LlamaConfig(
    vocab_size=32_000, hidden_size=5120, intermediate_size=13_824, num_hidden_layers=40, num_attention_heads=40
)
LLAMA_2_70B = LlamaConfig(
    vocab_size=32_000,
    hidden_size=8192,
    intermediate_size=28_672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)

# Gemma Team 2024 (arXiv:2403.08295), table 1: one KV head.
GEMMA_2B = GemmaConfig(
    hidden_size=2048,
    intermediate_size=16_384,
    num_hidden_layers=18,
    num_attention_heads=8,
    num_key_value_heads=1,
    head_dim=256,
)

# DeepSeek-AI 2024 (arXiv:2405.04434): 60 layers, 128 heads of 128, a latent of 512 and a rotary key of 64.
DEEPSEEK_V2 = DeepseekV2Config(
    num_hidden_layers=60, num_attention_heads=128, kv_lora_rank=512, qk_rope_head_dim=64, hidden_size=5120
)
# The same heads if each kept its own K and V, and if all shared one.
DEEPSEEK_V2_AS_MHA = LlamaConfig(
    num_hidden_layers=60, num_attention_heads=128, num_key_value_heads=128, head_dim=128, hidden_size=5120
)
DEEPSEEK_V2_AS_MQA = LlamaConfig(
    num_hidden_layers=60, num_attention_heads=128, num_key_value_heads=1, head_dim=128, hidden_size=5120
)
