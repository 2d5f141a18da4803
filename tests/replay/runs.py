"""Runs to record: crowds around the mock model, which share, copy, give way and lose what was cached."""

from __future__ import annotations

import json
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from folovllm import LLMEngine, SamplingParams
from folovllm.engine.recording import recording
from folovllm.engine.trace import StepTrace
from tests.m4.helpers import cached_engine
from tests.mock import drain, mock_engine, paged_mock_engine

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "docs"))  # where the site's modules are

import replays  # noqa: F401


def engine_like(kind: str, **kwargs: Any) -> LLMEngine:
    """An engine around the mock model; its trace keeps the blocks, so that the recording can be held against them."""
    if kind == "m2":
        return mock_engine(max_num_seqs=3, budget=48, capacity=256)
    engine = cached_engine(**kwargs) if kind == "m4" else paged_mock_engine(**kwargs)
    engine.core.recorder.trace_blocks = True
    return engine


def crowd(engine: LLMEngine, count: int = 9, first: int = 0) -> None:
    """Requests that begin alike, some with samples: they share, copy, and are too many for a small pool."""
    for i in range(first, first + count):
        prompt = [(7 * j) % 60 + 1 for j in range(8)] + [i + 1] * (1 + 5 * i % 17)
        params = SamplingParams(max_tokens=6 + i % 9, ignore_eos=True, n=1 + 2 * (i % 4 == 1), temperature=1.0, seed=i)
        engine.add_request(f"r{i}", prompt, params)


SMALL = {"num_blocks": 18, "block_size": 4, "budget": 24, "max_num_seqs": 6, "max_model_len": 48}
KINDS: dict[str, dict[str, Any]] = {
    "m2": {},
    "m3": SMALL | {"budget": 40},
    "m3-swap": SMALL | {"budget": 40, "preemption_mode": "swap", "num_host_blocks": 40},
    "m4": SMALL,
    "m4-swap": SMALL | {"preemption_mode": "swap", "num_host_blocks": 40},
}


def crowded_run(kind: str) -> tuple[dict[str, Any], list[StepTrace]]:
    """What was recorded of a crowd, and what the engine's own trace says."""
    engine = engine_like(kind.partition("-")[0], **KINDS[kind])
    with recording(engine) as recorder:
        crowd(engine)
        for _ in range(12):
            engine.step()
        engine.abort_request("r3")
        crowd(engine, 3, first=9)
        drain(engine)
    return recorder.to_json(), list(engine.trace)


class Scripts(HTMLParser):
    """The scripts of a page, as a browser separates them from the rest."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.tags: Counter[str] = Counter()
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "script"

    def handle_data(self, data: str) -> None:
        if self.inside:
            attrs, text = self.scripts[-1]
            self.scripts[-1] = (attrs, text + data)


def scripts_of(page: str) -> Scripts:
    parser = Scripts()
    parser.feed(page)
    return parser


def data_of(page: str) -> Any:
    (text,) = [text for attrs, text in scripts_of(page).scripts if attrs.get("id") == "recording"]
    return json.loads(text)
