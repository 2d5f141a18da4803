"""Forms of prompts, messages and arguments that programs written for vLLM or transformers bring along.

The right ids and texts are those of transformers' tokenizer.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import folovllm
from folovllm import (
    LLM,
    BeamSearchParams,
    ConfigError,
    EngineDeadError,
    EngineGenerateError,
    InvalidRequestError,
    LLMEngine,
    ModelConfig,
    SamplingParams,
    SchedulerConfig,
)
from folovllm.models.loader import resolve_model
from tests.mock import mock_engine
from tests.oracle import tiny_model

MILESTONES = ("m1", "m2", "m3", "m4")
ONE = SamplingParams(temperature=0, max_tokens=2)
BOS = "<|endoftext|>"
FOLDER = Path(resolve_model("folo-tiny").path_or_id)
TALK = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module", params=MILESTONES)
def llm(request: pytest.FixtureRequest) -> LLM:
    return LLM("folo-tiny", milestone=request.param, dtype="float32", device="cpu", max_model_len=256)


@pytest.fixture(scope="module")
def m4() -> LLM:
    return LLM("folo-tiny", dtype="float32", device="cpu", max_model_len=256)


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A model whose tokenizer adds a BOS to a text, and whose chat template writes one."""
    folder = tmp_path_factory.mktemp("bos") / "model"
    shutil.copytree(FOLDER, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    tokenizer.chat_template = BOS + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    return LLM(str(folder), dtype="float32", device="cpu", max_model_len=256)


def ids_of(llm: LLM, prompts: Any, params: SamplingParams = ONE) -> list[list[int]]:
    """The prompts that ran, as ids."""
    return [output.prompt_token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


# ---------------------------------------------------------------------- token ids


def test_ids_of_any_library_are_ids(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    text = "A KV cache"
    ids = tokenizer(text)["input_ids"]
    one: dict[str, Any] = {
        "numpy": np.array(ids),
        "numpy, 16 bits": np.array(ids, dtype=np.uint16),
        "torch": torch.tensor(ids),
        "torch, 32 bits": torch.tensor(ids, dtype=torch.int32),
        "list of numpy integers": [np.int64(i) for i in ids],
        "list of 0-d tensors": list(torch.tensor(ids)),
        "tuple": tuple(ids),
        "BatchEncoding": tokenizer(text),
        "BatchEncoding of tensors": tokenizer(text, return_tensors="pt"),
        "BatchEncoding of arrays": tokenizer(text, return_tensors="np"),
        "its dict": dict(tokenizer(text)),
    }
    for name, form in one.items():
        assert ids_of(llm, form) == [ids], name
        assert ids_of(llm, [form, text]) == [ids, ids], name
    for name, form in one.items():
        if "Batch" not in name and name != "its dict":
            assert ids_of(llm, [{"prompt_token_ids": form}]) == [ids], name
    assert all(type(i) is int for form in one.values() for i in ids_of(llm, form)[0])


def test_a_batch_is_a_list_of_prompts_and_padding_is_no_part_of_them(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    texts = ["A KV cache", "A block of tokens, and more of them"]
    want = [tokenizer(text)["input_ids"] for text in texts]
    same = [[1, 2, 3], [4, 5, 6]]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for side in ("left", "right"):
        padded = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
        assert padded["input_ids"].shape[0] == 2 and not bool(padded["attention_mask"].all())
        assert ids_of(llm, padded) == want
    assert ids_of(llm, tokenizer(texts)) == want
    for batch in (np.array(same), torch.tensor(same), tuple(np.array(same)), [torch.tensor(row) for row in same]):
        assert ids_of(llm, batch) == same


BAD_IDS: list[tuple[Any, str]] = [
    (np.array([1.0, 2.0]), r"prompt.*=1.0 is not valid"),
    (torch.tensor([1.5]), r"prompt.*=1.5 is not valid"),
    ([np.array([True, False])], r"prompt_token_ids\[0\]=True is not valid"),
    ([[np.bool_(True)]], r"prompt_token_ids\[0\]=.*True.* is not valid"),
    ([torch.tensor([[[1]]])], r"prompt_token_ids\[0\]=\[\[1\]\] is not valid"),
    ({"prompt_token_ids": torch.tensor([[1, 2]])}, r"prompt_token_ids\[0\]=\[1, 2\] is not valid; allowed: integers"),
    ([np.array([5, 10**6])], r"prompt_token_ids\[1\]=1000000 is not valid"),
    ([torch.tensor([-1])], r"prompt_token_ids\[0\]=-1 is not valid"),
    ([np.array([], dtype=np.int64)], r"prompt=\[\] has no tokens"),
    ([torch.tensor(3)], None),  # a list of one integer is a prompt
    (torch.tensor(3), "prompts=tensor.* is not valid"),
    ([{"input_ids": [[1, 2], [3, 4]]}], "allowed: the ids of one prompt, not of 2"),
    ([{"input_ids": [1, 2], "attention_mask": [1]}], "attention_mask=.* is not valid; allowed: a number for each"),
    ([{"input_ids": 5}], "input_ids=5 is not valid"),
]


@pytest.mark.parametrize(("prompts", "message"), BAD_IDS, ids=[str(m) for _, m in BAD_IDS])
def test_arrays_are_checked_like_lists(m4: LLM, prompts: Any, message: str | None) -> None:
    if message is None:
        assert ids_of(m4, prompts) == [[3]]
        return
    with pytest.raises(InvalidRequestError, match=message):
        m4.generate(prompts, ONE, use_tqdm=False)
    assert not m4.engine.has_unfinished_requests()


def test_ids_in_parameters_may_be_of_any_library(m4: LLM) -> None:
    assert SamplingParams(stop_token_ids=np.array([5, 6, 5])).stop_token_ids == [5, 6]
    assert SamplingParams(stop_token_ids=[torch.tensor(5)]).stop_token_ids == [5]
    assert SamplingParams(logit_bias={np.int64(5): 1.0}).logit_bias == {5: 1.0}
    assert BeamSearchParams(2, 4, stop_token_ids=torch.tensor([7])).stop_token_ids == [7]
    for bad in (np.array([-1]), [np.bool_(True)], np.array([1.0]), torch.tensor([[1]])):
        with pytest.raises(InvalidRequestError, match="stop_token_ids=.* is not valid"):
            SamplingParams(stop_token_ids=bad)
    with pytest.raises(InvalidRequestError, match=r"stop_token_ids=\[99999\] is not valid"):
        m4.beam_search(["A"], BeamSearchParams(2, 4, stop_token_ids=[99999]))


# ---------------------------------------------------------------------- special tokens and truncation


def test_special_tokens_are_added_to_a_text_and_to_nothing_else(with_bos: LLM) -> None:
    """As in vLLM: a rendered template that is given as text has its BOS twice, and through chat() once."""
    tokenizer = with_bos.get_tokenizer()
    text = str(tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True))
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert plain.count(0) == 1 and tokenizer(text)["input_ids"] == [0, *plain]
    assert ids_of(with_bos, text) == ids_of(with_bos, {"prompt": text}) == [[0, *plain]]
    assert ids_of(with_bos, {"prompt": text, "add_special_tokens": False}) == [plain]
    assert with_bos.chat(TALK, ONE, use_tqdm=False)[0].prompt_token_ids == plain
    assert ids_of(with_bos, [plain]) == [plain]
    for prompt, message in (
        ({"prompt": "a", "add_special_tokens": 1}, "add_special_tokens=1 is not valid; allowed: True or False"),
        ({"prompt_token_ids": [1], "add_special_tokens": True}, "allowed: leaving it out"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            with_bos.generate(prompt, ONE, use_tqdm=False)


@pytest.mark.parametrize("kept", [1, 2, 5, 9, 50])
def test_truncation_keeps_the_end_of_a_prompt(llm: LLM, with_bos: LLM, kept: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=2, truncate_prompt_tokens=kept)
    text = "A block holds the keys and values of sixteen tokens."
    for one in (llm, with_bos):
        # Not the engine's: its truncation is a setting that stays.
        tokenizer = AutoTokenizer.from_pretrained(one.engine.config.model.model if one is with_bos else FOLDER)
        tokenizer.truncation_side = "left"
        want = tokenizer(text, truncation=True, max_length=kept)["input_ids"]
        assert ids_of(one, text, params) == [want]
        assert ids_of(one, [list(range(1, 30))], params) == [list(range(1, 30))[-kept:]]
    assert ids_of(llm, text, ONE) == [llm.get_tokenizer()(text)["input_ids"]]


def test_truncation_to_what_the_model_takes(llm: LLM) -> None:
    whole = SamplingParams(temperature=0, max_tokens=2, truncate_prompt_tokens=-1)
    assert ids_of(llm, [[1] * 10 + [2] * 300], whole) == [[2] * 255]
    for kept in (0, -2, 1.5, True):
        with pytest.raises(InvalidRequestError, match=f"truncate_prompt_tokens={kept!r} is not valid"):
            SamplingParams(truncate_prompt_tokens=kept)
    with pytest.raises(InvalidRequestError, match="truncate_prompt_tokens=256 is not valid; allowed: at most 255"):
        llm.generate("A", SamplingParams(truncate_prompt_tokens=256), use_tqdm=False)


# ---------------------------------------------------------------------- chat

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}{{ '=' + m.name if m.name }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{{ ' <think>' if enable_thinking }}{% endif %}"
)
PARTS_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}\n{% endfor %}"
)
STRICT_TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}{{ m.content }}{% endfor %}"
)
SILENT_TEMPLATE = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"

