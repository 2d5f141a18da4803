"""One request through the layers of the engine: which function is called when, seen by Python's own profiler."""

from __future__ import annotations

import importlib
import inspect
import sys
from types import CodeType, FrameType

from claims.ledger import Derived

from errata.finding import Evidence
from folovllm import LLM, SamplingParams

INTERFACE, MODEL, RUNTIME = "interface", "model authoring", "runtime"
# In the order of the first calls, which `through_the_layers` watches.
WALK = (
    (INTERFACE, "folovllm/entrypoints/llm.py:LLM.generate"),
    (INTERFACE, "folovllm/engine/llm_engine.py:LLMEngine.prepare"),
    (INTERFACE, "folovllm/engine/llm_engine.py:LLMEngine.submit"),
    (RUNTIME, "folovllm/scheduler/scheduler.py:Scheduler.add_request"),
    (RUNTIME, "folovllm/engine/core.py:EngineCore.step"),
    (RUNTIME, "folovllm/scheduler/scheduler.py:Scheduler.schedule"),
    (RUNTIME, "folovllm/kv_cache/block_manager.py:BlockManager.allocate_slots"),
    (RUNTIME, "folovllm/runner/paged_runner.py:PagedRunner.execute_model"),
    (RUNTIME, "folovllm/runner/input_batch.py:InputBatch.fill"),
    (MODEL, "folovllm/models/decoder.py:Decoder.forward"),
    (MODEL, "folovllm/models/decoder.py:Attention.forward"),
    (RUNTIME, "folovllm/attention/backend.py:AttentionBackend.write"),
    (RUNTIME, "folovllm/attention/torch_backend.py:TorchBackend.attend"),
    (MODEL, "folovllm/models/decoder.py:Decoder.logits"),
    (RUNTIME, "folovllm/sampling/sampler.py:Sampler.__call__"),
    (RUNTIME, "folovllm/scheduler/scheduler.py:Scheduler.update_from_output"),
    (INTERFACE, "folovllm/engine/output_processor.py:RequestState.add"),
)


def code_of(target: str) -> CodeType:
    """The code of "path:Class.method"."""
    path, _, name = target.partition(":")
    found = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        found = getattr(found, part)
    return inspect.unwrap(found).__code__  # type: ignore[arg-type]


def through_the_layers() -> Evidence:
    """The functions of the walk in the order in which one short request calls them first."""
    layer_of = dict((target, layer) for layer, target in WALK)
    targets = {code_of(target): target for target in layer_of}
    called: dict[str, None] = {}
    llm = LLM(milestone="m4", dtype="float32")

    def watch(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code in targets:
            called.setdefault(targets[frame.f_code])

    sys.setprofile(watch)
    try:
        llm.generate("What is a KV cache?", SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    finally:
        sys.setprofile(None)
    return {str(n): Derived(target, layer_of[target]) for n, target in enumerate(called, start=1)}
