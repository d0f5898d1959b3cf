"""What a run inside another trainer sets, and what that means: collect with it, gamma from it, numbers to log."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rhythm_kernels.attention.options import MAX_WINDOW
from rhythm_kernels.checks import check_bool, check_choice, check_float, check_horizon, check_int, check_tensor
from rhythm_kernels.collect import Collector, collect
from rhythm_kernels.credit import MOST_AMP, STRATEGIES, token_credit
from rhythm_kernels.group_schedule import GroupSchedule
from rhythm_kernels.signals import GROUPS_PER
from rhythm_kernels.types import HeadGroups, Rhythm

READS_ATTENTION = ("local", "global", "coupled")


@dataclass(frozen=True, kw_only=True)
class CreditOptions:
    """The credit options of a run; names, meaning and defaults are those of `collect` and `token_credit`.

    Raises:
        TypeError, ValueError: an option of the wrong type or value, when it is made.
    """

    strategy: str = "coupled"
    """What multiplies a token's positive advantage: none, random, entropy, local, global or coupled."""
    q: float = 0.4
    """Share of a response's tokens that is selected."""
    amp: float = 1.5
    """Factor of a selected token."""
    alpha: float = 0.5
    """Share of a dominated anchor's credit that moves to its opening."""
    k: int = 3
    """Tokens before an anchor in which its opening may lie."""
    largest: bool = True
    """Select the largest values, or the smallest (the paper's ablation)."""
    layers: int | tuple[int, ...] = 5
    """How many layers of the middle third are read, or their indices."""
    window: int = 10
    """WAAD clips distances at this many tokens."""
    horizon: tuple[int, int | None] = (10, 50)
    """FAI counts attention from so many tokens later to so many; None: to the end."""
    local: float = 0.3
    """Share of all heads that are local."""
    global_: float = 0.3
    """Share of all heads that are global."""
    groups_per: str = "sequence"
    """Rank heads by each sequence's own spans, or by those of the whole pass ("batch")."""
    groups_every: int = 1
    """Steps that a ranking of the heads serves; above 1 it is that of all sequences of its step."""
    seed: int = 0
    """Of the strategy "random"."""

    def __post_init__(self):
        check_choice("strategy", self.strategy, STRATEGIES)
        check_float("q", self.q, 0.0, 1.0)
        check_float("amp", self.amp, 0.0, MOST_AMP)
        check_float("alpha", self.alpha, 0.0, 1.0)
        check_int("k", self.k, 1, 2**63 - 1)
        check_bool("largest", self.largest)
        if isinstance(self.layers, Sequence) and not isinstance(self.layers, str):
            object.__setattr__(self, "layers", tuple(check_int("layers", layer, -(2**31)) for layer in self.layers))
            if not self.layers:
                raise ValueError("layers must be an int or a list of layer indices, got an empty list")
        else:
            check_int("layers", self.layers, 1)
        check_int("window", self.window, 1, MAX_WINDOW)
        object.__setattr__(self, "horizon", check_horizon(self.horizon))
        if check_float("local", self.local, 0.0, 1.0) + check_float("global_", self.global_, 0.0, 1.0) > 1:
            raise ValueError(f"local and global_ must leave disjoint groups, got {self.local} and {self.global_}")
        check_choice("groups_per", self.groups_per, GROUPS_PER)
        check_int("groups_every", self.groups_every, 1)
        check_int("seed", self.seed, 0, 2**32 - 1)

    @property
    def reads_attention(self) -> bool:
        return self.strategy in READS_ATTENTION

    @property
    def reads_entropy(self) -> bool:
        return self.strategy == "entropy"

    def schedule(self) -> GroupSchedule:
        """The head groups of a run."""
        return GroupSchedule(self.groups_every, local=self.local, global_=self.global_)

    def collect(self, model: nn.Module, response_mask: Tensor, groups: HeadGroups | None = None) -> Collector:
        """`collect` with these options; groups as of `GroupSchedule.groups`, None at a calibration."""
        return collect(model, response_mask=response_mask, groups=groups, **self.collect_options)

    @property
    def collect_options(self) -> dict:
        """The arguments of `collect` that these options set."""
        return {
            "layers": list(self.layers) if isinstance(self.layers, tuple) else self.layers,
            "window": self.window,
            "horizon": self.horizon,
            "groups_per": self.groups_per,
            "local": self.local,
            "global_": self.global_,
        }

    def gamma(
        self,
        mask: Tensor,
        *,
        rhythm: Rhythm | None = None,
        entropy: Tensor | None = None,
        draw: int = 0,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """`token_credit` with these options: [B, T] fp32. `draw` tells one call of "random" from another."""
        return token_credit(
            self.strategy,
            mask=mask,
            rhythm=rhythm,
            entropy=entropy,
            q=self.q,
            amp=self.amp,
            alpha=self.alpha,
            k=self.k,
            largest=self.largest,
            seed=(self.seed << 32) + draw % 2**32,
            cu_seqlens=cu_seqlens,
        )


def credit_sums(gamma: Tensor, mask: Tensor, rhythm: Rhythm | None = None) -> dict[str, Tensor]:
    """What a run logs about a part of its batch, as sums: they add up over parts and ranks.

    Returns:
        Sums by name, 0-dim fp64 on the device of gamma. "tokens" (of R) is what the others are divided by; they are
        "rhythm/gamma_mean", "rhythm/credited_share" and, with a rhythm, "rhythm/waad_mean" (tokens) and
        "rhythm/fai_mean".
    """
    check_tensor("gamma", gamma, ["B", "T"])
    check_tensor("mask", mask, list(gamma.shape), [torch.bool], gamma.device)
    values = {"tokens": torch.ones_like(gamma), "rhythm/gamma_mean": gamma, "rhythm/credited_share": gamma != 1}
    if rhythm is not None:
        values |= {"rhythm/waad_mean": rhythm.waad, "rhythm/fai_mean": rhythm.fai}
    return {name: value.double().masked_fill(~mask, 0.0).sum() for name, value in values.items()}


def credit_means(sums: dict[str, float]) -> dict[str, float]:
    """The metrics of sums; nothing where there was no token."""
    tokens = sums["tokens"]
    return {name: total / tokens for name, total in sums.items() if name != "tokens"} if tokens else {}
