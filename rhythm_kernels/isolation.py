"""Keeps the arithmetic of the statistics apart from the settings of the program around them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import _disable_current_modes

PRODUCTS = (("cuda", "matmul"), ("mkldnn", "matmul"))
"""The settings that may round the factors of fp32 matrix products, one for each library."""
SETTING_OF = dict(zip(("cuda", "cpu"), PRODUCTS, strict=True))
"""The setting of each device type."""
ROUNDED = ("bf16", "tf32")
"""Values of those settings, the coarsest first."""

_lock = threading.Lock()
_inside = 0  # the number of open contexts of exact products, over all threads
_changed: dict[tuple[str, str], str] = {}  # the settings as they were before the first of these contexts
_apart = 0  # the number of open contexts of graphs of their own, over all threads
_would_warn: bool | None = None  # that setting as it was before the first of them; None if it was left alone
_changed_float32: str | None = None  # torch.get_float32_matmul_precision() as it was, if that had to change too


@contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Opens a context in which no outer setting changes the arithmetic of the statistics.

    Gradients are off. Autocast is off, since it would round scores to 16 bits. Products of fp32 matrices are exact,
    whatever `torch.set_float32_matmul_precision` and TF32 say. No dispatch mode is active: selective activation
    checkpointing queues results, and operators that its recomputation does not repeat would shift the queue.
    """
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _disable_current_modes(), exact_products():
        yield


@contextmanager
def exact_products() -> Iterator[None]:
    """Opens a context in which products of fp32 matrices keep all their bits.

    The setting belongs to the process: it changes for the first thread that enters and returns with the last that
    leaves.
    """
    global _inside
    with _lock:
        if _inside == 0 and lowest_precision() is not None:
            _make_exact()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0 and _changed:
                _restore()


def _make_exact() -> None:
    """Sets all products to exact ones. torch's older setting follows, or torch would raise where it is read."""
    global _changed_float32
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # it contradicts the newer settings already
        older = None
    _changed.update((place, _own_precision(place)) for place in PRODUCTS)
    if older not in (None, "highest"):
        _changed_float32 = older
        torch.set_float32_matmul_precision("highest")
    for place in PRODUCTS:
        torch._C._set_fp32_precision_setter(*place, "ieee")


def _restore() -> None:
    global _changed_float32
    if _changed_float32 is not None:
        torch.set_float32_matmul_precision(_changed_float32)
        _changed_float32 = None
    while _changed:
        place, precision = _changed.popitem()
        torch._C._set_fp32_precision_setter(*place, precision)


@contextmanager
def graphs_of_their_own() -> Iterator[None]:
    """Opens a context in which torch.compile makes and runs other graphs than outside.

    A graph that was compiled where hooks break it would otherwise be taken after the context too, in its pieces.
    torch.compile looks at some settings of the process before it takes a graph. One of them has no effect while
    deterministic algorithms are off: whether they would only warn. So it is switched while such contexts are open.
    Where these algorithms are on, it stays, and so do the pieces.
    """
    global _apart, _would_warn
    with _lock:
        if _apart == 0 and not torch.are_deterministic_algorithms_enabled():
            _would_warn = torch.is_deterministic_algorithms_warn_only_enabled()
            torch._C._set_deterministic_algorithms(False, warn_only=not _would_warn)
        _apart += 1
    try:
        yield
    finally:
        with _lock:
            _apart -= 1
            if _apart == 0 and _would_warn is not None:
                if not torch.are_deterministic_algorithms_enabled():
                    torch._C._set_deterministic_algorithms(False, warn_only=_would_warn)
                _would_warn = None


def lowest_precision(device: str | None = None) -> str | None:
    """Returns the coarsest rounding of factors that a setting asks for in fp32 products: "bf16", "tf32", or None.

    Args:
        device: a device type, whose setting alone counts; the settings of all libraries if None or unknown.
    """
    settings = [_precision(place) for place in ([SETTING_OF[device]] if device in SETTING_OF else PRODUCTS)]
    return next((precision for precision in ROUNDED if precision in settings), None)


def _precision(place: tuple[str, str]) -> str:
    return torch._C._get_fp32_precision_getter(*place)


def _own_precision(place: tuple[str, str]) -> str:
    """Returns a setting; "none" if it is inherited from a wider setting, so that restoring it keeps it inherited."""
    precision = _precision(place)
    torch._C._set_fp32_precision_setter(*place, "none")
    return "none" if _precision(place) == precision else precision
