// The first part of the page's script: the data, the colours, and the cursor that all views share. page.py joins the
// parts in one function. Text of a model or a user is untrusted: it only enters as textContent, never as HTML.

const $ = (id) => document.getElementById(id);
const bytes = (text) => {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const raw = atob(text), array = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) array[i] = raw.charCodeAt(i);
  return array;
};
const floats = (text) => new Float32Array(bytes(text).buffer);
const clamp = (x, low, high) => Math.max(low, Math.min(high, x));
const make = (name, className = "", text = "") => {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
};

const data = JSON.parse($("data").textContent);
const first = data.prompt_tokens; // the answer's first token; indices count from the beginning of the prompt
const end = data.texts.length; // one after the last token
const PEAK = { waad: 16, fai: 32, receiver: 64 };
const PREPLAN = 1, ANCHOR = 2, DOMINATED = 4, INTRO = 8;
const flags = bytes(data.flags);
const introBack = bytes(data.intro_back); // tokens from a dominated anchor back to its intro; 0: none
const values = Object.fromEntries(Object.entries(data.values).map(([name, text]) => [name, floats(text)]));
const SIGNALS = [
  { name: "waad", title: "WAAD", unit: "tokens", peak: PEAK.waad },
  { name: "fai", title: "FAI", unit: "to the end of the answer", peak: PEAK.fai },
  { name: "entropy", title: "Entropy", unit: "nats", peak: 0 },
  { name: "receiver", title: "Receiver-head FAI", unit: "to the end of the answer", peak: PEAK.receiver },
];
for (const signal of SIGNALS) signal.values = values[signal.name];

const group = (n) => n.toLocaleString("en-US");
const short = (x) => String(Number(x.toPrecision(3)));
const long = (x) => (x === 0 ? "0" : Math.abs(x) >= 1e-3 ? x.toPrecision(4) : x.toExponential(3));
// Marks that turn the direction of the text behind them are named, or an answer could reorder the page.
const turns = /[\u202a-\u202e\u2066-\u2069]/g;
const named = (mark) => `⟨U+${mark.codePointAt(0).toString(16).toUpperCase()}⟩`;
const visible = (text) => text.replace(/\r?\n/g, "⏎").replace(/\t/g, "⇥").replace(turns, named);
const label = (t) => {
  const word = visible(data.texts[t]).trim();
  return word.length > 14 ? `${word.slice(0, 13)}…` : word;
};
const quoted = (t) => (data.texts[t] === "" ? "(part of a character)" : `“${visible(data.texts[t])}”`);

// ---- colours, which change with the theme ------------------------------------------------------------------------

const probe = make("i");
probe.hidden = true;
document.body.append(probe);
let colors = {};
const readColors = () => {
  for (const name of ["card", "ink", "soft", "line", "grid", "waad", "fai", "entropy", "receiver", "coupled"]) {
    probe.style.color = `var(--${name})`;
    colors[name] = getComputedStyle(probe).color;
  }
};
const channels = (color) => color.match(/[\d.]+/g).slice(0, 3).map(Number);
const redraws = [];
const redraw = () => {
  readColors();
  for (const draw of redraws) draw();
};
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
const themes = document.querySelectorAll("[data-theme-name]");
const setTheme = (name) => {
  if (name) document.documentElement.dataset.theme = name;
  else delete document.documentElement.dataset.theme;
  for (const button of themes) button.setAttribute("aria-pressed", button.dataset.themeName === name);
  try {
    localStorage.setItem("rhythm-theme", name);
  } catch {} // some browsers store nothing for files
  redraw();
};

/** Returns the context of a canvas that has the screen's resolution and is drawn in CSS pixels. */
const fitted = (canvas, width, height) => {
  const ratio = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = "12px ui-sans-serif, system-ui, sans-serif";
  return context;
};
/** Returns a function that draws once in the next frame, however often it is called before. */
const later = (draw) => {
  let requested = false;
  return () => {
    if (requested) return;
    requested = true;
    requestAnimationFrame(() => {
      requested = false;
      draw();
    });
  };
};

// ---- the cursor, shared by all views -----------------------------------------------------------------------------

let cursor = -1;
const followers = [];
const show = later(() => {
  for (const follow of followers) follow(cursor);
});
const setCursor = (t) => {
  t = clamp(t, first, end - 1);
  if (t === cursor) return;
  cursor = t;
  show();
};

const cells = {};
for (const [name, title, className] of [
  ["waad", "WAAD", "waad"], ["fai", "FAI", "fai"], ["credit_fai", "FAI 10-50", ""], ["entropy", "entropy", "entropy"],
  ["receiver", "receiver FAI", "receiver"], ["gamma", "gamma", ""],
]) {
  const cell = make("span");
  if (className) cell.append(make("i", `swatch ${className}`));
  cells[name] = make("b");
  cells[name].dataset.value = name;
  cell.append(`${title} `, cells[name]);
  $("values").append(cell);
}
const sets = make("span", "soft");
sets.dataset.value = "sets";
$("values").append(sets);
followers.push((t) => {
  const where = make("span"), code = make("code"), mark = make("mark", "", visible(data.texts[t]) || "·");
  const before = data.texts.slice(Math.max(first, t - 6), t).join("");
  const after = data.texts.slice(t + 1, t + 9).join("");
  code.append(visible(before).slice(-28), mark, visible(after).slice(0, 40));
  where.append(`Token ${group(t)} (${group(t - first)} of the answer) `, code);
  $("where").replaceChildren(where);
  for (const [name, cell] of Object.entries(cells)) cell.textContent = long(values[name][t - first]);
  const bits = flags[t - first];
  const names = [[PREPLAN, "preplan"], [ANCHOR, "anchor"], [DOMINATED, "dominated"], [INTRO, "intro"]];
  const peaks = SIGNALS.filter((signal) => bits & signal.peak).map((signal) => `${signal.title} peak`);
  sets.textContent = [...names.filter(([bit]) => bits & bit).map(([, name]) => name), ...peaks].join(", ");
  $("to-text").hidden = $("values").hidden = false;
});
