"""M1: an engine around the model. One request at a time, with a sampler, stop rules, streaming and metrics.

python examples/m1_inference.py                               # questions from the glossary, to the bundled model
python examples/m1_inference.py --prompts "What is a KV cache?" "Tell me a joke" --max-tokens 64 --stream
python examples/m1_inference.py --model Qwen/Qwen3-0.6B --temperature 0.7     # with a network or local weights
python examples/m1_inference.py --model qwen3-0.6b --load-format dummy        # real shapes, random weights, offline
"""

from __future__ import annotations

from folovllm.entrypoints.start import prepare

if __name__ == "__main__":  # the imports below take seconds, and Ctrl-C should print one line then as well
    prepare()

import argparse

from rich.console import Console

from folovllm import LLM, SamplingParams
from folovllm.checks import check_int
from folovllm.entrypoints.cli import clean_exit, load_llm
from folovllm.entrypoints.tables import phase_table, request_table, stats_table
from folovllm.entrypoints.terminal import make_prompts, print_samples, print_stream, show_ids


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="folo-tiny", help="bundled name, local folder or hub id")
    parser.add_argument("--prompts", nargs="+", metavar="TEXT", help="questions; default: some from the glossary")
    parser.add_argument("--num-prompts", type=int, default=4, help="how many glossary questions to ask")
    parser.add_argument("--max-tokens", type=int, default=256, help="most tokens per answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    parser.add_argument("--seed", type=int, default=None, help="makes drawn tokens repeatable")
    parser.add_argument("--stream", action="store_true", help="show answers as they grow")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--load-format", default="auto", help="auto, safetensors or dummy (random weights)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Answer the prompts and print tables of latencies and counts."""
    args = parse_args(argv)
    console = Console()
    with clean_exit(console):
        check_int("num_prompts", args.num_prompts, 1)
        params = SamplingParams(temperature=args.temperature, seed=args.seed, max_tokens=args.max_tokens)
        llm: LLM = load_llm(
            console,
            args.model,
            milestone="m1",
            dtype=args.dtype,
            device=args.device,
            load_format=args.load_format,
        )
        titles, prompts = make_prompts(llm, args.prompts, args.num_prompts, raw=False)
        if args.stream:
            ids = llm.enqueue(prompts, params)
            outputs = print_stream(console, llm.follow(ids), dict(zip(ids, titles, strict=True)), show_ids(llm))
        else:
            outputs = llm.generate(prompts, params)
            for title, output in zip(titles, outputs, strict=True):
                print_samples(console, title, output, show_ids(llm))
        console.print(request_table(outputs), phase_table(llm.engine.trace), stats_table(llm.engine.stats))


if __name__ == "__main__":
    main()
