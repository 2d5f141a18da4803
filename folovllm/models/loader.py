"""Find the files of a model, and load its config, tokenizer and Hugging Face model.

A name is, in this order: a bundled model, a folder, a hub id (`org/name`). What a checkpoint may look like is in
`folovllm.models.checkpoint`. `from_pretrained` only warns if it initialises missing tensors at random; here it is an
error.

Annotations say `transformers.PreTrainedModel` because importing that name loads torch's compiler and Triton.
"""

from __future__ import annotations

import logging
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from folovllm.checks import check_choice, invalid
from folovllm.config import DTYPES, LOAD_FORMATS
from folovllm.models.checkpoint import (
    DOWNLOAD_ADVICE,
    LOAD_ERRORS,
    ModelSource,
    check_complete,
    load_error,
    open_checkpoint,
    other_formats,
    other_shapes,
    some,
)
from folovllm.models.dummy import build_dummy_model

logger = logging.getLogger(__name__)

BUNDLED_MODEL = "folo-tiny"
BUNDLED_CONFIGS = {  # shape without weights -> the hub id that has them
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
}
BUNDLED = (BUNDLED_MODEL, *BUNDLED_CONFIGS)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class LoadSpec:
    """A model to load, and how. Raises ValueError for an unknown load_format."""

    source: ModelSource
    hf_config: PretrainedConfig
    dtype: torch.dtype
    device: torch.device
    load_format: str = "auto"  # as in `load_hf_model`
    seed: int = 0  # of dummy weights
    max_positions: int | None = None  # tokens that a request may have; None: as many as the config allows

    def __post_init__(self) -> None:
        check_choice("load_format", self.load_format, LOAD_FORMATS)


def resolve_model(model: str) -> ModelSource:
    """Find the files of `model`. Only looks at folders, and uses no network.

    Raises ValueError for an unknown bare name, a path that does not exist, a file, or a folder without config.json.
    """
    if not isinstance(model, str) or not model.strip():
        raise invalid("model", model, "a bundled name, a folder or a hub id")
    lowered = model.lower()
    if lowered == BUNDLED_MODEL:
        return ModelSource(lowered, str(_asset(lowered)), "bundled", has_weights=True)
    if lowered in BUNDLED_CONFIGS:
        return ModelSource(lowered, str(_asset("configs", lowered)), "config", has_weights=False)

    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(
                f"model={model!r} is a folder without config.json{other_formats(path)}, so it is not a Hugging Face "
                "model; allowed: a folder with config.json and the weights"
            )
        has_weights = any(True for pattern in _WEIGHT_FILES for _ in path.glob(pattern))
        return ModelSource(path.resolve().name, str(path), "local", has_weights)
    if path.exists():
        raise ValueError(f"model={model!r} is a file; pass the folder that holds config.json and the weights")
    if _HUB_ID.fullmatch(model):
        return ModelSource(model, model, "hub", has_weights=True)
    if "/" in model or "\\" in model or model.startswith((".", "~")):
        raise ValueError(f"model={model!r} looks like a path, but there is no such folder; {DOWNLOAD_ADVICE}")
    raise ValueError(f"model={model!r} is unknown; bundled models are {', '.join(BUNDLED)}; {DOWNLOAD_ADVICE}")


def load_config(source: ModelSource) -> PretrainedConfig:
    """The model's config.json as a Hugging Face config. Raises ValueError if it is missing or cannot be read."""
    try:
        with _quiet():
            return AutoConfig.from_pretrained(
                source.path_or_id, local_files_only=source.local_files_only, trust_remote_code=False
            )
    except LOAD_ERRORS as error:
        raise load_error(source, "config.json", error) from error


def load_generation_config(source: ModelSource) -> GenerationConfig | None:
    """The model's generation_config.json. Without one, what config.json has of it, as transformers does; or None.

    Raises ValueError if the file of a folder or a bundled model cannot be read.
    """
    offline = source.local_files_only
    has_file = source.kind == "hub" or (Path(source.path_or_id) / "generation_config.json").is_file()
    try:
        with _quiet():
            try:
                if has_file:
                    return GenerationConfig.from_pretrained(source.path_or_id, local_files_only=offline)
            except OSError:
                if source.kind != "hub":  # if the hub has the model, it does not have this file
                    raise
            return GenerationConfig.from_pretrained(
                source.path_or_id, config_file_name="config.json", local_files_only=offline, _from_model_config=True
            )
    except LOAD_ERRORS as error:
        if source.kind == "hub" and isinstance(error, OSError):
            return None
        raise load_error(source, "generation_config.json" if has_file else "config.json", error) from error


