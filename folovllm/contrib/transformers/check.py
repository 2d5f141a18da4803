"""Check, before any request, that a Hugging Face model computes the same on ragged tokens in blocks as by itself.

transformers does not say which models leave all attention to the registered function. The text of those that do not is
plausible but wrong. So two short texts are run both ways::

    reference:  Hugging Face's own "eager" attention, each text alone
    ours:       step 1  | a third of a | a third of b |           one forward each, K/V in blocks of 4,
                step 2  | rest of a          | rest of b   |      block tables interleaved

Every layer must call the attention function exactly once per forward, all with K/V of the same shapes, and the logits
must be equal up to rounding. What only starts at some length is read in the config (`folovllm.models.families`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor

from folovllm.attention.backend import AttentionBackend, LayerKV
from folovllm.attention.torch_backend import TorchBackend
from folovllm.contrib.transformers.decoder import IMPLEMENTATION, HFPagedModel, PagedStep, register
from folovllm.kv_cache.interface import BlockPlan
from folovllm.math_utils import cdiv
from folovllm.messages import ScheduledRequest
from folovllm.models.loader import LoadSpec, load_hf_model
from folovllm.models.paged_model import KVShape
from folovllm.runner.hf.check import MODEL_ERRORS, too_far, trial_texts, why_not_side_by_side
from folovllm.runner.input_batch import InputBatch

LENGTHS = (9, 6)  # tokens of the two texts
BLOCK_SIZE = 4


def load_hf_paged(spec: LoadSpec, backend: AttentionBackend) -> HFPagedModel:
    """The Hugging Face model of a checkpoint, checked with this backend.

    Raises ValueError for a checkpoint as `load_hf_model` does, and for a model that fails the check.
    """
    longest = spec.max_positions or spec.hf_config.get_text_config().max_position_embeddings
    model = load_hf_model(spec.source, spec.dtype, spec.device, spec.load_format, spec.seed, "eager")
    return checked(model, backend, longest)


def checked(model: transformers.PreTrainedModel, backend: AttentionBackend, max_positions: int) -> HFPagedModel:
    """The paged model of a model with eager attention. Raises ValueError if it fails the check.

    What the message recommends has been tried on this very model.
    """
    paged = try_in_blocks(model, backend, max_positions)
    if isinstance(paged, HFPagedModel):
        return paged
    kind, what_runs_it = model.config.model_type, advice(model, backend, max_positions)
    raise ValueError(f"model_type={kind!r} cannot have its K/V in blocks: {paged}; {what_runs_it}")


def advice(model: transformers.PreTrainedModel, backend: AttentionBackend, max_positions: int) -> str:
    """What runs a model that failed the check with this backend, if anything does."""
    if not isinstance(backend, TorchBackend) and isinstance(try_in_blocks(model, TorchBackend(), 0), HFPagedModel):
        return "attention_backend='torch' runs it"
    if model.config._attn_implementation == IMPLEMENTATION:  # some models do not let it be replaced
        model.set_attn_implementation(model.get_correct_attn_implementation(None))  # as at m1 and m2
    reasons = {
        name: why_not_side_by_side(model, batching, max_positions)
        for name, batching in (("m1", "loop"), ("m2", "padded"))
    }
    able = [name for name, reason in reasons.items() if reason is None]
    if not able:
        return f"milestones m1 and m2 cannot run it either: {reasons['m1']}"
    runs = "milestones m1 and m2 run" if len(able) > 1 else f"milestone {able[0]} runs"
    return f"{runs} it, with Hugging Face's own attention"


def try_in_blocks(
    model: transformers.PreTrainedModel, backend: AttentionBackend, max_positions: int
) -> HFPagedModel | str:
    """The paged model of a model, or why there is none."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", max(LENGTHS))
    texts = trial_texts(model, [min(n, longest) for n in LENGTHS])
    register()
    try:
        if model.config._attn_implementation == IMPLEMENTATION:
            model.set_attn_implementation("eager")
        expected = [reference_logits(model, ids) for ids in texts]  # each [L, V]
        model.set_attn_implementation(IMPLEMENTATION)
        paged, logits = try_out(model, backend, texts, max_positions)
    except torch.OutOfMemoryError:
        raise
    except MODEL_ERRORS as error:
        return str(error) or type(error).__name__
    return too_far(torch.cat(logits), torch.cat(expected), "for ragged tokens") or paged


