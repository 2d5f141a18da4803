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
# # Lab 3: continuous batching
#
# In lab 0 company made tokens cheap, and in lab 2 everybody waited while one request ran. M2 lets requests share
# forward passes, and decides **anew at every step** who shares the next one. In this lab you watch 16 requests go
# through static, dynamic and continuous batching, count the cells that padding fills with nobody, see who waits under
# three policies, and find out which part of the gain is *scheduling* and which is *batching*.
#
# It takes about a minute on two cores and needs no network. Questions come before the cells that answer them: write
# your guess down, then run, then unfold.

# %%
MODEL = "folo-tiny"  # a bundled name, a local folder, or a hub id such as "Qwen/Qwen3-0.6B"
THREADS = 1  # one core gives the steadiest times
SEED = 3  # of the 16 requests
SEATS = 4  # requests that run at once, until section 5 changes it
ROUNDS = 3  # of every comparison of speeds

# %%
import random
from dataclasses import replace
from itertools import accumulate
from statistics import fmean

import torch

from folovllm import LLM, SamplingParams
from folovllm.course.bench.engines import EngineServer
from folovllm.course.bench.peers import run_dynamic, run_static
from folovllm.course.bench.report import spread
from folovllm.course.bench.workloads import BenchRequest
from folovllm.course.viz.batching import (
    batch_gantt,
    depth_of_trace,
    lives_from_batches,
    lives_from_trace,
    queue_depth,
    ratio_bars,
    starvation,
    throughput_by_batch,
    waiting_times,
)
from folovllm.course.viz.notebook import MarkdownTable, progress
from folovllm.course.viz.padding import (
    batch_rectangle,
    kv_cells_of_static,
    kv_cells_of_trace,
    padding_growth,
    padding_map,
    padding_over_steps,
)
from folovllm.course.viz.panels import STEP_KINDS, static_step_panel
from folovllm.course.viz.sliders import slider_figure

torch.set_num_threads(THREADS)
torch.set_grad_enabled(False)


def server(milestone="m2", **settings):
    """An engine that serves lists of requests and says when each token came."""
    llm = LLM(MODEL, milestone=milestone, dtype="float32", max_model_len=128, **settings)
    return EngineServer(llm, llm.engine.core.runner.model.device.type)


m2 = server(max_num_seqs=SEATS)
model = m2.llm.engine.core.runner.model

rng = random.Random(SEED)
requests = []
for _ in range(16):
    prompt = [rng.randrange(model.config.vocab_size) for _ in range(rng.randint(4, 24))]
    requests.append(BenchRequest(prompt, min(48, 4 + int(rng.expovariate(1 / 12)))))
prompt_lens = [len(r.prompt_token_ids) for r in requests]
max_tokens = [r.max_tokens for r in requests]
print("prompt tokens:", prompt_lens)
print("output tokens:", max_tokens, "=", sum(max_tokens))

# %% [markdown]
# Most outputs are short and a few are long. All prompts are made-up ids, decoding is greedy and no end-of-text token
# ends an output, so every system below does the same work.
#
# ## 1. Sixteen requests at once
#
# **Static batching** takes four requests, pads them into one rectangle, and runs until the longest of the four is
# done; then it takes the next four. (Here it is Hugging Face's `generate`.) **Continuous batching** also runs four at
# a time. But after every step it asks who is done, and gives a free seat to the next in line: Orca (Yu et al., OSDI
# 2022) called it *iteration-level scheduling*.
#
# **Predict.** Both have four seats. How many steps does static batching take: what sum is it? How many are the least
# that any scheduler could need? In which of the two can a short request be done before a long one that came earlier?
#
# <details><summary>Unfold after you have run the cells</summary>
#
# Static: the longest output of each batch of four, summed. No scheduler can do better than the number of tokens over
# the number of seats; continuous batching comes close while somebody waits, and leaves seats empty only in its tail.
# The hatched time in the upper panel is the difference: requests that are done and keep their seat. In both, short
# ones overtake long ones of their own batch; only continuous batching hands their seats on.
#
# The bars of the steps are not equally long: a step in which somebody joins runs two forwards, one for the newcomers'
# prompts and one for everybody else's next token. Under static batching a row stays in the rectangle after its
# request's last token, and is computed to the end of the batch.
# </details>


