"""The parts of a paged engine, and how much memory its pool may have."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from folovllm.attention.backend import AttentionBackend
from folovllm.attention.reference import ReferenceBackend
from folovllm.attention.torch_compiled import TorchCompiledBackend
from folovllm.attention.torch_paged import TorchBackend
from folovllm.config import ATTENTION_BACKENDS, EngineConfig
from folovllm.engine.host_memory import GIB, free_cpu_bytes, keep_freed_memory
from folovllm.kv_cache.block_manager import BlockManager
from folovllm.kv_cache.interface import BlockPlan
from folovllm.kv_cache.prefix_cache import PrefixCache
from folovllm.kv_cache.storage import KVStorage
from folovllm.models.loader import ModelSource
from folovllm.models.paged_model import PagedModel, load_paged_model
from folovllm.runner.input_batch import InputBuffers
from folovllm.runner.paged_runner import PagedRunner
from folovllm.sampling.sampler import Sampler
from folovllm.sampling_params import SamplingParams
from folovllm.scheduler.output import NewRequest, ScheduledRequest, SchedulerOutput

CPU_MEMORY_SHARE = 0.25  # of the memory that is free once the model is loaded; the rest is for everybody else
GPU_SIZES = (1, 2, 4, *range(8, 513, 8))  # what steps on a GPU are padded to, as CUDA graphs want it


@dataclass
class PagedParts:
    """The books and the tensors of paged K/V, which agree on the number of blocks."""

    manager: BlockManager
    runner: PagedRunner


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
) -> PagedParts:
    """Load the model and make a pool for it. Raises ValueError if the memory does not hold a single request."""
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
    buffers = InputBuffers(
        max_tokens, max_requests, max_blocks, size, device, GPU_SIZES if device.type == "cuda" else ()
    )
    block_bytes = kv_block_bytes(model, size)
    num_blocks = config.cache.num_kv_blocks
    if num_blocks is None:
        free = free_bytes(config, model, buffers, sampler, backend, block_bytes)
        # More than all running requests at their longest, and a held leader each, would never be touched.
        num_blocks = min(free // block_bytes, 2 * max_requests * max_blocks)
        if num_blocks < 1:
            raise ValueError(
                f"the model leaves {free:,} bytes for K/V and a block takes {block_bytes:,}; allowed: a smaller "
                "block_size or max_num_batched_tokens, a larger gpu_memory_utilization, or num_kv_blocks of your choice"
            )
    swaps = config.scheduler.preemption_mode == "swap"
    num_host_blocks = int(config.cache.swap_space * GIB) // block_bytes if swaps else 0
    storage = make_storage(model, num_blocks, num_host_blocks, size)
    return PagedParts(
        BlockManager(num_blocks, size, num_host_blocks, PrefixCache(size) if config.prefix_caching else None),
        PagedRunner(model, storage, backend, sampler, buffers, num_threads=num_threads),
    )


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
        # Only now: whoever imports folovllm for something else should not wait for Triton, or need it.
        from folovllm.attention.triton_paged import TritonBackend

        return TritonBackend(device)
    if name == "torch":
        return TorchBackend()
    if name == "reference":
        return ReferenceBackend()
    if name == "torch-compiled":
        return TorchCompiledBackend()
    raise ValueError(f"attention_backend={name!r} is not valid; allowed: {', '.join(ATTENTION_BACKENDS)}")


def make_storage(model: PagedModel, num_blocks: int, num_host_blocks: int, block_size: int) -> KVStorage:
    """A pool for the model's layers."""
    shape = model.config
    return KVStorage(
        shape.num_layers,
        num_blocks,
        num_host_blocks,
        block_size,
        shape.num_kv_heads,
        shape.head_dim,
        model.dtype,
        model.device,
    )


def kv_block_bytes(model: PagedModel, block_size: int) -> int:
    """Bytes of a block: keys and values of `block_size` tokens in all layers."""
    shape = model.config
    return 2 * shape.num_layers * block_size * shape.num_kv_heads * shape.head_dim * model.dtype.itemsize


def free_bytes(
    config: EngineConfig,
    model: PagedModel,
    buffers: InputBuffers,
    sampler: Sampler,
    backend: AttentionBackend,
    block_bytes: int,
) -> int:
    """Bytes that K/V may take. On a CPU a share of the free memory; on a GPU what the longest step leaves."""
    if model.device.type == "cpu":
        return int(CPU_MEMORY_SHARE * free_cpu_bytes())
    torch.cuda.synchronize(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    run_longest_step(model, buffers, sampler, backend)
    torch.cuda.synchronize(model.device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(model.device)
    now, peak = torch.cuda.memory_allocated(model.device), torch.cuda.max_memory_allocated(model.device)
    in_use = total - free + (peak - now)
    return max(0, int(total * config.cache.gpu_memory_utilization) - in_use)


def run_longest_step(model: PagedModel, buffers: InputBuffers, sampler: Sampler, backend: AttentionBackend) -> None:
    """One prefill of as many tokens as a step may have, sampled, to see how much memory that takes."""
    size = buffers.block_size
    num_tokens = min(len(buffers.token_ids.host), model.max_positions)  # of one request
    shares: list[ScheduledRequest] = []
    left, block = len(buffers.token_ids.host), 1
    while left > 0 and len(shares) < len(buffers.seq_lens.host):
        count = min(left, num_tokens)
        table = tuple(range(block, block + -(-count // size)))
        shares.append(ScheduledRequest(str(len(shares)), [0] * count, 0, True, BlockPlan("", 0, count, (), table)))
        left, block = left - count, table[-1] + 1
    storage = make_storage(model, block - 1, 0, size)
    runner = PagedRunner(model, storage, backend, sampler, buffers)
    params = SamplingParams(temperature=0)
    runner.execute(
        SchedulerOutput(shares, new_requests=[NewRequest(s.request_id, [0], params, frozenset()) for s in shares])
    )
