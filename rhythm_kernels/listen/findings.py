"""Keeps what is known of a forward only once the device has run it: whether its layers attend as assumed, and times."""

import torch
from torch import Tensor

from rhythm_kernels.host import fetch
from rhythm_kernels.listen.clock import Clock
from rhythm_kernels.statistics.poison import factor_of
from rhythm_kernels.statistics.probes import Deviation
from rhythm_kernels.tensor_checks import can_look


class Findings:
    """The deviations and times of one forward.

    They are small: those of many forwards can be kept until the host waits for the device, once for all of them.
    """

    def __init__(self):
        self.clock, self.check_clock = Clock(), Clock()
        self._deviations: list[tuple[int, str, Deviation, str]] = []

    @property
    def seconds(self) -> float:
        """Seconds spent in the statistics, their check included; on a GPU this waits for them."""
        return self.clock.seconds()

    @property
    def check_seconds(self) -> float:
        """Seconds of these in which the layers' outputs were checked; on a GPU this waits for them."""
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
        """Returns NaN if a layer does not attend as assumed, else 1, 0-dim fp32; None where `add` has looked."""
        if not self._deviations:
            return None
        worst = torch.stack([deviation.excess for _, _, deviation, _ in self._deviations]).amax()
        return factor_of(worst)

    def check(self) -> None:
        """Raises where a layer's output or log-sum-exp is not that of the map that its statistics assume.

        On a CPU the forward itself has raised. On a GPU this does, since the host does not wait for the forward.

        Raises:
            ValueError: names the layer, the token, the head and both values.
        """
        _refuse(self._deviations)


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
