"""The errata: every claim has an entry and evidence, and the evidence is what was derived by hand or known before."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

from claims.ledger import text  # noqa: E402
from claims.registry import all_claims, claim_text  # noqa: E402
from errata.blocks import TablesWithoutCounts  # noqa: E402
from errata.finding import Evidence  # noqa: E402
from errata.run import main  # noqa: E402
from errata.themes import all_errata  # noqa: E402

PAGE = (DOCS / "errata.md").read_text(encoding="utf-8")
ERRATA = all_errata()
RIGHT = {"address", "seven-blocks", "exercise-5-1", "exercise-5-2", "exercise-5-3"}  # checked, and right

# Derived by hand, from papers and arithmetic on paper. Key by key, what the formula of a claim gives.
EXPECTED = {
    "attention-bottleneck": {"attention-flops": "16.4"},  # 4 x 32 x 128 x 1000 x 1000
    "unlike-work": {
        "claimed-10": "5.26",  # 1000 / 190
        "claimed-100": "50.25",  # 1,000,000 / 19,900
        "claimed-1000": "500.25",
        "linear-1000": "500.5",  # (n + 1) / 2
        "attention-1000": "667",  # (2n + 1) / 3
    },
    "heads-of-what": {
        "llama2-7b-wrong": "524,288",  # 2 x 32 x 32 x 128 x 2
        "llama2-7b-over": "1",
        "llama2-70b-wrong": "2,621,440",  # 2 x 80 x 64 x 128 x 2
        "llama2-70b-over": "8",
        "qwen25-wrong": "86,016",  # 2 x 24 x 14 x 64 x 2
        "qwen25-over": "7",
        "qwen3-wrong": "229,376",  # 2 x 28 x 16 x 128 x 2
        "qwen3-over": "2",
    },
    "gqa-in-llama-2": {"7b": "MHA", "13b": "MHA", "70b": "GQA", "70b-group": "8", "70b-bytes": "320 KiB"},
    "padding-example": {"cells": "2 of 111"},
    "padding-quadratic": {"once": "693", "rows": "2.14", "prompt": "2.01", "both": "4.31"},  # 1485, 1393, 2985
    "eight-rows": {"all": "801", "useful": "108"},  # 100 + 8 + 7 x 99
    "second-chunk": {"c-1000": "500", "c-600": "290 and 210"},
    "scheduler-with-models": {"asking": "0"},
    "sjf-in-vllm": {"fcfs": "75.75", "sjf": "1.5"},  # (0 + 100 + 101 + 102) / 4, (0 + 1 + 2 + 3) / 4
    "bytes-of-a-layer": {"gb": "0.134 GB", "gib": "0.125 GiB", "waste": "0.79 %"},  # 8 of 1008
    "paged-waste": {
        **{"paged-100": "10.71 %", "region-100": "97.6 %", "paged-500": "2.34 %", "region-500": "87.8 %"},
        **{"paged-1000": "0.79 %", "region-1000": "75.6 %", "paged-2000": "0.00 %", "region-2000": "51.2 %"},
    },
    "one-layer": {"region-gb": "4.29 GB", "blocks-gb": "0.537 GB"},  # 4 and 0.5 GiB
    "paging-removes-internal": {"most": "15", "mean": "7.5"},
    "sharing-without-counts": {"without": "4", "with": "0"},
    "short-prefix": {"blocks-of-16": "0", "blocks-of-4": "4"},
    "hash-is-identity": {"trusting": "16", "comparing": "0"},
    "lookup-on-the-worker": {"tensors": "0", "books": "block_manager.py"},
    "no-rescale": {
        **{"softmax": "0.292", "with": "0.292", "without": "0.546"},
        **{"sum-with": "3.473", "sum-without": "7.430"},
    },
    "paper-on-waste": {"orca": "61.8 to 79.6 %", "vllm": "3.7 %"},
    "table-of-systems": {"systems": "Orca (Max), Orca (Pow2), Orca (Oracle), vLLM"},
    "the-name": {"title": "Efficient Memory Management for Large Language Model Serving with PagedAttention"},
    "exercise-5-2": {"cells": "289", "true": "73"},  # 17 x 17; 3 + 15 + 55
}
# What the claims of chapters say that entries show: COURSE-wide values that must never drift.
KNOWN = {
    "kv-bytes-llama2-7b": "512 KiB",
    "kv-1000-llama2-7b": "500 MiB",
    "kv-10x500-llama2-7b": "2.44 GiB",
    "kv-100k": "48.8 GiB",
    "card-regions": "7",
    "card-tokens": "15,728",
    "card-requests": "30",
    "batch-layer-region": "4 GiB",
    "batch-layer-blocks": "512 MiB",
    "batch-region": "64 GiB",
    "batch-blocks": "8 GiB",
    "batch-saved": "87.5 %",
    "attention-crossing-full": "24,704",
    "attention-crossing-causal": "49,407",
    "page-physical": "14,096",
    "padding-exercise-cells": "13",
    "vllm-policies": "fcfs and priority",
}


# --- formulas ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ERRATA)
def test_a_formula_gives_what_was_derived_by_hand(name: str) -> None:
    start = f"erratum-{name}-"
    given = {claim_id.removeprefix(start): text(claim) for claim_id, claim in ERRATA[name].claims.items()}
    assert given == EXPECTED.get(name, {})


@pytest.mark.parametrize(("known", "shown"), KNOWN.items())
def test_what_entries_show_from_the_chapters(known: str, shown: str) -> None:
    assert any(known in erratum.known for erratum in ERRATA.values())
    assert claim_text(known) == shown


def test_the_ledger_has_every_finding() -> None:
    of_errata = {claim_id for erratum in ERRATA.values() for claim_id in erratum.claims}
    assert of_errata == {i for i in all_claims() if i.startswith("erratum-")}


def test_a_table_without_counts_is_right_until_a_request_ends() -> None:
    books = TablesWithoutCounts(8)
    books.take("a", 2)
    books.fork("a", "b")
    books.take("c", 2)
    assert books.tables["a"] == books.tables["b"] and not set(books.tables["a"]) & set(books.tables["c"])
    books.end("a")
    books.take("d", 1)
    assert set(books.tables["d"]) < set(books.tables["b"])


# --- experiments ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> dict[str, Evidence]:
    """Every experiment, once; but for the walk through the layers, which `test_pages` holds against its page."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    experiments = {name: e.experiment for name, e in ERRATA.items() if e.experiment and name != "exercise-5-3"}
    results = {name: experiment() for name, experiment in experiments.items()}
    torch.set_num_threads(threads)
    return results


