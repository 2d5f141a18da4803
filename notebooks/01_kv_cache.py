# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Lab 1: the KV cache
#
# To generate a token, a model looks at the whole text so far. To generate the next one it looks at the same text
# again, one token longer. Almost all of that work is work it has done before. In this lab you find out *why* it may
# be kept, what exactly has to be kept, what that saves (in work, which we can derive, and in time, which we have to
# measure) and what it costs in memory.
#
# It takes less than a minute on two cores and needs no network. Questions come before the cells that answer them:
# write your guess down, then run, then unfold.

# %%
MODEL = "folo-tiny"  # a bundled name, a local folder, or a hub id such as "Qwen/Qwen3-0.6B"
THREADS = 1  # one core gives the steadiest times
NEW_TOKENS = 256  # how long the timed text gets

# %%
import torch
from transformers import DeepseekV2Config, DynamicCache, LlamaConfig

from folovllm.baseline import cache_bytes, generate_cached, generate_recompute
from folovllm.course.lessons.formulas import attention_ratio, generation_flops, linear_ratio
from folovllm.course.viz.kv import cache_timing, kv_bytes_bars, kv_cells, kv_drift
from folovllm.course.viz.masks import attention_masks, position_grid
from folovllm.course.viz.notebook import MarkdownTable, progress
from folovllm.course.viz.style import binary_bytes
from folovllm.kv_cache.formulas import attention_kind, kv_bytes, kv_bytes_per_token
from folovllm.models.loader import load_config, load_hf_model, load_tokenizer, resolve_model

torch.set_num_threads(THREADS)
SETTING = f"{THREADS} thread{'s' * (THREADS > 1)}, float32"
torch.set_grad_enabled(False)

source = resolve_model(MODEL)
config, tokenizer = load_config(source), load_tokenizer(source)
model = load_hf_model(source, torch.float32, torch.device("cpu"))

text = "The KV cache keeps keys and values"
ids = tokenizer(text)["input_ids"]
tokens = [tokenizer.decode([i]).strip() for i in ids]
L = len(ids)
print(f"{MODEL}: {L} tokens, {tokens}")

# %% [markdown]
# ## 1. Attention is the only place where tokens meet
#
# Embedding, norms, linear layers and activations treat every position by itself. Only attention mixes positions: each
# token makes a **query** (what am I looking for?), a **key** (what can I be found by?) and a **value** (what do I
# hand over?); a query is compared with keys, and the values are averaged with the resulting weights. Several
# **heads** do this side by side, each with projections of its own. Which keys a query may be compared with is decided
# by the **mask**.
#
# So the mask can be seen from outside. Replace one token of the text, and look which positions' logits change.
#
# **Predict.** Token 3 is replaced. At which positions do the logits change?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# At 3 and after it, never before it. A language model is trained to predict each token from those before it, so a
# query may look at its own position and at earlier ones: the *causal* mask. It is a lower triangle when a row is a
# query and a column a key. Without it, training would be reading the answer.
# </details>

# %%
plain = model(input_ids=torch.tensor([ids])).logits[0]  # [L, V]
influence = torch.zeros(L, L, dtype=torch.bool)  # [position looked at, token replaced]
for j in range(L):
    changed = ids.copy()
    changed[j] = (changed[j] + 1) % config.get_text_config().vocab_size
    difference = model(input_ids=torch.tensor([changed])).logits[0] - plain  # [L, V]
    influence[:, j] = difference.abs().amax(dim=-1) > 1e-3

causal = torch.ones(L, L, dtype=torch.bool).tril()  # [query, key]
print("the measured pattern is the causal mask:", torch.equal(influence, causal))
attention_masks(
    {
        "the causal mask": causal,
        "measured: the key's token\nchanges the query's logits": influence,
    },
    tokens,
    columns=2,
    title="What a position depends on",
)

