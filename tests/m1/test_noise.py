"""The sampler's random numbers: the published generator, and no pattern in what it gives to neighbours."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from scipy.stats import kstest, pearsonr

from folovllm.sampling.noise import exponential_noise, exponential_noise_at, own_seed, splitmix64, to_int64
from tests.m1.sampling_reference import reference_noise

# The first outputs of the authors' splitmix64.c (https://prng.di.unimi.it/splitmix64.c), as its users test it.
PUBLISHED = {
    0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC],
    1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431],
}


@pytest.mark.parametrize("seed", PUBLISHED)
def test_the_generator_is_the_published_one(seed: int) -> None:
    outputs = splitmix64(torch.tensor(seed), torch.arange(4)).tolist()
    assert [output % 2**64 for output in outputs] == PUBLISHED[seed]


@pytest.mark.parametrize("vocab_size", [1, 2, 7, 64])
def test_noise_is_that_of_its_definition(vocab_size: int) -> None:
    seeds, index = [0, 1, -1, 2**63 - 1, -(2**63)], [0, 1, 2, 1000, 2**31]
    noise = exponential_noise(torch.tensor(seeds), torch.tensor(index), vocab_size)
    expected = torch.tensor([reference_noise(s, i, vocab_size) for s, i in zip(seeds, index, strict=True)])
    torch.testing.assert_close(noise, expected.float(), rtol=1e-4, atol=0)  # float32 has few digits of 1 - u


def test_noise_of_some_tokens_is_that_of_all() -> None:
    seeds, index = torch.arange(-3, 4), torch.arange(7) * 2**20
    for vocab_size in (1, 2, 9, 64):
        token_ids = torch.arange(vocab_size).expand(7, -1)  # [7, V]
        some = exponential_noise_at(seeds[:, None], index[:, None], token_ids)
        torch.testing.assert_close(some, exponential_noise(seeds, index, vocab_size), rtol=1e-6, atol=0)


def test_noise_depends_on_nothing_else() -> None:
    seeds, index = torch.arange(9), torch.arange(9) % 4
    together = exponential_noise(seeds, index, 1001)
    for row in range(9):
        assert torch.equal(exponential_noise(seeds[row : row + 1], index[row : row + 1], 1001)[0], together[row])
    assert torch.equal(exponential_noise(seeds, index, 77), together[:, :77])  # a wider vocabulary adds tokens


def test_noise_is_positive_finite_and_exponential() -> None:
    noise = exponential_noise(torch.arange(20), torch.zeros(20, dtype=torch.int64), 50_000)
    assert noise.min() > 0 and noise.max() < 17
    assert kstest(noise.flatten()[::7].double().numpy(), "expon").pvalue > 1e-3
    rare = (noise < 1e-4).double().mean().item()  # it is the small ones that win a race
    assert abs(rare - 1e-4) < 5 * (1e-4 / noise.numel()) ** 0.5


def test_neighbours_in_seed_index_and_token_are_independent() -> None:
    index = torch.arange(200)
    a = exponential_noise(torch.full((200,), 5), index, 200).double()  # [index, token]
    b = exponential_noise(torch.full((200,), 6), index, 200).double()
    pairs = {"seed": (a, b), "index": (a[1:], a[:-1]), "token": (a[:, 1:], a[:, :-1]), "both": (a[1:], b[:-1])}
    for name, (x, y) in pairs.items():
        assert pearsonr(x.flatten().numpy(), y.flatten().numpy()).pvalue > 1e-3, name


def test_requests_without_a_seed_get_different_ones() -> None:
    seeds = [own_seed(engine, number) for engine in range(30) for number in range(30)]
    assert len(set(seeds)) == 900
    assert seeds == [own_seed(engine, number) for engine in range(30) for number in range(30)]
    assert to_int64(2**63) == -(2**63) and to_int64(-(2**63) - 1) == 2**63 - 1 and to_int64(-7) == -7


def test_the_noise_of_another_process_is_the_same() -> None:
    code = (
        "import torch; from folovllm.sampling.noise import exponential_noise as e; torch.manual_seed(9);"
        "print(e(torch.tensor([3]), torch.tensor([4]), 5).tolist())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(exponential_noise(torch.tensor([3]), torch.tensor([4]), 5).tolist())
