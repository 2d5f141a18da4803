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
# # Lab 2: an engine
#
# A loop around a model generates text. An **engine** does that for whoever asks: it takes requests, keeps each one's
# state, chooses tokens as that request wants them chosen, ends it for the right reason, hands out text while it
# grows, and writes down what happened. In this lab you follow one step of the M1 engine from token ids to text and
# look at each part with real numbers.
#
# It takes less than a minute on two cores and needs no network. Questions come before the cells that answer them:
# write your guess down, then run, then unfold.

# %%
MODEL = "folo-tiny"  # a bundled name, a local folder, or a hub id such as "Qwen/Qwen3-0.6B"
THREADS = 1  # one core gives the steadiest times
SEED = 0

# %%
from itertools import islice

import torch
from transformers import DynamicCache

from folovllm import LLM, SamplingParams
from folovllm.course.glossary import default_prompts
from folovllm.course.viz.flow import shape_flow
from folovllm.course.viz.notebook import MarkdownTable, progress
from folovllm.course.viz.panels import sampled_panel
from folovllm.course.viz.sampling import Release, filter_stages, text_release, token_match
from folovllm.course.viz.sliders import slider_figure
from folovllm.course.viz.timeline import phase_times, request_gantt
from folovllm.engine.detokenizer import Detokenizer
from folovllm.sampling import Sampler, SamplingBatch, SamplingState
from folovllm.sampling.logits import (
    apply_min_p,
    apply_temperature,
    apply_top_k,
    apply_top_p,
)

torch.set_num_threads(THREADS)
torch.set_grad_enabled(False)

llm = LLM(MODEL, milestone="m1", dtype="float32", seed=SEED)
engine, tokenizer = llm.engine, llm.engine.tokenizer
runner = engine.core.runner
model = runner.model


def chat_ids(question):
    """Token ids of a question in the model's chat format."""
    return llm.chat_prompts([{"role": "user", "content": question}])[0]["prompt_token_ids"]


greedy = SamplingParams(temperature=0, max_tokens=64)
output = llm.generate([chat_ids("What is a token?")], greedy, use_tqdm=False)[0]
print(output.outputs[0].text)
print("finish_reason:", output.outputs[0].finish_reason)

# %% [markdown]
# ## 1. One step, as shapes
#
# A step is: **schedule** (who runs, how many tokens), **prepare** (the runner learns of new requests), **forward**
# (logits), **sample** (logits to ids), **update** (append, check the stop rules, free what is finished). The next
# cell watches the tensors of two real steps of one request: the prefill and the first decode.
#
# **Predict.** Which shapes differ between the two steps? Which is the only one that keeps growing?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# Everything with L in it: L is the length of the prompt in the prefill and 1 in a decode. The logits do not differ,
# because the LM head runs on the last row only (`logits_to_keep`): nobody samples from the others. What grows is
# the cache, by one position per step. Queries are wider than keys where the model has fewer KV heads than query heads
# (GQA).
# </details>

# %%
layer = model.model.layers[0]
watched = {
    "embedding": model.model.embed_tokens,
    "queries, layer 0": layer.self_attn.q_proj,
    "keys, layer 0": layer.self_attn.k_proj,
    "attention out": layer.self_attn.o_proj,
    "inside the MLP": layer.mlp.gate_proj,
    "after all layers": model.model.norm,
    "logits": model.lm_head,
}


def shapes_of_step(request_id):
    """Run one step of the engine and note the shape of what each part gives."""
    shapes = {}

    def note(name):
        return lambda module, args, result: shapes.__setitem__(name, tuple(result.shape))

    hooks = [module.register_forward_hook(note(name)) for name, module in watched.items()]
    engine.step()
    for hook in hooks:
        hook.remove()
    cache = runner.caches.gather([request_id]).cache
    shapes["cached keys, layer 0"] = tuple(cache.layers[0].keys.shape)
    shapes["token ids"] = shapes["embedding"][:2]
    shapes["next token id"] = (engine.trace[-1].requests[0].num_sampled,)
    order = "token ids|embedding|queries, layer 0|keys, layer 0|cached keys, layer 0|"
    order += "attention out|inside the MLP|after all layers|logits|next token id"
    return [(name, shapes[name]) for name in order.split("|")]


engine.add_request("shapes", chat_ids("What is a KV cache?"), greedy)
prefill, decode = shapes_of_step("shapes"), shapes_of_step("shapes")
engine.abort_request("shapes")
shape_flow(
    {"prefill": prefill, "first decode": decode},
    title="One request's tensors in its first two steps (red: another shape)",
)

