"""Packs rollouts into one row of tokens and cuts micro-batches from it; nothing is padded or dropped.

Every tensor of tokens is [N]: prompts and answers of all sequences, one after another. Entry t describes token t, which
the model predicts at t - 1.
Shapes: N tokens and B sequences in the batch; n tokens, S sequences and m tokens of answers in a micro-batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rhythm_kernels.host import send
from train.distributed import World
from train.rollout import Completion


class Rollouts(NamedTuple):
    """B answers with their prompts, N tokens in all."""

    ids: Tensor
    """[N] int64."""
    cu_seqlens: Tensor
    """[B + 1] int32: sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1]."""
    response_mask: Tensor
    """[N] bool: true for the answers' tokens, the end of sequence included."""
    log_probs: Tensor
    """[N] fp32: the sampler's log-probabilities; 0 in prompts."""
    finished: Tensor
    """[B] bool: which answers ended by themselves."""
    lengths: tuple[int, ...]
    """The number of tokens of each sequence, known to the host."""
    prompts: tuple[int, ...]
    """The number of tokens of each sequence's prompt, known to the host."""

    @property
    def sequence_of(self) -> Tensor:
        """[N] int64: the sequence of each token."""
        sequences = torch.arange(len(self.lengths), device=self.ids.device)
        return sequences.repeat_interleave(self.cu_seqlens.diff().long(), output_size=len(self.ids))

    def per_sequence(self, values: Tensor) -> Tensor:
        """Returns the sums over each sequence: [N] -> [B]."""
        sums = torch.zeros(len(self.lengths), dtype=values.dtype, device=values.device)
        return sums.index_add_(0, self.sequence_of, values)


def pack(prompts: Sequence[list[int]], completions: Sequence[Completion], n: int, device: torch.device) -> Rollouts:
    """Returns the rollouts of `n` completions to each prompt, in the order in which an engine returns them.

    Raises:
        ValueError: the number of completions is wrong, or a prompt or a completion is empty.
    """
    if not prompts or len(completions) != n * len(prompts):
        raise ValueError(f"completions must be {n} to each prompt, got {len(completions)} to {len(prompts)} prompts")
    for name, ids in (("prompt", prompts), ("completion", [completion.ids for completion in completions])):
        if not all(ids):
            raise ValueError(f"each {name} must have a token, got none in {name} {[*map(bool, ids)].index(False)}")
    ids, mask, log_probs, lengths = [], [], [], []
    for index, completion in enumerate(completions):
        prompt = prompts[index // n]
        ids += prompt + completion.ids
        mask += [False] * len(prompt) + [True] * len(completion.ids)
        log_probs += [0.0] * len(prompt) + completion.log_probs
        lengths.append(len(prompt) + len(completion.ids))
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    finished = torch.tensor([completion.finish_reason == "stop" for completion in completions])
    return Rollouts(
        send(torch.tensor(ids), device),
        send(bounds, device),
        send(torch.tensor(mask), device),
        send(torch.tensor(log_probs, dtype=torch.float32), device),
        send(finished, device),
        tuple(lengths),
        tuple(len(prompt) for prompt in prompts for _ in range(n)),
    )


class MicroBatch(NamedTuple):
    """A packed row with some of a batch's sequences."""

    ids: Tensor
    """[1, n] int64."""
    position_ids: Tensor
    """[1, n] int64: from 0 in each sequence."""
    cu_seqlens: Tensor
    """[S + 1] int32."""
    bounds: tuple[int, ...]
    """cu_seqlens as numbers: FSDP would send a tensor to the device, and wait for it."""
    longest: int
    place: Tensor
    """[n] int64: the place of each token in the batch."""
    answers: Tensor
    """[m] int64: the places in this row of the answers' tokens; each has a token before it."""
    sequences: Tensor
    """[S] int64: which sequences of the batch these are."""
    is_surplus: bool = False
    """Whether it is run only because another rank has one more micro-batch; its results are dropped."""


def micro_batches(batch: Rollouts, rows: Sequence[int], most_tokens: int, world: World) -> list[MicroBatch]:
    """Returns the sequences `rows` in packed rows of at most `most_tokens`; a longer sequence gets its own row.

    Every rank gets the same number, since all ranks gather sharded weights together.
    """
    micros = [take(batch, bin_) for bin_ in bins([batch.lengths[row] for row in rows], rows, most_tokens)]
    missing = world.most(len(micros)) - len(micros)
    shortest = min(range(len(batch.lengths)), key=batch.lengths.__getitem__)
    return micros + [take(batch, [shortest])._replace(is_surplus=True)] * missing


def bins(lengths: Sequence[int], rows: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Puts each of `rows` into a bin, by first fit, the longest first; rows ascend inside a bin."""
    filled: list[list[int]] = []
    room: list[int] = []
    for length, row in sorted(zip(lengths, rows, strict=True), key=lambda pair: -pair[0]):
        place = next((i for i, left in enumerate(room) if length <= left), None)
        if place is None:
            filled.append([row])
            room.append(most_tokens - length)
        else:
            filled[place].append(row)
            room[place] -= length
    return [sorted(bin_) for bin_ in filled]


def take(batch: Rollouts, rows: Sequence[int]) -> MicroBatch:
    """Returns these sequences as a micro-batch, without waiting for a device."""
    device = batch.ids.device
    lengths, prompts = (torch.tensor([known[row] for row in rows]) for known in (batch.lengths, batch.prompts))
    ends = lengths.cumsum(0)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).int()
    position_ids = torch.arange(int(ends[-1])) - (ends - lengths).repeat_interleave(lengths)
    starts = torch.tensor(batch.lengths).cumsum(0)[list(rows)] - lengths
    place = send(position_ids + starts.repeat_interleave(lengths), device)
    answers = (position_ids >= prompts.repeat_interleave(lengths)).nonzero().flatten()
    return MicroBatch(
        batch.ids[place][None],
        send(position_ids, device)[None],
        send(bounds, device),
        tuple(bounds.tolist()),
        int(lengths.max()),
        place,
        send(answers, device),
        send(torch.tensor(rows), device),
    )
