"""Command-line options, with the meaning of the same argument of `LLM` or `SamplingParams`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from folovllm.config import BATCHINGS, MILESTONES, PREEMPTION_MODES, SCHEDULING_POLICIES
from folovllm.models.loader import BUNDLED

Model = Annotated[
    str,
    typer.Option(help=f"A bundled name ({', '.join(BUNDLED)}), a local folder, or a hub id such as Qwen/Qwen3-0.6B."),
]
MilestoneName = Annotated[
    str,
    typer.Option(help=f"The preset: {', '.join(MILESTONES)}. (m0 is examples/m0_inference.py.)"),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
LoadFormat = Annotated[str, typer.Option(help="auto, safetensors, or dummy: random weights from config.json alone.")]
Generation = Annotated[
    str,
    typer.Option(
        help="Which generation_config.json counts: auto (the model's), vllm (none but for EOS ids) or a folder's. "
        "Options such as --temperature always win over it."
    ),
]
MaxTokens = Annotated[int, typer.Option(help="At most this many tokens per answer.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; above 0, tokens are drawn at random.")]
TopP = Annotated[float, typer.Option(help="Draw from the smallest set of tokens with this much probability.")]
TopK = Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0 is off.")]
MinP = Annotated[float, typer.Option(help="Drop tokens less likely than this share of the likeliest.")]
Seed = Annotated[int | None, typer.Option(help="Makes random tokens reproducible.")]
Stop = Annotated[list[str] | None, typer.Option(help="End an answer at this string. May be given more than once.")]
MaxModelLen = Annotated[
    int | None, typer.Option(help="Tokens of prompt and answer together; the model's own if not given.")
]
MaxNumSeqs = Annotated[
    int | None, typer.Option(help="Requests that may run at once; the milestone's default if not given.")
]
MaxNumBatchedTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens that one step may compute; if not given, 2048, or the longest sequence if that is more and "
        "prompts are not split."
    ),
]
Batching = Annotated[
    str | None,
    typer.Option(
        help=f"How m2 runs a step's requests: {' or '.join(BATCHINGS)} (one forward each); {BATCHINGS[0]} if not given."
    ),
]
Policy = Annotated[
    str,
    typer.Option(help=f"Order of the queue: {', '.join(SCHEDULING_POLICIES)} (shortest job first). m1 has fcfs only."),
]
BlockSize = Annotated[int, typer.Option(help="Tokens in a block of K/V.")]
NumKVBlocks = Annotated[
    int | None, typer.Option(help="Blocks of K/V in the pool; as many as memory allows if not given.")
]
Preemption = Annotated[
    str,
    typer.Option(help=f"What happens to a preempted request's K/V: {', '.join(PREEMPTION_MODES)}."),
]
ChunkedPrefill = Annotated[
    bool | None,
    typer.Option(
        "--enable-chunked-prefill/--no-enable-chunked-prefill",
        help="Compute prompts in chunks beside the decodes; as the milestone says if not given.",
        show_default=False,
    ),
]
PrefixCaching = Annotated[
    bool | None,
    typer.Option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        help="Reuse K/V of prompts with the same beginning; as the milestone says if not given.",
        show_default=False,
    ),
]
LongPrefill = Annotated[
    int, typer.Option(help="With chunked prefill, the most tokens of one request per step; 0 is no limit.")
]
TracePath = Annotated[
    Path | None,
    typer.Option(help="Record every step in this file, for `folovllm replay`, ui.perfetto.dev and chrome://tracing."),
]
