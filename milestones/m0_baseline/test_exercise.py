"""The checks behind `folovllm grade m0`. Reading them is allowed: they say what, never how."""

from __future__ import annotations

import functools
import json
from importlib.resources import files
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen3Config

from folovllm.course.grading.checks import Call, WrongAnswer

KIB = 2**10
a_length = st.integers(1, 40)
a_count = st.integers(0, 8)


def counted_flops(run: Any) -> int:
    """What PyTorch's own counter finds in `run()`."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


# --- chapter 0 --------------------------------------------------------------------------------------------


@pytest.mark.exercise("linear_flops")
class TestLinearFlops:
    def test_with_a_cache(self, impl: ModuleType) -> None:
        """With a cache, the prompt is fed once and then one token per step."""
        why = "4 + 1 + 1 = 6 tokens are fed, 2 FLOPs per weight each. The third token is chosen, never fed."
        Call(impl.linear_flops, 1000, 4, 3, cached=True).must_return(12_000, why)

    def test_without_a_cache(self, impl: ModuleType) -> None:
        """Without a cache, every step feeds the whole text so far."""
        why = "4 + 5 + 6 = 15 tokens are fed, 2 FLOPs per weight each."
        Call(impl.linear_flops, 1000, 4, 3, cached=False).must_return(30_000, why)

    def test_the_first_token_costs_the_same(self, impl: ModuleType) -> None:
        """The first token comes from the prompt alone: a cache cannot help it."""
        for cached in (True, False):
            Call(impl.linear_flops, 7, 100, 1, cached=cached).must_return(1400, "100 tokens, 7 weights, 2 FLOPs.")

    def test_nothing_generated(self, impl: ModuleType) -> None:
        """No token, no forward pass, no FLOPs."""
        for cached in (True, False):
            Call(impl.linear_flops, 7, 3, 0, cached=cached).must_return(0)

    @pytest.mark.parametrize(("n", "ratio"), [(10, 5.5), (100, 50.5), (1000, 500.5)])
    def test_the_ratio_grows_with_the_text(self, impl: ModuleType, n: int, ratio: float) -> None:
        """From a prompt of one token, a cache saves a factor of (n + 1) / 2."""
        with_cache = Call(impl.linear_flops, 1, 1, n, cached=True)
        with_cache.must_return(2 * n, f"{n} tokens are fed once each.")
        why = f"The ratio to the same work with a cache is ({n} + 1) / 2 = {ratio}."
        Call(impl.linear_flops, 1, 1, n, cached=False).must_return(round(2 * n * ratio), why)

    @given(prompt_len=a_length, n=a_count, cached=st.booleans())
    def test_against_a_count_of_real_layers(self, impl: ModuleType, prompt_len: int, n: int, cached: bool) -> None:
        """PyTorch's FLOP counter agrees, for a layer of 3 x 5 weights that is really run."""
        weight = torch.empty(5, 3, device="meta")

        def run() -> None:
            for step in range(n):
                tokens = 1 if cached and step else prompt_len + step
                F.linear(torch.empty(tokens, 3, device="meta"), weight)

        why = "Counted while a layer of 15 weights ran on these tokens."
        Call(impl.linear_flops, 15, prompt_len, n, cached=cached).must_return(counted_flops(run), why)

    def test_refusals(self, impl: ModuleType) -> None:
        """A prompt without tokens and a negative number of tokens are refused."""
        Call(impl.linear_flops, 7, 0, 3, cached=True).must_refuse("prompt_len is less than 1.")
        Call(impl.linear_flops, 7, 3, -1, cached=False).must_refuse("n is less than 0.")


