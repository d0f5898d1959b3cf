"""Statistics of a model whose tokens or heads lie on several ranks, against those of one rank."""

import pytest
import torch
import torch.distributed as dist
from models import llama
from ranks import Raised, on_ranks
from sharded import TOKENS, Row, model_over, split_over_heads, watch_inputs
from torch.distributed.device_mesh import init_device_mesh

from rhythm_kernels import Parallel, attention_stats, collect, group_heads
from rhythm_kernels.listen.shards import head_shares
from rhythm_kernels.signals import rhythm_of
from rhythm_kernels.statistics.layout import make_layout

pytestmark = pytest.mark.xdist_group("ranks")
PACKED = [0, 32, 40, 96]


def options_of(grouped):
    more = ("first_mass", "self_mass", "column_sum", *(() if grouped else ("row_entropy", "largest_score")))
    return {"window": 5, "horizon": (3, 20), "more": more}


def groups_of(model):
    torch.manual_seed(3)
    return group_heads(torch.rand(len(collect(model).layers), model.config.num_attention_heads))


def tokens_of_a_row(order, cuts, sizes, by_sequence, model_sizes, whole_mask, grouped):
    """Compares every statistic of a sharded row with those of the whole row; returns Rhythm of this rank."""
    row = Row(order, cuts, sizes, by_sequence)
    model, attention = model_over(row, **model_sizes)
    bounds = None if cuts is None else torch.tensor(cuts, dtype=torch.int32)
    options, groups = options_of(grouped), groups_of(model) if grouped else None
    with (
        torch.no_grad(),
        collect(
            model,
            response_mask=row.response if whole_mask else row.part(row.response),
            cu_seqlens=bounds if by_sequence else None,
            parallel=Parallel(tokens=dist.group.WORLD, order=order if by_sequence else "auto"),
            groups=groups,
            **options,
        ) as c,
    ):
        model(row.part(row.ids), attention_mask=row.part(row.mask), position_ids=row.part(row.positions))
    assert torch.equal(c.own_tokens, row.own)
    heads = model.config.num_attention_heads
    own = list(head_shares(heads, dist.get_world_size())[dist.get_rank()])
    compare(c, row, {layer: (*attention.wholes[layer], None) for layer in c.layers}, own, options, groups)
    return c.rhythm()[:2]


def compare(c, row, inputs, own, options, groups=None):
    """Holds a rank's statistics against those that one rank computes from all heads of the whole row.

    Args:
        inputs: q, k and the given log-sum-exp, or None, of all heads and tokens, by layer.
        own: this rank's heads.
    """
    bounds = None if row.cuts is None else torch.tensor(row.cuts, dtype=torch.int32)
    layout = make_layout(len(row.ids), TOKENS, torch.device("cpu"), row.response, row.mask, bounds)
    masks = {"response_mask": row.response, "attention_mask": row.mask, "cu_seqlens": bounds}
    whole = {layer: attention_stats(q, k, lse=lse, **masks, **options) for layer, (q, k, lse) in inputs.items()}
    expected, rhythm = rhythm_of(whole, layout, groups=groups), c.rhythm()
    for layer, stats in c.stats.items():
        assert set(stats.more) == set(options["more"])
        if groups is not None:
            local, far = (group[c.layers.index(layer)] for group in groups)
            pairs = [(stats.waad, whole[layer].waad[:, local].sum(1)), (stats.fai, whole[layer].fai[:, far].sum(1))]
            for name, value in stats.more.items():
                pairs.append((value, whole[layer].more[name][:, far if name == "column_sum" else local].sum(1)))
            for got, wanted in pairs:
                torch.testing.assert_close(got, wanted, rtol=2e-6, atol=2e-6)
            continue
        for name in ("waad", "fai", "lse"):
            assert torch.equal(getattr(stats, name), getattr(whole[layer], name)[:, own]), (layer, name)
        assert torch.equal(stats.span, whole[layer].span[:, own])
        for name, value in stats.more.items():
            assert torch.equal(value, whole[layer].more[name][:, own]), (layer, name)
    if groups is None:
        assert torch.equal(rhythm.spans, expected.spans)
    assert all(map(torch.equal, rhythm.groups, expected.groups))
    torch.testing.assert_close(rhythm.waad, expected.waad, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(rhythm.fai, expected.fai, rtol=2e-6, atol=1e-8)


def check(returned: list) -> None:
    assert not any(isinstance(x, Raised) for x in returned), returned
    for other in returned[1:]:  # the same bits on every rank
        assert all(map(torch.equal, returned[0], other))


@pytest.mark.parametrize("grouped", [False, True], ids=["own groups", "known groups"])
@pytest.mark.parametrize(
    ("order", "cuts", "sizes", "by_sequence"),
    [
        ("contiguous", None, None, False),
        ("zigzag", None, None, False),
        ("contiguous", PACKED, None, False),
        ("zigzag", PACKED, None, False),
        ("zigzag", PACKED, None, True),
        ("contiguous", PACKED, [50, 46], False),
    ],
)
def test_tokens_on_two_ranks(order, cuts, sizes, by_sequence, grouped):
    check(on_ranks(2, tokens_of_a_row, order, cuts, sizes, by_sequence, {}, False, grouped))


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_attention_heads": 8, "num_key_value_heads": 2},
        {"num_attention_heads": 6, "num_key_value_heads": 2},
        {"num_attention_heads": 3, "num_key_value_heads": 3},
        {"num_attention_heads": 6, "num_key_value_heads": 1},
    ],
    ids=lambda sizes: "{num_attention_heads} heads, {num_key_value_heads} keys".format(**sizes),
)
def test_heads_that_four_ranks_do_not_divide(sizes):
    check(on_ranks(4, tokens_of_a_row, "zigzag", None, None, False, sizes, True, False))


