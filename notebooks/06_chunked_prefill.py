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
# # Lab 6: chunked prefill
#
# Until now a prompt went through the model in one piece, and everybody in the same step waited for it. In this lab
# you cut it. You put a mask together from rectangles, cut a prompt in right and in wrong ways, watch what fills a step,
# and find out who pays for a big chunk, and which percentile hides it.
#
# It takes less than a minute on two cores and needs no network. Questions come before the cells that answer them:
# write your guess down, then run, then unfold.

# %%
MODEL = "folo-tiny"  # a bundled name, a local folder, or a hub id such as "Qwen/Qwen3-0.6B"
THREADS = 1
SEED = 0  # of the random prompts
REPEATS = 3  # of what is timed

# %%
import random
from itertools import pairwise
from statistics import median

import torch
from transformers import DynamicCache, LlamaConfig

from folovllm import LLM, SamplingParams
from folovllm.course.bench.record import percentile
from folovllm.course.viz.chunks import (
    chunk_masks,
    chunked_mask,
    composition,
    latency_by_chunk,
    step_composition,
)
from folovllm.course.viz.notebook import MarkdownTable, progress
from folovllm.course.viz.panels import CHUNK_KINDS, chunk_rows_panel
from folovllm.course.viz.sliders import slider_figure
from folovllm.kv_cache.formulas import kv_bytes
from folovllm.models.loader import load_hf_model, resolve_model

torch.set_num_threads(THREADS)
torch.set_grad_enabled(False)
rng = random.Random(SEED)


def engine(budget, milestone="m4", **settings):
    """An engine with a budget of tokens per step, and nothing found in a cache."""
    if milestone == "m4":
        settings["enable_prefix_caching"] = False
    return LLM(
        MODEL,
        milestone=milestone,
        dtype="float32",
        max_model_len=1536,
        num_kv_blocks=200,
        max_num_batched_tokens=budget,
        **settings,
    ).engine


def tokens(count):
    """A prompt without any sense."""
    return [rng.randrange(2048) for _ in range(count)]


def exactly(count):
    """Greedy, and so many tokens."""
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)


# %% [markdown]
# ## 1. A mask in pieces
#
# Ten tokens, in chunks of four. Each chunk is a pass of its own: its queries are its own tokens, its keys are all
# tokens so far.
#
# **Predict.** Which shapes do the three masks have? How many cells of each are True, and how many in all three?
#
# <details><summary>Unfold after you have run the cells</summary>
#
# `[4, 4]`, `[4, 8]` and `[2, 10]`, with 10, 26 and 19 True cells: 55 = 10 * 11 / 2, as in the triangle. Rows are cut,
# nothing else. A decode step is the same cut with a single row.
# </details>

# %%
pieces = chunk_masks([4, 4, 2])
print([list(piece.shape) for piece in pieces], [int((piece > 0).sum()) for piece in pieces])
print("together:", sum(int((piece > 0).sum()) for piece in pieces))

# %%
chunked_mask([4, 4, 2], title="The same mask in one pass and in three")

# %% [markdown]
# And with other chunks? In a running notebook the slider chooses their size, for a prompt of 12 tokens; where nothing
# runs, four sizes stand side by side.
#
# **Predict.** Chunks of 12, of 4 and of 1: how many passes are that, and how many cached tokens do they read in all?
# What else is read once per pass, that no mask shows? What are chunks of 1?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# 1, 3 and 12 passes. In one pass everything is there; in three, the second reads 4 tokens and the third 8, that is 12;
# in twelve, 0 + 1 + … + 11 = 66. What no mask shows are the weights, which every pass reads once. The True cells are
# the same 78 however it is cut: work is not saved, and reading is added. Chunks of 1 are decoding. A prompt that comes
# in such pieces is computed as if the model had said it.
# </details>

# %%
slider_figure(
    lambda ax, size: chunk_rows_panel(ax, 12, size),
    name="chunks of",
    values=range(1, 13),
    start=4,
    shown=(1, 4, 5, 12),
    height=2.6,
    kinds=CHUNK_KINDS,
    title="Twelve tokens, cut",
)

