"""docs/check_site.py must find what it is there to find."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "docs" / "check_site.py"

GOOD = """
<link rel="stylesheet" href="style.css"><link rel="canonical" href="https://example.org/index.html">
<script src="app.js"></script><img src="data:image/png;base64,AAAA">
<h1 id="top">T</h1> <a href="#top">up</a> <a href="sub/other.html#here">on</a> <a href="https://example.org">away</a>
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "index.html").write_text(GOOD)
    (tmp_path / "sub" / "other.html").write_text('<p id="here">x</p> <a href="../index.html">back</a>')
    (tmp_path / "style.css").write_text("a { background: url(sub/a.png) } b { background: url('data:image/png') }")
    (tmp_path / "app.js").write_text("")
    return tmp_path


def check(site: Path) -> tuple[int, str]:
    done = subprocess.run([sys.executable, TOOL, site], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_sound_site_passes(site: Path) -> None:
    assert check(site) == (0, "")


@pytest.mark.parametrize(
    ("html", "complaint"),
    [
        ('<script src="https://cdn.example.org/a.js"></script>', "loads https://cdn.example.org/a.js"),
        ('<script src="//cdn.example.org/a.js"></script>', "loads //cdn.example.org/a.js"),
        ('<img src="http://example.org/a.png">', "loads http://example.org/a.png"),
        (
            '<link rel="preload stylesheet" href="https://example.org/a.css">',
            "loads https://example.org/a.css",
        ),
        ('<a href="gone.html">x</a>', "gone.html leads nowhere"),
        ('<img src="gone.png">', "gone.png leads nowhere"),
        ('<a href="#gone">x</a>', "#gone names an anchor that is not there"),
        ('<a href="sub/other.html#gone">x</a>', "sub/other.html#gone names an anchor that is not there"),
    ],
)
def test_a_fault_in_a_page_is_named(site: Path, html: str, complaint: str) -> None:
    (site / "index.html").write_text(GOOD + html)
    assert check(site) == (1, f"index.html: {complaint}\n")


@pytest.mark.parametrize("rule", ["@import 'https://example.org/f.css';", "a { src: url(//example.org/f.ttf) }"])
def test_a_style_that_loads_from_elsewhere_is_named(site: Path, rule: str) -> None:
    (site / "style.css").write_text(rule)
    status, output = check(site)
    assert (status, output.count("style.css: loads ")) == (1, 1)


def test_an_empty_folder_is_no_site(tmp_path: Path) -> None:
    status, output = check(tmp_path)
    assert status == 1
    assert "no HTML file" in output
