"""Whether a Hugging Face model computes the same on ragged tokens in blocks as by itself: found out before any request.

transformers does not say which models hand all of their attention to the registered function. Those that do not are
worse than broken: their text is fluent, and wrong. So two short texts go through the model in both ways::

    reference:  Hugging Face's own "eager" attention, each text alone
    ours:       step 1  | a third of a | a third of b |           one forward each, K/V in blocks of 4,
                step 2  | rest of a          | rest of b   |      block tables interleaved

Every layer must have asked for attention exactly once per forward, all with K/V of one shape, and the rows of logits
must be the reference's, up to rounding. What these few tokens cannot show, because it begins at some length only, is
looked up in the config.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from folovllm.attention.backend import AttentionBackend, LayerKV
from folovllm.contrib.transformers.decoder import IMPLEMENTATION, HFPagedModel, KVShape, PagedStep, register
from folovllm.kv_cache.interface import BlockPlan
from folovllm.messages import ScheduledRequest
from folovllm.models.loader import ModelSource, load_hf_model
from folovllm.runner.input_batch import InputBatch

if TYPE_CHECKING:  # at run time this name would bring torch's compiler and Triton along
    from transformers import PreTrainedModel

LAYER_TYPES = ("full_attention", "sliding_attention")  # whose K/V is a list of tokens, of which the last ones are seen
LENGTHS = (9, 6)  # tokens of the two texts
BLOCK_SIZE = 4
# How far, relative to its size, a row of logits may be from the reference's and still be called rounding. A model that
# leaves out attention, or reads a neighbour's tokens, is about 1 away.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.7}
# What foreign code raises when it is called in a way that its authors did not foresee.
MODEL_ERRORS = (ValueError, TypeError, AttributeError, RuntimeError, KeyError, IndexError)


def load_hf_paged(
    source: ModelSource,
    hf_config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    backend: AttentionBackend,
    load_format: str = "auto",
    seed: int = 0,
    max_positions: int | None = None,
) -> HFPagedModel:
    """The Hugging Face model of a checkpoint, checked to be right with this backend. Arguments as in `load_decoder`.

    Raises ValueError for a checkpoint as `load_hf_model` does, and for a model that would be wrong, with the reason.
    """
    longest = max_positions or hf_config.get_text_config().max_position_embeddings
    check_config(hf_config, longest)
    model = load_hf_model(source, dtype, device, load_format, seed, attn_implementation="eager")
    return checked(model, backend, longest)


def refused(hf_config: PretrainedConfig, reason: str) -> ValueError:
    """The error for a model that cannot be trusted with K/V in blocks."""
    return ValueError(
        f"model_type={hf_config.model_type!r} cannot have its K/V in blocks: {reason}; "
        "milestones m1 and m2 use Hugging Face's own attention"
    )


def check_config(hf_config: PretrainedConfig, max_positions: int) -> None:
    """Raise ValueError for what a config says and a few tokens would not show."""
    text = hf_config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or LAYER_TYPES)
    if not kinds <= set(LAYER_TYPES):
        raise refused(
            hf_config, f"it has layers of type {sorted(kinds - set(LAYER_TYPES))}, allowed: {', '.join(LAYER_TYPES)}"
        )
    for rope in rope_parameters(text):
        # It takes other frequencies for all tokens of a forward once any of them is past the original length.
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
    """A step of the trial, whose pools are made when a layer asks for the first time, in the shape that it brings."""

    pools: dict[int, LayerKV] = field(default_factory=dict)
    # num_blocks, dtype: of each pool
    num_blocks: int = 0
    dtype: torch.dtype = torch.float32

    def layer_kv(self, layer: int, key: Tensor, value: Tensor) -> LayerKV:
        """See `PagedStep`. Raises ValueError where keys and values, or two layers, differ in shape."""
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


def checked(model: PreTrainedModel, backend: AttentionBackend, max_positions: int) -> HFPagedModel:
    """A model in eager attention, made to attend over blocks and tried out. Raises ValueError if it cannot be right."""
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
    if not distance <= TOLERANCE[model.dtype]:  # written so that NaN is refused
        raise refused(
            model.config,
            f"its logits for ragged tokens are {distance:.1e} away from its own, one text at a time "
            f"(relative to their size); allowed: at most {TOLERANCE[model.dtype]:.0e}",
        )
    return paged


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    """Logits of every token of one text as the model computes them by itself, [L, V]."""
    out: Any = model(input_ids=torch.tensor([token_ids], device=model.device), use_cache=False)
    logits: Tensor = out.logits[0]
    return logits


@torch.inference_mode()
def try_out(
    model: PreTrainedModel, backend: AttentionBackend, texts: Sequence[list[int]], max_positions: int
) -> tuple[HFPagedModel, list[Tensor]]:
    """The paged model, and logits of every token of every text, each [L, V], from two ragged steps over blocks."""
    num_layers = int(model.config.get_text_config().num_hidden_layers)
    num_blocks = max(-(-len(ids) // BLOCK_SIZE) for ids in texts)  # of one text
    # Table i is i + 1, i + 1 + n, i + 1 + 2n ... of n texts: no text has two blocks side by side.
    tables = [tuple(range(i + 1, 1 + len(texts) * num_blocks, len(texts))) for i in range(len(texts))]
    buffers = InputBatch(sum(map(len, texts)), len(texts), num_blocks, BLOCK_SIZE, model.device)
    thirds = [-(-len(ids) // 3) for ids in texts]
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
    """How far two tensors of logits, [L, V] each, are apart: the farthest row, relative to its size.

    In 16 bits it is the median row. There rounding alone can give a token to another expert of a mixture, which throws
    one row far off. A constant added to all logits of a row does not count, because it changes no probability.
    """
    wide = [x.float() - x.float().mean(dim=-1, keepdim=True) for x in (ours, theirs)]
    rows = (wide[0] - wide[1]).norm(dim=-1) / wide[1].norm(dim=-1)  # [L]
    return float(rows.max() if ours.dtype == torch.float32 else rows.median())
