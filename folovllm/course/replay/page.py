"""One self-contained HTML file that replays a recording. It loads nothing from the network.

Its parts are in ``assets/replay/``: ``page.html`` is the frame, ``style.css`` the style, ``state.js`` applies the
recording's changes, and the other scripts draw. This module joins them into one file.
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
    """The page. recording: from `load_recording` or `Recorder.to_json`. title: the heading; None: model and milestone.

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
    # In one pass, so that inserted text is not searched for further parts.
    return PART.sub(lambda match: parts[match[1]], _asset("page.html"))


def embedded(data: Mapping[str, Any]) -> str:
    """JSON for a <script> element: "<" is escaped, so that no token text can end the element."""
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def write_page(recording: Mapping[str, Any], path: str | Path, title: str | None = None) -> Path:
    """Write `replay_page` to a file. Returns its path."""
    path = Path(path)
    path.write_bytes(replay_page(recording, title).encode("utf-8", "replace"))
    return path


def _asset(name: str) -> str:
    return (files("folovllm") / "assets" / "replay" / name).read_text(encoding="utf-8")
