"""Random numbers that are a function of what they are for: of a seed, the output token's index and a token id.

A generator with a state gives its next number to the next request, so a repeated or reordered step changes all later
ones. Here nothing is stored and nothing advances. The function is SplitMix64 (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014), whose n-th output can be computed on its own. It is used twice: a seed's
n-th output is itself the seed of the noise for the n-th token. vLLM keeps a `torch.Generator` per seeded request.

The bits are integers, the same on every device. From them to a float there is one logarithm, whose last bit may differ
between a CPU and a GPU, as the logits do. It hardly matters: the race in `sampler.py` compares scores, and rounding
changes the winner only where two scores are equal to as many digits. A cumulative sum, with one uniform number per row,
would be cheaper, but its rounding adds up over the vocabulary and differs between devices.
"""

from __future__ import annotations

import torch
from torch import Tensor

# SplitMix64's constants, as int64: torch multiplies and adds modulo 2 ** 64.
GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64
FACTORS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


def splitmix64(seeds: Tensor, index: Tensor) -> Tensor:
    """Output number `index`, from 0, of the generator with each seed; int64, of the shape that the two broadcast to."""
    x = seeds + (index + 1) * GOLDEN_GAMMA
    for shift, factor in FACTORS:
        x.bitwise_xor_(_shift_right(x, shift)).mul_(factor)
    return x.bitwise_xor_(_shift_right(x, 31))


def _shift_right(x: Tensor, count: int) -> Tensor:
    return (x >> count).bitwise_and_(2 ** (64 - count) - 1)  # without the copies of the sign


def exponential_noise(seeds: Tensor, index: Tensor, vocab_size: int) -> Tensor:
    """Independent exponential random numbers of rate 1, float32 `[R, V]`, all > 0 and finite.

    seeds, index: int64 `[R]`; row r is the noise of output token `index[r]` of the request with `seeds[r]`.
    """
    streams = splitmix64(seeds, index)[:, None]  # [R, 1]
    words = splitmix64(streams, torch.arange((vocab_size + 1) // 2, device=seeds.device))  # [R, V / 2]
    return _exponential(words.view(torch.int32)[:, :vocab_size])


def exponential_noise_at(seeds: Tensor, index: Tensor, token_ids: Tensor) -> Tensor:
    """Some numbers of `exponential_noise`: those of `token_ids`, int64, of whose shape the result is, as the others."""
    words = splitmix64(splitmix64(seeds, index), token_ids >> 1)[..., None].view(torch.int32)  # [..., 2]
    return _exponential(words.gather(-1, (token_ids & 1)[..., None]).squeeze(-1))


def _exponential(bits: Tensor) -> Tensor:
    """Exponential numbers from the lower 31 bits of int32."""
    uniform = (bits & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31)  # small ones are fine-grained, and they win a race
    return uniform.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_()


def own_seed(engine_seed: int, number: int) -> int:
    """A seed for an engine's request number `number`, counted over those whose parameters have none."""
    seeds = torch.tensor([to_int64(engine_seed)])
    return int(splitmix64(splitmix64(seeds, torch.tensor([0])), torch.tensor([number])).item())


def to_int64(seed: int) -> int:
    """`seed` modulo 2 ** 64, as int64 has it: a sample's seed may lie beyond the range of its parent's."""
    return (seed + 2**63) % 2**64 - 2**63
