"""The checks behind `folovllm grade m1`. Reading them is allowed: they say what, never how."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.generation import logits_process as hf

from folovllm.course.grading.checks import Call, WrongAnswer

INF = float("inf")
REPLACEMENT = "\ufffd"

# Quarters make ties. No row is without a possible token.
a_logit = st.integers(-24, 24).map(lambda i: i / 4) | st.just(-INF)
some_logits = st.lists(a_logit, min_size=2, max_size=12).filter(lambda row: max(row) > -INF)
no_ids = torch.zeros(1, 0, dtype=torch.long)


def by_hugging_face(processor: Callable[..., Any], row: Sequence[float], ids: Sequence[int] = ()) -> torch.Tensor:
    """What Hugging Face's logits processor makes of one row."""
    made: torch.Tensor = processor(torch.tensor([list(ids)], dtype=torch.long), torch.tensor([list(row)]))
    return made[0]


def logits_of(*probs: float) -> torch.Tensor:
    return torch.tensor(probs).log()


def check_input_is_kept(function: Callable[..., Any], *args: Any) -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 1.0])
    function(logits, *args)
    if logits.tolist() != [2.0, -1.0, 0.5, 1.0]:
        raise WrongAnswer(f"{function.__name__} changed the logits that it was given. Return a new tensor.")


# --- the sampler ------------------------------------------------------------------------------------------


@pytest.mark.exercise("apply_repetition_penalty")
class TestRepetitionPenalty:
    def test_the_example(self, impl: ModuleType) -> None:
        """Positive logits are divided, negative ones multiplied: both become less likely."""
        call = Call(impl.apply_repetition_penalty, torch.tensor([2.0, -2.0, 4.0, 1.0]), [0, 1, 0], 2.0)
        call.must_return(torch.tensor([1.0, -4.0, 4.0, 1.0]), "Tokens 0 and 1 have occurred. 2 / 2 and -2 * 2.")

    def test_once_however_often(self, impl: ModuleType) -> None:
        """A token that occurred three times is penalised once."""
        call = Call(impl.apply_repetition_penalty, torch.tensor([8.0, 1.0]), [0, 0, 0], 2.0)
        call.must_return(torch.tensor([4.0, 1.0]), "8 / 2. Penalties per occurrence are frequency_penalty's business.")

    def test_nothing_has_occurred(self, impl: ModuleType) -> None:
        """Without tokens nothing changes."""
        call = Call(impl.apply_repetition_penalty, torch.tensor([2.0, -2.0]), [], 2.0)
        call.must_return(torch.tensor([2.0, -2.0]))

    @given(row=some_logits, data=st.data(), penalty=st.sampled_from([0.5, 1.0, 1.25, 2.0]))
    def test_against_hugging_face(
        self, impl: ModuleType, row: list[float], data: st.DataObject, penalty: float
    ) -> None:
        """The same as Hugging Face's RepetitionPenaltyLogitsProcessor."""
        ids = data.draw(st.lists(st.integers(0, len(row) - 1), max_size=8))
        want = by_hugging_face(hf.RepetitionPenaltyLogitsProcessor(penalty), row, ids)
        Call(impl.apply_repetition_penalty, torch.tensor(row), ids, penalty).must_return(want)

    def test_the_input_is_kept(self, impl: ModuleType) -> None:
        """The logits that are passed in stay as they are."""
        check_input_is_kept(impl.apply_repetition_penalty, [0, 1], 2.0)

    def test_refusals(self, impl: ModuleType) -> None:
        """A penalty of 0 or less is refused."""
        for penalty in (0.0, -1.0):
            Call(impl.apply_repetition_penalty, torch.tensor([2.0, 1.0]), [0], penalty).must_refuse("penalty <= 0.")


@pytest.mark.exercise("apply_temperature")
class TestTemperature:
    def test_the_example(self, impl: ModuleType) -> None:
        """At 0.5 the distances between logits double."""
        call = Call(impl.apply_temperature, torch.tensor([1.0, 2.0]), 0.5)
        call.must_return(torch.tensor([2.0, 4.0]), "Divided by 0.5.")

    @given(row=some_logits, temperature=st.sampled_from([0.01, 0.5, 0.7, 1.0, 2.0]))
    def test_against_hugging_face(self, impl: ModuleType, row: list[float], temperature: float) -> None:
        """The same as Hugging Face's TemperatureLogitsWarper."""
        want = by_hugging_face(hf.TemperatureLogitsWarper(temperature), row)
        Call(impl.apply_temperature, torch.tensor(row), temperature).must_return(want)

    def test_the_input_is_kept(self, impl: ModuleType) -> None:
        """The logits that are passed in stay as they are."""
        check_input_is_kept(impl.apply_temperature, 0.5)

    def test_refusals(self, impl: ModuleType) -> None:
        """A temperature of 0 is refused (greedy decoding divides by nothing), and so is one below."""
        for temperature in (0.0, -1.0):
            Call(impl.apply_temperature, torch.tensor([2.0, 1.0]), temperature).must_refuse("temperature <= 0.")


