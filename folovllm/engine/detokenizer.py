"""Token ids to text as they come; emitted text never changes (vLLM: `vllm/v1/engine/detokenizer.py`).

Three things make this harder than decode(token):

1. A character can span tokens. Byte-level vocabularies split an emoji into up to four tokens, and byte fallback writes
   any rare character as single bytes. Where a token's bytes are known, they are decoded as UTF-8, and bytes that may
   still become a character wait; those that cannot are shown at once, as U+FFFD.
2. A token's text can depend on the one before: some tokenizers put a space between words, or drop the very first one.
   So other tokens are decoded behind a visible token that was there before, and the text of that one is cut off.
3. A stop string can span tokens. Text that may be the beginning of one is held back until that is decided.
"""

from __future__ import annotations

import codecs
import copy
import re
from collections.abc import Sequence
from itertools import groupby, islice
from typing import Any, ClassVar, Protocol

REPLACEMENT = "\ufffd"
LONGEST = 4  # bytes of a UTF-8 character, so an incomplete one is in at most three tokens
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
ESCAPED = re.compile("[\udc80-\udcff]")  # what Python's "surrogateescape" makes of a byte that is in no character


class Decodes(Protocol):
    """The part of a tokenizer that is used here."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> Any: ...


def byte_letters() -> dict[str, int]:
    """Byte-level vocabularies write each byte as a letter: itself if it prints, else the next one from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


class IncrementalDecoder:
    """Turns a growing list of token ids into a growing string: `push` returns only new, final text.

    All texts together are the tokenizer's decode of prompt and output, without the prompt's part. How the tokens are
    divided into calls of `push` does not change that. As in vLLM it is the tokenizer's own decode, without what
    transformers' `clean_up_tokenization_spaces` would do to the text after it.
    """

    LETTERS: ClassVar[dict[str, int]] = byte_letters()

    def __init__(
        self,
        tokenizer: Decodes,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)  # None: there is only `decode`
        self._tokenizer: Any = tokenizer if backend is None else backend
        self._skip_special_tokens = skip_special_tokens
        has_decoder = backend is not None and backend.decoder is not None
        steps = set(re.findall(r'"type":"(\w+)"', backend.decoder.__getstate__().decode())) if has_decoder else set()
        self._byte_level = "ByteLevel" in steps and steps <= {"ByteLevel", "Sequence", "Fuse"}
        self._byte_fallback = "ByteFallback" in steps
        self._may_end_open = backend is None or ("ByteLevel" in steps and not self._byte_level)
        self._added: dict[int, str] = {}  # added tokens, if there may be no space between two of them
        if backend is not None and not skip_special_tokens and not spaces_between_special_tokens:
            self._added = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
        self._after_added = False
        # A visible token whose text was returned, and those after it that are not decided. These lists are never
        # changed in place, so `copy.copy` copies the state.
        self._window: list[int] = []
        self._num_shown = 0  # characters of the window's text that were returned
        self._open = b""  # the beginning of a character
        self._prompt_tail = ""  # U+FFFD at the prompt's end, which the output's text does not repeat

        self.push(*self._last_visible(prompt_token_ids, LONGEST))
        width = len(self._open) if self._byte_fallback else min(1, len(self._open))
        self._prompt_tail = self._decode(self._window)[self._num_shown :] + REPLACEMENT * width

    def push(self, *token_ids: int) -> str:
        """Add tokens, and return the text that is now final; it may be ""."""
        if not self._added:
            return self._push(token_ids)
        texts = []
        for token_id in token_ids:
            text, name = self._push([token_id]), self._added.get(token_id)
            texts.append(name if name is not None and self._after_added else text)
            self._after_added = name is not None
        return "".join(texts)

    def peek(self, token_id: int) -> str:
        """What `push` would return."""
        return copy.copy(self).push(token_id)

    def flush(self) -> str:
        """End the output, and return the remaining text, without an incomplete last character."""
        text = self._decode(self._window)
        rest = text[self._num_shown : len(text) - self._count_open(text)]
        self._open = b""
        self._slide()
        return rest

    def _push(self, token_ids: Sequence[int]) -> str:
        texts = []
        for is_text, group in groupby(((i, self._bytes_of(i)) for i in token_ids), lambda pair: pair[1] is None):
            ids, contents = zip(*group, strict=True)
            texts.append(self._push_text(list(ids)) if is_text else self._push_bytes(list(ids), b"".join(contents)))
        text = "".join(texts)
        if text and self._prompt_tail:
            text, self._prompt_tail = text.removeprefix(self._prompt_tail), ""
        return text

    def _bytes_of(self, token_id: int) -> bytes | None:
        """The bytes that a token stands for, b"" if it is hidden. None if it has to be decoded beside another."""
        if self._byte_level:
            text = self._decode([token_id])
            if REPLACEMENT not in text:
                return text.encode()
            name = str(self._tokenizer.id_to_token(token_id))
            codes = [self.LETTERS.get(letter) for letter in name]
            return name.encode() if None in codes else bytes(code for code in codes if code is not None)
        found = BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token_id) or "") if self._byte_fallback else None
        return None if found is None else bytes.fromhex(found[1])

    def _push_bytes(self, token_ids: list[int], data: bytes) -> str:
        data = self._open + data
        # Tokenizers show invalid bytes of a byte-level vocabulary as Python's "replace" does, others one by one.
        text, used = codecs.utf_8_decode(data, "replace" if self._byte_level else "surrogateescape", False)
        self._open = data[used:]
        if self._byte_level:
            return text
        if not self._window and not self._decode(token_ids[:1]):
            text = text[1:]  # a space in front of all, which this tokenizer drops
        self._window = token_ids[-1:]
        self._num_shown = len(self._decode(self._window))
        return ESCAPED.sub(REPLACEMENT, text)

    def _push_text(self, token_ids: list[int]) -> str:
        invalid = ""
        if self._open:  # a token between bytes ends their run, but a hidden one is not between them
            token_ids = [i for i in token_ids if self._is_visible(i)]
            if token_ids:
                invalid, self._open = REPLACEMENT * len(self._open), b""
        self._window = [*self._window, *token_ids]
        text = self._decode(self._window)
        num_open = self._count_open(text)
        if num_open and len(self._window) <= LONGEST:
            return invalid
        new = text[self._num_shown : len(text) - num_open]
        self._slide(num_open)
        return invalid + new

    def _count_open(self, text: str) -> int:
        """How much of the end of a text may be the beginning of a character."""
        num_broken = len(text) - max(self._num_shown, len(text.rstrip(REPLACEMENT)))
        return max(0, min(num_broken, LONGEST - 1)) if self._may_end_open else 0

    def _slide(self, num_open: int = 0) -> None:
        """Shorten the window to what the text of the next tokens depends on."""
        # Three U+FFFD can be nine tokens, and a cut within a character is forgotten three tokens later.
        self._window = self._window[-3 * LONGEST :] if num_open else self._last_visible(self._window, 1)
        self._num_shown = max(0, len(self._decode(self._window)) - num_open)

    def _last_visible(self, token_ids: Sequence[int], count: int) -> list[int]:
        return [*islice(filter(self._is_visible, reversed(token_ids)), count)][::-1]

    def _is_visible(self, token_id: int) -> bool:
        # Twice, because some tokenizers drop the space in front of all, which may be the whole token.
        return self._decode([token_id, token_id]) != ""

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens))


