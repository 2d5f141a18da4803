"""Tokenizers of every kind that decoders of language models have, small and built on the spot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTES = [f"<0x{b:02X}>" for b in range(256)]
WORDS = ["▁", "a", "▁a", "▁the", "s", ".", "▁▁", "▁not"]


def finished(raw: Tokenizer) -> PreTrainedTokenizerFast:
    """With two special tokens and one that is added without being special, as chat models have them."""
    raw.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<end>", special=True)])
    raw.add_tokens(["<tool>"])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2, Llama 3, Qwen: characters are split, also together with a space."""
    letters = bytes_to_unicode()
    names = [letters[b] for b in range(256)]
    space, e2, c3, f0, f9 = (letters[b] for b in (0x20, 0xE2, 0xC3, 0xF0, 0x9F))
    merges = [("a", "s"), (space, "a"), (space, e2), (c3, letters[0xA9]), (f0, f9), ("s", c3)]
    names += [first + second for first, second in merges]
    raw = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return finished(raw)


def sentencepiece(decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    raw = Tokenizer(
        models.BPE(
            {name: i for i, name in enumerate(["<unk>", *BYTES, *WORDS])}, [], byte_fallback=True, unk_token="<unk>"
        )
    )
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    raw.decoder = decoder
    return finished(raw)


def llama() -> PreTrainedTokenizerFast:
    """Llama 2 and Mistral: byte fallback, and the space in front of all is dropped."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return sentencepiece(decoders.Sequence(steps))


def gemma() -> PreTrainedTokenizerFast:
    """Gemma: byte fallback, and every space stays."""
    return sentencepiece(decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]))


def unigram() -> PreTrainedTokenizerFast:
    """XGLM and other SentencePiece models: the marks of the first token are dropped."""
    raw = Tokenizer(models.Unigram([("<unk>", 0.0), *((word, -1.0) for word in WORDS)], unk_id=0))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return finished(raw)


def word_piece() -> PreTrainedTokenizerFast:
    """BERT and its kind: a space before each word, but not before the rest of one, or before a full stop."""
    names = ["[UNK]", "the", "##s", "##", "a", ".", "do", "##n", "'", "not"]
    raw = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return finished(raw)


def end_of_word() -> PreTrainedTokenizerFast:
    """GPT-1 and CLIP: a mark at the end of a word is a space, unless nothing follows."""
    names = ["<unk>", "a", "a</w>", "the</w>", "s</w>", "</w>"]
    raw = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>"))
    raw.decoder = decoders.BPEDecoder()
    return finished(raw)


def words() -> PreTrainedTokenizerFast:
    """No decoder at all: names with spaces between."""
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "the": 2, ".": 3}, "<unk>"))
    return finished(raw)


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    kind.__name__: kind for kind in (byte_level, llama, gemma, unigram, word_piece, end_of_word, words)
}


def byte_ids(kind: str, tokenizer: PreTrainedTokenizerBase, data: bytes) -> list[int]:
    """A token for each byte."""
    names = [bytes_to_unicode()[b] if kind == "byte_level" else BYTES[b] for b in data]
    return [int(i) for i in tokenizer.convert_tokens_to_ids(names)]


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    """The oracle: all at once."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))


def beyond(shown: str, whole: str) -> str:
    """What the second text has after the beginning that both have."""
    return whole[sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(shown, whole, strict=False))) :]
