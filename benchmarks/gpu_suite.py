"""Everything that needs a GPU, in one command: build, tests, sanitizers, benchmarks, and one report.

    python -m benchmarks.gpu_suite [--only build gpu-tests ...] [--budget 540] [--out benchmarks/results]
    python -m benchmarks.gpu_suite --dry-run        # lists the steps; needs no GPU

Runs on a bare machine: torch (2.11 or later), triton, transformers and pytest; nvcc for the extension's CUDA ops. Each
step is a process with its own time limit. One that fails, or for which no time is left, is recorded with the end of its
output, and the others go on. After each step the report is written: gpu-<device>.json and gpu-<device>.md.

Exit code: 0 if every step passed, 1 if one did not, 2 without a GPU.
"""

import argparse
import ast
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from benchmarks.measure import environment, output_of, write

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ROOT / "tests" / "test_architectures.py"
TAIL = 40  # lines of a failing step's output
PYTHON = sys.executable


class Step(NamedTuple):
    name: str
    command: list[str]
    """{out} stands for the path, without a suffix, where a benchmark writes its results."""
    seconds: int
    """At most."""
    environment: dict[str, str] | None = None


class Outcome(NamedTuple):
    name: str
    status: str
    """"passed", "failed", "out of time" (its own or the suite's) or "left out"."""
    seconds: float
    tail: str
    """The end of the output; or why it was left out."""


def steps() -> list[Step]:
    """In the order of what is missed most when time runs out."""
    pytest = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5"]
    if importlib.util.find_spec("xdist"):  # references and compilations take most of the tests' time
        pytest += ["-n", "4"]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 4))}
    tokens = [str(n) for n in (1024, 4096, 8192, 32768, 131072)]
    attention = [PYTHON, "-m", "benchmarks.attention", "--tokens", *tokens, "--rounds", "20", "--limit", "8"]
    selection = [PYTHON, "-m", "benchmarks.selection", "--rounds", "20", "--limit", "4"]
    forward = [PYTHON, "-m", "benchmarks.forward", "--rounds", "5", "--limit", "40"]
    trainer = [PYTHON, "-m", "benchmarks.trainer", "--model", "qwen3-4b", "--paper-rounds", "0", "--rounds", "5"]
    sanitizer = [sanitizer_path() or "compute-sanitizer", "--error-exitcode", "9"]
    kernels = [PYTHON, "-m", "benchmarks.gpu_suite", "--run-kernels-once"]
    # each allocation from the driver, so that an access past its end is seen
    no_cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Step("build", [PYTHON, "setup.py", "build_ext", "--inplace"], 150),
        Step("gpu-tests", [*pytest, "-m", "gpu", *runnable(gpu_tests())], 180, threads),
        Step("ceilings", [PYTHON, "-m", "benchmarks.ceilings", "--out", "{out}"], 60),
        Step("attention", [*attention, "--out", "{out}"], 200),
        Step("selection", [*selection, "--out", "{out}"], 60),
        Step("forward", [*forward, "--out", "{out}"], 100),
        Step("trainer", [*trainer, "--out", "{out}"], 120),
        Step("triton-tests", [*pytest, *runnable(triton_tests())], 150, threads | {"FUZZ_CASES": "40"}),
        Step("memcheck", [*sanitizer, "--tool", "memcheck", "--report-api-errors", "no", *kernels], 90, no_cache),
        Step("racecheck", [*sanitizer, "--tool", "racecheck", *kernels], 90),
        # many shapes, each compiled: last, so that they take no time from the others
        Step("architectures", [*pytest, "-m", "gpu", *runnable([ARCHITECTURES])], 150, threads),
    ]


def gpu_tests() -> list[Path]:
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [file for file in files if "mark.gpu" in file.read_text() and file != ARCHITECTURES]


def triton_tests() -> list[Path]:
    """They take the GPU where there is one; what compiles ahead of time needs none."""
    return [file for file in sorted((ROOT / "tests").glob("test_triton*.py")) if "compile" not in file.name]


# ---- what can run here -----------------------------------------------------------------------------------------------


def sanitizer_path() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")


def missing_modules(path: Path) -> set[str]:
    """The packages that a test file, or a file beside it that it imports, needs and that are not installed."""
    missing, seen, todo = set(), set(), [path]
    while todo:
        file = todo.pop()
        seen.add(file)
        for name in imported(file):
            beside = path.parent / f"{name}.py"
            if beside.exists():
                todo += [beside] if beside not in seen else []
            elif not (ROOT / name).exists() and importlib.util.find_spec(name) is None:
                missing.add(name)
    return missing


