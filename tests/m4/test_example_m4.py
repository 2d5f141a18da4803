"""examples/m4_inference.py and the options of `folovllm generate` that came with M4, as a reader uses them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from folovllm import LLM, EngineConfig, LLMEngine, SamplingParams
from folovllm.course.glossary import load_glossary
from folovllm.entrypoints.cli import app
from folovllm.outputs import CompletionOutput, RequestMetrics, RequestOutput

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "m4_inference.py"
ENV = {"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
ANSWERS = {entry.question: entry.answer for entry in load_glossary()}
SMALL = (
    *("--num-prompts", "3", "--late", "2", "--late-after", "6", "--max-tokens", "12"),
    *("--system-paragraphs", "5", "--document-paragraphs", "12"),
)


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("m4_inference", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_example()


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENV.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def m4(example: ModuleType) -> LLM:
    """The engine that the example runs last."""
    return LLM(milestone="m4", **example.options(example.parse_args([]), "m4"))


def flat(text: str) -> str:
    """Output without the line breaks that a terminal's width puts in."""
    return " ".join(text.split())


def table(output: str) -> dict[str, list[str]]:
    """The comparison's rows."""
    return {line.split()[0]: line.split()[1:] for line in output.splitlines() if re.match(r" M\d  ", line)}


def in_common(prompts: list[list[int]]) -> int:
    """Tokens that all of them begin with."""
    columns = zip(*prompts, strict=False)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), min(map(len, prompts)))


def number(cell: str) -> float:
    return float(cell.replace(",", ""))


# --- what is asked ----------------------------------------------------------------------------------------


def test_all_prompts_begin_alike_and_the_document_comes_in_the_middle(example: ModuleType, m4: LLM) -> None:
    asks = example.make_asks(m4, example.parse_args([]))
    assert [ask.request_id for ask in asks] == ["0", "1", "2", "3", "4", "5", "6", "7", "8", "document", "9", "10"]
    assert [ask.late for ask in asks] == [False] * 7 + [True] * 5
    prompts = {ask.request_id: ask.prompt["prompt_token_ids"] for ask in asks}
    document = prompts.pop("document")
    common = in_common([*prompts.values(), document])
    assert common >= 900 and max(map(len, prompts.values())) - common < 40
    assert 2_000 < len(document) < 3_000


def test_the_document_is_short_enough_for_exact_answers(example: ModuleType, m4: LLM) -> None:
    """The bundled model saw few longer texts: with this one it answers as the glossary does, word for word."""
    asks = example.make_asks(m4, example.parse_args([]))
    outputs = example.serve(m4.engine, asks, SamplingParams(temperature=0, max_tokens=256), late_after=64)
    titles = [ask.title.removesuffix(" (with the document)") for ask in asks]
    assert [output.outputs[0].text for output in outputs] == [ANSWERS[title] for title in titles]


@pytest.mark.parametrize("late_after", [0, 9, 10_000])
def test_the_late_ones_come_when_so_many_tokens_were_generated(example: ModuleType, m4: LLM, late_after: int) -> None:
    asks = example.make_asks(m4, example.parse_args(list(SMALL)))
    example.fresh(m4.engine)
    told: list[int] = []
    outputs = example.serve(
        m4.engine, asks, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), late_after, told.append
    )
    assert [output.request_id for output in outputs] == ["0", "1", "document", "2"] and told[-1] == 4
    late = {ask.request_id for ask in asks if ask.late}
    generated = 0
    for step in m4.engine.trace:
        here = late & {share.request_id for share in step.requests}
        if here:
            break
        assert generated < late_after or generated == 0
        generated += sum(share.num_sampled for share in step.requests)
    assert generated == min(late_after, 12) and m4.engine.stats.generated_tokens == 48


def test_random_prompts_have_the_same_structure(example: ModuleType) -> None:
    titles, prompts = example.random_prompts(100, 3)
    assert [len(prompt) for prompt in prompts] == [944, 944, 944, 2592] and len(titles) == 4
    assert in_common(prompts) >= 928 and len({tuple(prompt) for prompt in prompts}) == 4
    assert example.random_prompts(100, 3) == (titles, prompts)


