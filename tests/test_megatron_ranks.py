"""`integrations.megatron.collect` where ranks share a GPTModel: tensor, sequence, context and pipeline parallelism.

Each head's statistics keep the bits that one rank computes from the same queries and keys; means are held to rounding.
"""

import pytest
import torch
import torch.distributed as dist
from megatron_cases import HEADS, FusedCore, Watched, fill_stage, gpt, megatron_groups, places, positions
from ranks import Raised, on_ranks, preload

from rhythm_kernels import HeadGroups, Rhythm, attention_stats, group_heads
from rhythm_kernels.integrations import megatron
from rhythm_kernels.signals import rhythm_of
from rhythm_kernels.statistics.layout import make_layout

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
pytestmark = pytest.mark.xdist_group("ranks")
preload("megatron_cases", "megatron.core.models.gpt")
TOKENS = 96
CUTS = [0, 32, 40, 96]


def batch(packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns token ids [B, T] and R."""
    torch.manual_seed(2)
    shape = (1 if packed else 2, TOKENS)
    return torch.randint(0, 61, shape), torch.rand(shape) < 0.7


def bounds(packed: bool):
    from megatron.core.packed_seq_params import PackedSeqParams

    cuts = torch.tensor(CUTS, dtype=torch.int32)
    return PackedSeqParams("thd", cuts, cuts, max_seqlen_q=56, max_seqlen_kv=56) if packed else None


def known_groups(layers: int = 3) -> HeadGroups:
    torch.manual_seed(3)
    return group_heads(torch.rand(layers, HEADS))


def gathered(x: torch.Tensor, group, dim: int) -> list[torch.Tensor]:
    parts: list = [None] * group.size()
    dist.all_gather_object(parts, x, group)
    return parts


def forward(packed=False, grouped=False, made=None, sizes=None, layers=5, whole_mask=False):
    """Runs a forward on this rank, compares its heads, and returns (Rhythm of all, logits of the whole row)."""
    sizes = sizes or {}
    with megatron_groups(**sizes):
        from megatron.core import parallel_state

        stage, stages = parallel_state.get_pipeline_model_parallel_rank(), sizes.get("pipeline_model_parallel_size", 1)
        tp, cp = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_context_parallel_group()
        model = gpt(stages=(stage == 0, stage == stages - 1), **(made or {}))
        if stages > 1:
            fill_stage(model, gpt(pipeline_model_parallel_size=1, **(made or {})))
        watched = Watched(model)
        ids, response = batch(packed)
        own = places(CUTS if packed else [0, TOKENS], cp.size())[cp.rank()]
        groups = known_groups() if grouped else None
        mask = response if whole_mask else response[:, own]
        arguments = {"layers": layers, "response_mask": mask, "groups": groups, "lse": "own"}
        with torch.no_grad(), megatron.collect(model, **arguments) as c:
            if stage > 0:
                received = torch.empty(TOKENS // (tp.size() if model.config.sequence_parallel else 1), len(ids), 64)
                dist.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
                model.set_input_tensor(received)
            out = model(
                ids[:, own] if stage == 0 else None,
                positions(ids)[:, own] if stage == 0 else None,
                None,
                packed_seq_params=bounds(packed),
            )
            if stage < stages - 1:
                dist.send(out, parallel_state.get_pipeline_model_parallel_next_rank())
        rhythm = c.rhythm()
        c.check()
        if cp.size() > 1:
            assert torch.equal(c.own_tokens, own)
        check_heads(c, watched, response, packed, groups, tp, cp)
        if stage == stages - 1:
            out = torch.cat(gathered(out, tp, -1), -1)
            out = torch.cat(gathered(out, cp, 1), 1)[
                :, torch.cat(places(CUTS if packed else [0, TOKENS], cp.size())).argsort()
            ]
        return (rhythm.waad, rhythm.fai, rhythm.spans, *rhythm.groups), (out if stage == stages - 1 else None)


def check_heads(c, watched, response, packed, groups, tp, cp) -> None:
    """Holds this rank's statistics against those of the same layer's queries and keys of all heads and tokens."""
    cuts = torch.tensor(CUTS, dtype=torch.int32) if packed else None
    back = torch.cat(places(CUTS if packed else [0, TOKENS], cp.size())).argsort()
    size = HEADS // tp.size() // cp.size()
    first = tp.rank() * (HEADS // tp.size()) + cp.rank() * size
    for layer, stats in c.stats.items():
        q, k = (torch.cat(gathered(x, cp, 2), 2)[:, :, back] for x in watched.inputs[layer])
        heads = HEADS // tp.size() // k.shape[1]
        q, k = (torch.cat(gathered(x, tp, 1), 1) for x in (q, k.repeat_interleave(heads, 1)))
        whole = attention_stats(q, k, response_mask=response, cu_seqlens=cuts, lse=None)
        if groups is None:
            own = slice(first, first + size)
            for name in ("waad", "fai"):
                assert torch.equal(getattr(stats, name), getattr(whole, name)[:, own]), (layer, name)
            assert torch.equal(stats.span, whole.span[:, own])
        else:
            local, far = (group[c.layers.index(layer)] for group in groups)
            torch.testing.assert_close(stats.waad, whole.waad[:, local].sum(1), rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(stats.fai, whole.fai[:, far].sum(1), rtol=2e-6, atol=2e-6)


_alone: dict[str, list] = {}


def check(size: int, **arguments) -> None:
    """Runs `forward` on ranks, and compares rhythm and logits of all of them with those of one rank."""
    alone_arguments = arguments | {"sizes": {}, "made": {**(arguments.get("made") or {}), "sequence_parallel": False}}
    key = repr(sorted(alone_arguments.items()))
    if key not in _alone:
        [_alone[key]] = on_ranks(1, forward_by_name, alone_arguments)
    returned = on_ranks(size, forward_by_name, arguments)
    for rank in (_alone[key], *returned):
        assert not isinstance(rank, Raised), rank.args[2]
    (waad, fai, spans, *groups), logits = _alone[key]
    for (got_waad, got_fai, got_spans, *got_groups), got_logits in returned:
        torch.testing.assert_close(got_waad, waad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got_fai, fai, rtol=1e-5, atol=1e-6)
        assert all(map(torch.equal, got_groups, groups))
        if spans is not None:
            torch.testing.assert_close(got_spans, spans, rtol=1e-5, atol=1e-5)
        if got_logits is not None:
            torch.testing.assert_close(got_logits, logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(got_waad, returned[0][0][0])  # the same bits on every rank
        assert torch.equal(got_fai, returned[0][0][1])


def forward_by_name(arguments: dict):
    return forward(**arguments)


@pytest.mark.parametrize("grouped", [False, True], ids=["own groups", "known groups"])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tokens on all", "sequence parallel"])
@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallelism(size, sequence_parallel, grouped):
    made = {"sequence_parallel": sequence_parallel}
    check(size, sizes={"tensor_model_parallel_size": size}, made=made, grouped=grouped)


def test_key_heads_fewer_than_ranks():
    check(4, sizes={"tensor_model_parallel_size": 4}, made={"num_query_groups": 2})


@pytest.mark.parametrize("grouped", [False, True], ids=["own groups", "known groups"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("whole_mask", [False, True], ids=["own mask", "whole mask"])
def test_context_parallelism(packed, grouped, whole_mask):
    made = {"core": FusedCore}
    check(2, sizes={"context_parallel_size": 2}, made=made, packed=packed, grouped=grouped, whole_mask=whole_mask)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_tensor_and_context_parallelism(packed):
    sizes = {"tensor_model_parallel_size": 2, "context_parallel_size": 2}
    check(4, sizes=sizes, made={"core": FusedCore, "sequence_parallel": True}, packed=packed)


@pytest.mark.parametrize("grouped", [False, True], ids=["own groups", "known groups"])
@pytest.mark.parametrize("layers", [5, [0, 1, 2]], ids=["on both stages", "on the first stage"])
@pytest.mark.parametrize("tp", [1, 2])
def test_pipeline_parallelism(tp, layers, grouped):
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": 2}
    made = {"sequence_parallel": tp > 1}
    check(2 * tp, sizes=sizes, made=made, layers=layers, grouped=grouped)
