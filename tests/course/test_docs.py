"""The course's sources: what they name exists, and what they claim about the code is so."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from folovllm.config import MILESTONES
from folovllm.course.glossary import load_glossary

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))  # where the modules of the course's site are

import figures  # noqa: E402
import reference  # noqa: E402
import sources  # noqa: E402

CHAPTERS = sorted(DOCS.glob("chapters/*.md"))
PAGES = sorted([*DOCS.glob("*.md"), *CHAPTERS, *ROOT.glob("*.md"), *ROOT.glob("milestones/*/*.md")])


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def prose_of(page: Path) -> str:
    """A page without its code blocks, in which a bracket may mean anything."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_the_reference_names_every_module() -> None:
    documented = re.findall(r"^\.\. automodule:: (\S+)$", reference.reference(), re.MULTILINE)
    modules = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in (ROOT / "folovllm").rglob("*.py")
        if not file.name.startswith("__") and re.search(r"^(def|class) [a-zA-Z]", file.read_text("utf-8"), re.MULTILINE)
    }
    programs = {module for module in modules if re.search(r"\.(measure|training)\.", module)}  # they have --help
    assert set(documented) <= modules and modules - programs - set(documented) == set()
    assert len(documented) == len(set(documented))


def test_the_front_page_says_which_milestones_run() -> None:
    rows = re.findall(r"^\| (M\d) \|.*\| (yes|no) \|$", text_of("index.md"), re.MULTILINE)
    assert [milestone for milestone, _ in rows] == ["M0", "M1", "M2", "M3", "M4"]
    running = {milestone.lower() for milestone, runs in rows if runs == "yes"}
    assert running == {"m0", *MILESTONES}  # M0 is `folovllm.baseline`, not a preset of the engine


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_between_files_arrive(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)", prose_of(page))
    local = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:", target)]
    made = {"api.md"}  # by the build
    lost = [target for target in local if target and not (page.parent / target).exists()]
    assert [target for target in lost if target not in made] == []


def terms_used() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for text in re.findall(r"\{term\}`([^`]+)`", prose_of(page)):
            explicit = re.fullmatch(r".*<([^>]+)>", text)
            yield name_of(page), explicit.group(1) if explicit else text


def test_terms_that_pages_link_to_are_in_the_glossary() -> None:
    listed = {entry.term.casefold() for entry in load_glossary() if entry.listed}
    assert [(page, term) for page, term in terms_used() if term.casefold() not in listed] == []


def test_every_listed_entry_points_only_to_listed_terms() -> None:
    # A pointer that names no term is shown as plain text, so a slip of the pen would go unseen.
    entries = load_glossary()
    listed = {entry.term for entry in entries if entry.listed}
    file_or_paper = re.compile(r"[./]|\d{4}")
    lost = [
        (entry.term, pointer)
        for entry in entries
        for pointer in (entry.see if entry.listed else ())
        if pointer not in listed and not file_or_paper.search(pointer)
    ]
    assert lost == []


# --- chapters ---------------------------------------------------------------------------------------------

SECTIONS = [
    "The problem, measured",
    "The idea",
    "The data structure",
    "Read the code",
    "Run it",
    "What changed, in numbers",
    "Exercises",
    "Check yourself",
    "Further reading",
]
each_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=name_of)


def source_of(chapter: Path) -> str:
    return chapter.read_text(encoding="utf-8")


@each_chapter
def test_a_chapter_has_the_parts_of_every_chapter_in_their_order(chapter: Path) -> None:
    titles = re.findall(r"^## (.*)$", source_of(chapter), re.MULTILINE)
    places = [next((i for i, title in enumerate(titles) if title.startswith(part)), -1) for part in SECTIONS]
    assert -1 not in places, dict(zip(SECTIONS, places, strict=True))
    assert places == sorted(places)


@each_chapter
def test_a_chapter_has_questions_errata_and_figures(chapter: Path) -> None:
    text = source_of(chapter)
    answers = re.findall(r"^:::\{self-check\} ([^\n]+)\n(.*?)^:::$", text, re.MULTILINE | re.DOTALL)
    assert len(answers) >= 5
    assert [question for question, answer in answers if len(answer) < 40] == []
    errata = re.findall(r"^:::\{erratum\} [^\n]+\n(.*?)^:::$", text, re.MULTILINE | re.DOTALL)
    assert errata
    for erratum in errata:
        assert re.findall(r"^\*(.+?):\*", erratum, re.MULTILINE) == [
            "Claimed",
            "Why it is plausible",
            "How it is refuted",
        ]
    assert text.count("```{drawn}") >= 2


