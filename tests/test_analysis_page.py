"""The page of `rhythm show` in a real browser, headless Chromium."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser

from rhythm_kernels import HeadGroups, Rhythm, coupled_sets, find_peaks, group_heads, token_credit
from rhythm_kernels.analysis.maps import MeanMaps
from rhythm_kernels.analysis.page import ShownAnswer, render
from rhythm_kernels.analysis.reading import Reading
from rhythm_kernels.console import visible

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium"),
    pytest.mark.xdist_group("chromium"),
]
PROMPT, TOKENS = 11, 200
HEADS, LAYERS, SAMPLED = 6, 8, [3, 4]
SCRIPT = '</script><img src=x onerror="window.hacked=1">'
NASTY = [SCRIPT, "<b>bold</b>", "&amp;", "\u2028", "十二", "🍎", "\n\n", "\t", "", "a\u202eb"]

# ---- a page ----------------------------------------------------------------------------------------------------------


def made_up(tokens: int = TOKENS, window: tuple[int, int] | None = (40, 90)) -> ShownAnswer:
    """Returns an answer of random numbers, with words that would break a careless page."""
    torch.manual_seed(0)
    words = [" the", " number", " of", " pencils", ".", " Sara", " has", " 12", "\n", " so", *NASTY]
    texts = [words[place % len(words)] for place in range(tokens)]
    response = torch.arange(tokens) >= PROMPT
    mask = response[None]
    waad = torch.where(response, 1 + 4 * torch.rand(tokens), 0.0)
    fai, credit_fai, receiver_fai = (torch.rand(3, tokens) ** 6 / 20).unbind()
    rhythm = Rhythm(waad[None], credit_fai[None])
    spans = torch.rand(LAYERS, HEADS).mul(5).exp()
    groups = group_heads(spans[SAMPLED])

    def peaks(values):
        return find_peaks(values[None], mask, min_quantile=0.6)[0]

    def maps(begin, end, bins):
        size = -(-(end - begin) // bins)
        n = -(-(end - begin) // size)
        pair = [torch.rand(n, n).pow(8).tril().mul(0.9) for _ in range(2)]
        return MeanMaps(*pair, begin, end, size)

    sets = coupled_sets(mask, rhythm)
    reading = Reading(
        ids=torch.arange(tokens),
        response=response,
        waad=waad,
        fai=fai,
        credit_fai=credit_fai,
        receiver_fai=receiver_fai,
        entropy=torch.where(response, torch.rand(tokens) * 3, 0.0),
        waad_peaks=peaks(waad),
        fai_peaks=peaks(fai),
        receiver_peaks=peaks(receiver_fai),
        sets=type(sets)(*(members[0] for members in sets)),
        gamma=token_credit("coupled", mask, rhythm)[0],
        layers=list(range(LAYERS)),
        spans=spans,
        kurtosis=torch.rand(LAYERS, HEADS, dtype=torch.float64) * 50,
        receivers=torch.rand(LAYERS, HEADS) < 0.2,
        sampled=SAMPLED,
        groups=HeadGroups(*groups),
    )
    shown = [maps(0, tokens, 256)] + ([maps(*window, 1024)] if window else [])
    return ShownAnswer(reading, texts, shown, "made <up>", 0.6, {"seed": "0 </script>"}, {"torch": "2"})


# ---- opening and reading it ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def answer() -> ShownAnswer:
    return made_up()


@pytest.fixture(scope="module")
def path(answer, tmp_path_factory) -> Path:
    written = tmp_path_factory.mktemp("page") / "index.html"
    written.write_text(render(answer), encoding="utf-8")
    return written


def value(browser: Browser, name: str) -> float:
    return float(browser.text(f"[data-value={name}]"))


def at(browser: Browser) -> int:
    """Returns the token that the readout shows."""
    return int(browser.text("#where").split("(")[0].replace("Token", "").replace(",", ""))


def check_readout(browser: Browser, answer: ShownAnswer) -> None:
    t, reading = at(browser), answer.reading
    for name, values in (
        ("waad", reading.waad),
        ("fai", reading.fai),
        ("credit_fai", reading.credit_fai),
        ("entropy", reading.entropy),
        ("receiver", reading.receiver_fai),
        ("gamma", reading.gamma),
    ):
        assert value(browser, name) == pytest.approx(float(values[t]), rel=1e-3, abs=1e-6), name
    words = browser.text("[data-value=sets]")
    assert ("preplan" in words) == bool(reading.sets.preplan[t]) and ("anchor" in words) == bool(
        reading.sets.anchors[t]
    )
    assert ("dominated" in words) == bool(reading.sets.dominated[t])
    assert ("WAAD peak" in words) == bool(reading.waad_peaks[t])


# ---- what it does ----------------------------------------------------------------------------------------------------


def test_it_renders_without_errors_or_network(browser, path):
    browser.open(path)
    for canvas in ("#curves", "#navigator", "#map-local", "#map-global", "#spans"):
        assert browser.pixels(canvas) > 8, f"{canvas} is empty"
    assert browser.errors == []
    assert len(browser.requests) == 1 and browser.requests[0] == path.as_uri()


def test_nothing_that_a_model_wrote_is_markup(browser, answer, path):
    browser.open(path)
    assert (
        browser.js("window.hacked") is None
        and browser.js("document.querySelectorAll('#text img, #text b').length") == 0
    )
    shown = browser.js("[...document.querySelectorAll('.cell.fai span')].map((s) => s.textContent)")
    assert shown == [visible(text).replace("\t", "⇥") for text in answer.texts[PROMPT:]] and "a⟨U+202E⟩b" in shown
    assert browser.text("#prompt") == "".join(answer.texts[:PROMPT])
    place = PROMPT + next(t for t, text in enumerate(answer.texts[PROMPT:]) if "onerror" in text)
    browser.hover(f".cell.waad [data-t='{place}']")
    assert at(browser) == place and "onerror" in browser.text("#where")
    browser.hover("#map-local", 0.2, 0.9)
    assert browser.js("window.hacked") is None
    assert "made <up>" in browser.text("h1 + p") and "0 </script>" in browser.text("footer")


def test_curves_tell_the_values_of_a_token(browser, answer, path):
    browser.open(path)
    seen = set()
    for across in (0.1, 0.4, 0.77, 0.99):
        browser.hover("#cursor", across)
        check_readout(browser, answer)
        seen.add(at(browser))
    assert len(seen) == 4 and max(seen) >= TOKENS - 4


def test_the_text_and_the_curves_share_a_cursor(browser, answer, path):
    browser.open(path)
    browser.hover(".cell.fai [data-t='57']")
    assert at(browser) == 57
    check_readout(browser, answer)
    marked = "[...document.querySelectorAll('.at')].map((s) => s.dataset.t)"
    assert browser.js(marked) == ["57", "57"]
    before = browser.js("document.querySelector('#cursor').toDataURL()")
    browser.hover(".cell.fai [data-t='90']")
    assert browser.js(marked) == ["90", "90"]
    assert browser.js("document.querySelector('#cursor').toDataURL()") != before
    browser.hover("#cursor", 0.97)
    browser.js("document.querySelector('#to-text').click()")
    browser.settle()
    top = browser.js("document.querySelector('.at').getBoundingClientRect().top")
    assert browser.js("document.querySelector('.at').dataset.t") == str(at(browser)) and 100 < top < 800


def test_zoom_by_wheel_drag_buttons_and_reset(browser, path):
    browser.open(path)
    whole = browser.text("#range")
    assert whole == f"tokens {PROMPT} to {TOKENS - 1} of {TOKENS}"
    x, y = browser.hover("#cursor")
    browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=-300)
    browser.settle()
    assert browser.text("#range") == whole  # the page scrolls
    x, y = browser.hover("#cursor")
    token = at(browser)
    browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=-300, modifiers=2)
    browser.settle()
    begin, end = shown(browser)
    assert end - begin < TOKENS / 2 and begin <= token <= end
    browser.hover("#cursor")
    assert abs(at(browser) - token) <= 1  # what is below the pointer stays there

    browser.js("document.querySelector('#zoom-reset').click()")
    browser.settle()
    assert browser.text("#range") == whole
    box = browser.box("#cursor")
    y = box["y"] + 50
    a, b = box["x"] + 0.3 * box["width"], box["x"] + 0.5 * box["width"]
    browser.mouse("mouseMoved", a, y)
    browser.mouse("mousePressed", a, y, button="left", buttons=1, clickCount=1)
    browser.mouse("mouseMoved", (a + b) / 2, y, button="left", buttons=1)
    browser.mouse("mouseMoved", b, y, button="left", buttons=1)
    browser.mouse("mouseReleased", b, y, button="left", clickCount=1)
    browser.settle()
    begin, end = shown(browser)
    assert 30 <= end - begin <= 50 and 45 <= begin <= 75

    browser.js("document.querySelector('#zoom-in').click()")
    browser.settle()
    closer = shown(browser)
    assert closer[1] - closer[0] < end - begin
    browser.js("document.querySelector('#cursor').dispatchEvent(new MouseEvent('dblclick'))")
    browser.settle()
    assert browser.text("#range") == whole


def shown(browser: Browser) -> tuple[int, int]:
    words = browser.text("#range").split()
    return int(words[1].replace(",", "")), int(words[3].replace(",", ""))


def test_the_keyboard_is_enough(browser, answer, path):
    browser.open(path)
    browser.js("document.querySelector('#cursor').focus()")
    browser.key("ArrowRight")
    assert at(browser) == PROMPT
    browser.key("ArrowRight")
    browser.key("ArrowRight", modifiers=8)  # shift
    assert at(browser) == PROMPT + 11
    check_readout(browser, answer)
    whole = shown(browser)
    browser.key("+")
    assert shown(browser)[1] - shown(browser)[0] < whole[1] - whole[0]
    browser.key("End")
    assert at(browser) == TOKENS - 1 and shown(browser)[1] == TOKENS - 1  # the view follows
    browser.key("0")
    assert shown(browser) == whole
    browser.js("document.querySelector('#map-local').focus()")
    browser.key("ArrowUp")
    browser.key("ArrowRight")
    assert "Token 198" in browser.text("#map-value") and "token 1 " in browser.text("#map-value")
    browser.js("document.querySelector('#spans').focus()")
    browser.key("ArrowRight")
    browser.key("ArrowDown")
    assert browser.text("#span-value").startswith("Layer 1, head 1: span ")


def test_maps_tell_rows_columns_and_weights(browser, answer, path):
    browser.open(path)
    browser.hover("#map-global", 0.251, 0.501)
    text = browser.text("#map-value")
    maps = answer.maps[0]
    row, column = (int(word) for word in (text.split()[1], text.split("token ")[1].split()[0]))
    assert (row, column) == (100, 50)
    local_value, global_value = (float(text.split(f"{name} ")[1].split(",")[0]) for name in ("local", "global"))
    assert local_value == pytest.approx(float(maps.local_map[row, column]), rel=1e-3)
    assert global_value == pytest.approx(float(maps.global_map[row, column]), rel=1e-3)
    assert at(browser) == row
    check_readout(browser, answer)

    browser.js("document.querySelectorAll('#parts button')[1].click()")
    browser.hover("#map-local", 0.01, 0.99)
    text = browser.text("#map-value")
    assert text.startswith("Token 89 ") and "token 40 " in text
    browser.hover("#map-local", 0.9, 0.1)  # above the diagonal: the row's last visible token
    assert "token 45 " in browser.text("#map-value")


def test_heads_tell_their_span_and_groups(browser, answer, path):
    browser.open(path)
    reading = answer.reading
    wide = browser.js("document.querySelector('#spans').getBoundingClientRect().toJSON()")
    cell = (wide["width"] - 36) / LAYERS
    texts = {}
    for layer in range(LAYERS):
        box = browser.box("#spans")
        for head in range(HEADS):
            y = box["y"] + (head + 0.5) * (box["height"] - 20) / HEADS
            browser.mouse("mouseMoved", box["x"] + 34 + (layer + 0.5) * cell, y)
            browser.settle()
            text = browser.text("#span-value")
            texts[layer, head] = text
            assert text.startswith(f"Layer {layer}, head {head}: ")
            assert float(text.split("span ")[1].split()[0]) == pytest.approx(
                float(reading.spans[layer, head]), rel=1e-3
            )
            assert ("receiver" in text) == bool(reading.receivers[layer, head])
    for place, layer in enumerate(SAMPLED):
        for head in range(HEADS):
            assert (", local" in texts[layer, head]) == bool(reading.groups.local_heads[place, head])
            assert (", global" in texts[layer, head]) == bool(reading.groups.global_heads[place, head])


def test_arrows_lead_to_intros_where_they_are_in_view(browser, answer, path):
    browser.open(path)
    browser.box(".row")
    marks = browser.js("document.querySelectorAll('.cell.fai svg path').length")
    assert 0 < marks < browser.js("document.querySelectorAll('.row').length") + 1
    assert browser.js("document.querySelector('.cell.fai svg path').getAttribute('d').length") > 20
    dominated = browser.js("[...document.querySelectorAll('.cell.fai .dominated')].map((s) => Number(s.dataset.t))")
    assert dominated == answer.reading.sets.dominated.nonzero().flatten().tolist()
    browser.js("document.querySelector('#show-arrows').click()")
    assert browser.js("document.querySelectorAll('.cell.fai svg').length") == 0
    browser.js("document.querySelector('#show-marks').click()")
    assert browser.js("document.querySelector('#text').classList.contains('marks')") is False


def test_the_text_is_tinted_by_fai_to_the_end_on_demand(browser, answer, path):
    """The paper's Fig. 8 shows FAI to the end; credit's own FAI is the first choice."""
    browser.open(path)
    browser.box(".row")
    read = "[...document.querySelectorAll('.cell.fai [data-t]')].map((s) => Number(s.style.getPropertyValue('--h')))"

    def heat(values: torch.Tensor) -> np.ndarray:
        values = values[answer.reading.response].double().numpy()
        low, high = (np.sort(values)[min(len(values) - 1, int(share * len(values)))] for share in (0.05, 0.98))
        return np.clip((values - low) / max(high - low, 1e-9), 0, 1)

    np.testing.assert_allclose(browser.js(read), heat(answer.reading.credit_fai), atol=2e-3)
    browser.js("document.querySelector('#to-the-end').click()")
    np.testing.assert_allclose(browser.js(read), heat(answer.reading.fai), atol=2e-3)
    assert browser.js("document.querySelector('#fai-name').textContent") == "FAI to the end of the answer"
    browser.js("document.querySelector('#to-the-end').click()")
    np.testing.assert_allclose(browser.js(read), heat(answer.reading.credit_fai), atol=2e-3)


def test_light_dark_and_the_switch(browser, path):
    ground = "getComputedStyle(document.body).backgroundColor"
    browser.open(path)
    light, light_map = browser.js(ground), browser.js("document.querySelector('#map-local').toDataURL()")
    browser.open(path, dark=True)
    dark, dark_map = browser.js(ground), browser.js("document.querySelector('#map-local').toDataURL()")
    assert light != dark and light_map != dark_map and browser.errors == []
    browser.js("document.querySelector('[data-theme-name=light]').click()")
    browser.settle()
    assert browser.js(ground) == light and browser.js("document.querySelector('#map-local').toDataURL()") == light_map
    browser.js("document.querySelector('[data-theme-name=\"\"]').click()")
    assert browser.js(ground) == dark


@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_shows_all_of_it(browser, answer, path, width):
    browser.open(path, width=width, height=800, touch=True)
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert browser.js("innerWidth") == width
    tops = browser.js("[...document.querySelectorAll('.row')][0].children[1].offsetTop")
    assert tops > 10  # stacked
    box = browser.box("#cursor")
    point = {"x": box["x"] + box["width"] * 0.6, "y": box["y"] + box["height"] * 0.5}
    browser.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[point])
    browser.settle()
    browser.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    check_readout(browser, answer)
    before = shown(browser)
    middle, y = box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5
    for apart in (30, 60, 90):
        points = [{"x": middle - apart, "y": y, "id": 0}, {"x": middle + apart, "y": y, "id": 1}]
        browser.call("Input.dispatchTouchEvent", type="touchStart" if apart == 30 else "touchMove", touchPoints=points)
    browser.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    browser.settle()
    assert shown(browser)[1] - shown(browser)[0] < 0.6 * (before[1] - before[0])  # a pinch
    assert browser.errors == []


def test_a_page_of_8192_tokens(browser, tmp_path, record_property):
    path = tmp_path / "long.html"
    path.write_text(render(made_up(8192 + PROMPT, window=(1000, 2024))), encoding="utf-8")
    opened = browser.open(path)
    loading = browser.js("[...tasks]")
    assert browser.js("document.querySelectorAll('.cell.waad span').length") == 8192
    browser.js("tasks.length = 0")
    frames = browser.js(
        "new Promise((done) => { const gaps = []; let last = performance.now(), y = 0; const step = (now) => {"
        "gaps.push(now - last); last = now; y += 400; scrollTo(0, y);"
        "if (gaps.length < 90) requestAnimationFrame(step); else done(gaps) }; requestAnimationFrame(step) })"
    )
    hovered = time.perf_counter()
    for across in (0.2, 0.4, 0.6, 0.8):
        browser.hover("#cursor", across)
    hovered = (time.perf_counter() - hovered) / 4
    browser.js("document.querySelector('#zoom-in').click()")
    browser.js("document.querySelectorAll('#parts button')[1].click()")
    browser.settle()
    browser.js("new Promise((done) => setTimeout(() => done(1), 300))")
    after = browser.js("[...tasks]")
    size = path.stat().st_size / 2**20
    report = (
        f"a page of 8,192 tokens ({size:.1f} MiB): open in {opened:.2f} s, longest task while it loads "
        f"{max(loading, default=0):.0f} ms, while it scrolls and zooms {max(after, default=0):.0f} ms; frames of "
        f"scrolling: median {sorted(frames)[len(frames) // 2]:.0f} ms, longest {max(frames):.0f} ms; a hover "
        f"{hovered * 1e3:.0f} ms"
    )
    print(report)
    record_property("resources", report)
    assert browser.errors == [] and opened < 30
    assert max(after, default=0) < 2000, after


def test_an_answer_of_one_token(browser, tmp_path):
    path = tmp_path / "short.html"
    path.write_text(render(made_up(PROMPT + 1, window=None)), encoding="utf-8")
    browser.open(path)
    browser.hover("#cursor")
    assert at(browser) == PROMPT and browser.errors == []