def imported(file: Path) -> set[str]:
    """The top-level modules that a file imports when it is imported itself."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def runnable(files: list[Path]) -> list[str]:
    """Those whose imports are all there, relative to the root."""
    return [str(file.relative_to(ROOT)) for file in files if not missing_modules(file)]


def left_out_tests() -> dict[str, list[str]]:
    """Test files that cannot be imported here, and the packages that they miss."""
    files = {file.name: sorted(missing_modules(file)) for file in (*gpu_tests(), *triton_tests())}
    return {name: missing for name, missing in files.items() if missing}


# ---- running ---------------------------------------------------------------------------------------------------------


def run(step: Step, seconds: float, out: Path) -> Outcome:
    """The step in a process group of its own, which ends with it."""
    command = [argument.replace("{out}", str(out)) for argument in step.command]
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(step.environment or {})}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = "passed" if process.wait(max(seconds, 0)) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            end(process)
        output.seek(0)
        lines = [line for line in output.read().replace("\r", "\n").splitlines() if line.strip()]
    return Outcome(step.name, status, time.perf_counter() - begin, "\n".join(lines[-TAIL:]))


def end(process: subprocess.Popen) -> None:
    """Ends what is left of a step's process group: a compiler or a worker outlives the process that started it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_kernels_once(device: str) -> None:
    """Each kernel of the package on small inputs, for the sanitizers: they find what is wrong, nothing is compared."""
    import torch

    from rhythm_kernels import attention, attention_stats, group_stats

    heads = torch.tensor([True, False, False, True], device=device)
    bounds = torch.tensor([0, 77, 77, 300], dtype=torch.int32, device=device)
    some = torch.rand(1, 300, device=device) < 0.7
    packed = {"cu_seqlens": bounds, "row_mask": some, "softcap": 20.0, "sinks": torch.zeros(4, device=device)}
    for dtype, size, options in (
        (torch.bfloat16, 128, {}),
        (torch.float16, 80, packed),
        (torch.float32, 64, {"sliding_window": 40, "horizon": (1, None)}),
    ):
        q, k, v = (torch.randn(1, n, 300, size, device=device, dtype=dtype) for n in (4, 2, 2))
        lse = attention_stats(q, k, **options).lse
        attention_stats(q, k, lse=lse, need_span=False, **options)
        group_stats(q, k, heads, ~heads, lse=lse, **options)
        attention(q, k, v, **options)
    # few threads a block and many; scratch in shared memory and, at 60,000 tokens, in global memory; packed: both
    for shape, cuts in (
        ((3, 1000), None),
        ((2, 3000), None),
        ((1, 60_000), None),
        ((1, 1000), [0, 77, 77, 1000]),
        ((1, 62_000), [0, 77, 77, 2000, 62_000]),
    ):
        cu_seqlens = None if cuts is None else torch.tensor(cuts, dtype=torch.int32, device=device)
        mask = torch.rand(shape, device=device) < 0.8
        run_selection_once(torch.randn(shape, device=device), mask, cu_seqlens)
        run_selection_once(torch.randint(3, shape, device=device).float(), mask, cu_seqlens)  # heavy ties
    if device == "cuda":
        # on a CPU all three raise: sequences that leave the row, or overlap, and a signal that is not finite
        values, mask = torch.randn(1, 60_000, device=device), torch.rand(1, 60_000, device=device) < 0.8
        for cuts in ([0, 70_000], [0, 40_000, 100, 60_000]):
            run_selection_once(values, mask, torch.tensor(cuts, dtype=torch.int32, device=device))
        run_selection_once(torch.where(values > 1, torch.nan, values), mask, None)
        torch.cuda.synchronize()


