"""The figures of chapter 2."""

from __future__ import annotations

from typing import Any

import torch
from claims import chapter_2
from claims.ledger import result
from matplotlib.figure import Figure
from traces import traced_requests

from folovllm.course.viz.sampling import Release, filter_stages, text_release
from folovllm.course.viz.timeline import phase_times, request_gantt
from folovllm.engine.detokenizer import Detokenizer
from folovllm.models.loader import load_hf_model, resolve_model
from folovllm.sampling.logits import apply_min_p, apply_temperature, apply_top_k, apply_top_p

FILTER_PROMPT = "The cache"


def draw_gantt() -> Figure:
    """Three requests at M1: one at a time."""
    steps, outputs = traced_requests()
    endings = {o["request_id"]: o["finish_reason"] for o in result(chapter_2.TINY)["trace"]["outputs"]}
    return request_gantt(steps, [output.request_id for output in outputs], endings=endings)


def draw_phases() -> Figure:
    """Where the time of those steps went."""
    return phase_times(traced_requests()[0])


def draw_filters() -> Figure:
    """The bundled model's next token after a text it has not learned, through the filters in their order."""
    tokenizer = chapter_2.tokenizer()
    model = load_hf_model(resolve_model("folo-tiny"), torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        logits = model(torch.tensor([tokenizer.encode(FILTER_PROMPT)])).logits[:, -1].float()  # [1, V]
        stages = {"softmax of the logits": logits}
        for name, apply, value in (
            ("temperature 1.5", apply_temperature, torch.tensor([[1.5]])),
            ("min_p 0.02", apply_min_p, torch.tensor([[0.02]])),
            ("top_k 12", apply_top_k, torch.tensor([[12]])),
            ("top_p 0.9", apply_top_p, torch.tensor([[0.9]])),
        ):
            stages[name] = apply(next(reversed(stages.values())), value)
    labels = [repr(tokenizer.decode([i])) for i in range(logits.shape[-1])]
    return filter_stages({name: x.softmax(dim=-1)[0].numpy() for name, x in stages.items()}, labels)


def draw_release() -> Figure:
    """A stream with an emoji that spans tokens and a stop string that does as well."""
    tokenizer = chapter_2.tokenizer()
    detokenizer = Detokenizer(tokenizer, [chapter_2.STOP])
    moments = []
    for token_id in tokenizer.encode(chapter_2.STREAMED):
        detokenizer.update([token_id])
        visible = detokenizer.visible
        moments.append(Release(token_text(tokenizer, token_id), visible, detokenizer.text[len(visible) :]))
        if detokenizer.stop_reason is not None:
            break
    return text_release(moments)


def token_text(tokenizer: Any, token_id: int) -> str:
    """A token's text, or its bytes where it is a part of a character."""
    text = str(tokenizer.decode([token_id]))
    if "\ufffd" not in text:
        return repr(text)[1:-1].replace(" ", "\u2423")
    return f"token {token_id}"


FIGURES = {
    "request-gantt": draw_gantt,
    "phase-times": draw_phases,
    "filter-stages": draw_filters,
    "text-release": draw_release,
}