@pytest.mark.exercise("apply_min_p")
class TestMinP:
    def test_the_example(self, impl: ModuleType) -> None:
        """The threshold is relative to the likeliest token."""
        logits = logits_of(0.5, 0.3, 0.2)
        want = torch.tensor([logits[0], logits[1], -INF])
        why = "The probabilities are 0.5, 0.3, 0.2 and the threshold is 0.5 * 0.5 = 0.25."
        Call(impl.apply_min_p, logits, 0.5).must_return(want, why)

    def test_a_flat_distribution_keeps_all(self, impl: ModuleType) -> None:
        """Four equally likely tokens all reach 90 % of the likeliest, though each has only 0.25."""
        call = Call(impl.apply_min_p, torch.zeros(4), 0.9)
        call.must_return(torch.zeros(4), "The threshold is 0.9 * 0.25 = 0.225, not 0.9.")

    def test_the_likeliest_stays(self, impl: ModuleType) -> None:
        """At min_p = 1 only the likeliest tokens stay, and there is always one."""
        call = Call(impl.apply_min_p, torch.tensor([1.0, 3.0, 2.0, 3.0]), 1.0)
        call.must_return(torch.tensor([-INF, 3.0, -INF, 3.0]))

    @given(row=some_logits, min_p=st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.7, 1.0]))
    def test_against_hugging_face(self, impl: ModuleType, row: list[float], min_p: float) -> None:
        """The same as Hugging Face's MinPLogitsWarper."""
        probs = torch.tensor(row, dtype=torch.float64).softmax(dim=0)
        threshold = min_p * probs.max()
        assume(min_p in (0, 1) or ((probs - threshold).abs() > 1e-5 * threshold).all())  # rounding may decide there
        want = by_hugging_face(hf.MinPLogitsWarper(min_p), row)
        Call(impl.apply_min_p, torch.tensor(row), min_p).must_return(want)

    def test_the_input_is_kept(self, impl: ModuleType) -> None:
        """The logits that are passed in stay as they are."""
        check_input_is_kept(impl.apply_min_p, 0.5)

    def test_refusals(self, impl: ModuleType) -> None:
        """Values outside [0, 1] are refused."""
        for min_p in (-0.1, 1.1):
            Call(impl.apply_min_p, torch.tensor([2.0, 1.0]), min_p).must_refuse("min_p is a share of a probability.")


@pytest.mark.exercise("apply_top_k")
class TestTopK:
    def test_the_example(self, impl: ModuleType) -> None:
        """Two tokens tie for the second place: both stay."""
        call = Call(impl.apply_top_k, torch.tensor([3.0, 1.0, 2.0, 2.0]), 2)
        call.must_return(
            torch.tensor([3.0, -INF, 2.0, 2.0]), "Which of two equals comes k-th is an accident of sorting."
        )

    def test_only_the_best(self, impl: ModuleType) -> None:
        """top_k = 1 keeps the largest logit, wherever it stands."""
        call = Call(impl.apply_top_k, torch.tensor([-3.0, -1.0, -2.0]), 1)
        call.must_return(torch.tensor([-INF, -1.0, -INF]))

    def test_more_than_there_are(self, impl: ModuleType) -> None:
        """A top_k larger than the vocabulary keeps everything."""
        Call(impl.apply_top_k, torch.tensor([3.0, 1.0, 2.0]), 50).must_return(torch.tensor([3.0, 1.0, 2.0]))

    @given(row=some_logits, top_k=st.integers(1, 14))
    def test_against_hugging_face(self, impl: ModuleType, row: list[float], top_k: int) -> None:
        """The same as Hugging Face's TopKLogitsWarper."""
        want = by_hugging_face(hf.TopKLogitsWarper(top_k), row)
        Call(impl.apply_top_k, torch.tensor(row), top_k).must_return(want)

    def test_the_input_is_kept(self, impl: ModuleType) -> None:
        """The logits that are passed in stay as they are."""
        check_input_is_kept(impl.apply_top_k, 2)

    def test_refusals(self, impl: ModuleType) -> None:
        """A top_k below 1 would leave no token, and is refused."""
        for top_k in (0, -1):
            Call(impl.apply_top_k, torch.tensor([2.0, 1.0]), top_k).must_refuse("top_k < 1.")


