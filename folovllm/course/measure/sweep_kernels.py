"""Time the Triton kernels on the GPU at hand: this command writes `results/kernels-CARD.json`.

date, git, hardware, versions, command, dtype
rounds, calls      every number of seconds is {median, min, max, rounds} over that many rounds of a CUDA graph that
                   holds at least so many calls; it is the time of one call, without what Python takes to launch it
prefill            a list: shape (name, heads, kv_heads, head_dim), lengths (tokens of each request), flops (4 *
                   head_dim per query head and visible key), sdpa_s (torch's flash attention on the same requests,
                   contiguous), configs (name -> its numbers, seconds, share), shipped, best, left_out (name -> why)
                   share is sdpa_s / seconds, taken round by round: 1 is as fast as SDPA
decode             a list: shape, requests, kv_len, kv_bytes (keys and values that a call reads), copy_s (a copy on the
                   device of as many bytes), configs, shipped, best, left_out
                   share is a call's kv_bytes / seconds over the copy's 2 * kv_bytes / copy_s, since a copy reads and
                   writes: 1 is to read as fast as the card copies

picked             prefill and decode: head size -> config, the one to put into `folovllm.attention.triton_configs`: of
                   those that were timed for all shapes of that size, the one with the largest share (geometric mean)

shipped is the configuration that `folovllm.attention.triton_configs` has for the shape, and best the one with the
lowest median. Each result is compared with SDPA's before it is timed. The aims: a share of 0.7 (prefill), 0.8 (decode).

The file is saved after every entry. Where time on the GPU is short, take `--shapes` one by one, or `--shipped-only`.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from folovllm.attention.backend import AttentionParams, LayerKV
from folovllm.attention.metadata import AttentionMetadata
from folovllm.attention.triton_backend import INTERPRETED, TritonBackend
from folovllm.attention.triton_configs import KernelConfig, choose_configs
from folovllm.course.bench.report import save_report
from folovllm.course.bench.rounds import provenance, spread, turned
from folovllm.course.lessons.triton_compile import compile_attention
from folovllm.course.paths import RESULTS
from folovllm.math_utils import cdiv

DEVICE = torch.device("cuda")
BLOCK_SIZE = 16
COLD_BYTES = 2**29  # K/V that a decode goes through before it meets the same again: more than any cache holds
TOLERANCE = 2e-2  # of numbers below 1, relative for those above: a few steps of bfloat16
Timer = Callable[[Sequence[Callable[[], object]]], float]  # calls -> mean seconds of one of them


@dataclass(frozen=True)
class Shape:
    """The attention of a model. Query heads are a multiple of KV heads."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int


SHAPES = (
    Shape("qwen2.5-0.5b", 14, 2, 64),
    Shape("qwen3-0.6b", 16, 8, 128),
    Shape("llama-3-8b", 32, 8, 128),
    Shape("gemma-2-9b", 16, 8, 256),
)
PREFILLS = ((4096,), (1024,) * 8)  # tokens of each request
DECODES = ((1, 8192), (8, 4096), (64, 2048), (256, 1024))  # requests, tokens of K/V of each


def prefill_candidates() -> list[KernelConfig]:
    """What may be fast on a card with tensor cores."""
    cuts = product((64, 128), (32, 64, 128), (4, 8), (2, 3, 5), (True, False))
    return [KernelConfig(rows, tile, warps, stages, two_loops=two) for rows, tile, warps, stages, two in cuts]


def decode_candidates() -> list[KernelConfig]:
    """16 rows hold any usual group; what differs is how the keys are walked through."""
    cuts = product((16, 32, 64), (2, 4), (2, 3, 5), (8, 16, 32))
    return [KernelConfig(16, tile, warps, stages, segments) for tile, warps, stages, segments in cuts]


# ---------------------------------------------------------------------- what is timed


