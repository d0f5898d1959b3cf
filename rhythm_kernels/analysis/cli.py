"""Shows what a language model's own attention says about the tokens of its answers.

Two numbers per token are read from attention:
  WAAD  windowed average attention distance: how far back the local heads look from a token. Where it peaks or changes
        sharply, the model reaches back before it goes on; those are the preplan tokens.
  FAI   future attention influence: how much attention later tokens pay to a token in the global heads. Tokens with a
        high FAI are the anchors.
"The paper" is Li et al., 2025, https://arxiv.org/abs/2510.13554.

examples:
  rhythm show --prompt "What is 17 times 23?"    the page of an answer of SmolLM2-135M, which needs no network
  rhythm couple Qwen/Qwen3-0.6B                  one of the paper's tables, on a model of the Hugging Face hub
  rhythm show --help                             the options of a command
"""

import argparse
import sys
from importlib import import_module

from rhythm_kernels.console import escape_unencodable, missing_package, print_error

COMMANDS = {
    "show": "draw WAAD and FAI along an answer: a page and figures",
    "couple": "test whether anchors follow preplan tokens (the paper's Table 2)",
    "perturb": "test whether anchors decide what follows them (the paper's Table 1)",
    "value": "test whether credit lands where the answer is decided, on your model and task",
    "bench": "measure what the statistics would cost on this machine",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns 0, or 2 after an error of the caller or the machine, or 130 after Ctrl-C.

    Errors are told in one line. An import error of the package itself is raised: it is a fault of the package.
    """
    escape_unencodable()
    parser = argparse.ArgumentParser(
        prog="rhythm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, line in COMMANDS.items():
        commands.add_parser(name, help=line, add_help=False)
    arguments = sys.argv[1:] if arguments is None else arguments
    command = parser.parse_args(arguments[:1]).command
    try:
        import_module(f"rhythm_kernels.analysis.{command}").main(arguments[1:])
    except KeyboardInterrupt:
        print(f"\nrhythm {command}: stopped", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError) as error:
        if isinstance(error, ImportError) and (error.name or "").startswith("rhythm_kernels"):
            raise
        print_error(f"rhythm {command}", missing_package(error) if isinstance(error, ImportError) else str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
