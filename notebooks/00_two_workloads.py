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
# # Lab 0: inference is two workloads
#
# A language model answers in two phases. **Prefill** runs the whole prompt through the model at once and ends with
# the first token. **Decode** then runs one token at a time through the same weights. In this lab you measure on your
# own machine why these are two different workloads, what the words TTFT and ITL mean, and when attention starts to
# matter.
#
# It takes less than a minute on two cores and needs no network. Questions come before the cells that answer them:
# write your guess down, then run, then unfold.

# %%
MODEL = "folo-tiny"  # a bundled name, a local folder, or a hub id such as "Qwen/Qwen3-0.6B"
SHAPE = "qwen2.5-0.5b"  # the real model whose layers are timed, on random weights
LAYERS = 8  # how many of its layers: all have the same shape
THREADS = 1  # one core gives the steadiest times; the last section asks you to change it
PRICE_PER_HOUR = 1.0  # what an hour of your machine costs you, in your currency

# %%
import time
from itertools import cycle

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DynamicCache, LlamaConfig

from folovllm import LLM, SamplingParams
from folovllm.course.bench.machine import cpu_model, probe
from folovllm.course.bench.roofline import Row, pass_work
from folovllm.course.glossary import load_glossary
from folovllm.course.lessons.formulas import (
    attention_flops_per_token,
    linear_flops_per_token,
    linear_params,
    lm_head_params,
)
from folovllm.course.viz.notebook import MarkdownTable, progress
from folovllm.course.viz.roofline import (
    RooflinePoint,
    attention_share,
    gemm_sweep,
    roofline,
)
from folovllm.course.viz.style import binary_bytes, engineering
from folovllm.course.viz.timeline import latency_timeline
from folovllm.kv_cache.formulas import kv_bytes_per_token
from folovllm.models.dummy import build_dummy_model
from folovllm.models.loader import load_config, resolve_model

torch.set_num_threads(THREADS)
torch.manual_seed(0)
DTYPE = torch.float32
BYTES = DTYPE.itemsize


