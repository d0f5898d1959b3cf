"""Runs a command's work: its output suits any console, errors are one line, and signals end it."""

import errno
import sys
from collections.abc import Callable

from rhythm_kernels.console import escape_unencodable, missing_package, print_error
from train.config import BadSetting, RunError
from train.stop import Stopped, heeded

OWN = ("train", "rhythm_kernels")


def run(program: str, work: Callable[[], int], *, when_stopped: str = "") -> int:
    """Returns the work's exit status, or that of an error of the caller or the machine, which is printed in one line.

    The status is 2 for a wrong setting, 1 for something missing, full, damaged or not allowed, and 130, 143 and 129
    after SIGINT, SIGTERM and SIGHUP. Any other error is a fault of the program and is raised.
    """
    escape_unencodable()
    try:
        with heeded():
            return work()
    except (KeyboardInterrupt, Stopped) as stop:
        name = f" by {stop}" if isinstance(stop, Stopped) else ""
        print(f"\n{program}: stopped{name}{when_stopped}", file=sys.stderr)
        return stop.status if isinstance(stop, Stopped) else 130
    except Exception as error:
        return explain(program, error)


def explain(program: str, error: Exception) -> int:
    """Prints an error in one line and returns the exit status; raises an error that is a fault of the program."""
    if isinstance(error, ImportError):
        if (error.name or "").partition(".")[0] in OWN:
            raise error
        text = missing_package(error)
    elif isinstance(error, OSError):
        text = str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text += "; --resume goes on from the last checkpoint once there is room"
    elif isinstance(error, BadSetting | RunError):
        text = str(error)
    else:
        raise error
    print_error(program, text)
    return 2 if isinstance(error, BadSetting) else 1
