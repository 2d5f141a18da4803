// The colours of requests, and small helpers to draw with.

// Okabe and Ito's colours are distinct for any kind of colour vision; vermillion is reserved for evictions.
const PALETTE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442"];
const INKS = ["#fff", "#000", "#000", "#000", "#000", "#000"]; // readable on each of them
const CORNER = "#fff 0 5px, transparent 5px";
const TEXTURES = [ // the next six requests have the same colours with one corner cut off, then with two
  "",
  `linear-gradient(315deg, ${CORNER})`,
  `linear-gradient(315deg, ${CORNER}), linear-gradient(135deg, ${CORNER})`,
];

// A request's colour is that of its place and never changes.
function colour(place) {
  return PALETTE[place % PALETTE.length];
}

function ink(place) {
  return INKS[place % PALETTE.length];
}

// A CSS background: the colour of one request, or bands of several.
function background(places) {
  const few = places.slice(0, 4);
  if (few.length === 1) {
    const texture = TEXTURES[Math.floor(few[0] / PALETTE.length) % TEXTURES.length];
    return texture === "" ? colour(few[0]) : `${texture}, ${colour(few[0])}`;
  }
  const bands = few.map((place, i) => `${colour(place)} ${(100 * i) / few.length}% ${(100 * (i + 1)) / few.length}%`);
  return `linear-gradient(90deg, ${bands.join(", ")})`;
}

function paint(element, places) {
  element.style.background = background(places);
  element.style.color = places.length > 1 ? "#000" : ink(places[0]);
}

// An id that fits a cell.
function shortId(id) {
  return [...id].length <= 3 ? id : [...id].slice(0, 3).join("");
}

// A new element. Text is inserted as text only, so that no prompt can add HTML to the page.
function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className !== "") element.className = className;
  if (text !== "") element.textContent = text;
  return element;
}

function byId(id) {
  return document.getElementById(id);
}

function chip(request) {
  const element = make("span", "chip", request.id);
  paint(element, [request.place]);
  return element;
}

function number(value) {
  return value.toLocaleString("en-US");
}

function counted(count, one, many = `${one}s`) {
  return `${number(count)} ${count === 1 ? one : many}`;
}

function milliseconds(microseconds) {
  const ms = microseconds / 1000;
  return `${ms >= 100 ? ms.toFixed(0) : ms >= 10 ? ms.toFixed(1) : ms.toFixed(2)} ms`;
}

// "1, 2, 3 and 4 more"
function listed(words, most = 8) {
  const more = words.length - most;
  return words.slice(0, most).join(", ") + (more > 0 ? ` and ${number(more)} more` : "");
}

// A colour of the page's scheme, for canvases, which cannot use CSS variables.
function themeColour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// A canvas as wide as its parent and `height` high, sharp on any screen; its context draws in CSS pixels.
function fitCanvas(canvas, height) {
  const width = Math.max(1, Math.floor(canvas.parentElement.clientWidth));
  const ratio = window.devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

// The last characters of a text; and the first and last tokens of a list.
function tail(text, most) {
  const letters = [...text];
  return letters.length <= most ? text : `… ${letters.slice(-most).join("")}`;
}

function bothEnds(tokens, most) {
  if (tokens.length <= most) return tokens.join("");
  return `${tokens.slice(0, most / 2).join("")} … ${tokens.slice(-most / 2).join("")}`;
}
