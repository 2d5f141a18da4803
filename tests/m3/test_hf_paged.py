"""Any Hugging Face decoder over blocks: the tokens of `generate`, in many families, or a refusal before any request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from folovllm import LLM, SamplingParams
from folovllm.attention.backend import AttentionParams, LayerKV
from folovllm.attention.metadata import AttentionMetadata
from folovllm.attention.reference import ReferenceBackend
from folovllm.attention.torch_backend import TorchBackend
from folovllm.contrib.transformers import check as hf_check
from folovllm.contrib.transformers.check import checked
from folovllm.contrib.transformers.decoder import (
    IMPLEMENTATION,
    HFPagedModel,
    KVShape,
    PagedStep,
    paged_attention,
    register,
    window_of_mask,
)
from folovllm.course.measure.families import FAMILIES, FIELDS, GQA
from folovllm.engine.factory import what_decoder_lacks
from folovllm.models.decoder import Decoder
from folovllm.models.families import check_family
from folovllm.runner.hf.check import row_distance
from tests.m3.helpers import check_all_free, manager_of
from tests.oracle import OracleStats, assert_same_tokens, hf_greedy, random_prompt, randomize, tiny_config

MODELS = (
    "llama", "mistral", "qwen3", "qwen2", "qwen3_moe", "qwen2_moe", "mixtral", "phimoe", "gemma", "gemma2",
    "gemma3_text", "gpt_oss", "deepseek_v2", "deepseek_v3", "phi", "phi3", "olmo2", "smollm3", "granite", "glm4",
    "cohere2", "starcoder2", "gpt2", "opt", "gpt_neox",
)  # fmt: skip
LENGTHS = (1, 3, 9, 17, 8, 12)
NEW_TOKENS = 8
each_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_config(name: str, **overrides: Any) -> PretrainedConfig:
    return AutoConfig.for_model(name, **{**FIELDS, **FAMILIES.get(name, GQA), **overrides})


def make_model(name: str, seed: int = 3, **overrides: Any) -> PreTrainedModel:
    """A model of random weights in eager attention, as `checked` wants it."""
    model = AutoModelForCausalLM.from_config(make_config(name, **overrides), dtype=torch.float32)
    randomize(model, seed)
    model.set_attn_implementation("eager")
    return model.eval()


def make_llm(folder: Path, **kwargs: Any) -> LLM:
    kwargs = {"model_impl": "transformers", "num_kv_blocks": 120, "dtype": "float32", "device": "cpu", **kwargs}
    return LLM(str(folder), milestone="m3", **kwargs)


class HFCase:
    """A model in a folder, and prompts with Hugging Face's greedy tokens for each."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder, self.model = folder, make_model(name)
        self.model.save_pretrained(folder)
        self.prompts = [random_prompt(n, seed=n) for n in LENGTHS]
        self.expected = [hf_greedy(self.model, prompt, NEW_TOKENS) for prompt in self.prompts]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HFCase]:
    return {name: HFCase(name, tmp_path_factory.mktemp(name)) for name in ("gemma3_text", "opt")}


# ---------------------------------------------------------------------- the same tokens as Hugging Face


@each_model
def test_tokens_and_log_probabilities(name: str, tmp_path: Path, oracle_stats: OracleStats) -> None:
    """Ragged batches, prefills and decodes mixed, of requests that give way to one another, recomputed and swapped.

    Scaling or capping logits changes no greedy token, so log probabilities are compared as well.
    """
    case = HFCase(name, tmp_path)
    assert len({token for tokens in case.expected for token in tokens}) > 6  # no noise that repeats itself
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=1)
    settings: list[dict[str, Any]] = [
        {"block_size": 1, "num_kv_blocks": 30},
        {"block_size": 4, "num_kv_blocks": 9, "preemption_mode": "swap", "swap_space": 0.01},
    ]
    for setting in settings:
        llm = make_llm(tmp_path, **setting)
        assert isinstance(llm.engine.core.runner.model, HFPagedModel)  # type: ignore[attr-defined]
        outputs = llm.generate(case.prompts, params, use_tqdm=False)
        for prompt, theirs, output in zip(case.prompts, case.expected, outputs, strict=True):
            ours = output.outputs[0]
            assert_same_tokens(ours.token_ids, theirs, case.model, prompt, oracle_stats)
            if ours.token_ids == theirs:
                assert ours.cumulative_logprob == pytest.approx(hf_logprob(case.model, prompt, theirs), abs=1e-3)
        check_all_free(llm.engine)
        assert llm.engine.stats.max_running > 1 and llm.engine.stats.forwards < len(LENGTHS) * NEW_TOKENS
        assert llm.engine.stats.preemptions > 0
        assert (llm.engine.stats.swapped_in_blocks > 0) == ("swap_space" in setting)


