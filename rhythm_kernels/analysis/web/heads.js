// The span of each head.

const board = $("spans"), heads = data.heads, layers = data.layers;
const span = floats(data.spans), kurtosis = floats(data.kurtosis), member = bytes(data.members);
const LOCAL = 1, GLOBAL = 2, RECEIVER = 4, EDGE = 34, FOOT = 20;
const logs = span.map((value) => Math.log(Math.max(value, 1e-3)));
const ranked = Float32Array.from(logs).sort();
const nearest = ranked[0], farthest = ranked[ranked.length - 1];
const median = (ranked[(ranked.length - 1) >> 1] + ranked[ranked.length >> 1]) / 2;
let chosen = null; // [index of the layer, head]
const cellSize = () => {
  const room = board.parentElement.clientWidth - EDGE - 2;
  const width = clamp(room / layers.length, 11, 36);
  return [width, Math.min(width, 22)];
};
/** Returns the colour of a span: from that of the shortest through that of the median to that of the longest. */
const tone = (log) => {
  const [low, middle, high] = [colors.waad, colors.grid, colors.fai].map(channels);
  const share = log < median ? (median - log) / (median - nearest) : (log - median) / (farthest - median || 1);
  const far = log < median ? low : high;
  return `rgb(${middle.map((x, c) => Math.round(x + (far[c] - x) * share)).join(" ")})`;
};
const drawSpans = () => {
  const [w, h] = cellSize(), width = EDGE + w * layers.length + 2, height = h * heads + FOOT;
  if (board.parentElement.clientWidth === 0) return;
  board.style.width = `${width}px`;
  board.style.height = `${height}px`;
  const context = fitted(board, width, height);
  context.textBaseline = "middle";
  for (let layer = 0; layer < layers.length; layer++) {
    const x = EDGE + layer * w;
    for (let head = 0; head < heads; head++) {
      const place = layer * heads + head, y = head * h, bits = member[place];
      const inset = bits & (LOCAL | GLOBAL) ? 4.5 : 1;
      context.fillStyle = tone(logs[place]);
      context.fillRect(x + inset, y + inset, w - 2 * inset, h - 2 * inset);
      if (bits & RECEIVER) {
        context.fillStyle = colors.ink;
        context.beginPath();
        context.arc(x + w / 2, y + h / 2, Math.min(2.6, w / 5), 0, 7);
        context.fill();
      }
      if (bits & (LOCAL | GLOBAL)) {
        context.strokeStyle = bits & LOCAL ? colors.waad : colors.fai;
        context.lineWidth = 2;
        context.strokeRect(x + 2.2, y + 2.2, w - 4.4, h - 4.4);
      }
    }
    if (data.sampled.includes(layers[layer])) {
      context.strokeStyle = colors.soft;
      context.lineWidth = 1;
      context.strokeRect(x - 0.5, 0.5, w + 1, h * heads - 1);
    }
  }
  context.fillStyle = colors.soft;
  context.textAlign = "center";
  const layerStep = Math.ceil(26 / w);
  for (let place = 0; place < layers.length; place += layerStep) {
    context.fillText(layers[place], EDGE + (place + 0.5) * w, height - FOOT / 2 + 2);
  }
  context.textAlign = "right";
  const headStep = Math.ceil(15 / h);
  for (let head = 0; head < heads; head += headStep) context.fillText(head, EDGE - 8, (head + 0.5) * h);
  if (chosen) {
    context.strokeStyle = colors.ink;
    context.lineWidth = 2;
    context.strokeRect(EDGE + chosen[0] * w, chosen[1] * h, w, h);
  }
};
const spansSoon = later(drawSpans);
const choose = (layer, head) => {
  chosen = [clamp(layer, 0, layers.length - 1), clamp(head, 0, heads - 1)];
  const place = chosen[0] * heads + chosen[1], bits = member[place];
  const groups = [[LOCAL, "local"], [GLOBAL, "global"], [RECEIVER, "receiver head"]].filter(([bit]) => bits & bit);
  const where = `Layer ${layers[chosen[0]]}, head ${chosen[1]}`;
  const numbers = `span ${long(span[place])} tokens, kurtosis ${long(kurtosis[place])}`;
  $("span-value").textContent = `${where}: ${[numbers, ...groups.map(([, name]) => name)].join(", ")}`;
  spansSoon();
};
const pick = (event) => {
  const box = board.getBoundingClientRect(), [w, h] = cellSize();
  choose(Math.floor((event.clientX - box.left - EDGE) / w), Math.floor((event.clientY - box.top) / h));
};
board.addEventListener("pointermove", pick);
board.addEventListener("pointerdown", pick);
board.addEventListener("keydown", (event) => {
  const steps = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };
  if (!(event.key in steps)) return;
  const [layer, head] = chosen ?? [0, 0], [right, down] = steps[event.key];
  choose(layer + right, head + down);
  event.preventDefault();
});
$("shortest").textContent = short(Math.exp(nearest));
$("median").textContent = short(Math.exp(median));
$("longest").textContent = short(Math.exp(farthest));
redraws.push(drawSpans);
new ResizeObserver(spansSoon).observe(board.parentElement);
