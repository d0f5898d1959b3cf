"""A step's metrics, under TRL's names where TRL has one, to metrics.jsonl and TensorBoard."""

import json
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from train.checkpoint import Position
from train.policy import TokenStats
from train.rollout import Rollouts

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends to a run's metrics, after cutting off what was written beyond `position`."""

    def __init__(self, run: Path, position: Position):
        self.file = open(run / FILE, "ab")  # noqa: SIM115
        self.file.truncate(position.metrics_bytes)
        self.board = SummaryWriter(run / "tensorboard", purge_step=position.step + 1)

    def write(self, step: int, metrics: dict[str, float]):
        self.file.write(json.dumps({"step": step, **metrics}).encode() + b"\n")
        self.file.flush()
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)

    def flush(self) -> int:
        """Has the disk hold everything written so far, and returns its size in bytes."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.board.flush()
        return self.file.seek(0, os.SEEK_END)

    def close(self):
        self.flush()
        self.file.close()
        self.board.close()


def read_metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / FILE).read_text().splitlines()]


def rollout_metrics(
    batch: Rollouts, rewards: Tensor, num_generations: int, old: TokenStats, gamma: Tensor
) -> dict[str, float]:
    mask = batch.response_mask
    lengths = mask.sum(-1).float()
    ended = lengths[batch.finished]
    deviations = rewards.view(-1, num_generations).std(-1)
    gap = (old.log_probs - batch.log_probs).abs()[mask]
    metrics = {
        "reward": rewards.mean(),
        "reward_std": deviations.mean(),
        "frac_reward_zero_std": (deviations == 0).float().mean(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1 - batch.finished.float().mean(),
        "completions/mean_terminated_length": ended.mean() if len(ended) else torch.tensor(0.0),
        "num_tokens": batch.attention_mask.sum(),
        "entropy": old.entropy[mask].mean(),
        "sampling/sampling_logp_difference/mean": gap.mean(),
        "sampling/sampling_logp_difference/max": gap.max(),
        "rhythm/gamma_mean": gamma[mask].mean(),
        "rhythm/credited_share": (gamma[mask] != 1).float().mean(),
    }
    if old.rhythm is not None:
        metrics["rhythm/waad_mean"] = old.rhythm.waad[mask].mean()
        metrics["rhythm/fai_mean"] = old.rhythm.fai[mask].mean()
    drift = old.drift._asdict() if old.drift else {}
    return {name: value.item() for name, value in metrics.items()} | {f"groups/{k}": v for k, v in drift.items()}


def learning_warnings(metrics: dict[str, float]) -> set[str]:
    """Why this step taught nothing, if so."""
    found = set()
    if metrics["frac_reward_zero_std"] == 1:
        found.add(
            f"every group's answers got equal rewards (mean {metrics['reward']:.2f}), so no advantage differs from 0; "
            "an easier or a harder task, or more --num-generations, would spread them"
        )
    if metrics["completions/clipped_ratio"] == 1:
        found.add("every answer was cut off at the length limit; raise --max-completion-length")
    return found