@pytest.mark.exercise("attention_flops")
class TestAttentionFlops:
    def test_with_a_cache(self, impl: ModuleType) -> None:
        """With a cache, a step has one query, which meets every key so far, itself included."""
        why = "2*2 pairs in the prompt, then 1*3 and 1*4: 11 pairs of 4 FLOPs."
        Call(impl.attention_flops, 1, 1, 1, 2, 3, cached=True).must_return(44, why)

    def test_without_a_cache(self, impl: ModuleType) -> None:
        """Without a cache, every token of the text is a query again in every step."""
        why = "2*2 + 3*3 + 4*4 = 29 pairs of 4 FLOPs, the masked ones included."
        Call(impl.attention_flops, 1, 1, 1, 2, 3, cached=False).must_return(116, why)

    def test_layers_heads_and_sizes_multiply(self, impl: ModuleType) -> None:
        """Every layer and every query head does this work, on head_dim numbers."""
        why = "One pair, 4 * head_dim FLOPs, in each of 2 layers and 3 query heads."
        Call(impl.attention_flops, 2, 3, 5, 1, 1, cached=True).must_return(120, why)

    @pytest.mark.parametrize(("n", "ratio"), [(10, 7), (100, 67), (1000, 667)])
    def test_the_ratio_grows_with_the_text(self, impl: ModuleType, n: int, ratio: int) -> None:
        """From a prompt of one token, a cache saves attention a factor of (2n + 1) / 3."""
        pairs = n * (n + 1) // 2
        Call(impl.attention_flops, 1, 1, 1, 1, n, cached=True).must_return(4 * pairs, "1 + 2 + ... + n pairs.")
        why = f"The ratio to the same work with a cache is (2 * {n} + 1) / 3 = {ratio}."
        Call(impl.attention_flops, 1, 1, 1, 1, n, cached=False).must_return(4 * pairs * ratio, why)

    @given(heads=st.integers(1, 4), prompt_len=a_length, n=a_count, cached=st.booleans())
    def test_against_a_count_of_real_products(
        self, impl: ModuleType, heads: int, prompt_len: int, n: int, cached: bool
    ) -> None:
        """PyTorch's FLOP counter agrees, for q @ k and p @ v that are really run."""

        def run() -> None:
            for step in range(n):
                keys = prompt_len + step
                queries = 1 if cached and step else keys
                q, kv = (torch.empty(heads, length, 8, device="meta") for length in (queries, keys))
                (q @ kv.transpose(1, 2)) @ kv

        why = f"Counted while q @ k and p @ v ran, with {heads} heads of 8."
        call = Call(impl.attention_flops, 1, heads, 8, prompt_len, n, cached=cached)
        call.must_return(counted_flops(run), why)

    def test_refusals(self, impl: ModuleType) -> None:
        """A prompt without tokens and a negative number of tokens are refused."""
        Call(impl.attention_flops, 1, 1, 1, 0, 3, cached=True).must_refuse("prompt_len is less than 1.")
        Call(impl.attention_flops, 1, 1, 1, 3, -1, cached=False).must_refuse("n is less than 0.")


@pytest.mark.exercise("arithmetic_intensity")
class TestArithmeticIntensity:
    def test_one_token(self, impl: ModuleType) -> None:
        """With one token, about one FLOP per byte: the weights are read for a single multiply and add each."""
        why = "2,000,000 FLOPs over 2 * (1000 + 1,000,000 + 1000) bytes."
        Call(impl.arithmetic_intensity, 1, 1000, 1000, 2).must_return(2e6 / 2_004_000, why)

    def test_many_tokens(self, impl: ModuleType) -> None:
        """64 tokens share one read of the weights."""
        why = "64 times the FLOPs, and only the two small matrices have grown."
        Call(impl.arithmetic_intensity, 64, 1000, 1000, 2).must_return(64e6 / 1_128_000, why)

    def test_smaller_numbers_are_cheaper_to_move(self, impl: ModuleType) -> None:
        """The same product in 4 bytes per number moves twice the bytes."""
        Call(impl.arithmetic_intensity, 1, 1000, 1000, 4).must_return(1e6 / 2_004_000, "Half of that with 2 bytes.")

    @given(m=st.integers(1, 512), k=st.integers(1, 300), n=st.integers(1, 300))
    def test_against_real_matrices(self, impl: ModuleType, m: int, k: int, n: int) -> None:
        """PyTorch's FLOP counter over the bytes that the three matrices really take."""
        x, w = torch.empty(m, k, device="meta"), torch.empty(k, n, device="meta")
        moved = x.nbytes + w.nbytes + (x @ w).nbytes
        why = f"{counted_flops(lambda: x @ w):,} FLOPs were counted and {moved:,} bytes lie in x, w and y."
        Call(impl.arithmetic_intensity, m, k, n, 4).must_return(counted_flops(lambda: x @ w) / moved, why)

    @pytest.mark.parametrize("shape", [(0, 4, 4, 2), (4, 0, 4, 2), (4, 4, 0, 2), (4, 4, 4, 0)])
    def test_refusals(self, impl: ModuleType, shape: tuple[int, int, int, int]) -> None:
        """Sizes below 1 are refused."""
        Call(impl.arithmetic_intensity, *shape).must_refuse("One of the sizes is 0.")