def generation_config_of(folder: str) -> GenerationConfig:
    """The generation_config.json of a folder other than the model's. Raises ValueError if there is none to read."""
    path = Path(folder).expanduser()
    if not (path / "generation_config.json").is_file():
        raise invalid("generation_config", folder, "'auto', 'vllm' or a folder with a generation_config.json")
    try:
        with _quiet():
            return GenerationConfig.from_pretrained(str(path))
    except LOAD_ERRORS as error:
        raise invalid("generation_config", folder, f"a file that can be read: {error}") from error


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer; None for a bundled config and a folder without tokenizer files.

    Raises ValueError if it cannot be downloaded or read.
    """
    if source.kind == "config":
        return None
    if source.kind == "local" and not has_tokenizer(Path(source.path_or_id)):
        return None
    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(
                source.path_or_id, local_files_only=source.local_files_only, trust_remote_code=False
            )
    except (*LOAD_ERRORS, ImportError) as error:
        raise load_error(source, "the tokenizer", error) from error


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has the files of a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def resolve_tokenizer(tokenizer: str) -> ModelSource:
    """Find the files of a tokenizer: a bundled name, a folder or a hub id, as in `resolve_model`.

    A folder needs no config.json. Raises ValueError for what `resolve_model` refuses, and without tokenizer files.
    """
    path = Path(tokenizer).expanduser()
    if path.is_dir():
        if not has_tokenizer(path):
            raise invalid("tokenizer", tokenizer, f"a folder with one of {', '.join(_TOKENIZER_FILES)}")
        return ModelSource(path.resolve().name, str(path), "local", has_weights=False)
    source = resolve_model(tokenizer)
    if source.kind == "config":
        raise invalid("tokenizer", tokenizer, f"a model with one; {tokenizer} is bundled as a shape")
    return source


def eos_token_ids(
    hf_config: PretrainedConfig,
    generation_config: GenerationConfig | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[int, ...]:
    """The ids that end a sequence, in the order given, without repeats; empty if none are known.

    generation_config.json comes first (chat models list several there), then config.json, then the tokenizer. An id
    without a row in the model is never sampled. Such ids are left out, with one warning.
    """
    vocab_size = hf_config.get_text_config().vocab_size
    for holder in (generation_config, hf_config, hf_config.get_text_config(), tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None and ids != []:
            given = list(dict.fromkeys(ids if isinstance(ids, (list, tuple)) else [ids]))
            found = [i for i in given if isinstance(i, int) and 0 <= i < vocab_size]
            if found != given:
                others = [i for i in given if i not in found]
                logger.warning("eos_token_id %s: not in [0, %d), the model's ids, and left out", others, vocab_size)
            return tuple(found)
    return ()


def special_token_ids(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, int]:
    """The ids of the tokens that decoding with skip_special_tokens=True leaves out, by name."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {token.content: token_id for token_id, token in added.items() if token.special}


def load_hf_model(
    source: ModelSource,
    dtype: torch.dtype,
    device: torch.device,
    load_format: str = "auto",
    seed: int = 0,
    attn_implementation: str | None = None,
) -> transformers.PreTrainedModel:
    """The model on `device` in `dtype`, ready for inference: eval mode, KV cache on, no gradients.

    load_format: "auto" takes any weight files, "safetensors" only those, "dummy" none of them (random weights of
    `folovllm.models.dummy`, from `seed`). attn_implementation: None is SDPA, or "eager" for a model without it. Raises
    ValueError, chained to its cause, if the weights are missing or damaged, lack a tensor, or have another shape than
    the config says.
    """
    check_choice("load_format", load_format, LOAD_FORMATS)
    config = load_config(source)
    if load_format == "dummy":
        with _quiet():
            model = build_dummy_model(config, dtype, device, seed, attn_implementation)
            model.generation_config = load_generation_config(source) or model.generation_config
    else:
        model = _load_checkpoint(source, config, dtype, device, load_format, attn_implementation)
    model.config.use_cache = True
    return model.eval().requires_grad_(False)


