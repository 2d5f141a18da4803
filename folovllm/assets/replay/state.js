// The state of the engine after a step, built from the recording's changes.
// folovllm/engine/recording.py and pool_changes.py describe the fields of the recording.

class Replay {
  constructor(recording) {
    this.recording = recording;
    this.engine = recording.engine;
    this.steps = recording.steps.map(withDefaults);
    this.totals = this.steps.map(totalsOf);
    this.blockSize = this.engine.block_size;
    this.hasBlocks = this.steps.some((step) => step.blocks !== null);
    this.highest = highestBlock(recording, (changes) => [...changes.taken, ...tailsOf(changes.tables)]);
    this.highestHost = highestBlock(recording, (changes) => tailsOf(changes.host));
    this.rewind();
    this.seek(0);
  }

  // Go to a step by its index. Changes apply forward only: going back starts again from the first step.
  seek(index) {
    if (index < this.index) this.rewind();
    while (this.index < index) {
      this.index += 1;
      this.apply(this.steps[this.index]);
    }
  }

  get step() {
    return this.steps[this.index];
  }

  rewind() {
    this.index = -1;
    this.requests = this.recording.requests.map((request, place) => ({
      place,
      id: request.id,
      prompt: request.prompt === null ? null : this.recording.prompts[request.prompt],
      outputTokens: request.output,
      maxOutput: request.max_output,
      status: "unseen", // then "running", "preempted", or its finish reason
      computed: 0, // tokens with K/V
      output: 0, // tokens sampled so far
      found: 0, // prompt tokens that were cache hits when it was admitted
      share: null, // its part of the step
    }));
    for (const request of this.requests) this.startWith(request, this.recording.requests[request.place].begun);
    // Places of the preempted requests, in the order in which they resume.
    this.preempted = this.requests.filter((request) => request.status === "preempted").map((request) => request.place);
    this.tables = new Map(); // place -> blocks
    this.hostTables = new Map();
    this.cached = new Map(); // block -> its parent block, or null
    this.free = new Set(); // the free queue, the next block to be taken first
    for (let block = 1; block <= this.highest; block += 1) this.free.add(block);
    this.fillers = new Map(); // block -> the request that filled it, and the block's index in that request
    this.changeBlocks(allChanges(this.recording.start));
  }

  // A recording may begin while requests are running or preempted.
  startWith(request, begun) {
    if (begun === undefined) return;
    [request.status, request.computed, request.output] = begun;
  }

  apply(step) {
    for (const place of step.aborted) this.requests[place].status = "abort";
    for (const place of step.preempted) this.requests[place].status = "preempted";
    const back = new Set([...step.aborted, ...step.preempted]);
    for (const request of this.requests) request.share = null;
    for (const row of step.shares) back.add(this.applyShare(row));
    this.preempted = [...[...step.preempted].reverse(), ...this.preempted.filter((place) => !back.has(place))];
    if (step.blocks !== null) this.changeBlocks(step.blocks, step.ops);
    // Dropped K/V is recomputed later; K/V on the host is not.
    for (const place of this.preempted) if (!this.hostTables.has(place)) this.requests[place].computed = 0;
  }

  // A row is only a place for a plain decode, the most common case.
  applyShare(row) {
    const place = typeof row === "number" ? row : row[0];
    const request = this.requests[place];
    const plain = [place, 1, 0, 0, request.computed + 1, request.output + 1];
    const [, scheduled, ofPrompt, found, computed, output, reason] = typeof row === "number" ? plain : row;
    const start = computed - scheduled;
    const isFirst = request.status !== "running";
    const isFork = request.status === "unseen" && start > found; // it has K/V from its parent
    request.share = { scheduled, ofPrompt, found, start, isFirst, isFork, sampled: output - request.output };
    if (isFirst) request.found = found;
    Object.assign(request, { computed, output, status: reason === undefined ? "running" : reason });
    return place;
  }

  changeBlocks(changes, ops = []) {
    const before = new Map(this.tables);
    for (const block of changes.taken) this.free.delete(block);
    for (const block of changes.freed) this.free.add(block); // a Set keeps the order of insertion
    applyTables(this.tables, changes.tables);
    applyTables(this.hostTables, changes.host);
    for (const block of changes.uncached) this.cached.delete(block);
    for (const [block, parent] of changes.cached) this.cached.set(block, parent);
    this.taken = new Set();
    const copies = new Set(ops.filter((op) => op[0] === "copy").map((op) => op[2]));
    for (const [place, kept, tail] of changes.tables) {
      tail.forEach((block, i) => this.note(place, kept + i, block, before, copies));
    }
    this.forgetFillers([...changes.evicted, ...changes.cached.map(([block]) => block)]);
  }

