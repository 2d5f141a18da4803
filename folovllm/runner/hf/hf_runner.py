"""Hugging Face's own forward on per-request K/V: one request at a time (M1), or several in a padded batch (M2).

The shapes of one call for B requests of at most L new tokens: token ids [B, L] and positions [B, L] in, logits
[B, N, V] of the last N columns out; the cache, [B, Hkv, T, D] per layer for keys and for values, grows by L columns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from folovllm.messages import ModelRunnerOutput, ScheduledRequest, SchedulerOutput
from folovllm.outputs import Logprob
from folovllm.runner.hf.padded_cache import PaddedBatch, PaddedCaches
from folovllm.runner.interface import ModelRunner
from folovllm.runner.sampling_states import PROMPT_ROWS, SamplingStates
from folovllm.runner.threads import cpu_threads
from folovllm.sampling.sampler import Sampler

if TYPE_CHECKING:  # at run time this name would bring torch's compiler and Triton along
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Padding:
    """Padding in one forward: rows of new tokens, and columns of K/V that the mask hides."""

    tokens: int = 0
    kv_tokens: int = 0


class HFRunner(ModelRunner):
    """Runs the scheduled requests through a Hugging Face model and samples them together.

    batching: "loop" runs one forward per request. "padded" puts all prefills of a step into one forward and all decodes
    into another.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sampler: Sampler,
        batching: str = "loop",
        clock: Callable[[], float] = time.perf_counter,
        num_threads: int | None = None,
    ) -> None:
        self.model = model
        self.batching = batching
        self.clock = clock
        self.num_threads = num_threads
        self.states = SamplingStates(sampler)
        self.caches = PaddedCaches()

    def update_states(self, step: SchedulerOutput) -> None:
        self.states.update(step)
        for request_id in step.finished_req_ids:
            self.caches.drop(request_id)

    def execute_model(self, step: SchedulerOutput) -> ModelRunnerOutput:
        with cpu_threads(self.num_threads), torch.inference_mode():
            before: list[tuple[PaddedBatch, list[int]]] = []
            try:
                return self._execute(step, before)
            except BaseException:
                for batch, lengths in before:
                    batch.cut(lengths)
                raise

    def _execute(self, step: SchedulerOutput, before: list[tuple[PaddedBatch, list[int]]]) -> ModelRunnerOutput:
        """Run a step. Every batch that it appends to is added to `before`, with its lengths until then."""
        start = self.clock()
        groups = self.groups(step.scheduled)
        prepared = self.clock()
        rows: dict[str, Tensor] = {}  # request id -> its last token's logits, [V]
        prompt_logprobs: dict[str, list[Mapping[int, Logprob]]] = {}
        paddings = []
        for group in groups:
            batch = self.batch_of(group)
            before.append((batch, batch.lengths))
            for part in in_chunks(group):
                asked = [(share.request_id, position) for share in part for position in share.prompt_rows]
                logits, padding = self.forward(part, batch, part[0].num_tokens if asked else 1)  # [B, N, V]
                if asked:
                    first = part[0].prompt_rows.start - part[0].start
                    self.states.add_prompt_logprobs(prompt_logprobs, asked, logits[0, first : first + len(asked)])
                rows.update(zip((share.request_id for share in part), logits[:, -1], strict=True))
                paddings.append(padding)
        forwarded = self.clock()
        sampling = [rows[share.request_id] for share in step.scheduled if share.samples]
        result = self.states.sample(step.scheduled, torch.stack(sampling) if sampling else None)
        result.prompt_logprobs = prompt_logprobs
        result.forwards = len(paddings)
        result.padding_tokens = sum(padding.tokens for padding in paddings)
        result.padding_kv_tokens = sum(padding.kv_tokens for padding in paddings)
        result.phases = {
            "prepare": (start, prepared),
            "forward": (prepared, forwarded),
            "sample": (forwarded, self.clock()),
        }
        return result

    def groups(self, scheduled: list[ScheduledRequest]) -> list[list[ScheduledRequest]]:
        """Which requests share a forward: prefills do, and so do decodes.

        Both at once would pad every decode's single token to the longest prompt. A prompt whose log probabilities are
        asked for is alone, in chunks.
        """
        if self.batching == "loop":
            return [[share] for share in scheduled]
        alone = [[share] for share in scheduled if share.prompt_rows]
        prefills = [share for share in scheduled if share.start == 0 and not share.prompt_rows]
        decodes = [share for share in scheduled if share.start > 0]
        return [*alone, *(group for group in (prefills, decodes) if group)]

    def batch_of(self, group: Sequence[ScheduledRequest]) -> PaddedBatch:
        """The K/V that these requests have so far, as one batch."""
        request_ids = [share.request_id for share in group]
        return self.caches.add(request_ids) if group[0].start == 0 else self.caches.gather(request_ids)

    def forward(
        self, group: Sequence[ScheduledRequest], batch: PaddedBatch, num_logits: int = 1
    ) -> tuple[Tensor, Padding]:
        """Requests through the model, left-padded to a rectangle: logits of the last columns, [B, num_logits, V]."""
        device = self.model.device
        columns = max(share.num_tokens for share in group)  # L
        rows = [(columns - share.num_tokens, share) for share in group]
        token_ids = torch.tensor([[0] * pad + share.token_ids for pad, share in rows], device=device)  # [B, L]
        positions = torch.tensor(
            [[0] * pad + list(range(share.start, share.start + share.num_tokens)) for pad, share in rows], device=device
        )  # [B, L]
        width = batch.width + columns
        lengths = [share.start + share.num_tokens for share in group]
        hidden = [width - length for length in lengths]  # columns of padding per row, all on its left
        mask = None
        if any(hidden):  # without a mask, attention takes a faster path
            mask = (torch.arange(width)[None] >= torch.tensor(hidden)[:, None]).long().to(device)  # [B, width]
        out = self.model(
            input_ids=token_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=batch.cache,
            use_cache=True,
            # The LM head is the widest layer, and one column is all that sampling needs. By its index: logits_to_keep=1
            # would hand it a slice, which torch, on a CPU in bfloat16, multiplies by a copy of the weight per row.
            logits_to_keep=torch.arange(columns - num_logits, columns, device=device),
        )
        batch.lengths = lengths
        logits: Tensor = out.logits[:, -num_logits:]  # [B, N, V]
        return logits, Padding(sum(pad for pad, _ in rows), sum(hidden))


def in_chunks(group: list[ScheduledRequest]) -> Iterator[list[ScheduledRequest]]:
    """The forwards of a group: one, or for a prompt whose log probabilities are asked for one per `PROMPT_ROWS`."""
    share, rows = group[0], group[0].prompt_rows
    if not rows:
        yield group
        return
    for i in range(0, share.num_tokens, PROMPT_ROWS):
        start, token_ids = share.start + i, share.token_ids[i : i + PROMPT_ROWS]
        asked = range(max(rows.start, start), min(rows.stop, start + len(token_ids)))
        yield [replace(share, token_ids=token_ids, start=start, prompt_rows=asked)]
