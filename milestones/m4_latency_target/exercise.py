"""Exercises of M4's third part: change a policy to meet a latency target (chapter 8).

Write your answers in place of the lines that raise NotImplementedError, in order, and run
`folovllm grade m4-latency-target`. Each docstring says all there is to know; the README has a folded hint for each.
Helper functions of your own are welcome. `LatencyPolicy` fills the steps of the real engine, in place of its own rule.

All times are whole nanoseconds, so that nobody has to think about rounding: 42,000,000 are 42 milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence

# --- what a step costs ------------------------------------------------------------------------------------


def step_cost(shares: Sequence[tuple[int, int]], cost: tuple[int, int, int]) -> int:
    """How long a step takes on a made-up machine, in nanoseconds.

    shares: (start, count) per request that takes part. The step computes `count` tokens of it, at the positions start,
        start + 1, ... K/V of its positions below `start` is there from earlier steps. A decode is (start, 1).
    cost: (fixed, per_token, per_pair). Every step takes `fixed`, which is reading the weights; `per_token` for each
        token that it computes, which is the linear layers; and `per_pair` for each pair of a token that it computes and
        a key that this token may see, which is attention. A token at position i sees i + 1 keys, its own included.

    Examples, with cost (1000, 10, 1):
        step_cost([(0, 3)], cost)          is 1000 + 30 + (1 + 2 + 3)
        step_cost([(100, 2)], cost)        is 1000 + 20 + (101 + 102)
        step_cost([(7, 1), (0, 2)], cost)  is 1000 + 30 + 8 + (1 + 2)
        step_cost([], cost)                is 1000

    Raises ValueError for a start < 0 and for a count < 1.
    """
    raise NotImplementedError("step_cost")


def tokens_within(
    shares: Sequence[tuple[int, int]], start: int, missing: int, target: int, cost: tuple[int, int, int]
) -> int:
    """How many tokens of a prompt a step can take along and still end in time.

    shares: (start, count) of those that are in the step already, as in `step_cost`.
    start, missing: the prompt has K/V for its first `start` tokens, and lacks `missing` more, at least 1.
    target: nanoseconds that the step may take, the prompt's share included.
    cost: as in `step_cost`.

    Returns the largest count, from 0 to `missing`, with which the step takes no longer than `target`. 0 means that the
    prompt is not in the step at all; it is also the answer if the step takes too long without it.

    Examples, with cost (1000, 10, 1):
        tokens_within([], 0, 5, 1033, cost)           is 2, since 1 token takes 1011, 2 take 1023, and 3 take 1036
        tokens_within([], 100, 5, 1250, cost)         is 2: the later the chunk, the more keys for each of its tokens
        tokens_within([(7, 1)], 0, 5, 1033, cost)     is 1: the decode beside it takes 18
        tokens_within([], 0, 5, 5000, cost)           is 5, for there are no more
        tokens_within([(0, 90)], 0, 5, 1033, cost)    is 0

    It is asked in every step about prompts of many thousand tokens. To try them one by one would take longer than the
    step.
    """
    raise NotImplementedError("tokens_within")


# --- a policy ---------------------------------------------------------------------------------------------


class LatencyPolicy:
    """Fills the steps of the engine so that latency targets are met.

    The engine asks for a plan before each step. Eight readers decode; a prompt of 4,096 tokens comes, and in the last
    check five short prompts come behind it. The targets: no request may wait longer than `target` for its next token,
    ever. The long prompt has its first token at most 1,200 ms after it came, and each short one at most 100 ms after.

    On this machine (fixed 20 ms, 0.05 ms per token, 40 ns per pair; a target of 42 ms) no fixed budget of tokens meets
    both of the first two: what is small enough for the last chunks, which see thousands of keys, is too small for the
    first ones. The checks will show you. And who gives a prompt all that is left of each step until it is done lets all
    short ones wait behind it.

    What they say must not change, and nobody may starve: every request is served to its last token.
    """

    def __init__(self, target: int, cost: tuple[int, int, int]) -> None:
        """target: nanoseconds that anybody may wait for the next token. cost: as in `step_cost`."""
        raise NotImplementedError("LatencyPolicy")

    def plan(
        self, running: Sequence[tuple[str, int, int]], waiting: Sequence[tuple[str, int, int]]
    ) -> list[tuple[str, int]]:
        """Who is in the next step, and with how many tokens.

        running: (id, start, missing) of those that have begun, in the order in which they did. `start` tokens have K/V,
            and `missing` known ones have none. One that decodes lacks exactly 1, the token that it sampled last. One
            whose prompt is being computed in chunks lacks what is left of it.
        waiting: the same of those that have not begun, in the order in which they came. Their `start` is 0.

        Returns (id, tokens) of all that take part, each once, with 1 to `missing` tokens. Who is left out keeps what it
        has and waits for the next step. At least one takes part, since otherwise nothing would ever change. There is
        room for everybody's K/V, and no limit to the tokens of a step but the time that they take.
        """
        raise NotImplementedError("LatencyPolicy")
