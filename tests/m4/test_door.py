"""What is checked at the door, at every milestone: ids have rows, backends run, and sizes are what fits."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from folovllm import LLM, SamplingParams
from folovllm.attention.torch_backend import TorchBackend
from folovllm.engine import factory
from folovllm.models.loader import resolve_model
from tests.oracle import OracleStats, assert_same_tokens, hf_greedy, random_prompt, tiny_model

MILESTONES = pytest.mark.parametrize("milestone", ["m1", "m2", "m3", "m4"])
PAGED = pytest.mark.parametrize("milestone", ["m3", "m4"])
CPU: dict[str, Any] = {"dtype": "float32", "device": "cpu"}


def bundled(folder: Path, **config: Any) -> str:
    """A copy of the bundled model, with changes of its config.json."""
    shutil.copytree(resolve_model("folo-tiny").path_or_id, folder, dirs_exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return str(folder)


# ---------------------------------------------------------------------- ids


@pytest.fixture(scope="module")
def with_more_tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer with a token more than the model has rows."""
    folder = bundled(tmp_path_factory.mktemp("more"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(folder)
    return folder


@MILESTONES
def test_text_with_a_token_that_the_model_lacks_is_refused(with_more_tokens: str, milestone: str) -> None:
    llm = LLM(with_more_tokens, milestone=milestone, num_kv_blocks=512, **CPU)
    params = SamplingParams(temperature=0, max_tokens=4)
    llm.engine.add_request("other", "Tell me about attention", params)
    llm.engine.step()
    refused = "prompt='call <tool> now' is not valid; allowed: text of tokens below 2048, .* '<tool>', id 2048"
    for prompts in ("call <tool> now", ["fine", "call <tool> now"], {"prompt": "call <tool> now"}):
        with pytest.raises(ValueError, match=refused):
            llm.generate(prompts, params, use_tqdm=False)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"prompt_token_ids\[\d+\]=2048 is not valid; allowed: integers in \[0, 2048\)"
    ):
        llm.chat([{"role": "user", "content": "<tool>"}], params, use_tqdm=False)
    assert list(llm.engine.core.scheduler.requests) == ["other"]
    assert len(llm.engine.run_to_completion(["other"])["other"].outputs[0].token_ids) == 4


@MILESTONES
@pytest.mark.parametrize(
    ("eos", "kept"), [([2048, 1], [1]), ([-1], []), (99999, []), ([1, 1, 5000, 3], [1, 3])], ids=str
)
def test_eos_ids_without_a_row_are_left_out_with_one_warning(
    eos: Any, kept: list[int], milestone: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = bundled(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": eos}))
    with caplog.at_level(logging.WARNING):
        llm = LLM(folder, milestone=milestone, num_kv_blocks=512, **CPU)
    assert list(llm.engine.eos_token_ids) == kept
    assert sum("eos_token_id" in r.getMessage() and "left out" in r.getMessage() for r in caplog.records) == 1
    # min_tokens bans EOS, with every id that is left
    params = SamplingParams(temperature=0, max_tokens=12, min_tokens=12)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = [5, 6, 7]
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    expected = hf_greedy(model, prompt, 12)
    if not set(expected) & set(kept):
        assert output.outputs[0].token_ids == expected


@MILESTONES
@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"stop_token_ids": [1, 2048]}, r"stop_token_ids=\[2048\] is not valid; allowed: token ids <= 2047"),
        ({"logit_bias": {2048: 1.0}}, r"logit_bias=\[2048\] is not valid; allowed: token ids <= 2047"),
        ({"logprobs": 2049}, "logprobs=2049 is not valid; allowed: at most 2048"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_ids_of_parameters_have_rows(params: dict[str, Any], message: str, milestone: str) -> None:
    llm = LLM(milestone=milestone, num_kv_blocks=512, **CPU)
    for n in (1, 2):
        with pytest.raises(ValueError, match=message):
            llm.generate(["fine", "x"], [SamplingParams(), SamplingParams(n=n, **params)], use_tqdm=False)
    assert not llm.engine.has_unfinished_requests()


# ---------------------------------------------------------------------- backends


class Uncompiled(TorchBackend):
    """As "triton" is where it finds no compiler: the first call fails."""

    name = "triton"

    def attend(self, *args: Any) -> Any:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")


class Broken(TorchBackend):
    name = "triton"

    def attend(self, *args: Any) -> Any:
        return super().attend(*args) * float("nan")


@PAGED
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Uncompiled, "RuntimeError: Failed to find C compiler. Please"),
        (Broken, "its attention over values of 1 is nan"),
    ],
)
def test_a_backend_that_cannot_run_is_refused_when_the_engine_is_made(
    kind: type[TorchBackend], reason: str, milestone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = factory.make_backend
    monkeypatch.setattr(
        factory, "make_backend", lambda name, device: kind() if name == "triton" else make(name, device)
    )
    with pytest.raises(ValueError) as caught:
        LLM(milestone=milestone, attention_backend="triton", num_kv_blocks=64, **CPU)
    message = str(caught.value)
    assert message.startswith("attention_backend='triton' is not valid; allowed: 'auto', 'reference', 'torch', because")
    assert reason in message and "\n" not in message


@PAGED
def test_auto_takes_torch_for_a_backend_that_cannot_run_and_says_so(
    milestone: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make = factory.make_backend
    monkeypatch.setattr(
        factory, "make_backend", lambda name, device: Uncompiled() if name == "auto" else make(name, device)
    )
    with caplog.at_level(logging.INFO):
        llm = LLM(milestone=milestone, num_kv_blocks=64, **CPU)
    assert llm.engine.core.runner.backend.name == "torch"  # type: ignore[attr-defined]
    (line,) = [r.getMessage() for r in caplog.records if "attention_backend" in r.getMessage()]
    assert line.startswith(
        "attention_backend='auto' is 'torch', because 'triton' cannot run here: RuntimeError: Failed"
    )


# ---------------------------------------------------------------------- sizes


@MILESTONES
@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}, 32),  # as it says it is
        ({"rope_type": "linear", "factor": 2.5}, 80),
        ({"rope_type": "default"}, 32),
        ({"rope_type": "dynamic", "factor": 4.0}, 32),
    ],
    ids=lambda value: str(value)[15:40],
)
def test_a_scaled_rope_makes_the_model_longer(
    rope: dict[str, Any], longest: int, milestone: str, tmp_path: Path, oracle_stats: OracleStats
) -> None:
    settings = {"rope_theta": 10000.0, **rope}
    model = tiny_model("qwen3", seed=3, max_position_embeddings=32, rope_parameters=settings)
    model.save_pretrained(tmp_path)
    llm = LLM(str(tmp_path), milestone=milestone, num_kv_blocks=64, **CPU)
    assert llm.engine.max_model_len == longest
    prompt = random_prompt(20, seed=1)
    (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=None), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == longest - 20
    expected = hf_greedy(model, prompt, longest - 20)
    assert_same_tokens(output.outputs[0].token_ids, expected, model, prompt, oracle_stats)
    with pytest.raises(ValueError, match=f"max_model_len={longest + 1} is not valid; allowed: at most {longest}"):
        LLM(str(tmp_path), milestone=milestone, max_model_len=longest + 1, **CPU)


