"""Our decoder against Hugging Face's models: hidden states, logits, tokens, and what a checkpoint may look like."""

from __future__ import annotations

import json
import shutil
import weakref
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma2Config, GPT2Config, PretrainedConfig, PreTrainedModel

from folovllm import LLM, SamplingParams
from folovllm.attention.backend import AttentionBackend
from folovllm.attention.metadata import AttentionMetadata
from folovllm.attention.reference import ReferenceBackend
from folovllm.attention.torch_backend import TorchBackend
from folovllm.models import weights
from folovllm.models.checkpoint import Checkpoint, StoredTensor, open_checkpoint, weight_files
from folovllm.models.decoder import Decoder, DecoderConfig
from folovllm.models.layers import Linear, packing_works
from folovllm.models.loader import LoadSpec, load_config, load_hf_model, resolve_model
from folovllm.models.weights import fill_dummy, load_decoder, targets
from folovllm.runner.kv_storage import KVStorage
from tests.oracle import FAMILIES, OracleStats, assert_same_tokens, hf_greedy, random_prompt, tiny_config, tiny_model

CPU = torch.device("cpu")
BLOCK_SIZE = 4
INDEX = "model.safetensors.index.json"

# What tells one mistake from another: biases, tied weights, one KV head or as many as heads, a window on some layers.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama without scaling": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True, "num_key_value_heads": 1}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen2 with a window on the last layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "mistral without a window": ("mistral", {"sliding_window": None, "rms_norm_eps": 0.1}),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def load(folder: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Decoder:
    source = resolve_model(str(folder))
    return load_decoder(LoadSpec(source, load_config(source), dtype, CPU, **kwargs))