  // A request that was admitted and finished in one step left no table, so the contents of its blocks are unknown.
  forgetFillers(blocks) {
    const held = new Set([...this.tables.values()].flat());
    for (const block of blocks) {
      const filler = this.fillers.get(block);
      if (filler !== undefined && !held.has(block) && this.requests[filler.place].share === null) {
        this.fillers.delete(block);
      }
    }
  }

  // A block is new in a table: it was allocated for new tokens, or it was a cache hit.
  note(place, index, block, before, copies) {
    const share = this.requests[place].share;
    const isNewTable = !before.has(place) && share !== null;
    const backFromHost = isNewTable && this.step.ops.some((op) => op[0] === "in" && op[2] === block);
    const inherited = isNewTable && !backFromHost && !copies.has(block) ? share.start : 0;
    const isFound = index * this.blockSize < inherited;
    if (!isFound || !this.fillers.has(block)) this.fillers.set(block, { place, index });
    if (!isFound) this.taken.add(block);
  }

  // ---------------------------------------------------------------- questions about the state

  // block -> places of the requests whose tables name it
  owners(tables = this.tables) {
    const owners = new Map();
    for (const [place, blocks] of [...tables].sort((a, b) => a[0] - b[0])) {
      for (const block of blocks) owners.set(block, [...(owners.get(block) || []), place]);
    }
    return owners;
  }

  // Slots of a block with K/V: the maximum over its owners. A fork that has not run shares its prompt but the last token.
  filled(block, owners) {
    if (owners.length === 0) return this.cached.has(block) ? this.blockSize : 0;
    const written = owners.map((place) => {
      const start = this.tables.get(place).indexOf(block) * this.blockSize;
      const { status, computed, prompt } = this.requests[place];
      if (status !== "unseen") return computed - start;
      return (prompt === null ? Infinity : prompt.length - 1) - start;
    });
    return Math.max(0, Math.min(this.blockSize, Math.max(...written)));
  }

  // Requests that wait for their first step, in the order of the queue, and the number that the recording does not name.
  waiting() {
    const away = new Set(this.preempted);
    const named = this.step.line.filter((place) => !away.has(place));
    return { named, more: Math.max(0, this.step.waiting - this.preempted.length - named.length) };
  }

  // The texts of a request's tokens from start to end, without output tokens that are not sampled yet.
  textOf(request, start, end) {
    const prompt = request.prompt || [];
    const output = request.outputTokens.slice(0, request.output);
    return [...prompt, ...output].slice(start, end).map((text) => this.recording.texts[text]);
  }

  promptLength(request) {
    return request.prompt === null ? 0 : request.prompt.length;
  }
}

// Tokens that a step computes for requests in prefill, and for all others.
function totalsOf(step) {
  const totals = { prefill: 0, decode: 0 };
  for (const row of step.shares) {
    const [, scheduled, ofPrompt] = typeof row === "number" ? [row, 1, 0] : row;
    totals[ofPrompt > 0 ? "prefill" : "decode"] += scheduled;
  }
  return totals;
}

// Fields that a step leaves out have these values.
function withDefaults(step) {
  const usual = { shares: [], line: [], ops: [], preempted: [], aborted: [], padding: [0, 0], forwards: 1, times: [] };
  return { ...usual, ...step, blocks: step.blocks === undefined ? null : allChanges(step.blocks) };
}

function allChanges(changes) {
  return { tables: [], host: [], taken: [], freed: [], cached: [], uncached: [], evicted: [], ...changes };
}

function applyTables(tables, changes) {
  for (const [place, kept, tail] of changes) {
    const blocks = [...(tables.get(place) || []).slice(0, kept), ...tail];
    if (blocks.length > 0) tables.set(place, blocks);
    else tables.delete(place);
  }
}

function tailsOf(changes) {
  return changes.flatMap(([, , tail]) => tail);
}

// Only blocks that the run uses are drawn; a pool may be much larger.
function highestBlock(recording, blocksOf) {
  let highest = 0;
  for (const changes of [recording.start, ...recording.steps.map((step) => step.blocks || {})]) {
    for (const block of blocksOf(allChanges(changes))) highest = Math.max(highest, block);
  }
  return highest;
}
