"""What stands around a command's work: output that any console takes, errors in one line, signals."""

import errno
import sys
from collections.abc import Callable

from train.config import BadSetting, RunError
from train.stop import Stopped, heeded

OWN = ("train", "rhythm_kernels")


def run(program: str, work: Callable[[], int], *, when_stopped: str = "") -> int:
    """The exit status of the work, or that of an error that is the caller's or the machine's, told in one line.

    2 for a setting, 1 for what is missing, full, damaged or not allowed, 130, 143 and 129 after SIGINT, SIGTERM and
    SIGHUP. Anything else is raised: it is a fault of the program.
    """
    say_what_the_console_can()
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
    """Tells an error in one line and returns the exit status; raises it where it is a fault of the program."""
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
    print(f"{program}: {' '.join(line.strip() for line in text.splitlines())}", file=sys.stderr)
    return 2 if isinstance(error, BadSetting) else 1


def missing_package(error: ImportError) -> str:
    """An import that failed, with what to install where a package is missing and the error does not say so itself."""
    cause = error
    while cause.__cause__ is not None and isinstance(cause, ImportError):  # transformers raises its own from another's
        cause = cause.__cause__
    if not isinstance(cause, ModuleNotFoundError) or not cause.name or "pip install" in str(error):
        return str(error)
    package = cause.name.partition(".")[0].replace("_", "-")
    return f"the package {package} is needed and not installed: pip install {package}"


def say_what_the_console_can() -> None:
    """Has output escape the characters that the console's encoding lacks, as C and ascii lack ±, and not fail."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
