"""Models whose attention several ranks share, and what one rank would have computed."""

import torch
import torch.distributed as dist
from architectures import ARCHITECTURES
from models import llama, qwen3
from torch import Tensor
from transformers import AttentionInterface

from rhythm_kernels.listen import collector
from rhythm_kernels.listen.shards import places_of
from rhythm_kernels.listen.taps import _eager_function
from rhythm_kernels.statistics.options import Options

TOKENS = 96
SMALL = {"llama": llama, "qwen3": qwen3}


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
        self.group, self.by_sequence = group, by_sequence
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

    def mask_of(self, sliding_window: int | None) -> Tensor:
        """Returns what eager attention adds to the scores, [B, 1, T, T]."""
        t = torch.arange(TOKENS)
        sees = (t[:, None] >= t)[None]
        if sliding_window is not None:
            sees = sees & (t[:, None] - t < sliding_window)
        if self.cuts:
            segment = torch.bucketize(t, torch.tensor(self.cuts[1:]), right=True)
            sees = sees & (segment[:, None] == segment)
        if self.mask is not None:
            sees = sees & self.mask.bool()[:, None, :]
        sees = sees | torch.eye(TOKENS, dtype=torch.bool)
        return torch.where(sees, 0.0, torch.finfo(torch.float32).min)[:, None]

    def part(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x[..., self.own]


def gathered(x: Tensor, places: list[Tensor], dim: int, group=None) -> Tensor:
    """Returns the whole of what lies on the ranks in parts along `dim`, by way of objects."""
    parts: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, x.detach(), group)
    whole = torch.cat(parts, dim)
    return torch.empty_like(whole).index_copy_(dim, torch.cat(places), whole)


class GatheringAttention:
    """Eager attention over a row of which each rank has a part: it gathers q, k and v, and keeps the rank's outputs.

    It stands for ring attention, which returns the same outputs.
    """

    def __init__(self, row: Row):
        self.row = row

    def __call__(self, module, query, key, value, attention_mask, **kwargs):
        q, k, v = (gathered(x, self.row.places, 2, self.row.group) for x in (query, key, value))
        mask = self.row.mask_of(kwargs.get("sliding_window")).to(q.dtype)
        out, _ = _eager_function(type(module))(module, q, k, v, mask, **kwargs)
        return out[:, self.row.own].contiguous(), None


def sharded_model(row: Row, name: str, **sizes) -> torch.nn.Module:
    """Returns a model that attends over a row of which each rank has a part."""
    AttentionInterface.register("gathering", GatheringAttention(row))
    model = build(name, **sizes)
    model.config._attn_implementation = "gathering"
    return model


def build(name: str, **sizes) -> torch.nn.Module:
    """Returns a model with eager attention, of these sizes."""
    if name not in SMALL:
        return ARCHITECTURES[name].build("eager", **sizes)
    torch.manual_seed(1)
    return SMALL[name]("eager", **sizes)


def split_over_heads(model: torch.nn.Module, mesh) -> None:
    """Makes a Llama tensor-parallel, as torch's and transformers' plans do."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"} | {"self_attn.o_proj": RowwiseParallel()}
    plan |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")} | {"mlp.down_proj": RowwiseParallel()}
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)


def watch_inputs() -> list[tuple[Tensor, Tensor, Tensor | None, Options]]:
    """Returns a list that gets the q, k, log-sum-exp and options that statistics are computed from, layer by layer."""
    seen: list[tuple[Tensor, Tensor, Tensor | None, Options]] = []
    for name in ("run_stats", "run_group_stats"):
        original = getattr(collector, name)

        def watching(q, k, lse, *rest, original=original):
            seen.append((q, k, lse, next(x for x in rest if isinstance(x, Options))))
            return original(q, k, lse, *rest)

        setattr(collector, name, watching)
    return seen
