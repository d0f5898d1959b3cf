"""Draws the figures of `rhythm show` with matplotlib: the curves, the tinted text, the maps and the spans."""

import math
import warnings
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from rhythm_kernels.analysis.page import ShownAnswer
from rhythm_kernels.analysis.style import COLORS, hide_frame

DPI = 150
MOST_WORDS = 400  # tokens of the answer in the tinted text
LINE = 76  # characters of a line of the tinted text
NAMED = 12  # peaks of a curve that are labelled with their words
LATE = 32  # last tokens, which do not set the scale of a curve: their FAI is a mean over few tokens
MANY = 500  # in an answer of more tokens, the scale leaves out single values far above the rest
STYLE = {"font.family": "DejaVu Sans", "font.size": 9, "text.parse_math": False, "axes.unicode_minus": False}


def write(shown: ShownAnswer, folder: Path) -> list[Path]:
    """Writes curves.png, text.png, credit.png, maps.png, maps-window.png and spans.png; returns the paths."""
    drawn = {
        "curves.png": draw_curves(shown),
        "text.png": draw_text(shown),
        "credit.png": draw_credit(shown),
        "maps.png": draw_maps(shown, 0),
        "maps-window.png": draw_maps(shown, 1),
        "spans.png": draw_spans(shown),
    }
    for name, figure in drawn.items():
        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # the font lacks some scripts
            figure.savefig(folder / name, dpi=DPI, facecolor="white")
    return [folder / name for name in drawn]


def draw_curves(shown: ShownAnswer) -> Figure:
    """Draws WAAD, FAI, entropy and receiver-head FAI along the answer, with peaks and the words of the highest."""
    reading = shown.reading
    parts = (
        ("WAAD, tokens", "waad", reading.waad, reading.waad_peaks),
        ("FAI", "fai", reading.fai, reading.fai_peaks),
        ("entropy, nats", "entropy", reading.entropy, None),
        ("receiver-head FAI", "receiver", reading.receiver_fai, reading.receiver_peaks),
    )
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 7.2), layout="constrained")
        axes = figure.subplots(len(parts), 1, sharex=True)
        begin = shown.prompt_tokens
        place = np.arange(begin, reading.tokens)
        for ax, (name, color, values, peaks) in zip(axes, parts, strict=True):
            values = values[begin:].numpy()
            low, high = _scale(values)
            width = 1.1 if len(values) <= MANY else 0.4
            ax.plot(place, values.clip(max=high), color=COLORS[color], linewidth=width)
            reach = (high - low) or 1.0
            ax.margins(x=0.01)
            ax.set_ylim(low - 0.06 * reach, high + (0.24 if peaks is not None else 0.06) * reach)
            ax.set_ylabel(name, color=COLORS["text"])
            _quiet(ax)
            if peaks is not None:
                tops = peaks[begin:].numpy().nonzero()[0]
                named = _name_peaks(ax, shown, tops, values, high)
                dots = tops if len(values) <= MANY else named
                ax.plot(dots + begin, values[dots].clip(max=high), "o", color=COLORS[color], markersize=3)
        axes[-1].set_xlabel("token, counted from the beginning of the prompt", color=COLORS["text"])
    return figure


def _scale(values: np.ndarray) -> tuple[float, float]:
    """Returns the range of the values without the LATE last ones and, among many, without single large ones."""
    values = values[:-LATE] if len(values) > LATE else values
    high = float(values.max())
    return float(values.min()), min(high, 2.5 * float(np.quantile(values, 0.99))) if len(values) > MANY else high


def _name_peaks(ax, shown: ShownAnswer, tops: np.ndarray, values: np.ndarray, high: float) -> np.ndarray:
    """Writes the words of the highest peaks that have room; returns these peaks."""
    begin, count = shown.prompt_tokens, len(values)
    named: list[int] = []
    for top in sorted(tops, key=lambda t: -values[t]):
        word = _visible(shown.texts[begin + top]).strip()[:14]
        if word and len(named) < NAMED and all(abs(top - other) > 0.07 * count for other in named):
            named.append(top)
            at = (begin + top, min(values[top], high))
            ax.annotate(word, at, (0, 5), textcoords="offset points", ha="center", fontsize=8, color=COLORS["text"])
    return np.array(named, dtype=np.int64)


