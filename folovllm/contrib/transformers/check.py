"""Check, before any request, that a Hugging Face model computes the same on ragged tokens in blocks as by itself.

transformers does not say which models leave all attention to the registered function. The text of those that do not is
plausible but wrong. So two short texts are run both ways::

    reference:  Hugging Face's own "eager" attention, each text alone
    ours:       step 1  | a third of a | a third of b |           one forward each, K/V in blocks of 4,
                step 2  | rest of a          | rest of b   |      block tables interleaved

Every layer must call the attention function exactly once per forward, all with K/V of one shape, and the logits must be
equal up to rounding. Features that only start at some length are looked up in the config.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig

from folovllm.attention.backend import AttentionBackend, LayerKV
from folovllm.contrib.transformers.decoder import IMPLEMENTATION, HFPagedModel, PagedStep, register
from folovllm.kv_cache.interface import BlockPlan
from folovllm.math_utils import cdiv
from folovllm.messages import ScheduledRequest
from folovllm.models.loader import LoadSpec, load_hf_model
from folovllm.models.paged_model import KVShape
from folovllm.runner.input_batch import InputBatch

LAYER_TYPES = ("full_attention", "sliding_attention")  # K/V per token, of which all or the last ones are attended to
LENGTHS = (9, 6)  # tokens of the two texts
BLOCK_SIZE = 4
# The largest relative distance between two rows of logits that counts as rounding. A model without attention, or one
# that reads another request's tokens, is about 1 away.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.7}
# What model code raises when it is called in an unforeseen way.
MODEL_ERRORS = (ValueError, TypeError, AttributeError, RuntimeError, KeyError, IndexError)


def load_hf_paged(spec: LoadSpec, backend: AttentionBackend) -> HFPagedModel:
    """The Hugging Face model of a checkpoint, checked with this backend.

    Raises ValueError for a checkpoint as `load_hf_model` does, and for a model that fails the check.
    """
    longest = spec.max_positions or spec.hf_config.get_text_config().max_position_embeddings
    check_config(spec.hf_config, longest)
    model = load_hf_model(spec.source, spec.dtype, spec.device, spec.load_format, spec.seed, "eager")
    return checked(model, backend, longest)


def refused(hf_config: PretrainedConfig, reason: str) -> ValueError:
    """The error for a model that would be wrong with K/V in blocks."""
    return ValueError(
        f"model_type={hf_config.model_type!r} cannot have its K/V in blocks: {reason}; "
        "milestones m1 and m2 use Hugging Face's own attention"
    )


def check_config(hf_config: PretrainedConfig, max_positions: int) -> None:
    """Raise ValueError for unsupported features that a few tokens would not show."""
    text = hf_config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or LAYER_TYPES)
    if not kinds <= set(LAYER_TYPES):
        raise refused(
            hf_config, f"it has layers of type {sorted(kinds - set(LAYER_TYPES))}, allowed: {', '.join(LAYER_TYPES)}"
        )
    for rope in rope_parameters(text):
        # Once one token of a forward is past the original length, the frequencies of all its tokens change.
        original = rope.get("original_max_position_embeddings", max_positions)
        if rope.get("rope_type") == "longrope" and max_positions > original:
            raise refused(
                hf_config,
                f"max_model_len={max_positions} is not valid with rope_type='longrope', which changes for all requests "
                f"of a forward when one is longer than {original}; allowed: at most {original}",
            )


def rope_parameters(text: PretrainedConfig) -> list[dict[str, Any]]:
    """The RoPE settings of a config: one, or one per type of layer, or none."""
    given = getattr(text, "rope_parameters", None) or {}
    return [given, *(value for value in given.values() if isinstance(value, dict))]


@dataclass
class TrialStep(PagedStep):
    """A step of the check. A layer's pool is made on its first call, in the shape of its keys."""

    pools: dict[int, LayerKV] = field(default_factory=dict)
    num_blocks: int = 0  # of each pool
    dtype: torch.dtype = torch.float32  # of each pool

    def layer_kv(self, layer: int, key: Tensor, value: Tensor) -> LayerKV:
        """Raises ValueError if keys and values, or two layers, differ in shape."""
        if key.dtype != self.dtype or value.dtype != self.dtype:
            raise ValueError(
                f"layer {layer} has keys in {key.dtype} and values in {value.dtype}; allowed: {self.dtype}"
            )
        shape = (self.num_blocks, BLOCK_SIZE, *key.shape[1:])
        first = next(iter(self.pools.values()), None)
        if key.shape != value.shape or (first is not None and first.keys.shape != shape):
            raise ValueError(
                f"layer {layer} has keys of {list(key.shape[1:])} and values of {list(value.shape[1:])} per token "
                "(heads, head size); allowed: one shape for both, and for all layers"
            )
        if layer not in self.pools:
            self.pools[layer] = LayerKV(key.new_zeros(shape), key.new_zeros(shape))
        return self.pools[layer]


def checked(model: transformers.PreTrainedModel, backend: AttentionBackend, max_positions: int) -> HFPagedModel:
    """The paged model of a model with eager attention. Raises ValueError if it fails the check."""
    text = model.config.get_text_config()
    lengths = [min(n, getattr(text, "max_position_embeddings", n)) for n in LENGTHS]
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(text.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    register()
    try:
        expected = [reference_logits(model, ids) for ids in texts]  # each [L, V]
        model.set_attn_implementation(IMPLEMENTATION)
        paged, logits = try_out(model, backend, texts, max_positions)
    except torch.OutOfMemoryError:
        raise
    except MODEL_ERRORS as error:
        raise refused(model.config, str(error) or type(error).__name__) from error
    distance = max(row_distance(ours, theirs) for ours, theirs in zip(logits, expected, strict=True))
    if not distance <= TOLERANCE[model.dtype]:  # also true for NaN
        raise refused(
            model.config,
            f"its logits for ragged tokens are {distance:.1e} away from its own, one text at a time "
            f"(relative to their size); allowed: at most {TOLERANCE[model.dtype]:.0e}",
        )
    return paged


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
    paged.config = KVShape(num_layers, num_kv_heads, head_dim)
    return paged, [torch.cat(found) for found in logits]


def row_distance(ours: Tensor, theirs: Tensor) -> float:
    """The relative distance of two tensors of logits, [L, V] each: that of the worst row, or in 16 bits the median row.

    In 16 bits, rounding can route a token to another expert, which changes one row a lot. A constant added to all
    logits of a row is ignored, because it changes no probability.
    """
    wide = [x.float() - x.float().mean(dim=-1, keepdim=True) for x in (ours, theirs)]
    rows = (wide[0] - wide[1]).norm(dim=-1) / wide[1].norm(dim=-1)  # [L]
    return float(rows.max() if ours.dtype == torch.float32 else rows.median())
