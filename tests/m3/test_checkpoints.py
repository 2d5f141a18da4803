"""One answer to every checkpoint: what transformers reads of it, at each milestone, or a refusal at each.

The expected column of the matrix is computed: the tokens of transformers' own model of the same folder, or a refusal
where transformers raises, or would fill a weight with random numbers. Refusals that are ours come after it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from folovllm import LLM, SamplingParams
from folovllm.models.checkpoint import WEIGHT_FILES, canonical_name
from folovllm.models.loader import LoadSpec, load_config, resolve_model
from folovllm.models.weights import load_decoder
from tests.oracle import FAMILIES, OracleStats, assert_same_tokens, hf_greedy, random_prompt, randomize, tiny_model

ROOT = Path(__file__).resolve().parent.parent.parent
SINGLE, INDEX, BIN, BIN_INDEX = WEIGHT_FILES
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
UP_PROJ = "model.layers.0.mlp.up_proj.weight"
PROMPT = random_prompt(20, seed=5)
Tensors = dict[str, Tensor]

# How an engine gets to its model: M1 and M2 through transformers, M3 and M4 through our decoder, or not.
ENGINES: dict[str, dict[str, Any]] = {
    "m1": {"milestone": "m1"},
    "m2": {"milestone": "m2"},
    "m3": {"milestone": "m3"},
    "m4": {"milestone": "m4"},
    "m4 on transformers": {"milestone": "m4", "model_impl": "transformers"},
}
each_engine = pytest.mark.parametrize("engine", ENGINES)


def engine_on(folder: Path, engine: str, **others: Any) -> LLM:
    settings = {"dtype": "float32", "device": "cpu", "num_kv_blocks": 64, **ENGINES[engine], **others}
    return LLM(str(folder), **settings)


def transformers_answer(folder: Path) -> PreTrainedModel | None:
    """The model that transformers makes of the folder; None if it raises, or makes up a weight."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except Exception:  # whatever it is: no answer
        return None
    # A tied head is never missing.
    lacks = set(info["missing_keys"]) - set(model.all_tied_weights_keys)
    return None if lacks or info["mismatched_keys"] else model.eval()


# ---------------------------------------------------------------------- layouts


def put(folder: Path, tensors: Tensors, name: str = SINGLE) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    if name.endswith(".bin"):
        torch.save(tensors, folder / name)
    else:
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / name, {"format": "pt"})


def put_index(folder: Path, files: dict[str, Iterable[str]], name: str = INDEX, **others: Any) -> None:
    """files: file -> names of its tensors."""
    weight_map = {tensor: file for file, tensors in files.items() for tensor in tensors}
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map, **others}))


def put_shards(folder: Path, tensors: Tensors, form: str = "model-{}.safetensors", index: str | None = INDEX) -> None:
    shards = {form.format(1): dict(list(tensors.items())[::2]), form.format(2): dict(list(tensors.items())[1::2])}
    for name, part in shards.items():
        put(folder, part, name)
    if index is not None:
        put_index(folder, shards, index)


def wrong(tensors: Tensors) -> Tensors:
    """What must not be read."""
    return {name: tensor.flip(0) for name, tensor in tensors.items()}


