"""Any Hugging Face decoder on flattened tokens and K/V in blocks (vLLM: `vllm/model_executor/models/transformers`).

transformers lets one replace the attention of its models: a function is registered under a name, and every attention
layer calls it with its queries, keys and values, positions already applied. All else stays the model's own code::

    token ids [T] -> embedding, norms, MLPs of the model -> hidden states [T, E] -> its own head -> logits [N, V]
                            |                  ^
                            v                  |
              `paged_attention`: write K and V to their slots, attend over blocks

The model sees one sequence of T tokens, whose positions start again and again. That is right only if nothing but the
registered function mixes tokens, and nothing in the library promises it: a model may compute attention by itself, and
then every request reads its neighbours' tokens, without an error. So none is trusted: see
`folovllm.contrib.transformers.check`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from folovllm.attention.backend import AttentionBackend, AttentionParams, LayerKV
from folovllm.attention.metadata import AttentionMetadata

if TYPE_CHECKING:  # at run time this name would bring torch's compiler and Triton along
    from transformers import PreTrainedModel

IMPLEMENTATION = "folovllm_paged"  # the name under which transformers knows `paged_attention`
# What layers may hand over beside the arguments below, and what no result here depends on.
IGNORED = ("dropout", "position_ids", "output_attentions", "output_hidden_states", "use_cache", "return_dict")


@dataclass(frozen=True)
class KVShape:
    """The K/V that the pool must hold for each token."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


@dataclass
class PagedStep:
    """One forward's K/V, metadata and backend. It travels through the model's own code as a keyword argument."""

    kv: Sequence[LayerKV]
    meta: AttentionMetadata
    backend: AttentionBackend
    calls: list[int] = field(default_factory=list)  # the layers that asked for attention so far, in their order

    def layer_kv(self, layer: int, key: Tensor, value: Tensor) -> LayerKV:
        """The pool of a layer that is about to write `key` and `value`, each [T, Hkv, D]."""
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
    """What an attention layer calls: query [1, Hq, T, D], key and value [1, Hkv, T, D] in, ([1, T, Hq, D], None) out.

    attention_mask: no mask but the window's length, from `window_of_mask`; None for no window. Raises ValueError, by
    name, for what the backends do not have: a model that needs such a thing is found out before its first request.
    """
    layer = getattr(module, "layer_idx", None)
    if paged_step is None or layer is None:
        raise ValueError("its attention layers do not say which layer they are, or do not hand on keyword arguments")
    if s_aux is not None:
        raise ValueError("its attention has sinks (s_aux), which no attention_backend has")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError("its attention is not causal (is_causal=False)")
    for name, given in others.items():
        if name not in IGNORED and given is not None and given is not False:
            raise ValueError(f"its attention wants {name}, which no attention_backend has")
    if attention_mask is not None and attention_mask.numel() != 1:
        raise ValueError("it makes an attention mask of its own")
    window = None if attention_mask is None else int(attention_mask)
    if sliding_window is not None and sliding_window != window:
        raise ValueError(f"layer {layer} says sliding_window={sliding_window}, and its mask says {window}")
    # Kernels index rows of heads: [T, H, D], one token behind the other.
    query, key, value = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    kv = paged_step.layer_kv(layer, key, value)
    paged_step.calls.append(layer)
    # All K/V of the step is stored before anybody attends, as in our own decoder.
    paged_step.backend.write(kv, key, value, paged_step.meta)
    params = AttentionParams(query.shape[-1] ** -0.5 if scaling is None else scaling, window, softcap)
    return paged_step.backend.attend(query, kv, paged_step.meta, params)[None], None


def window_of_mask(local_size: int | None = None, use_vmap: bool = False, **others: Any) -> Tensor | None:
    """What a model gets when it makes a mask, causal in any case: [1, 1, 1, 1] with its sliding window; None for none.

    The mask is what Hugging Face's own attention obeys. Not every model tells its window to the attention as well.
    Raises ValueError for a mask with an addition of the model's own (`use_vmap`).
    """
    if use_vmap:
        raise ValueError("it adds to the causal mask")
    return None if local_size is None else torch.full((1, 1, 1, 1), local_size)


def register() -> None:
    """Make `paged_attention` known to transformers. Doing it again changes nothing."""
    # Here, because these names bring torch's compiler and Triton along.
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, paged_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, window_of_mask)


class HFPagedModel:
    """A Hugging Face model behind the interface of `folovllm.models.paged_model.PagedModel`.

    model must attend with `IMPLEMENTATION`, and is this object's own: another engine needs another one.
    """

    def __init__(self, model: PreTrainedModel, config: KVShape, max_positions: int) -> None:
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
        """Token ids and positions, [T] each, in; hidden states [T, E] out. K/V of all tokens is written to `kv`."""
        return self.run(token_ids, positions, PagedStep(kv, meta, backend))

    def run(self, token_ids: Tensor, positions: Tensor, step: PagedStep) -> Tensor:
        """The forward of one step: hidden states [T, E]. Raises RuntimeError unless each layer attended once."""
        out = self.body(input_ids=token_ids[None], position_ids=positions[None], use_cache=False, paged_step=step)
        if sorted(step.calls) != list(range(self.config.num_layers)):
            raise RuntimeError(
                f"a forward called the attention function {len(step.calls)} times, from {len(set(step.calls))} layers; "
                f"allowed: once from each of its {self.config.num_layers} layers"
            )
        hidden: Tensor = out.last_hidden_state[0]  # [T, E]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states of the rows that sample, [N, E], as logits, [N, V], with whatever the model does to them."""
        logits: Tensor = self.head(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits


class GivenOutput:
    """What a body returns, as far as a head reads it: the hidden states, by name or as the first item; else None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


class GivenHiddenStates(nn.Module):
    """Stands where a model's body was, and returns as its result the embeddings that it is given."""

    def forward(self, *ids: None, inputs_embeds: Tensor, **others: Any) -> GivenOutput:
        """[1, N, E] in and out."""
        return GivenOutput(inputs_embeds)

    @property
    def decoder(self) -> GivenHiddenStates:
        """Some heads (OPT's) ask the body's `decoder`."""
        return self


def head_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model's own code from hidden states to logits: the same model and weights, without its body.

    So its scaling or capping of logits is done by the code that defines it, for as few rows as one likes.
    """
    head = copy.copy(model)
    head._modules = {**model._modules, model.base_model_prefix: GivenHiddenStates()}
    return head
