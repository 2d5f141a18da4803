"""Paged attention in Triton, the default on a GPU: launches the kernels of `triton_kernels`.

A launch is a grid (the number of programs along three axes) and arguments. The grid depends on the shapes of the step's
tensors, which are padded to a few sizes, and on whether all requests decode, but never on values on the device. So no
launch waits for the device, and a launch could be captured in a CUDA graph and replayed for another step of the same
size and kind. Programs without work end at once::

    attention_kernel    (blocks of queries, KV heads * chunks of their group, segments)

Without a GPU the kernels run in Triton's interpreter, on the CPU, if TRITON_INTERPRET=1 is set before Triton is
imported. That is for lessons and tests: it takes milliseconds for what takes a GPU microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from folovllm.attention.backend import AttentionBackend, AttentionParams, LayerKV
from folovllm.attention.metadata import AttentionMetadata
from folovllm.attention.triton_configs import ENOUGH_PROGRAMS, KernelConfig, KernelConfigs, choose_configs
from folovllm.attention.triton_kernels import attention_kernel, copy_kernel, reduce_kernel, write_kernel

# Whether Triton was imported with TRITON_INTERPRET=1: then its own functions are not compiled either.
INTERPRETED = not isinstance(triton.language.max, triton.JITFunction)
WRITE_CHUNK, COPY_CHUNK = 1024, 2048  # elements per program: a multiple of what its 128 threads load at once


class TritonBackend(AttentionBackend):
    """Ragged paged attention by the kernels, for prefills and decodes alike.

    device: of the tensors. configs: tile sizes instead of those of `choose_configs`. The constructor raises ValueError
    for a CPU without the interpreter, and `attend` for what `choose_configs` refuses.
    """

    name = "triton"

    def __init__(self, device: torch.device, configs: KernelConfigs | None = None) -> None:
        if device.type != "cuda" and not INTERPRETED:
            raise ValueError(
                f"attention_backend='triton' is not valid on device={str(device)!r}, for which Triton cannot compile; "
                "allowed: a GPU, another backend, or TRITON_INTERPRET=1 set in the environment before the start, which "
                "runs the kernels in Triton's slow interpreter"
            )
        self.device = device
        self.configs = configs
        self.capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)

    def write(self, kv: LayerKV, key: Tensor, value: Tensor, meta: AttentionMetadata) -> None:
        key, value = with_contiguous_heads(key), with_contiguous_heads(value)
        keys, values = kv.flat()
        num_tokens, widths = len(key), [x.shape[1] * x.shape[2] for x in (key, value)]
        with self._on_device():
            write_kernel[(num_tokens, triton.cdiv(max(widths), WRITE_CHUNK))](
                key, value, keys, values, meta.slot_mapping, key.stride(0), value.stride(0),
                WIDTH=widths[0], VALUE_WIDTH=widths[1], CHUNK=WRITE_CHUNK,
            )  # fmt: skip

    def attend(self, query: Tensor, kv: LayerKV, meta: AttentionMetadata, params: AttentionParams) -> Tensor:
        num_tokens, num_heads, dim = query.shape
        num_kv_heads, num_requests, value_dim = kv.keys.shape[2], len(meta.seq_lens), kv.values.shape[3]
        configs = self.configs or choose_configs(query.dtype, max(dim, value_dim), self.capability)
        config = configs.decode if meta.only_decodes else configs.prefill
        constants = attention_constants(config, num_heads, num_kv_heads, (dim, value_dim), meta.block_size, params)
        # A block of queries for every BLOCK_Q tokens, and one for each request because its last block is rounded up.
        q_blocks = num_tokens // (config.rows // constants["HEADS"]) + num_requests
        heads = num_kv_heads * triton.cdiv(constants["GROUP"], constants["HEADS"])
        segments = config.segments if q_blocks * heads < ENOUGH_PROGRAMS else 1
        # A captured launch may be replayed for a step with fewer tokens.
        padded = num_tokens > meta.num_tokens or (query.is_cuda and torch.cuda.is_current_stream_capturing())
        query = with_contiguous_heads(query)
        shape, device = (num_tokens, num_heads, value_dim), query.device
        keys, values = kv.flat()
        if segments > 1:
            out = torch.empty(shape, dtype=query.dtype, device=device)  # [T, Hq, Dv]
            splits = (num_tokens, num_heads, segments)
            partial_out = torch.empty(*splits, constants["PADDED_VALUE"], dtype=torch.float32, device=device)
            partial_max = torch.empty(splits, dtype=torch.float32, device=device)
            partial_sum = torch.empty(splits, dtype=torch.float32, device=device)
        else:  # no program writes rows of padding
            out = (torch.zeros if padded else torch.empty)(shape, dtype=query.dtype, device=device)  # [T, Hq, Dv]
            partial_out = partial_max = partial_sum = out  # not touched
        sinks = out if params.sinks is None else params.sinks  # not touched
        with self._on_device():
            attention_kernel[(q_blocks, heads, segments)](
                query, keys, values, out, sinks, meta.block_table, meta.seq_lens, meta.query_start_loc,
                partial_out, partial_max, partial_sum, num_requests, params.scale, params.softcap or 1.0,
                query.stride(0), keys.stride(0), values.stride(0), meta.block_table.stride(0),
                **constants, SEGMENTS=segments, num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip
            if segments > 1:
                reduce_kernel[(num_tokens * num_heads,)](
                    out, partial_out, partial_max, partial_sum, meta.query_start_loc, num_requests,
                    NUM_HEADS=num_heads, VALUE_DIM=value_dim, PADDED_VALUE=constants["PADDED_VALUE"], SEGMENTS=segments,
                )  # fmt: skip
        return out

    def copy_blocks(self, pool: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
        layers, parts, _, *block = pool.shape
        numbers = block[0] * block[1] * block[2]
        pin = pool.device.type == "cuda"  # a copy from pinned memory is asynchronous
        for together in independent(pairs):
            table = torch.tensor(together, dtype=torch.int32, pin_memory=pin).to(pool.device, non_blocking=True)
            with self._on_device():
                copy_kernel[(len(together), parts * layers, triton.cdiv(numbers, COPY_CHUNK))](
                    pool, table, pool.stride(1), BLOCK_NUMBERS=numbers, CHUNK=COPY_CHUNK
                )

    def _on_device(self) -> AbstractContextManager[Any]:
        """Make this GPU the current one, on which Triton launches."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


