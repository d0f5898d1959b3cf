"""A tab of headless Chromium for tests, driven over a pipe by the DevTools protocol."""

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars"),
    "--remote-debugging-pipe",
]
RECORD_LONG_TASKS = """
window.tasks = [];
new PerformanceObserver((list) => list.getEntries().forEach((entry) => tasks.push(entry.duration)))
  .observe({type: "longtask", buffered: true});
"""
# An observer hears of a frame in the order in which observers were made, so this one is told after the page's own
SETTLE = """
(async () => {
  const frame = () => new Promise(requestAnimationFrame);
  await frame();
  await frame();
  await new Promise((heard) => {
    const last = new IntersectionObserver(() => {
      last.disconnect();
      heard();
    });
    last.observe(document.documentElement);
  });
  await frame();
  await frame();
})()
"""
# Chromium reads from file descriptor 3 and writes to 4
START = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def _pipe() -> tuple[int, int]:
    """Returns (reading end, writing end), with numbers above those that Chromium needs for itself."""
    ends = os.pipe()
    moved = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return moved


class Browser:
    """A tab that is driven by JSON messages, each of which ends with NUL; collects errors and requests of the page."""

    def __init__(self, profile: Path):
        self.errors: list[str] = []
        self.requests: list[str] = []
        to_read, self.out = _pipe()
        self.into, to_write = _pipe()
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(to_read), str(to_write), *command],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self.waiting, self.numbers, self.session = b"", itertools.count(1), None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.addScriptToEvaluateOnNewDocument", source=RECORD_LONG_TASKS)

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.out)
        os.close(self.into)

    def call(self, method: str, **parameters):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(60)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _next(self, seconds: float) -> dict:
        until = time.monotonic() + seconds
        while b"\0" not in self.waiting:
            if not select.select([self.into], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError(f"chromium said nothing in {seconds} s")
            part = os.read(self.into, 1 << 20)
            if not part:
                raise RuntimeError(f"chromium has ended with {self.process.wait(10)}")
            self.waiting += part
        message, _, self.waiting = self.waiting.partition(b"\0")
        message = json.loads(message)
        self._note(message)
        return message

    def _note(self, message: dict) -> None:
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(parameters["exceptionDetails"])[:600])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(parameters["args"])[:600])
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.errors.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])

    def js(self, expression: str):
        """Evaluates an expression in the page and returns its value."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:600])
        return answer["result"].get("value")

    def open(self, path: Path, width: int = 1200, height: int = 900, dark: bool = False, touch: bool = False) -> float:
        """Opens a page; returns the seconds until it says that it is ready and has been painted."""
        self.errors.clear()
        self.requests.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        begin = time.perf_counter()
        self.call("Page.navigate", url=path.as_uri())
        while not self.js("document.documentElement?.dataset.ready === 'true'"):
            assert not self.errors, self.errors
            assert time.perf_counter() - begin < 60
            time.sleep(0.01)
        self.settle()
        return time.perf_counter() - begin

    def settle(self) -> None:
        """Waits until the page has been painted, its observers have heard of it, and what they asked for is painted."""
        self.js(SETTLE)

    def box(self, selector: str) -> dict:
        """Scrolls an element into view and returns its rectangle."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.js(f"{element}.scrollIntoView({{block: 'center'}})")
        self.settle()
        return self.js(f"{element}.getBoundingClientRect().toJSON()")

    def mouse(self, kind: str, x: float, y: float, **more) -> None:
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def hover(self, selector: str, across: float = 0.5, down: float = 0.5) -> tuple[float, float]:
        box = self.box(selector)
        x, y = box["x"] + across * box["width"], box["y"] + down * box["height"]
        self.mouse("mouseMoved", x, y)
        self.settle()
        return x, y

    def key(self, key: str, **more) -> None:
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text, **more)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, **more)
        self.settle()

    def text(self, selector: str) -> str:
        return self.js(f"document.querySelector({json.dumps(selector)}).textContent")

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def pixels(self, selector: str) -> int:
        """Returns the number of colours of a canvas."""
        canvas = f"document.querySelector({json.dumps(selector)})"
        return self.js(
            f"(() => {{const c = {canvas}, d = new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height)"
            ".data.buffer); return new Set(d).size})()"
        )