@dataclass
class Paged:
    """A decoder and its K/V, driven by hand: `step` takes the new tokens of any requests, in any order."""

    decoder: Decoder
    backend: AttentionBackend
    done: dict[str, int] = field(default_factory=dict)  # tokens that have K/V
    tables: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.storage = KVStorage(self.decoder.config, self.decoder.dtype, CPU, BLOCK_SIZE, 200)
        self.storage.device_pools[0].fill_(torch.nan)  # nobody may read what was not written
        self.free = torch.randperm(200, generator=torch.Generator().manual_seed(0)).add(1).tolist()

    @torch.inference_mode()
    def step(self, new: dict[str, list[int]]) -> dict[str, Tensor]:
        """Hidden states of the new tokens of each request, [L, E]."""
        starts, slots, positions, kv_lens = [0], [], [], []
        for request, tokens in new.items():
            table, first = self.tables.setdefault(request, []), self.done.get(request, 0)
            for position in range(first, first + len(tokens)):
                if position // BLOCK_SIZE == len(table):
                    table.append(self.free.pop())
                slots.append(table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
                positions.append(position)
            starts.append(starts[-1] + len(tokens))
            kv_lens.append(first + len(tokens))
            self.done[request] = kv_lens[-1]
        tables = [tuple(self.tables[request]) for request in new]
        width = max(map(len, tables))
        meta = AttentionMetadata(
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor(kv_lens, dtype=torch.int32),
            torch.tensor(slots),
            torch.tensor([[*table, *[0] * (width - len(table))] for table in tables], dtype=torch.int32),
            BLOCK_SIZE,
            [len(tokens) for tokens in new.values()],
            kv_lens,
            tables,
        )
        flat = torch.tensor([token for tokens in new.values() for token in tokens])
        hidden = self.decoder(flat, torch.tensor(positions), self.storage.layers, meta, self.backend)
        return {request: hidden[a:b] for request, a, b in zip(new, starts, starts[1:], strict=False)}


# ---------------------------------------------------------------------- the same numbers as Hugging Face


@pytest.mark.parametrize("backend", [ReferenceBackend, TorchBackend])
@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_and_logits_of_a_ragged_batch(variant: str, backend: Any, tmp_path: Path) -> None:
    """Prefills, decodes and chunks of four sequences in three forwards; every row is compared."""
    family, overrides = VARIANTS[variant]
    model = tiny_model(family, seed=3, **overrides)
    model.save_pretrained(tmp_path)
    paged = Paged(load(tmp_path), backend())
    texts = {name: random_prompt(length, seed=length) for name, length in (("a", 12), ("b", 70), ("c", 1), ("d", 23))}
    steps = [{"a": 9, "b": 33}, {"b": 20, "a": 1, "c": 1}, {"a": 2, "d": 23, "b": 17}]
    found: dict[str, list[Tensor]] = {name: [] for name in texts}
    for step in steps:
        new = {name: texts[name][paged.done.get(name, 0) :][:count] for name, count in step.items()}
        for name, rows in paged.step(new).items():
            found[name].append(rows)
    for name, text in texts.items():
        ours = torch.cat(found[name])  # [L, E]
        with torch.no_grad():
            expected = model.model(torch.tensor([text])).last_hidden_state[0]  # [L, E]
            logits = model(torch.tensor([text])).logits[0]  # [L, V]
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        with torch.inference_mode():
            torch.testing.assert_close(paged.decoder.logits(ours), logits, rtol=1e-4, atol=1e-3)
            some = torch.tensor([len(text) - 1, 0])
            torch.testing.assert_close(paged.decoder.logits(ours[some]), logits[some], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_sequences_that_join_and_leave(family: str, tmp_path: Path, oracle_stats: OracleStats) -> None:
    """A sequence joins in every second step, so prefills and decodes share most forwards."""
    model = tiny_model(family, seed=4)
    model.save_pretrained(tmp_path)
    paged = Paged(load(tmp_path), TorchBackend())
    prompts = {str(n): random_prompt(n, seed=n) for n in (1, 7, 8, 9, 33, 64)}
    outputs: dict[str, list[int]] = {}
    mixed = 0
    for step in range(100):
        new = {name: [tokens[-1]] for name, tokens in outputs.items() if len(tokens) < 20}
        decodes = len(new)
        for name in list(prompts)[: step // 2 + 1]:
            if name not in outputs:
                new[name], outputs[name] = prompts[name], []
        if not new:
            break
        mixed += 0 < decodes < len(new)
        for name, rows in paged.step(new).items():
            with torch.inference_mode():
                outputs[name].append(int(paged.decoder.logits(rows[-1:]).argmax()))
    assert mixed == 5
    for name, prompt in prompts.items():
        assert_same_tokens(outputs[name], hf_greedy(model, prompt, 20), model, prompt, oracle_stats)


def test_logits_are_computed_for_rows_that_sample_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    llm = LLM(str(tmp_path), milestone="m3", dtype="float32", device="cpu", max_num_batched_tokens=64)
    rows: list[int] = []
    decoder = llm.engine.core.runner.model
    logits = decoder.logits

    def watched(hidden: Tensor) -> Tensor:
        rows.append(len(hidden))
        return logits(hidden)

    monkeypatch.setattr(decoder, "logits", watched)
    params = SamplingParams(temperature=0, max_tokens=3)
    llm.generate([random_prompt(n, seed=n) for n in (30, 20, 14, 9)], params, use_tqdm=False)
    assert [step.num_scheduled_tokens for step in llm.engine.trace] == [30 + 20 + 14, 3 + 9, 4, 1]
    assert rows == [3, 4, 4, 1]


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not valid; allowed: 'silu'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type='yarn' is not valid; allowed: 'default', 'llama3'",
        ),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type='dynamic' is not valid",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5 is not valid; allowed: 1.0",
        ),
    ],
)
def test_what_the_decoder_does_not_have_is_refused_by_name(family: str, changes: dict[str, Any], message: str) -> None:
    config = tiny_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError) as caught:
        Decoder(DecoderConfig.from_hf(config), 16, torch.float32, CPU)
    assert message in str(caught.value)


@pytest.mark.parametrize("config", [Gemma2Config(), GPT2Config()])
def test_another_kind_of_model_is_refused_by_name(config: PretrainedConfig) -> None:
    kind = config.model_type
    with pytest.raises(ValueError, match=f"model_type='{kind}' is not valid; allowed: llama, mistral, qwen2, qwen3"):
        DecoderConfig.from_hf(config)


