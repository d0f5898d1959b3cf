"""The command line: `python -m train [--preset NAME] [flags]`, or `python -m train --resume FOLDER [flags]`."""

import os
import sys
from typing import NoReturn

# Set before torch starts its thread pools: waiting threads must not spin on cores that the other seeds need.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from train.command import run
from train.flags import parse


def main(arguments: list[str] | None = None) -> int:
    def work() -> int:
        config, folder = parse(arguments)
        from train.launch import launch  # torch and transformers load here, after the flags have been checked

        return launch(config, folder)

    resumes = "; --resume with the run's folder continues from its last checkpoint, if it has one"
    return run("python -m train", work, when_stopped=resumes)


def leave(status: int) -> NoReturn:
    """Ends the process. A rank exits without cleanup, since gloo's threads can abort an interpreter during teardown."""
    if os.environ.get("WORLD_SIZE"):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    leave(main())
