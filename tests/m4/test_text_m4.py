"""The text that a user gets at M1 to M4, with tokenizers of every kind; the oracle is the tokenizer's own decode."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from folovllm import LLM, BeamSearchParams, SamplingParams
from folovllm.config import MILESTONES
from tests.m1.text_cases import KINDS, beyond, byte_ids, decoded
from tests.oracle import tiny_model

VOCAB = 320  # more than any of the tokenizers has: some rows of the model are no tokens
TALK = [{"role": "user", "content": "What is a KV cache?"}]
END = "<|im_end|>"
each_kind = pytest.mark.parametrize("kind", KINDS)
each_milestone = pytest.mark.parametrize("milestone", MILESTONES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model by the kind of its tokenizer."""
    model = tiny_model("llama", vocab_size=VOCAB)
    made = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in made.items():
        model.save_pretrained(folder)
        KINDS[kind]().save_pretrained(folder)
    return made


def make(folder: Path | str, milestone: str) -> LLM:
    return LLM(str(folder), milestone=milestone, dtype="float32", device="cpu", num_kv_blocks=200)


def tokenizer_of(llm: LLM) -> PreTrainedTokenizerFast:
    assert isinstance(llm.engine.tokenizer, PreTrainedTokenizerFast)
    return llm.engine.tokenizer


@each_milestone
@each_kind
def test_a_streams_text_and_its_logprobs_are_the_decode_of_the_whole(
    folders: dict[str, Path], kind: str, milestone: str
) -> None:
    llm = make(folders[kind], milestone)
    tokenizer = tokenizer_of(llm)
    word, mark = tokenizer.convert_tokens_to_ids(["a", "<s>"])
    prompts = [[word], [mark], [word, mark, mark], [VOCAB - 1]]
    # With byte fallback an invalid run hides its characters in a decode of the whole, which cannot be streamed.
    banned = byte_ids(kind, tokenizer, bytes(range(256))) if kind in ("llama", "gemma") else []
    params = [
        SamplingParams(
            n=2,
            seed=i,
            temperature=2.0,
            max_tokens=16,
            logprobs=4,
            skip_special_tokens=i % 2 == 0,
            logit_bias=dict.fromkeys(banned, -1e9),
        )
        for i in range(len(prompts))
    ]
    texts: dict[tuple[str, int], str] = {}
    for output in llm.stream([{"prompt_token_ids": p} for p in prompts], params):
        for completion in output.outputs:
            name = (output.request_id, completion.index)
            assert completion.text.startswith(texts.get(name, ""))
            texts[name] = completion.text
            if not output.finished:
                continue
            ids, skip = completion.token_ids, params[int(output.request_id)].skip_special_tokens
            prompt = output.prompt_token_ids
            whole = beyond(decoded(tokenizer, prompt, skip), decoded(tokenizer, [*prompt, *ids], skip))
            assert whole.startswith(completion.text)
            assert whole[len(completion.text) :] in ("", "\ufffd" if kind == "byte_level" else "")
            assert completion.logprobs is not None
            pieces = [entries[i].decoded_token or "" for i, entries in zip(ids, completion.logprobs, strict=True)]
            named = beyond(decoded(tokenizer, prompt, False), decoded(tokenizer, [*prompt, *ids], False))
            assert named.startswith("".join(pieces)) and len(named) - len("".join(pieces)) <= (kind == "byte_level")
            for t, entries in enumerate(completion.logprobs):
                before = [*prompt, *ids[:t]]
                for i, entry in entries.items():
                    if kind != "byte_level" and i not in banned:
                        assert entry.decoded_token == beyond(
                            decoded(tokenizer, before, False), decoded(tokenizer, [*before, i], False)
                        )


@each_milestone
@pytest.mark.parametrize("kind", ["byte_level", "llama", "gemma"])
def test_a_character_of_which_the_prompt_has_the_beginning(folders: dict[str, Path], kind: str, milestone: str) -> None:
    llm = make(folders[kind], milestone)
    tokenizer = tokenizer_of(llm)
    word, rocket = tokenizer.convert_tokens_to_ids("a"), byte_ids(kind, tokenizer, "🚀".encode())
    prompts = [{"prompt_token_ids": [word, *rocket[:i]]} for i in range(4)]
    params = [SamplingParams(temperature=0, max_tokens=1, logprobs=0, logit_bias={i: 1e4}) for i in rocket]
    completions = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    assert [c.text for c in completions] == ["", "", "", "🚀"]
    assert [c.logprobs[0][i].decoded_token for c, i in zip(completions, rocket, strict=True) if c.logprobs] == [
        *("", "", "", "🚀")
    ]


