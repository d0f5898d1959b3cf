"""Statistics of a model whose heads or tokens lie on several ranks, against those of one rank."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import Raised, on_ranks
from sharded import TOKENS, Row, build, sharded_model, split_over_heads, watch_inputs
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rhythm_kernels import HeadGroups, Parallel, collect, group_heads
from rhythm_kernels.listen import collector
from rhythm_kernels.listen.shards import head_shares, places_of
from rhythm_kernels.ranks import Ranks
from rhythm_kernels.statistics.api import run_stats
from rhythm_kernels.statistics.layout import make_layout

pytestmark = pytest.mark.xdist_group("ranks")
PACKED = [0, 32, 40, 96]

# ---- one comparison, which runs on every rank ------------------------------------------------------------------------


def options_of(grouped: bool) -> dict:
    more = ("first_mass", "self_mass", "column_sum", *(() if grouped else ("row_entropy", "largest_score")))
    return {"window": 5, "horizon": (3, 20), "more": more}


def groups_of(model) -> HeadGroups:
    torch.manual_seed(3)
    return group_heads(torch.rand(len(collect(model, parallel=None).layers), model.config.num_attention_heads))


def from_all(x) -> list:
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x)
    return parts


def stats_of_all_heads(given, layout, keys, ranks):
    """Returns the statistics that one rank computes from the inputs of all heads.

    Args:
        given: q, k, the log-sum-exp and the options of this rank's heads; None if it has none.
        keys: the number of key heads.
        ranks: in the order of their heads.
    """
    parts = from_all(given)
    q, k, lse, options = zip(*(parts[rank] for rank in ranks if parts[rank] is not None))
    k = torch.cat([own.repeat_interleave(x.shape[1] // own.shape[1], 1) for x, own in zip(q, k)], 1)
    sinks = None if options[0].sinks is None else torch.cat([own.sinks for own in options])
    lse = None if lse[0] is None else torch.cat(lse, 1)
    return run_stats(torch.cat(q, 1), k[:, :: k.shape[1] // keys], lse, layout, options[0]._replace(sinks=sinks))


def compare(c, row, seen, whole_model, options, groups=None, ranks=None):
    """Holds this rank's statistics against those of one rank, and returns the means over the heads.

    Those of a head have the bits that one rank computes from the q and k of all heads. All of them, and the means, are
    close to those of a whole model.

    Args:
        seen: q, k, the log-sum-exp and the options of the statistics, layer by layer; empty if this rank has no head.
        ranks: in the order of their heads.
    """
    ranks = ranks or list(range(dist.get_world_size()))
    bounds = None if row.cuts is None else torch.tensor(row.cuts, dtype=torch.int32)
    layout = make_layout(len(row.ids), TOKENS, torch.device("cpu"), row.response, row.mask, bounds)
    counts = from_all(seen[0][0].shape[1] if seen else 0)
    begin = sum(counts[rank] for rank in ranks[: ranks.index(dist.get_rank())])
    own = slice(begin, begin + counts[dist.get_rank()])
    with torch.no_grad(), collect(whole_model, response_mask=row.response, groups=groups, **options) as one:
        whole_model(row.ids, attention_mask=row.mask, position_ids=row.positions, use_cache=False)
    keys = whole_model.config.num_key_value_heads
    rhythm, expected = c.rhythm(), one.rhythm()
    assert all(map(torch.equal, rhythm.groups, expected.groups))
    torch.testing.assert_close(rhythm.waad, expected.waad, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(rhythm.fai, expected.fai, rtol=2e-5, atol=1e-7)
    for place, layer in enumerate(c.layers):
        stats, close = c.stats[layer], one.stats[layer]
        assert set(stats.more) == set(options["more"])
        if groups is not None:
            pairs = zip([*stats[:2], *stats.more.values()], [*close[:2], *close.more.values()], strict=True)
            for got, wanted in pairs:
                torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)
            continue
        exact = stats_of_all_heads(seen[place] if seen else None, layout, keys, ranks)
        got, same, near = (flat(x) for x in (stats, exact, close))
        for name, value in got.items():
            assert torch.equal(value, same[name][:, own]), (layer, name)
            torch.testing.assert_close(value, near[name][:, own], rtol=2e-5, atol=2e-5)
    return rhythm.waad, rhythm.fai


def flat(stats) -> dict:
    return stats._asdict() | stats.more | {"more": torch.zeros(1, 0)}


def check(returned: list) -> None:
    """Raises unless all ranks have returned the same bits."""
    for rank in returned:
        assert not isinstance(rank, Raised), rank.args[2]
    for other in returned[1:]:
        assert all(map(torch.equal, returned[0], other))


# ---- tokens on ranks -------------------------------------------------------------------------------------------------


def tokens_of_a_row(row: tuple, model: tuple, whole_mask: bool, grouped: bool):
    name, sizes = model
    row = Row(*row)
    model, options, seen = sharded_model(row, name, **sizes), options_of(grouped), watch_inputs()
    groups = groups_of(model) if grouped else None
    # a zigzag in each sequence is none of the row, so its bounds must be known
    known = {"cu_seqlens": torch.tensor(row.cuts)} if row.by_sequence else {}
    parallel = Parallel(tokens=dist.group.WORLD, order="zigzag" if row.by_sequence else "auto")
    mask = row.response if whole_mask else row.part(row.response)
    with torch.no_grad(), collect(model, response_mask=mask, parallel=parallel, groups=groups, **known, **options) as c:
        model(row.part(row.ids), attention_mask=row.part(row.mask), position_ids=row.part(row.positions))
    assert torch.equal(c.own_tokens, row.own)
    return compare(c, row, list(seen), build(name, **sizes), options, groups)


LLAMA = ("llama", {})


@pytest.mark.parametrize("grouped", [False, True], ids=["own groups", "known groups"])
@pytest.mark.parametrize(
    "row",
    [
        ("contiguous", None),
        ("zigzag", None),
        ("contiguous", PACKED),
        ("zigzag", PACKED),
        ("zigzag", PACKED, None, True),
        ("contiguous", PACKED, [50, 46]),
    ],
    ids=["padded", "padded zigzag", "packed", "packed zigzag", "zigzag in each sequence", "unequal shards"],
)
def test_tokens_on_two_ranks(row, grouped):
    check(on_ranks(2, tokens_of_a_row, row, LLAMA, False, grouped))


@pytest.mark.parametrize("grouped", [False, True], ids=["own groups", "known groups"])
@pytest.mark.parametrize(("heads", "keys"), [(8, 2), (6, 2), (3, 3), (6, 1)])
def test_heads_that_four_ranks_do_not_divide(heads, keys, grouped):
    sizes = {"num_attention_heads": heads, "num_key_value_heads": keys}
    check(on_ranks(4, tokens_of_a_row, ("zigzag", None), ("llama", sizes), True, grouped))


@pytest.mark.parametrize(
    ("name", "row"),
    [
        *((name, ("zigzag", None)) for name in ("qwen3", "GptOss", "DeepseekV3", "Gemma2", "Cohere2")),
        *((name, ("contiguous", PACKED)) for name in ("qwen3", "DeepseekV3", "Gemma2")),
    ],
    ids=lambda x: x if isinstance(x, str) else "packed" if x[1] else "padded",
)
def test_tokens_of_architectures(name, row):
    """Sliding windows, sinks, soft-capped scores, and values of another size than keys."""
    check(on_ranks(2, tokens_of_a_row, row, (name, {}), False, False))


# ---- heads on ranks --------------------------------------------------------------------------------------------------


def heads_of_a_model(packed: bool, grouped: bool):
    row = Row(cuts=PACKED if packed else None, group=dist.new_subgroups(1)[0])
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4}
    model = build("llama", **sizes)
    model.set_attn_implementation("sdpa")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ranks",))
    split_over_heads(model, mesh)
    options, groups, seen = options_of(grouped), groups_of(model) if grouped else None, watch_inputs()
    with (
        torch.no_grad(),
        collect(model, response_mask=row.response, parallel=Parallel(heads=mesh), groups=groups, **options) as c,
    ):
        model(row.ids, attention_mask=row.mask, position_ids=row.positions, use_cache=False)
    assert torch.equal(c.own_tokens, torch.arange(row.ids.shape[1]))
    return compare(c, row, list(seen), build("llama", **sizes), options, groups)


@pytest.mark.parametrize("grouped", [False, True], ids=["own groups", "known groups"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("size", [2, 4])
def test_heads_on_ranks(size, packed, grouped):
    check(on_ranks(size, heads_of_a_model, packed, grouped))


def tokens_and_heads():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    row, sizes = Row("zigzag", group=mesh["cp"].get_group()), {"num_attention_heads": 8, "num_key_value_heads": 4}
    model = sharded_model(row, "llama", **sizes)
    split_over_heads(model, mesh["tp"])
    options, seen = options_of(grouped=False), watch_inputs()
    with (
        torch.no_grad(),
        collect(model, response_mask=row.part(row.response), parallel=Parallel(mesh["tp"], mesh["cp"]), **options) as c,
    ):
        model(row.part(row.ids), attention_mask=row.part(row.mask), position_ids=row.part(row.positions))
    return compare(c, row, list(seen), build("llama", **sizes), options, ranks=[0, 2, 1, 3])


def test_two_ranks_share_the_heads_of_two_others_by_tokens():
    check(on_ranks(4, tokens_and_heads))


def heads_of_a_sharded_model():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    row = Row(cuts=PACKED, group=dist.new_subgroups(1)[0])
    model, whole = build("llama"), build("llama")
    model.set_attn_implementation("sdpa")
    split_over_heads(model, mesh["tp"])
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh["dp"])
    options, seen = options_of(grouped=False), watch_inputs()
    with torch.no_grad(), collect(model, response_mask=row.response, **options) as c:
        model(row.ids, attention_mask=row.mask, position_ids=row.positions, use_cache=False)
    assert seen[0][0].shape[1] == model.config.num_attention_heads // 2
    return compare(c, row, list(seen), whole, options, ranks=mesh["tp"].mesh.tolist())


def test_heads_of_a_model_that_fsdp_shards_are_found():
    check(on_ranks(4, heads_of_a_sharded_model))


def gradients_of_ranks(collected: bool):
    """Returns the gradients of a tensor-parallel model whose layers are computed again in the backward."""
    model, mesh = build("llama"), init_device_mesh("cpu", (2,))
    model.set_attn_implementation("sdpa")
    split_over_heads(model, mesh)
    model.train()
    policy = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": policy})
    ids = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(2))
    with collect(model, parallel=Parallel(heads=mesh)) if collected else nullcontext() as c:
        model(ids, use_cache=False).logits.square().mean().backward()
    if collected:
        assert c.rhythm().waad.isfinite().all()
    return [
        weight.grad.full_tensor() if hasattr(weight.grad, "full_tensor") else weight.grad
        for weight in model.parameters()
    ]


def test_gradients_keep_their_bits():
    """The exchanges of the ranks are not repeated, nor kept, by what computes layers again."""
    plain, collected = (on_ranks(2, gradients_of_ranks, collected) for collected in (False, True))
    check(collected)
    assert all(map(torch.equal, plain[0], collected[0]))


def from_a_plan(folder: str, sharded: bool):
    """Loads a model by transformers' own plan of tensor parallelism, which `collect` finds by itself."""
    row = Row(group=dist.new_subgroups(1)[0])
    plan = DistributedConfig(tp_size=2, tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan, attn_implementation="eager")
    options, seen = options_of(grouped=False), watch_inputs()
    with torch.no_grad(), collect(model, response_mask=row.response, **options) as c:
        model(row.ids, attention_mask=row.mask, position_ids=row.positions)
    heads = model.config.num_attention_heads
    assert c.stats[c.layers[0]].waad.shape[1] == (heads // 2 if sharded else heads)
    whole = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    if not sharded:  # each rank has all heads, and is alone
        with torch.no_grad(), collect(whole, response_mask=row.response, **options) as one:
            whole(row.ids, attention_mask=row.mask, position_ids=row.positions)
        return c.rhythm().waad - one.rhythm().waad, c.rhythm().fai - one.rhythm().fai
    return compare(c, row, list(seen), whole, options)


@pytest.mark.parametrize(("name", "sharded"), [("llama", True), ("qwen3", True), ("GptOss", False)])
def test_the_plan_of_transformers_is_found(name, sharded, tmp_path):
    """The plan of gpt-oss leaves all heads on every rank."""
    build(name, vocab_size=64).save_pretrained(tmp_path)
    returned = on_ranks(2, from_a_plan, str(tmp_path), sharded)
    check(returned)
    if not sharded:
        assert all(x.abs().max() < 1e-5 for x in returned[0])


# ---- ranks that disagree or fail -------------------------------------------------------------------------------------


def one_is_wrong(what: str):
    """Rank 1 does something else than rank 0; returns what `collect` raises."""
    wrong = dist.get_rank() == 1
    row = Row(group=dist.new_subgroups(1)[0] if what in ("response_mask", "no heads") else None)
    model = sharded_model(row, "llama")
    options = {"parallel": Parallel(tokens=dist.group.WORLD), "response_mask": row.part(row.response)}
    inputs = {name: row.part(x) for name, x in (("input_ids", row.ids), ("position_ids", row.positions))}
    inputs["attention_mask"] = row.part(row.mask)
    if what == "argument" and wrong:
        options["response_mask"] = options["response_mask"].long()
    if what == "option" and wrong:
        options["window"] = 7
    if what == "rows" and wrong:
        inputs = {name: x[:1] for name, x in inputs.items()}
        options["response_mask"] = options["response_mask"][:1]
    if what == "positions" and wrong:
        del inputs["position_ids"]
    if what == "order":
        inputs["position_ids"] = inputs["position_ids"] + 5 * dist.get_rank()
    if what == "NaN":
        model.model.embed_tokens.weight.data.fill_(torch.nan)
    if what == "no rows":
        options["response_mask"] = torch.zeros_like(options["response_mask"])
    if what == "attention":
        whole = ALL_ATTENTION_FUNCTIONS["gathering"]

        def attend(*args, **kwargs):
            out, _ = whole(*args, **kwargs)
            return (out * 1.5 if wrong else out), None

        AttentionInterface.register("gathering", attend)
    if what == "no heads":  # all ranks have the whole model
        model.set_attn_implementation("sdpa")
        options["parallel"] = Parallel(heads=dist.group.WORLD)
    if what == "response_mask":
        model.set_attn_implementation("sdpa")
        split_over_heads(model, init_device_mesh("cpu", (2,)))
        options["parallel"] = Parallel(heads=dist.group.WORLD)
        if wrong:
            options["response_mask"] = options["response_mask"] & (torch.arange(TOKENS) > 20)
    if what == "statistics" and wrong:
        collector.run_stats = raise_an_error
    with torch.no_grad(), collect(model, **options) as c:
        model(**inputs, use_cache=False)
    return c.rhythm()


def raise_an_error(*_):
    raise MemoryError("no memory left")


WRONG = {
    "argument": ("TypeError", "response_mask must be torch.bool", ""),
    "option": ("Disagreement", "the ranks of parallel.tokens must agree, got options: ", "'window': 7"),
    "rows": ("Disagreement", "the batch's rows: 2, 1", ""),
    "positions": ("Disagreement", "position_ids: torch.int64 [2, 'T'], None", ""),
    "order": ("ValueError", "position_ids must show how the ranks of parallel.tokens share a row", "would follow"),
    "attention": ("ValueError", "layer 2 does not attend as collect assumes: the output of token", ""),
    "NaN": ("ValueError", "spans must not hold NaN, got ", ""),
    "no heads": ("ValueError", "the model's 6 query heads, got 12 heads on parallel.heads together", ""),
    "response_mask": ("Disagreement", "the ranks of parallel.heads must agree, got response_mask: ", ""),
    "statistics": ("MemoryError", "no memory left", ""),
}
BY_ONE = {"argument", "statistics"}
"""Only rank 1 raises its own error; the other is told."""


@pytest.mark.parametrize("what", WRONG)
def test_ranks_that_disagree_raise_one_error(what):
    kind, text, more = WRONG[what]
    returned = on_ranks(2, one_is_wrong, what)
    assert all(isinstance(rank, Raised) for rank in returned), returned
    assert returned[1].args[0] == kind
    for rank in returned:
        assert text in rank.args[1] and more in rank.args[1], rank.args[2]
    if what in BY_ONE:
        assert returned[0].args[0] == "Disagreement"
        assert returned[0].args[1].startswith(f"rank 1 of parallel.tokens: {kind}: "), returned[0].args[1]


def test_no_rows_have_no_rhythm():
    for rhythm in on_ranks(2, one_is_wrong, "no rows"):
        assert not isinstance(rhythm, Raised), rhythm.args[2]
        assert rhythm.waad.shape == (2, TOKENS) and not rhythm.waad.any() and not rhythm.fai.any()


def fails_in_the_model():
    """Rank 1 raises in its forward, which the model of tensor-parallel ranks does not tell the others."""
    model, mesh = build("llama"), init_device_mesh("cpu", (2,))
    split_over_heads(model, mesh)
    if dist.get_rank() == 1:
        model.model.layers[5].register_forward_pre_hook(raise_an_error)
    with torch.no_grad(), collect(model, parallel=Parallel(heads=mesh)):
        model(torch.randint(0, 61, (1, 20)))


def test_a_forward_that_fails_raises_its_own_error():
    other, own = on_ranks(2, fails_in_the_model)
    assert own.args[:2] == ("MemoryError", "no memory left")
    assert other.args[0] == "RuntimeError"  # gloo's: the connection is closed


@pytest.mark.parametrize(
    ("parallel", "error", "text"),
    [
        ("tp", TypeError, "parallel must be a rhythm_kernels.Parallel, got str: 'tp'"),
        (Parallel(), ValueError, "got neither"),
        (Parallel(heads=4, order="ring"), ValueError, "parallel.order must be one of"),
        (Parallel(heads=4), RuntimeError, "parallel.heads needs torch.distributed, which has not been initialized"),
    ],
)
def test_wrong_arguments(parallel, error, text):
    with pytest.raises(error, match=text.replace("(", r"\(")):
        collect(build("llama"), parallel=parallel)


def wrong_groups():
    texts = []
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    for group in (4, mesh):
        try:
            collect(build("llama"), parallel=Parallel(heads=group))
        except (TypeError, ValueError) as error:
            texts.append(str(error))
    return texts


def test_wrong_groups():
    for texts in on_ranks(2, wrong_groups):
        assert texts == [
            "parallel.heads must be a ProcessGroup or a DeviceMesh, got int",
            "parallel.heads must be a mesh of one dimension, got 2: pass one, as mesh['tp']",
        ]


# ---- what travels ----------------------------------------------------------------------------------------------------


def bytes_sent(grouped: bool):
    """Returns the bytes that this rank sends in a forward, beside the short messages in which ranks agree."""
    row = Row("contiguous", PACKED)
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4}
    model = sharded_model(row, "llama", **sizes)
    sent, gather = [], Ranks.numbers

    def numbers(ranks, *given):
        before = ranks.sent
        told = gather(ranks, *given)
        sent.append(ranks.sent - before)
        return told

    Ranks.numbers = numbers
    groups = groups_of(model) if grouped else None
    with torch.no_grad(), collect(model, parallel=Parallel(tokens=dist.group.WORLD), groups=groups) as c:
        model(row.part(row.ids), position_ids=row.part(row.positions))
    return c._shards.groups[0].sent - sum(sent), len(sent), len(c.layers)