def heads_of_a_model(packed, grouped, lse="auto"):
    """Compares the statistics of a tensor-parallel Llama."""
    row = Row(cuts=PACKED if packed else None, group=dist.new_subgroups(1)[0])
    torch.manual_seed(1)
    model = llama(num_attention_heads=8, num_key_value_heads=4)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    split_over_heads(model, mesh["tp"])
    options, groups = options_of(grouped), groups_of(model) if grouped else None
    seen = watch_inputs()
    parallel = Parallel(heads=mesh["tp"])
    with (
        torch.no_grad(),
        collect(model, response_mask=row.response, parallel=parallel, groups=groups, lse=lse, **options) as c,
    ):
        model(row.ids, attention_mask=row.mask, position_ids=row.positions, use_cache=False)
    assert c.own_tokens is None
    size = 8 // dist.get_world_size()
    inputs = {
        layer: tuple(None if x is None else all_heads(x) for x in given)
        for layer, given in zip(c.layers, seen, strict=True)
    }
    own = list(range(dist.get_rank() * size, (dist.get_rank() + 1) * size))
    compare(c, row, inputs, own, options, groups)
    return c.rhythm()[:2]


def all_heads(x, order=None):
    """Returns the heads of all ranks; order: the ranks by their heads."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x)
    return torch.cat([parts[rank] for rank in order or range(len(parts))], 1)


@pytest.mark.parametrize("grouped", [False, True], ids=["own groups", "known groups"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("size", [2, 4])
def test_heads_on_ranks(size, packed, grouped):
    check(on_ranks(size, heads_of_a_model, packed, grouped))


def tokens_and_heads():
    """Compares a model whose heads lie on two ranks, each half of which lies on two ranks by tokens."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    row = Row("zigzag", group=mesh["cp"].get_group())
    model, _ = model_over(row, num_attention_heads=8, num_key_value_heads=4)
    split_over_heads(model, mesh["tp"])
    options, seen = options_of(grouped=False), watch_inputs()
    with (
        torch.no_grad(),
        collect(model, response_mask=row.part(row.response), parallel=Parallel(mesh["tp"], mesh["cp"]), **options) as c,
    ):
        model(row.part(row.ids), attention_mask=row.part(row.mask), position_ids=row.part(row.positions))
    tp, cp = mesh["tp"].get_local_rank(), mesh["cp"].get_local_rank()
    inputs = {layer: (*(all_heads(x, order=(0, 2, 1, 3)) for x in qk), None) for layer, (*qk, _) in zip(c.layers, seen)}
    compare(c, row, inputs, [4 * tp + 2 * cp, 4 * tp + 2 * cp + 1], options)
    return c.rhythm()[:2]


def test_heads_and_tokens_on_ranks():
    check(on_ranks(4, tokens_and_heads))
