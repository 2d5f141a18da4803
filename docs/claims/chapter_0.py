"""Claims of chapter 0: two workloads, arithmetic intensity, what attention costs."""

from __future__ import annotations

from claims.forms import giga, ms, plain, three
from claims.ledger import Cited, Claim, Derived, Measured, Table, measured_table, result
from claims.models import BYTES_16_BIT, LLAMA_2_7B
from folovllm.course.lessons.formulas import (
    attention_flops_per_token,
    linear_flops_per_token,
    linear_params,
    lm_head_params,
)

HERE = "docs/claims/chapter_0.py"
FORMULAS = "folovllm/course/lessons/formulas.py"
WORKLOADS = "two-workloads-qwen3-0.6b"

LLAMA_2_TRAINING_TOKENS = 2e12  # arXiv:2307.09288, table 1
TRAINING_OVER_INFERENCE = 6 / 2  # FLOPs per weight and token: 6 to train (arXiv:2001.08361), 2 to serve
H100_BYTES_PER_S, H100_FLOPS = 3.35e12, 989e12  # SXM, bf16 without sparsity
LAYER_SIZE = 4096  # of the linear layer in the table of intensities

# --- attention's share of the FLOPs of a prompt of n tokens, LM head aside ---------------------------------


def attention_share(n: int, causal: bool) -> float:
    """Of the FLOPs of Llama-2-7B's layers on a prompt of n tokens; `causal` leaves out the hidden half of the pairs."""
    keys = (n + 1) / 2 if causal else n  # per query, on average
    attention = attention_flops_per_token(LLAMA_2_7B, 1) * keys
    return attention / (attention + linear_flops_per_token(LLAMA_2_7B))


def attention_crossing(causal: bool) -> float:
    """The prompt length at which attention costs as many FLOPs as the linear layers."""
    keys = linear_flops_per_token(LLAMA_2_7B) / attention_flops_per_token(LLAMA_2_7B, 1)
    return 2 * keys - 1 if causal else keys


# --- bytes and FLOPs of a linear layer --------------------------------------------------------------------


def intensity(m: int, k: int, n: int, itemsize: int) -> float:
    """FLOPs per byte of [m, k] x [k, n], with all three matrices moved once."""
    return 2 * m * k * n / (itemsize * (m * k + k * n + m * n))


def decode_weight_bytes() -> int:
    """What a decode step of Llama-2-7B has to read in 16 bits, K and V aside: linear layers and LM head."""
    return BYTES_16_BIT * (linear_params(LLAMA_2_7B) + lm_head_params(LLAMA_2_7B))


def decode_attention_intensity(group: int, itemsize: int) -> float:
    """FLOPs per byte of decode attention: each cached number serves `group` query heads with 2 FLOPs each."""
    return 2 * group / itemsize


# --- a step of a scheduler, as an example has it -----------------------------------------------------------

BUDGET, DECODES, PROMPTS = 1000, 10, (100, 200, 500)


def scheduled_tokens() -> int:
    """Tokens that 10 decodes and three whole prompts make."""
    return DECODES + sum(PROMPTS)


# --- the machine that was measured -------------------------------------------------------------------------


def machine_ceilings() -> tuple[float, float]:
    """FLOP/s of the best matrix product and bytes/s of the best read, medians of the rounds."""
    machine = result(WORKLOADS)["summary"]["machine"]
    return max(rate["median"] for rate in machine["gemm_flops_per_s"].values()), machine["read_bytes_per_s"]["median"]


# --- tables -----------------------------------------------------------------------------------------------

KINDS = {
    "prefill": "prefill, 512 tokens of one text",
    "decode-1": "decode, 1 token of one text",
    "decode-8": "decode, 1 token of each of 8 texts",
}


