"""Builds the extension for the GPU of this machine, unless one came along that runs.

    python -m benchmarks.gpu_build

A copy without .git may carry a compiled extension, which is used if its CUDA ops run on this GPU. Otherwise setup.py
builds one with nvcc, for this GPU's architecture alone or for those in RHYTHM_KERNELS_CUDA_ARCHS.
"""

import os
import subprocess
import sys

import torch

from benchmarks import ROOT

PROBE = """
import torch
from rhythm_kernels import segment_topq
values = torch.tensor([[3.0, 1.0, 2.0]], device="cuda")
selected = segment_topq(values, torch.ones_like(values, dtype=torch.bool), 0.4, backend="extension").tolist()
assert selected == [[True, False, True]], selected
"""


def arch_of(capability: tuple[int, int]) -> str:
    """Returns the name that setup.py takes, such as "90a" for (9, 0), an H100. Its own instructions need the letter."""
    number = f"{capability[0]}{capability[1]}"
    return f"{number}a" if capability >= (9, 0) else number


def why_not() -> str:
    """Returns the reason why the extension does not run on this GPU, or "" if it runs. Each call loads it anew."""
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True)
    reason = done.stderr.strip() or f"exit code {done.returncode}"
    return "" if done.returncode == 0 else reason.splitlines()[-1]


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit(f"the extension is built for the visible GPU, and torch {torch.__version__} sees none")
    if not (ROOT / ".git").exists():  # the sources of a checkout may have changed since the last build
        reason = why_not()
        if not reason:
            print("the extension that came along runs")
            return
        print(f"the extension that came along does not run, or none did ({reason}): building one", flush=True)
    archs = os.environ.get("RHYTHM_KERNELS_CUDA_ARCHS") or arch_of(torch.cuda.get_device_capability())
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(build, cwd=ROOT, check=True, env={**os.environ, "RHYTHM_KERNELS_CUDA_ARCHS": archs})
    if reason := why_not():
        raise SystemExit(f"the extension built for {archs} does not run: {reason}")
    print(f"the extension built for {archs} runs")


if __name__ == "__main__":
    sys.exit(main())
