"""What a checkpoint holds, and whether it can be loaded: one set of rules for both readers, before a weight is read.

Our decoder (`folovllm.models.weights`) and Hugging Face's models (`folovllm.models.loader`) both start with
`open_checkpoint`. The rules are those of transformers' `modeling_utils` and `core_model_loading`:

1. The first of `WEIGHT_FILES` counts. Other weight files in the folder are not read, and a download asks for no others.
2. An index names the files, and every tensor in them counts. Of two with one name, the one in the last file counts.
3. Names may lack the prefix of the body (`model.`), or have it once too often: `canonical_name`.
4. Tensors that the model does not use are skipped with a warning that names them; a missing one is an error.

Two rules are ours, because transformers would take the numbers as they are: a quantized checkpoint is an error, and so
is a weight in any other format than `DTYPES`.
"""

from __future__ import annotations

import logging
import os
import re
import textwrap
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from folovllm.checks import invalid
from folovllm.models.hub import why_not_the_hub

logger = logging.getLogger(__name__)

WEIGHT_FILES = (  # in this order
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
DTYPES = ("float32", "float16", "bfloat16", "float64")  # of weights in a file
DOWNLOAD_ADVICE = (
    "to use a model from the hub, run `hf download ORG/NAME --local-dir DIR` and pass DIR, "
    "or pass the id ORG/NAME where there is a network"
)
# What transformers, safetensors, torch and json raise for a bad checkpoint.
LOAD_ERRORS = (
    OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, AssertionError, EOFError, UnpicklingError,
    SafetensorError, StrictDataclassError,
)  # fmt: skip

_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_OTHER_FORMATS = (  # of files with weights
    "adapter_config.json", "*.safetensors", "*.bin", "*.gguf", "*.pth", "*.pt", "*.ckpt", "*.h5", "*.msgpack", "*.onnx",
    "*.npz",
)  # fmt: skip
_ADAPTER = "adapter_config.json"
_DISTRIBUTED = "shard-*-model-*-of-*.safetensors"  # transformers prefers these, and reads them on many devices only
_QUANTIZATION_FIELDS = ("quantization_config", "compression_config")
_QUANTIZATION_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
# Tensors that only quantized weights have: GPTQ, AWQ; compressed-tensors, FP8; bitsandbytes; MXFP4; torchao; HQQ.
_QUANTIZED_NAME = re.compile(
    r"\.(qweight|qzeros|weight_packed|weight_scale(_\w+)?|SCB|weight\.(absmax|quant_\w+)\S*|W_q)$"
    r"|_proj_(blocks|scales)$|\.weight:\w+$"
)
_COMPUTED = "rotary_emb.inv_freq"  # in old checkpoints; computed from the config


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are."""

    name: str
    path_or_id: str  # what `from_pretrained` takes: a folder, or a hub id
    kind: Literal["bundled", "config", "local", "hub"]
    has_weights: bool  # False for bundled configs and folders without weight files; assumed for a hub id

    @cached_property
    def cache_only(self) -> str | None:
        """Why a hub id is looked up in the cache alone; None if the hub answers. The hub is asked on first use."""
        return why_not_the_hub(self.path_or_id) if self.kind == "hub" else None

    @property
    def local_files_only(self) -> bool:
        """The argument of that name in transformers and huggingface_hub."""
        return self.cache_only is not None

    def __str__(self) -> str:
        return self.name if self.kind == "bundled" else f"{self.name} ({self.path_or_id})"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not yet read."""

    shape: tuple[int, ...]
    dtype: str  # as in `DTYPES`, or the file's own word for another format
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model's weight files, by the names in the files."""

    source: ModelSource
    folder: Path  # of config.json; for a hub id, in the cache
    tensors: Mapping[str, StoredTensor]

    def odd_tensors(self) -> dict[str, StoredTensor]:
        """Tensors that may be no plain numbers, by format or name. Nearly always none."""
        return {n: t for n, t in self.tensors.items() if t.dtype not in DTYPES or _QUANTIZED_NAME.search(n)}

    def check_numbers(self, weights: Mapping[str, Tensor], prefix: str) -> None:
        """Raise ValueError if the model would take numbers that are none.

        weights: all parameters and buffers of the model by Hugging Face's names; prefix: as in `canonical_name`.
        """
        others = []
        for name, stored in self.odd_tensors().items():
            target = weights.get(canonical_name(name, weights, prefix))
            if target is None and _QUANTIZED_NAME.search(name):
                raise _quantized(self.source, f"it has {name}")
            # A weight under an unknown name may be a part of a fused one.
            is_weight = name.endswith("weight") if target is None else target.is_floating_point()
            if is_weight and stored.dtype not in DTYPES:
                others.append(f"{name} ({stored.dtype})")
        if others:
            raise ValueError(
                f"{self.source}: the checkpoint has weights in another format than {', '.join(DTYPES)}: {some(others)}"
            )

    def by_canonical_name(self, known: Collection[str], prefix: str) -> tuple[dict[str, StoredTensor], list[str]]:
        """The tensors under the names of `known`, and the names of all others."""
        found: dict[str, StoredTensor] = {}
        others = []
        # Of two names for one weight transformers takes the first in the order of their parts.
        for name in sorted(self.tensors, key=lambda name: name.split(".")):
            target = canonical_name(name, known, prefix)
            if target in known:
                found.setdefault(target, self.tensors[name])
            elif _COMPUTED not in name:
                others.append(name)
        return found, others


def open_checkpoint(source: ModelSource, hf_config: PretrainedConfig, load_format: str = "auto") -> Checkpoint:
    """Find a model's weight files, download those of a hub id, and list their tensors. No weight is read.

    load_format: "safetensors" takes no other files. Raises ValueError for a quantized checkpoint, an adapter, files in
    other formats only, and for a file that is missing or damaged.
    """
    method = quantization_method(vars(hf_config))
    if method is not None:
        raise _quantized(source, f"config.json says {method}")
    if source.kind != "hub":
        _check_folder(source, Path(source.path_or_id))
    folder, files = weight_files(source, load_format, getattr(hf_config, "transformers_weights", None))
    _check_folder(source, folder)  # of a hub id, what an earlier download left beside the weights
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            tensors |= _list_safetensors(file) if file.suffix == ".safetensors" else _list_pickled(file)
        except LOAD_ERRORS as error:
            if _is_lfs_pointer(file):
                raise ValueError(f"{source}: {file.name} is a Git LFS pointer; `git lfs pull` gets the file") from error
            raise load_error(source, file.name, error) from error
    return Checkpoint(source, folder, tensors)


def weight_files(source: ModelSource, load_format: str = "auto", named: str | None = None) -> tuple[Path, list[Path]]:
    """The model's folder, and the files of its weights: a later one counts more. A hub id is downloaded.

    named: the file or index that config.json names (`transformers_weights`). Raises ValueError if there are none.
    """
    names = (named,) if named else WEIGHT_FILES[:2] if load_format == "safetensors" else WEIGHT_FILES
    where, offline = source.path_or_id, source.local_files_only
    if named:
        _check_named(source, named)
    for name in names:
        try:
            # transformers' own functions: for a folder they look, for a hub id they also download.
            file = cached_file(where, name, local_files_only=offline, _raise_exceptions_for_missing_entries=False)
            if file is None:
                continue
            files = [file]
            if name.endswith(".index.json"):
                files = get_checkpoint_shard_files(where, file, local_files_only=offline)[0]
        except LOAD_ERRORS as error:
            raise load_error(source, name, error) from error
        if files:
            return Path(file).parents[len(Path(name).parts) - 1], [Path(shard) for shard in files]
        raise ValueError(f"{source}: cannot load {name}: it names no file")
    if source.kind == "hub":
        raise load_error(source, "the weights", FileNotFoundError(f"it has none of {', '.join(names)}"))
    raise ValueError(
        f"{source}: the folder has no weight files that folovllm reads{other_formats(Path(where))}; allowed: "
        f"{', '.join(names)} (an index with its shards); load_format='dummy' gives random weights"
    )


def other_formats(folder: Path) -> str:
    """The files with weights in a folder, for the error that none of them can be read."""
    found = sorted({file.name for pattern in _OTHER_FORMATS for file in folder.glob(pattern)})
    return f" (it has {some(found)})" if found else ""


def canonical_name(name: str, known: Collection[str], prefix: str) -> str:
    """The model's name for a name in a file, as transformers' `rename_source_key` has it.

    known: the names of the model; prefix: that of its body, "model" in most.
    """
    if name.startswith(prefix) and name[len(prefix) + 1 :] in known:
        return name[len(prefix) + 1 :]
    return f"{prefix}.{name}" if f"{prefix}.{name}" in known else name


def other_shapes(
    found: Mapping[str, StoredTensor], weights: Mapping[str, Tensor]
) -> list[tuple[str, Iterable[int], Iterable[int]]]:
    """The tensors whose shape is not that of the weight they are for: name, shape in the file, shape of the weight."""
    return [(n, t.shape, weights[n].shape) for n, t in found.items() if t.shape != tuple(weights[n].shape)]


def check_complete(
    source: ModelSource,
    missing: Iterable[str] = (),
    mismatched: Iterable[tuple[str, Iterable[int], Iterable[int]]] = (),
    unused: Iterable[str] = (),
    untied: Mapping[str, str] | None = None,
) -> None:
    """Raise ValueError for missing tensors and for shapes (file, config) that differ; warn of what else is odd.

    unused: tensors that the model does not have. untied: of a tied pair that is stored as two different tensors, the
    name of the head -> that of the embedding.
    """
    if missing := sorted(missing):
        raise ValueError(f"{source}: the checkpoint lacks {some(missing)}")
    shapes = [f"{name} (file {list(found)}, config {list(expected)})" for name, found, expected in sorted(mismatched)]
    if shapes:
        raise ValueError(f"{source}: the checkpoint has another shape than config.json says for {some(shapes)}")
    if unused := sorted(unused):
        logger.warning("%s: the model has no weights of these names, skipped: %s", source, some(unused))
    for head, embedding in (untied or {}).items():
        logger.warning(
            "%s: config.json ties %s to %s, but the checkpoint has both, and they differ: both are used",
            source, head, embedding,
        )  # fmt: skip


def quantization_method(fields: Mapping[str, Any]) -> str | None:
    """The quantization that a config declares, for the whole model or a part of it; None for plain weights."""
    for name in _QUANTIZATION_FIELDS:
        if fields.get(name) is not None:
            return f"{name}: {_method_name(fields[name], name)}"
    mlx = fields.get("quantization")
    if isinstance(mlx, dict) and "bits" in mlx:
        return f"quantization: mlx, {mlx['bits']} bits"
    parts = (vars(part) if isinstance(part, PretrainedConfig) else part for part in fields.values())
    return next(filter(None, (quantization_method(part) for part in parts if isinstance(part, dict))), None)


def some(items: list[str]) -> str:
    """The first four items, and the number of the others."""
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")


def load_error(source: ModelSource, what: str, error: BaseException) -> ValueError:
    """The ValueError for any failure to load `what`. If a hub id cannot be downloaded, it says what to do instead."""
    reason = textwrap.shorten(str(error) or type(error).__name__, width=300, placeholder=" …")
    if source.kind == "hub" and isinstance(error, OSError):
        hub = "the hub" if source.cache_only is None else f"the hub ({source.cache_only})"
        return ValueError(f"cannot get {what} of {source.name!r} from {hub} or its cache: {reason}; {DOWNLOAD_ADVICE}")
    return ValueError(f"{source}: cannot load {what}: {reason}")


def _quantized(source: ModelSource, reason: str) -> ValueError:
    return ValueError(f"{source}: the checkpoint is quantized ({reason}); allowed: weights in {', '.join(DTYPES)}")


def _method_name(given: Any, field: str) -> str:
    if not isinstance(given, dict):
        return str(given)
    if field == "compression_config":
        return "compressed-tensors"
    for name in ("quant_method", "quant_algo"):
        if given.get(name):
            return str(given[name])
    bits = next((bits for bits in (4, 8) if given.get(f"load_in_{bits}bit")), None)
    return f"bitsandbytes, {bits} bits" if bits else "unknown method"


def _check_folder(source: ModelSource, folder: Path) -> None:
    """Raise ValueError for a folder whose weights, by other files in it, are not what they seem."""
    for name, method in _QUANTIZATION_FILES.items():
        if (folder / name).is_file():
            raise _quantized(source, f"{name}: {method}")
    if (folder / _ADAPTER).is_file():  # transformers adds it to the weights, or not, depending on an installed package
        raise ValueError(f"{source}: {_ADAPTER} makes it an adapter; allowed: the whole model, adapters merged into it")
    if shard := next(folder.glob(_DISTRIBUTED), None):
        raise ValueError(f"{source}: {shard.name} is of a distributed checkpoint; allowed: {', '.join(WEIGHT_FILES)}")


def _check_named(source: ModelSource, named: Any) -> None:
    """Raise ValueError for a `transformers_weights` that transformers does not take."""
    base = os.path.abspath(source.path_or_id)
    inside = isinstance(named, str) and os.path.abspath(os.path.join(base, named)).startswith(base + os.sep)
    if not inside or not named.endswith((".safetensors", ".safetensors.index.json")):
        allowed = "a *.safetensors or *.safetensors.index.json file in the model's folder"
        raise ValueError(f"{source}: {invalid('transformers_weights', named, allowed)}")


def _list_safetensors(file: Path) -> dict[str, StoredTensor]:
    weights = safe_open(file, framework="pt")  # closed with the last StoredTensor; memory-mapped
    found = {}
    for name in weights.keys():  # noqa: SIM118 (it is no dict)
        header = weights.get_slice(name)
        dtype = _SAFETENSORS_DTYPES.get(header.get_dtype(), header.get_dtype())
        found[name] = StoredTensor(tuple(header.get_shape()), dtype, partial(weights.get_tensor, name))
    return found


def _list_pickled(file: Path) -> dict[str, StoredTensor]:
    # The format before torch 1.6 is no zip file, and cannot be memory-mapped.
    tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    found = {}
    for name, value in tensors.items():  # also of other things than tensors
        if not isinstance(name, str):
            raise TypeError(f"the name {name!r} is no text")
        dtype = str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
        found[name] = StoredTensor(tuple(getattr(value, "shape", ())), dtype, partial(tensors.get, name))
    return found


def _is_lfs_pointer(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(42) == b"version https://git-lfs.github.com/spec/v1"
