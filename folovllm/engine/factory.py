"""Build an engine from its configuration: the only place where a milestone's preset becomes objects."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass, field

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from folovllm.attention.backend import AttentionBackend
from folovllm.attention.reference import ReferenceBackend
from folovllm.attention.torch_backend import TorchBackend
from folovllm.attention.trial import why_it_cannot_run
from folovllm.checks import check_choice, invalid, quoted
from folovllm.config import ATTENTION_BACKENDS, EngineConfig
from folovllm.contrib.transformers.check import load_hf_paged
from folovllm.engine.core import EngineCore
from folovllm.engine.generation_defaults import GenerationDefaults, generation_defaults
from folovllm.kv_cache.block_manager import BlockManager
from folovllm.kv_cache.contiguous import ContiguousKVManager
from folovllm.kv_cache.interface import KVCacheManager
from folovllm.kv_cache.prefix_cache import PrefixCache
from folovllm.math_utils import cdiv
from folovllm.models.config_fields import check_fields
from folovllm.models.decoder import DecoderConfig
from folovllm.models.decoder_check import how_decoder_differs
from folovllm.models.families import check_family, length_with_rope
from folovllm.models.layers import rope_frequencies
from folovllm.models.loader import (
    LoadSpec,
    eos_token_ids,
    generation_config_of,
    load_config,
    load_generation_config,
    load_hf_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
    resolve_model,
    resolve_tokenizer,
    special_token_ids,
)
from folovllm.models.paged_model import PagedModel
from folovllm.models.weights import load_decoder
from folovllm.runner.hf.check import check_side_by_side
from folovllm.runner.hf.hf_runner import HFRunner
from folovllm.runner.host_memory import GIB, HostHeap, free_cpu_bytes
from folovllm.runner.input_batch import InputBatch
from folovllm.runner.interface import ModelRunner
from folovllm.runner.kv_storage import KVStorage
from folovllm.runner.memory import determine_available_memory, kv_block_bytes, memory_share
from folovllm.runner.paged_runner import PagedRunner
from folovllm.runner.threads import choose_num_threads
from folovllm.sampling.sampler import Sampler
from folovllm.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

GPU_SIZES = (1, 2, 4, *range(8, 513, 8))  # steps on a GPU are padded to these, for CUDA graphs


@dataclass
class EngineParts:
    """The parts of an `LLMEngine`. Tests pass a core of their own."""

    core: EngineCore
    tokenizer: PreTrainedTokenizerBase | None
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    max_model_len: int
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    special_token_ids: dict[str, int] = field(default_factory=dict)  # by name; the text does not show them


def model_length(config: EngineConfig, hf_config: PretrainedConfig) -> int:
    """Tokens of prompt and output that a request may have. Raises ValueError for a max_model_len above the model's.

    A RoPE that is scaled for longer texts makes the model longer, as in vLLM.
    """
    longest = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(longest, int):
        raise ValueError(
            f"model={config.model.model!r} is a {hf_config.model_type} without max_position_embeddings; "
            "allowed: a decoder with rotary or learned positions"
        )
    longest = max(longest, length_with_rope(hf_config.get_text_config()) or 0)
    wanted = config.model.max_model_len
    if wanted is not None and wanted > longest:
        name = "max_position_embeddings, with the factor of its rope_parameters if they have one"
        raise invalid("max_model_len", wanted, f"at most {longest}, the model's {name}")
    return longest if wanted is None else wanted


def build_engine(config: EngineConfig, model: transformers.PreTrainedModel | None = None) -> EngineParts:
    """Load the model and make the core that `config.milestone` describes.

    model: loaded weights to reuse, of another engine with the same `config.model`; a forward only reads them.
    Raises ValueError for an unknown model, a corrupt checkpoint, or settings that the model cannot meet.
    """
    source = resolve_model(config.model.model)
    hf_config = load_config(source)
    check_fields(hf_config)
    max_model_len = model_length(config, hf_config)
    check_family(hf_config, max_model_len)
    device = resolve_device(config.model.device)
    dtype = resolve_dtype(config.model.dtype, hf_config, device)
    spec = LoadSpec(source, hf_config, dtype, device, config.model.load_format, config.model.seed, max_model_len)
    own = config.model.tokenizer
    tokenizer = load_tokenizer(source if own is None else resolve_tokenizer(own))
    option = config.model.generation_config
    own_file = option in ("auto", "vllm")
    generation_config = load_generation_config(source) if own_file else generation_config_of(option)
    special_ids = special_token_ids(tokenizer)
    defaults = generation_defaults(None if option == "vllm" else generation_config, special_ids)
    sampler = Sampler()
    budget = config.max_num_batched_tokens(max_model_len)
    heap = HostHeap(keep=device.type == "cpu" and config.preset.paged and config.keep_freed_memory)
    kv: KVCacheManager
    runner: ModelRunner
    if config.preset.paged:
        kv, runner = build_paged(config, spec, budget, sampler)
    else:
        if model is None:
            model = load_hf_model(source, dtype, device, spec.load_format, spec.seed)
        kv = ContiguousKVManager(kv_capacity(config, max_model_len), max_model_len)
        logger.info(
            "K/V: as much memory as its tokens take. %s tokens are reserved by count alone, %s for each request",
            f"{kv.capacity:,}", f"{kv.region:,}",
        )  # fmt: skip
        batching = config.batching or next(iter(config.preset.batchings), "loop")
        check_side_by_side(model, batching, max_model_len)
        runner = HFRunner(model, sampler, batching, num_threads=step_threads(config, hf_config, device)[0])
    scheduler = Scheduler(
        kv,
        config.max_num_seqs,
        budget,
        config.scheduler.scheduling_policy,
        config.scheduler.preemption_mode,
        config.chunked_prefill,
        config.scheduler.long_prefill_token_threshold,
    )
    core = EngineCore(scheduler, runner, config.max_trace_steps, config.trace_blocks, heap=heap)
    vocab_size = int(hf_config.get_text_config().vocab_size)
    eos_ids = eos_token_ids(hf_config, generation_config, tokenizer)
    return EngineParts(core, tokenizer, eos_ids, vocab_size, max_model_len, defaults, special_ids)


def build_paged(
    config: EngineConfig, spec: LoadSpec, max_tokens: int, sampler: Sampler
) -> tuple[BlockManager, PagedRunner]:
    """Load the model and make its pool of blocks. max_tokens: the token budget of a step.

    Raises ValueError if no block fits into memory.
    """
    device = spec.device
    backend = choose_backend(config.attention_backend, spec, config.cache.block_size)
    model = load_paged_model(spec, backend, config.model.model_impl)
    size = config.cache.block_size
    max_blocks = cdiv(model.max_positions, size)  # of one request
    max_requests = min(config.max_num_seqs, max_tokens)
    buffers = InputBatch(max_tokens, max_requests, max_blocks, size, device, GPU_SIZES if device.type == "cuda" else ())
    block_bytes = kv_block_bytes(model, size)
    num_blocks, why = config.cache.num_kv_blocks, "as num_kv_blocks says"
    if num_blocks is None:
        free = determine_available_memory(config, model, buffers, sampler, backend)
        # At most twice what all running requests hold at their longest; the rest is for cached prefixes and idle K/V.
        num_blocks, why = min(
            (free // block_bytes, memory_share(config, device)),
            (2 * max_requests * max_blocks, f"twice what {max_requests} requests of {model.max_positions} tokens hold"),
        )
        if num_blocks < 1:
            raise ValueError(
                f"the model leaves {free:,} bytes for K/V and a block takes {block_bytes:,}; allowed: a smaller "
                "block_size or max_num_batched_tokens, a larger gpu_memory_utilization, or num_kv_blocks of your choice"
            )
    swaps = config.scheduler.preemption_mode == "swap"
    num_host_blocks = int(config.cache.swap_space * GIB) // block_bytes if swaps else 0
    asked = f"K/V of {num_blocks * block_bytes / GIB:.2f} GiB in {num_blocks:,} blocks of {size} tokens, {why}"
    if num_host_blocks:
        asked += f", and {num_host_blocks * block_bytes / GIB:.2f} GiB of swap_space"
    try:
        storage = KVStorage(model.config, model.dtype, model.device, size, num_blocks, num_host_blocks)
    except (MemoryError, OverflowError, ValueError, torch.OutOfMemoryError) as error:  # by size: numpy has three
        raise ValueError(f"{asked}: the system refuses so much memory; allowed: less") from error
    if device.type == "cpu":
        asked += "; it takes memory as it is written"
        if (num_blocks + num_host_blocks) * block_bytes > (left := free_cpu_bytes()):
            logger.warning("%s, and may need more than the %.2f GiB that are free", asked, left / GIB)
    logger.info("%s", asked)
    manager = BlockManager(num_blocks, size, num_host_blocks, PrefixCache(size) if config.prefix_caching else None)
    num_threads = step_threads(config, spec.hf_config, device)[0]
    return manager, PagedRunner(model, storage, backend, sampler, buffers, num_threads=num_threads)


def choose_backend(name: str, spec: LoadSpec, block_size: int) -> AttentionBackend:
    """The attention backend of that name, which has run in the model's shape. "auto" takes "torch" for one that cannot.

    Raises ValueError for any other name whose backend cannot run here.
    """
    shape = (2, 1, 64)  # of a model that is not our decoder's: `load_hf_paged` tries that one itself
    if what_decoder_lacks(spec.hf_config) is None:
        decoder = DecoderConfig.from_hf(spec.hf_config)
        shape = (decoder.num_heads, decoder.num_kv_heads, decoder.head_dim)
    backend = make_backend(name, spec.device)
    reason = why_it_cannot_run(backend, spec.device, spec.dtype, block_size, *shape)
    if reason is None:
        return backend
    if name == "auto" and backend.name != "torch":
        logger.info("attention_backend='auto' is 'torch', because %r cannot run here: %s", backend.name, reason)
        return choose_backend("torch", spec, block_size)
    others = quoted([other for other in ATTENTION_BACKENDS if other != name])
    raise invalid("attention_backend", name, f"{others}, because this one cannot run here: {reason}")


def make_backend(name: str, device: torch.device) -> AttentionBackend:
    """The attention backend of that name. "auto" is "triton" on a GPU if Triton is installed, else "torch".

    Raises ValueError for another name, and for "triton" where its kernels cannot run.
    """
    check_choice("attention_backend", name, ATTENTION_BACKENDS)
    has_triton = importlib.util.find_spec("triton") is not None
    if name == "auto":
        if device.type == "cuda" and not has_triton:
            logger.info("attention_backend='auto' is 'torch', because Triton is not installed")
        name = "triton" if device.type == "cuda" and has_triton else "torch"
    if name == "torch":
        return TorchBackend()
    if name == "reference":
        return ReferenceBackend()
    if not has_triton:
        raise ValueError(
            "attention_backend='triton' is not valid here, where Triton is not installed (it is made for Linux); "
            f"allowed: {quoted([b for b in ATTENTION_BACKENDS if b != 'triton'])}"
        )
    # Imported only here: importing Triton takes time.
    from folovllm.attention.triton_backend import TritonBackend

    return TritonBackend(device)


def load_paged_model(spec: LoadSpec, backend: AttentionBackend, model_impl: str = "auto") -> PagedModel:
    """The model of a checkpoint, ready for inference.

    model_impl: "folovllm" is our decoder, "transformers" is Hugging Face's model, "auto" is our decoder if it supports
    the config and computes the same. Raises ValueError for a config that the chosen one does not support, and for
    weights as `load_decoder` and `load_hf_paged` do.
    """
    if model_impl == "transformers":
        return load_hf_paged(spec, backend)
    lacks = what_decoder_lacks(spec.hf_config)
    if lacks is None and spec.source.kind not in ("bundled", "config"):  # the tests check those
        lacks = how_decoder_differs(spec.hf_config)
        if lacks is not None and model_impl == "auto":
            logger.warning("model=%r runs with model_impl='transformers': %s", spec.source.name, lacks)
    if model_impl == "folovllm" and lacks is not None:
        raise ValueError(f"model_impl='folovllm' is not valid for this model: {lacks}; or model_impl='auto'")
    return load_decoder(spec) if lacks is None else load_hf_paged(spec, backend)


def what_decoder_lacks(hf_config: PretrainedConfig) -> str | None:
    """Why our decoder does not support this config; None if it does."""
    try:
        config = DecoderConfig.from_hf(hf_config)
        rope_frequencies(config.rope, config.head_dim)
    except ValueError as error:
        return str(error)
    except (KeyError, TypeError, AttributeError) as error:
        return f"its config cannot be read: {type(error).__name__} {error}"
    return None


def step_threads(config: EngineConfig, hf_config: PretrainedConfig, device: torch.device) -> tuple[int | None, str]:
    """The CPU threads of a step (None: as many as the process uses), and the reason. With a GPU, only `num_threads`."""
    if device.type != "cpu":
        return config.num_threads, "a GPU computes"
    return choose_num_threads(config.num_threads, hf_config.get_text_config().hidden_size)


def kv_capacity(config: EngineConfig, max_model_len: int) -> int:
    """The capacity of a contiguous cache, in tokens.

    num_kv_blocks of them if that is set; else a region for each running request, so that `max_num_seqs` alone limits
    admission.
    """
    if config.cache.num_kv_blocks is not None:
        return config.cache.num_kv_blocks * config.cache.block_size
    return config.max_num_seqs * max_model_len