def best_seconds(call, repeats=5):
    """The shortest of `repeats` runs: what else the machine does can only make one longer."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


SETTING = f"{THREADS} thread{'s' * (THREADS > 1)}, {str(DTYPE).removeprefix('torch.')}"
print(f"{cpu_model()}, torch {torch.__version__}, {SETTING}")

# %% [markdown]
# ## 1. The two ceilings of this machine
#
# A computation moves bytes and does arithmetic, and each has a speed limit. `probe` from
# `folovllm/course/bench/machine.py` measures both: it reads buffers far too large for the processor's caches (bytes
# per second), and multiplies matrices (floating-point operations per second, FLOP/s; a multiply and an add are two).
#
# **Predict.** How many operations can your machine do in the time in which it reads one byte? How many does a matrix
# times a vector need per byte of its weights, if a weight is a float32?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# The last line is the answer to the first question. By its data sheet, an H100 could
# do <!-- claim: h100-ridge -->295<!-- /claim --> of them in bfloat16. A matrix times a vector takes one multiply and
# one add per weight of four bytes: half an operation per byte. It waits for memory, on any machine. The next section
# shows what helps.
# </details>

# %%
ceilings = probe(torch.device("cpu"), DTYPE)
bandwidth, peak_flops = (
    ceilings["read_bytes_per_s"],
    max(ceilings["gemm_flops_per_s"].values()),
)

print(f"reads    {engineering(bandwidth, 'B/s')}")
print(f"computes {engineering(peak_flops, 'FLOP/s')}")
print(
    f"so it could do {peak_flops / bandwidth:.3g} FLOP in the time it takes to read one byte"
)

# %% [markdown]
# ## 2. One matrix, m vectors: find the ridge
#
# A linear layer multiplies its weight matrix by one vector per token. In a decode step of a single request that is
# **one** vector; in a prefill it is as many as the prompt has tokens. The next cell times exactly this, for m = 1 …
# 512 vectors and a 4096 × 4096 matrix, the shape of the query projection of Llama-2-7B. It takes a different matrix
# every time, as a model does on its way through its layers, so that no cache can help.
#
# **Predict.** Compared with m = 1, how many times longer does m = 8 take? And m = 512?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# Neither 8 nor 512 times. For small m the time goes into reading the weights, which happens once however many vectors
# there are. Only when the arithmetic for m vectors takes longer than that read does time grow in proportion to m. The
# two times are equal at the *ridge*: m = (weight bytes / bandwidth) × peak FLOP/s / (FLOPs per vector). For a matrix
# of n × k weights of b bytes, n and k cancel and it is b/2 × peak / bandwidth: a property of the machine and the
# number format.
#
# From m = 1 to m = 2 the time may jump: a library has one routine for a matrix times a vector and another for a
# matrix times a matrix, and the second may first copy the weights into a layout of its own.
# </details>

# %%
N = 4096
weights = cycle([torch.randn(N, N, dtype=DTYPE) for _ in range(4)])
rows = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]

seconds = []
for m in progress(rows, "GEMM"):
    x = torch.randn(m, N, dtype=DTYPE)
    repeats = 8 if m <= 64 else 3
    seconds.append(best_seconds(lambda x=x: F.linear(x, next(weights)), repeats))

flops = [2 * m * N * N for m in rows]  # a multiply and an add per weight and vector
# A ceiling is what can be reached: should a product have been faster than the probe, it counts.
peak_flops = max(peak_flops, *(f / t for f, t in zip(flops, seconds, strict=True)))
bandwidth = max(bandwidth, N * N * BYTES / seconds[0])
title = f"A {N} x {N} matrix times m vectors ({SETTING})"
gemm_sweep(rows, seconds, flops[0], N * N * BYTES, peak_flops, bandwidth, title=title)

# %%
speeds = [f / t for f, t in zip(flops, seconds, strict=True)]
half = next(m for m, speed in zip(rows, speeds, strict=True) if speed >= peak_flops / 2)
print(
    f"ridge, from the two ceilings:                 m = {BYTES / 2 * peak_flops / bandwidth:.3g}"
)
print(f"first measured m that reaches half the peak:  m = {half}")
table = [
    [m, f"{1e3 * t:.2f}", f"{1e3 * t / m:.3f}", f"{v / 1e9:.1f}", f"{v / peak_flops:.0%}"]
    for m, t, v in zip(rows, seconds, speeds, strict=True)
]
MarkdownTable(["m", "ms per call", "ms per vector", "GFLOP/s", "of the peak"], table)

# %% [markdown]
# The right-hand plot is the whole economy of inference: **the more vectors share one read of the weights, the cheaper
# each becomes**, until arithmetic takes over. Prefill has many vectors by nature. Decode has one per request, so it
# has to find its vectors in *other* requests. That is what batching is for, and why most of this course is about it.
# (Training resembles prefill: whole texts at once, and a backward pass of about twice the work of the forward. Only
# inference has a phase that runs one token at a time.)
#
# ## 3. A whole model under the roof
#
# The *roofline* (Williams, Waterman and Patterson, 2009) puts this into one picture. A computation's **arithmetic
# intensity** is its FLOPs divided by the bytes it has to move. Below the ridge a machine cannot be faster than
# intensity × bandwidth; above it, no faster than its peak.
#
# To place a model's steps we need their FLOPs and bytes. Both follow from the config
# (`folovllm/kv_cache/formulas.py`); `pass_work` adds them up for one forward: every weight is read once, every key
# and value once; a token costs 2 FLOPs per weight of the linear layers, a text 2 per weight of the LM head (which
# runs on its last position only), and attention 4 × head size per head and pair of query and key. Norms, activations
# and softmax are left out.

# %%
config = load_config(resolve_model(SHAPE))
config.num_hidden_layers, config.layer_types = LAYERS, config.layer_types[:LAYERS]
cpu = torch.device("cpu")
model = build_dummy_model(config, DTYPE, cpu, 0, attn_implementation="sdpa").eval()
total = sum(p.numel() for p in model.parameters())
size = f"{engineering(total, '')} parameters, {binary_bytes(total * BYTES)}"
print(f"{SHAPE}, {LAYERS} layers: {size}")

# %% [markdown]
# **Predict.** A decode step of one request has how many FLOPs per byte, roughly? Which number format would double it?
# Where will a prefill of 512 tokens stand, left or right of the ridge?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# In decode each weight (4 bytes in float32) is read for one multiply and one add: 2 FLOP / 4 B = 0.5 FLOP per byte,
# for every dense model of any size. In bfloat16 it is 1. A batch of m requests multiplies it by m for the linear
# layers, but not for attention: every request has keys and values of its own to read. A prefill of 512 tokens uses
# each weight 512 times and stands far to the right.
#
# Points keep below the roof by what it does not know of: small operations between the big ones, copies inside
# libraries, Python. A model as small as folo-tiny consists of little else, and its weights may fit into the
# processor's cache, where the slanted part of the roof is higher.
# </details>


# %%
def measured(model, batch, new, past):
    """Best seconds of a forward: `new` tokens in each of `batch` texts, after `past` cached ones."""
    text = model.config.get_text_config()
    head_dim = (
        getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    )
    ids = torch.randint(text.vocab_size, (batch, new))  # [B, L]
    kv = torch.randn(batch, text.num_key_value_heads, past, head_dim)  # [B, Hkv, T, D]
    cache = DynamicCache()
    for layer in range(text.num_hidden_layers):
        cache.update(kv.to(DTYPE), kv.to(DTYPE), layer)

    last = torch.tensor([new - 1])  # the LM head runs on the last position only

    def forward():
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=last)
        cache.crop(-new)

    with torch.inference_mode():
        return best_seconds(forward, repeats=3)


def point(model, name, batch, new, past):
    """Where such a forward stands under the roof, and its seconds."""
    work = pass_work(model.config, [Row(past, new, past)] * batch, BYTES)
    seconds = measured(model, batch, new, past)
    label = f"prefill {new}" if new > 1 else f"decode, batch {batch}"
    return RooflinePoint(
        label, work.flops / work.bytes, work.flops / seconds, name
    ), seconds


decode = [(1, 1, 128), (4, 1, 128), (16, 1, 128), (64, 1, 128)]  # batch, new, cached tokens
prefill = [(1, 32, 0), (1, 128, 0), (1, 512, 0)]
name = f"{SHAPE}, {LAYERS} layers"
runs = {run: point(model, name, *run) for run in progress([*decode, *prefill], "forwards")}

tiny = LLM(MODEL, milestone="m1", dtype="float32")
tiny_model = tiny.engine.core.runner.model
points = [found for found, _ in runs.values()]
points += [point(tiny_model, MODEL, *run)[0] for run in (decode[0], prefill[-1])]
roofline(
    peak_flops, bandwidth, points, title=f"Steps of two models on this machine ({SETTING})"
)

# %%
table = []
for p in points:
    roof = min(peak_flops, p.intensity * bandwidth)
    speed, share = f"{p.flops_per_s / 1e9:.1f}", f"{p.flops_per_s / roof:.0%}"
    table.append([p.kind, p.label, f"{p.intensity:.2f}", speed, share])
MarkdownTable(["model", "step", "FLOP per byte", "GFLOP/s", "of the roof"], table)

# %% [markdown]
# ## 4. Three calculators
#
# FLOPs per token, bytes of weights and bytes of KV cache per token are all you need for a first estimate of any
# model. The table derives them from configs alone. The last column is a bound, not a forecast: a decode step of one
# request reads every weight, so on *this* machine it cannot take less than weight bytes / bandwidth.
#
# **Predict.** Llama-2-7B has some 13 times the weights of Qwen2.5-0.5B. How many times the KV cache per token?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# Some 43 times: <!-- claim: kv-bytes-llama2-7b-exact -->524,288<!-- /claim -->
# against <!-- claim: kv-bytes-qwen25-05b -->12,288<!-- /claim --> bytes. The two follow from different numbers of the
# config. Weights grow with the square of the width; the cache grows with the KV heads, and there Llama-2-7B has 32 of
# size 128 and Qwen2.5-0.5B only 2 of size 64. Lab 1 is about that.
# </details>

# %%
llama_2_7b = LlamaConfig(  # Touvron et al. 2023, arXiv:2307.09288
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    vocab_size=32000,
)
shapes = {
    "folo-tiny": load_config(resolve_model("folo-tiny")),
    "qwen2.5-0.5b": load_config(resolve_model("qwen2.5-0.5b")),
    "qwen3-0.6b": load_config(resolve_model("qwen3-0.6b")),
    "Llama-2-7B": llama_2_7b,
}
table = []
for name, shape in shapes.items():
    weights = linear_params(shape) + lm_head_params(shape)
    flops = linear_flops_per_token(shape) + 2 * lm_head_params(shape)
    kv, least = (
        binary_bytes(kv_bytes_per_token(shape, 2)),
        f"{2e3 * weights / bandwidth:.3g} ms",
    )
    table.append([name, engineering(flops, "FLOP"), binary_bytes(2 * weights), kv, least])
header = ["model, 16-bit", "FLOPs per token", "weights read per step", "KV per token"]
MarkdownTable([*header, "decode step here, at least"], table)

# %% [markdown]
# ## 5. TTFT and ITL, on a real trace
#
# Two requests arrive at the same moment at an engine that serves one at a time (milestone M1). Its trace records when
# each step began and ended; the figure is drawn from that record.
#
# - **TTFT**, time to first token: from arrival to the first token, waiting included.
# - **ITL**, inter-token latency (also TBT, time between tokens): the gap between two consecutive tokens. **TPOT** is
#   its mean over a request.
#
# **Predict.** Which of the two gets longer when a request has to wait in the queue? Which when its prompt gets
# longer?
#
# <details><summary>Unfold after you have run the next two cells</summary>
#
# Waiting and prefill both happen before the first token, so both belong to TTFT. ITL is what a decode step takes; it
# grows only slowly with the context, because the weights outweigh the keys and values that are read beside them. That
# changes as soon as somebody else's prefill is put between two decode steps: milestone M4 is about that.
# </details>

# %%
words = " ".join(entry.answer for entry in load_glossary()[:40])
text_ids = tiny.engine.tokenizer(words)["input_ids"]
six = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)

tiny.generate(
    [text_ids[:512]], six, use_tqdm=False
)  # a first run pays for what is set up once
tiny.engine.trace.clear()
outputs = tiny.generate([text_ids[:512], text_ids[512:768]], six, use_tqdm=False)
latency_timeline(
    tiny.engine.trace, outputs, title="Two requests, served one after the other"
)

# %%
table = []
for length in (64, 128, 256, 512, 1024):
    trials = [tiny.generate([text_ids[:length]], six, use_tqdm=False) for _ in range(3)]
    metrics = [outputs[0].metrics for outputs in trials]
    ttft, tpot = min(m.ttft for m in metrics), min(m.tpot for m in metrics)
    table.append([length, f"{1e3 * ttft:.1f}", f"{1e3 * tpot:.2f}"])
MarkdownTable(["prompt tokens", "TTFT ms, best of 3", "TPOT ms, best of 3"], table)

# %% [markdown]
# ## 6. What attention costs, and when
#
# **Erratum.** *The claim:* attention's quadratic cost is what makes inference slow, already at a thousand tokens.
# *Why it sounds right:* 1000² × 4096 is a large number. *How to check:* compare it with the rest of the model.
#
# Per token and layer, the linear layers of Llama-2-7B take 2 FLOPs per weight. Attention takes 4 × hidden size for
# every key that the token looks at. So the token at position n pays 4 × 4096 × n for attention. In a causal prefill
# the tokens look at n/2 keys on average, if the kernel skips what the mask hides.
#
# **Predict.** At which context length does attention cost as much as all linear layers together?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# (4 × 4096² + 3 × 4096 × 11008) weights × 2 FLOPs = 404.8 MFLOP per layer and token, divided by 4 × 4096 FLOPs per
# key: <!-- claim: attention-crossing-full -->24,704<!-- /claim --> keys. That is the crossing for a decode step, and
# for a prefill that computes masked pairs too. A causal prefill that skips them crosses at twice the length. At 1000
# tokens attention has <!-- claim: attention-share-1000-causal -->2.0 %<!-- /claim -->
# to <!-- claim: attention-share-1000-full -->3.9 %<!-- /claim --> of a layer's FLOPs. It does matter earlier for memory
# (keys and values are bytes to store and to read), which is chapter 1.
# </details>

# %%
context = np.unique(np.geomspace(100, 400_000, 200).astype(int))
per_key = attention_flops_per_token(llama_2_7b, 1)
linear = linear_flops_per_token(llama_2_7b)
crossing = linear / per_key
full = "every key: a decode step, or a prefill without skipping"
causal = "half the keys: a causal prefill that skips"

shares = {full: context / (context + crossing), causal: context / (context + 2 * crossing)}
title = "Llama-2-7B: attention's share of the layers' FLOPs"
attention_share(context, shares, {full: crossing, causal: 2 * crossing}, title=title)

# %%
MarkdownTable(
    ["context", "every key", "half the keys"],
    [
        [n, f"{n / (n + crossing):.1%}", f"{n / (n + 2 * crossing):.1%}"]
        for n in (100, 1000, 4096, 16_384, round(crossing), round(2 * crossing), 131_072)
    ],
)

# %% [markdown]
# ## 7. What inference costs
#
# Training is paid once; inference is paid for every token. The formula has two factors, and you know both:
#
# > price per million tokens = price per hour / 3600 × seconds per token × 10⁶
#
# A price list would only be true on the day it was printed, so put your own number into `PRICE_PER_HOUR` above (the
# unit is your currency). The seconds are those you measured in section 3, for the model that was timed there.
#
# **Predict.** What does a token of the prompt cost, compared with a token of the answer at batch 1? And at batch 64?
#
# <details><summary>Unfold after you have run the cell</summary>
#
# Far less than the answer's at batch 1, for the reason of section 2: a prompt brings its own company. A batch of 64
# brings an answer's token most of the way to the prompt's price. A gap remains: every token of the answer needs the
# LM head (in this cut model a large part of all weights) and reads keys and values of its own.
# </details>

# %%
table = []
for (batch, new, _), (_, t) in runs.items():
    tokens = batch * new
    name = f"prompt token, {new} at once" if new > 1 else f"answer token, batch {batch}"
    hours = 1e6 * t / tokens / 3600
    table.append(
        [name, f"{tokens / t:.1f}", f"{hours:.3g}", f"{PRICE_PER_HOUR * hours:.3g}"]
    )
header = ["", "tokens per second", "machine hours per million", "price per million"]
MarkdownTable(header, table)

# %% [markdown]
# The same hour of the same machine yields very different numbers of tokens. Three times the throughput means a third
# of the machines (1 - 1/3 = 67 % fewer), as long as nobody minds the latency. When somebody does, the scheduler has
# work to do: chapter 3.
#
# ## Three things to try
#
# 1. Set `THREADS` to the number of your cores and run all again. Arithmetic scales with cores, bandwidth does not
#    quite: predict which way the ridge moves, then look.
# 2. Set `DTYPE = torch.bfloat16` (sections 1 to 3). What does the formula say about the ridge? Does the CPU agree?
#    (On a CPU without bfloat16 instructions it will be slow: that is an answer too.)
# 3. Add `(16, 1, 4096)` to `decode`. Which of the bytes that `pass_work` adds up grew, and why does a larger batch no
#    longer help as much?
