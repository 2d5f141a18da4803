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
# # Lab 5: ragged batches, and the kernel
#
# In lab 4 you handed out blocks. Now something has to read from them: one forward for the tokens of all requests,
# without padding, and attention that finds each request's keys through its table. In this lab you pack texts into
# one row, in ways that are right and in one that is silently wrong; you read the numbers that a step of the engine
# hands to attention; you watch online softmax at work, with its rescale and without; and you run a Triton kernel,
# without a GPU.
#
# It takes less than a minute on two cores and needs no network. Questions come before the cells that answer them:
# write your guess down, then run, then unfold.

# %%
MODEL = "folo-tiny"  # a bundled name, a local folder, or a hub id such as "Qwen/Qwen3-0.6B"
THREADS = 1
SEED = 0  # of the random queries, keys and values

# %%
import math
import os
import time
from itertools import pairwise

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: kernels run on the CPU

import torch
from transformers import DynamicCache

from folovllm import LLM, SamplingParams
from folovllm.attention.backend import AttentionParams, LayerKV
from folovllm.attention.metadata import AttentionMetadata
from folovllm.attention.reference import ReferenceBackend, visible_tokens
from folovllm.course.glossary import default_prompts
from folovllm.course.lessons.online_softmax import online_softmax
from folovllm.course.viz.notebook import MarkdownTable
from folovllm.course.viz.ragged import (
    kernel_tiles,
    online_softmax_steps,
    padded_and_ragged,
    ragged_masks,
    slot_arrows,
)
from folovllm.models.loader import load_hf_model, resolve_model

try:
    from folovllm.attention.triton_backend import TritonBackend
except (
    ImportError
):  # macOS, Windows: section 6 then has torch's backend in the kernel's place
    TritonBackend = None

torch.set_num_threads(THREADS)
torch.set_grad_enabled(False)
model = load_hf_model(resolve_model(MODEL), torch.float32, torch.device("cpu"), "auto")
vocab_size = model.config.vocab_size

# %% [markdown]
# ## 1. The same texts, padded and in one row
#
# Three texts of 12, 300 and 40 tokens. As a rectangle they are `[3, 300]`. One behind the other they are `[352]`.
#
# **Predict.** Which share of the rectangle is padding? And for 36, 37 and 36 tokens, which somebody once chose to
# show how wasteful padding is?
#
# <details><summary>Unfold after you have run the cells</summary>
#
# 548 of 900 cells, 60.9 %. And 2 of 111, 1.8 %. Padding is expensive where lengths differ.
# </details>

# %%
LENGTHS, ALIKE = (12, 300, 40), (36, 37, 36)
padded_and_ragged(LENGTHS, "abc", title="12, 300 and 40 tokens")

# %%
padded_and_ragged(ALIKE, "abc", title="36, 37 and 36 tokens")

# %% [markdown]
# The model is Hugging Face's in both cases, with the same weights, and we need the logits after each text's last
# token. The rectangle gets its mask and positions as in lab 3. The row gets a mask, too, which says who sees whom:
# block-diagonal, since a text is no past of another one, and causal within each block.
#
# **Predict.** How much faster is the row, for either set of lengths? What about three forwards, one per text?
#
# <details><summary>Unfold after you have run the cells</summary>
#
# For unequal lengths the row takes well under half of the rectangle's time: nearly in proportion to the cells. Where
# lengths are alike there is nothing to gain, and the two are about even: the row's mask is `[352, 352]` or
# `[109, 109]`, and Hugging Face computes all of it, strangers included. (An engine does not: section 3.) Three
# forwards have no padding either. What they lack is company: each reads all the weights for its own few tokens.
# </details>

# %%
generator = torch.Generator().manual_seed(SEED)


def block_diagonal(lengths):
    """Who sees whom: [1, 1, T, T] bool."""
    parts = [visible_tokens(n, n, None) for n in lengths]
    return torch.block_diag(*parts).bool()[None, None]


