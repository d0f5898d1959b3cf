"""Says where a command ran: the device, the versions of the packages, and the commit of a checkout."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import rhythm_kernels


def device_name(device: torch.device) -> str:
    """Returns the name of the GPU, or "CPU" with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def package_versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that the numbers depend on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}  # with the build, such as +cu130
    for package in ("transformers", "rhythm_kernels"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"  # the package may run from a checkout
    return versions


def environment(device: torch.device) -> dict[str, str]:
    """Returns the device, the versions and, where the package is the root of a git checkout, its commit."""
    described = {"device": device_name(device), **package_versions()}
    root = Path(rhythm_kernels.__file__).resolve().parent.parent
    if _git(root, "rev-parse", "--show-toplevel") == str(root):
        # benchmarks write their results while others still run
        dirty = _git(root, "status", "--porcelain", "--", ".", ":!benchmarks/results")
        described["commit"] = _git(root, "rev-parse", "--short", "HEAD") + ("-dirty" if dirty else "")
    return described


def _git(root: Path, *arguments: str) -> str:
    """Returns the output of a git command; empty without git or a checkout."""
    try:
        command = ("git", "-C", str(root), *arguments)
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
