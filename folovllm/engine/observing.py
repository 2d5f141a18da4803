"""Observe every step of an engine, with the state of every block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from folovllm.checks import check_int
from folovllm.engine.llm_engine import LLMEngine
from folovllm.engine.trace import StepTrace


@contextmanager
def observing(engine: LLMEngine, observe: Callable[[StepTrace], None]) -> Iterator[None]:
    """Call `observe` with each step, after any observer that is already set.

    The trace keeps the states of blocks only with trace_blocks, because they take much memory in a large pool. Raises
    ValueError for an engine that keeps no trace.
    """
    check_int("max_trace_steps", engine.config.max_trace_steps, 1)  # steps are taken from the trace
    recorder, watcher = engine.core.recorder, engine.on_step
    keeps_blocks = recorder.trace_blocks

    def on_step(step: StepTrace) -> None:
        if watcher is not None:
            watcher(step)
        if not keeps_blocks:
            recorder.trace.amend_last(blocks=None)
        observe(step)

    recorder.trace_blocks, engine.on_step = True, on_step
    try:
        yield
    finally:
        recorder.trace_blocks, engine.on_step = keeps_blocks, watcher
