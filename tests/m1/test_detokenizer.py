"""Incremental detokenisation: nothing shown is ever taken back, no half characters, stop strings wherever they fall."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from folovllm.engine.detokenizer import Detokenizer, IncrementalDecoder
from folovllm.models.loader import load_tokenizer, resolve_model

EMOJI = "🚀 你好，世界！👩‍👩‍👧 naïve café \u200d end"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(resolve_model("folo-tiny"))
    assert tokenizer is not None
    return tokenizer


class Bytes:
    """A tokenizer whose tokens are single bytes: every character beyond ASCII is split."""

    def decode(self, token_ids, skip_special_tokens=True):
        return bytes(i for i in token_ids if i < 256).decode("utf-8", errors="replace")


class Pieces:
    """A tokenizer with one token per given string, so that a test decides where tokens begin and end."""

    def __init__(self, pieces):
        self.pieces = pieces

    def decode(self, token_ids, skip_special_tokens=True):
        return "".join(self.pieces[i] for i in token_ids)


def stream(tokenizer, token_ids):
    decoder = IncrementalDecoder(tokenizer)
    return [decoder.push(i) for i in token_ids], decoder.flush()


@settings(deadline=None, max_examples=150)
@given(text=st.text(max_size=60))
@example(text=EMOJI)
def test_text_of_single_bytes_arrives_whole_and_character_by_character(text):
    token_ids = list(text.encode("utf-8", errors="replace"))
    text = bytes(token_ids).decode("utf-8")
    pieces, rest = stream(Bytes(), token_ids)
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces) and rest == ""
        ends = [i for i in range(1, len(token_ids) + 1) if i == len(token_ids) or token_ids[i] & 0xC0 != 0x80]
        assert [i + 1 for i, piece in enumerate(pieces) if piece] == ends  # each as soon as its last byte is there
    assert "".join(pieces) + rest == text.rstrip("\ufffd")


@settings(deadline=None, max_examples=150)
@given(token_ids=st.lists(st.integers(0, 255) | st.sampled_from([*b"\x80\xf0\x90\xe6\xbca"]), max_size=40))
@example(token_ids=[*b"\x80\x80\xf0\x90\x80a"])
@example(token_ids=[*b"\x80\xe6\x90\x90\xf0\xbc\x80\xf0\xf0\x80\xffa"])
def test_any_bytes_at_all_give_what_decoding_them_at_once_gives(token_ids):
    pieces, rest = stream(Bytes(), token_ids)
    text, whole = "".join(pieces) + rest, Bytes().decode(token_ids)
    # A tokenizer that says no more than its decode: three U+FFFD at the end may be an incomplete character.
    assert whole.startswith(text) and set(whole[len(text) :]) <= {"\ufffd"} and len(whole) - len(text) <= 3


@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=40))
@example(text=EMOJI)
def test_the_bundled_tokenizer_streams_any_text(tokenizer, text):
    token_ids = tokenizer(text)["input_ids"]
    pieces, rest = stream(tokenizer, token_ids)
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + rest == tokenizer.decode(token_ids, skip_special_tokens=True).rstrip("\ufffd")


def test_emoji_and_chinese_are_split_by_the_bundled_tokenizer_and_never_shown_in_halves(tokenizer):
    token_ids = tokenizer("ok 🚀 你好")["input_ids"]
    assert any("\ufffd" in tokenizer.decode([i]) for i in token_ids)  # the case is real
    pieces, rest = stream(tokenizer, token_ids)
    assert "".join(pieces) == "ok 🚀 你好" and rest == ""
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_output_cut_inside_a_character_ends_before_it():
    detokenizer = Detokenizer(Bytes())
    detokenizer.update(list("né".encode())[:-1])
    detokenizer.finish()
    assert detokenizer.visible == "n"


def reference_stop(text, stop, allowed_from, include):
    """Brute force: the first character at which some stop string is complete, at or after `allowed_from` characters."""
    for end in range(allowed_from + 1, len(text) + 1):
        for s in stop:
            if text[:end].endswith(s):
                return (text[:end] if include else text[: end - len(s)]), s
    return text, None


ab = st.text(alphabet="ab", min_size=1, max_size=3)


@settings(deadline=None, max_examples=500)
@given(
    pieces=st.lists(ab, min_size=1, max_size=12),
    stop=st.lists(ab, min_size=1, max_size=3),
    min_tokens=st.integers(0, 4),
    include=st.booleans(),
)
def test_stop_strings_against_brute_force_and_nothing_shown_is_taken_back(pieces, stop, min_tokens, include):
    detokenizer = Detokenizer(Pieces(pieces), stop, min_tokens, include)
    shown = [""]
    for i in range(len(pieces)):
        detokenizer.update([i])
        assert detokenizer.visible.startswith(shown[-1])
        shown.append(detokenizer.visible)
    detokenizer.finish()
    assert detokenizer.visible.startswith(shown[-1])
    allowed_from = len("".join(pieces[:min_tokens]))
    text, reason = reference_stop("".join(pieces), stop, allowed_from, include)
    assert (detokenizer.visible, detokenizer.stop_reason) == (text, reason)
    assert detokenizer.text == detokenizer.visible


def test_a_stop_string_over_two_tokens_is_held_back_and_found():
    detokenizer = Detokenizer(Pieces(["one ", "two<", "/a", ">rest"]), ["</a>"])
    seen = []
    for i in range(4):
        reason = detokenizer.update([i])
        seen.append(detokenizer.visible)
    assert seen == ["one ", "one two", "one two", "one two"] and reason == "</a>"


def test_what_only_looked_like_a_stop_string_is_shown_in_the_end():
    detokenizer = Detokenizer(Pieces(["x", "<", "/", "b"]), ["</a>"])
    seen = []
    for i in range(4):
        detokenizer.update([i])
        seen.append(detokenizer.visible)
    assert seen == ["x", "x", "x", "x</b"]
    held = Detokenizer(Pieces(["x<"]), ["</a>"])
    held.update([0])
    assert held.visible == "x"
    held.finish()
    assert held.visible == "x<"


class Metaspace:
    """As Llama 2's tokenizer decodes: a mark is a space, and the space in front of all is dropped."""

    pieces = ("\u2581Hello", "\u2581Paris", "\u2581is", "s", "\u2581")

    def decode(self, token_ids, skip_special_tokens=True):
        return "".join(self.pieces[i] for i in token_ids).replace("\u2581", " ").removeprefix(" ")


