"""Beam search against Hugging Face's `generate` with `early_stopping=False`, at every milestone and in small pools."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from folovllm import LLM, BeamSearchParams, SamplingParams
from folovllm.engine.beam_search import beam_search
from folovllm.messages import ModelRunnerOutput, SchedulerOutput
from folovllm.outputs import BeamSearchOutput
from tests.m3.helpers import check_all_free, manager_of
from tests.oracle import OracleStats, float64_logits, random_prompt, tiny_model

PROMPTS = [random_prompt(n, seed=n) for n in (1, 9, 33)]
EOS_SETS: dict[str, list[int]] = {
    "none": [],
    "one": [5],
    "many": list(range(0, 128, 9)),
    "most": list(range(1, 128, 3)),
    "three of four": [token for token in range(128) if token % 4],  # those that go on are not among the first
}
TIE = 1e-4  # two beams whose scores are that near may change places by rounding

# Width, tokens, length penalty: every width, and penalties that favour long, short, and neither.
SEARCHES = [(1, 8, 1.0), (2, 12, 1.0), (3, 14, 0.0), (4, 16, 1.0), (5, 10, 2.0), (4, 12, -1.0)]
ENGINES: dict[str, dict[str, Any]] = {
    "m3": {"milestone": "m3"},
    "m3 reference": {"milestone": "m3", "attention_backend": "reference", "block_size": 1},
    "m3 small": {"milestone": "m3", "num_kv_blocks": 40, "block_size": 4, "max_num_seqs": 3},
    "m3 tiny": {"milestone": "m3", "num_kv_blocks": 13, "block_size": 4},
    "m3 swap": {
        "milestone": "m3",
        "num_kv_blocks": 16,
        "block_size": 4,
        "preemption_mode": "swap",
        "swap_space": 0.01,
        "scheduling_policy": "sjf",
    },
    "m2": {"milestone": "m2"},
    "m2 loop": {"milestone": "m2", "batching": "loop", "max_num_seqs": 3},
    "m1": {"milestone": "m1"},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Searched:
    """A model with an EOS set, and Hugging Face's beams for the prompts: each search is done once."""

    def __init__(self, family: str, eos: list[int], folder: Path) -> None:
        self.model: PreTrainedModel = tiny_model(family, seed=3)
        self.model.generation_config.eos_token_id = eos or None
        self.model.save_pretrained(folder)
        self.path, self.eos = str(folder), eos
        self._found: dict[Any, list[tuple[list[list[int]], list[float]]]] = {}

    def llm(self, **kwargs: Any) -> LLM:
        if kwargs["milestone"] == "m3":
            kwargs = {"num_kv_blocks": 400, **kwargs}
        return LLM(self.path, dtype="float32", device="cpu", **kwargs)

    def beams(self, width: int, tokens: int, penalty: float, ignore_eos: bool = False) -> list[Any]:
        """Per prompt: the sequences, best first, and their scores."""
        key = (width, tokens, penalty, ignore_eos)
        if key not in self._found:
            eos = [] if ignore_eos else self.eos
            self._found[key] = [self._beams(prompt, width, tokens, penalty, eos) for prompt in PROMPTS]
        return self._found[key]

    def _beams(
        self, prompt: list[int], width: int, tokens: int, penalty: float, eos: list[int]
    ) -> tuple[list[list[int]], list[float]]:
        pad = next(i for i in range(127, -1, -1) if i not in eos)
        config = GenerationConfig(
            do_sample=False,
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=tokens,
            length_penalty=penalty,
            early_stopping=False,
            eos_token_id=eos or None,
            pad_token_id=pad,
            return_dict_in_generate=True,
            output_scores=True,
        )
        own, self.model.generation_config = self.model.generation_config, config
        try:
            ids = torch.tensor([prompt])
            found = self.model.generate(ids, generation_config=config, attention_mask=torch.ones_like(ids))
        finally:
            self.model.generation_config = own
        sequences = [self._trimmed(s, len(prompt), eos) for s in found.sequences.tolist()]
        if width == 1:  # then it is a greedy search, which has no scores
            total = sum(float(s[0].log_softmax(-1)[t]) for s, t in zip(found.scores, sequences[0][len(prompt) :]))  # noqa: B905
            return sequences, [total / (len(sequences[0]) - len(prompt)) ** penalty]
        return sequences, found.sequences_scores.tolist()

    @staticmethod
    def _trimmed(sequence: list[int], prompt_len: int, eos: list[int]) -> list[int]:
        """Without what comes after the EOS, which is padding."""
        ends = [i for i, token in enumerate(sequence) if i >= prompt_len and token in eos]
        return sequence[: ends[0] + 1] if ends else sequence