# --- running it -------------------------------------------------------------------------------------------


def expected_hits(prompts: list[list[int]], block_size: int) -> int:
    """Tokens found if each prompt finds all full blocks that it has in common with any before it."""
    found = 0
    for i, prompt in enumerate(prompts):
        best = max([in_common([prompt, other]) for other in prompts[:i]], default=0)
        found += min(best, len(prompt) - 1) // block_size * block_size
    return found


def test_the_table_counts_what_each_milestone_computed(
    example: ModuleType, m4: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    example.main([*SMALL, "--rounds", "2", "--num-kv-blocks", "200", "--max-num-batched-tokens", "48"])
    output = capsys.readouterr().out
    assert "The same requests on every milestone: the best of 2 rounds" in output
    assert max(map(len, output.splitlines())) <= 80
    rows, asks = table(output), example.make_asks(m4, example.parse_args(list(SMALL)))
    assert list(rows) == ["M1", "M2", "M3", "M4"]
    prompts = [ask.prompt["prompt_token_ids"] for ask in asks]
    total, hits = sum(map(len, prompts)), expected_hits(prompts, 16)
    for name in ("M1", "M2", "M3"):
        assert [number(cell) for cell in rows[name][2:4]] == [total, 0]
    assert [number(cell) for cell in rows["M4"][2:4]] == [total - hits, hits] and hits > 3 * 400
    reserved = {name: number(row[6]) for name, row in rows.items()}
    assert reserved["M1"] == 4096 and reserved["M2"] == 4 * 4096
    assert reserved["M3"] % 16 == 0 and reserved["M3"] >= total and reserved["M4"] < reserved["M3"] - 1000
    verdict = "same tokens at every milestone: yes (4 answers of 48 tokens, compared in float32)"
    assert flat(output).endswith(verdict)
    for ask in asks:
        question = ask.title.removesuffix(" (with the document)")
        assert flat(f"> {ask.title} {ANSWERS[question][:25]}") in flat(output)


def test_watched_in_a_process_of_its_own() -> None:
    args = [*SMALL, "--milestones", "m4", "--watch", "--num-kv-blocks", "80", "--rounds", "2"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *args], env={**os.environ, **ENV, "PYTHONPATH": str(ROOT)}, capture_output=True,
        encoding="utf-8", timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4 of 4 finished, 48 tokens" in done.stdout and "\x1b" not in done.stdout
    assert "prompt tokens from a cache" in done.stdout and "the best of 2 rounds" in done.stdout
    assert list(table(done.stdout)) == ["M4"] and "same tokens at every milestone: yes" in done.stdout


@pytest.mark.parametrize("watch", [[], ["--watch"]])
def test_interrupted_it_ends_cleanly(
    example: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, watch: list[str]
) -> None:
    engines: list[LLMEngine] = []
    step = LLMEngine.step

    def interrupted(self: LLMEngine) -> list[RequestOutput]:
        engines.append(self)
        if len(engines) == 9:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(LLMEngine, "step", interrupted)
    with pytest.raises(SystemExit) as ended:
        example.main([*SMALL, "--milestones", "m4", *watch])
    output = capsys.readouterr().err
    assert ended.value.code == 130 and output.endswith("\ninterrupted\n") and "Traceback" not in output
    assert not engines[-1].has_unfinished_requests()


def test_interrupted_while_it_is_loaded_it_ends_cleanly(tmp_path: Path) -> None:
    """Importing torch takes seconds. This one presses Ctrl-C meanwhile."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)], env={**os.environ, **ENV, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True, encoding="utf-8", timeout=240,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--milestones", "m1", "m5"], "milestones='m5' is not valid; allowed: 'm1', 'm2', 'm3', 'm4'"),
        (["--num-prompts", "0"], "num_prompts=0 is not valid"),
        (["--late", "12"], "late=12 is not valid; allowed: an integer >= 0 and <= 11"),
        (["--late-after", "-1"], "late_after=-1 is not valid"),
        (["--system-paragraphs", "0"], "system_paragraphs=0 is not valid"),
        (["--document-paragraphs", "5"], "document_paragraphs=5 is not valid; allowed: an integer >= 13"),
        (["--document-paragraphs", "999", "--milestones", "m4"], "document_paragraphs=999 is not valid; allowed: at"),
        (["--rounds", "0"], "rounds=0 is not valid"),
        (["--pace", "-1"], "pace=-1.0 is not valid"),
        (["--max-num-batched-tokens", "0"], "max_num_batched_tokens=0 is not valid"),
        (["--long-prefill-token-threshold", "-1"], "long_prefill_token_threshold=-1 is not valid"),
        (["--max-model-len", "1024", "--milestones", "m4"], "1024"),
        (["--num-kv-blocks", "100", "--milestones", "m4"], "and the whole KV cache has 100"),
        (["--model", "nope"], "model='nope' is unknown"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(
    example: ModuleType, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        example.main(args)
    assert ended.value.code == 2
    output = flat(capsys.readouterr().err)
    assert output.startswith("error: ") and message in output and output.count("error") == 1


def test_the_newest_is_watched_first_and_then_all_take_turns(
    example: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    serve, load = example.serve, example.load

    def served(engine: LLMEngine, asks: Any, params: SamplingParams, *args: Any) -> list[RequestOutput]:
        events.append(f"{engine.config.milestone} {'warm-up' if params.max_tokens == 4 else len(asks)}")
        outputs: list[RequestOutput] = serve(engine, asks, params, *args)
        return outputs

    def loaded(config: Any, arms: Any) -> Any:
        events.append(f"load {config.milestone}")
        return load(config, arms)

    monkeypatch.setattr(example, "serve", served)
    monkeypatch.setattr(example, "load", loaded)
    example.main([*SMALL, "--watch", "--rounds", "2", "--milestones", "m3", "m4", "m1", "m2"])
    order = ["m3", "m4", "m1", "m2"]
    assert events[:4] == ["m4 4", "load m3", "load m1", "load m2"]
    assert events[4:] == [f"{name} warm-up" for name in order] + [f"{name} 4" for name in order] * 2
    assert list(table(capsys.readouterr().out)) == ["M3", "M4", "M1", "M2"]


def test_m1_and_m2_share_their_weights(example: ModuleType) -> None:
    arms: list[Any] = []
    for name in ("m3", "m2", "m1"):
        config = EngineConfig.from_kwargs(
            model="folo-tiny", milestone=name, **example.options(example.parse_args([]), name)
        )
        arms.append(example.Arm(name, example.load(config, arms)))
    assert arms[1].engine.core.runner.model is arms[2].engine.core.runner.model


# --- the times --------------------------------------------------------------------------------------------


def timed(example: ModuleType, seconds: float, waited: float = 0.0, ttft: float = 0.25, max_itl: float = 0.5) -> Any:
    return example.Round(seconds, waited, ttft, max_itl, 70, 30, 4096, 100)


def with_rounds(example: ModuleType, **rounds: list[Any]) -> list[Any]:
    return [example.Arm(name, None, rounds=found) for name, found in rounds.items()]


def test_a_row_is_the_round_of_least_seconds(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """TTFT and ITL are those of that round, though others had lower ones."""
    m3 = [timed(example, 4.0, 0.0, 0.1, 0.3), timed(example, 2.0, 0.0, 0.7, 0.9), timed(example, 3.0, 0.0, 0.2, 0.1)]
    m4 = [timed(example, 1.25, 0.0, 0.05, 0.06), timed(example, 8.0)]
    Console(width=80).print(example.comparison_table(with_rounds(example, m3=m3, m4=m4)))
    rows = table(capsys.readouterr().out)
    assert rows["M3"] == ["2.00", "50", "70", "30", "700", "900", "4,096"]
    assert rows["M4"] == ["1.25", "80", "70", "30", "50", "60", "4,096"]


@pytest.mark.parametrize("share", [1.0, 0.95, 0.6])
def test_a_busy_machine_is_told_from_the_time_in_which_this_thread_ran(
    example: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """Clocks by hand: a look at the wall's takes a second, and this thread runs in `share` of each."""
    now = [0.0]

    def wall() -> float:
        now[0] += 1
        return now[0]

    monkeypatch.setattr(example, "time", SimpleNamespace(perf_counter=wall, thread_time=lambda: share * now[0]))
    example.main([*SMALL, "--rounds", "2", "--milestones", "m4"])
    output = flat(capsys.readouterr().out)
    assert ("The machine was busy: other programs used the processor for up to 40% of a round." in output) == (
        share == 0.6
    )
    assert ("compare the counts" in output) == (share == 0.6) == ("busy" in output)


def test_only_what_the_table_shows_is_judged(example: ModuleType) -> None:
    calm, busy = timed(example, 1.0, 0.02), timed(example, 3.0, 2.0)
    assert example.cautions(with_rounds(example, m3=[timed(example, 2.0)], m4=[busy, calm]), True) == []
    (line,) = example.cautions(with_rounds(example, m3=[timed(example, 4.0)], m4=[busy]), True)
    assert "for up to 67% of a round" in line


def test_a_table_that_says_the_opposite_says_so(example: ModuleType) -> None:
    fast, slow, waited = timed(example, 1.0), timed(example, 2.0), timed(example, 2.0, 0.5)
    assert example.cautions(with_rounds(example, m1=[slow], m3=[slow], m4=[fast]), True) == []
    assert example.cautions(with_rounds(example, m1=[fast], m3=[slow]), True) == []  # M3 is not said to be faster
    (line,) = example.cautions(with_rounds(example, m1=[slow], m3=[fast], m4=[slow, slow]), True)
    assert line.startswith("M3 was faster than M4, so this run was disturbed: ignore its times.")
    assert "run it again" in line
    for defaults in (True, False):
        lines = example.cautions(with_rounds(example, m4=[waited], m1=[fast]), defaults)
        assert lines[0].startswith("The machine was busy") and lines[1].startswith("M1 was faster than M4, so this run")
    (line,) = example.cautions(with_rounds(example, m3=[fast], m4=[slow]), False)  # a budget of one token, say
    assert "with these options" in line and "disturbed" not in line


def test_which_options_leave_the_workload_as_it_is(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example.torch.cuda, "is_available", lambda: False)
    same = ["--watch", "--rounds", "5", "--pace", "0", "--milestones", "m3", "m4"]
    assert example.with_defaults(example.parse_args(same))
    for other in (["--no-enable-prefix-caching"], ["--max-tokens", "9"], ["--model", "qwen3-0.6b"]):
        assert not example.with_defaults(example.parse_args([*same, *other]))


# --- the verdict ------------------------------------------------------------------------------------------


def arm(example: ModuleType, name: str, *answers: list[int]) -> Any:
    outputs = [
        RequestOutput(str(i), None, [1], [CompletionOutput(0, "", ids)], True, RequestMetrics(0.0))
        for i, ids in enumerate(answers)
    ]
    return example.Arm(name, None, rounds=[], runs=[outputs])


def test_the_verdict_is_found_by_comparing(example: ModuleType) -> None:
    m1 = arm(example, "m1", [5, 6, 7], [8])
    assert example.same_tokens([m1, replace(m1, name="m2")], "float32") == [
        "same tokens at every milestone: yes (2 answers of 4 tokens, compared in float32)"
    ]
    other, short = arm(example, "m2", [5, 9, 7], [8]), arm(example, "m3", [5, 6], [8])
    lines = example.same_tokens([m1, other, short], "bfloat16")
    assert lines[0] == "same tokens at every milestone: no (2 answers of 4 tokens, compared in bfloat16)"
    assert lines[1] == "m2, request 0: token 1 is [9], and [6] in m1"
    assert lines[2] == "m3, request 0: token 2 is the end, and [7] in m1"
    assert len(lines) == 4 and "bfloat16" in lines[3]
    restless = arm(example, "m4", [5, 6, 7], [8])
    restless.runs.insert(0, other.runs[0])  # such as the one that was watched
    lines = example.same_tokens([m1, restless], "float32")
    assert "no (" in lines[0] and lines[1:] == ["m4: not the same tokens in each run"]


def test_a_wrong_token_anywhere_is_no(
    example: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = example.serve

    def wrong(engine: LLMEngine, *args: Any) -> list[RequestOutput]:
        outputs: list[RequestOutput] = serve(engine, *args)
        if engine.config.milestone == "m4" and len(outputs) == 4:  # not when it warms up
            outputs[2].outputs[0].token_ids[3] += 1
        return outputs

    monkeypatch.setattr(example, "serve", wrong)
    example.main([*SMALL, "--rounds", "1", "--milestones", "m3", "m4"])
    output = flat(capsys.readouterr().out)
    assert "same tokens at every milestone: no (" in output and "m4, request document: token 3 is [" in output


# --- the command ------------------------------------------------------------------------------------------


def invoke(*args: str) -> Any:
    return CliRunner().invoke(app, list(args), env={**ENV, "COLUMNS": "120"})


QUESTION = "What is a KV cache?"
GENERATE = ("generate", "--dtype", "float32", "--max-tokens", "8", "--block-size", "4", "--num-kv-blocks", "64")


def test_generate_says_what_came_from_the_cache() -> None:
    result = invoke(*GENERATE, QUESTION, QUESTION, "--no-stream")
    assert result.exit_code == 0, result.output
    llm = LLM(milestone="m1", dtype="float32")
    length = len(llm.chat_prompts([{"role": "user", "content": QUESTION}])[0]["prompt_token_ids"])  # type: ignore[index,call-overload]
    hits = (length - 1) // 4 * 4
    table = result.output.partition("Requests")[2].partition("Steps")[0]
    rows = {match[1]: match[2].split() for match in re.finditer(r"^ +(\d) +(.*)$", table, re.MULTILINE)}
    assert [row[:2] for row in rows.values()] == [[str(length), "0"], [str(length), str(hits)]]
    assert re.search(rf"prompt tokens from a cache +{hits} *\n", result.output)
    assert re.search(rf"share of prompt tokens from a cache +{hits / (2 * length):.1%}", result.output)
    without = invoke(*GENERATE, QUESTION, QUESTION, "--no-stream", "--no-enable-prefix-caching")
    assert without.exit_code == 0 and "cache" not in without.output.partition("Requests")[2]
    assert without.output.count("> ") == 2
    answers = [re.findall(r"> .*\n.*", run.output.partition("Requests")[0]) for run in (without, result)]
    assert answers[0] == answers[1] and len(answers[0]) == 2


def test_generate_splits_prompts_or_does_not() -> None:
    chunked = invoke(*GENERATE, QUESTION, "--no-stream", "--max-num-batched-tokens", "4")
    assert chunked.exit_code == 0, chunked.output
    refused = invoke(*GENERATE, QUESTION, "--max-num-batched-tokens", "4", "--no-enable-chunked-prefill")
    assert refused.exit_code == 2 and "or enable_chunked_prefill" in flat(refused.output)
    bounded = invoke(*GENERATE, QUESTION, "--no-stream", "--long-prefill-token-threshold", "4")
    steps = [int(re.search(r" steps +(\d+) *\n", result.output)[1]) for result in (chunked, bounded)]  # type: ignore[index]
    length = len(LLM().chat_prompts([{"role": "user", "content": QUESTION}])[0]["prompt_token_ids"])  # type: ignore[index,call-overload]
    assert steps == [-(-length // 4) + 7] * 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--milestone", "m3", "--enable-chunked-prefill"], "enable_chunked_prefill=True is not valid"),
        (["--milestone", "m2", "--enable-prefix-caching"], "enable_prefix_caching=True is not valid"),
        (["--long-prefill-token-threshold", "-1"], "long_prefill_token_threshold=-1 is not valid"),
        (["--milestone", "m3", "--long-prefill-token-threshold", "8"], "0 without chunked prefill"),
    ],
)
def test_what_cannot_work_is_one_line_and_status_2(args: list[str], message: str) -> None:
    result = invoke("generate", *args)
    assert result.exit_code == 2, result.output
    assert message in flat(result.output) and "Traceback" not in result.output
