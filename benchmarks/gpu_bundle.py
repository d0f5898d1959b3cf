"""Packs what `make test-gpu` needs on a machine without network or git, and prints the commands to run there.

    python -m benchmarks.gpu_bundle [--build-with PYTHON] [--out build/gpu-bundle.tar.gz]

The archive holds one folder, rhythm_kernels/: the files of HEAD, a file COMMIT that names it, since there is no .git,
and the compiled extension for an H100 or H200 (sm_90a), in place.

The extension is compiled from the same files. This takes nvcc and the Python of an environment with a CUDA build of
torch, but no GPU. Without them the archive has no extension, and the suite's build step compiles it on the GPU machine.
That step tries a carried extension on the GPU first, and compiles one only if it does not run.

The command refuses a tree that differs from HEAD, and an extension that cannot be built or loaded, and says why.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch

from benchmarks import ROOT
from benchmarks.gpu_suite import BUDGET, HALVES
from benchmarks.measure import commit_of, make_parser

TOP = "rhythm_kernels"  # the folder in the archive
ARCHS = "90a"  # the value of RHYTHM_KERNELS_CUDA_ARCHS for setup.py
TAIL = 20  # lines to show of a failing build


def commit_to_pack() -> str:
    """Returns the commit of a checkout without changes.

    Raises: SystemExit if files differ from it, or if there is no checkout.
    """
    if not (ROOT / ".git").exists():
        raise SystemExit(f"the files to pack are those of a commit, and {ROOT} is no git checkout")
    commit = commit_of(ROOT)
    if commit.endswith("-dirty"):
        changes = run(["git", "status", "--short"], ROOT).rstrip()
        raise SystemExit(f"the tree differs from commit {commit.removesuffix('-dirty')}, commit or stash:\n{changes}")
    return commit


def run(command: list[object], folder: Path, **environment: str) -> str:
    """Returns what a command prints.

    Raises: SystemExit with the end of the output if the command fails.
    """
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        end = "\n".join(done.stdout.splitlines()[-TAIL:])
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{end}")
    return done.stdout


def build_extension(folder: Path, python: str) -> None:
    """Compiles the extension of the sources in `folder` in place, and loads it once."""
    run([python, "setup.py", "build_ext", "--inplace"], folder, RHYTHM_KERNELS_CUDA_ARCHS=ARCHS)
    shutil.rmtree(folder / "build", ignore_errors=True)
    load = "from rhythm_kernels.credit import extension; extension.require('cuda')"
    run([python, "-B", "-c", load], folder)


def pack(out: Path, commit: str, python: str | None) -> None:
    """Writes the archive, whole or not at all. `python` builds the extension; None leaves it out."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder, files = Path(scratch) / TOP, Path(scratch) / "files.tar"
        run(["git", "archive", f"--prefix={TOP}/", "--output", files, "HEAD"], ROOT)
        run(["tar", "-xf", files], Path(scratch))
        (folder / "COMMIT").write_text(f"{commit}\n")
        if python is not None:
            build_extension(folder, python)
        unfinished = out.with_name(f"{out.name}.unfinished")
        with tarfile.open(unfinished, "w:gz") as archive:
            archive.add(folder, TOP)
        unfinished.replace(out)


def instructions(out: Path) -> str:
    """Returns the commands for the GPU machine, each complete by itself: the second one may find a fresh machine."""
    suite = f"tar -xzf {out.name} -C /tmp && cd /tmp/{TOP} && python3 -m benchmarks.gpu_suite"
    commands = "\n".join(f"    {suite} --half {half} --out DIR" for half in HALVES)
    return f"""
Run on the GPU machine, in the folder that holds {out.name}; DIR is the absolute path of the folder that comes back.
Each command takes at most {BUDGET // 60} minutes. The first one runs the most important steps, the second one the rest.

{commands}

A third one, with --ptxas in the place of --half, repeats tests and memcheck with the assembler of nvcc's toolkit.

Join what came back to two folders, here: python -m benchmarks.gpu_suite --merge FIRST SECOND --out BOTH
"""


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    here = sys.executable if torch.version.cuda is not None and shutil.which("nvcc") else None
    parser.add_argument(
        "--build-with",
        metavar="PYTHON",
        default=here,
        help="Python that builds the extension; default: this one, where its torch is a CUDA build and nvcc is found",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-bundle.tar.gz", help="the archive")
    args = parser.parse_args(arguments)
    python = args.build_with and shutil.which(args.build_with)
    if args.build_with and python is None:
        parser.error(f"--build-with must be a Python that runs, got {args.build_with!r}")
    commit = commit_to_pack()
    pack(args.out, commit, python and os.path.abspath(python))  # not resolved: an environment's Python is a link
    extension = f"the extension for sm_{ARCHS}" if args.build_with else "no extension: the suite builds it there"
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB, commit {commit}, {extension}")
    print(instructions(args.out))


if __name__ == "__main__":
    main()
