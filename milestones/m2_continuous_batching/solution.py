"""Reference answers to the exercises of M2. The tasks are in `exercise.py`; each answer names its place in folovllm."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

# --- what a batch wastes ----------------------------------------------------------------------------------


def padding_share(lengths: Sequence[int]) -> float:
    """One minus tokens over cells. The engine counts both kinds: `Padding` in folovllm/runner/hf/hf_runner.py."""
    if min(lengths, default=0) < 1:
        raise ValueError(f"lengths={list(lengths)}: at least one row, and no row below 1")
    return 1 - sum(lengths) / (len(lengths) * max(lengths))


def padded_inputs(
    new_tokens: Sequence[Sequence[int]], cached: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every row is padded twice, in the cache and among the new tokens (folovllm/runner/hf/hf_runner.py: `HFRunner`).

    The engine feeds prefills and decodes apart, so that a row's padding is all on its left.
    """
    if not new_tokens or not all(new_tokens) or min(cached, default=0) < 0 or len(new_tokens) != len(cached):
        raise ValueError(f"new_tokens={new_tokens}, cached={cached}: rows of at least one token, and as many lengths")
    width, columns = max(cached), max(map(len, new_tokens))  # W, L
    ids, mask, positions = [], [], []
    for tokens, start in zip(new_tokens, cached, strict=True):
        pad = [0] * (columns - len(tokens))
        ids.append(pad + list(tokens))
        mask.append([0] * (width - start) + [1] * start + pad + [1] * len(tokens))
        positions.append(pad + list(range(start, start + len(tokens))))
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(positions)


# --- static and continuous --------------------------------------------------------------------------------


def check_lengths(output_lens: Sequence[int], batch_size: int) -> None:
    """The refusals that both ways of batching share."""
    if batch_size < 1 or min(output_lens, default=1) < 1:
        raise ValueError(f"output_lens={list(output_lens)}, batch_size={batch_size}: all must be at least 1")


def static_batch_steps(output_lens: Sequence[int], batch_size: int) -> int:
    """The longest of each batch (`run_static` in folovllm/course/bench/peers.py: Hugging Face's `generate` does it)."""
    check_lengths(output_lens, batch_size)
    return sum(max(output_lens[i : i + batch_size]) for i in range(0, len(output_lens), batch_size))


def continuous_steps(output_lens: Sequence[int], batch_size: int) -> int:
    """Seats that are refilled before every step (folovllm/engine/core.py: `EngineCore`)."""
    check_lengths(output_lens, batch_size)
    waiting = deque(output_lens)
    running: list[int] = []  # tokens that each still needs
    steps = 0
    while waiting or running:
        while waiting and len(running) < batch_size:
            running.append(waiting.popleft())
        running = [left - 1 for left in running if left > 1]
        steps += 1
    return steps


# --- who is next ------------------------------------------------------------------------------------------


class PriorityQueue:
    """Looks at everyone who waits to find the next, for clarity.

    folovllm/scheduler/request_queue.py: `RequestQueue` keeps a heap, in which nobody is looked for: who leaves from the
    middle leaves a gap, which is skipped when it comes to the front.
    """

    def __init__(self) -> None:
        self.places: dict[str, tuple[int, int]] = {}  # id -> (priority, turn): smaller is sooner
        self.turn = 0

    def add_request(self, request_id: str, priority: int) -> None:
        """Turns only ever grow, so no two places are equal, and an id is never compared."""
        if request_id in self.places:
            raise ValueError(f"request_id={request_id!r} waits already")
        self.turn += 1
        self.places[request_id] = (priority, self.turn)

    def peek_request(self) -> str:
        """The smallest place."""
        if not self.places:
            raise IndexError("peek at an empty queue")
        return min(self.places, key=self.places.__getitem__)

    def pop_request(self) -> str:
        """The smallest place, given up."""
        request_id = self.peek_request()
        del self.places[request_id]
        return request_id

    def remove_request(self, request_id: str) -> None:
        """A place given up. A dict raises the KeyError by itself."""
        del self.places[request_id]

    def __len__(self) -> int:
        return len(self.places)


# --- who runs ---------------------------------------------------------------------------------------------


def schedule(
    waiting: Sequence[tuple[str, int]],
    running: Sequence[str],
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    decodes_skipped: bool = False,
) -> list[tuple[str, int]]:
    """Decodes, then admission, or admission alone (folovllm/scheduler/scheduler.py: `Scheduler`).

    The engine refuses a prompt that is too long when it arrives, so that it never stands in a line.
    """
    for request_id, num_tokens in waiting:
        if num_tokens > max_num_batched_tokens:
            raise ValueError(f"{request_id}: {num_tokens} tokens never fit a budget of {max_num_batched_tokens}")
    seats = max_num_seqs - len(running)
    budget = max_num_batched_tokens - len(running)
    step = [(request_id, 1) for request_id in running]
    if waiting and seats > 0 and waiting[0][1] > budget and not decodes_skipped:
        step, budget = [], max_num_batched_tokens
    for request_id, num_tokens in waiting[: max(0, seats)]:
        if num_tokens > budget:
            break
        step.append((request_id, num_tokens))
        budget -= num_tokens
    return step


# --- optional: the shortest job first, and how nobody starves ---------------------------------------------


def pick_job(jobs: Sequence[tuple[float, int]], now: float, ageing: float) -> int:
    """Without ageing: `sjf_rank` in folovllm/scheduler/request_queue.py.

    `now` moves all ranks alike: the order is that of tokens + ageing * arrival, which never changes while a job waits.
    That is why a heap could keep it.
    """
    if not jobs or ageing < 0 or any(arrival > now for arrival, _ in jobs):
        raise ValueError(f"jobs={list(jobs)}, now={now}, ageing={ageing}: some job, none from the future, ageing >= 0")
    ranks = [(tokens - ageing * (now - arrival), arrival, index) for index, (arrival, tokens) in enumerate(jobs)]
    return min(ranks)[2]
