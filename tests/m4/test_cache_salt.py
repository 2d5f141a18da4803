"""Requests with different salts share no cached blocks."""

from __future__ import annotations

from tests.m4.helpers import COMMON, cached_engine, run


def test_a_salt_separates_the_cached_blocks_of_requests() -> None:
    engine = cached_engine()
    assert run(engine, "a", COMMON[:9], cache_salt="one") == 0
    assert run(engine, "b", COMMON[:9], cache_salt="two") == 0
    assert run(engine, "c", COMMON[:9], cache_salt="one") == 8
    assert run(engine, "d", COMMON[:9], cache_salt="") == 0