CHATS: list[tuple[str, list[dict[str, Any]], dict[str, Any]]] = [
    ("the model's template", TALK, {}),
    ("continued", [*TALK, {"role": "assistant", "content": "A KV"}], {"continue_final_message": True}),
    ("no turn begun", TALK, {"add_generation_prompt": False}),
    ("another template", TALK, {"chat_template": TEMPLATE}),
    ("variables", TALK, {"chat_template": TEMPLATE, "chat_template_kwargs": {"enable_thinking": True}}),
    ("a name", [{"role": "user", "content": "Hi", "name": "Ada"}], {"chat_template": TEMPLATE}),
    ("a name that the template does not use", [{"role": "user", "content": "Hi", "name": "Ada"}], {}),
    ("roles", [{"role": "developer", "content": "Be short."}, *TALK, {"role": "tool", "content": "42"}], {}),
    ("system", [{"role": "system", "content": "Be short."}, *TALK], {}),
]


@pytest.mark.parametrize(("messages", "options"), [case[1:] for case in CHATS], ids=[case[0] for case in CHATS])
def test_a_conversation_is_what_the_template_makes_of_it(
    llm: LLM, messages: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    flags = {"add_generation_prompt": not options.get("continue_final_message")} | options
    variables = flags.pop("chat_template_kwargs", {})
    text = AutoTokenizer.from_pretrained(FOLDER).apply_chat_template(messages, tokenize=False, **flags, **variables)
    want = llm.get_tokenizer()(text, add_special_tokens=False)["input_ids"]
    one, two = llm.chat([messages, messages], ONE, use_tqdm=False, **options)
    assert one.prompt_token_ids == two.prompt_token_ids == want
    assert llm.chat(messages, ONE, use_tqdm=False, **options)[0].outputs[0].token_ids == one.outputs[0].token_ids
    assert llm.chat_prompts(messages, **options) == [{"prompt_token_ids": want}]


def test_text_parts_are_joined_unless_the_template_reads_parts(m4: LLM) -> None:
    """vLLM's rule: with newlines for a template that takes a string."""
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}, "you"]
    tokenizer = m4.get_tokenizer()

    def text(content: Any, template: str | None) -> str:
        (prompt,) = m4.chat_prompts([{"role": "user", "content": content}], chat_template=template)
        return str(tokenizer.decode(prompt["prompt_token_ids"]))

    joined = text("Hello\nthere\nyou", None)
    assert "Hello\nthere\nyou" in joined and text(parts, None) == joined
    assert text(parts, TEMPLATE) == text("Hello\nthere\nyou", TEMPLATE)
    assert text(parts, PARTS_TEMPLATE) == "user: Hellothereyou"
    assert text([], None) == text("", None)


