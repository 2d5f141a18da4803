"""The page in a browser: what it shows of each step is what the engine recorded, and keys, mouse and touch move it.

A script that is put behind the page's own presses keys and reads what is there. Skipped where there is no Chromium.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from folovllm import SamplingParams
from folovllm.course.replay.page import replay_page
from folovllm.engine.recording import recording
from folovllm.engine.trace import StepTrace
from folovllm.kv_cache.interface import BlockSnapshot
from folovllm.request import RequestStatus
from tests.mock import drain
from tests.needs import BROWSERS, find, need
from tests.replay.runs import KINDS, Scripts, crowd, crowded_run, engine_like

BROWSER = find(*BROWSERS)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--virtual-time-budget=20000", "--dump-dom",
)  # fmt: skip
TOOLS = """
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
const press = (key, where = document) =>
  where.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const all = (selector) => [...document.querySelectorAll(selector)];
const texts = (selector) => all(selector).map((element) => element.textContent);
const shown = () => Number(document.documentElement.dataset.step);
const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
async function look() {
  %s
}
look().catch((error) => ({ failed: String(error) })).then((found) => {
  const place = document.createElement("pre");
  place.id = "found";
  place.textContent = JSON.stringify({ found, errors });
  document.body.append(place);
});
"""
EVERY_STEP = """
  const steps = [];
  press("Home");
  for (let i = 0; i <= lastStep; i += 1) {
    const cells = all("#blocks .cell").slice(1);
    steps.push({
      step: shown(),
      slider: Number(byId("slider").value),
      owners: cells.map((cell) => cell.dataset.owners),
      filled: cells.map((cell) => Number(cell.dataset.filled)),
      cached: cells.map((cell) => cell.classList.contains("cached")),
      evicted: cells.map((cell) => cell.classList.contains("evicted")),
      words: cells.map((cell) => blockWords(replay, Number(cell.dataset.block))),
      what: texts(".queue.running .what"),
      labels: cells.map((cell) => cell.textContent),
      tables: all("#tables dd").map((dd) => [dd.dataset.table, dd.textContent]),
      host: all("#host .cell").map((cell) => cell.dataset.owners),
      running: all(".queue.running .request")
        .map(({ dataset }) => [dataset.request, dataset.computed, dataset.known]),
      waiting: texts(".queue.waiting .chip"),
      taken: cells.map((cell) => cell.classList.contains("taken")),
      preempted: all(".queue.preempted .request").map(({ dataset }) => [dataset.request, Number(dataset.computed)]),
      finished: texts(".queue.finished .chip"),
      budget: [Number(byId("budget").dataset.prefill), Number(byId("budget").dataset.decode)],
      fresh: all(".text").map((card) => [card.dataset.request, card.querySelector("mark")?.textContent]),
    });
    press("ArrowRight");
  }
  return steps;
"""

pytestmark = need("Chromium", BROWSER is not None)


class _Found(Scripts):
    """The text of the element that the test's script leaves behind."""

    def __init__(self) -> None:
        super().__init__()
        self.at = False
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.at = ("id", "found") in attrs

    def handle_data(self, data: str) -> None:
        if self.at:
            self.text += data


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., Any]:
    """Open a page, run the body of an async function in it, and get what that returns."""

    def run(data: dict[str, Any], body: str, fragment: str = "", *flags: str) -> Any:
        file = tmp_path / "page.html"
        script = f"<script>{TOOLS % body}</script></body>"
        file.write_text(replay_page(data).replace("</body>", script), encoding="utf-8")
        profile = tmp_path / f"profile{len(list(tmp_path.iterdir()))}"
        command = [str(BROWSER), *FLAGS, *flags, f"--user-data-dir={profile}", file.as_uri() + fragment]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120, check=True)
        reader = _Found()
        reader.feed(done.stdout)
        made = json.loads(reader.text)
        assert made["errors"] == [], made["errors"]
        return made["found"]

    return run


# --- what it shows ------------------------------------------------------------------------------------------


def begun_run() -> tuple[dict[str, Any], list[StepTrace]]:
    """A recording that begins when requests are on their way."""
    engine = engine_like("m4", **KINDS["m4"])
    crowd(engine)
    for _ in range(20):
        engine.step()
    with recording(engine) as recorder:
        drain(engine)
    return recorder.to_json(), list(engine.trace)[20:]