# %% [markdown]
# ## 2. Three ways to get it wrong
#
# A prompt of 48 tokens through Hugging Face's model: in one pass, and in chunks of 16 that go on from a cache. What is
# compared are the logits of the last chunk.
#
# **Predict.** One of the ways below is right. Of the three mistakes, does any give an error? Which one is the
# smallest? The logits themselves have a standard deviation of about 3.
#
# <details><summary>Unfold after you have run the cell</summary>
#
# The right way agrees up to rounding. All three mistakes run through without an error, and their logits are off by
# several standard deviations. It is not a matter of degree, and no test that looks at shapes or at speed would find
# one of them. Compare tokens with those of one pass, always.
# </details>

# %%
model = load_hf_model(resolve_model(MODEL), torch.float32, torch.device("cpu"))
ids = torch.tensor([tokens(48)])  # [1, T]
whole = model(input_ids=ids, use_cache=False).logits  # [1, T, V]
rows, columns = torch.arange(32, 48)[:, None], torch.arange(48)[None]


def last_chunk(fill_cache=True, **inputs):
    """How far the last chunk's logits are from those of one pass."""
    cache = DynamicCache()
    for chunk in ids[:, :32].split(16, dim=1) if fill_cache else ():
        model(input_ids=chunk, past_key_values=cache, use_cache=True)
    logits = model(
        input_ids=ids[:, 32:], past_key_values=cache, use_cache=True, **inputs
    ).logits
    return f"{(logits - whole[:, 32:]).abs().max():.2g}"


rectangle = torch.ones(1, 1, 16, 48, dtype=torch.bool)
MarkdownTable(
    ["way", "largest difference of a logit"],
    [
        ["goes on from the cache", last_chunk()],
        [
            "the same, mask given by hand",
            last_chunk(attention_mask=(columns <= rows)[None, None]),
        ],
        [
            "the chunk sees itself only",
            last_chunk(fill_cache=False, position_ids=rows.T),
        ],
        ["no triangle at the end", last_chunk(attention_mask=rectangle)],
        ["positions begin again", last_chunk(position_ids=rows.T - 32)],
    ],
)

# %% [markdown]
# ## 3. Only the last chunk samples
#
# Two answers are being written when a prompt of 150 tokens comes. A step has 64 tokens.
#
# **Predict.** In how many steps is the prompt computed, and with how many tokens in each? In which of them does it
# sample? What would the model have said after the first chunk?
#
# <details><summary>Unfold after you have run the cells</summary>
#
# Two tokens of each step belong to the decodes, so 62, 62 and 26. It samples in the third, when it has caught up. After
# the first chunk the logits are as good as any, and what they predict is the prompt's 63rd token, which is known, and
# is another one. From the next step on it lacks one token per step, like the others: nothing tells a prompt from an
# answer but a number.
# </details>

# %%
eng = engine(64)
for name in "ab":
    eng.add_request(name, tokens(8), exactly(12))
for _ in range(4):
    eng.step()
prompt = tokens(150)
eng.add_request("long", prompt, exactly(4))
while eng.has_unfinished_requests():
    eng.step()

rows = []
for step in eng.trace:
    share = {r.request_id: r for r in step.requests}
    if "long" in share:
        beside = [share[name].num_scheduled if name in share else 0 for name in "ab"]
        own = share["long"]
        rows.append(
            [step.step, *beside, own.num_scheduled, own.num_computed, own.num_sampled]
        )
MarkdownTable(["step", "of a", "of b", "of long", "long has K/V for", "long samples"], rows)

# %%
after_first = int(model(input_ids=torch.tensor([prompt[:62]])).logits[0, -1].argmax())
print(
    f"after the first chunk the model would say {after_first}; the prompt goes on with {prompt[62]}"
)

