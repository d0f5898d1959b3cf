"""The colours of the figures, which are those of the documentation's light pictures."""

COLORS = {
    "text": "#3c4048",
    "soft": "#7d828c",
    "grid": "#e4e2dd",
    "waad": "#2f6db5",
    "fai": "#c2620e",
    "entropy": "#7357b8",
    "receiver": "#ad3f66",
    "coupled": "#2b8259",
}


def hide_frame(ax) -> None:
    """Hides the upper and the right edge of a matplotlib Axes."""
    ax.spines[["top", "right"]].set_visible(False)
