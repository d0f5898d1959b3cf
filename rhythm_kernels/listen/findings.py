"""Keeps what is known once the device has run a forward: its times, and whether its layers attend as assumed."""

import torch
from torch import Tensor

from rhythm_kernels.host import fetch
from rhythm_kernels.listen.clock import Clock
from rhythm_kernels.ranks import Ranks
from rhythm_kernels.statistics.poison import factor_of
from rhythm_kernels.statistics.probes import Deviation
from rhythm_kernels.tensor_checks import can_look


class Findings:
    """The deviations and times of one forward.

    They are small, so many forwards can be kept until the host waits for the device once.
    """

    def __init__(self):
        self.clock, self.check_clock = Clock(), Clock()
        self._deviations: list[tuple[int, str, Deviation, str]] = []
        self._ranks: list[tuple[str, Tensor]] = []

    @property
    def seconds(self) -> float:
        """Seconds spent on the statistics, including their check; waits for a GPU."""
        return self.clock.seconds()

    @property
    def check_seconds(self) -> float:
        """The part of `seconds` spent on checking the layers' outputs; waits for a GPU."""
        return self.check_clock.seconds()

    def add(self, layer: int, worst: list[tuple[str, Deviation]], hints: str) -> None:
        """Keeps the worst deviations of a layer by name. On a CPU, raises if one is a mismatch.

        Args:
            hints: sentences for the error, each with a space before it.
        """
        deviations = [(layer, name, deviation, hints) for name, deviation in worst]
        if deviations and can_look(deviations[0][2].excess):
            _refuse(deviations)
        else:
            self._deviations += deviations

    def poison(self) -> Tensor | None:
        """Returns NaN if a layer does not attend as assumed, here or on a rank that told so, else 1, 0-dim fp32.

        None if `add` has checked all, and no rank has told anything.
        """
        factors = [told.prod() for _, told in self._ranks]
        if self._deviations:
            factors.append(factor_of(torch.stack([deviation.excess for _, _, deviation, _ in self._deviations]).amax()))
        return torch.stack(factors).prod() if factors else None

    def tell(self, ranks: Ranks, device: torch.device) -> None:
        """Tells the ranks of a group what this rank knows, and keeps what they tell, so that `check` raises on all.

        All of them call it, one without heads too. Nothing is told on a CPU, where `add` has raised.

        Args:
            device: that of the model.
        """
        known = torch.ones((), device=device)
        if can_look(known):
            return
        poison = self.poison()
        self._ranks.append((ranks.name, torch.stack(ranks.gather(known if poison is None else poison))))

    def check(self) -> None:
        """Raises if a layer's output or log-sum-exp is not that of the map that its statistics assume.

        On a CPU `add` raises this error. On a GPU the host does not wait for the forward: call `check`.

        Raises:
            ValueError: names the layer, the token, the head and both values; or the rank that raises that error.
        """
        _refuse(self._deviations)
        for name, factors in self._ranks:
            [broken] = fetch([factors.isnan().nonzero().flatten()])
            if len(broken):
                raise ValueError(f"a layer does not attend as collect assumes on rank {int(broken[0])} of {name}")


def _refuse(deviations: list[tuple[int, str, Deviation, str]]) -> None:
    if not deviations:
        return
    [excesses] = fetch([torch.stack([deviation.excess for _, _, deviation, _ in deviations])])
    for excess, (layer, name, deviation, hints) in zip(excesses.tolist(), deviations, strict=True):
        if excess > 1:
            row, token, head = deviation.place.tolist()
            got, expected, allowed = deviation.values.tolist()
            if name == "log-sum-exp":
                hints += ' With lse="own" the statistics compute it themselves.'
            raise ValueError(
                f"layer {layer} does not attend as collect assumes: the {name} of token {token} of row {row}, head "
                f"{head}, is {got:.6g} where the assumed attention map gives {expected:.6g}, and rounding explains "
                f"{allowed:.2g}.{hints}"
            )