def numbers(of: Evidence) -> dict[str, object]:
    return {key: finding.value() for key, finding in of.items()}


def test_without_order_a_prompt_leaves_other_keys(found: dict[str, Evidence]) -> None:
    got = numbers(found["prefill-not-causal"])
    assert got["logits"] > 1  # type: ignore[operator]
    assert got["layer-0"] == 0 and got["layer-1"] > 0.1  # type: ignore[operator]


def test_masks_that_are_right_and_masks_that_are_not(found: dict[str, Evidence]) -> None:
    triangles, rows = numbers(found["upper-triangle"]), numbers(found["decode-row"])
    assert max(triangles["lower"], rows["all"]) < 1e-3  # type: ignore[type-var, operator]
    assert min(triangles["upper"], rows["itself"]) > 1  # type: ignore[type-var, operator]


def test_both_loops_give_the_same_tokens_and_flops_are_counted(found: dict[str, Evidence]) -> None:
    got = numbers(found["ratio-of-flops"])
    assert got["same"] == "True"
    # folo-tiny: 4 layers of width 256, 8 and 2 heads of 32, MLP 832, vocabulary 2048; 16 + 64 tokens.
    weights, head = 4 * (2 * 256 * 256 + 2 * 256 * 64 + 3 * 256 * 832), 256 * 2048
    fed, pairs = sum(range(16, 80)), sum(length**2 for length in range(16, 80))
    without = 2 * weights * fed + 2 * head * 64 + 4 * 4 * 8 * 32 * pairs
    cached = 2 * weights * 79 + 2 * head * 64 + 4 * 4 * 8 * 32 * (16**2 + sum(range(17, 80)))
    assert got["flops"] == pytest.approx(without / cached)


def test_the_cache_of_hugging_face(found: dict[str, Evidence]) -> None:
    got = numbers(found["tuple-cache"])
    assert got["type"] == "DynamicCache" and got["shape"] == "[1, 2, 5, 32]" and got["heads"] == "8 and 2"
    assert got["tuples"] in ("ValueError", "AttributeError", "TypeError")
    grows = numbers(found["hf-preallocates"])
    assert [grows[f"after-{n}"] for n in (1, 10, 100)] == [2048, 20_480, 204_800]  # 4 layers x 2 x 2 x 32 x 4
    assert grows["longest"] > 10 * 204_800  # type: ignore[operator]


def test_a_loop_makes_a_forward_per_token(found: dict[str, Evidence]) -> None:
    assert numbers(found["loop-of-forwards"]) == {"m1": 4 * 12, "loop": 4 * 12, "padded": 12}


def test_packed_texts(found: dict[str, Evidence]) -> None:
    spread = float(claim_text("packed-spread"))
    cannot, enough = numbers(found["hf-cannot-pack"]), numbers(found["positions-are-enough"])
    assert cannot["mask"] < 1e-3 and cannot["nothing"] > spread  # type: ignore[operator]
    assert enough["positions"] < 1e-3 and enough["positions_with_cache"] > spread  # type: ignore[operator]
    texts = numbers(found["all-attend-to-all"])
    assert texts["a"] < 1e-3 and min(texts["b"], texts["c"]) > spread  # type: ignore[type-var, operator]