def draw_text(shown: ShownAnswer) -> Figure:
    """Draws the first words of the answer, tinted by WAAD and by FAI to the end, with their peaks (Fig. 8)."""
    reading = shown.reading
    return _draw_words(
        shown,
        ("WAAD; peaks underlined", "waad", reading.waad, reading.waad_peaks),
        ("FAI to the end of the answer; peaks underlined", "fai", reading.fai, reading.fai_peaks),
    )


def draw_credit(shown: ShownAnswer) -> Figure:
    """Draws the first words of the answer, tinted by WAAD and by credit's FAI, with preplan tokens and anchors."""
    reading = shown.reading
    return _draw_words(
        shown,
        ("WAAD; preplan tokens underlined", "waad", reading.waad, reading.sets.preplan),
        ("FAI, 10 to 50 tokens later; anchors underlined", "fai", reading.credit_fai, reading.sets.anchors),
    )


def _draw_words(shown: ShownAnswer, *parts: tuple[str, str, Tensor, Tensor]) -> Figure:
    """Draws the words once for each of two (title, colour, values [T], bool [T] of the underlined tokens)."""
    reading, begin = shown.reading, shown.prompt_tokens
    end = min(reading.tokens, begin + MOST_WORDS)
    lines = _lines([_visible(text) for text in shown.texts[begin:end]], shown.texts[begin:end])
    count = 1 + max(line for line, *_ in lines)
    with matplotlib.rc_context(STYLE):
        wide, high, share = (
            11,
            0.7 + 0.2 * count,
            0.485,
        )  # inches, inches, and the width of a column relative to the figure
        figure = Figure(figsize=(wide, high))
        font = 0.97 * 72 * wide * share / (LINE + 1) / 0.602  # points: a character is 0.602 times as wide as high
        for left, (title, color, values, members) in zip((0.01, 0.505), parts, strict=True):
            ax = figure.add_axes((left, 0.3 / high, share, (high - 0.6) / high))
            heat = _heat(values[begin:])
            for t, (line, column, word) in enumerate(lines):
                box = (column, line - 0.42), len(word), 0.8
                ax.add_patch(Rectangle(*box, color=COLORS[color], alpha=0.62 * heat[t], linewidth=0))
                if members[begin + t]:
                    under = (column + 0.08, line + 0.4), max(0.2, len(word) - 0.16), 0.09
                    ax.add_patch(Rectangle(*under, color=COLORS[color], linewidth=0))
                ax.text(column, line, word, family="DejaVu Sans Mono", fontsize=font, va="center", color=COLORS["text"])
            ax.set(xlim=(0, LINE + 1), ylim=(count - 0.3, -0.7))
            ax.set_title(title, fontsize=9, color=COLORS["text"], loc="left")
            ax.axis("off")
        if end < reading.tokens:
            rest = f"{reading.tokens - end:,} more tokens are on the page"
            figure.text(0.01, 0.1 / high, rest, fontsize=8, color=COLORS["soft"])
    return figure


def _lines(words: list[str], raw: list[str]) -> list[tuple[int, int, str]]:
    """Returns (line, column, word) of each word; lines break after LINE characters and after line breaks."""
    placed, line, column = [], 0, 0
    for word, text, after in zip(words, raw, [*raw[1:], ""], strict=True):
        word = word[:LINE]
        if column and column + len(word) > LINE:
            line, column = line + 1, 0
        placed.append((line, column, word))
        column += len(word)
        if "\n" in text and not after.lstrip(" ").startswith("\n"):
            line, column = line + 1, 0
    return placed


def _heat(values: Tensor) -> list[float]:
    """Returns the values scaled from their 5th to their 98th percentile to 0 to 1."""
    values = values.double()
    low, high = (float(values.quantile(share)) for share in (0.05, 0.98))
    return ((values - low) / max(high - low, 1e-9)).clamp(0, 1).tolist()