def check_beams(
    outputs: Sequence[BeamSearchOutput], expected: Sequence[tuple[list[list[int]], list[float]]], stats: OracleStats
) -> None:
    """The same sequences with the same scores in the same order; two may change places only at a tie."""
    for prompt, output, (sequences, scores) in zip(PROMPTS, outputs, expected, strict=True):
        assert len(output.sequences) == len(sequences)
        for ours, score in zip(output.sequences, scores, strict=True):
            assert math.isclose(ours.score, score, rel_tol=2e-6, abs_tol=TIE)  # float32 has seven digits
        stats.sequences += 1
        tokens = [beam.tokens for beam in output.sequences]
        stats.tokens += sum(len(t) - len(prompt) for t in tokens)
        if tokens != sequences:
            nearest = min(a - b for a, b in pairwise(scores))
            assert nearest < TIE, f"{tokens}\n{sequences}"
            stats.excused.append(f"beams of a prompt of {len(prompt)}: scores {nearest:.2e} apart")


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Searched]:
    wanted = [("qwen3", eos) for eos in EOS_SETS] + [("mistral", "one"), ("llama", "many"), ("qwen2", "none")]
    return {(f, e): Searched(f, EOS_SETS[e], tmp_path_factory.mktemp(f"{f}-{e}")) for f, e in wanted}


Cases = dict[tuple[str, str], Searched]


# ---------------------------------------------------------------------- the same beams as Hugging Face


@pytest.mark.parametrize(
    ("family", "eos"),
    [("qwen3", e) for e in EOS_SETS] + [("mistral", "one"), ("llama", "many"), ("qwen2", "none")],
)
@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_the_beams_are_hugging_faces(
    family: str, eos: str, search: tuple[int, int, float], searched: Cases, oracle_stats: OracleStats
) -> None:
    case, (width, tokens, penalty) = searched[family, eos], search
    llm = case.llm(milestone="m3")
    outputs = llm.beam_search(PROMPTS, BeamSearchParams(width, tokens, length_penalty=penalty))
    check_beams(outputs, case.beams(*search), oracle_stats)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        for beam in output.sequences:
            new = beam.tokens[len(prompt) :]
            assert beam.tokens[: len(prompt)] == prompt and 1 <= len(new) <= tokens
            assert not set(new[:-1]) & set(EOS_SETS[eos])
            assert beam.finish_reason == ("stop" if new[-1] in EOS_SETS[eos] else "length")
            assert beam.finish_reason == "stop" or len(new) == tokens
            assert math.isclose(beam.score, beam.cum_logprob / len(new) ** penalty, rel_tol=1e-6)
    check_all_free(llm.engine)


def test_beams_end_for_both_reasons_in_these_tests(searched: Cases) -> None:
    """Else half of what they compare would be empty."""
    reasons = set()
    for eos in ("one", "many", "most"):
        for search in SEARCHES:
            for prompt, (sequences, _) in zip(PROMPTS, searched["qwen3", eos].beams(*search), strict=True):
                ends = [s[-1] in EOS_SETS[eos] for s in sequences]
                reasons.add((eos, all(ends), any(ends)))
                assert all(len(s) > len(prompt) for s in sequences)
    assert {("many", True, True), ("many", False, True), ("most", True, True)} <= reasons
    assert ("one", False, False) in reasons