# %% [markdown]
# ## 2. Where the time of a step goes
#
# `engine.trace` has a record of every step with the start and end of each of its five parts.
#
# **Predict.** The forward takes most of a step. What share of a *decode* step is left for everything else? Would that
# share be larger or smaller with a model a hundred times the size?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# The parts around the forward cost about the same whatever the model's size; they are Python. With a small model and
# one request they are a visible share of a decode step, with a large model a smaller one. On a fast GPU the forward
# shrinks and the Python does not: that is why engines work so hard on what is *not* the model.
# </details>

# %%
questions = default_prompts(4)
engine.trace.clear()
outputs = llm.generate([chat_ids(q) for q in questions], greedy, use_tqdm=False)
setting = f"{THREADS} thread{'s' * (THREADS > 1)}, float32"
phase_times(engine.trace, title=f"{MODEL}, one request at a time, {setting}")

# %% [markdown]
# ## 3. From logits to one token: the filters
#
# With `temperature=0` the sampler takes the largest logit. Otherwise it draws, from a distribution that the request's
# parameters have cut to size, in vLLM's order: **temperature** divides the logits, **min-p** drops tokens less likely
# than a fraction of the likeliest, **top-k** keeps the k likeliest, **top-p** keeps the smallest set whose mass
# reaches p.
#
# The logits below are the model's own, after a text that could go on in many ways.
#
# **Predict.** Which stage changes probabilities without dropping a token? After min-p has dropped some, what has
# happened to the probabilities of the others?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# Temperature: it reorders nothing and drops nothing; above 1 it flattens, below 1 it sharpens. Dropped tokens get the
# logit minus infinity, so their probability is 0 and the softmax spreads their mass over those that stay, in
# proportion: ratios between survivors never change.
# </details>

# %%
text = "What is"
TEMPERATURE, MIN_P, TOP_K, TOP_P = 1.5, 0.05, 12, 0.8

ids = tokenizer(text)["input_ids"]
raw = model(input_ids=torch.tensor([ids])).logits[:, -1].float()  # [1, V]
warm = apply_temperature(raw, torch.tensor([[TEMPERATURE]]))
likely = apply_min_p(warm, torch.tensor([[MIN_P]]))
few = apply_top_k(likely, torch.tensor([[TOP_K]]))
kept = apply_top_p(few, torch.tensor([[TOP_P]]))

labels = [repr(tokenizer.decode([i]))[1:-1].replace(" ", "_") for i in range(raw.shape[-1])]
stages = {
    "the model's own": raw,
    f"temperature {TEMPERATURE}": warm,
    f"min-p {MIN_P}": likely,
    f"top-k {TOP_K}": few,
    f"top-p {TOP_P}": kept,
}
filter_stages(
    {name: logits.softmax(-1)[0] for name, logits in stages.items()},
    labels,
    title=f"What may follow “{text}”",
)

# %% [markdown]
# Now temperature alone, with top-p behind it and nothing else. In a running notebook the figure has a slider; where
# nothing runs, four of its positions stand side by side. The hollow bars are always the model's own.
#
# **Predict.** How many tokens does top-p leave at temperature 0.2? And at 3? Can a temperature make the second
# likeliest token the likeliest?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# One token at 0.2, which is greedy decoding in all but name, and 718 of the 2048 at 3. Top-p keeps a share of the mass,
# and a hot distribution spreads its mass over the tail: that is where nonsense comes from, and why temperature and
# top-p are not two names for one thing. The order never changes, since all logits are divided by the same number.
# </details>


# %%
def at_temperature(ax, temperature):
    """One panel: what is drawn from at this temperature."""
    hot = apply_temperature(raw, torch.tensor([[temperature]]))
    cut = apply_top_p(hot, torch.tensor([[TOP_P]]))
    return sampled_panel(ax, raw.softmax(-1)[0], cut.softmax(-1)[0], labels)


slider_figure(
    at_temperature,
    name="temperature",
    values=(0.2, 0.3, 0.5, 0.7, 1.0, 1.2, 1.5, 2.0, 2.5, 3.0),
    start=1.0,
    shown=(0.2, 0.7, 1.5, 3.0),
    title=f"“{text}”: temperature, then top-p {TOP_P}",
)

