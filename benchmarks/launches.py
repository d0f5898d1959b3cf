"""Compiles the package's Triton launches without a GPU, exactly as its launchers do on one.

The public calls run on CPU tensors while Triton and torch are told that they are on a GPU of some compute capability.
Each launch compiles its kernel, with the signature, constants and alignment that Triton's runtime derives from the
arguments, but does not run it. This works only where Triton compiles: not with TRITON_INTERPRET=1.
"""

import inspect
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import KernelInterface

from rhythm_kernels import attention, attention_stats, group_stats
from rhythm_kernels.statistics import api, more
from rhythm_kernels.statistics.layout import make_layout
from rhythm_kernels.statistics.options import check_options
from rhythm_kernels.statistics.probes import rounding_of
from rhythm_kernels.statistics.verify import probe_output

TARGETS = (80, 90, 100)  # compute capabilities, times ten
TOKENS, QUERY_HEADS, KEY_HEADS = 8192, 32, 8
FEATURES = {"softcap": 30.0, "sinks": torch.zeros(QUERY_HEADS)}
SAMPLE = {"span_rows": 512}
WINDOW = {"sliding_window": 4096}
MORE = {"more": more.MORE, "prefix_lengths": torch.tensor([1024])}
# WAAD's window or FAI's horizon reaches further than a tile.
FAR = {"window": 256}, {"horizon": (1, None)}, {"window": 256, "horizon": (1, None)}


class Launch(NamedTuple):
    target: int
    dtype: str
    """The dtype of q; "" if the kernel has no q."""
    kernel: str
    constants: dict[str, Any]
    """The compile-time arguments by name."""
    compiled: CompiledKernel
    """The kernel, which is never loaded."""


class _AbsentDriver:
    """Answers what Triton's runtime asks of a driver before it launches."""

    def __init__(self, target: int):
        self.target = target

    def get_current_device(self) -> int:
        return self.target  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.target, 32)


