"""What an engine is made of: four small configurations, the milestone presets, and all their validation.

Everything a user can get wrong is refused here, before a weight is read: an unknown name, a value out of range, or
two values that contradict each other give one `ValueError` that names the field, the value and what is allowed.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, cast, dataclass_transform

T = TypeVar("T")

DTYPES = ("auto", "float32", "float", "bfloat16", "float16", "half")
LOAD_FORMATS = ("auto", "safetensors", "dummy")
SCHEDULING_POLICIES = ("fcfs", "priority", "sjf")
PREEMPTION_MODES = ("recompute", "swap")
ATTENTION_BACKENDS = ("auto", "reference", "torch", "torch-compiled", "triton")
BATCHINGS = ("padded", "loop")
MODEL_IMPLS = ("auto", "folovllm", "transformers")
MAX_THREADS = 1024  # torch takes any number, and makes as many threads
MIN_DEFAULT_BATCHED_TOKENS = 2048  # vLLM's default budget; raised to max_model_len where a prompt cannot be split


@dataclass(frozen=True)
class Milestone:
    """A preset of the one engine: which KV manager and runner it uses, and what it can do."""

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
        Milestone("m3", "K/V in blocks, shared and taken on demand, and batches without padding", 256, paged=True),
        Milestone(
            "m4",
            "prompts in pieces beside the decodes, and no prefix computed twice",
            256,
            paged=True,
            chunked_prefill=True,
            prefix_caching=True,
        ),
    )
}
NEWEST_MILESTONE = next(reversed(MILESTONES))


def _fail(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"{name}={value!r} is not valid; allowed: {allowed}")


def _quoted(choices: Sequence[object]) -> str:
    return ", ".join(repr(c) for c in choices)


def check_int(name: str, value: object, minimum: int, maximum: int | None = None) -> None:
    """Raise ValueError unless `value` is an int (not a bool) in [minimum, maximum]."""
    allowed = f"an integer >= {minimum}" + ("" if maximum is None else f" and <= {maximum}")
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise _fail(name, value, allowed)
    if maximum is not None and value > maximum:
        raise _fail(name, value, allowed)


def check_float(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    """Raise ValueError unless `value` is a real number in [low, high] (or (low, high] with `open_low`)."""
    allowed = f"a number {'>' if open_low else '>='} {low} and <= {high}"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise _fail(name, value, allowed)
    if open_low and value == low:
        raise _fail(name, value, allowed)


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise _fail(name, value, _quoted(choices))


def check_optional_bool(name: str, value: object) -> None:
    """Raise ValueError unless `value` is True, False or None."""
    if value is not None and not isinstance(value, bool):
        raise _fail(name, value, "True, False or None (as the milestone says)")


def unknown_name(owner: str, name: str, known: Sequence[str]) -> ValueError:
    """The error for a keyword that nothing takes, with the nearest known name as a hint."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return ValueError(f"{owner} has no field {name!r}{hint}; allowed: {', '.join(known)}")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def config(cls: type[T]) -> type[T]:
    """A frozen dataclass whose unknown keywords are a ValueError, like every other bad value."""
    made = dataclass(frozen=True)(cls)
    known = [f.name for f in fields(cast(Any, made))]
    generated: Callable[..., None] = made.__init__

    @functools.wraps(generated)
    def __init__(self: T, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in known:
                raise unknown_name(cls.__name__, name, known)
        generated(self, *args, **kwargs)

    cast(Any, made).__init__ = __init__
    return made


@config
class ModelConfig:
    """Which model, in which numbers, on which device."""

    #: A bundled name ("folo-tiny"), a local folder in Hugging Face format, or a hub id ("Qwen/Qwen3-0.6B")
    model: str = "folo-tiny"
    #: "auto" is the checkpoint's 16-bit type on a GPU; on a CPU bfloat16 where it is native, else float32
    dtype: str = "auto"
    device: str = "auto"
    #: "auto" or "safetensors" read weights; "dummy" draws them at random from config.json alone
    load_format: str = "auto"
    #: Tokens of prompt and output together; None is the model's max_position_embeddings
    max_model_len: int | None = None
    seed: int = 0  #: of dummy weights and of requests that bring no seed of their own
    #: Whose code the paged milestones run: "folovllm" has Llama, Mistral, Qwen2 and Qwen3, "transformers" any decoder
    #: that leaves attention to us; "auto" is ours where it fits. Before paging it is always Hugging Face's.
    model_impl: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise _fail("model", self.model, "a bundled name, a local folder or a hub id")
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("load_format", self.load_format, LOAD_FORMATS)
        if not isinstance(self.device, str) or self.device.split(":")[0] not in ("auto", "cpu", "cuda"):
            raise _fail("device", self.device, "'auto', 'cpu', 'cuda' or 'cuda:N'")
        if self.max_model_len is not None:
            check_int("max_model_len", self.max_model_len, 1)
        check_int("seed", self.seed, 0, 2**63 - 1)
        check_choice("model_impl", self.model_impl, MODEL_IMPLS)


@config
class CacheConfig:
    """How much K/V there is room for, and how it is cut."""

    block_size: int = 16  #: tokens per block
    #: The pool's size; None derives it. For a contiguous cache the same two numbers give a budget of num_kv_blocks *
    #: block_size tokens, so that it can be compared with paging on equal terms.
    num_kv_blocks: int | None = None
    gpu_memory_utilization: float = 0.9  #: share of the card for weights, activations and K/V
    swap_space: float = 4  #: GiB of host memory; like the field above, of no meaning to a contiguous cache
    enable_prefix_caching: bool | None = None

    def __post_init__(self) -> None:
        check_int("block_size", self.block_size, 1, 256)
        if self.num_kv_blocks is not None:
            check_int("num_kv_blocks", self.num_kv_blocks, 1)
        check_float("gpu_memory_utilization", self.gpu_memory_utilization, 0, 1, open_low=True)
        check_float("swap_space", self.swap_space, 0, 2**20)
        check_optional_bool("enable_prefix_caching", self.enable_prefix_caching)


@config
class SchedulerConfig:
    """How many requests and tokens share a step, and in which order they come."""

    max_num_seqs: int | None = None  #: requests that run at once; None takes the milestone's
    #: Tokens one step may compute; None is 2048, or max_model_len where that is longer and prompts are not split
    max_num_batched_tokens: int | None = None
    #: Split prompts, so that one may be longer than a step; None is as the milestone says
    enable_chunked_prefill: bool | None = None
    #: With split prompts, the most tokens of one request in a step, so that others fit beside it; 0 for no limit
    long_prefill_token_threshold: int = 0
    #: The order of waiting requests: "fcfs", "priority" (the lowest first) or "sjf" (the fewest tokens left first)
    scheduling_policy: str = "fcfs"
    preemption_mode: str = "recompute"

    def __post_init__(self) -> None:
        if self.max_num_seqs is not None:
            check_int("max_num_seqs", self.max_num_seqs, 1)
        if self.max_num_batched_tokens is not None:
            check_int("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        check_optional_bool("enable_chunked_prefill", self.enable_chunked_prefill)
        check_int("long_prefill_token_threshold", self.long_prefill_token_threshold, 0)
        check_choice("scheduling_policy", self.scheduling_policy, SCHEDULING_POLICIES)
        check_choice("preemption_mode", self.preemption_mode, PREEMPTION_MODES)


@config
class EngineConfig:
    """One engine: a milestone, its three parts, and how many steps of trace it keeps."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    milestone: str = NEWEST_MILESTONE
    #: "auto" is "triton" on a GPU and "torch" on a CPU. "torch-compiled" is "torch" with a fused decode, which needs a
    #: C++ compiler and seconds at the first step; "reference" is dense and obvious; "triton" on a CPU wants
    #: TRITON_INTERPRET=1 in the environment, and patience.
    attention_backend: str = "auto"
    #: How M2 puts requests into forwards: "padded", left-padded into one, or "loop", one after the other; None for
    #: every other milestone
    batching: str | None = None
    max_trace_steps: int = 10_000
    trace_blocks: bool = False  #: keep the state of every block in each step's record
    #: Threads of the CPU that a step uses; None: one for a small model, else torch's, and always OMP_NUM_THREADS or the
    #: caller's torch.set_num_threads
    num_threads: int | None = None
    #: On a CPU from M3 on, ask the C library to keep up to a GiB of freed memory for the next step, in the whole
    #: process. Without it a long prefill waits for zeroed pages in every layer (`results/host-memory-*.json`).
    keep_freed_memory: bool = True

    def __post_init__(self) -> None:
        for name, value, kind in (
            ("model", self.model, ModelConfig),
            ("cache", self.cache, CacheConfig),
            ("scheduler", self.scheduler, SchedulerConfig),
        ):
            if not isinstance(value, kind):
                raise _fail(name, value, f"a {kind.__name__}")
        if not isinstance(self.milestone, str) or self.milestone not in MILESTONES:
            built = ", ".join(repr(m) for m in MILESTONES)
            raise _fail("milestone", self.milestone, f"{built} ('m0' is the module folovllm.baseline)")
        check_choice("attention_backend", self.attention_backend, ATTENTION_BACKENDS)
        if self.batching is not None:
            check_choice("batching", self.batching, BATCHINGS)
        check_int("max_trace_steps", self.max_trace_steps, 0)
        check_choice("trace_blocks", self.trace_blocks, (False, True))
        check_choice("keep_freed_memory", self.keep_freed_memory, (False, True))
        if self.num_threads is not None:
            check_int("num_threads", self.num_threads, 1, MAX_THREADS)
        self._check_milestone()

    def _check_milestone(self) -> None:
        preset, where = self.preset, f"with milestone {self.milestone}"
        limit, wanted = preset.max_num_seqs_limit, self.scheduler.max_num_seqs
        if limit is not None and wanted is not None and wanted > limit:
            raise _fail("max_num_seqs", wanted, f"{limit} {where}, which runs one request at a time")
        if self.scheduler.scheduling_policy not in preset.policies:
            raise _fail("scheduling_policy", self.scheduler.scheduling_policy, f"{_quoted(preset.policies)} {where}")
        if self.batching is not None and self.batching not in preset.batchings:
            raise _fail("batching", self.batching, f"{_quoted(preset.batchings) or None} {where}")
        if self.scheduler.enable_chunked_prefill and not preset.chunked_prefill:
            raise _fail("enable_chunked_prefill", True, f"False or None {where}")
        if self.scheduler.long_prefill_token_threshold and not self.chunked_prefill:
            raise _fail(
                "long_prefill_token_threshold", self.scheduler.long_prefill_token_threshold, "0 without chunked prefill"
            )
        if self.cache.enable_prefix_caching and not preset.prefix_caching:
            raise _fail("enable_prefix_caching", True, f"False or None {where}")
        if self.scheduler.preemption_mode == "swap" and not preset.paged:
            raise _fail("preemption_mode", "swap", f"'recompute' {where}, which reserves and never preempts")
        if self.attention_backend != "auto" and not preset.paged:
            raise _fail("attention_backend", self.attention_backend, f"'auto' {where}, which has Hugging Face's own")
        if self.model.model_impl == "folovllm" and not preset.paged:
            raise _fail("model_impl", "folovllm", f"'auto' or 'transformers' {where}, which has Hugging Face's model")
        if self.trace_blocks and not preset.paged:
            raise _fail("trace_blocks", True, f"False {where}, which has no blocks")

    @property
    def preset(self) -> Milestone:
        """The milestone's preset."""
        return MILESTONES[self.milestone]

    @property
    def max_num_seqs(self) -> int:
        """Requests that may run at once."""
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
        """Tokens one step may compute, given the model's length."""
        longest_prompt = 0 if self.chunked_prefill else max_model_len
        return self.scheduler.max_num_batched_tokens or max(MIN_DEFAULT_BATCHED_TOKENS, longest_prompt)

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> EngineConfig:
        """Sort flat keywords (those of `LLM`) into the four configurations; refuse any that none of them has."""
        parts: dict[str, type] = {"model": ModelConfig, "cache": CacheConfig, "scheduler": SchedulerConfig}
        own = (
            "milestone",
            "attention_backend",
            "batching",
            "max_trace_steps",
            "trace_blocks",
            "num_threads",
            "keep_freed_memory",
        )
        owner = {f.name: part for part, kind in parts.items() for f in fields(cast(Any, kind))}
        sorted_kwargs: dict[str, dict[str, Any]] = {part: {} for part in parts}
        engine_kwargs: dict[str, Any] = {}
        for name, value in kwargs.items():
            if name in own:
                engine_kwargs[name] = value
            elif name in owner:
                sorted_kwargs[owner[name]][name] = value
            else:
                raise unknown_name("LLM", name, [*owner, *own])
        made = {part: kind(**sorted_kwargs[part]) for part, kind in parts.items()}
        if engine_kwargs.get("milestone") is None:
            engine_kwargs.pop("milestone", None)
        return cls(**made, **engine_kwargs)