# %%
def lives(run, trace=None):
    """When each request had a seat and what it did there: from an engine's trace, or from batches."""
    if trace is None:
        return lives_from_batches(run.extra["batches"], run.arrivals, run.token_times)
    return lives_from_trace(trace, {str(i): t for i, t in enumerate(run.arrivals)})


m2.run(requests), run_static(model, requests, SEATS)  # warm-up
static, continuous = run_static(model, requests, SEATS), m2.run(requests)
trace = list(m2.llm.engine.trace)
batch_gantt(
    {
        f"static, batches of {SEATS}": lives(static),
        f"continuous, {SEATS} seats": lives(continuous, trace),
    },
    title="The same 16 requests",
)


# %%
def milliseconds(values):
    """Their mean."""
    return f"{1e3 * fmean(values):.0f}"


def latencies(run):
    """Mean TTFT and mean end-to-end latency, and when all were done."""
    whole = [t[-1] - a for t, a in zip(run.token_times, run.arrivals, strict=True)]
    return [milliseconds(run.ttfts), milliseconds(whole), f"{1e3 * run.wall_seconds:.0f}"]


least = -(-sum(max_tokens) // SEATS)
static_steps = sum(max(max_tokens[i : i + SEATS]) for i in range(0, 16, SEATS))
print(f"at least {sum(max_tokens)} tokens / {SEATS} seats = {least} steps")
MarkdownTable(
    ["way", "steps", "mean TTFT ms", "mean end to end ms", "all done ms"],
    [
        [f"static, batches of {SEATS}", static_steps, *latencies(static)],
        [f"continuous, {SEATS} seats", len(trace), *latencies(continuous)],
    ],
)

# %% [markdown]
# ## 2. Requests that come one by one
#
# Nobody's users arrive together. Now the same requests come at random moments: a Poisson process, whose gaps are
# exponentially distributed. A static batch starts only when it is full. **Dynamic batching** (as in many model
# servers) sets a window: a batch starts when it is full, or when its first request has waited that long.
#
# **Predict.** Whom does the window help: the first of a batch or the last? Does it do anything about the hatched time?
# What happens to it if the window is 0?
#
# <details><summary>Unfold after you have run the cells</summary>
#
# It helps those who came first and would wait for others to come. It does nothing about the wait for the batch's
# longest, and nothing for those who come while a batch runs: they see a closed door until it ends. It has a price,
# too: a batch that starts early is smaller and takes nearly as long, so on a busy machine everybody after it may be
# *later* than with static batching. With a window of 0 a batch is whoever is there when the machine becomes free.
#
# Continuous batching has no window to tune: a newcomer waits for the end of a *step*, if a seat is free.
# </details>

# %%
RATE, WINDOW = 12.0, 0.05  # requests per second, seconds

moments = accumulate([0.0, *(rng.expovariate(RATE) for _ in requests[1:])])
late = [replace(r, arrival=t) for r, t in zip(requests, moments, strict=True)]
static_late = run_static(model, late, SEATS)
dynamic_late = run_dynamic(model, late, SEATS, WINDOW)
continuous_late = m2.run(late)
batch_gantt(
    {
        f"static, batches of {SEATS}": lives(static_late),
        f"dynamic, {SEATS} or {1e3 * WINDOW:.0f} ms": lives(dynamic_late),
        f"continuous, {SEATS} seats": lives(continuous_late, m2.llm.engine.trace),
    },
    title=f"The same 16, arriving at random, {RATE:g} per second",
)

# %%
ways = {"static": static_late, "dynamic": dynamic_late, "continuous": continuous_late}
MarkdownTable(
    ["way", "mean TTFT ms", "mean end to end ms", "all done ms"],
    [[way, *latencies(run)] for way, run in ways.items()],
)

# %% [markdown]
# ## 3. Padding: cells that belong to nobody
#
# A forward of Hugging Face's model takes a rectangle: rows of one length. Shorter rows are padded, on the left, so
# that all end in the same column, and a mask hides the padding. Hidden or not, it is computed. Suppose an engine put
# one prompt of 100 tokens and seven decodes, of one token each, into the same forward:
#
# **Predict.** What share of that rectangle is padding? If the batch has twice as many rows, how much more padding is
# there? If the prompt is twice as long? If both?
#
# <details><summary>Unfold after you have run the cells</summary>
#
# Of <!-- claim: padding-mixed-cells -->800<!-- /claim --> cells <!-- claim: padding-mixed-tokens -->107<!-- /claim -->
# hold a token; <!-- claim: padding-mixed -->86.6 %<!-- /claim --> are padding. For one prompt of n tokens beside B - 1
# of one token the padding is `(n-1)(B-1)` cells. That is *bilinear*: a straight line in n for each B, and a straight
# line in B for each n. Twice the rows is about twice the padding, and so is twice the length. It is easily called
# "quadratic", because about four times as much comes out if *both* are doubled; but then the rectangle is four times as
# large too, and the padded share goes from <!-- claim: padding-mixed -->86.6 %<!-- /claim --> to 93.3 %.
#
# This is why M2 does not mix: the prefills of a step share one forward, its decodes another. A decode's rectangle of
# new tokens is one column wide and has no padding at all.
# </details>

# %%
mixed = batch_rectangle([100] + 7 * [1])
padding_map({"a prompt of 100 tokens and 7 decodes": mixed})

# %%
assert (mixed == 1).sum() == (100 - 1) * (8 - 1)  # counted cells against the formula
padding_growth([2, 4, 8, 16], [25, 50, 100], title="Padding, one long row among short ones")

# %% [markdown]
# That was the rectangle of *new* tokens. A decode also reads everybody's K/V, and in Hugging Face's cache that is a
# rectangle too, as wide as the longest text. Below is the first static batch of section 1: its prefill, and its K/V
# in the last step.
#
# **Predict.** In the last step of a static batch, how many of its four rows are still needed?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# One, unless two outputs happen to be equally long. The others' requests are done. Their rows are computed, and their
# K/V read, for nobody, and no mask would make that cheaper: a rectangle is computed as a whole.
# </details>

# %%
first = slice(0, SEATS)
fed = max(max_tokens[first]) - 1  # decode steps: the last token is never fed back
padding_map(
    {
        "prefill": batch_rectangle(prompt_lens[first]),
        f"K/V in decode step {fed}": batch_rectangle(
            prompt_lens[first], max_tokens[first], fed
        ),
    },
    title="The first static batch",
)

# %% [markdown]
# Between the two lies the whole life of the batch. In a running notebook the slider goes through it step by step; where
# nothing runs, four of its steps stand one below the other.
#
# **Predict.** In which step is the batch at its best? When does the first of the four become red, and what is computed
# for it from then on?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# In step 6: every row grows by a needed cell per step, and the padding on the left stays as it is, so the share rises
# to 78 %. Then request 2 has its 7 tokens, the first of them from the prefill, and from step 7 on its row is red. It
# goes on growing with the others. From step 11 on three of four rows are computed for nobody.
# </details>


# %%
def in_step(ax, step):
    """One panel: whose cells the first static batch holds in this step."""
    return static_step_panel(ax, prompt_lens[first], max_tokens[first], step)


slider_figure(
    in_step,
    name="step",
    values=range(fed + 1),
    start=0,
    height=1.25,
    columns=1,
    kinds=STEP_KINDS,
    title="K/V of the first static batch; step 0 is its prefill",
)

# %% [markdown]
# Now all steps of all 16 requests: how many cells of K/V stand in the batch, and whose they are. The static counts
# follow from the lengths, those of M2 from its trace (`padding_kv_tokens`).
#
# **Predict.** Which of the three colours disappears with continuous batching? Which one stays?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# Nobody who is done keeps cells: that colour is gone, and the same tokens need far fewer steps. Padding stays, and
# there may even be more of it: a newcomer with a short text sits beside someone whose text has grown long, and the
# rectangle is as wide as the longest. Continuous batching alone does not cure padding. Milestone M3 does, by giving
# up the rectangle.
# </details>

# %%
padding_over_steps(
    {
        f"static, batches of {SEATS}": kv_cells_of_static(prompt_lens, max_tokens, SEATS),
        f"continuous, {SEATS} seats": kv_cells_of_trace(trace),
    },
    title="Cells of K/V in the batch, step by step",
)

# %% [markdown]
# ## 4. Who waits: fcfs, priority, sjf
#
# When a seat comes free, a policy says whose it is. `fcfs`: first come, first served. `priority`: the smallest number
# first; here every fourth request is urgent. `sjf`: shortest job first, by the most tokens that a request may still
# need, prompt and output together.
#
# **Predict.** Which policy has the lowest mean wait? Which request waits longest under `sjf`? Does any policy change
# how many tokens are computed?
#
# <details><summary>Unfold after you have run the cells</summary>
#
# `sjf` has the lowest mean: a short request in front delays those behind it by little. Its price is paid by the
# longest request, which waits for everyone else. Under `priority` the urgent four hardly wait, and the others wait
# longer; the mean says nothing about that. The work is the same under all three: the same tokens, in another order.
# Even so the number of steps differs. If a long request starts last, it ends alone, and the other seats are empty:
# look at the tails of the running line.
#
# A real engine does not know how long an answer will be. `sjf` here takes `max_tokens` at its word.
# </details>

# %%
urgent = [i % 4 == 3 for i in range(16)]
by_policy = {
    policy: server(max_num_seqs=SEATS, scheduling_policy=policy).llm.engine
    for policy in ("fcfs", "priority", "sjf")
}


def exactly(tokens):
    """Greedy, and so many tokens."""
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def steps_before(trace, request_id):
    """Steps before the first one that runs this request."""
    ran = ({r.request_id for r in step.requests} for step in trace)
    return next(number for number, ids in enumerate(ran) if request_id in ids)


traces, waits = {}, {}
for policy, engine in by_policy.items():
    for i, request in enumerate(requests):
        priority = int(not urgent[i]) if policy == "priority" else 0
        engine.add_request(
            str(i), request.prompt_token_ids, exactly(request.max_tokens), priority=priority
        )
    while engine.has_unfinished_requests():
        engine.step()
    traces[policy] = list(engine.trace)
    waits[policy] = [steps_before(traces[policy], str(i)) for i in range(16)]

queue_depth(
    {policy: depth_of_trace(steps) for policy, steps in traces.items()},
    title="The queue, step by step",
)

# %%
order = sorted(range(16), key=lambda i: prompt_lens[i] + max_tokens[i])
waiting_times(
    {policy: [values[i] for i in order] for policy, values in waits.items()},
    [f"{prompt_lens[i]} in, {max_tokens[i]} out" + ", urgent" * urgent[i] for i in order],
    "steps",
    title="Steps that each request waits, the shortest job at the top",
)

# %% [markdown]
# Sixteen requests end. What if short ones never stop coming? A long request stands in line while four short ones run,
# and with every step one more short one arrives; together the seats finish about one per step.
#
# **Predict.** How does the long one's wait grow with the length of the stream, under `fcfs` and under `sjf`?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# Under `fcfs` it does not grow at all: nobody who comes later can pass. Under `sjf` it grows with the stream, without
# bound: that is **starvation**. A lowest mean is no promise to anyone. Engines that sort by length need a second rule,
# such as moving up with age. (`priority` starves the same way if urgent requests never stop.)
# </details>


# %%
def wait_of_the_long_one(engine, stream):
    """Steps until a long request gets a seat, while `stream` short ones come, one per step."""
    engine.trace.clear()
    prompt = requests[0].prompt_token_ids[:4]
    for i in range(SEATS):
        engine.add_request(f"short {i}", prompt, exactly(SEATS))
    engine.add_request("long", prompt, exactly(8 * SEATS))
    for i in range(stream):
        engine.step()
        engine.add_request(f"late {i}", prompt, exactly(SEATS))
    while engine.has_unfinished_requests():
        engine.step()
    return steps_before(engine.trace, "long")


streams = [0, 4, 8, 16, 32]
starvation(
    streams,
    {p: [wait_of_the_long_one(by_policy[p], n) for n in streams] for p in ("fcfs", "sjf")},
    title="A long request in a stream of short ones",
)

# %% [markdown]
# ## 5. What is company worth: throughput against batch size
#
# M2 has two ways to compute a step. `padded` puts the decodes of a step into one forward. `loop` has the same
# scheduler, the same queue and the same seats, and gives **every request a forward of its own**. It is the control arm:
# whatever it gains comes from scheduling, and what `padded` gains beyond it comes from batching. Static batches are
# there for comparison.
#
# **Predict.** From 1 to 16 seats, how do the tokens per second of `loop` grow? And those of `padded`: as the number of
# seats, faster, or slower?
#
# <details><summary>Unfold after you have run the cells</summary>
#
# `loop` stays where M1 is: the machine was never idle, and it makes as many forwards as before. What little it may
# gain is the rest of a step, above all the sampler, which runs once for all rows. `padded` rises, because a forward
# with many rows costs much less than as many forwards. It rises slower than the number of seats: a forward with 16
# rows is not free (the table says what it costs), and in the tail there are fewer requests than seats.
#
# What do the rows share? On a model as small as folo-tiny mostly the fixed cost of a call, for its weights fit into
# the processor's caches. With a model of a useful size it is the reading of the weights, as in lab 0. Its *prompts*
# gain nothing: one of them keeps the arithmetic busy by itself, and padding is more work. Chapter 3 measures both.
# </details>

# %%
LOOP_SEATS, PADDED_SEATS, STATIC_SEATS = (1, 4, 16), (1, 2, 4, 8, 16), (4, 16)

servers = {"M1": server("m1")}
servers |= {f"loop, {n}": server(batching="loop", max_num_seqs=n) for n in LOOP_SEATS}
servers |= {f"padded, {n}": server(batching="padded", max_num_seqs=n) for n in PADDED_SEATS}
arms = {name: s.run for name, s in servers.items()}
arms |= {f"static, {n}": lambda rs, n=n: run_static(model, rs, n) for n in STATIC_SEATS}
for run in arms.values():  # warm-up: the first two output tokens of everyone
    run([replace(r, max_tokens=2) for r in requests])

runs = {name: [] for name in arms}
bar = progress(desc="serving", total=ROUNDS * len(arms))
for number in range(ROUNDS):
    names = list(arms)
    for name in names[number:] + names[:number]:  # another one begins in each round
        runs[name].append(arms[name](requests))
        bar.update()
bar.close()

base = runs["M1"][0].token_ids
print(
    "same tokens everywhere:", all(r.token_ids == base for rs in runs.values() for r in rs)
)
speeds = {
    name: spread(r.output_tokens / r.wall_seconds for r in own)
    for name, own in runs.items()
}
throughput_by_batch(
    {
        "M2, padded": {n: speeds[f"padded, {n}"] for n in PADDED_SEATS},
        "M2, loop": {n: speeds[f"loop, {n}"] for n in LOOP_SEATS},
        "static batches": {n: speeds[f"static, {n}"] for n in STATIC_SEATS},
    },
    ("M1", speeds["M1"]),
    title=f"16 requests on {MODEL}: tokens per second, least to greatest",
)

# %%
rows = []
for name, s in servers.items():
    arm, _, seats = name.partition(", ")
    forwards = s.llm.engine.stats.forwards  # of the last run; the same in every one
    each = min(r.forward_seconds for r in runs[name]) / forwards
    rows.append(
        [arm, seats or 1, forwards, f"{1e3 * each:.2f}", f"{speeds[name]['median']:.0f}"]
    )
print(f"{sum(max_tokens)} output tokens")
MarkdownTable(["arm", "seats", "forwards", "ms per forward", "tokens per second"], rows)

# %% [markdown]
# ## 6. Scheduling is not batching
#
# The same runs once more, as ratios to M1 within each round, and with what users feel.
#
# **Predict.** The control arm's throughput is about that of M1. Is anything about it better for a user, and is
# anything worse?
#
# <details><summary>Unfold after you have run the cells</summary>
#
# The first token comes much sooner: nobody waits for whole answers of others any more, only for their turn in a step.
# But every step now holds 16 forwards, so the tokens after the first come far slower, and the *mean* end-to-end
# latency gets no better, or worse: when 16 take turns, all of them finish late. Scheduling moves waiting around. Only
# when the rows share a forward does it become less.
# </details>

# %%
ratios = {}
for name in ("loop, 4", "static, 4", "padded, 4", "loop, 16", "static, 16", "padded, 16"):
    pairs = zip(runs[name], runs["M1"], strict=True)
    ratios[f"{name} seats"] = spread(
        m1.wall_seconds / own.wall_seconds for own, m1 in pairs
    )
ratio_bars(ratios, title="Over one request at a time: median, least and greatest")

# %%
rows = []
for name in ("M1", "loop, 16", "padded, 16"):
    best = min(runs[name], key=lambda r: r.wall_seconds)
    rows.append([name, *latencies(best), f"{1e3 * fmean(best.itls):.1f}"])
MarkdownTable(
    ["arm", "mean TTFT ms", "mean end to end ms", "all done ms", "mean ITL ms"], rows
)

# %% [markdown]
# ## 7. How to read "3-5x throughput, 60-80 % GPU utilisation"
#
# The text that this milestone grew from expected both of an engine of its kind, and put the gain down to a GPU that
# idles less. Under known limitations it also said that every request still had a forward of its own: the very arm
# that section 5 calls `loop`. How busy the GPU was, nobody had measured.
#
# Three questions help with such a claim. **What was counted?** Tokens per second and forwards, or is it what somebody
# expects? **Against what?** The same model, prompts and machine, and beside it the arm that *should* fail? **What does
# utilisation mean here?** A scheduler that fills its token budget has filled a number that it was given. It knows
# nothing of what the processor does meanwhile.
#
# The last one can be tested. Give `loop` and `padded` the same small token budget and the same 16 seats.
#
# **Predict.** Which of the two fills its budget better? Which is faster?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# Both fill it equally, to the token, because it is the same scheduler and it decides before any forward runs. Yet one
# is far faster than the other. A filled token budget says how much work a step was *given*. To say how well the
# machine was used takes a clock and the machine's ceilings: `folovllm bench` writes it as the share of the roofline.
# </details>

# %%
BUDGET = max(prompt_lens)  # tokens per step
rows = []
for way in ("loop", "padded"):
    arm = server(batching=way, max_num_seqs=16, max_num_batched_tokens=BUDGET)
    arm.run(requests)  # warm-up
    best = min((arm.run(requests) for _ in range(ROUNDS)), key=lambda r: r.wall_seconds)
    steps = list(arm.llm.engine.trace)
    filled = fmean(s.num_scheduled_tokens / s.token_budget for s in steps)
    speed = best.output_tokens / best.wall_seconds
    passes = sum(s.forwards for s in steps)
    rows.append([way, len(steps), f"{filled:.1%}", passes, f"{speed:.0f}"])
MarkdownTable(
    ["arm", "steps", "budget filled", "forwards", "tokens per second"],
    rows,
)

# %% [markdown]
# ## Three things to try
#
# 1. Let all outputs be equally long (`max_tokens=16` for every request). Predict what becomes of static batching's
#    hatched time, and how much continuous batching is still ahead.
# 2. In section 2, set `WINDOW = 0.0` and then `0.5`, and `RATE` to 5 and to 80. Find a load under which dynamic
#    batching is as good as it gets, and one under which its window does nothing.
# 3. Sort the requests by prompt length before section 1. Which waste of static batching shrinks, and which does not?
#    What would a queue that sorts like this do to someone with an unusual length?
