"""The console script `rhythm`: one command for each question.

rhythm show smollm2 --prompt "..."      the rhythm of an answer, as a page and as figures
rhythm couple smollm2                   do anchors follow preplan tokens? (the paper's Table 2)
rhythm perturb smollm2                  do anchors decide what follows? (the paper's Table 1)
rhythm bench smollm2                    what would the statistics cost here?
"""

import argparse
import sys

COMMANDS = {
    "show": "the rhythm of an answer, as a page and as figures",
    "couple": "do anchors follow preplan tokens? (the paper's Table 2)",
    "perturb": "do anchors decide what follows? (the paper's Table 1)",
    "bench": "what would the statistics cost on this machine?",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; 0, or 2 after an error that is the caller's, told in one line."""
    parser = argparse.ArgumentParser(
        prog="rhythm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, line in COMMANDS.items():
        commands.add_parser(name, help=line, add_help=False)
    given = sys.argv[1:] if arguments is None else arguments
    chosen = parser.parse_args(given[:1]).command
    module = __import__(f"rhythm_kernels.analysis.{chosen}", fromlist=["main"])
    try:
        module.main(given[1:])
    except (ValueError, TypeError, OSError) as error:
        print(f"rhythm {chosen}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
