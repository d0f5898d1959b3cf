// The curves of WAAD, FAI, entropy and receiver-head FAI along the tokens, and the navigator below them.

const stage = $("curves").parentElement, overlay = $("cursor");
const LEFT = 52, RIGHT = 8, TITLE = 38, GAP = 12, AXIS = 22; // pixels
const LATE = 32; // last tokens, which do not set the scale: their FAI is a mean over few tokens
const MANY = 500; // with more tokens in view, the scale leaves out single values far above the rest
let view = [first, end];
let panels = []; // {top, y} of each signal, as drawn
const FEWEST = Math.min(8, end - first);
let currentSize = null; // of the stage; null after its width has changed
const size = () => {
  if (currentSize) return currentSize;
  const width = stage.clientWidth;
  const panel = width < 600 ? 64 : 84;
  const height = SIGNALS.length * (TITLE + panel + GAP) + AXIS;
  currentSize = { width, panel, height, plot: Math.max(1, width - LEFT - RIGHT) };
  return currentSize;
};
const xOf = (t) => LEFT + ((t + 0.5 - view[0]) * size().plot) / (view[1] - view[0]);
const tokenAt = (x) => Math.floor(view[0] + ((x - LEFT) * (view[1] - view[0])) / size().plot);

const setView = (begin, stop) => {
  const length = clamp(stop - begin, FEWEST, end - first);
  begin = clamp(begin, first, end - length);
  view = [begin, begin + length];
  drawSoon();
};
const zoom = (factor, at = (view[0] + view[1]) / 2) => {
  const length = clamp((view[1] - view[0]) * factor, FEWEST, end - first);
  const share = (at - view[0]) / (view[1] - view[0]);
  setView(at - share * length, at + (1 - share) * length);
};

/** Draws the line of values[from..to); where several tokens share a pixel, from their smallest to their largest. */
const trace = (context, line, from, to, x, y) => {
  const perPixel = (view[1] - view[0]) / size().plot;
  context.beginPath();
  if (perPixel <= 1) {
    for (let t = from; t < to; t++) context.lineTo(x(t), y(line[t - first]));
  } else {
    const step = Math.ceil(perPixel);
    for (let t = from - (from % step); t < to; t += step) {
      let low = Infinity, high = -Infinity, lowFirst = true;
      for (let i = Math.max(t, from); i < Math.min(t + step, to); i++) {
        const value = line[i - first];
        if (value < low) [low, lowFirst] = [value, false];
        if (value > high) [high, lowFirst] = [value, true];
      }
      if (low > high) continue;
      const at = x(t + step / 2 - 0.5);
      context.lineTo(at, y(lowFirst ? low : high));
      context.lineTo(at, y(lowFirst ? high : low));
    }
  }
  context.stroke();
};
const niceStep = (range, count) => {
  const raw = range / count, power = 10 ** Math.floor(Math.log10(raw));
  return [1, 2, 5, 10].find((digit) => digit * power >= raw * 0.999) * power;
};

/** Returns the least and the largest value; among many, without single ones far above the rest. */
const scaleOf = (list) => {
  const sorted = list.slice().sort(), high = sorted[sorted.length - 1];
  return [sorted[0], sorted.length > MANY ? Math.min(high, 2.5 * sorted[Math.floor(0.99 * sorted.length)]) : high];
};

const drawPanel = (context, signal, top, panel, plot) => {
  const from = Math.max(first, Math.floor(view[0])), to = Math.min(end, Math.ceil(view[1]));
  const until = Math.max(Math.min(to, end - LATE), from + 1);
  let [low, high] = scaleOf(signal.values.subarray(from - first, until - first));
  if (low < 0.35 * high) low = Math.min(0, low);
  if (!(high > low)) high = low + (Math.abs(low) || 1);
  const y = (value) => Math.max(top - 3, top + panel - ((value - low) / (high - low)) * panel);

  context.textBaseline = "alphabetic";
  context.textAlign = "left";
  context.font = "600 12px ui-sans-serif, system-ui, sans-serif";
  context.fillStyle = colors[signal.name];
  context.fillText(signal.title, LEFT, top - TITLE + 14);
  const after = LEFT + context.measureText(signal.title).width + 7;
  context.font = "12px ui-sans-serif, system-ui, sans-serif";
  context.fillStyle = colors.soft;
  context.fillText(signal.unit, after, top - TITLE + 14);

  context.textAlign = "right";
  context.textBaseline = "middle";
  context.lineWidth = 1;
  const step = niceStep(high - low, 2.6);
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step) {
    const at = Math.round(y(value)) + 0.5;
    context.strokeStyle = colors.grid;
    context.beginPath();
    context.moveTo(LEFT, at);
    context.lineTo(LEFT + plot, at);
    context.stroke();
    context.fillStyle = colors.soft;
    context.fillText(short(Math.abs(value) < step * 1e-6 ? 0 : value), LEFT - 8, at);
  }

  context.save();
  context.beginPath();
  context.rect(LEFT, top - TITLE + 18, plot, panel + TITLE);
  context.clip();
  context.strokeStyle = colors[signal.name];
  context.lineWidth = 1.4;
  context.lineJoin = "round";
  trace(context, signal.values, Math.max(first, from - 1), Math.min(end, to + 1), xOf, y);
  if (signal.peak) drawPeaks(context, signal, from, to, y, top, plot);
  context.restore();
  return { top, y };
};

