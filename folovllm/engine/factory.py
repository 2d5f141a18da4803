"""From a configuration to the parts of an engine: the one place where a milestone's preset is turned into objects."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from folovllm.attention.backend import AttentionBackend
from folovllm.attention.reference import ReferenceBackend
from folovllm.attention.torch_backend import TorchBackend
from folovllm.config import ATTENTION_BACKENDS, EngineConfig
from folovllm.contrib.transformers.check import load_hf_paged
from folovllm.engine.core import EngineCore
from folovllm.kv_cache.block_manager import BlockManager
from folovllm.kv_cache.contiguous import ContiguousKVManager
from folovllm.kv_cache.interface import KVCacheManager
from folovllm.kv_cache.prefix_cache import PrefixCache
from folovllm.models.decoder import DecoderConfig
from folovllm.models.layers import rope_frequencies
from folovllm.models.loader import (
    ModelSource,
    eos_token_ids,
    load_config,
    load_generation_config,
    load_hf_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
    resolve_model,
)
from folovllm.models.paged_model import PagedModel
from folovllm.models.weights import load_decoder
from folovllm.runner.hf.hf_runner import HFRunner
from folovllm.runner.input_batch import InputBatch
from folovllm.runner.interface import ModelRunner
from folovllm.runner.kv_storage import KVStorage
from folovllm.runner.memory import GIB, determine_available_memory, keep_freed_memory, kv_block_bytes
from folovllm.runner.paged_runner import PagedRunner
from folovllm.runner.threads import choose_num_threads
from folovllm.sampling.sampler import Sampler
from folovllm.scheduler.scheduler import Scheduler

if TYPE_CHECKING:  # at run time this name would bring torch's compiler and Triton along
    from transformers import PreTrainedModel

GPU_SIZES = (1, 2, 4, *range(8, 513, 8))  # what steps on a GPU are padded to, as CUDA graphs want it


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
        kv, runner = build_paged(config, source, hf_config, dtype, device, max_model_len, budget, sampler, num_threads)
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


def build_paged(
    config: EngineConfig,
    source: ModelSource,
    hf_config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    max_tokens: int,
    sampler: Sampler,
    num_threads: int | None = None,
) -> tuple[BlockManager, PagedRunner]:
    """Load the model, and make a pool of blocks for it. Raises ValueError where not even a block fits the memory."""
    if device.type == "cpu" and config.keep_freed_memory:
        keep_freed_memory()
    backend = make_backend(config.attention_backend, device)
    chosen = config.model
    model = load_paged_model(
        source, hf_config, dtype, device, backend, chosen.model_impl, chosen.load_format, chosen.seed, max_model_len
    )
    size = config.cache.block_size
    max_blocks = -(-max_model_len // size)  # of one request
    max_requests = min(config.max_num_seqs, max_tokens)
    buffers = InputBatch(max_tokens, max_requests, max_blocks, size, device, GPU_SIZES if device.type == "cuda" else ())
    block_bytes = kv_block_bytes(model, size)
    num_blocks = config.cache.num_kv_blocks
    if num_blocks is None:
        free = determine_available_memory(config, model, buffers, sampler, backend)
        # More than all running requests at their longest, and a held leader each, would never be touched.
        num_blocks = min(free // block_bytes, 2 * max_requests * max_blocks)
        if num_blocks < 1:
            raise ValueError(
                f"the model leaves {free:,} bytes for K/V and a block takes {block_bytes:,}; allowed: a smaller "
                "block_size or max_num_batched_tokens, a larger gpu_memory_utilization, or num_kv_blocks of your choice"
            )
    swaps = config.scheduler.preemption_mode == "swap"
    num_host_blocks = int(config.cache.swap_space * GIB) // block_bytes if swaps else 0
    storage = KVStorage.of_model(model, num_blocks, num_host_blocks, size)
    manager = BlockManager(num_blocks, size, num_host_blocks, PrefixCache(size) if config.prefix_caching else None)
    return manager, PagedRunner(model, storage, backend, sampler, buffers, num_threads=num_threads)


def make_backend(name: str, device: torch.device) -> AttentionBackend:
    """The backend of that name; "auto" is Triton's on a GPU, where Triton is installed, and else torch's.

    Raises ValueError for another name, and for "triton" where its kernels cannot run.
    """
    has_triton = importlib.util.find_spec("triton") is not None
    if name == "auto":
        name = "triton" if device.type == "cuda" and has_triton else "torch"
    if name == "triton":
        if not has_triton:
            raise ValueError(
                "attention_backend='triton' is not valid here, where Triton is not installed (it is made for Linux); "
                f"allowed: {', '.join(repr(b) for b in ATTENTION_BACKENDS if b != 'triton')}"
            )
        # Imported only here: nothing else needs Triton, and importing it takes time.
        from folovllm.attention.triton_backend import TritonBackend

        return TritonBackend(device)
    if name == "torch":
        return TorchBackend()
    if name == "reference":
        return ReferenceBackend()
    raise ValueError(f"attention_backend={name!r} is not valid; allowed: {', '.join(ATTENTION_BACKENDS)}")


def load_paged_model(
    source: ModelSource,
    hf_config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    backend: AttentionBackend,
    model_impl: str = "auto",
    load_format: str = "auto",
    seed: int = 0,
    max_positions: int | None = None,
) -> PagedModel:
    """The model of a checkpoint, ready for inference.

    model_impl: "folovllm" is our decoder, "transformers" Hugging Face's model, "auto" ours where it has all that the
    config asks for. Raises ValueError for what the chosen one does not have, by name, and for weights as `load_decoder`
    and `load_hf_paged` do.
    """
    lacks = None if model_impl == "transformers" else what_decoder_lacks(hf_config)
    if model_impl == "folovllm" and lacks is not None:
        raise ValueError(f"model_impl='folovllm' is not valid for this model: {lacks}; or model_impl='auto'")
    if model_impl == "transformers" or lacks is not None:
        return load_hf_paged(source, hf_config, dtype, device, backend, load_format, seed, max_positions)
    return load_decoder(source, hf_config, dtype, device, load_format, seed, max_positions)


def what_decoder_lacks(hf_config: PretrainedConfig) -> str | None:
    """What our decoder does not have and this config asks for; None if it has everything."""
    try:
        config = DecoderConfig.from_hf(hf_config)
        rope_frequencies(config.rope, config.head_dim)
    except ValueError as error:
        return str(error)
    return None


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
