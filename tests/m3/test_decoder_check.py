"""Before our decoder serves a config that was not seen before, a small copy of it is run by it and by transformers."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PretrainedConfig

from folovllm import LLM, SamplingParams
from folovllm.contrib.transformers.decoder import HFPagedModel
from folovllm.models import decoder_check
from folovllm.models.decoder import DecoderConfig
from folovllm.models.decoder_check import cache_folder, compare, how_decoder_differs, small_copy
from folovllm.models.loader import BUNDLED, load_config, resolve_model
from folovllm.runner.paged_runner import PagedRunner
from tests.oracle import FAMILIES, OracleStats, assert_same_tokens, hf_greedy, random_prompt, tiny_config, tiny_model

WINDOWED = {"use_sliding_window": True, "sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"]}
# A decoder that takes one setting of a config in a wrong sense: family, overrides, what it takes instead.
MISREAD: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {}, {"windows": (6, 6)}),
    ("mistral", {}, {"windows": (None, None)}),
    ("mistral", {}, {"windows": (7, 7)}),
    ("qwen2", WINDOWED, {"windows": (None, None)}),
    ("qwen3", WINDOWED, {"windows": (6, None)}),
    ("qwen2", {}, {"qkv_bias": False}),
    ("llama", {}, {"qkv_bias": True}),
    ("llama", {"mlp_bias": True}, {"mlp_bias": False}),
    ("qwen3", {}, {"qk_norm": False}),
    ("llama", {}, {"rope": {"rope_type": "default", "rope_theta": 10000.0}}),
    ("qwen2", {"max_position_embeddings": 4096}, {"rope": {"rope_type": "default", "rope_theta": 10100.0}}),
    ("qwen2", {}, {"norm_eps": 1e-3}),
    ("qwen2", {}, {"tied_embeddings": True}),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("config", [*map(tiny_config, FAMILIES), *(load_config(resolve_model(b)) for b in BUNDLED)])
def test_the_decoder_computes_what_transformers_does(config: PretrainedConfig) -> None:
    assert compare(small_copy(config)) is None


@pytest.mark.parametrize(("family", "overrides", "misread"), MISREAD)
def test_a_setting_in_a_wrong_sense_is_seen(
    family: str, overrides: dict[str, Any], misread: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(family, **overrides)
    misread_by(misread, monkeypatch)
    assert how_decoder_differs(config) is not None


def misread_by(misread: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = DecoderConfig.from_hf
    monkeypatch.setattr(DecoderConfig, "from_hf", lambda hf: replace(real(hf), **(misread | windows(misread, hf))))


def windows(misread: dict[str, Any], hf: PretrainedConfig) -> dict[str, Any]:
    """The wrong windows, for as many layers as the small copy has."""
    return {"windows": misread["windows"][: hf.num_hidden_layers]} if "windows" in misread else {}


def test_what_differs_goes_the_transformers_way_or_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, oracle_stats: OracleStats
) -> None:
    model, prompt = tiny_model("mistral"), random_prompt(20)
    model.save_pretrained(tmp_path / "model")
    misread_by({"windows": (None, None)}, monkeypatch)
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "num_kv_blocks": 20}
    with pytest.raises(ValueError, match=r"model_impl='folovllm' is not valid for this model: on a small copy of its"):
        LLM(str(tmp_path / "model"), model_impl="folovllm", **options)
    with caplog.at_level(logging.WARNING):
        llm = LLM(str(tmp_path / "model"), **options)
    assert "model='model' runs with model_impl='transformers': on a small copy of its config" in caplog.text
    assert isinstance(llm.engine.core.runner, PagedRunner)
    assert isinstance(llm.engine.core.runner.model, HFPagedModel)
    (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    assert_same_tokens(output.outputs[0].token_ids, hf_greedy(model, prompt, 8), model, prompt, oracle_stats)


# --- answers are kept ---------------------------------------------------------------------------------------


def test_an_answer_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(decoder_check, "compare", lambda small: calls.append(small.model_type))
    for _ in range(2):
        assert how_decoder_differs(tiny_config("llama")) is None
        assert how_decoder_differs(tiny_config("qwen3")) is None
    assert calls == ["llama", "qwen3"]
    assert how_decoder_differs(tiny_config("llama", num_hidden_layers=5, vocab_size=500)) is None
    assert calls == ["llama", "qwen3"]  # the same small copy
    monkeypatch.setattr(decoder_check.transformers, "__version__", "6.0.0")
    assert how_decoder_differs(tiny_config("llama")) is None
    assert calls == ["llama", "qwen3", "llama"]


def test_a_difference_is_kept_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_check, "compare", lambda small: "it differs")
    assert how_decoder_differs(tiny_config("llama")) == "it differs"
    monkeypatch.setattr(decoder_check, "compare", lambda small: None)
    assert how_decoder_differs(tiny_config("llama")) == "it differs"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '"x"', "\x00\xff"])
def test_a_damaged_answer_is_computed_again(content: str) -> None:
    assert how_decoder_differs(tiny_config("llama")) is None
    (file,) = cache_folder().iterdir()
    whole = file.read_bytes()
    file.write_text(content, encoding="latin-1")
    assert how_decoder_differs(tiny_config("llama")) is None
    assert file.read_bytes() == whole and list(cache_folder().iterdir()) == [file]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert how_decoder_differs(tiny_config("llama")) is None


@pytest.mark.parametrize(
    ("system", "variables", "expected"),
    [
        ("Linux", {}, "home/.cache/folovllm"),
        ("Darwin", {}, "home/Library/Caches/folovllm"),
        ("Windows", {}, "home/AppData/Local/folovllm"),
        ("Windows", {"LOCALAPPDATA": "/data"}, "/data/folovllm"),
        ("Linux", {"XDG_CACHE_HOME": "/cache"}, "/cache/folovllm"),
    ],
)
def test_the_folder_is_the_platforms(
    system: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(decoder_check.platform, "system", lambda: system)
    monkeypatch.setattr(Path, "home", lambda: Path("home"))
    assert cache_folder() == Path(expected)


# --- what it costs ------------------------------------------------------------------------------------------

START = """
import sys
from folovllm import LLM
LLM(sys.argv[1], device="cpu", num_kv_blocks=10)
slow = ("transformers.modeling_utils", "torch._dynamo", "torch._inductor", "triton")
print("imported:", *[name for name in slow if name in sys.modules])
"""


def imported_by(model: str, cache: Path) -> list[str]:
    """Which slow modules a start imports."""
    done = subprocess.run(
        [sys.executable, "-c", START, model],
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("imported:")[1].split()


def test_the_bundled_model_needs_no_check(tmp_path: Path) -> None:
    assert imported_by("folo-tiny", tmp_path / "new") == []
    assert not (tmp_path / "new" / "folovllm").exists()


def test_a_known_answer_needs_no_modelling_code(tmp_path: Path) -> None:
    tiny_model("qwen2").save_pretrained(tmp_path / "model")
    assert "transformers.modeling_utils" in imported_by(str(tmp_path / "model"), tmp_path / "new")
    assert imported_by(str(tmp_path / "model"), tmp_path / "new") == []
