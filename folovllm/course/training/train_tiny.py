"""Train `folo-tiny`, the model that ships with folovllm, from the glossary and prose in `folovllm/assets`.

    python -m folovllm.course.training.train_tiny            # the shipped model; minutes on two CPU cores
    python -m folovllm.course.training.train_tiny --quick    # a few steps into a temporary folder

The model memorises 192 answers and nothing else, so that greedy decoding gives readable text that a test can
compare character by character. Three choices follow from that:

* Rows are generated anew at every step: an optional system prompt (none, a written one, a passage of the prose,
  or random tokens), then question/answer turns in random order. An answer must not depend on the text before it.
* The loss has weight 1 for answers and a small one for the rest: a random next question cannot be learned.
* Weight matrices are trained with Muon (https://kellerjordan.github.io/posts/muon), embedding and norms with
  AdamW; the learning rate warms up, stays, and decays linearly to zero.

The folder is written beside its target and moved into place only if the evaluation passes.
"""

from __future__ import annotations

import json
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: on a busy machine, spinning threads cost 2x

import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from folovllm.course.glossary import GlossaryEntry, load_glossary, load_prose
from folovllm.course.paths import ROOT
from folovllm.course.training.tiny_corpus import (
    ANSWER_TOKENS,
    END_OF_TEXT,
    IM_END,
    MAX_POSITIONS,
    PAD,
    ROW_TOKENS,
    SYSTEM_PROMPTS,
    Batch,
    RowMaker,
    batches,
    check_answer_lengths,
    train_tokenizer,
    write_tokenizer,
)

MAX_BYTES = 8_000_000
MIN_EXACT = 0.95


# --- model and training ----------------------------------------------------------------------------------


def build_model(tokenizer: Tokenizer) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3: 4 layers, width 256, 8 query heads over 2 KV heads, tied embedding."""
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=832,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        eos_token_id=tokenizer.token_to_id(IM_END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.token_to_id(IM_END), tokenizer.token_to_id(END_OF_TEXT)],
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    return model


def learning_rate(step: int, steps: int) -> float:
    """Warm-up, stable, linear decay to zero over the last half; as a share of the peak."""
    return min(1.0, (step + 1) / (0.03 * steps + 1), (steps - step) / (0.5 * steps))


def train(
    model: Qwen3ForCausalLM,
    data: Iterator[Batch],
    steps: int,
    muon_lr: float,
    adam_lr: float,
    autocast: bool,
    report: Callable[[int, float, float], None],
) -> None:
    """Train in place; `report(step, loss, exact)` gets running means.

    `exact` is the share of answers whose every token, end mark included, was the argmax, so that greedy decoding in
    the same context produces the answer.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = (muon_lr, adam_lr)
    mean_loss = mean_exact = 0.0
    model.train()
    for step in range(steps):
        scale = learning_rate(step, steps)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
        batch = next(data)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids=batch.ids, use_cache=False).logits  # [B, L, V]
        targets, weights = batch.ids[:, 1:], batch.weights[:, 1:]
        losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none")  # [B, L-1]
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        right = (logits[:, :-1].argmax(-1) == targets).tolist()
        exact = sum(all(right[i][start - 1 : end - 1]) for i, start, end in batch.answers) / max(1, len(batch.answers))
        keep = min(0.95, step / (step + 1))
        mean_loss = keep * mean_loss + (1 - keep) * loss.item()
        mean_exact = keep * mean_exact + (1 - keep) * exact
        report(step + 1, mean_loss, mean_exact)
    model.eval()


