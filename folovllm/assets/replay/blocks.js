// The map of physical blocks: a cell for each, in the order of their numbers.

const MOST_CELLS = 4096; // a page with more would be slow
const SPACIOUS = 640; // with more cells, they are small and have no text

// Cells are created once; a step only changes their style and text.
function makeCells(replay) {
  const count = Math.min(MOST_CELLS, replay.highest);
  byId("blocks").replaceChildren(...cellsFor(0, count));
  byId("host").replaceChildren(...cellsFor(1, Math.min(MOST_CELLS, replay.highestHost)));
  byId("blocks").classList.toggle("dense", count > SPACIOUS);
  byId("host").classList.toggle("dense", replay.highestHost > SPACIOUS);
  byId("host-part").hidden = replay.highestHost === 0;
}

function cellsFor(first, last) {
  const cells = [];
  for (let block = first; block <= last; block += 1) {
    const cell = make("span", "cell");
    cell.dataset.block = block;
    cells.push(cell);
  }
  return cells;
}

function drawBlocks(replay) {
  byId("blocks-panel").classList.toggle("without-blocks", !replay.hasBlocks);
  drawKV(replay);
  if (!replay.hasBlocks) return;
  const owners = replay.owners();
  const evicted = new Set(replay.step.blocks === null ? [] : replay.step.blocks.evicted);
  for (const cell of byId("blocks").children) {
    const block = Number(cell.dataset.block);
    if (block === 0) cell.className = "cell null";
    else drawCell(replay, cell, block, owners.get(block) || [], evicted.has(block));
  }
  const hostOwners = replay.owners(replay.hostTables);
  for (const cell of byId("host").children) drawPlain(replay, cell, hostOwners.get(Number(cell.dataset.block)) || []);
  drawTables(replay);
  const held = owners.size;
  byId("blocks").setAttribute("aria-label", `${held} blocks are held; the block tables below list them by request`);
}

function drawCell(replay, cell, block, owners, isEvicted) {
  const filled = replay.filled(block, owners);
  const isCached = replay.cached.has(block);
  drawPlain(replay, cell, owners);
  cell.classList.toggle("shared", owners.length > 1);
  cell.classList.toggle("cached", isCached);
  cell.classList.toggle("taken", replay.taken.has(block));
  cell.classList.toggle("evicted", isEvicted);
  cell.dataset.filled = filled;
  if (owners.length > 0 && filled < replay.blockSize) drawPartly(cell, owners, 1 - filled / replay.blockSize);
  if (owners.length > 1) cell.textContent = `×${owners.length}`;
  const filler = replay.fillers.get(block);
  const isIdle = owners.length === 0 && isCached && filler !== undefined;
  cell.style.setProperty("--filler", isIdle ? colour(filler.place) : "");
  if (isIdle) cell.textContent = shortId(replay.requests[filler.place].id);
}

function drawPlain(replay, cell, owners) {
  cell.className = owners.length > 0 ? "cell held" : "cell free";
  cell.removeAttribute("style");
  cell.dataset.owners = owners.join(" ");
  cell.textContent = owners.length > 0 ? shortId(replay.requests[owners[0]].id) : "";
  if (owners.length > 0) paint(cell, owners);
}

// The slots without K/V are left blank, at the top.
function drawPartly(cell, owners, empty) {
  cell.classList.add("partly");
  cell.style.background = `linear-gradient(var(--panel) 0 ${100 * empty}%, transparent 0), ${background(owners)}`;
  cell.style.borderColor = colour(owners[0]);
  cell.style.color = "";
}

