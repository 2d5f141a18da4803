"""Claims of chapter 1: what a KV cache saves, and what it weighs."""

from __future__ import annotations

from transformers import PretrainedConfig

from claims.forms import Form, binary, digits, fixed, ms, plain, power, three
from claims.ledger import Claim, Derived, Measured, Table, measured_table, result
from claims.models import (
    BYTES_16_BIT,
    DEEPSEEK_V2,
    DEEPSEEK_V2_AS_MHA,
    DEEPSEEK_V2_AS_MQA,
    GEMMA_2B,
    LLAMA_2_7B,
    LLAMA_2_13B,
    LLAMA_2_70B,
    bundled,
)
from folovllm.course.lessons.formulas import attention_ratio, generation_flops, linear_ratio
from folovllm.kv_cache.formulas import attention_kind, kv_bytes, kv_bytes_per_token, kv_values_per_layer

HERE = "docs/claims/chapter_1.py"
FORMULAS = "folovllm/course/lessons/formulas.py"
KV_SIZES = "folovllm/kv_cache/formulas.py"
TINY, QWEN = "m0-cache-folo-tiny", "m0-cache-qwen3-0.6b"
MODEL_OF = {TINY: "folo-tiny", QWEN: "qwen3-0.6b"}

LENGTHS = (10, 100, 1000)

SIZES: dict[str, PretrainedConfig] = {
    "Llama-2-7B": LLAMA_2_7B,
    "Llama-2-13B": LLAMA_2_13B,
    "Llama-2-70B": LLAMA_2_70B,
    "Llama-3.2-1B": bundled("llama-3.2-1b"),
    "Qwen3-0.6B": bundled("qwen3-0.6b"),
    "Qwen2.5-0.5B": bundled("qwen2.5-0.5b"),
    "Gemma-2B": GEMMA_2B,
    "DeepSeek-V2": DEEPSEEK_V2,
}


def flop_ratio(file: str, n: int) -> float:
    """FLOPs without a cache over FLOPs with one, for n tokens of the model and the prompt that were measured."""
    config, prompt_len = bundled(MODEL_OF[file]), result(file)["prompt_len"]
    without, cached = (generation_flops(config, prompt_len, n, cached=c) for c in (False, True))
    return without.total / cached.total


def ratio_rows() -> list[list[str]]:
    """Both ratios from a prompt of one token."""
    return [[plain(n), fixed(1)(linear_ratio(n)), three(attention_ratio(n))] for n in LENGTHS]


def size_rows() -> list[list[str]]:
    """What one token takes in models of all four kinds, in 16 bits."""
    rows = []
    for name, config in SIZES.items():
        kind = attention_kind(config)
        latent = kind == "MLA"
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rows.append(
            [
                name,
                kind,
                plain(config.num_hidden_layers),
                plain(config.num_attention_heads),
                "latent" if latent else plain(config.num_key_value_heads or config.num_attention_heads),
                f"{config.kv_lora_rank} + {config.qk_rope_head_dim}" if latent else plain(head_dim),
                plain(kv_bytes_per_token(config, BYTES_16_BIT)),
            ]
        )
    return rows


DIFFERENCES = {
    "token_by_token_with_cache": "the same text token by token, with a cache",
    "lower_triangular": "an explicit lower-triangular mask",
    "decode_sees_all": "a decode step whose row is all True",
    "upper_triangular": "an upper-triangular mask",
    "decode_sees_itself_only": "a decode step whose row is False but for itself",
    "decode_one_position_late": "a decode step at position T instead of T - 1",
}


def difference_rows() -> list[list[str]]:
    """The largest difference of any logit from one plain forward: three ways that agree, three that do not."""
    found = result(TINY)["logit_differences"]
    return [
        [name, power(found[key]) if found[key] < 1e-2 else digits(2)(found[key])] for key, name in DIFFERENCES.items()
    ]


TABLES: dict[str, Table] = {
    "m0-timing-qwen3": measured_table(
        "M0 with and without a cache, shape of Qwen3-0.6B",
        f"{QWEN}/summary",
        "new tokens",
        {
            "ms per token without": ("recompute_seconds_per_token", ms),
            "ms per token with": ("cached_seconds_per_token", ms),
            "ratio of times": ("time_ratio", "range .2g"),
            "ratio of FLOPs": lambda n: three(flop_ratio(QWEN, int(n))),
        },
        {str(n): plain(n) for n in result(QWEN)["new_tokens"]},
    ),
    "recompute-ratios": Table(
        "work without a cache over work with one, from a prompt of one token",
        ("n, tokens generated", "linear layers, (n + 1) / 2", "attention, (2n + 1) / 3"),
        ratio_rows,
    ),
    "kv-sizes": Table(
        "bytes of K and V per token, 16 bits",
        ("model", "kind", "layers", "query heads", "KV heads", "head size", "bytes per token"),
        size_rows,
    ),
    "logit-differences": Table(
        "logits against one plain forward",
        ("compared with one forward over T tokens", "largest difference of a logit"),
        difference_rows,
        files=(TINY,),
    ),
}


