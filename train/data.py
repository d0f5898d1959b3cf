"""Determines the order of the training problems."""

import torch

from rhythm_kernels.tasks import Problem


class ProblemStream:
    """Repeats `problems` in endless seeded epochs; its whole state is the cursor (epoch, position)."""

    def __init__(self, problems: list[Problem], seed: int):
        self.problems, self.seed = problems, seed
        self.load_state_dict({"epoch": 0, "position": 0})

    def take(self, count: int) -> list[Problem]:
        """Returns the next `count` problems; a new epoch begins when one ends."""
        taken = []
        while len(taken) < count:
            if self.position == len(self.problems):
                self.load_state_dict({"epoch": self.epoch + 1, "position": 0})
            taken.append(self.problems[self.order[self.position]])
            self.position += 1
        return taken

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        self.order = torch.randperm(len(self.problems), generator=generator).tolist()