def forwards(lengths):
    """Three ways to the last logits of random texts of these lengths, each [texts, V]."""
    texts = [torch.randint(vocab_size, (n,), generator=generator) for n in lengths]
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.int64)  # [B, L]
    present = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, longest - len(text) :], present[row, longest - len(text) :] = text, 1
    columns = (present.cumsum(1) - 1).clamp(min=0)  # [B, L]
    packed, mask = torch.cat(texts)[None], block_diagonal(lengths)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]  # [1, T]
    ends = torch.tensor(lengths).cumsum(0) - 1

    def call(**inputs):
        return model(use_cache=False, **inputs).logits

    return {
        "padded": lambda: call(
            input_ids=ids,
            attention_mask=present,
            position_ids=columns,
            logits_to_keep=torch.tensor([longest - 1]),
        )[:, 0],
        "ragged": lambda: call(
            input_ids=packed,
            attention_mask=mask,
            position_ids=positions,
            logits_to_keep=ends,
        )[0],
        "one by one": lambda: torch.cat(
            [
                call(input_ids=t[None], logits_to_keep=torch.tensor([len(t) - 1]))[0]
                for t in texts
            ]
        ),
    }


def milliseconds(work):
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


rows = []
for name, lengths in {"12, 300, 40": LENGTHS, "36, 37, 36": ALIKE}.items():
    ways = forwards(lengths)
    logits = [way() for way in ways.values()]  # warm-up, and what they say
    apart = max(float((x - logits[0]).abs().max()) for x in logits)
    took = [min(milliseconds(way) for _ in range(3)) for way in ways.values()]
    row = [name, *(f"{t:.0f}" for t in took), f"{took[0] / took[1]:.2f}"]
    rows.append([*row, f"{apart:.0e}"])
MarkdownTable(
    ["lengths", "padded, ms", "ragged, ms", "one by one, ms", "padded / ragged", "apart"],
    rows,
)

# %% [markdown]
# ## 2. A trap: packed inputs that are silently wrong
#
# So a Hugging Face model can do ragged batches, if somebody makes the mask. That is tedious, and there is a short cut:
# give `position_ids` that begin again at 0 for each text, and no mask at all. Transformers looks at them, sees that
# several texts are packed, and makes the mask itself. Does it always?
#
# **Predict.** Below, the packed logits are compared with those of each text alone, in six ways. Which ones are wrong,
# and for which of the three texts? By how much? (The logits' standard deviation is about 3.)
#
# 1. the mask, and positions that begin again
# 2. the mask, and positions counted through from 0 to 351
# 3. no mask, positions that begin again, `use_cache=False`
# 4. no mask, positions that begin again, `use_cache=True`
# 5. the same with a `DynamicCache` of one's own
# 6. nothing: no mask, no positions
#
# <details><summary>Unfold after you have run the cell</summary>
#
# 1 to 3 are right. 2 needs no special positions, since RoPE turns keys and queries by *differences*, and within a text
# these are the same. With a cache (4, 5) the positions mean nothing to the mask: transformers looks for packed texts
# only without one. Nothing is said, and the logits are off by more than their own spread, as if nothing had been done
# (6). `use_cache=True` is the default of `forward`!
#
# The first text is right in all ways. A causal mask never looks ahead, so `a`, which stands first, cannot see the
# others: the later texts see the earlier ones. A check that looks at the first text only would pass.
# </details>

# %%
texts = [torch.randint(vocab_size, (n,), generator=generator) for n in LENGTHS]
alone = [model(input_ids=t[None], use_cache=False).logits[0] for t in texts]
packed, mask = torch.cat(texts)[None], block_diagonal(LENGTHS)
again = torch.cat([torch.arange(n) for n in LENGTHS])[None]  # [1, T]
ways = {
    "1 mask": {"attention_mask": mask, "position_ids": again, "use_cache": False},
    "2 mask, counted through": {"attention_mask": mask, "use_cache": False},
    "3 positions, no cache": {"position_ids": again, "use_cache": False},
    "4 positions, use_cache=True": {"position_ids": again, "use_cache": True},
    "5 positions, own cache": {"position_ids": again, "past_key_values": DynamicCache()},
    "6 nothing": {"use_cache": False},
}
rows = []
for name, inputs in ways.items():
    parts = model(input_ids=packed, **inputs).logits[0].split(LENGTHS)
    apart = [float((x - y).abs().max()) for x, y in zip(parts, alone, strict=True)]
    rows.append([name, *(f"{x:.1e}" if x < 0.1 else f"{x:.1f}" for x in apart)])
