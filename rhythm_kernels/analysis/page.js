"use strict";
// Draws the page of `rhythm show` from the data inside it. Model and prompt are untrusted: text only enters as
// textContent, nothing is parsed as HTML.
(() => {
  const $ = (id) => document.getElementById(id);
  const bytes = (text) => {
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
    const raw = atob(text), found = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) found[i] = raw.charCodeAt(i);
    return found;
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
  const first = data.prompt_tokens; // of the answer; tokens are counted from the beginning of the prompt
  const end = data.texts.length;
  const PEAK = { waad: 16, fai: 32, receiver: 64 };
  const LOC = 1, GLOB = 2, DOM = 4, INTRO = 8;
  const flags = bytes(data.flags);
  const back = bytes(data.intro_back); // how many tokens before an anchor its intro is; 0: none
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
  const visible = (text) => text.replace(/\r?\n/g, "⏎").replace(/\t/g, "⇥");
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
    for (const each of redraws) each();
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  const themes = document.querySelectorAll("[data-theme-name]");
  const setTheme = (name) => {
    if (name) document.documentElement.dataset.theme = name;
    else delete document.documentElement.dataset.theme;
    for (const button of themes) button.setAttribute("aria-pressed", button.dataset.themeName === name);
    try {
      localStorage.setItem("rhythm-theme", name);
    } catch {} // a browser may keep nothing for files
    redraw();
  };

  /** A canvas as large as its box, in pixels of the screen; drawn in pixels of CSS. */
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
  const later = (draw) => {
    let asked = false;
    return () => {
      if (asked) return;
      asked = true;
      requestAnimationFrame(() => {
        asked = false;
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
    const names = [[LOC, "preplan"], [GLOB, "anchor"], [DOM, "dominated"], [INTRO, "intro"]];
    const peaks = SIGNALS.filter((signal) => bits & signal.peak).map((signal) => `${signal.title} peak`);
    sets.textContent = [...names.filter(([bit]) => bits & bit).map(([, name]) => name), ...peaks].join(", ");
    $("to-text").hidden = $("values").hidden = false;
  });

  // ---- curves ------------------------------------------------------------------------------------------------------

  const stage = $("curves").parentElement, over = $("cursor");
  const LEFT = 52, RIGHT = 8, TITLE = 38, GAP = 12, AXIS = 22; // pixels
  const LATE = 32; // tokens that few others follow: FAI is a mean over these few
  const MANY = 500; // tokens
  let view = [first, end];
  let panels = []; // {top, low, high} of each signal, as drawn
  const FEWEST = Math.min(8, end - first);
  let box = null; // what `size` found, until the page changes its width
  const size = () => {
    if (box) return box;
    const width = stage.clientWidth;
    const panel = width < 600 ? 64 : 84;
    const height = SIGNALS.length * (TITLE + panel + GAP) + AXIS;
    box = { width, panel, height, plot: Math.max(1, width - LEFT - RIGHT) };
    return box;
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

  /** The line of values[from..to): where several tokens fall on a pixel, from their smallest to their largest. */
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

  /** The least and the largest value; of many, without single ones far above the rest. */
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

  /** Dots at the peaks, the tallest of those that would touch, and the words of the tallest that have room. */
  const drawPeaks = (context, signal, from, to, y, top, plot) => {
    const tallest = new Map();
    for (let t = from; t < to; t++) {
      if (!(flags[t - first] & signal.peak)) continue;
      const place = Math.floor(xOf(t) / 6), other = tallest.get(place);
      if (other === undefined || signal.values[t - first] > signal.values[other - first]) tallest.set(place, t);
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
    for (const canvas of [$("curves"), over]) canvas.style.height = `${height}px`;
    const context = fitted($("curves"), width, height);
    panels = SIGNALS.map((signal, place) => {
      return drawPanel(context, signal, place * (TITLE + panel + GAP) + TITLE, panel, plot);
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
    view = [first, end]; // the line of all tokens
    trace(context, values.waad, first, end, x, (value) => height - 3 - (value / top) * (height - 6));
    view = whole;
    context.globalAlpha = 1;
    context.strokeStyle = length < plot - 1 ? colors.soft : colors.line;
    context.lineWidth = 1;
    context.strokeRect(begin + 0.5, 0.5, Math.max(2, length - 1), height - 1);
  };
  let selected = null; // [x, x] of a drag
  const drawCursor = () => {
    const { width, height, plot, panel } = size();
    if (width === 0) return;
    const context = fitted(over, width, height);
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
    SIGNALS.forEach((signal, place) => {
      context.beginPath();
      context.arc(x, panels[place].y(signal.values[cursor - first]), 4, 0, 7);
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
    box = null;
    drawSoon();
  }).observe(stage);

  const pointers = new Map(); // id -> x, of those that are down
  let pressed = null; // {x, view, pan} of a drag with a mouse
  let pinched = null; // {distance, middle, view} of two fingers
  const xIn = (event, element) => event.clientX - element.getBoundingClientRect().left;
  over.addEventListener("pointerdown", (event) => {
    const x = xIn(event, over);
    pointers.set(event.pointerId, x);
    if (event.pointerType !== "touch") {
      if (event.button !== 0) return;
      over.setPointerCapture(event.pointerId);
      pressed = { x, view, pan: event.shiftKey };
    } else if (pointers.size === 2) {
      const [a, b] = [...pointers.values()];
      pinched = { distance: Math.max(20, Math.abs(a - b)), middle: (a + b) / 2, view };
    } else setCursor(tokenAt(x));
  });
  over.addEventListener("pointermove", (event) => {
    const x = xIn(event, over), { plot } = size();
    if (pointers.has(event.pointerId)) pointers.set(event.pointerId, x);
    if (pinched && pointers.size === 2) {
      const [a, b] = [...pointers.values()];
      const length = ((pinched.view[1] - pinched.view[0]) * pinched.distance) / Math.max(20, Math.abs(a - b));
      const at = pinched.view[0] + ((pinched.middle - LEFT) / plot) * (pinched.view[1] - pinched.view[0]);
      const begin = at - (((a + b) / 2 - LEFT) / plot) * length;
      setView(begin, begin + length);
      return;
    }
    if (pressed?.pan) {
      const moved = ((pressed.x - x) * (pressed.view[1] - pressed.view[0])) / plot;
      setView(pressed.view[0] + moved, pressed.view[1] + moved);
    } else if (pressed && Math.abs(x - pressed.x) > 4) {
      selected = [pressed.x, x];
      drawCursor();
    }
    if (!pinched) setCursor(tokenAt(x));
  });
  const release = (event) => {
    pointers.delete(event.pointerId);
    if (pointers.size < 2) pinched = null;
    if (selected && event.type === "pointerup") {
      const [a, b] = [Math.min(...selected), Math.max(...selected)].map(tokenAt);
      setView(a, b + 1);
    }
    pressed = selected = null;
    drawCursor();
  };
  over.addEventListener("pointerup", release);
  over.addEventListener("pointercancel", release);
  over.addEventListener("dblclick", () => setView(first, end));
  over.addEventListener("wheel", (event) => {
    const { plot } = size();
    if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      if (view[1] - view[0] >= end - first) return;
      event.preventDefault();
      const moved = (event.deltaX * (view[1] - view[0])) / plot;
      setView(view[0] + moved, view[1] + moved);
    } else if (event.ctrlKey || event.metaKey || document.activeElement === over) { // else the page scrolls
      event.preventDefault();
      const lines = event.deltaMode === 1 ? 20 : 1;
      const rate = event.ctrlKey && Math.abs(event.deltaY) < 40 ? 0.012 : 0.003; // a touchpad's pinch: small steps
      zoom(Math.exp(event.deltaY * lines * rate), clamp(tokenAt(xIn(event, over)) + 0.5, view[0], view[1]));
    }
  }, { passive: false });
  over.addEventListener("keydown", (event) => {
    const at = cursor < 0 ? Math.ceil(view[0]) : cursor, page = Math.max(1, Math.round((view[1] - view[0]) / 2));
    const leap = event.shiftKey ? 10 : 1;
    const steps = { ArrowLeft: -leap, ArrowRight: leap, PageUp: -page, PageDown: page, Home: -end, End: end };
    if (event.key in steps && !event.ctrlKey && !event.metaKey) {
      const next = clamp(cursor < 0 ? at : at + steps[event.key], first, end - 1), length = view[1] - view[0];
      setCursor(next);
      if (next < view[0] || next + 1 > view[1]) setView(next - length / 2, next + length / 2);
    } else if (event.key === "+" || event.key === "=") zoom(0.5, at + 0.5);
    else if (event.key === "-") zoom(2, at + 0.5);
    else if (event.key === "0" || event.key === "Escape") setView(first, end);
    else return;
    event.preventDefault();
  });
  const inView = () => (cursor >= view[0] && cursor < view[1] ? cursor + 0.5 : undefined);
  $("zoom-in").addEventListener("click", () => zoom(0.5, inView()));
  $("zoom-out").addEventListener("click", () => zoom(2, inView()));
  $("zoom-reset").addEventListener("click", () => setView(first, end));
  const moveTo = (event) => {
    const t = first + ((xIn(event, $("navigator")) - LEFT) / size().plot) * (end - first), length = view[1] - view[0];
    setView(t - length / 2, t + length / 2);
  };
  $("navigator").addEventListener("pointerdown", (event) => {
    $("navigator").setPointerCapture(event.pointerId);
    moveTo(event);
  });
  $("navigator").addEventListener("pointermove", (event) => event.buttons & 1 && moveTo(event));

  // ---- the text ----------------------------------------------------------------------------------------------------

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

  // ---- maps --------------------------------------------------------------------------------------------------------

  const parts = data.maps;
  let part = 0, spot = null; // [row, column] in bins
  const weights = (map, kind) => {
    if (typeof map[kind] === "string") map[kind] = floats(map[kind]); // when it is first looked at
    return map[kind];
  };
  const weight = (map, kind, row, column) => weights(map, kind)[(row * (row + 1)) / 2 + column];
  const pictures = new Map(); // of a part and a kind, in the present colours
  const picture = (kind) => {
    const key = `${part} ${kind}`;
    if (pictures.has(key)) return pictures.get(key);
    const map = parts[part], n = map.bins, list = weights(map, kind);
    const canvas = new OffscreenCanvas(n, n), context = canvas.getContext("2d"), image = context.createImageData(n, n);
    const pixels = image.data, ground = channels(colors.card);
    const full = channels(colors[kind === "local" ? "waad" : "fai"]);
    let most = 1e-12;
    for (let i = 0; i < list.length; i++) if (list[i] > most) most = list[i];
    // colours by the root of a weight: a power of each would take long
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
    const [local, global_] = ["local", "global"].map((kind) => long(weight(map, kind, ...spot)));
    const words = map.bin === 1 ? ["Token", "token"] : ["Tokens", "tokens"];
    $("map-value").textContent =
      `${words[0]} ${binName(map, spot[0])} → ${words[1]} ${binName(map, spot[1])}: local ${local}, global ${global_}`;
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
    soon.forEach((draw, place) => setTimeout(draw, 40 * place)); // each makes its picture in a task of its own
  };
  parts.forEach((map, place) => {
    const whole = map.begin === 0 && map.end === end;
    const some = `Tokens ${group(map.begin)} to ${group(map.end - 1)}`;
    const button = make("button", "", whole ? `All ${group(end)} tokens` : some);
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

  // ---- spans of the heads ------------------------------------------------------------------------------------------

  const board = $("spans"), heads = data.heads, layers = data.layers;
  const span = floats(data.spans), kurtosis = floats(data.kurtosis), member = bytes(data.members);
  const LOCAL = 1, GLOBAL = 2, RECEIVER = 4, EDGE = 34, FOOT = 20;
  const logs = span.map((value) => Math.log(Math.max(value, 1e-3)));
  const ranked = Float32Array.from(logs).sort();
  const nearest = ranked[0], farthest = ranked[ranked.length - 1];
  const median = (ranked[(ranked.length - 1) >> 1] + ranked[ranked.length >> 1]) / 2;
  let chosen = null; // [layer, head], their places
  const cellSize = () => {
    const room = board.parentElement.clientWidth - EDGE - 2;
    const width = clamp(room / layers.length, 11, 36);
    return [width, Math.min(width, 22)];
  };
  /** From the shortest span over the median to the longest. */
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
    const every = Math.ceil(26 / w);
    for (let place = 0; place < layers.length; place += every) {
      context.fillText(layers[place], EDGE + (place + 0.5) * w, height - FOOT / 2 + 2);
    }
    context.textAlign = "right";
    const each = Math.ceil(15 / h);
    for (let head = 0; head < heads; head += each) context.fillText(head, EDGE - 8, (head + 0.5) * h);
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

  // ---- begin -------------------------------------------------------------------------------------------------------

  let kept = "";
  try {
    kept = localStorage.getItem("rhythm-theme") ?? "";
  } catch {}
  for (const button of themes) button.addEventListener("click", () => setTheme(button.dataset.themeName));
  readColors();
  setPart(0);
  setTheme(["light", "dark"].includes(kept) ? kept : "");
  build(cuts(), 0);
})();
