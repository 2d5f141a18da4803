"""A sampler in plain Python and float64, and random requests to hold the real one against it.

It follows vLLM V1's order one row and one token at a time, and shares no code with the package's sampler.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from folovllm.sampling import Sampler, SamplerOutput, SamplingBatch, SamplingState
from folovllm.sampling_params import SamplingParams

INF = math.inf
VOCAB = 24  # of the random requests


def state(
    params: SamplingParams | None = None,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    stop: Sequence[int] = (),
    **kwargs: Any,
) -> SamplingState:
    params = params or SamplingParams(**kwargs)
    return SamplingState(params, list(prompt), list(output), frozenset(stop), params.seed or 0)


def sample(logits: torch.Tensor, states: Sequence[SamplingState]) -> SamplerOutput:
    """One step of fresh rows."""
    batch = SamplingBatch(logits.device, logits.shape[-1])
    rows = batch.select([batch.add(s) for s in states])
    return Sampler()(logits, rows, [len(s.output_token_ids) for s in states])


def with_seeds(s: SamplingState, seeds: Iterable[int]) -> list[SamplingState]:
    """The same request again and again, with these seeds."""
    return [replace(s, seed=seed) for seed in seeds]


def reference_noise(seed: int, index: int, vocab_size: int) -> list[float]:
    """What `folovllm/sampling/noise.py` says that it computes, in Python's integers and floats."""

    def splitmix64(seed: int, n: int) -> int:
        z = (seed + (n + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    stream = splitmix64(seed % 2**64, index)
    words = [splitmix64(stream, n) for n in range((vocab_size + 1) // 2)]
    halves = [half for word in words for half in (word % 2**32, word >> 32)][:vocab_size]
    return [-math.log1p(-min((half % 2**31 + 0.5) / 2**31, 1 - 2**-24)) for half in halves]


def softmax(x: Sequence[float]) -> list[float]:
    top = max(x)
    weights = [math.exp(v - top) for v in x]
    total = math.fsum(weights)
    return [w / total for w in weights]


def reference_edit(logits: Sequence[float], s: SamplingState) -> list[float]:
    """The logits that greedy sampling sees."""
    p, x = s.params, list(logits)
    for token in s.stop_token_ids if len(s.output_token_ids) < p.min_tokens else ():
        x[token] = -INF
    for token, bias in (p.logit_bias or {}).items():
        x[token] += bias
    for token in set(s.prompt_token_ids) | set(s.output_token_ids):
        x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
    for token in set(s.output_token_ids):
        x[token] -= p.frequency_penalty * s.output_token_ids.count(token)
        x[token] -= p.presence_penalty
    return x


def reference_probs(logits: Sequence[float], s: SamplingState) -> tuple[list[float], bool]:
    """What each token's probability should be, and whether float32 could see a filter's edge elsewhere."""
    p, x = s.params, reference_edit(logits, s)
    near = False
    if p.temperature == 0:
        return [float(token == x.index(max(x))) for token in range(len(x))], False
    x = [v / p.temperature for v in x]
    if p.min_p > 0:
        probs = softmax(x)
        edge = p.min_p * max(probs)
        near |= any(abs(q - edge) < 1e-5 * edge for q in probs) and p.min_p < 1
        x = [v if q >= edge else -INF for v, q in zip(x, probs, strict=True)]
    if 0 < p.top_k < len(x):
        kth = sorted(x, reverse=True)[p.top_k - 1]
        near |= any(0 < abs(v - kth) < 1e-5 for v in x)
        x = [v if v >= kth else -INF for v in x]
    if p.top_p < 1:
        probs, mass, dropped = softmax(x), 0.0, set()
        for token in sorted(range(len(x)), key=lambda t: (x[t], t))[:-1]:
            mass += probs[token]
            near |= abs(mass - (1 - p.top_p)) < 1e-5
            if mass <= 1 - p.top_p:
                dropped.add(token)
        x = [-INF if token in dropped else v for token, v in enumerate(x)]
    return softmax(x), near


def random_state(rng: torch.Generator, greedy_share: float = 0.2) -> SamplingState:
    """A request with a random mix of everything that a request can ask for."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=rng))

    def maybe(value: Any, off: Any, share: float = 0.5) -> Any:
        return value if uniform(0, 1) < share else off

    def ids(most: int) -> list[int]:
        return torch.randint(VOCAB, (int(uniform(0, most + 1)),), generator=rng).tolist()

    params = SamplingParams(
        temperature=0 if uniform(0, 1) < greedy_share else uniform(0.3, 2.0),
        min_p=maybe(uniform(0.01, 0.3), 0.0),
        top_k=maybe(int(uniform(1, VOCAB + 3)), 0),
        top_p=maybe(uniform(0.2, 0.99), 1.0),
        presence_penalty=maybe(uniform(-2, 2), 0.0),
        frequency_penalty=maybe(uniform(-2, 2), 0.0),
        repetition_penalty=maybe(uniform(0.5, 2.0), 1.0),
        min_tokens=maybe(int(uniform(0, 8)), 0),
        logit_bias=maybe({token: uniform(-4, 4) for token in ids(4)}, None),
        logprobs=maybe(int(uniform(0, 6)), None),
        seed=int(uniform(0, 2**31)),
    )
    return state(params, ids(10), ids(10), ids(3))


def random_batch(seed: int, rows: int, **kwargs: Any) -> tuple[torch.Tensor, list[SamplingState]]:
    rng = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(rows, VOCAB, generator=rng), [random_state(rng, **kwargs) for _ in range(rows)]