def run_selection_once(values: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> None:
    """Every op of csrc/ops.cpp."""
    from rhythm_kernels import Rhythm, coupled_sets, find_peaks, segment_topq, token_credit

    options = {"cu_seqlens": cu_seqlens, "backend": "extension"}
    segment_topq(values, mask, 0.4, **options)
    find_peaks(values, mask, min_quantile=0.5, **options)
    rhythm = Rhythm(waad=values, fai=values.flip(-1))
    for strategy in ("local", "global", "coupled"):
        token_credit(strategy, mask=mask, rhythm=rhythm, k=40, **options)
    coupled_sets(rhythm, mask, k=40, **options)


# ---- the report ------------------------------------------------------------------------------------------------------


def floor_seconds(work: dict[str, int], ceilings: dict[str, float]) -> float:
    """The time of the slowest of products, exponentials and memory, each at its measured ceiling."""
    return max(amount / ceilings[name] for name, amount in work.items())


def floors(rows: dict[str, dict], ceilings: dict[str, float]) -> str:
    """Of each variant of a benchmark, by column: the fraction of its floor, by the time inside its kernels."""
    names = sorted({name for row in rows.values() for name in row["work"]})
    lines = ["| fraction of the floor | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for name in names:
        cells = []
        for row in rows.values():
            m = row["measured"].get(name)
            cells.append("" if m is None else _share(floor_seconds(row["work"][name], ceilings), m))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _share(floor: float, measured: dict) -> str:
    return f"{floor / (measured['kernel_seconds'] or measured['seconds']):.0%}"


def report(where: dict[str, str], outcomes: list[Outcome], left_out: dict[str, list[str]], folder: Path) -> str:
    """Markdown of all that is there so far; `folder` holds the steps' own results."""
    head = ", ".join(f"{name} {value}" for name, value in where.items())
    lines = [head, "", "| step | | seconds |", "|---|---|---|"]
    lines += [f"| {o.name} | {o.status} | {o.seconds:.0f} |" for o in outcomes]
    if left_out:
        lines += ["", "Test files that could not run:", ""]
        lines += [f"- {name}: {', '.join(missing)} not installed" for name, missing in left_out.items()]
    results = collected(outcomes, folder)
    for name in results:
        lines += ["", f"## {name}", "", (folder / f"{name}.md").read_text().strip()]
        if (folder / f"{name}.png").exists():
            lines += ["", f"![{name}]({report_name(where)}-{name}.png)"]
    counted = counted_rows(results)
    if "ceilings" in results and counted:
        lines += ["", "The floor is the largest of products, exponentials and bytes at the ceilings above."]
        for rows in counted:
            lines += ["", floors(rows, results["ceilings"])]
    for o in outcomes:
        if o.status == "passed" and "tests" in o.name:
            lines += ["", f"{o.name}: {o.tail.splitlines()[-1].strip('= ')}"]
        elif o.status != "passed":
            lines += ["", f"## {o.name}: {o.status}", "", "```", o.tail, "```"]
    return "\n".join(lines) + "\n"


def collected(outcomes: list[Outcome], folder: Path) -> dict[str, dict]:
    """What the benchmarks wrote, also before they ran out of time."""
    files = {o.name: folder / f"{o.name}.json" for o in outcomes}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def counted_rows(results: dict[str, dict]) -> list[dict[str, dict]]:
    """Of each benchmark that counts the work of its variants: its rows, by their size or shape."""
    tokens = results.get("attention", {}).get("tokens", {})
    shapes = results.get("selection", {}).get("shapes", {})
    return [rows for rows in ({f"{int(n):,}": row for n, row in tokens.items()}, shapes) if rows]


def report_name(where: dict[str, str]) -> str:
    return "gpu-" + re.sub(r"[^a-z0-9]+", "-", where["device"].lower()).strip("-")


def save(where: dict[str, str], outcomes: list[Outcome], left_out: dict[str, list[str]], folder: Path, out: Path):
    data = {**where, "steps": [o._asdict() for o in outcomes], "left_out_tests": left_out}
    text = report(where, outcomes, left_out, folder)
    write(out / report_name(where), text, {**data, "results": collected(outcomes, folder)})
    for picture in folder.glob("*.png"):
        shutil.copy(picture, out / f"{report_name(where)}-{picture.name}")


def main(arguments: list[str] | None = None) -> int:
    planned = {step.name: step for step in steps()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=planned, metavar="STEP", help=f"of {', '.join(planned)}")
    parser.add_argument("--budget", type=float, default=540, help="seconds for all steps together")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the report")
    parser.add_argument("--dry-run", action="store_true", help="list the steps and what could not run")
    parser.add_argument("--run-kernels-once", action="store_true", help=argparse.SUPPRESS)  # under a sanitizer
    args = parser.parse_args(arguments)
    chosen = [planned[name] for name in args.only or planned]
    if args.dry_run:
        for step in chosen:
            print(f"{step.name}, at most {step.seconds} s: {' '.join(step.command)}")
        for name, missing in left_out_tests().items():
            print(f"left out: {name}, {', '.join(missing)} not installed")
        return 0

    import torch

    if not torch.cuda.is_available():
        print(f"benchmarks.gpu_suite needs a GPU, and torch {torch.__version__} sees none", file=sys.stderr)
        return 2
    if args.run_kernels_once:
        run_kernels_once("cuda")
        return 0

    begin, outcomes = time.perf_counter(), []
    nvcc = re.search(r"release ([\d.]+)", output_of("nvcc", "--version"))
    where = environment(torch.device("cuda")) | {"nvcc": nvcc[1] if nvcc else "absent"}
    left_out = left_out_tests()
    with tempfile.TemporaryDirectory() as scratch:
        for step in chosen:
            left = args.budget - (time.perf_counter() - begin)
            if step.name in ("memcheck", "racecheck") and sanitizer_path() is None:
                outcome = Outcome(step.name, "left out", 0.0, "compute-sanitizer is not installed")
            elif left < 1:
                outcome = Outcome(step.name, "out of time", 0.0, f"the budget of {args.budget:.0f} s is spent")
            else:
                print(f"{step.name} ...", flush=True)
                outcome = run(step, min(step.seconds, left), Path(scratch) / step.name)
            print(f"{step.name}: {outcome.status}, {outcome.seconds:.0f} s", flush=True)
            outcomes.append(outcome)
            save(where, outcomes, left_out, Path(scratch), args.out)
        print(report(where, outcomes, left_out, Path(scratch)))
    return 0 if all(o.status in ("passed", "left out") for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
