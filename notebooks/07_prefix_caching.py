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
# # Lab 7: prefix caching
#
# Twenty requests begin with the same system prompt, and an engine without a memory computes it twenty times. In this
# lab you build the names by which blocks are found again, leave parts of them out and see what goes wrong, look for the
# tokens that no cache finds, and follow a block from its last use to its end.
#
# It takes less than a minute on two cores and needs no network. Questions come before the cells that answer them:
# write your guess down, then run, then unfold.

# %%
MODEL = "folo-tiny"  # a bundled name, a local folder, or a hub id such as "Qwen/Qwen3-0.6B"
THREADS = 1
SEED = 0  # of the random prompts

# %%
import random
from itertools import takewhile

import torch

from folovllm import LLM, SamplingParams
from folovllm.course.glossary import default_prompts
from folovllm.course.viz.chunks import composition, step_composition
from folovllm.course.viz.notebook import MarkdownTable, progress
from folovllm.course.viz.panels import REUSE_KINDS, reuse_panel
from folovllm.course.viz.prefix import hash_tree, hit_rate_by_prefix, lru_order
from folovllm.course.viz.sliders import slider_figure
from folovllm.kv_cache.block_manager import BlockManager
from folovllm.kv_cache.prefix_cache import PrefixCache, hash_block
from folovllm.request import Request

torch.set_num_threads(THREADS)
torch.set_grad_enabled(False)
rng = random.Random(SEED)


def engine(block_size=16, num_kv_blocks=600, **settings):
    """An M4 engine."""
    room = {"max_model_len": 1024, "max_num_seqs": 32} | settings
    return LLM(
        MODEL, dtype="float32", block_size=block_size, num_kv_blocks=num_kv_blocks, **room
    )


def put_in(llm, cache=PrefixCache, books=BlockManager):
    """Give an engine that has not run yet other books, or another index of blocks."""
    scheduler = llm.engine.core.scheduler
    size = scheduler.kv.block_size
    scheduler.kv = books(scheduler.kv.pool.num_blocks, size, cache=cache(size))
    return llm


def tokens(count):
    """A prompt without any sense."""
    return [rng.randrange(2048) for _ in range(count)]


def answers(llm, prompts, count=8):
    """Each request's tokens, and how many of its prompt's were found."""
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    done = llm.generate(prompts, params, use_tqdm=False)
    return [out.outputs[0].token_ids for out in done], [
        out.num_cached_tokens for out in done
    ]


# %% [markdown]
# ## 1. A name that says what came before
#
# Four prompts, in blocks of four words. For this section a word is a token.
#
# **Predict.** How many *full* blocks do the four prompts have together, and how many different keys do these get? Which
# two blocks have the same words and different keys?
#
# <details><summary>Unfold after you have run the cells</summary>
#
# They have eight full blocks and five keys. "You are a helpful" opens three prompts, "poet . Sing of" follows it in
# two. The same words also stand in `d`, after another beginning. Their K/V is another one, and so is their key, because
# it contains the key of the block before. The rests of the prompts, dotted, have no key.
# </details>

# %%
PROMPTS = {
    "a": "You are a helpful poet . Sing of rain",
    "b": "You are a helpful poet . Sing of the sea .",
    "c": "You are a helpful cook . How do I boil",
    "d": "Write as a drunken poet . Sing of gin",
}
number = {}  # word -> token id
ids = {
    name: [number.setdefault(word, len(number)) for word in text.split()]
    for name, text in PROMPTS.items()
}


def chain(prompt, size=4):
    """The keys of a prompt's full blocks."""
    keys = [b"a secret of this lab"]
    for start in range(0, len(prompt) - size + 1, size):
        keys.append(hash_block(keys[-1], prompt[start : start + size], ""))
    return keys[1:]


keys = {name: chain(prompt) for name, prompt in ids.items()}
for name, own in keys.items():
    print(name, [key.hex()[:6] for key in own])
print(
    "full blocks:", sum(map(len, keys.values())), "keys:", len(set().union(*keys.values()))
)

# %%
books, texts, tails = BlockManager(16, 4, cache=PrefixCache(4)), {}, {}
for name, prompt in ids.items():
    request, words = Request(name, prompt, SamplingParams(), (), 64), PROMPTS[name].split()
    plan = books.allocate_slots(request, len(prompt) - books.get_computed_blocks(request))
    books.cache_blocks(plan)
    for i, block in enumerate(plan.block_table):
        part = words[4 * i : 4 * i + 4]
        if len(part) == 4:
            texts[block] = " ".join(part)
        else:
            tails[name] = " ".join(part)
hash_tree(books.snapshot(), texts, tails, title="Four prompts in one pool")