@pytest.mark.parametrize(
    ("name", "block_size", "backend"),
    [
        (name, size, ("torch", "reference")[(i + j) % 2])  # each backend meets both models and every size
        for i, name in enumerate(("gemma3_text", "opt"))
        for j, size in enumerate((1, 8, 16, 32, 256))
    ],
)
def test_any_block_size_and_backend(
    name: str, block_size: int, backend: str, cases: dict[str, HFCase], oracle_stats: OracleStats
) -> None:
    case = cases[name]
    llm = make_llm(case.folder, block_size=block_size, attention_backend=backend, num_kv_blocks=-(-300 // block_size))
    outputs = llm.generate(case.prompts, SamplingParams(temperature=0, max_tokens=NEW_TOKENS), use_tqdm=False)
    for prompt, theirs, output in zip(case.prompts, case.expected, outputs, strict=True):
        assert_same_tokens(output.outputs[0].token_ids, theirs, case.model, prompt, oracle_stats)
    assert llm.engine.stats.max_running > 1 and llm.engine.stats.preemptions == 0
    check_all_free(llm.engine)


@torch.no_grad()
def hf_logprob(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> float:
    """The log probability of all `tokens` after `prompt`, from one forward over the text."""
    logits: Tensor = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0]  # [L, V]
    rows = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
    return float(rows.gather(1, torch.tensor(tokens)[:, None]).sum())


@pytest.mark.parametrize("name", ["gpt2", "opt", "qwen3"])
def test_up_to_the_last_position(name: str, tmp_path: Path, oracle_stats: OracleStats) -> None:
    """Learned positions end with their table, and a request ends there; no engine is made for a longer one."""
    model = make_model(name, max_position_embeddings=24)
    model.save_pretrained(tmp_path)
    prompts = [random_prompt(n, seed=n) for n in (20, 23, 24 - 12)]
    llm = make_llm(tmp_path, block_size=8)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [4, 1, 12]
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = hf_greedy(model, prompt, 24 - len(prompt))
        assert_same_tokens(output.outputs[0].token_ids, expected, model, prompt, oracle_stats)
    with pytest.raises(ValueError, match="max_model_len=25 is not valid; allowed: at most 24"):
        make_llm(tmp_path, max_model_len=25)


def test_engines_that_take_turns_do_not_meet(tmp_path: Path) -> None:
    """What the registered function needs comes with the forward: two models, two backends, step by step in turns."""
    models = {name: make_model(name) for name in ("gemma", "gemma3_text")}
    prompts = [random_prompt(n, seed=n) for n in (5, 9, 14)]
    params = SamplingParams(temperature=0, max_tokens=8)
    engines = {}
    for (name, model), backend in zip(models.items(), ("torch", "reference"), strict=True):
        model.save_pretrained(tmp_path / name)
        engines[name] = make_llm(tmp_path / name, attention_backend=backend, block_size=4).engine
        for i, prompt in enumerate(prompts):
            engines[name].add_request(str(i), prompt, params)
    done: dict[str, dict[str, list[int]]] = {name: {} for name in engines}
    while any(engine.has_unfinished_requests() for engine in engines.values()):
        for name, engine in engines.items():
            done[name] |= {o.request_id: o.outputs[0].token_ids for o in engine.step() if o.finished}
            manager_of(engine).check()
    for name, model in models.items():
        assert [done[name][str(i)] for i in range(3)] == [hf_greedy(model, prompt, 8) for prompt in prompts]


@each_model
def test_sixteen_bits_pass_the_check(name: str) -> None:
    """Rounding in bfloat16 is no reason to refuse a model."""
    checked(make_model(name).to(torch.bfloat16), TorchBackend(), 128)


# ---------------------------------------------------------------------- what is refused, before any request

REFUSED: dict[str, str] = {
    # The interface is never called: without counting, requests would read one another's tokens.
    "falcon": "a forward called the attention function 0 times, from 0 layers; allowed: once from",
    "bloom": "0 times",
    "gptj": "0 times",
    "codegen": "0 times",
    "mimo_v2_flash": "layer 1 has keys of [4, 192] and values of [4, 128] per token",  # the layer before has two heads
    "qwen3_5_text": "layers of type ['linear_attention']; allowed: full_attention, sliding_attention",
    "roc_bert": "its attention is not causal",  # it can be a decoder; this one is none
    "stablelm": "do not pass on keyword arguments",
    "diffllama": "4 times, from 2 layers; allowed: once from each of its 2 layers",
}


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_would_be_wrong(name: str, tmp_path: Path) -> None:
    make_model(name).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as caught:
        make_llm(tmp_path, model_impl="auto")
    assert REFUSED[name] in str(caught.value) and name.removesuffix("_text") in str(caught.value)


class NoSinks(ReferenceBackend):
    """A backend without a formula that the model needs."""

    def attend(self, query: Tensor, kv: LayerKV, meta: AttentionMetadata, params: AttentionParams) -> Tensor:
        if params.sinks is not None:
            raise ValueError("sinks are not valid with attention_backend='other'")
        return super().attend(query, kv, meta, params)


def test_another_backend_is_recommended_where_it_runs_the_model() -> None:
    with pytest.raises(ValueError, match=r"sinks are not valid .*; attention_backend='torch' runs it"):
        checked(make_model("gpt_oss"), NoSinks(), 128)


class RunningSum(nn.Module):
    """Adds up all tokens so far. Alone, a text comes out as always; packed, it reads the text before it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) + 0.1 * x.cumsum(dim=1)
        return out


class Twice(nn.Module):
    """Attends twice, and is otherwise right: the second time writes the same K/V to the same slots."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.inner(*args, **kwargs)
        return self.inner(*args, **kwargs)


class NoPositions(nn.Module):
    """Makes up positions instead of taking those that it is given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        return self.inner(x, torch.arange(x.shape[1])[None])


def test_a_model_that_mixes_tokens_elsewhere_is_found_out() -> None:
    model = make_model("llama")
    checked(make_model("llama"), TorchBackend(), 128)
    model.model.layers[1].mlp = RunningSum(model.model.layers[1].mlp)
    # From a cache, one token at a time, it adds up nothing: as `generate` at M1, and not beside others at M2.
    with pytest.raises(ValueError, match="logits for ragged tokens are .* away from its own.*; milestone m1 runs it"):
        checked(model, TorchBackend(), 128)


def test_a_model_that_ignores_positions_is_found_out() -> None:
    model = make_model("llama")
    model.model.rotary_emb = NoPositions(model.model.rotary_emb)
    with pytest.raises(ValueError, match="logits for ragged tokens are .* away from its own"):
        checked(model, TorchBackend(), 128)


def test_a_layer_that_attends_twice_is_found_out() -> None:
    model = make_model("llama")
    model.model.layers[1].self_attn = Twice(model.model.layers[1].self_attn)
    with pytest.raises(ValueError, match="called the attention function 3 times, from 2 layers; allowed: once"):
        checked(model, TorchBackend(), 128)


class BlindInDecode(TorchBackend):
    """Right in the first step of a request, and blind for what is in the blocks after it."""

    def attend(self, query: Tensor, kv: LayerKV, meta: AttentionMetadata, params: AttentionParams) -> Tensor:
        if meta.kv_lens != meta.query_lens:
            kv = LayerKV(torch.zeros_like(kv.keys), torch.zeros_like(kv.values))
        return super().attend(query, kv, meta, params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_looks_at_stored_keys_and_values_too(dtype: torch.dtype) -> None:
    """In 16 bits as well, where the median row decides: most rows come second."""
    with pytest.raises(ValueError, match="away from its own"):
        checked(make_model("llama").to(dtype), BlindInDecode(), 128)


def test_numbers_that_overflow_are_no_match() -> None:
    model = make_model("llama")
    model.lm_head.weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="logits for ragged tokens are nan away"):
        checked(model, TorchBackend(), 128)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"is_causal": False}, "not causal"),
        ({"position_bias": torch.zeros(1)}, "uses position_bias"),
        ({"attention_mask": torch.zeros(1, 1, 3, 3)}, "its own attention mask"),
        ({"sliding_window": 4}, "layer 0 has sliding_window=4, and its mask has None"),
        (
            {"sliding_window": 4, "attention_mask": window_of_mask(5)},
            "layer 0 has sliding_window=4, and its mask has 5",
        ),
        ({"paged_step": None}, "do not pass on keyword arguments"),
        ({"module": nn.Identity()}, "have no layer_idx"),
    ],
)
def test_no_argument_is_dropped_in_silence(given: dict[str, Any], message: str) -> None:
    module = nn.Identity()
    module.layer_idx = 0  # type: ignore[assignment]
    query = torch.randn(1, 4, 3, 16)
    step = PagedStep([], None, TorchBackend())  # type: ignore[arg-type]
    kwargs = {"module": module, "attention_mask": None, "paged_step": step, **given}
    with pytest.raises(ValueError, match=message):
        paged_attention(query=query, key=query[:, :2], value=query[:, :2], **kwargs)


def test_how_far_logits_are_apart() -> None:
    """By the farthest row in float32, by the median row in 16 bits, and without what is added to a whole row."""
    theirs = torch.tensor([[3.0, -3.0, 0.0], [1.0, 1.0, 4.0], [0.0, 2.0, -2.0]])  # [L, V]
    ours = theirs + torch.tensor([[5.0], [-1.0], [0.0]])
    assert row_distance(ours, theirs) == pytest.approx(0, abs=1e-6)
    ours[1] *= 3
    assert row_distance(ours, theirs) == pytest.approx(2)
    assert row_distance(ours.bfloat16(), theirs.bfloat16()) == pytest.approx(0, abs=1e-2)
    ours[0] *= 2
    assert row_distance(ours.bfloat16(), theirs.bfloat16()) == pytest.approx(1, abs=1e-2)


class Recorder(ReferenceBackend):
    """Remembers what each layer asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.params: list[AttentionParams] = []

    def attend(self, query: Tensor, kv: LayerKV, meta: AttentionMetadata, params: AttentionParams) -> Tensor:
        self.params.append(params)
        return super().attend(query, kv, meta, params)


@pytest.mark.parametrize(("max_positions", "max_model_len"), [(128, 1), (128, 4), (7, None)])
def test_short_lengths_do_not_stop_the_check(max_positions: int, max_model_len: int | None, tmp_path: Path) -> None:
    make_model("gpt2", max_position_embeddings=max_positions).save_pretrained(tmp_path)
    llm = make_llm(tmp_path, max_model_len=max_model_len)
    assert llm.engine.max_model_len == (max_model_len or max_positions)


class Cast(nn.Module):
    """Takes and gives other formats than those of its weights."""

    def __init__(self, inner: nn.Module, takes: torch.dtype, gives: torch.dtype) -> None:
        super().__init__()
        self.inner, self.takes, self.gives = inner, takes, gives

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x.to(self.takes)).to(self.gives)
        return out


def test_keys_in_another_format_than_the_pool_are_refused() -> None:
    """The model itself runs well, with attention in float32 between layers in bfloat16."""
    model = make_model("llama").to(torch.bfloat16)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            gives = torch.bfloat16 if name == "o_proj" else torch.float32
            setattr(layer.self_attn, name, Cast(getattr(layer.self_attn, name), torch.bfloat16, gives))
    message = "layer 0 has keys in torch.float32 and values in torch.float32; allowed: torch.bfloat16"
    with pytest.raises(ValueError, match=message):
        checked(model, TorchBackend(), 128)


def test_what_a_layer_asks_for_reaches_the_backend() -> None:
    """Scale, window and softcap of each layer, as the config says."""
    recorder = Recorder()
    checked(make_model("gemma2"), recorder, 128)
    scale = pytest.approx(13**-0.5)
    assert recorder.params[:2] == [AttentionParams(scale, 6, 2.0), AttentionParams(scale, None, 2.0)]
    recorder = Recorder()
    paged = checked(make_model("phimoe"), recorder, 128)
    assert [params.sliding_window for params in recorder.params] == [6] * 4
    assert paged.config == KVShape(2, 2, 16, v_head_dim=16) and paged.max_positions == 128


def test_a_mask_with_an_addition_is_refused() -> None:
    with pytest.raises(ValueError, match="adds to the causal mask"):
        window_of_mask(use_vmap=True)


def test_registering_twice_changes_nothing() -> None:
    register()
    before = AttentionInterface().valid_keys()
    register()
    assert AttentionInterface().valid_keys() == before and before.count(IMPLEMENTATION) == 1
    assert AttentionInterface()[IMPLEMENTATION] is paged_attention


def test_a_config_is_judged_before_any_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_config("qwen3_5_text").save_pretrained(tmp_path)
    monkeypatch.setattr(hf_check, "load_hf_model", None)
    with pytest.raises(ValueError, match="linear_attention"):
        make_llm(tmp_path, load_format="dummy")
    check_family(make_config("gemma3_text"), 128)


# ---------------------------------------------------------------------- which of the two runs


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("name", "overrides", "impl", "kind"),
    [
        ("llama", {}, "auto", Decoder),
        ("llama", {}, "folovllm", Decoder),
        ("llama", {}, "transformers", HFPagedModel),
        ("llama", {"hidden_act": "gelu"}, "auto", HFPagedModel),
        ("qwen3", {"rope_parameters": YARN}, "auto", HFPagedModel),
        ("gemma", {}, "auto", HFPagedModel),
    ],
)
def test_who_runs_a_model(
    name: str, overrides: dict[str, Any], impl: str, kind: type, tmp_path: Path, oracle_stats: OracleStats
) -> None:
    model = make_model(name, **overrides)
    model.save_pretrained(tmp_path)
    llm = make_llm(tmp_path, model_impl=impl)
    assert type(llm.engine.core.runner.model) is kind  # type: ignore[attr-defined]
    prompt = random_prompt(20)
    (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    assert_same_tokens(output.outputs[0].token_ids, hf_greedy(model, prompt, 8), model, prompt, oracle_stats)


def test_our_decoder_may_be_asked_for_where_it_cannot_serve(tmp_path: Path) -> None:
    make_config("gemma").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model_impl='folovllm' is not valid for this model: model_type='gemma'"):
        make_llm(tmp_path, model_impl="folovllm", load_format="dummy")
    assert what_decoder_lacks(tiny_config("llama")) is None


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"model_impl": "vllm"}, "model_impl='vllm' is not valid; allowed: 'auto', 'folovllm', 'transformers'"),
        ({"model_impl": "folovllm", "milestone": "m1"}, "model_impl='folovllm' is not valid; allowed: 'auto' or 'tr"),
        ({"model_impl": "folovllm", "milestone": "m2"}, "model_impl='folovllm' is not valid; allowed: 'auto' or 'tr"),
    ],
)
def test_names_that_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM("folo-tiny", **kwargs)


def test_dummy_weights(tmp_path: Path) -> None:
    """A shape alone is enough, and both kinds of model fill it alike."""
    make_config("qwen3").save_pretrained(tmp_path)
    prompts = [random_prompt(n, seed=n) for n in (3, 11)]
    params = SamplingParams(temperature=0, max_tokens=8)
    ours, theirs = (
        make_llm(tmp_path, model_impl=impl, load_format="dummy").generate(prompts, params, use_tqdm=False)
        for impl in ("folovllm", "transformers")
    )
    assert [o.outputs[0].token_ids for o in ours] == [o.outputs[0].token_ids for o in theirs]