@dataclass
class TrialStep(PagedStep):
    """A step of the check. A layer's pool is made on its first call, in the shape of its keys."""

    pools: dict[int, LayerKV] = field(default_factory=dict)
    num_blocks: int = 0  # of each pool
    dtype: torch.dtype = torch.float32  # of each pool

    def layer_kv(self, layer: int, key: Tensor, value: Tensor) -> LayerKV:
        """Raises ValueError if keys and values differ in number, or two layers in shape."""
        if key.dtype != self.dtype or value.dtype != self.dtype:
            raise ValueError(
                f"layer {layer} has keys in {key.dtype} and values in {value.dtype}; allowed: {self.dtype}"
            )
        shapes = [(self.num_blocks, BLOCK_SIZE, *x.shape[1:]) for x in (key, value)]
        first = next(iter(self.pools.values()), None)
        as_first = first is None or [first.keys.shape, first.values.shape] == shapes
        if key.shape[:2] != value.shape[:2] or not as_first:
            raise ValueError(
                f"layer {layer} has keys of {list(key.shape[1:])} and values of {list(value.shape[1:])} per token "
                "(heads, head size); allowed: as many heads for both, and the same shapes in all layers"
            )
        if layer not in self.pools:
            self.pools[layer] = LayerKV(*(key.new_zeros(shape) for shape in shapes))
        return self.pools[layer]


@torch.inference_mode()
def reference_logits(model: transformers.PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    """Logits of every token of one text with the model's own attention, [L, V]."""
    return model(input_ids=torch.tensor([token_ids], device=model.device), use_cache=False).logits[0]


@torch.inference_mode()
def try_out(
    model: transformers.PreTrainedModel, backend: AttentionBackend, texts: Sequence[list[int]], max_positions: int
) -> tuple[HFPagedModel, list[Tensor]]:
    """The paged model, and logits of every token of every text, each [L, V], from two ragged steps over blocks."""
    num_layers = int(model.config.get_text_config().num_hidden_layers)
    num_blocks = max(cdiv(len(ids), BLOCK_SIZE) for ids in texts)  # of one text
    # Table i of n texts is i + 1, i + 1 + n, i + 1 + 2n ...: no text has two consecutive blocks.
    tables = [tuple(range(i + 1, 1 + len(texts) * num_blocks, len(texts))) for i in range(len(texts))]
    buffers = InputBatch(sum(map(len, texts)), len(texts), num_blocks, BLOCK_SIZE, model.device)
    thirds = [cdiv(len(ids), 3) for ids in texts]
    parts = [(0, third) for third in thirds], [(third, len(ids)) for third, ids in zip(thirds, texts, strict=True)]
    pools: dict[int, LayerKV] = {}
    paged = HFPagedModel(model, KVShape(num_layers, 0, 0), max_positions)
    logits: list[list[Tensor]] = [[] for _ in texts]
    for part in parts:
        shares = [
            ScheduledRequest(str(i), texts[i][a:b], a, False, BlockPlan("", a, b - a, (), tables[i]))
            for i, (a, b) in enumerate(part)
            if a < b
        ]
        batch = buffers.fill(shares)
        step = TrialStep([], batch.metadata, backend, [], pools, 1 + len(texts) * num_blocks, model.dtype)
        hidden = paged.run(batch.token_ids, batch.positions, step)  # [T, E]
        for share, rows in zip(shares, hidden.split([share.num_tokens for share in shares]), strict=True):
            logits[int(share.request_id)].append(paged.logits(rows))
    _, _, num_kv_heads, head_dim = pools[0].keys.shape
    paged.config = KVShape(num_layers, num_kv_heads, head_dim, v_head_dim=pools[0].values.shape[-1])
    return paged, [torch.cat(found) for found in logits]