@each_milestone
def test_two_tokens_have_two_texts(folders: dict[str, Path], milestone: str) -> None:
    """A word with and without its space: OpenAI's completions API has top log probabilities by text."""
    llm = make(folders["unigram"], milestone)
    word, spaced = tokenizer_of(llm).convert_tokens_to_ids(["a", "▁a"])
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=VOCAB)
    (entries,) = llm.generate([[spaced]], params, use_tqdm=False)[0].outputs[0].logprobs or []
    assert [entries[i].decoded_token for i in (word, spaced)] == ["a", " a"]


@each_milestone
@pytest.mark.parametrize("kind", ["llama", "word_piece"])
def test_beams(folders: dict[str, Path], kind: str, milestone: str) -> None:
    llm = make(folders[kind], milestone)
    tokenizer = tokenizer_of(llm)
    (output,) = llm.beam_search([[tokenizer.convert_tokens_to_ids("a")]], BeamSearchParams(3, 6))
    assert [beam.text for beam in output.sequences] == [decoded(tokenizer, b.tokens) for b in output.sequences]


@each_milestone
def test_a_stop_string_may_be_a_special_token_that_is_shown(milestone: str) -> None:
    llm = make("folo-tiny", milestone)
    tokenizer = tokenizer_of(llm)
    end = tokenizer.convert_tokens_to_ids(END)
    common = {"temperature": 0, "max_tokens": 150, "ignore_eos": True, "skip_special_tokens": False}
    for include in (False, True):
        params = SamplingParams(**common, stop=[END], include_stop_str_in_output=include)
        completion = llm.chat(TALK, params, use_tqdm=False)[0].outputs[0]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", END)
        assert completion.token_ids.index(end) == len(completion.token_ids) - 1
        shown = completion.token_ids if include else completion.token_ids[:-1]
        assert completion.text == decoded(tokenizer, shown, False)
    # A stop string may begin in text and end in a special token.
    last = completion.text.removesuffix(END)[-3:]
    params = SamplingParams(**common, stop=[last + END])
    assert llm.chat(TALK, params, use_tqdm=False)[0].outputs[0].stop_reason == last + END


@each_milestone
def test_eos_is_hidden_unless_asked_for(milestone: str) -> None:
    llm = make("folo-tiny", milestone)
    for skip in (False, True):
        for include in (False, True):
            params = SamplingParams(
                temperature=0, max_tokens=150, skip_special_tokens=skip, include_stop_str_in_output=include
            )
            completion = llm.chat(TALK, params, use_tqdm=False)[0].outputs[0]
            assert completion.finish_reason == "stop" and completion.stop_reason is None
            assert completion.text.endswith(END) == (include and not skip)


@each_milestone
def test_a_stop_string_that_cannot_match_is_warned_of_once(milestone: str, caplog: pytest.LogCaptureFixture) -> None:
    llm = make("folo-tiny", milestone)
    quiet = [
        SamplingParams(temperature=0, max_tokens=4, stop=[END]),  # an EOS: the output ends there anyway
        SamplingParams(temperature=0, max_tokens=4, stop=[END], ignore_eos=True, stop_token_ids=[2]),
        SamplingParams(temperature=0, max_tokens=4, stop=[END], ignore_eos=True, skip_special_tokens=False),
        SamplingParams(temperature=0, max_tokens=4, stop=["im_end"], ignore_eos=True),
    ]
    with caplog.at_level(logging.WARNING):
        llm.generate(["A"] * len(quiet), quiet, use_tqdm=False)
        assert not caplog.records
        params = SamplingParams(temperature=0, max_tokens=150, stop=[END, "so" + END], ignore_eos=True)
        for _ in range(2):
            completion = llm.chat(TALK, params, use_tqdm=False)[0].outputs[0]
            assert completion.finish_reason == "length" and 2 in completion.token_ids  # as in vLLM
    assert sorted(record.getMessage().split(":")[0] for record in caplog.records) == [
        f"stop='{END}' never matches",
        f"stop='so{END}' never matches",
    ]
    assert all("skip_special_tokens=False, or stop_token_ids=[2]" in r.getMessage() for r in caplog.records)