# %% [markdown]
# ## 2. The mask, right and wrong
#
# **Errata.** Three claims that stand in tutorials, and in the text this course grew out of:
#
# 1. *"The mask is* `[[T,T,T,T], [F,T,T,T], [F,F,T,T], [F,F,F,T]]`*."* That is an **upper** triangle: each token would
#    see only what comes after it. It looks right because the picture is right when rows are keys and columns are
#    queries.
# 2. *"Prefill runs in parallel because causality does not matter there."* Prefill runs in parallel because all its
#    tokens are known; each still sees only the past.
# 3. *"The row of a new token is* `[F, F, F, F, T]`*."* In decode the one new query may see **all** cached keys and
#    itself.
#
# **Predict.** We run the real model with each of these masks and compare logits with those of its own mask. Which of
# them gives an error? Which a difference that rounding would explain?
#
# <details><summary>Unfold after you have run the two cells</summary>
#
# None gives an error: every mask here has a legal shape, so only the numbers can tell. The right masks differ from
# the model's own by nothing or by rounding. The wrong ones move logits by amounts of the size of the logits
# themselves, and where the likeliest token changes, the text does too.
# </details>


# %%
def as_scores(mask):
    """A boolean mask [Lq, Lk] as the numbers a model adds to its scores, [1, 1, Lq, Lk]."""
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(mask.shape).masked_fill(~mask, lowest)[None, None]


def logits_with(mask):
    """Logits [L, V] of the text under a boolean mask [L, L]."""
    scores = as_scores(mask)
    out = model(input_ids=torch.tensor([ids]), attention_mask=scores, use_cache=False)
    return out.logits[0]


everything = torch.ones(L, L, dtype=torch.bool)
panels, rows = {}, []
wrong = {"upper triangle (1)": everything.triu(), "no mask (2)": everything}
for name, mask in {"causal": causal, **wrong}.items():
    logits = logits_with(mask)
    largest = (logits - plain).abs().max().item()
    other = (logits.argmax(-1) != plain.argmax(-1)).sum().item()
    panels[f"{name}\nlargest difference {largest:.2g}"] = mask
    rows.append([name, f"{largest:.2g}", f"{other} of {L}"])
attention_masks(panels, tokens, title="One prompt, three masks, and the logits they give")

# %%
header = ["mask", "largest logit difference", "positions with another likeliest token"]
MarkdownTable(header, rows)


# %%
def decode_with(row):
    """Logits [V] of the last token, fed alone to a cache of the others, under a mask [1, L]."""
    cache = DynamicCache(config=config)
    model(input_ids=torch.tensor([ids[:-1]]), past_key_values=cache, use_cache=True)
    last, position = torch.tensor([ids[-1:]]), torch.tensor([[L - 1]])
    out = model(
        last, position_ids=position, attention_mask=as_scores(row), past_key_values=cache
    )
    return out.logits[0, -1]


panels = {}
itself = torch.arange(L)[None] == L - 1  # [1, L]
for name, row in {"all keys": everything[-1:], "itself only (3)": itself}.items():
    largest = (decode_with(row) - plain[-1]).abs().max().item()
    panels[f"{name}: largest difference {largest:.2g}"] = row
attention_masks(panels, tokens, columns=2, title="The mask of a decode step has one row")

# %% [markdown]
# ## 3. Why the past never changes
#
# Under the causal mask, what a layer computes at position i depends on positions 0 … i only. Appending a token
# therefore changes nothing at any earlier position, in any layer: not the hidden vectors, so not the keys and values
# made from them. That is the whole licence for a KV cache.
#
# The cell computes keys and values of a text twice, without and with one more token at its end, and shows how far
# those of the **old** positions moved. Then it does the same for a model without a mask, as in an encoder.
#
# **Predict.** Without a mask, do the keys and values of layer 0 move too?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# No. Layer 0 makes its keys and values from the embeddings, before anything has been mixed. From layer 1 on, every
# position has seen the new token, and every key and value moves. A model without a causal mask has nothing to cache.
#
# With the mask, old keys and values come out equal in every bit or up to rounding: a matrix product of another size
# may add in another order.
# </details>

# %%
longer = ids + tokenizer(" of every token")["input_ids"]