# %% [markdown]
# **Predict.** Does the order matter? Let min-p go *before* temperature: do more tokens survive, or fewer?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# Fewer, for a temperature above 1: before it the distribution is sharper, so more tokens lie below the bar. Two
# engines with the same parameters and another order are two different samplers. That is why the order is written
# down, and tested.
# </details>

# %%
early = apply_min_p(raw, torch.tensor([[MIN_P]]))  # the mask is all that counts here
print("tokens left by temperature, then min-p (vLLM):", int(likely.isfinite().sum()))
print("tokens left by min-p, then temperature:       ", int(early.isfinite().sum()))

# %% [markdown]
# The engine's sampler runs all of this on rows of a batch. Does it draw what the last row of the figure says? Ask it
# 20,000 times.

# %%
params = SamplingParams(temperature=TEMPERATURE, min_p=MIN_P, top_k=TOP_K, top_p=TOP_P)
batch = SamplingBatch("cpu", raw.shape[-1])
rows = batch.select([batch.add(SamplingState(params, ids, seed=i)) for i in range(20_000)])
drawn = Sampler()(raw.expand(20_000, -1), rows, [0] * 20_000).sampled
expected = kept.softmax(-1)[0]
MarkdownTable(
    ["token", "probability", "drawn"],
    [
        [f"`{labels[i]}`", f"{expected[i]:.3f}", f"{(drawn == i).float().mean():.3f}"]
        for i in expected.argsort(descending=True)[: int((expected > 0).sum())].tolist()
    ],
)

# %% [markdown]
# A draw is a function of the request's `seed` and the token's index, so a text does not depend on who else is there.
# Penalties act on the logits before everything else: `repetition_penalty` on tokens that occur in prompt or output,
# `presence_penalty` and `frequency_penalty` on those of the output only, once or per occurrence.
#
# The model has not learned the text below, so it soon talks nonsense, and runs into a loop.
#
# **Predict.** Which of the parameters can break the loop: a penalty, another seed, a higher temperature?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# Each of them can: a penalty lowers the logit of what was said already, and a draw at a temperature above 0 sometimes
# takes another way. Only the penalties aim at the loop. The two runs with seed 1 are equal, whatever was generated
# between them.
# </details>

# %%
text = "In the kitchen the cat"
variants = {
    "greedy": {"temperature": 0},
    "greedy, repetition_penalty 1.3": {"temperature": 0, "repetition_penalty": 1.3},
    "greedy, presence_penalty 2": {"temperature": 0, "presence_penalty": 2.0},
    "temperature 0.8, seed 1": {"temperature": 0.8, "seed": 1},
    "temperature 0.8, seed 1, again": {"temperature": 0.8, "seed": 1},
    "temperature 0.8, seed 2": {"temperature": 0.8, "seed": 2},
}
wishes = [SamplingParams(max_tokens=40, **given) for given in variants.values()]
results = llm.generate([text] * len(wishes), wishes, use_tqdm=False)
MarkdownTable(
    ["parameters", f"{text} …"],
    [[name, o.outputs[0].text] for name, o in zip(variants, results, strict=True)],
)

# %% [markdown]
# ## 4. Every token equals Hugging Face's
#
# Optimisations may change time and memory, never text. The reference is Hugging Face's own `generate`; the comparison
# is token by token, to the end. Beside the engine runs a **control arm that should fail**: greedy decoding with the
# position of every decode token one too high, the classic mistake of lab 1.
#
# Both run on two models of the same shape: the bundled one, which has learned its answers by heart, and one with
# random weights.
#
# **Predict.** At which token does the control arm first differ: on the bundled model, on the random one?
#
# <details><summary>Unfold after you have run the cells</summary>
#
# On the random one within a few tokens. (Not at token 0: that one comes out of the prefill, where positions were
# right.) On the bundled one *not at all*: it is so sure of an answer it knows by heart that logits wrong by several
# units, as in lab 1, still have the same maximum. **A readable answer is no proof, and neither are equal tokens on a
# model that cannot be confused.** This is why the tests of this course compare whole outputs, on random models with
# weights large enough to keep every token in doubt.
# </details>


# %%
def hf_generate(model, ids, max_new_tokens=64):
    """The new tokens of Hugging Face's greedy `generate`."""
    inputs = torch.tensor([ids])
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": 0}
    eos = list(engine.eos_token_ids)
    out = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), eos_token_id=eos, **settings
    )
    return out[0, len(ids) :].tolist()


