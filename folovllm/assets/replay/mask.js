// The attention mask of a step, and the strip of all steps: both are drawn on a canvas.

const LEFT = 46; // pixels for the names of the requests
const LOWEST_BAND = 9; // pixels of a request's rows
const HIGHEST_MASK = 280;
const STRIP_HEIGHT = 64;

// ---------------------------------------------------------------- the mask

// The rectangle of each request: its new tokens are rows, all its tokens so far are columns.
// Requests do not attend to each other, so only these rectangles on the diagonal have visible keys.
function maskBands(replay, width) {
  const requests = shareOrder(replay);
  const keys = requests.map((request) => request.computed);
  const rows = requests.map((request) => request.share.scheduled);
  const allKeys = keys.reduce((a, b) => a + b, 0);
  const perRow = Math.min(12, Math.max(1, 180 / Math.max(1, rows.reduce((a, b) => a + b, 0))));
  const heights = shrink(rows.map((count) => Math.max(LOWEST_BAND, count * perRow)), HIGHEST_MASK);
  const scale = Math.min(12, (width - LEFT - 1) / Math.max(1, allKeys));
  let x = LEFT, y = 2;
  return requests.map((request, i) => {
    const band = { request, x, y, width: keys[i] * scale, height: heights[i], rows: rows[i], keys: keys[i] };
    x += band.width;
    y += band.height + 2;
    return band;
  });
}

function shrink(heights, most) {
  const whole = heights.reduce((a, b) => a + b, 0);
  return whole <= most ? heights : heights.map((height) => Math.max(3, (height * most) / whole));
}

function drawMask(replay) {
  const canvas = byId("mask");
  const width = Math.max(1, Math.floor(canvas.parentElement.clientWidth));
  const bands = maskBands(replay, width);
  const last = bands[bands.length - 1];
  const { context } = fitCanvas(canvas, last === undefined ? 1 : Math.ceil(last.y + last.height + 1));
  for (const band of bands) drawBand(context, band, width);
  const rows = bands.reduce((count, band) => count + band.rows, 0);
  const keys = bands.reduce((count, band) => count + band.keys, 0);
  const [, hidden] = replay.step.padding;
  const padded = hidden > 0 ? ` The padding of this batch, ${number(hidden)} masked keys, is not drawn.` : "";
  byId("mask-words").textContent = rows === 0
    ? "Nothing was computed in this step."
    : `${counted(rows, "query", "queries")} (down) by ${counted(keys, "key")} (across): each query sees the keys of ` +
      `its own request up to its own position.${padded}`;
  canvas.setAttribute("aria-label", maskLabel(bands));
}

function maskLabel(bands) {
  const words = bands.map(({ request, rows, keys }) =>
    `${request.id}: ${counted(rows, "query", "queries")} at ${keys - rows} to ${keys - 1}, keys 0 to ${keys - 1}`);
  return `Attention mask. ${listed(words)}`;
}

// Earlier K/V is pale, with dots for cache hits; K/V that this step writes is strong.
function drawBand(context, band, width) {
  const { request, x, y, height } = band;
  const perKey = band.width / band.keys;
  const { start } = request.share;
  const split = x + start * perKey;
  const shade = colour(request.place);
  context.fillStyle = themeColour("faint");
  context.fillRect(LEFT, y, width - LEFT, height);
  context.fillStyle = themeColour("panel");
  context.fillRect(split, y, band.keys * perKey + x - split, height);
  context.globalAlpha = 0.45;
  context.fillStyle = shade;
  context.fillRect(x, y, split - x, height);
  context.globalAlpha = 1;
  drawFound(context, band, perKey);
  drawStairs(context, band, split, perKey, shade);
  context.strokeStyle = shade;
  context.strokeRect(x + 0.5, y + 0.5, Math.max(1, band.width - 1), Math.max(1, height - 1));
  if (height < 8) return;
  context.fillStyle = themeColour("ink");
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "middle";
  context.fillText([...request.id].slice(0, 6).join(""), 0, y + height / 2);
}

function drawFound(context, { request, x, y, height }, perKey) {
  const end = x + Math.min(request.found, request.share.start) * perKey;
  context.fillStyle = themeColour("ink");
  for (let dotY = y + 3; dotY < y + height - 1; dotY += 5) {
    for (let dotX = x + 3; dotX < end - 1; dotX += 5) context.fillRect(dotX, dotY, 1, 1);
  }
}

