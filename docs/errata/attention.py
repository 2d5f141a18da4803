"""Claims about attention, its masks, and what it costs."""

from __future__ import annotations

from functools import cache

import torch
from claims.chapter_1 import TINY
from claims.ledger import Claim, Derived, Measured
from claims.models import LLAMA_2_7B

from errata.bundled_model import bundled_model, cache_after, layer_of, some_tokens
from errata.finding import Erratum, Evidence, claims_of
from folovllm.baseline import generate_cached, generate_recompute
from folovllm.course.lessons.formulas import attention_flops_per_token, attention_ratio, generation_flops, linear_ratio

PROMPT_LEN, NEW_TOKENS = 16, 64


def prompt_without_order() -> Evidence:
    """A prompt in which every token sees every other, beside the causal one."""
    tokens = some_tokens(24)
    ids, everything = torch.tensor([tokens]), torch.ones(1, 1, 24, 24, dtype=torch.bool)  # [1, 1, T, T]
    with torch.inference_mode():
        causal = bundled_model()(input_ids=ids, use_cache=False).logits  # [1, T, V]
        unordered = bundled_model()(input_ids=ids, attention_mask=everything, use_cache=False).logits
    right, wrong = cache_after(tokens), cache_after(tokens, attention_mask=everything)
    first, second = (float((layer_of(right, i)[0] - layer_of(wrong, i)[0]).abs().max()) for i in (0, 1))
    return {
        "logits": Derived("largest difference of a logit", float((causal - unordered).abs().max()), ".2g"),
        "layer-0": Derived("largest difference of a cached key, first layer", first, "power"),
        "layer-1": Derived("largest difference of a cached key, second layer", second, ".2g"),
    }


@cache
def masks() -> dict[str, float]:
    """What chapter 1 measures, on this machine."""
    from folovllm.course.measure.chapter_1 import logit_differences  # only where the experiment runs

    with torch.inference_mode():
        return logit_differences(bundled_model())


def triangles() -> Evidence:
    """Both triangles as the mask of one forward."""
    found = masks()
    return {
        "lower": Derived("lower triangle, largest difference of a logit", found["lower_triangular"], "power"),
        "upper": Derived("upper triangle, largest difference of a logit", found["upper_triangular"], ".2g"),
    }


def decode_rows() -> Evidence:
    """Both rows as the mask of a decode step."""
    found = masks()
    return {
        "all": Derived("a row that is all True, largest difference of a logit", found["decode_sees_all"], "power"),
        "itself": Derived(
            "a row that is True for the new token only, largest difference", found["decode_sees_itself_only"], ".2g"
        ),
    }


def one_layer() -> Evidence:
    """What attention computes in one layer of Llama-2-7B at 1000 tokens, hidden pairs included."""
    flops = 1000 * attention_flops_per_token(LLAMA_2_7B, 1000) / LLAMA_2_7B.num_hidden_layers
    return {"attention-flops": Derived("attention of the layer on 1000 tokens, billion FLOPs", flops / 1e9, ".3g")}


def like_with_like() -> Evidence:
    """The claim's two sums over each other, and the ratios of equal work where chapter 1 has none."""
    found = {
        f"claimed-{n}": Derived(f"n³ / (n² + n(n - 1)) at n = {n:,}", n**3 / (n**2 + n * (n - 1)), ".2f")
        for n in (10, 100, 1000)
    }
    says = "work of {} without a cache over work with one, 1,000 tokens from a prompt of one"
    found["linear-1000"] = Derived(says.format("linear"), linear_ratio(1000), ".1f")
    found["attention-1000"] = Derived(says.format("attention"), attention_ratio(1000), ".3g")
    return found


def by_the_clock() -> Evidence:
    """Both loops of M0, by FLOPs and by a clock, for the same tokens."""
    model, prompt = bundled_model(), some_tokens(PROMPT_LEN)
    generate_cached(model, prompt, 4)  # warm-up
    loops = [loop(model, prompt, NEW_TOKENS) for loop in (generate_recompute, generate_cached)]
    without, cached = (sum(run.token_times) for run in loops)
    flops = [generation_flops(model.config, PROMPT_LEN, NEW_TOKENS, cached=c).total for c in (False, True)]
    return {
        "same": Derived("the same tokens", str(loops[0].token_ids == loops[1].token_ids)),
        "flops": Derived(f"{NEW_TOKENS} tokens of folo-tiny, FLOPs without over with", flops[0] / flops[1], ".3g"),
        "time": Derived("the same, time without over with", without / cached, ".2g"),
    }


ERRATA = (
    Erratum(
        "prefill-not-causal",
        "A prompt is read in parallel because order does not matter there",
        experiment=prompt_without_order,
    ),
    Erratum(
        "upper-triangle",
        "The attention mask is an upper triangle",
        ("upper-triangle-logit-difference", "logit-standard-deviation"),
        experiment=triangles,
    ),
    Erratum(
        "decode-row",
        "In decode, the new token's row of the mask is False but for itself",
        ("decode-row-logit-difference", "logit-standard-deviation"),
        experiment=decode_rows,
    ),
    Erratum(
        "attention-bottleneck",
        "Attention's quadratic cost is what limits inference",
        (
            "llama2-7b-layer-params",
            "llama2-7b-layer-flops-1000",
            "attention-share-1000-causal",
            "attention-share-1000-full",
            "attention-crossing-full",
            "attention-crossing-causal",
        ),
        formula=one_layer,
    ),
    Erratum(
        "unlike-work",
        "Without a cache n³ operations, with one n² + n(n - 1)",
        ("linear-ratio-10", "linear-ratio-100", "attention-ratio-10", "attention-ratio-100"),
        formula=like_with_like,
    ),
    Erratum(
        "ratio-of-flops",
        "A KV cache makes generating a hundred tokens about fifty times as fast",
        ("linear-ratio-100", "attention-ratio-100", "m0-flop-ratio-qwen3", "m0-time-ratio-qwen3"),
        experiment=by_the_clock,
    ),
)

CLAIMS: dict[str, Claim] = {
    "decode-row-logit-difference": Measured(
        "largest difference of a logit when a decode step sees itself only, folo-tiny",
        f"{TINY}/logit_differences/decode_sees_itself_only",
        ".2g",
    ),
    **claims_of(ERRATA),
}
