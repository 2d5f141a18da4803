"""The tokenizer of `folo-tiny`, and an endless source of its training rows. Used by `train_tiny.py`."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from folovllm.course.glossary import GlossaryEntry

MAX_POSITIONS = 4096
ANSWER_TOKENS = (8, 200)

END_OF_TEXT, IM_START, IM_END, PAD = SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
# Contractions, words with one leading space or mark, single digits, punctuation runs, newlines, other spaces.
SPLIT = r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""

SYSTEM_PROMPTS = (
    "You are folo-tiny, a small model that explains LLM inference.",
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "You teach how inference engines work. Answer in a few sentences.",
    "Answer the question.",
)
LEADS = ("", "", "", "Please explain: ", "Hi! ", "Question: ")

# Row length and the share of steps that use it; every step sees ROW_TOKENS tokens.
ROW_LENGTHS, ROW_SHARES, ROW_TOKENS = (256, 1024, 2048, 4096), (0.62, 0.24, 0.10, 0.04), 4096
ANSWER, PROSE, CONTEXT = 1.0, 0.3, 0.1


# --- tokenizer -------------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer: any UTF-8 text encodes, and no text is changed by a normaliser."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(s, special=True, normalized=False) for s in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json (special tokens, chat template)."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "pad_token": PAD,
        "additional_special_tokens": [END_OF_TEXT, IM_START],
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_answer_lengths(tokenizer: Tokenizer, entries: list[GlossaryEntry]) -> list[int]:
    """Tokens of each answer; ValueError that lists the terms whose answer is outside ANSWER_TOKENS."""
    low, high = ANSWER_TOKENS
    lengths = [len(tokenizer.encode(entry.answer).ids) for entry in entries]
    bad = [f"{e.term!r} has {n}" for e, n in zip(entries, lengths, strict=True) if not low <= n <= high]
    if bad:
        raise ValueError(f"answers must have {low} to {high} tokens: " + ", ".join(bad))
    return lengths


# --- training rows ---------------------------------------------------------------------------------------


@dataclass
class Row:
    """Token ids, the loss weight of each, and the ranges [start, end) of complete answers."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    answers: list[tuple[int, int]] = field(default_factory=list)

    def add(self, ids: tuple[int, ...], weight: float) -> None:
        """Append tokens, each with this weight in the loss."""
        self.ids += ids
        self.weights += [weight] * len(ids)

    def add_answer(self, ids: tuple[int, ...]) -> None:
        """Append the tokens of an answer and record their range."""
        self.answers.append((len(self.ids), len(self.ids) + len(ids)))
        self.add(ids, ANSWER)


class RowMaker:
    """An endless seeded source of training rows. Entries are drawn from reshuffled permutations: all equally often."""

    def __init__(self, tokenizer: Tokenizer, entries: list[GlossaryEntry], prose: dict[str, str], seed: int) -> None:
        self.rng = random.Random(seed)
        self.entries = entries
        self.paragraphs = [p.strip() for text in prose.values() for p in text.split("\n\n") if p.strip()]
        self.vocab_size = tokenizer.get_vocab_size()
        # Texts are encoded in the same parts as at inference: split at the template's special tokens, and between a
        # bare question (the prompt) and the line break that begins its answer (the output).
        self.encode = lru_cache(maxsize=8192)(lambda text: tuple(tokenizer.encode(text).ids))
        self.deck: list[GlossaryEntry] = []

    def row(self, length: int) -> Row:
        """One row of exactly `length` tokens. Its last turn is cut at the end of the row."""
        row = Row()
        kind = self.rng.random()
        if kind < 0.70:
            self._system(row, length // 2)
            add_turn = self._chat_turn
        elif kind < 0.95:
            add_turn = self._plain_turn
        else:
            add_turn = self._paragraph
        while len(row.ids) < length:
            add_turn(row)
        answers = [span for span in row.answers if span[1] <= length]
        return Row(row.ids[:length], row.weights[:length], answers)

    def _system(self, row: Row, budget: int) -> None:
        kind = self.rng.random()
        if kind < 0.45:
            return
        row.add(self.encode(f"{IM_START}system\n"), CONTEXT)
        if kind < 0.70:
            row.add(self.encode(self.rng.choice(SYSTEM_PROMPTS)), CONTEXT)
        elif kind < 0.95:
            start = self.rng.randrange(len(self.paragraphs))
            text = "\n\n".join(self.paragraphs[start:] + self.paragraphs[:start])
            row.add(self.encode(text)[: self.rng.randint(16, budget)], CONTEXT)
        else:
            n = self.rng.randint(16, budget)
            noise = [self.rng.randrange(len(SPECIALS), self.vocab_size) for _ in range(n)]
            row.add(tuple(noise), 0.0)
        row.add(self.encode(f"{IM_END}\n"), CONTEXT)

    def _chat_turn(self, row: Row) -> None:
        entry = self._next_entry()
        question = self.rng.choice(LEADS) + self._vary(entry.question)
        row.add(self.encode(f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n"), CONTEXT)
        row.add_answer(self.encode(entry.answer + IM_END))
        row.add(self.encode("\n"), CONTEXT)

    def _plain_turn(self, row: Row) -> None:
        entry = self._next_entry()
        row.add(self.encode(self._vary(entry.question)), CONTEXT)
        row.add_answer(self.encode("\n") + self.encode(entry.answer + END_OF_TEXT))

    def _paragraph(self, row: Row) -> None:
        row.add(self.encode(self.rng.choice(self.paragraphs) + END_OF_TEXT), PROSE)

    def _vary(self, question: str) -> str:
        kind = self.rng.random()
        if kind < 0.70:
            return question
        variants = (question.lower(), question.rstrip("?"), question.lower().rstrip("?"), question + " ")
        return self.rng.choice(variants)

    def _next_entry(self) -> GlossaryEntry:
        if not self.deck:
            self.deck = self.rng.sample(self.entries, len(self.entries))
        return self.deck.pop()


@dataclass(frozen=True)
class Batch:
    """Rows of one length."""

    ids: torch.Tensor  # [B, L] int64
    weights: torch.Tensor  # [B, L] float32
    answers: list[tuple[int, int, int]]  # (row, start, end)


def batches(maker: RowMaker) -> Iterator[Batch]:
    """An endless stream of batches, each of a length drawn from `ROW_LENGTHS`."""
    while True:
        length = maker.rng.choices(ROW_LENGTHS, ROW_SHARES)[0]
        rows = [maker.row(length) for _ in range(ROW_TOKENS // length)]
        yield Batch(
            ids=torch.tensor([row.ids for row in rows]),
            weights=torch.tensor([row.weights for row in rows]),
            answers=[(i, start, end) for i, row in enumerate(rows) for start, end in row.answers],
        )