# ---------------------------------------------------------------------- checkpoints


def by_name(decoder: Decoder) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in targets(decoder).items()}


def hf_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_finds_its_place(variant: str, tmp_path: Path) -> None:
    family, overrides = VARIANTS[variant]
    model = tiny_model(family, seed=3, **overrides)
    model.save_pretrained(tmp_path)
    assert_same_tensors(by_name(load(tmp_path)), hf_tensors(model))


def test_fused_weights_are_the_parts_in_order(tmp_path: Path) -> None:
    model = tiny_model("qwen2", seed=3)
    model.save_pretrained(tmp_path)
    decoder, theirs = load(tmp_path), hf_tensors(model)
    for index, layer in enumerate(decoder.layers):
        names = [f"model.layers.{index}.self_attn.{part}_proj" for part in "qkv"]
        assert torch.equal(layer.attention.qkv.weight, torch.cat([theirs[f"{n}.weight"] for n in names]))
        assert torch.equal(layer.attention.qkv.bias, torch.cat([theirs[f"{n}.bias"] for n in names]))
        names = [f"model.layers.{index}.mlp.{part}_proj.weight" for part in ("gate", "up")]
        assert torch.equal(layer.mlp.gate_up.weight, torch.cat([theirs[n] for n in names]))


@pytest.mark.parametrize("form", ["sharded", "sharded .bin", ".bin", "cut by hand"])
def test_every_form_of_a_checkpoint(form: str, tmp_path: Path) -> None:
    model = tiny_model("llama", seed=3)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    half = dict(list(tensors.items())[: len(tensors) // 2])
    rest = {name: tensor for name, tensor in tensors.items() if name not in half}
    model.config.save_pretrained(tmp_path)
    if form == "sharded":
        model.save_pretrained(tmp_path, max_shard_size="100KB")
        assert (tmp_path / INDEX).is_file() and len(list(tmp_path.glob("*.safetensors"))) > 2
        (tmp_path / "leftover.safetensors").write_bytes(b"the index does not name this")
    elif form == ".bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    elif form == "sharded .bin":
        torch.save(half, tmp_path / "pytorch_model-00001-of-00002.bin")
        torch.save(rest, tmp_path / "pytorch_model-00002-of-00002.bin")
        shards = {name: f"pytorch_model-0000{1 if name in half else 2}-of-00002.bin" for name in tensors}
        index = {"metadata": {}, "weight_map": shards}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:  # some checkpoints hold a file of all parts beside the parts
        save_file(tensors, tmp_path / "model.safetensors")
        save_file(half, tmp_path / "consolidated.safetensors")
    assert_same_tensors(by_name(load(tmp_path)), hf_tensors(model))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32])
def test_the_format_of_the_file_is_not_that_of_the_model(
    stored: torch.dtype, wanted: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Linear, "pack", lambda self, keep=False: None)  # a packed weight cannot be read
    model = tiny_model("qwen3", seed=3).to(stored)
    model.save_pretrained(tmp_path)
    assert_same_tensors(by_name(load(tmp_path, wanted)), hf_tensors(model.to(wanted)))


