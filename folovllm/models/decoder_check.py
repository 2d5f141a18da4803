"""Check at load that our decoder computes what Hugging Face's model does, for a config that was not seen before.

`DecoderConfig` takes what it knows from a config. A field that it does not know, or takes in another sense, would give
plausible but wrong text. So a small copy of the config is run by both, with the same random weights, in float32:

    one layer of each kind, at most 4 heads of the true size, a window of at most 8 tokens, a vocabulary of 64
    24 tokens, more than the window, at positions spread over the model's length: a scaled RoPE differs only far out

Answers are kept in the user's cache folder, one file per small copy and version: the next start need not import
Hugging Face's modelling code. If the folder cannot be written, the check runs in every start.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig

from folovllm.attention import backend, reference
from folovllm.attention.backend import LayerKV
from folovllm.attention.metadata import AttentionMetadata
from folovllm.attention.reference import ReferenceBackend
from folovllm.models import decoder, layers, weights
from folovllm.models.decoder import Decoder, DecoderConfig
from folovllm.models.dummy import build_dummy_model
from folovllm.models.weights import targets

NUM_TOKENS = 24
MAX_WINDOW = 8
VOCAB_SIZE = 64
MAX_POSITIONS = 2**14  # the table of RoPE is this long at most
TOLERANCE = 1e-4  # relative distance of two rows of logits; rounding gives about 1e-6, a mistake 1e-3 or more
CHECKED = (backend, reference, decoder, layers, weights)  # an edit of one of these modules makes old answers void
# What model code raises when it is called in an unforeseen way.
MODEL_ERRORS = (ValueError, TypeError, AttributeError, RuntimeError, KeyError, IndexError, AssertionError)


def how_decoder_differs(hf_config: PretrainedConfig) -> str | None:
    """Why our decoder would not give Hugging Face's tokens for this config; None if it does.

    hf_config: one that `DecoderConfig.from_hf` accepts.
    """
    small = small_copy(hf_config)
    file = cache_folder() / f"decoder-{digest(small)}.json"
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["differs"]) or None
    except (OSError, ValueError, KeyError, TypeError):  # no answer yet, or no whole one
        pass
    try:
        with torch.device("cpu"):  # whatever the process's default is
            found = compare(small)
    except MODEL_ERRORS as error:
        return f"a small copy of its config cannot be run: {error or type(error).__name__}"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps({"differs": found or ""}), encoding="utf-8")
        unfinished.replace(file)  # another process never sees half an answer
    except OSError:
        pass
    return found


def small_copy(hf_config: PretrainedConfig) -> PretrainedConfig:
    """The config with one layer of each kind, and everything small that no field's meaning depends on."""
    small = copy.deepcopy(hf_config)
    heads = hf_config.num_attention_heads
    kv_heads = min(hf_config.num_key_value_heads, 2)
    small.num_key_value_heads = kv_heads
    small.num_attention_heads = kv_heads * min(heads // hf_config.num_key_value_heads, 2)
    # As many columns per head as before: head_dim may be this number, or one of its own.
    small.hidden_size = small.num_attention_heads * (hf_config.hidden_size // heads)
    small.intermediate_size = 96
    small.vocab_size = VOCAB_SIZE
    small.pad_token_id = small.bos_token_id = small.eos_token_id = None
    kinds = list(dict.fromkeys(getattr(hf_config, "layer_types", None) or ["all"]))
    small.num_hidden_layers = len(kinds)
    if kinds != ["all"]:
        small.layer_types = kinds
    if isinstance(getattr(hf_config, "sliding_window", None), int):
        small.sliding_window = min(hf_config.sliding_window, MAX_WINDOW)
    return small


@torch.inference_mode()
def compare(small: PretrainedConfig) -> str | None:
    """Run both with the same weights: how they differ, or None. Raises what either of them raises."""
    device = torch.device("cpu")
    theirs = build_dummy_model(small, torch.float32, device, 0, "eager").eval()
    generator = torch.Generator().manual_seed(0)
    parameters = {name: parameter.data for name, parameter in theirs.named_parameters()}
    for parameter in parameters.values():
        if parameter.ndim == 1:  # biases and norm weights: at 0 and 1 a forgotten one could not be seen
            parameter.normal_(1.0, 0.3, generator=generator)
    num_positions = min(small.max_position_embeddings, MAX_POSITIONS)
    ours = Decoder(DecoderConfig.from_hf(small), num_positions, torch.float32, device)
    wanted = targets(ours)
    if wanted.keys() != parameters.keys():
        return f"only one of both has the weights {sorted(wanted.keys() ^ parameters.keys())}"
    for name, target in wanted.items():
        target.copy_(parameters[name])

    count = min(NUM_TOKENS, num_positions)
    token_ids = torch.randint(VOCAB_SIZE, (count,), generator=generator)  # [T]
    positions = torch.linspace(0, num_positions - 1, count).long()  # [T]
    # The mask says that this is one text: positions with gaps alone would be taken for several.
    expected = theirs(
        input_ids=token_ids[None],
        attention_mask=torch.ones(1, count, dtype=torch.long),
        position_ids=positions[None],
        use_cache=False,
    ).logits[0]  # [T, V]
    found = our_logits(ours, token_ids, positions)
    distance = float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
    if distance <= TOLERANCE:  # not true for NaN
        return None
    return (
        f"on a small copy of its config the logits are {distance:.1e} away from Hugging Face's (relative to their "
        f"size); allowed: at most {TOLERANCE:.0e}"
    )


def our_logits(model: Decoder, token_ids: Tensor, positions: Tensor) -> Tensor:
    """Logits of every token of one text, [T, V], computed in one step, with all K/V in block 1."""
    count = len(token_ids)
    meta = AttentionMetadata(
        query_start_loc=torch.tensor([0, count], dtype=torch.int32),
        seq_lens=torch.tensor([count], dtype=torch.int32),
        slot_mapping=count + torch.arange(count),
        block_table=torch.tensor([[1]], dtype=torch.int32),
        block_size=count,
        query_lens=[count],
        kv_lens=[count],
        tables=[(1,)],
    )
    shape = (2, count, model.config.num_kv_heads, model.config.head_dim)
    kv = [LayerKV(torch.zeros(shape), torch.zeros(shape)) for _ in model.layers]
    return model.logits(model(token_ids, positions, kv, meta, ReferenceBackend()))


def digest(small: PretrainedConfig) -> str:
    """A name for the answer: of the small copy, of the versions, and of the sources that stand for ours."""
    sources = [hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest() for module in CHECKED]
    versions = [torch.__version__, transformers.__version__]
    text = json.dumps([small.to_dict(), versions, sources], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def cache_folder() -> Path:
    """Where this user's programs keep what they can compute again, by the customs of the platform."""
    home = Path.home()
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "folovllm"
    if platform.system() == "Darwin":
        return home / "Library" / "Caches" / "folovllm"
    if platform.system() == "Windows":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "folovllm"
    return home / ".cache" / "folovllm"
