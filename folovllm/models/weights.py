"""Load a checkpoint into the decoder, tensor by tensor.

`targets` maps Hugging Face's names to our parameters. Fused weights are filled slice by slice, so at most one tensor is
in memory twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from folovllm.models.decoder import Decoder, DecoderConfig
from folovllm.models.dummy import fill_dummy_
from folovllm.models.layers import Linear
from folovllm.models.loader import LoadSpec, ModelSource, check_has_weights, some

INDEX = "model.safetensors.index.json"
IGNORED = ("rotary_emb.inv_freq",)  # in old checkpoints; computed from the config


def load_decoder(spec: LoadSpec) -> Decoder:
    """Our decoder with the weights of a checkpoint, ready for inference.

    Raises ValueError for a model that the decoder does not support, for a damaged or missing file, and for a tensor
    that is missing, unknown or of another shape than the config says.
    """
    config = DecoderConfig.from_hf(spec.hf_config)
    max_positions = spec.max_positions or spec.hf_config.max_position_embeddings
    decoder = Decoder(config, max_positions, spec.dtype, spec.device)
    if spec.load_format == "dummy":
        fill_dummy(decoder, spec.seed)
    else:
        fill_from(spec.source, decoder, spec.load_format)
    decoder.pack()
    return decoder.eval()


def targets(decoder: Decoder) -> dict[str, Tensor]:
    """Hugging Face's name of each weight -> the parameter to fill, or a slice of a fused one."""
    config = decoder.config
    found: dict[str, Tensor] = {"model.embed_tokens.weight": decoder.embedding.data}
    if not config.tied_embeddings:
        found |= _linear(decoder.head, {"lm_head": config.vocab_size})
    found["model.norm.weight"] = decoder.norm.weight.data
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for index, layer in enumerate(decoder.layers):
        name = f"model.layers.{index}"
        attention = f"{name}.self_attn"
        found[f"{name}.input_layernorm.weight"] = layer.attention_norm.weight.data
        found[f"{name}.post_attention_layernorm.weight"] = layer.mlp_norm.weight.data
        found |= _linear(
            layer.attention.qkv, {f"{attention}.q_proj": query, f"{attention}.k_proj": kv, f"{attention}.v_proj": kv}
        )
        found |= _linear(layer.attention.out, {f"{attention}.o_proj": config.hidden_size})
        if layer.attention.q_norm is not None and layer.attention.k_norm is not None:
            found[f"{attention}.q_norm.weight"] = layer.attention.q_norm.data
            found[f"{attention}.k_norm.weight"] = layer.attention.k_norm.data
        width = config.intermediate_size
        found |= _linear(layer.mlp.gate_up, {f"{name}.mlp.gate_proj": width, f"{name}.mlp.up_proj": width})
        found |= _linear(layer.mlp.down, {f"{name}.mlp.down_proj": config.hidden_size})
    return found


def _linear(layer: Linear, rows: dict[str, int]) -> dict[str, Tensor]:
    """The slices of a (fused) layer. rows: name of each layer in it -> its rows, in order."""
    found: dict[str, Tensor] = {}
    for kind, tensor in (("weight", layer.weight), ("bias", layer.bias)):
        if tensor is not None:
            parts = tensor.data.split(list(rows.values()))
            found |= {f"{name}.{kind}": part for name, part in zip(rows, parts, strict=True)}
    return found


def fill_dummy(decoder: Decoder, seed: int) -> None:
    """Random weights, equal to those of Hugging Face's model with `load_format="dummy"` and the same config."""
    for name, target in targets(decoder).items():
        if name.endswith("norm.weight"):
            target.fill_(1.0)
        fill_dummy_(name, target, seed)


def fill_from(source: ModelSource, decoder: Decoder, load_format: str) -> None:
    """Copy a checkpoint into the decoder. Raises ValueError as `load_decoder` does."""
    check_has_weights(source)
    folder = Path(source.path_or_id) if source.kind != "hub" else _download(source)
    wanted = targets(decoder)
    tied = decoder.config.tied_embeddings
    for name, tensor in read_tensors(source, folder, load_format):
        if name.endswith(IGNORED) or (tied and name == "lm_head.weight"):
            continue
        target = wanted.pop(name, None)
        if target is None:
            raise ValueError(f"{source}: the checkpoint has {name}, which is no weight of a {decoder.config}")
        if target.shape != tensor.shape:
            raise ValueError(
                f"{source}: the checkpoint has another shape than config.json says for {name} "
                f"(file {list(tensor.shape)}, config {list(target.shape)})"
            )
        target.copy_(tensor)
    if wanted:
        raise ValueError(f"{source}: the checkpoint lacks {some(list(wanted))}")


def read_tensors(source: ModelSource, folder: Path, load_format: str) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a checkpoint, in the order of the files.

    Safetensors files are memory-mapped. Without any, "auto" takes PyTorch's own files. Raises ValueError for a
    file that cannot be read.
    """
    try:
        files = weight_files(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source}: cannot load {INDEX}: {error}") from error
    if files:
        for file in files:
            try:
                with safe_open(file, framework="pt") as weights:
                    for name in weights.keys():  # noqa: SIM118 (it is no dict)
                        yield name, weights.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{source}: cannot load {file.name}: {error}") from error
        return
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    if load_format == "safetensors" or not pickled:
        raise ValueError(f"{source}: the folder has no *.safetensors; load_format='dummy' gives random weights")
    for file in pickled:
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
            raise ValueError(f"{source}: cannot load {file.name}: {error}") from error
        yield from tensors.items()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: those of its index, or model.safetensors, or all in the folder."""
    if (folder / INDEX).is_file():
        names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def _download(source: ModelSource) -> Path:
    try:
        return Path(snapshot_download(source.path_or_id, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot get the weights of {source.name!r} from the hub or its cache: {error}") from error
