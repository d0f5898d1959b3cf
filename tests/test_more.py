"""The statistics that `more` names: what they refuse, what they cost, and inside a model's forward."""

import pytest
import torch
import triton_calls
from models import eager_maps, llama, qwen3
from stats_cases import StatsCase, assert_close_to_reference, assert_groups_close, make_case, named
from test_blockwise import LargestTensor, run, run_groups
from torch.utils.flop_counter import FlopCounterMode

from rhythm_kernels import GroupStats, HeadGroups, attention, attention_stats, collect, group_stats, reference
from rhythm_kernels.statistics import api, blockwise_masses
from rhythm_kernels.statistics.blockwise_rows import ROW_TILE
from rhythm_kernels.statistics.more import MASSES, MORE, NEED_EVERY_KEY
from rhythm_kernels.statistics.poison import scaled

LINEAR = (*MASSES, "column_sum")
Q, K = torch.randn(2, 4, 8, 16), torch.randn(2, 2, 8, 16)
HEADS = torch.ones(4, dtype=torch.bool)
LENGTHS = torch.tensor([3, 5])
HUGE = (2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**30)


@pytest.mark.parametrize("lse_given", [False, True])
@pytest.mark.parametrize("kind", ["padded", "packed", "packed, long"])
def test_all_of_them_with_every_option(kind, lse_given, monkeypatch):
    """Several tiles of keys and rows, sequences of one token and of none, and prefixes longer than some sequences."""
    monkeypatch.setattr(blockwise_masses, "MASS_BYTES", 1 << 12)
    if kind == "padded":
        options = {"attention_mask": torch.arange(150) >= torch.tensor([[0], [50]])}
        options["prefix_lengths"] = torch.tensor([100, 30])
    else:
        options = {"cu_seqlens": torch.tensor([0, 40, 40, 41, 150 if kind == "packed" else 400], dtype=torch.int32)}
        options["prefix_lengths"] = torch.tensor([50, 3, 0, 60], dtype=torch.int32)
    batch, tokens = (2, 150) if kind == "padded" else (1, int(options["cu_seqlens"][-1]))
    options |= {"more": MORE, "sinks": torch.arange(6) - 2.0, "softcap": 9.0, "sliding_window": 70}
    options["response_mask"] = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(1)) < 0.6
    case = make_case((batch, 6, tokens, 24), 2, lse_given=lse_given, sharpness=3.0, **options)
    assert_close_to_reference(run(case), case)
    for per_sequence in (False, True):
        groups = torch.rand(len(options["prefix_lengths"]), 6) < 0.5 if per_sequence else torch.arange(6) < 2
        assert_groups_close(run_groups(case, groups, ~groups), case, groups, ~groups)


