// The text of the answer, tinted by WAAD and by FAI, with arrows from dominated anchors to their intros.

const text = $("text");
const spans = { waad: [], fai: [] }; // of each token of the answer
const rows = []; // {begin, stop, element, seen}
const bounds = (list) => {
  const sorted = Float32Array.from(list).sort();
  const at = (share) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
  return [at(0.05), Math.max(at(0.98), at(0.05) + 1e-9)];
};
const NEAR = "FAI, 10 to 50 tokens later", WHOLE = "FAI to the end of the answer";
const heats = { waad: values.waad, fai: values.credit_fai };
const scales = { waad: bounds(heats.waad), fai: bounds(heats.fai) };
const names = { waad: "WAAD", fai: NEAR };
const heat = (kind, t) => {
  const [low, high] = scales[kind];
  return clamp((heats[kind][t - first] - low) / (high - low), 0, 1).toFixed(3);
};

/** Returns where rows begin: after line breaks, or after a sentence or phrase of a long paragraph. */
const cuts = () => {
  const starts = [first];
  for (let t = first; t < end; t++) {
    const length = t + 1 - starts[starts.length - 1], word = data.texts[t];
    const paragraph = length >= 24 && word.includes("\n") && !/^\s*\n/.test(data.texts[t + 1] ?? "");
    const sentence = length >= 140 && /[.!?;]\s*$/.test(word);
    if (paragraph || sentence || length >= 220) starts.push(t + 1);
  }
  if (starts[starts.length - 1] !== end) starts.push(end);
  return starts;
};
const buildRow = (begin, stop) => {
  const row = make("div", "row");
  for (const kind of ["waad", "fai"]) {
    const cell = make("div", `cell ${kind}`);
    cell.dataset.name = names[kind];
    for (let t = begin; t < stop; t++) {
      const bits = flags[t - first], raw = data.texts[t];
      const span = make("span", "", visible(raw));
      if (bits & PREPLAN) span.classList.add("preplan");
      if (bits & ANCHOR) span.classList.add("anchor");
      if (bits & DOMINATED) span.classList.add("dominated");
      span.dataset.t = t;
      span.style.setProperty("--h", heat(kind, t));
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

/** Returns the arrows from dominated anchors to their intros, above the words; across lines only their ends. */
const arrowPath = (begin, stop, cell) => {
  const box = cell.getBoundingClientRect();
  const place = (t) => {
    const rect = spans.fai[t - first].getClientRects()[0];
    return rect && { x: rect.left - box.left + rect.width / 2, y: rect.top - box.top + 2 };
  };
  const parts = [];
  const head = (x, y) => parts.push(`M${x - 3.4} ${y - 4.6}L${x} ${y}L${x + 3.6} ${y - 4.2}`);
  for (let t = begin; t < Math.min(stop + 3, end); t++) {
    const step = introBack[t - first], u = t - step;
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
  // reads all positions before it writes anything, so that the layout is computed once
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
$("to-the-end").addEventListener("change", (event) => {
  heats.fai = event.target.checked ? values.fai : values.credit_fai;
  scales.fai = bounds(heats.fai);
  names.fai = event.target.checked ? WHOLE : NEAR;
  $("fai-name").textContent = names.fai;
  for (const row of rows) row.element.children[1].dataset.name = names.fai;
  spans.fai.forEach((span, place) => span.style.setProperty("--h", heat("fai", first + place)));
});

/** Builds rows for 20 ms at a time, so that the page stays responsive while it loads. */
const build = (starts, row) => {
  const until = performance.now() + 20, part = document.createDocumentFragment();
  for (; row + 1 < starts.length && performance.now() < until; row++) {
    const element = buildRow(starts[row], starts[row + 1]);
    element.dataset.row = rows.length;
    rows.push({ begin: starts[row], stop: starts[row + 1], element, seen: false });
    part.append(element);
  }
  const added = [...part.children];
  text.append(part);
  for (const element of added) watcher.observe(element);
  if (row + 1 < starts.length) setTimeout(build, 0, starts, row);
  else document.documentElement.dataset.ready = "true";
};
const tokenOf = (target) => Number(target.closest?.("[data-t]")?.dataset.t ?? NaN);
for (const kind of ["pointerover", "pointerdown"]) {
  text.addEventListener(kind, (event) => {
    const t = tokenOf(event.target);
    if (!Number.isNaN(t)) setCursor(t);
  });
}
let marked = -1; // the token that is outlined
followers.push((t) => {
  for (const kind of ["waad", "fai"]) {
    spans[kind][marked - first]?.classList.remove("at");
    spans[kind][t - first]?.classList.add("at");
  }
  marked = t;
});
$("to-text").addEventListener("click", () => {
  spans.waad[cursor - first]?.scrollIntoView({ block: "center" });
});
const count = (bit) => group(flags.reduce((sum, bits) => sum + (bits & bit ? 1 : 0), 0));
$("sets").textContent =
  `${count(PREPLAN)} preplan tokens, ${count(ANCHOR)} anchors, ${count(DOMINATED)} of them dominated, ${count(INTRO)} intros`;
$("prompt").textContent = data.texts.slice(0, first).join("");
$("prompt-details").open = first <= 120;
