"""Streamed text is the tokenizer's decode of the whole, whatever the tokenizer and wherever the prompt ends."""

from __future__ import annotations

import codecs
from functools import cache
from itertools import accumulate, chain

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders
from transformers import PreTrainedTokenizerFast

from folovllm.engine.detokenizer import Detokenizer, IncrementalDecoder
from tests.m1.text_cases import KINDS, beyond, byte_ids, decoded, finished

REPLACEMENT = "\ufffd"
CHARACTERS = "漢字é🚀√ "


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return KINDS[kind]()


def streamed(tokenizer, prompt, output, sizes=(), **options):
    """The text after each batch of tokens; `sizes` are the batches', and the rest comes one by one."""
    decoder = IncrementalDecoder(tokenizer, prompt, **options)
    rest, texts, text = list(output), [], ""
    for size in [*sizes, *([1] * len(output))]:
        batch, rest = rest[:size], rest[size:]
        text += decoder.push(*batch)
        texts.append(text)
    return texts, text + decoder.flush()


def pieces_of(kind):
    """Lists of ids: any token, and with byte fallback those of whole characters instead of single bytes."""
    tokenizer = tokenizer_of(kind)
    ids = set(range(len(tokenizer)))
    pieces = []
    if kind in ("llama", "gemma"):  # a run in which characters and broken ones are mixed is in another test
        ids -= set(byte_ids(kind, tokenizer, bytes(range(256))))
        pieces = [byte_ids(kind, tokenizer, character.encode()) for character in CHARACTERS]
    return [*pieces, *([i] for i in sorted(ids)), [len(tokenizer) + 7]]  # the last is not in the vocabulary


cases = st.sampled_from(sorted(KINDS)).flatmap(
    lambda kind: st.tuples(
        st.just(kind),
        st.lists(st.sampled_from(pieces_of(kind)), min_size=1, max_size=14),
        st.integers(1, 40),
        st.lists(st.integers(1, 5), max_size=5),
        st.booleans(),
    )
)


@settings(deadline=None, max_examples=600)
@given(case=cases)
def test_the_text_is_the_decode_of_the_whole(case):
    kind, pieces, split, sizes, skip = case
    tokenizer = tokenizer_of(kind)
    ids = [*chain(*pieces), tokenizer.convert_tokens_to_ids("a")]  # an end within a character has a test of its own
    split = min(split, len(ids) - 1)
    texts, text = streamed(tokenizer, ids[:split], ids[split:], sizes, skip_special_tokens=skip)
    # A character that begins in the prompt is the output's: a prompt ends before it, or has U+FFFD instead.
    start = max(n for n in accumulate(map(len, pieces), initial=0) if n <= split)
    assert text == beyond(decoded(tokenizer, ids[:start], skip), decoded(tokenizer, ids, skip))
    assert all(text.startswith(shown) for shown in texts)


@settings(deadline=None, max_examples=400)
@given(
    kind=st.sampled_from(["byte_level", "llama", "gemma"]),
    data=st.lists(st.sampled_from([*b"\xe6\xbc\xa2\xf0\x9f\x9a\x80\xc3\xa9\xff\xed\xa0 a"]), max_size=30).map(bytes),
    split=st.integers(0, 30),
    sizes=st.lists(st.integers(1, 5), max_size=5),
)
@example(kind="llama", data=b"\xe6\xbca", split=1, sizes=[])
@example(kind="byte_level", data=b"\xf0\x9f\xf0\x9f", split=2, sizes=[])
def test_bytes_are_shown_once_they_are_a_character_or_can_be_none(kind, data, split, sizes):
    """Python's own decoder says when that is. With byte fallback, every byte that is in no character is shown."""
    tokenizer = tokenizer_of(kind)
    prompt = [tokenizer.convert_tokens_to_ids("a"), *byte_ids(kind, tokenizer, data[:split])]
    output = byte_ids(kind, tokenizer, data[split:])
    decoder = codecs.getincrementaldecoder("utf-8")("replace" if kind == "byte_level" else "surrogateescape")
    decoder.decode(data[:split])
    waiting = decoder.getstate()[0]  # the prompt shows it as broken already
    tail = REPLACEMENT * (len(waiting) if kind != "byte_level" else min(1, len(waiting)))
    expected, text = [], ""
    for byte in data[split:]:
        text += "".join(REPLACEMENT if "\udc80" <= c <= "\udcff" else c for c in decoder.decode(bytes([byte])))
        expected.append(text.removeprefix(tail))
    texts, final = streamed(tokenizer, prompt, output)
    assert texts == expected
    assert final == text.removeprefix(tail)
    assert streamed(tokenizer, prompt, output, sizes)[1] == final


@pytest.mark.parametrize("kind", ["byte_level", "llama", "gemma"])
@pytest.mark.parametrize("split", range(1, 5))
def test_a_prompt_may_end_within_a_character(kind, split):
    tokenizer = tokenizer_of(kind)
    ids = byte_ids(kind, tokenizer, "🚀漢".encode())
    prompt = [tokenizer.convert_tokens_to_ids("a"), *ids[:split]]
    texts, text = streamed(tokenizer, prompt, ids[split:])
    assert text == ("🚀漢" if split < 4 else "漢")
    assert set(texts) <= {"", "🚀", text}