print(f"standard deviation of the logits: {torch.cat(alone).std():.1f}")
MarkdownTable(["largest difference from the text alone", "a", "b", "c"], rows)

# %% [markdown]
# This engine never relies on any of that. It says who is who in integers, and its attention reads them.
#
# ## 3. What a step says of its tokens
#
# The next cell runs the engine on four short requests and writes down what its runner hands to attention in every
# step. Let us look at a step in which one request prefills while others decode.
#
# **Predict.** A step has the 17 tokens of a new prompt, and decodes of two texts. How long are `token_ids`,
# `positions`, `slot_mapping`? How many numbers are in `query_start_loc`, in `seq_lens`? How many columns would the
# mask have?
#
# <details><summary>Unfold after you have run the cells</summary>
#
# T is 17 + 1 + 1 = 19: one token id, one position and one slot per new token. `query_start_loc` has a number more than
# there are requests, `seq_lens` one for each. The mask's columns are keys, and a decode's keys are all tokens of its
# text so far: sum(seq_lens), not T. That is why "the mask is `[T, T]`" holds in a first prefill only, and why
# metadata needs `seq_lens` and `block_table` beside `query_start_loc`.
# </details>

# %%
llm = LLM(
    MODEL,
    milestone="m3",
    dtype="float32",
    device="cpu",
    attention_backend="torch",
    max_model_len=128,
    max_num_seqs=3,
    block_size=8,
    num_kv_blocks=24,
)
questions = default_prompts(5)[1:]
prompts = llm.chat_prompts([[{"role": "user", "content": text}] for text in questions])
params = [
    SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (12, 3, 12, 12)
]


class Watched:
    """The engine's own buffers, and a copy of every batch that they lay out."""

    def __init__(self, buffers):
        self.buffers, self.batches = buffers, []

    def fill(self, scheduled):
        batch = self.buffers.fill(scheduled)
        meta = batch.metadata
        self.batches.append(
            {
                "token_ids": batch.token_ids.tolist(),
                "positions": batch.positions.tolist(),
                "slot_mapping": meta.slot_mapping.tolist(),
                "query_start_loc": meta.query_start_loc.tolist(),
                "seq_lens": meta.seq_lens.tolist(),
                "block_table": [list(table) for table in meta.tables],
            }
        )
        return batch


runner = llm.engine.core.runner
runner.buffers = Watched(runner.buffers)
llm.generate(prompts, params, use_tqdm=False)
batches = runner.buffers.batches
mixed = next(b for b in batches[1:] if len(b["token_ids"]) > len(b["seq_lens"]))
for name, numbers in mixed.items():
    print(f"{name:16} {numbers}")

# %%
starts, seq_lens = mixed["query_start_loc"], mixed["seq_lens"]
query_lens = [end - start for start, end in pairwise(starts)]
T, S = sum(query_lens), sum(seq_lens)
seen = sum(
    int(visible_tokens(q, s, None).sum()) for q, s in zip(query_lens, seq_lens, strict=True)
)
print(f"T = {T} new tokens, S = {S} keys: {seen} of {T * S} pairs see each other")
ragged_masks(
    {"prefill of three": ((3, 7, 5), (3, 7, 5)), "a mixed step": ((1, 5, 1), (8, 5, 6))},
    "abc",
    title="Block-diagonal, and causal in each block",
)