def keys_and_values(token_ids, masked=True):
    """K and V of all layers for one text: [layers, 2, Hkv, T, D]."""
    cache = DynamicCache()
    mask = None if masked else torch.zeros(1, 1, len(token_ids), len(token_ids))
    model(torch.tensor([token_ids]), past_key_values=cache, attention_mask=mask)
    pairs = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
    return torch.stack(pairs)


drift = {}
for name, masked in (("causal mask", True), ("no mask", False)):
    before, after = keys_and_values(longer[:-1], masked), keys_and_values(longer, masked)
    moved = (before - after[..., :-1, :]).abs().amax(dim=(1, 2, 4))  # [layers, T]
    drift[f"{name}: largest change {moved.max().item():.2g}"] = moved
kv_drift(drift, title="How far old keys and values move when a token is appended")

# %% [markdown]
# ## 4. What Hugging Face keeps
#
# A forward of a Hugging Face decoder takes and returns, among others:
#
# | argument | shape | what it is |
# |---|---|---|
# | `input_ids` | `[B, L]` | the tokens to compute now |
# | `position_ids` | `[B, L]` | where they stand in their texts; RoPE turns queries and keys by it |
# | `attention_mask` | `[B, T]` or `[B, 1, L, T]` | padding, or the full mask; without it: causal |
# | `past_key_values` | a `DynamicCache` | keys and values of the T − L tokens before |
# | `use_cache` | bool | whether to keep keys and values at all (training does not) |
# | `logits_to_keep` | int, or positions `[K]` | where to run the LM head: the last so many, or there; 0: everywhere |
# | → `logits` | `[B, L, V]` | a score per vocabulary entry, for every position kept |
# | → `past_key_values` | the same object, longer | |
#
# **Erratum.** *The claim:* `past_key_values` is a tuple of `(key, value)` pairs, each `[batch, num_heads, length,
# head_dim]`. *Why it sounds right:* it was so for years. Today a tuple raises an error, and the second axis counts
# **KV heads**, which with grouped-query attention are fewer.
#
# **Predict.** The next cell feeds the text, and then two more tokens one by one. Which shapes are the same in the last
# two passes, and which one grows? At which position does the first of the two tokens stand, counted from 0?
#
# <details><summary>Unfold after you have run the cells</summary>
#
# `input_ids`, the positions and the logits have length 1 in both; the keys grow by one per pass, and with them the
# bytes of all layers. The first of the two stands at position L, the length of what is cached: tokens count from 0.
# </details>

# %%
cache = DynamicCache(config=config)
rows = []
for fed in (ids, longer[L : L + 1], longer[L + 1 : L + 2]):
    past = cache.get_seq_length()
    position_ids = torch.arange(past, past + len(fed))[None]
    out = model(
        input_ids=torch.tensor([fed]),
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
    )
    layer = cache.layers[0]
    rows.append(
        [
            list(position_ids.shape),
            position_ids[0].tolist(),
            list(out.logits.shape),
            list(layer.keys.shape),
            binary_bytes(cache_bytes(cache)),
        ]
    )
MarkdownTable(
    ["input_ids", "positions", "logits", "layers[0].keys", "all layers, K and V"], rows
)

# %%
heads = config.get_text_config()
print(f"query heads {heads.num_attention_heads}, KV heads {heads.num_key_value_heads}")
length = cache.get_seq_length()
print(
    f"by formula, {length} tokens in float32 take {binary_bytes(kv_bytes(config, length, 4))}"
)
old_style = tuple((layer.keys, layer.values) for layer in cache.layers)
try:
    model(input_ids=torch.tensor([ids[-1:]]), past_key_values=old_style)
except (AttributeError, TypeError, ValueError) as error:
    print("a tuple:", type(error).__name__, "-", str(error).splitlines()[0])

