"""Beam search: a driver above the engine (vLLM: `vllm/entrypoints/llm.py: beam_search`).

In each round every beam is a request that asks for one token and its likeliest alternatives. Then the best `beam_width`
candidates of all become the beams of the next round:

    prompt ──> a ──> [a b] ──> ...        a round: K candidates from each beam, the best `beam_width` go on
          └──> c ──> [a d]                beams with a common past share its blocks, and copy the one where they part

Where K/V can be shared (M3, M4) a beam is a fork of its parent in the round before, which is held until then. At M1 and
M2 each round computes its beams from the first token. Results are those of Hugging Face's `generate` with
`early_stopping=False`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from folovllm.engine.input_processor import Prompt
from folovllm.engine.llm_engine import LLMEngine
from folovllm.errors import EngineGenerateError
from folovllm.outputs import BeamSearchOutput, BeamSequence, RequestOutput
from folovllm.sampling_params import BeamSearchParams, SamplingParams


@dataclass
class Beam:
    """A sequence that is not complete."""

    tokens: list[int]
    cum_logprob: float
    request_id: str | None = None  # its request in the round before, which this round forks


@dataclass
class Search:
    """One prompt's search: `beams` go on, `ended` are complete and ranked by score, at most `beam_width` of each."""

    index: int  # of the prompt
    prompt_len: int
    max_tokens: int
    beams: list[Beam]
    cache_salt: str = ""
    ended: list[tuple[float, Beam, str]] = field(default_factory=list)
    running: bool = True
    kv_saved: float = 0.0


def beam_search(
    engine: LLMEngine,
    prompts: Sequence[Prompt],
    params: BeamSearchParams,
    on_done: Callable[[int], None] = lambda index: None,
) -> list[BeamSearchOutput]:
    """Search all prompts at once, a token per round; `on_done` is called with the index of each finished prompt.

    Raises ValueError, before anything runs, for a bad prompt. Other requests of the engine go on meanwhile. An
    interrupted search leaves no request behind.
    """
    stop_ids = params.stop_token_ids or []
    SamplingParams(stop_token_ids=stop_ids).check_vocab(engine.vocab_size)
    eos = tuple(dict.fromkeys([*(() if params.ignore_eos else engine.eos_token_ids), *stop_ids]))
    num_candidates = min(max(2, 1 + len(eos)) * params.beam_width, engine.vocab_size)
    sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=num_candidates, ignore_eos=True)
    searches: list[Search] = []
    for prompt in prompts:
        (request,) = engine.prepare(engine.next_request_id(), prompt, sampling).requests
        tokens = request.prompt_token_ids
        max_tokens = min(params.max_tokens, engine.max_model_len - len(tokens))
        searches.append(Search(len(searches), len(tokens), max_tokens, [Beam(tokens, 0.0)], request.cache_salt))
        check_last_round(engine, searches[-1], sampling)
    request_ids: list[str] = []  # of the newest round: the scheduler may hold their K/V
    try:
        while active := [search for search in searches if search.running]:
            outputs = run_round(engine, active, sampling, request_ids)
            kv_saved = engine.loop.turn(engine.core.scheduler.kv.usage).sharing_saves
            for search in active:
                search.kv_saved = max(search.kv_saved, kv_saved)
                advance(search, outputs, num_candidates, eos, params)
                if not search.running:
                    on_done(search.index)
    finally:
        engine.loop.turn(lambda: engine.core.scheduler.free_held(request_ids))
    return [result(engine, search, params) for search in searches]


def check_last_round(engine: LLMEngine, search: Search, sampling: SamplingParams) -> None:
    """Raise ValueError unless the longest possible beam could run as a prompt, without its parent's K/V."""
    tokens = search.beams[0].tokens
    longest = [*tokens, *tokens[-1:] * (search.max_tokens - 1)]
    try:
        engine.prepare(engine.next_request_id(), {"prompt_token_ids": longest}, sampling)
    except ValueError as error:
        raise ValueError(
            f"a beam with {len(tokens)} tokens of prompt and {search.max_tokens} of output cannot run: {error}"
        ) from error