def _flop_ratio(file: str, n: int) -> Claim:
    return Derived(
        f"FLOPs without a cache over FLOPs with one, {MODEL_OF[file]}, {n} tokens",
        lambda: flop_ratio(file, n),
        ".3g",
        generation_flops,
    )


def _ratio(kind: str, n: int) -> Claim:
    ratio, form = {"linear": (linear_ratio, fixed(1)), "attention": (attention_ratio, three)}[kind]
    says = f"work of {kind} without a cache over work with one, {n} tokens from a prompt of one"
    return Derived(says, ratio(n), form, f"{FORMULAS}:{kind}_ratio")


def _kv(model: str, config: PretrainedConfig, form: Form) -> Claim:
    number = kv_bytes_per_token(config, BYTES_16_BIT)
    return Derived(f"bytes of K and V per token, {model}, 16 bits", number, form, kv_bytes_per_token)


def _per_layer(says: str, config: PretrainedConfig) -> Claim:
    number = kv_values_per_layer(config)
    return Derived(f"numbers that a layer caches per token, {says}", number, by=kv_values_per_layer)


CLAIMS: dict[str, Claim] = {
    "m0-flop-ratio-tiny": _flop_ratio(TINY, 256),
    "m0-time-ratio-qwen3": Measured(
        "time without a cache over time with one, qwen3-0.6b, 64 tokens", f"{QWEN}/summary/64/time_ratio", "range .2g"
    ),
    "m0-flop-ratio-qwen3": _flop_ratio(QWEN, 64),
    **{f"{kind}-ratio-{n}": _ratio(kind, n) for n in (100, 10) for kind in ("linear", "attention")},
    "kv-bytes-llama2-7b": _kv("Llama-2-7B", LLAMA_2_7B, binary),
    "kv-bytes-llama2-7b-exact": _kv("Llama-2-7B", LLAMA_2_7B, plain),
    "kv-bytes-llama2-13b": _kv("Llama-2-13B", LLAMA_2_13B, binary),
    "kv-bytes-qwen25-05b": _kv("Qwen2.5-0.5B", bundled("qwen2.5-0.5b"), plain),
    "kv-bytes-qwen3-06b": _kv("Qwen3-0.6B", bundled("qwen3-0.6b"), plain),
    "kv-values-mla": _per_layer("DeepSeek-V2", DEEPSEEK_V2),
    "kv-values-mqa": _per_layer("one KV head of 128", DEEPSEEK_V2_AS_MQA),
    "kv-values-mha": _per_layer("128 KV heads of 128", DEEPSEEK_V2_AS_MHA),
    "kv-1000-llama2-7b": Derived(
        "K and V of 1000 tokens, Llama-2-7B, 16 bits", kv_bytes(LLAMA_2_7B, 1000, BYTES_16_BIT), "binary", kv_bytes
    ),
    "kv-10x500-llama2-7b": Derived(
        "K and V of 10 texts of 500 tokens, Llama-2-7B, 16 bits",
        kv_bytes(LLAMA_2_7B, 500, BYTES_16_BIT, num_sequences=10),
        "binary",
        kv_bytes,
    ),
    "logits-of-a-prompt": Derived(
        "logits of a prompt of 1000 tokens, Qwen3-0.6B, float32",
        4 * 1000 * bundled("qwen3-0.6b").vocab_size,
        "binary",
        f"{HERE}:CLAIMS",
    ),
    "m0-kv-bytes-tiny-derived": Derived(
        "K and V of 16 + 256 - 1 tokens, folo-tiny, float32",
        kv_bytes(bundled("folo-tiny"), 16 + 256 - 1, 4),
        by=kv_bytes,
    ),
    "causal-cells-4": Derived("cells of a causal mask of 4 tokens that are True", 4 * 5 // 2, by=f"{HERE}:CLAIMS"),
    "upper-triangle-logit-difference": Measured(
        "largest difference of a logit under an upper-triangular mask, folo-tiny",
        f"{TINY}/logit_differences/upper_triangular",
        ".2g",
    ),
    "logit-standard-deviation": Measured(
        "standard deviation of all logits of that text, folo-tiny",
        f"{TINY}/logit_differences/logits_standard_deviation",
        ".2g",
    ),
}