# %% [markdown]
# ## 5. Which cells are computed, which are reused
#
# `generate_recompute` and `generate_cached` in `folovllm/baseline.py` differ only in what they feed. The next cell
# watches the key projection of the first layer while both generate six tokens, and notes which positions pass through
# it.
#
# **Predict.** With a prompt of p tokens and n new ones: how many key cells does each loop compute?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# Without a cache p + (p+1) + … + (p+n−1) = n·p + n(n−1)/2. With one p + n − 1: each position once, and the last new
# token never, because nobody asks for what comes after it.
# </details>

# %%
fed = {"without a cache": [], "with a cache": []}
for name, generate in zip(fed, (generate_recompute, generate_cached), strict=True):
    lengths = []
    hook = model.model.layers[0].self_attn.k_proj.register_forward_hook(
        lambda module, args, output, lengths=lengths: lengths.append(output.shape[1])
    )
    generate(model, ids, max_new_tokens=6)
    hook.remove()
    fed[name] = [(L + step - length, L + step) for step, length in enumerate(lengths)]
kv_cells(fed, title="K/V of one layer, step by step, as recorded")

# %% [markdown]
# ## 6. Work saved and time saved
#
# **Errata.** *"A KV cache makes 100 tokens 50 times faster"* takes a ratio of **work** for a ratio of **time**. And
# *"5×, 50×, 500× at 10, 100, 1000 tokens"*, from n³ / (n² + (n−1)·n), compares different work: it bills each step of
# one loop at the final length, and has the other read n tokens before it generates n − 1. Like with like, for n
# tokens from a prompt of one:

# %%
MarkdownTable(
    ["tokens", "linear layers, (n + 1) / 2", "attention, (2n + 1) / 3"],
    [[n, f"{linear_ratio(n):g}", f"{attention_ratio(n):g}"] for n in (10, 100, 1000)],
)

# %% [markdown]
# **Predict.** For this model and n = 256: is the ratio of times larger or smaller than the ratio of FLOPs? By how
# much?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# Much smaller. Lab 0 showed why: the step with a cache multiplies weights by *one* vector, which is memory-bound, and
# for a model as small as this one it is mostly the fixed cost of launching many small operations. The step without a
# cache multiplies them by hundreds of vectors at once, which is the efficient kind of work. So recomputing wastes
# FLOPs, but each of its FLOPs is cheap. The ratio of times grows with n. A larger model has a larger fixed cost as
# well, because a step with a cache reads all its weights for one token: Qwen3-0.6B keeps far below the ratio of FLOPs
# too (`results/m0-cache-qwen3-0.6b.json`).
# </details>


# %%
def chat_ids(question):
    """Token ids of a question in the model's chat format."""
    messages = [{"role": "user", "content": question}]
    chat = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    return tokenizer(chat, add_special_tokens=False)["input_ids"]


def timed(generate):
    """One run; four tokens before it pay for what a process sets up once."""
    generate(model, prompt, 4)
    with progress(desc=generate.__name__, total=NEW_TOKENS) as bar:
        return generate(model, prompt, NEW_TOKENS, on_token=lambda token: bar.update())


prompt = chat_ids("What is a KV cache?")
recompute, cached = timed(generate_recompute), timed(generate_cached)
print("same tokens:", recompute.token_ids == cached.token_ids)

sizes = [n for n in (16, 32, 64, 128, 256) if n <= NEW_TOKENS]
flops = [
    [generation_flops(config, len(prompt), n, cached=c).total for c in (False, True)]
    for n in sizes
]
flop_ratio = [without / with_ for without, with_ in flops]
cache_timing(
    sizes,
    [1e3 * sum(recompute.token_times[:n]) / n for n in sizes],
    [1e3 * sum(cached.token_times[:n]) / n for n in sizes],
    flop_ratio,
    title=f"{MODEL}, a prompt of {len(prompt)} tokens, {SETTING}",
)

# %%
rows = []
for n, ratio in zip(sizes, flop_ratio, strict=True):
    without, with_ = sum(recompute.token_times[:n]), sum(cached.token_times[:n])
    times = [f"{1e3 * without:.0f}", f"{1e3 * with_:.0f}", f"{without / with_:.2f}"]
    rows.append([n, *times, f"{ratio:.1f}"])