@pytest.mark.parametrize("name", ENGINES)
def test_every_milestone_and_every_pool_finds_them(name: str, searched: Cases, oracle_stats: OracleStats) -> None:
    """In a pool for hardly one of them, what is held is given up again and again, and beams start anew."""
    searches = SEARCHES[1::2]
    for eos in ("none", "many"):
        case = searched["qwen3", eos]
        llm = case.llm(**ENGINES[name])
        for search in searches:
            width, tokens, penalty = search
            outputs = llm.beam_search(PROMPTS, BeamSearchParams(width, tokens, length_penalty=penalty))
            check_beams(outputs, case.beams(*search), oracle_stats)
        assert llm.engine.core.scheduler.requests == {} and llm.engine.core.scheduler.kv.usage().reserved == 0
        if name.startswith("m3"):
            check_all_free(llm.engine)
        if name in ("m3 tiny", "m3 swap"):  # a beam that lost its parent computes its whole prompt
            roomy = case.llm(milestone="m3", block_size=4)
            for width, tokens, penalty in searches:
                roomy.beam_search(PROMPTS, BeamSearchParams(width, tokens, length_penalty=penalty))
            assert llm.engine.stats.prompt_tokens_computed > 1.5 * roomy.engine.stats.prompt_tokens_computed


def test_beams_are_preempted_and_found_all_the_same(searched: Cases, oracle_stats: OracleStats) -> None:
    """A round takes one step, in which no beam grows into a block that it does not have: it takes others beside it
    to make beams give way."""
    for mode in ("recompute", "swap"):
        case = searched["qwen3", "many"]
        llm = case.llm(milestone="m3", num_kv_blocks=16, block_size=4, preemption_mode=mode, swap_space=0.01)
        beside = [random_prompt(n, seed=50 + n) for n in (5, 11, 14)]
        params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
        for i, prompt in enumerate(beside):
            llm.engine.add_request(f"beside {i}", prompt, params)
        outputs = llm.beam_search(PROMPTS, BeamSearchParams(4, 16))
        check_beams(outputs, case.beams(4, 16, 1.0), oracle_stats)
        assert llm.engine.stats.preemptions > 0
        done = {}
        while llm.engine.has_unfinished_requests():
            done |= {o.request_id: o.outputs[0].token_ids for o in llm.engine.step() if o.finished}
        alone = case.llm(milestone="m3").generate(beside, params, use_tqdm=False)
        assert done == {f"beside {i}": o.outputs[0].token_ids for i, o in enumerate(alone)}
        check_all_free(llm.engine)


def test_eos_can_be_ignored(searched: Cases, oracle_stats: OracleStats) -> None:
    case = searched["qwen3", "many"]
    outputs = case.llm(milestone="m3").beam_search(PROMPTS, BeamSearchParams(3, 12, ignore_eos=True))
    check_beams(outputs, case.beams(3, 12, 1.0, ignore_eos=True), oracle_stats)
    assert {beam.finish_reason for output in outputs for beam in output.sequences} == {"length"}


def test_a_beam_ends_where_the_model_ends(searched: Cases, oracle_stats: OracleStats) -> None:
    """max_model_len leaves the longest prompt 7 tokens; the others get what they ask for."""
    case = searched["qwen3", "none"]
    llm = case.llm(milestone="m3", max_model_len=40)
    outputs = llm.beam_search(PROMPTS, BeamSearchParams(3, 12))
    expected = [*case.beams(3, 12, 1.0)[:2], case.beams(3, 7, 1.0)[2]]
    check_beams(outputs, expected, oracle_stats)
    check_all_free(llm.engine)


def test_cum_logprob_is_the_sum_over_the_outputs_tokens(searched: Cases) -> None:
    """In float64, from the whole sequence at once."""
    case = searched["qwen3", "many"]
    outputs = case.llm(milestone="m3").beam_search(PROMPTS, BeamSearchParams(3, 12))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        for beam in output.sequences:
            logprobs = float64_logits(case.model, beam.tokens).log_softmax(-1)  # [L, V]
            places = range(len(prompt), len(beam.tokens))
            total = sum(float(logprobs[i - 1, beam.tokens[i]]) for i in places)
            assert math.isclose(beam.cum_logprob, total, rel_tol=2e-6, abs_tol=1e-4)


def test_temperature_changes_nothing(searched: Cases) -> None:
    llm = searched["qwen3", "many"].llm(milestone="m3")
    cold, hot = (llm.beam_search(PROMPTS, BeamSearchParams(3, 6, temperature=t)) for t in (0.0, 1.7))
    assert cold == hot


# ---------------------------------------------------------------------- what a user gives and gets