@pytest.mark.parametrize("kind", ["m3-swap", "m4"])
def test_every_step_shows_what_the_engine_recorded(kind: str, browse: Callable[..., Any]) -> None:
    data, trace = crowded_run(kind)
    found = browse(data, EVERY_STEP)
    assert len(found) == len(trace)
    ids = [request["id"] for request in data["requests"]]
    outputs: dict[str, list[int]] = {}
    preempted: set[str] = set()
    finished: set[str] = set()
    known: dict[str, int] = {}
    contents = Contents()
    before = [0] * len(evictions(trace[0]))
    for index, (page, step) in enumerate(zip(found, trace, strict=True)):
        assert (page["step"], page["slider"]) == (step.step, index)
        check_blocks(page, step, ids, {r.request_id for s in trace if s.step <= step.step for r in s.requests})
        evicted = evictions(step)
        assert page["evicted"] == [new > old for old, new in zip(before, evicted, strict=True)][: len(page["evicted"])]
        before = evicted
        check_shares(page, step)
        check_words(page, step, contents)
        preempted = (preempted | set(step.preempted)) - {r.request_id for r in step.requests} - set(step.aborted)
        finished |= {*step.finished, *step.aborted}
        check_taken(page, step, trace[index - 1].blocks if index else None)
        assert step.blocks is not None
        kept = {i: contents.computed[i] if i in step.blocks.host_tables else 0 for i in preempted}
        assert dict(page["preempted"]) == kept and set(page["finished"]) == finished
        assert page["waiting"] == [i for i in step.next_in_line if i not in preempted]
        for share in step.requests:
            outputs.setdefault(share.request_id, []).extend(share.sampled_ids)
            known[share.request_id] = share.prompt_len + share.num_output
        running = {r[0]: int(r[2]) for r in page["running"]}
        assert len(running) == step.num_running and running == {i: known[i] for i in running}
        sampled = {r.request_id: "".join(f"{t} " for t in r.sampled_ids) for r in step.requests if r.sampled_ids}
        assert {i: text for i, text in page["fresh"] if text is not None} == sampled
    assert any(word == "forked + 1" for page in found for word in page["what"])
    assert preempted == set() and sum(bool(page["preempted"]) for page in found) > 0
    if kind == "m4":
        assert sum(before) > 0 and any("×3" in page["labels"] for page in found)
    else:
        assert any(any(page["host"]) for page in found)


def test_a_recording_that_begins_in_the_middle_is_shown_as_it_was(browse: Callable[..., Any]) -> None:
    data, trace = begun_run()
    found = browse(data, EVERY_STEP)
    ids = [request["id"] for request in data["requests"]]
    for page, step in zip(found, trace, strict=True):
        check_blocks(page, step, ids, {r.request_id for s in trace if s.step <= step.step for r in s.requests})
        check_shares(page, step)
        sampled = {r.request_id: "".join(f"{t} " for t in r.sampled_ids) for r in step.requests if r.sampled_ids}
        assert {i: text for i, text in page["fresh"] if text is not None} == sampled


def evictions(step: StepTrace) -> list[int]:
    """How often cached tokens were lost, block by block, so far."""
    return [] if step.blocks is None else list(step.blocks.evictions[1:])


