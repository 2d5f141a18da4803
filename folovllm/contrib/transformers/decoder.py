"""Any Hugging Face decoder on flattened tokens and K/V in blocks (vLLM: `vllm/model_executor/models/transformers`).

transformers can replace the attention of its models: a function is registered under a name, and every attention layer
calls it with its queries, keys and values, RoPE applied. Everything else is the model's own code::

    token ids [T] -> embedding, norms, MLPs of the model -> hidden states [T, E] -> its own head -> logits [N, V]
                            |                  ^
                            v                  |
              `paged_attention`: write K and V to their slots, attend over blocks

The model sees one sequence of T tokens, whose positions start again with each request. That is correct only if tokens
are mixed by the registered function alone, which the library does not guarantee: a model that computes attention by
itself would let requests read each other's tokens, without an error. So each model is checked first: see
`folovllm.contrib.transformers.check`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from folovllm.attention.backend import AttentionBackend, AttentionParams, LayerKV
from folovllm.attention.metadata import AttentionMetadata
from folovllm.models.paged_model import KVShape

IMPLEMENTATION = "folovllm_paged"  # `paged_attention`'s name in transformers
# Keyword arguments of layers that do not change the result here.
IGNORED = ("dropout", "position_ids", "output_attentions", "output_hidden_states", "use_cache", "return_dict")


@dataclass
class PagedStep:
    """One forward's K/V, metadata and backend, passed through the model's own code as a keyword argument."""

    kv: Sequence[LayerKV]
    meta: AttentionMetadata
    backend: AttentionBackend
    calls: list[int] = field(default_factory=list)  # layers that called the attention function, in order

    def layer_kv(self, layer: int, key: Tensor, value: Tensor) -> LayerKV:
        """The pool that the layer will write `key` [T, Hkv, D] and `value` [T, Hkv, Dv] to."""
        return self.kv[layer]


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    paged_step: PagedStep | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function that attention layers call: query [1, Hq, T, D] to [1, T, Hq, Dv].

    key, value: [1, Hkv, T, D] and [1, Hkv, T, Dv]. s_aux: sinks, [Hq]. attention_mask: the length of the sliding
    window, from `window_of_mask`; None for no window. Raises ValueError for what the backends do not support; the check
    before the first request triggers it.
    """
    layer = getattr(module, "layer_idx", None)
    if paged_step is None or layer is None:
        raise ValueError("its attention layers have no layer_idx, or do not pass on keyword arguments")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError("its attention is not causal (is_causal=False)")
    for name, given in others.items():
        if name not in IGNORED and given is not None and given is not False:
            raise ValueError(f"its attention uses {name}, which no attention_backend has")
    if attention_mask is not None and attention_mask.numel() != 1:
        raise ValueError("it builds its own attention mask")
    window = None if attention_mask is None else int(attention_mask)
    if sliding_window is not None and sliding_window != window:
        raise ValueError(f"layer {layer} has sliding_window={sliding_window}, and its mask has {window}")
    # [T, H, D], contiguous, as kernels require.
    query, key, value = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    kv = paged_step.layer_kv(layer, key, value)
    paged_step.calls.append(layer)
    paged_step.backend.write(kv, key, value, paged_step.meta)
    params = AttentionParams(query.shape[-1] ** -0.5 if scaling is None else scaling, window, softcap, s_aux)
    return paged_step.backend.attend(query, kv, paged_step.meta, params)[None], None


def window_of_mask(local_size: int | None = None, use_vmap: bool = False, **others: Any) -> Tensor | None:
    """Replaces the causal mask: the sliding window as a tensor of [1, 1, 1, 1]; None for no window.

    Hugging Face's attention takes the window from the mask; not every model passes it to the attention function too.
    Raises ValueError if the model adds its own rule to the causal mask (`use_vmap`).
    """
    if use_vmap:
        raise ValueError("it adds to the causal mask")
    return None if local_size is None else torch.full((1, 1, 1, 1), local_size)


def register() -> None:
    """Register `paged_attention` with transformers. May be repeated."""
    # Imported here, because these names load torch's compiler and Triton.
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, paged_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, window_of_mask)


class HFPagedModel:
    """A Hugging Face model as a `PagedModel`.

    The model's attention implementation is `IMPLEMENTATION`. Engines cannot share a model.
    """

    def __init__(self, model: transformers.PreTrainedModel, config: KVShape, max_positions: int) -> None:
        self.config, self.max_positions = config, max_positions
        self.dtype, self.device = model.dtype, model.device
        self.model = model
        self.body: Any = model.base_model
        self.head: Any = head_of(model)

    def __call__(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv: list[LayerKV],
        meta: AttentionMetadata,
        backend: AttentionBackend,
    ) -> Tensor:
        return self.run(token_ids, positions, PagedStep(kv, meta, backend))

    def run(self, token_ids: Tensor, positions: Tensor, step: PagedStep) -> Tensor:
        """The forward of one step: hidden states [T, E]. Raises RuntimeError unless each layer attended once."""
        out = self.body(input_ids=token_ids[None], position_ids=positions[None], use_cache=False, paged_step=step)
        if sorted(step.calls) != list(range(self.config.num_layers)):
            raise RuntimeError(
                f"a forward called the attention function {len(step.calls)} times, from {len(set(step.calls))} layers; "
                f"allowed: once from each of its {self.config.num_layers} layers"
            )
        return out.last_hidden_state[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states of the rows that sample, [N, E], to logits, [N, V], scaled or capped as the model does."""
        return self.head(inputs_embeds=hidden[None], use_cache=False).logits[0]


class GivenOutput:
    """The output of `GivenHiddenStates`: hidden states, by name or as the first item. All other fields are None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


class GivenHiddenStates(nn.Module):
    """Replaces a model's body: returns the given embeddings as hidden states."""

    def forward(self, *ids: None, inputs_embeds: Tensor, **others: Any) -> GivenOutput:
        return GivenOutput(inputs_embeds)

    @property
    def decoder(self) -> GivenHiddenStates:
        """Some heads (OPT's) call `body.decoder`."""
        return self


def head_of(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The model without its body, with the same weights: its own code from hidden states to logits.

    So scaled or capped logits are computed by the model's own code, for the rows that sample only.
    """
    head = copy.copy(model)
    head._modules = {**model._modules, model.base_model_prefix: GivenHiddenStates()}
    return head