def test_text_in_and_text_out() -> None:
    llm = LLM("folo-tiny", milestone="m3", dtype="float32", device="cpu", block_size=4, num_kv_blocks=200)
    tokenizer = llm.engine.tokenizer
    texts = ["A block is", "The KV cache"]
    outputs = llm.beam_search(texts, BeamSearchParams(3, 8))
    for text, output in zip(texts, outputs, strict=True):
        prompt = tokenizer(text)["input_ids"]
        for beam in output.sequences:
            assert beam.tokens[: len(prompt)] == prompt
            assert beam.text == tokenizer.decode(beam.tokens, skip_special_tokens=True)
            assert beam.text.startswith(text)
        assert [b.score for b in output.sequences] == sorted((b.score for b in output.sequences), reverse=True)
    same = llm.beam_search({"prompt_token_ids": tokenizer(texts[0])["input_ids"]}, BeamSearchParams(3, 8))
    assert [beam.tokens for beam in same[0].sequences] == [beam.tokens for beam in outputs[0].sequences]
    assert llm.beam_search([], BeamSearchParams(3, 8)) == []
    check_all_free(llm.engine)


def test_a_model_without_a_tokenizer_gives_token_ids(searched: Cases) -> None:
    outputs = searched["qwen3", "none"].llm(milestone="m3").beam_search(PROMPTS[:1], BeamSearchParams(2, 3))
    assert [beam.text for beam in outputs[0].sequences] == ["", ""]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"beam_width": 0, "max_tokens": 4}, "beam_width=0"),
        ({"beam_width": 2.0, "max_tokens": 4}, "beam_width=2.0"),
        ({"beam_width": 2, "max_tokens": 0}, "max_tokens=0"),
        ({"beam_width": 2, "max_tokens": 4, "length_penalty": math.inf}, "length_penalty=inf"),
        ({"beam_width": 2, "max_tokens": 4, "length_penalty": math.nan}, "length_penalty=nan"),
        ({"beam_width": 2, "max_tokens": 4, "temperature": -1}, "temperature=-1"),
        ({"beam_width": 2, "max_tokens": 4, "ignore_eos": 1}, "ignore_eos=1"),
        ({"beam_width": 2, "max_tokens": 4, "best_of": 1}, "best_of"),
    ],
)
def test_bad_parameters_are_refused_by_name(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BeamSearchParams(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "bad", "message"),
    [
        ({}, [], r"prompt=\[\] has no tokens"),
        ({}, [1, 500], "500"),
        ({"max_model_len": 40}, [1] * 40, "the prompt has 40 tokens, which leaves none for output"),
        ({"max_num_batched_tokens": 40}, [1] * 41, "the prompt has 41 tokens and a step computes at most 40"),
        # A beam's past is the prompt of its next round, so what it may become has to fit as a prompt.
        (
            {"max_num_batched_tokens": 40},
            [1] * 36,
            "36 tokens of prompt and 6 of output cannot run: .* has 41 tokens and a step computes at most 40",
        ),
        (
            {"num_kv_blocks": 10, "block_size": 4},
            [1] * 36,
            "36 tokens of prompt and 6 of output cannot run: .* 11 blocks of 4, and the whole KV cache has 10",
        ),
    ],
)
def test_bad_prompts_are_refused_before_anything_runs(
    kwargs: dict[str, Any], bad: list[int], message: str, searched: Cases
) -> None:
    llm = searched["qwen3", "none"].llm(milestone="m3", **kwargs)
    params = BeamSearchParams(2, 6)
    with pytest.raises(ValueError, match=message):
        llm.beam_search([PROMPTS[0], {"prompt_token_ids": bad}], params)
    assert llm.engine.stats.steps == 0
    check_all_free(llm.engine)
    for not_params in (SamplingParams(), None, {"beam_width": 2}):
        with pytest.raises(ValueError, match=r"params=.* is not valid; allowed: a BeamSearchParams"):
            llm.beam_search(PROMPTS[:1], not_params)  # type: ignore[arg-type]


@pytest.mark.parametrize("kwargs", [{"max_num_batched_tokens": 40}, {"num_kv_blocks": 10, "block_size": 4}])
def test_as_long_as_a_step_or_a_pool_allows(kwargs: dict[str, Any], searched: Cases, oracle_stats: OracleStats) -> None:
    """33 tokens of prompt and 7 of output: the last round computes 39, and needs room for 40 at most."""
    case = searched["qwen3", "none"]
    llm = case.llm(milestone="m3", **kwargs)
    check_beams(llm.beam_search(PROMPTS, BeamSearchParams(3, 7)), case.beams(3, 7, 1.0), oracle_stats)
    check_all_free(llm.engine)


