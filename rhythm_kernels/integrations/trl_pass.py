"""Describes the log-prob pass of TRL's trainer and reads its attention.

Shapes: B rows of a batch, P tokens of the longest prompt, C of the longest completion.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rhythm_kernels.integrations.virtual_tokens import VirtualTokensCollector, virtual_tokens
from rhythm_kernels.listen.collect import collect
from rhythm_kernels.listen.collector import Collector
from rhythm_kernels.options import CreditOptions
from rhythm_kernels.types import HeadGroups, Rhythm


class Readings:
    """Reads the statistics of each forward of a model in this context: a pass runs one forward for each chunk of rows.

    Args:
        response_mask: [B, P + C] bool, R.
        groups: head groups of an earlier pass; None: each forward ranks its own heads.
    """

    def __init__(self, credit: CreditOptions, model: nn.Module, response_mask: Tensor, groups: HeadGroups | None):
        self.credit, self.model, self.groups = credit, model, groups
        self.response_mask = response_mask
        self.virtual = virtual_tokens(model)
        self.rows_seen = 0
        self._collectors: list[Collector] = []
        self._rhythms: list[Rhythm] = []
        self._open: Collector | None = None

    def __enter__(self) -> "Readings":
        self._hooks = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after),
        ]
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()
        self._close()

    def _close(self) -> None:
        if self._open is not None:
            self._open.__exit__()
            self._open = None

    def _before(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        rows = len(kwargs["input_ids"])
        response_mask = self.response_mask[self.rows_seen : self.rows_seen + rows]
        self.rows_seen += rows
        options = self.credit.collect_arguments | {"groups": self.groups}
        if self.virtual:
            collector = VirtualTokensCollector(model, self.virtual, response_mask, **options)
        else:
            collector = collect(model, response_mask=response_mask, **options)
        self._open = collector.__enter__()

    def _after(self, *_) -> None:
        collector = self._open
        self._close()
        self._collectors.append(collector)
        self._rhythms.append(collector.rhythm())
        collector.stats.clear()  # frees [B, HQ, T] tensors of each layer

    def rhythm(self, completion: int) -> Rhythm:
        """Returns WAAD and FAI of the last `completion` tokens of all rows, [B, C]."""
        if self.rows_seen != len(self.response_mask):
            raise RuntimeError(f"the log-prob pass ran over {self.rows_seen} of {len(self.response_mask)} rows")
        waad, fai = (torch.cat(parts)[:, -completion:] for parts in list(zip(*self._rhythms, strict=True))[:2])
        return Rhythm(waad, fai)

    def check(self) -> None:
        """Raises ValueError if a layer did not attend as its statistics assume; waits for a GPU."""
        for collector in self._collectors:
            collector.check()

    @property
    def seconds(self) -> float:
        """Seconds spent on the statistics; waits for a GPU."""
        return sum(collector.seconds for collector in self._collectors)

    def pooled_spans(self) -> tuple[Tensor, Tensor]:
        """Returns the pooled spans of a calibration and their number of tokens.

        Returns:
            (spans times tokens of R, summed over sequences, [L, HQ] fp64; tokens of R, 0-dim int64).
        """
        total, begin = 0.0, 0
        for rhythm in self._rhythms:
            end = begin + len(rhythm.waad)
            tokens = self.response_mask[begin:end].sum(-1)
            # spans are [B, L, HQ], or [L, HQ] where one ranking serves all rows of a forward
            total = total + (rhythm.spans.double() * tokens[:, None, None]).sum(0)
            begin = end
        return total, self.response_mask.sum()


@dataclass
class Pass:
    """The awaited log-prob pass of the policy: the next one of this model over these tokens."""

    model: nn.Module
    ids: Tensor | None = None
    """[B, P + C]: prompt and completion; None accepts any tokens."""
    tool_mask: Tensor | list[list[int]] | None = None
    is_open: bool = True
    """Whether the next pass can be the awaited one; False while a rollout runs."""
    reads: bool = True
    """Whether its credit is read."""
    gamma: Tensor | None = None
    """[B, C] fp32, after the pass, or from an earlier one."""
    log_probs: Tensor | None = None
    """[B, C], after the pass, without a gradient."""
    response_mask: Tensor | None = None
    """[B, C] bool, R: completion tokens that are trained on."""
    rhythm: Rhythm | None = None
    """waad and fai [B, C]."""
    readings: Readings | None = None

    def is_of(self, model: nn.Module, ids: Tensor) -> bool:
        """Returns whether a pass of this model over these tokens is the awaited one."""
        waits = self.is_open and self.log_probs is None and model is self.model
        return waits and (self.ids is None or torch.equal(ids, self.ids))


# ---- TRL's batches ---------------------------------------------------------------------------------------------------


def ids_of(batch) -> Tensor:
    """Returns prompt and completion, [B, P + C]."""
    return torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)


def mask_of(batch) -> Tensor:
    """Returns 1 at the completion tokens that TRL trains on, else 0, [B, C]."""
    mask = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


def completion_mask(valid: Tensor, tool_mask: Tensor | list[list[int]] | None) -> Tensor:
    """Returns R, [B, C] bool: completion tokens that are valid and, with tools, not a tool's.

    Args:
        valid: [B, C] of 0 and 1.
        tool_mask: 0 at a tool's tokens, [B, C] or one list for each row.
    """
    mask = valid.bool()
    if tool_mask is None:
        return mask
    if not isinstance(tool_mask, Tensor):
        # TRL counts tokens after a list's end as the model's
        padded = torch.ones(mask.shape, dtype=torch.bool, device="cpu")
        for row, of_model in zip(padded, tool_mask, strict=True):
            row[: len(of_model)] = torch.tensor(of_model, dtype=torch.bool, device="cpu")
        tool_mask = padded.to(mask.device)
    return mask & tool_mask.bool()