def test_positions_masks_and_scripts(found: dict[str, Evidence]) -> None:
    assert numbers(found["rope-needs-a-row"]) == {"difference": 0}
    assert numbers(found["mask-by-length"]) == {"prefill": "[2, 1, 5, 5]", "decode": "[2, 1, 1, 6]"}
    scripted = numbers(found["dict-in-a-kernel"])
    assert all(name.startswith("aten::") for name in str(scripted["graph"]).split(", "))
    assert scripted["dict"] in ("RuntimeError", "TypeError")


# --- the page ---------------------------------------------------------------------------------------------


def entries() -> dict[str, tuple[str, str]]:
    """The entries of the page by name: heading and text."""
    found = re.findall(
        r"^\(erratum-(\S+)\)=\n### ([^\n]+)\n(.*?)(?=^\(erratum-|^## |\Z)", PAGE, re.MULTILINE | re.DOTALL
    )
    return {name: (heading, text) for name, heading, text in found}


def test_every_claim_has_an_entry_in_its_place() -> None:
    assert {name: heading for name, (heading, _) in entries().items()} == {n: e.claim for n, e in ERRATA.items()}
    assert list(entries()) == list(ERRATA)
    assert PAGE.count("\n### ") == len(ERRATA)


@pytest.mark.parametrize("name", ERRATA)
def test_an_entry_says_why_and_shows_its_evidence(name: str) -> None:
    _, text = entries()[name]
    assert re.findall(r"^```\{evidence\} (\S+)$", text, re.MULTILINE) == [name]
    if name not in RIGHT:
        assert text.startswith("\n**Plausible**") and ("\n**But** " in text or "It is *paged*" in text)
    assert len(text.split("```{evidence}")[0].splitlines()) <= 12
    erratum = ERRATA[name]
    assert erratum.known or erratum.formula or erratum.experiment


def test_claims_of_the_source_texts_are_all_here() -> None:
    """The list of mistakes that the course was given, in its order."""
    assert set(ERRATA) - RIGHT == {
        # ragged batching
        *("padding-example", "hf-cannot-pack", "positions-are-enough", "all-attend-to-all", "rope-needs-a-row"),
        *("mask-by-length", "keys-are-new-tokens", "dict-in-a-kernel"),
        # attention and paging
        *("bytes-of-a-layer", "paged-waste", "one-layer", "hf-preallocates", "paper-on-waste", "factor-of-24"),
        *("table-of-systems", "sharing-without-counts", "the-name"),
        # the forward of a Hugging Face model
        *("tuple-cache", "ratio-of-flops"),
        # the report on continuous batching
        *("loop-of-forwards", "gpu-utilisation"),
        # the foundations of inference
        *("prefill-not-causal", "upper-triangle", "decode-row", "attention-bottleneck", "unlike-work"),
        *("heads-of-what", "gqa-in-llama-2", "mla-smallest", "waste-counted-twice", "buddy"),
        *("paging-removes-internal", "chunks-fit", "no-rescale", "short-prefix", "padding-quadratic", "eight-rows"),
        *("full-budget", "second-chunk", "sjf-in-vllm"),
        # met while the course was written
        *("continuous-no-padding", "hash-is-identity", "lookup-on-the-worker", "scheduler-with-models"),
    }


def test_boxes_in_chapters_lead_to_entries() -> None:
    led_to = []
    for chapter in sorted(DOCS.glob("chapters/*.md")):
        boxes = re.findall(r"^:::\{erratum\} .+\n(?::entry: (\S+)\n)?", chapter.read_text("utf-8"), re.MULTILINE)
        led_to += [(chapter.name, name) for name in boxes if name]
    assert [(page, name) for page, name in led_to if name not in ERRATA] == []
    assert len(led_to) >= 27


# --- the command ------------------------------------------------------------------------------------------


def test_the_command_lists_all_claims(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(ERRATA)
    assert all(line.endswith(erratum.claim) for line, erratum in zip(lines, ERRATA.values(), strict=True))


def test_the_command_shows_numbers_and_where_they_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["padding-example", "loop-of-forwards"]) == 0
    shown = capsys.readouterr().out
    assert "1.8 %" in shown and "60.9 %" in shown
    assert "2 of 111" in shown and "computed by docs/errata/batches.py:bitten_off" in shown
    assert "from results/m2-w2-qwen3-0.6b.json" in shown and "run by docs/errata/batches.py:forwards" in shown


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no-such-claim"]) == 2
    assert "'no-such-claim'" in capsys.readouterr().err