# ---------------------------------------------------------------------- blocks


@pytest.mark.parametrize("width", [1, 2, 4])
def test_kv_saved_is_the_most_that_sharing_saved_in_any_round(width: int, searched: Cases) -> None:
    """Counted from the tables that the trace has kept: a round is one step here."""
    llm = searched["qwen3", "none"].llm(milestone="m3", block_size=4, trace_blocks=True)
    (output,) = llm.beam_search([PROMPTS[2]], BeamSearchParams(width, 10))
    saved = []
    for step in llm.engine.trace:
        assert step.blocks is not None
        tables = list(step.blocks.tables.values())
        named = sum(len(table) for table in tables)
        saved.append(1 - len({block for table in tables for block in table}) / named)
    assert len(saved) == 10 and output.kv_saved == max(saved)
    assert (output.kv_saved > 0) == (width > 1)
    # Each beam has 9 to 11 blocks, and shares at least the prompt's 8 whole ones: of 4 x 11, 8 + 4 x 3 would be the
    # least sharing in the longest round.
    assert width == 1 or output.kv_saved >= 1 - (8 + width * 3) / (width * 11)


def test_beams_copy_a_block_only_when_they_part_within_it(searched: Cases) -> None:
    """With blocks of one token nobody ever writes into a shared block; with larger ones beams that part must copy."""
    case = searched["qwen3", "none"]
    for block_size in (1, 4, 16):
        llm = case.llm(milestone="m3", block_size=block_size)
        llm.beam_search([PROMPTS[2]], BeamSearchParams(4, 10))
        stats = llm.engine.stats
        assert (stats.copied_blocks > 0) == (block_size > 1)
        # The prompt is computed once; each later round computes one token per beam.
        assert stats.prompt_tokens_computed == 33 + 9 * 4 and stats.steps == 10


# ---------------------------------------------------------------------- interrupted


@pytest.mark.parametrize("after", [0, 1, 4])
@pytest.mark.parametrize("kind", [KeyboardInterrupt])
def test_an_interrupted_search_leaves_nothing(
    after: int, kind: type[BaseException], searched: Cases, oracle_stats: OracleStats
) -> None:
    case = searched["qwen3", "none"]
    llm = case.llm(milestone="m3", num_kv_blocks=40, block_size=4)
    runner = llm.engine.core.runner
    execute, calls = runner.execute_model, 0

    def interrupted(step: SchedulerOutput) -> ModelRunnerOutput:
        nonlocal calls
        calls += bool(step.scheduled)
        if step.scheduled and calls == after + 1:
            raise kind("stop")
        return execute(step)

    runner.execute_model = interrupted  # type: ignore[method-assign]
    with pytest.raises(kind, match="stop"):
        llm.beam_search(PROMPTS, BeamSearchParams(3, 7))
    runner.execute_model = execute  # type: ignore[method-assign]
    check_all_free(llm.engine)
    check_beams(llm.beam_search(PROMPTS, BeamSearchParams(3, 7)), case.beams(3, 7, 1.0), oracle_stats)
    check_all_free(llm.engine)


def test_a_callback_that_raises_leaves_nothing(searched: Cases) -> None:
    llm = searched["qwen3", "many"].llm(milestone="m3")

    def on_done(index: int) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        beam_search(llm.engine, PROMPTS, BeamSearchParams(3, 12), on_done)
    check_all_free(llm.engine)


def test_logits_that_leave_no_choice_end_the_search(searched: Cases) -> None:
    llm = searched["qwen3", "none"].llm(milestone="m3")
    decoder = llm.engine.core.runner.model
    logits = decoder.logits
    decoder.logits = lambda hidden: logits(hidden) * math.nan
    with pytest.raises(RuntimeError, match="of a beam search has no tokens: the logits leave no token to choose"):
        llm.beam_search(PROMPTS, BeamSearchParams(3, 7))
    decoder.logits = logits
    check_all_free(llm.engine)
    assert manager_of(llm.engine).pool.num_held == 0