REFUSED_CHATS: list[tuple[Any, dict[str, Any], str]] = [
    (TALK, {"chat_template_kwargs": 5}, "chat_template_kwargs=5 is not valid"),
    (TALK, {"chat_template_kwargs": {"tokenize": True}}, r"chat_template_kwargs\['tokenize'\]=True is not valid"),
    (TALK, {"chat_template": ""}, "chat_template='' is not valid"),
    (TALK, {"chat_template": "{% if %}"}, "is refused by the chat template: "),
    (TALK, {"continue_final_message": 1}, "continue_final_message=1 is not valid; allowed: True or False"),
    (TALK, {"add_generation_prompt": 1}, "add_generation_prompt=1 is not valid"),
    (
        TALK,
        {"continue_final_message": True, "add_generation_prompt": True},
        "add_generation_prompt=True is not valid; allowed: False or None with continue_final_message=True",
    ),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        {},
        r"messages\[0\]\['content'\]\[0\]=.*image_url.* is not valid; allowed: .*reads text only",
    ),
    ([{"role": "user", "content": [{"type": "text"}]}], {}, r"messages\[0\]\['content'\]\[0\]="),
    ([{"role": "user", "content": "x", "name": 5}], {}, r"messages\[0\]\['name'\]=5 is not valid; allowed: a string"),
    ([{"role": "user", "content": "x", "mood": "y"}], {}, r"messages\[0\]\['mood'\]='y' is not valid"),
    ([{"role": "tool", "content": "42"}], {"chat_template": STRICT_TEMPLATE}, "chat template: no role tool"),
    (
        [*TALK, {"role": "tool", "content": "42"}],
        {"chat_template": SILENT_TEMPLATE},
        r"messages\[1\]\['role'\]='tool' is not valid; allowed: roles that the model's chat template renders",
    ),
    (
        [{"role": "developer", "content": "42"}, *TALK],
        {"chat_template": SILENT_TEMPLATE},
        r"messages\[0\]\['role'\]='developer' is not valid",
    ),
    (TALK, {"chat_template": "{{ messages[0].content + 5 }}"}, "is refused by the chat template: "),
]