@pytest.mark.exercise("apply_top_p")
class TestTopP:
    def test_the_token_that_crosses_top_p_stays(self, impl: ModuleType) -> None:
        """The set has to reach top_p: the token that crosses it belongs to it."""
        logits = logits_of(0.5, 0.3, 0.2)
        want = torch.tensor([logits[0], logits[1], -INF])
        Call(impl.apply_top_p, logits, 0.6).must_return(want, "0.5 is less than 0.6; 0.5 + 0.3 reaches it.")

    def test_the_likeliest_stays(self, impl: ModuleType) -> None:
        """The likeliest token stays, even if it alone has more than top_p."""
        logits = logits_of(0.2, 0.7, 0.1)
        call = Call(impl.apply_top_p, logits, 0.1)
        call.must_return(torch.tensor([-INF, logits[1], -INF]), "0.7 reaches 0.1 at once.")

    def test_tokens_stay_where_they_are(self, impl: ModuleType) -> None:
        """The result has the order of the vocabulary, not of the probabilities."""
        logits = logits_of(0.1, 0.2, 0.3, 0.4)
        want = torch.tensor([-INF, -INF, logits[2], logits[3]])
        Call(impl.apply_top_p, logits, 0.65).must_return(want, "0.4 + 0.3 reaches 0.65.")

    def test_one_drops_nothing(self, impl: ModuleType) -> None:
        """top_p = 1 keeps every token, however unlikely."""
        logits = torch.tensor([12.0, 0.0, -12.0, 11.0, -11.0, 3.0])
        call = Call(impl.apply_top_p, logits, 1.0)
        call.must_return(logits.clone(), "Sums of rounded probabilities may reach 1 before the last token.")

    @given(row=some_logits, top_p=st.sampled_from([0.05, 0.3, 0.5, 0.8, 0.9, 0.97]))
    def test_the_smallest_set_that_reaches_top_p(self, impl: ModuleType, row: list[float], top_p: float) -> None:
        """Against Hugging Face's TopPLogitsWarper: equally likely tokens at the edge are interchangeable."""
        sums = torch.tensor(row, dtype=torch.float64).softmax(dim=0).sort(descending=True).values.cumsum(dim=0)
        assume(((sums - top_p).abs() > 1e-5).all())  # rounding may decide there
        call = Call(impl.apply_top_p, torch.tensor(row), top_p)
        got = call.must_be_tensor([len(row)], torch.float32)
        want = by_hugging_face(hf.TopPLogitsWarper(top_p), row)
        if sorted(got.tolist()) != sorted(want.tolist()):
            call.fail(got, want, "The kept logits differ from Hugging Face's.")
        if any(g not in (logit, -INF) for g, logit in zip(got.tolist(), row, strict=True)):
            call.fail(got, want, "A kept token keeps its own logit, in its own place.")

    def test_the_input_is_kept(self, impl: ModuleType) -> None:
        """The logits that are passed in stay as they are."""
        check_input_is_kept(impl.apply_top_p, 0.5)

    def test_refusals(self, impl: ModuleType) -> None:
        """Values outside (0, 1] are refused."""
        for top_p in (0.0, -0.1, 1.1):
            Call(impl.apply_top_p, torch.tensor([2.0, 1.0]), top_p).must_refuse("top_p is outside (0, 1].")


# --- when to stop -----------------------------------------------------------------------------------------

EOS = {"eos_token_ids": {2}, "max_model_len": 100}
ON = (None, None)


