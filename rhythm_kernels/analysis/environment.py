"""Says where a command ran: the device, the versions of the packages, and the commit."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import rhythm_kernels

CPU = torch.device("cpu")
UNKNOWN = "unknown"
"""The commit of files that are neither in git nor in a bundle."""
PACKAGES = ("triton", "transformers", "rhythm_kernels")


def device_name(device: torch.device) -> str:
    """Returns the name of the GPU, or of the CPU with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU, {names[0] if names else platform.processor()}, {len(names) or '?'} cores seen"


def package_versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that the numbers depend on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}  # with the build, such as +cu130
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"  # this package may run from a checkout
    return versions


def environment(device: torch.device = CPU) -> dict[str, str]:
    """Returns the device, its driver or the number of threads, the versions and the commit."""
    where = {"device": device_name(device)}
    if device.type == "cuda":
        where["driver"] = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    else:
        where["threads"] = str(torch.get_num_threads())
    return where | package_versions() | {"commit": commit_of(Path(rhythm_kernels.__file__).resolve().parent.parent)}


def heading(where: dict[str, str]) -> str:
    """Returns the line of a report that says where it was measured."""
    return ", ".join(f"{name} {value}" for name, value in where.items())


def commit_of(root: Path) -> str:
    """Returns the commit of a checkout, with "-dirty" where files differ from it.

    Without .git it returns what the file COMMIT holds, or else UNKNOWN.
    """
    if not (root / ".git").exists():  # git would answer for a repository around it
        file = root / "COMMIT"
        return file.read_text().strip() if file.exists() else UNKNOWN
    git = ("git", "-C", str(root))
    commit = output_of(*git, "rev-parse", "--short", "HEAD") or UNKNOWN
    # results are written while others are still measured
    changed = output_of(*git, "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return f"{commit}-dirty" if changed else commit


def output_of(*command: str) -> str:
    """Returns what a command prints; an empty string if the command is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
