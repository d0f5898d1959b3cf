"""Joins the ranks of a run, and shards the policy over them with FSDP2. A single process needs none of it.

    torchrun --nproc-per-node 8 -m train ...

Answers, weights, gradients and optimizer state are divided among the ranks. Each rank reads the attention statistics
of its own sequences and computes their head groups and credit, without communication.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from train.config import BadSetting, Config

Item = TypeVar("Item")


def choose_device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise BadSetting("--device must be one that is there, got 'cuda' where torch finds no CUDA device")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def visible_gpus(device: str) -> list[str]:
    """Returns the names of the GPUs that this process may use with --device `device`; none for a CPU."""
    if choose_device(device) == "cpu":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(place) for place in range(torch.cuda.device_count())]


def is_torchrun() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


class World(NamedTuple):
    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device: str) -> "World":
        """Joins the ranks that torchrun started; without torchrun the world has one rank."""
        name = choose_device(device)
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if name == "cuda":
            place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(place)
        else:
            place = torch.device("cpu")
        if size > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo")
        return cls(rank, size, place)

    @staticmethod
    def leave() -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def draw(self, seed: int, step: int) -> int:
        """Returns the seed of this rank's draws at a step, below 2^63."""
        return (seed * 1_000_003 + step) % 2**48 * self.size + self.rank

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def from_first(self, make: Callable[[], Item]) -> Item:
        """Returns the first rank's result of `make` on every rank, or raises its error on every rank."""
        outcome: list = [None, None]
        if self.is_first:
            try:
                outcome[0] = make()
            except Exception as error:
                outcome[1] = error
        if self.size > 1:
            dist.broadcast_object_list(outcome, 0)
        result, error = outcome
        if error is not None:
            raise error
        return result

    def sum(self, values: Tensor) -> Tensor:
        return self._reduced(values, dist.ReduceOp.SUM)

    def largest(self, values: Tensor) -> Tensor:
        return self._reduced(values, dist.ReduceOp.MAX)

    def most(self, value: int) -> int:
        return int(self.largest(torch.tensor(value)))

    def gather(self, values: Tensor) -> Tensor:
        """Returns the values of every rank, [ranks, ...], which have one shape."""
        if self.size == 1:
            return values[None]
        of_ranks = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(of_ranks, values.contiguous())
        return torch.stack(of_ranks)

    def _reduced(self, values: Tensor, how) -> Tensor:
        if self.size == 1:
            return values
        values = values.to(self.device, copy=True)
        dist.all_reduce(values, how)
        return values

    def share(self, items: Sequence[Item], parts: int) -> list[Item]:
        """Returns this rank's share of each of `parts` equal parts; the parts are the same for any number of ranks."""
        size = len(items) // (parts * self.size)
        starts = (size * (part * self.size + self.rank) for part in range(parts))
        return [item for start in starts for item in items[start : start + size]]


def sharing_ranks(config: Config, most: int) -> list[int]:
    """Returns how many ranks, up to `most`, can share an optimizer step: by whole groups, or by equal parts of one."""
    rollout = config.rollout
    problems, answers = rollout.prompts_per_step // config.grpo.gradient_steps, rollout.num_generations

    def fits(ranks: int) -> bool:
        return problems % ranks == 0 or (ranks % problems == 0 and answers % (ranks // problems) == 0)

    return [ranks for ranks in range(1, most + 1) if fits(ranks)]


def shard(policy: nn.Module, layers: Iterable[nn.Module], world: World, dtype: torch.dtype) -> None:
    """Shards the float32 parameters as DTensors, which are gathered layer by layer, in `dtype`, for use."""
    if not dist.is_initialized():  # a single process that computes in another dtype than its parameters'
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(world.device.type, (world.size,))
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    options = {"mesh": mesh} if dtype == torch.float32 else {"mesh": mesh, "mp_policy": mixed}
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(policy, **options)


def whole(tensor: Tensor) -> Tensor:
    """Returns the whole tensor of which this rank has a shard; every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and persistent buffers with their sharding; a tied one under its first name."""
    state = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    first = {id(tensor): name for name, tensor in reversed(state.items())}
    return {name: tensor for name, tensor in state.items() if first[id(tensor)] == name}


def whole_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yields each of `weights_of` whole, one at a time; every rank must go through all."""
    for name, tensor in weights_of(model).items():
        full = whole(tensor.detach())
        yield name, full.to(dtype) if full.is_floating_point() else full
