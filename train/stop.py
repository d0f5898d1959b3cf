"""Ends a run at SIGTERM or SIGHUP: during training after the current step, with a checkpoint; otherwise at once.

Ctrl-C and SIGKILL end it at once. It continues from its last checkpoint in every case.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """Raised when a signal ends this process. Like KeyboardInterrupt, it passes every `except Exception`."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number  # the status that shells report for a process ended by the signal


class _State:
    """Shared by the run and the signal handler, which belongs to the whole process."""

    asked = 0
    """The signal that arrived; 0 before one has."""
    is_held = False


def _arrive(number: int, frame) -> None:
    if _State.asked:  # the run is ending: a second signal must not interrupt its writing
        return
    _State.asked = number
    if not _State.is_held:
        raise Stopped(number)


@contextmanager
def heeded() -> Iterator[None]:
    """Raises Stopped at the signals in this block; an ignored one, such as SIGHUP under nohup, stays ignored."""
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread handle signals
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number in SIGNALS:
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, _arrive)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _State.asked = 0


@contextmanager
def held() -> Iterator[None]:
    """Makes a signal in this block wait: `asked` returns it, and Stopped is raised at the end."""
    _State.is_held = True
    try:
        yield
    finally:
        _State.is_held = False
    if _State.asked:
        raise Stopped(_State.asked)


def asked() -> int:
    """Returns the number of the signal that waits, or 0."""
    return _State.asked


def stop_with_parent() -> None:
    """Sends this process SIGTERM once its parent has ended in any way: its standard input is the parent's pipe."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