def off_by_one(model, ids, max_new_tokens=64):
    """Greedy decoding with every decode token one position too late."""
    cache, fed, start, new = DynamicCache(), ids, 0, []
    while len(new) < max_new_tokens and not (new and new[-1] in engine.eos_token_ids):
        positions = torch.arange(start, start + len(fed))[None] + (1 if new else 0)
        out = model(torch.tensor([fed]), position_ids=positions, past_key_values=cache)
        start += len(fed)
        fed = [int(out.logits[0, -1].argmax())]
        new += fed
    return new


def equal(tokens, expected):
    """Token by token; a missing or surplus token counts as different."""
    length = max(len(tokens), len(expected))
    return [tokens[i : i + 1] == expected[i : i + 1] for i in range(length)]


prompts = {question: chat_ids(question) for question in default_prompts(8)}
random_llm = LLM(MODEL, milestone="m1", dtype="float32", load_format="dummy", seed=SEED)
arms = {}  # (weights, question) -> engine and control arm, token by token against Hugging Face
bar = progress(desc="comparing", total=2 * len(prompts))
for weights, subject in ((MODEL, llm), ("random", random_llm)):
    hf = subject.engine.core.runner.model
    outputs = subject.generate(list(prompts.values()), greedy, use_tqdm=False)
    for (question, ids), out in zip(prompts.items(), outputs, strict=True):
        reference = hf_generate(hf, ids)
        ours, control = out.outputs[0].token_ids, off_by_one(hf, ids)
        arms[weights, question] = equal(ours, reference), equal(control, reference)
        bar.update()
bar.close()

shown = {}
for weights in (MODEL, "random"):
    for which, arm in enumerate(("engine", "control")):
        for number, question in enumerate(default_prompts(3)):
            shown[f"{weights}: {arm}, text {number}"] = arms[weights, question][which]
token_match(shown, title="Each output token against Hugging Face's")


# %%
def first_difference(matches):
    """The first output token that differs."""
    return next((str(i) for i, same in enumerate(matches) if not same), "none")


header = ["weights", "question", "tokens", "engine: first difference"]
MarkdownTable(
    [*header, "control: first difference"],
    [
        [weights, question, len(ours), first_difference(ours), first_difference(control)]
        for (weights, question), (ours, control) in arms.items()
    ],
)

# %% [markdown]
# ## 5. Text that never has to be taken back
#
# Users see text, the engine makes tokens, and the two do not line up. Two rules keep a stream honest.
#
# **A stop string may span tokens.** Text that could be the beginning of one is held back until it is clear that it is
# not. The cell stops at `" a piece"` and shows what the detokenizer holds, token by token.
#
# **Predict.** The answer begins with "The unit a language model …". Is anything held back before the stop string
# really comes?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# Yes: every " a" might become " a piece". It is released as soon as the next token decides otherwise. Without this
# rule a stream would show the beginning of the stop string and then have to take it back. The tokens of the stop
# string count as generated; its text is not shown.
# </details>


# %%
def release(token_ids, stop=(), names=None):
    """What a stream may show after each token, and what it holds back."""
    detokenizer = Detokenizer(tokenizer, stop)
    moments = []
    for i, token_id in enumerate(token_ids):
        detokenizer.update([token_id])
        held = detokenizer.text[len(detokenizer.visible) :]
        name = repr(tokenizer.decode([token_id])) if names is None else names[i]
        moments.append(Release(name, detokenizer.visible, held))
        if detokenizer.stop_reason is not None:
            break
    return moments


stop = " a piece"
stopping = SamplingParams(temperature=0, max_tokens=64, stop=[stop])
prompt = chat_ids("What is a token?")
stopped = llm.generate([prompt], stopping, use_tqdm=False)[0].outputs[0]
print(f"text: {stopped.text!r}  finish: {stopped.finish_reason}, {stopped.stop_reason!r}")
text_release(
    release(stopped.token_ids, [stop]), title=f"Stop string {stop!r}: what may be shown"
)

# %% [markdown]
# **A character may span tokens.** A byte-level vocabulary can write any text, but an emoji may take four tokens of
# one byte each. Decoding them one by one gives U+FFFD, the replacement character, four times.

# %%
sample = "naïve café 😀!"
sample_ids = tokenizer(sample)["input_ids"]
print("one by one:", "".join(tokenizer.decode([i]) for i in sample_ids))

