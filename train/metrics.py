"""Computes the metrics of a step, with TRL's names if it has them; writes them as JSON lines and to TensorBoard."""

import json
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from rhythm_kernels import CreditOptions, coupled_sets, find_peaks
from rhythm_kernels.integrations.metrics import rises
from train.batch import Rollouts
from train.distributed import World
from train.loss import Groups
from train.reading import TokenStats

FILE = "metrics.jsonl"
UNVERIFIED = "most answers could not be verified, and got 0 whatever they say"
TOTAL = -1.0  # in place of a count: the metric is a sum, not a mean


class MetricsLog:
    """Appends to a run's metrics; first cuts off what lies beyond `size` bytes or belongs to steps after `step`.

    Only the first rank writes. `missing` says how many of the `size` bytes are missing, for example if only the
    checkpoints of a run were copied.
    """

    def __init__(self, run: Path, step: int, size: int, world: World):
        self.file = self.board = None
        self.missing = ""
        if world.is_first:
            kept = whole_lines(run / FILE, step, size)
            if kept < size:
                self.missing = (
                    f"{run / FILE} lacks {size - kept:,} of the {size:,} bytes that the run had written up to step "
                    f"{step}: the curve and the report are without them"
                )
            self.file = open(run / FILE, "ab")  # noqa: SIM115
            self.file.truncate(kept)
            self.board = SummaryWriter(run / "tensorboard", purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if self.file is None:
            return
        self.file.write(json.dumps({"step": step, **metrics}).encode() + b"\n")
        self.file.flush()
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)

    def flush(self) -> int:
        """Writes everything through to the disk, and returns the size of the file in bytes."""
        if self.file is None:
            return 0
        self.file.flush()
        os.fsync(self.file.fileno())
        self.board.flush()
        return self.file.seek(0, os.SEEK_END)

    def close(self) -> None:
        if self.file is not None:
            self.flush()
            self.file.close()
            self.board.close()


def whole_lines(path: Path, step: int, size: int) -> int:
    """Returns how many of the first `size` bytes are whole lines of steps up to `step`; 0 if there is no file."""
    kept = 0
    for line in path.read_bytes()[:size].splitlines(keepends=True) if path.exists() else ():
        try:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
        except (ValueError, TypeError, KeyError, RecursionError):  # not a record of a run
            break
        kept += len(line)
    return kept


def read_metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / FILE).read_text(encoding="utf-8").splitlines()]


def is_evaluation(record: dict[str, float]) -> bool:
    return "reward" not in record


def is_evaluated(run: Path, step: int) -> bool:
    """Returns whether a run's metrics have an evaluation after this step."""
    return any(is_evaluation(record) and record["step"] == step for record in read_metrics(run))


class Gathered:
    """Collects means and extremes over all ranks, with one read from the device; leaves out means of nothing."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        self.most: dict[str, Tensor] = {}

    def mean(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        """Adds the mean of the values of all ranks, or of those where a mask of their shape is True."""
        if where is None:
            where = torch.ones_like(values, dtype=torch.bool)
        # indexing by the mask would make the host wait for its length
        self.sums[name] = (values.double().where(where, 0.0).sum(), where.sum().double())

    def share(self, name: str, part: Tensor, whole: Tensor) -> None:
        """Adds the share of `part` in `whole`, both masks."""
        self.sums[name] = (part.sum().double(), whole.sum().double())

    def total(self, name: str, value: float) -> None:
        """Adds the sum of the ranks' values."""
        value, count = (torch.full((), x, dtype=torch.float64, device=self.device) for x in (value, TOTAL))
        self.sums[name] = (value, count)

    def largest(self, name: str, values: Tensor) -> None:
        self.most[name] = values.max().double()

    def reduce(self, world: World) -> dict[str, float]:
        sums, counts = zip(*self.sums.values(), strict=True)
        means, most = world.sum(torch.stack([*sums, *counts])), world.largest(torch.stack([*self.most.values()]))
        read = torch.cat([means, most]).tolist()
        sums, counts, most = read[: len(sums)], read[len(sums) : -len(most)], read[-len(most) :]
        of_names = zip(self.sums, sums, counts, strict=True)
        metrics = {name: total if count < 0 else total / count for name, total, count in of_names if count}
        return metrics | dict(zip(self.most, most, strict=True))


