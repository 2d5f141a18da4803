"""M0: the same text generated without and with a KV cache, side by side.

    python examples/m0_inference.py
    python examples/m0_inference.py --prompts "What is a KV cache?" "What is paging?" --max-tokens 100
    python examples/m0_inference.py --model qwen3-0.6b --load-format dummy --max-tokens 16

The loops are in folovllm/baseline.py. For each prompt: whether the tokens are equal, milliseconds per token
at the start and at the end of the text, the ratio of times (measured in this run) beside the ratio of FLOPs
(derived from the model's config), and the bytes of the cache.
"""

from __future__ import annotations

from folovllm.entrypoints.start import prepare

if __name__ == "__main__":  # the imports below take seconds, and Ctrl-C should print one line then as well
    prepare()

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from folovllm.baseline import BaselineResult, generate_cached, generate_recompute
from folovllm.config import LOAD_FORMATS
from folovllm.course.glossary import default_prompts
from folovllm.course.lessons.baseline_report import BaselineReport, compare
from folovllm.entrypoints.terminal import clean_exit
from folovllm.models.loader import (
    eos_token_ids,
    load_config,
    load_generation_config,
    load_hf_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
    resolve_model,
)

EDGE = 8  # decode steps averaged at either end of the text
LOOPS = (("without a cache", generate_recompute), ("with a cache", generate_cached))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Generate text without and with a KV cache; compare tokens, time, FLOPs and memory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="folo-tiny", help="bundled name, local folder or hub id")
    add("--prompts", nargs="+", help="texts; by default questions from the glossary")
    add("--num-prompts", type=positive, default=3, help="how many, without --prompts")
    add("--prompt-tokens", type=positive, default=32, help="prompt length for a model without a tokenizer")
    add("--max-tokens", type=positive, default=64, help="new tokens per prompt at most")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--seed", type=int, default=0, help="of sampling, dummy weights and random prompts")
    add("--dtype", default="float32", help="auto, float32, bfloat16 or float16")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--load-format", default="auto", choices=LOAD_FORMATS, help="dummy: random weights")
    return parser.parse_args()


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def main() -> None:
    args = parse_args()
    console = Console()
    source = resolve_model(args.model)
    config = load_config(source)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, config, device)
    tokenizer = load_tokenizer(source)
    eos = eos_token_ids(config, load_generation_config(source), tokenizer)
    prompts = make_prompts(args, tokenizer, config.get_text_config().vocab_size)
    model = load_hf_model(source, dtype, device, args.load_format, args.seed)
    threads = f"{torch.get_num_threads()} CPU threads"
    console.print(f"{source.name}: {dtype} on {device}, {threads}, torch {torch.__version__}", markup=False)

    # Warm-up: the first forward passes of a process include one-time set-up.
    compare(config, *(generate(model, prompts[0][1], max_new_tokens=2) for _, generate in LOOPS))

    for text, prompt in prompts:
        console.print()
        console.print(text, style="bold", markup=False)
        results = []
        for title, generate in LOOPS:
            console.print(f"{title}: ", style="dim", end="")
            results.append(run(console, generate, model, tokenizer, prompt, eos, args))
        console.print(report_table(compare(config, *results), *results))


def make_prompts(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> list[tuple[str, list[int]]]:
    """For each prompt, the text to show and its token ids, in the model's chat format if it has one."""
    if tokenizer is None:
        if args.prompts:
            raise ValueError(f"--prompts: model={args.model!r} has no tokenizer, so it cannot read text")
        numbers, length = random.Random(args.seed), args.prompt_tokens
        ids = [[numbers.randrange(vocab_size) for _ in range(length)] for _ in range(args.num_prompts)]
        return [(f"{length} random token ids", prompt) for prompt in ids]
    prompts = []
    for text in args.prompts or default_prompts(args.num_prompts):
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": text}]
            chat = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            prompts.append((text, tokenizer.encode(chat, add_special_tokens=False)))
        else:
            prompts.append((text, tokenizer.encode(text)))
    return prompts


def run(
    console: Console,
    generate: Callable[..., BaselineResult],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: list[int],
    eos: tuple[int, ...],
    args: argparse.Namespace,
) -> BaselineResult:
    """Run one loop on one prompt, and print its text as it is generated."""
    stream = TextStream(console, tokenizer)
    result = generate(model, prompt, args.max_tokens, eos, args.temperature, args.seed, on_token=stream.put)
    stream.end()
    return result


@dataclass
class TextStream:
    """Prints tokens as text as they are generated; without a tokenizer, their ids."""

    console: Console
    tokenizer: PreTrainedTokenizerBase | None
    token_ids: list[int] = field(default_factory=list)
    printed: int = 0  # characters of the text

    def put(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        # A character may span several tokens. It decodes to U+FFFD until the last of them, so it is held back.
        if not self._text().endswith("\N{REPLACEMENT CHARACTER}"):
            self._print_rest()

    def end(self) -> None:
        self._print_rest()
        self.console.print()

    def _text(self) -> str:
        if self.tokenizer is None:
            return "".join(f"{token_id} " for token_id in self.token_ids)
        return str(self.tokenizer.decode(self.token_ids, skip_special_tokens=True))

    def _print_rest(self) -> None:
        text = self._text()
        self.console.print(text[self.printed :], end="", markup=False, highlight=False, soft_wrap=True)
        self.printed = len(text)


def report_table(report: BaselineReport, recompute: BaselineResult, cached: BaselineResult) -> Table:
    table = Table(title=f"{report.prompt_len} prompt tokens, {report.new_tokens} new", title_style="dim")
    table.add_column("")
    for column in ("without cache", "with cache", "ratio"):
        table.add_column(column, justify="right")

    def add_mean(name: str, start: int, stop: int) -> None:
        means = [1e3 * sum(r.token_times[start:stop]) / (stop - start) for r in (recompute, cached)]
        table.add_row(name, *(f"{mean:.2f} ms" for mean in means), f"{means[0] / means[1]:.1f}x")

    n = report.new_tokens
    edge = min(EDGE, n - 1)
    add_mean("first token (prefill)", 0, 1)
    if edge:
        add_mean(f"each of the first {edge} decoded", 1, 1 + edge)
        add_mean(f"each of the last {edge} decoded", n - edge, n)
    seconds = [f"{s:.3f} s" for s in (report.seconds_recompute, report.seconds_cached)]
    table.add_row("all, measured", *seconds, f"{report.time_ratio:.1f}x", style="bold")
    gflops = [f"{f.total / 1e9:.3f} GFLOP" for f in (report.flops_recompute, report.flops_cached)]
    table.add_row("work, derived", *gflops, f"{report.flop_ratio:.1f}x", style="bold")
    table.add_row("KV cache at the end", "0 B", f"{report.kv_bytes:,} B", "")
    table.add_row("tokens equal?", "", "yes" if report.same_tokens else "NO", "")
    return table


if __name__ == "__main__":
    with clean_exit(Console()):
        main()