def shape_of(layers: int, heads: int, hidden: int, **more: int | None) -> dict[str, int | None]:
    return {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": hidden, **more}


LLAMA_2_7B = shape_of(32, 32, 4096)
LLAMA_2_13B = shape_of(40, 40, 5120, num_key_value_heads=40)
LLAMA_2_70B = shape_of(80, 64, 8192, num_key_value_heads=8)
QWEN_25_05B = shape_of(24, 14, 896, num_key_value_heads=2)
QWEN_3_06B = shape_of(28, 16, 1024, num_key_value_heads=8, head_dim=128)
DEEPSEEK_V2 = shape_of(
    60, 128, 5120, num_key_value_heads=128, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128
)


@pytest.mark.exercise("kv_bytes_per_token")
class TestKVBytesPerToken:
    def test_every_head_has_its_own(self, impl: ModuleType) -> None:
        """Multi-head attention: Llama-2-7B in 16 bits takes 512 KiB per token."""
        why = "K and V: 2 * 32 layers * 32 heads * 128 numbers * 2 bytes."
        Call(impl.kv_bytes_per_token, LLAMA_2_7B, 2).must_return(524_288, why)
        Call(impl.kv_bytes_per_token, LLAMA_2_13B, 2).must_return(800 * KIB, "2 * 40 * 40 * 128 * 2 bytes.")

    def test_only_kv_heads_are_cached(self, impl: ModuleType) -> None:
        """Grouped-query attention: what is cached are KV heads, however many query heads share each."""
        why = "2 * 24 layers * 2 KV heads * 64 numbers * 2 bytes; the 14 query heads give only the 64 = 896 / 14."
        Call(impl.kv_bytes_per_token, QWEN_25_05B, 2).must_return(12_288, why)
        Call(impl.kv_bytes_per_token, LLAMA_2_70B, 2).must_return(320 * KIB, "2 * 80 * 8 * 128 * 2 bytes.")

    def test_head_dim_may_be_given(self, impl: ModuleType) -> None:
        """A head_dim in the config counts, even where it is not hidden_size / heads."""
        why = "2 * 28 layers * 8 KV heads * 128 numbers * 2 bytes; hidden_size / heads would be 64."
        Call(impl.kv_bytes_per_token, QWEN_3_06B, 2).must_return(114_688, why)

    def test_null_in_the_file_is_none(self, impl: ModuleType) -> None:
        """A None in the config is the same as no entry."""
        config = LLAMA_2_7B | {"head_dim": None, "num_key_value_heads": None, "kv_lora_rank": None}
        Call(impl.kv_bytes_per_token, config, 2).must_return(524_288, "As without the three.")

    def test_bytes_per_number(self, impl: ModuleType) -> None:
        """float32 takes twice what a 16-bit type takes, an 8-bit type half."""
        Call(impl.kv_bytes_per_token, QWEN_25_05B, 4).must_return(24_576)
        Call(impl.kv_bytes_per_token, QWEN_25_05B, 1).must_return(6_144)

    def test_latent_attention(self, impl: ModuleType) -> None:
        """MLA: one vector and one position key per token and layer, not one per head, and not two."""
        why = "60 layers * (512 + 64) numbers * 2 bytes. A key and a value are not stored apart: no factor 2."
        Call(impl.kv_bytes_per_token, DEEPSEEK_V2, 2).must_return(69_120, why)

    @pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen2.5-0.5b", "llama-3.2-1b"])
    def test_real_config_files(self, impl: ModuleType, name: str) -> None:
        """The configs that come with folovllm, against the size of a cache made for them."""
        config = json.loads((files("folovllm") / "assets" / "configs" / name / "config.json").read_text())
        kinds = {"qwen2": LlamaConfig, "qwen3": Qwen3Config, "llama": LlamaConfig}
        shape = {k: config.get(k) for k in shape_of(1, 1, 1, num_key_value_heads=1, head_dim=1) if config.get(k)}
        want = cached_bytes(kinds[config["model_type"]](**shape, intermediate_size=8, vocab_size=8))
        call = Call(impl.kv_bytes_per_token, {k: v for k, v in config.items() if v is None or type(v) is int}, 4)
        call.must_return(want, f"Counted in a DynamicCache that holds one token of {name}, in float32.")

    def test_refusals(self, impl: ModuleType) -> None:
        """KV heads that do not divide the query heads, and sizes below a byte, are refused."""
        config = shape_of(2, 8, 512, num_key_value_heads=3)
        Call(impl.kv_bytes_per_token, config, 2).must_refuse("8 query heads cannot share 3 KV heads evenly.")
        Call(impl.kv_bytes_per_token, LLAMA_2_7B, 0).must_refuse("dtype_bytes is less than 1.")


def cached_bytes(config: PretrainedConfig) -> int:
    """Bytes that one float32 token takes in the cache of a real model of this shape, whose weights take no memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        cache = DynamicCache()
        model(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


# --- chapter 1 --------------------------------------------------------------------------------------------


def mask_rows(*rows: str) -> torch.Tensor:
    return torch.tensor([[letter == "T" for letter in row.split()] for row in rows])


@pytest.mark.exercise("causal_mask")
class TestCausalMask:
    def test_a_prompt(self, impl: ModuleType) -> None:
        """A prompt's mask is lower-triangular: a prefill is causal as well."""
        want = mask_rows("T F F F", "T T F F", "T T T F", "T T T T")
        why = "Row i is a query, column j a key: token 0 sees itself alone, the last token sees all."
        Call(impl.causal_mask, 0, 4).must_return(want, why)

    def test_a_decode_step(self, impl: ModuleType) -> None:
        """A decode step has one row, and it is all True."""
        why = "The newest token stands at position 4: it sees the 4 cached tokens and itself."
        Call(impl.causal_mask, 4, 1).must_return(mask_rows("T T T T T"), why)

    def test_a_chunk(self, impl: ModuleType) -> None:
        """A chunk of a prompt sees all that came before it, and is causal inside."""
        why = "The rows stand at positions 3 and 4. The mask is rectangular: 2 queries, 5 keys."
        Call(impl.causal_mask, 3, 2).must_return(mask_rows("T T T T F", "T T T T T"), why)

    @given(start=st.integers(0, 12), length=st.integers(1, 12))
    def test_every_cell(self, impl: ModuleType, start: int, length: int) -> None:
        """Cell (i, j) is True exactly if key j is not later than query start + i."""
        want = torch.tensor([[j <= start + i for j in range(start + length)] for i in range(length)])
        Call(impl.causal_mask, start, length).must_return(want)

    @given(start=st.integers(0, 12), length=st.integers(1, 12))
    def test_attention_comes_out_the_same(self, impl: ModuleType, start: int, length: int) -> None:
        """Attention of a chunk through this mask equals the same rows of attention over the whole text."""
        total = start + length
        q, k, v = torch.randn(3, 1, 2, total, 8, generator=torch.Generator().manual_seed(0))  # each [1, H, T, D]
        whole = F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, start:]
        call = Call(impl.causal_mask, start, length)
        mask = call.must_be_tensor([length, total], torch.bool)
        chunk = F.scaled_dot_product_attention(q[:, :, start:], k, v, attn_mask=mask)
        if not torch.allclose(chunk, whole, atol=1e-5):
            call.fail(mask, why="PyTorch's causal attention over the whole text gives other outputs for these rows.")

    def test_refusals(self, impl: ModuleType) -> None:
        """A negative start and a chunk without tokens are refused."""
        Call(impl.causal_mask, -1, 2).must_refuse("start is less than 0.")
        Call(impl.causal_mask, 3, 0).must_refuse("length is less than 1.")


