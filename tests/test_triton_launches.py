"""How many kernels a layer's statistics launch on a GPU, and parts of them that are tested alone."""

import pytest
import torch
import triton
import triton.language as tl
from stats_cases import make_case, strided
from torch.utils._python_dispatch import TorchDispatchMode
from triton_calls import DEVICE, HALF

from rhythm_kernels.statistics import triton_backend
from rhythm_kernels.statistics.layout import make_layout
from rhythm_kernels.statistics.options import check_options
from rhythm_kernels.statistics.spans import SPAN_UNIT, mean_over_rows
from rhythm_kernels.statistics.triton_scores import aligned
from rhythm_kernels.statistics.triton_spans import BROKEN, mean_spans, span_units

TOKENS, HEADS = 90, 4
MOST = 4
PADDED = {"attention_mask": torch.arange(TOKENS) < torch.tensor([[TOKENS], [40]])}
PACKED = {"cu_seqlens": torch.tensor([0, 13, 33, TOKENS], dtype=torch.int32)}


class Launches(TorchDispatchMode):
    """Records the names of torch's operators that launch work on a GPU: all but views and pure allocations."""

    def __init__(self):
        super().__init__()
        self.names = []
        self._inside = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in func._schema.arguments)
        if not (self._inside or is_view or func._schema.name.startswith(("aten::empty", "aten::new_empty"))):
            self.names.append(func._schema.name)
        return func(*args, **kwargs or {})

    def launcher(self, real):
        """Returns a launcher that counts a kernel as one launch, whatever operators the interpreter runs for it."""

        def launch(kernel, *args, **kwargs):
            self.names.append(kernel.fn.__name__)
            self._inside = True
            try:
                return real(kernel, *args, **kwargs)
            finally:
                self._inside = False

        return launch


CALLS = {
    "statistics": ("statistics", {}),
    "statistics, lse given": ("statistics", {"lse_given": True}),
    "statistics, lse given in another order": ("statistics", {"lse_given": True, "order": "heads inside"}),
    "statistics, lse given, no span": ("statistics", {"lse_given": True, "need_span": False}),
    "statistics, sampled": ("statistics", {"span_rows": 64}),
    "statistics, lse given, sampled": ("statistics", {"lse_given": True, "span_rows": 64}),
    "groups": ("groups", {}),
    "groups, lse given": ("groups", {"lse_given": True}),
    "attention": ("attention", {}),
    "attention, sampled": ("attention", {"span_rows": 64}),
}


@pytest.mark.skipif(DEVICE == "cuda", reason="counted where the kernels are interpreted")
@pytest.mark.parametrize("call, options", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("kind", [{}, PADDED, PACKED], ids=["plain", "padded", "packed"])
@pytest.mark.slow
def test_a_layer_takes_few_launches(kind, call, options, monkeypatch):
    """The first layer of a forward launches more, to make the tables of its layout; the second one is counted."""
    from triton.runtime.interpreter import GridExecutor

    case = make_case((2 if kind is PADDED else 1, HEADS, TOKENS, 16), 2, dtype=HALF, **options, **kind)
    q, k, lse = case.q, case.k, case.kwargs.get("lse")
    layout = make_layout(*q.shape[::2], q.device, **kind)
    groups = [(torch.arange(HEADS) % 2 == i).expand(layout.sequences, -1) for i in range(2)]
    checked = check_options(
        q, k, scale=None, window=10, horizon=(10, 50), sliding_window=None, softcap=None, sinks=None,
        need_span=options.get("need_span", call != "groups"), span_rows=options.get("span_rows"),
    )  # fmt: skip
    layer = {
        "statistics": lambda: triton_backend.attention_stats(q, k, lse, layout, checked),
        "groups": lambda: triton_backend.group_stats(q, k, lse, *groups, layout, checked),
        "attention": lambda: triton_backend.attention(q, k, k, layout, checked),
    }[call]

    layer()
    launches = Launches()
    monkeypatch.undo()  # filling memory with poison is not a launch of the layer
    monkeypatch.setattr(GridExecutor, "__call__", launches.launcher(GridExecutor.__call__))
    with launches:
        layer()
    assert 1 <= len(launches.names) <= MOST, launches.names


@triton.jit
def units_kernel(distance, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, span_units(tl.load(distance + i)))


def test_distances_are_rounded_as_torch_rounds_them():
    """Halves of the unit go to the even number, on both sides of 0 and up to the longest sequence."""
    generator = torch.Generator().manual_seed(0)
    halves = torch.arange(-64, 64) * (SPAN_UNIT / 4)
    random = torch.rand(128, generator=generator) * 2.0 ** torch.randint(-20, 20, (128,), generator=generator)
    distance = torch.cat([halves, random]).to(DEVICE)
    out = torch.empty(256, dtype=torch.int64, device=DEVICE)
    units_kernel[(1,)](distance, out, BLOCK=256)
    assert torch.equal(out, (distance.double() / SPAN_UNIT).round().long())


@pytest.mark.parametrize("tile", [1, 8, 256])
@pytest.mark.parametrize("kind", [{}, PADDED, PACKED], ids=["plain", "padded", "packed"])
def test_the_mean_over_tiles_has_the_bits_of_the_mean_over_rows(kind, tile):
    batch = 2 if kind is PADDED else 1
    generator = torch.Generator().manual_seed(tile)
    response_mask = torch.rand(batch, TOKENS, generator=generator) < 0.6
    response_mask[-1, 33:] = False  # the last sequence of the packed ones has no row
    response_mask, kind = response_mask.to(DEVICE), {name: x.to(DEVICE) for name, x in kind.items()}
    layout = make_layout(batch, TOKENS, response_mask.device, response_mask, **kind)
    distance = torch.rand(batch, HEADS, TOKENS, generator=generator).to(DEVICE) * TOKENS * layout.rows[:, None]
    distance[0, 1, layout.rows[0].nonzero()[0]] = torch.nan
    expected = mean_over_rows(distance, layout)
    assert expected.isnan().sum() == 1

    totals = torch.full((HEADS, batch * TOKENS // tile + layout.sequences + 1), 7, dtype=torch.int64, device=DEVICE)
    for sequence, (row, begin, end) in enumerate(layout.bounds):
        slot = (row * TOKENS + begin) // tile + sequence
        for at in range(begin, end, tile):
            units = (distance[row, :, at : min(at + tile, end)].double() / SPAN_UNIT).round()
            totals[:, slot] = torch.where(units.isfinite().all(-1), units.nan_to_num().sum(-1).long(), BROKEN.value)
            slot += 1
    spans = mean_spans(totals[None], layout, tile)
    assert torch.equal(spans.nan_to_num(-1), expected.nan_to_num(-1))


@pytest.mark.parametrize("size", [5, 8, 20, 72])
@pytest.mark.parametrize("order", ["heads outside", "heads inside", "slice"])
def test_what_cannot_be_read_16_bytes_at_a_time_is_copied(order, size):
    x = strided(torch.randn(2, 3, 7, size).half(), order)
    readable = aligned(x)
    assert (readable is x) == (size % 8 == 0 and order != "slice")
    assert readable.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in readable.stride()[:3])
    assert torch.equal(readable[..., :size], x)
    assert readable.shape[-1] - size in range(8) and (readable[..., size:] == 0).all()