@pytest.mark.parametrize("kind", ["batch", "packed", "packed, long"])
@pytest.mark.parametrize("size", [1, 24, 64, 96, 128, 192, 256])
def test_a_row_that_sees_few_keys_has_their_weights_as_exactly_as_eager(size, kind):
    """However large the products are: scores of another product would be rounded otherwise than the log-sum-exp."""
    for seed, sliding_window in enumerate((1, 1, 1, 2, 2, 3)):
        options = {"prefix_lengths": torch.tensor([9, 21])}
        if kind != "batch":
            options["cu_seqlens"] = torch.tensor([0, 12, 40 if kind == "packed" else 200])
        shape = (2, 6, 40, size) if kind == "batch" else (1, 6, int(options["cu_seqlens"][-1]), size)
        options |= {"scale": 1.0, "sliding_window": sliding_window, "window": 1, "more": MORE, "first_keys": 20}
        case = make_case(shape, 2, seed=100 * size + seed, dtype=(torch.float32, torch.float16)[seed % 2], **options)
        assert_close_to_reference(run(case), case)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "name, large, whole",
    [
        *(("sliding_window", size, 40) for size in HUGE),
        *(("horizon", (1, size), (1, 40)) for size in HUGE),
        *(("horizon", (size, None), (40, None)) for size in HUGE),
        *(("first_keys", size, 40) for size in HUGE),
        ("prefix_lengths", torch.tensor([2**63 - 1, 2**31 + 5]), torch.tensor([40, 40])),
        ("prefix_lengths", torch.tensor([2**31 - 1, 3], dtype=torch.int32), torch.tensor([40, 3])),
    ],
)
def test_a_size_above_that_of_the_sequence_is_the_whole_sequence(name, large, whole, backend):
    options = {"more": ("first_mass", "prefix_mass"), "prefix_lengths": LENGTHS, "backend": backend}
    options |= {"cu_seqlens": torch.tensor([0, 15, 40]), "response_mask": torch.arange(40)[None] % 3 > 0}
    generator = torch.Generator().manual_seed(1)
    q, k = (triton_calls.on_device(torch.randn(1, heads, 40, 16, generator=generator)) for heads in (4, 2))
    got, want = (
        attention_stats(q, k, **{key: triton_calls.on_device(x) for key, x in (options | {name: size}).items()})
        for size in (large, whole)
    )
    for x, y in zip((*got[:4], *got.more.values()), (*want[:4], *want.more.values()), strict=True):
        assert x.isfinite().all() and torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_prefix_of_any_length_does_not_overflow_behind_other_sequences(dtype):
    case = make_case((1, 4, 400, 16), 2, cu_seqlens=torch.tensor([0, 150, 400]), more=("prefix_mass",))
    got, want = (
        attention_stats(case.q, case.k, **case.kwargs, prefix_lengths=torch.tensor([3, most], dtype=dtype))
        for most in (torch.iinfo(dtype).max, 250)
    )
    assert torch.equal(got.more["prefix_mass"], want.more["prefix_mass"])
    torch.testing.assert_close(got.more["prefix_mass"][..., 150:], torch.ones(1, 4, 250))


@pytest.mark.parametrize(
    "kind, lse_given",
    [("weight of 0", False), ("weight of 0", True), ("infinity", False), ("infinity", True), ("lse of NaN", True)],
)
def test_backends_agree_where_a_number_is_not_finite(kind, lse_given):
    """In tiles that are masked and in those that are not: the rows behind the first tile see whole ones."""
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, heads, 150, 16, generator=generator) for heads in (2, 1))
    q[..., 0] = q[..., 0].abs()
    with_lse = {"lse": attention_stats(q, k).lse} if lse_given else {}
    if kind == "lse of NaN":
        with_lse["lse"][0, 0, 90] = torch.nan
    else:
        k[0, 0, 3] = 0.0
        k[0, 0, 3, 0] = -torch.inf if kind == "weight of 0" else torch.inf
    got = [
        attention_stats(*map(triton_calls.on_device, (q, k)), backend=backend, more=NEED_EVERY_KEY, **with_lse).more
        for backend in ("torch", "triton")
    ]
    if kind == "weight of 0":
        assert got[0]["row_entropy"].isfinite().all()
    for name in NEED_EVERY_KEY:
        torch.testing.assert_close(got[1][name], got[0][name], rtol=1e-5, atol=1e-5, equal_nan=True)


def test_names_come_in_one_order_and_once():
    stats = attention_stats(Q, K, more=["column_sum", "self_mass", "row_entropy", "self_mass"])
    assert list(stats.more) == ["row_entropy", "self_mass", "column_sum"]
    assert attention_stats(Q, K).more == group_stats(Q, K, HEADS, HEADS).more == {}


@pytest.mark.parametrize("call", ["statistics", "statistics, lse given", "attention"])
def test_asking_for_more_changes_no_bit_of_the_others(call):
    """The row pass runs in place of the band with a given lse and entropies, and rounds elsewhere."""
    names = LINEAR if "given" in call else MORE
    options = {"cu_seqlens": torch.tensor([0, 30, 90]), "sinks": torch.zeros(4)}
    case = make_case((1, 4, 90, 16), 2, lse_given="given" in call, need_span=False, **options)
    more = {"more": names, "prefix_lengths": torch.tensor([4, 70])}

    def values(**more):
        if call == "attention":
            out, stats = attention(case.q, case.k, case.k, **case.options("lse"), **more)
            return {"out": out} | named(stats)
        return named(attention_stats(case.q, case.k, **case.kwargs, **more))

    plain, with_more = values(), values(**more)
    assert all(torch.equal(x, with_more[name]) for name, x in plain.items())
    assert set(with_more) - set(plain) == set(names)