def rows(*lines: list[int]) -> torch.Tensor:
    return torch.tensor(lines)


some_prompts = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=4)


@pytest.mark.exercise("left_pad")
class TestLeftPad:
    def test_the_example(self, impl: ModuleType) -> None:
        """Two prompts of 3 and 1 tokens."""
        want = (rows([5, 6, 7], [0, 0, 8]), rows([1, 1, 1], [0, 0, 1]), rows([0, 1, 2], [0, 0, 0]))
        why = "Value 1 is input_ids, 2 attention_mask, 3 position_ids. The padding stands on the left."
        Call(impl.left_pad, [[5, 6, 7], [8]], 0).must_return(want, why)

    def test_positions_start_at_the_first_token(self, impl: ModuleType) -> None:
        """A prompt's first token is at position 0, in whichever column it stands."""
        want = (rows([1, 2, 3, 4], [9, 9, 5, 6]), rows([1, 1, 1, 1], [0, 0, 1, 1]), rows([0, 1, 2, 3], [0, 0, 0, 1]))
        Call(impl.left_pad, [[1, 2, 3, 4], [5, 6]], 9).must_return(want, "[5 6] has the positions 0 and 1.")

    def test_no_padding_needed(self, impl: ModuleType) -> None:
        """Prompts of one length need no padding."""
        want = (rows([1, 2], [3, 4]), rows([1, 1], [1, 1]), rows([0, 1], [0, 1]))
        Call(impl.left_pad, [[1, 2], [3, 4]], 0).must_return(want)

    def test_a_pad_token_inside_a_prompt(self, impl: ModuleType) -> None:
        """A token of the prompt that happens to be the pad token is a token."""
        want = (rows([0, 5, 0], [0, 0, 0]), rows([1, 1, 1], [0, 1, 1]), rows([0, 1, 2], [0, 0, 1]))
        why = "The prompts are [0 5 0] and [0 0]: only the one zero that was added is masked."
        Call(impl.left_pad, [[0, 5, 0], [0, 0]], 0).must_return(want, why)

    def test_how_much_is_padding(self, impl: ModuleType) -> None:
        """Prompts of 2, 5 and 10 tokens: 30 cells, of which 13 are padding."""
        call = Call(impl.left_pad, [[1] * 2, [1] * 5, [1] * 10], 0)
        mask = torch.tensor([[0] * (10 - n) + [1] * n for n in (2, 5, 10)])
        want = (mask.clone(), mask, rows([0] * 9 + [1], [0] * 6 + [1, 2, 3, 4], list(range(10))))
        call.must_return(want, "17 of 30 cells are tokens.")

    @given(prompts=some_prompts, pad=st.integers(0, 9))
    def test_any_prompts(self, impl: ModuleType, prompts: list[list[int]], pad: int) -> None:
        """Any prompts, with any pad token."""
        width = max(map(len, prompts))
        gaps = [width - len(p) for p in prompts]
        want = (
            rows(*([pad] * gap + p for gap, p in zip(gaps, prompts, strict=True))),
            rows(*([0] * gap + [1] * (width - gap) for gap in gaps)),
            rows(*([0] * gap + list(range(width - gap)) for gap in gaps)),
        )
        Call(impl.left_pad, prompts, pad).must_return(want)

    def test_a_model_does_not_see_the_padding(self, impl: ModuleType) -> None:
        """In a real model, each prompt's last logits in the batch are those that it has alone."""
        model, prompts = small_model(), [[5, 6, 7, 8, 9], [11, 12], [13, 14, 15, 16]]
        call = Call(impl.left_pad, prompts, 3)
        batch = call.must_be_tensors([[3, 5]] * 3, torch.int64)
        logits = forward(model, *batch)[:, -1]  # [B, V]
        for i, prompt in enumerate(prompts):
            alone = forward(model, torch.tensor([prompt]))[0, -1]
            if not torch.allclose(logits[i], alone, atol=1e-4):
                gap = (logits[i] - alone).abs().max()
                call.fail(tuple(batch), why=f"Fed to a small Llama, the logits of prompt {i} are off by {gap:.3g}.")

    def test_refusals(self, impl: ModuleType) -> None:
        """No prompts and prompts without tokens are refused."""
        Call(impl.left_pad, [], 0).must_refuse("There is no prompt.")
        Call(impl.left_pad, [[1, 2], []], 0).must_refuse("The second prompt has no tokens.")


