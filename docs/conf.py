"""How Sphinx builds the course. `make docs` builds it offline; the pages load nothing from elsewhere."""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "_ext")]  # `claims` and `figures`; the extensions

project = "folovllm"
author = "The folovllm authors"
project_copyright = f"2026, {author}"
release = version_of("folovllm")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "glossary_page",
    "native_math",
    "api_page",
    "source_links",
    "claim_roles",
    "chapter_parts",
    "replay_pages",
    "museum_page",
    "errata_parts",
    "lab_pages",
]
smartquotes = False  # quotation marks in a docstring are often Python
exclude_patterns = ["_build", "_ext"]

# --- text -------------------------------------------------------------------------------------------------
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are committed with their outputs, and run by `make notebooks`
nb_render_markdown_format = "gfm"  # of outputs: tables
html_math_renderer = "native"

# --- API --------------------------------------------------------------------------------------------------
default_role = "py:obj"  # `name` in a docstring links to what it names, or is set as code
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# --- site -------------------------------------------------------------------------------------------------
html_theme = "sphinx_book_theme"
html_title = "folovllm"
html_static_path = ["_static"]
html_css_files = ["course.css", "chapters.css", "replays.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "navbar_persistent": [],  # the search field is in the side bar
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "use_repository_button": False,
}
