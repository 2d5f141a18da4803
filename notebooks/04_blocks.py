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
# # Lab 4: blocks
#
# In lab 3 requests shared forward passes, but not memory: each reserved as many tokens as the model allows, for all
# of its life, in one piece. In this lab you count what that costs, see why an operating system would never do it, and
# then take its answer: pages. You watch an allocator at work, read real block tables, share blocks and copy them on
# write, break a table on purpose, and see what an engine does when its blocks run out.
#
# It takes less than a minute on two cores and needs no network. Questions come before the cells that answer them:
# write your guess down, then run, then unfold.

# %%
MODEL = "folo-tiny"  # a bundled name, a local folder, or a hub id such as "Qwen/Qwen3-0.6B"
THREADS = 1
SEED = 0  # of the lengths in section 2, and of random weights

# %%
import random
from dataclasses import replace

import torch
from transformers import LlamaConfig

from folovllm import LLM, BeamSearchParams, SamplingParams
from folovllm.course.bench.workloads import draw, get_workload
from folovllm.course.glossary import default_prompts
from folovllm.course.lessons.allocators import Buddy
from folovllm.course.lessons.fragmentation import (
    POLICIES,
    capacity_of,
    draw_requests,
    paged_waste,
    region_waste,
    replay,
    translate,
)
from folovllm.course.viz.blocks import (
    TableState,
    block_map,
    block_tables,
    memory_shares,
    preemption_timeline,
    waste_by_block_size,
)
from folovllm.course.viz.notebook import MarkdownTable, progress
from folovllm.course.viz.panels import held_slots_panel
from folovllm.course.viz.sliders import slider_figure
from folovllm.kv_cache.block_manager import BlockManager
from folovllm.kv_cache.formulas import kv_bytes_per_token
from folovllm.request import Request

torch.set_num_threads(THREADS)
torch.set_grad_enabled(False)


def paged(block_size=8, num_kv_blocks=64, **settings):
    """An M3 engine with a small pool that notes the state of every block after each step."""
    return LLM(
        MODEL,
        milestone="m3",
        dtype="float32",
        max_model_len=256,
        block_size=block_size,
        num_kv_blocks=num_kv_blocks,
        trace_blocks=True,
        **settings,
    )


llm = paged()
questions = default_prompts(5)[1:]
prompts = llm.chat_prompts([[{"role": "user", "content": text}] for text in questions])
print("prompt tokens:", [len(p["prompt_token_ids"]) for p in prompts])

# %% [markdown]
# ## 1. What a reservation wastes
#
# A system that keeps each request's K/V in one contiguous region has to choose its length before the first token, and
# nobody knows how long an answer will be. So it takes the longest there could be, here 4096 tokens. A system with
# blocks takes a block of 16 tokens whenever the last one is full.
#
# **Predict.** A request ends with 100 tokens. What share of the region was for nothing? What share of the blocks? For
# which of the lengths below do blocks waste nothing at all?
#
# <details><summary>Unfold after you have run the cells</summary>
#
# 100 tokens in 4096 slots leave <!-- claim: erratum-paged-waste-region-100 -->97.6 %<!-- /claim --> empty. In blocks
# they take <!-- claim: blocks-100 -->7<!-- /claim -->, that is <!-- claim: slots-100 -->112<!-- /claim --> slots, of
# which <!-- claim: empty-100 -->12<!-- /claim --> are empty: <!-- claim: paged-waste-100 -->10.7 %<!-- /claim -->. It
# is 0 where the length is a multiple of 16. Blocks do not abolish *internal fragmentation* (room inside of what one
# has, and never uses); they bound it: less than one block per request, however long the request.
# </details>