@contextmanager
def absent_gpu(target: int) -> Iterator[list[Launch]]:
    """Takes CPU tensors in its block for a GPU's of this target, and collects the launches instead of running them."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("Triton interprets kernels in this process: unset TRITON_INTERPRET")
    launches: list[Launch] = []

    def launcher(kernel, grid) -> Callable:
        def compile_only(*args, **options) -> None:
            compiled = kernel.run(*args, grid=grid, warmup=True, **options)
            named = {name: value for name, value in options.items() if name in kernel.arg_names}
            values = inspect.signature(kernel.fn).bind(*args, **named).arguments
            dtype = str(values["q"].dtype).removeprefix("torch.") if "q" in values else ""
            constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
            launches.append(Launch(target, dtype, kernel.__name__, constants, compiled))

        return compile_only

    with ExitStack() as stack:
        stack.enter_context(patch.object(driver, "_active", _AbsentDriver(target)))
        stack.enter_context(patch.object(KernelInterface, "__getitem__", launcher))
        stack.enter_context(patch.object(Tensor, "is_cuda", True))
        stack.enter_context(patch.object(torch.cuda, "get_device_capability", lambda _=None: divmod(target, 10)))
        stack.enter_context(patch.object(api, "can_look", lambda _: False))  # nothing has run
        yield launches


class Case(NamedTuple):
    """A public call, or the check of an attention call's output, at 8,192 tokens, 32 query heads and 8 key heads."""

    call: str
    size: int
    options: dict[str, Any]
    dtype: torch.dtype = torch.bfloat16
    value_size: int | None = None
    lse: bool = False

    def run(self) -> None:
        def zeros(heads: int, size: int) -> Tensor:
            return torch.zeros((1, heads, TOKENS, size), dtype=self.dtype)

        q, k = zeros(QUERY_HEADS, self.size), zeros(KEY_HEADS, self.size)
        options = {**self.options, "backend": "triton"}
        if self.lse:
            seen = torch.arange(1, TOKENS + 1) + ("sinks" in options)  # each with a score of 0
            options["lse"] = seen.float().log().expand(1, QUERY_HEADS, -1)
        if self.call == "attention":
            attention(q, k, zeros(KEY_HEADS, self.value_size or self.size), **options)
        elif self.call == "probe_output":
            self._probe(q, k, zeros(KEY_HEADS, self.value_size or self.size))
        elif self.call == "group_stats":
            group_stats(q, k, *torch.ones(2, QUERY_HEADS, dtype=torch.bool), **options)
        else:
            attention_stats(q, k, **options)

    def _probe(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        plain = {"scale": None, "window": 10, "horizon": (10, 50), "sliding_window": None, "softcap": None}
        options = check_options(q, k, need_span=False, **{**plain, "sinks": None, **self.options})
        out = torch.zeros((1, TOKENS, QUERY_HEADS, v.shape[-1]), dtype=self.dtype)
        layout = make_layout(1, TOKENS, q.device)
        probe_output(q, k, v, out, torch.zeros(q.shape[:3]), layout, options, rounding_of(self.dtype), "triton")


def cases(target: int) -> list[Case]:
    """Returns calls that launch every kernel in each of the target's tiles, and on the H100 with every option."""
    calls = [
        *[Case("attention", size, WINDOW) for size in (64, 128, 256)],
        *[Case("attention_stats", size, {}) for size in (64, 72)],
        *[Case("attention_stats", size, FEATURES) for size in (128, 256)],
        *[Case("attention_stats", size, SAMPLE | FEATURES | WINDOW, lse=True) for size in (64, 128, 256)],
        *[Case(call, 128, SAMPLE) for call in ("attention", "attention_stats")],
        Case("group_stats", 128, FEATURES, lse=True),
        *[Case("probe_output", size, options) for size, options in ((64, {}), (128, FEATURES), (256, {}))],
        Case("probe_output", 128, FEATURES, dtype=torch.float32),
    ]
    if target == 90:
        calls += [
            *[Case(call, size, {}) for size in (64, 128, 256) for call in ("attention", "attention_stats")],
            Case("attention_stats", 64, FEATURES),
            Case("attention", 128, FEATURES | WINDOW),
            *[Case("attention_stats", 128, options, lse=True) for options in ({}, FEATURES)],
            *[Case("attention_stats", size, SAMPLE, lse=True) for size in (64, 80, 128, 256)],
            *[Case(call, 64, SAMPLE) for call in ("attention", "attention_stats")],
            Case("attention_stats", 128, SAMPLE | FEATURES | WINDOW, dtype=torch.float32, lse=True),
            *[Case("attention_stats", 128, {"need_span": False, **far}, lse=True) for far in FAR],
            Case("attention_stats", 128, {"need_span": False}),
            Case("group_stats", 128, {}, lse=True),
            Case("attention", 192, {}, value_size=128),
            Case("attention_stats", 80, {}),
            Case("attention_stats", 128, {}, dtype=torch.float16),
            *[Case(call, 128, FEATURES | WINDOW, dtype=torch.float32) for call in ("attention", "attention_stats")],
        ]
    return calls + cases_of_more(target)


def cases_of_more(target: int) -> list[Case]:
    """Returns calls that launch the variants of kernels which only statistics of `more` need."""
    calls = [
        *[Case("attention_stats", size, MORE | FEATURES | WINDOW) for size in (64, 128, 256)],
        Case("attention_stats", 128, MORE | FEATURES | WINDOW, lse=True),
    ]
    if target == 90:
        calls += [
            *[Case("attention_stats", 128, MORE, lse=is_given) for is_given in (False, True)],
            *[Case("attention_stats", 128, {"more": [name]}) for name in more.NEED_EVERY_KEY],
            Case("group_stats", 128, {"more": ["self_mass"]}, lse=True),
            *[Case("attention_stats", size, MORE) for size in (64, 80, 256)],
            Case("attention_stats", 128, MORE | FEATURES | WINDOW, dtype=torch.float32),
        ]
    return calls


def compile_launches(targets: Iterable[int] = TARGETS, sizes: Container[int] | None = None) -> Iterator[Launch]:
    """Yields the launches of `cases` for these head sizes or all of them, each compiled kernel once."""
    seen = set()
    for target in targets:
        for case in cases(target):
            if sizes is None or case.size in sizes:
                with absent_gpu(target) as launches:
                    case.run()
                for launch in launches:
                    if launch.compiled.hash not in seen:
                        seen.add(launch.compiled.hash)
                        yield launch
