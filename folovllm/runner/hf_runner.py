"""Hugging Face's own forward, one request at a time, with one `DynamicCache` per request (M1).

The shapes of one call: token ids [1, L] and positions [1, L] in, logits [1, 1, V] of the last row out; the cache grows
by L along its third axis, [1, Hkv, T, D] per layer for keys and for values.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from folovllm.kv_cache.interface import KVCopy, KVOp
from folovllm.runner.interface import ModelRunner, RunnerOutput
from folovllm.sampling.sampler import Sampler, SamplingState
from folovllm.scheduler.output import NewRequest, ScheduledRequest, SchedulerOutput

if TYPE_CHECKING:  # at run time this name would bring torch's compiler and Triton along
    from transformers import PreTrainedModel

NO_CHOICE = "the logits leave no token to choose: they hold NaN or +inf, or logit_bias and min_tokens ban every token"
# Layers whose K/V is a plain list of tokens. Others keep a running state that cannot be forked at a chosen token.
SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}


@dataclass
class RequestState:
    """What the runner remembers of a live request."""

    sampling: SamplingState
    cache: DynamicCache


class HFRunner(ModelRunner):
    """Runs each scheduled request with its own forward pass and samples them together."""

    def __init__(
        self, model: PreTrainedModel, sampler: Sampler, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        layers = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
        if not layers <= SUPPORTED_LAYERS:
            raise ValueError(
                f"the model has layers of type {sorted(layers - SUPPORTED_LAYERS)}; allowed: {sorted(SUPPORTED_LAYERS)}"
            )
        self.model = model
        self.sampler = sampler
        self.clock = clock
        self.states: dict[str, RequestState] = {}

    def execute(self, step: SchedulerOutput) -> RunnerOutput:
        """See `ModelRunner.execute`."""
        start = self.clock()
        forked = self._apply(step.kv_ops)
        for request_id in step.finished_ids:
            self.states.pop(request_id, None)
        for new in step.new_requests:
            self.states[new.request_id] = self._new_state(new, forked.get(new.request_id))
        prepared = self.clock()
        rows = [self._forward(share) for share in step.scheduled]
        forwarded = self.clock()
        result = self._sample(step.scheduled, rows)
        result.forwards = len(rows)
        result.phases = {
            "prepare": (start, prepared),
            "forward": (prepared, forwarded),
            "sample": (forwarded, self.clock()),
        }
        return result

    def _apply(self, kv_ops: list[KVOp]) -> dict[str, DynamicCache]:
        """Copy caches: destination id -> its cache."""
        copies = [op for op in kv_ops if isinstance(op, KVCopy)]
        if len(copies) != len(kv_ops):
            raise RuntimeError(f"a contiguous cache can only be copied, and was asked for {kv_ops}")
        return {op.dst: copy_cache(self.states[op.src].cache, op.num_tokens) for op in copies}

    def _new_state(self, new: NewRequest, cache: DynamicCache | None) -> RequestState:
        sampling = SamplingState(
            new.sampling_params,
            new.prompt_token_ids,
            [],
            new.stop_token_ids,
            self.sampler.make_generator(new.sampling_params),
        )
        # No config is given to the cache on purpose: with one, sliding-window layers keep only their window, and such
        # a cache cannot be cut back to a prompt. The attention mask still applies the window.
        return RequestState(sampling, cache if cache is not None else DynamicCache())

    @torch.inference_mode()
    def _forward(self, share: ScheduledRequest) -> Tensor:
        """One request through the model: its last row's logits, [1, V]."""
        device = self.model.device
        token_ids = torch.tensor([share.token_ids], device=device)  # [1, L]
        positions = torch.arange(share.start, share.start + share.num_tokens, device=device)[None]  # [1, L]
        out = self.model(
            input_ids=token_ids,
            position_ids=positions,
            past_key_values=self.states[share.request_id].cache,
            use_cache=True,
            logits_to_keep=1,  # the LM head is the widest layer: one row of it is all that sampling needs
        )
        logits: Tensor = out.logits[:, -1]  # [1, V]
        return logits

    def _sample(self, scheduled: list[ScheduledRequest], rows: list[Tensor]) -> RunnerOutput:
        result = RunnerOutput()
        sampling = [i for i, share in enumerate(scheduled) if share.samples]
        states = [self.states[scheduled[i].request_id].sampling for i in sampling]
        result.sampled_token_ids = [[] for _ in scheduled]
        result.logprobs = [None] * len(scheduled)
        if not states:
            return result
        logits = rows[sampling[0]] if len(sampling) == 1 else torch.cat([rows[i] for i in sampling])  # [R, V]
        out = self.sampler(logits, states)
        result.failed = {scheduled[sampling[row]].request_id: NO_CHOICE for row in out.bad_rows}
        for i, state, token_id, logprobs in zip(sampling, states, out.token_ids, out.logprobs, strict=True):
            if scheduled[i].request_id in result.failed:
                continue
            state.output_token_ids.append(token_id)
            result.sampled_token_ids[i] = [token_id]
            result.logprobs[i] = None if logprobs is None else [logprobs]
        return result


def copy_cache(cache: DynamicCache, num_tokens: int) -> DynamicCache:
    """A new cache with the K/V of the first `num_tokens` tokens of `cache`, sharing no memory with it."""
    copy = DynamicCache()
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
            raise RuntimeError(f"layer {index} is a {type(layer).__name__} without keys and values to copy")
        keys = layer.keys[:, :, :num_tokens].clone()  # [1, Hkv, num_tokens, D]
        values = layer.values[:, :, :num_tokens].clone()  # [1, Hkv, num_tokens, D]
        copy.update(keys, values, index)
    return copy
