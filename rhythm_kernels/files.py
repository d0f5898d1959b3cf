"""Writes files whole."""

from pathlib import Path

SUFFIX = ".unfinished"


def unfinished(path: Path) -> Path:
    """Returns the path beside `path` under which it is written."""
    return path.with_name(path.name + SUFFIX)


def write_whole(path: Path, text: str) -> None:
    """Writes a text in UTF-8, so that `path` holds all of it or what was there before, even if the process is killed.

    The folder is made.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished(path).write_text(text, encoding="utf-8")
    unfinished(path).replace(path)