def test_prompt_and_output_join_even_where_a_leading_space_is_dropped():
    detokenizer = Detokenizer(Metaspace(), prompt_token_ids=[0])
    for i in (1, 2, 3):
        detokenizer.update([i])
    detokenizer.finish()
    assert detokenizer.visible == " Paris iss" and Metaspace().decode([0, 1, 2, 3]) == "Hello Paris iss"


class Counting(Bytes):
    """Counts how many tokens it was asked to decode."""

    asked = 0

    def decode(self, token_ids, skip_special_tokens=True):
        self.asked += len(token_ids)
        return super().decode(token_ids)


@pytest.mark.parametrize(
    ("token_id", "most"), [(65, 5), (300, 5), (0x80, 25)], ids=["text", "special tokens only", "invalid bytes"]
)
def test_the_cost_of_a_token_does_not_grow_with_the_output(token_id, most):
    tokenizer = Counting()
    decoder = IncrementalDecoder(tokenizer)
    for _ in range(1000):
        decoder.push(token_id)
    assert tokenizer.asked <= most * 1000


def test_the_window_begins_in_the_prompt_but_shows_none_of_it():
    decoder = IncrementalDecoder(Bytes(), list(b"a long prompt"))
    assert [decoder.push(i) for i in b" ok"] == [" ", "o", "k"]
