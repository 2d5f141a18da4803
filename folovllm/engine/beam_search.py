"""Beam search: a driver above the engine (vLLM: `vllm/entrypoints/llm.py: beam_search`).

Each round every beam is a request of its own that asks for one token and its likeliest alternatives. When it has
finished it is held, and the beams that survive are forks of it:

    prompt ──> a ──> [a b] ──> ...        a round: K candidates from each beam, the best `beam_width` of all go on
          └──> c ──> [a d]                beams that share their past name the same blocks, and copy one to part ways

So the engine knows nothing of beams. Results are those of Hugging Face's `generate` with `early_stopping=False`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from folovllm.engine.input_processor import Prompt
from folovllm.engine.llm_engine import LLMEngine
from folovllm.outputs import BeamSearchOutput, BeamSequence, RequestOutput
from folovllm.sampling_params import BeamSearchParams, SamplingParams


@dataclass
class Beam:
    """A sequence on its way."""

    tokens: list[int]
    cum_logprob: float
    request_id: str | None = None  # the round's request of it, which the next round forks


@dataclass
class Search:
    """One prompt's search: `beams` go on, `ended` are complete and ranked by score, at most `beam_width` of each."""

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
    """Search all prompts at once, a token per round; `on_done` is told the index of each prompt that is finished.

    Raises ValueError, before anything runs, for a prompt that cannot be. Other requests of the engine go on beside.
    When interrupted, nothing of it stays in the engine.
    """
    eos = () if params.ignore_eos else engine.eos_token_ids
    num_candidates = min(max(2, 1 + len(eos)) * params.beam_width, engine.vocab_size)
    sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=num_candidates, ignore_eos=True)
    searches = []
    for prompt in prompts:
        (request,) = engine.prepare(engine.next_request_id(), prompt, sampling).requests
        tokens, room = request.prompt_token_ids, engine.max_model_len - request.num_prompt_tokens
        searches.append(Search(len(tokens), min(params.max_tokens, room), [Beam(tokens, 0.0)], request.cache_salt))
        check_last_round(engine, searches[-1], sampling)
    held: list[str] = []
    try:
        while active := [search for search in searches if search.running]:
            outputs = run_round(engine, active, sampling, held)
            kv_saved = engine.core.scheduler.kv.usage().sharing_saves
            for search in active:
                search.kv_saved = max(search.kv_saved, kv_saved)
                advance(search, outputs, num_candidates, eos, params)
                if not search.running:
                    on_done(searches.index(search))
            kept = {beam.request_id for search in active if search.running for beam in search.beams}
            engine.core.let_go([i for i in held if i not in kept])
            held = [i for i in held if i in kept]
    finally:
        engine.core.let_go(held)
    return [result(engine, search) for search in searches]


def check_last_round(engine: LLMEngine, search: Search, sampling: SamplingParams) -> None:
    """Raise ValueError unless what a beam has become by its last round could run as a prompt, without its parent."""
    tokens = search.beams[0].tokens
    longest = [*tokens, *tokens[-1:] * (search.max_tokens - 1)]
    try:
        engine.prepare(engine.next_request_id(), {"prompt_token_ids": longest}, sampling)
    except ValueError as error:
        raise ValueError(
            f"a beam with {len(tokens)} tokens of prompt and {search.max_tokens} of output cannot run: {error}"
        ) from error


def run_round(
    engine: LLMEngine, searches: Sequence[Search], sampling: SamplingParams, held: list[str]
) -> dict[str, RequestOutput]:
    """One more token for every beam. The round's requests are added to `held`; those before it are let go.

    A parent whose K/V was given up for lack of room is no parent any more: its children compute their prompt alone.
    """
    submissions, parents = [], list(held)
    for beam, salt in [(beam, search.cache_salt) for search in searches for beam in search.beams]:
        parent = beam.request_id if beam.request_id and engine.core.scheduler.is_held(beam.request_id) else None
        beam.request_id = engine.next_request_id()
        prompt: Prompt = {"prompt_token_ids": beam.tokens, "cache_salt": salt}
        submissions.append(engine.prepare(beam.request_id, prompt, sampling, parent_id=parent, hold=True))
    engine.submit(submissions)
    engine.core.let_go(parents)
    held[:] = [s.user.request_id for s in submissions]
    outputs = engine.run_to_completion(held)
    for request_id in held:
        if request_id not in outputs or not outputs[request_id].outputs[0].logprobs:
            raise RuntimeError(f"request {request_id!r} of a beam search was aborted, or its logits are not finite")
    return outputs


def advance(
    search: Search,
    outputs: dict[str, RequestOutput],
    num_candidates: int,
    eos: Sequence[int],
    params: BeamSearchParams,
) -> None:
    """Choose the beams of the next round from the best candidates of this one, and rank those that end.

    Of the `num_candidates` best, those that end and are among the first `beam_width` compete with what has ended
    before; the best `beam_width` of those that do not end go on. The search is over when no beam could still get in.
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


def result(engine: LLMEngine, search: Search) -> BeamSearchOutput:
    """What the user gets of a finished search."""
    sequences = [
        BeamSequence(
            beam.tokens,
            "" if engine.tokenizer is None else str(engine.tokenizer.decode(beam.tokens, skip_special_tokens=True)),
            beam.cum_logprob,
            score,
            reason,
        )
        for score, beam, reason in search.ended
    ]
    return BeamSearchOutput(sequences, search.kv_saved)
