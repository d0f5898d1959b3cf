"""Ranks that share the attention of a model, and what the statistics exchange between them.

Every exchange is one of three: a gather, a swap of parts, or a sum of the ranks' tensors in the order of the ranks. The
sum does not depend on how the backend of torch.distributed adds, and has the same bits on every rank.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rhythm_kernels.checks import check_choice

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

ORDERS = ("auto", "contiguous", "zigzag")
"""How tokens lie on ranks: one run of the row after the other, or the row's run r from the left and from the right."""


class Parallel(NamedTuple):
    """Names the ranks that share a model's attention, by heads or by tokens."""

    heads: "ProcessGroup | DeviceMesh | None" = None
    """The ranks that hold some heads of all tokens, in the order of the heads: tensor parallelism."""
    tokens: "ProcessGroup | DeviceMesh | None" = None
    """The ranks that hold some tokens of all heads: Ulysses, ring attention and context parallelism."""
    order: str = "auto"
    """How the tokens lie on the ranks of `tokens`. "contiguous": one run of the row after the other. "zigzag": of 2 W
    runs, rank r has run r and run 2 W - 1 - r; with `cu_seqlens` those of every packed sequence. "auto": whichever of
    the two, over the whole row, the position_ids show."""


class Ranks:
    """The ranks of one process group.

    Args:
        name: the argument's name, for errors.
        group: a process group, or a device mesh of one dimension.

    Raises:
        TypeError, ValueError: another type, a mesh of several dimensions, or this process is not in the group.
        RuntimeError: torch.distributed has not been initialized.
    """

    def __init__(self, name: str, group: "ProcessGroup | DeviceMesh"):
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(f"{name} needs torch.distributed, which has not been initialized")
        from torch.distributed.device_mesh import DeviceMesh

        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(f"{name} must be a mesh of one dimension, got {group.ndim}: pass one, as mesh['tp']")
            group = group.get_group()
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"{name} must be a ProcessGroup or a DeviceMesh, got {type(group).__name__}")
        self.name, self.group = name, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sent = 0
        """Bytes that this rank has sent to others."""

    def gather(self, x: Tensor) -> list[Tensor]:
        """Returns the tensor of each rank, all of one shape."""
        flat = _bytes_of(x)
        received = flat.new_empty(self.size * flat.numel())
        # torch 2.13 has another name for it, and warns of this one
        getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(received, flat, group=self.group)
        self.sent += (self.size - 1) * flat.numel()
        return [part.view(x.dtype).view(x.shape) for part in received.view(self.size, flat.numel())]

    def numbers(self, *numbers: int) -> list[list[int]]:
        """Returns the integers that each rank gives; the host has them."""
        given = torch.tensor(numbers, dtype=torch.int64, device=self._talking_device())
        return torch.stack(self.gather(given)).tolist()

    def gather_uneven(self, x: Tensor, sizes: Sequence[int], dim: int) -> list[Tensor]:
        """Returns the tensor of each rank, whose size along `dim` is sizes[rank]."""
        most = max(sizes)
        padded = x.new_zeros([*x.shape[:dim], most, *x.shape[dim + 1 :]])
        padded.narrow(dim, 0, x.shape[dim]).copy_(x)
        return [part.narrow(dim, 0, size) for part, size in zip(self.gather(padded), sizes, strict=True)]

    def swap(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Sends parts[r] to rank r, and returns what each rank has sent, of the given shapes; all of one dtype."""
        dtype, flat = parts[0].dtype, [_bytes_of(part) for part in parts]
        item = parts[0].element_size()
        lengths = [item * torch.Size(shape).numel() for shape in shapes]
        received = flat[0].new_empty(sum(lengths))
        out = [len(part) for part in flat]
        dist.all_to_all_single(received, torch.cat(flat), lengths, out, group=self.group)
        self.sent += sum(out) - out[self.rank]
        return [part.view(dtype).view(*shape) for part, shape in zip(received.split(lengths), shapes, strict=True)]

    def sum(self, x: Tensor) -> Tensor:
        """Returns the sum over the ranks, in their order: the same bits on every rank.

        Each rank adds its part of the numbers, so that no more bytes travel than a ring sends for an all-reduce.
        """
        if self.size == 1:
            return x
        flat = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % self.size))
        parts = list(flat.chunk(self.size))
        total, *others = self.swap(parts, [part.shape for part in parts])
        for other in others:
            total = total + other
        return torch.cat(self.gather(total))[: x.numel()].view(x.shape)

    def agree(self, said: str, failed: str | None) -> str | None:
        """Tells all ranks whether one of them has failed, or says something else.

        Args:
            said: what must be the same on all ranks, one fact in each line.
            failed: why this rank cannot go on, else None.

        Returns:
            why the ranks cannot go on; None if they can.
        """
        text = (f"!{failed}" if failed else f"={said}").encode()
        own = [len(text), int.from_bytes(hashlib.sha256(text).digest()[:7], "big")]
        told = self.numbers(*own)
        if not failed and all(other == own for other in told):
            return None
        content = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self._talking_device())
        texts = [bytes(x.cpu().numpy()).decode() for x in self.gather_uneven(content, [n for n, _ in told], 0)]
        failures = {rank: told[1:] for rank, told in enumerate(texts) if told.startswith("!")}
        named = "; ".join(f"rank {rank} of {self.name}: {why}" for rank, why in failures.items())
        return named or self._differences([told[1:] for told in texts])

    def _talking_device(self) -> torch.device:
        """Returns the CPU if this group has a backend for it, so that the host need not wait for a GPU."""
        devices = {device.type for device in self.group._device_types}
        return torch.device("cpu") if "cpu" in devices else torch.device("cuda", torch.cuda.current_device())

    def _differences(self, texts: list[str]) -> str:
        facts = [dict(line.split(": ", 1) for line in text.splitlines()) for text in texts]
        names = [name for name in {**facts[0], **facts[-1]} if len({fact.get(name) for fact in facts}) > 1]
        shown = (f"{name}: {', '.join(str(fact.get(name)) for fact in facts)}" for name in names or facts[0])
        return f"the ranks of {self.name} must agree, got {'; '.join(shown)}"


class HeadShards:
    """The heads of this rank among all of a layer, and the exchanges that make statistics of all from its own.

    Args:
        groups: groups of ranks with the number of heads of each of their ranks, the finest split first. Heads may be
            split twice: each rank of the last group holds a run of all heads, and the ranks of the group before it
            split that run again.
    """

    def __init__(self, groups: Sequence[tuple[Ranks, list[int]]]):
        self._groups = [(ranks, counts) for ranks, counts in groups if ranks.size > 1]

    def all_heads(self, x: Tensor) -> Tensor:
        """Returns a value of every head, [..., HQ], from those of this rank's heads."""
        for ranks, counts in self._groups:
            x = torch.cat(ranks.gather_uneven(x, counts, x.ndim - 1), -1)
        return x

    def own_heads(self, x: Tensor) -> Tensor:
        """Returns the values of this rank's heads among those of every head, [..., HQ]."""
        for ranks, counts in reversed(self._groups):
            x = x.split(counts, -1)[ranks.rank]
        return x

    def total(self, x: Tensor) -> Tensor:
        """Returns the sum over all ranks, in a fixed order: the same bits on every rank."""
        for ranks, _ in self._groups:
            x = ranks.sum(x)
        return x


class Disagreement(RuntimeError):
    """Another rank has failed, or the ranks do not compute the same thing."""


@contextmanager
def together(groups: Sequence[Ranks]) -> Iterator[dict[str, object]]:
    """Opens a context that all ranks leave alike: an error inside it on one of them is raised on all.

    The context gives a dict for facts that must be the same on all ranks, each of one line.

    Args:
        groups: the groups that this process is in; none for a process alone.

    Raises:
        Exception: this rank's own error.
        Disagreement: another rank's error, or facts that differ.
    """
    facts: dict[str, object] = {}
    failure = None
    try:
        yield facts
    except Exception as error:
        failure = error
    said = "\n".join(f"{name}: {value}" for name, value in facts.items())
    failed = None if failure is None else f"{type(failure).__name__}: {failure}"
    for ranks in groups:
        failed = ranks.agree(said, failed)
    if failure is not None:
        raise failure
    if failed is not None:
        raise Disagreement(failed)


def check_parallel(parallel: object) -> Parallel:
    """Returns `parallel` if it is a `Parallel` of at least one group.

    Raises:
        TypeError, ValueError: another type, an unknown order, or no group.
    """
    if not isinstance(parallel, Parallel):
        raise TypeError(f"parallel must be a rhythm_kernels.Parallel, got {type(parallel).__name__}: {parallel!r}")
    check_choice("parallel.order", parallel.order, ORDERS)
    if parallel.heads is None and parallel.tokens is None:
        raise ValueError("parallel must name the ranks of `heads`, of `tokens`, or of both, got neither")
    return parallel


def _bytes_of(x: Tensor) -> Tensor:
    """Returns the bytes of a tensor, which every backend of torch.distributed can send."""
    return x.contiguous().view(-1).view(torch.uint8)
