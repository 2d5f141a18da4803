"""A model without a model: it stores token ids where a real one stores K/V, and derives the next token from them.

What a `MockRunner` samples depends on every token it reads back from its slots and on their order. So a token that was
computed twice, left out, put at a wrong position or taken from another request shows as a wrong token. `mock_tokens` is
the same function on a plain list: the oracle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from folovllm.config import EngineConfig, SchedulerConfig
from folovllm.engine.core import EngineCore
from folovllm.engine.factory import EngineParts
from folovllm.engine.llm_engine import LLMEngine
from folovllm.kv_cache.block_manager import BlockManager
from folovllm.kv_cache.contiguous import ContiguousKVManager
from folovllm.kv_cache.interface import BlockCopy, KVOp, SwapIn, SwapOut
from folovllm.kv_cache.prefix_cache import PrefixCache
from folovllm.messages import ModelRunnerOutput, NewRequestData, SchedulerOutput
from folovllm.runner.interface import ModelRunner
from folovllm.sampling_params import SamplingParams
from folovllm.scheduler.scheduler import Scheduler

VOCAB_SIZE = 64
EOS = 0


def next_token(tokens: Sequence[int], seed: int | None = None) -> int:
    """The token after `tokens`, as the mock model has it; a seed stands for sampling."""
    digest = hashlib.blake2b(bytes(tokens) + repr(seed).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % VOCAB_SIZE


def mock_tokens(prompt: Sequence[int], params: SamplingParams, max_model_len: int = 64) -> tuple[list[int], str]:
    """Output tokens and finish reason that an engine around the mock model must give: the stop rules, written out."""
    output: list[int] = []
    while True:
        output.append(next_token([*prompt, *output], params.seed))
        if len(output) >= params.min_tokens:
            if output[-1] == EOS and not params.ignore_eos:
                return output, "stop"
            if output[-1] in (params.stop_token_ids or ()):
                return output, "stop"
        if len(output) == params.max_tokens or len(prompt) + len(output) == max_model_len:
            return output, "length"


class MockRunner(ModelRunner):
    """Slots of token ids instead of K/V. Raises if a step asks for something no K/V exists for."""

    def __init__(self) -> None:
        self.slots: dict[str, list[int]] = {}
        self.known: dict[str, NewRequestData] = {}
        self.steps: list[SchedulerOutput] = []
        self.failing: set[str] = set()  # ids that nothing can be sampled for

    def update_states(self, step: SchedulerOutput) -> None:
        """Forget, and learn."""
        self.steps.append(step)
        if step.kv_ops:
            raise RuntimeError(f"contiguous K/V is never moved, and a step asks for {step.kv_ops}")
        for request_id in step.finished_req_ids:
            self.known.pop(request_id, None)
            self.slots.pop(request_id, None)
        for new in step.scheduled_new_reqs:
            self.known[new.request_id] = new

    def execute_model(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Write, and read back. A step that is tried again writes the same slots."""
        result = ModelRunnerOutput(forwards=1)
        for share in step.scheduled:
            slots = self.slots.setdefault(share.request_id, [])
            if len(slots) not in (share.start, share.start + share.num_tokens):
                raise RuntimeError(f"{share.request_id} starts at {share.start} with K/V for {len(slots)} tokens")
            slots[share.start :] = share.token_ids
            seed = self.known[share.request_id].sampling_params.seed
            fails = share.request_id in self.failing
            if fails:
                result.failed[share.request_id] = "no token to choose"
            result.sampled_token_ids.append([next_token(slots, seed)] if share.samples and not fails else [])
            result.logprobs.append(None)
        result.phases = {"prepare": (0.0, 0.0), "forward": (0.0, 0.0), "sample": (0.0, 0.0)}
        return result