def attention_constants(
    config: KernelConfig,
    num_heads: int,
    num_kv_heads: int,
    head_dims: tuple[int, int],
    block_size: int,
    params: AttentionParams,
) -> dict[str, Any]:
    """The compile-time constants of `attention_kernel`, without SEGMENTS. head_dims: of keys, and of values."""
    # tl.dot needs sides of at least 16.
    padded_dim, padded_value = (max(16, triton.next_power_of_2(dim)) for dim in head_dims)
    group = num_heads // num_kv_heads
    return {
        "NUM_HEADS": num_heads,
        "GROUP": group,
        "HEADS": min(group, config.rows),
        "HEAD_DIM": head_dims[0],
        "VALUE_DIM": head_dims[1],
        "PADDED_DIM": padded_dim,
        "PADDED_VALUE": padded_value,
        "BLOCK_SIZE": block_size,
        "ROWS": config.rows,
        "TILE": config.tile,
        "TWO_LOOPS": config.two_loops and params.sliding_window is None,
        "WINDOW": params.sliding_window or 0,
        "SOFTCAP": params.softcap is not None,
        "SINKS": params.sinks is not None,
        # The interpreter silently computes with bfloat16 as if it were an integer.
        "WIDEN": INTERPRETED,
    }


def with_contiguous_heads(x: Tensor) -> Tensor:
    """`x` [T, H, D] itself if each token's heads are contiguous, with any stride between tokens; else a copy."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def independent(pairs: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Split the pairs (from, to), in order, into runs in which no pair writes what another one reads or writes."""
    run: list[tuple[int, int]] = []
    read: set[int] = set()
    written: set[int] = set()
    for source, target in pairs:
        if source in written or target in written or target in read:
            yield run
            run, read, written = [], set(), set()
        run.append((source, target))
        read.add(source)
        written.add(target)
    if run:
        yield run
