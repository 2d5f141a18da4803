"""Each system on a small workload: the right tokens, honest times, and counts that a look from outside confirms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from folovllm import LLM
from folovllm.config import MILESTONES
from folovllm.course.bench import one_run
from folovllm.course.bench.arrivals import Arrivals
from folovllm.course.bench.engines import EngineServer, engine_kwargs, from_trace
from folovllm.course.bench.one_run import Job, check_complete
from folovllm.course.bench.peers import (
    batch_work,
    generate,
    run_continuous,
    run_dynamic,
    run_peer,
    run_sequential,
    run_static,
)
from folovllm.course.bench.record import Measured
from folovllm.course.bench.systems import System, parse_milestones, parse_peers
from folovllm.course.bench.workloads import WORKLOADS, BenchRequest, draw
from folovllm.engine.trace import RequestStep, StepTrace, Trace
from folovllm.kv_cache.interface import KVUsage
from folovllm.models.loader import load_config, resolve_model
from tests.oracle import OracleStats, assert_same_tokens, hf_greedy, random_prompt, tiny_config, tiny_model

VOCAB = 128
SHAPES = ((5, 9), (17, 3), (1, 6), (11, 12))
W2 = [BenchRequest(random_prompt(n, seed=n), tokens) for n, tokens in SHAPES]
COMING = [replace(r, arrival=0.02 * i) for i, r in enumerate(W2)]


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


def check_arrivals(requests: list[BenchRequest], measured: Measured) -> None:
    """Requests come when they should, whoever serves them."""
    assert requests[0].arrival == 0
    after_the_first = [arrival - measured.arrivals[0] for arrival in measured.arrivals]
    assert after_the_first == pytest.approx([r.arrival for r in requests], abs=1e-9)


@pytest.mark.parametrize("requests", [W2, COMING], ids=["at once", "coming"])
@pytest.mark.parametrize("peer", ["sequential", "static", "static:3", "dynamic:2:0.01", "continuous"])
def test_peers_give_generates_tokens_and_ignore_eos(
    model: PreTrainedModel, peer: str, requests: list[BenchRequest], oracle_stats: OracleStats
):
    (system,) = parse_peers(peer)
    measured = run_peer(system, model, requests)
    for request, ids in zip(requests, measured.token_ids, strict=True):
        expected = hf_greedy(model, request.prompt_token_ids, request.max_tokens)
        assert_same_tokens(ids, expected, model, request.prompt_token_ids, oracle_stats)
    check_complete(requests, measured)
    check_times(requests, measured)
    check_arrivals(requests, measured)
    # The model is as it was: the next run would notice.
    assert model.generation_config.eos_token_id == list(range(0, VOCAB, 2))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("requests", [W2, COMING], ids=["at once", "coming"])
@pytest.mark.parametrize("milestone", [*MILESTONES, "m2:loop", "m2:padded@2"])
def test_milestones_give_generates_tokens(
    config_folder: str, milestone: str, requests: list[BenchRequest], oracle_stats: OracleStats
):
    server = engine_server(config_folder, milestone, requests)
    reference: Any = engine_server(config_folder, "m1", requests).llm.engine.core.runner
    server.run([BenchRequest(r.prompt_token_ids[::-1], 2) for r in requests])  # a warm-up leaves no trace
    measured = server.run(requests)
    for request, ids in zip(requests, measured.token_ids, strict=True):
        expected = hf_greedy(reference.model, request.prompt_token_ids, request.max_tokens)
        assert_same_tokens(ids, expected, reference.model, request.prompt_token_ids, oracle_stats)
    check_complete(requests, measured)
    check_times(requests, measured)
    check_arrivals(requests, measured)
    stats = measured.extra["engine"]["stats"]
    assert stats["generated_tokens"] == sum(r.max_tokens for r in W2)
    assert stats["cached_tokens"] == 0
    assert 0 < measured.forward_seconds < measured.wall_seconds
    assert measured.kv_used_tokens <= measured.kv_reserved_tokens <= measured.kv_capacity_tokens


def test_a_limit_of_requests_at_once_holds(config_folder: str):
    for name, most in (("m1", 1), ("m2:padded@1", 1), ("m2:loop@3", 3), ("m2", 4), ("m2@99", 4)):
        measured = engine_server(config_folder, name, W2).run(W2)
        assert measured.extra["engine"]["max_num_seqs"] == most
        assert measured.extra["engine"]["stats"]["max_running"] == most


def test_m1_reserves_the_models_length_and_uses_what_it_fed(config_folder: str):
    request = BenchRequest(random_prompt(20), 8)
    other = BenchRequest(random_prompt(30), 4)
    measured = engine_server(config_folder, "m1", [request, other]).run([request, other])
    assert measured.kv_reserved_tokens == 34  # max_model_len: what the longer one needs
    # Seen at the end of a step; the step that samples a request's last token also releases it.
    assert measured.kv_used_tokens == 30 + 2
    assert measured.padding_share == 0.0


class Rows:
    """Counts what a model really computes, by looking at its inputs, its cache and its mask."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.computed = 0
        self.cached = 0
        self.columns = 0
        self.hidden = 0
        self.handle = model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids, cache = kwargs["input_ids"], kwargs["past_key_values"]
        assert isinstance(cache, DynamicCache)
        self.computed += ids.numel()
        self.cached = max(self.cached, ids.shape[0] * (cache.get_seq_length() + ids.shape[1]))
        self.columns += ids.shape[0] * (cache.get_seq_length() + ids.shape[1])
        mask = kwargs.get("attention_mask")
        self.hidden += 0 if mask is None else int((mask == 0).sum())


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


