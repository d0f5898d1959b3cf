"""Turns what one rank sees of a forward, some heads or some tokens, into whole rows of some heads.

The statistics are those of heads, so a rank that has all tokens of some heads needs no other rank before the sums over
the head groups. Where a rank has some tokens of all heads, a swap turns tokens into heads in the sampled layers.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from rhythm_kernels.host import fetch, send
from rhythm_kernels.isolation import isolated
from rhythm_kernels.listen.masks import is_mask
from rhythm_kernels.listen.taps import Call
from rhythm_kernels.ranks import HeadShards, Parallel, Ranks, together


class Shards:
    """The part of one forward's attention that this rank holds.

    Args:
        parallel: checked.

    Raises:
        TypeError, ValueError, RuntimeError: as `Ranks`.
    """

    def __init__(self, parallel: Parallel):
        ranks = {
            name: Ranks(f"parallel.{name}", group)
            for name, group in (("tokens", parallel.tokens), ("heads", parallel.heads))
            if group is not None
        }
        self.groups = [group for group in ranks.values() if group.size > 1]
        self._tokens = next((group for group in self.groups if group is ranks.get("tokens")), None)
        self._order = parallel.order
        self._places: list[Tensor] = []
        self.heads: HeadShards | None = None
        """This rank's heads; None before the first sampled layer."""
        self.call_heads: int | None = None
        """The number of heads in this rank's calls; None before the first sampled layer."""

    @property
    def of_tokens(self) -> bool:
        """Whether ranks have some tokens of all heads."""
        return self._tokens is not None

    @property
    def own_tokens(self) -> Tensor | None:
        """The place of each token of this rank in the whole row, [T of this rank] int64; None if ranks split heads."""
        return self._places[self._tokens.rank] if self._places else None

    # ---- before the forward ------------------------------------------------------------------------------------------

    def whole_row(
        self, tokens: int, values: dict[str, Tensor | None], cu_seqlens: Tensor | None
    ) -> tuple[int, dict[str, Tensor | None]]:
        """Finds the place of every rank's tokens, and returns the length of the whole row and values of all tokens.

        The shapes and names of `values` have been found to be the same on all ranks, but for the number of tokens.

        Args:
            tokens: the number of this rank's tokens.
            values: by name, [..., T of this rank] or, whole already, [..., T]; "position_ids" among them.
            cu_seqlens: [S + 1] on the CPU, bounds of the packed sequences in the whole row, if they are known.

        Raises:
            ValueError: a value has another number of tokens; the positions are missing, or show another order than the
                given one, or none; the number of tokens does not allow a zigzag. All ranks raise an error.
        """
        if self._tokens is None:
            return tokens, values
        sizes = [size for [size] in self._tokens.numbers(tokens)]
        whole = sum(sizes)
        with together(self.groups) as facts:
            for name, value in values.items():
                facts[name] = _extent(name, value, tokens, whole)
        parts = {
            name: [value] if value is None or value.shape[-1] == whole else self._gathered(value, sizes)
            for name, value in values.items()
        }
        positions = parts["position_ids"]
        if positions[0] is None:
            raise ValueError(
                "position_ids must be given where ranks hold parts of a row, got None: without them each rank's "
                "tokens begin at position 0"
            )
        device = positions[0].device
        [fetched] = fetch([torch.cat(positions, -1)])
        self._places = [send(places, device) for places in self._find_places(sizes, fetched, cu_seqlens)]
        joined = {name: x[0] if len(x) == 1 else self._in_place(x, x[0].ndim - 1) for name, x in parts.items()}
        return whole, joined

    def _gathered(self, value: Tensor, sizes: list[int]) -> list[Tensor]:
        return self._tokens.gather_uneven(value, sizes, value.ndim - 1)

    def _find_places(self, sizes: list[int], positions: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
        """Returns the places of each rank's tokens: those of the order that the positions confirm.

        Args:
            positions: [..., T], rank by rank, on the CPU.
        """
        cuts = None if cu_seqlens is None else cu_seqlens.tolist()
        orders = ["contiguous", "zigzag"] if self._order == "auto" else [self._order]
        found, refused = {}, {}
        for order in orders:
            try:
                places = places_of(order, sizes, cuts)
            except ValueError as error:
                refused[order] = str(error)
                continue
            in_row = torch.empty_like(positions).index_copy_(-1, torch.cat(places), positions)
            why = _misplaced(in_row, cuts)
            if why is None:
                found[order] = places, _starts(in_row)
            else:
                refused[order] = why
        if not found:
            reasons = "; ".join(f"{order}: {why}" for order, why in refused.items())
            raise ValueError(f"position_ids must show how the ranks of parallel.tokens share a row, got {reasons}")
        if len(found) == 2 and not _same_sequences(*found.values()):
            raise ValueError(
                'parallel.order must be "contiguous" or "zigzag" here: these position_ids of packed sequences fit both'
            )
        return next(iter(found.values()))[0]

    # ---- in a layer --------------------------------------------------------------------------------------------------

    def count_heads(self, call_heads: int, query_heads: object) -> None:
        """Finds out which heads each rank has; all ranks call it at their first sampled layer.

        Args:
            call_heads: the number of heads in this rank's call.
            query_heads: the number of heads of the model's layers; not checked if it is not an int.

        Raises:
            ValueError: the ranks do not hold the model's heads. All ranks raise it.
        """
        groups, total = [], call_heads
        for ranks in self.groups:
            if ranks is self._tokens:
                groups.append((ranks, [len(share) for share in head_shares(call_heads, ranks.size)]))
            else:
                counts = [count for [count] in ranks.numbers(call_heads)]
                groups.append((ranks, counts))
                total = sum(counts)
        if isinstance(query_heads, int) and total != query_heads:
            raise ValueError(
                f"parallel must name the ranks that share the model's {query_heads} query heads, got {total} heads on "
                f"{' and '.join(ranks.name for ranks in self.groups) or 'one rank'} together"
            )
        self.heads, self.call_heads = HeadShards(groups), call_heads

    def turned(self, call: Call, out: Tensor) -> tuple[Call, Tensor]:
        """Returns a call on all tokens of this rank's share of the heads, and its output, [B, T, HQ, Dv].

        Args:
            call: a call on this rank's tokens of all heads.
            out: [B, T of this rank, HQ, Dv], its output.
        """
        if self._tokens is None:
            return call, out
        heads, keys = call.query.shape[1], call.key.shape[1]
        shares = head_shares(heads, self._tokens.size)
        key_shares = [_keys_of(share, heads // keys) for share in shares]
        own = shares[self._tokens.rank]
        sinks = call.kwargs.get("s_aux")
        with isolated(call.query.device):
            turned = call._replace(
                query=self._swapped(call.query, shares),
                key=self._swapped(call.key, key_shares),
                value=self._swapped(call.value, key_shares),
                kwargs=call.kwargs if sinks is None else call.kwargs | {"s_aux": sinks[own.start : own.stop]},
            )
            return turned, self._swapped(out.transpose(1, 2), shares).transpose(1, 2)

    def _swapped(self, x: Tensor, shares: Sequence[Sequence[int]]) -> Tensor:
        """Returns [B, heads of this rank's share, T, D] from [B, H, T of this rank, D]."""
        parts = [_heads(x.detach(), share) for share in shares]
        batch, _, _, size = x.shape
        own = len(shares[self._tokens.rank])
        shapes = [[batch, own, len(places), size] for places in self._places]
        return self._in_place(self._tokens.swap(parts, shapes), 2)

    def _in_place(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """Returns the tokens of all ranks in their order in the row."""
        joined = torch.cat(list(parts), dim)
        return torch.empty_like(joined).index_copy_(dim, torch.cat(self._places), joined)


def check_shard(layer: int, call: Call) -> None:
    """Raises ValueError for a mask that a rank cannot know to be that of the whole row."""
    if is_mask(call.mask):
        raise ValueError(
            f"collect needs layers without a 4-D mask where ranks hold parts of a row, got one of "
            f"{list(getattr(call.mask, 'shape', []))} in layer {layer}: tell packed sequences apart by position_ids"
        )


def head_shares(heads: int, ranks: int) -> list[range]:
    """Returns the heads of each rank, in order; their numbers differ by at most one."""
    cuts = [(heads * rank + ranks - 1) // ranks for rank in range(ranks + 1)]
    return [range(begin, end) for begin, end in itertools.pairwise(cuts)]


def places_of(order: str, sizes: Sequence[int], cuts: Sequence[int] | None = None) -> list[Tensor]:
    """Returns the place of each rank's tokens in the whole row, int64 on the CPU.

    Args:
        order: "contiguous" or "zigzag".
        sizes: the number of tokens of each rank.
        cuts: the bounds of packed sequences, each of which has a zigzag of its own; None for one over the row.

    Raises:
        ValueError: the numbers of tokens do not allow a zigzag.
    """
    ranks, tokens = len(sizes), sum(sizes)
    row = torch.arange(tokens, device="cpu")
    if order == "contiguous":
        return list(row.split(list(sizes)))
    if len(set(sizes)) > 1:
        raise ValueError(f"a zigzag gives every rank as many tokens, got {', '.join(map(str, sizes))}")
    pieces: list[list[Tensor]] = [[] for _ in sizes]
    for begin, end in itertools.pairwise([0, tokens] if cuts is None else cuts):
        if (end - begin) % (2 * ranks):
            raise ValueError(f"a zigzag cuts into {2 * ranks} runs of one length, got {end - begin} tokens")
        runs = row[begin:end].chunk(2 * ranks) if end > begin else [row[:0]] * (2 * ranks)
        for rank in range(ranks):
            pieces[rank] += [runs[rank], runs[-1 - rank]]
    return [torch.cat(own) for own in pieces]


def _keys_of(share: range, group: int) -> Sequence[int]:
    """Returns the key heads of a share of the query heads, of which `group` share one key head.

    Each key head that is returned serves as many query heads of the share as any other. A share that begins or ends
    inside a group of several has a key head for each of its query heads.
    """
    if not share:
        return range(0)
    first, last = share[0] // group, share[-1] // group
    whole = share[0] % group == 0 and len(share) % group == 0
    return range(first, last + 1) if whole or first == last else [head // group for head in share]


def _heads(x: Tensor, share: Sequence[int]) -> Tensor:
    """Returns the heads of a share, [B, heads, T, D]; the host waits for nothing."""
    if isinstance(share, range):
        return x[:, share.start : share.stop]
    return torch.cat([x[:, head : head + 1] for head in share], 1)


def _misplaced(positions: Tensor, cuts: Sequence[int] | None) -> str | None:
    """Returns why the positions of a row, [..., T], are not those of whole sequences; None if they are."""
    first = positions[..., :1]
    if (first > 1).any():
        return f"the row would begin at position {int(first.max())}"
    if cuts is not None:
        bounds = torch.tensor(cuts, device=positions.device)
        begin = torch.repeat_interleave(bounds[:-1], bounds.diff())
        place = torch.arange(positions.shape[-1], device=positions.device)
        wrong = (positions != place - begin).flatten(0, -2).any(0).nonzero()
        if len(wrong):
            t = int(wrong[0])
            return f"token {t} would have position {positions[..., t].flatten()[0].item()} in its packed sequence"
        return None
    step = positions.diff()
    # a sequence begins at 0; padding has one position again and again
    wrong = ((step != 1) & (step != 0) & (positions[..., 1:] > 1)).flatten(0, -2).any(0).nonzero()
    if len(wrong):
        t = int(wrong[0])
        before, after = (positions[..., place].flatten()[0].item() for place in (t, t + 1))
        return f"position {after} would follow position {before}"
    return None


def _extent(name: str, value: Tensor | None, tokens: int, whole: int) -> str:
    """Returns what a value is of: nothing, the whole row or this rank's part of it; which ranks must have alike.

    Raises:
        ValueError: it is of another number of tokens.
    """
    if value is None:
        return "None"
    if value.shape[-1] not in (tokens, whole):
        raise ValueError(
            f"{name} must be of the {tokens} tokens of this rank or of all {whole}, got shape {list(value.shape)}"
        )
    return "of the whole row" if value.shape[-1] == whole else "of each rank's tokens"


def _starts(positions: Tensor) -> Tensor:
    """Returns where the positions of a row do not follow each other, [..., T] bool."""
    return torch.nn.functional.pad(positions.diff() != 1, (1, 0), value=True)


def _same_sequences(one: tuple[list[Tensor], Tensor], other: tuple[list[Tensor], Tensor]) -> bool:
    """Returns whether two orders put the same tokens, by their places in memory, into the same sequences."""

    def before(places: list[Tensor], starts: Tensor) -> Tensor:
        memory = torch.cat(places).argsort()  # the token in memory at each place of the row
        previous = torch.nn.functional.pad(memory[:-1], (1, 0), value=-1).expand(starts.shape)
        return torch.empty_like(previous).index_copy_(-1, memory, torch.where(starts, -1, previous))

    return bool((before(*one) == before(*other)).all())