def test_a_window_that_holds_the_rows_of_h2o_and_snapkv():
    """Column sums are those of the dense map: over all rows (H2O), over the last rows (SnapKV)."""
    weights, _ = reference.attention_map(Q, K, reference.segment_ids(2, 8))
    h2o = attention_stats(Q, K, horizon=(0, None), more=["column_sum"]).more["column_sum"]
    torch.testing.assert_close(h2o.double(), weights.sum(-2), rtol=1e-5, atol=1e-6)
    last = torch.arange(8).expand(2, -1) >= 5
    snap = attention_stats(Q, K, horizon=(0, None), response_mask=last, more=["column_sum"]).more["column_sum"]
    torch.testing.assert_close(snap.double(), weights[:, :, 5:].sum(-2), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("open_to_modes")
def test_what_is_not_asked_for_is_not_computed(monkeypatch):
    """A mass reads its own keys alone; one of a group its own heads; a column sum and a self mass no product."""
    monkeypatch.setattr(api, "probe_lse", lambda *args: None)  # it computes a few rows of every head

    def cost(more=(), heads=None, **options):
        case = make_case((1, 8, 512, 16), 2, lse_given=True, need_span=False, more=more, **options)
        with FlopCounterMode(display=False) as counter:
            run(case) if heads is None else run_groups(case, torch.arange(8) < heads, torch.arange(8) < 0)
        return counter.get_total_flops()

    band = cost()
    first, whole = cost(["first_mass"]) - band, cost(NEED_EVERY_KEY) - band
    assert 0 < first == 2 * 8 * 512 * 4 * 16 < whole / 4
    assert cost(["prefix_mass"], prefix_lengths=torch.tensor([8])) - band == 2 * first
    assert cost(["self_mass", "column_sum"]) == band
    assert cost(["first_mass"], heads=2) - cost(heads=2) == first // 4
    assert cost(["first_mass"], sliding_window=61) - cost(sliding_window=61) == first // 8  # 64 rows see them


@pytest.mark.parametrize("name", MORE)
@pytest.mark.usefixtures("open_to_modes")
def test_memory_is_linear_in_the_tokens(name, monkeypatch):
    monkeypatch.setattr(blockwise_masses, "MASS_BYTES", 1 << 18)
    largest = {}
    for tokens in (1024, 2048):
        options = {"prefix_lengths": torch.tensor([tokens // 2])} if name == "prefix_mass" else {}
        case = make_case((1, 4, tokens, 16), 2, lse_given=True, need_span=False, more=[name], **options)
        with LargestTensor() as mode:
            run(case)
        largest[tokens] = mode.numel
    assert largest[2048] <= 2 * largest[1024] and largest[2048] <= 4 * 2048 * ROW_TILE


@pytest.mark.parametrize("lse_given", [False, True])
@pytest.mark.parametrize("kind", ["packed", "batch"])
def test_a_nan_stays_in_its_sequence(kind, lse_given):
    options = {"horizon": (1, 20)} | ({"cu_seqlens": torch.tensor([0, 30, 60, 90])} if kind == "packed" else {})
    case = make_case((1, 4, 90, 8) if kind == "packed" else (3, 4, 30, 8), 2, lse_given=lse_given, more=MORE,
                     prefix_lengths=torch.tensor([9, 9, 9]), **options)  # fmt: skip

    def results():
        return {name: x.transpose(1, 2).reshape(3, 30, 4) for name, x in run(case).more.items()}

    clean = results()
    (case.q[0, :, 37] if kind == "packed" else case.q[1, :, 7]).fill_(torch.nan)
    if lse_given:
        (case.kwargs["lse"][0, :, 37] if kind == "packed" else case.kwargs["lse"][1, :, 7]).fill_(torch.nan)
    for name, x in results().items():
        assert torch.equal(x[[0, 2]], clean[name][[0, 2]]), name
        assert x[1].isnan().any() and clean[name].isfinite().all(), name


def test_a_factor_marks_them_too():
    """On a GPU, which is not waited for, wrong statistics become NaN."""
    stats = [attention_stats(Q, K, more=LINEAR[2:]), attention_stats(Q, K, need_span=False)]
    one, marked = scaled(stats, torch.tensor(1.0)), scaled(stats, torch.tensor(torch.nan))
    for before, same, broken in zip(stats, one, marked, strict=True):
        assert list(same.more) == list(before.more) == list(broken.more)
        assert all(torch.equal(x, named(before)[name]) for name, x in named(same).items())
        assert all(x.isnan().all() for x in named(broken).values())
        assert (same.span is None) == (before.span is None)


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"more": "row_entropy"}, TypeError, "more must be a collection of names, got str: 'row_entropy'"),
        ({"more": None}, TypeError, "more must be a collection of names, got NoneType"),
        ({"more": ["entropy"]}, ValueError, "more must hold names among row_entropy, .*, column_sum, got 'entropy'"),
        ({"more": ["first_mass"], "first_keys": 0}, ValueError, "first_keys must be at least 1, got 0"),
        ({"first_keys": 1.0}, TypeError, "first_keys must be an int, got float: 1.0"),
        ({"more": ["prefix_mass"]}, ValueError, 'prefix_lengths, int .S., and "prefix_mass" .* each other, got None'),
        ({"prefix_lengths": LENGTHS}, ValueError, r"need each other, got shape \[2\] and more=\(\)"),
        ({"more": MORE, "prefix_lengths": [3, 5]}, TypeError, "prefix_lengths must be a tensor, got list"),
        ({"more": MORE, "prefix_lengths": LENGTHS.float()}, TypeError, "prefix_lengths must be torch.int32 or"),
        ({"more": MORE, "prefix_lengths": LENGTHS[:1]}, ValueError, r"prefix_lengths must have shape \[2\], got \[1\]"),
        ({"more": MORE, "prefix_lengths": -LENGTHS}, ValueError, "prefix_lengths must be at least 0, got -5"),
    ],
)
def test_bad_input(options, error, text):
    with pytest.raises(error, match=text):
        attention_stats(Q, K, **options)
    with pytest.raises(error, match=text):
        attention(Q, K, K, **options)
    if "more" not in options or options["more"] is not MORE:
        with pytest.raises(error, match=text.replace("row_entropy, .*", ".*")):
            group_stats(Q, K, HEADS, HEADS, **options)
        with pytest.raises(error, match=text):
            collect(llama(), **options)