def test_batches_pad_less_than_one_batch_and_still_wait_for_their_longest(model: PreTrainedModel, rows: Rows):
    measured = run_static(model, W2, batch_size=2)
    needed = sum(r.num_prompt_tokens + r.max_tokens - 1 for r in W2)
    assert measured.padding_share == pytest.approx(1 - needed / rows.computed)
    # By hand: 2 rows x (17 + 8), and 2 x (11 + 11).
    assert rows.computed == 50 + 44
    assert measured.kv_reserved_tokens == rows.cached == 50
    assert measured.kv_used_tokens == 13 + 19


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_work_of_batches_is_what_the_model_sees(model: PreTrainedModel, rows: Rows, batch_size: int):
    run_dynamic(model, W2, batch_size, window=0.0)  # all are there from the start
    work = [batch_work(W2[i : i + batch_size]) for i in range(0, 4, batch_size)]
    assert sum(w.rows for w in work) == rows.computed
    assert sum(w.kv_columns for w in work) == rows.columns
    # Left padding is hidden by the mask. Rows that ran too long are not: nobody told the model that they were done.
    ran_on = 0
    for i in range(0, 4, batch_size):
        steps = max(tokens for _, tokens in SHAPES[i : i + batch_size])
        ran_on += sum(prompt + step for prompt, tokens in SHAPES[i : i + batch_size] for step in range(tokens, steps))
    assert sum(w.kv_columns - w.kv_columns_needed for w in work) == rows.hidden + ran_on


@pytest.mark.parametrize("name", ["m1", "m2:loop", "m2:padded", "m2:padded@2"])
def test_padding_of_an_engine_is_what_its_model_sees(config_folder: str, name: str):
    server = engine_server(config_folder, name, W2)
    runner: Any = server.llm.engine.core.runner
    seen = Rows(runner.model)
    measured = server.run(W2)
    seen.handle.remove()
    needed = sum(r.num_prompt_tokens + r.max_tokens - 1 for r in W2)
    assert measured.padding_share == pytest.approx(1 - needed / seen.computed)
    assert measured.kv_padding_share == pytest.approx(seen.hidden / seen.columns)
    assert (measured.kv_padding_share > 0) == name.startswith("m2:padded")


def test_sequential_computes_nothing_in_vain(model: PreTrainedModel, rows: Rows):
    measured = run_sequential(model, W2)
    assert measured.padding_share == measured.kv_padding_share == 0
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
    measured = run_continuous(model, MIXED)
    check_complete(MIXED, measured)
    check_times(MIXED, measured)
    assert measured.extra["arrival_rule"] == "each"
    # The manager runs in a thread of its own and may be some tokens ahead of who watches it.
    assert 2 <= min(tokens_before_the_late_one(measured)) < 12


def test_arrival_by_hand():
    requests = [BenchRequest([1], 5), BenchRequest([1], 3), BenchRequest([1], 1, start_after=3)]
    each, together = Arrivals(requests, max_num_seqs=3), Arrivals(requests, max_num_seqs=1)
    for arrival in (each, together):
        assert arrival.due(0.0) == [0, 1]
        arrival.progress.update({0: 5, 1: 0})
    assert each.due(1.0) == [] and together.due(1.0) == []
    together.progress[1] = 1
    assert together.due(1.0) == [2] and together.due(1.0) == []  # named once
    each.progress[1] = 3
    assert each.due(1.0) == [2]
    assert Arrivals(requests[:2]).note == {}
    with pytest.raises(ValueError, match=r"start_after=4 is not valid; allowed: at most 3"):
        Arrivals([*requests[:2], BenchRequest([1], 1, start_after=4)])


