// The panels of text and bars: this step, the requests, their texts.

const PROMPT_SHOWN = 32; // tokens of a prompt
const OUTPUT_SHOWN = 420; // characters of an output, counted from its end

// ---------------------------------------------------------------- this step

function drawStep(replay) {
  const { step } = replay;
  byId("summary").textContent = summaryOf(replay);
  drawBudget(replay, step);
  drawPhases(replay, step);
}

// The step in words.
function summaryOf(replay) {
  const { step } = replay;
  const ids = (places) => listed(places.map((place) => replay.requests[place].id));
  const shares = replay.requests.filter((request) => request.share !== null);
  const parts = [];
  const admitted = shares.filter((request) => request.share.isFirst);
  const ended = shares.filter((request) => isDone(request)).map((request) => `${request.id} (${request.status})`);
  const copies = step.ops.filter((op) => op[0] === "copy").length;
  const out = step.ops.filter((op) => op[0] === "out").length;
  const back = step.ops.filter((op) => op[0] === "in").length;
  const read = shares.filter((request) => request.share.ofPrompt > 0 && !request.share.isFork);
  if (admitted.length > 0) parts.push(`admits ${ids(admitted.map((request) => request.place))}`);
  const reads = read.map(({ id, share }) => `${counted(share.ofPrompt, "token")} of ${id}`);
  if (reads.length > 0) parts.push(`prefills ${listed(reads, 4)}`);
  if (step.preempted.length > 0) parts.push(`preempts ${ids(step.preempted)}`);
  if (copies > 0) parts.push(`copies ${counted(copies, "block")} on write`);
  if (out > 0) parts.push(`swaps ${counted(out, "block")} out to the host`);
  if (back > 0) parts.push(`swaps ${counted(back, "block")} in`);
  if (step.blocks !== null && step.blocks.evicted.length > 0) {
    parts.push(`evicts ${counted(step.blocks.evicted.length, "cached block")}`);
  }
  if (step.aborted.length > 0) parts.push(`comes after the abort of ${ids(step.aborted)}`);
  if (ended.length > 0) parts.push(`finishes ${listed(ended)}`);
  const decoding = shares.length === 1 ? shares[0].id : "all running requests";
  const words = parts.length > 0 ? parts.join("; ") : `decodes one token of ${decoding}`;
  return `Step ${step.step} ${words}.`;
}

function isDone(request) {
  return !["unseen", "running", "preempted"].includes(request.status);
}

// A full bar is the budget, or the largest step if the budget is far larger: all bars would look empty.
function budgetScale(replay) {
  const largest = replay.totals.reduce((most, totals) => Math.max(most, sum(totals)), 1);
  const budget = replay.engine.max_num_batched_tokens;
  return budget <= 3 * largest ? budget : largest;
}

function sum(totals) {
  return totals.prefill + totals.decode;
}

function drawBudget(replay, step) {
  const bar = byId("budget");
  const scale = budgetScale(replay);
  const budget = replay.engine.max_num_batched_tokens;
  const totals = replay.totals[replay.index];
  bar.replaceChildren();
  for (const request of shareOrder(replay)) {
    const { scheduled, ofPrompt } = request.share;
    const part = make("span", ofPrompt > 0 ? "part prefill" : "part decode");
    part.style.width = `${(100 * scheduled) / scale}%`;
    part.title = `${request.id}: ${counted(scheduled, "token")}`;
    paint(part, [request.place]);
    if (scheduled / scale > 0.07) part.textContent = `${shortId(request.id)}: ${number(scheduled)}`;
    bar.append(part);
  }
  const [padded] = step.padding;
  const padding = padded > 0 ? ` The batch also has ${counted(padded, "token")} of padding.` : "";
  const forwards = step.forwards === 1 ? "" : ` In ${counted(step.forwards, "forward")}.`;
  const kinds = [];
  if (totals.prefill > 0) kinds.push(`${number(totals.prefill)} prefill (tall)`);
  if (totals.decode > 0) kinds.push(`${number(totals.decode)} decode (low)`);
  byId("budget-words").textContent =
    `${counted(sum(totals), "token")} of a budget of ${number(budget)}: ${kinds.join(" and ") || "none"}.` +
    (scale < budget ? ` A full bar is ${number(scale)}, the largest step.` : "") + padding + forwards;
  bar.setAttribute("aria-label", byId("budget-words").textContent);
  bar.dataset.prefill = totals.prefill;
  bar.dataset.decode = totals.decode;
}

// Requests of the step, in the order of the scheduler.
function shareOrder(replay) {
  return replay.step.shares.map((row) => replay.requests[typeof row === "number" ? row : row[0]]);
}

function drawPhases(replay, step) {
  const bar = byId("phases");
  bar.hidden = step.times.length === 0;
  if (bar.hidden) {
    byId("phases-words").textContent = "Times were not recorded, so that the page of a run is reproducible.";
    return;
  }
  const names = replay.recording.phases;
  const spans = names.map((name, i) => step.times[2 + 2 * i] - step.times[1 + 2 * i]);
  const whole = Math.max(1, spans.reduce((a, b) => a + b, 0));
  bar.replaceChildren();
  names.forEach((name, i) => {
    const part = make("span", `part phase-${i % 5}`);
    part.style.width = `${(100 * Math.max(0, spans[i])) / whole}%`;
    part.title = `${name}: ${milliseconds(spans[i])}`;
    if (spans[i] / whole > 0.16) part.textContent = name;
    bar.append(part);
  });
  const words = names.map((name, i) => `${name} ${milliseconds(spans[i])}`).join(", ");
  byId("phases-words").textContent = `${milliseconds(whole)}: ${words}.`;
  bar.setAttribute("aria-label", byId("phases-words").textContent);
}