@pytest.mark.exercise("decode_inputs")
class TestDecodeInputs:
    def test_the_example(self, impl: ModuleType) -> None:
        """After prompts of 3 and 1 tokens, the new tokens stand at positions 3 and 1."""
        want = (rows([9], [4]), rows([1, 1, 1, 1], [0, 0, 1, 1]), rows([3], [1]))
        why = "Value 1 is input_ids, 2 attention_mask, 3 position_ids: the row's own length, no column number."
        Call(impl.decode_inputs, rows([1, 1, 1], [0, 0, 1]), [9, 4]).must_return(want, why)

    def test_the_first_decode_position_is_the_prompts_length(self, impl: ModuleType) -> None:
        """Without padding, the first token after a prompt of 5 stands at position 5."""
        want = (rows([7]), rows([1, 1, 1, 1, 1, 1]), rows([5]))
        why = "The prompt holds positions 0 to 4. One more, and every later token is off by one."
        Call(impl.decode_inputs, rows([1, 1, 1, 1, 1]), [7]).must_return(want, why)

    def test_the_mask_stays_as_it_is(self, impl: ModuleType) -> None:
        """The mask that is passed in is not changed."""
        mask = rows([1, 1], [0, 1])
        Call(impl.decode_inputs, mask, [1, 2]).must_return((rows([1], [2]), rows([1, 1, 1], [0, 1, 1]), rows([2], [1])))
        if mask.tolist() != [[1, 1], [0, 1]]:
            raise WrongAnswer("decode_inputs changed the attention_mask that was passed in. Make a new tensor.")

    @given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), steps=st.integers(1, 3))
    def test_step_after_step(self, impl: ModuleType, lengths: list[int], steps: int) -> None:
        """The mask of one step is the input of the next, and every row counts on by itself."""
        width = max(lengths)
        for step in range(steps):
            mask = rows(*([0] * (width - n) + [1] * (n + step) for n in lengths))
            tokens = [10 * step + i for i in range(len(lengths))]
            want = (
                rows(*([token] for token in tokens)),
                rows(*([0] * (width - n) + [1] * (n + step + 1) for n in lengths)),
                rows(*([n + step] for n in lengths)),
            )
            Call(impl.decode_inputs, mask, tokens).must_return(want)

    def test_a_model_does_not_see_the_padding(self, impl: ModuleType) -> None:
        """In a real model, the step's logits in the batch are those that each text has alone."""
        model, prompts, tokens = small_model(), [[5, 6, 7, 8, 9], [11, 12]], [20, 21]
        ids = rows(prompts[0], [3, 3, 3, *prompts[1]])
        mask = rows([1, 1, 1, 1, 1], [0, 0, 0, 1, 1])
        cache = DynamicCache()
        forward(model, ids, mask, rows([0, 1, 2, 3, 4], [0, 0, 0, 0, 1]), cache)
        call = Call(impl.decode_inputs, mask, tokens)
        batch = call.must_be_tensors([[2, 1], [2, 6], [2, 1]], torch.int64)
        logits = forward(model, *batch, cache)[:, -1]  # [B, V]
        for i, (prompt, token) in enumerate(zip(prompts, tokens, strict=True)):
            alone = forward(model, torch.tensor([[*prompt, token]]))[0, -1]
            if not torch.allclose(logits[i], alone, atol=1e-4):
                gap = (logits[i] - alone).abs().max()
                call.fail(tuple(batch), why=f"Fed to a small Llama, the logits of text {i} are off by {gap:.3g}.")


