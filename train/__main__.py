"""The command line: `python -m train [--preset NAME] [flags]`, or `python -m train --resume FOLDER`."""

import argparse
import os
import sys

# Before torch starts its thread pools: waiting threads must not spin on cores that the other seeds need.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pathlib import Path
from typing import NoReturn

from train.command import run
from train.config import BadSetting, Config, add_flags, check_given, flag_name
from train.presets import PRESETS, load_preset


def main(arguments: list[str] | None = None) -> int:
    def work() -> int:
        config, folder = parse(arguments)
        from train.launch import launch  # torch and transformers load here, after the flags have been checked

        return launch(config, folder)

    resumes = "; --resume with the run's folder continues from its last checkpoint"
    return run("python -m train", work, when_stopped=resumes)


def parse(arguments: list[str] | None) -> tuple[Config, Path | None]:
    """The checked configuration, and the folder to continue, if any."""
    values = vars(build_parser().parse_args(arguments))
    preset, resume = values.pop("preset"), values.pop("resume")
    if resume is None:
        config = load_preset(preset or "countdown-tiny").change(**values)
        check_given(values, config)
        return config, None
    if preset or values:
        given = ", ".join(map(flag_name, [*(["preset"] if preset else []), *values]))
        raise BadSetting(f"--resume continues a run as it was configured, but also got {given}")
    path = Path(resume) / "config.json"
    if not path.is_file():
        raise BadSetting(f"--resume must be a run's folder, got {resume!r}, which has no config.json")
    return Config.load(path), Path(resume)


def build_parser() -> argparse.ArgumentParser:
    """A flag for every field of the configuration; only those that were given come out."""
    parser = argparse.ArgumentParser(
        prog="python -m train", description=__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    parser.add_argument("--preset", default=None, help=f"one of {', '.join(PRESETS)}; the default is the first")
    parser.add_argument("--resume", default=None, metavar="FOLDER", help="continue the run in this folder")
    add_flags(parser, list(Config().flat()))
    return parser


def leave(status: int) -> NoReturn:
    """Ends the process; a rank at once, since gloo's threads can abort an interpreter that is being torn down."""
    if os.environ.get("WORLD_SIZE"):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    leave(main())
