"""What the measurements share: models with the head of their file, one forward, and the file itself."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from folovllm import SamplingParams
from folovllm.course.bench.rounds import provenance, spreads
from folovllm.engine.trace import Trace
from folovllm.models.loader import load_config, load_hf_model, resolve_dtype, resolve_model
from folovllm.outputs import RequestOutput

CPU = torch.device("cpu")
DECODE_CONTEXT = 128  # tokens that a timed decode step attends over
LINE = 200  # characters that a line of a results file may have; a list of plain values always takes one line
MICROSECONDS = 6  # decimals of the times in a trace


def load_format(name: str) -> str:
    """Random weights for the models that come as a shape only."""
    return "auto" if name == "folo-tiny" else "dummy"


def load(name: str, dtype: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model on the CPU, and what a file says of where and with what it was measured."""
    _, chosen, header = describe(name, dtype)
    return load_hf_model(resolve_model(name), chosen, CPU, load_format(name)), header


def describe(name: str, dtype: str) -> tuple[PretrainedConfig, torch.dtype, dict[str, Any]]:
    """A model's config, the number format, and the head of a file, without its weights."""
    config = load_config(resolve_model(name))
    chosen = resolve_dtype(dtype, config, CPU)
    header = {
        **provenance(CPU),
        "model": name,
        "dtype": str(chosen).removeprefix("torch."),
        "load_format": load_format(name),
    }
    return config, chosen, header


def random_tokens(count: int, vocab_size: int) -> list[int]:
    """The same ids at every call."""
    ids = random.Random(0)
    return [ids.randrange(vocab_size) for _ in range(count)]


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_rounds(header: dict[str, Any], part: str, rounds: Sequence[Any], **facts: Any) -> dict[str, Any]:
    """A results file: its head, the command, what holds for all rounds, and the rounds with their spreads."""
    command = {"command": f"python -m folovllm.course.measure {part}"}
    return {**header, **command, **facts, "summary": spreads(rounds), "rounds": rounds}


def counts(stats: Any, *names: str) -> dict[str, Any]:
    """Some of an engine's counters."""
    return {name: getattr(stats, name) for name in names}


def exactly(max_tokens: int) -> SamplingParams:
    """Greedy, and so many tokens."""
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def as_text(data: Any, indent: int = 0) -> str:
    """JSON that people can read: what is short, and any list of plain values, on one line; the rest line by line."""
    line = json.dumps(data)
    nested = any(isinstance(value, (dict, list)) for value in data) if isinstance(data, list) else True
    if not isinstance(data, (dict, list)) or not nested or len(line) + indent <= LINE:
        return line
    pad = "\n" + " " * (indent + 1)
    if isinstance(data, dict):
        inner = [f"{json.dumps(key)}: {as_text(value, indent + 1)}" for key, value in data.items()]
    else:
        inner = [as_text(value, indent + 1) for value in data]
    start, end = "{}" if isinstance(data, dict) else "[]"
    return start + pad + f",{pad}".join(inner) + "\n" + " " * indent + end


def feed(model: PreTrainedModel, tokens: Sequence[int], cache: DynamicCache) -> torch.Tensor:
    """One forward of one text that goes on from `cache`: the last position's logits, [1, 1, V]."""
    last = torch.tensor([len(tokens) - 1])  # an index: see `lm_head_seconds` in chapter_1
    logits: torch.Tensor = model(
        input_ids=torch.tensor([list(tokens)]), past_key_values=cache, use_cache=True, logits_to_keep=last
    ).logits
    return logits


def plain(trace: Trace, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """A trace and outputs as plain data; times from the first arrival, steps and requests counted from 0."""
    zero = min(output.metrics.arrival_time for output in outputs)

    def since(moment: float | None) -> float:
        return round((zero if moment is None else moment) - zero, MICROSECONDS)

    number = {output.request_id: str(i) for i, output in enumerate(outputs)}
    steps = trace.to_json()["steps"]
    for index, step in enumerate(steps):
        step["step"] = index
        step["finished"] = [number[i] for i in step["finished"]]
        del step["prompts"]  # the file says elsewhere what was asked
        for request in step["requests"]:
            request["request_id"] = number[request["request_id"]]
        step["phases"] = {name: [since(start), since(end)] for name, (start, end) in step["phases"].items()}
    return {
        "steps": steps,
        "outputs": [
            {
                "request_id": number[output.request_id],
                "prompt_len": len(output.prompt_token_ids),
                "text": output.outputs[0].text,
                "finish_reason": output.outputs[0].finish_reason,
                "arrival_time": since(output.metrics.arrival_time),
                "first_scheduled_time": since(output.metrics.first_scheduled_time),
                "finished_time": since(output.metrics.finished_time),
                "token_times": [since(moment) for moment in output.metrics.token_times],
            }
            for output in outputs
        ],
    }
