"""Check a built site: nothing is loaded from elsewhere, and every link inside it arrives.

    python docs/check_site.py docs/_build/html

Links that a reader clicks may lead anywhere. What a page loads by itself, such as scripts, styles,
images and fonts, may not: the course can be read without a network, and no server learns
that it is being read.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADING_LINKS = {"stylesheet", "icon", "preload", "modulepreload", "prefetch", "preconnect", "dns-prefetch"}
CSS_URL = re.compile(r"""(?:url\(|@import\s)\s*["']?((?:https?:)?//[^"')\s]+)""")


@dataclass
class Page:
    """What one page loads, where it links to, and the anchors it offers."""

    loads: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page = Page()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        if anchor := values.get("id"):
            self.page.anchors.add(anchor)
        if src := values.get("src"):
            self.page.loads.append(src)
        if href := values.get("href"):
            is_loaded = tag == "link" and LOADING_LINKS & set(values.get("rel", "").lower().split())
            (self.page.loads if is_loaded else self.page.links).append(href)


def read(file: Path) -> Page:
    """Parse one HTML file."""
    reader = _Reader()
    reader.feed(file.read_text(encoding="utf-8"))
    return reader.page


def problems(site: Path) -> list[str]:
    """What is wrong with the site in the folder `site`, one line each; an empty list means nothing is."""
    site = site.resolve()
    # Themes leave templates of theirs in _static; no reader comes there.
    files = [file for file in sorted(site.rglob("*.html")) if "_static" not in file.relative_to(site).parts]
    pages = {file: read(file) for file in files}
    found = [] if pages else [f"{site}: no HTML file in it"]
    for file, page in pages.items():
        name = file.relative_to(site)
        for url in page.loads + page.links:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                if url in page.loads and parts.scheme != "data":
                    found.append(f"{name}: loads {url}")
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if not target.exists():
                found.append(f"{name}: {url} leads nowhere")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{name}: {url} names an anchor that is not there")
    for file in sorted(site.rglob("*.css")):
        for url in CSS_URL.findall(file.read_text(encoding="utf-8")):
            found.append(f"{file.relative_to(site)}: loads {url}")
    return found


def main() -> int:
    """Print what is wrong with the site named on the command line. Returns the exit status."""
    if len(sys.argv) != 2:
        print("usage: python docs/check_site.py FOLDER", file=sys.stderr)
        return 2
    found = problems(Path(sys.argv[1]))
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
