"""Claims about the KV cache: what it is in Hugging Face's library, and how many bytes it takes."""

from __future__ import annotations

import torch
from claims.forms import plain
from claims.ledger import Derived
from claims.models import BYTES_16_BIT, LLAMA_2_7B, LLAMA_2_13B, LLAMA_2_70B, bundled
from transformers import PretrainedConfig

from errata.bundled_model import bundled_model, cache_after, layer_of, some_tokens
from errata.finding import Erratum, Evidence, claims_of
from folovllm.baseline import cache_bytes
from folovllm.kv_cache.formulas import attention_kind, kv_bytes, kv_bytes_per_token

LENGTHS = (1, 10, 100)  # tokens


def tuples_raise() -> Evidence:
    """What a forward gets and gives as `past_key_values`."""
    kept = cache_after(some_tokens(5))
    pairs = tuple(layer_of(kept, index) for index in range(len(kept.layers)))
    try:
        with torch.inference_mode():
            bundled_model()(input_ids=torch.tensor([[3]]), past_key_values=pairs, use_cache=True)
        answer = "nothing is raised"
    except (ValueError, TypeError, AttributeError) as error:
        answer = type(error).__name__
    config = bundled_model().config
    return {
        "type": Derived("past_key_values is a", type(kept).__name__),
        "tuples": Derived("with tuples, a call raises", answer),
        "shape": Derived(
            "shape of layers[0].keys after 5 tokens, [B, Hkv, T, D]", str(list(layer_of(kept, 0)[0].shape))
        ),
        "heads": Derived("query heads and KV heads", f"{config.num_attention_heads} and {config.num_key_value_heads}"),
    }


def grows() -> Evidence:
    """Bytes that Hugging Face's cache holds after so many tokens, beside those of its longest text."""
    found = {
        f"after-{n}": Derived(f"bytes after {n} token{'s' * (n > 1)}", cache_bytes(cache_after(some_tokens(n))))
        for n in LENGTHS
    }
    config = bundled_model().config
    longest = config.max_position_embeddings
    found["longest"] = Derived(f"bytes of a region for {longest:,} tokens", kv_bytes(config, longest, 4))
    return found


def by_query_heads(config: PretrainedConfig) -> int:
    """Bytes per token of 2 x layers x heads x head size x 2, the formula with the wrong heads."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * config.num_attention_heads * head_dim * BYTES_16_BIT)


def heads_of_what() -> Evidence:
    """The formula with query heads over the one with KV heads."""
    models = {
        "llama2-7b": ("Llama-2-7B", LLAMA_2_7B),
        "llama2-70b": ("Llama-2-70B", LLAMA_2_70B),
        "qwen25": ("Qwen2.5-0.5B", bundled("qwen2.5-0.5b")),
        "qwen3": ("Qwen3-0.6B", bundled("qwen3-0.6b")),
    }
    found = {}
    for key, (name, config) in models.items():
        right = kv_bytes_per_token(config, BYTES_16_BIT)
        found[f"{key}-wrong"] = Derived(f"{name}, bytes per token with query heads", by_query_heads(config), plain)
        found[f"{key}-over"] = Derived(f"{name}, that over the bytes it takes", by_query_heads(config) / right, ".2g")
    return found


def kinds_of_llama_2() -> Evidence:
    """Which Llama 2 shares K and V, by its configuration."""
    group = LLAMA_2_70B.num_attention_heads // (LLAMA_2_70B.num_key_value_heads or 1)
    return {
        "7b": Derived("Llama-2-7B", attention_kind(LLAMA_2_7B)),
        "13b": Derived("Llama-2-13B", attention_kind(LLAMA_2_13B)),
        "70b": Derived("Llama-2-70B", attention_kind(LLAMA_2_70B)),
        "70b-group": Derived("query heads that share a KV head in Llama-2-70B", group),
        "70b-bytes": Derived("bytes per token of Llama-2-70B", kv_bytes_per_token(LLAMA_2_70B, BYTES_16_BIT), "binary"),
    }


ERRATA = (
    Erratum(
        "tuple-cache",
        "past_key_values is a tuple of (key, value) tuples, a head per query head",
        experiment=tuples_raise,
    ),
    Erratum("hf-preallocates", "Hugging Face sets K/V aside for the longest text", experiment=grows),
    Erratum(
        "heads-of-what",
        "A token takes 2 × layers × heads × head size numbers",  # noqa: RUF001  as in print
        ("kv-bytes-llama2-7b-exact", "kv-bytes-llama2-13b", "kv-bytes-qwen25-05b", "kv-bytes-qwen3-06b"),
        formula=heads_of_what,
    ),
    Erratum("gqa-in-llama-2", "Llama 2 uses grouped-query attention", formula=kinds_of_llama_2),
    Erratum(
        "mla-smallest",
        "Latent attention has the smallest cache of all",
        ("kv-values-mha", "kv-values-mla", "kv-values-mqa"),
    ),
)

CLAIMS = claims_of(ERRATA)
