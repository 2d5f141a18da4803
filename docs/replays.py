"""The runs that the site replays, one per milestone: recorded when the site is built, by the engine itself.

Nothing in them is drawn at random, and times are left out: the same sources give the same pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from folovllm import LLM, SamplingParams
from folovllm.course.glossary import default_prompts, load_prose
from folovllm.course.replay.page import replay_page
from folovllm.engine.input_processor import Prompt
from folovllm.engine.recording import Recorder, recording

PARTS = ("assets/replay/*", "course/replay/*.py", "engine/*.py", "kv_cache/*.py", "scheduler/*.py")
PACKAGE = Path(__file__).resolve().parent.parent / "folovllm"
DEPENDS_ON = (Path(__file__), *(file for part in PARTS for file in sorted(PACKAGE.glob(part))))
Run = tuple[str, Callable[[], Recorder], Callable[[dict[str, Any]], bool]]


def greedy(max_tokens: int) -> SamplingParams:
    """The likeliest tokens, at most so many of them."""
    return SamplingParams(temperature=0, max_tokens=max_tokens)


def questions(llm: LLM, count: int, system: str | None = None) -> list[Prompt]:
    """Questions of the glossary, through the chat template; under a system prompt, if one is given."""
    opening = [] if system is None else [{"role": "system", "content": system}]
    return llm.chat_prompts([[*opening, {"role": "user", "content": text}] for text in default_prompts(count)])


def one_at_a_time() -> Recorder:
    """M1: three questions, of which two wait."""
    llm = LLM("folo-tiny", "m1", dtype="float32", device="cpu", max_model_len=256, max_num_batched_tokens=64)
    with recording(llm.engine, times=False) as recorder:
        llm.generate(questions(llm, 3), greedy(40), use_tqdm=False)
    return recorder


def all_at_once() -> Recorder:
    """M2: ten questions for four seats."""
    llm = LLM(
        "folo-tiny", "m2", dtype="float32", device="cpu", max_model_len=256, max_num_seqs=4, max_num_batched_tokens=64
    )
    with recording(llm.engine, times=False) as recorder:
        llm.generate(questions(llm, 10), greedy(48), use_tqdm=False)
    return recorder


def in_blocks() -> Recorder:
    """M3: a pool that is too small for all, and three samples that share the blocks of their prompt."""
    llm = LLM(
        "folo-tiny", "m3", dtype="float32", device="cpu", max_model_len=256, max_num_seqs=8, max_num_batched_tokens=96,
        block_size=4, num_kv_blocks=84, preemption_mode="swap", swap_space=0.25,
    )  # fmt: skip
    prompts = questions(llm, 6)
    samples = SamplingParams(n=3, temperature=0.8, seed=1, max_tokens=40)
    with recording(llm.engine, times=False) as recorder:
        llm.generate(prompts, [greedy(56), samples, *[greedy(56)] * 4], use_tqdm=False)
    return recorder


def chunked_and_cached() -> Recorder:
    """M4: questions under one system prompt, and a document that comes while they are being answered."""
    llm = LLM(
        "folo-tiny", "m4", dtype="float32", device="cpu", max_model_len=1024, max_num_seqs=8, max_num_batched_tokens=64,
        block_size=16, num_kv_blocks=64,
    )  # fmt: skip
    engine = llm.engine
    texts = [part.strip() for text in load_prose().values() for part in text.split("\n\n")]
    paragraphs = [text for text in texts if not text.startswith("#")]
    short = questions(llm, 8, paragraphs[0])
    (document,) = questions(llm, 1, "\n\n".join(paragraphs[1:6]))

    def add(names: Sequence[str], prompts: Sequence[Prompt], max_tokens: int = 40) -> None:
        for name, prompt in zip(names, prompts, strict=True):
            engine.add_request(name, prompt, greedy(max_tokens))

    arrivals: dict[int, Callable[[], None]] = {
        0: lambda: add("abcd", short[:4]),
        10: lambda: add(["doc"], [document], 24),
        14: lambda: add("ef", short[4:6]),
        30: lambda: add("gh", short[6:8]),
    }
    with recording(engine, times=False) as recorder:
        for arrive in [arrivals.get(number) for number in range(max(arrivals) + 1)]:
            if arrive is not None:
                arrive()
            engine.step()
        while engine.has_unfinished_requests():
            engine.step()
    return recorder


def gives_way(step: dict[str, Any]) -> bool:
    """Whether a request was preempted."""
    return bool(step.get("preempted"))


def prompt_beside_decodes(step: dict[str, Any]) -> bool:
    """Whether the step computes tokens of a prompt, and at least three decodes."""
    kinds = [isinstance(share, list) and share[2] > 0 for share in step.get("shares", ())]
    return any(kinds) and kinds.count(False) >= 3


RUNS: dict[str, Run] = {  # milestone -> title, the run, and what happens in the step that the page opens at
    "m1": ("M1: one request at a time", one_at_a_time, lambda step: step["step"] == 8),
    "m2": ("M2: continuous batching", all_at_once, prompt_beside_decodes),
    "m3": ("M3: blocks, samples that share, and a pool that is too small", in_blocks, gives_way),
    "m4": ("M4: chunked prefill and a prefix cache", chunked_and_cached, prompt_beside_decodes),
}


@cache
def recorded(name: str) -> dict[str, Any]:
    """The recording of a run. Raises KeyError for a name that is not in `RUNS`."""
    return RUNS[name][1]().to_json()


def page(name: str) -> str:
    """The page that replays a run."""
    title, _, opens_at = RUNS[name]
    data = recorded(name)
    return replay_page(data, title, next(index for index, step in enumerate(data["steps"]) if opens_at(step)))