def set_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def bare(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def without(tensors: Tensors, *names: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def rolled_head(tensors: Tensors) -> Tensor:
    return tensors[EMBEDDING].roll(1, 0)


# --- files


def single_file(folder: Path, tensors: Tensors) -> None:
    put(folder, tensors)


def shards(folder: Path, tensors: Tensors) -> None:
    put_shards(folder, tensors)


def shards_in_a_folder(folder: Path, tensors: Tensors) -> None:
    put_shards(folder, tensors, "parts/{}.safetensors")


def single_file_beside_shards(folder: Path, tensors: Tensors) -> None:
    put(folder, tensors)
    put_shards(folder, wrong(tensors))


def shards_beside_bin(folder: Path, tensors: Tensors) -> None:
    put_shards(folder, tensors)
    put(folder, wrong(tensors), BIN)


def bin_alone(folder: Path, tensors: Tensors) -> None:
    put(folder, tensors, BIN)


def bin_beside_its_shards(folder: Path, tensors: Tensors) -> None:
    put(folder, tensors, BIN)
    put_shards(folder, wrong(tensors), "pytorch_model-{}.bin", BIN_INDEX)


def bin_shards(folder: Path, tensors: Tensors) -> None:
    put_shards(folder, tensors, "pytorch_model-{}.bin", BIN_INDEX)


def bin_of_an_old_torch(folder: Path, tensors: Tensors) -> None:
    torch.save(tensors, folder / BIN, _use_new_zipfile_serialization=False)


def bin_with_other_things(folder: Path, tensors: Tensors) -> None:
    torch.save({**tensors, "epoch": 3, "optimizer": {"lr": 0.1}}, folder / BIN)


def bin_with_tensors_one_level_down(folder: Path, tensors: Tensors) -> None:
    torch.save({"state_dict": tensors}, folder / BIN)


def other_files_beside(folder: Path, tensors: Tensors) -> None:
    put(folder, tensors)
    put(folder, wrong(tensors), "consolidated.safetensors")
    put(folder, wrong(tensors), "original/model.safetensors")
    put(folder, wrong(tensors), "consolidated.00.pth")
    (folder / "model.gguf").write_bytes(b"GGUF")


def other_files_alone(folder: Path, tensors: Tensors) -> None:
    put(folder, tensors, "consolidated.safetensors")


def shards_without_an_index(folder: Path, tensors: Tensors) -> None:
    put_shards(folder, tensors, "model-0000{}-of-00002.safetensors", None)


def a_file_that_config_names(folder: Path, tensors: Tensors) -> None:
    put(folder, wrong(tensors))
    put(folder, tensors, "special.safetensors")
    set_config(folder, transformers_weights="special.safetensors")


def an_index_that_config_names(folder: Path, tensors: Tensors) -> None:
    put(folder, wrong(tensors))
    put_shards(folder, tensors, "special-{}.safetensors", "special.safetensors.index.json")
    set_config(folder, transformers_weights="special.safetensors.index.json")


def a_file_that_config_names_and_is_not_there(folder: Path, tensors: Tensors) -> None:
    put(folder, tensors)
    set_config(folder, transformers_weights="special.safetensors")


def a_file_that_config_names_outside_of_the_folder(folder: Path, tensors: Tensors) -> None:
    put(folder, tensors)
    put(folder, tensors, "../outside.safetensors")
    set_config(folder, transformers_weights="../outside.safetensors")


def a_roundabout_name_in_config(folder: Path, tensors: Tensors) -> None:
    put(folder, wrong(tensors))
    put(folder, tensors, "special.safetensors")
    set_config(folder, transformers_weights=f"../{folder.name}/special.safetensors")


def a_bin_that_config_names(folder: Path, tensors: Tensors) -> None:
    put(folder, tensors, BIN)
    set_config(folder, transformers_weights=BIN)


def a_file_without_metadata(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / SINGLE)


def a_file_of_another_framework(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / SINGLE, {"format": "mlx"})


def a_git_lfs_pointer(folder: Path, tensors: Tensors) -> None:
    (folder / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def a_bin_that_holds_a_list(folder: Path, tensors: Tensors) -> None:
    torch.save(list(tensors.values()), folder / BIN)


def a_bin_with_a_number_as_a_name(folder: Path, tensors: Tensors) -> None:
    torch.save({**tensors, 0: torch.ones(1)}, folder / BIN)


def a_truncated_shard(folder: Path, tensors: Tensors) -> None:
    put_shards(folder, tensors)
    (folder / "model-2.safetensors").write_bytes((folder / "model-2.safetensors").read_bytes()[:-8])


# --- indices


def a_tensor_in_two_shards(folder: Path, tensors: Tensors) -> None:
    """The index gives the first, and has a later name for the file whose tensor counts."""
    put(folder, wrong(tensors), "a.safetensors")
    put(folder, {NORM: tensors[NORM], **without(tensors, NORM)}, "b.safetensors")
    put_index(folder, {"b.safetensors": without(tensors, NORM), "a.safetensors": [NORM]})


def a_tensor_that_the_index_lacks(folder: Path, tensors: Tensors) -> None:
    put_shards(folder, tensors)
    put_index(folder, {"model-1.safetensors": list(tensors)[:1], "model-2.safetensors": list(tensors)[1:2]})


def a_tensor_that_only_the_index_has(folder: Path, tensors: Tensors) -> None:
    put(folder, without(tensors, UP_PROJ), "a.safetensors")
    put_index(folder, {"a.safetensors": tensors})


def a_shard_that_only_the_index_has(folder: Path, tensors: Tensors) -> None:
    put(folder, tensors, "a.safetensors")
    put_index(folder, {"a.safetensors": tensors, "b.safetensors": ["more"]})


def an_index_without_metadata(folder: Path, tensors: Tensors) -> None:
    put(folder, tensors, "a.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "a.safetensors")}))


def an_empty_index(folder: Path, tensors: Tensors) -> None:
    put(folder, tensors, "a.safetensors")
    put_index(folder, {})


# --- names and ties


def names_of_the_body_alone(folder: Path, tensors: Tensors) -> None:
    put(folder, bare(tensors))


def names_with_the_prefix_twice(folder: Path, tensors: Tensors) -> None:
    put(folder, {f"model.{name}": tensor for name, tensor in tensors.items()})


def names_with_another_prefix(folder: Path, tensors: Tensors) -> None:
    put(folder, {f"module.{name}": tensor for name, tensor in tensors.items()})


def two_names_for_one_weight(folder: Path, tensors: Tensors) -> None:
    """Of one pair the name with the prefix comes first in the order of names, of the other the name without."""
    double = {name: tensors[f"model.{name}"].flip(0) for name in ("embed_tokens.weight", "norm.weight")}
    put(folder, tensors | double)


def a_head_in_the_body(folder: Path, tensors: Tensors) -> None:
    put(folder, {**without(tensors, HEAD), f"model.{HEAD}": tensors[HEAD]})


def no_head(folder: Path, tensors: Tensors) -> None:
    put(folder, without(tensors, HEAD))


def a_head_of_its_own(folder: Path, tensors: Tensors) -> None:
    put(folder, {**tensors, HEAD: rolled_head(tensors)})


def a_head_of_its_own_in_another_shard(folder: Path, tensors: Tensors) -> None:
    put(folder, tensors, "b.safetensors")
    put(folder, {HEAD: rolled_head(tensors)}, "a.safetensors")
    put_index(folder, {"a.safetensors": [HEAD], "b.safetensors": tensors})


def a_head_of_another_shape(folder: Path, tensors: Tensors) -> None:
    put(folder, {**tensors, HEAD: rolled_head(tensors)[:-1]})


def a_head_that_is_the_embedding(folder: Path, tensors: Tensors) -> None:
    put(folder, {**tensors, HEAD: tensors[EMBEDDING].clone()})


def a_bin_with_both_names_for_one_tensor(folder: Path, tensors: Tensors) -> None:
    put(folder, {**tensors, HEAD: tensors[EMBEDDING]}, BIN)


def the_head_alone(folder: Path, tensors: Tensors) -> None:
    put(folder, {**without(tensors, EMBEDDING), HEAD: tensors[EMBEDDING]})


def the_head_alone_in_the_body(folder: Path, tensors: Tensors) -> None:
    put(folder, bare(without(tensors, EMBEDDING)) | {f"model.{HEAD}": tensors[EMBEDDING]})


def neither_of_the_tied_pair(folder: Path, tensors: Tensors) -> None:
    put(folder, without(tensors, EMBEDDING))


# --- tensors


def more_tensors(folder: Path, tensors: Tensors) -> None:
    more = {
        "model.layers.0.self_attn.o_proj.bias": torch.ones(64),
        "model.layers.2.input_layernorm.weight": torch.ones(64),
        "vision_tower.patch_embedding": torch.ones(3),
        "steps": torch.tensor(7),
    }
    put(folder, tensors | more)


def a_missing_tensor(folder: Path, tensors: Tensors) -> None:
    put(folder, without(tensors, UP_PROJ, NORM))


def another_shape(folder: Path, tensors: Tensors) -> None:
    put(folder, {**tensors, UP_PROJ: tensors[UP_PROJ].T})


def rotary_frequencies(folder: Path, tensors: Tensors) -> None:
    put(folder, {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})


def in_float16(folder: Path, tensors: Tensors) -> None:
    put(folder, {name: tensor.half() for name, tensor in tensors.items()})


def in_four_formats(folder: Path, tensors: Tensors) -> None:
    formats = (torch.float64, torch.bfloat16, torch.float16, torch.float32)
    put(folder, {name: t.to(formats[i % 4]) for i, (name, t) in enumerate(tensors.items())})


Layout = Callable[[Path, Tensors], None]
# Layout -> what a refusal says, if transformers refuses; what the one warning says, if there is one; else ("", "").
FILES: dict[Layout, tuple[str, str]] = {
    single_file: ("", ""),
    shards: ("", ""),
    shards_in_a_folder: ("", ""),
    single_file_beside_shards: ("", ""),
    shards_beside_bin: ("", ""),
    bin_alone: ("", ""),
    bin_beside_its_shards: ("", ""),
    bin_shards: ("", ""),
    bin_of_an_old_torch: ("", ""),
    bin_with_other_things: ("", "skipped: epoch, optimizer$"),
    bin_with_tensors_one_level_down: ("lacks lm_head.weight, model.embed_tokens.weight, .* more", ""),
    other_files_beside: ("", ""),
    other_files_alone: (r"no weight files that folovllm reads \(it has consolidated.safetensors\); allowed: model", ""),
    shards_without_an_index: (r"no weight files .*it has model-00001-of-00002.safetensors, model-00002", ""),
    a_file_that_config_names: ("", ""),
    an_index_that_config_names: ("", ""),
    a_file_that_config_names_and_is_not_there: ("allowed: special.safetensors", ""),
    a_file_that_config_names_outside_of_the_folder: (
        r"transformers_weights='\.\./.*' is not valid; allowed: a \*.safetensors or",
        "",
    ),
    a_roundabout_name_in_config: ("", ""),
    a_bin_that_config_names: (r"transformers_weights='pytorch_model.bin' is not valid; allowed: a \*.safetensors", ""),
    a_file_without_metadata: ("", ""),
    a_file_of_another_framework: ("", ""),
    a_git_lfs_pointer: (f"{SINGLE} is a Git LFS pointer", ""),
    a_bin_that_holds_a_list: (f"cannot load {BIN}", ""),
    a_bin_with_a_number_as_a_name: (f"cannot load {BIN}: the name 0 is no text", ""),
    a_truncated_shard: ("cannot load model-2.safetensors", ""),
    a_tensor_in_two_shards: ("", ""),
    a_tensor_that_the_index_lacks: ("", ""),
    a_tensor_that_only_the_index_has: (f"lacks {UP_PROJ}$", ""),
    a_shard_that_only_the_index_has: ("cannot load b.safetensors", ""),
    an_index_without_metadata: (f"cannot load {INDEX}: 'metadata'", ""),
    an_empty_index: (f"cannot load {INDEX}: it names no file", ""),
    names_of_the_body_alone: ("", ""),
    names_with_the_prefix_twice: ("", ""),
    names_with_another_prefix: ("lacks lm_head.weight, model.embed_tokens.weight, .* more$", ""),
    two_names_for_one_weight: ("", ""),
    a_head_in_the_body: ("", ""),
    no_head: (f"lacks {HEAD}$", ""),
    more_tensors: (
        "",
        "no weights of these names, skipped: model.layers.0.self_attn.o_proj.bias, "
        "model.layers.2.input_layernorm.weight, steps, vision_tower.patch_embedding$",
    ),
    a_missing_tensor: (f"lacks {UP_PROJ}, {NORM}$", ""),
    another_shape: (rf"another shape .* {UP_PROJ} \(file \[64, 96\], config \[96, 64\]\)$", ""),
    rotary_frequencies: ("", ""),
    in_float16: ("", ""),
    in_four_formats: ("", ""),
}
DIFFER = f"config.json ties {HEAD} to {EMBEDDING}, but the checkpoint has both, and they differ: both are used$"
TIED: dict[Layout, tuple[str, str]] = {
    single_file: ("", ""),
    bin_shards: ("", ""),
    names_of_the_body_alone: ("", ""),
    a_head_of_its_own: ("", DIFFER),
    a_head_of_its_own_in_another_shard: ("", DIFFER),
    a_head_of_another_shape: (rf"another shape .* {HEAD} \(file \[127, 64\], config \[128, 64\]\)$", ""),
    a_head_that_is_the_embedding: ("", ""),
    a_bin_with_both_names_for_one_tensor: ("", ""),
    the_head_alone: ("", ""),
    the_head_alone_in_the_body: ("", ""),
    neither_of_the_tied_pair: (f"lacks {EMBEDDING}$", ""),
}
CASES = [
    pytest.param(FAMILIES[i % 4], tied, layout, says, id=("tied: " if tied else "") + layout.__name__)
    for tied, layouts in ((False, FILES), (True, TIED))
    for i, (layout, says) in enumerate(layouts.items())
]


@each_engine
@pytest.mark.parametrize(("family", "tied", "layout", "says"), CASES)
def test_every_milestone_reads_what_transformers_reads(
    family: str, tied: bool, layout: Layout, says: tuple[str, str], engine: str, tmp_path: Path,
    oracle_stats: OracleStats, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    model = tiny_model(family, seed=3, tie_word_embeddings=tied)
    folder = tmp_path / "model"
    model.config.save_pretrained(folder)
    layout(folder, {name: tensor.detach() for name, tensor in model.named_parameters()})
    check_answer(folder, engine, says, oracle_stats, caplog)


def check_answer(
    folder: Path, engine: str, says: tuple[str, str], oracle_stats: OracleStats, caplog: pytest.LogCaptureFixture
) -> None:
    """The tokens of transformers' model with the warning that is said, or the refusal that is said."""
    refusal, warning = says
    theirs = transformers_answer(folder)
    assert (theirs is None) == bool(refusal), "transformers has changed its mind"
    caplog.clear()
    if theirs is None:
        with pytest.raises(ValueError, match=refusal) as caught:
            engine_on(folder, engine)
        assert "\n" not in str(caught.value) and folder.name in str(caught.value)
        return
    llm = engine_on(folder, engine)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("folovllm")]
    assert len(said) == bool(warning)
    if warning:
        assert said[0].startswith(folder.name)

        assert re.search(warning, said[0]), said[0]
    [output] = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    assert_same_tokens(output.outputs[0].token_ids, hf_greedy(theirs, PROMPT, 8), theirs, PROMPT, oracle_stats)


# ---------------------------------------------------------------------- other families: M3 and M4 through transformers

GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2, "vocab_size": 128}
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GPT2_EMBEDDING = "transformer.wte.weight"


def gpt2_names_of_the_body_alone(folder: Path, tensors: Tensors) -> None:
    """As the first GPT-2 checkpoints are, with the causal masks that they hold as numbers of 8 bits."""
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril().byte() for i in range(2)}
    put(folder, {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()} | masks, BIN)


def gpt2_head_alone(folder: Path, tensors: Tensors) -> None:
    put(folder, {**without(tensors, GPT2_EMBEDDING), HEAD: tensors[GPT2_EMBEDDING]})


def gpt2_head_of_its_own(folder: Path, tensors: Tensors) -> None:
    put(folder, {**tensors, HEAD: tensors[GPT2_EMBEDDING].roll(1, 0)})


@pytest.mark.parametrize("engine", list(ENGINES)[:4])
@pytest.mark.parametrize(
    ("layout", "says"),
    [
        (single_file, ("", "")),
        (gpt2_names_of_the_body_alone, ("", "")),
        (gpt2_head_alone, ("", "")),
        (gpt2_head_of_its_own, ("", f"ties {HEAD} to {GPT2_EMBEDDING}, but the checkpoint has both, and they differ")),
    ],
)
def test_another_family_is_read_as_transformers_reads_it(
    layout: Layout, says: tuple[str, str], engine: str, tmp_path: Path,
    oracle_stats: OracleStats, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    config = AutoConfig.for_model("gpt2", **GPT2, **NO_IDS)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model, 3)
    config.save_pretrained(tmp_path)
    layout(tmp_path, {name: tensor.detach() for name, tensor in model.named_parameters()})
    check_answer(tmp_path, engine, says, oracle_stats, caplog)


# ---------------------------------------------------------------------- what is refused though transformers might not


def refusal(folder: Path, engine: str) -> str:
    with pytest.raises(ValueError) as caught:
        engine_on(folder, engine)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny_model("qwen3", seed=3)
    model.config.save_pretrained(tmp_path)
    put(tmp_path, {name: tensor.detach() for name, tensor in model.named_parameters()})
    return tmp_path


# What config.json says -> what the refusal says.
QUANTIZATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
    "awq": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
    "bitsandbytes": ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
    "old bitsandbytes": ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes, 8 bits"),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
    "compressed-tensors": ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    "old compressed-tensors": ({"compression_config": {"format": "pack-quantized"}}, "compressed-tensors"),
    "mxfp4": ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
    "modelopt": ({"quantization_config": {"quant_algo": "NVFP4"}}, "NVFP4"),
    "hqq": ({"quantization_config": {"quant_method": "hqq"}}, "hqq"),
    "unheard of": ({"quantization_config": {"quant_method": "zip"}}, "zip"),  # transformers would read it as numbers
    "unnamed": ({"quantization_config": {"bits": 4}}, "unknown method"),
    "mlx": ({"quantization": {"group_size": 64, "bits": 4}}, "mlx, 4 bits"),
    "empty": ({"quantization_config": {}}, "unknown method"),
}


@each_engine
@pytest.mark.parametrize("which", QUANTIZATIONS)
def test_what_config_json_calls_quantized_is_refused_by_its_method(
    which: str, engine: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields, says = QUANTIZATIONS[which]
    set_config(folder, **fields)
    (folder / SINGLE).unlink()  # so nothing can be read before
    message = refusal(folder, engine)
    assert re.search(rf"the checkpoint is quantized \(config.json says \w+: {says}\); allowed: weights in f", message)


@each_engine
def test_a_config_that_says_there_is_no_quantization_is_taken(engine: str, folder: Path) -> None:
    set_config(folder, quantization_config=None)
    engine_on(folder, engine)


@pytest.mark.parametrize("engine", list(ENGINES)[:4])
def test_a_text_model_may_be_quantized_by_itself(engine: str, tmp_path: Path) -> None:
    text = {"hidden_size": 64, "num_hidden_layers": 2, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    AutoConfig.for_model("gemma3", text_config=text).save_pretrained(tmp_path)
    assert "the checkpoint is quantized (config.json says quantization_config: gptq)" in refusal(tmp_path, engine)


@each_engine
@pytest.mark.parametrize(
    ("name", "method"),
    [("quantize_config.json", "gptq"), ("quant_config.json", "awq"), ("hf_quant_config.json", "mod")],
)
def test_old_files_beside_config_json_say_it_too(name: str, method: str, engine: str, folder: Path) -> None:
    (folder / name).write_text("{}")
    assert f"the checkpoint is quantized ({name}: {method}" in refusal(folder, engine)


QUANTIZED_TENSORS = {  # in place of, or beside, the weight of a layer
    "gptq": {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16, "g_idx": torch.int32},
    "compressed-tensors": {"weight_packed": torch.int32, "weight_scale": torch.bfloat16, "weight_shape": torch.int64},
    "fp8": {"weight": torch.float8_e4m3fn, "weight_scale_inv": torch.float32},
    "int8 with a scale": {"weight": torch.int8, "weight_scale": torch.float32},
    "a scale beside plain numbers": {"weight": torch.bfloat16, "weight_scale": torch.float32},
    "bitsandbytes, 8 bits": {"weight": torch.int8, "SCB": torch.float32},
    "bitsandbytes, 4 bits": {
        "weight": torch.uint8, "weight.absmax": torch.uint8, "weight.quant_state.bitsandbytes__nf4": torch.uint8
    },
    "hqq": {"W_q": torch.uint8, "meta": torch.uint8},
}  # fmt: skip


@each_engine
@pytest.mark.parametrize("method", QUANTIZED_TENSORS)
def test_quantized_tensors_are_refused_whatever_config_json_says(method: str, engine: str, folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    shape = tensors.pop(UP_PROJ).shape
    layer = UP_PROJ.removesuffix(".weight")
    new = {f"{layer}.{name}": torch.ones(shape).to(dtype) for name, dtype in QUANTIZED_TENSORS[method].items()}
    put(folder, tensors | new)
    assert f"the checkpoint is quantized (it has {layer}." in refusal(folder, engine)


OTHER_FORMATS = (
    torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
    torch.complex64,
)  # fmt: skip


@each_engine
@pytest.mark.parametrize(
    ("dtype", "file"), [*((dtype, SINGLE) for dtype in OTHER_FORMATS), (torch.float8_e4m3fn, BIN), (torch.int8, BIN)]
)
@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_a_weight_is_never_taken_as_numbers_that_it_is_not(
    dtype: torch.dtype, file: str, engine: str, folder: Path
) -> None:
    """transformers casts it to the model's format, without a word."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    put(folder, {**tensors, UP_PROJ: tensors[UP_PROJ].to(dtype)}, file)
    assert transformers_answer(folder) is not None
    message = refusal(folder, engine)
    assert (
        f"the checkpoint has weights in another format than float32, float16, bfloat16, float64: {UP_PROJ} (" in message
    )


@pytest.mark.parametrize("engine", list(ENGINES)[:4])
def test_a_part_of_a_fused_weight_is_none_either(engine: str, tmp_path: Path) -> None:
    """Mixtral's files have each expert's weights by itself; the model has all in one tensor."""
    fields = {"num_local_experts": 2, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = AutoConfig.for_model(
        "mixtral", **fields, **NO_IDS, num_attention_heads=4, num_key_value_heads=2, vocab_size=128
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    engine_on(tmp_path, engine, max_model_len=64)
    tensors = load_file(tmp_path / SINGLE)
    name = next(name for name in tensors if "experts.1.w1" in name)
    put(tmp_path, {**tensors, name: tensors[name].to(torch.int8)})
    assert f"in another format than float32, float16, bfloat16, float64: {name} (I8)" in refusal(tmp_path, engine)


@each_engine
def test_tensors_that_the_model_lacks_may_have_any_format(engine: str, folder: Path) -> None:
    put(folder, {**load_file(folder / SINGLE), "tokens_seen": torch.tensor(7), "mask": torch.ones(3).bool()})
    engine_on(folder, engine)


FOREIGN = ("model-Q4_K_M.gguf", "consolidated.00.pth", "tf_model.h5", "flax_model.msgpack", "model.onnx", "weights.npz")


@each_engine
@pytest.mark.parametrize("name", FOREIGN)
def test_files_in_other_formats_are_refused_by_name(name: str, engine: str, folder: Path) -> None:
    (folder / SINGLE).rename(folder / name)
    message = refusal(folder, engine)
    assert f"no weight files that folovllm reads (it has {name}); allowed: model.safetensors, " in message
    (folder / "config.json").unlink()
    message = refusal(folder, engine)
    assert (
        f"a folder without config.json (it has {name})" in message and "allowed: a folder with config.json" in message
    )


@each_engine
def test_an_adapter_is_no_model(engine: str, folder: Path) -> None:
    """With a package installed transformers adds it to the weights, without the package it does not."""
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "adapter_config.json makes it an adapter; allowed: the whole model" in refusal(folder, engine)
    (folder / SINGLE).rename(folder / "adapter_model.safetensors")
    assert "adapter_config.json makes it an adapter; allowed: the whole model" in refusal(folder, engine)
    (folder / "config.json").unlink()
    assert "(it has adapter_config.json, adapter_model.safetensors)" in refusal(folder, engine)


@each_engine
def test_a_distributed_checkpoint_is_refused_by_name(engine: str, folder: Path) -> None:
    """transformers would prefer its shards to model.safetensors."""
    (folder / "shard-00000-model-00001-of-00001.safetensors").write_bytes((folder / SINGLE).read_bytes())
    assert "shard-00000-model-00001-of-00001.safetensors is of a distributed checkpoint" in refusal(folder, engine)


@pytest.mark.parametrize("engine", ["m1", "m4"])
def test_load_format_safetensors_takes_no_other_file(engine: str, folder: Path) -> None:
    put(folder, load_file(folder / SINGLE), BIN)
    engine_on(folder, engine, load_format="safetensors")
    (folder / SINGLE).unlink()
    with pytest.raises(ValueError, match=rf"it has {BIN}\); allowed: {SINGLE}, {INDEX} \("):
        engine_on(folder, engine, load_format="safetensors")


# ---------------------------------------------------------------------- details


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_of_transformers(family: str) -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    model = tiny_model(family)
    state, mapping = model.state_dict(), get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    for name in state:
        body = name.removeprefix("model.")
        for stored in (name, body, f"model.{name}", f"model.model.{name}", f"transformer.{body}", f"{name}_more"):
            theirs, _ = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
            assert canonical_name(stored, state, "model") == theirs


@pytest.mark.parametrize(("dtype", "tied"), [(torch.float32, False), (torch.bfloat16, True)])
def test_a_head_is_compared_in_the_format_of_the_model(dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    model = tiny_model("qwen3", seed=3, tie_word_embeddings=True).bfloat16().float()
    model.config.save_pretrained(tmp_path)
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
    put(tmp_path, {**tensors, HEAD: tensors[EMBEDDING] * (1 + 2**-12)})  # equal in bfloat16
    source = resolve_model(str(tmp_path))
    decoder = load_decoder(LoadSpec(source, load_config(source), dtype, torch.device("cpu")))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == tied
    assert decoder.config.tied_embeddings == tied


def test_an_ordinary_checkpoint_needs_none_of_transformers_models() -> None:
    """They cost seconds of every start: what they would say of names and ties is said by a few lines of ours."""
    code = """
import sys
from folovllm import LLM
LLM("folo-tiny", num_kv_blocks=16, device="cpu")
names = ("transformers.modeling_utils", "transformers.core_model_loading", "torch._dynamo", "triton")
print(*(name for name in names if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
