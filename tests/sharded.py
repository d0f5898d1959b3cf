"""Models whose attention several ranks share, and what one rank would have computed."""

import torch
import torch.distributed as dist
from models import llama
from torch import Tensor
from transformers import AttentionInterface

from rhythm_kernels.listen import collector
from rhythm_kernels.listen.shards import places_of

TOKENS = 96


class Row:
    """A packed or padded batch, and this rank's part of it.

    Args:
        order: "contiguous" or "zigzag".
        cuts: bounds of packed sequences; None for a batch of two rows, of which the second is padded on the left.
        sizes: tokens of each rank; None for equal shares.
        by_sequence: whether each packed sequence has a zigzag of its own.
        group: the ranks that share the row.
    """

    def __init__(self, order="contiguous", cuts=None, sizes=None, by_sequence=False, group=None):
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        torch.manual_seed(0)
        self.group = group
        self.cuts = cuts
        rows = 1 if cuts else 2
        self.ids = torch.randint(0, 61, (rows, TOKENS))
        self.response = torch.rand(rows, TOKENS) < 0.7
        position = torch.arange(TOKENS)
        self.mask = None
        if cuts:
            begins = torch.repeat_interleave(torch.tensor(cuts[:-1]), torch.tensor(cuts).diff())
            self.positions = (position - begins)[None]
        else:
            self.mask = torch.ones(rows, TOKENS, dtype=torch.long)
            self.mask[1, :7] = 0
            self.response[1, :7] = False
            self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        self.places = places_of(order, sizes or [TOKENS // ranks] * ranks, cuts if by_sequence else None)
        self.own = self.places[rank]

    def part(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x[..., self.own]


def gathered(x: Tensor, places: list[Tensor], dim: int, group=None) -> Tensor:
    """Returns the whole of what lies on the ranks in parts along `dim`, by way of objects."""
    parts: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, x.detach(), group)
    whole = torch.cat(parts, dim)
    return torch.empty_like(whole).index_copy_(dim, torch.cat(places), whole)


class GatheringAttention:
    """Attention over a row of which each rank has a part: it gathers q, k and v, and keeps the rank's own outputs.

    It stands for ring attention, which returns the same outputs.
    """

    def __init__(self, row: Row):
        self.row, self.wholes = row, []

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **_):
        q, k, v = (gathered(x, self.row.places, 2, self.row.group) for x in (query, key, value))
        self.wholes.append((q, k))
        out = whole_attention(q, k, v, self.row, scaling)
        return out[:, :, self.row.own].transpose(1, 2).contiguous(), None


def whole_attention(q: Tensor, k: Tensor, v: Tensor, row: Row, scale: float | None) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    t = torch.arange(q.shape[2])
    sees = (t[:, None] >= t)[None]
    if row.cuts:
        segment = torch.bucketize(t, torch.tensor(row.cuts[1:]), right=True)
        sees = sees & (segment[:, None] == segment)
    if row.mask is not None:
        sees = sees & row.mask.bool()[:, None, :]
    sees = sees | torch.eye(len(t), dtype=torch.bool)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, sees[:, None], scale=scale)


def model_over(row: Row, **sizes) -> tuple[torch.nn.Module, GatheringAttention]:
    attention = GatheringAttention(row)
    AttentionInterface.register("gathering", attention)
    torch.manual_seed(1)
    model = llama(**sizes)
    model.config._attn_implementation = "gathering"
    return model, attention


def split_over_heads(model: torch.nn.Module, mesh) -> None:
    """Makes a Llama tensor-parallel, as torch's and transformers' plans do."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"} | {"self_attn.o_proj": RowwiseParallel()}
    plan |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")} | {"mlp.down_proj": RowwiseParallel()}
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)


def watch_inputs() -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Returns a list that gets the q, k and log-sum-exp that statistics are computed from, layer by layer."""
    seen: list[tuple[Tensor, Tensor, Tensor | None]] = []
    for name in ("run_stats", "run_group_stats"):
        original = getattr(collector, name)

        def watching(q, k, lse, *rest, original=original):
            seen.append((q, k, lse))
            return original(q, k, lse, *rest)

        setattr(collector, name, watching)
    return seen
