"""The pool of blocks in the live view: which request holds which physical block after the newest step.

A cell is one block, two characters wide, and readable without colour. The letter is the request, as at the left of its
row: a capital if the block is full, else a small letter. The second character is the fill level, or the reference
count if it is above 1:

    "A "   full, in A's block table only            "a▄"   in A's block table only, half of its slots are written
    "A3"   full, in three block tables, A's too     "A+"   the same, in ten or more
    "a3"   partly full, in three block tables       "· "   free
    "◦ "   free, and still in the prefix cache: a prefix hit reuses it until it is evicted

In a larger pool a cell is one character for several blocks, as high as the share of them that is held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rich.text import Text

from folovllm.course.viz.live_state import LiveState
from folovllm.kv_cache.interface import BlockCopy, BlockSnapshot, SwapIn, SwapOut

LEVELS, LEVELS_ASCII = " ▁▂▃▄▅▆▇█", " .:-=+*#@"
COLORS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#9D8DF1")
SHARED, FREE, CACHED = "white", "bright_black", "bright_white"
ON_SHARED = f"bold black on {SHARED}"
MOST_NAMED = 5  # preempted requests that are named; the others are counted
MOST_NEXT = 3  # of the cached blocks that are evicted next

Cell = tuple[str, str]  # text and style


def level(part: int, whole: int, ascii_only: bool) -> str:
    """One character whose height is part / whole, rounded up: blank only for 0."""
    levels = LEVELS_ASCII if ascii_only else LEVELS
    return levels[-(-part * (len(levels) - 1) // max(1, whole))]


def part_mark(filled: int, size: int, ascii_only: bool) -> str:
    """The fill level of a partly full block: never the highest level."""
    return (LEVELS_ASCII if ascii_only else LEVELS)[-(-7 * filled // max(1, size - 1))]


def letter(number: int) -> str:
    """The letter of owner `number`. Letters repeat after Z."""
    return chr(ord("A") + number % 26)


def swatch(number: int) -> Cell:
    """The cell of a full block of that owner."""
    return f"{letter(number)} ", f"black on {COLORS[number % len(COLORS)]}"


def owners_of(tables: Mapping[str, Sequence[int]], owners: Mapping[str, int]) -> dict[int, int]:
    """The owner of each held block: of the requests that hold it, the one with the smallest number."""
    found: dict[int, int] = {}
    for request_id, blocks in tables.items():
        number = owners[request_id]
        for block in blocks:
            found[block] = min(number, found.get(block, number))
    return found


def free_cell(ascii_only: bool) -> Cell:
    """The cell of a free block."""
    return ("_ " if ascii_only else "· "), FREE


def cached_cell(ascii_only: bool) -> Cell:
    """The cell of a free block that is in the prefix cache."""
    return ("o " if ascii_only else "◦ "), CACHED


def device_cell(blocks: BlockSnapshot, block: int, owner: int | None, ascii_only: bool) -> Cell:
    """The cell of a block of the pool."""
    if owner is None:
        return cached_cell(ascii_only) if block in blocks.cached else free_cell(ascii_only)
    holders, filled = blocks.ref_cnt[block], blocks.filled[block]
    text, style = swatch(owner)
    if holders > 1:
        text, style = f"{text[0]}{holders if holders < 10 else '+'}", ON_SHARED
    if filled < blocks.block_size:
        mark = part_mark(filled, blocks.block_size, ascii_only) if holders == 1 else text[1]
        text, style = text[0].lower() + mark, SHARED if holders > 1 else COLORS[owner % len(COLORS)]
    return text, style


def crowded_cell(held: Sequence[int | None], size: int, ascii_only: bool, any_cached: bool = False) -> Cell:
    """The cell of `size` blocks. held: the owner of each held block, or None if the block is shared.

    any_cached: whether any free block among them is in the prefix cache.
    """
    if not held:
        text, style = cached_cell(ascii_only) if any_cached else free_cell(ascii_only)
        return text[0], style
    (most, _), *_ = Counter(held).most_common(1)
    return level(len(held), size, ascii_only), SHARED if most is None else COLORS[most % len(COLORS)]


def blocks_per_cell(num_blocks: int, width: int, rows: int) -> int:
    """1 if each block fits as a cell of two characters; else the smallest round number of blocks per cell that fits."""
    if num_blocks <= rows * per_row(width // 2):
        return 1
    sizes = (factor * 10**power for power in range(10) for factor in (1, 2, 5))
    return next(size for size in sizes if size > 1 and num_blocks <= size * rows * per_row(width))


def per_row(cells: int) -> int:
    """Cells per row where `cells` fit: a multiple of ten, so that block numbers are easy to count."""
    return cells - cells % 10 if cells > 10 else max(1, cells)


def rows_of(cells: Sequence[Cell], row_len: int, per_cell: int, digits: int) -> list[Text]:
    """Cells in rows. Each row begins with the number of its first block."""
    lines = []
    for start in range(0, len(cells), row_len):
        line = Text(f"{1 + start * per_cell:>{digits}} ", no_wrap=True, overflow="crop")
        for text, style in cells[start : start + row_len]:
            line.append(text, style)
        lines.append(line)
    return lines


def device_map(
    blocks: BlockSnapshot, owners: Mapping[str, int], width: int, rows: int, ascii_only: bool
) -> tuple[list[Text], int]:
    """The pool as at most `rows` lines of at most `width` characters, and the number of blocks per cell."""
    num_blocks = len(blocks.ref_cnt) - 1
    digits = len(str(num_blocks))
    width = max(1, width - digits - 1)
    holders = owners_of(blocks.tables, owners)
    size = blocks_per_cell(num_blocks, width, rows)
    if size == 1:
        cells = [device_cell(blocks, block, holders.get(block), ascii_only) for block in range(1, num_blocks + 1)]
        return rows_of(cells, per_row(width // 2), 1, digits), 1
    held: list[list[int | None]] = [[] for _ in range(0, num_blocks, size)]
    for block, owner in holders.items():
        held[(block - 1) // size].append(owner if blocks.ref_cnt[block] == 1 else None)
    cached = {(block - 1) // size for block in blocks.cached}  # cells with a cached block
    last = num_blocks - size * (len(held) - 1)  # blocks of the last cell
    sizes = [size] * (len(held) - 1) + [last]
    cells = [
        crowded_cell(owners, count, ascii_only, index in cached)
        for index, (owners, count) in enumerate(zip(held, sizes, strict=True))
    ]
    return rows_of(cells, per_row(width), size, digits), size


def host_line(blocks: BlockSnapshot, owners: Mapping[str, int], width: int) -> Text:
    """The blocks swapped to the host, request by request. Cells that do not fit are counted."""
    line = Text(no_wrap=True, overflow="crop")
    held = [swatch(owners[request_id]) for request_id, table in blocks.host_tables.items() for _ in table]
    shown = max(0, width // 2 - (0 if 2 * len(held) <= width else 8))
    for text, style in held[:shown]:
        line.append(text, style)
    if len(held) > shown:
        line.append(f"and {len(held) - shown:,} more")
    return line if held else Text("nothing")


def counts_line(state: LiveState, blocks: BlockSnapshot) -> Text:
    """Counts of held, shared and free blocks, and the copies and swaps of the step."""
    ops = [] if state.step is None else state.step.kv_ops
    shared = sum(count > 1 for count in blocks.ref_cnt)
    held = len(blocks.ref_cnt) - 1 - blocks.num_free
    done = [
        f"{count} {word}"
        for kind, word in ((BlockCopy, "copied"), (SwapOut, "swapped out"), (SwapIn, "swapped in"))
        if (count := sum(isinstance(op, kind) for op in ops))
    ]
    now = f"; in this step {', '.join(done)}" if done else ""
    return Text(f"{held:,} held, {shared:,} of them shared, {blocks.num_free:,} free{now}")


def preempted_line(state: LiveState, blocks: BlockSnapshot) -> Text:
    """The requests that are preempted now, in the order in which they resume."""
    times = state.stats.preemptions
    if not state.preempted:
        return Text(f"none now, {times:,} time{'s' * (times > 1)} so far" if times else "none so far")
    line = Text()
    named = state.preempted[:MOST_NAMED]
    for words, ids in (
        ("on the host", [i for i in named if i in blocks.host_tables]),
        ("dropped", [i for i in named if i not in blocks.host_tables]),
    ):
        for request_id in ids:
            line.append(", " if request_id != ids[0] else "; " if line else "")
            if request_id in blocks.host_tables:
                line.append(*swatch(state.owners[request_id])).append(" ")
            line.append(request_id)
        line.append(f" {words}" if ids else "")
    more = len(state.preempted) - len(named)
    return line.append(f"; and {more} more" if more else "")


def cache_line(state: LiveState, blocks: BlockSnapshot) -> Text:
    """The hit rate so far, the number of evicted blocks, and the cached free blocks that are evicted next."""
    rate, idle = state.stats.hit_rate or 0.0, [block for block in blocks.free if block in blocks.cached]
    line = Text(f"hit rate {rate:.0%}; {state.num_evicted:,} evicted; {len(idle):,} free")
    return line.append(f"; evict next {', '.join(map(str, idle[:MOST_NEXT]))}" if idle else "")


def legend_lines(size: int, width: int, ascii_only: bool, uses_cache: bool = False) -> list[Text]:
    """The legend of the map, on one line if it fits `width`, otherwise on two."""
    levels = LEVELS_ASCII if ascii_only else LEVELS
    free, cached = free_cell(ascii_only), cached_cell(ascii_only)
    if size == 1:
        only_cached = Text.assemble(cached, "free, cached")
        groups = [
            [
                Text("letter = request below"),
                Text.assemble(swatch(0), "full"),
                Text.assemble(("a", COLORS[0]), " partly full"),
                Text.assemble((levels[1], COLORS[0]), " to ", (levels[-2], COLORS[0]), " how full"),
            ],
            [
                Text.assemble(("A3", ON_SHARED), " in 3 block tables, ", ("A+", ON_SHARED), " in 10 or more"),
                Text.assemble(free, "free"),
                only_cached,
            ],
        ]
    else:
        only_cached = Text.assemble((cached[0][0], cached[1]), " free, cached")
        groups = [
            [
                Text(f"1 cell = {size:,} blocks"),
                Text(f"{levels[1]} to {levels[-1]} held"),
                Text.assemble((free[0][0], free[1]), " all free"),
                only_cached,
            ],
            [Text("colour = request below that holds most of it, white = shared")],
        ]
    gap = Text("  ")
    fits = len(gap.join(part for group in groups for part in group)) <= width
    if not uses_cache:  # `fits` includes it, so that the view does not jump at the first cached block
        groups = [[part for part in group if part is not only_cached] for group in groups]
    return [gap.join(part for group in groups for part in group)] if fits else [gap.join(group) for group in groups]


def pool_lines(state: LiveState, width: int, rows: int, ascii_only: bool) -> list[tuple[str, Text]]:
    """The block part of the view as (label, line of at most `width` characters); [] without snapshots.

    The map takes at most `rows` of the lines.
    """
    blocks = state.blocks
    if blocks is None:
        return []
    cells, size = device_map(blocks, state.owners, width, rows, ascii_only)
    lines = [
        ("preempted", preempted_line(state, blocks)),
        ("pool", counts_line(state, blocks)),
        *zip(["blocks", *[""] * (len(cells) - 1)], cells, strict=True),
    ]
    if state.uses_host:
        lines.append(("host", host_line(blocks, state.owners, width)))
    if state.uses_cache:
        lines.append(("cache", cache_line(state, blocks)))
    legend = legend_lines(size, width, ascii_only, state.uses_cache)
    return [*lines, *zip(["legend", *[""] * (len(legend) - 1)], legend, strict=True)]