@pytest.mark.parametrize("kind", ["byte_level", "llama"])
def test_hidden_tokens_are_not_between_the_bytes_of_a_character(kind):
    tokenizer = tokenizer_of(kind)
    hidden = tokenizer.convert_tokens_to_ids(["<s>", "<end>"]) * 5
    first, second, third = byte_ids(kind, tokenizer, "漢".encode())
    prompt, output = [tokenizer.convert_tokens_to_ids("a"), first, *hidden], [*hidden, second, *hidden, third, *hidden]
    assert streamed(tokenizer, prompt, output)[1] == "漢" == decoded(tokenizer, prompt + output)[1:]


def test_a_special_token_at_the_prompts_end_takes_no_space_from_the_output():
    """Twenty of them leave none of the text before them in a short window, and a first space would be dropped."""
    for kind in ("llama", "unigram"):
        tokenizer = tokenizer_of(kind)
        word, mark = tokenizer.convert_tokens_to_ids(["▁the", "<s>"])
        assert streamed(tokenizer, [word, *[mark] * 20], [word, mark, word])[1] == " the the"
        assert streamed(tokenizer, [mark], [word, mark, word])[1] == "the the"


class Counting:
    """A tokenizer that counts the tokens which it is asked to decode."""

    def __init__(self, tokenizer):
        self.backend_tokenizer, self.inner, self.decoder = self, tokenizer.backend_tokenizer, tokenizer.decoder
        self.asked = 0

    def decode(self, token_ids, skip_special_tokens=True):
        self.asked += len(token_ids)
        return self.inner.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def id_to_token(self, token_id):
        return self.inner.id_to_token(token_id)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("flood", ["a", "<s>", 0xFF, 0xE6, 0x80, "▁"])
@pytest.mark.parametrize("in_steps", [True, False])
def test_a_token_costs_the_same_however_many_came_before(kind, flood, in_steps):
    """Also invalid bytes, special tokens, and marks that one kind of tokenizer drops in front."""
    tokenizer = tokenizer_of(kind)
    count = 1500
    if isinstance(flood, int):
        if kind not in ("byte_level", "llama", "gemma"):
            return
        (token_id,) = byte_ids(kind, tokenizer, bytes([flood]))
    else:
        token_id = tokenizer.convert_tokens_to_ids(flood)
        if token_id is None or tokenizer.convert_ids_to_tokens(token_id) != flood:
            return
    counting, start = Counting(tokenizer), [] if flood == "<s>" else [tokenizer.convert_tokens_to_ids("a")]
    decoder = IncrementalDecoder(counting, start)
    text = "".join(decoder.push(token_id) for _ in range(count)) if in_steps else decoder.push(*[token_id] * count)
    assert counting.asked <= (5 if in_steps or flood == "<s>" else 1) * count + 20
    if not isinstance(flood, int):
        assert text == beyond(decoded(tokenizer, start), decoded(tokenizer, [*start, *[token_id] * count]))


@settings(deadline=None, max_examples=200)
@given(
    case=cases,
    stop=st.lists(st.text("a the.<s>end\ufffd", min_size=1, max_size=3), max_size=2),
    least=st.integers(0, 6),
)
def test_tokens_read_late_and_together_end_where_tokens_read_one_by_one_do(case, stop, least):
    kind, pieces, split, sizes, skip = case
    ids = list(chain(*pieces))
    prompt, output = ids[:split], ids[split:]
    one, many = (Detokenizer(tokenizer_of(kind), stop, least, True, prompt, skip) for _ in range(2))
    for token_id in output:
        one.update([token_id])
    for size in [*sizes, len(output)]:
        many.update(output[:size])
        output = output[size:]
    assert (one.finish(), one.text) == (many.finish(), many.text)


@pytest.mark.parametrize("kind", ["word_piece", "words", "byte_level", "llama"])
def test_spaces_between_special_tokens(kind):
    """vLLM: without spaces, an added token behind another one is its bare name."""
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.convert_tokens_to_ids(["a", "<s>", "<end>", "<tool>", "a", "<s>"])
    spaced, tight = (
        streamed(tokenizer, ids[:1], ids[1:], [3], skip_special_tokens=False, spaces_between_special_tokens=spaces)[1]
        for spaces in (True, False)
    )
    assert spaced == beyond("a", decoded(tokenizer, ids, False))
    assert tight == spaced.replace("> <", "><")
    assert (tight != spaced) == (kind in ("word_piece", "words"))
    # With special tokens hidden the field says nothing.
    hidden = streamed(tokenizer, ids[:1], ids[1:], spaces_between_special_tokens=False)[1]
    assert hidden == beyond("a", decoded(tokenizer, ids))


def finished_bytes():
    raw = KINDS["byte_level"]().backend_tokenizer
    raw.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("q", "k")])
    return finished(raw)


def test_a_tokenizer_that_knows_no_more_than_decode_is_streamed_too():
    """As a decoder of several steps that end in bytes: what its tokens are is only in its text."""
    raw = finished_bytes()
    data = "a漢🚀é".encode() + b"\xff\xff\xff\xff\xffa" + "漢".encode()
    ids = byte_ids("byte_level", raw, data)
    texts, text = streamed(raw, ids[:1], ids[1:])
    assert text == decoded(raw, ids)[1:] == "漢🚀é" + 5 * REPLACEMENT + "a漢"
    assert all(text.startswith(shown) for shown in texts)
