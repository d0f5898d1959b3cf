// The text of the answer, tinted by WAAD and by FAI, with arrows from dominated anchors to their intros.

const text = $("text");
const spans = { waad: [], fai: [] }; // of each token of the answer
const rows = []; // {begin, stop, element, seen}
const bounds = (list) => {
  const sorted = Float32Array.from(list).sort();
  const at = (share) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
  return [at(0.05), Math.max(at(0.98), at(0.05) + 1e-9)];
};
const heats = { waad: values.waad, fai: values.credit_fai };
const scales = { waad: bounds(heats.waad), fai: bounds(heats.fai) };

/** Where rows end: at line breaks, or at the end of a sentence or phrase in a long paragraph. */
const cuts = () => {
  const found = [first];
  for (let t = first; t < end; t++) {
    const length = t + 1 - found[found.length - 1], word = data.texts[t];
    const paragraph = length >= 24 && word.includes("\n") && !/^\s*\n/.test(data.texts[t + 1] ?? "");
    const sentence = length >= 140 && /[.!?;]\s*$/.test(word);
    if (paragraph || sentence || length >= 220) found.push(t + 1);
  }
  if (found[found.length - 1] !== end) found.push(end);
  return found;
};
const buildRow = (begin, stop) => {
  const row = make("div", "row");
  for (const kind of ["waad", "fai"]) {
    const cell = make("div", `cell ${kind}`), [low, high] = scales[kind];
    cell.dataset.name = kind === "waad" ? "WAAD" : "FAI, 10 to 50 tokens later";
    for (let t = begin; t < stop; t++) {
      const bits = flags[t - first], raw = data.texts[t];
      const span = make("span", "", visible(raw));
      if (bits & LOC) span.classList.add("loc");
      if (bits & GLOB) span.classList.add("glob");
      if (bits & DOM) span.classList.add("dom");
      span.dataset.t = t;
      span.style.setProperty("--h", clamp((heats[kind][t - first] - low) / (high - low), 0, 1).toFixed(3));
      cell.append(span);
      if (raw.includes("\n") && t + 1 < stop && !/^\s*\n/.test(data.texts[t + 1])) cell.append("\n");
      spans[kind][t - first] = span;
    }
    row.append(cell);
  }
  let letters = 0;
  for (let t = begin; t < stop; t++) letters += data.texts[t].length;
  row.style.containIntrinsicSize = `auto ${Math.ceil(letters / 58 + 0.5) * 30 + 6}px`;
  return row;
};

/** From dominated anchors to their intros, above the words; where a line ends between them, only both ends. */
const arrowPath = (begin, stop, cell) => {
  const box = cell.getBoundingClientRect();
  const place = (t) => {
    const rect = spans.fai[t - first].getClientRects()[0];
    return rect && { x: rect.left - box.left + rect.width / 2, y: rect.top - box.top + 2 };
  };
  const parts = [];
  const head = (x, y) => parts.push(`M${x - 3.4} ${y - 4.6}L${x} ${y}L${x + 3.6} ${y - 4.2}`);
  for (let t = begin; t < Math.min(stop + 3, end); t++) {
    const step = back[t - first], u = t - step;
    if (!step || u >= stop) continue;
    const from = t < stop ? place(t) : null, to = u >= begin ? place(u) : null;
    if (from && to && Math.abs(from.y - to.y) < 8) {
      const rise = Math.min(9, 4 + (from.x - to.x) * 0.08);
      const top = Math.min(from.y, to.y) - rise;
      parts.push(`M${from.x} ${from.y}C${from.x} ${top} ${to.x} ${top} ${to.x} ${to.y}`);
      head(to.x, to.y);
      continue;
    }
    if (from) parts.push(`M${from.x} ${from.y}Q${from.x} ${from.y - 7} ${from.x - 12} ${from.y - 7}`);
    if (to) {
      parts.push(`M${to.x + 13} ${to.y - 8}Q${to.x} ${to.y - 8} ${to.x} ${to.y}`);
      head(to.x, to.y);
    }
  }
  return parts.join("");
};
const SVG = "http://www.w3.org/2000/svg";
const drawArrows = () => {
  const shown = $("show-arrows").checked ? rows.filter((row) => row.seen) : [];
  // all places are read before anything is written
  const paths = shown.map((row) => arrowPath(row.begin, row.stop, row.element.children[1]));
  for (const row of rows) row.svg?.remove();
  shown.forEach((row, place) => {
    row.svg = document.createElementNS(SVG, "svg");
    row.svg.setAttribute("aria-hidden", "true");
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("d", paths[place]);
    row.svg.append(path);
    row.element.children[1].append(row.svg);
  });
};
const arrowsSoon = later(drawArrows);
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) rows[entry.target.dataset.row].seen = entry.isIntersecting;
  arrowsSoon();
}, { rootMargin: "250px" });
new ResizeObserver(arrowsSoon).observe(text);
$("show-arrows").addEventListener("change", drawArrows);
$("show-marks").addEventListener("change", (event) => text.classList.toggle("marks", event.target.checked));

const build = (found, place) => {
  const until = performance.now() + 20, part = document.createDocumentFragment();
  for (; place + 1 < found.length && performance.now() < until; place++) {
    const element = buildRow(found[place], found[place + 1]);
    element.dataset.row = rows.length;
    rows.push({ begin: found[place], stop: found[place + 1], element, seen: false });
    part.append(element);
  }
  const added = [...part.children];
  text.append(part);
  for (const element of added) watcher.observe(element);
  if (place + 1 < found.length) setTimeout(build, 0, found, place);
  else document.documentElement.dataset.ready = "true";
};
const tokenOf = (target) => Number(target.closest?.("[data-t]")?.dataset.t ?? NaN);
for (const kind of ["pointerover", "pointerdown"]) {
  text.addEventListener(kind, (event) => {
    const t = tokenOf(event.target);
    if (!Number.isNaN(t)) setCursor(t);
  });
}
let at = -1;
followers.push((t) => {
  for (const kind of ["waad", "fai"]) {
    spans[kind][at - first]?.classList.remove("at");
    spans[kind][t - first]?.classList.add("at");
  }
  at = t;
});
$("to-text").addEventListener("click", () => {
  spans.waad[cursor - first]?.scrollIntoView({ block: "center" });
});
const count = (bit) => group(flags.reduce((sum, bits) => sum + (bits & bit ? 1 : 0), 0));
$("sets").textContent =
  `${count(LOC)} preplan tokens, ${count(GLOB)} anchors, ${count(DOM)} of them dominated, ${count(INTRO)} intros`;
$("prompt").textContent = data.texts.slice(0, first).join("");
$("prompt-details").open = first <= 120;
