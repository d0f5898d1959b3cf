"""Every test runs on poisoned memory: what torch.empty hands out is full of NaN (or the largest integer)."""

import os

import pytest

# Triton decides at its import whether it interprets kernels on the CPU
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def poisoned(make):
    def wrapped(*args, **kwargs):
        out = make(*args, **kwargs)
        if isinstance(out, torch.Tensor) and out.device.type != "meta" and not out.is_sparse:
            with torch.no_grad():
                if out.dtype.is_floating_point:
                    out.fill_(float("nan"))
                elif out.dtype == torch.bool:
                    out.fill_(True)
                elif not out.dtype.is_complex:
                    out.fill_(torch.iinfo(out.dtype).max)
        return out

    return wrapped


@pytest.fixture(autouse=True)
def poison_uninitialized_memory(monkeypatch):
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
