"""`integrations.megatron.collect` where ranks share a GPTModel: tensor, sequence, context and pipeline parallelism.

Each head's statistics have the bits that one rank computes from the same queries and keys; means are held to rounding.
"""

import re
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron_cases import (
    HEADS,
    HIDDEN,
    FusedCore,
    Watched,
    cpu_for_cuda,
    fill_stage,
    gpt,
    megatron_groups,
    places,
    positions,
)
from ranks import Raised, on_ranks, preload

from rhythm_kernels import HeadGroups, attention_stats, group_heads, signals
from rhythm_kernels.integrations import megatron
from rhythm_kernels.listen import findings

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
pytestmark = pytest.mark.xdist_group("ranks")
preload("megatron_cases", "megatron.core.models.gpt")
TOKENS = 96
CUTS = [0, 32, 40, 96]
LENGTHS = [29, 8, 51]


class Case:
    """A batch, and this rank's part of it.

    Args:
        kind: "rows", "packed" or, with padding behind each packed sequence, "padded".
    """

    def __init__(self, kind: str):
        from megatron.core import parallel_state
        from megatron.core.packed_seq_params import PackedSeqParams

        self.tp = parallel_state.get_tensor_model_parallel_group()
        self.cp = parallel_state.get_context_parallel_group()
        self.stage = parallel_state.get_pipeline_model_parallel_rank()
        self.stages = parallel_state.get_pipeline_model_parallel_world_size()
        torch.manual_seed(2)
        shape = (2 if kind == "rows" else 1, TOKENS)
        self.ids, self.response = torch.randint(0, 61, shape), torch.rand(shape) < 0.7
        self.rows, self.params, self.cuts = self.response, None, None
        if kind != "rows":
            self.cuts = torch.tensor(CUTS, dtype=torch.int32)
            lengths = torch.tensor(LENGTHS) if kind == "padded" else self.cuts.diff()
            bounds = torch.cat([self.cuts[:1], lengths.cumsum(0).int()])
            padded = {"cu_seqlens_q_padded": self.cuts, "cu_seqlens_kv_padded": self.cuts} if kind == "padded" else {}
            self.params = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=56, max_seqlen_kv=56, **padded)
            real = torch.cat([torch.arange(room) < n for room, n in zip(self.cuts.diff(), lengths, strict=True)])
            self.rows = self.response & real
        self.order = places([0, TOKENS] if kind == "rows" else CUTS, self.cp.size())
        self.own = self.order[self.cp.rank()]

    def model(self, **made):
        model = gpt(stages=(self.stage == 0, self.stage == self.stages - 1), **made)
        if self.stages > 1:
            fill_stage(model, gpt(pipeline_model_parallel_size=1, **made))
        return model

    def forward(self, model) -> torch.Tensor:
        """Runs this rank's part of a forward, and hands hidden states on to the next stage."""
        from megatron.core import parallel_state

        ids, position_ids = self.ids[:, self.own], positions(self.ids)[:, self.own]
        if self.stage > 0:
            ids, position_ids = None, None
            tokens = len(self.own) // (self.tp.size() if model.config.sequence_parallel else 1)
            received = torch.empty(tokens, len(self.ids), HIDDEN)
            dist.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(received)
        out = model(ids, position_ids, None, packed_seq_params=self.params)
        if self.stage < self.stages - 1:
            dist.send(out, parallel_state.get_pipeline_model_parallel_next_rank())
        return out

    def whole(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Returns the tokens of all ranks in their order."""
        return torch.cat(gathered(x, self.cp), dim).index_select(dim, torch.cat(self.order).argsort())


def gathered(x: torch.Tensor, group) -> list[torch.Tensor]:
    parts: list = [None] * group.size()
    dist.all_gather_object(parts, x, group)
    return parts


def known_groups() -> HeadGroups:
    torch.manual_seed(3)
    return group_heads(torch.rand(3, HEADS))


def forward(kind="rows", grouped=False, made=None, sizes=None, layers=5, whole_mask=False):
    """Runs a forward and checks this rank's heads; returns what `rhythm()` has, and the logits of the whole row."""
    with megatron_groups(**(sizes or {})):
        case = Case(kind)
        model = case.model(**(made or {}))
        watched, groups = Watched(model), known_groups() if grouped else None
        mask = case.response if whole_mask else case.response[:, case.own]
        arguments = {"layers": layers, "response_mask": mask, "groups": groups, "lse": "own"}
        with torch.no_grad(), megatron.collect(model, **arguments) as c:
            out = case.forward(model)
        rhythm = c.rhythm()
        c.check()
        assert torch.equal(c.own_tokens, case.own)
        check_heads(c, case, watched, groups)
        logits = None
        if case.stage == case.stages - 1:
            logits = case.whole(torch.cat(gathered(out, case.tp), -1), 1)
        return (rhythm.waad, rhythm.fai, rhythm.spans, *rhythm.groups), logits


def check_heads(c, case: Case, watched: Watched, groups: HeadGroups | None) -> None:
    """Holds this rank's statistics against those of all heads and tokens of the same layer."""
    size = HEADS // case.tp.size() // case.cp.size()
    first = case.tp.rank() * (HEADS // case.tp.size()) + case.cp.rank() * size
    for layer, stats in c.stats.items():
        q, k = (case.whole(x, 2) for x in watched.inputs[layer])
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        q, k = (torch.cat(gathered(x, case.tp), 1) for x in (q, k))
        latent = getattr(c.decoder.decoder.layers[0].self_attention, "softmax_scale", None)
        whole = attention_stats(q, k, scale=latent, response_mask=case.rows, cu_seqlens=case.cuts)
        if groups is None:
            for name in ("waad", "fai", "span"):
                own = getattr(whole, name)[:, first : first + size]
                assert torch.equal(getattr(stats, name), own), (layer, name)
        else:
            local, far = (group[c.layers.index(layer)] for group in groups)
            torch.testing.assert_close(stats.waad, whole.waad[:, local].sum(1), rtol=5e-6, atol=5e-6)
            torch.testing.assert_close(stats.fai, whole.fai[:, far].sum(1), rtol=5e-6, atol=5e-6)


def forward_of(arguments: dict):
    return forward(**arguments)


alone: dict[str, list] = {}
"""Keeps what one rank returns, by the arguments."""


def check(size: int, **arguments) -> None:
    """Runs `forward` on ranks, and compares rhythm and logits of all of them with those of one rank."""
    made = {**arguments.get("made", {}), "sequence_parallel": False}
    one = {**arguments, "sizes": {}, "made": made, "whole_mask": False}
    if repr(one) not in alone:
        alone[repr(one)] = on_ranks(1, forward_of, one)
    returned = on_ranks(size, forward_of, arguments)
    for rank in (*alone[repr(one)], *returned):
        assert not isinstance(rank, Raised), rank.args[2]
    [((waad, fai, spans, *groups), logits)] = alone[repr(one)]
    for (rank_waad, rank_fai, rank_spans, *rank_groups), rank_logits in returned:
        torch.testing.assert_close(rank_waad, waad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rank_fai, fai, rtol=1e-5, atol=1e-6)
        assert all(map(torch.equal, rank_groups, groups))
        if spans is not None:
            torch.testing.assert_close(rank_spans, spans, rtol=1e-5, atol=1e-5)
        if rank_logits is not None:
            torch.testing.assert_close(rank_logits, logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(rank_waad, returned[0][0][0])  # the same bits on every rank
        assert torch.equal(rank_fai, returned[0][0][1])


@pytest.mark.parametrize(
    ("size", "sequence_parallel", "grouped"),
    [(2, False, False), (2, True, True), (4, True, False)],
    ids=["two", "two, sequence parallel, known groups", "four, sequence parallel"],
)
def test_tensor_parallelism(size, sequence_parallel, grouped):
    made = {"sequence_parallel": sequence_parallel}
    check(size, sizes={"tensor_model_parallel_size": size}, made=made, grouped=grouped)


def test_key_heads_fewer_than_ranks():
    check(4, sizes={"tensor_model_parallel_size": 4}, made={"num_query_groups": 2})


def test_multi_latent_attention_on_two_ranks():
    made = {"multi_latent_attention": True, "spec": {"multi_latent_attention": True}, "core": FusedCore}
    made |= {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 8, "v_head_dim": 8}
    made |= {"kv_channels": 8, "num_query_groups": 8, "rope_type": "rope"}
    check(2, sizes={"tensor_model_parallel_size": 2}, made=made)


@pytest.mark.parametrize(
    ("kind", "grouped", "whole_mask"),
    [("rows", False, False), ("packed", True, False), ("padded", False, False), ("padded", False, True)],
    ids=["rows", "packed, known groups", "padded", "padded, mask of all tokens"],
)
def test_context_parallelism(kind, grouped, whole_mask):
    made = {"core": FusedCore}
    check(2, sizes={"context_parallel_size": 2}, made=made, kind=kind, grouped=grouped, whole_mask=whole_mask)


def test_tensor_and_context_parallelism():
    sizes = {"tensor_model_parallel_size": 2, "context_parallel_size": 2}
    check(4, sizes=sizes, made={"core": FusedCore, "sequence_parallel": True}, kind="packed")


@pytest.mark.parametrize(
    ("tp", "layers", "grouped"),
    [(1, 5, False), (1, [0, 1, 2], True), (2, 5, True), (2, [0, 1, 2], False)],
    ids=["both", "one, known groups", "both, two ranks each, known groups", "one, two ranks each"],
)
def test_pipeline_parallelism_with_sampled_layers_on_stages(tp, layers, grouped):
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": 2}
    check(2 * tp, sizes=sizes, made={"sequence_parallel": tp > 1}, layers=layers, grouped=grouped)


def test_pipeline_and_context_parallelism():
    sizes = {"context_parallel_size": 2, "pipeline_model_parallel_size": 2}
    check(4, sizes=sizes, made={"core": FusedCore}, kind="packed")


def batches_of_a_schedule(stages: int) -> list[tuple[torch.Tensor, ...]]:
    """Runs three micro-batches by Megatron's own schedule; returns WAAD, FAI and the groups of each."""
    with megatron_groups(pipeline_model_parallel_size=stages):
        from megatron.core.pipeline_parallel import get_forward_backward_func

        case = Case("rows")
        model = case.model(batch_p2p_comm=False)
        contexts = []

        def forward_step(iterator, model):
            ids = next(iterator)
            with megatron.collect(model) as c:
                out = model(ids, positions(ids), None)
            contexts.append(c)
            return out, lambda out: (out.sum(), {})

        ids = torch.randint(0, 61, (3, 2, TOKENS), generator=torch.Generator().manual_seed(4))
        run = get_forward_backward_func()
        sizes = {"num_microbatches": 3, "seq_length": TOKENS, "micro_batch_size": 2, "forward_only": True}
        with torch.no_grad(), cpu_for_cuda():
            run(forward_step_func=forward_step, data_iterator=iter(ids), model=model, **sizes)
        return [(*c.rhythm()[:2], *c.rhythm().groups) for c in contexts]


def test_a_context_for_each_micro_batch_of_a_schedule():
    [alone] = on_ranks(1, batches_of_a_schedule, 1)
    returned = on_ranks(2, batches_of_a_schedule, 2)
    for rank in (alone, *returned):
        assert not isinstance(rank, Raised), rank.args[2]
    for rank in returned:
        for (waad, fai, *groups), (waad_alone, fai_alone, *groups_alone) in zip(rank, alone, strict=True):
            torch.testing.assert_close(waad, waad_alone, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(fai, fai_alone, rtol=1e-5, atol=1e-6)
            assert all(map(torch.equal, groups, groups_alone))


# ---- errors ----------------------------------------------------------------------------------------------------------


def failing(sizes: dict, broken: int, how: str) -> None:
    """Runs a forward in which one rank has an attention that its statistics refuse, or another option."""
    from megatron.core.transformer.enums import AttnMaskType

    with megatron_groups(**sizes):
        case = Case("rows")
        model = case.model(core=FusedCore)
        is_broken = dist.get_rank() == broken
        for layer in model.decoder.layers if is_broken else ():
            if how == "mask type":
                layer.self_attention.attn_mask_type = AttnMaskType.no_mask
            elif how == "scale":
                layer.self_attention.config.softmax_scale = 0.7  # not that of the core, which exists already
        options = {"response_mask": case.response}
        if is_broken:
            options |= {"window": {"window": 11}, "mask": {"response_mask": case.response[:, 1:]}}.get(how, {})
        if how == "groups":
            torch.manual_seed(3 + is_broken)
            options |= {"groups": group_heads(torch.rand(3, HEADS))}
        with torch.no_grad(), megatron.collect(model, **options) as c:
            case.forward(model)
        c.rhythm()


WAYS = {
    "tensor": {"tensor_model_parallel_size": 2},
    "context": {"context_parallel_size": 2},
    "pipeline": {"pipeline_model_parallel_size": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("broken", "how", "message"),
    [
        (0, "mask type", "got attn_mask_type no_mask without a mask in layer"),
        (1, "mask type", "got attn_mask_type no_mask without a mask in layer"),
        (1, "scale", "does not attend as collect assumes|must agree, got scaling"),
        (0, "window", "must agree, got options"),
        (1, "groups", "must agree, got groups"),
        (0, "mask", "response_mask must (have shape|be of the 48 tokens)|must agree, got response_mask"),
    ],
)
def test_an_error_on_one_rank_is_raised_on_all(way, broken, how, message):
    for raised in on_ranks(2, failing, WAYS[way], broken, how):
        assert isinstance(raised, Raised)
        assert re.search(message, raised.args[1]), raised.args[2]


def where_the_host_may_not_look(sizes: dict, broken: int | None, made: dict) -> None:
    """Runs a forward as on a GPU, in which one rank's layers have an output that is not that of their maps."""
    blind = (mock.patch.object(module, "can_look", return_value=False) for module in (findings, signals))
    with megatron_groups(**sizes), next(blind), next(blind):
        case = Case("rows")
        model = case.model(core=FusedCore, **made)
        for layer in model.decoder.layers if dist.get_rank() == broken else ():
            layer.self_attention.core_attention.register_forward_hook(lambda core, args, out: out * 1.1)
        with torch.no_grad(), megatron.collect(model, response_mask=case.response) as c:
            case.forward(model)
        rhythm = c.rhythm()
        assert broken is not None or rhythm.waad.isfinite().all()
        c.check()


PAIRS = [("tensor", "pipeline"), ("tensor", "context"), ("context", "pipeline")]


@pytest.mark.parametrize("ways", [*((way,) for way in WAYS), *PAIRS], ids="-".join)
@pytest.mark.parametrize("broken", [0, "last"])
def test_what_a_gpu_finds_on_one_rank_is_raised_on_all(ways, broken):
    sizes = {name: size for way in ways for name, size in WAYS[way].items()}
    ranks = 2 ** len(ways)
    for raised in on_ranks(ranks, where_the_host_may_not_look, sizes, ranks - 1 if broken == "last" else 0, {}):
        assert isinstance(raised, Raised) and raised.args[0] == "ValueError", raised
        assert "does not attend as collect assumes" in raised.args[1]


def test_a_rank_without_heads_takes_part_in_the_check_of_a_gpu():
    one_head = {"num_attention_heads": 1, "num_query_groups": 1}
    returned = on_ranks(2, where_the_host_may_not_look, WAYS["context"], None, one_head)
    assert returned == [None, None], returned
    for raised in on_ranks(2, where_the_host_may_not_look, WAYS["context"], 1, one_head):
        assert "does not attend as collect assumes" in raised.args[1]


def bounds_of_a_part() -> None:
    with megatron_groups(context_parallel_size=2):
        case = Case("packed")
        model = case.model(core=FusedCore)
        case.params.cu_seqlens_q = torch.tensor([0, 32, 40], dtype=torch.int32)
        with torch.no_grad(), megatron.collect(model):
            case.forward(model)


def test_bounds_of_a_part_of_the_row_are_refused():
    for raised in on_ranks(2, bounds_of_a_part):
        assert "must bound all 96 tokens of the row, got 40" in raised.args[1]
