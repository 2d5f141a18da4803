"""Run a step. If its forward fails: find the requests at fault, and give the others their tokens.

The step is tried again in halves, and a half that fails in halves of its own, until a request that fails is alone. That
one gets another try, because its failure may have been chance::

    [a b c d] fails -> [a b] gives two tokens, [c d] fails -> [c] gives one, [d] fails: only d ends, with its reason

What a step does once (`ModelRunner.update_states`) is not repeated. A request that was to read K/V which a failed one
did not write, because both began with the same new prefix, is not run: it has to compute its K/V again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from folovllm.messages import ModelRunnerOutput, ScheduledRequest, SchedulerOutput
from folovllm.outputs import Logprob
from folovllm.runner.interface import ModelRunner

logger = logging.getLogger(__name__)


def is_device_fault(error: Exception) -> bool:
    """Whether the device is lost: all that it is asked later fails, too. A lack of memory is no such fault.

    By its text, because the type depends on torch's version, and Triton has one of its own.
    """
    text = str(error)
    return any(mark in text for mark in ("CUDA error", "HIP error", "Error [CUDA]")) and "out of memory" not in text


def reason_of(error: Exception) -> str:
    """An error as the `stop_reason` of a request."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def execute_in_parts(runner: ModelRunner, step: SchedulerOutput) -> ModelRunnerOutput:
    """Run a step, as a whole if its forward does not fail, else in parts.

    Each request has run, or is in `failed`, or in `unread`. Raises a device fault.
    """
    todo = [step.scheduled]  # the next part is the last
    has_failed = False
    failed_alone: set[str] = set()  # once: it may have been chance
    sampled: dict[str, tuple[list[int], list[Mapping[int, Logprob]] | None]] = {}
    not_written: set[int] = set()  # blocks
    result = ModelRunnerOutput()
    while todo:
        part = todo.pop()
        shares = [share for share in part if not share.plan.reads_any(not_written)] if not_written else part
        if not shares:
            continue
        try:
            done = runner.execute_model(SchedulerOutput(shares))
        except Exception as error:
            if is_device_fault(error):
                raise
            has_failed = True
            if len(shares) > 1 or shares[0].request_id not in failed_alone:
                logger.debug("requests failed and are tried again: %d", len(shares), exc_info=error)
                if len(shares) == 1:
                    failed_alone.add(shares[0].request_id)
                todo += halves(shares)
                continue
            result.failed[shares[0].request_id] = reason_of(error)
            result.not_written.add(shares[0].request_id)
            not_written.update(shares[0].plan.written_blocks())
            logger.error("request %r failed alone and is ended: %s", shares[0].request_id, reason_of(error))
            continue
        if not has_failed:
            return done
        each = zip(shares, done.sampled_token_ids, done.logprobs, strict=True)
        sampled |= {share.request_id: (tokens, logprobs) for share, tokens, logprobs in each}
        merge(result, done)
    for share in step.scheduled:
        if share.request_id in sampled or share.request_id in result.not_written:
            tokens, logprobs = sampled.get(share.request_id, ([], None))
            result.sampled_token_ids.append(tokens)
            result.logprobs.append(logprobs)
        else:
            result.unread.append(share.request_id)
    return result


def halves(shares: list[ScheduledRequest]) -> list[list[ScheduledRequest]]:
    """The second half, then the first: requests read K/V that those before them write. One alone is one part."""
    middle = len(shares) // 2
    return [half for half in (shares[middle:], shares[:middle]) if half]


def merge(result: ModelRunnerOutput, part: ModelRunnerOutput) -> None:
    """Add what a part has failed, counted and timed."""
    result.failed |= part.failed
    result.prompt_logprobs |= part.prompt_logprobs
    result.forwards += part.forwards
    result.padding_tokens += part.padding_tokens
    result.padding_kv_tokens += part.padding_kv_tokens
    first, last = result.phases or part.phases, part.phases
    result.phases = {
        "prepare": first["prepare"],
        "forward": (first["forward"][0], last["forward"][1]),
        "sample": last["sample"],
    }