MarkdownTable(["tokens", "ms without", "ms with", "ratio of times", "ratio of FLOPs"], rows)

# %% [markdown]
# ## 7. What it costs: bytes
#
# One layer keeps a key and a value per **KV head** for every token:
#
# > bytes per token = 2 × layers × KV heads × head size × bytes per number
#
# How many KV heads there are is a decision of the model's authors. **MHA**: one per query head. **GQA**: one per
# group of query heads. **MQA**: one for all. **MLA** keeps no keys and values at all but one compressed vector, from
# which each head makes its own, and a small key that carries the position.
#
# **Predict.** Order the four for a model of 32 layers with 32 heads of size 128 (GQA with 8 KV heads; MLA with the
# vector of 512 + 64 numbers of DeepSeek-V2).
#
# <details><summary>Unfold after you have run the cell</summary>
#
# MHA <!-- claim: kv-bytes-llama2-7b -->512 KiB<!-- /claim -->, GQA 128 KiB, MLA 36 KiB, MQA 16 KiB. **Erratum:** MLA is
# often called the smallest. Its <!-- claim: kv-values-mla -->576<!-- /claim --> numbers per layer and token are small
# beside the 8192 of MHA, but more than the <!-- claim: kv-values-mqa -->256<!-- /claim --> of MQA. What it buys is
# quality at that size, not the minimum.
# </details>

# %%
shape = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
same_shape = {
    "MHA, 32 KV heads": LlamaConfig(**shape, num_key_value_heads=32),
    "GQA, 8 KV heads": LlamaConfig(**shape, num_key_value_heads=8),
    "MQA, 1 KV head": LlamaConfig(**shape, num_key_value_heads=1),
    "MLA, 512 + 64 numbers": DeepseekV2Config(
        **shape, kv_lora_rank=512, qk_rope_head_dim=64
    ),
}
kv_bytes_bars(
    [(name, attention_kind(c), kv_bytes_per_token(c, 2)) for name, c in same_shape.items()],
    title="32 layers, 32 heads of size 128, 16-bit numbers",
)

# %% [markdown]
# The same for models as they were published. (**Erratum:** "Llama-2 uses GQA" is true of its 34B and 70B sizes only.)

# %%
published = {
    "Llama-2-7B": LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32
    ),
    "Llama-2-13B": LlamaConfig(
        hidden_size=5120, num_hidden_layers=40, num_attention_heads=40
    ),
    "Llama-2-70B": LlamaConfig(
        hidden_size=8192,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
    "DeepSeek-V2": DeepseekV2Config(
        num_hidden_layers=60, kv_lora_rank=512, qk_rope_head_dim=64
    ),
    "Qwen3-0.6B": load_config(resolve_model("qwen3-0.6b")),
    "Qwen2.5-0.5B": load_config(resolve_model("qwen2.5-0.5b")),
}
kv_bytes_bars(
    [(name, attention_kind(c), kv_bytes_per_token(c, 2)) for name, c in published.items()],
    title="Published models, 16-bit numbers",
)

# %%
llama = published["Llama-2-7B"]
MarkdownTable(
    ["Llama-2-7B, 16-bit", "KV cache"],
    [
        ["1 token", binary_bytes(kv_bytes(llama, 1, 2))],
        ["1 text of 1000 tokens", binary_bytes(kv_bytes(llama, 1000, 2))],
        ["10 texts of 500 tokens", binary_bytes(kv_bytes(llama, 500, 2, num_sequences=10))],
        ["1 text of 100,000 tokens", binary_bytes(kv_bytes(llama, 100_000, 2))],
    ],
)