# %% [markdown]
# What if the key did not contain the block before? Let us break the engine in two steps. `no parent in the key` hashes
# a block's own tokens only, but still compares the block before on a hit. `nothing but the tokens` does not compare it
# either. Eight times, four prompts of two blocks and a bit come one after the other: A P, then B Q, then A Q, and then
# B Q once more.
#
# **Predict.** What does the third one find, and what should it find? Which of the two engines makes wrong tokens, and
# what does the other one lose?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# The third finds A, and rightly nothing more: nobody has computed Q after A. Without the comparison it takes the block
# that was computed after B, and its text goes on from a mixture of two pasts: no error, and sometimes wrong tokens.
# With the comparison it stays right, but there is room for one Q in the index, and the fourth finds that its own was
# replaced. So the chained key makes a cache *good*, and the comparison makes it *safe*. The engine has both.
# </details>


# %%
class NoParent(PrefixCache):
    """Keys of a block's own tokens."""

    def __init__(self, block_size):
        super().__init__(
            block_size, hash_block=lambda parent, own, salt: hash_block(b"", own, salt)
        )


class Careless(NoParent):
    """The same, and a hit does not look at the block before."""

    def find(self, request, num_blocks):
        """The longest chain of keys that are there."""
        entries = (self._entries.get(key) for key, _ in self._chain(request, 0, num_blocks))
        return list(takewhile(lambda entry: entry is not None, entries))


cases = []
for _ in range(8):
    a, b, p, q, rest = tokens(16), tokens(16), tokens(16), tokens(16), tokens(4)
    cases.append(([*a, *p, *rest], [*b, *q, *rest], [*a, *q, *rest], [*b, *q, *rest]))


def third_and_fourth(llm):
    """The answers to the third prompts, and how many tokens the third and the fourth have found."""
    third, found = [], []
    for case in cases:
        llm.reset_prefix_cache()
        outs = [answers(llm, [prompt]) for prompt in case]
        third.append(outs[2][0])
        found.append((outs[2][1][0], outs[3][1][0]))
    return third, found


right, _ = third_and_fourth(engine(enable_prefix_caching=False))
rows = []
for name, kind in {
    "chained, compared": PrefixCache,
    "no parent in the key": NoParent,
    "nothing but the tokens": Careless,
}.items():
    got, found = third_and_fourth(put_in(engine(), kind))
    rows.append([name, *found[0], sum(x == y for x, y in zip(got, right, strict=True))])
MarkdownTable(
    ["keys", "found by the third", "by the fourth", "right answers of the third, of 8"],
    rows,
)

# %% [markdown]
# ## 2. What is found
#
# Twenty prompts of 64 tokens begin with the same `s` tokens and then differ.
#
# **Predict.** Draw the share of all prompt tokens that is found, over `s`, for blocks of 4 and of 16. Where does it
# jump? How high can it get at `s` = 64, when all prompts are the same?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# It jumps where another block is full: a common beginning of 15 tokens shares nothing in blocks of 16. The dotted line
# is what blocks of one token would give. At 64 the others stay below it: the last token of a prompt is always computed,
# and with it its whole block.
# </details>

# %%
LENGTHS = (0, 4, 8, 12, 15, 16, 17, 24, 31, 32, 40, 48, 56, 63, 64)
rates = {}
for size in progress((4, 16), "block sizes"):
    llm = engine(block_size=size)
    rates[size] = []
    for shared in LENGTHS:
        llm.reset_prefix_cache()
        begin = tokens(shared)
        prompts = [begin + [i, *tokens(64)][: 64 - shared] for i in range(20)]
        rates[size].append(sum(answers(llm, prompts, 1)[1]) / (20 * 64))
hit_rate_by_prefix(LENGTHS, rates, 64, 20, title="Twenty prompts of 64 tokens")

# %% [markdown]
# The tokens behind one point of these lines: a prompt of 64, the same beginning as an earlier one, in blocks of four
# sizes. In a running notebook the slider is the length of the common beginning; where nothing runs, four lengths stand
# one below the other.
#
# **Predict.** At 31, at 32, at 64: which tokens are shared and computed all the same (yellow), in blocks of 16 and of
# 32? Is there a length at which every block size finds the same?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# At 31, blocks of 16 find 16 tokens and compute the next 15 although they are shared; blocks of 32 find none. At 32
# both find 32: yellow is gone, and so it is for every size, since 4, 8, 16 and 32 divide 32. At 64 yellow comes back:
# each size computes its own last block, so the larger the block, the dearer is the full hit. The sizes agree below 4,
# where none finds anything, and from 32 to 35.
# </details>

# %%
slider_figure(
    lambda ax, shared: reuse_panel(ax, shared, 64, (4, 8, 16, 32)),
    name="common beginning of",
    values=range(65),
    start=24,
    shown=(15, 31, 32, 64),
    height=1.35,
    columns=1,
    kinds=REUSE_KINDS,
    title="What a prompt of 64 tokens finds",
)

