"""The options that commands share, each with the meaning that it has for `LLM` or `SamplingParams`."""

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
    typer.Option(help=f"Which stage of the course runs it: {', '.join(MILESTONES)}. (m0 is examples/m0_inference.py.)"),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
LoadFormat = Annotated[str, typer.Option(help="auto, safetensors, or dummy: random weights from config.json alone.")]
MaxTokens = Annotated[int, typer.Option(help="The most tokens to generate per answer.")]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token; above, tokens are drawn.")]
TopP = Annotated[float, typer.Option(help="Draw from the smallest set of tokens with this much probability.")]
TopK = Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0 is off.")]
MinP = Annotated[float, typer.Option(help="Drop tokens less likely than this share of the likeliest.")]
Seed = Annotated[int | None, typer.Option(help="Makes drawn tokens repeatable.")]
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
        help="Tokens that one step may compute; if not given, 2048, or the longest sequence where that is more and "
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
    typer.Option(help=f"Who comes first: {', '.join(SCHEDULING_POLICIES)} (shortest job first). m1 knows fcfs only."),
]
BlockSize = Annotated[int, typer.Option(help="Tokens in a block of K/V.")]
NumKVBlocks = Annotated[
    int | None, typer.Option(help="Blocks of K/V that all requests share; as memory allows if not given.")
]
Preemption = Annotated[
    str,
    typer.Option(help=f"What becomes of the K/V of who gives way when blocks run out: {', '.join(PREEMPTION_MODES)}."),
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
        help="Take over K/V of prompts that begin alike; as the milestone says if not given.",
        show_default=False,
    ),
]
LongPrefill = Annotated[
    int, typer.Option(help="With chunks, the most tokens of one prompt in a step; 0 is as many as there is room for.")
]
TracePath = Annotated[
    Path | None,
    typer.Option(
        help="Record every step in this file. `folovllm replay` makes a page of it; ui.perfetto.dev and "
        "chrome://tracing open it, too."
    ),
]