class Contents:
    """What stands in each block, from the tables and the tokens of the trace."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.computed: dict[str, int] = {}
        self.texts: dict[int, str] = {}
        self.tables: dict[str, tuple[int, ...]] = {}

    def observe(self, step: StepTrace) -> None:
        for request_id, prompt in step.prompts.items():
            self.tokens[request_id] = list(prompt)
        for share in step.requests:
            self.tokens[share.request_id] += share.sampled_ids
            self.computed[share.request_id] = share.num_computed
        assert step.blocks is not None
        size, held = step.blocks.block_size, {}
        left = {i: self.tables.get(i, ()) for i in step.finished}  # in their last step they filled what they had
        self.tables = dict(step.blocks.tables)
        for request_id, table in (left | self.tables).items():
            for index, block in enumerate(table):
                end = min(self.computed.get(request_id, 0), (index + 1) * size)
                ids = self.tokens.get(request_id, [])[index * size : end]
                held[block] = max(held.get(block, ""), "".join(f"{token} " for token in ids), key=len)
        self.texts |= held


def check_words(page: dict[str, Any], step: StepTrace, contents: Contents) -> None:
    """What the page says of each block: its tokens, the block before it, and when it is lost."""
    contents.observe(step)
    assert step.blocks is not None
    idle = [block for block in step.blocks.free if block in step.blocks.cached]
    for block, words in enumerate(page["words"], 1):
        holders = {i for i, table in step.blocks.tables.items() if block in table}
        if holders and holders.isdisjoint(contents.tokens):
            assert "“" in words  # of forks that wait: the page knows their prompt, this oracle does not yet
        elif step.blocks.filled[block]:
            assert f"“{contents.texts[block]}”" in words
        else:
            assert "“" not in words
        parent = step.blocks.cached.get(block, 0)
        assert ("the first of a chain" in words) == (parent is None)
        assert (f"includes that of block {parent}." in words) == bool(parent)
        if block in idle:
            turn = idle.index(block)
            assert ("the next to be evicted" if turn == 0 else f"{turn} are evicted before it") in words


def check_taken(page: dict[str, Any], step: StepTrace, before: BlockSnapshot | None) -> None:
    """Who was free and empty and is held now was taken; who is held by those only that held it before was not."""
    blocks = step.blocks
    assert blocks is not None
    for block, taken in enumerate(page["taken"], 1):
        holders = {i for i, table in blocks.tables.items() if block in table}
        held = set() if before is None else {i for i, table in before.tables.items() if block in table}
        was_empty = before is None or (block in before.free and block not in before.cached)
        if holders and was_empty:
            assert taken
        if holders <= held:
            assert not taken


def test_what_nobody_knows_of_a_block_is_not_made_up(browse: Callable[..., Any]) -> None:
    # The second request takes blocks of the first, all but its first one, and is gone at the end of the same step.
    engine = engine_like("m4", num_blocks=4, block_size=4, max_model_len=16)
    with recording(engine) as recorder:
        for name, token, count in (("a", 7, 3), ("b", 9, 1)):
            engine.add_request(name, [token] * 12, SamplingParams(max_tokens=count, ignore_eos=True))
            drain(engine)
    blocks = engine.trace[-1].blocks
    assert blocks is not None and [step.finished for step in engine.trace][-2:] == [["a"], ["b"]]
    found = browse(recorder.to_json(), EVERY_STEP)
    told = ["“7 7 7 7 ”" in words for words in found[-2]["words"]]
    assert told == [True, True, True, False] and blocks.evictions == (0, 0, 1, 1, 0)
    assert ["“" in words for words in found[-1]["words"]] == [True, False, False, False]


def check_blocks(page: dict[str, Any], step: StepTrace, ids: list[str], ran: set[str]) -> None:
    """Who holds what, how full it is and what is cached, block by block."""
    blocks = step.blocks
    assert blocks is not None
    for block, (owners, filled, cached) in enumerate(
        zip(page["owners"], page["filled"], page["cached"], strict=True), 1
    ):
        names = [ids[int(place)] for place in owners.split()]
        assert sorted(names) == sorted(i for i, table in blocks.tables.items() if block in table)
        assert len(names) == blocks.ref_cnt[block]
        if names and ran.isdisjoint(names):  # forks that wait: what they share of the block
            assert 0 < filled <= blocks.filled[block]
        else:
            assert filled == blocks.filled[block]
        assert cached == (block in blocks.cached)
    assert {i: tuple(map(int, text.split())) for i, text in page["tables"]} == blocks.tables
    on_host = [[ids[int(place)] for place in owners.split()] for owners in page["host"]]
    expected: list[list[str]] = [[] for _ in on_host]
    for request_id, table in blocks.host_tables.items():
        for block in table:
            expected[block - 1].append(request_id)
    assert on_host == expected


def check_shares(page: dict[str, Any], step: StepTrace) -> None:
    """The budget, and how far each running request has come."""
    prefill = sum(r.num_scheduled for r in step.requests if r.num_prompt)
    assert page["budget"] == [prefill, step.num_scheduled_tokens - prefill]
    computed = {i: int(count) for i, count, _ in page["running"]}
    for share in step.requests:
        if RequestStatus[share.status] == RequestStatus.RUNNING:
            assert computed[share.request_id] == share.num_computed


def test_words_for_a_block_and_for_the_mask(browse: Callable[..., Any]) -> None:
    engine = engine_like("m4", num_blocks=12, block_size=4)
    with recording(engine) as recorder:
        for name, first in (("a", 1), ("b", 9)):
            engine.add_request(name, [7, 7, 7, 7, first], SamplingParams(max_tokens=3, ignore_eos=True))
        drain(engine)
    point = """
      const over = (block) => {
        const cell = document.querySelector(`#blocks [data-block="${block}"]`);
        cell.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
        return byId("block-info").textContent;
      };
      const box = byId("mask").getBoundingClientRect();
      const at = (x, y) => {
        byId("mask").dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + x, clientY: box.top + y }));
        return byId("mask-info").textContent;
      };
      const band = maskBands(replay, box.width);
      const middle = ({ x, y, width, height, keys }, key) => at(x + (key + 0.5) * width / keys, y + height - 1);
      const first = { seen: middle(band[0], 4), found: middle(band[1], 0) };
      press("ArrowRight");
      const later = middle(maskBands(replay, box.width)[1], 4);
      press("Home");
      return { ...first, later, null: over(0), shared: over(1), own: over(2),
               other: at(band[0].x + 1, band[1].y + 1), hidden: at(band[0].x + band[0].width - 1, band[0].y + 1),
               words: byId("mask-words").textContent, blocks: byId("blocks-words").textContent,
               label: byId("mask").getAttribute("aria-label") };
    """
    found = browse(recorder.to_json(), point)
    assert "null block" in found["null"]
    assert "is in 2 tables: those of a, b." in found["shared"] and "“7 7 7 7 ”" in found["shared"]
    assert "Block 2 is held by a. 1 of 4 slots are written: tokens 4 to 4 of a, “1 ”." in found["own"]
    assert "position 4 sees its keys 0 to 4. Key 4, “1 ”: visible; written in this step." in found["seen"]
    assert "Key 0, “7 ”: visible; a cache hit." in found["found"]
    assert "position 5 sees its keys 0 to 5. Key 4, “9 ”: visible; written before." in found["later"]
    assert "These are keys of a: masked." in found["other"]
    assert "position 0 sees its keys 0 to 0. Key 4, “1 ”: a later position, so it is masked." in found["hidden"]
    assert "Blocks after 3 are not drawn: this run never uses them." in found["blocks"]
    assert found["words"].startswith("6 queries (down) by 10 keys (across)")
    assert "a: 5 queries at 0 to 4, keys 0 to 4, b: 1 query at 4 to 4, keys 0 to 4" in found["label"]


def test_panels_that_do_not_apply_say_so(browse: Callable[..., Any]) -> None:
    without_blocks, _ = crowded_run("m2")
    look = """return { words: byId("blocks-words").textContent, cells: byId("blocks").offsetParent !== null,
                       phases: byId("phases-words").textContent, bar: byId("kv").offsetParent !== null };"""
    found = browse({**without_blocks, "steps": [{**s, "times": []} for s in without_blocks["steps"]]}, look)
    assert found["words"].startswith("M2 has no blocks") and not found["cells"] and found["bar"]
    assert "not recorded" in found["phases"]


def test_texts_that_look_like_markup_stand_there_literally(browse: Callable[..., Any]) -> None:
    names = ["</script><b>x</b>", "<img src=x onerror=errors.push(1)>", "&lt;"]
    engine = engine_like("m3")
    with recording(engine) as recorder:
        for name in names:
            engine.add_request(name, [1, 2], SamplingParams(max_tokens=2, ignore_eos=True))
        drain(engine)
    data = recorder.to_json()
    data["texts"] = [f"<i>{text}</i>" for text in data["texts"]]
    look = """return { ids: texts("#texts .chip"), prompts: texts("#texts .prompt"),
                       i: texts("main i:not([class]), img") };"""
    found = browse(data, look)
    assert found["ids"] == names
    assert found["prompts"][0] == "<i>1 </i><i>2 </i>" and found["i"] == []


# --- what moves it ------------------------------------------------------------------------------------------


def test_keys_buttons_slider_and_strip_choose_the_step(browse: Callable[..., Any]) -> None:
    data, trace = crowded_run("m4")
    last = len(trace) - 1
    move = """
      const seen = { opened: shown(), kept: press("x"), "kept by the menu": press("ArrowRight", byId("speed")) };
      const after = (name, act) => { act(); seen[name] = shown(); };
      after("end", () => press("End"));
      after("right at the end", () => press("ArrowRight"));
      after("left", () => press("ArrowLeft"));
      after("home", () => { seen.taken = press("Home"); });
      after("left at home", () => press("ArrowLeft"));
      after("page down", () => press("PageDown"));
      after("page up", () => press("PageUp"));
      after("right on the slider", () => press("ArrowRight", byId("slider")));
      after("control and right", () =>
        document.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", ctrlKey: true })));
      after("next", () => byId("next").click());
      after("previous", () => byId("previous").click());
      after("last", () => byId("last").click());
      after("first", () => byId("first").click());
      after("slider", () => { byId("slider").value = 7; byId("slider").dispatchEvent(new Event("input")); });
      const box = byId("strip").getBoundingClientRect();
      const at = (type, share) => byId("strip").dispatchEvent(
        new PointerEvent(type, { clientX: box.left + share * box.width, buttons: 1, bubbles: true }));
      after("press on the strip", () => at("pointerdown", 0.5));
      after("drag on the strip", () => at("pointermove", 0.999));
      location.hash = "#step=3";
      await wait(50);
      seen.address = shown();
      await wait(1000);
      seen.hash = location.hash;
      return seen;
    """
    found = browse(data, move, "#step=5")
    assert found == {
        "opened": 5, "kept": True, "kept by the menu": True, "taken": False,
        "end": last, "right at the end": last, "left": last - 1, "home": 0, "left at home": 0,
        "page down": 10, "page up": 0, "right on the slider": 1, "control and right": 1, "next": 2, "previous": 1,
        "last": last, "first": 0, "slider": 7, "press on the strip": (last + 1) // 2, "drag on the strip": last,
        "address": 3, "hash": "#step=3",
    }  # fmt: skip


def test_space_plays_and_stops(browse: Callable[..., Any]) -> None:
    data, trace = crowded_run("m3")
    play = """
      const seen = [];
      byId("speed").value = "20";
      press(" ");
      seen.push(byId("play").textContent);
      await wait(1020);
      press(" ");
      const stopped = shown();
      seen.push(byId("play").textContent, stopped >= 15 && stopped <= 22);
      await wait(500);
      seen.push(shown() === stopped);
      press(" ");
      await wait(100);
      press("Home");
      await wait(500);
      seen.push(shown(), byId("play").textContent);
      byId("speed").value = "60";
      byId("play").click();
      await wait(5000);
      seen.push(shown(), byId("play").textContent);
      press(" ", byId("play"));
      seen.push(shown());
      press(" ");
      await wait(5);
      seen.push(shown() <= 1);
      return seen;
    """
    last = len(trace) - 1
    assert last > 22
    found = browse(data, play)
    assert found == ["pause", "play", True, True, 0, "play", last, "play", last, True]


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (800, "light"), (1400, "light"), (360, "dark")])
def test_no_width_makes_the_page_scroll_sideways(width: int, scheme: str, browse: Callable[..., Any]) -> None:
    data, _ = crowded_run("m4")
    data["requests"][0]["id"] = "x" * 200
    look = """
      const wide = document.documentElement;
      const over = ["Home", "PageDown"].map((key) => { press(key); return wide.scrollWidth - wide.clientWidth; });
      const names = all("button, select, input, [role=img]").filter((e) => e.offsetParent !== null)
        .filter((e) => !(e.getAttribute("aria-label") || e.labels?.length)).map((e) => e.id);
      return { over: Math.max(...over), width: innerWidth, names,
               page: getComputedStyle(document.body).backgroundColor,
               touch: Math.min(...all("button").map((button) => button.getBoundingClientRect().height)) };
    """
    found = browse(data, look, f"#theme={scheme}", f"--window-size={width},900")
    assert found["over"] <= 0 and found["width"] <= max(width, 500) and found["names"] == [] and found["touch"] >= 32
    assert (found["page"] == "rgb(20, 23, 27)") == (scheme == "dark")
