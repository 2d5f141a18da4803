"""How much memory the pool of blocks may take (V1: `determine_available_memory`, `profile_run`)."""

from __future__ import annotations

import logging

import torch

from folovllm.attention.backend import AttentionBackend
from folovllm.config import EngineConfig
from folovllm.kv_cache.interface import BlockPlan
from folovllm.math_utils import cdiv
from folovllm.messages import NewRequestData, ScheduledRequest, SchedulerOutput
from folovllm.models.paged_model import PagedModel
from folovllm.runner.host_memory import GIB, free_cpu_bytes
from folovllm.runner.input_batch import InputBatch
from folovllm.runner.kv_storage import KVStorage
from folovllm.runner.paged_runner import PagedRunner
from folovllm.sampling.sampler import Sampler
from folovllm.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

CPU_MEMORY_SHARE = 0.25  # of the memory available after the model is loaded


def kv_block_bytes(model: PagedModel, block_size: int) -> int:
    """Bytes of a block: keys and values of `block_size` tokens in all layers."""
    kv = model.config
    return kv.num_layers * block_size * kv.num_kv_heads * sum(kv.head_dims) * model.dtype.itemsize


def determine_available_memory(
    config: EngineConfig, model: PagedModel, buffers: InputBatch, sampler: Sampler, backend: AttentionBackend
) -> int:
    """Bytes that K/V may take. On a CPU a share of the available memory; on a GPU what the largest step leaves."""
    if model.device.type == "cpu":
        return int(CPU_MEMORY_SHARE * free_cpu_bytes())
    torch.cuda.synchronize(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    profile_run(model, buffers, sampler, backend)
    torch.cuda.synchronize(model.device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(model.device)
    now, peak = torch.cuda.memory_allocated(model.device), torch.cuda.max_memory_allocated(model.device)
    ours = int(total * config.cache.gpu_memory_utilization) - peak
    available = max(0, min(ours, free - (peak - now)))
    if available < ours:  # other processes use the card, too
        logger.warning(
            "gpu_memory_utilization=%s of %.1f GiB would leave %.1f GiB for K/V; %.1f GiB are free, which are taken",
            config.cache.gpu_memory_utilization, total / GIB, ours / GIB, available / GIB,
        )  # fmt: skip
    return available


def memory_share(config: EngineConfig, device: torch.device) -> str:
    """`determine_available_memory` in words."""
    if device.type == "cpu":
        return f"{CPU_MEMORY_SHARE:.0%} of the memory that is free to this process"
    return f"what gpu_memory_utilization={config.cache.gpu_memory_utilization} leaves"


def profile_run(model: PagedModel, buffers: InputBatch, sampler: Sampler, backend: AttentionBackend) -> None:
    """Run the largest step, a prefill of the whole token budget with sampling, to measure its peak memory."""
    size = buffers.block_size
    num_tokens = min(len(buffers.token_ids.host), model.max_positions)  # at most, of one request
    shares: list[ScheduledRequest] = []
    left, block = len(buffers.token_ids.host), 1
    while left > 0 and len(shares) < len(buffers.seq_lens.host):
        count = min(left, num_tokens)
        table = tuple(range(block, block + cdiv(count, size)))
        shares.append(ScheduledRequest(str(len(shares)), [0] * count, 0, True, BlockPlan("", 0, count, (), table)))
        left, block = left - count, table[-1] + 1
    storage = KVStorage(model.config, model.dtype, model.device, size, block - 1)
    runner = PagedRunner(model, storage, backend, sampler, buffers)
    params = SamplingParams(temperature=0)
    new = [NewRequestData(share.request_id, [0], params, frozenset()) for share in shares]
    step = SchedulerOutput(shares, scheduled_new_reqs=new)
    runner.update_states(step)
    runner.execute_model(step)
