"""Token ids to text, one token at a time, without ever taking a character back (vLLM: `vllm/v1/engine/detokenizer.py`).

Two things make this harder than decode(token):

1. A character can span tokens. Byte-level vocabularies split an emoji into up to four bytes in as many tokens, and the
   text of an incomplete one is U+FFFD. So text is decoded from a window of tokens and emitted only once it does not end
   in U+FFFD.
2. A stop string can span tokens. Text that may be the beginning of one is held back until it is clear that it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

REPLACEMENT = "\ufffd"
CONTEXT = 5  # prompt tokens in the first window, as in vLLM


class Decodes(Protocol):
    """The one method of a tokenizer that is needed here."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> Any:
        """Text of `token_ids`."""


class IncrementalDecoder:
    """Turns a growing list of token ids into a growing string: `push` returns only new, final text.

    Two offsets frame a window of tokens: [prefix, read) has been emitted, [read, end) has not. The window's text minus
    the prefix's text is what is new. Decoding a window, not a token, keeps the spaces and joins that a tokenizer makes
    between tokens; keeping it short makes a step's cost independent of the output's length. The first window begins in
    the prompt, so that prompt and output join: some tokenizers drop the space in front of whatever they decode first.
    """

    def __init__(self, tokenizer: Decodes, prompt_token_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._token_ids = list(prompt_token_ids[-CONTEXT:])
        self._prefix = 0
        self._read = len(self._token_ids)

    def push(self, token_id: int) -> str:
        """Add a token; the text that became certain with it, possibly ""."""
        self._token_ids.append(token_id)
        emitted, window = self._decode_window()
        if window == emitted and not window.endswith(REPLACEMENT):
            self._token_ids.pop()  # a special token: no text now or later, so the window need not grow by it
            return ""
        if window.endswith(REPLACEMENT) or len(window) <= len(emitted):
            return ""
        self._prefix, self._read = self._read, len(self._token_ids)
        return window[len(emitted) :]

    def flush(self) -> str:
        """No more tokens will come: what is left, without the bytes of a character that never became whole."""
        emitted, window = self._decode_window()
        self._prefix = self._read = len(self._token_ids)
        return window[len(emitted) :].rstrip(REPLACEMENT)

    def _decode_window(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        emitted = str(decode(self._token_ids[self._prefix : self._read], skip_special_tokens=True))
        return emitted, str(decode(self._token_ids[self._prefix :], skip_special_tokens=True))


class Detokenizer:
    """The text of one output, the stop string that ends it, and how much of it may be shown.

    `text` is everything decoded so far, cut at a stop string once one is found. `visible` never shrinks and never
    contains text that may yet be cut away.
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
        """Add tokens; the stop string that they completed, or None. After one, further tokens are ignored."""
        for token_id in token_ids:
            if self.stop_reason is None:
                self._num_tokens += 1
                self._add(self._decoder.push(token_id))
        return self.stop_reason

    def finish(self) -> str | None:
        """The output is complete: show everything. A stop string in the very last bytes still counts."""
        if self.stop_reason is None:
            self._add(self._decoder.flush())
        self.visible = self.text
        return self.stop_reason

    def _add(self, new: str) -> None:
        start = len(self.text)
        self.text += new
        # As in vLLM, a stop string counts if it is completed after the first `min_tokens` tokens.
        if new and self._num_tokens > self._min_tokens:
            self._cut_at_stop(start)
        if self.stop_reason is not None or self._include_stop:
            self.visible = self.text
        else:
            self.visible = self.text[: len(self.text) - self._held_back()]

    def _cut_at_stop(self, start: int) -> None:
        """Cut `text` at the stop string completed first in text[start:]; of two that end together, the first listed."""
        found: tuple[int, str] | None = None
        for stop in self._stop:
            begin = self.text.find(stop, max(0, start - len(stop) + 1))
            if begin >= 0 and (found is None or begin + len(stop) < found[0]):
                found = (begin + len(stop), stop)
        if found is not None:
            end, self.stop_reason = found
            self.text = self.text[: end if self._include_stop else end - len(self.stop_reason)]

    def _held_back(self) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = max((len(s) for s in self._stop), default=0) - 1
        for length in range(min(longest, len(self.text)), 0, -1):
            if any(s.startswith(self.text[-length:]) for s in self._stop):
                return length
        return 0