@pytest.mark.exercise("check_stop")
class TestCheckStop:
    def test_eos(self, impl: ModuleType) -> None:
        """An EOS ends the request; its stop_reason is None."""
        Call(impl.check_stop, 5, [7, 2], **EOS).must_return(("stop", None), "2 is the EOS.")
        Call(impl.check_stop, 5, [7], **EOS).must_return(ON, "7 is no EOS.")
        several = {"eos_token_ids": [2, 3], "max_model_len": 100}
        Call(impl.check_stop, 5, [3], **several).must_return(("stop", None), "A model may have several EOS ids.")

    def test_only_the_newest_token_counts(self, impl: ModuleType) -> None:
        """Earlier tokens have been asked about already: an EOS that was ignored then is history."""
        Call(impl.check_stop, 5, [2, 7], **EOS).must_return(ON, "The newest token is 7.")

    def test_stop_tokens(self, impl: ModuleType) -> None:
        """A stop token ends the request and is named as the reason."""
        Call(impl.check_stop, 5, [7, 9], **EOS, stop_token_ids=[8, 9]).must_return(("stop", 9))

    def test_ignore_eos(self, impl: ModuleType) -> None:
        """With ignore_eos an EOS is a token like others, unless it is a stop token too."""
        Call(impl.check_stop, 5, [2], **EOS, ignore_eos=True).must_return(ON)
        call = Call(impl.check_stop, 5, [2], **EOS, ignore_eos=True, stop_token_ids={2})
        call.must_return(("stop", 2), "As a stop token it still ends the request, and is the reason.")
        Call(impl.check_stop, 5, [9], **EOS, ignore_eos=True, stop_token_ids={9}).must_return(("stop", 9))

    def test_eos_comes_before_stop_tokens(self, impl: ModuleType) -> None:
        """A token that is both EOS and a stop token has ended the request as EOS."""
        Call(impl.check_stop, 5, [2], **EOS, stop_token_ids={2}).must_return(("stop", None))

    def test_max_tokens(self, impl: ModuleType) -> None:
        """The output ends at max_tokens."""
        Call(impl.check_stop, 5, [7, 7], **EOS, max_tokens=3).must_return(ON, "2 of 3 tokens.")
        Call(impl.check_stop, 5, [7, 7, 7], **EOS, max_tokens=3).must_return(("length", None), "3 of 3 tokens.")

    def test_the_models_length(self, impl: ModuleType) -> None:
        """Prompt and output together end at max_model_len."""
        Call(impl.check_stop, 98, [7], **EOS).must_return(ON, "98 + 1 of 100 tokens.")
        Call(impl.check_stop, 98, [7, 7], **EOS).must_return(("length", None), "98 + 2 of 100 tokens.")

    def test_an_eos_at_the_last_token_is_a_stop(self, impl: ModuleType) -> None:
        """A text that ends by itself with its last allowed token has finished with "stop"."""
        Call(impl.check_stop, 5, [7, 2], **EOS, max_tokens=2).must_return(("stop", None))
        Call(impl.check_stop, 98, [7, 9], **EOS, stop_token_ids={9}).must_return(("stop", 9))

    def test_min_tokens(self, impl: ModuleType) -> None:
        """Before min_tokens, neither EOS nor a stop token ends the request."""
        Call(impl.check_stop, 5, [7, 2], **EOS, min_tokens=3).must_return(ON, "2 tokens, at least 3 are wanted.")
        Call(impl.check_stop, 5, [7, 9], **EOS, min_tokens=3, stop_token_ids={9}).must_return(ON)
        call = Call(impl.check_stop, 5, [7, 7, 2], **EOS, min_tokens=3)
        call.must_return(("stop", None), "The newest token is counted: these are 3.")

    def test_min_tokens_does_not_make_the_model_longer(self, impl: ModuleType) -> None:
        """The model's length ends the output even before min_tokens."""
        Call(impl.check_stop, 98, [7, 7], **EOS, min_tokens=3).must_return(("length", None), "98 + 2 of 100 tokens.")
        Call(impl.check_stop, 98, [7, 2], **EOS, min_tokens=3).must_return(("length", None), "As EOS it is too early.")

    @given(
        output=st.lists(st.integers(1, 4), min_size=1, max_size=5),
        prompt_len=st.integers(1, 6),
        max_tokens=st.none() | st.integers(1, 6),
        min_tokens=st.integers(0, 6),
        ignore_eos=st.booleans(),
        stop=st.sets(st.integers(2, 4)),
    )
    def test_all_of_it(
        self,
        impl: ModuleType,
        output: list[int],
        prompt_len: int,
        max_tokens: int | None,
        min_tokens: int,
        ignore_eos: bool,
        stop: set[int],
    ) -> None:
        """Any combination: the first rule that applies is the answer."""
        max_model_len, newest = 8, output[-1]
        assume(len(output) <= (max_tokens or 9) and prompt_len + len(output) <= max_model_len)
        rules = [
            (len(output) >= min_tokens and newest == 2 and not ignore_eos, ("stop", None)),
            (len(output) >= min_tokens and newest in stop, ("stop", newest)),
            (len(output) == max_tokens, ("length", None)),
            (prompt_len + len(output) == max_model_len, ("length", None)),
            (True, ON),
        ]
        call = Call(
            impl.check_stop, prompt_len, output, eos_token_ids={2}, max_model_len=max_model_len, max_tokens=max_tokens,
            min_tokens=min_tokens, ignore_eos=ignore_eos, stop_token_ids=stop,
        )  # fmt: skip
        call.must_return(next(answer for applies, answer in rules if applies))


