"""Builds rhythm_kernels._C, the C++/CUDA extension; everything else about the package is in pyproject.toml.

    pip install --no-build-isolation .        # or -e .

The CPU ops are built if a C++ compiler is found. The CUDA ops are built if torch is a CUDA build and the CUDA toolkit
is found too (CUDA_HOME, or nvcc on the PATH), whatever the visible GPU. RHYTHM_KERNELS_CUDA_ARCHS lists the
architectures to compile for, such as "80 90a 100+PTX". An empty value leaves the CUDA ops out.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        f"rhythm_kernels is built against the installed torch, which cannot be imported ({error}). "
        "Install torch >= 2.11 first, then run: pip install --no-build-isolation ."
    ) from error

ROOT = Path(__file__).resolve().parent
DEFAULT_CUDA_ARCHS = "80 90a 100+PTX"  # PTX serves later GPUs
TORCH_TARGET_VERSION = "0x020b000000000000"  # libtorch's stable interface as of 2.11
PYTHON_TAG = "cp310"  # the oldest Python; csrc/ops.cpp says so too


def say(message: str) -> None:
    print(f"rhythm_kernels: {message}", file=sys.stderr, flush=True)


def find_cxx() -> str | None:
    """Returns the C++ compiler: $CXX, or the first one on the PATH."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((name for name in candidates if shutil.which(shlex.split(name)[0])), None)


def find_nvcc() -> Path | None:
    """Returns the nvcc that lies in its toolkit.

    torch takes the folder above the nvcc on the PATH for the toolkit. That nvcc may be a script that calls another one.
    Then neither headers nor libraries lie beside it, so this function asks nvcc itself.
    """
    home = cpp_extension.CUDA_HOME
    nvcc = Path(home) / "bin" / "nvcc" if home else None
    if nvcc is None or not nvcc.exists():
        return None
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
    commands = subprocess.run(command, capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", commands, re.MULTILINE)
    inside = Path(top.group(1).strip()).resolve() / "bin" / "nvcc" if top is not None else nvcc
    return inside if inside.exists() else nvcc


def nvcc_version(nvcc: Path) -> str:
    """Returns the version of nvcc, such as "13.0"."""
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"release (\d+\.\d+)", text).group(1)


def why_no_cuda(nvcc: Path | None) -> str | None:
    """Returns the reason to leave the CUDA ops out, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if nvcc is None:
        return "no CUDA toolkit was found"
    version = nvcc_version(nvcc)
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"the CUDA toolkit is {version} and torch was built with {torch.version.cuda}"
    return None


def parse_archs(text: str) -> list[str]:
    """Returns ["80", "90a", "100+PTX"] for "80 90a 100+PTX", also with commas, semicolons or dots (8.0)."""
    archs = [token.replace(".", "") for token in re.split(r"[\s,;]+", text) if token]
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", arch):
            raise SystemExit(f'RHYTHM_KERNELS_CUDA_ARCHS must look like "{DEFAULT_CUDA_ARCHS}", got {text!r}')
    return archs


def known_archs(archs: list[str], nvcc: Path) -> list[str]:
    """Returns the architectures that this nvcc compiles for."""
    known = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
    return [arch for arch in archs if "sm_" + re.match(r"\d+", arch).group() in known]


def gencode_flags(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def torch_flags() -> list[str]:
    """Returns the flags for torch's headers. -isystem keeps their warnings out."""
    includes = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    return [*includes, f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]


def cxx_flags() -> list[str]:
    # Without contraction ceil(fraction * n - 1e-9) rounds as in Python.
    return ["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", *torch_flags()]


def nvcc_flags(archs: list[str]) -> list[str]:
    return [
        "-std=c++17",
        "-O3",
        "-Xcompiler=-Wall,-Wextra,-fvisibility=hidden,-ffp-contract=off",
        *gencode_flags(archs),
        *torch_flags(),
    ]


def cuda_archs_to_build() -> list[str]:
    """Returns the architectures to compile for; an empty list leaves the CUDA ops out."""
    wanted = os.environ.get("RHYTHM_KERNELS_CUDA_ARCHS")
    archs = parse_archs(DEFAULT_CUDA_ARCHS if wanted is None else wanted)
    if not archs:
        say("RHYTHM_KERNELS_CUDA_ARCHS is empty: building the CPU ops only.")
        return []
    nvcc = find_nvcc()
    reason = why_no_cuda(nvcc)
    if reason is not None:
        if wanted is not None:
            raise SystemExit(f"rhythm_kernels: RHYTHM_KERNELS_CUDA_ARCHS={wanted!r}, but {reason}.")
        say(f"{reason}: building the CPU ops only.")
        return []
    return archs if wanted is not None else known_archs(archs, nvcc)


def extensions() -> list:
    cxx = find_cxx()
    if cxx is None:
        say("no C++ compiler found: installing without the extension, with the slower torch implementation instead.")
        return []
    os.environ.setdefault("CXX", cxx)
    archs = cuda_archs_to_build()
    if archs:
        cpp_extension.CUDA_HOME = str(find_nvcc().parent.parent)  # torch takes headers and libraries from there
    patterns = ["ops.cpp", "cpu/*.cpp"] + (["cuda/*.cu"] if archs else [])
    sources = sorted(path for pattern in patterns for path in (ROOT / "csrc").glob(pattern))
    headers = sorted(path for suffix in ("h", "cuh") for path in (ROOT / "csrc").rglob(f"*.{suffix}"))
    make = cpp_extension.CUDAExtension if archs else cpp_extension.CppExtension
    return [
        make(
            "rhythm_kernels._C",
            [str(path.relative_to(ROOT)) for path in sources],
            depends=[str(path.relative_to(ROOT)) for path in headers],
            define_macros=[("RHYTHM_KERNELS_WITH_CUDA", None)] if archs else [],
            extra_compile_args={"cxx": cxx_flags(), "nvcc": nvcc_flags(archs)},
            py_limited_api=True,
        )
    ]


def main() -> None:
    modules = extensions()
    setup(
        ext_modules=modules,
        cmdclass={"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=True)},
        options={"bdist_wheel": {"py_limited_api": PYTHON_TAG}} if modules else {},
    )


if __name__ == "__main__":
    main()