def intensity_rows() -> list[list[str]]:
    """A 4096 x 4096 layer at growing m."""
    cells = []
    for m in (1, 8, 64, 512, 4096):
        values = (intensity(m, LAYER_SIZE, LAYER_SIZE, itemsize) for itemsize in (2, 4))
        cells.append([plain(m), plain(2 * m * LAYER_SIZE**2 // 10**6), *(three(value) for value in values)])
    return cells


TABLES: dict[str, Table] = {
    "two-workloads": measured_table(
        "prefill and decode on one machine",
        f"{WORKLOADS}/summary/points",
        "one pass",
        {
            "ms": ("seconds", ms),
            "ms per token": ("seconds_per_token", ms),
            "FLOP per byte": lambda kind: three(result(WORKLOADS)["work"][kind]["intensity"]),
            "GFLOP/s reached": ("flops_per_s", giga),
            "of the best rate": ("share_of_peak_flops", ".0%"),
        },
        KINDS,
    ),
    "intensity": Table(
        "arithmetic intensity of a linear layer",
        ("m, tokens", "MFLOP", "FLOP per byte, 16 bits", "FLOP per byte, 32 bits"),
        intensity_rows,
    ),
}

CLAIMS: dict[str, Claim] = {
    "decode-share-of-peak": Measured(
        "decode of one text, share of the best rate of a matrix product",
        f"{WORKLOADS}/summary/points/decode-1/share_of_peak_flops",
        ".0%",
    ),
    "decode-share-of-bandwidth": Measured(
        "decode of one text, share of the read bandwidth",
        f"{WORKLOADS}/summary/points/decode-1/share_of_read_bandwidth",
        ".0%",
    ),
    "machine-ridge": Derived(
        "best rate of a matrix product over best read rate, medians, FLOP per byte",
        lambda: machine_ceilings()[0] / machine_ceilings()[1],
        ".3g",
        machine_ceilings,
    ),
    "llama2-training-tokens": Cited(
        "tokens that Llama 2 was trained on, trillions",
        LLAMA_2_TRAINING_TOKENS / 1e12,
        ".2g",
        "Touvron et al. 2023, table 1",
        "https://arxiv.org/abs/2307.09288",
    ),
    "llama2-serving-break-even": Derived(
        "tokens to serve until inference has cost the FLOPs of training, trillions",
        TRAINING_OVER_INFERENCE * LLAMA_2_TRAINING_TOKENS / 1e12,
        ".2g",
        f"{HERE}:TRAINING_OVER_INFERENCE",
    ),
    "llama2-7b-linear-params": Derived(
        "weights in the linear layers of Llama-2-7B, billions", linear_params(LLAMA_2_7B) / 1e9, ".3g", linear_params
    ),
    "llama2-7b-layer-params": Derived(
        "weights in the linear layers of one layer of Llama-2-7B, millions",
        linear_params(LLAMA_2_7B) / LLAMA_2_7B.num_hidden_layers / 1e6,
        ".3g",
        linear_params,
    ),
    "llama2-7b-layer-flops-1000": Derived(
        "FLOPs of these on 1000 tokens, billions",
        1000 * linear_flops_per_token(LLAMA_2_7B) / LLAMA_2_7B.num_hidden_layers / 1e9,
        ".3g",
        linear_flops_per_token,
    ),
    "llama2-7b-decode-bytes": Derived(
        "bytes that a decode step of Llama-2-7B reads in 16 bits, K and V aside", decode_weight_bytes, ".3g GB"
    ),
    "h100-bandwidth": Cited(
        "memory bandwidth of an H100 SXM",
        H100_BYTES_PER_S,
        ".3g TB/s",
        "NVIDIA H100 data sheet",
        "https://www.nvidia.com/en-us/data-center/h100/",
    ),
    "h100-flops": Cited(
        "dense bf16 rate of an H100 SXM",
        H100_FLOPS,
        ".3g TFLOP/s",
        "NVIDIA H100 data sheet",
        "https://www.nvidia.com/en-us/data-center/h100/",
    ),
    "h100-ridge": Derived(
        "ridge of an H100 SXM by its data sheet, FLOP per byte",
        H100_FLOPS / H100_BYTES_PER_S,
        ".3g",
        f"{HERE}:H100_BYTES_PER_S",
    ),
    "llama2-7b-decode-floor-h100": Derived(
        "least time of a decode step of Llama-2-7B on an H100 SXM: its bytes over the bandwidth",
        decode_weight_bytes() / H100_BYTES_PER_S,
        ".2g ms",
        decode_weight_bytes,
    ),
    "decode-attention-intensity-mha": Derived(
        "FLOP per byte of decode attention in 16 bits, each query head with K and V of its own",
        decode_attention_intensity(1, BYTES_16_BIT),
        ".2g",
        decode_attention_intensity,
    ),
    "decode-attention-intensity-group-4": Derived(
        "FLOP per byte of decode attention in 16 bits, four query heads per KV head",
        decode_attention_intensity(4, BYTES_16_BIT),
        ".2g",
        decode_attention_intensity,
    ),
    "attention-share-1000-causal": Derived(
        "attention's share of Llama-2-7B's layers at 1000 tokens, hidden pairs skipped",
        attention_share(1000, causal=True),
        ".1%",
        attention_share,
    ),
    "attention-share-1000-full": Derived(
        "attention's share of Llama-2-7B's layers at 1000 tokens, hidden pairs computed",
        attention_share(1000, causal=False),
        ".1%",
        attention_share,
    ),
    "attention-crossing-full": Derived(
        "prompt length at which attention costs as much as the linear layers, hidden pairs computed",
        attention_crossing(causal=False),
        ".0f",
        attention_crossing,
    ),
    "attention-crossing-causal": Derived(
        "prompt length at which attention costs as much as the linear layers, hidden pairs skipped",
        attention_crossing(causal=True),
        ".0f",
        attention_crossing,
    ),
    "budget-scheduled": Derived("tokens of 10 decodes and prompts of 100, 200 and 500", scheduled_tokens),
    "budget-filled": Derived(
        "the share of a budget of 1000 that they fill", scheduled_tokens() / BUDGET, ".0%", scheduled_tokens
    ),
    "budget-c-claimed": Derived(
        "tokens of request C that the example schedules in order to fill the budget",
        BUDGET - DECODES - PROMPTS[0] - PROMPTS[1],
        by=scheduled_tokens,
    ),
}
