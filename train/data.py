"""Determines the order of the training problems, and tells whether they are the same."""

import hashlib
import json

import torch

from rhythm_kernels.tasks import Problem


def fingerprint(problems: list[Problem]) -> str:
    """Returns the number of the problems and a hash of them in their order, by which a continued run knows them."""
    return f"{len(problems)} with SHA-256 {hashlib.sha256(json.dumps(problems).encode()).hexdigest()[:16]}"


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
