"""The oracle itself: it must fail where two texts differ, and excuse only what float64 cannot tell apart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.oracle import (
    FAMILIES,
    OracleStats,
    assert_same_tokens,
    float64_logits,
    hf_greedy,
    random_prompt,
    tiny_config,
    tiny_model,
)

ROOT = Path(__file__).resolve().parents[1]
PROMPT = random_prompt(5)


def model_with_twins(gap: float) -> tuple[PreTrainedModel, int, int]:
    """A model whose best two next tokens after PROMPT have float64 logits that differ by about `gap`."""
    model = tiny_model("qwen2")
    best = hf_greedy(model, PROMPT, 1)[0]
    twin = (best + 1) % 128
    weight = model.lm_head.weight.data
    weight[twin] = weight[best] * (1 - gap / float64_logits(model, PROMPT)[-1, best].item())
    return model, best, twin


def test_equal_tokens_pass_and_are_counted() -> None:
    stats = OracleStats()
    model = tiny_model("qwen2")
    reference = hf_greedy(model, PROMPT, 8)
    assert_same_tokens(reference, reference, model, PROMPT, stats)
    assert (stats.sequences, stats.tokens, stats.excused) == (1, 8, [])
    assert not stats.excused_too_many()


def test_a_near_tie_is_excused_counted_and_capped() -> None:
    model, best, twin = model_with_twins(gap=1e-4)
    stats = OracleStats()
    assert_same_tokens([twin, 1], [best, 2], model, PROMPT, stats)
    assert (stats.sequences, stats.tokens, len(stats.excused)) == (1, 0, 1)
    assert "float64 gap 1.0" in str(stats) or "float64 gap 9.9" in str(stats)
    assert stats.excused_too_many() and "more than 1%" in str(stats)
    stats.sequences = 100
    assert not stats.excused_too_many()


@pytest.mark.parametrize(("processes", "compared", "status"), [(2, 99, 1), (0, 100, 0)])
def test_the_cap_is_over_all_processes_of_a_run(tmp_path: Path, processes: int, compared: int, status: int) -> None:
    """Two tests with one excuse each, of 198 or 200 sequences together: the run fails, or does not."""
    (tmp_path / "test_two.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('name', 'ab')\n"
        "def test_it(name, oracle_stats):\n"
        f"    oracle_stats.sequences += {compared}\n"
        "    oracle_stats.excused.append(f'excuse of {name}')\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider", "--rootdir"]
    done = subprocess.run(
        [*command, str(tmp_path), "-n", str(processes), str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == status and "2 passed" in done.stdout, done.stdout + done.stderr
    assert f"{2 * compared} sequences" in done.stdout
    assert "excuse of a" in done.stdout and "excuse of b" in done.stdout


def test_a_gap_that_rounding_cannot_explain_fails() -> None:
    model, best, twin = model_with_twins(gap=5e-3)
    with pytest.raises(AssertionError, match="new token 0"):
        assert_same_tokens([twin], [best], model, PROMPT, OracleStats())


def test_a_tie_does_not_excuse_a_third_token() -> None:
    model, best, twin = model_with_twins(gap=1e-4)
    third = next(token for token in range(128) if token not in (best, twin))
    for ours, reference in (([third], [best]), ([best], [third])):
        with pytest.raises(AssertionError, match="new token 0"):
            assert_same_tokens(ours, reference, model, PROMPT, OracleStats())


@pytest.mark.parametrize("cut", [0, 3, 7])
def test_a_text_that_ends_early_or_late_is_never_excused(cut: int) -> None:
    model = tiny_model("qwen2")
    text = hf_greedy(model, PROMPT, 8)
    for ours, reference in ((text[:cut], text), (text, text[:cut])):
        with pytest.raises(AssertionError, match=f"equal for {cut} tokens, then one ends"):
            assert_same_tokens(ours, reference, model, PROMPT, OracleStats())


@pytest.mark.parametrize("family", FAMILIES)
def test_float64_logits_are_the_models_own_in_higher_precision(family: str) -> None:
    """Eager and SDPA attention sum in different orders: they agree to float64 rounding, not to float32's."""
    model = tiny_model(family)
    prompt = random_prompt(20)
    runs = []
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        runs.append(float64_logits(model, prompt))
    assert runs[0].dtype == torch.float64
    assert (runs[0] - runs[1]).abs().max() < 1e-12
    with torch.no_grad():
        float32 = model(input_ids=torch.tensor([prompt])).logits[0]
    assert 1e-8 < (runs[0] - float32).abs().max() < 1e-4
    assert next(model.parameters()).dtype == torch.float32


def test_hf_greedy_ignores_what_the_models_generation_config_says() -> None:
    model = tiny_model("qwen2")
    free = hf_greedy(model, PROMPT, 8)
    own = model.generation_config
    own.eos_token_id, own.repetition_penalty, own.do_sample = free[2], 5.0, True
    assert hf_greedy(model, PROMPT, 8) == free
    assert hf_greedy(model, PROMPT, 8, eos=[free[4]]) == free[: free.index(free[4]) + 1]
    assert model.generation_config is own


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_are_seeded_and_do_not_repeat_one_token(family: str) -> None:
    one, same, other = (hf_greedy(tiny_model(family, seed), PROMPT, 20) for seed in (0, 0, 1))
    assert one == same != other
    assert len(set(one)) > 5


def test_unknown_families_are_refused() -> None:
    with pytest.raises(ValueError, match="gpt5"):
        tiny_config("gpt5")