/** Draws dots at the peaks, where several would touch at the tallest, and the words of the tallest that have room. */
const drawPeaks = (context, signal, from, to, y, top, plot) => {
  const tallest = new Map();
  for (let t = from; t < to; t++) {
    if (!(flags[t - first] & signal.peak)) continue;
    const column = Math.floor(xOf(t) / 6), other = tallest.get(column);
    if (other === undefined || signal.values[t - first] > signal.values[other - first]) tallest.set(column, t);
  }
  const peaks = [...tallest.values()].sort((a, b) => signal.values[b - first] - signal.values[a - first]);
  context.fillStyle = colors[signal.name];
  for (const t of peaks) {
    context.beginPath();
    context.arc(xOf(t), y(signal.values[t - first]), 2.6, 0, 7);
    context.fill();
  }
  context.textAlign = "center";
  context.textBaseline = "alphabetic";
  context.fillStyle = colors.ink;
  const taken = [];
  for (const t of peaks.slice(0, 60)) {
    const word = label(t);
    if (!word) continue;
    const half = context.measureText(word).width / 2 + 5;
    const x = clamp(xOf(t), LEFT + half, LEFT + plot - half);
    if (taken.length > plot / 70 || taken.some(([a, b]) => x - half < b && a < x + half)) continue;
    taken.push([x - half, x + half]);
    context.fillText(word, x, Math.max(top - TITLE + 30, y(signal.values[t - first]) - 7));
  }
};

const drawCurves = () => {
  const { width, panel, height, plot } = size();
  if (width === 0) return;
  for (const canvas of [$("curves"), overlay]) canvas.style.height = `${height}px`;
  const context = fitted($("curves"), width, height);
  panels = SIGNALS.map((signal, row) => {
    return drawPanel(context, signal, row * (TITLE + panel + GAP) + TITLE, panel, plot);
  });
  const step = Math.max(1, niceStep(view[1] - view[0], plot / 90));
  context.fillStyle = colors.soft;
  context.textAlign = "center";
  context.textBaseline = "top";
  for (let t = Math.ceil(view[0] / step) * step; t < view[1]; t += step) {
    if (xOf(t) < LEFT + plot - 14) context.fillText(group(t), xOf(t), height - AXIS + 6);
  }
  const [from, to] = [Math.floor(view[0]), Math.ceil(view[1])];
  $("range").textContent = `tokens ${group(from)} to ${group(to - 1)} of ${group(end)}`;
  $("zoom-reset").disabled = to - from >= end - first;
  drawNavigator();
  drawCursor();
};
const drawNavigator = () => {
  const canvas = $("navigator"), width = canvas.clientWidth, height = 26;
  const context = fitted(canvas, width, height);
  const { plot } = size(), x = (t) => LEFT + ((t + 0.5 - first) * plot) / (end - first);
  const top = values.waad.reduce((a, b) => Math.max(a, b), 1e-9);
  const [begin, length] = [x(view[0] - 0.5), ((view[1] - view[0]) * plot) / (end - first)];
  context.fillStyle = colors.grid;
  context.fillRect(begin, 0, length, height);
  context.strokeStyle = colors.soft;
  context.globalAlpha = 0.7;
  context.lineWidth = 0.7;
  const whole = view;
  view = [first, end]; // `trace` draws the tokens in view: here all
  trace(context, values.waad, first, end, x, (value) => height - 3 - (value / top) * (height - 6));
  view = whole;
  context.globalAlpha = 1;
  context.strokeStyle = length < plot - 1 ? colors.soft : colors.line;
  context.lineWidth = 1;
  context.strokeRect(begin + 0.5, 0.5, Math.max(2, length - 1), height - 1);
};
let selected = null; // [x, x] of a drag, in pixels
const drawCursor = () => {
  const { width, height, plot, panel } = size();
  if (width === 0) return;
  const context = fitted(overlay, width, height);
  if (selected) {
    const [a, b] = [Math.min(...selected), Math.max(...selected)].map((x) => clamp(x, LEFT, LEFT + plot));
    context.fillStyle = colors.soft;
    context.globalAlpha = 0.16;
    context.fillRect(a, 0, b - a, height - AXIS);
    context.globalAlpha = 1;
  }
  if (cursor < view[0] - 0.5 || cursor >= view[1]) return;
  const x = Math.floor(xOf(cursor)) + 0.5;
  context.strokeStyle = colors.soft;
  context.lineWidth = 1;
  context.beginPath();
  for (const { top } of panels) {
    context.moveTo(x, top - 4);
    context.lineTo(x, top + panel + 4);
  }
  context.stroke();
  SIGNALS.forEach((signal, row) => {
    context.beginPath();
    context.arc(x, panels[row].y(signal.values[cursor - first]), 4, 0, 7);
    context.fillStyle = colors.card;
    context.fill();
    context.lineWidth = 2;
    context.strokeStyle = colors[signal.name];
    context.stroke();
  });
};
const drawSoon = later(drawCurves);
redraws.push(drawCurves);
followers.push(drawCursor);
new ResizeObserver(() => {
  currentSize = null;
  drawSoon();
}).observe(stage);