// The causal part: the first of the new rows sees one new key, the last sees all of them.
function drawStairs(context, { x, y, width, height, rows }, split, perKey, shade) {
  const perRow = height / rows;
  context.fillStyle = shade;
  context.beginPath();
  context.moveTo(split, y);
  for (let row = 0; row < rows; row += 1) {
    context.lineTo(split + (row + 1) * perKey, y + row * perRow);
    context.lineTo(split + (row + 1) * perKey, y + (row + 1) * perRow);
  }
  context.lineTo(x + width - rows * perKey, y + height);
  context.closePath();
  context.fill();
}

const MASK_HINT = "Point at the mask to see the query and the key of a cell. " +
  "Strong colour: K/V written in this step. Pale: written before. Dotted: prefix cache hit.";

function watchMask(getReplay) {
  const canvas = byId("mask");
  const hint = () => { byId("mask-info").textContent = MASK_HINT; };
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const words = maskWords(getReplay(), box.width, event.clientX - box.left, event.clientY - box.top);
    byId("mask-info").textContent = words || MASK_HINT;
  });
  canvas.addEventListener("pointerleave", hint);
  return hint;
}

function maskWords(replay, width, pointX, pointY) {
  const bands = maskBands(replay, width);
  const band = bands.find(({ y, height }) => pointY >= y && pointY < y + height);
  if (band === undefined) return "";
  const { id, share } = band.request;
  const row = Math.min(band.rows - 1, Math.floor(((pointY - band.y) / band.height) * band.rows));
  const position = share.start + row;
  const query = `The query of ${id} at position ${number(position)} sees its keys 0 to ${number(position)}.`;
  const column = bands.find(({ x, width: wide }) => pointX >= x && pointX < x + wide);
  if (column === undefined) return query;
  if (column !== band) return `${query} These are keys of ${column.request.id}: masked.`;
  const key = Math.min(band.keys - 1, Math.floor(((pointX - band.x) / band.width) * band.keys));
  const token = replay.textOf(band.request, key, key + 1).join("");
  const before = key < band.request.found ? "a cache hit" : "written before";
  const origin = key >= share.start ? "written in this step" : before;
  const verdict = key > position ? "a later position, so it is masked" : `visible; ${origin}`;
  return `${query} Key ${number(key)}, “${token}”: ${verdict}.`;
}

// ---------------------------------------------------------------- the strip of all steps

function drawStrip(replay) {
  const canvas = byId("strip");
  const { context, width, height } = fitCanvas(canvas, STRIP_HEIGHT);
  const all = replay.totals;
  const top = all.reduce((most, totals) => Math.max(most, sum(totals)), 1);
  const column = width / all.length;
  const marks = 12; // pixels above the columns
  const high = (tokens) => (tokens / top) * (height - marks);
  all.forEach((totals, index) => {
    const x = index * column;
    const wide = Math.max(1, column - (column > 3 ? 1 : 0));
    context.fillStyle = themeColour("decode");
    context.fillRect(x, height - high(totals.decode), wide, high(totals.decode));
    context.fillStyle = themeColour("prefill");
    context.fillRect(x, height - high(sum(totals)), wide, high(totals.prefill));
  });
  drawMarks(context, replay, column);
  context.fillStyle = themeColour("cursor");
  context.fillRect(replay.index * column, 0, Math.max(2, column), height);
  context.strokeStyle = themeColour("ink");
  context.strokeRect(replay.index * column + 0.5, 0.5, Math.max(2, column - 1), height - 1);
  byId("strip-scale").textContent = `highest: ${counted(top, "token")}`;
  const label = `Tokens of all ${all.length} steps, at most ${top}; step ${replay.step.step} is shown`;
  canvas.setAttribute("aria-label", label);
}

function drawMarks(context, replay, column) {
  context.font = "10px system-ui, sans-serif";
  context.textAlign = "center";
  context.textBaseline = "top";
  replay.steps.forEach((step, index) => {
    const x = (index + 0.5) * column;
    const evicts = step.blocks !== null && step.blocks.evicted.length > 0;
    context.fillStyle = themeColour("lost");
    if (step.preempted.length > 0) context.fillText("▼", x, 0);
    else if (evicts) context.fillText("✕", x, 1);
  });
  context.textAlign = "start";
}
