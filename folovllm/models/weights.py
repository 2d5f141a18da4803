"""Load a checkpoint into the decoder, tensor by tensor.

`targets` maps Hugging Face's names to our parameters. Fused weights are filled slice by slice, so at most one tensor is
in memory twice.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from folovllm.models.checkpoint import Checkpoint, StoredTensor, check_complete, open_checkpoint, other_shapes
from folovllm.models.decoder import Decoder, DecoderConfig
from folovllm.models.dummy import fill_dummy_
from folovllm.models.layers import Linear, empty_parameter
from folovllm.models.loader import LoadSpec, check_has_weights

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_decoder(spec: LoadSpec) -> Decoder:
    """Our decoder with the weights of a checkpoint, ready for inference.

    Raises ValueError for a model that the decoder does not support, for a checkpoint as `open_checkpoint` does, and for
    tensors that are missing or of another shape than the config says.
    """
    config = DecoderConfig.from_hf(spec.hf_config)
    checkpoint = None
    if spec.load_format != "dummy":
        check_has_weights(spec.source)
        checkpoint = open_checkpoint(spec.source, spec.hf_config, spec.load_format)
    max_positions = spec.max_positions or spec.hf_config.max_position_embeddings
    decoder = Decoder(config, max_positions, spec.dtype, spec.device)
    if checkpoint is None:
        fill_dummy(decoder, spec.seed)
    else:
        fill_from(checkpoint, decoder)
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


def fill_from(checkpoint: Checkpoint, decoder: Decoder) -> None:
    """Copy a checkpoint into the decoder. Raises ValueError as `load_decoder` does."""
    # As in Hugging Face's model, a tied head has a name, too.
    names = {HEAD: decoder.embedding.data} | targets(decoder)
    checkpoint.check_numbers(names, "model")
    found, unused = checkpoint.by_canonical_name(names, "model")
    untied = decoder.config.tied_embeddings and not tie(found, decoder)
    if untied:
        decoder.head.weight = empty_parameter(*decoder.embedding.shape, dtype=decoder.dtype, device=decoder.device)
        decoder.config = replace(decoder.config, tied_embeddings=False)
    wanted = targets(decoder)
    check_complete(
        checkpoint.source,
        wanted.keys() - found.keys(),
        other_shapes(found, wanted),
        unused,
        {HEAD: EMBEDDING} if untied else {},
    )
    for name, stored in found.items():
        wanted[name].copy_(stored.read())


def tie(found: dict[str, StoredTensor], decoder: Decoder) -> bool:
    """Leave one tensor of the tied pair, under the embedding's name. False if both are stored, and differ."""
    head = found.pop(HEAD, None)
    if head is None:
        return True
    embedding = found.setdefault(EMBEDDING, head)
    # transformers, too, compares them in the model's format.
    if have_same_values(embedding, head, decoder.dtype):
        return True
    found[HEAD] = head
    return False


def have_same_values(one: StoredTensor, other: StoredTensor, dtype: torch.dtype) -> bool:
    """Whether two tensors are equal once cast to `dtype`."""
    if one is other or one.shape != other.shape:
        return one is other
    return torch.equal(one.read().to(dtype), other.read().to(dtype))