# %% [markdown]
# ## 8. Positions, when prompts are padded
#
# To run prompts of different lengths in one batch, Hugging Face pads them on the left, so that all end in the last
# column. Then "position" is no longer "column". For the right ids, count the real tokens: the cumulative sum of the
# mask, minus one.
#
# **Predict.** Four variants of the same batch; in which are the last logits those of the prompts run alone?
#
# 1. mask, counted positions
# 2. mask, positions 0, 1, 2, … from the left edge of the batch
# 3. no mask, counted positions
# 4. mask and counted positions for the prompt, but the first decode token at position "width of the batch"
#
# <details><summary>Unfold after you have run the two cells</summary>
#
# 1 and, perhaps to your surprise, 2. RoPE turns queries and keys by their positions, and only the *difference* of two
# positions enters a score: moving a whole row by the same amount changes nothing. (A model with learned position
# embeddings, such as GPT-2, would differ.) 3 attends to padding and is wrong. 4 is wrong because it tears a gap
# between the prompt and its continuation: every row but the longest. It is an easy mistake, and the *first* token it
# produces is right.
# </details>

# %%
questions = [
    "What is a KV cache?",
    "How does paging help?",
    "Why is decode slow when the batch is small?",
]
prompts = [chat_ids(question) for question in questions]
width = max(map(len, prompts))
pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
batch = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])  # [B, W]
mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])  # [B, W]

counted = (mask.cumsum(-1) - 1).clamp(min=0)  # [B, W]
columns = torch.arange(width).expand_as(mask)  # [B, W]
position_grid(
    {
        "counted: cumulative sum of the mask, minus one": counted,
        "from the left edge of the batch": columns,
    },
    mask,
    [f"{len(p)} tokens" for p in prompts],
    title="Position ids of a left-padded batch",
)

# %%
alone = [model(input_ids=torch.tensor([p])).logits[0, -1] for p in prompts]
chosen = torch.stack([logits.argmax() for logits in alone])[:, None]  # [B, 1]
alone_next = [
    model(input_ids=torch.tensor([[*p, token]])).logits[0, -1]
    for p, token in zip(prompts, chosen[:, 0].tolist(), strict=True)
]
lengths = torch.tensor([[len(p)] for p in prompts])  # [B, 1]


def padded(positions, use_mask=True, next_positions=None):
    """Largest logit difference of each row from its prompt run alone: at its end, one token on."""
    cache = DynamicCache(config=config)
    real = mask if use_mask else torch.ones_like(mask)
    kwargs = {"past_key_values": cache, "use_cache": True}
    first = model(
        input_ids=batch, attention_mask=real, position_ids=positions, **kwargs
    ).logits[:, -1]
    real = torch.cat([real, torch.ones_like(chosen)], dim=1)
    following = positions[:, -1:] + 1 if next_positions is None else next_positions
    second = model(
        input_ids=chosen, attention_mask=real, position_ids=following, **kwargs
    ).logits[:, -1]
    return [
        ", ".join(
            f"{(row - reference).abs().max().item():.1g}"
            for row, reference in zip(rows, references, strict=True)
        )
        for rows, references in ((first, alone), (second, alone_next))
    ]


MarkdownTable(
    ["variant", "difference after the prompt, per row", "after one decode step"],
    [
        ["1. mask, counted", *padded(counted)],
        ["2. mask, from the left edge", *padded(columns)],
        ["3. no mask, counted", *padded(counted, use_mask=False)],
        [
            "4. counted, then the width",
            *padded(counted, next_positions=torch.full_like(lengths, width)),
        ],
        ["5. counted, then one too many", *padded(counted, next_positions=lengths + 1)],
    ],
)

# %% [markdown]
# The last line is the classic of small engines: the first decode token stands at position *length of the prompt*,
# counted from 0; one more, and everything is slightly off. Whoever compares only the first token with a reference
# will not notice.
#
# ## Three things to try
#
# 1. Run the lab with a larger model: `MODEL = "Qwen/Qwen3-0.6B"` with a network, and `NEW_TOKENS = 64`. Predict
#    first: does the ratio of times come closer to the ratio of FLOPs?
# 2. In section 3, append two tokens instead of one. Then replace the *first* token, and predict the picture.
# 3. Your machine has some memory left. How many tokens of Llama-2-7B's cache fit into it? And of Qwen2.5-0.5B's?
#    (`kv_bytes_per_token`.) What would you give up to fit twice as many?
