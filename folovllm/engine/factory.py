"""From a configuration to the parts of an engine: the one place where a milestone's preset is turned into objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from folovllm.config import EngineConfig
from folovllm.engine.core import EngineCore
from folovllm.engine.paged import build_paged
from folovllm.kv_cache.contiguous import ContiguousKVManager
from folovllm.kv_cache.interface import KVCacheManager
from folovllm.models.loader import (
    eos_token_ids,
    load_config,
    load_generation_config,
    load_hf_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
    resolve_model,
)
from folovllm.runner.hf_runner import HFRunner
from folovllm.runner.interface import ModelRunner
from folovllm.runner.threads import choose_num_threads
from folovllm.sampling.sampler import Sampler
from folovllm.scheduler.scheduler import Scheduler

if TYPE_CHECKING:  # at run time this name would bring torch's compiler and Triton along
    from transformers import PreTrainedModel


@dataclass
class EngineParts:
    """What `LLMEngine` is made of. Tests give it a core of their own."""

    core: EngineCore
    tokenizer: PreTrainedTokenizerBase | None
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    max_model_len: int


def model_length(config: EngineConfig, hf_config: PretrainedConfig) -> int:
    """Tokens of prompt and output the engine allows. Raises ValueError when asked for more than the model has."""
    longest = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(longest, int):
        raise ValueError(
            f"model={config.model.model!r} is a {hf_config.model_type} without max_position_embeddings; "
            "allowed: a decoder with rotary or learned positions"
        )
    wanted = config.model.max_model_len
    if wanted is not None and wanted > longest:
        raise ValueError(
            f"max_model_len={wanted} is not valid; allowed: at most {longest}, the model's max_position_embeddings"
        )
    return longest if wanted is None else wanted


def build_engine(config: EngineConfig, model: PreTrainedModel | None = None) -> EngineParts:
    """Load the model and make the core that `config.milestone` describes.

    model: the weights, where another engine of the same `config.model` has loaded them: a forward only reads them.
    Raises ValueError for an unknown model, a corrupt checkpoint, or settings that the model cannot meet.
    """
    source = resolve_model(config.model.model)
    hf_config = load_config(source)
    max_model_len = model_length(config, hf_config)
    device = resolve_device(config.model.device)
    dtype = resolve_dtype(config.model.dtype, hf_config, device)
    tokenizer = load_tokenizer(source)
    generation_config = load_generation_config(source)
    sampler = Sampler(config.model.seed, device)
    num_threads = step_threads(config, hf_config, device)[0]
    budget = config.max_num_batched_tokens(max_model_len)
    kv: KVCacheManager
    runner: ModelRunner
    if config.preset.paged:
        parts = build_paged(config, source, hf_config, dtype, device, max_model_len, budget, sampler, num_threads)
        kv, runner = parts.manager, parts.runner
    else:
        if model is None:
            model = load_hf_model(source, dtype, device, config.model.load_format, config.model.seed)
        kv = ContiguousKVManager(kv_capacity(config, max_model_len), max_model_len)
        batching = config.batching or next(iter(config.preset.batchings), "loop")
        runner = HFRunner(model, sampler, batching, num_threads=num_threads)
    policy, preemption = config.scheduler.scheduling_policy, config.scheduler.preemption_mode
    scheduler = Scheduler(
        kv,
        config.max_num_seqs,
        budget,
        policy,
        preemption,
        config.chunked_prefill,
        config.scheduler.long_prefill_token_threshold,
    )
    core = EngineCore(scheduler, runner, config.max_trace_steps, config.trace_blocks)
    vocab_size = int(hf_config.get_text_config().vocab_size)
    # An id without a logit can never be sampled, so it can never end a sequence either.
    eos_ids = tuple(i for i in eos_token_ids(hf_config, generation_config, tokenizer) if i < vocab_size)
    return EngineParts(core, tokenizer, eos_ids, vocab_size, max_model_len)


def step_threads(config: EngineConfig, hf_config: PretrainedConfig, device: torch.device) -> tuple[int | None, str]:
    """The CPU threads of a step, None for as many as the process uses, and why. Next to a GPU only what was asked."""
    if device.type != "cpu":
        return config.num_threads, "a GPU computes"
    return choose_num_threads(config.num_threads, hf_config.get_text_config().hidden_size)


def kv_capacity(config: EngineConfig, max_model_len: int) -> int:
    """Tokens of K/V that a contiguous cache may set aside.

    Given num_kv_blocks, that many blocks. Else a region for each running request and one more, in which the K/V of a
    finished leader can wait for its forks: then it is `max_num_seqs` alone that limits admission.
    """
    if config.cache.num_kv_blocks is not None:
        return config.cache.num_kv_blocks * config.cache.block_size
    return (config.max_num_seqs + 1) * max_model_len