def test_the_front_page_lists_every_chapter() -> None:
    listed = re.findall(r"^chapters/(\S+)$", text_of("index.md"), re.MULTILINE)
    assert listed == [chapter.stem for chapter in CHAPTERS]


@each_chapter
def test_links_to_code_arrive(chapter: Path) -> None:
    for text in re.findall(r"\{src\}`([^`]+)`", source_of(chapter)):
        explicit = re.fullmatch(r"(?s).+?\s*<([^<>]+)>", text)
        path, _, name = (explicit.group(1) if explicit else text).partition(":")
        assert (sources.line_of(path, name) is None) == (name == "")


@pytest.mark.parametrize(
    "target", ["folovllm/gone.py:f", "folovllm/baseline.py:gone", "folovllm/request.py:Request.gone"]
)
def test_a_link_to_code_that_is_gone_is_an_error(target: str) -> None:
    path, _, name = target.partition(":")
    with pytest.raises(LookupError, match="gone"):
        sources.line_of(path, name)


def test_a_link_leads_to_the_line_on_which_the_name_begins() -> None:
    for path, name, begins in (
        ("folovllm/baseline.py", "generate_cached", "def generate_cached("),
        ("folovllm/scheduler/scheduler.py", "Scheduler._admit", "    def _admit("),
        ("folovllm/request.py", "Request", "class Request:"),
        ("folovllm/baseline.py", "MIN_TEMPERATURE", "MIN_TEMPERATURE ="),
    ):
        line = sources.line_of(path, name)
        assert line is not None
        assert (ROOT / path).read_text(encoding="utf-8").splitlines()[line - 1].startswith(begins)


def test_figures_on_pages_are_drawn_and_described() -> None:
    used = [
        use for chapter in CHAPTERS for use in re.findall(r"```\{drawn\} (\S+)\n:alt: (.*)\n(.+)", source_of(chapter))
    ]
    assert sum(source_of(chapter).count("```{drawn}") for chapter in CHAPTERS) == len(used)
    assert sorted(name for name, _, _ in used) == sorted(figures.FIGURES)
    assert [name for name, alt, caption in used if len(alt) < 80 or len(caption) < 20] == []


@pytest.mark.parametrize("name", list(figures.FIGURES))
def test_a_figure_is_an_svg_that_loads_nothing(name: str) -> None:
    root = ElementTree.fromstring(figures.svg(name))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    links = [value for node in root.iter() for key, value in node.items() if key.endswith("href")]
    assert [link for link in links if not link.startswith(("#", "data:"))] == []


def test_a_figure_is_the_same_at_every_build() -> None:
    assert figures.svg("causal-masks") == figures.svg("causal-masks")


# --- what the chapters say about transformers -------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def test_tuple_caches_raise_and_a_cache_has_kv_heads(llama: LlamaForCausalLM) -> None:
    ids = torch.tensor([[5, 6, 7]])
    cache = DynamicCache(config=llama.config)
    assert llama(input_ids=ids, past_key_values=cache, use_cache=True).past_key_values is cache
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(1, 2, 3, 8)] * 2  # [B, Hkv, T, D]
    assert cache.get_seq_length() == 3
    pairs = tuple((layer.keys, layer.values) for layer in cache.layers)
    with pytest.raises((ValueError, AttributeError, TypeError)):
        llama(input_ids=ids[:, :1], past_key_values=pairs, use_cache=True)


@torch.inference_mode()
def test_only_the_lower_triangle_and_the_full_decode_row_are_right(llama: LlamaForCausalLM) -> None:
    ids = torch.arange(3, 12)[None]  # [1, 9]
    plain = llama(input_ids=ids).logits
    triangle = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    torch.testing.assert_close(llama(input_ids=ids, attention_mask=triangle).logits, plain)
    upper = llama(input_ids=ids, attention_mask=triangle.transpose(2, 3)).logits
    assert (upper - plain).abs().max() > 0.1

    def decode(**inputs: torch.Tensor) -> torch.Tensor:
        cache = DynamicCache(config=llama.config)
        llama(input_ids=ids[:, :-1], past_key_values=cache)
        logits: torch.Tensor = llama(input_ids=ids[:, -1:], past_key_values=cache, **inputs).logits
        return logits[:, -1]

    everything = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    itself = torch.arange(9) == 8
    torch.testing.assert_close(decode(attention_mask=everything), plain[:, -1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decode(position_ids=torch.tensor([[8]])), plain[:, -1], atol=1e-5, rtol=1e-5)
    assert (decode(attention_mask=itself[None, None, None]) - plain[:, -1]).abs().max() > 0.1
    assert (decode(position_ids=torch.tensor([[9]])) - plain[:, -1]).abs().max() > 1e-3