def draw_maps(shown: ShownAnswer, index: int) -> Figure:
    """Draws the mean maps of the local and of the global heads; the answer begins at the dashes."""
    maps, begin = shown.maps[index], shown.prompt_tokens
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 5.6), layout="constrained")
        edges = maps.begin - 0.5, maps.begin + len(maps.local_map) * maps.bin - 0.5
        for ax, name, color, weights in zip(
            figure.subplots(1, 2), ("local", "global"), ("waad", "fai"), (maps.local_map, maps.global_map), strict=True
        ):
            picture = (weights / weights.max().clamp(min=1e-12)).numpy() ** 0.4
            tones = LinearSegmentedColormap.from_list(name, ["#ffffff", COLORS[color]])
            ax.imshow(picture, cmap=tones, vmin=0, vmax=1, extent=(*edges, *edges[::-1]), interpolation="auto")
            if maps.begin < begin < maps.end:
                dashes = {"color": COLORS["soft"], "linewidth": 0.8, "linestyle": (0, (3, 4))}
                ax.plot([begin - 0.5] * 2, [begin, maps.end], **dashes)
                ax.plot([maps.begin, begin], [begin - 0.5] * 2, **dashes)
            ax.set_xlim(edges[0], maps.end - 0.5)
            ax.set_ylim(maps.end - 0.5, edges[0])
            ax.set_title(f"mean map of the {name} heads", fontsize=10, color=COLORS["text"])
            ax.set_xlabel("token looked at" + f", {maps.bin} in a column" * (maps.bin > 1), color=COLORS["text"])
            _quiet(ax, grid=False)
        figure.axes[0].set_ylabel("token that looks", color=COLORS["text"])
    return figure


def draw_spans(shown: ShownAnswer) -> Figure:
    """Draws the span of every head: layers are columns; local and global heads are outlined, receiver heads dotted."""
    reading = shown.reading
    layers, heads = reading.spans.shape
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(6, min(14, 1.8 + 0.3 * layers)), 1.3 + 0.24 * heads), layout="constrained")
        ax = figure.subplots()
        spans = reading.spans.clamp(min=1e-3).double().log().T.numpy()
        tones = LinearSegmentedColormap.from_list("span", [COLORS["waad"], "#efedea", COLORS["fai"]])
        low, middle, high = float(spans.min()), float(np.median(spans)), float(spans.max())
        norm = TwoSlopeNorm(middle, min(low, middle - 1e-3), max(high, middle + 1e-3))
        image = ax.imshow(spans, cmap=tones, norm=norm, aspect="auto")
        for place, layer in enumerate(reading.sampled):
            column = reading.layers.index(layer)
            frame = {"fill": False, "edgecolor": COLORS["text"], "linewidth": 0.8}
            ax.add_patch(Rectangle((column - 0.5, -0.5), 1, heads, **frame))
            for group, color in ((reading.groups.local_heads, "waad"), (reading.groups.global_heads, "fai")):
                for head in group[place].nonzero().flatten().tolist():
                    own = {"fill": False, "edgecolor": COLORS[color], "linewidth": 1.8}
                    gap = {"fill": False, "edgecolor": "white", "linewidth": 4.5}
                    for frame in (gap, own):
                        ax.add_patch(Rectangle((column - 0.37, head - 0.37), 0.74, 0.74, **frame))
        layer, head = reading.receivers.nonzero(as_tuple=True)
        ax.plot(layer, head, "o", color=COLORS["text"], markersize=3, linestyle="none")
        step = math.ceil(layers / 32)
        ax.set_xticks(range(0, layers, step), reading.layers[::step])
        ax.set_xlabel("layer; the sampled ones are framed, a dot is a receiver head", color=COLORS["text"])
        ax.set_ylabel("head", color=COLORS["text"])
        _quiet(ax, grid=False)
        bar = figure.colorbar(image, ax=ax, pad=0.01)
        ticks = sorted({low, middle, high})
        bar.set_ticks(ticks, labels=[f"{math.exp(tick):.3g}" for tick in ticks])
        bar.minorticks_off()
        bar.ax.tick_params(colors=COLORS["text"], length=2, labelsize=8)
        bar.set_label("span, tokens: shortest, median, longest", color=COLORS["text"])
        bar.outline.set_visible(False)
    return figure


def _visible(text: str) -> str:
    return text.replace("\r", "").replace("\n", "⏎").replace("\t", "→")


def _quiet(ax, grid: bool = True) -> None:
    ax.tick_params(colors=COLORS["text"], length=2, labelsize=8)
    hide_frame(ax)
    ax.spines[["left", "bottom"]].set_color(COLORS["grid"])
    if grid:
        ax.grid(axis="y", color=COLORS["grid"], linewidth=0.6)
        ax.set_axisbelow(True)
