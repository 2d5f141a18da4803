"""{src}`folovllm/baseline.py:generate_cached` links to the line where that function begins, on a page of the site.

The name is looked up when the course is built: a function that was renamed or moved fails the build, and line numbers
never go stale. A link may have a text of its own, {src}`the loop <folovllm/baseline.py:_generate>`, or name only a
file. Each file that is linked to becomes a page with numbered lines, so the code can be read beside the text, offline.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename
from sources import ROOT, line_of
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxRole
from sphinx.writers.html5 import HTML5Translator

EXPLICIT = re.compile(r"(?s)(?P<text>.+?)\s*<(?P<target>[^<>]+)>$")


class source_node(nodes.reference):
    """A link to a line of a file of the repository."""


def source_reference(env: BuildEnvironment, target: str, text: str | None = None) -> nodes.Node:
    """A link to "path:name" or "path". Raises LookupError if it leads nowhere."""
    path, _, name = target.partition(":")
    return note_source(env, path, line_of(path, name), text or target)


def note_source(env: BuildEnvironment, path: str, line: int | None, text: str) -> nodes.Node:
    """A link to a file or a line of it; remembers that the file needs a page."""
    env.note_dependency(str(ROOT / path))
    pages_of(env).setdefault(env.docname, set()).add(path)
    where = f"{path}, line {line}" if line else path
    return source_node("", "", nodes.literal(text=text), path=path, line=line, title=where, refuri="")


def pages_of(env: BuildEnvironment) -> dict[str, set[str]]:
    """Document -> files that it links to."""
    if not hasattr(env, "course_sources"):
        env.course_sources = {}
    found: dict[str, set[str]] = env.course_sources
    return found


def visit_source(self: HTML5Translator, node: source_node) -> None:
    page = self.builder.get_relative_uri(self.builder.current_docname, f"source/{node['path']}")
    href = page + (f"#L-{node['line']}" if node["line"] else "")
    self.body.append(self.starttag(node, "a", "", href=href, title=node["title"], CLASS="reference internal"))


def depart_source(self: HTML5Translator, node: source_node) -> None:
    self.body.append("</a>")


class SourceRole(SphinxRole):
    """A link to code."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        explicit = EXPLICIT.match(self.text)
        target, text = (explicit["target"], explicit["text"]) if explicit else (self.text, None)
        try:
            if text is None and ":" in target:
                text = target.partition(":")[2]
            return [source_reference(self.env, target, text)], []
        except LookupError as error:
            message = self.inliner.reporter.error(str(error), line=self.lineno)
            return [self.inliner.problematic(self.rawtext, self.rawtext, message)], [message]


def collect_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """One page per file that is linked to."""
    formatter = HtmlFormatter(linenos="inline", lineanchors="L", anchorlinenos=True, wrapcode=True)
    for path in sorted(set().union(*pages_of(app.env).values())):
        lexer = get_lexer_for_filename(path)
        code = highlight((ROOT / path).read_text(encoding="utf-8"), lexer, formatter)
        body = f"<h1>{html.escape(path)}</h1>\n<div class='source-page'>{code}</div>"
        yield f"source/{path}", {"title": path, "body": body}, "page.html"


def forget(app: Sphinx, env: BuildEnvironment, docname: str) -> None:
    """A document is read anew."""
    pages_of(env).pop(docname, None)


def merge(app: Sphinx, env: BuildEnvironment, docnames: set[str], other: BuildEnvironment) -> None:
    """Documents were read by another process."""
    pages_of(env).update({name: files for name, files in pages_of(other).items() if name in docnames})


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_node(source_node, override=True, html=(visit_source, depart_source))
    app.add_role("src", SourceRole())
    app.connect("html-collect-pages", collect_pages)
    app.connect("env-purge-doc", forget)
    app.connect("env-merge-info", merge)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
