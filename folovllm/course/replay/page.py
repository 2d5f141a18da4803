"""One HTML file that replays a recording: nothing else is needed to open it, and nothing is loaded from anywhere.

The page's parts lie in ``assets/replay/``, to be read one by one: ``page.html`` is the frame, ``style.css`` how it
looks, ``state.js`` puts the recording's changes together again, and the other scripts draw. Here they become one file.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

SCRIPTS = ("state.js", "look.js", "panels.js", "blocks.js", "mask.js", "player.js")
PART = re.compile(r"<!-- (title|open at|style|scripts|recording) -->")


def replay_page(recording: Mapping[str, Any], title: str | None = None, open_at: int = 0) -> str:
    """The page. recording: as `load_recording` or `Recorder.to_json` gives it. title: a heading of one's own.

    open_at: the step that is shown first, counted from 0.
    """
    engine = recording["engine"]
    parts = {
        "title": html.escape(f"{engine['model']}, {engine['milestone']}" if title is None else title),
        "open at": str(open_at),
        "style": _asset("style.css"),
        "scripts": "\n".join(_asset(name) for name in SCRIPTS),
        "recording": embedded(recording),
    }
    # In one pass: what is put in is not searched for further parts.
    return PART.sub(lambda match: parts[match[1]], _asset("page.html"))


def embedded(data: Mapping[str, Any]) -> str:
    """JSON that can stand in a <script>: no text in it can end the element, whatever tokens say."""
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def write_page(recording: Mapping[str, Any], path: str | Path, title: str | None = None) -> Path:
    """Write `replay_page` to a file. Returns its path."""
    path = Path(path)
    path.write_bytes(replay_page(recording, title).encode("utf-8", "replace"))
    return path


def _asset(name: str) -> str:
    return (files("folovllm") / "assets" / "replay" / name).read_text(encoding="utf-8")
