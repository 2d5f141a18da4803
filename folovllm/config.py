"""The configuration of an engine: its parts, the milestone presets, and their validation.

Invalid settings are refused before any weight is read. An unknown name, a value out of range and two values that
contradict each other each raise a `ValueError` that names the field, the value and what is allowed.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields
from typing import Any, cast

from folovllm.checks import check_bool, check_choice, check_float, check_int, config, invalid, quoted, unknown_name
from folovllm.errors import ConfigError, errors_as

DTYPES = ("auto", "float32", "float", "bfloat16", "float16", "half")
LOAD_FORMATS = ("auto", "safetensors", "dummy")
SCHEDULING_POLICIES = ("fcfs", "priority", "sjf")
PREEMPTION_MODES = ("recompute", "swap")
ATTENTION_BACKENDS = ("auto", "reference", "torch", "triton")
BATCHINGS = ("padded", "loop")
MODEL_IMPLS = ("auto", "folovllm", "transformers")
MAX_THREADS = 1024  # torch has no bound of its own: it starts as many threads as it is told
MIN_DEFAULT_BATCHED_TOKENS = 2048  # vLLM's default budget; raised to max_model_len if prompts cannot be split
# vLLM's arguments that come with what they choose
NOT_YET = {"enforce_eager": "CUDA graphs, and every step is eager", "tensor_parallel_size": "more devices than one"}
MILESTONE_DEFAULT = "True, False or None (as the milestone says)"


@dataclass(frozen=True)
class Milestone:
    """A preset of the one engine: which KV manager and runner it uses, and what it supports."""

    name: str
    adds: str
    max_num_seqs: int  #: the default
    max_num_seqs_limit: int | None = None  #: the largest allowed; None: no limit
    paged: bool = False  #: K/V in blocks and our own forward on flattened tokens; else Hugging Face's, per request
    batchings: tuple[str, ...] = ()  #: ways to put requests into forwards; the first is the default
    policies: tuple[str, ...] = SCHEDULING_POLICIES
    chunked_prefill: bool = False
    prefix_caching: bool = False


MILESTONES: dict[str, Milestone] = {
    m.name: m
    for m in (
        Milestone("m1", "a request life cycle around the model", 1, max_num_seqs_limit=1, policies=("fcfs",)),
        Milestone("m2", "continuous batching, scheduled at every step", 16, batchings=BATCHINGS),
        Milestone("m3", "K/V in blocks, shared and allocated on demand, and batches without padding", 256, paged=True),
        Milestone(
            "m4",
            "prompts in chunks beside the decodes, and no prefix computed twice",
            256,
            paged=True,
            chunked_prefill=True,
            prefix_caching=True,
        ),
    )
}
NEWEST_MILESTONE = next(reversed(MILESTONES))


@config
class ModelConfig:
    """Which model, in which number format, on which device."""

    #: A bundled name ("folo-tiny"), a local folder in Hugging Face format (a string or a path), or a hub id
    #: ("Qwen/Qwen3-0.6B")
    model: str = "folo-tiny"
    #: A folder or hub id with the tokenizer; None is the model's
    tokenizer: str | None = None
    #: A name or a torch.dtype. "auto" is the checkpoint's 16-bit type on a GPU; on a CPU bfloat16 where it is native,
    #: else float32
    dtype: str = "auto"
    device: str = "auto"
    #: "auto" or "safetensors" read weights; "dummy" draws them at random from config.json alone
    load_format: str = "auto"
    #: Tokens of prompt and output together; None is the model's max_position_embeddings
    max_model_len: int | None = None
    seed: int = 0  #: of dummy weights, and of requests without a seed
    #: The model code of the paged milestones: "folovllm" has Llama, Mistral, Qwen2 and Qwen3; "transformers" is any
    #: Hugging Face decoder whose attention can be replaced; "auto" is ours where it fits. M1 and M2 always run
    #: Hugging Face's.
    model_impl: str = "auto"
    #: Sampling parameters of requests that have none: "auto" takes those of the model's generation_config.json, and
    #: refuses a model whose file asks for what they cannot say; "vllm" takes those of `SamplingParams()`; or a folder
    #: with a generation_config.json to read instead. EOS ids are the file's in any case.
    generation_config: str = "auto"

    def __post_init__(self) -> None:
        for name in ("model", "tokenizer", "generation_config"):
            if isinstance(getattr(self, name), os.PathLike):
                object.__setattr__(self, name, str(getattr(self, name)))
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        if not isinstance(self.model, str) or not self.model:
            raise invalid("model", self.model, "a bundled name, a local folder or a hub id")
        if self.tokenizer is not None and (not isinstance(self.tokenizer, str) or not self.tokenizer):
            raise invalid("tokenizer", self.tokenizer, "None, a bundled name, a folder or a hub id")
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("load_format", self.load_format, LOAD_FORMATS)
        if not isinstance(self.device, str) or self.device.split(":")[0] not in ("auto", "cpu", "cuda"):
            raise invalid("device", self.device, "'auto', 'cpu', 'cuda' or 'cuda:N'")
        if self.max_model_len is not None:
            check_int("max_model_len", self.max_model_len, 1)
        check_int("seed", self.seed, 0, 2**63 - 1)
        check_choice("model_impl", self.model_impl, MODEL_IMPLS)
        if not isinstance(self.generation_config, str) or not self.generation_config:
            raise invalid("generation_config", self.generation_config, "'auto', 'vllm' or a folder")


@config
class CacheConfig:
    """The size of the KV cache and of its blocks."""

    block_size: int = 16  #: tokens per block
    #: The pool's size; None derives it from the free memory. A contiguous cache gets a budget of num_kv_blocks *
    #: block_size tokens, so that it can be compared with paging on equal terms.
    num_kv_blocks: int | None = None
    gpu_memory_utilization: float = 0.9  #: share of the GPU's memory for weights, activations and K/V
    swap_space: float = 4  #: GiB of host memory; unused by a contiguous cache, as is gpu_memory_utilization
    enable_prefix_caching: bool | None = None  #: None: as the milestone says

    def __post_init__(self) -> None:
        check_int("block_size", self.block_size, 1, 256)
        if self.num_kv_blocks is not None:
            check_int("num_kv_blocks", self.num_kv_blocks, 1)
        allowed = "a number > 0 and <= 1"
        check_float("gpu_memory_utilization", self.gpu_memory_utilization, math.ulp(0.0), 1, allowed)
        check_float("swap_space", self.swap_space, 0, 2**20)
        if self.enable_prefix_caching is not None:
            check_bool("enable_prefix_caching", self.enable_prefix_caching, MILESTONE_DEFAULT)


@config
class SchedulerConfig:
    """How many requests and tokens share a step, and in which order requests are admitted."""

    max_num_seqs: int | None = None  #: requests that run at once; None takes the milestone's
    #: Tokens one step may compute; None is 2048, or max_model_len if that is larger and prompts are not split
    max_num_batched_tokens: int | None = None
    #: Split prompts, so that one may be longer than a step; None is as the milestone says
    enable_chunked_prefill: bool | None = None
    #: With chunked prefill, the most tokens of one request per step; 0 for no limit
    long_prefill_token_threshold: int = 0
    #: The order of waiting requests: "fcfs", "priority" (the lowest first) or "sjf" (the fewest tokens left first)
    scheduling_policy: str = "fcfs"
    preemption_mode: str = "recompute"  #: what happens to a preempted request's K/V: "recompute" or "swap"

    def __post_init__(self) -> None:
        if self.max_num_seqs is not None:
            check_int("max_num_seqs", self.max_num_seqs, 1)
        if self.max_num_batched_tokens is not None:
            check_int("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        if self.enable_chunked_prefill is not None:
            check_bool("enable_chunked_prefill", self.enable_chunked_prefill, MILESTONE_DEFAULT)
        check_int("long_prefill_token_threshold", self.long_prefill_token_threshold, 0)
        check_choice("scheduling_policy", self.scheduling_policy, SCHEDULING_POLICIES)
        check_choice("preemption_mode", self.preemption_mode, PREEMPTION_MODES)


@config
class EngineConfig:
    """One engine: a milestone, its three parts, and options of the engine itself."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    milestone: str = NEWEST_MILESTONE
    #: "auto" is "triton" on a GPU and "torch" on a CPU. "reference" is the formula, slow and obvious. "triton" on a CPU
    #: needs TRITON_INTERPRET=1 in the environment, and is very slow.
    attention_backend: str = "auto"
    #: How M2 batches requests: "padded" (left-padded into one forward) or "loop" (one forward each); None for
    #: every other milestone
    batching: str | None = None
    max_trace_steps: int = 10_000  #: steps that the trace keeps
    trace_blocks: bool = False  #: keep the state of every block in each step's record
    #: CPU threads of a step. None: OMP_NUM_THREADS or the caller's torch.set_num_threads if set, else one for a small
    #: model and torch's default for a large one
    num_threads: int | None = None
    #: On a CPU from M3 on, ask the C library to keep up to a GiB of freed memory for the next step, in the whole
    #: process. Otherwise a long prefill waits for zeroed pages in every layer (`results/host-memory-*.json`).
    keep_freed_memory: bool = True

    def __post_init__(self) -> None:
        for name, kind in PARTS.items():
            if not isinstance(getattr(self, name), kind):
                raise invalid(name, getattr(self, name), f"a {kind.__name__}")
        if not isinstance(self.milestone, str) or self.milestone not in MILESTONES:
            raise invalid(
                "milestone", self.milestone, f"{quoted(list(MILESTONES))} ('m0' is the module folovllm.baseline)"
            )
        check_choice("attention_backend", self.attention_backend, ATTENTION_BACKENDS)
        if self.batching is not None:
            check_choice("batching", self.batching, BATCHINGS)
        check_int("max_trace_steps", self.max_trace_steps, 0)
        check_bool("trace_blocks", self.trace_blocks)
        check_bool("keep_freed_memory", self.keep_freed_memory)
        if self.num_threads is not None:
            check_int("num_threads", self.num_threads, 1, MAX_THREADS)
        self._check_milestone()

    def _check_milestone(self) -> None:
        """Raise ValueError for an option that the milestone does not have."""
        preset, scheduler, where = self.preset, self.scheduler, f"with milestone {self.milestone}"
        limit = preset.max_num_seqs_limit
        if limit is not None and self.max_num_seqs > limit:
            raise invalid("max_num_seqs", self.max_num_seqs, f"{limit} {where}, which runs one request at a time")
        if scheduler.scheduling_policy not in preset.policies:
            raise invalid("scheduling_policy", scheduler.scheduling_policy, f"{quoted(preset.policies)} {where}")
        if self.batching is not None and self.batching not in preset.batchings:
            raise invalid("batching", self.batching, f"{quoted(preset.batchings) or None} {where}")
        if scheduler.enable_chunked_prefill and not preset.chunked_prefill:
            raise invalid("enable_chunked_prefill", True, f"False or None {where}")
        if self.cache.enable_prefix_caching and not preset.prefix_caching:
            raise invalid("enable_prefix_caching", True, f"False or None {where}")
        threshold = scheduler.long_prefill_token_threshold
        if threshold and not self.chunked_prefill:
            raise invalid("long_prefill_token_threshold", threshold, "0 without chunked prefill")
        if preset.paged:
            return
        if scheduler.preemption_mode == "swap":
            raise invalid("preemption_mode", "swap", f"'recompute' {where}, which reserves and never preempts")
        if self.attention_backend != "auto":
            raise invalid("attention_backend", self.attention_backend, f"'auto' {where}, which has Hugging Face's own")
        if self.model.model_impl == "folovllm":
            allowed = f"'auto' or 'transformers' {where}, which has Hugging Face's model"
            raise invalid("model_impl", "folovllm", allowed)
        if self.trace_blocks:
            raise invalid("trace_blocks", True, f"False {where}, which has no blocks")

    @property
    def preset(self) -> Milestone:
        return MILESTONES[self.milestone]

    @property
    def max_num_seqs(self) -> int:
        return self.scheduler.max_num_seqs or self.preset.max_num_seqs

    @property
    def chunked_prefill(self) -> bool:
        """Whether prompts may be split: as asked, or as the milestone says."""
        asked = self.scheduler.enable_chunked_prefill
        return self.preset.chunked_prefill if asked is None else asked

    @property
    def prefix_caching(self) -> bool:
        """Whether prefixes are cached: as asked, or as the milestone says."""
        asked = self.cache.enable_prefix_caching
        return self.preset.prefix_caching if asked is None else asked

    def max_num_batched_tokens(self, max_model_len: int) -> int:
        """The token budget of a step, given the longest sequence."""
        longest_prompt = 0 if self.chunked_prefill else max_model_len
        return self.scheduler.max_num_batched_tokens or max(MIN_DEFAULT_BATCHED_TOKENS, longest_prompt)

    @classmethod
    @errors_as(ConfigError)
    def from_kwargs(cls, **kwargs: Any) -> EngineConfig:
        """Sort flat keywords (those of `LLM`) into the four configurations. Raises ValueError for an unknown one."""
        owner = {f.name: part for part, kind in PARTS.items() for f in fields(cast(Any, kind))}
        own = [f.name for f in fields(cast(Any, cls)) if f.name not in PARTS]
        parts: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
        engine_kwargs: dict[str, Any] = {}
        for name, value in kwargs.items():
            if name in owner:
                parts[owner[name]][name] = value
            elif name in NOT_YET:
                raise ValueError(
                    f"LLM has no field {name!r} yet; allowed: leaving it out (there are no {NOT_YET[name]})"
                )
            elif name not in own:
                raise unknown_name("LLM", name, [*owner, *own])
            elif name != "milestone" or value is not None:  # milestone=None is the default
                engine_kwargs[name] = value
        return cls(**{part: kind(**parts[part]) for part, kind in PARTS.items()}, **engine_kwargs)


def dtype_name(dtype: Any) -> Any:
    """The name of a torch dtype; other values as they are. (torch is not imported for that.)"""
    name = str(dtype)
    return name.removeprefix("torch.") if type(dtype).__module__ == "torch" and name.startswith("torch.") else dtype


PARTS: dict[str, type] = {"model": ModelConfig, "cache": CacheConfig, "scheduler": SchedulerConfig}
