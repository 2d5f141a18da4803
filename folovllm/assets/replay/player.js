// The player: the step that is shown, and the controls that change it.

const replay = new Replay(JSON.parse(byId("recording").textContent));
const lastStep = replay.steps.length - 1;
let timer = null; // while it plays
const showBlock = watchBlocks(() => replay);
const showMaskHint = watchMask(() => replay);

// ---------------------------------------------------------------- showing a step

function show(index) {
  replay.seek(Math.max(0, Math.min(lastStep, index)));
  draw();
  // While it plays, steps are not announced to a screen reader, and the address does not change.
  byId("summary").setAttribute("aria-live", timer === null ? "polite" : "off");
  if (timer === null) rememberStep();
}

function draw() {
  byId("slider").value = replay.index;
  byId("slider").setAttribute("aria-valuetext", `step ${replay.step.step}`);
  const [first, last] = [replay.steps[0].step, replay.steps[lastStep].step];
  byId("where").textContent = `step ${replay.step.step} of ${first}–${last}`;
  document.documentElement.dataset.step = replay.step.step;
  drawStrip(replay);
  drawStep(replay);
  drawRequests(replay);
  drawBlocks(replay);
  drawMask(replay);
  drawTexts(replay);
  showBlock();
}

function describeEngine() {
  const { engine } = replay;
  const words = [
    `${engine.model}`,
    `milestone ${engine.milestone}`,
    `${counted(engine.max_num_seqs, "request")} at once`,
    `${counted(engine.max_num_batched_tokens, "token")} per step`,
  ];
  if (engine.num_blocks !== null) words.push(`${counted(engine.num_blocks, "block")} of ${engine.block_size}`);
  if (engine.milestone === "m2" && engine.batching !== null) words.push(`batching: ${engine.batching}`);
  if (engine.chunked_prefill) words.push("chunked prefill");
  if (engine.prefix_caching) words.push("prefix cache");
  if (engine.num_blocks !== null) words.push(`preemption: ${engine.preemption_mode}`);
  if (engine.scheduling_policy !== "fcfs") words.push(`policy: ${engine.scheduling_policy}`);
  byId("settings").textContent = words.join(" · ");
}

// Legend entries that this run does not need are hidden.
function hideUnused() {
  const any = (test) => replay.steps.some(test);
  const used = {
    "if-preempted": any((step) => step.preempted.length > 0),
    "if-evicted": any((step) => step.blocks !== null && step.blocks.evicted.length > 0),
    "if-cache": replay.engine.prefix_caching,
  };
  for (const [name, isUsed] of Object.entries(used)) {
    for (const element of document.getElementsByClassName(name)) element.hidden = !isUsed;
  }
}

// ---------------------------------------------------------------- playing

function play() {
  if (replay.index === lastStep) show(0);
  const tick = () => {
    if (replay.index === lastStep) pause();
    else {
      timer = setTimeout(tick, 1000 / Number(byId("speed").value));
      show(replay.index + 1);
    }
  };
  timer = setTimeout(tick, 0);
  nameButton();
}

function pause() {
  clearTimeout(timer);
  timer = null;
  nameButton();
  show(replay.index);
}

function nameButton() {
  byId("play").textContent = timer === null ? "play" : "pause";
  byId("play").setAttribute("aria-label", timer === null ? "Play" : "Pause");
}

function toggle() {
  if (timer === null) play();
  else pause();
}

// Choosing a step stops the playback.
function go(index) {
  if (timer !== null) pause();
  show(index);
}

// ---------------------------------------------------------------- keys, mouse, touch, address

const KEYS = {
  ArrowLeft: () => go(replay.index - 1),
  ArrowRight: () => go(replay.index + 1),
  PageUp: () => go(replay.index - 10),
  PageDown: () => go(replay.index + 10),
  Home: () => go(0),
  End: () => go(lastStep),
  " ": toggle,
};

function onKey(event) {
  const act = KEYS[event.key];
  const { target } = event;
  // A select has keys of its own, and space presses the focused button.
  const isTaken = target.tagName === "SELECT" || (event.key === " " && ["BUTTON", "SUMMARY"].includes(target.tagName));
  if (act === undefined || isTaken || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault(); // otherwise the slider would move again and the page would scroll
  act();
}

function onStrip(event) {
  if (event.type === "pointermove" && event.buttons === 0) return;
  const box = byId("strip").getBoundingClientRect();
  go(Math.floor(((event.clientX - box.left) / box.width) * replay.steps.length));
}

// "#step=12" opens the page at that step; "&theme=dark" or "light" overrules the system's scheme.
function readAddress() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  if (["dark", "light"].includes(wanted.get("theme"))) document.documentElement.dataset.theme = wanted.get("theme");
  const index = replay.steps.findIndex((step) => String(step.step) === wanted.get("step"));
  return index < 0 ? null : index;
}

let remembering = null;

// Browsers limit how often the address may change, so it is updated after a pause.
function rememberStep() {
  clearTimeout(remembering);
  remembering = setTimeout(() => {
    const wanted = new URLSearchParams(location.hash.slice(1));
    wanted.set("step", replay.step.step);
    history.replaceState(null, "", `#${wanted}`);
  }, 400);
}

function start() {
  byId("slider").max = lastStep;
  byId("slider").addEventListener("input", () => go(Number(byId("slider").value)));
  byId("first").addEventListener("click", () => go(0));
  byId("previous").addEventListener("click", () => go(replay.index - 1));
  byId("play").addEventListener("click", toggle);
  byId("next").addEventListener("click", () => go(replay.index + 1));
  byId("last").addEventListener("click", () => go(lastStep));
  byId("strip").addEventListener("pointerdown", onStrip);
  byId("strip").addEventListener("pointermove", onStrip);
  document.addEventListener("keydown", onKey);
  window.addEventListener("resize", draw);
  window.addEventListener("hashchange", () => go(readAddress() ?? replay.index));
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  describeEngine();
  hideUnused();
  makeCells(replay);
  showMaskHint();
  replay.seek(Math.min(lastStep, readAddress() ?? Number(document.body.dataset.openAt)));
  draw();
}

start();
