"""What only the README shows: the engine in reading order, with its lines counted."""

from __future__ import annotations

from claims.ledger import ROOT, Table

SPINE = (  # file below folovllm/, and what it does
    ("entrypoints/llm.py", "`LLM`: prompts in, completions out"),
    ("engine/llm_engine.py", "text in, text out, around a core that sees token ids only"),
    ("engine/input_processor.py", "a prompt, checked, as token ids"),
    ("request.py", "one sequence and how far it has come"),
    ("engine/core.py", "one step: schedule, execute, update, record"),
    ("messages.py", "what the parts say to each other in a step"),
    ("scheduler/scheduler.py", "which requests run in the next step, and how many tokens of each"),
    ("scheduler/request_queue.py", "the waiting requests, in the policy's order"),
    ("scheduler/parallel_sampling.py", "samples and beams that share a prompt"),
    ("scheduler/stop.py", "when a sequence is complete"),
    ("kv_cache/interface.py", "what a scheduler may ask of a KV cache manager"),
    ("kv_cache/block_manager.py", "block tables, copy-on-write, swap"),
    ("kv_cache/block_pool.py", "reference counts and the free list"),
    ("kv_cache/prefix_cache.py", "blocks found by the tokens in them and before them"),
    ("runner/paged_runner.py", "a step as one forward"),
    ("runner/input_batch.py", "a step's requests as flat tensors"),
    ("runner/kv_storage.py", "the tensors of the pool"),
    ("runner/sampling_states.py", "how each request samples"),
    ("attention/metadata.py", "what attention must know of a ragged batch"),
    ("attention/backend.py", "what an attention backend is"),
    ("attention/reference.py", "paged attention, as the formula has it"),
    ("models/decoder.py", "Llama, Mistral, Qwen2 and Qwen3 on flat tokens"),
    ("models/layers.py", "linear layers, norms, RoPE"),
    ("sampling/sampler.py", "logits to token ids, in vLLM's order"),
    ("sampling/batch.py", "what each request asks of the sampler, as rows of tables"),
    ("sampling/logits.py", "filters and penalties"),
    ("sampling/noise.py", "random numbers from seed, index and token id"),
    ("sampling/logprobs.py", "log probabilities to report"),
    ("engine/output_processor.py", "token ids back to what a user sees"),
    ("engine/detokenizer.py", "text as it grows, never taken back"),
)


def lines_of(file: str) -> int:
    """Lines of a file of the package."""
    return len((ROOT / "folovllm" / file).read_text(encoding="utf-8").splitlines())


def rows() -> list[list[str]]:
    """A row per file, and the sum."""
    counted = [(file, what, lines_of(file)) for file, what in SPINE]
    table = [[f"[`{file}`](folovllm/{file})", what, str(lines)] for file, what, lines in counted]
    return [*table, ["", f"{len(SPINE)} files", f"{sum(lines for *_, lines in counted):,}"]]


TABLES = {
    "reading-order": Table(
        "the engine's files in the order in which to read them, with their lines",
        ["file", "what it does", "lines"],
        rows,
    )
}