# ------------------------------------------------------------------ sums over a trace


def step(
    forward: float, sample: float, padding: int, scheduled: int, reserved: int, used: int, kv_padding: int = 0
) -> StepTrace:
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
        padding_kv_tokens=kv_padding,
        kv=KVUsage(capacity=100, reserved=reserved, used=used),
    )


def test_a_trace_by_hand():
    trace = Trace(10)
    trace.append(step(3.0, 0.5, 6, 10, 64, 10, kv_padding=5))
    trace.append(step(5.0, 0.5, 2, 14, 32, 24, kv_padding=11))
    found = from_trace(trace, "cpu")
    assert found["forward_seconds"] == 8.0
    assert found["padding_share"] == 8 / 32
    assert found["kv_padding_share"] == 16 / (16 + 10 + 14)
    assert [found[f"kv_{k}_tokens"] for k in ("capacity", "reserved", "used")] == [100, 64, 24]
    assert found["phase_s"] == {"schedule": 2.0, "prepare": 2.0, "forward": 8.0, "sample": 1.0, "update": 2.0}
    assert from_trace(trace, "cuda")["forward_seconds"] == 9.0


def test_a_trace_that_lost_steps_is_not_summed():
    trace = Trace(1)
    with pytest.raises(RuntimeError, match="0 steps"):
        from_trace(trace, "cpu")
    trace.append(step(1.0, 1.0, 0, 1, 1, 1))
    trace.append(step(1.0, 1.0, 0, 1, 1, 1))
    with pytest.raises(RuntimeError, match="1 dropped"):
        from_trace(trace, "cpu")


def test_a_short_answer_is_no_result():
    measured = Measured([0.0], 1.0, [[1, 2]], [[0.5, 1.0]])
    check_complete([BenchRequest([1], 2)], measured)
    with pytest.raises(RuntimeError, match="asked for 3 tokens and got 2"):
        check_complete([BenchRequest([1], 3)], measured)


def test_a_run_is_warmed_up_and_checked(monkeypatch: pytest.MonkeyPatch):
    served: list[list[BenchRequest]] = []

    def serve(system: System, model: PreTrainedModel, requests: list[BenchRequest]) -> Measured:
        served.append(requests)
        return Measured([0.0], 1.0, [[1] * 13], None)

    monkeypatch.setattr(one_run, "run_peer", serve)
    (system,) = parse_peers("sequential")
    job = Job(system, "w1", "folo-tiny", "float32", "cpu", "auto", seed=2, scale=0.2)
    assert one_run.run_job(job)["output_tokens"] == 13
    vocab_size = int(load_config(resolve_model("folo-tiny")).vocab_size)
    assert served == [draw(WORKLOADS["w1"], vocab_size, 2, 0.2, warm_up=w) for w in (True, False)]
    with pytest.raises(RuntimeError, match="asked for 6 tokens and got 13"):
        one_run.run_job(replace(job, scale=0.1))


def test_a_run_has_the_jobs_arrivals(monkeypatch: pytest.MonkeyPatch):
    arrivals: list[list[float]] = []

    def serve(system: System, model: PreTrainedModel, requests: list[BenchRequest]) -> Measured:
        arrivals.append([r.arrival for r in requests])
        return Measured([0.0], 1.0, [[1] * r.max_tokens for r in requests], None)

    monkeypatch.setattr(one_run, "run_peer", serve)
    (system,) = parse_peers("sequential")
    one_run.run_job(Job(system, "w2", "folo-tiny", "float32", "cpu", "auto", arrival_rate=5.0))
    assert arrivals == [[0.0] * 16, [r.arrival for r in draw(WORKLOADS["w2"], VOCAB, arrival_rate=5.0)]]


def test_milestones_and_peers_are_not_taken_for_each_other(model: PreTrainedModel):
    with pytest.raises(ValueError, match="hf:static"):
        engine_kwargs(System("hf:static", peer="static"), W2)
    with pytest.raises(ValueError, match="system='m1' is not valid; allowed: a peer"):
        run_peer(System("m1", milestone="m1"), model, W2)