@pytest.mark.parametrize("name", NEED_EVERY_KEY)
def test_groups_refuse_what_has_no_sum(name):
    text = f"more must hold names among first_mass, .*, column_sum where head groups are given, got '{name}': it is not"
    with pytest.raises(ValueError, match=text):
        group_stats(Q, K, HEADS, HEADS, more=[name])
    model = llama()
    heads = torch.ones(len(collect(model).layers), model.config.num_attention_heads, dtype=torch.bool)
    with pytest.raises(ValueError, match=text):
        collect(model, more=[name], groups=HeadGroups(heads, ~heads))


@pytest.mark.parametrize("make", [llama, qwen3], ids=["llama", "qwen3 with a window"])
@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_collect_gives_those_of_the_models_own_maps(make, kind):
    """`collect` has them of each head, and summed over the groups where they are known."""
    torch.manual_seed(1)
    model, ids = make(), torch.randint(0, 61, (2, 40))
    lengths = torch.tensor([17, 5])
    if kind == "padded":
        real = torch.arange(40) >= torch.tensor([[0], [13]])
        inputs, segments = {"input_ids": ids, "attention_mask": real.long()}, reference.segment_ids(2, 40, real)
    else:
        position = torch.cat([torch.arange(25), torch.arange(15)])[None]
        inputs = {"input_ids": ids[:1], "position_ids": position}
        segments = reference.segment_ids(1, 40, cu_seqlens=torch.tensor([0, 25, 40]))
    inputs["use_cache"] = False
    maps = eager_maps(model, **inputs)
    response = (segments >= 0) & (torch.rand(segments.shape) < 0.7)
    options = {"response_mask": response, "more": MORE, "prefix_lengths": lengths, "first_keys": 3, "horizon": (2, 30)}
    with torch.no_grad(), collect(model, **options) as c:
        model(**inputs)
    options |= {"more": LINEAR, "groups": c.rhythm().groups}
    with torch.no_grad(), collect(model, **options) as grouped:
        model(**inputs)
    for index, layer in enumerate(c.layers):
        exact = exact_more(maps[layer], response, segments, lengths)
        exact["largest_score"] = torch.where(response[:, None], c.stats[layer].lse + maps[layer].amax(-1).log(), 0.0)
        assert list(c.stats[layer].more) == list(MORE)
        for name, x in c.stats[layer].more.items():
            torch.testing.assert_close(x.double(), exact[name].double(), rtol=3e-5, atol=3e-5, msg=name)
        groups = (group[:, index] for group in c.rhythm().groups)
        linear = {name: exact[name] for name in LINEAR}
        sums = reference.group_sums(exact["self_mass"], exact["self_mass"], *groups, segments, linear)
        assert isinstance(grouped.stats[layer], GroupStats) and list(grouped.stats[layer].more) == list(LINEAR)
        for name, x in grouped.stats[layer].more.items():
            torch.testing.assert_close(x.double(), sums.more[name].double(), rtol=3e-5, atol=3e-5, msg=name)