@pytest.mark.parametrize(("messages", "options", "message"), REFUSED_CHATS, ids=[m for *_, m in REFUSED_CHATS])
def test_a_conversation_that_the_template_cannot_take_is_refused(
    m4: LLM, messages: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        m4.chat(messages, ONE, use_tqdm=False, **options)
    assert not m4.engine.has_unfinished_requests()


# ---------------------------------------------------------------------- beams that stop


@pytest.mark.parametrize("milestone", MILESTONES)
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_stop_tokens_end_beams_as_more_eos_do(milestone: str, ignore_eos: bool, tmp_path: Path) -> None:
    model = tiny_model("qwen3", eos_token_id=3)
    model.save_pretrained(tmp_path)
    prompt = [5, 17, 99, 42]
    params = BeamSearchParams(3, 8, ignore_eos=ignore_eos, stop_token_ids=[7, 50, 88, 120])
    with torch.no_grad():
        want = model.generate(
            torch.tensor([prompt]),
            num_beams=3,
            num_return_sequences=3,
            max_new_tokens=8,
            do_sample=False,
            early_stopping=False,
            eos_token_id=[*([] if ignore_eos else [3]), 7, 50, 88, 120],
            pad_token_id=0,
        ).tolist()
    llm = LLM(str(tmp_path), milestone=milestone, dtype="float32", device="cpu", num_kv_blocks=64)
    found = llm.beam_search([prompt], params)[0].sequences
    for ours, row in zip(found, want, strict=True):
        assert ours.tokens == row[: len(ours.tokens)] and not any(row[len(ours.tokens) :])
        assert (ours.finish_reason == "stop") == (len(ours.tokens) < 12 or ours.tokens[-1] in (3, 7, 50, 88, 120))
        assert ours.stop_reason == (ours.tokens[-1] if ours.tokens[-1] in (7, 50, 88, 120) else None)


def test_the_text_of_a_beam_is_without_its_stop_token(m4: LLM) -> None:
    tokenizer = m4.get_tokenizer()
    free = m4.beam_search(["A block"], BeamSearchParams(2, 6))[0].sequences[0]
    stop = free.tokens[-2]
    for include in (False, True):
        params = BeamSearchParams(2, 6, stop_token_ids=[stop], include_stop_str_in_output=include)
        stopped = [s for s in m4.beam_search(["A block"], params)[0].sequences if s.stop_reason == stop]
        assert stopped
        for sequence in stopped:
            shown = sequence.tokens if include else sequence.tokens[:-1]
            assert sequence.text == tokenizer.decode(shown, skip_special_tokens=True)


# ---------------------------------------------------------------------- arguments of LLM


def test_paths_dtypes_and_a_tokenizer_of_ones_own(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    model.save_pretrained(tmp_path)
    bare = LLM(tmp_path, dtype=torch.float32, num_kv_blocks=64)
    assert bare.engine.config.model.model == str(tmp_path) and bare.engine.config.model.dtype == "float32"
    with pytest.raises(ConfigError, match="has no tokenizer; allowed: token ids"):
        bare.get_tokenizer()
    for own in ("folo-tiny", FOLDER, str(FOLDER)):
        llm = LLM(tmp_path, tokenizer=own, dtype=torch.float32, num_kv_blocks=64)
        assert isinstance(llm.get_tokenizer(), PreTrainedTokenizerBase)
        assert ids_of(llm, "A block") == [llm.get_tokenizer()("A block")["input_ids"]]
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.half, "float16"), (torch.float, "float32")):
        assert ModelConfig(dtype=dtype).dtype == name


