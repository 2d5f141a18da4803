"""The measurement of chapter 2, `python -m folovllm.course.measure engine`: M1 beside the bare loop, and its trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from folovllm import LLM, SamplingParams
from folovllm.baseline import generate_cached
from folovllm.course.bench.rounds import in_turn
from folovllm.course.glossary import default_prompts
from folovllm.course.measure.measuring import exactly, in_rounds, load, load_format, plain, random_tokens

PROMPT_LEN = 16
ENGINE_TOKENS = {"folo-tiny": 64, "qwen3-0.6b": 6}


def engine(console: Console, rounds: int, models: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """M1 beside the bare loop, on the same tokens; and, of the bundled model, the trace of three questions."""
    return [(f"m1-engine-{name}", engine_of(console, name, rounds)) for name in models]


def engine_of(console: Console, name: str, rounds: int) -> dict[str, Any]:
    """One model's file."""
    dtype = "float32" if name == "folo-tiny" else "auto"
    model, header = load(name, dtype)
    llm = LLM(name, milestone="m1", dtype=dtype, load_format=load_format(name), max_model_len=1024)
    prompt, n = random_tokens(PROMPT_LEN, model.config.vocab_size), ENGINE_TOKENS[name]
    params = exactly(n)

    def loop() -> tuple[list[int], float]:
        run = generate_cached(model, prompt, n)
        return run.token_ids, sum(run.token_times[1:]) / (n - 1)

    def through_engine() -> tuple[list[int], float]:
        llm.engine.trace.clear()
        (output,) = llm.generate(prompt, params, use_tqdm=False)
        return output.outputs[0].token_ids, output.metrics.tpot or 0.0

    jobs = {"loop": loop, "engine": through_engine}
    for job in jobs.values():
        job()  # warm-up
    measured, same = [], True
    for index in range(rounds):
        done = in_turn(jobs, index)
        same = same and done["loop"][0] == done["engine"][0]
        decodes = [step for step in llm.engine.trace if not step.num_prefills]
        forward = sum(step.phases["forward"][1] - step.phases["forward"][0] for step in decodes)
        measured.append(
            {
                "loop_seconds_per_token": done["loop"][1],
                "engine_seconds_per_token": done["engine"][1],
                "engine_over_loop": done["engine"][1] / done["loop"][1],
                "decode_share_outside_forward": 1 - forward / sum(step.duration for step in decodes),
            }
        )
        console.print(f"{name}, round {index + 1}: {measured[-1]}", highlight=False)
    data = in_rounds(header, "engine", measured, prompt_len=PROMPT_LEN, new_tokens=n, same_tokens=same)
    if name == "folo-tiny":
        data["trace"] = traced_questions(llm)
    return data


def traced_questions(llm: LLM) -> dict[str, Any]:
    """Three questions that arrive together, at most 24 tokens each: what every step did, and each request's times."""
    questions = default_prompts(3)
    prompts = llm.chat_prompts([[{"role": "user", "content": text}] for text in questions])
    params = SamplingParams(temperature=0, max_tokens=24)
    llm.generate(prompts, params, use_tqdm=False)  # warm-up
    llm.engine.trace.clear()
    ids = llm.enqueue(prompts, params)
    outputs = list(llm.engine.run_to_completion(ids).values())
    return {"questions": questions, **plain(llm.engine.trace, outputs)}