def rollout_metrics(
    batch: Rollouts,
    groups: Groups,
    old: TokenStats,
    gamma: Tensor,
    credit: CreditOptions,
    world: World,
) -> dict[str, float]:
    """Returns the metrics of one step's answers over all ranks; gamma [N]."""
    mask, gathered = batch.response_mask, Gathered(world.device)
    lengths = batch.per_sequence(mask.long())
    gathered.mean("reward", groups.own_rewards)
    gathered.mean("reward_std", groups.rewards.std(-1))  # a group that ranks share counts on each of them: all do
    gathered.mean("frac_reward_zero_std", groups.are_equal)
    gathered.mean("completions/mean_length", lengths)
    gathered.mean("completions/mean_terminated_length", lengths, batch.finished)
    gathered.mean("completions/clipped_ratio", ~batch.finished)
    gathered.largest("completions/max_length", lengths)
    gathered.largest("completions/min_length", -lengths)
    gathered.total("num_tokens", len(batch.ids))
    known = mask & old.log_probs.isfinite()  # a single step's own pass leaves out answers without an advantage
    gathered.mean("entropy", old.entropy, known)
    gap = (old.log_probs - batch.log_probs).where(known, 0.0)
    gathered.mean("sampling/sampling_logp_difference/mean", gap.abs(), known)
    gathered.largest("sampling/sampling_logp_difference/max", gap.abs())
    gathered.mean("sampling/importance_sampling_ratio/mean", gap.exp(), known)
    gathered.mean("rhythm/gamma_mean", gamma, mask)
    gathered.mean("rhythm/credited_share", gamma != 1, mask)
    if old.rhythm is not None:
        packed = {"cu_seqlens": batch.cu_seqlens}
        sets = coupled_sets(mask[None], old.rhythm, **credit.set_arguments, **packed)
        peaks = find_peaks(old.rhythm.waad, mask[None], **packed)[0]
        gathered.mean("rhythm/waad_mean", old.rhythm.waad[0], mask)
        gathered.mean("rhythm/fai_mean", old.rhythm.fai[0], mask)
        gathered.share("rhythm/dominated_anchors", sets.dominated, sets.anchors)
        gathered.share("rhythm/anchors_that_are_preplan", sets.preplan & sets.anchors, sets.anchors)
        gathered.share("rhythm/preplan_rises", sets.preplan & rises(old.rhythm.waad, mask[None]), sets.preplan)
        gathered.mean("rhythm/entropy_at_waad_peaks", old.entropy, peaks & known)
    metrics = gathered.reduce(world)
    metrics["completions/min_length"] *= -1
    drift = old.drift._asdict() if old.drift else {}
    return metrics | {f"rhythm/groups_{name}": value for name, value in drift.items()}


def memory_metrics(old: TokenStats, device: torch.device) -> dict[str, float]:
    """Returns the peak of memory since the last call (on a CPU, that of the process) and of the statistics, in GiB."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return {
        "memory/peak_gib": peak / 2**30,
        "memory/statistics_gib": old.bytes / 2**30,
        "rhythm/statistics_memory_share": old.bytes / peak,
    }


def learning_warnings(metrics: dict[str, float]) -> set[str]:
    """Returns the reasons why a step gave no learning signal; empty if it gave one."""
    reasons = set()
    if metrics.get("rewards/error_share", 0) > 0.5:
        reasons.add(UNVERIFIED)  # so the difficulty of the task is not known
    elif metrics["frac_reward_zero_std"] == 1:
        reasons.add(
            f"every group's answers got equal rewards (mean {metrics['reward']:.2f}), so no advantage differs from 0; "
            "an easier or a harder task, or more --num-generations, would spread them"
        )
    if metrics["completions/clipped_ratio"] == 1:
        reasons.add("every answer was cut off at the length limit; raise --max-completion-length")
    return reasons