REFUSED_SETTINGS: list[tuple[Callable[[], Any], str]] = [
    (lambda: LLM(enforce_eager=True), "LLM has no field 'enforce_eager' yet; allowed: leaving it out"),
    (lambda: LLM(tensor_parallel_size=2), "LLM has no field 'tensor_parallel_size' yet"),
    (lambda: LLM(tokenizer=""), "tokenizer='' is not valid"),
    (lambda: LLM(tokenizer="qwen3-0.6b"), "tokenizer='qwen3-0.6b' is not valid"),
    (lambda: LLM(tokenizer=str(FOLDER.parent)), "tokenizer='.*' is not valid; allowed: a folder with one of"),
    (lambda: LLM(tokenizer="./none"), "looks like a path, but there is no such folder"),
    (lambda: LLM(dtype=torch.int8), "dtype='int8' is not valid"),
    (lambda: LLM(Path("./no/such/folder")), "model='no/such/folder' looks like a path"),
    (lambda: LLM(model=b"folo-tiny"), "model=b'folo-tiny' is not valid"),
    (lambda: LLM("no-such-model"), "model='no-such-model' is unknown"),
    (lambda: LLMEngine(SchedulerConfig()), "model=.* is not valid; allowed: a ModelConfig"),
    (lambda: SchedulerConfig(max_num_seqs=0), "max_num_seqs=0"),
    (lambda: ModelConfig(modle="x"), "ModelConfig has no field 'modle'"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED_SETTINGS, ids=[m for _, m in REFUSED_SETTINGS])
def test_what_is_wrong_with_an_engine_is_a_config_error(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_what_is_wrong_with_a_request_is_an_invalid_request_error() -> None:
    engine = mock_engine()
    for refused in (
        lambda: SamplingParams(temperature=-1),
        lambda: SamplingParams(nn=1),
        lambda: BeamSearchParams(0, 1),
        lambda: engine.add_request("", [1]),
        lambda: engine.add_request("a", "text"),
        lambda: engine.enqueue(5),
        lambda: engine.generate_batch([[1], []]),
        lambda: engine.add_request("a", [1] * 64),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            refused()
        assert caught.value.__suppress_context__  # one error, one traceback
    assert not engine.has_unfinished_requests()


def test_the_kinds_of_errors_are_few_and_python_s() -> None:
    assert folovllm.ConfigError is ConfigError
    assert ConfigError.__mro__[1] is InvalidRequestError.__mro__[1] is ValueError
    assert EngineGenerateError.__mro__[1] is EngineDeadError.__mro__[1] is RuntimeError
