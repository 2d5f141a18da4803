"""Record a run: what a page needs to replay it, in a file that stays small.

The file is JSON. It is a Chrome trace, which Perfetto opens, with one key more::

    {"traceEvents": [...], "displayTimeUnit": "ms", "folovllm": recording}

    recording   schema, version, engine (its settings), phases (their names), texts, prompts, requests, start, steps
    texts       what tokens say, each text once; prompts and outputs are lists of places in it
    requests    id, prompt (a place in prompts, or null), output, max_output; begun: what it was before the first step,
                if it had run then: "running" or "preempted", tokens computed, tokens of output
    start       changes that make the pool as it was before the first step
    steps       what is new in each step: see `Recorder.observe` and `folovllm.engine.pool_changes`

A request is named by its place in `requests`. Whatever a step says is read from its `StepTrace`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from folovllm.engine.detokenizer import IncrementalDecoder
from folovllm.engine.llm_engine import LLMEngine
from folovllm.engine.observing import observing
from folovllm.engine.pool_changes import PoolRecorder
from folovllm.engine.trace import PHASES, RequestStep, StepTrace
from folovllm.kv_cache.interface import BlockCopy, KVCopy, KVOp, SwapIn, SwapOut
from folovllm.request import RequestStatus

SCHEMA, VERSION = "folovllm-recording", 1
KEY = "folovllm"  # under which a Chrome trace carries the recording
OPS: dict[type[KVOp], tuple[str, tuple[str, ...]]] = {  # kind of operation: its name in the file, its numbers
    BlockCopy: ("copy", ("src", "dst")),
    SwapOut: ("out", ("block", "host_block")),
    SwapIn: ("in", ("host_block", "block")),
}


@dataclass
class _Seen:
    """A request so far: its tokens, and what its newest share said of it."""

    request_id: str
    prompt: list[int] | None = None
    output: list[int] = field(default_factory=list)
    num_missed: int = 0  # tokens of output before those, which nobody recorded
    max_output: int = 0
    begun: list[Any] | None = None
    num_computed: int = 0
    num_output: int = 0
    has_run: bool = False


class Recorder:
    """Takes in steps as they happen, and gives the recording of them.

    times: False leaves out the times of the phases, and then the same run gives the same recording.
    """

    def __init__(self, engine: LLMEngine, times: bool = True) -> None:
        self._engine = engine
        self._times = times
        self._zero: float | None = None  # when the first step began
        self._requests: list[_Seen] = []
        self._places: dict[str, int] = {}  # of the newest request with an id
        self._steps: list[dict[str, Any]] = []
        before = engine.core.scheduler.kv.snapshot()
        self._capacity = engine.core.scheduler.kv.usage().capacity
        self._pool = None if before is None else PoolRecorder(before.block_size, len(before.ref_cnt) - 1)
        self._start: dict[str, Any] = {}

    def begin(self) -> None:
        """Requests and the pool are now as they will be before the first step that is observed."""
        scheduler = self._engine.core.scheduler
        for request in scheduler.requests.values():
            if request.status in (RequestStatus.RUNNING, RequestStatus.PREEMPTED):
                seen = self._requests[self._place(request.request_id)]
                seen.prompt, seen.output = request.prompt_token_ids, list(request.output_token_ids)
                status = "running" if request.status == RequestStatus.RUNNING else "preempted"
                self._begin(seen, status, request.num_computed_tokens, request.num_output_tokens)
        now = scheduler.kv.snapshot()
        if self._pool is not None and now is not None:
            self._start = self._pool.observe(now, self._place)

    def observe(self, step: StepTrace) -> None:
        """Take in the next step.

        What is the same in most steps is left out: see the page's `state.js`, which puts it back. A share is a place
        where it is a plain decode, one token computed and one sampled, and else
        [place, scheduled, of the prompt, found in a cache, computed so far, output so far, finish reason].
        """
        for request_id, prompt in step.prompts.items():
            self._first_run(request_id, prompt)
        for request_id in step.preempted:
            self._requests[self._place(request_id)].num_computed = -1  # its next share is written out in full
        shares = [self._share(share) for share in step.requests]
        made: dict[str, Any] = {
            "step": step.step,
            "shares": shares,
            "running": step.num_running,
            "waiting": step.num_waiting,
            "line": [self._place(i) for i in step.next_in_line],
            "kv": [step.kv.reserved, step.kv.used, step.kv.unshared],
            "ops": [self._op(op) for op in step.kv_ops],
            "preempted": [self._place(i) for i in step.preempted],
            "aborted": [self._place(i) for i in step.aborted],
            "padding": [step.padding_tokens, step.padding_kv_tokens],
            "forwards": step.forwards,
            "times": self._phase_times(step) if self._times else [],
        }
        if step.blocks is not None and self._pool is not None:
            made["blocks"] = self._pool.observe(step.blocks, self._place)
        plain = {"padding": [0, 0], "forwards": 1}
        self._steps.append({k: v for k, v in made.items() if v != [] and v != plain.get(k)})

    def to_json(self) -> dict[str, Any]:
        """The recording so far, as plain data."""
        texts: dict[str, int] = {}
        prompts: dict[tuple[int, ...], int] = {}
        encoded: list[list[int]] = []
        requests: list[dict[str, Any]] = []
        for seen in self._requests:
            prompt, output = self._texts(seen)
            places = [texts.setdefault(text, len(texts)) for text in (*prompt, *output)]
            key = tuple(places[: len(prompt)])
            if seen.prompt is not None and key not in prompts:
                prompts[key] = len(encoded)
                encoded.append(list(key))
            made = {
                "id": seen.request_id,
                "prompt": None if seen.prompt is None else prompts[key],
                "output": places[len(prompt) :],
                "max_output": seen.max_output,
            }
            requests.append(made if seen.begun is None else made | {"begun": seen.begun})
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "engine": settings(self._engine, self._capacity),
            "phases": list(PHASES),
            "texts": list(texts),
            "prompts": encoded,
            "requests": requests,
            "start": self._start,
            "steps": self._steps,
        }

    def save(self, path: str | Path) -> Path:
        """Write the file that `folovllm replay` and Perfetto read. Returns its path."""
        path = Path(path)
        data = self._engine.trace.to_chrome_trace() | {KEY: self.to_json()}
        path.write_text(json.dumps(data, separators=(",", ":")), encoding="utf-8")
        return path

    def _place(self, request_id: str) -> int:
        if request_id not in self._places:
            self._places[request_id] = len(self._requests)
            self._requests.append(_Seen(request_id))
        return self._places[request_id]

    def _first_run(self, request_id: str, prompt: list[int]) -> None:
        """An id that ran before belongs to another request now."""
        if request_id in self._places and self._requests[self._places[request_id]].has_run:
            del self._places[request_id]
        seen = self._requests[self._place(request_id)]
        seen.prompt = prompt

    def _begin(self, seen: _Seen, status: str, num_computed: int, num_output: int) -> None:
        seen.begun, seen.has_run = [status, num_computed, num_output], True
        seen.num_computed, seen.num_output = num_computed, num_output

    def _share(self, share: RequestStep) -> int | list[Any]:
        place = self._place(share.request_id)
        seen = self._requests[place]
        seen.num_missed += max(0, share.num_output - share.num_sampled - seen.num_missed - len(seen.output))
        if seen.num_missed and not seen.has_run:
            self._begin(seen, "running", share.num_computed - share.num_scheduled, seen.num_missed)
        is_plain = (share.num_scheduled, share.num_prompt, share.num_cached, share.num_computed, share.num_output) == (
            1, 0, 0, seen.num_computed + 1, seen.num_output + 1,
        )  # fmt: skip
        seen.output += share.sampled_ids
        seen.max_output, seen.has_run = share.max_output, True
        seen.num_computed, seen.num_output = share.num_computed, share.num_output
        reason = RequestStatus[share.status].finish_reason
        if is_plain and reason is None:
            return place
        counts = [share.num_scheduled, share.num_prompt, share.num_cached, share.num_computed, share.num_output]
        return [place, *counts, *([] if reason is None else [reason])]

    def _op(self, op: KVOp) -> list[Any]:
        if isinstance(op, KVCopy):
            return ["tokens", self._place(op.src), self._place(op.dst), op.num_tokens]
        name, numbers = OPS[type(op)]
        return [name, *(getattr(op, number) for number in numbers)]

    def _phase_times(self, step: StepTrace) -> list[int]:
        """The step's start, then start and end of each phase after that, in microseconds."""
        start = step.phases["schedule"][0]
        self._zero = start if self._zero is None else self._zero
        spans = [moment - start for name in PHASES for moment in step.phases[name]]
        return [round(1e6 * seconds) for seconds in (start - self._zero, *spans)]

    def _texts(self, seen: _Seen) -> tuple[list[str], list[str]]:
        """What each token of a prompt and of its output says."""
        prompt = seen.prompt or []
        texts = token_texts(self._engine.tokenizer, [*prompt, *seen.output])
        return texts[: len(prompt)], [""] * seen.num_missed + texts[len(prompt) :]


