"""Exercises of M2: what batches waste, who waits in which order, and who runs in a step (chapter 3).

Write your answers in place of the lines that raise NotImplementedError, in any order, and run `folovllm grade m2`.
Each docstring says all there is to know; the README has a folded hint for each. Helper functions of your own are
welcome. Few answers need more than a dozen lines. The last check of `schedule` puts your answer into the real engine.

Letters in shapes: B requests in a batch, L tokens fed per row of one forward pass, W columns of K/V in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# --- what a batch wastes ----------------------------------------------------------------------------------


def padding_share(lengths: Sequence[int]) -> float:
    """The share of a padded batch that is padding.

    lengths: how many tokens each row holds. The rectangle has a row for each of them and is as wide as the longest.

    The rows may be prompts: then it is the share of the token rows that a prefill computes for nobody. They may be K/V:
    then it is the share of the cache's columns that hold nothing.

    Example: padding_share([12, 300, 40]) is 0.608...: of 3 * 300 cells, 352 hold tokens.

    Raises ValueError for no rows at all and for a length below 1.
    """
    raise NotImplementedError("padding_share")


def padded_inputs(
    new_tokens: Sequence[Sequence[int]], cached: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inputs of one forward pass for requests of different lengths, padded on the left.

    M0 had two such functions, for a prefill and for the step after it. This one does both, for requests that joined the
    batch at different times: each has K/V of a length of its own.

    new_tokens: per request, the tokens to feed now, at least one: a whole prompt, or the newest token.
    cached: per request, how many of its tokens have K/V. The cache is left-padded too: it has W = max(cached) columns,
        and a request's K/V stands in the last of them.

    Returns (input_ids [B, L], attention_mask [B, W + L], position_ids [B, L]), all int64, L being the most new tokens.
        input_ids: 0 on the left, then the row's new tokens.
        attention_mask: W columns for the cache, then L for the new tokens: 1 where a token of the row stands, else 0.
        position_ids: a row's new tokens go on counting from its own `cached`; 0 on padding.

    A token may be 0: that one is no padding.

    Example: padded_inputs([[5, 6, 7], [8]], [0, 0])        padded_inputs([[9], [4]], [3, 1])
        input_ids    attention_mask    position_ids         input_ids    attention_mask    position_ids
        5 6 7        1 1 1             0 1 2                9            1 1 1 1           3
        0 0 8        0 0 1             0 0 0                4            0 0 1 1           1

    Raises ValueError for no requests, for one without new tokens, for a negative `cached`, and for two lists of
    different lengths.
    """
    raise NotImplementedError("padded_inputs")


# --- static and continuous --------------------------------------------------------------------------------


def static_batch_steps(output_lens: Sequence[int], batch_size: int) -> int:
    """Steps that static batching takes.

    output_lens: how many tokens each request will produce, in the order in which they wait; all are there from the
        start. A request gets one token in every step that it runs, its first in the step that reads its prompt.
    batch_size: seats. The first `batch_size` requests make a batch, the next ones the next batch, and so on. A batch
        runs until its longest output is done, and only then does the next one start.

    Example: static_batch_steps([2, 5, 1, 1, 1], 2) == 5 + 1 + 1 == 7

    No requests take 0 steps. Raises ValueError for batch_size < 1 and for an output length below 1.
    """
    raise NotImplementedError("static_batch_steps")


def continuous_steps(output_lens: Sequence[int], batch_size: int) -> int:
    """Steps that continuous batching takes for the same work as in `static_batch_steps`.

    Before every step, each free seat is given to the next request that waits. A request that has all its tokens after a
    step leaves, so that its seat is free in the next one.

    Example: continuous_steps([2, 5, 1, 1, 1], 2) == 5. The long request has a seat for all 5 steps; the others follow
    each other in the second seat.

    No requests take 0 steps. Raises ValueError for batch_size < 1 and for an output length below 1.
    """
    raise NotImplementedError("continuous_steps")


# --- who is next ------------------------------------------------------------------------------------------


