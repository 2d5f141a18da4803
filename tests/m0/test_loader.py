"""Names, files and weights: what `folovllm.models.loader` promises, held against transformers and torch."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from folovllm.models import loader
from folovllm.models.dummy import build_dummy_model
from folovllm.models.loader import (
    BUNDLED,
    BUNDLED_CONFIGS,
    eos_token_ids,
    load_config,
    load_generation_config,
    load_hf_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
    resolve_model,
)
from tests.oracle import FAMILIES, tiny_config

CPU = torch.device("cpu")


def reference_model(family: str, **overrides: Any) -> PreTrainedModel:
    """A model built by transformers alone, in the usual way."""
    torch.manual_seed(7)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=torch.float32)
    return model.eval()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "ckpt"
    reference_model("qwen3").save_pretrained(folder)
    return folder


def load(folder: Path, **kwargs: Any) -> PreTrainedModel:
    return load_hf_model(resolve_model(str(folder)), torch.float32, CPU, **kwargs)


# --- names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_names_are_found_in_any_case(name: str) -> None:
    source = resolve_model(name.upper())
    assert source == resolve_model(name)
    assert source.name == name
    assert (Path(source.path_or_id) / "config.json").is_file()
    assert source.has_weights == (name == "folo-tiny") == (source.kind == "bundled")


def test_a_folder_wins_over_a_hub_id(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    checkpoint.rename(tmp_path / "org" / "model")
    source = resolve_model("org/model")
    assert (source.kind, source.name, source.has_weights) == ("local", "model", True)
    assert resolve_model("org/other").kind == "hub"


def test_bad_names_are_refused_with_advice(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"qwen4.*unknown.*folo-tiny, qwen3-0\.6b.*hf download ORG/NAME --local-dir"):
        resolve_model("qwen4")
    with pytest.raises(ValueError, match="without config.json"):
        resolve_model(str(tmp_path))
    with pytest.raises(ValueError, match="is a file"):
        resolve_model(str(checkpoint / "config.json"))
    for path in (str(tmp_path / "absent"), "./absent", "~/absent-folo", "a/b/c", "..\\absent"):
        with pytest.raises(ValueError, match="no such folder.*hf download"):
            resolve_model(path)
    for not_a_name in ("", "  ", None, 3):
        with pytest.raises(ValueError, match="bundled name, a folder or a hub id"):
            resolve_model(not_a_name)  # type: ignore[arg-type]


def test_an_unreachable_hub_id_is_one_error_with_advice() -> None:
    source = resolve_model("nobody/no-such-model")
    for read in (load_config, load_tokenizer):
        with pytest.raises(ValueError, match="nobody/no-such-model.*hf download ORG/NAME") as caught:
            read(source)
        assert isinstance(caught.value.__cause__, OSError)
    assert load_generation_config(source) is None


# --- bundled shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "eos", "rope_theta", "positions"),
    [
        ("qwen3-0.6b", 596_049_920, (151645, 151643), 1e6, 40960),
        ("qwen2.5-0.5b", 494_032_768, (151643,), 1e6, 32768),
        ("llama-3.2-1b", 1_235_814_400, (128001,), 5e5, 131072),
    ],
)
def test_bundled_shapes_are_the_published_ones(
    name: str, parameters: int, eos: tuple[int, ...], rope_theta: float, positions: int,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    source = resolve_model(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = AutoConfig.from_pretrained(source.path_or_id)
        GenerationConfig.from_pretrained(source.path_or_id)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    assert not caplog.records
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert config.rope_parameters["rope_theta"] == rope_theta
    assert config.max_position_embeddings == positions
    assert config.dtype == torch.bfloat16
    assert eos_token_ids(load_config(source), load_generation_config(source), load_tokenizer(source)) == eos


def test_llama_shape_has_its_rope_scaling() -> None:
    rope = load_config(resolve_model("llama-3.2-1b")).rope_parameters
    assert rope["rope_type"] == "llama3"
    assert (rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]) == (32.0, 1.0, 4.0)
    assert rope["original_max_position_embeddings"] == 8192


@pytest.mark.parametrize("load_format", ["auto", "safetensors"])
@pytest.mark.parametrize("name", BUNDLED_CONFIGS)
def test_a_shape_has_no_weights_to_load(name: str, load_format: str) -> None:
    with pytest.raises(ValueError, match=f"load_format='dummy'.*{BUNDLED_CONFIGS[name]}"):
        load_hf_model(resolve_model(name), torch.bfloat16, CPU, load_format)


# --- tokenizer and end ids -------------------------------------------------------------------------------


def test_a_folder_without_tokenizer_files_has_no_tokenizer(checkpoint: Path) -> None:
    assert load_tokenizer(resolve_model(str(checkpoint))) is None
    assert load_tokenizer(resolve_model("qwen3-0.6b")) is None
    (checkpoint / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot load the tokenizer"):
        load_tokenizer(resolve_model(str(checkpoint)))


def test_end_ids_come_from_generation_config_then_config_then_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("qwen3", eos_token_id=5)
    no_eos = tiny_config("qwen3")
    tokenizer = load_tokenizer(resolve_model("folo-tiny"))
    assert tokenizer is not None
    assert eos_token_ids(config, GenerationConfig(eos_token_id=[9, 5, 9, 0]), tokenizer) == (9, 5, 0)
    assert eos_token_ids(config, GenerationConfig(eos_token_id=0), tokenizer) == (0,)
    assert eos_token_ids(config, GenerationConfig(), tokenizer) == (5,)
    assert eos_token_ids(config, None, None) == (5,)
    assert eos_token_ids(no_eos, GenerationConfig(), tokenizer) == (tokenizer.eos_token_id,)
    assert eos_token_ids(no_eos, None, None) == ()


# --- checkpoints -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("load_format", ["auto", "safetensors"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_comes_back_exactly(tmp_path: Path, family: str, tied: bool, load_format: str) -> None:
    saved = reference_model(family, tie_word_embeddings=tied)
    saved.config.use_cache = False
    saved.save_pretrained(tmp_path)
    model = load(tmp_path, load_format=load_format)
    assert not model.training
    assert model.config.use_cache
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    assert saved.state_dict().keys() == model.state_dict().keys()
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    ids = torch.arange(12)[None]
    torch.testing.assert_close(model(ids).logits, saved(ids).logits)


def test_dtype_and_attention_implementation_are_passed_on(checkpoint: Path) -> None:
    source = resolve_model(str(checkpoint))
    model = load_hf_model(source, torch.bfloat16, CPU, attn_implementation="eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


def test_loading_is_quiet_and_restores_the_verbosity(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logging = transformers.utils.logging
    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        capfd.readouterr()
        load(checkpoint)
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.INFO, True)
        assert capfd.readouterr() == ("", "")
    finally:
        logging.set_verbosity(before[0])
        if not before[1]:
            logging.disable_progress_bar()


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_checkpoint_is_named(checkpoint: Path, keep: int) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"ckpt.*cannot load model\.safetensors") as caught:
        load(checkpoint)
    assert caught.value.__cause__ is not None


def test_the_damaged_shard_is_named(tmp_path: Path) -> None:
    reference_model("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].write_bytes(shards[1].read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"cannot load {shards[1].name}"):
        load(tmp_path)
    shards[1].unlink()
    with pytest.raises(ValueError, match=shards[1].name):
        load(tmp_path)


def test_a_missing_tensor_is_refused_and_not_initialised(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["lm_head.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks lm_head\.weight, model\.layers\.1\.mlp\.up_proj\.weight"):
        load(checkpoint)


def test_a_tied_model_needs_no_lm_head_but_an_embedding(tmp_path: Path) -> None:
    reference_model("qwen2", tie_word_embeddings=True).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    load(tmp_path)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks.*embed_tokens"):
        load(tmp_path)


def test_another_shape_is_refused(checkpoint: Path) -> None:
    file = checkpoint / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "intermediate_size": 100}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"another shape.*down_proj\.weight \(file \[64, 96\], config \[64, 100\]\)"):
        load(checkpoint)


@pytest.mark.parametrize("text", ["{", "[]", "", '{"model_type": "no-such-type"}', '{"hidden_size": 8}', "\x00\x01"])
def test_a_bad_config_is_named(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"ckpt.*cannot load config\.json") as caught:
        load(checkpoint)
    assert caught.value.__cause__ is not None


def test_a_config_field_of_the_wrong_type_is_named(checkpoint: Path) -> None:
    file = checkpoint / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "hidden_size": "wide"}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"cannot load config\.json.*hidden_size"):
        load_config(resolve_model(str(checkpoint)))


def test_a_bad_generation_config_is_named(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"cannot load generation_config\.json"):
        load_generation_config(resolve_model(str(checkpoint)))


def test_a_folder_without_weights_can_only_be_a_dummy(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no weight files.*dummy"):
        load(checkpoint)
    assert load(checkpoint, load_format="dummy").config.model_type == "qwen3"


def test_an_unknown_load_format_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="load_format='gguf'.*'auto', 'safetensors', 'dummy'"):
        load(checkpoint, load_format="gguf")


# --- dummy weights ---------------------------------------------------------------------------------------

DUMMY_CASES = [(family, tied) for family in FAMILIES for tied in (False, True)]


def dummy(family: str, tied: bool, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    config = tiny_config(family, tie_word_embeddings=tied, vocab_size=512)
    return build_dummy_model(config, dtype, CPU, seed, "sdpa").eval().requires_grad_(False)


@pytest.mark.parametrize(("dtype", "seeds"), [(torch.float32, (0,)), (torch.bfloat16, (1, 2))], ids=str)
@pytest.mark.parametrize(("family", "tied"), DUMMY_CASES)
def test_dummy_output_is_usable(family: str, tied: bool, dtype: torch.dtype, seeds: tuple[int, ...]) -> None:
    for seed in seeds:
        model = dummy(family, tied, dtype, seed)
        ids = torch.arange(seed, seed + 16)[None]
        logits = model(ids).logits.float()
        assert logits.isfinite().all()
        assert 0.7 < logits.std(-1).mean() < 1.4
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
        # A random map of a few hundred states ends in a cycle; a collapsed model has 1 or 2 different tokens.
        assert tokens[0, 16:].unique().numel() >= 12


@pytest.mark.parametrize(("family", "tied"), DUMMY_CASES)
def test_dummy_weights_have_the_stated_scale(family: str, tied: bool) -> None:
    model = dummy(family, tied, torch.bfloat16)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        if parameter.ndim == 1:
            assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all(), name
        else:
            gain = 4.0 if "down_proj" in name else 1.0
            scaled = parameter.double() * parameter.shape[-1] ** 0.5 / gain
            assert scaled.std().item() == pytest.approx(1.0, abs=0.05), name
            assert scaled.mean().item() == pytest.approx(0.0, abs=0.05), name


@pytest.mark.parametrize("family", FAMILIES)
def test_dummy_buffers_equal_a_normally_built_model(family: str) -> None:
    """RoPE frequencies are in no checkpoint: a model built without its constructor has garbage there."""
    model, normal = dummy(family, False), reference_model(family, vocab_size=512)
    buffers = dict(normal.named_buffers())
    assert any("inv_freq" in name for name in buffers)
    assert buffers.keys() == dict(model.named_buffers()).keys()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    normal.load_state_dict(model.state_dict())
    ids = torch.arange(200)[None]
    torch.testing.assert_close(model(ids).logits, normal(ids).logits)


def test_dummy_weights_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = dummy("qwen3", False, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    again, other = dummy("qwen3", False, seed=3).state_dict(), dummy("qwen3", False, seed=4).state_dict()
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
        if tensor.ndim > 1:
            assert not torch.equal(tensor, other[name]), name
    q_proj = [tensor for name, tensor in first.items() if "q_proj" in name]
    assert not torch.equal(q_proj[0], q_proj[1])


def test_dummy_model_of_a_bundled_shape_knows_its_end_ids(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real shape with fewer layers and a smaller vocabulary, so that it is quick."""
    for file in Path(resolve_model("qwen3-0.6b").path_or_id).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    small = {**config, "num_hidden_layers": 2, "vocab_size": 4096}
    (tmp_path / "config.json").write_text(json.dumps(small), encoding="utf-8")
    model = load_hf_model(resolve_model(str(tmp_path)), torch.bfloat16, CPU, "dummy", seed=1)
    assert model.generation_config.eos_token_id == [151645, 151643]
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