def make_batch(
    shape: Shape, lengths: Sequence[tuple[int, int]], layers: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[LayerKV], AttentionMetadata]:
    """Queries, filled pools and metadata of requests with (past, new) tokens each, in scattered blocks."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=torch.float32).to(dtype)

    kv_lens, query_lens = [sum(length) for length in lengths], [new for _, new in lengths]
    counts = [cdiv(length, BLOCK_SIZE) for length in kv_lens]
    order = (torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)) + 1).tolist()
    tables, slots = [], []
    for count, (past, new) in zip(counts, lengths, strict=True):
        tables.append(tuple(order[:count]))
        order = order[count:]
        slots += [tables[-1][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(past, past + new)]
    pool = (sum(counts) + 1, BLOCK_SIZE, shape.kv_heads, shape.head_dim)
    width = max(counts)
    meta = AttentionMetadata(
        torch.tensor([sum(query_lens[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32, device=device),
        torch.tensor(kv_lens, dtype=torch.int32, device=device),
        torch.tensor(slots, device=device),
        torch.tensor([[*table, *[0] * (width - len(table))] for table in tables], dtype=torch.int32, device=device),
        BLOCK_SIZE,
        query_lens,
        kv_lens,
        tables,
    )
    query = normal(sum(query_lens), shape.heads, shape.head_dim)  # [T, Hq, D]
    return query, [LayerKV(normal(*pool), normal(*pool)) for _ in range(layers)], meta


def gather(kv: LayerKV, meta: AttentionMetadata) -> tuple[Tensor, Tensor]:
    """Keys and values of requests of one length, contiguous: [R, Hkv, S, D] each."""
    tables = torch.tensor(meta.tables, device=kv.keys.device)  # [R, blocks]
    k, v = (x[tables].flatten(1, 2)[:, : meta.kv_lens[0]].transpose(1, 2).contiguous() for x in (kv.keys, kv.values))
    return k, v


def sweep_prefill(
    shape: Shape,
    lengths: Sequence[int],
    candidates: Sequence[KernelConfig],
    dtype: torch.dtype,
    device: torch.device,
    timer: Timer,
    rounds: int,
) -> dict[str, Any]:
    """One entry of `prefill`. lengths: equal ones, as SDPA wants them."""
    query, (kv,), meta = make_batch(shape, [(0, length) for length in lengths], 1, dtype, device)
    params = AttentionParams(shape.head_dim**-0.5)
    k, v = gather(kv, meta)
    q = query.view(len(lengths), lengths[0], *query.shape[1:]).transpose(1, 2).contiguous()  # [R, Hq, L, D]

    def sdpa() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True, scale=params.scale, enable_gqa=True)

    expected = sdpa().transpose(1, 2).flatten(0, 1)  # [T, Hq, D]
    shipped = choose_configs(dtype, shape.head_dim, capability_of(device))

    def attend(config: KernelConfig) -> list[Callable[[], Tensor]]:
        backend = TritonBackend(device, replace(shipped, prefill=config))
        return [partial(backend.attend, query, kv, meta, params)]

    found = sweep(shape, {"sdpa": [sdpa]}, attend, shipped.prefill, candidates, expected, dtype, device, timer, rounds)
    flops = sum(4 * shape.head_dim * shape.heads * length * (length + 1) // 2 for length in lengths)
    sdpa_s = found.seconds.pop("sdpa")
    shares = {name: [s / own for s, own in zip(sdpa_s, values, strict=True)] for name, values in found.seconds.items()}
    return {"shape": asdict(shape), "lengths": list(lengths), "flops": flops, "sdpa_s": spread(sdpa_s)} | found.to_json(
        shares
    )


def sweep_decode(
    shape: Shape,
    requests: int,
    kv_len: int,
    candidates: Sequence[KernelConfig],
    dtype: torch.dtype,
    device: torch.device,
    timer: Timer,
    rounds: int,
    cold_bytes: int = COLD_BYTES,
) -> dict[str, Any]:
    """One entry of `decode`."""
    kv_bytes = 2 * requests * kv_len * shape.kv_heads * shape.head_dim * dtype.itemsize
    layers = max(1, cdiv(cold_bytes, kv_bytes))
    query, pools, meta = make_batch(shape, [(kv_len - 1, 1)] * requests, layers, dtype, device)
    params = AttentionParams(shape.head_dim**-0.5)
    sources = [torch.empty(kv_bytes, dtype=torch.uint8, device=device) for _ in range(layers)]
    target = torch.empty(layers, kv_bytes, dtype=torch.uint8, device=device)
    copies: list[Callable[[], Any]] = [
        partial(copied.copy_, source) for copied, source in zip(target, sources, strict=True)
    ]
    shipped = choose_configs(dtype, shape.head_dim, capability_of(device))
    k, v = gather(pools[0], meta)
    expected = scaled_dot_product_attention(query[:, :, None], k, v, scale=params.scale, enable_gqa=True)[:, :, 0]

    def attend(config: KernelConfig) -> list[Callable[[], Tensor]]:
        backend = TritonBackend(device, replace(shipped, decode=config))
        return [partial(backend.attend, query, kv, meta, params) for kv in pools]

    found = sweep(shape, {"copy": copies}, attend, shipped.decode, candidates, expected, dtype, device, timer, rounds)
    copy_s = found.seconds.pop("copy")
    shares = {
        name: [(kv_bytes / own) / (2 * kv_bytes / s) for s, own in zip(copy_s, values, strict=True)]
        for name, values in found.seconds.items()
    }
    about = {"shape": asdict(shape), "requests": requests, "kv_len": kv_len, "kv_bytes": kv_bytes}
    return about | {"copy_s": spread(copy_s)} | found.to_json(shares)


# ---------------------------------------------------------------------- how


@dataclass
class Found:
    """Seconds by round, per arm. An arm that is a configuration has its name in `configs`."""

    seconds: dict[str, list[float]]
    configs: dict[str, KernelConfig]
    left_out: dict[str, str]
    shipped: str

    def to_json(self, shares: dict[str, list[float]]) -> dict[str, Any]:
        """The configurations as plain data, the fastest first."""
        names = sorted(self.configs, key=lambda name: median(self.seconds[name]))
        return {
            "shipped": self.shipped,
            "best": names[0],
            "configs": {
                name: {
                    **asdict(self.configs[name]),
                    "seconds": spread(self.seconds[name]),
                    "share": spread(shares[name]),
                }
                for name in names
            },
            "left_out": self.left_out,
        }


def sweep(
    shape: Shape,
    yardstick: dict[str, list[Callable[[], Any]]],
    attend: Callable[[KernelConfig], list[Callable[[], Tensor]]],
    shipped: KernelConfig,
    candidates: Sequence[KernelConfig],
    expected: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    timer: Timer,
    rounds: int,
) -> Found:
    """Time the yardstick and every configuration that fits and is right, all of them once per round."""
    arms, configs, left_out = dict(yardstick), {}, {}
    for config in dict.fromkeys((shipped, *candidates)):
        # What is shipped is timed even where another release of Triton spills it: that is worth knowing.
        reason = None if config == shipped else why_not(config, shape, dtype, device)
        if reason is None:
            calls = attend(config)
            apart = (calls[0]().float() - expected.float()).abs() / expected.float().abs().clamp(min=1)
            error = apart.max().item()
            reason = None if error < TOLERANCE else f"its result is off by {error:.2g}"
        if reason is not None and config == shipped:
            raise RuntimeError(f"the configuration for {shape.name} cannot be used here: {reason}")
        if reason is None:
            arms[label(config)], configs[label(config)] = calls, config
        else:
            left_out[label(config)] = reason
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds):
        for name in turned(list(arms), turn):
            seconds[name].append(timer(arms[name]))
    return Found(seconds, configs, left_out, label(shipped))


def pick(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Head size -> the configuration that is best over all entries of that size, and its share there."""
    picked = {}
    for dim in sorted({entry["shape"]["head_dim"] for entry in entries}):
        timed = [entry["configs"] for entry in entries if entry["shape"]["head_dim"] == dim]
        shares = {
            name: geometric_mean([configs[name]["share"]["median"] for configs in timed])
            for name in timed[0]
            if all(name in configs for configs in timed)
        }
        best = max(shares, key=lambda name: shares[name])  # there is one: what is shipped is in all of them
        picked[str(dim)] = {"config": best, "share": shares[best]}
    return picked