@pytest.mark.parametrize("stored_head", [False, True])
def test_tied_weights_are_one_tensor_whatever_the_file_holds(stored_head: bool, tmp_path: Path) -> None:
    model = tiny_model("qwen3", seed=3, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    if stored_head:
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    decoder = load(tmp_path)
    assert decoder.head.weight is decoder.embedding
    assert torch.equal(decoder.embedding, model.get_input_embeddings().weight)


def test_old_checkpoints_with_rotary_frequencies_load(tmp_path: Path) -> None:
    model = tiny_model("llama", seed=3)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert_same_tensors(by_name(load(tmp_path)), hf_tensors(model))


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def spoil(folder: Path, how: str) -> str:
    """Damage a checkpoint; what the error must name."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if how == "missing":
        del tensors[Q_PROJ]
        expected = f"lacks {Q_PROJ}$"
    elif how == "many missing":
        tensors = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
        expected = r"lacks model.layers.1\.\S+, \S+, \S+, \S+ and 7 more$"
    elif how == "untied head missing":
        del tensors["lm_head.weight"]
        expected = "lacks lm_head.weight$"
    elif how == "another shape":
        tensors[Q_PROJ] = tensors[Q_PROJ][:-1].contiguous()
        expected = rf"another shape than config.json says for {Q_PROJ} \(file \[127, 64\], config \[128, 64\]\)"
    elif how == "transposed":
        tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"].T.contiguous()
        expected = r"config.json says for .*mlp.down_proj.weight \(file \[96, 64\], config \[64, 96\]\)"
    else:
        raise AssertionError(how)
    save_file(tensors, file, {"format": "pt"})
    return expected


@pytest.mark.parametrize(
    "how",
    ["missing", "many missing", "untied head missing", "another shape", "transposed"],
)
def test_tensors_that_do_not_match_are_one_error_that_names_them(how: str, tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*{spoil(tmp_path, how)}"):
        load(tmp_path)


def cut_short(folder: Path, name: str) -> None:
    file = folder / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    "how", ["truncated", "not safetensors", "shard missing", "index broken", "truncated .bin", "no files", "only .bin"]
)
def test_damaged_files_are_one_error_that_names_them(how: str, tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    load_format = "auto"
    if how in ("truncated .bin", "only .bin"):
        model.config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    else:
        model.save_pretrained(tmp_path, max_shard_size="100KB" if how in ("shard missing", "index broken") else "1GB")
    if how == "truncated":
        cut_short(tmp_path, "model.safetensors")
        named = "cannot load model.safetensors"
    elif how == "not safetensors":
        (tmp_path / "model.safetensors").write_text("<html>404</html>")
        named = "cannot load model.safetensors"
    elif how == "shard missing":
        shard = sorted(tmp_path.glob("*.safetensors"))[1]
        shard.unlink()
        named = f"cannot load {shard.name}"
    elif how == "index broken":
        (tmp_path / INDEX).write_text('{"weight_map": ')
        named = f"cannot load {INDEX}"
    elif how == "truncated .bin":
        cut_short(tmp_path, "pytorch_model.bin")
        named = "cannot load pytorch_model.bin"
    elif how == "no files":
        (tmp_path / "model.safetensors").unlink()
        named = "no weight files .*load_format='dummy' gives random weights"
    else:
        load_format = "safetensors"
        named = r"no weight files that folovllm reads \(it has pytorch_model.bin\); allowed: model.safetensors, "
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*{named}"):
        load(tmp_path, load_format=load_format)


def test_a_shape_without_weights_and_a_wrong_load_format_are_refused(tmp_path: Path) -> None:
    source = resolve_model("qwen3-0.6b")
    config = tiny_config("qwen3")
    with pytest.raises(ValueError, match=r"qwen3-0.6b.*without weights: pass load_format='dummy' for random ones"):
        load_decoder(LoadSpec(source, config, torch.float32, CPU))
    with pytest.raises(ValueError, match="load_format='gguf' is not valid; allowed: 'auto', 'safetensors', 'dummy'"):
        LoadSpec(source, config, torch.float32, CPU, load_format="gguf")


# ---------------------------------------------------------------------- dummy weights, memory, packing


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dummy_weights_are_those_of_hugging_faces_model(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    family, overrides = VARIANTS[variant]
    config = tiny_config(family, **overrides)
    config.save_pretrained(tmp_path)
    theirs = load_hf_model(resolve_model(str(tmp_path)), dtype, CPU, load_format="dummy", seed=5)
    decoder = Decoder(DecoderConfig.from_hf(config), 16, dtype, CPU)
    for tensor in targets(decoder).values():
        tensor.fill_(torch.nan)  # the memory is as it was found
    fill_dummy(decoder, seed=5)
    assert_same_tensors(by_name(decoder), hf_tensors(theirs))


def test_dummy_weights_give_hugging_faces_tokens(tmp_path: Path, oracle_stats: OracleStats) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    model = load_hf_model(resolve_model(str(tmp_path)), torch.float32, CPU, load_format="dummy", seed=5)
    llm = LLM(str(tmp_path), milestone="m3", load_format="dummy", seed=5, dtype="float32", device="cpu")
    prompts = [random_prompt(n, seed=n) for n in (3, 17, 50)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_same_tokens(output.outputs[0].token_ids, hf_greedy(model, prompt, 12), model, prompt, oracle_stats)


def test_no_weight_is_ever_held_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not measured: of the tensors read from the file, one is alive at a time, and none when it is over."""
    tiny_model("llama", seed=3, num_hidden_layers=4).save_pretrained(tmp_path, max_shard_size="100KB")
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def watched(*args: Any) -> Checkpoint:
        checkpoint = open_checkpoint(*args)

        def reading(stored: StoredTensor) -> Tensor:
            nonlocal most
            tensor = stored.read()
            alive.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in alive))
            return tensor

        tensors = {name: replace(t, read=partial(reading, t)) for name, t in checkpoint.tensors.items()}
        return replace(checkpoint, tensors=tensors)

    monkeypatch.setattr(weights, "open_checkpoint", watched)
    decoder = load(tmp_path)
    assert len(alive) == 2 + 1 + 4 * 9
    assert most == 1
    assert not any(ref() is not None for ref in alive)
    # And the decoder itself holds each weight once: the parts of a fused one are views of it.
    storages = {tensor.untyped_storage().data_ptr() for tensor in targets(decoder).values()}
    assert storages == {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    held = sum(p.untyped_storage().nbytes() for p in decoder.parameters())
    assert held == sum(p.nbytes for p in decoder.parameters()) == 4 * sum(p.numel() for p in decoder.parameters())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 16, 100])