# %% [markdown]
# ## 4. What fills a step
#
# Eight answers are being written, and a prompt of 1024 tokens comes in: to M3, which does not cut, and to M4 with two
# budgets.
#
# **Predict.** How high is the highest bar in each panel? How many steps does the prompt take with a budget of 256? And
# do the answers take more steps in M3 or in M4?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# 1032, 256 and 64: what fits is used. Each step of the budget has 248 tokens left beside the decodes, so it takes five.
# The answers take the same number of steps everywhere, a token per step; what differs is how long the steps are. With
# the budget of 64, one more thing changes: the eight prompts at the beginning do not fit into one step either.
# </details>

# %%
STREAMS, STREAM_TOKENS, LONG = 8, 40, 1024


def among_streams(eng):
    """Eight streams, and a long prompt that comes when each has 12 tokens: outputs by name."""
    eng.trace.clear()
    for i in range(STREAMS):
        eng.add_request(f"stream {i}", tokens(16), exactly(STREAM_TOKENS))
    done = {}

    def step():
        done.update({out.request_id: out for out in eng.step() if out.finished})

    while len(eng.trace) == 0 or min(r.num_output for r in eng.trace[-1].requests) < 12:
        step()
    eng.add_request("long", tokens(LONG), exactly(2))
    while eng.has_unfinished_requests():
        step()
    return done


BUDGETS = (64, 128, 256, 512, 2048)
engines = {budget: engine(budget) for budget in BUDGETS}
m3 = engine(2048, milestone="m3")
for eng in (m3, *engines.values()):
    among_streams(eng)
step_composition(
    {
        "M3, in one piece": composition(m3.trace),
        "M4, a budget of 256": composition(engines[256].trace),
        "M4, a budget of 64": composition(engines[64].trace),
    },
    title="Tokens of each step",
)

# %% [markdown]
# ## 5. Who pays for a big chunk
#
# Now the same with a clock. The streams' times between tokens (ITL) are taken twice: *while the prompt is computed*,
# that is between its arrival and its first token, and over the *whole run*.
#
# **Predict.** Draw four curves over the budget before you run: the largest ITL, the 95th percentile while the prompt is
# computed, the 95th percentile of the whole run, and the long prompt's time to first token. Which of them fall, which
# rise? One of the four misleads. Which?
#
# <details><summary>Unfold after you have run the cells</summary>
#
# The largest ITL rises with the budget: a stream waits for all of the step that it is in. The time to first token
# falls: fewer passes, fewer reads of what is there already, fewer decodes in between. The 95th percentile of the whole
# run misleads. It rises while pauses are short and many, and *falls* as soon as they are long and few: with one pause
# in 39 gaps, 97 % of the gaps are short. It says that the largest budget is the best one for readers.
#
# Where p95 lies well above p50 while the prompt is computed, chunks of one size do not take one time: the last has the
# most keys to look at.
# </details>


# %%
def latencies(done):
    """Of the streams: gaps beside the long prompt, and all; and the long prompt's time to first token."""
    long = done["long"].metrics
    known = [done[f"stream {i}"].metrics.token_times for i in range(STREAMS)]
    gaps = [(a, b) for times in known for a, b in pairwise(times)]
    beside = [b - a for a, b in gaps if a < long.first_token_time and b > long.arrival_time]
    return {"beside": beside, "all": [b - a for a, b in gaps], "ttft": long.ttft}


def spread(values):
    """Median and ends of some repeats."""
    return {"median": median(values), "min": min(values), "max": max(values)}


runs = {budget: [] for budget in BUDGETS}
for _ in progress(range(REPEATS), "repeats"):
    for budget, eng in engines.items():
        runs[budget].append(latencies(among_streams(eng)))


def over(kind, q):
    """A percentile of each repeat, its spread for each budget."""
    return [spread([percentile(run[kind], q) for run in runs[b]]) for b in BUDGETS]


