"""A report as tables for a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

MIB = 2**20
BUSY = 0.1  # if other programs use a larger share of the CPU, times are not reliable
TABLE_WIDTH = 100  # columns that the tables need
NAME_WIDTH = 13  # of a system's name: "hf:continuous"


def tables(report: dict[str, Any]) -> RenderableType:
    """The machine in a line, one table per workload, and what was not measured, with the reason."""
    return Group(*_parts(report))


def _parts(report: dict[str, Any]) -> Iterator[RenderableType]:
    yield Text(machine_line(report))
    yield Text(f"Medians of {count(len(report['rounds']), 'round')}. The base is {report['base']}.")
    for workload, rows in report["summary"].items():
        yield Text()
        yield workload_table(report, workload, rows)
        same = {name: row["same_tokens_as_base"] for name, row in rows.items() if name != report["base"]}
        counts = ", ".join(f"{name} {'/'.join(map(str, n))}" for name, n in same.items() if n is not None)
        if counts:
            yield Text(f"Requests with the same tokens as {report['base']}: {counts}")
        if (busiest := max(_others(row) for row in rows.values())) > BUSY:
            yield Text(
                f"Other programs used up to {share(busiest)} of the CPU during a run of {workload}: "
                "repeat it on a quiet machine.",
                style="bold red",
            )
    for workload, reasons in report["left_out"].items():
        for system, reason in reasons.items():
            yield Text(f"{workload}: no {system}: {reason}")
    if report["roofline_left_out"]:
        yield Text(f"no roofline: {report['roofline_left_out']}")


def machine_line(report: dict[str, Any]) -> str:
    """Model, hardware and measured ceilings."""
    read, gemm = report["machine"]["read_bytes_per_s"], report["machine"]["gemm_flops_per_s"]
    line = f"{report['model']}, {report['dtype']}, load format {report['load_format']}, {processor(report)}"
    if read is None:
        return line
    rates = ", ".join(f"m={m} {giga(s)}" for m, s in gemm.items())
    return f"{line}\nReads {giga(read)} GB/s. GEMM GFLOP/s: {rates}"


def processor(report: dict[str, Any]) -> str:
    """The processor, or the GPU."""
    hardware = report["hardware"]
    if hardware["gpu"]:
        return str(hardware["gpu"])
    return f"{hardware['cpu']} with {count(hardware['threads'], 'thread')}"


def workload_table(report: dict[str, Any], workload: str, rows: dict[str, dict[str, Any]]) -> Table:
    """One row per system. A cell has the median and, below it, the least and the greatest of the rounds."""
    scale = "" if report["scale"] == 1 else f" (lengths x {report['scale']:g})"
    table = Table(
        title=f"{workload}: {report['workloads'][workload]['about']}{scale}",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("system", no_wrap=True)
    for name in (
        "tokens/s\nmedian\nmin-max",
        "x base\nmedian\nmin-max",
        "of\nroof-\nline",
        "TTFT ms\np50\np99\nmax",
        "ITL ms\np50\np99\nmax",
        "KV MiB\nreserved\nused",
        "padded\nrows\nK/V",
        "over-\nhead",
        "peak\nMiB",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for system, row in rows.items():
        table.add_row(
            Text(_two_lines(system), style="bold" if not system.startswith("hf:") else ""),
            _stacked(row["output_tokens_per_s"], number),
            _stacked(row["ratio_to_base"], ratio),
            _median(row["roofline_share"], share),
            _lines(row, ("ttft_p50_s", "ttft_p99_s", "ttft_max_s"), milliseconds),
            _lines(row, ("itl_p50_s", "itl_p99_s", "itl_max_s"), milliseconds),
            _lines(row, ("kv_reserved_bytes", "kv_used_bytes"), mebibytes),
            _lines(row, ("padding_share", "kv_padding_share"), share),
            _median(row["overhead_share"], share),
            _median(row["peak_memory_bytes"], mebibytes),
            end_section=True,
        )
    return table


def _two_lines(system: str) -> str:
    """A long name on two lines: "hf:dynamic:4:0.25" would take too many columns."""
    if len(system) <= NAME_WIDTH:
        return system
    cut = max(system.rfind(":", 0, NAME_WIDTH + 1), system.rfind("@", 0, NAME_WIDTH + 1))
    return f"{system[:cut]}\n{system[cut:]}" if cut > 0 else system


def _stacked(summary: dict[str, Any] | None, form: Any) -> str:
    if summary is None:
        return "-"
    return f"{form(summary['median'])}\n{form(summary['min'])}-{form(summary['max'])}"


def _median(summary: dict[str, Any] | None, form: Any) -> str:
    return "-" if summary is None else form(summary["median"])


def _others(row: dict[str, Any]) -> float:
    return 0.0 if row["other_cpu_share"] is None else float(row["other_cpu_share"]["max"])


def _lines(row: dict[str, Any], names: tuple[str, ...], form: Any) -> str:
    if all(row[name] is None for name in names):
        return "-"
    return "\n".join(_median(row[name], form) for name in names)


# ------------------------------------------------------------------ numbers with significant digits


def count(how_many: int, what: str) -> str:
    """ "1 round", "2 rounds"."""
    return f"{how_many} {what}" if how_many == 1 else f"{how_many} {what}s"


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(value: float) -> str:
    """A factor with two decimals."""
    return f"{value:.2f}"


def share(value: float) -> str:
    """A share of one as a percentage."""
    return f"{value:.0%}" if value >= 0.1 or value == 0 else f"{value:.1%}"


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds."""
    return number(seconds * 1e3)


def mebibytes(count: float) -> str:
    """Bytes as MiB."""
    return number(count / MIB)


def giga(summary: dict[str, Any]) -> str:
    """A rate's median and spread, in billions."""
    low, mid, high = (number(summary[key] / 1e9) for key in ("min", "median", "max"))
    return mid if low == high else f"{mid} ({low}-{high})"