// How full the K/V memory is, for every milestone.
function drawKV(replay) {
  const [reserved, used, unshared] = replay.step.kv;
  const { kv_capacity: capacity, milestone, num_blocks: numBlocks } = replay.engine;
  const amounts =
    `${number(reserved)} of ${number(capacity)} tokens of K/V are reserved, ${number(used)} are written`;
  const bar = byId("kv");
  bar.hidden = replay.hasBlocks;
  if (replay.hasBlocks) {
    const owners = replay.owners();
    const shared = [...owners.values()].filter((places) => places.length > 1).length;
    const idle = [...replay.cached.keys()].filter((block) => !owners.has(block)).length;
    const saved = unshared > reserved ? `; sharing saves ${Math.round(100 * (1 - reserved / unshared))} %` : "";
    const drawn = Math.min(MOST_CELLS, replay.highest);
    const rest = drawn < numBlocks ? ` Blocks after ${number(drawn)} are not drawn` : "";
    const reason = rest !== "" && drawn === replay.highest ? ": this run never uses them." : rest && ".";
    const cachedWords = replay.engine.prefix_caching ? `, ${number(idle)} free but cached` : "";
    byId("blocks-words").textContent =
      `${number(owners.size)} of ${number(numBlocks)} blocks of ${replay.blockSize} tokens held, ` +
      `${number(shared)} of them shared${cachedWords}. ${amounts}${saved}.${rest}${reason}`;
    return;
  }
  byId("blocks-words").textContent = numBlocks === null
    ? `${milestone.toUpperCase()} has no blocks: each request reserves K/V for its maximum length. ${amounts}.`
    : `The state of the blocks was not recorded (trace_blocks=True does that). ${amounts}.`;
  const parts = [["used", used], ["reserved", reserved - used]].map(([name, amount]) => {
    const part = make("span", `part ${name}`);
    part.style.width = `${(100 * amount) / Math.max(1, capacity)}%`;
    return part;
  });
  bar.replaceChildren(...parts);
  bar.setAttribute("aria-label", amounts);
}

function drawTables(replay) {
  const rows = [...replay.tables].sort((a, b) => a[0] - b[0]).flatMap(([place, blocks]) => {
    const name = make("dt");
    name.append(chip(replay.requests[place]));
    const table = make("dd", "", blocks.join(" "));
    table.dataset.table = replay.requests[place].id;
    return [name, table];
  });
  byId("tables").replaceChildren(...rows);
}

// ---------------------------------------------------------------- a block in words

function blockWords(replay, block) {
  if (block === 0) return "Block 0 is the null block: padding points at it, and no request holds it.";
  const owners = replay.owners().get(block) || [];
  const sentences = [holderWords(replay, block, owners), contentWords(replay, block, owners)];
  const copied = replay.step.ops.find((op) => op[0] === "copy" && op[2] === block);
  if (copied !== undefined) sentences.push(`Copied from block ${copied[1]} in this step, before it was written to.`);
  else if (replay.taken.has(block)) sentences.push("Allocated in this step.");
  if (replay.step.blocks !== null && replay.step.blocks.evicted.includes(block)) {
    sentences.push("Its earlier contents were evicted from the cache in this step.");
  }
  return sentences.filter((sentence) => sentence !== "").join(" ");
}

function holderWords(replay, block, owners) {
  const ids = owners.map((place) => replay.requests[place].id);
  if (owners.length > 1) return `Block ${block} is in ${owners.length} tables: those of ${listed(ids)}.`;
  if (owners.length === 1) return `Block ${block} is held by ${ids[0]}.`;
  const cached = [...replay.free].filter((other) => replay.cached.has(other));
  const turn = cached.indexOf(block);
  if (turn < 0) return `Block ${block} is free.`;
  const next = turn === 0 ? "the next to be evicted" : `${number(turn)} are evicted before it`;
  return `Block ${block} is free and in the cache, ${next}.`;
}

function contentWords(replay, block, owners) {
  const filled = replay.filled(block, owners);
  const filler = replay.fillers.get(block);
  if (filled === 0 || filler === undefined) return "";
  const request = replay.requests[filler.place];
  const start = filler.index * replay.blockSize;
  const text = replay.textOf(request, start, start + filled).join("");
  const parent = replay.cached.get(block);
  const chain = parent === undefined ? "" : parent === null ? " Its hash is the first of a chain." :
    ` Its hash includes that of block ${parent}.`;
  return `${filled} of ${replay.blockSize} slots are written: tokens ${start} to ${start + filled - 1} of ` +
    `${request.id}, “${text}”.${chain}`;
}

const BLOCK_HINT = "Point at a block to see its owner and its contents.";

// The text about the block under the pointer, updated at every step.
function watchBlocks(getReplay) {
  let watched = null;
  const show = () => {
    byId("block-info").textContent = watched === null ? BLOCK_HINT : blockWords(getReplay(), watched);
    for (const cell of byId("blocks").children) {
      cell.classList.toggle("watched", Number(cell.dataset.block) === watched);
    }
  };
  byId("blocks").addEventListener("pointerover", (event) => {
    const cell = event.target.closest("[data-block]");
    if (cell === null) return;
    watched = Number(cell.dataset.block);
    show();
  });
  return show;
}