def exact_more(weights, rows, segments, lengths) -> dict[str, torch.Tensor]:
    """Returns the statistics of a map by their names, without the largest score."""
    weights = weights.double()
    return {
        "row_entropy": reference.row_entropy(weights, rows),
        "first_mass": reference.prefix_mass(weights, rows, segments, torch.tensor([3, 3])),
        "prefix_mass": reference.prefix_mass(weights, rows, segments, lengths),
        "self_mass": reference.self_mass(weights, rows),
        "column_sum": reference.column_sum(weights, rows, segments, (2, 30)),
    }


def test_collect_names_a_wrong_number_of_prefixes():
    model = llama()
    c = collect(model, more=["prefix_mass"], prefix_lengths=LENGTHS)
    with torch.no_grad(), c, pytest.raises(ValueError, match=r"prefix_lengths must have shape \[1\], got \[2\]"):
        model(torch.zeros(1, 9, dtype=torch.long))


@pytest.mark.slow
@pytest.mark.parametrize("lse_given", [False, True])
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(lse_given):
    """In the Triton kernels: packed between two others, padded on the left and on the right, and in a group."""
    begin, end = 21, 70
    options = {"more": MORE, "sinks": torch.arange(4.0), "sliding_window": 40, "horizon": (0, None)}
    packed = {"cu_seqlens": torch.tensor([0, begin, end, 100]), "prefix_lengths": torch.tensor([1, 17, 9])}
    case = make_case((1, 4, 100, 32), 2, lse_given=lse_given, **options, **packed)
    alone = StatsCase(*(x[:, :, begin:end] for x in case[:2]), {**options, "prefix_lengths": torch.tensor([17])})
    padded = StatsCase(*case[:2], {**options, "prefix_lengths": torch.tensor([17])})
    padded.kwargs["attention_mask"] = (torch.arange(100) >= begin)[None] & (torch.arange(100) < end)
    if lse_given:
        padded.kwargs["lse"] = case.kwargs["lse"]
        alone.kwargs["lse"] = case.kwargs["lse"][:, :, begin:end]
    local = torch.tensor([True, False, True, True])
    for run_one in (triton_calls.run, lambda case: triton_calls.run_groups(case, local, ~local)):
        expected = run_one(alone).more
        assert list(expected) == list(MORE if run_one is triton_calls.run else LINEAR)
        for batch in (case, padded):
            for name, x in run_one(batch).more.items():
                assert torch.equal(x[..., begin:end], expected[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_the_host_does_not_wait_for_a_gpu(where):
    q, k, heads = Q.cuda(), K.cuda(), HEADS.cuda()
    options = {"more": MORE, "prefix_lengths": LENGTHS.to(where)}
    expected = attention_stats(Q, K, **options | {"prefix_lengths": LENGTHS})
    torch.cuda.set_sync_debug_mode("error")
    try:
        stats = attention_stats(q, k, **options)
        sums = group_stats(q, k, heads, heads, **options | {"more": LINEAR})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in MORE:
        torch.testing.assert_close(stats.more[name].cpu(), expected.more[name], rtol=1e-5, atol=1e-5)
    for name in LINEAR:
        torch.testing.assert_close(sums.more[name].cpu(), expected.more[name].sum(1), rtol=1e-5, atol=1e-5)