@functools.cache
def small_model() -> PreTrainedModel:
    """A Llama with random weights, large enough for neighbouring positions to matter."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=False, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def forward(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    cache: DynamicCache | None = None,
) -> torch.Tensor:
    """Logits [B, L, V]."""
    with torch.inference_mode():
        logits: torch.Tensor = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        ).logits
    return logits


@pytest.mark.exercise("generate_greedy", optional=True)
class TestGenerateGreedy:
    @pytest.mark.parametrize("n", [1, 2, 12])
    def test_the_tokens_of_hugging_face(self, impl: ModuleType, n: int) -> None:
        """The tokens are those of Hugging Face's own generate()."""
        prompt = [5, 6, 7, 8, 9]
        want = small_model().generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False, pad_token_id=0)
        call = Call(impl.generate_greedy, small_model(), prompt, n)
        call.must_return(want[0, len(prompt) :].tolist(), "The new tokens of model.generate(do_sample=False).")

    @pytest.mark.parametrize("n", [1, 6])
    def test_nothing_is_computed_twice(self, impl: ModuleType, n: int) -> None:
        """The prompt is fed once, then one token per step, and n tokens take n passes."""
        model, fed = small_model(), list[int]()

        def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = args[0] if args else kwargs["input_ids"]
            fed.append(ids.shape[-1])

        handle = model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            call = Call(impl.generate_greedy, model, [5, 6, 7, 8, 9], n)
            call.result()
        finally:
            handle.remove()
        want = [5] + [1] * (n - 1)
        if fed != want:
            raise WrongAnswer(f"{call.text}\nfed       {fed} tokens in its forward passes\nexpected  {want}")