# %%
MarkdownTable(
    ["tokens", "blocks of 16", "empty in the blocks", "empty in a region of 4096"],
    [
        [n, -(-n // 16), f"{paged_waste(n, 16):.2%}", f"{region_waste(n, 4096):.1%}"]
        for n in (100, 500, 1000, 2000)
    ],
)

# %% [markdown]
# What does that mean for the number of users? Llama-2-13B in 16 bits weighs 26 GB. Of a card of 40 GB, let 12 GiB be
# left for K/V.
#
# **Predict.** One token's K/V takes <!-- claim: kv-bytes-llama2-13b -->800 KiB<!-- /claim -->. How many requests can
# run at once if each reserves 2048 tokens? How many, if they are 500 tokens long and take blocks?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# There is room for <!-- claim: card-tokens -->15,728<!-- /claim --> tokens. Those
# are <!-- claim: card-regions -->7<!-- /claim --> regions of 2048, or <!-- claim: card-blocks -->983<!-- /claim -->
# blocks; a request of 500 tokens takes 32 blocks (not 31.25), and <!-- claim: card-requests -->30<!-- /claim --> of
# them run at once.
# </details>

# %%
llama_13b = LlamaConfig(hidden_size=5120, num_hidden_layers=40, num_attention_heads=40)
per_token = kv_bytes_per_token(llama_13b, dtype_bytes=2)
room = capacity_of(12 * 2**30, per_token, region=2048, block_size=16, num_tokens=500)
print(f"{per_token / 1024:.0f} KiB per token, room for {room.tokens:,} tokens")
print(f"{room.regions} requests at once in regions of 2048")
print(f"{room.requests} requests of 500 tokens in {room.blocks} blocks")

# %% [markdown]
# Regions of *different* lengths have another problem: they leave gaps. A **buddy allocator** (Linux hands out pages
# with one) keeps it in check: lengths are powers of two, a gap is halved until it just fits, and two free halves of
# one parent merge again. A textbook's example: of 128 MB, A takes 32, B takes 16, C takes 8, and A gives its 32 back.
#
# **Predict.** How much is free? Does a request for 64 MB fit? And after that, one for 33?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# 32 + 8 + 64 = <!-- claim: buddy-free -->104 MB<!-- /claim --> are free. The 64 that were never touched are in one
# piece, so 64 does fit. (If you found 112, or that 64 does not fit: so did others, in print. Draw the memory.)
# Then <!-- claim: buddy-left -->40 MB<!-- /claim --> are left, in pieces of 32 and 8, and 33 does not fit although 40
# are free: that is **external fragmentation**. Blocks know nothing of it. Each is as good as any other.
# </details>

# %%
memory = Buddy(128)
a, b, c = (memory.allocate(size) for size in (32, 16, 8))
memory.release(a)
print("gaps (start: MB):", dict(sorted(memory.gaps.items())), "free:", memory.num_free)
print("64 MB at:", memory.allocate(64))
print("free:", memory.num_free, "gaps:", dict(sorted(memory.gaps.items())))
print("33 MB at:", memory.allocate(33))

# %% [markdown]
# ## 2. Two hundred requests, four ways to hand out memory
#
# Now the same on a stream of requests, without a model: only lengths, arrivals and memory. There are 16,384 slots, a
# slot is room for one token. Lengths are drawn from lognormal distributions (most are short, a few very long), and a
# request's `max_tokens` is its true output rounded up to a power of two: nobody over-estimates by more than 2 x. The
# four policies:
#
# | policy | a request gets | what it has to know |
# |---|---|---|
# | `max` | a region of 2048 | nothing |
# | `pow2` | a region for prompt and `max_tokens`, rounded up to a power of two, from a buddy allocator | its limit |
# | `oracle` | a region of exactly its final length | the future |
# | `paged` | blocks of 16 from the engine's own `BlockManager`, one at a time | nothing |
#
# Every slot is one of these: **used** (a token's K/V), **reserved** (its owner will write it before the end),
# **internal** (its owner will never write it), **external** (free, and the next in line waits only because what is
# free lies in pieces), or plainly free.
#
# **Predict.** Rank the policies by their used share. The oracle makes no mistakes: is its used share 100 %? Which
# kind of waste can it not avoid?
#
# <details><summary>Unfold after you have run the cells</summary>
#
# The oracle reserves no slot in vain, and yet about half of the memory holds nothing. A request of 500 tokens holds
# 500 slots from its first step on, when it has written 50: *reserved* room is not lost, but it is empty for most of
# the request's life. And regions of all lengths leave gaps. Paging does better than the oracle while it knows less.
# The decisive thing is not to know the length but not to need it: what was contiguous no longer has to be.
#
# On the right are numbers of the vLLM paper, from other requests on other systems. The order is the same; the numbers
# are not ours, and need not agree.
# </details>

# %%
stream = draw_requests(200, seed=SEED)
runs = {policy: replay(stream, policy) for policy in progress(POLICIES, "replay")}
memory_shares(
    {policy: run.shares for policy, run in runs.items()},
    title=f"{runs['max'].capacity:,} slots under four policies",
)

# %%
MarkdownTable(
    ["policy", "used", "requests at once", "steps until all are done", "gave way"],
    [
        [
            policy,
            f"{run.shares['used']:.1%}",
            f"{run.mean_running:.1f}",
            len(run.steps),
            run.preemptions,
        ]
        for policy, run in runs.items()
    ],
)

# %% [markdown]
# `paged` pays a price that the others do not know: it admits a request before it knows that there will be room for
# all of it. When blocks run out somebody **gives way** (the last column). Section 6 shows what that means.
#
# ## 3. How large should a block be?
#
# **Predict.** A request's last block has 0 to B - 1 empty slots. How many on average, for B = 16? For B = 256? If
# small blocks waste less, what speaks for large ones?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# (B - 1) / 2, if all lengths modulo B are equally
# likely: <!-- claim: erratum-paging-removes-internal-mean -->7.5<!-- /claim --> and 127.5. That line is what speaks
# against large blocks, and at 16 it is already below 2 % of what requests hold. For them speaks that a table has fewer
# entries, that a kernel reads longer stretches, and that there are fewer books to keep. vLLM's default is 16. The
# prefix cache of M4 will add another reason not to make blocks large.
# </details>

# %%
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
by_size = [
    replay(stream, "paged", block_size=size) for size in progress(SIZES, "block sizes")
]


def empty_share(run):
    """Of all slots that requests held, those that were empty."""
    empty = sum(step.reserved + step.internal for step in run.steps)
    return empty / (empty + sum(step.used for step in run.steps))


waste_by_block_size(
    SIZES,
    [run.empty_per_request for run in by_size],
    [empty_share(run) for run in by_size],
    title="What a block size costs",
)

# %% [markdown]
# The same replays as they went, step by step: what requests hold, and what of it is written. In a running notebook the
# slider chooses the block size; where nothing runs, four of them stand side by side.
#
# **Predict.** The upper edge is what is held. Does it move when the block size does? What moves, and who pays for it?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# It hardly moves: as long as somebody waits, nearly all is held. What moves is the border below it. Of what is
# held, <!-- claim: empty-share-16 -->1.7 %<!-- /claim --> is empty with blocks of 16
# and <!-- claim: empty-share-256 -->22 %<!-- /claim --> with blocks of 256. Those who wait pay for it: 29 requests run
# at once instead of 36, so all of the 200 are done later.
# </details>


# %%
replays = dict(zip(SIZES, by_size, strict=True))
longest = max(len(run.steps) for run in by_size)


def with_blocks_of(ax, size):
    """One panel: held and written slots with blocks of this size."""
    return held_slots_panel(ax, replays[size], longest)


slider_figure(
    with_blocks_of,
    name="blocks of",
    values=SIZES,
    start=16,
    shown=(1, 16, 64, 256),
    title="200 requests in blocks",
)

# %% [markdown]
# ## 4. A block table is a page table
#
# An operating system gives each program addresses from 0 on, in one piece, and keeps the memory in pages wherever
# there is room. A table per program says which page lies in which frame.
#
# | operating system | engine |
# |---|---|
# | program | request |
# | virtual address | position of a token |
# | page | logical block |
# | frame | physical block |
# | page table | block table |
# | the MMU looks it up at every access | the attention kernel looks it up at every read |
# | a page fault brings a page in | a request whose last block is full asks for another one |
# | fork, copy-on-write | parallel samples, beams |
#
# **Predict.** Pages of 4096 bytes, page 2 lies in frame 3: where is address 10,000? And with blocks of 16 tokens and
# the block table [7, 2, 9]: in which slot is token 37?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# 10,000 = 2 × 4096 + 1808, so it is on page 2 at offset 1808, and frame 3 begins at
# 12,288: <!-- claim: page-physical -->14,096<!-- /claim -->. And 37 = 2 × 16 + 5, so it is slot 5 of block
# 9: <!-- claim: slot-of-37 -->149<!-- /claim -->. It is the same function. (The analogy ends where an operating system
# would load a missing page at the moment of the access. A kernel cannot stop and wait; the scheduler provides all
# blocks *before* the step.)
# </details>

# %%
print("address 10,000 lies at", translate(10_000, page_size=4096, table={0: 2, 1: 5, 2: 3}))
print("token 37 lies in slot", translate(37, page_size=16, table=[7, 2, 9]))

# %% [markdown]
# Tables can do what regions cannot: two of them may name the same block. Below is the engine's `BlockManager` itself,
# with six blocks of four slots. Request `a` has six tokens. Then `b` is forked from its first five.
#
# **Predict.** How many blocks does the fork take? `b` writes its own sixth token next. Why can it not write where `a`
# has its sixth? What has to happen, and how many of `b`'s blocks are its own then?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# The fork takes none: two reference counts become 2. To write into a block that somebody else reads would change the
# other's past. So `b` gets a copy of that one block and writes there: *copy-on-write*. Full blocks are never written
# again and stay shared for good. Note that sharing alone is not copy-on-write: without reference counts nobody would
# know when to copy, or when a block is free.
# </details>

# %%
books = BlockManager(num_blocks=6, block_size=4)
a, b = (Request(name, [0] * 6, SamplingParams(), (), max_model_len=64) for name in "ab")
text = ["the", "cat", "sat", "on", "the", "mat"]

books.cache_blocks(books.allocate_slots(a, 6))
states = {"a has six tokens": TableState(books.snapshot(), {"a": text})}
books.fork(a, b, num_tokens=5)
states["b is forked from five of them"] = TableState(
    books.snapshot(), {"a": text, "b": text[:5]}
)
plan = books.allocate_slots(b, 1)
books.cache_blocks(plan)
states["b writes a sixth token of its own"] = TableState(
    books.snapshot(),
    {"a": text, "b": [*text[:5], "hat"]},
    copies=[(op.src, op.dst) for op in plan.ops],
)
block_tables(states, title="Fork and copy-on-write")

# %% [markdown]
# The same in a real run: three samples (`n=3`) of one prompt of 16 tokens, in blocks of four. The first sample
# computes the prompt; the other two start as forks of its first 15 tokens and compute the last one themselves, since
# its logits are what each of them draws its first token from.
#
# **Predict.** How many of the prompt's four blocks stay shared? How many blocks are copied? What happens to the
# shared ones when the first sample is done before the others?
#
# <details><summary>Unfold after you have run the cells</summary>
#
# Three stay shared, crossed in the map. The fourth is copied twice, once for each of the other samples. Cells have
# the colour of the first holder; when that one is gone the blocks pass to the next colour: they are free when the
# *last* holder lets go. (The map shows the state after each step, so in the last column everything is free.)
# </details>

# %%
sampler = paged(block_size=4, num_kv_blocks=18)
(output,) = sampler.generate(
    [prompts[0]],
    SamplingParams(n=3, temperature=2.0, seed=2, max_tokens=12),
    use_tqdm=False,
)
trace = sampler.engine.trace
ids = list(dict.fromkeys(r.request_id for step in trace for r in step.requests))
block_map(
    trace,
    labels={request_id: str(i) for i, request_id in enumerate(ids)},
    title="Three samples of one prompt",
)

# %%
for completion in output.outputs:
    print(f"sample {completion.index}: {completion.text!r}")
print("blocks copied:", sampler.engine.stats.copied_blocks)
print(
    f"sharing saves up to {max(step.kv.sharing_saves for step in trace):.0%} of the blocks"
)
(beams,) = sampler.beam_search([prompts[0]], BeamSearchParams(beam_width=4, max_tokens=12))
print(f"with a beam search of width 4: up to {beams.kv_saved:.0%}")

# %% [markdown]
# ## 5. A table that lies
#
# How much depends on the table? The next cell puts something between scheduler and runner that changes every block
# table on its way: four ways to rewire the engine. Weights are random, so that no token is certain (lab 2 has shown
# why), and the output is compared with the unchanged engine's.
#
# 1. **renamed**: every block gets another number, in all tables alike.
# 2. **full blocks shuffled**: in decode steps, all of a table's blocks but the last are in another order.
# 3. **reversed**: the table is read from back to front, in every step.
# 4. **a neighbour's block**: in decode steps, a table begins with the first block of somebody else's.
#
# **Predict.** Which of them give wrong tokens? Where one does: from which token on? One of the answers will surprise
# you.
#
# <details><summary>Unfold after you have run the cell</summary>
#
# *renamed* is right: a physical block's number means nothing, as long as writer and reader agree. *A neighbour's
# block* is wrong from the first decode on, or soon after.
#
# *Full blocks shuffled* is right too! A decode's query attends to all keys, softmax sums over a set, and each key
# carries its position inside (RoPE turned it before it was stored). The order of what is read does not matter, except
# at the end, where the table is cut off at the length of the text. (In a prefill it would matter: the causal mask
# goes by position in the table.) So a test that shuffles a table has to know what it is testing.
#
# *reversed* is right for a while: writer and reader agree, until the table grows. Then every entry means another
# block. The prompts have 16, 17, 21 and 17 tokens, and blocks 8 slots, so the tables grow at position 16 or 24. The
# token that is sampled there is number 1 (16 - 16 + 1), 8, 4 and 8, counted from 0, and the first that can be wrong.
# (It need not be: even a wrong sum can have the right maximum.)
# </details>


# %%
class Rewired:
    """A runner whose requests get `change(share)` for a block table."""

    def __init__(self, runner, change):
        self.runner, self.change = runner, change
        self.update_states = runner.update_states

    def execute_model(self, step):
        shares = [
            replace(share, plan=replace(share.plan, block_table=self.change(share)))
            for share in step.scheduled
        ]
        return self.runner.execute_model(replace(step, scheduled=shares))


names = list(range(1, 65))
random.Random(SEED).shuffle(names)
first_blocks = {}  # request id -> its first block


def renamed(share):
    return tuple(names[block - 1] for block in share.plan.block_table)


def full_blocks_shuffled(share):
    *full, last = share.plan.block_table
    return (*reversed(full), last) if share.num_tokens == 1 else share.plan.block_table


def reversed_table(share):
    return share.plan.block_table[::-1]


def neighbours_block(share):
    own, *rest = share.plan.block_table
    first_blocks[share.request_id] = own
    if share.num_tokens > 1:
        return share.plan.block_table
    return (next(b for r, b in first_blocks.items() if r != share.request_id), *rest)


def outputs_with(change=None, load_format="dummy"):
    """The outputs of the four prompts, with tables as `change` gives them."""
    subject = paged(load_format=load_format, seed=SEED)
    core = subject.engine.core
    if change is not None:
        core.runner = Rewired(core.runner, change)
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    return [out.outputs[0] for out in subject.generate(prompts, params, use_tqdm=False)]


def first_difference(tokens, expected):
    """The number of the first output token that differs, from 0."""
    pairs = zip(tokens, expected, strict=True)
    return next((str(i) for i, (ours, right) in enumerate(pairs) if ours != right), "none")


right = outputs_with()
arms = {
    "renamed": renamed,
    "full blocks shuffled": full_blocks_shuffled,
    "reversed": reversed_table,
    "a neighbour's block": neighbours_block,
}
rows = []
for name, change in arms.items():
    wrong = outputs_with(change)
    found = [
        first_difference(x.token_ids, y.token_ids)
        for x, y in zip(wrong, right, strict=True)
    ]
    rows.append([name, *found])
MarkdownTable(["first wrong token", *(f"request {i}" for i in range(4))], rows)

# %% [markdown]
# With the bundled model's own weights the same mistake can be read:

# %%
print("right:   ", outputs_with(load_format="auto")[0].text)
print("reversed:", outputs_with(reversed_table, load_format="auto")[0].text)

# %% [markdown]
# ## 6. When blocks run out
#
# Four requests with 32 tokens of output need 25 blocks of 8 in the end. This pool has 14. All four prompts fit, so
# all four are admitted; some steps later a request needs a block and none is free. Then the one that **came last
# gives way**: it leaves the pool and goes to the front of the line. Its tokens are kept. Its K/V is either dropped
# and computed again later (`recompute`), or copied to the host and back (`swap`).
#
# **Predict.** Who gives way first? How long does it wait? Do the tokens of anybody change? Which mode computes more
# prompt tokens?
#
# <details><summary>Unfold after you have run the cells</summary>
#
# `d` gives way, and then `c`. They come back when the first two are done. Nobody's tokens change: the K/V that is
# computed again is that of the same tokens, and a copy is a copy. The steps are the same in both modes; what differs
# is what the return costs: a step over the whole text so far (blue with a plus), or as many block copies as it had
# blocks. Which one is cheaper depends on the model, the length and the bus;
# `python -m folovllm.course.measure blocks` measures it here.
# </details>

# %%
LETTERS = "abcd"
answer = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)


def run(subject):
    """Serve the four prompts under the names a to d: the tokens of each."""
    for name, prompt in zip(LETTERS, prompts, strict=True):
        subject.engine.add_request(name, prompt, answer)
    done = subject.engine.run_to_completion(list(LETTERS))
    return [done[name].outputs[0].token_ids for name in LETTERS]


expected = run(paged(num_kv_blocks=64))
tight, rows = {}, []
for mode in ("recompute", "swap"):
    subject = paged(num_kv_blocks=14, preemption_mode=mode, swap_space=0.01)
    same = run(subject) == expected
    tight[mode] = list(subject.engine.trace)
    stats = subject.engine.stats
    rows.append(
        [
            mode,
            "yes" if same else "NO",
            stats.preemptions,
            stats.steps,
            stats.prompt_tokens_computed,
            stats.swapped_out_blocks + stats.swapped_in_blocks,
        ]
    )
block_map(tight["swap"], title="14 blocks for four requests, with a host to swap to")

# %%
MarkdownTable(
    [
        "mode",
        "same tokens as with room",
        "gave way",
        "steps",
        "prompt tokens computed",
        "blocks moved",
    ],
    rows,
)

# %%
preemption_timeline(tight, LETTERS, title="Who gives way, and how it comes back")

# %% [markdown]
# ## 7. Sixteen at once
#
# Back to lab 3's engine. Both get the same memory: 4096 tokens of K/V. M2 cuts it into regions of `max_model_len`, M3
# into 256 blocks of 16. The requests are those of the benchmark `w2`: 16 at once, 32 to 256 tokens in, 16 to 128 out.
#
# **Predict.** With `max_model_len=1024`, how many run at once in M2? In M3, what decides? The prompts have 2452
# tokens together, and prompts and outputs 3553.
#
# <details><summary>Unfold after you have run the cell</summary>
#
# 4096 / 1024 = 4 in M2, whatever the requests look like: the others wait while most of the reserved room stays empty.
# In M3 it is the sum of what they *have*: all 16 fit, though not from the first step on, because a step takes in at
# most 2048 tokens of prompts. More company per forward means fewer forwards, and lab 0 has measured what that is
# worth.
# </details>

# %%
w2 = draw(get_workload("w2"), vocab_size=2048)
wishes = [
    SamplingParams(temperature=0, max_tokens=r.max_tokens, ignore_eos=True) for r in w2
]
rows, tokens = [], {}
for milestone in ("m2", "m3"):
    subject = LLM(
        MODEL,
        milestone=milestone,
        dtype="float32",
        max_model_len=1024,
        num_kv_blocks=256,
        block_size=16,
    )
    done = subject.generate([r.prompt_token_ids for r in w2], wishes, use_tqdm=False)
    tokens[milestone] = [out.outputs[0].token_ids for out in done]
    stats, kv = subject.engine.stats, [step.kv for step in subject.engine.trace]
    rows.append(
        [
            milestone,
            stats.max_running,
            stats.forwards,
            max(usage.reserved for usage in kv),
            max(usage.used for usage in kv),
        ]
    )
print("same tokens:", tokens["m2"] == tokens["m3"])
MarkdownTable(
    [
        "milestone",
        "requests at once",
        "forwards",
        "slots held at most",
        "of them used at most",
    ],
    rows,
)

# %% [markdown]
# ## Three things to try
#
# 1. In section 2, let requests come slowly: `draw_requests(200, rate=0.02)`. Who waits now under `paged`, and who
#    under `max`? What are shares "over busy steps" worth when few steps are busy?
# 2. In section 4, sample from `prompts[1]`, which has 17 tokens or more. For which prompt lengths is no block copied
#    at all?
# 3. In section 7, give M3 half of the memory, `num_kv_blocks=128`. How many run at once now, what does
#    `stats.preemptions` say, and how many forwards does it take beside M2 with all of it?
