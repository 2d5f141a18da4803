"""The index of cached blocks alone: keys in a chain, collisions, and pending blocks."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folovllm import SamplingParams
from folovllm.kv_cache.prefix_cache import CachedBlock, PrefixCache, hash_block
from folovllm.request import Request

SECRET = b"sixteen bytes of"


def request(name: str, tokens: Sequence[int], salt: str = "") -> Request:
    return Request(name, list(tokens), SamplingParams(), (), 1000, cache_salt=salt)


def constant(parent: bytes, tokens: Sequence[int], salt: str) -> bytes:
    return b"always the same"


def by_tokens_alone(parent: bytes, tokens: Sequence[int], salt: str) -> bytes:
    """Blocks of the same sum collide, wherever they stand."""
    return bytes([sum(tokens) % 256])


def write(cache: PrefixCache, r: Request, blocks: Sequence[int]) -> list[CachedBlock]:
    """The request computes its first blocks in one step: its chain."""
    chain: list[CachedBlock] = []
    cache.extend(r, chain, blocks, len(blocks))
    cache.commit(r.request_id)
    cache.check()
    return chain


def find(cache: PrefixCache, tokens: Sequence[int], salt: str = "") -> list[int]:
    """The blocks that a new request with these tokens would find."""
    newcomer = request("newcomer", tokens, salt)
    found = [entry.block for entry in cache.find(newcomer, len(tokens) // cache.block_size)]
    cache.forget("newcomer")
    cache.check()
    return found


# ---------------------------------------------------------------------- keys


def test_a_key_is_a_hash_of_the_key_before_the_tokens_and_the_salt() -> None:
    expected = blake2b(b"before" + struct.pack("=3q", 7, 0, 2**40) + "sält".encode(), digest_size=16).digest()
    assert hash_block(b"before", [7, 0, 2**40], "sält") == expected and len(expected) == 16


@given(
    st.lists(st.integers(0, 2), min_size=2, max_size=8),
    st.lists(st.integers(0, 2), min_size=2, max_size=8),
    st.sampled_from(["", "a"]),
    st.sampled_from(["", "a"]),
)
def test_keys_are_equal_exactly_where_prefix_and_salt_are(
    one: list[int], other: list[int], salt: str, other_salt: str
) -> None:
    cache = PrefixCache(2, SECRET)
    keys = [key for key, _ in cache._chain(request("one", one, salt), 0, len(one) // 2)]
    others = [key for key, _ in cache._chain(request("other", other, other_salt), 0, len(other) // 2)]
    for i, key in enumerate(keys):
        for j, other_key in enumerate(others):
            same = i == j and one[: 2 * i + 2] == other[: 2 * j + 2] and salt == other_salt
            assert (key == other_key) == same


def test_each_process_has_a_secret_of_its_own_unless_it_is_given_one() -> None:
    """Keys begin with it, so that nobody outside can work out which tokens collide."""
    first, second, given_one = PrefixCache(2), PrefixCache(2), PrefixCache(2, SECRET)
    assert first.secret != second.secret and len(first.secret) == len(second.secret) == 16
    keys = [next(iter(cache._chain(request("r", [1, 2]), 0, 1)))[0] for cache in (first, second, given_one)]
    assert len(set(keys)) == 3
    assert keys[2] == hash_block(SECRET, [1, 2], "")


def test_each_key_is_worked_out_once() -> None:
    """A request that waits is looked up in every step."""
    parents: list[bytes] = []

    def counted(parent: bytes, tokens: Sequence[int], salt: str) -> bytes:
        parents.append(parent)
        return hash_block(parent, tokens, salt)

    cache, r = PrefixCache(2, SECRET, counted), request("r", [1, 2, 3, 4, 5])
    write(cache, request("w", [1, 2, 3, 4]), [1, 2])
    parents.clear()
    for _ in range(3):
        assert len(cache.find(r, 2)) == 2
    first = hash_block(SECRET, [1, 2], "")
    assert parents == [SECRET, first]
    r.output_token_ids.append(6)  # its third block is full now
    cache.extend(r, cache.find(r, 2), [1, 2, 3], 3)
    assert parents == [SECRET, first, hash_block(first, [3, 4], "")]


# ---------------------------------------------------------------------- what is found


def test_a_lookup_stops_at_the_first_miss_and_finds_full_blocks_only() -> None:
    cache = PrefixCache(2, SECRET)
    write(cache, request("w", [1, 2, 3, 4, 5, 6, 7]), [4, 9, 2])
    assert len(cache) == 3
    assert find(cache, [1, 2, 3, 4, 5, 6, 7, 8]) == [4, 9, 2]
    assert find(cache, [1, 2, 3, 4, 5]) == [4, 9]
    assert find(cache, [1, 2, 0, 4, 5, 6]) == [4]
    assert find(cache, [0, 2, 3, 4, 5, 6]) == []
    assert find(cache, [3, 4]) == []  # the same tokens at another place
    assert [e.block for e in cache.find(request("r", [1, 2, 3, 4, 5, 6]), 2)] == [4, 9]  # no more than was asked for


def test_a_salt_separates() -> None:
    cache = PrefixCache(2, SECRET)
    write(cache, request("w", [1, 2, 3, 4], salt="mine"), [1, 2])
    assert find(cache, [1, 2, 3, 4], "mine") == [1, 2]
    assert find(cache, [1, 2, 3, 4]) == find(cache, [1, 2, 3, 4], "yours") == []
    write(cache, request("v", [1, 2, 3, 4]), [3, 4])
    assert find(cache, [1, 2, 3, 4], "mine") == [1, 2] and find(cache, [1, 2, 3, 4]) == [3, 4]


def test_a_pending_block_is_found_and_stays_when_it_is_written() -> None:
    cache, chain = PrefixCache(2, SECRET), []
    r = request("r", [1, 2, 3, 4, 5, 6, 7])
    cache.extend(r, chain, [], 0)  # a first chunk of one token, say
    assert chain == [] and len(cache) == 0 and find(cache, r.prompt_token_ids) == []
    cache.commit("r")
    cache.extend(r, chain, [5, 6], 2)
    assert find(cache, r.prompt_token_ids) == [5, 6] and [e.block for e in chain] == [5, 6]
    cache.commit("r")
    cache.extend(r, chain, [5, 6, 7], 3)
    assert find(cache, r.prompt_token_ids) == [5, 6, 7]
    cache.commit("r")
    cache.forget("r")
    assert find(cache, r.prompt_token_ids) == [5, 6, 7] and len(cache) == 3


def test_a_request_that_leaves_takes_its_pending_blocks_along_and_leaves_what_is_written() -> None:
    cache, chain = PrefixCache(2, SECRET), []
    r = request("r", [1, 2, 3, 4, 5, 6])
    cache.extend(r, chain, [1], 1)
    cache.commit("r")
    cache.extend(r, chain, [1, 2], 2)
    assert find(cache, [1, 2, 3, 4, 5, 6]) == [1, 2]
    cache.forget("r")
    assert find(cache, [1, 2, 3, 4, 5, 6]) == [1] and len(cache) == 1
    assert (cache._pending, cache._keys) == ({}, {})


def test_tokens_that_are_known_later_are_entered_when_their_block_is_full() -> None:
    """The output is cached like the prompt."""
    cache, chain = PrefixCache(2, SECRET), []
    r = request("r", [1, 2, 3])
    cache.extend(r, chain, [1, 2], 1)
    cache.commit("r")
    r.output_token_ids += [4]
    cache.extend(r, chain, [1, 2], 2)
    cache.commit("r")
    assert find(cache, [1, 2, 3, 4, 5]) == [1, 2]


# ---------------------------------------------------------------------- two that compute the same


def test_a_block_with_the_same_tokens_does_not_replace_the_first() -> None:
    cache = PrefixCache(2, SECRET)
    write(cache, request("a", [1, 2, 3, 4]), [1, 2])
    chain = write(cache, request("b", [1, 2, 3, 4]), [3, 4])
    assert find(cache, [1, 2, 3, 4]) == [1, 2] and [e.block for e in chain] == [1, 2]


def test_a_second_one_goes_on_where_the_firsts_blocks_end() -> None:
    cache = PrefixCache(2, SECRET)
    write(cache, request("a", [1, 2]), [1])
    write(cache, request("b", [1, 2, 3, 4]), [3, 4])
    assert find(cache, [1, 2, 3, 4]) == [1, 4]


def test_when_the_firsts_block_is_evicted_the_seconds_takes_its_place() -> None:
    cache = PrefixCache(2, SECRET)
    a, b = request("a", [1, 2, 3, 4]), request("b", [1, 2, 3, 4, 5, 6])
    write(cache, a, [1, 2])
    chain: list[CachedBlock] = []
    cache.extend(b, chain, [3, 4], 2)
    cache.commit("b")
    cache.forget("a")
    for block in (2, 1):
        cache.evict(block)
    assert find(cache, [1, 2, 3, 4, 5, 6]) == []
    cache.extend(b, chain, [3, 4, 5], 3)
    cache.commit("b")
    assert find(cache, [1, 2, 3, 4, 5, 6]) == [3, 4, 5] and [e.block for e in chain] == [3, 4, 5]
    cache.check()


# ---------------------------------------------------------------------- eviction


def test_an_evicted_block_is_not_found_and_neither_is_what_came_after_it() -> None:
    cache = PrefixCache(2, SECRET)
    write(cache, request("w", [1, 2, 3, 4, 5, 6]), [1, 2, 3])
    cache.evict(2)
    cache.evict(40)  # nothing stands on it
    assert find(cache, [1, 2, 3, 4, 5, 6]) == [1]
    assert cache.parents() == {1: None, 3: None}


def test_what_stood_on_an_evicted_block_is_never_found_again() -> None:
    """The same tokens are computed again, even on the same block: the third block stays an orphan until it is replaced,
    since nobody can say any more what it was computed after."""
    cache = PrefixCache(2, SECRET)
    write(cache, request("w", [1, 2, 3, 4, 5, 6]), [1, 2, 3])
    cache.forget("w")
    cache.evict(2)
    write(cache, request("v", [1, 2, 3, 4]), [1, 2])
    assert find(cache, [1, 2, 3, 4, 5, 6]) == [1, 2]
    assert cache.parents() == {1: None, 2: 1, 3: None}
    write(cache, request("u", [1, 2, 3, 4, 5, 6]), [1, 2, 8])
    assert find(cache, [1, 2, 3, 4, 5, 6]) == [1, 2, 8] and len(cache) == 3
    cache.evict(3)  # which is not in the index any more
    assert find(cache, [1, 2, 3, 4, 5, 6]) == [1, 2, 8]
    assert cache.parents() == {1: None, 2: 1, 8: 2}


def test_clear_forgets_everything_in_every_state() -> None:
    cache, chain = PrefixCache(2, SECRET), []
    r = request("r", [1, 2, 3, 4, 5, 6])
    write(cache, request("w", [9, 9]), [9])
    cache.extend(r, chain, [1], 1)
    cache.commit("r")
    cache.extend(r, chain, [1, 2], 2)
    cache.clear()
    assert find(cache, [1, 2, 3, 4, 5, 6]) == find(cache, [9, 9]) == [] and len(cache) == 0
    assert cache._entries == {} and cache.parents() == {}
    cache.commit("r")
    cache.forget("r")
    assert cache._entries == {}
    write(cache, request("w", [9, 9]), [9])
    assert find(cache, [9, 9]) == [9]


# ---------------------------------------------------------------------- collisions


@pytest.mark.parametrize("function", [constant, by_tokens_alone])
def test_equal_keys_are_not_enough(function: object) -> None:
    cache = PrefixCache(2, SECRET, function)  # type: ignore[arg-type]
    write(cache, request("w", [1, 4]), [1])
    assert find(cache, [1, 4]) == [1]
    assert find(cache, [4, 1]) == find(cache, [2, 3]) == find(cache, [1, 4], "salt") == []
    write(cache, request("v", [4, 1]), [2])  # the newer one stays
    assert find(cache, [4, 1]) == [2] and find(cache, [1, 4]) == [] and len(cache) == 1
    cache.evict(1)  # it belongs to nobody
    assert find(cache, [4, 1]) == [2]


def test_the_block_before_is_compared_and_not_only_its_key() -> None:
    """[1, 4] and [4, 1] collide, and so do the blocks after them, which hold the same tokens."""
    cache = PrefixCache(2, SECRET, by_tokens_alone)
    write(cache, request("w", [1, 4, 5, 5]), [1, 2])
    cache.forget("w")
    write(cache, request("v", [4, 1]), [3])
    assert find(cache, [4, 1, 5, 5]) == [3]


def test_not_even_when_the_block_before_was_evicted_and_used_again() -> None:
    """The parent has the same key and even the same number. Its tokens are others, and so is the K/V after them."""
    cache = PrefixCache(2, SECRET, by_tokens_alone)
    write(cache, request("w", [1, 4, 5, 5, 6, 6]), [1, 2, 3])
    cache.forget("w")
    cache.evict(1)
    write(cache, request("v", [4, 1]), [1])
    assert find(cache, [4, 1, 5, 5, 6, 6]) == [1]
    assert find(cache, [1, 4, 5, 5, 6, 6]) == []
    assert cache.parents() == {1: None, 2: None, 3: 2}


def test_a_request_whose_own_blocks_collide_finds_nothing_wrong() -> None:
    cache = PrefixCache(1, SECRET, constant)
    write(cache, request("w", [5, 5, 5]), [1, 2, 3])
    assert find(cache, [5]) == [] and len(cache) == 1  # only the last one is left, and nothing leads to it
    assert cache.parents() == {3: None}


def test_a_collision_takes_a_pending_entry_away_for_good() -> None:
    cache, chain = PrefixCache(2, SECRET, constant), []
    a = request("a", [1, 4, 5, 5])
    cache.extend(a, chain, [1], 1)
    write(cache, request("b", [2, 2]), [2])
    cache.commit("a")
    assert find(cache, [1, 4, 5, 5]) == [] and find(cache, [2, 2]) == [2]
    cache.forget("a")
    assert find(cache, [2, 2]) == [2]


# ---------------------------------------------------------------------- the check itself


def test_the_check_sees_what_is_wrong() -> None:
    def make() -> PrefixCache:
        cache = PrefixCache(2, SECRET)
        write(cache, request("w", [1, 2]), [1])
        return cache

    cache = make()
    cache._by_block[2] = cache._by_block[1]
    with pytest.raises(RuntimeError, match="by key and by block differ"):
        cache.check()
    cache = make()
    (entry,) = cache._entries.values()
    cache._entries[b"another key"] = cache._entries.pop(entry.key)
    with pytest.raises(RuntimeError, match="by key and by block differ"):
        cache.check()