# --- from tokens to text ----------------------------------------------------------------------------------


def decode_bytes(token_ids: list[int]) -> str:
    """A tokenizer whose tokens are single bytes: every character beyond ASCII is split."""
    return bytes(token_ids).decode("utf-8", errors="replace")


@functools.cache
def tokenizer_with_spaces() -> Tokenizer:
    """One token per word, which carries the space before it, as in Llama 2: the first word loses it in decoding."""
    words = {f"▁{word}": i for i, word in enumerate(["the", "cache", "grows", "token", "by"])} | {"?": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@functools.cache
def byte_level_tokenizer() -> Tokenizer:
    """A small byte-level BPE, as in GPT-2 and Qwen: some tokens are parts of characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["naïve 🚀🚀🚀 café", "你好 the the cache"], trainer)
    return tokenizer


def check_stream(impl: ModuleType, decode: Callable[[list[int]], str], token_ids: list[int]) -> None:
    stream, returned, steps = impl.TextStream(decode), "", []
    for i, token_id in enumerate(token_ids):
        new = stream.push(token_id)
        whole = decode(token_ids[: i + 1])
        steps.append(f"push({token_id}) returned {new!r}")
        returned = must_add(steps, returned, new)
        if not whole.endswith(REPLACEMENT) and returned != whole:
            wrong_text(steps, f"So far this is {returned!r}, and the tokens so far are {whole!r}.")
        if not whole.rstrip(REPLACEMENT).startswith(returned):
            wrong_text(steps, f"So far this is {returned!r}, while the tokens so far are {whole!r}: not final yet.")
    new = stream.finish()
    steps.append(f"finish() returned {new!r}")
    returned = must_add(steps, returned, new)
    whole = decode(token_ids).rstrip(REPLACEMENT)
    if returned != whole:
        wrong_text(steps, f"Together this is {returned!r}, and it should be {whole!r}.")


def must_add(steps: list[str], returned: str, new: Any) -> str:
    if not isinstance(new, str):
        wrong_text(steps, "It should be a string, possibly empty.")
    return returned + str(new)


def wrong_text(steps: list[str], why: str) -> None:
    shown = steps if len(steps) <= 8 else ["...", *steps[-8:]]
    raise WrongAnswer("\n".join([*shown, why]))


@pytest.mark.exercise("TextStream")
class TestTextStream:
    def test_plain_text(self, impl: ModuleType) -> None:
        """Text of one token per character comes out at once."""
        check_stream(impl, decode_bytes, list(b"cache"))

    def test_a_character_in_four_tokens(self, impl: ModuleType) -> None:
        """An emoji in four tokens appears with the fourth, and never as U+FFFD."""
        check_stream(impl, decode_bytes, list("ok 🚀!".encode()))

    def test_the_space_between_words(self, impl: ModuleType) -> None:
        """Tokens decoded one by one lose the space between words; decoded together they keep it."""
        check_stream(impl, tokenizer_with_spaces().decode, [0, 1, 2, 3, 4, 3])

    def test_an_end_inside_a_character(self, impl: ModuleType) -> None:
        """Half a character at the end is left out."""
        check_stream(impl, decode_bytes, list("né".encode())[:-1])

    def test_a_byte_that_is_no_text(self, impl: ModuleType) -> None:
        """A byte that no later one can complete is U+FFFD for good, once text follows."""
        check_stream(impl, decode_bytes, [97, 255, 98])

    def test_no_tokens(self, impl: ModuleType) -> None:
        """Without tokens, no text."""
        check_stream(impl, decode_bytes, [])

    @given(token_ids=st.lists(st.integers(0, 255), max_size=12))
    @example(token_ids=list("你好👩‍👧 naïve".encode()))
    def test_any_bytes(self, impl: ModuleType, token_ids: list[int]) -> None:
        """Any bytes at all, text or not."""
        check_stream(impl, decode_bytes, token_ids)

    @given(text=st.text(alphabet="the cache 🚀你好ïé", max_size=16))
    def test_a_byte_level_tokenizer(self, impl: ModuleType, text: str) -> None:
        """A trained tokenizer, in which a token may hold part of one character or several whole ones."""
        tokenizer = byte_level_tokenizer()
        check_stream(impl, tokenizer.decode, tokenizer.encode(text).ids)


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """Brute force: the first character at which a stop string is complete."""
    for end in range(1, len(text) + 1):
        for s in stop:
            if text[:end].endswith(s):
                return text[: end - len(s)], s
    return text, None


def waiting(text: str, stop: Sequence[str]) -> int:
    """Brute force: the length of the longest end of `text` that is the beginning of a stop string."""
    return max((n for n in range(len(text) + 1) for s in stop if n < len(s) and text.endswith(s[:n])), default=0)


def check_stops(impl: ModuleType, stop: list[str], pieces: list[str]) -> None:
    checker, shown, fed = impl.StopStrings(stop), "", ""
    steps = [f"StopStrings({stop!r})"]
    for piece in pieces:
        new = checker.feed(piece)
        fed += piece
        steps.append(f"feed({piece!r}) returned {new!r}")
        shown = must_add(steps, shown, new)
        text, matched = cut_at_stop(fed, stop)
        held = 0 if matched else waiting(text, stop)
        may_be_shown = text[: len(text) - held]
        if shown != may_be_shown:
            wrong_text(steps, f"Shown so far: {shown!r}. It should be {may_be_shown!r}.")
        must_match(steps, checker, matched)
    new = checker.finish()
    steps.append(f"finish() returned {new!r}")
    shown = must_add(steps, shown, new)
    text, matched = cut_at_stop(fed, stop)
    if shown != text:
        wrong_text(steps, f"Shown in the end: {shown!r}. It should be {text!r}.")
    must_match(steps, checker, matched)


def must_match(steps: list[str], checker: Any, matched: str | None) -> None:
    if checker.matched != matched:
        wrong_text(steps, f"`matched` is {checker.matched!r}. It should be {matched!r}.")


ab = st.text(alphabet="ab", min_size=1, max_size=3)


@pytest.mark.exercise("StopStrings")
class TestStopStrings:
    def test_no_stop_strings(self, impl: ModuleType) -> None:
        """Without stop strings nothing is held back."""
        check_stops(impl, [], ["one ", "two"])

    def test_inside_one_piece(self, impl: ModuleType) -> None:
        """A stop string inside a piece cuts the text where it begins."""
        check_stops(impl, ["STOP"], ["one STOP two", "three"])

    def test_over_several_pieces(self, impl: ModuleType) -> None:
        """A stop string that spans pieces: its beginning is never shown."""
        check_stops(impl, ["</a>"], ["one ", "two<", "/a", ">rest"])

    def test_a_false_alarm(self, impl: ModuleType) -> None:
        """What only looked like a stop string is shown as soon as that is clear."""
        check_stops(impl, ["</a>"], ["x", "<", "/", "b"])

    def test_held_until_the_end(self, impl: ModuleType) -> None:
        """At the end, what was held back is shown after all."""
        check_stops(impl, ["</a>"], ["x</"])

    def test_the_first_to_be_complete(self, impl: ModuleType) -> None:
        """Of two stop strings, the one that is complete first counts, whichever is listed first."""
        check_stops(impl, ["cd", "b"], ["abcd"])
        check_stops(impl, ["cd", "b"], list("abcd"))

    def test_complete_together(self, impl: ModuleType) -> None:
        """Of two that are complete at the same character, the one listed first counts."""
        check_stops(impl, ["bc", "abc"], ["xabc"])
        check_stops(impl, ["abc", "bc"], ["xabc"])

    def test_a_beginning_inside_a_beginning(self, impl: ModuleType) -> None:
        """After "aa" an "a" more does not end the hope for "aab"."""
        check_stops(impl, ["aab"], ["x", "a", "a", "a", "b", "a"])

    @given(stop=st.lists(ab, max_size=3), pieces=st.lists(ab, max_size=8))
    def test_any_text_in_any_pieces(self, impl: ModuleType, stop: list[str], pieces: list[str]) -> None:
        """Against brute force: what is shown after every piece, and what was matched."""
        check_stops(impl, stop, pieces)

    def test_refusals(self, impl: ModuleType) -> None:
        """An empty stop string, which is everywhere, is refused."""
        Call(impl.StopStrings, ["a", ""]).must_refuse("The second stop string is empty.")
