"""Each system on a small workload: the right tokens, honest times, and counts that a look from outside confirms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from folovllm import LLM
from folovllm.bench import one_run
from folovllm.bench.engines import Arrival, EngineServer, engine_kwargs, from_trace
from folovllm.bench.one_run import Job, check_complete
from folovllm.bench.peers import RUN_PEER, generate, run_static
from folovllm.bench.record import Measured
from folovllm.bench.systems import System, parse_milestones, parse_peers
from folovllm.bench.workloads import WORKLOADS, BenchRequest, draw
from folovllm.config import MILESTONES
from folovllm.engine.trace import RequestStep, StepTrace, Trace
from folovllm.kv_cache.interface import KVUsage
from folovllm.models.loader import load_config, resolve_model
from tests.oracle import OracleStats, assert_same_tokens, hf_greedy, random_prompt, tiny_config, tiny_model

VOCAB = 128
W2 = [BenchRequest(random_prompt(n, seed=n), tokens) for n, tokens in ((5, 9), (17, 3), (1, 6), (11, 12))]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    # The model has an EOS of its own: whoever does not ignore it stops early.
    model = tiny_model("qwen3", max_position_embeddings=512)
    model.generation_config.eos_token_id = list(range(0, VOCAB, 2))
    model.generation_config.pad_token_id = 1
    return model


@pytest.fixture(scope="module")
def config_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_config("qwen3", max_position_embeddings=512, eos_token_id=list(range(0, VOCAB, 2))).save_pretrained(folder)
    return str(folder)


def engine_server(folder: str, name: str, requests: list[BenchRequest]) -> EngineServer:
    (system,) = parse_milestones(name)
    kwargs = engine_kwargs(system, requests)
    return EngineServer(LLM(folder, load_format="dummy", dtype="float32", device="cpu", **kwargs), "cpu")


def check_times(requests: list[BenchRequest], measured: Measured) -> None:
    """Times that can be true: per request one per token, in order, none before its arrival or after the end."""
    assert measured.token_times is not None
    for request, arrival, times in zip(requests, measured.arrivals, measured.token_times, strict=True):
        assert len(times) == request.max_tokens
        assert arrival < times[0] and times == sorted(times)
    assert measured.finished == max(times[-1] for times in measured.token_times)


@pytest.mark.parametrize("peer", RUN_PEER)
def test_peers_give_generates_tokens_and_ignore_eos(model: PreTrainedModel, peer: str, oracle_stats: OracleStats):
    measured = RUN_PEER[peer](model, W2)
    for request, ids in zip(W2, measured.token_ids, strict=True):
        expected = hf_greedy(model, request.prompt_token_ids, request.max_tokens)
        assert_same_tokens(ids, expected, model, request.prompt_token_ids, oracle_stats)
    check_complete(W2, measured)
    check_times(W2, measured)
    # The model is as it was: the next run would notice.
    assert model.generation_config.eos_token_id == list(range(0, VOCAB, 2))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("milestone", MILESTONES)
def test_milestones_give_generates_tokens(config_folder: str, milestone: str, oracle_stats: OracleStats):
    server = engine_server(config_folder, milestone, W2)
    reference: Any = engine_server(config_folder, "m1", W2).llm.engine.core.runner
    server.run([BenchRequest(r.prompt_token_ids[::-1], 2) for r in W2])  # a warm-up leaves no trace
    measured = server.run(W2)
    for request, ids in zip(W2, measured.token_ids, strict=True):
        expected = hf_greedy(reference.model, request.prompt_token_ids, request.max_tokens)
        assert_same_tokens(ids, expected, reference.model, request.prompt_token_ids, oracle_stats)
    check_complete(W2, measured)
    check_times(W2, measured)
    stats = measured.extra["engine"]["stats"]
    assert stats["generated_tokens"] == sum(r.max_tokens for r in W2)
    assert stats["cached_tokens"] == 0
    assert 0 < measured.forward_seconds < measured.wall_seconds
    assert measured.kv_used_tokens <= measured.kv_reserved_tokens <= measured.kv_capacity_tokens


def test_m1_reserves_the_models_length_and_uses_what_it_fed(config_folder: str):
    request = BenchRequest(random_prompt(20), 8)
    other = BenchRequest(random_prompt(30), 4)
    measured = engine_server(config_folder, "m1", [request, other]).run([request, other])
    assert measured.kv_reserved_tokens == 34  # max_model_len: what the longer one needs
    # Seen at the end of a step; the step that samples a request's last token also releases it.
    assert measured.kv_used_tokens == 30 + 2
    assert measured.padding_share == 0.0


class Rows:
    """Counts what a model really computes, by looking at its inputs and its cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.computed = 0
        self.cached = 0
        self.handle = model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids, cache = kwargs["input_ids"], kwargs["past_key_values"]
        assert isinstance(cache, DynamicCache)
        self.computed += ids.numel()
        self.cached = max(self.cached, ids.shape[0] * (cache.get_seq_length() + ids.shape[1]))