# %% [markdown]
# **Predict.** A prompt comes twice. How many of its tokens are found the second time, in blocks of 16, if it has 15,
# 16, 17, 32, 33 tokens? Which of these numbers would be another one in an engine that forgets the full hit?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# 0, 0, 16, 16 and 32. At 16 and 32 everything is there, and something has to be computed for the logits; it is a whole
# block, since nobody may write into a shared one. An engine that forgets this would find 16 and 32 there, have nothing
# to compute, and sample from nothing.
# </details>

# %%
llm = engine()
rows = []
for length in (15, 16, 17, 32, 33):
    prompt = tokens(length)
    (first,), _ = answers(llm, [prompt])
    (second,), (found,) = answers(llm, [prompt])
    rows.append([length, found, length - found, "yes" if first == second else "NO"])
MarkdownTable(["tokens", "found the second time", "computed", "same answer"], rows)

# %% [markdown]
# ## 3. Twenty requests with one system prompt
#
# All twenty come in the same moment, with a system prompt and a question each. Three engines: without a cache; with one
# that finds a block when the forward that wrote it is over (`WrittenOnly`, our control arm); and M4, which also finds
# what *this very* forward will write.
#
# **Predict.** The system prompt has some 200 tokens, and the budget is 2048: enough for nine prompts and a part of the
# tenth. How often does each engine compute the system prompt? And with a budget of 8192?
#
# <details><summary>Unfold after you have run the cells</summary>
#
# Twenty times, ten times, and once. The control arm admits as many as fit into the first step, and each computes all of
# its prompt, because nothing is written yet. The larger the budget, the worse: with 8192 all twenty are in the first
# step, and its cache finds nothing at all. In M4 the second request of a step finds the blocks that the first one is
# about to fill. Each layer stores the K/V of all rows before any of them looks.
# </details>

# %%
SYSTEM = (
    "You are the assistant of a course on inference engines. Answer in one or two plain sentences. "
    "Say what a thing is before you say what it is good for. Give a number where there is one. "
) * 4
llm = engine()
shared = [
    llm.engine.tokenizer.encode(SYSTEM + question) for question in default_prompts(20)
]
print("tokens:", [len(prompt) for prompt in shared])


class WrittenOnly(PrefixCache):
    """Finds a block only when the forward that writes it is over."""

    def find(self, request, num_blocks):
        """Entries up to the first that is pending."""
        pending = [entry for entries in self._pending.values() for entry in entries]
        return list(
            takewhile(lambda entry: entry not in pending, super().find(request, num_blocks))
        )


def three_engines(budget, **settings):
    """Without a cache, the control arm, and M4."""
    none = engine(max_num_batched_tokens=budget, enable_prefix_caching=False, **settings)
    written = put_in(engine(max_num_batched_tokens=budget, **settings), WrittenOnly)
    return {
        "no cache": none,
        "finds what is written": written,
        "M4": engine(max_num_batched_tokens=budget, **settings),
    }


rows, served = [], {}
for budget in (2048, 8192):
    for name, llm in three_engines(budget).items():
        got, found = answers(llm, shared)
        served[budget, name] = (got, llm)
        stats, trace = llm.engine.stats, llm.engine.trace
        ttft = sum(s.duration for s in trace if s.num_prefills)
        rows.append(
            [
                name,
                budget,
                stats.prompt_tokens_computed,
                stats.cached_tokens,
                f"{1e3 * ttft:.0f} ms",
            ]
        )
print("same tokens everywhere:", len({str(got) for got, _ in served.values()}) == 1)
MarkdownTable(
    ["engine", "budget", "prompt tokens computed", "found", "time of steps with prompts"],
    rows,
)

# %%
step_composition(
    {
        name: composition(served[2048, name][1].engine.trace)
        for name in ("no cache", "finds what is written", "M4")
    },
    share_scale=True,
    title="Twenty requests with one system prompt",
)

# %% [markdown]
# ## 4. Who is evicted
#
# A pool of twelve blocks of four tokens. Five requests, each alone: `a` and `b` with 13 tokens, then `a'`, which begins
# with the first 8 of `a`, then `c` with 14 and `d` with 9. Each gets three tokens of answer.
#
# **Predict.** When `a` is done, in which order do its three full blocks stand in the line of free ones? Whose block is
# the first to be lost, and in which request's turn? Which blocks of `a` are left in the end?
#
# <details><summary>Unfold after you have run the cells</summary>
#
# a2, a1, a0: the last block stands first in line. Then `a'` finds a0 and a1 and puts them back at the end; a2 stays
# where it is, and is the first to go, when `c` needs four blocks. After it b2 and b1 go, for `d`. a0 and a1 are still
# there: they have been used later than b's.
# </details>

