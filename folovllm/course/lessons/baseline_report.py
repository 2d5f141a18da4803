"""M0's two loops side by side: derived FLOPs and measured times."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from folovllm.baseline import BaselineResult
from folovllm.course.lessons.formulas import Flops, generation_flops


@dataclass(frozen=True)
class BaselineReport:
    """One generation without and with a cache: derived FLOPs and measured times."""

    same_tokens: bool
    prompt_len: int
    new_tokens: int
    flops_recompute: Flops
    flops_cached: Flops
    seconds_recompute: float
    seconds_cached: float
    kv_bytes: int

    @property
    def flop_ratio(self) -> float:
        """FLOPs without a cache over FLOPs with one. Derived: see `folovllm.course.lessons.formulas`."""
        return self.flops_recompute.total / self.flops_cached.total

    @property
    def time_ratio(self) -> float:
        """Seconds without a cache over seconds with one. Measured on this machine in this run."""
        return self.seconds_recompute / self.seconds_cached


def compare(config: PretrainedConfig, recompute: BaselineResult, cached: BaselineResult) -> BaselineReport:
    """Both results of one prompt side by side; `config` is the model's.

    If one stopped earlier, only the first n tokens that both have are counted.
    Raises ValueError for results of different prompts or without a token, and where `generation_flops` does.
    """
    n = min(len(recompute.token_ids), len(cached.token_ids))
    if recompute.prompt_len != cached.prompt_len or n == 0:
        raise ValueError(
            f"prompts of {recompute.prompt_len} and {cached.prompt_len} tokens, {n} new tokens in common: "
            "two results of the same prompt with at least one new token are needed"
        )
    return BaselineReport(
        same_tokens=recompute.token_ids == cached.token_ids,
        prompt_len=cached.prompt_len,
        new_tokens=n,
        flops_recompute=generation_flops(config, cached.prompt_len, n, cached=False),
        flops_cached=generation_flops(config, cached.prompt_len, n, cached=True),
        seconds_recompute=sum(recompute.token_times[:n]),
        seconds_cached=sum(cached.token_times[:n]),
        kv_bytes=cached.kv_bytes,
    )
