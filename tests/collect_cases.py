"""Holds a forward under `collect` against the maps that the model's own attention function uses."""

import pytest
import torch
from models import dense_stats
from own_maps import own_maps

from rhythm_kernels import collect

TOKENS = 44


def assert_right(model, segments=None, rows=None, **inputs):
    """Holds a forward against the model's own maps; returns its collector."""
    with torch.no_grad(), own_maps(model) as own:
        model(**inputs)
    with torch.no_grad(), collect(model, response_mask=rows) as c:
        model(**inputs)
    layout = c.layout
    if segments is None:
        segments = layout.segments.masked_fill(layout.first > layout.last, -1)
    rows = layout.rows if rows is None else rows & (segments >= 0)
    assert sorted(c.stats) == c.layers
    for layer in c.layers:
        exact = dense_stats(own.maps[layer], rows, segments, layout.sequences)
        for got, true in zip(c.stats[layer], exact):
            torch.testing.assert_close(got.double(), true, rtol=2e-5, atol=2e-5)
    return c


def refused(match):
    return pytest.raises(ValueError, match=match)


def ids_of(batch=1, tokens=TOKENS):
    torch.manual_seed(5)
    return torch.randint(3, 58, (batch, tokens))
