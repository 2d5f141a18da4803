"""Token ids to text, one token at a time; emitted text never changes (vLLM: `vllm/v1/engine/detokenizer.py`).

Two things make this harder than decode(token):

1. A character can span tokens. Byte-level vocabularies split an emoji into up to four tokens, and an incomplete
   character decodes to U+FFFD. So a window of tokens is decoded, and its text is emitted once it no longer ends in
   U+FFFD.
2. A stop string can span tokens. Text that may be the beginning of one is held back until that is decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

REPLACEMENT = "\ufffd"
CONTEXT = 5  # prompt tokens in the first window, as in vLLM


class Decodes(Protocol):
    """The part of a tokenizer that is used here."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> Any: ...


class IncrementalDecoder:
    """Turns a growing list of token ids into a growing string: `push` returns only new, final text.

    Two offsets divide a window of tokens: [prefix, read) has been emitted, [read, end) has not. The new text is the
    window's text without that of [prefix, read). Decoding a window keeps the spaces that a tokenizer puts between
    tokens, and a short window makes a step's cost independent of the output's length. The first window starts in the
    prompt, because some tokenizers drop the space before the first token that they decode.
    """

    def __init__(self, tokenizer: Decodes, prompt_token_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._token_ids = list(prompt_token_ids[-CONTEXT:])
        self._prefix = 0
        self._read = len(self._token_ids)

    def push(self, token_id: int) -> str:
        """Add a token, and return the text that is now final; it may be ""."""
        self._token_ids.append(token_id)
        emitted, window = self._decode_window()
        if window == emitted and not window.endswith(REPLACEMENT):
            self._token_ids.pop()  # a special token has no text, now or later
            return ""
        if window.endswith(REPLACEMENT) or len(window) <= len(emitted):
            return ""
        self._prefix, self._read = self._read, len(self._token_ids)
        return window[len(emitted) :]

    def flush(self) -> str:
        """End the output, and return the remaining text, without an incomplete last character."""
        emitted, window = self._decode_window()
        self._prefix = self._read = len(self._token_ids)
        return window[len(emitted) :].rstrip(REPLACEMENT)

    def _decode_window(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        emitted = str(decode(self._token_ids[self._prefix : self._read], skip_special_tokens=True))
        return emitted, str(decode(self._token_ids[self._prefix :], skip_special_tokens=True))


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
    ) -> None:
        self._decoder = IncrementalDecoder(tokenizer, prompt_token_ids)
        self._stop = list(stop)
        self._min_tokens = min_tokens
        self._include_stop = include_stop_str_in_output
        self._num_tokens = 0
        self.text = ""
        self.visible = ""
        self.stop_reason: str | None = None

    def update(self, token_ids: Sequence[int]) -> str | None:
        """Add tokens, and return the stop string that they complete, or None. Tokens after it are ignored."""
        for token_id in token_ids:
            if self.stop_reason is None:
                self._num_tokens += 1
                self._add(self._decoder.push(token_id))
        return self.stop_reason

    def finish(self) -> str | None:
        """End the output: make all text visible. Returns a stop string as `update` does."""
        if self.stop_reason is None:
            self._add(self._decoder.flush())
        self.visible = self.text
        return self.stop_reason

    def _add(self, new: str) -> None:
        start = len(self.text)
        self.text += new
        # As in vLLM, only a stop string completed after the first `min_tokens` tokens counts.
        if new and self._num_tokens > self._min_tokens:
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