// ---------------------------------------------------------------- the requests

function drawRequests(replay) {
  const { step } = replay;
  const running = replay.requests.filter((request) => request.status === "running");
  const done = replay.requests.filter(isDone);
  const { named, more } = replay.waiting();
  const rows = (requests, kind) => requests.map((request) => requestRow(replay, request, kind));
  const unnamed = more > 0 ? [make("p", "more", `and ${number(more)} more`)] : [];
  byId("queues").replaceChildren(
    queue("running", `Running: ${number(step.running)} of at most ${number(replay.engine.max_num_seqs)}`,
      rows(running, "running")),
    queue("waiting", `Waiting: ${number(named.length + more)}${policyWords(replay)}`,
      [...rows(named.map((place) => replay.requests[place]), "waiting"), ...unnamed]),
    queue("preempted", `Preempted: ${number(replay.preempted.length)}`,
      rows(replay.preempted.map((place) => replay.requests[place]), "preempted")),
    queue("finished", `Finished: ${number(done.length)}`, rows(done, "finished")),
  );
}

function policyWords(replay) {
  const orders = { sjf: ", fewest tokens left first", priority: ", lowest priority first" };
  return orders[replay.engine.scheduling_policy] || "";
}

function queue(kind, title, rows) {
  const part = make("div", `queue ${kind}`);
  part.append(make("h3", "", title), ...rows);
  part.hidden = rows.length === 0 && kind !== "running";
  return part;
}

function requestRow(replay, request, kind) {
  const row = make("div", "request");
  row.dataset.request = request.id;
  row.dataset.computed = request.computed;
  row.dataset.known = replay.promptLength(request) + request.output;
  row.append(chip(request), make("span", "what", whatHappens(replay, request, kind)));
  if (kind === "waiting") return row;
  const most = replay.promptLength(request) + request.maxOutput;
  const bar = make("span", "progress");
  const known = make("span", "known");
  const computed = make("span", "computed");
  known.style.width = `${(100 * Number(row.dataset.known)) / Math.max(1, most)}%`;
  computed.style.width = `${(100 * request.computed) / Math.max(1, most)}%`;
  paint(computed, [request.place]);
  bar.append(known, computed);
  bar.title = `${number(request.computed)} of ${number(Number(row.dataset.known))} tokens computed; ` +
    `maximum ${number(most)}`;
  row.append(bar, make("span", "counts", `${number(request.computed)} of ${number(Number(row.dataset.known))}`));
  return row;
}

// The step's work for a request, in one or two words.
function whatHappens(replay, request, kind) {
  if (kind === "waiting") return "";
  if (kind === "preempted") return replay.hostTables.has(request.place) ? "on the host" : "K/V dropped";
  if (kind === "finished") return request.status;
  const { share } = request;
  if (share === null) return "skipped";
  const found = share.isFirst && share.found > 0 ? `, ${number(share.found)} cached` : "";
  if (share.scheduled > 1 && request.output > share.sampled) return `recompute ${number(share.scheduled)}${found}`;
  if (share.isFork) return `forked + ${number(share.scheduled)}`;
  if (share.ofPrompt === 0) return "decode";
  const isChunk = request.computed < replay.promptLength(request) || share.start > share.found;
  return `${isChunk ? "chunk" : "prefill"} of ${number(share.scheduled)}${found}`;
}

// ---------------------------------------------------------------- texts

function drawTexts(replay) {
  const started = replay.requests.filter((request) => request.status !== "unseen");
  const rank = (request) => (request.status === "running" ? 0 : request.status === "preempted" ? 1 : 2);
  const sorted = [...started].sort((a, b) => rank(a) - rank(b) || a.place - b.place);
  byId("texts").replaceChildren(...sorted.map((request) => textCard(replay, request)));
}

function textCard(replay, request) {
  const card = make("article", `text ${isDone(request) ? "done" : ""}`);
  card.dataset.request = request.id;
  const length = replay.promptLength(request);
  const sampled = request.share === null ? 0 : request.share.sampled;
  const old = replay.textOf(request, length, length + request.output - sampled).join("");
  const fresh = replay.textOf(request, length + request.output - sampled, length + request.output).join("");
  const prompt = make("p", "prompt", bothEnds(replay.textOf(request, 0, length), PROMPT_SHOWN));
  if (request.prompt === null) prompt.textContent = "Its prompt was not recorded.";
  const output = make("p", "output", tail(old, OUTPUT_SHOWN));
  if (fresh !== "" || sampled > 0) output.append(make("mark", "", fresh === "" ? "\u2007" : fresh));
  const grown = `${number(request.output)} of at most ${number(request.maxOutput)}`;
  const size = `${counted(length, "token")} of prompt, ${grown}`;
  const head = make("p", "head");
  head.append(chip(request), make("span", "size", size));
  card.append(head, prompt, output);
  return card;
}
