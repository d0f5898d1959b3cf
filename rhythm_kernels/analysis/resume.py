"""The log of a study: what it has measured so far, in a file from which a killed run continues."""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGIN = b'{"study": '


class Log:
    """A JSONL file: the settings in the first line, then one finished piece of work per line.

    Each line has a digest over the settings, the key and the value, so that a line from another run or an edited line
    is refused. A last line that a kill or a full disk cut short is dropped, and its work is done again.

    Raises:
        ValueError: the file has other settings (the message names them), has a damaged line before its last one, or is
            no log of this study.
        OSError: another process has the log open.
    """

    def __init__(self, path: Path, study: str, settings: dict[str, Any]):
        self.path = path
        self._values: dict[str, str] = {}  # by key, as JSON
        head = json.dumps({"study": study, "settings": settings}, allow_nan=False)
        self._fingerprint = hashlib.sha256(head.encode()).hexdigest()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            self._lock()
            self._read(study, json.loads(head)["settings"])
            if self._file.seek(0, os.SEEK_END) == 0:
                self._write(head)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file and releases its lock."""
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """Returns the value of a key from the log; where it has none, calls `make` and writes the result first.

        The value always comes back as parsed JSON, so that a resumed run sees exactly what the first run saw.
        """
        if key not in self._values:
            value = json.dumps(make(), allow_nan=False)
            self._write(f'{{"key": {json.dumps(key)}, "digest": "{self._digest(key, value)}", "value": {value}}}')
            self._values[key] = value
        return json.loads(self._values[key])

    def _digest(self, key: str, value: str) -> str:
        return hashlib.sha256("\n".join((self._fingerprint, key, value)).encode()).hexdigest()[:16]

    def _write(self, line: str) -> None:
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(f"{self.path} is being written by another process") from error

    def _read(self, study: str, settings: dict[str, Any]) -> None:
        """Reads the values, checks them, and cuts off a last line that is incomplete."""
        self._file.seek(0)
        *lines, rest = self._file.read().split(b"\n")
        if not lines:
            if rest and not (rest + BEGIN[len(rest) :]).startswith(BEGIN):
                raise ValueError(f"{self.path} is not the log of a study")
            self._file.truncate(0)
            return
        old_settings = self._check_settings(lines[0], study)
        if len(lines) == 1:  # an earlier run did no work, so its settings bind nobody
            self._file.truncate(0)
            return
        self._check_same(old_settings, settings)
        good_bytes = len(lines[0]) + 1
        for number, line in enumerate(lines[1:], 2):
            entry = self._entry(line)
            if entry is None and number == len(lines):
                break
            if entry is None:
                raise ValueError(f"{self.path}, line {number}: damaged, or not of this run")
            self._values[entry[0]] = entry[1]
            good_bytes += len(line) + 1
        self._file.truncate(good_bytes)

    def _entry(self, line: bytes) -> tuple[str, str] | None:
        """Returns (key, value as JSON), or None for a line that this log did not write."""
        try:
            entry = json.loads(line)
            key, digest, value = entry["key"], entry["digest"], json.dumps(entry["value"])
            return (key, value) if digest == self._digest(key, value) else None
        except (ValueError, KeyError, TypeError, RecursionError):
            return None

    def _check_settings(self, line: bytes, study: str) -> dict[str, Any]:
        """Returns the settings in the first line of a log of this study."""
        try:
            head = json.loads(line)
            old_study, old_settings = head["study"], dict(head["settings"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{self.path} is not the log of a study") from None
        if old_study != study:
            raise ValueError(f"{self.path} is the log of {old_study}, not of {study}")
        return old_settings

    def _check_same(self, old_settings: dict[str, Any], settings: dict[str, Any]) -> None:
        absent = object()
        differing = [
            f"{name} was {old_settings.get(name, 'absent')!r} and is {settings.get(name, 'absent')!r}"
            for name in {**old_settings, **settings}
            if old_settings.get(name, absent) != settings.get(name, absent)
        ]
        if differing:
            raise ValueError(
                f"{self.path} has results of other settings: {'; '.join(differing)}. Give another --out, or the same "
                "settings"
            )