def token_texts(tokenizer: PreTrainedTokenizerBase | None, token_ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it; together they are the whole text.

    A token that ends within a character adds "", and the one that completes it adds it. Special tokens, which a decoded
    text leaves out, are shown by their names. Without a tokenizer, texts are the ids.
    """
    if tokenizer is None:
        return [f"{token_id} " for token_id in token_ids]
    special = set(tokenizer.all_special_ids)
    decoder = IncrementalDecoder(tokenizer)
    texts = []
    for token_id in token_ids:
        if token_id in special:
            texts.append(decoder.flush() + str(tokenizer.convert_ids_to_tokens(token_id)))
        else:
            texts.append(decoder.push(token_id))
    if texts:
        texts[-1] += decoder.flush()
    return texts


def settings(engine: LLMEngine, capacity: int) -> dict[str, Any]:
    """What was asked of the engine, and what it made of it. A folder's model goes by its name."""
    config, snapshot = engine.config, engine.core.scheduler.kv.snapshot()
    model = config.model.model
    return {
        "model": Path(model).name if Path(model).is_dir() else model,
        "milestone": config.milestone,
        "batching": config.batching or next(iter(config.preset.batchings), None),
        "scheduling_policy": config.scheduler.scheduling_policy,
        "max_num_seqs": engine.core.scheduler.max_num_running_reqs,
        "max_num_batched_tokens": engine.core.scheduler.max_num_batched_tokens,
        "max_model_len": engine.max_model_len,
        "kv_capacity": capacity,
        "block_size": None if snapshot is None else snapshot.block_size,
        "num_blocks": None if snapshot is None else len(snapshot.ref_cnt) - 1,
        "preemption_mode": config.scheduler.preemption_mode,
        "chunked_prefill": config.chunked_prefill,
        "prefix_caching": config.prefix_caching,
    }


@contextmanager
def recording(engine: LLMEngine, times: bool = True) -> Iterator[Recorder]:
    """Whatever runs the engine meanwhile, every step of it is recorded, with the state of every block.

    Raises ValueError for an engine that keeps no trace.
    """
    recorder = Recorder(engine, times)
    with observing(engine, recorder.observe):
        recorder.begin()
        yield recorder


def record(engine: LLMEngine) -> Recorder:
    """The steps that the engine's trace has. Blocks are in it where the engine recorded them (`trace_blocks=True`)."""
    recorder = Recorder(engine)
    for step in engine.trace:
        recorder.observe(step)
    return recorder
