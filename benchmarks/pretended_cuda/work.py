"""Counts the launches on the pretended device and the waits of the host for it."""

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
SYNC_MODES = ("default", "warn", "error")
"""The modes of torch.cuda.set_sync_debug_mode, in the order of their numbers."""


class Wait(NamedTuple):
    """One wait of the host for the device."""

    where: str
    """The innermost line of this project: "file:line in function"."""
    what: str
    """The operation that waited."""


class Work:
    """The launches and waits of all threads in the block of `counted`."""

    def __init__(self):
        self.launches: Counter[str] = Counter()
        """Launches by the name of the operator or of the Triton kernel; "memcpy" is a copy between host and device."""
        self.waits: list[Wait] = []


_open_counts: list[Work] = []
_sync_mode = SYNC_MODES[0]


@contextmanager
def counted() -> Iterator[Work]:
    """Counts what its block launches and waits for. Blocks inside each other all count."""
    work = Work()
    _open_counts.append(work)
    try:
        yield work
    finally:
        _open_counts.remove(work)


def count_launch(name: str) -> None:
    for work in _open_counts:
        work.launches[name] += 1


def count_wait(what: str, reported: bool = True) -> None:
    """Counts a wait of the host. `reported` says whether torch.cuda.set_sync_debug_mode reports such a wait."""
    for work in _open_counts:
        work.waits.append(Wait(_innermost_line(), what))
    if reported and _sync_mode == "error":
        raise RuntimeError(f"called a synchronizing CUDA operation: {what}")
    if reported and _sync_mode == "warn":
        warnings.warn(f"called a synchronizing CUDA operation: {what}", stacklevel=2)


def _innermost_line() -> str:
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        in_project = path.is_relative_to(ROOT) and "site-packages" not in path.parts
        if in_project and not path.is_relative_to(FOLDER):
            return f"{path.relative_to(ROOT)}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside the project"


def get_sync_mode() -> int:
    return SYNC_MODES.index(_sync_mode)


def set_sync_mode(mode: int | str) -> None:
    global _sync_mode
    _sync_mode = SYNC_MODES[mode] if isinstance(mode, int) else mode
