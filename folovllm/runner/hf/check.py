"""Check, before any request, that a model gives a text the logits of Hugging Face's `generate`, also beside others.

transformers does not say which models obey positions and a mask of padding, or keep all K/V in a cache that can be cut
into rows. The text of those that do not is plausible but wrong. So three short texts are run both ways::

    reference:  `generate` of each text alone
    ours:       prefill a and b | prefill c | decode a, b and c | decode them again          each step one forward,
                                                                                or with "loop" one per text

The paged milestones have a check of their own (`folovllm.contrib.transformers.check`), with the same measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from folovllm.kv_cache.interface import KVPlan
from folovllm.messages import ScheduledRequest
from folovllm.models.config_fields import without_unread_windows
from folovllm.models.decoder import MODEL_TYPES
from folovllm.runner.hf.hf_runner import HFRunner
from folovllm.sampling.sampler import Sampler

if TYPE_CHECKING:  # at run time this name would bring torch's compiler and Triton along
    from transformers import PreTrainedModel

LENGTHS = (9, 5, 6)  # tokens of the three texts, before those that are generated
NEW_TOKENS = 3
# Config fields with a length from which on attention selects some keys of a row, of which padding then takes places.
SELECTION_FIELDS = ("keep_window_size",)
# The largest relative distance between two rows of logits that counts as rounding. A model without attention, or one
# that reads another request's tokens, is about 1 away.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.7}
# What model code raises when it is called in an unforeseen way.
MODEL_ERRORS = (ValueError, TypeError, AttributeError, RuntimeError, KeyError, IndexError, NotImplementedError)


def check_side_by_side(model: PreTrainedModel, batching: str, max_model_len: int) -> None:
    """Raise ValueError for a model that `HFRunner` cannot run with that batching, for requests of at most that length.

    Families that our own decoder has are not tried again: tests hold them against Hugging Face at every milestone.
    """
    kind = model.config.model_type
    if kind in MODEL_TYPES or (reason := why_not_side_by_side(model, batching, max_model_len)) is None:
        return
    if batching != "loop" and (alone := why_not_side_by_side(model, "loop", max_model_len)) is None:
        raise ValueError(
            f"batching={batching!r} is not valid for model_type={kind!r}: {reason}; allowed: 'loop', or milestone m1"
        )
    raise ValueError(
        f"model_type={kind!r} cannot run at milestones m1 and m2: {reason if batching == 'loop' else alone}"
    )


def why_not_side_by_side(model: PreTrainedModel, batching: str, max_model_len: int) -> str | None:
    """Why `HFRunner` cannot run requests of at most that length with this batching; None if it can."""
    text = model.config.get_text_config()
    for name in SELECTION_FIELDS if batching == "padded" else ():
        if getattr(text, name, None) is not None and max_model_len > getattr(text, name):
            return (
                f"max_model_len={max_model_len} is above {name}={getattr(text, name)}, "
                "from which on padding takes the place of tokens"
            )
    # A model may have no more positions than a few.
    new_tokens = min(NEW_TOKENS, max_model_len)
    prompts = trial_texts(model, [max(1, min(n, max_model_len - new_tokens + 1)) for n in LENGTHS])
    try:
        expected = [generate_alone(model, prompt, new_tokens) for prompt in prompts]
        ours = trial_logits(HFRunner(model, Sampler(), batching), prompts, [ids for ids, _ in expected])
    except torch.OutOfMemoryError:
        raise
    except MODEL_ERRORS as error:
        return str(error) or type(error).__name__
    how = "from a cache" if batching == "loop" else "beside other requests"
    return too_far(torch.cat(ours), torch.cat([logits for _, logits in expected]), how)


def trial_texts(model: PreTrainedModel, lengths: Sequence[int]) -> list[list[int]]:
    """Random texts of these lengths."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


def generate_alone(model: PreTrainedModel, prompt: list[int], new_tokens: int) -> tuple[list[int], Tensor]:
    """Greedy tokens of Hugging Face's `generate`, [N], and the logits of which they are the largest, [N, V]."""
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    text = model.config.get_text_config(decoder=True)
    settings.use_cache = without_unread_windows(text) is text  # else its cache would drop what the model attends to
    input_ids = torch.tensor([prompt], device=model.device)  # [1, L]
    hf: Any = model
    # generate would fill from the model's own what a given configuration leaves unset.
    own, model.generation_config = model.generation_config, settings
    try:
        out = hf.generate(input_ids, attention_mask=torch.ones_like(input_ids))
    finally:
        model.generation_config = own
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)


@torch.inference_mode()
def trial_logits(runner: HFRunner, prompts: Sequence[list[int]], new: Sequence[list[int]]) -> list[Tensor]:
    """The logits of `generate_alone` for each text, [N, V], with all texts in steps of their own."""
    *first, last = range(len(prompts))
    steps = [[(i, 0, prompts[i]) for i in first], [(last, 0, prompts[last])]]
    for n in range(len(new[0]) - 1):
        steps.append([(i, len(prompt) + n, [new[i][n]]) for i, prompt in enumerate(prompts)])
    rows: list[list[Tensor]] = [[] for _ in prompts]
    for step in steps:
        shares = [ScheduledRequest(str(i), ids, a, True, KVPlan(str(i), a, len(ids))) for i, a, ids in step]
        for group in runner.groups(shares):
            logits, _ = runner.forward(group, runner.batch_of(group))  # [B, 1, V]
            for share, row in zip(group, logits[:, 0], strict=True):
                rows[int(share.request_id)].append(row)
    return [torch.stack(found) for found in rows]


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
