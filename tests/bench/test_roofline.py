"""The least time, against numbers worked out by hand, the formulas' own totals, and what must hold on any machine."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig, Qwen3MoeConfig

from folovllm.course.bench.roofline import ideal_passes, least_seconds, pass_work
from folovllm.course.bench.workloads import WORKLOADS, BenchRequest, draw
from folovllm.course.lessons.formulas import attention_flops_per_token, generation_flops
from folovllm.models.loader import load_config, resolve_model

# By hand: q, o 2 x 4x4; k, v 2 x 4x2; gate, up, down 3 x 4x8: 32 + 16 + 96 = 144 weights. LM head 4 x 10 = 40.
# K/V of a token in 4-byte numbers: 1 layer x 2 x 1 head x 2 x 4 = 16 bytes. A query-key pair: 4 x 2 heads x 2 FLOPs.
TINY = LlamaConfig(
    vocab_size=10,
    hidden_size=4,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=2,
)
QWEN3 = load_config(resolve_model("qwen3-0.6b"))


def request(prompt_len: int, max_tokens: int, start_after: int = 0, first: int = 0) -> BenchRequest:
    return BenchRequest(list(range(first, first + prompt_len)), max_tokens, start_after)


def least(requests: list[BenchRequest], bytes_per_s: float = 1e9, flops_per_s: float = 1e9) -> float:
    return least_seconds(TINY, requests, 4, bytes_per_s, flops_per_s)


def test_one_request_by_hand():
    prefill, decode = ideal_passes([request(3, 2)])
    work = pass_work(TINY, prefill, itemsize=4)
    assert work.weight_bytes == (144 + 40 + 3 * 4) * 4 == 784  # with the embedding's rows of 3 tokens
    assert work.kv_bytes == 3 * 16  # written; nothing is read back within the pass
    assert work.flops == 3 * 2 * 144 + 2 * 40 + (1 + 2 + 3) * 16 == 1040
    work = pass_work(TINY, decode, itemsize=4)
    assert work.weight_bytes == (144 + 40 + 4) * 4 == 752
    assert work.kv_bytes == (3 + 1) * 16  # 3 tokens read, 1 written
    assert work.flops == 2 * 144 + 2 * 40 + 4 * 16 == 432
    # 100 B/s and 100 FLOP/s: prefill max(8.32, 10.40), decode max(8.16, 4.32).
    assert least([request(3, 2)], 100, 100) == pytest.approx(10.40 + 8.16)


def test_a_batch_reads_the_weights_once_and_every_context():
    passes = ideal_passes([request(3, 3), request(2, 2, first=5)])
    assert [len(rows) for rows in passes] == [2, 2, 1]
    second, third = (pass_work(TINY, rows, itemsize=4) for rows in passes[1:])
    assert second.weight_bytes == (144 + 40 + 2 * 4) * 4
    assert second.kv_bytes == (3 + 2 + 2) * 16
    assert second.flops == 2 * (2 * 144 + 2 * 40) + (4 + 3) * 16
    assert third.kv_bytes == (4 + 1) * 16


def test_a_shared_prefix_is_computed_once_and_read_per_request():
    sharers = [BenchRequest([1, 2, 3, 4], 2), BenchRequest([1, 2, 3, 5, 6], 2)]
    prefill, decode = (pass_work(TINY, rows, itemsize=4) for rows in ideal_passes(sharers))
    assert prefill.kv_bytes == (4 + 2) * 16  # stored: 3 shared, 1 and 2 own
    # Pairs: 1 + 2 + 3 + 4 for the first; 4 + 5 for the second's own two tokens.
    assert prefill.flops == 6 * 2 * 144 + 2 * 2 * 40 + (10 + 9) * 16
    assert decode.kv_bytes == (4 + 5 + 2) * 16  # the 3 shared tokens are read twice


def test_a_late_request_is_computed_beside_the_others_tokens():
    passes = ideal_passes([request(2, 4), request(5, 2, start_after=2)])
    assert [[row.num_tokens for row in rows] for rows in passes] == [[2], [1], [1, 5], [1, 1]]
    with pytest.raises(ValueError, match="overlap"):
        ideal_passes([request(2, 2), request(5, 2, start_after=3)])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60))
def test_flops_are_those_of_the_formulas_less_the_masked_pairs(prompt_len, max_tokens):
    passes = ideal_passes([request(prompt_len, max_tokens)])
    ours = sum(pass_work(TINY, rows, itemsize=2).flops for rows in passes)
    masked = attention_flops_per_token(TINY, context=prompt_len * (prompt_len - 1) // 2)
    assert ours == generation_flops(TINY, prompt_len, max_tokens, cached=True).total - masked


SHAPES = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=8)
RATE = st.floats(1.0, 1e15)


def without_a_prefix(shapes: list[tuple[int, int]]) -> list[BenchRequest]:
    return [request(prompt_len, max_tokens, first=100 * i) for i, (prompt_len, max_tokens) in enumerate(shapes)]


@settings(max_examples=50, deadline=None)
@given(SHAPES, RATE, RATE, st.floats(1, 100))
def test_a_faster_machine_is_never_slower_and_twice_the_machine_takes_half(shapes, bytes_per_s, flops_per_s, factor):
    requests = without_a_prefix(shapes)
    seconds = least(requests, bytes_per_s, flops_per_s)
    assert least(requests, bytes_per_s * factor, flops_per_s) <= seconds
    assert least(requests, bytes_per_s, flops_per_s * factor) <= seconds
    assert least(requests, bytes_per_s * 2, flops_per_s * 2) == pytest.approx(seconds / 2)


@settings(max_examples=50, deadline=None)
@given(SHAPES, SHAPES, RATE, RATE)
def test_together_takes_longer_than_either_and_less_than_both(some, others, bytes_per_s, flops_per_s):
    requests = without_a_prefix([*some, *others])
    first, second, together = (
        least(r, bytes_per_s, flops_per_s) for r in (requests[: len(some)], requests[len(some) :], requests)
    )
    assert max(first, second) <= together * (1 + 1e-9)
    assert together <= (first + second) * (1 + 1e-9)


def test_decoding_one_request_of_qwen3_takes_as_long_as_reading_its_weights():
    # 0.44 billion weights in layers and 0.156 in the head (Qwen3-0.6B's model card: 0.6B, 0.44B non-embedding).
    weights = 2 * (0.440e9 + 151_936 * 1024)
    (w1,) = draw(WORKLOADS["w1"], 1000)
    passes = ideal_passes([w1])
    decode = [pass_work(QWEN3, rows, itemsize=2).seconds(1e9, 1e15) for rows in passes[1:]]
    assert len(decode) == 63
    for seconds in decode:
        assert weights / 1e9 * 0.99 < seconds < weights / 1e9 * 1.03
    # K/V is the rest: 114,688 bytes for each token of the context.
    assert decode[-1] - decode[0] == pytest.approx(62 * 114_688 / 1e9)


def test_models_and_texts_that_the_formulas_do_not_describe_are_refused():
    with pytest.raises(ValueError, match="model_type"):
        least_seconds(Qwen3MoeConfig(), [request(3, 2)], 2, 1e9, 1e9)
    with pytest.raises(ValueError, match="sliding_window=8"):
        least_seconds(MistralConfig(sliding_window=8), [request(7, 3)], 2, 1e9, 1e9)
    for rates in ((0, 1), (1, -1)):
        with pytest.raises(ValueError, match="allowed: numbers > 0"):
            least([request(3, 2)], *rates)