def resolve_dtype(dtype: str | torch.dtype, hf_config: PretrainedConfig, device: torch.device) -> torch.dtype:
    """The number format to compute in.

    "auto" on a GPU: the checkpoint's own 16-bit format; for a float32 checkpoint bfloat16, or float16 where the GPU
    has no bfloat16. "auto" on a CPU: bfloat16 if the checkpoint is bfloat16 and the CPU computes with it natively,
    else float32. float16 is much slower than float32 on a CPU, so it is used there only if asked for by name.
    Raises ValueError for another name or type.
    """
    if isinstance(dtype, torch.dtype) and dtype in (torch.float32, torch.bfloat16, torch.float16):
        return dtype
    check_choice("dtype", dtype, DTYPES)
    if dtype != "auto":
        return getattr(torch, str(dtype))
    stored = hf_config.dtype or hf_config.get_text_config().dtype
    if device.type == "cpu":
        return torch.bfloat16 if stored == torch.bfloat16 and cpu_has_bfloat16() else torch.float32
    if stored == torch.float16 or not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def resolve_device(device: str) -> torch.device:
    """ "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N". Raises ValueError for others and absent GPUs."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        return torch.device("cpu")
    found = re.fullmatch(r"cuda(?::(\d+))?", device) if isinstance(device, str) else None
    if found is None:
        raise invalid("device", device, "auto, cpu, cuda, cuda:N")
    if int(found[1] or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={device!r} is not available: torch sees {torch.cuda.device_count()} CUDA devices")
    return torch.device(device)


@cache
def cpu_has_bfloat16() -> bool:
    """Whether this CPU has bfloat16 dot products (x86 AVX512-BF16 or AMX, Arm BF16); else they are emulated.

    Read from /proc/cpuinfo on Linux; False elsewhere.
    """
    if platform.system() != "Linux":
        return False
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return re.search(r"^(?:flags|Features)\s*:.*\b(?:avx512_bf16|amx_bf16|bf16)\b", flags, re.MULTILINE) is not None


def _asset(*parts: str) -> Path:
    return Path(str(files("folovllm").joinpath("assets", *parts)))


def _load_checkpoint(
    source: ModelSource,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    load_format: str,
    attn_implementation: str | None,
) -> transformers.PreTrainedModel:
    check_has_weights(source)
    checkpoint = open_checkpoint(source, config, load_format)
    if checkpoint.odd_tensors():
        checkpoint.check_numbers(*_weights_of(config))
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(checkpoint.folder),
                config=config,
                dtype=dtype,
                attn_implementation=attn_implementation,
                use_safetensors=True if load_format == "safetensors" else None,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # reported below, in one message
                output_loading_info=True,  # makes the result a pair, which its type does not say
            )
    except LOAD_ERRORS as error:
        # A tied head of another shape, for one, makes transformers compare what it never loaded.
        try:
            weights, prefix = _weights_of(config)
        except LOAD_ERRORS:  # the config itself cannot be followed
            raise load_error(source, "the weights", error) from error
        found, _ = checkpoint.by_canonical_name(weights, prefix)
        check_complete(source, mismatched=other_shapes(found, weights))
        raise load_error(source, "the weights", error) from error
    model, info = loaded
    if source.kind == "hub":  # only the weights are sure to be in the folder
        model.generation_config = load_generation_config(source) or model.generation_config
    if info["error_msgs"]:
        raise ValueError(f"{source}: the checkpoint cannot be loaded: {some(list(info['error_msgs']))}")
    tied = model.all_tied_weights_keys
    declared = model.get_expanded_tied_weights_keys(all_submodels=True)
    check_complete(
        source,
        set(info["missing_keys"]) - set(tied),
        info["mismatched_keys"],
        info["unexpected_keys"],
        {head: embedding for head, embedding in declared.items() if head not in tied},
    )
    return model.to(device)


def _weights_of(config: PretrainedConfig) -> tuple[dict[str, torch.Tensor], str]:
    """The weights of Hugging Face's model by name, without their values, and the prefix of those of its body."""
    with _quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model.state_dict(), model.base_model_prefix


def check_has_weights(source: ModelSource) -> None:
    """Raise ValueError for a bundled shape, which has no weights."""
    if source.kind == "config":
        raise ValueError(
            f"model={source.name!r} is bundled as a shape without weights: pass load_format='dummy' for random ones, "
            f"or the hub id {BUNDLED_CONFIGS[source.name]!r} for the real ones"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Turn off transformers' progress bars and warnings, and restore the settings afterwards."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