# %%
a, b, c, d = tokens(13), tokens(13), tokens(14), tokens(9)
sequence = {"a": a, "b": b, "a'": a[:8] + tokens(5), "c": c, "d": d}


def one_by_one(llm, prompts):
    """Each request alone: how many tokens it finds."""
    return [answers(llm, [prompt], 3)[1][0] for prompt in prompts]


tiny = {"block_size": 4, "num_kv_blocks": 12, "max_model_len": 48, "trace_blocks": True}
llm = engine(**tiny)
one_by_one(llm, sequence.values())
lru_order(
    llm.engine.trace,
    labels=dict(zip("01234", sequence, strict=True)),
    title="The line of free blocks",
)

# %% [markdown]
# Why the tail first? The other order, as a control arm: blocks are given back from the head to the tail.
#
# **Predict.** After the same five requests, `b` comes once more. How many tokens does it find in each engine?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# Tail first, b0 is left, so 4 tokens are found. Head first, b0 was the first of its blocks to go. b2 is still in the
# pool, but a lookup begins at the beginning and finds nothing. It holds room, and can never be found again.
# </details>


# %%
class HeadFirst(BlockManager):
    """Gives blocks back in the wrong order."""

    def free(self, request):
        """The first block goes first."""
        table = self._tables.get(request.request_id)
        if table is not None:
            table.blocks.reverse()
        super().free(request)


rows = []
for name, kind in {"tail first": BlockManager, "head first": HeadFirst}.items():
    llm = put_in(engine(**tiny), PrefixCache, kind)
    one_by_one(llm, sequence.values())
    left = len(llm.engine.trace[-1].blocks.cached)
    rows.append([name, left, *one_by_one(llm, [b])])
MarkdownTable(["order", "blocks in the cache before", "tokens of b found"], rows)

# %% [markdown]
# ## 5. A chat, a stranger, and one who gave way
#
# Three turns of a chat: each prompt is all that was said so far, and something new. Then the first prompt again, from
# somebody with another salt. Blocks have 4 tokens.
#
# **Predict.** The first prompt has 20 tokens, each answer 8, and each new question 10. How many tokens does the second
# turn find? (The last token of an answer is never fed to the model.) And the stranger?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# When the first turn is done, 27 tokens have K/V: 20 of the prompt and 7 of the answer. That is six full blocks, 24
# tokens, four of them of the answer. The third turn has 56 tokens and finds 44, for the same reason. The stranger finds
# nothing, although the tokens are the same: the salt is in every key.
# </details>

# %%
llm = engine(block_size=4)
said, rows = tokens(20), []
first_prompt = list(said)
for turn in (1, 2, 3):
    (answer,), (found,) = answers(llm, [said])
    rows.append([f"turn {turn}", len(said), found])
    said = said + answer + tokens(10)
stranger = {"prompt_token_ids": first_prompt, "cache_salt": "somebody else"}
rows.append(["the stranger", len(first_prompt), *answers(llm, [stranger])[1]])
MarkdownTable(["prompt", "tokens", "found"], rows)

# %% [markdown]
# Last, four requests in a pool that cannot hold them all (lab 4, section 6). Whoever gives way loses its blocks and
# computes its text again, later.
#
# **Predict.** With a cache, are its blocks lost? Which of them could it find when it returns? Is its output among them?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# They are free, and still cached, until somebody takes them; the tail goes first. What is left is found, output
# included, so fewer tokens are computed again. The pool has no room to spare here, and still some blocks survive.
# </details>

# %%
crowd = [tokens(n) for n in (16, 17, 21, 17)]
rows, texts_of = [], []
for name, caching in {"without the cache": False, "with it": True}.items():
    llm = engine(
        block_size=4, num_kv_blocks=30, max_model_len=96, enable_prefix_caching=caching
    )
    got, _ = answers(llm, crowd, 24)
    texts_of.append(got)
    computed = sum(step.num_scheduled_tokens for step in llm.engine.trace)
    rows.append([name, llm.engine.stats.preemptions, computed, llm.engine.stats.steps])
print("same tokens:", texts_of[0] == texts_of[1])
MarkdownTable(["engine", "gave way", "tokens computed", "steps"], rows)

# %% [markdown]
# ## Three things to try
#
# 1. In section 3, put a word that is different for everybody in *front* of the system prompt: `f"{i}. " + SYSTEM`.
#    What is left of the hits, and where should such a word stand?
# 2. In section 4, send `a` once more between `c` and `d`. What is lost now, in which order, and why?
# 3. In section 3, give the engines a `long_prefill_token_threshold` of 64, so that the twenty are computed side by
#    side, a chunk each. How often is the system prompt computed now? What would a scheduler have to do about it?
