// The mean attention maps of the local and of the global heads.

const parts = data.maps;
let part = 0, spot = null; // the map that is shown, and the cell under the pointer, [row, column]
const weights = (map, kind) => {
  if (typeof map[kind] === "string") map[kind] = floats(map[kind]); // decoded when it is drawn
  return map[kind];
};
const weight = (map, kind, row, column) => weights(map, kind)[(row * (row + 1)) / 2 + column];
const pictures = new Map(); // by part and kind, in the current colours
const picture = (kind) => {
  const key = `${part} ${kind}`;
  if (pictures.has(key)) return pictures.get(key);
  const map = parts[part], n = map.bins, list = weights(map, kind);
  const canvas = new OffscreenCanvas(n, n), context = canvas.getContext("2d"), image = context.createImageData(n, n);
  const pixels = image.data, ground = channels(colors.card);
  const full = channels(colors[kind === "local" ? "waad" : "fai"]);
  let most = 1e-12;
  for (let i = 0; i < list.length; i++) if (list[i] > most) most = list[i];
  // looks colours up by the root of a weight, because a power of each weight would take long
  const STEPS = 1024, table = new Uint8ClampedArray(3 * (STEPS + 1));
  for (let i = 0; i <= STEPS; i++) {
    const heat = (i / STEPS) ** 0.8;
    for (let c = 0; c < 3; c++) table[3 * i + c] = ground[c] + (full[c] - ground[c]) * heat;
  }
  for (let row = 0, place = 0; row < n; row++) {
    for (let column = 0; column <= row; column++, place++) {
      const color = 3 * Math.round(STEPS * Math.sqrt(list[place] / most)), pixel = 4 * (row * n + column);
      pixels[pixel] = table[color];
      pixels[pixel + 1] = table[color + 1];
      pixels[pixel + 2] = table[color + 2];
      pixels[pixel + 3] = 255;
    }
  }
  context.putImageData(image, 0, 0);
  pictures.set(key, canvas);
  return canvas;
};
const MAPS = { local: $("map-local"), global: $("map-global") };
const drawMap = (kind) => {
  const canvas = MAPS[kind], side = canvas.clientWidth, map = parts[part];
  if (side === 0) return;
  const context = fitted(canvas, side, side), scale = side / map.bins;
  context.imageSmoothingEnabled = map.bins > canvas.width;
  context.drawImage(picture(kind), 0, 0, side, side);
  context.lineWidth = 1;
  context.strokeStyle = colors.line;
  context.strokeRect(0.5, 0.5, side - 1, side - 1);
  const line = (x, y, a, b) => {
    context.beginPath();
    context.moveTo(x, y);
    context.lineTo(a, b);
    context.stroke();
  };
  const edge = ((first - map.begin) / map.bin) * scale;
  if (edge > 0 && edge < side) {
    context.strokeStyle = colors.soft;
    context.setLineDash([3, 4]);
    line(edge, edge, edge, side);
    line(0, edge, edge, edge);
    context.setLineDash([]);
  }
  const half = (place) => Math.floor((place + 0.5) * scale) + 0.5;
  const row = spot ? spot[0] : Math.floor((cursor - map.begin) / map.bin);
  context.strokeStyle = colors.ink;
  context.globalAlpha = 0.55;
  if (cursor >= 0 || spot) {
    if (row >= 0 && row < map.bins) line(0, half(row), (row + 1) * scale, half(row));
  }
  if (spot) line(half(spot[1]), spot[1] * scale, half(spot[1]), side);
  context.globalAlpha = 1;
};
const soon = Object.keys(MAPS).map((kind) => later(() => drawMap(kind)));
const mapsSoon = () => soon.forEach((draw) => draw());
const binName = (map, bin) => {
  const from = map.begin + bin * map.bin, to = Math.min(map.end, from + map.bin);
  if (to - from === 1) return `${group(from)} ${quoted(from)}`;
  const words = visible(data.texts.slice(from, Math.min(to, from + 6)).join(""));
  return `${group(from)} to ${group(to - 1)} “${words}${to - from > 6 ? "…" : ""}”`;
};
const setSpot = (row, column) => {
  const map = parts[part];
  spot = [clamp(row, 0, map.bins - 1), 0];
  spot[1] = clamp(column, 0, spot[0]);
  const [localWeight, globalWeight] = ["local", "global"].map((kind) => long(weight(map, kind, ...spot)));
  const words = map.bin === 1 ? ["Token", "token"] : ["Tokens", "tokens"];
  $("map-value").textContent =
    `${words[0]} ${binName(map, spot[0])} → ${words[1]} ${binName(map, spot[1])}: local ${localWeight}, global ${globalWeight}`;
  mapsSoon();
  const looks = map.begin + spot[0] * map.bin;
  if (looks >= first) setCursor(looks);
};
for (const canvas of Object.values(MAPS)) {
  const move = (event) => {
    const box = canvas.getBoundingClientRect(), n = parts[part].bins;
    const [down, across] = [(event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width];
    setSpot(Math.floor(down * n), Math.floor(across * n));
  };
  canvas.addEventListener("pointermove", move);
  canvas.addEventListener("pointerdown", move);
  canvas.addEventListener("pointerleave", () => {
    spot = null;
    mapsSoon();
  });
  canvas.addEventListener("keydown", (event) => {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (!(event.key in steps)) return;
    const leap = event.shiftKey ? 10 : 1, [down, right] = steps[event.key];
    const [row, column] = spot ?? [parts[part].bins - 1, 0];
    setSpot(row + leap * down, column + leap * right);
    event.preventDefault();
  });
}
const setPart = (chosen) => {
  part = chosen;
  spot = null;
  const map = parts[part];
  [...$("parts").children].forEach((button, place) => button.setAttribute("aria-pressed", place === part));
  const binned = `${map.bin} tokens in each row and column: what a row gives to a column, on average over its tokens`;
  $("part").textContent = map.bin === 1 ? "" : binned;
  for (const ends of document.querySelectorAll(".ends")) {
    ends.children[0].textContent = group(map.begin);
    ends.children[2].textContent = group(map.end - 1);
  }
  soon.forEach((draw, place) => setTimeout(draw, 40 * place)); // each map is coloured in a task of its own
};
parts.forEach((map, place) => {
  const whole = map.begin === 0 && map.end === end;
  const range = `Tokens ${group(map.begin)} to ${group(map.end - 1)}`;
  const button = make("button", "", whole ? `All ${group(end)} tokens` : range);
  button.type = "button";
  button.addEventListener("click", () => setPart(place));
  $("parts").append(button);
});
$("parts").parentElement.hidden = parts.length === 1 && parts[0].bin === 1;
redraws.push(() => {
  pictures.clear();
  mapsSoon();
});
let mapsSeen = false;
new IntersectionObserver((entries) => {
  mapsSeen = entries[0].isIntersecting;
  if (mapsSeen) mapsSoon();
}).observe(MAPS.local.parentElement.parentElement);
followers.push(() => mapsSeen && mapsSoon());
new ResizeObserver(mapsSoon).observe(MAPS.local);
