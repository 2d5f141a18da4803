"""folovllm teaches how a modern LLM inference engine works by being one."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from folovllm.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
    from folovllm.engine.llm_engine import LLMEngine
    from folovllm.entrypoints.llm import LLM
    from folovllm.errors import ConfigError, EngineDeadError, EngineGenerateError, InvalidRequestError
    from folovllm.outputs import CompletionOutput, RequestMetrics, RequestOutput
    from folovllm.sampling_params import BeamSearchParams, SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "BeamSearchParams",
    "CacheConfig",
    "CompletionOutput",
    "ConfigError",
    "EngineConfig",
    "EngineDeadError",
    "EngineGenerateError",
    "InvalidRequestError",
    "LLMEngine",
    "ModelConfig",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "SchedulerConfig",
]

MODULES = {
    "LLM": "entrypoints.llm",
    "LLMEngine": "engine.llm_engine",
    "CacheConfig": "config",
    "EngineConfig": "config",
    "ModelConfig": "config",
    "SchedulerConfig": "config",
    "CompletionOutput": "outputs",
    "RequestMetrics": "outputs",
    "RequestOutput": "outputs",
    "ConfigError": "errors",
    "EngineDeadError": "errors",
    "EngineGenerateError": "errors",
    "InvalidRequestError": "errors",
    "BeamSearchParams": "sampling_params",
    "SamplingParams": "sampling_params",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import folovllm` alone does not load torch."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