# %% [markdown]
# The mask is drawn here and built nowhere: the kernel works out from the integers which keys its queries may see, and
# loads no others. And where do the *new* keys and values go? Each token has a slot.
#
# **Predict.** Request `b` has five tokens in its text before this step, in blocks of four, with the block table
# `[5, 2]`. In which slot is its new token's K/V?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# Token 5 (counted from 0) is number 1 in the second block of its table, block 2: slot 2 × 4 + 1 = 9. Neighbours in the
# row of tokens need not be neighbours in the pool, and the other way round.
# </details>

# %%
slot_arrows(
    query_start_loc=[0, 3, 4, 5],
    seq_lens=[3, 6, 9],
    slot_mapping=[28, 29, 30, 9, 16],
    block_table=[[7], [5, 2], [1, 6, 4]],
    block_size=4,
    num_blocks=9,
    names="abc",
    title="A prefill of three tokens beside two decodes",
)

# %% [markdown]
# ## 4. Scrambled tables
#
# How much does attention depend on the order of a table? Lab 4 has rewired an engine. Here is attention alone, with
# random queries, keys and values, and a single request of 30 tokens in four blocks of 8, the last one not full.
#
# **Predict.** For a decode (one query), and for a prefill of the last 20 tokens: which changes of the table change the
# output?
#
# 1. two full blocks trade places, in the table only
# 2. two full blocks trade places in the table *and* in the pool
# 3. the last block, which is not full, and the first one trade places
# 4. one entry is another request's block
#
# <details><summary>Unfold after you have run the cell</summary>
#
# 2 changes nothing, ever: the number of a block means nothing, as long as writer and reader agree. 4 is always wrong.
#
# 1 is the interesting one: a decode does not care! Its query sees all keys, softmax sums over a set, and a sum has no
# order. (Positions are not lost by that: RoPE has turned each key before it was stored.) A prefill does care, since
# its mask goes by places in the table: scrambled, its first rows see keys that they should not.
#
# And 3 breaks the decode as well. Which slots count as empty is decided at the end of the *last* entry, so two true
# keys are cut off, and two slots are read that hold nothing of this text. A control arm that should fail must be
# chosen with care: with 1 and a decode alone it would not have failed, and the test would be worth nothing.
# </details>

# %%
SIZE, HEADS, KV_HEADS, DIM = 8, 4, 2, 16
LENGTH, TABLE = 30, (3, 1, 6, 2)


def normal(*shape):
    return torch.randn(*shape, generator=generator)


keys, values = normal(8, SIZE, KV_HEADS, DIM), normal(8, SIZE, KV_HEADS, DIM)


def attend(query, table, pool=(keys, values), backend=None):
    """Attention of the last queries of a request of 30 tokens, read through `table`."""
    new = len(query)
    meta = AttentionMetadata(
        query_start_loc=torch.tensor([0, new], dtype=torch.int32),
        seq_lens=torch.tensor([LENGTH], dtype=torch.int32),
        slot_mapping=torch.zeros(new, dtype=torch.int64),
        block_table=torch.tensor([table], dtype=torch.int32),
        block_size=SIZE,
        query_lens=[new],
        kv_lens=[LENGTH],
        tables=[tuple(table)],
    )
    backend = backend or ReferenceBackend()
    return backend.attend(query, LayerKV(*pool), meta, AttentionParams(DIM**-0.5))


a, b, c, d = TABLE
moved = [x.clone() for x in (keys, values)]
for x in moved:
    x[[a, b]] = x[[b, a]]
arms = {
    "1 two full blocks, table only": ((b, a, c, d), (keys, values)),
    "2 two full blocks, table and pool": ((b, a, c, d), moved),
    "3 the first and the last": ((d, b, c, a), (keys, values)),
    "4 somebody else's block": ((5, b, c, d), (keys, values)),
}
rows = []
for name, (table, pool) in arms.items():
    row = [name]
    for query in (normal(1, HEADS, DIM), normal(20, HEADS, DIM)):
        apart = float((attend(query, table, pool) - attend(query, TABLE)).abs().max())
        row.append("same" if apart < 1e-5 else f"wrong by {apart:.2f}")
    rows.append(row)
