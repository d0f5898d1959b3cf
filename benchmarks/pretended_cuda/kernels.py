"""Launches of Triton's kernels on the pretended device, computed by Triton's interpreter."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy
import triton
from torch import Tensor
from triton.runtime import interpreter

from benchmarks.pretended_cuda.tensors import Pretended
from benchmarks.pretended_cuda.work import count_launch
from rhythm_kernels.statistics import triton_backend, triton_tiles
from rhythm_kernels.statistics.triton_tiles import BandTile, Tile, Tiles

GRID_LIMITS = (2**31, 2**16, 2**16)
# A GPU has small tiles for fp32. The interpreter's time goes by operations, not by elements, so they are larger here.
FP32 = Tiles(*[Tile(64, 64, 1, 1)] * 3, band=BandTile(64, 64, 1, 1))


@contextmanager
def triton_kernels(interprets: bool) -> Iterator[None]:
    """Lets Triton's kernels run on the pretended device. `interprets` says whether they compute anything."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(patch.object(builder, "create_dot", _dot(builder.create_dot)))
        enter(patch.object(executor, "__call__", _launcher(executor.__call__, interprets)))
        enter(patch.object(triton_backend, "INTERPRETING", False))
        enter(patch.object(triton_tiles, "FP32", FP32))
        yield


def _launcher(interpret: Callable, interprets: bool) -> Callable:
    """Wraps the interpreter's launch, which then takes tensors of the pretended device alone."""

    def call(executor, *args, **kwargs) -> None:
        name = executor.fn.__name__
        for place, x in {**dict(enumerate(args)), **kwargs}.items():
            if isinstance(x, Tensor) and not isinstance(x, Pretended):
                raise ValueError(f"Pointer argument {place} of {name} cannot be accessed from Triton (cpu tensor?)")
        grid = executor.grid(dict(zip(executor.arg_names, args)) | kwargs) if callable(executor.grid) else executor.grid
        if not all(type(n) is int and 0 <= n < limit for n, limit in zip(grid, GRID_LIMITS, strict=False)):
            raise ValueError(f"{name} cannot be launched on a grid of {grid}")
        if math.prod(grid):
            count_launch(name)
        if interprets:
            interpret(executor, *map(_values, args), **{key: _values(x) for key, x in kwargs.items()})

    return call


def _values(x):
    return x.held.detach() if isinstance(x, Pretended) else x


def _dot(create_dot: Callable) -> Callable:
    """Wraps the interpreter's matrix product, which multiplies the bits of bf16 factors instead of their values."""

    def create_dot_of_values(builder, a, b, *rest):
        return create_dot(builder, _widened(a), _widened(b), *rest)

    return create_dot_of_values


def _widened(x):
    if x.dtype.scalar != triton.language.bfloat16:
        return x
    return interpreter.TensorHandle((x.data.astype(numpy.uint32) << 16).view(numpy.float32), triton.language.float32)
