"""Claims about ragged batches, masks that go with them, and the kernel."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from claims.chapter_5 import SCORES, TILE, UNEQUAL, VALUES, difference
from claims.ledger import Derived
from torch import Tensor
from transformers import DynamicCache

from errata.bundled_model import bundled_model, some_tokens
from errata.finding import Erratum, Evidence, claims_of
from folovllm.course.lessons.online_softmax import online_softmax


@cache
def packed() -> dict[str, list[float]]:
    """What chapter 5 measures: the largest difference of a logit from the text alone, per way and text."""
    from folovllm.course.measure.chapter_5 import packing  # only where the experiment runs

    with torch.inference_mode():
        found: dict[str, list[float]] = packing(bundled_model(), UNEQUAL)["differences"]
    return found


def one_row_and_a_mask() -> Evidence:
    """Three texts in one row of Hugging Face's forward."""
    ways = {"mask": "with a block-diagonal 4-D mask", "nothing": "with nothing but the tokens"}
    return {
        key: Derived(f"three texts in one row, {name}: largest difference of a logit", max(packed()[key]), difference)
        for key, name in ways.items()
    }


def positions_and_a_cache() -> Evidence:
    """Positions that begin again, without and with a cache."""
    ways = {"positions": "use_cache=False", "positions_with_cache": "use_cache=True"}
    return {
        key: Derived(f"positions that begin again, {name}: largest difference", max(packed()[key]), difference)
        for key, name in ways.items()
    }


def text_by_text() -> Evidence:
    """Three packed texts without a mask, one by one."""
    return {
        name: Derived(f"no mask: text {name}, {length} tokens, largest difference", most, difference)
        for name, length, most in zip("abc", UNEQUAL, packed()["nothing"], strict=True)
    }


def rotations() -> Evidence:
    """RoPE's angles for packed positions, beside those of each text alone."""
    rope: Any = bundled_model().model.rotary_emb
    hidden = torch.zeros(1, 1, bundled_model().config.hidden_size)  # RoPE takes its type and device from it
    each = [torch.arange(length)[None] for length in UNEQUAL]
    together = rope(hidden, torch.cat(each, dim=1))  # cos and sin, each [1, T, D]
    alone = [torch.cat(parts, dim=1) for parts in zip(*(rope(hidden, positions) for positions in each), strict=True)]
    most = max(float((a - b).abs().max()) for a, b in zip(together, alone, strict=True))
    return {"difference": Derived("angles of 352 packed positions, largest difference from each text's", most, "power")}


def mask_shapes() -> Evidence:
    """The masks that reach attention, for a padded batch of two texts and for its next token."""
    model, shapes = bundled_model(), list[list[int]]()
    ids, present = torch.tensor([some_tokens(5)] * 2), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])

    def seen(_: object, __: object, inputs: dict[str, Any]) -> None:
        mask: Tensor = inputs["attention_mask"]
        shapes.append(list(mask.shape))

    hook = model.model.layers[0].self_attn.register_forward_pre_hook(seen, with_kwargs=True)
    kept = DynamicCache(config=model.config)
    try:
        with torch.inference_mode():
            model(input_ids=ids, attention_mask=present, past_key_values=kept)
            later = torch.cat([present, torch.ones(2, 1, dtype=torch.long)], dim=1)
            model(input_ids=ids[:, :1], attention_mask=later, past_key_values=kept)
    finally:
        hook.remove()
    return {
        "prefill": Derived("mask in a layer, two texts of 5 columns, [B, 1, Lq, Lk]", str(shapes[0])),
        "decode": Derived("in the decode step after it", str(shapes[1])),
    }


def scripted() -> Evidence:
    """What torch.jit.script makes of a function, and what becomes of a dict that should be a tensor."""

    def attend(query: Tensor, keys: Tensor) -> Tensor:
        return torch.softmax(query @ keys.T, dim=-1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it deprecated
        graph = torch.jit.script(attend).graph
    operations = [node.kind() for node in graph.nodes() if not node.kind().startswith("prim::")]
    try:
        torch.tensor({0: [7, 2]})
        made = "is made"
    except (RuntimeError, TypeError) as error:
        made = type(error).__name__
    return {
        "graph": Derived("operations of the scripted function", ", ".join(operations)),
        "dict": Derived("a tensor of a dict of block tables", made),
    }


def rescaled() -> Evidence:
    """Sixteen scores in tiles of four: the attention of online softmax and of softmax."""
    scores, values = (torch.tensor(numbers, dtype=torch.float64) for numbers in (SCORES, VALUES))
    right, wrong = (online_softmax(scores, values[:, None], TILE, rescale=r)[-1] for r in (True, False))
    return {
        "softmax": Derived("attention by softmax over all scores", float(scores.softmax(0) @ values), ".3f"),
        "with": Derived("by online softmax", float(right.attention[0]), ".3f"),
        "without": Derived("by online softmax without the rescale", float(wrong.attention[0]), ".3f"),
        "sum-with": Derived("its sum of weights with the rescale", right.total, ".3f"),
        "sum-without": Derived("and without", wrong.total, ".3f"),
    }


ERRATA = (
    Erratum(
        "hf-cannot-pack",
        "Hugging Face cannot do ragged batching",
        (
            "packed-right",
            "packed-spread",
            "ragged-tokens",
            "score-cells-padded",
            "score-cells-packed",
            "score-cells-needed",
        ),
        experiment=one_row_and_a_mask,
    ),
    Erratum(
        "positions-are-enough",
        "To pack texts, let the positions begin again",
        ("packed-wrong", "packed-spread"),
        experiment=positions_and_a_cache,
    ),
    Erratum("all-attend-to-all", "Without a mask, all tokens attend to each other", experiment=text_by_text),
    Erratum("rope-needs-a-row", "RoPE needs a row of positions per text", experiment=rotations),
    Erratum("mask-by-length", "The mask is [B, L] or [B, L, L]", experiment=mask_shapes),
    Erratum(
        "keys-are-new-tokens",
        "Attention takes T queries and T keys",
        ("long-step-tokens", "long-step-keys", "long-step-cells", "long-step-visible", "long-step-integers"),
    ),
    Erratum(
        "dict-in-a-kernel", "A scripted function with a dict of block tables is a CUDA kernel", experiment=scripted
    ),
    Erratum("no-rescale", "Online softmax keeps a maximum and a sum, and adds up the output", formula=rescaled),
)

CLAIMS = claims_of(ERRATA)