class PagedMockRunner(MockRunner):
    """Slots of token ids in blocks, on a device and on a host. What a request reads back goes through its block table.

    Raises if an operation reads a block that holds nothing, if a slot is written by two requests of a step or lies in
    the null block, and if a request reads a slot that nobody wrote.
    """

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        super().__init__()
        self.block_size = block_size
        self.device: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks + 1)]
        self.host: list[list[int | None]] = [[None] * block_size for _ in range(num_host_blocks + 1)]

    def update_states(self, step: SchedulerOutput) -> None:
        """Copy and swap in order, forget, and learn."""
        self.steps.append(step)
        for op in step.kv_ops:
            self.apply(op)
        for request_id in step.finished_req_ids:
            self.known.pop(request_id, None)
        for new in step.scheduled_new_reqs:
            self.known[new.request_id] = new

    def execute_model(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Write every token, and then read back."""
        written: set[tuple[int, int]] = set()
        for share in step.scheduled:
            for position, token in enumerate(share.token_ids, share.start):
                slot = (share.plan.block_table[position // self.block_size], position % self.block_size)
                if slot in written or slot[0] == 0:
                    raise RuntimeError(f"slot {slot} is written twice, or null, by {share.request_id}")
                written.add(slot)
                self.device[slot[0]][slot[1]] = token
        result = ModelRunnerOutput(forwards=1)
        for share in step.scheduled:
            end = share.start + share.num_tokens
            slots = [self.device[share.plan.block_table[i // self.block_size]][i % self.block_size] for i in range(end)]
            if None in slots:
                raise RuntimeError(f"{share.request_id} reads a slot that nobody wrote")
            fails = share.request_id in self.failing
            if fails:
                result.failed[share.request_id] = "no token to choose"
            seed = self.known[share.request_id].sampling_params.seed
            sampled = [next_token(slots, seed)] if share.samples and not fails else []  # type: ignore[arg-type]
            result.sampled_token_ids.append(sampled)
            result.logprobs.append(None)
        result.phases = {"prepare": (0.0, 0.0), "forward": (0.0, 0.0), "sample": (0.0, 0.0)}
        return result

    def apply(self, op: KVOp) -> None:
        """Do one block operation. What is moved leaves nothing behind on the host, since nobody may read it again."""
        if isinstance(op, BlockCopy):
            source, target, place = self.device[op.src], self.device, op.dst
        elif isinstance(op, SwapOut):
            source, target, place = self.device[op.block], self.host, op.host_block
        elif isinstance(op, SwapIn):
            source, target, place = self.host[op.host_block], self.device, op.block
            self.host[op.host_block] = [None] * self.block_size
        else:
            raise RuntimeError(f"{op} is not for blocks")
        if source[0] is None or place == 0:
            raise RuntimeError(f"{op} reads a block that holds nothing, or writes the null block")
        target[place] = list(source)


def paged_mock_engine(
    max_num_seqs: int = 8,
    budget: int = 64,
    max_model_len: int = 64,
    num_blocks: int = 64,
    block_size: int = 4,
    num_host_blocks: int = 0,
    policy: str = "fcfs",
    preemption_mode: str = "recompute",
    cache: PrefixCache | None = None,
    chunked_prefill: bool = False,
    long_prefill_token_threshold: int = 0,
) -> LLMEngine:
    """An engine over blocks and the mock model; `engine.core.scheduler.kv` is the BlockManager."""
    kv = BlockManager(num_blocks, block_size, num_host_blocks, cache)
    scheduler = Scheduler(
        kv, max_num_seqs, budget, policy, preemption_mode, chunked_prefill, long_prefill_token_threshold
    )
    core = EngineCore(scheduler, PagedMockRunner(num_blocks, block_size, num_host_blocks))
    parts = EngineParts(core, None, (EOS,), VOCAB_SIZE, max_model_len)
    config = EngineConfig(milestone="m2", scheduler=SchedulerConfig(scheduling_policy=policy))
    return LLMEngine(engine_config=config, parts=parts)


def mock_engine(
    max_num_seqs: int = 1,
    budget: int = 64,
    max_model_len: int = 64,
    capacity: int = 128,
    policy: str = "fcfs",
) -> LLMEngine:
    """An engine over the mock model, without a tokenizer; `engine.core.runner` is the MockRunner.

    capacity: tokens that the contiguous KV cache may set aside.
    """
    core = EngineCore(
        Scheduler(ContiguousKVManager(capacity, max_model_len), max_num_seqs, budget, policy), MockRunner()
    )
    parts = EngineParts(core, None, (EOS,), VOCAB_SIZE, max_model_len)
    config = EngineConfig(milestone="m2", scheduler=SchedulerConfig(scheduling_policy=policy))
    return LLMEngine(engine_config=config, parts=parts)


def drain(engine: LLMEngine) -> dict[str, tuple[list[list[int]], list[str | None]]]:
    """Step to the end: request id -> (token ids, finish reasons) of its sequences."""
    done = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                done[output.request_id] = (
                    [c.token_ids for c in output.outputs],
                    [c.finish_reason for c in output.outputs],
                )
    return done


def first_scheduled(engine: LLMEngine) -> list[str]:
    """Requests in the order in which they first ran."""
    return list(dict.fromkeys(request.request_id for step in engine.trace for request in step.requests))


def check_empty(engine: LLMEngine) -> None:
    """Nothing is left of any request, anywhere."""
    runner, scheduler = engine.core.runner, engine.core.scheduler
    assert isinstance(runner, MockRunner)
    assert runner.slots == {} and runner.known == {}
    assert scheduler.requests == {} and scheduler.running == [] and scheduler.num_waiting == 0
    assert len(scheduler._parked) == 0 and scheduler._finished_req_ids == []
    usage = scheduler.kv.usage()
    assert usage.reserved == 0 and usage.used == 0
    assert engine._request_states == {} and engine._parent_requests == {}
    assert len(engine._outbox) == 0 and not engine._outbox.grown and not engine._outbox.failures and engine._stems == {}
