"""A step's metrics, under TRL's names where TRL has one, to metrics.jsonl and TensorBoard."""

import json
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from rhythm_kernels import CreditOptions, coupled_sets, find_peaks
from train.batch import Rollouts
from train.distributed import World
from train.reading import TokenStats

FILE = "metrics.jsonl"
UNVERIFIED = "most answers could not be verified, and got 0 whatever they say"
TOTAL = -1.0  # in place of a count: a sum, not a mean


class MetricsLog:
    """Appends to a run's metrics, after cutting off what was written beyond `size` bytes, of steps after `step`.

    Only the first rank writes. `missing` says how many of those bytes are not there, as where checkpoints alone were
    copied.
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

    def write(self, step: int, metrics: dict[str, float]):
        if self.file is None:
            return
        self.file.write(json.dumps({"step": step, **metrics}).encode() + b"\n")
        self.file.flush()
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)

    def flush(self) -> int:
        """Has the disk hold everything written so far, and returns its size in bytes."""
        if self.file is None:
            return 0
        self.file.flush()
        os.fsync(self.file.fileno())
        self.board.flush()
        return self.file.seek(0, os.SEEK_END)

    def close(self):
        if self.file is not None:
            self.flush()
            self.file.close()
            self.board.close()


def whole_lines(path: Path, step: int, size: int) -> int:
    """The bytes, of the first `size` of a file that may not be there, up to what is no line of a step up to `step`."""
    kept = 0
    if path.exists():
        with path.open("rb") as file:
            for line in file.read(size).splitlines(keepends=True):
                if not line.endswith(b"\n") or not is_record(line, step):
                    break
                kept += len(line)
    return kept


def is_record(line: bytes, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, TypeError, KeyError):
        return False


def read_metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / FILE).read_text(encoding="utf-8").splitlines()]


class Gathered:
    """Means and extremes over all ranks, summed on the device and read from it once; a mean of nothing is left out."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        self.most: dict[str, Tensor] = {}

    def mean(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        """Of the values of all ranks, or of those where a mask of their shape is True."""
        if where is None:
            where = torch.ones_like(values, dtype=torch.bool)
        # an index by the mask would have the host wait for its length
        self.sums[name] = (values.double().where(where, 0.0).sum(), where.sum().double())

    def share(self, name: str, part: Tensor, whole: Tensor) -> None:
        """The part's True values over the whole's."""
        self.sums[name] = (part.sum().double(), whole.sum().double())

    def total(self, name: str, value: float) -> None:
        self.sums[name] = (self._scalar(value), self._scalar(TOTAL))

    def largest(self, name: str, values: Tensor) -> None:
        self.most[name] = values.max().double()

    def _scalar(self, value: float) -> Tensor:
        return torch.full((), value, dtype=torch.float64, device=self.device)

    def reduce(self, world: World) -> dict[str, float]:
        sums, counts = zip(*self.sums.values(), strict=True)
        means, most = world.sum(torch.stack([*sums, *counts])), world.largest(torch.stack([*self.most.values()]))
        read = torch.cat([means, most]).tolist()
        sums, counts, most = read[: len(sums)], read[len(sums) : -len(most)], read[-len(most) :]
        of_names = zip(self.sums, sums, counts, strict=True)
        found = {name: total if count < 0 else total / count for name, total, count in of_names if count}
        return found | dict(zip(self.most, most, strict=True))


def rollout_metrics(
    batch: Rollouts,
    rewards: Tensor,
    num_generations: int,
    old: TokenStats,
    gamma: Tensor,
    credit: CreditOptions,
    world: World,
) -> dict[str, float]:
    """Of one step's answers over all ranks; rewards [B], gamma [N]."""
    mask, found = batch.response_mask, Gathered(world.device)
    lengths = batch.per_sequence(mask.long())
    deviations = rewards.view(-1, num_generations).std(-1)
    found.mean("reward", rewards)
    found.mean("reward_std", deviations)
    found.mean("frac_reward_zero_std", deviations == 0)
    found.mean("completions/mean_length", lengths)
    found.mean("completions/mean_terminated_length", lengths, batch.finished)
    found.mean("completions/clipped_ratio", ~batch.finished)
    found.largest("completions/max_length", lengths)
    found.largest("completions/min_length", -lengths)
    found.total("num_tokens", len(batch.ids))
    known = mask & old.log_probs.isfinite()  # a single step's own pass leaves out answers without an advantage
    found.mean("entropy", old.entropy, known)
    gap = (old.log_probs - batch.log_probs).where(known, 0.0)
    found.mean("sampling/sampling_logp_difference/mean", gap.abs(), known)
    found.largest("sampling/sampling_logp_difference/max", gap.abs())
    found.mean("sampling/importance_sampling_ratio/mean", gap.exp(), known)
    found.mean("rhythm/gamma_mean", gamma, mask)
    found.mean("rhythm/credited_share", gamma != 1, mask)
    if old.rhythm is not None:
        _rhythm_metrics(found, batch, old, known, credit)
    metrics = found.reduce(world)
    metrics["completions/min_length"] *= -1
    return metrics | {
        f"rhythm/groups_{name}": value for name, value in (old.drift._asdict() if old.drift else {}).items()
    }


def _rhythm_metrics(found: Gathered, batch: Rollouts, old: TokenStats, known: Tensor, credit: CreditOptions) -> None:
    mask = batch.response_mask
    packed = {"cu_seqlens": batch.cu_seqlens}
    sets = coupled_sets(mask[None], old.rhythm, **credit.set_arguments, **packed)
    peaks = find_peaks(old.rhythm.waad, mask[None], **packed)[0]
    found.mean("rhythm/waad_mean", old.rhythm.waad[0], mask)
    found.mean("rhythm/fai_mean", old.rhythm.fai[0], mask)
    found.share("rhythm/dominated_anchors", sets.dominated, sets.anchors)
    found.share("rhythm/anchors_that_are_preplan", sets.preplan & sets.anchors, sets.anchors)
    found.mean("rhythm/entropy_at_waad_peaks", old.entropy, peaks & known)


def memory_metrics(old: TokenStats, device: torch.device) -> dict[str, float]:
    """GiB: the most held since the last call (on a GPU; else by the process so far), and by the statistics of it."""
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
    """Why this step taught nothing, if so."""
    found = set()
    if metrics.get("rewards/error_share", 0) > 0.5:
        found.add(UNVERIFIED)  # and so nothing is known of how hard the task is
    elif metrics["frac_reward_zero_std"] == 1:
        found.add(
            f"every group's answers got equal rewards (mean {metrics['reward']:.2f}), so no advantage differs from 0; "
            "an easier or a harder task, or more --num-generations, would spread them"
        )
    if metrics["completions/clipped_ratio"] == 1:
        found.add("every answer was cut off at the length limit; raise --max-completion-length")
    return found
