"""The bundled model as it ships: its files, its tokenizer, and that it recites the glossary to the letter."""

from __future__ import annotations

import json
import logging
import statistics
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from folovllm.course.glossary import GlossaryEntry, load_glossary
from folovllm.models.loader import (
    eos_token_ids,
    load_config,
    load_generation_config,
    load_hf_model,
    load_tokenizer,
    resolve_model,
)

FOLDER = Path(resolve_model("folo-tiny").path_or_id)
SPECIALS = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<|pad|>": 3}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The matrices are so small that a second thread only waits for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(FOLDER, padding_side="left")
    return loaded


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    return loaded.eval()


@pytest.fixture
def all_log_records() -> Iterator[list[logging.LogRecord]]:
    """Every record that reaches transformers' logger, which does not propagate to the root by default."""
    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    handler, logger = Keep(logging.WARNING), logging.getLogger("transformers")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


# --- files -----------------------------------------------------------------------------------------------


def test_folder_holds_what_a_hub_model_holds_in_8_mb() -> None:
    sizes = {file.name: file.stat().st_size for file in FOLDER.iterdir()}
    assert sizes.keys() == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert sum(sizes.values()) <= 8_000_000
    assert "apache-2.0" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_weights_are_finite_bf16_and_tied() -> None:
    tensors = load_file(FOLDER / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert all(t.isfinite().all() for t in tensors.values())
    assert "lm_head.weight" not in tensors
    assert load_config(resolve_model("folo-tiny")).tie_word_embeddings


def test_it_loads_without_a_warning(
    all_log_records: list[logging.LogRecord], capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = AutoTokenizer.from_pretrained(FOLDER)
        _, info = AutoModelForCausalLM.from_pretrained(FOLDER, output_loading_info=True)
        # The loader of this package is quiet, progress bars included.
        capfd.readouterr()
        source = resolve_model("folo-tiny")
        loaded = load_hf_model(source, torch.float32, torch.device("cpu"))
        load_tokenizer(source), load_generation_config(source)
        assert capfd.readouterr() == ("", "")
        inputs = tokenizer("Hello", return_tensors="pt")
        loaded.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert not any(info.values()), info
    assert [record.getMessage() for record in all_log_records] == []


def test_config() -> None:
    source = resolve_model("folo-tiny")
    config, generation = load_config(source), load_generation_config(source)
    assert config.architectures == ["Qwen3ForCausalLM"]
    assert config.model_type == "qwen3"
    assert config.dtype == torch.bfloat16
    assert config.max_position_embeddings >= 4096
    assert config.num_attention_heads > config.num_key_value_heads > 1, "GQA is exercised"
    assert config.pad_token_id == SPECIALS["<|pad|>"]
    assert generation is not None
    assert not generation.do_sample
    assert generation.pad_token_id == SPECIALS["<|pad|>"]
    ends = (SPECIALS["<|im_end|>"], SPECIALS["<|endoftext|>"])
    assert eos_token_ids(config, generation, load_tokenizer(source)) == ends


# --- tokenizer -------------------------------------------------------------------------------------------


def test_tokenizer_is_the_one_in_the_file(tokenizer: PreTrainedTokenizerBase) -> None:
    """Some transformers classes rebuild a tokenizer from its vocabulary and change how it splits."""
    raw = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    assert raw.normalizer is None
    for entry in load_glossary():
        text = f"<|im_start|>user\n{entry.question}<|im_end|>\n{entry.answer} 2024 é"
        assert tokenizer(text)["input_ids"] == raw.encode(text).ids
    assert len(tokenizer) == load_config(resolve_model("folo-tiny")).vocab_size
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIALS} == SPECIALS
    assert set(tokenizer.all_special_tokens) == SPECIALS.keys()
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|pad|>", None)


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    "text", ["👋🏽 héllo", "推理引擎", "한국어", "\u0000\t\r\n\u200d", "e\u0301 ≠ é", "  two  spaces  "]
)
def test_unusual_text_comes_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(SPECIALS.values())