def why_not(config: KernelConfig, shape: Shape, dtype: torch.dtype, device: torch.device) -> str | None:
    """What speaks against launching it: a spill, or more of something than there is."""
    if INTERPRETED:
        return None
    major, minor = capability_of(device)
    heads = (shape.heads, shape.kv_heads)
    compiled = compile_attention(config, 10 * major + minor, dtype, shape.head_dim, heads, BLOCK_SIZE)
    return "; ".join(compiled.problems(tensor_cores=dtype != torch.float32)) or None


def label(config: KernelConfig) -> str:
    """The configuration as its call would be written."""
    return "KernelConfig(" + ", ".join(f"{name}={value}" for name, value in asdict(config).items()) + ")"


def capability_of(device: torch.device) -> tuple[int, int]:
    """The GPU's compute capability; where kernels are interpreted, that of the smallest table."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def graph_timer(calls: int) -> Timer:
    """Mean seconds of a call, by the GPU's clock, from a recorded graph of at least `calls`: no launch from Python."""

    def timer(works: Sequence[Callable[[], object]]) -> float:
        turns = max(1, cdiv(calls, len(works)))
        for work in works:  # compiled and warm before anything is recorded
            work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(turns):
                for work in works:
                    work()
        graph.replay()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000 / (turns * len(works))

    return timer