class PriorityQueue:
    """Requests that wait, in the order in which they should run.

    The lowest priority value is the most urgent, as in vLLM. Among equals, who joined first comes first: the ids say
    nothing about the order. A request may leave from anywhere in the line, because its user has gone away.
    """

    def __init__(self) -> None:
        """An empty line."""
        raise NotImplementedError("PriorityQueue")

    def add_request(self, request_id: str, priority: int) -> None:
        """Join the line. Raises ValueError for an id that waits already; one that has left may join again."""
        raise NotImplementedError("PriorityQueue")

    def peek_request(self) -> str:
        """The id that is next, which stays in the line. Raises IndexError if nobody waits."""
        raise NotImplementedError("PriorityQueue")

    def pop_request(self) -> str:
        """Take the id that is next out of the line. Raises IndexError if nobody waits."""
        raise NotImplementedError("PriorityQueue")

    def remove_request(self, request_id: str) -> None:
        """Take an id out from wherever it stands; the others keep their order. Raises KeyError if it is not there."""
        raise NotImplementedError("PriorityQueue")

    def __len__(self) -> int:
        """How many wait."""
        raise NotImplementedError("PriorityQueue")


# --- who runs ---------------------------------------------------------------------------------------------


def schedule(
    waiting: Sequence[tuple[str, int]],
    running: Sequence[str],
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    decodes_skipped: bool = False,
) -> list[tuple[str, int]]:
    """Decide one step of an engine: who computes how many tokens.

    waiting: (request id, tokens of its prompt), first come first. None of it is computed yet, and a prompt cannot be
        split: it is computed as a whole, in one step.
    running: ids of requests whose prompt is computed. Each needs 1 token in a step.
    max_num_seqs: seats. Requests that run at once, those that join in this step included.
    max_num_batched_tokens: the budget. Tokens that one step may compute, over all requests. At least max_num_seqs.
    decodes_skipped: whether the step before this one was one without decodes, as in rule 3.

    Returns [(request id, tokens), ...]: the step. Whoever is not in it computes nothing now. The rules:

    1. Every running request gets its 1 token, in the order of `running`, before anybody who waits.
    2. Then those that wait join, in their order, each with its whole prompt, while there is a seat and the step stays
       within the budget. Nobody overtakes: the first that does not fit ends it.
    3. But if a seat is free and the first in line does not fit beside the decodes, the step is for those that wait:
       no decodes, and rule 2 with the whole budget. Never two such steps in a row: after one (decodes_skipped), the
       decodes run as in rule 1, and whoever fits beside them joins.
    4. A prompt longer than the budget could never run. Raise ValueError for it, wherever in the line it stands.

    With nobody there, the step is empty.

    Examples, with 4 seats and a budget of 10:
        waiting [("c", 3), ("d", 6), ("e", 1)], running ["a", "b"]     [("a", 1), ("b", 1), ("c", 3)]
            "d" does not fit: 5 + 6 > 10. "e" would, and must not overtake.
        waiting [("c", 9)], running ["a", "b"]                         [("c", 9)]
            a step of its own, since 2 + 9 > 10
        waiting [("c", 9)], running ["a", "b"], decodes_skipped        [("a", 1), ("b", 1)]
    """
    raise NotImplementedError("schedule")


# --- optional: the shortest job first, and how nobody starves ---------------------------------------------


def pick_job(jobs: Sequence[tuple[float, int]], now: float, ageing: float) -> int:
    """Shortest job first, softened: which of the jobs that wait is next? Returns its index in `jobs`.

    jobs: (time of arrival, tokens it needs), in any order; nobody arrives after `now`.
    ageing: tokens that a job's need counts less for every second that it has waited. The job with the smallest
            tokens - ageing * (seconds waited)
        is next; among equals the one that arrived first, then the one that stands first in `jobs`.

    With 0 this is shortest job first: a long job waits for as long as shorter ones keep arriving. With any ageing above
    0 it does not: after enough waiting it counts less than any newcomer.

    Example: pick_job([(0, 100), (9, 20)], now=10, ageing=0) == 1. With ageing=10 it is 0: 100 - 100 against 20 - 10.

    Raises ValueError for no jobs, for ageing < 0, and for a job that arrives after `now`.
    """
    raise NotImplementedError("pick_job")
