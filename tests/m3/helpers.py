"""What the tests of paged engines share: running one to its end, and looking at what is left of it."""

from __future__ import annotations

from folovllm import LLMEngine
from folovllm.kv_cache.block_manager import BlockManager
from folovllm.request import RequestStatus
from folovllm.runner.paged_runner import PagedRunner
from tests.mock import PagedMockRunner

Finished = dict[str, tuple[list[list[int]], list[str | None]]]


def manager_of(engine: LLMEngine) -> BlockManager:
    """The engine's block manager."""
    manager = engine.core.scheduler.kv
    assert isinstance(manager, BlockManager)
    return manager


def run_to_the_end(engine: LLMEngine) -> Finished:
    """Step until nothing is left, checking the books after each: id -> (token ids, finish reasons) of its sequences."""
    done: Finished = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                tokens = [c.token_ids for c in output.outputs]
                done[output.request_id] = (tokens, [c.finish_reason for c in output.outputs])
        check_progress(engine)
        manager_of(engine).check()
    return done


def check_progress(engine: LLMEngine) -> None:
    """The newest step computed something. One that did not would be followed by others like it, for ever."""
    assert engine.trace[-1].requests, "a step without work, and somebody waits"


def check_kv_of_requests(engine: LLMEngine) -> None:
    """Between two steps: who should have K/V has a table, no one else has, and every token is in its cell."""
    scheduler, runner, snapshot = engine.core.scheduler, engine.core.runner, manager_of(engine).snapshot()
    assert isinstance(runner, PagedMockRunner)
    size = snapshot.block_size
    requests = {**scheduler.requests, **scheduler._held}
    assert {*snapshot.tables, *snapshot.host_tables} <= set(requests)
    for i, request in requests.items():
        count, waits = request.num_computed_tokens, request.status is RequestStatus.WAITING
        assert (waits and count > 0) == (i in scheduler._waiting_forks)
        if count == 0:
            assert i not in snapshot.tables and i not in snapshot.host_tables
            continue
        on_host = i in snapshot.host_tables
        assert on_host or request.status is not RequestStatus.PREEMPTED
        table, cells = snapshot.tables.get(i, ()), runner.device
        if on_host:
            table, cells = snapshot.host_tables[i], runner.host
        found = [cells[table[p // size]][p % size] for p in range(count)]
        assert found == request.tokens(0, count)


def check_all_free(engine: LLMEngine) -> None:
    """Every block is free, on the device and on the host, and nobody remembers any request."""
    manager, scheduler, runner = manager_of(engine), engine.core.scheduler, engine.core.runner
    manager.check()
    assert manager.pool.num_free == manager.pool.num_blocks and manager.host_pool.num_held == 0
    assert manager.usage().used == 0 and manager.usage().unshared == 0
    assert scheduler.requests == {} and scheduler.running == [] and len(scheduler.waiting) == 0
    assert scheduler.num_waiting == 0 and scheduler._finished_req_ids == []
    assert (len(scheduler._parked), scheduler._waiting_forks, scheduler._held) == (0, {}, {})
    assert not engine._request_states and not engine._parent_requests and not engine._outbox
    if isinstance(runner, PagedRunner):
        assert len(runner.states) == 0
    else:
        assert isinstance(runner, PagedMockRunner) and runner.known == {}