def main() -> None:
    """Sweep, print the best of each entry, and save after every entry."""
    parser = argparse.ArgumentParser(description="Time the Triton kernels on this GPU.")
    parser.add_argument("--parts", default="prefill,decode", help="prefill, decode, or both with a comma")
    parser.add_argument("--shapes", default=",".join(s.name for s in SHAPES), help="whose attention, comma-separated")
    parser.add_argument("--shipped-only", action="store_true", help="time only the configurations that are shipped")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--out", type=Path, help="default: results/kernels-CARD.json")
    options = parser.parse_args()
    parts, names = options.parts.split(","), options.shapes.split(",")
    for name, given, allowed in (("parts", parts, ["prefill", "decode"]), ("shapes", names, [s.name for s in SHAPES])):
        if not set(given) <= set(allowed):
            parser.error(f"--{name} {','.join(given)} is not valid; allowed: {', '.join(allowed)}, or several of them")
    for name, number in (("rounds", options.rounds), ("calls", options.calls)):
        if number < 1:
            parser.error(f"--{name} {number} is not valid; allowed: an integer >= 1")
    if not torch.cuda.is_available():
        parser.error("there is no GPU that torch can see here, and without one there is nothing to time")
    dtype, console = getattr(torch, options.dtype), Console()
    card = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(DEVICE).lower()).strip("-")
    typed = ["--parts", options.parts, "--shapes", options.shapes, "--dtype", options.dtype, "--rounds"]
    typed += [str(options.rounds), "--calls", str(options.calls), *["--shipped-only"] * options.shipped_only]
    report: dict[str, Any] = {
        "command": f"python -m folovllm.course.measure.sweep_kernels {shlex.join(typed)}",
        **provenance(DEVICE),
        "dtype": options.dtype,
        "rounds": options.rounds,
        "calls": options.calls,
        "prefill": [],
        "decode": [],
        "picked": {},
    }
    out = options.out or RESULTS / f"kernels-{card}.json"
    how = (dtype, DEVICE, graph_timer(options.calls), options.rounds)

    def add(part: str, what: str, entry: dict[str, Any]) -> None:
        report[part].append(entry)
        report["picked"][part] = pick(report[part])
        save_report(report, out)
        console.print(describe(f"{entry['shape']['name']} {part} {what}", entry), highlight=False)

    prefills, decodes = ([], []) if options.shipped_only else (prefill_candidates(), decode_candidates())
    for shape in (shape for shape in SHAPES if shape.name in names):
        for lengths in PREFILLS if "prefill" in parts else ():
            add("prefill", str(lengths), sweep_prefill(shape, lengths, prefills, *how))
        for requests, kv_len in DECODES if "decode" in parts else ():
            add("decode", f"{requests} x {kv_len}", sweep_decode(shape, requests, kv_len, decodes, *how))
    for part, picked in report["picked"].items():
        for dim, found in picked.items():
            console.print(f"{part}, head size {dim}: {found['config']} at {found['share']:.2f}", highlight=False)
    console.print(f"written: {out}", highlight=False)


def describe(what: str, entry: dict[str, Any]) -> str:
    """One line: what is shipped, and what would be faster."""
    configs = entry["configs"]
    lines = [f"{name} at {configs[entry[name]]['share']['median']:.2f}: {entry[name]}" for name in ("shipped", "best")]
    return f"{what}: " + "; ".join(lines)


if __name__ == "__main__":
    main()
