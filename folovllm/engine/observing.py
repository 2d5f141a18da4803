"""Watch an engine at work: every step is handed over with the state of every block, whoever runs the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from folovllm.checks import check_int
from folovllm.engine.llm_engine import LLMEngine
from folovllm.engine.trace import StepTrace


@contextmanager
def observing(engine: LLMEngine, observe: Callable[[StepTrace], None]) -> Iterator[None]:
    """Call `observe` with each step, after an observer that is there already.

    The trace keeps the states of blocks only where the engine does so anyway: for a long run in a large pool they would
    take much memory. Raises ValueError for an engine that keeps no trace.
    """
    check_int("max_trace_steps", engine.config.max_trace_steps, 1)  # steps are handed over by the trace
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
