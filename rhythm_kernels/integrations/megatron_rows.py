"""Reads a GPTModel's forward over a batch of rows that the trainer packs, or pads, on the way into the model.

    from rhythm_kernels.integrations.megatron_rows import collect_rows

    with collect_rows(model, response_mask, lengths) as c:
        model(packed_ids, None, None, packed_seq_params=packed_seq_params)
    gamma = token_credit("coupled", response_mask, c.rhythm_of_rows())  # [B, T]

Shapes: B rows of T tokens, padded on the right, as the trainer keeps them.
"""

import torch
from torch import Tensor, nn

from rhythm_kernels.host import fetch, send
from rhythm_kernels.integrations.megatron import collect
from rhythm_kernels.ranks import together
from rhythm_kernels.tensor_checks import check_tensor
from rhythm_kernels.types import Rhythm


class collect_rows(collect):  # called like a function, and named like one
    """Opens a context as `megatron.collect` does, for rows of a batch instead of those that the model gets.

    Where each row lies is read from the forward: in a packed row, where `packed_seq_params` says that its sequence
    begins; else in a row of its own. The forward may pad behind each row.

    Args:
        model: a GPTModel, or a wrapper of one.
        response_mask: [B, T] bool, R, on the model's device; of whole rows with context parallelism too.
        lengths: [B] int32 or int64, the number of tokens of each row, its prompt's included; on the same device.
        arguments: others of `megatron.collect`. `stats` have the layout of the forward, not that of the rows.

    Raises:
        TypeError, ValueError: as `megatron.collect`; also for lengths outside 0..T, R behind a row's length (as in rows
            that are padded on the left), and a forward that has not B sequences, or fewer tokens of one than its
            length.
    """

    def __init__(self, model: nn.Module, response_mask: Tensor, lengths: Tensor, **arguments):
        if "cu_seqlens" in arguments:
            raise TypeError("cu_seqlens must be left out: collect_rows reads them from packed_seq_params")
        super().__init__(model, **arguments)
        with together(self._shards.groups if self._shards else ()):
            check_tensor("response_mask", response_mask, ["B", "T"], [torch.bool])
            check_tensor("lengths", lengths, [len(response_mask)], [torch.int32, torch.int64], response_mask.device)
            self._rows_mask = response_mask
            self.valid = valid_places(lengths, response_mask.shape[1])
            """Which places of the batch's rows are tokens, [B, T] bool."""
            given, behind = fetch([lengths, (response_mask & ~self.valid).any(1)])
            self._lengths = given  # on the CPU
            if ((given < 0) | (given > response_mask.shape[1])).any():
                raise ValueError(f"lengths must be from 0 to {response_mask.shape[1]}, got {given.tolist()}")
            if behind.any():
                row = int(behind.nonzero()[0])
                raise ValueError(
                    f"response_mask must be False behind a row's length, got R behind the {given[row]} tokens of row "
                    f"{row}: lengths count the prompt too, and rows must be padded on the right"
                )

    def rhythm_of_rows(self) -> Rhythm:
        """Returns `rhythm()` with WAAD and FAI of the batch's rows, [B, T]; 0 behind a row's length."""
        rhythm = self.rhythm()
        waad, fai = (
            signal.new_zeros(self._rows_mask.shape).masked_scatter_(self.valid, signal[self._token_places])
            for signal in (rhythm.waad, rhythm.fai)
        )
        return rhythm._replace(waad=waad, fai=fai)

    def _read_arguments(self, args: tuple, kwargs: dict) -> dict:
        arguments = super()._read_arguments(args, kwargs)
        ranks, inputs = self._token_ranks(), arguments["input_ids"]
        shape = len(inputs), inputs.shape[1] * (1 if ranks is None else ranks.size)
        check_tensor("response_mask", self._rows_mask, ["B", "T"], [torch.bool], inputs.device)
        room = torch.full((shape[0],), shape[1], device="cpu") if self._real_lengths is None else self._real_lengths
        if len(room) != len(self._lengths) or (self._lengths > room).any():
            raise ValueError(
                f"the model must get {len(self._lengths)} rows of lengths {self._lengths.tolist()}, "
                f"got room for {room.tolist()}"
            )
        rows, columns = self.valid.nonzero(as_tuple=True)
        if self._cu_seqlens is not None:
            begins = send(self._cu_seqlens[:-1].long(), inputs.device)
            rows, columns = torch.zeros_like(rows), columns + begins[rows]
        self._token_places = rows, columns
        mask = torch.zeros(shape, dtype=torch.bool, device=inputs.device)
        self._response_mask = mask.index_put_(self._token_places, self._rows_mask[self.valid])
        return arguments


def valid_places(lengths: Tensor, tokens: int) -> Tensor:
    """Returns which places of rows of so many tokens, padded on the right, are tokens, [B, T] bool; lengths: [B]."""
    return torch.arange(tokens, device=lengths.device) < lengths[:, None]
