"""Writes the report of `benchmarks.attention`: a table, a summary and a log-log plot."""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.attention_variants import HORIZON, VARIANTS, WINDOW, Shape, work
from benchmarks.measure import Measured, environment, heading, markdown_table, publish, ratio

RATIOS = [("maps", "full"), ("maps", "band"), ("maps", "groups")]  # the statistics against the paper's way
for attention in ("sdpa", "cudnn", "triton"):  # against the attention itself
    RATIOS += [(statistics, attention) for statistics in ("sampled", "band", "groups", "fused")]
SHORT = {"group_waad": "waad of a group", "group_fai": "fai of a group", "column_mean": "means of columns"}


class Row(NamedTuple):
    """The results at one number of tokens, by the names of variants."""

    measured: dict[str, Measured]
    skipped: dict[str, str]
    """The reasons why variants did not run."""
    errors: dict[str, float]
    gives: dict[str, list[str]]
    """The fields of `Answer` that variants returned."""


def table(results: dict[int, Row], names: list[str]) -> str:
    lines = []
    notes: list[str] = []
    for name in names:
        gives = next((row.gives[name] for row in results.values() if name in row.gives), [])
        what = ", ".join(SHORT.get(field, field) for field in gives) or "-"
        lines.append([name, what, *(_cell(name, row, notes) for row in results.values())])
    for above, below in RATIOS:
        if above in names and below in names:
            ratios = [_ratio(row, above, below) for row in results.values()]
            lines.append([f"{above} / {below}", "", *(f"{x:.3g}x" if x else "" for x in ratios)])
    head = ["", "gives", *(f"{tokens:,}" for tokens in results)]
    return "\n".join([markdown_table(head, lines), *(f"\n({i}) {note}" for i, note in enumerate(notes, 1))])


def _cell(name: str, row: Row, notes: list[str]) -> str:
    if name in row.skipped:
        reason = row.skipped[name]
        if reason.startswith(("needs", "only at")):
            return reason
        note = f"{name}: {reason}"
        if note not in notes:
            notes.append(note)
        return f"({notes.index(note) + 1})"
    m = row.measured[name]
    inside = f" ({m.kernel_seconds * 1e3:.3g})" if m.kernel_seconds else ""
    return f"{_milliseconds(m.seconds)}{inside} ms, {m.extra_bytes / 2**20:,.0f} MiB"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f}" if seconds >= 1 else f"{seconds * 1e3:.3g}"


def _ratio(row: Row, above: str, below: str) -> float | None:
    if above in row.measured and below in row.measured:
        return ratio(row.measured[above], row.measured[below])
    return None


def summary(results: dict[int, Row]) -> str:
    """Compares maps with band at the largest size at which both ran, and says how band's time grows."""
    sentences = []
    both = [tokens for tokens, row in results.items() if _ratio(row, "maps", "band")]
    if both:
        row = results[both[-1]]
        memory = row.measured["band"].extra_bytes / max(row.measured["maps"].extra_bytes, 1)
        sentences.append(
            f"At {both[-1]:,} tokens band is {_ratio(row, 'maps', 'band'):.3g}x as fast as maps, "
            f"with {memory:.1%} of the memory."
        )
    banded = [tokens for tokens, row in results.items() if "band" in row.measured]
    if len(banded) > 1:
        few, many = banded[-2:]
        growth = results[many].measured["band"].seconds / results[few].measured["band"].seconds
        sentences.append(f"band takes {growth:.2f}x the time at {many:,} tokens that it takes at {few:,}.")
    return " ".join(sentences)


def plot(results: dict[int, Row], names: list[str], title: str, path: Path) -> None:
    """Draws time and memory over the tokens, both logarithmic. Each line is labelled at its end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    colors = dict(zip(names, matplotlib.color_sequences["tab20"][::2] + matplotlib.color_sequences["tab20"][1::2]))
    panels = {
        "time, ms": lambda m: m.seconds * 1e3,
        "peak extra memory, MiB": lambda m: max(m.extra_bytes, 2**16) / 2**20,
    }
    for axes, (label, value) in zip(figure.subplots(1, 2), panels.items()):
        ends = {}
        for name in names:
            points = [(n, value(row.measured[name])) for n, row in results.items() if name in row.measured]
            if points:
                ours = VARIANTS[name].ours
                axes.plot(*zip(*points), "o-", color=colors[name], lw=2.2 if ours else 1.2, ms=4 if ours else 3)
                ends[name] = points[-1]
        axes.set(xscale="log", yscale="log", xlabel="tokens", title=label)
        axes.set_xticks(list(results), [f"{n:,}" for n in results])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(right=max(results) * (max(results) / min(results)) ** 0.2)  # room for the labels
        for name, height in _apart({name: y for name, (_, y) in ends.items()}, axes.get_ylim()).items():
            weight = "bold" if VARIANTS[name].ours else "normal"
            text = axes.annotate(name, (ends[name][0], height), (7, 0), textcoords="offset points", fontsize=8)
            text.set(color=colors[name], va="center", weight=weight)
    figure.suptitle(title, fontsize=9)
    unfinished = path.with_name(f"{path.name}.unfinished")
    figure.savefig(unfinished, format="png", dpi=130)
    unfinished.replace(path)


def _apart(heights: dict[str, float], limits: tuple[float, float]) -> dict[str, float]:
    """Returns heights on a logarithmic axis, moved up where labels would touch."""
    step = (limits[1] / limits[0]) ** 0.045
    placed, last = {}, 0.0
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        last = placed[name] = max(height, last * step)
    return placed


def report(args: argparse.Namespace, shape: Shape, device: torch.device, results: dict[int, Row]) -> str:
    """Returns the report, after writing it where `--out` asks for it."""
    where = environment(device)
    heads = f"{shape.query_heads} query and {shape.key_heads} key heads of {shape.head_size}, {args.dtype}"
    worst = max((error for row in results.values() for error in row.errors.values()), default=0.0)
    rounds = f"medians of at most {args.rounds} interleaved rounds; largest error {worst:.1e}"
    text = f"{heading(where)}\n\n{heads}; {rounds}\n\n{table(results, args.variants)}\n\n{summary(results)}\n"
    rows = {
        tokens: {
            "measured": {name: m._asdict() for name, m in row.measured.items()},
            "work": {name: w._asdict() for name in row.measured if (w := work(name, shape, tokens))},
            "skipped": row.skipped,
            "errors": row.errors,
        }
        for tokens, row in results.items()
    }
    data = {**where, "shape": heads, "window": WINDOW, "horizon": HORIZON, "tokens": rows}
    text = publish(args.out, text, data)
    if args.out is not None:
        try:
            plot(results, args.variants, f"{where['device']}: {heads}", Path(f"{args.out}.png"))
        except ImportError as error:
            text += f"\nno plot: {one_line(error)}\n"
    return text


def one_line(error: BaseException) -> str:
    """Returns the first line of an error's message."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
