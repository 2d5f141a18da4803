"""Read a recording and validate it, so that a damaged file is refused here and not by the page in the browser."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from folovllm.engine.recording import KEY, OPS, SCHEMA, VERSION

Check = Callable[[str, Any], None]  # (path of the value, value); raises ValueError
MOST_BLOCKS = 10**7  # in a pool
SHOWN = 60  # characters of a wrong value in an error message


def load_recording(path: str | Path) -> dict[str, Any]:
    """The recording in a file that `Recorder.save` wrote. Raises ValueError with the reason for any other file."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON, or is truncated: {error}") from None
    recording = data.get(KEY, data) if isinstance(data, dict) else data
    try:
        check_recording(recording)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return dict(recording)


def check_recording(data: Any) -> None:
    """Raise ValueError unless `data` is a recording of this version with valid numbers."""
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError("the file has no recording; `folovllm generate --trace FILE` writes one")
    if data.get("version") != VERSION:
        raise ValueError(f"version={data.get('version')!r} is not valid; allowed: {VERSION}")
    _record(
        engine=_record(
            model=_text, milestone=_text, batching=_or_null(_text), scheduling_policy=_text, preemption_mode=_text,
            max_num_seqs=_count(1), max_num_batched_tokens=_count(1), max_model_len=_count(1), kv_capacity=_count(0),
            block_size=_or_null(_count(1)), num_blocks=_or_null(_count(0, MOST_BLOCKS)),
            chunked_prefill=_flag, prefix_caching=_flag,
        ),
        phases=_list(_text),
        texts=_list(_text),
    )("", data)  # fmt: skip
    text, paged = _count(0, len(data["texts"]) - 1), data["engine"]["block_size"] is not None
    if paged and data["engine"]["num_blocks"] is None:
        raise ValueError("engine.num_blocks=None is not valid; allowed: an integer if block_size is set")
    _record(prompts=_list(_list(text)))("", data)
    prompt = _count(0, len(data["prompts"]) - 1)
    request = _record(id=_text, prompt=_or_null(prompt), output=_list(text), max_output=_count(0))
    begun = _record(optional=True, begun=_row(_one_of("running", "preempted"), _count(0), _count(0)))
    _record(requests=_list(_both(request, begun)))("", data)
    outputs = [len(request["output"]) for request in data["requests"]]
    pool = _pool(len(outputs), data["engine"]["num_blocks"] if paged else 0)
    _record(start=pool, steps=_list(_step(outputs, len(data["phases"]), pool)))("", data)
    if not data["steps"]:
        raise ValueError("the recording has no steps; allowed: at least one")


def _pool(num_requests: int, num_blocks: int) -> Check:
    """The changes to a pool (see `folovllm.engine.pool_changes`)."""
    request, block = _count(0, num_requests - 1), _count(1, num_blocks)
    table = _row(request, _count(0), _list(block))
    host_table = _row(request, _count(0), _list(_count(1, MOST_BLOCKS)))
    blocks = _list(block)
    return _record(
        optional=True, tables=_list(table), host=_list(host_table), taken=blocks, freed=blocks, uncached=blocks,
        evicted=blocks, cached=_list(_row(block, _or_null(block))),
    )  # fmt: skip


def _step(outputs: list[int], num_phases: int, pool: Check) -> Check:
    """One step (see `engine.recording.Recorder.observe`). outputs: the number of output tokens of each request."""
    request = _count(0, len(outputs) - 1)
    counts = _row(request, _count(1), _count(0), _count(0), _count(0), _count(0))
    with_reason = _row(request, _count(1), _count(0), _count(0), _count(0), _count(0), _text)
    most = {name: _row(_one_of(name), *[_count(0)] * len(numbers)) for name, numbers in OPS.values()}

    def share(where: str, value: Any) -> None:
        if not isinstance(value, list):
            request(where, value)
            return
        (with_reason if len(value) == 7 else counts)(where, value)
        if value[5] > outputs[value[0]]:
            raise _wrong(f"{where}[5]", value[5], f"at most {outputs[value[0]]}, the request's output")

    def operation(where: str, value: Any) -> None:
        _list(_anything)(where, value)
        name = value[0] if value and isinstance(value[0], str) else ""
        if name not in most:
            raise _wrong(where, value, f"a list that begins with one of {', '.join(most)}")
        most[name](where, value)

    def times(where: str, value: Any) -> None:
        _list(_integer)(where, value)
        if value and len(value) != 1 + 2 * num_phases:
            raise _wrong(where, value, f"{1 + 2 * num_phases} integers, or none")

    needed = _record(
        step=_count(0), running=_count(0), waiting=_count(0), kv=_row(_count(0), _count(0), _or_null(_count(0)))
    )
    others = _record(
        optional=True, shares=_list(share), line=_list(request), ops=_list(operation), preempted=_list(request),
        aborted=_list(request), padding=_row(_count(0), _count(0)), forwards=_count(0), times=times, blocks=pool,
    )  # fmt: skip

    return _both(needed, others)


# --- kinds of values ------------------------------------------------------------------------------------------------


def _wrong(where: str, value: Any, allowed: str) -> ValueError:
    shown = repr(value)
    shown = shown if len(shown) <= SHOWN else shown[: SHOWN - 3] + "..."
    return ValueError(f"{where}={shown} is not valid; allowed: {allowed}")


def _anything(where: str, value: Any) -> None:
    """Accepts any value: it is checked elsewhere."""


def _text(where: str, value: Any) -> None:
    if not isinstance(value, str):
        raise _wrong(where, value, "a text")


def _flag(where: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise _wrong(where, value, "true or false")


def _integer(where: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**53:  # as in JavaScript
        raise _wrong(where, value, "an integer")


def _count(low: int, high: int = 2**53 - 1) -> Check:
    def check(where: str, value: Any) -> None:
        _integer(where, value)
        if not low <= value <= high:
            raise _wrong(where, value, f"an integer >= {low}" + (f" and <= {high}" if high < 2**53 - 1 else ""))

    return check


def _one_of(*names: str) -> Check:
    def check(where: str, value: Any) -> None:
        if value not in names:
            raise _wrong(where, value, ", ".join(names))

    return check


def _both(one: Check, other: Check) -> Check:
    def check(where: str, value: Any) -> None:
        one(where, value)
        other(where, value)

    return check


def _or_null(kind: Check) -> Check:
    def check(where: str, value: Any) -> None:
        if value is not None:
            kind(where, value)

    return check


def _list(kind: Check) -> Check:
    def check(where: str, value: Any) -> None:
        if not isinstance(value, list):
            raise _wrong(where, value, "a list")
        for index, item in enumerate(value):
            kind(f"{where}[{index}]", item)

    return check


def _row(*kinds: Check) -> Check:
    def check(where: str, value: Any) -> None:
        if not isinstance(value, list) or len(value) != len(kinds):
            raise _wrong(where, value, f"a list of {len(kinds)}")
        for index, (kind, item) in enumerate(zip(kinds, value, strict=True)):
            kind(f"{where}[{index}]", item)

    return check


def _record(optional: bool = False, **fields: Check) -> Check:
    """A dict with these keys; other keys are ignored. optional: all keys may be missing."""

    def check(where: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise _wrong(where, value, "an object")
        for name, kind in fields.items():
            place = f"{where}.{name}" if where else name
            if name in value:
                kind(place, value[name])
            elif not optional:
                raise ValueError(f"{place} is missing; allowed: {', '.join(fields)}")

    return check