@pytest.mark.parametrize("grouped", [False, True], ids=["own groups", "known groups"])
def test_what_travels(grouped):
    """Each sampled layer's q, k, v and output once, spans of all heads, and two sums for each token."""
    ranks, heads, keys, size, sequences = 2, 8, 4, 6, len(PACKED) - 1
    for sent, messages, layers in on_ranks(ranks, bytes_sent, grouped):
        swapped = layers * (TOKENS // ranks) * size * (2 * heads + 2 * keys) * 4 * (ranks - 1) // ranks
        positions = (TOKENS // ranks) * 8 * (ranks - 1)
        spans = 0 if grouped else sequences * layers * (heads // ranks) * 4 * (ranks - 1)
        sums = 2 * (layers if grouped else 1) * TOKENS * 4 * 2 * (ranks - 1) // ranks
        assert sent == swapped + positions + spans + sums
        # before the forward, of its arguments, sizes, extents and layout, and behind it; one for each sampled layer
        assert messages == 6 + layers


def test_orders_of_tokens():
    assert [x.tolist() for x in places_of("zigzag", [4, 4])] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert [x.tolist() for x in places_of("zigzag", [4, 4], [0, 4, 8])] == [[0, 3, 4, 7], [1, 2, 5, 6]]
    assert [x.tolist() for x in places_of("contiguous", [1, 3])] == [[0], [1, 2, 3]]
    with pytest.raises(ValueError, match="a zigzag gives every rank as many tokens, got 3, 5"):
        places_of("zigzag", [3, 5])
    with pytest.raises(ValueError, match="cuts into 4 runs of one length, got 6 tokens"):
        places_of("zigzag", [4, 4], [0, 6, 8])
    assert [list(x) for x in head_shares(7, 3)] == [[0, 1, 2], [3, 4], [5, 6]]
    assert [len(x) for x in head_shares(3, 4)] == [1, 1, 1, 0]