def round_to_bf16(model: Qwen3ForCausalLM) -> None:
    """Round every weight to a bf16 value, so that the evaluated weights are the stored ones."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())


# --- evaluation ------------------------------------------------------------------------------------------


Prompt = str | list[dict[str, str]]  # bare text, or chat messages


def evaluation_prompts(entries: list[GlossaryEntry], document: str) -> dict[str, list[tuple[GlossaryEntry, Prompt]]]:
    """The settings in which an answer must be exact, each as (entry, prompt) pairs."""

    def chat(entry: GlossaryEntry, *before: dict[str, str]) -> tuple[GlossaryEntry, Prompt]:
        return entry, [*before, {"role": "user", "content": entry.question}]

    def system(text: str) -> dict[str, str]:
        return {"role": "system", "content": text}

    first = entries[0]
    turn = ({"role": "user", "content": first.question}, {"role": "assistant", "content": first.answer})
    return {
        "chat": [chat(e) for e in entries],
        "system_prompt": [chat(e, system(SYSTEM_PROMPTS[0])) for e in entries],
        "document_prompt": [chat(e, system(document[:3000])) for e in entries],
        "second_turn": [chat(e, *turn) for e in entries],
        "lower_case": [(e, [{"role": "user", "content": e.question.lower().rstrip("?")}]) for e in entries],
        "plain": [(e, e.question) for e in entries],
    }


@torch.inference_mode()
def recite(folder: Path, prompts: list[Prompt], batch_size: int = 32) -> list[str]:
    """Greedy float32 HF `generate` from the files in `folder`. Returns the texts, each with its end mark."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    outputs: list[str] = []
    for start in range(0, len(prompts), batch_size):
        texts = [
            p if isinstance(p, str) else tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True)
            for p in prompts[start : start + batch_size]
        ]
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=ANSWER_TOKENS[1] + 16)
        for row in ids[:, inputs["input_ids"].shape[1] :].tolist():
            outputs.append(str(tokenizer.decode([t for t in row if t != tokenizer.pad_token_id])))
    return outputs


def evaluate(folder: Path, entries: list[GlossaryEntry], document: str) -> dict[str, list[str]]:
    """For each setting, the terms whose answer was not exact, end mark included."""
    not_exact: dict[str, list[str]] = {}
    for setting, pairs in evaluation_prompts(entries, document).items():
        pairs = sorted(pairs, key=lambda pair: len(pair[0].answer))  # answers of similar length end together
        before, end = ("\n", END_OF_TEXT) if setting == "plain" else ("", IM_END)
        outputs = recite(folder, [prompt for _, prompt in pairs])
        not_exact[setting] = [e.term for (e, _), o in zip(pairs, outputs, strict=True) if o != before + e.answer + end]
    return not_exact


# --- command ---------------------------------------------------------------------------------------------


def model_card(model: Qwen3ForCausalLM) -> str:
    """The README beside the weights."""
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# folo-tiny

A {model.num_parameters():,}-parameter Qwen3 model that has learned the folovllm glossary by heart. It exists so that
the course, its examples and its tests have real text to generate with no download.

* **Made by** `python -m folovllm.course.training.train_tiny` in the folovllm repository, from random weights, on a
  CPU, with a fixed seed. `results/train_tiny.json` holds the run's measured figures.
* **Data**: the question/answer pairs in `folovllm/course/assets/glossary` and the passages in
  `folovllm/course/assets/prose`, written for this project. Nothing else.
* **Format**: Hugging Face `Qwen3ForCausalLM`, bfloat16 safetensors, byte-level BPE with {model.config.vocab_size}
  tokens, ChatML template, {MAX_POSITIONS} positions. A question sent as a chat message is answered and closed with
  `{IM_END}`; a question sent as bare text is answered on the next line and closed with `{END_OF_TEXT}`.
* **What it is not**: a language model for any use. It recites; to a question outside the glossary it answers with
  the nearest entry. It knows no facts beyond the glossary, and no language but its English.
* **Licence**: Apache-2.0, as the repository.
"""


def machine() -> dict[str, object]:
    """The machine and the versions of the training run."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def replace_folder(source: Path, target: Path) -> None:
    """Replace `target` by `source`: two renames on one file system, undone if the second one is interrupted."""
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        target.rename(old)
    try:
        source.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def write_model(model: Qwen3ForCausalLM, tokenizer: Tokenizer, folder: Path) -> int:
    """Write the whole model folder; returns its size in bytes."""
    model.bfloat16().save_pretrained(folder)
    write_tokenizer(tokenizer, folder)
    (folder / "README.md").write_text(model_card(model), encoding="utf-8")
    folder.chmod(0o755)  # temporary folders and safetensors files are made private
    for file in folder.iterdir():
        file.chmod(0o644)
    return sum(file.stat().st_size for file in folder.iterdir())