pieces = tokenizer.convert_ids_to_tokens(sample_ids)  # byte-level: one character per byte
stream = iter(sample.encode())
names = []
for piece in pieces:
    data = bytes(islice(stream, len(piece)))
    hexes = "".join(f"<{byte:02X}>" for byte in data)
    names.append(repr(data.decode()) if data.isascii() else hexes)

moments, waiting = [], ""
for moment in release(sample_ids, names=names):
    shown_before = moments[-1].visible if moments else ""
    waiting = "" if moment.visible != shown_before else waiting + moment.token
    moments.append(Release(moment.token, moment.visible, waiting))
text_release(moments, title="UTF-8: bytes wait until they are a character")

# %% [markdown]
# ## 6. The life of a request
#
# `WAITING → RUNNING → FINISHED_STOPPED | FINISHED_LENGTH_CAPPED | FINISHED_ABORTED`; a finished state is final.
# (`PREEMPTED`, a running request that has to wait again, comes with milestone M3.) Four requests that end in four
# ways, at an engine that runs one at a time:
#
# **Predict.** Which step computes the first token of request "end of text"? What is the engine doing before?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# The one after the request before it has ended. M1 serves one request at a time, so everybody else waits, even though
# a step can carry several of them for far less than a step for each takes (lab 0). Milestone M2 is the answer to the
# grey cells.
# </details>

# %%
lives = {
    "length": ("How does attention work?", SamplingParams(temperature=0, max_tokens=5)),
    "end of text": ("What is a token?", SamplingParams(temperature=0, max_tokens=64)),
    "stop string": ("What is a token?", stopping),
    "user left": ("What is a KV cache?", SamplingParams(temperature=0, max_tokens=64)),
}
engine.trace.clear()
submitted, finished, endings = {}, {}, {}
for request_id, (question, params) in lives.items():
    engine.add_request(request_id, chat_ids(question), params)
    submitted[request_id] = len(engine.trace)
    if request_id == "length":
        engine.step()  # the others arrive one step later
while engine.has_unfinished_requests():
    for out in engine.step():
        if out.request_id == "user left" and len(out.outputs[0].token_ids) == 4:
            out = engine.abort_request("user left")[0]
        if out.finished:
            finished[out.request_id] = out
            c = out.outputs[0]
            reason = "" if c.stop_reason is None else f" ({c.stop_reason!r})"
            endings[out.request_id] = f"{c.finish_reason}{reason}"

request_gantt(
    engine.trace,
    list(lives),
    submitted=submitted,
    endings=endings,
    title="Four lives, step by step",
)

# %%
rows = []
for request_id, out in finished.items():
    m = out.metrics
    times = [f"{1e3 * t:.1f}" for t in (m.queue_time, m.ttft, m.tpot, m.e2e_latency)]
    rows.append([request_id, len(out.outputs[0].token_ids), endings[request_id], *times])
MarkdownTable(
    ["request", "tokens", "finish", "queue ms", "TTFT ms", "TPOT ms", "end to end ms"], rows
)

# %% [markdown]
# The same life as a walk through the code, in eight steps. Names follow vLLM V1, so the right column is also a map of
# vLLM.
#
# | | what happens | where |
# |---|---|---|
# | 1 | a prompt and its parameters come in and are checked | `entrypoints/llm.py`, `sampling_params.py` |
# | 2 | text becomes token ids, a `Request` is made and queued | `engine/llm_engine.py`, `request.py` |
# | 3 | the scheduler admits it when there is room | `scheduler/scheduler.py`, `kv_cache/` |
# | 4 | the runner prepares tensors for the scheduled tokens | `runner/hf/hf_runner.py` |
# | 5 | the model's forward: logits, and K/V into the cache | Hugging Face, so far |
# | 6 | the sampler chooses a token | `sampling/sampler.py` |
# | 7 | append, check the stop rules, free what is finished | `scheduler/scheduler.py`, `scheduler/stop.py` |
# | 8 | ids become text, a `RequestOutput` goes out | `engine/detokenizer.py`, `engine/output_processor.py` |
#
# ## Three things to try
#
# 1. In section 3, set `TEMPERATURE = 0.5`. Predict how many tokens each filter leaves. Then find parameters for which
#    top-p changes nothing after top-k.
# 2. In section 5, stop at `[" a piece", ":"]`. Which one ends the text, and what is held back now?
# 3. `engine.trace.save("trace.json", chrome=True)` writes section 6 as a Chrome trace. Open it at ui.perfetto.dev and
#    find the step in which the queue moved.
