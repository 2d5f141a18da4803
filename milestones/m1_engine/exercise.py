"""Exercises of M1: from logits to a token, when to stop, and from tokens to text (chapter 2).

Write your answers in place of the lines that raise NotImplementedError, in any order, and run `folovllm grade m1`.
Each docstring says all there is to know; the README has a folded hint for each. Helper functions of your own are
welcome. Few answers need more than a dozen lines.

The five functions of the sampler work on one request: logits are float32 [V], one number per token of the vocabulary.
None of them changes the tensor that it gets: each returns a new one. A token that is dropped has the logit -inf, which
is probability 0 after the softmax; a token that is kept keeps its logit exactly. Logits may hold -inf already.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch

# --- the sampler ------------------------------------------------------------------------------------------


def apply_repetition_penalty(logits: torch.Tensor, token_ids: Sequence[int], penalty: float) -> torch.Tensor:
    """Make tokens less likely that have occurred already (CTRL, arXiv 1909.05858).

    token_ids: the prompt and the output so far, in any order, possibly with repeats and possibly empty.
    penalty: the logit of every token in token_ids is divided by it if positive and multiplied by it if negative, once,
        however often the token has occurred. 1 changes nothing; below 1, repeating becomes more likely.

    Example: apply_repetition_penalty([2., -2., 4., 1.], [0, 1, 0], 2.0) is [1., -4., 4., 1.].

    Raises ValueError for penalty <= 0.
    """
    raise NotImplementedError("apply_repetition_penalty")


def apply_temperature(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Sharpen (below 1) or flatten (above 1) the distribution: every logit is divided by `temperature`.

    Example: apply_temperature([1., 2.], 0.5) is [2., 4.].

    Raises ValueError for temperature <= 0: greedy decoding, which users ask for with 0, is an argmax and no division.
    """
    raise NotImplementedError("apply_temperature")


def apply_min_p(logits: torch.Tensor, min_p: float) -> torch.Tensor:
    """Drop every token whose probability is less than `min_p` times the likeliest one's (arXiv 2407.01082).

    Probabilities are softmax(logits). A token exactly at the threshold stays, and so does the likeliest.

    Example: probabilities 0.5, 0.3, 0.2 and min_p = 0.5. The threshold is 0.25: the third token is dropped.

    Raises ValueError for min_p outside [0, 1]. 0 drops nothing.
    """
    raise NotImplementedError("apply_min_p")


def apply_top_k(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Keep the `top_k` largest logits (arXiv 1805.04833). Tokens that tie with the k-th largest stay as well.

    top_k: may be larger than the vocabulary: then every token stays.

    Example: apply_top_k([3., 1., 2., 2.], 2) is [3., -inf, 2., 2.].

    Raises ValueError for top_k < 1.
    """
    raise NotImplementedError("apply_top_k")


def apply_top_p(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the smallest set of likeliest tokens whose probabilities add up to at least `top_p` (arXiv 1904.09751).

    Probabilities are softmax(logits). The likeliest token always stays. Of tokens that are equally likely at the edge,
    keep as many as are needed, whichever you like.

    Example: probabilities 0.5, 0.3, 0.2 and top_p = 0.6. The first has only 0.5, with the second it is 0.8: these two
    stay. The token that crosses top_p belongs to the set.

    Raises ValueError for top_p outside (0, 1]. 1 drops nothing, however unlikely a token may be.
    """
    raise NotImplementedError("apply_top_p")


# --- when to stop -----------------------------------------------------------------------------------------


def check_stop(
    prompt_len: int,
    output_token_ids: Sequence[int],
    *,
    eos_token_ids: Collection[int],
    max_model_len: int,
    max_tokens: int | None = None,
    min_tokens: int = 0,
    ignore_eos: bool = False,
    stop_token_ids: Collection[int] = (),
) -> tuple[str | None, int | None]:
    """Does the newest output token complete the request? Called after every token, so there is at least one.

    Returns (finish_reason, stop_reason):
        ("stop", None)      the newest token is an EOS, and EOS is not ignored
        ("stop", token)     the newest token is in stop_token_ids; stop_reason is that token
        ("length", None)    the output has max_tokens tokens (None: no such bound), or prompt and output together have
                            max_model_len
        (None, None)        it goes on

    The rules are asked in this order, and the first that applies is the answer: a request whose last allowed token is
    an EOS has finished with "stop". The two rules about tokens are asked only once the output has at least min_tokens
    tokens, the newest included; "length" is always asked. Only the newest token is looked at: the earlier ones have
    been.

    Example: eos_token_ids={2}, prompt_len=5, max_model_len=100
        output [7, 2]                        ("stop", None)
        output [7, 2], ignore_eos=True       (None, None)
        output [7, 2], min_tokens=3          (None, None)
        output [7, 9], stop_token_ids={9}    ("stop", 9)
        output [7, 8], max_tokens=2          ("length", None)
    """
    raise NotImplementedError("check_stop")


# --- from tokens to text ----------------------------------------------------------------------------------


class TextStream:
    """Turns tokens into text while they come, without ever taking a character back.

    A character may span tokens: byte-level vocabularies cut an emoji into up to four pieces. Decoding the tokens so far
    then gives a text that ends in U+FFFD, the replacement character, and a later token turns that into the character.
    And a token's text may depend on its neighbours: some tokenizers write the space before a word only if the word is
    not the first. So decode(a) + decode(b) need not be decode(a + b).
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        """decode: token ids to text, for any list of them. It is all that is known about the tokenizer."""
        raise NotImplementedError("TextStream")

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that is new with it, possibly "".

        - Whenever decode(all tokens so far) does not end in U+FFFD, what has been returned up to now, joined, is
          exactly that: nothing is held back without a reason.
        - While it does end in U+FFFD, what has been returned is the beginning of it, and without those U+FFFD.
        """
        raise NotImplementedError("TextStream")

    def finish(self) -> str:
        """No more tokens will come: return what is left.

        Everything returned, joined, is then decode(all tokens), except that U+FFFD at its end, the bytes of a character
        that never became whole, are left out.
        """
        raise NotImplementedError("TextStream")


class StopStrings:
    """Finds a stop string in growing text, and holds back what may become one.

    The text ends where a stop string begins. It is complete at some character; of several stop strings, the one that is
    complete first counts, and of those complete at the same character the one listed first. How the text is cut into
    pieces makes no difference: a stop string may span any number of them.

    matched: None, or the stop string that ended the text.
    """

    matched: str | None

    def __init__(self, stop: Sequence[str]) -> None:
        """stop: the stop strings, possibly none. Raises ValueError if one of them is empty."""
        raise NotImplementedError("StopStrings")

    def feed(self, text: str) -> str:
        """Take the next piece of text; return what may be shown with it, possibly "".

        Held back is the longest end of the text so far that is the beginning of a stop string, and nothing more. Once a
        stop string has been found, nothing after its beginning is ever returned.

        Example: StopStrings(["</a>"]) fed "one<", "/", "b" returns "one", "", "</b"; fed "one<", "/a>two" it returns
        "one" and "", and `matched` is "</a>".
        """
        raise NotImplementedError("StopStrings")

    def finish(self) -> str:
        """No more text will come: return what was held back, which is "" if a stop string was found."""
        raise NotImplementedError("StopStrings")
