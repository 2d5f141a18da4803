"""The outside references that the tests hold the engine against.

`hf_greedy` is Hugging Face `generate`; `assert_same_tokens` compares two greedy outputs token by token. Sums
are taken in another order in another batch shape, so two exact implementations may part where two logits are
equal to within rounding. Such a first divergence is excused only where a float64 run of the same weights has
both tokens within `NEAR_TIE` of its best logit; each case is counted, printed and capped at `MAX_EXCUSED` of
the sequences compared. There is no other tolerance.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

FAMILIES: tuple[str, ...] = ("qwen2", "qwen3", "llama", "mistral")
NEAR_TIE = 1e-3  # a float64 logit gap below this may be decided by rounding
MAX_EXCUSED = 0.01  # of the sequences compared


# --- models --------------------------------------------------------------------------------------------


def tiny_config(family: str, **overrides: Any) -> PretrainedConfig:
    """A small random-weight config of `family` (one of `FAMILIES`); any field may be overridden.

    The shapes are chosen to tell mistakes apart: 4 query heads on 2 KV heads; a Qwen3 and a Mistral head_dim
    that is not hidden_size / heads; Llama-3 RoPE scaling whose three frequency bands all occur; a Mistral
    sliding window of 8 tokens, shorter than most tests' sequences. No EOS: a run is as long as the test asks.
    Raises ValueError for any other family.
    """
    fields: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # with 0.02 and tied embeddings a random model repeats one token for ever
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    config_class: type[PretrainedConfig]
    if family == "qwen2":
        config_class = Qwen2Config
    elif family == "qwen3":
        config_class = Qwen3Config
        fields["head_dim"] = 32
    elif family == "llama":
        config_class = LlamaConfig
        fields["rope_parameters"] = {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    elif family == "mistral":
        config_class = MistralConfig
        fields |= {"head_dim": 24, "sliding_window": 8}
    else:
        raise ValueError(f"family={family!r}: allowed are {', '.join(FAMILIES)}")
    return config_class(**(fields | overrides))


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """`tiny_config(family, **overrides)` with seeded random weights, in eval mode, on the CPU.

    Biases and norm weights are random too: Hugging Face starts them at 0 and 1, where a forgotten one cannot
    be seen. The same seed gives the same weights under every transformers version.
    """
    config = tiny_config(family, **overrides)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, seed)
    return model.to(dtype).eval()


def randomize(model: PreTrainedModel, seed: int = 0) -> None:
    """Fill in place: matrices and biases N(0, r), norm weights N(1, r), r = initializer_range."""
    scale = model.config.get_text_config().initializer_range
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.add_(1.0)


def random_prompt(length: int, seed: int = 0, vocab_size: int = 128) -> list[int]:
    """`length` seeded random token ids below `vocab_size`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (length,), generator=generator).tolist()


# --- references ----------------------------------------------------------------------------------------


def hf_greedy(
    model: PreTrainedModel, prompt_ids: Sequence[int], max_new_tokens: int, eos: Iterable[int] = ()
) -> list[int]:
    """The new tokens of Hugging Face greedy `generate`, the EOS that ended it included (`eos=()`: none)."""
    eos_ids = list(eos)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos_ids or None, pad_token_id=0
    )
    input_ids = torch.tensor([list(prompt_ids)], device=model.device)  # [1, L]
    # generate() fills what a passed config leaves unset from the model's own, an EOS or a penalty included:
    # the model's own is put aside for the call.
    own = model.generation_config
    model.generation_config = settings
    try:
        output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids))
    finally:
        model.generation_config = own
    return output[0, len(prompt_ids) :].tolist()


class _UpcastsToFloat64(TorchFunctionMode):
    """Turns the casts to float32 that HF code holds (norms, RoPE, eager softmax) into casts to float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        wide_args = [torch.float64 if arg is torch.float32 else arg for arg in args]
        wide_kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*wide_args, **wide_kwargs)


def float64_logits(model: PreTrainedModel, token_ids: Sequence[int]) -> torch.Tensor:
    """Logits of every position, computed in float64 from the model's own weights without a cache.  [L, V]"""
    wide = copy.deepcopy(model).to("cpu").double()
    with torch.no_grad(), _UpcastsToFloat64():
        return wide(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0]


# --- the comparison ------------------------------------------------------------------------------------


@dataclass
class OracleStats:
    """How much was compared, and every first divergence that was excused as a near tie."""

    sequences: int = 0
    tokens: int = 0
    excused: list[str] = field(default_factory=list)

    def add(self, other: OracleStats) -> None:
        """Count what another process has compared, too."""
        self.sequences += other.sequences
        self.tokens += other.tokens
        self.excused += other.excused

    def excused_too_many(self) -> bool:
        """Whether more than `MAX_EXCUSED` of the sequences needed an excuse. Then the run fails."""
        return len(self.excused) > MAX_EXCUSED * self.sequences

    def __str__(self) -> str:
        lines = [
            f"same tokens: {self.sequences} sequences, {self.tokens} tokens compared, "
            f"{len(self.excused)} first divergences excused as near ties"
            + (f": more than {MAX_EXCUSED:.0%}, which fails the run" if self.excused_too_many() else "")
        ]
        return "\n  ".join(lines + self.excused)


def assert_same_tokens(
    ours: Sequence[int],
    reference: Sequence[int],
    model: PreTrainedModel,
    prompt: Sequence[int],
    stats: OracleStats,
) -> None:
    """Fail unless `ours` equals `reference` (greedy, new tokens only) or first differs at a near tie.

    A different length with equal tokens up to the shorter end is a stop rule gone wrong and is never excused.
    After an excused divergence the texts have different histories, so the rest of them is not compared.
    """
    ours, reference = list(ours), list(reference)
    stats.sequences += 1
    common = 0
    while common < min(len(ours), len(reference)) and ours[common] == reference[common]:
        common += 1
    stats.tokens += common
    if ours == reference:
        return
    if common == min(len(ours), len(reference)):
        raise AssertionError(
            f"equal for {common} tokens, then one ends: {len(ours)} tokens, {len(reference)} in the reference"
        )
    logits = float64_logits(model, [*prompt, *reference[:common]])[-1]  # [V]
    best = logits.max().item()
    gap = max(best - logits[ours[common]].item(), best - logits[reference[common]].item())
    case = (
        f"prompt of {len(prompt)}, new token {common}: {ours[common]}, in the reference {reference[common]}, "
        f"float64 gap {gap:.2e}"
    )
    if gap >= NEAR_TIE:
        raise AssertionError(f"{case}\nours:      {ours}\nreference: {reference}")
    stats.excused.append(case)