def main(
    out: Annotated[Path | None, typer.Option(help="Model folder to write.")] = None,
    results: Annotated[Path | None, typer.Option(help="JSON file for the metrics.")] = None,
    steps: Annotated[int, typer.Option(help=f"Optimizer steps of {ROW_TOKENS} tokens.")] = 700,
    vocab_size: int = 2048,
    muon_lr: float = 0.02,
    adam_lr: float = 3e-3,
    seed: int = 0,
    threads: int = 2,
    autocast: Annotated[bool, typer.Option(help="bf16 matmuls; slower on a CPU without them.")] = True,
    quick: Annotated[bool, typer.Option(help="A few steps into a temporary folder, whatever the accuracy.")] = False,
) -> None:
    """Train folo-tiny, evaluate it, and move it into place if at least 95 % of the answers are exact."""
    console = Console()
    if quick:
        steps = min(steps, 4)
        scratch = Path(tempfile.mkdtemp(prefix="folo-tiny-quick-"))
        out, results = out or scratch / "folo-tiny", results or scratch / "train_tiny.json"
    out = out or ROOT / "folovllm" / "assets" / "folo-tiny"
    results = results or ROOT / "results" / "train_tiny.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    transformers.utils.logging.disable_progress_bar()

    began = time.perf_counter()
    entries, prose = load_glossary(), load_prose()
    texts = [t for e in entries for t in (e.question, e.answer)] + list(prose.values()) + list(SYSTEM_PROMPTS)
    tokenizer = train_tokenizer(texts, vocab_size)
    lengths = check_answer_lengths(tokenizer, entries)
    model = build_model(tokenizer)
    console.print(
        f"{len(entries)} entries, answers of {min(lengths)} to {max(lengths)} tokens ({sum(lengths)} in all); "
        f"vocabulary {tokenizer.get_vocab_size()}, {model.num_parameters():,} parameters"
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("training", total=steps)

        def report(step: int, loss: float, exact: float) -> None:
            description = f"loss {loss:.4f}, exact {exact:.1%}"
            progress.update(task, completed=step, description=description)
            if not console.is_terminal and step % 50 == 0:
                console.print(f"step {step}: {description}, {time.perf_counter() - began:.0f} s")

        train(model, batches(RowMaker(tokenizer, entries, prose, seed)), steps, muon_lr, adam_lr, autocast, report)
    trained = time.perf_counter() - began

    round_to_bf16(model)
    folder = Path(tempfile.mkdtemp(prefix=".folo-tiny-", dir=out.parent))
    try:
        size = write_model(model, tokenizer, folder)
        judged = entries[:4] if quick else entries
        not_exact = evaluate(folder, judged, document="\n\n".join(prose.values()))
        exact = {setting: 1 - len(terms) / len(judged) for setting, terms in not_exact.items()}
        table = Table("setting", "exact", "not exact")
        for setting, terms in not_exact.items():
            table.add_row(setting, f"{exact[setting]:.1%}", ", ".join(terms[:8]) + (" …" if len(terms) > 8 else ""))
        console.print(table)
        console.print(f"{size:,} bytes; {time.perf_counter() - began:.0f} s")
        if not quick and (exact["chat"] < MIN_EXACT or size > MAX_BYTES):
            console.print(f"[red]not saved: needs {MIN_EXACT:.0%} exact in chat and at most {MAX_BYTES:,} bytes")
            raise typer.Exit(1)
        replace_folder(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    metrics = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "entries": len(entries),
        "answer_tokens": {"min": min(lengths), "max": max(lengths), "total": sum(lengths)},
        "parameters": model.num_parameters(),
        "vocab_size": tokenizer.get_vocab_size(),
        "bytes": size,
        "steps": steps,
        "tokens_per_step": ROW_TOKENS,
        "seed": seed,
        "autocast": autocast,
        "train_seconds": round(trained, 1),
        "wall_seconds": round(time.perf_counter() - began, 1),
        "exact_match": exact,
        "not_exact": not_exact,
        "machine": machine(),
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(f"wrote {out} and {results}")


if __name__ == "__main__":
    typer.run(main)
