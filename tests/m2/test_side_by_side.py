"""The check at load of M1 and M2: a model has the logits of `generate` beside other requests, or it is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from folovllm.course.measure.families import build
from folovllm.runner.hf.check import check_side_by_side, generate_alone, why_not_side_by_side
from tests.oracle import hf_greedy, random_prompt


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


class NoMask(nn.Module):
    """A body that reads padding as if it were text."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class NoPositions(nn.Module):
    """Counts positions from the first column, padding included."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Sums(nn.Module):
    """Adds to each token all those before it in its row."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) + x.cumsum(dim=1)
        return out


@pytest.mark.parametrize("batching", ["loop", "padded"])
@pytest.mark.parametrize("name", ["granite", "gemma2", "gpt_oss", "deepseek_v3", "bloom", "mpt", "gpt2", "opt"])
def test_what_is_right_passes(name: str, batching: str) -> None:
    assert why_not_side_by_side(build(name), batching, 128) is None
    check_side_by_side(build(name), batching, 128)


@pytest.mark.parametrize("max_model_len", [1, 2, 3, 8])
@pytest.mark.parametrize("batching", ["loop", "padded"])
def test_short_lengths_do_not_stop_the_check(batching: str, max_model_len: int) -> None:
    model = build("gpt2", max_position_embeddings=max_model_len)
    assert why_not_side_by_side(model, batching, max_model_len) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt_oss", "gemma2", "bloom"])
def test_sixteen_bits_pass(name: str, dtype: torch.dtype) -> None:
    assert why_not_side_by_side(build(name).to(dtype), "padded", 128) is None


@pytest.mark.parametrize(("kind", "body"), [(NoMask, "model"), (NoPositions, "model"), (Sums, "lm_head")])
def test_a_model_that_padding_changes_runs_in_a_loop_only(kind: type[nn.Module], body: str) -> None:
    model = build("granite", rope_parameters={"rope_type": "default", "rope_theta": 5.0})
    if kind is Sums:
        model.model.layers[0].mlp = kind(model.model.layers[0].mlp)
    else:
        setattr(model, body, kind(getattr(model, body)))
    assert why_not_side_by_side(model, "loop", 128) is None
    message = r"batching='padded' is not valid for model_type='granite': its logits beside other requests are .* away"
    with pytest.raises(ValueError, match=message + ".*allowed: 'loop', or milestone m1"):
        check_side_by_side(model, "padded", 128)


@pytest.mark.parametrize("batching", ["loop", "padded"])
def test_a_model_without_a_cache_is_refused(batching: str) -> None:
    with pytest.raises(ValueError, match=r"model_type='openai-gpt' cannot run at milestones m1 and m2: its logits"):
        check_side_by_side(build("openai-gpt"), batching, 128)


def test_what_a_model_raises_is_the_reason() -> None:
    model = build("granite")
    model.model.norm = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"cannot run at milestones m1 and m2: mat1 and mat2 shapes"):
        check_side_by_side(model, "padded", 128)


def test_the_reference_is_generate_whatever_the_model_would_add() -> None:
    """Ends of sequence and penalties of a generation_config are not the forward's business, and stay as they were."""
    model, prompt = build("granite"), random_prompt(7)
    own = GenerationConfig(eos_token_id=list(range(128)), repetition_penalty=5.0, pad_token_id=0)
    model.generation_config = own
    ids, logits = generate_alone(model, prompt, 5)
    assert ids == hf_greedy(model, prompt, 5) == logits.argmax(dim=-1).tolist() and logits.shape == (5, 128)
    assert model.generation_config is own