class Detokenizer:
    """The text of one output, and the stop string that ends it.

    `text` is everything decoded so far, cut at the first stop string. `visible` is the final part of it, which never
    shrinks.
    """

    def __init__(
        self,
        tokenizer: Decodes,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        include_stop_str_in_output: bool = False,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        self._decoder = IncrementalDecoder(
            tokenizer, prompt_token_ids, skip_special_tokens, spaces_between_special_tokens
        )
        self._stop = list(stop)
        self._min_tokens = min_tokens
        self._include_stop = include_stop_str_in_output
        self._num_tokens = 0
        self.text = ""
        self.visible = ""
        self.stop_reason: str | None = None

    def update(self, token_ids: Sequence[int]) -> str | None:
        """Add tokens, and return the stop string that they complete, or None. Tokens after it are ignored."""
        if self.stop_reason is None:
            # As in vLLM, only a stop string completed after the first `min_tokens` tokens counts.
            early = max(0, self._min_tokens - self._num_tokens)
            self._num_tokens += len(token_ids)
            for part, may_stop in ((token_ids[:early], False), (token_ids[early:], True)):
                self._add(self._decoder.push(*part), may_stop)
        return self.stop_reason

    def finish(self) -> str | None:
        """End the output: make all text visible. Returns a stop string as `update` does."""
        if self.stop_reason is None:
            self._add(self._decoder.flush(), self._num_tokens > self._min_tokens)
        self.visible = self.text
        return self.stop_reason

    def _add(self, new: str, may_stop: bool) -> None:
        start = len(self.text)
        self.text += new
        if new and may_stop:
            self._cut_at_stop(start)
        if self.stop_reason is not None or self._include_stop:
            self.visible = self.text
        else:
            self.visible = self.text[: len(self.text) - self._held_back()]

    def _cut_at_stop(self, start: int) -> None:
        """Cut `text` at the first stop string that ends after `start`; of two that end together, the first listed."""
        found: tuple[int, str] | None = None
        for stop in self._stop:
            begin = self.text.find(stop, max(0, start - len(stop) + 1))
            if begin >= 0 and (found is None or begin + len(stop) < found[0]):
                found = (begin + len(stop), stop)
        if found is not None:
            end, self.stop_reason = found
            self.text = self.text[: end if self._include_stop else end - len(self.stop_reason)]

    def _held_back(self) -> int:
        """Length of the longest suffix of `text` with which a stop string begins."""
        longest = max((len(s) for s in self._stop), default=0) - 1
        for length in range(min(longest, len(self.text)), 0, -1):
            if any(s.startswith(self.text[-length:]) for s in self._stop):
                return length
        return 0
