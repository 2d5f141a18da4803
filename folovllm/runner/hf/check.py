"""Check, before any request, that Hugging Face's forward gives a text the same logits beside others as alone.

transformers does not say which models obey positions and a mask of padding, or keep all K/V in a cache that can be cut
into rows. The text of those that do not is plausible but wrong. So three short texts are run both ways::

    reference:  each text alone, without a cache
    ours:       prefill a and b | prefill c | decode a, b and c | decode them again          each step one forward,
                                                                                or with "loop" one per text

The paged milestones have a check of their own (`folovllm.contrib.transformers.check`), with the same measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from folovllm.kv_cache.interface import KVPlan
from folovllm.messages import ScheduledRequest
from folovllm.models.decoder import MODEL_TYPES
from folovllm.runner.hf.hf_runner import HFRunner
from folovllm.sampling.sampler import Sampler

if TYPE_CHECKING:  # at run time this name would bring torch's compiler and Triton along
    from transformers import PreTrainedModel

LENGTHS = (9, 5, 6)  # tokens of the three texts
NUM_DECODES = 2  # of which each text's last tokens are decoded
# The largest relative distance between two rows of logits that counts as rounding. A model without attention, or one
# that reads another request's tokens, is about 1 away.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.7}
# What model code raises when it is called in an unforeseen way.
MODEL_ERRORS = (ValueError, TypeError, AttributeError, RuntimeError, KeyError, IndexError, NotImplementedError)


def check_side_by_side(model: PreTrainedModel, batching: str) -> None:
    """Raise ValueError for a model that `HFRunner` cannot run with that batching.

    Families that our own decoder has are not tried again: tests hold them against Hugging Face at every milestone.
    """
    if model.config.model_type in MODEL_TYPES or (reason := why_not_side_by_side(model, batching)) is None:
        return
    alone = batching != "loop" and why_not_side_by_side(model, "loop") is None
    raise ValueError(
        f"model_type={model.config.model_type!r} cannot run with batching={batching!r}: {reason}; "
        + ("batching='loop' and milestone m1 can run it" if alone else "milestone m1 cannot run it either")
    )


def why_not_side_by_side(model: PreTrainedModel, batching: str) -> str | None:
    """Why `HFRunner` cannot run requests through this model with that batching; None if it can."""
    texts = trial_texts(model, LENGTHS)
    try:
        expected = [reference_logits(model, ids) for ids in texts]  # each [L, V]
        found = trial_rows(HFRunner(model, Sampler(0, model.device), batching), texts)
    except torch.OutOfMemoryError:
        raise
    except MODEL_ERRORS as error:
        return str(error) or type(error).__name__
    ours = torch.stack([row for _, _, row in found])  # [N, V]
    return too_far(ours, torch.stack([expected[text][position] for text, position, _ in found]), "side by side")


def trial_texts(model: PreTrainedModel, lengths: Sequence[int]) -> list[list[int]]:
    """Random texts of these lengths, or of as many tokens as the model has positions."""
    text = model.config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or max(lengths)
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(text.vocab_size, (min(n, longest),), generator=generator).tolist() for n in lengths]


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    """Logits of every token of one text with the model's own attention, [L, V]."""
    return model(input_ids=torch.tensor([token_ids], device=model.device), use_cache=False).logits[0]


@torch.inference_mode()
def trial_rows(runner: HFRunner, texts: Sequence[list[int]]) -> list[tuple[int, int, Tensor]]:
    """Logits [V] of tokens, each with its text and its position: of the last ones, decoded as far as texts allow."""
    first = [max(1, len(ids) - NUM_DECODES) for ids in texts]
    steps = [[(i, 0, first[i]) for i in range(len(texts) - 1)], [(len(texts) - 1, 0, first[-1])]]
    steps += [[(i, n + k, n + k + 1) for i, n in enumerate(first) if n + k < len(texts[i])] for k in range(NUM_DECODES)]
    found = []
    for step in steps:
        shares = [ScheduledRequest(str(i), texts[i][a:b], a, True, KVPlan(str(i), a, b - a)) for i, a, b in step]
        for group in runner.groups(shares):
            logits, _ = runner.forward(group)  # [B, V]
            found += [
                (int(share.request_id), share.start + share.num_tokens - 1, row)
                for share, row in zip(group, logits, strict=True)
            ]
    return found


def too_far(ours: Tensor, theirs: Tensor, how: str) -> str | None:
    """What is wrong with logits of N tokens, [N, V], computed in another way; None if only rounding is."""
    distance = row_distance(ours, theirs)
    if distance <= TOLERANCE[ours.dtype]:  # false for NaN
        return None
    return (
        f"its logits {how} are {distance:.1e} away from its own, one text at a time "
        f"(relative to their size); allowed: at most {TOLERANCE[ours.dtype]:.0e}"
    )


def row_distance(ours: Tensor, theirs: Tensor) -> float:
    """The relative distance of two tensors of logits, [L, V] each: that of the worst row, or in 16 bits the median row.

    In 16 bits, rounding can route a token to another expert, which changes one row a lot. A constant added to all
    logits of a row is ignored, because it changes no probability.
    """
    wide = [x.float() - x.float().mean(dim=-1, keepdim=True) for x in (ours, theirs)]
    rows = (wide[0] - wide[1]).norm(dim=-1) / wide[1].norm(dim=-1)  # [L]
    return float(rows.max() if ours.dtype == torch.float32 else rows.median())