def test_a_packed_layer_multiplies_as_a_plain_one(rows: int, bias: bool) -> None:
    if not packing_works():
        pytest.skip("this torch or this CPU cannot pack weights")
    layer = Linear(96, 200, bias, torch.bfloat16, CPU)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(rows, 96, generator=generator).bfloat16()
    exact = torch.nn.functional.linear(
        x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double()
    )
    before = layer(x)
    layer.pack()
    assert layer.packed is not None and layer.weight is None
    for product in (before, layer(x)):  # 2^-8 of rounding of a sum of 96 products of size 1, and of the result
        torch.testing.assert_close(product.double(), exact, rtol=2**-7, atol=2**-7 * 96**0.5)


def test_packing_leaves_float32_and_the_embedding_alone(tmp_path: Path) -> None:
    tiny_model("qwen3", seed=3, tie_word_embeddings=True).save_pretrained(tmp_path)
    wide, narrow = load(tmp_path), load(tmp_path, torch.bfloat16)
    assert all(m.packed is None and m.weight is not None for m in wide.modules() if isinstance(m, Linear))
    assert torch.equal(narrow.embedding, wide.embedding.bfloat16())
    if packing_works():
        assert all(m.packed is not None for m in narrow.modules() if isinstance(m, Linear))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_logits_are_within_rounding_of_float32(family: str, tmp_path: Path) -> None:
    """As near as Hugging Face's own bfloat16 model is, twice as far at most: packed or not."""
    model = tiny_model(family, seed=3)
    model.save_pretrained(tmp_path)
    text = random_prompt(40, seed=1)
    narrow = Paged(load(tmp_path, torch.bfloat16), TorchBackend())
    with torch.inference_mode():
        exact = model(torch.tensor([text])).logits[0]  # [L, V]
        theirs = model.bfloat16()(torch.tensor([text])).logits[0].float()
        ours = narrow.decoder.logits(narrow.step({"a": text})["a"]).float()
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm() < 0.5 * exact.norm()


def test_the_index_names_the_files_and_not_the_folder(tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path, max_shard_size="100KB")
    named = set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values())
    shutil.copy(tmp_path / min(named), tmp_path / "copy.safetensors")
    assert {file.name for file in weight_files(resolve_model(str(tmp_path)))[1]} == named