@pytest.fixture
def rows(model: PreTrainedModel) -> Iterator[Rows]:
    counter = Rows(model)
    yield counter
    counter.handle.remove()


def test_static_padding_is_what_the_model_computes_in_vain(model: PreTrainedModel, rows: Rows):
    measured = run_static(model, W2)
    needed = sum(r.num_prompt_tokens + r.max_tokens - 1 for r in W2)
    assert measured.padding_share == pytest.approx(1 - needed / rows.computed)
    assert measured.kv_reserved_tokens == rows.cached
    assert measured.kv_used_tokens == needed
    # By hand: 4 rows x (17 + 11) computed; 13 + 19 + 6 + 22 needed.
    assert (rows.computed, needed) == (112, 60)


def test_sequential_computes_nothing_in_vain(model: PreTrainedModel, rows: Rows):
    measured = RUN_PEER["sequential"](model, W2)
    assert rows.computed == sum(r.num_prompt_tokens + r.max_tokens - 1 for r in W2)
    assert measured.kv_reserved_tokens == rows.cached == 22
    # All arrive at the start, so the last one's first token has waited for the others.
    assert len(set(measured.arrivals)) == 1
    assert measured.ttfts == sorted(measured.ttfts)


def test_a_static_batch_gives_every_row_its_first_token_at_once(model: PreTrainedModel):
    measured = run_static(model, W2)
    assert len(set(measured.ttfts)) == 1
    assert [len(t) for t in measured.token_times] == [9, 3, 6, 12]


def test_left_padding_does_not_reach_the_tokens(model: PreTrainedModel):
    # Against a batch of its own width: had the mask been forgotten, the pads would have changed what row 0 says.
    alone = generate(model, [W2[0].prompt_token_ids], 9)
    batch = generate(model, [W2[0].prompt_token_ids, random_prompt(60, seed=9)], 9)
    assert [step[0] for step in batch.steps] == [step[0] for step in alone.steps]


# ------------------------------------------------------------------ the late request


MIXED = draw(WORKLOADS["mixed"], VOCAB, scale=0.125)  # 8 x (4 in, 12 out), 256 in arrives at 2 tokens each


def tokens_before_the_late_one(measured: Measured) -> list[int]:
    arrival = measured.arrivals[-1]
    return [sum(t < arrival for t in times) for times in measured.token_times[:-1]]


@pytest.mark.parametrize("milestone", MILESTONES)
def test_the_long_prompt_arrives_when_its_time_has_come(config_folder: str, milestone: str):
    measured = engine_server(config_folder, milestone, MIXED).run(MIXED)
    check_complete(MIXED, measured)
    check_times(MIXED, measured)
    limit = MILESTONES[milestone].max_num_seqs_limit
    before = tokens_before_the_late_one(measured)
    if limit is not None and limit < 8:
        assert measured.extra["arrival_rule"] == "together"
        assert sum(before) == 8 * 2  # one request at a time: exactly then
    else:
        assert measured.extra["arrival_rule"] == "each"
        assert min(before) == 2


def test_continuous_batching_of_hugging_face_takes_the_late_one_too(model: PreTrainedModel):
    measured = RUN_PEER["continuous"](model, MIXED)
    check_complete(MIXED, measured)
    check_times(MIXED, measured)
    assert measured.extra["arrival_rule"] == "each"
    # The manager runs in a thread of its own and may be some tokens ahead of who watches it.
    assert 2 <= min(tokens_before_the_late_one(measured)) < 12