@MILESTONES
def test_without_max_tokens_the_output_ends_where_the_cache_does(
    milestone: str, tmp_path: Path, oracle_stats: OracleStats
) -> None:
    """8 blocks of 4 hold K/V of 32 tokens, and the 33rd needs none."""
    model = tiny_model("qwen3", seed=3)
    model.save_pretrained(tmp_path)
    llm = LLM(str(tmp_path), milestone=milestone, num_kv_blocks=8, block_size=4, **CPU)
    for length in (1, 20, 31, 32):
        prompt = random_prompt(length, seed=length)
        for params in (
            SamplingParams(temperature=0, max_tokens=None),
            SamplingParams(temperature=0, max_tokens=33 - length),
        ):
            (output,) = llm.generate([prompt], params, use_tqdm=False)
            (completion,) = output.outputs
            assert (len(completion.token_ids), completion.finish_reason) == (33 - length, "length")
            expected = hf_greedy(model, prompt, 33 - length)
            assert_same_tokens(completion.token_ids, expected, model, prompt, oracle_stats)
    for length, max_tokens, grows in ((33, None, 34), (33, 1, 34), (20, 14, 34)):
        with pytest.raises(ValueError, match=rf"may grow to {grows} tokens \({length} of prompt .*whole KV cache h"):
            llm.generate([random_prompt(length)], SamplingParams(temperature=0, max_tokens=max_tokens), use_tqdm=False)
    assert llm.engine.core.scheduler.kv.usage().reserved == 0