# --- dtype and device ------------------------------------------------------------------------------------


def test_dtype_names() -> None:
    config = tiny_config("qwen3")
    names = {"float": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16,
             "half": torch.float16, "float16": torch.float16}  # fmt: skip
    for name, dtype in names.items():
        assert resolve_dtype(name, config, CPU) == dtype
        assert resolve_dtype(dtype, config, CPU) == dtype
    for bad in ("fp8", "", torch.int8, torch.float64, None):
        with pytest.raises(ValueError, match="dtype=.*allowed: 'auto', 'float32'"):
            resolve_dtype(bad, config, CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stored", "native", "expected"),
    [
        (torch.bfloat16, True, torch.bfloat16),
        (torch.bfloat16, False, torch.float32),
        (torch.float16, True, torch.float32),
        (torch.float32, True, torch.float32),
        (None, True, torch.float32),
    ],
)
def test_auto_dtype_on_a_cpu(
    stored: torch.dtype | None, native: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "cpu_has_bfloat16", lambda: native)
    assert resolve_dtype("auto", tiny_config("llama", dtype=stored), CPU) == expected


@pytest.mark.parametrize(
    ("stored", "native", "expected"),
    [
        (torch.bfloat16, True, torch.bfloat16),
        (torch.bfloat16, False, torch.float16),
        (torch.float16, True, torch.float16),
        (torch.float32, True, torch.bfloat16),
    ],
)
def test_auto_dtype_on_a_gpu(
    stored: torch.dtype, native: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native)
    config = tiny_config("llama", dtype=stored)
    assert resolve_dtype("auto", config, torch.device("cuda")) == expected


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    for absent in ("cuda", "cuda:0"):
        with pytest.raises(ValueError, match=f"{absent}.*0 CUDA devices"):
            resolve_device(absent)
    for bad in ("gpu", "mps", "cuda:x", "", "cpu:0", None):
        with pytest.raises(ValueError, match="allowed: auto, cpu, cuda"):
            resolve_device(bad)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="cuda:2.*2 CUDA devices"):
        resolve_device("cuda:2")
