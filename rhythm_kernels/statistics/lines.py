"""Reads tensors as lines, so that rows of any heads and tokens are copied by one index_select."""

from torch import Tensor


def lines_of(x: Tensor) -> Tensor:
    """Returns x [..., D], whose last stride is 1, as a view: the lines of D that begin at each element, [lines, D].

    Line i begins at x's element of offset i. One index_select over lines serves all strides. It is several times as
    fast as an index of several dimensions, and an index_select of a transposed tensor may take a hundred times as long.
    """
    count = 1 + sum((n - 1) * step for n, step in zip(x.shape[:-1], x.stride()[:-1], strict=True))
    return x.as_strided((count, x.shape[-1]), (1, 1))