MarkdownTable(["change", "a decode", "a prefill of 20"], rows)

# %% [markdown]
# ## 5. Online softmax
#
# A kernel does not gather 30 keys, let alone 30,000, to hold their scores side by side. It takes them in tiles and
# carries three things: the largest score so far, the sum of exp(score - maximum), and the sum of exp(score - maximum)
# × value. When a tile raises the maximum, both sums are multiplied by exp(old - new): the **rescale**.
#
# **Predict.** There are 16 scores in four tiles. The maximum rises in the second and in the third tile. If the rescale
# is left out, in which tile does the result go wrong, and is it too large or too small? Which scores would hide the
# mistake?
#
# <details><summary>Unfold after you have run the cells</summary>
#
# From the second tile on. The sum is too large, since early weights stay relative to a smaller maximum; the attention
# is a mean in which the early keys count too much, and it may be off in either direction. With the rescale, each state
# is the exact attention over the keys so far, and the last one that over all.
#
# If the largest score is in the first tile, all factors are 1, and the control arm is right: the last rows of the
# table. So this mistake gets through tests whose scores are in a lucky order.
# </details>

# %%
scores = [0.2, 1.0, 0.5, -0.3, 1.2, 0.1, 0.4, 0.9, 2.8, 1.5, 0.3, 2.0, 0.6, 1.1, 1.9, 0.2]
TILE = 4
row, row_values = torch.tensor(scores, dtype=torch.float64), normal(16, 4).double()
exact = row.softmax(0) @ row_values  # [4]
online_softmax_steps(
    scores,
    TILE,
    online_softmax(row, row_values, TILE),
    online_softmax(row, row_values, TILE, rescale=False),
    float(exact[0]),
    title="Sixteen scores in tiles of four",
)

# %%
rows = []
for name, order in {
    "as above": torch.arange(16),
    "ascending": row.argsort(),
    "descending": row.argsort(descending=True),
}.items():
    for arm in (True, False):
        last = online_softmax(row[order], row_values[order], TILE, rescale=arm)[-1]
        apart = float((last.attention - exact).abs().max())
        kept = "yes" if arm else "no"
        rows.append([name, kept, f"{last.total:.4f}", f"{apart:.0e}" if apart else "0"])
MarkdownTable(["order of the scores", "rescale", "sum", "attention off by"], rows)

# %% [markdown]
# ## 6. The kernel
#
# The Triton kernel does this for many rows at once. A *program* has a block of queries of one request, with all heads
# of one KV head as rows of its tile (GQA packing), and goes through that request's keys. Most tiles need no mask,
# because all its queries see all of it; those at the diagonal do; beyond the diagonal nothing is loaded.
#
# **Predict.** Three requests: a prefill of 12, a chunk of 7 with 16 tokens before it, and a decode over 17. With
# blocks of 4 queries and tiles of 8 keys, how many tiles are loaded? How many cells would a padded `[3, 12, 23]` have?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# 1 + 1 + 2 tiles for the prefill, 3 + 3 for the chunk, 3 for the decode: 13 tiles, 7 of them without a mask. The
# padded one has 828 cells, of which 78 + 140 + 17 = 235 are asked for. In the kernel nobody is padded to a
# neighbour's length: waste is at most a tile's edge.
# </details>

# %%
kernel_tiles([12, 7, 1], [12, 23, 17], 4, 8, "abc", title="What each program loads")

# %% [markdown]
# It runs here without a GPU: Triton interprets it, program by program, with NumPy. That is slow, but it does what the
# compiled kernel does, and all it may read beyond a text's end holds NaN in this cell.
#
# **Predict.** How far from the float64 reference? Does it depend on the block size, or on how many query heads share a
# KV head?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# By rounding: the last of seven digits or so. Neither block size nor group matters; a table says where keys are and
# does not change them. What a wrong mask would do is not a small number: the first NaN makes the row NaN.
# </details>