def run_round(
    engine: LLMEngine, searches: Sequence[Search], sampling: SamplingParams, request_ids: list[str]
) -> dict[str, RequestOutput]:
    """One more token for every beam. `request_ids` are the round before's, and become this round's."""
    engine.loop.turn(lambda: submit_round(engine, searches, sampling, request_ids))
    outputs = engine.run_to_completion(request_ids)
    for request_id in request_ids:
        if request_id not in outputs or not outputs[request_id].outputs[0].logprobs:
            reason = outputs[request_id].outputs[0].stop_reason if request_id in outputs else None
            reason = reason or "it was aborted, or its logits are not finite"
            raise EngineGenerateError(f"request {request_id!r} of a beam search has no tokens: {reason}")
    return outputs


def submit_round(
    engine: LLMEngine, searches: Sequence[Search], sampling: SamplingParams, request_ids: list[str]
) -> None:
    """Queue a request for every beam, as a fork of its parent in the round before."""
    submissions = []
    for beam, salt in [(beam, search.cache_salt) for search in searches for beam in search.beams]:
        parent_id, beam.request_id = beam.request_id, engine.next_request_id()
        prompt: Prompt = {"prompt_token_ids": beam.tokens, "cache_salt": salt}
        submissions.append(engine.prepare(beam.request_id, prompt, sampling, parent_id=parent_id, hold=True))
    engine.submit(submissions)
    engine.core.scheduler.free_held(request_ids)  # the forks have their share
    request_ids[:] = [s.user.request_id for s in submissions]


def advance(
    search: Search,
    outputs: dict[str, RequestOutput],
    num_candidates: int,
    eos: Sequence[int],
    params: BeamSearchParams,
) -> None:
    """Choose the beams of the next round from the best candidates of this one, and rank those that end.

    Of the `num_candidates` best, those that end and are among the first `beam_width` are ranked with the beams that
    ended before; the best `beam_width` of the others go on. The search is over when none of them could still be ranked.
    """
    width = params.beam_width
    candidates = [
        (beam.cum_logprob + found.logprob, order, token, beam)
        for order, beam in enumerate(search.beams)
        for token, found in (outputs[str(beam.request_id)].outputs[0].logprobs or [{}])[0].items()
    ]
    candidates = sorted(candidates, key=lambda c: (-c[0], c[1], c[2]))[:num_candidates]
    length = len(search.beams[0].tokens) - search.prompt_len + 1  # of every candidate's output
    full = length >= search.max_tokens
    going: list[Beam] = []
    for place, (cum_logprob, _, token, beam) in enumerate(candidates):
        grown = Beam([*beam.tokens, token], cum_logprob, beam.request_id)
        if token not in eos and not full:
            going.append(grown)
        elif place < width:
            reason = "stop" if token in eos else "length"
            search.ended.append((cum_logprob / length**params.length_penalty, grown, reason))
    search.ended = sorted(search.ended, key=lambda ended: -ended[0])[:width]
    search.beams = going[:width]
    could_improve = len(search.ended) < width or (
        bool(going) and going[0].cum_logprob / length**params.length_penalty > search.ended[-1][0]
    )
    search.running = not full and could_improve


def result(engine: LLMEngine, search: Search, params: BeamSearchParams) -> BeamSearchOutput:
    """The output of a finished search."""
    sequences = []
    for score, beam, reason in search.ended:
        last = beam.tokens[-1]
        stop_token = last if reason == "stop" and last in (params.stop_token_ids or ()) else None
        shown = beam.tokens[:-1] if reason == "stop" and not params.include_stop_str_in_output else beam.tokens
        text = "" if engine.tokenizer is None else str(engine.tokenizer.decode(shown, skip_special_tokens=True))
        sequences.append(BeamSequence(beam.tokens, text, beam.cum_logprob, score, reason, stop_token))
    return BeamSearchOutput(sequences, search.kv_saved)
