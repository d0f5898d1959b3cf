"""Runs everything that needs a GPU, in two halves: build, tests, sanitizers, benchmarks, and one report.

    python -m benchmarks.gpu_suite [--half 2] [--only build gpu-tests ...] [--budget 540] [--out build/gpu]
    python -m benchmarks.gpu_suite --dry-run        # lists the steps and their times; needs no GPU
    python -m benchmarks.gpu_suite --merge DIR ... --out DIR        # joins several reports; needs no GPU

The machine needs torch (2.11 or later), triton, transformers and pytest, and nvcc for the extension's CUDA ops. Both
halves begin with the build. The most important steps are in the first half, and at the beginning of each half. Each
step is a process with its own time limit. If a step fails or has no time left, the report says so, and the others go
on. The report is written after each step: gpu-<device>.json, .md, .log and pictures, at most eight files. It keeps the
steps of an earlier report in the folder, of the same device, versions and commit, until a later call runs them again.

Exit code: 0 if every step passed, 1 if one did not, 2 without a GPU or with wrong arguments.
"""

import argparse
import ast
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

from benchmarks import ROOT
from benchmarks.gpu_report import Report, load
from benchmarks.gpu_run import GRACE, Outcome, Step, run_together
from benchmarks.measure import environment, make_parser, output_of
from rhythm_kernels.analysis.environment import UNKNOWN

ARCHITECTURES = ROOT / "tests" / "test_architectures.py"
PYTHON = sys.executable
HALVES = (1, 2)
BUDGET = 540  # seconds for one half
SANITIZED = ("memcheck", "racecheck")
OTHERS = ("flex", "colreduce")  # other projects' variants, which compile for long or are seldom installed
DENSE = ("maps", "eager")
OURS = ("sdpa", "cudnn", "triton", "full", "sampled", "band", "groups", "fused")