# %%
if TritonBackend is None:
    from folovllm.attention.torch_backend import TorchBackend

    kernel = TorchBackend()
else:
    kernel = TritonBackend(torch.device("cpu"))


def ragged_step(lengths, size, heads, kv_heads):
    """A step of requests (past, new) in scattered blocks; all that nobody may read is NaN."""
    counts = [-(-(past + new) // size) for past, new in lengths]
    order = (torch.randperm(sum(counts), generator=generator) + 1).tolist()
    tables = [tuple(order.pop() for _ in range(count)) for count in counts]
    keys, values = torch.full((2, sum(counts) + 1, size, kv_heads, DIM), torch.nan)
    for table, (past, new) in zip(tables, lengths, strict=True):
        for j in range(past + new):
            for pool in (keys, values):
                pool[table[j // size], j % size] = normal(kv_heads, DIM)
    news, totals = [new for _, new in lengths], [past + new for past, new in lengths]
    starts = torch.tensor([0, *news]).cumsum(0).int()
    padded = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for line, table in zip(padded, tables, strict=True):
        line[: len(table)] = torch.tensor(table)
    lens, slots = torch.tensor(totals, dtype=torch.int32), torch.zeros(sum(news)).long()
    meta = AttentionMetadata(starts, lens, slots, padded, size, news, totals, tables)
    return normal(sum(news), heads, DIM), LayerKV(keys, values), meta


rows = []
for size, heads, kv_heads in ((1, 4, 4), (4, 4, 2), (16, 8, 1), (5, 6, 2)):
    query, kv, meta = ragged_step([(0, 12), (16, 7), (16, 1)], size, heads, kv_heads)
    params = AttentionParams(DIM**-0.5)
    got = kernel.attend(query, kv, meta, params)
    want = ReferenceBackend(torch.float64).attend(query.double(), kv, meta, params)
    apart = float((got - want).abs().max())
    rows.append([size, f"{heads} / {kv_heads}", f"{apart:.0e}"])
print("backend:", kernel.name)
MarkdownTable(["block size", "query heads / KV heads", "largest difference"], rows)

# %% [markdown]
# ## 7. Cut a long past into pieces
#
# A decode of one request with 8 KV heads is 8 programs, and a GPU has room for many more. **Split-KV** cuts the past
# into segments, a program for each, and puts the results together.
#
# **Predict.** Each segment brings its maximum, its sum and its output. What has to be done before they can be added?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# The rescale once more. Segments do not know of each other, so each is relative to its own maximum; multiplied by
# exp(own - largest) they are of one scale. Online softmax puts tiles together one after the other; split-KV does it
# with all of them at once, and the sum is the same. On a CPU the engine uses the same formula for something else: a
# prefix that several requests share is one part, and what each has of its own is the other
# (`folovllm/attention/cascade.py`).
# </details>

# %%
parts = [
    online_softmax(row[i : i + 4], row_values[i : i + 4], 4)[0] for i in range(0, 16, 4)
]
largest = max(part.maximum for part in parts)
factors = [math.exp(part.maximum - largest) for part in parts]
total = sum(f * part.total for f, part in zip(factors, parts, strict=True))
merged = sum(f * part.output for f, part in zip(factors, parts, strict=True)) / total
plain = sum(part.attention for part in parts) / 4
print("factors:", [f"{f:.3f}" for f in factors])
print(f"merged: off by {float((merged - exact).abs().max()):.0e}")
print(f"the mean of the four results: off by {float((plain - exact).abs().max()):.2f}")

# %% [markdown]
# ## Three things to try
#
# 1. In section 1, take lengths of your own. For which is one by one the fastest? What do all three have to do that no
#    layout changes?
# 2. In section 4, make the request 32 tokens long (`LENGTH = 32`), so that its last block is full. Which row of the
#    table changes, and why?
# 3. In section 5, multiply `scores` by 100 and leave out "minus maximum" altogether: `row.exp() @ row_values /
#    row.exp().sum()` in float32. What does softmax need the maximum for?