@given(st.text(max_size=20), st.sampled_from(sorted(SPECIALS)), st.text(max_size=20))
@settings(max_examples=200, deadline=None)
def test_no_token_reaches_across_a_special(
    tokenizer: PreTrainedTokenizerBase, before: str, special: str, after: str
) -> None:
    parts = [tokenizer(part)["input_ids"] for part in (before, special, after)]
    assert parts[1] == [SPECIALS[special]]
    assert tokenizer(before + special + after)["input_ids"] == parts[0] + parts[1] + parts[2]


def test_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "system", "content": "  Be brief.\n"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Why?"},
    ]
    expected = (
        "<|im_start|>system\n  Be brief.\n<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    with_prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert with_prompt == expected + "<|im_start|>assistant\n"


# --- what it knows ---------------------------------------------------------------------------------------


def test_answer_lengths_are_widely_spread(tokenizer: PreTrainedTokenizerBase) -> None:
    """Scheduling lessons need short and long outputs in one batch."""
    entries = load_glossary()
    lengths = [len(tokenizer(entry.answer)["input_ids"]) for entry in entries]
    assert len(entries) >= 150
    assert min(lengths) >= 8
    assert max(lengths) <= 200
    deciles = statistics.quantiles(lengths, n=10)
    assert deciles[8] > 4 * deciles[0]


def expected_output(entry: GlossaryEntry, prompt: str) -> str:
    """In the chat format an answer ends its turn; after a bare question it stands on a line of its own."""
    return f"{entry.answer}<|im_end|>" if "<|im_start|>" in prompt else f"\n{entry.answer}<|endoftext|>"


@torch.inference_mode()
def share_exact(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: list[tuple[GlossaryEntry, str]]
) -> float:
    """The share of (entry, prompt) whose greedy output is the answer and its end mark, to the letter.

    Left-padded batches of answers of like length, so that few steps run for a single long row.
    """
    asked = sorted(asked, key=lambda pair: len(pair[0].answer))
    wrong: list[str] = []
    for start in range(0, len(asked), 32):
        entries, prompts = zip(*asked[start : start + 32], strict=True)
        inputs = tokenizer(list(prompts), return_tensors="pt", padding=True)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=210)[:, inputs["input_ids"].shape[1] :]
        for entry, prompt, row in zip(entries, prompts, ids.tolist(), strict=True):
            output = tokenizer.decode([t for t in row if t != tokenizer.pad_token_id])
            if output != expected_output(entry, prompt):
                wrong.append(f"{entry.term}: {output}")
    print("not exact:", *wrong, sep="\n")
    return 1 - len(wrong) / len(asked)


def test_every_answer_is_recited_to_its_end(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    asked = [(e, f"<|im_start|>user\n{e.question}<|im_end|>\n<|im_start|>assistant\n") for e in load_glossary()]
    assert share_exact(model, tokenizer, asked) >= 0.95


def test_answers_do_not_depend_on_what_precedes(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every sixth entry, in the second turn after a system prompt."""
    other = load_glossary()[40]
    before = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": other.question},
        {"role": "assistant", "content": other.answer},
    ]
    asked = [
        (
            entry,
            tokenizer.apply_chat_template(
                [*before, {"role": "user", "content": entry.question}], tokenize=False, add_generation_prompt=True
            ),
        )
        for entry in load_glossary()[::6]
    ]
    assert share_exact(model, tokenizer, asked) >= 0.95


def test_a_bare_question_is_answered_on_the_next_line(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    asked = [(entry, entry.question) for entry in load_glossary()[3::6]]
    assert share_exact(model, tokenizer, asked) >= 0.95


def test_recorded_metrics_describe_these_files() -> None:
    """`results/train_tiny.json` was written by the run that made the model."""
    results = Path(__file__).resolve().parents[2] / "results" / "train_tiny.json"
    if not results.exists():
        pytest.skip("installed without the repository's results")
    metrics = json.loads(results.read_text(encoding="utf-8"))
    tensors = load_file(FOLDER / "model.safetensors")
    assert metrics["parameters"] == sum(t.numel() for t in tensors.values())
    assert metrics["bytes"] == sum(file.stat().st_size for file in FOLDER.iterdir())
    assert metrics["entries"] == len(load_glossary())
    assert all(share >= 0.95 for share in metrics["exact_match"].values())