ttfts = {b: [run["ttft"] for run in runs[b]] for b in BUDGETS}
latency_by_chunk(
    BUDGETS,
    {
        "ITL of the streams": {
            "p50, while the prompt is computed": over("beside", 50),
            "p95, while the prompt is computed": over("beside", 95),
            "p95, whole run": over("all", 95),
        },
        "TTFT of the long prompt": {
            "p50": [spread([percentile(ttfts[b], 50)]) for b in BUDGETS],
            "p95": [spread([percentile(ttfts[b], 95)]) for b in BUDGETS],
        },
    },
    labels={2048: "all"},
    title="Eight streams, and a prompt of 1024 tokens",
)

# %%
MarkdownTable(
    ["budget", "largest ITL", "ITL p95, whole run", "TTFT of the long prompt"],
    [
        [
            budget,
            f"{1e3 * median(max(run['beside']) for run in runs[budget]):.0f} ms",
            f"{1e3 * over('all', 95)[i]['median']:.0f} ms",
            f"{1e3 * median(ttfts[budget]):.0f} ms",
        ]
        for i, budget in enumerate(BUDGETS)
    ],
)

# %% [markdown]
# You have promised your readers that no gap is longer than a tenth of a second, say. Which budget would you take on
# this machine? The largest that keeps the promise. Everything below it is paid by newcomers, for nothing.
#
# ## 6. Those who wait behind
#
# Nobody decodes. A prompt of 1024 tokens arrives, and right behind it three short ones. The budget is 256.
# `long_prefill_token_threshold` bounds what *one* request gets of a step.
#
# **Predict.** In which step does each get its first token without a threshold? And with one of 64?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# Without, the long prompt fills four steps, and nobody gets past it: everybody is served in the fourth or fifth. With
# 64, there is room for three others in the first step already, and they are done. The long one takes 16 steps instead
# of 4. It is no slower in total: the steps are shorter.
# </details>

# %%
rows = []
for threshold in (0, 64):
    eng = engine(256, long_prefill_token_threshold=threshold)
    eng.add_request("long", tokens(1024), exactly(2))
    for i in range(3):
        eng.add_request(f"short {i}", tokens(20), exactly(2))
    while eng.has_unfinished_requests():
        eng.step()
    first = {}
    for number, step in enumerate(eng.trace, start=1):
        for r in step.requests:
            if r.num_sampled:
                first.setdefault(r.request_id, number)
    rows.append(
        [
            threshold or "none",
            *(first[n] for n in ("long", "short 0", "short 1", "short 2")),
        ]
    )
MarkdownTable(
    ["threshold", "first token of long: step", "of short 0", "of short 1", "of short 2"],
    rows,
)

# %% [markdown]
# ## 7. What chunks cannot do
#
# It is often said that chunks let a prompt of 100,000 tokens run on a card of 24 GB.
#
# **Predict.** How much K/V does Llama-2-7B have for 100,000 tokens in 16 bits? What will our engine say to a prompt of
# 600 tokens, if its whole pool has 512 slots and its budget is 64?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# It is <!-- claim: kv-100k -->48.8 GiB<!-- /claim -->, however it is cut. Chunks bound what is held *during* a step,
# and how long it takes. The engine refuses such a prompt when it arrives. It would never fit, and in the line it would
# block everybody behind it.
# </details>

# %%
llama = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
print(f"100,000 tokens: {kv_bytes(llama, 100_000, dtype_bytes=2) / 2**30:.1f} GiB of K/V")
small = LLM(MODEL, dtype="float32", num_kv_blocks=32, max_num_batched_tokens=64)
try:
    small.generate([tokens(600)], exactly(4), use_tqdm=False)
except ValueError as error:
    print(error)

# %% [markdown]
# ## Three things to try
#
# 1. In section 5, let there be 60 streams, with a budget of 64. How many tokens of the long prompt does a step compute?
#    When does it get its first token, and what would you change, the budget or `max_num_seqs`?
# 2. In section 3, give the requests a temperature and a seed. Is the text the same for budgets of 64, 16 and 1024?
#    Which rule of chapter 6 would have to be broken to change it?
# 3. In section 5, choose the budget by this machine's numbers so that no stream waits longer than twice its usual gap.
#    Then double the length of the long prompt. Does the promise still hold, and why not?
