"""Pages beside the chapters: what they name is there, what they promise is so, and every term is linked somewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from folovllm.course.glossary import load_glossary
from folovllm.course.grading.runner import find_milestones
from tests.course.wrong_answers import WRONG_ANSWERS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

import sources  # noqa: E402
from errata.layers import WALK, through_the_layers  # noqa: E402

CHAPTERS = sorted(DOCS.glob("chapters/*.md"))
OWN = [
    "compatibility",
    "compatibility_config",
    "compatibility_text",
    "compatibility_sampling",
    "compatibility_prompt_logprobs",
    "compatibility_door",
    "compatibility_api",
    "compatibility_resources",
    "errata",
    "interview",
    "vllm_map",
    "adding_a_milestone",
    "open_questions",
]
each_page = pytest.mark.parametrize("page", OWN)


def text_of(page: str) -> str:
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


def slug(heading: str) -> str:
    """The anchor of a heading, as MyST makes it."""
    plain = re.sub(r"\{\w+\}`([^`<]*?)(?: *<[^>]*>)?`|[`*]", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")


def anchors_of(page: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#{1,3} (.+)$", page.read_text("utf-8"), re.MULTILINE)}


@each_page
def test_anchors_in_links_are_there(page: str) -> None:
    links = re.findall(r"\]\(((?:chapters/)?\w+\.md)#([^)]+)\)", text_of(page))
    assert [link for link in links if link[1] not in anchors_of(DOCS / link[0])] == []


@each_page
def test_links_to_code_arrive(page: str) -> None:
    for text in re.findall(r"\{src\}`([^`]+)`", text_of(page)):
        explicit = re.fullmatch(r"(?s).+?\s*<([^<>]+)>", text)
        path, _, name = (explicit.group(1) if explicit else text).partition(":")
        assert (sources.line_of(path, name) is None) == (name == "")


def test_the_front_page_leads_to_every_page() -> None:
    front = text_of("index")
    listed = set(
        re.findall(r"^([\w/]+)$", "".join(re.findall(r":::\{toctree\}(.*?):::", front, re.DOTALL)), re.MULTILINE)
    )
    assert {page.stem for page in DOCS.glob("*.md")} - listed == {"index"}
    assert [page for page in OWN if f"]({page}.md)" not in front] == []


# --- the glossary -----------------------------------------------------------------------------------------


def test_every_term_is_linked_from_some_page() -> None:
    linked = set()
    for page in [*CHAPTERS, *DOCS.glob("*.md")]:
        for text in re.findall(r"\{term\}`([^`]+)`", page.read_text(encoding="utf-8")):
            explicit = re.fullmatch(r"(?s).*<([^>]+)>", text)
            linked.add(" ".join((explicit.group(1) if explicit else text).split()).casefold())
    terms = {entry.term.casefold() for entry in load_glossary() if entry.listed}
    assert terms - linked == set()


def test_a_chapter_links_a_term_only_a_few_times() -> None:
    # Links mark first uses; a page in which every other word is one marks nothing.
    for chapter in CHAPTERS:
        targets = re.findall(r"\{term\}`(?:[^`<]+<)?([^`>]+)>?`", chapter.read_text(encoding="utf-8"))
        often = {target for target in targets if targets.count(target) > 3}
        assert often == set(), chapter.name


# --- vLLM -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.stem)
def test_a_chapter_says_what_to_open_in_vllm(chapter: Path) -> None:
    further = chapter.read_text(encoding="utf-8").partition("\n## Further reading\n")[2]
    assert re.search(r"`vllm/[\w./]+`", further)


def test_the_walk_is_what_a_request_does_and_what_the_map_says() -> None:
    rows = re.findall(
        r"^\| (interface|model authoring|runtime) \| \{src\}`([^`]+)` \|", text_of("vllm_map"), re.MULTILINE
    )
    assert tuple(rows) == WALK
    seen = through_the_layers()
    assert [(finding.value(), finding.says) for finding in seen.values()] == list(WALK)


def test_the_map_has_every_room() -> None:
    named = "\n".join([text_of("vllm_map"), *(file for _, file in WALK)])
    rooms = {folder.name for folder in (ROOT / "folovllm").iterdir() if (folder / "__init__.py").exists()}
    assert {room for room in rooms - {"course"} if f"{room}/" not in named} == set()


# --- interview questions ----------------------------------------------------------------------------------


def test_interview_questions_are_answered_with_chapters_and_numbers() -> None:
    text = text_of("interview")
    found = re.findall(r"^:::\{self-check\} ([^\n]+)\n(.*?)^:::$", text, re.MULTILINE | re.DOTALL)
    answers = [(question, " ".join(answer.split())) for question, answer in found]
    assert len(answers) >= 20
    assert [question for question, answer in answers if not 200 < len(answer) < 1500] == []
    outlook = text.index("## Beyond this engine")
    inside = [(q, a) for q, a in answers if text.index(q) < outlook]
    assert [question for question, answer in inside if "See [chapter" not in answer] == []
    chapters = [int(re.search(r"See \[chapter (\d)\]", answer)[1]) for _, answer in inside]  # type: ignore[index]
    assert chapters == sorted(chapters) and set(chapters) == set(range(8))
    assert text.count("{claim}") + text.count("{measured}") >= 30


# --- a new milestone --------------------------------------------------------------------------------------


def test_every_milestone_has_wrong_answers() -> None:
    assert {name: set(exercises) for name, exercises in WRONG_ANSWERS.items()} == {
        name: set(milestone.exercises()) for name, milestone in find_milestones().items()
    }


def test_the_guide_names_files_and_tests_that_exist() -> None:
    guide = text_of("adding_a_milestone")
    paths = {path for path in re.findall(r"`((?:tests|docs|folovllm|examples)/[\w./]+)`", guide) if "m5" not in path}
    assert len(paths) >= 8
    later = {f"docs/{name}.py" for name in ("claims/chapter_9", "figures/chapter_9")} | {
        "docs/chapters/09_something.md"
    }
    assert {path for path in paths - later if not (ROOT / path).exists()} == set()
    tests = "\n".join(file.read_text(encoding="utf-8") for file in ROOT.glob("tests/course/test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", guide))
    assert named and {name for name in named if f"def {name}(" not in tests} == set()
