"""Keeps head groups for several steps, and measures how far they drift from one calibration to the next."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rhythm_kernels.checks import check_float, check_int
from rhythm_kernels.heads import group_heads
from rhythm_kernels.tensor_checks import check_tensor
from rhythm_kernels.types import HeadGroups


class GroupDrift(NamedTuple):
    """How far the heads' ranking by span moved from one calibration to the next."""

    spearman: float
    """Spearman's correlation of both calibrations' spans over all heads, -1 to 1; NaN if all spans of one are equal."""
    local_overlap: float
    """The share of the local heads that were local before, 0 to 1."""
    global_overlap: float
    """The share of the global heads that were global before, 0 to 1."""


class GroupSchedule:
    """The head groups of a run: ranked at every n-th step, and kept for the steps between.

        schedule = GroupSchedule(every=8)
        while training:
            for micro_batch in step:
                with torch.no_grad(), collect(
                    model, response_mask=mask, groups=schedule.groups, group_by="batch"
                ) as c:
                    model(...)
                rhythm = c.rhythm()
                schedule.add(rhythm.spans, mask.sum(-1))
            drift = schedule.advance()

    The first step is a calibration, then every `every`-th. Each pass of a calibration computes spans and groups the
    heads by them. `add` pools the spans into one span for each head, the mean over all tokens of R (Eq. 7), or its
    estimate where `collect` reads the spans from a sample (`span_rows`). The groups of the pooled spans serve from the
    next step on, for all sequences. With `every=1` no groups are kept: each pass ranks its own heads, by sequence or
    batch (the paper), and `advance` returns the drift from step to step.

    Each process has its own pool, which is summed in fp64 in the order of the calls.

    Args:
        every: steps from one calibration to the next.
        local_fraction, global_fraction: fractions of local and global heads, as in `group_heads` and `collect`.

    Raises:
        TypeError, ValueError: wrong arguments.
    """

    def __init__(self, every: int = 1, *, local_fraction: float = 0.3, global_fraction: float = 0.3):
        self.every = check_int("every", every, 1)
        self._fractions = {
            "local_fraction": check_float("local_fraction", local_fraction, 0.0, 1.0),
            "global_fraction": check_float("global_fraction", global_fraction, 0.0, 1.0),
        }
        self.load_state_dict({"age": 0, "spans": None})

    @property
    def groups(self) -> HeadGroups | None:
        """The groups for the passes of this step, [L, HQ] on the CPU; None at a calibration."""
        return self._groups if self._age < self.every else None

    def add(self, spans: Tensor | None, tokens: Tensor) -> None:
        """Pools the spans of one pass of a calibration.

        Args:
            spans: `rhythm.spans`: [B, L, HQ], or [L, HQ] over the whole pass; floating, in tokens. None adds
                nothing: a pass that was given groups has no spans.
            tokens: [B] int64 or int32: the number of tokens of R in each sequence of the pass (packed: [S]).

        Raises:
            TypeError, ValueError: wrong type, shape, dtype or device; other layers or heads than before.
            RuntimeError: spans between two calibrations, from a pass that was not given `groups`.
        """
        if spans is None:
            return
        if self.groups is not None:
            raise RuntimeError(
                f"spans arrived at step {self._age + 1} of {self.every}, between two calibrations: "
                "give the pass groups=schedule.groups"
            )
        floating = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
        check_tensor("spans", spans, self._size if getattr(spans, "ndim", 3) == 2 else ["B", *self._size], floating)
        sequences = len(spans) if spans.ndim == 3 else "B"
        check_tensor("tokens", tokens, [sequences], [torch.int64, torch.int32], spans.device)
        self._sum = self._sum + (spans.double() * tokens[:, None, None]).sum(0)
        self._tokens = self._tokens + tokens.sum()
        self._size = list(spans.shape[-2:])

    def advance(self) -> GroupDrift | None:
        """Ends the step. A calibration ranks the groups for the next steps and returns their drift.

        Returns None at the first calibration and between calibrations. At a calibration the host waits for the device.

        Raises:
            RuntimeError: a calibration had no token of R.
            ValueError: a span is NaN, or the fractions leave no disjoint groups (`group_heads`).
        """
        if self.groups is not None:
            self._age += 1
            return None
        if not self._tokens:
            raise RuntimeError(
                "a calibration without a token of R: add() the spans of its passes before advance(), got none"
            )
        before_spans, before = self._spans, self._groups
        self.load_state_dict({"age": 1, "spans": (self._sum / self._tokens).float().cpu()})
        if before is None:
            return None
        return GroupDrift(
            spearman(before_spans, self._spans),
            overlap(before.local_heads, self._groups.local_heads),
            overlap(before.global_heads, self._groups.global_heads),
        )

    def state_dict(self) -> dict[str, int | Tensor | None]:
        """Returns the state between two steps: the age of the groups in steps, and their spans, [L, HQ] fp32 or None.

        Raises:
            RuntimeError: the step is a calibration that has begun.
        """
        if isinstance(self._tokens, Tensor):
            raise RuntimeError("state_dict in the middle of a calibration: advance() first")
        return {"age": self._age, "spans": self._spans}

    def load_state_dict(self, state: Mapping[str, int | Tensor | None]) -> None:
        """Sets the state that `state_dict` returned.

        Raises:
            TypeError, ValueError: `state` is not such a state.
        """
        if set(state) != {"age", "spans"}:
            raise ValueError(f"state must have age and spans, got {sorted(state)}")
        age, spans = check_int("age", state["age"], 0), state["spans"]
        groups = None
        if spans is not None:
            spans = check_tensor("spans", spans, ["L", "HQ"], [torch.float32]).cpu()
            groups = group_heads(spans, **self._fractions)
        self._age, self._spans, self._groups = age, spans, groups
        self._size = ["L", "HQ"] if spans is None else list(spans.shape)
        self._sum = self._tokens = 0


def spearman(a: Tensor, b: Tensor) -> float:
    """Returns Spearman's correlation of two tensors of one shape: Pearson's of their ranks; NaN if one is constant."""
    x, y = _centred_ranks(a), _centred_ranks(b)
    return (x @ y / (x @ x * (y @ y)).sqrt()).item()  # ranks are half integers, so only root and quotient round


def overlap(before: Tensor, now: Tensor) -> float:
    """Returns the share of the group `now` that was in `before`, bool of one shape; 1 for an empty group."""
    size = int(now.sum())
    return int((before & now).sum()) / size if size else 1.0


def _centred_ranks(x: Tensor) -> Tensor:
    """Returns the rank of each value minus the mean rank, fp64; equal values have the mean of their ranks."""
    _, place, counts = x.flatten().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    ranks = last - (counts.double() - 1) / 2
    return ranks[place] - (x.numel() + 1) / 2