def test_arrival_by_hand():
    requests = [BenchRequest([1], 5), BenchRequest([1], 3), BenchRequest([1], 1, start_after=3)]
    each, together = Arrival(requests, max_num_seqs=3), Arrival(requests, max_num_seqs=1)
    for arrival in (each, together):
        arrival.progress.update({0: 5, 1: 0})
    assert each.due() == [] and together.due() == []
    together.progress[1] = 1
    assert together.due() == [2] and together.due() == []  # named once
    each.progress[1] = 3
    assert each.due() == [2]
    assert Arrival(requests[:2]).note == {}
    with pytest.raises(ValueError, match=r"start_after=4 is not valid; allowed: at most 3"):
        Arrival([*requests[:2], BenchRequest([1], 1, start_after=4)])


# ------------------------------------------------------------------ sums over a trace


def step(forward: float, sample: float, padding: int, scheduled: int, reserved: int, used: int) -> StepTrace:
    phases = {
        "schedule": (0.0, 1.0),
        "prepare": (1.0, 2.0),
        "forward": (2.0, 2.0 + forward),
        "sample": (9.0, 9.0 + sample),
        "update": (20.0, 21.0),
    }
    share = RequestStep(
        request_id="0",
        num_scheduled=scheduled,
        num_prompt=scheduled,
        num_cached=0,
        num_computed=scheduled,
        num_output=1,
        num_sampled=1,
        status="RUNNING",
    )
    return StepTrace(
        step=0,
        phases=phases,
        requests=[share],
        num_waiting=0,
        num_running=1,
        token_budget=64,
        forwards=1,
        padding_tokens=padding,
        kv=KVUsage(capacity=100, reserved=reserved, used=used),
    )


def test_a_trace_by_hand():
    trace = Trace(10)
    trace.append(step(3.0, 0.5, 6, 10, 64, 10))
    trace.append(step(5.0, 0.5, 2, 14, 32, 24))
    found = from_trace(trace, "cpu")
    assert found["forward_seconds"] == 8.0
    assert found["padding_share"] == 8 / 32
    assert [found[f"kv_{k}_tokens"] for k in ("capacity", "reserved", "used")] == [100, 64, 24]
    assert found["phase_s"] == {"schedule": 2.0, "prepare": 2.0, "forward": 8.0, "sample": 1.0, "update": 2.0}
    assert from_trace(trace, "cuda")["forward_seconds"] == 9.0


def test_a_trace_that_lost_steps_is_not_summed():
    trace = Trace(1)
    with pytest.raises(RuntimeError, match="0 steps"):
        from_trace(trace, "cpu")
    trace.append(step(1.0, 1.0, 0, 1, 1, 1))
    trace.append(step(1.0, 1.0, 0, 1, 1, 1))
    with pytest.raises(RuntimeError, match="lost 1"):
        from_trace(trace, "cpu")


def test_a_short_answer_is_no_result():
    measured = Measured([0.0], 1.0, [[1, 2]], [[0.5, 1.0]])
    check_complete([BenchRequest([1], 2)], measured)
    with pytest.raises(RuntimeError, match="asked for 3 tokens and got 2"):
        check_complete([BenchRequest([1], 3)], measured)


def test_a_run_is_warmed_up_and_checked(monkeypatch: pytest.MonkeyPatch):
    served: list[list[BenchRequest]] = []

    def serve(model: PreTrainedModel, requests: list[BenchRequest]) -> Measured:
        served.append(requests)
        return Measured([0.0], 1.0, [[1] * 13], None)

    monkeypatch.setitem(one_run.RUN_PEER, "sequential", serve)
    (system,) = parse_peers("sequential")
    job = Job(system, "w1", "folo-tiny", "float32", "cpu", "auto", seed=2, scale=0.2)
    assert one_run.run_job(job)["output_tokens"] == 13
    vocab_size = int(load_config(resolve_model("folo-tiny")).vocab_size)
    assert served == [draw(WORKLOADS["w1"], vocab_size, 2, 0.2, warm_up=w) for w in (True, False)]
    with pytest.raises(RuntimeError, match="asked for 6 tokens and got 13"):
        one_run.run_job(replace(job, scale=0.1))


def test_engine_keywords_are_for_milestones():
    with pytest.raises(ValueError, match="hf:static"):
        engine_kwargs(System("hf:static", peer="static"), W2)
