// Mouse, touch and keyboard on the curves: the cursor, zoom and pan.

const pointers = new Map(); // id -> x of the pointers that are down
let pressed = null; // {x, view, pan} of a drag with a mouse
let pinched = null; // {distance, middle, view} of two fingers
const xIn = (event, element) => event.clientX - element.getBoundingClientRect().left;
overlay.addEventListener("pointerdown", (event) => {
  const x = xIn(event, overlay);
  pointers.set(event.pointerId, x);
  if (event.pointerType !== "touch") {
    if (event.button !== 0) return;
    overlay.setPointerCapture(event.pointerId);
    pressed = { x, view, pan: event.shiftKey };
  } else if (pointers.size === 2) {
    const [a, b] = [...pointers.values()];
    pinched = { distance: Math.max(20, Math.abs(a - b)), middle: (a + b) / 2, view };
  } else setCursor(tokenAt(x));
});
overlay.addEventListener("pointermove", (event) => {
  const x = xIn(event, overlay), { plot } = size();
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
overlay.addEventListener("pointerup", release);
overlay.addEventListener("pointercancel", release);
overlay.addEventListener("dblclick", () => setView(first, end));
overlay.addEventListener("wheel", (event) => {
  const { plot } = size();
  if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
    if (view[1] - view[0] >= end - first) return;
    event.preventDefault();
    const moved = (event.deltaX * (view[1] - view[0])) / plot;
    setView(view[0] + moved, view[1] + moved);
  } else if (event.ctrlKey || event.metaKey || document.activeElement === overlay) { // else the page scrolls
    event.preventDefault();
    const lines = event.deltaMode === 1 ? 20 : 1;
    const rate = event.ctrlKey && Math.abs(event.deltaY) < 40 ? 0.012 : 0.003; // a touchpad's pinch sends small steps
    zoom(Math.exp(event.deltaY * lines * rate), clamp(tokenAt(xIn(event, overlay)) + 0.5, view[0], view[1]));
  }
}, { passive: false });
overlay.addEventListener("keydown", (event) => {
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