def steps() -> list[Step]:
    """Returns the steps of both halves, each half in order of importance."""
    pytest = [PYTHON, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "--durations=5"]
    cores = os.cpu_count() or 1
    workers = max(1, min(8, cores // 2))
    if importlib.util.find_spec("xdist"):  # references and compilations take most of the tests' time
        pytest += ["-n", str(workers)]  # no group of tests is among them
    threads = {"OMP_NUM_THREADS": "1"}  # several steps of tests run side by side
    attention = [PYTHON, "-m", "benchmarks.attention", "--rounds", "20", "--limit", "8", "--out", "{out}"]
    selection = [PYTHON, "-m", "benchmarks.selection", "--rounds", "20", "--limit", "4", "--out", "{out}"]
    forward = [PYTHON, "-m", "benchmarks.forward", "--rounds", "5", "--limit", "40", "--out", "{out}"]
    trainer = [PYTHON, "-m", "benchmarks.trainer", "--model", "qwen3-4b", "--paper-rounds", "0", "--rounds", "5"]
    sanitizer = [sanitizer_path() or "compute-sanitizer", "--error-exitcode", "9"]
    kernels = [PYTHON, "-m", "benchmarks.gpu_kernels"]
    # the driver makes each allocation, so that memcheck sees an access past its end
    no_cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # a 4B model's parameters, gradients and two moments in fp32 take 60 of an H100's 79 GiB
    whole = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}

    def variants(names: tuple[str, ...], *tokens: int) -> list[str]:
        return [*attention, "--variants", *names, "--tokens", *map(str, tokens)]

    memcheck = [*sanitizer, "--tool", "memcheck", "--report-api-errors", "no", *kernels]
    return [
        Step("build", 1, [PYTHON, "-m", "benchmarks.gpu_build"], 25, 120, {"MAX_JOBS": str(cores)}),
        Step("gpu-tests", 1, [*pytest, "-m", "gpu", *runnable(gpu_tests())], 75, 150, threads, "checks"),
        Step("memcheck", 1, memcheck, 160, 240, no_cache, "checks"),
        Step("racecheck", 1, [*sanitizer, "--tool", "racecheck", *kernels], 160, 240, {}, "checks"),
        Step(
            "triton-tests", 1, [*pytest, *runnable(triton_tests())], 90, 150, threads | {"FUZZ_CASES": "40"}, "checks"
        ),
        Step("architectures", 1, [*pytest, "-m", "gpu", *runnable([ARCHITECTURES])], 90, 150, threads, "checks"),
        Step("ceilings", 1, [PYTHON, "-m", "benchmarks.ceilings", "--out", "{out}"], 10, 40),
        Step("attention", 1, variants((*OURS, *DENSE), 1024, 4096, 8192, 16384), 40, 150),
        Step("tiles", 1, [PYTHON, "-m", "benchmarks.tiles", "--rounds", "10", "--out", "{out}"], 60, 150),
        Step("selection", 1, selection, 20, 60),
        Step("forward", 1, forward, 30, 100),
        Step("trainer", 1, [*trainer, "--out", "{out}"], 60, 120, whole),
        Step("attention-long", 2, variants(OURS, 32768, 131072), 35, 120),
        Step("more", 2, [PYTHON, "-m", "benchmarks.more_statistics", "--tokens", "8192", "--out", "{out}"], 30, 90),
        Step("attention-others", 2, variants(("sdpa", "full", *OTHERS), 8192), 60, 150),
    ]


def ptxas_steps(planned: list[Step], ptxas: Path) -> list[Step]:
    """Returns the first tests and memcheck as steps whose kernels another assembler makes."""
    return [
        step._replace(name=f"{step.name}-ptxas", environment={**step.environment, "TRITON_PTXAS_PATH": str(ptxas)})
        for step in planned
        if step.name in ("gpu-tests", "memcheck")
    ]


def gpu_tests() -> list[Path]:
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [file for file in files if "mark.gpu" in file.read_text() and file != ARCHITECTURES]


def triton_tests() -> list[Path]:
    """Returns the files that run on the GPU where there is one; those that compile ahead of time need none."""
    return [file for file in sorted((ROOT / "tests").glob("test_triton*.py")) if "compile" not in file.name]


# ---- what this machine can run ---------------------------------------------------------------------------------------


def sanitizer_path() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")


def toolkit_ptxas() -> Path:
    """Returns the path of the ptxas in the toolkit of nvcc, which may be a script that calls another nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return Path("ptxas")
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
    top = re.search(r"^#\$ TOP=(.+)$", subprocess.run(command, capture_output=True, text=True).stderr, re.MULTILINE)
    return Path(top[1].strip() if top else Path(nvcc).parent.parent, "bin", "ptxas").resolve()


def missing_modules(path: Path) -> set[str]:
    """Returns the packages that are not installed, but imported by a file or by what it imports of this project."""
    missing, seen, pending = set(), set(), [path]
    folders = (path.parent, ROOT)
    while pending:
        file = pending.pop()
        if file in seen:
            continue
        seen.add(file)
        for name in imported(file):
            package = name.partition(".")[0]
            pending += [imported_file for folder in folders for imported_file in files_of(folder, name)]
            is_own = any((folder / x).exists() for folder in folders for x in (package, f"{package}.py"))
            if not is_own and importlib.util.find_spec(package) is None:
                missing.add(package)
    return missing


def files_of(folder: Path, name: str) -> list[Path]:
    """Returns the files in this folder that importing "a.b" runs: a.py or a/__init__.py, and so on."""
    parts = name.split(".")
    paths = [folder.joinpath(*parts[: n + 1]) for n in range(len(parts))]
    return [file for path in paths for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()]


@cache
def imported(file: Path) -> set[str]:
    """Returns the modules that a file imports when it is imported itself; for "from a import b" both a and a.b."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def why_not(step: Step) -> str:
    """Returns the reason why a step cannot run here, or "" if it can."""
    if step.name.startswith(SANITIZED) and sanitizer_path() is None:
        return "compute-sanitizer is not installed"
    module = step.command[step.command.index("-m") + 1] if "-m" in step.command else ""
    if module == "pytest":  # without files it would run all tests
        return "" if any(x.endswith(".py") for x in step.command) else "none of its test files can be imported"
    if not module.startswith("benchmarks."):
        return ""
    missing = missing_modules(ROOT.joinpath(*module.split(".")).with_suffix(".py"))
    return f"{', '.join(sorted(missing))} not installed" if missing else ""


def runnable(files: list[Path]) -> list[str]:
    """Returns the files whose imports are all installed, relative to the root."""
    return [str(file.relative_to(ROOT)) for file in files if not missing_modules(file)]


def left_out_tests() -> dict[str, list[str]]:
    """Returns the test files that cannot be imported here, and the packages that they miss."""
    files = {file.name: sorted(missing_modules(file)) for file in (*gpu_tests(), *triton_tests())}
    return {name: missing for name, missing in files.items() if missing}


# ---- a run -----------------------------------------------------------------------------------------------------------


def describe(chosen: list[Step], budget: float) -> str:
    """Returns a line for each step: its time, and whether the steps before it leave it enough."""
    lines, begin = [], 0
    for together in side_by_side(chosen):
        end = begin + max(step.estimate for step in together)
        fits = "" if end <= budget else f"; beyond the budget of {budget:.0f} s"
        lines += [
            f"{step.name}: half {step.half}, about {step.estimate} s, at most {step.limit} s, done after about {end} s"
            f"{fits}: {' '.join(step.command)}"
            for step in together
        ]
        begin = end
    lines += [f"left out: {name}, {', '.join(missing)} not installed" for name, missing in left_out_tests().items()]
    return "\n".join(lines)


def run_all(chosen: list[Step], report: Report, budget: float, out: Path) -> list[Outcome]:
    """Runs the steps in their order while the budget lasts, and writes the report after each."""
    begin, outcomes = time.perf_counter(), []

    def add(outcome: Outcome) -> None:
        print(f"{outcome.name}: {outcome.status}, {outcome.seconds:.0f} s", flush=True)
        outcomes.append(outcome)
        report.add(outcome, Path(scratch), out)
        report.save(out)

    with tempfile.TemporaryDirectory() as scratch:
        for together in side_by_side(chosen):
            left = budget - (time.perf_counter() - begin) - GRACE
            ready = []
            for step in together:
                if reason := why_not(step):
                    add(Outcome(step.name, "left out", 0.0, reason))
                elif left < step.estimate / 2:  # a shorter step behind it may still fit
                    why = f"{max(left, 0):.0f} s of {budget:.0f} s are left, and it takes about {step.estimate} s"
                    add(Outcome(step.name, "out of time", 0.0, why))
                else:
                    print(f"{step.name} ...", flush=True)
                    ready.append(step)
            for outcome in run_together(ready, [min(step.limit, left) for step in ready], Path(scratch)):
                add(outcome)
    return outcomes


def side_by_side(chosen: list[Step]) -> list[list[Step]]:
    """Returns the steps in their order, those together that run at the same time."""
    groups: list[list[Step]] = []
    for step in chosen:
        if step.together and groups and groups[-1][0].together == step.together:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def merge(folders: list[Path], out: Path) -> Report:
    """Returns one report of several folders. Later steps replace earlier ones of the same name.

    Raises: ValueError for a folder without a report, or reports of several devices, versions or commits.
    """
    merged = None
    for folder in folders:
        report = load(folder)
        if report is None:
            raise ValueError(f"{folder} must hold a report, gpu-<device>.json")
        merged = merged or Report(report.where)
        merged.take(report, folder, out)
    merged.save(out)
    return merged


def parse(arguments: list[str] | None, planned: list[Step]) -> argparse.Namespace:
    names = [step.name for step in planned]
    parser = make_parser(__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--half", type=int, choices=HALVES, default=1, help="1: the most important steps; 2: the rest")
    which.add_argument("--only", nargs="+", choices=names, metavar="STEP", help=f"run these: {', '.join(names)}")
    help_ = "run gpu-tests and memcheck with this ptxas instead of Triton's; without PATH, with the one beside nvcc"
    which.add_argument("--ptxas", type=Path, nargs="?", const=Path(), metavar="PATH", help=help_)
    which.add_argument("--merge", type=Path, nargs="+", metavar="DIR", help="run nothing: join reports, later ones win")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all steps together")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of the report")
    parser.add_argument("--dry-run", action="store_true", help="list the steps, and what cannot run here")
    args = parser.parse_args(arguments)
    if args.ptxas == Path():
        args.ptxas = toolkit_ptxas()
    if args.ptxas is not None and not output_of(str(args.ptxas), "--version"):  # Triton would silently use its own
        parser.error(f"--ptxas must be an assembler that runs, got {args.ptxas}")
    return args


def choose(args: argparse.Namespace, planned: list[Step]) -> list[Step]:
    if args.only:
        return [step for step in planned if step.name in args.only]
    # a second machine has no extension yet, unless one came along
    build = [step for step in planned if step.name == "build"]
    if args.ptxas is not None:
        return build + ptxas_steps(planned, args.ptxas.resolve())
    return build + [step for step in planned if step.half == args.half and step not in build]


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments, steps())
    if args.merge:
        try:
            print(f"written: {args.out / merge(args.merge, args.out).name}.md")
        except ValueError as error:
            print(f"--merge: {error}", file=sys.stderr)
            return 2
        return 0
    if args.dry_run:
        print(describe(choose(args, steps()), args.budget))
        return 0

    import torch

    if not torch.cuda.is_available():
        print(f"benchmarks.gpu_suite needs a GPU, and torch {torch.__version__} sees none", file=sys.stderr)
        return 2
    # a background process of a shell ignores interrupts, and its steps would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nvcc = re.search(r"release ([\d.]+)", output_of("nvcc", "--version"))
    where = environment(torch.device("cuda")) | {"nvcc": nvcc[1] if nvcc else "absent"}
    if where["commit"] == UNKNOWN:
        print("WARNING: the commit is unknown: there is neither .git nor a file COMMIT", file=sys.stderr, flush=True)
    report = Report(where)
    try:
        earlier = load(args.out)
        if earlier is not None:
            report.take(earlier, args.out, args.out)
    except ValueError as error:
        print(f"--out: {error}; name another folder", file=sys.stderr)
        return 2
    report.left_out = left_out_tests()
    chosen = choose(args, steps())
    outcomes = run_all(chosen, report, args.budget, args.out)
    print((args.out / f"{report.name}.md").read_text())
    return 0 if all(x.status in ("passed", "left out") for x in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
