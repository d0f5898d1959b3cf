"""Reads a batch before the update: log-probabilities, entropies and, in the same forward, the rhythm of its tokens.

Shapes: N tokens in the batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rhythm_kernels import GroupDrift, GroupSchedule, Rhythm, collect, sampled_layers
from rhythm_kernels.options import CreditOptions
from train.batch import MicroBatch, Rollouts
from train.config import Config
from train.policy import Policy


class TokenStats(NamedTuple):
    """Holds the values of a batch's tokens; log-probabilities and entropy are None if the model's head did not run."""

    log_probs: Tensor | None
    """[N] fp32, 0 in prompts."""
    entropy: Tensor | None
    """[N] fp32, nats, 0 in prompts."""
    rhythm: Rhythm | None = None
    """WAAD (windowed average attention distance) and FAI (future attention influence), [1, N], if the strategy reads
    them."""
    drift: GroupDrift | None = None
    """The drift of the head groups, if this pass was a calibration after the first."""
    seconds: float = 0.0
    """Seconds spent on the statistics."""
    bytes: int = 0
    """The most memory that the statistics of one micro-batch held."""


def needs_old_log_probs(config: Config) -> bool:
    """Returns False if a batch has a single optimizer step, whose own log-probabilities are then the old ones."""
    grpo = config.grpo
    return grpo.num_iterations * grpo.gradient_steps > 1 or config.credit.reads_entropy


@torch.no_grad()
def read_log_probs(policy: Policy, batch: Rollouts, micros: Sequence[MicroBatch]) -> Tensor:
    """Returns [N] fp32 under a policy that is not trained; 0 in prompts."""
    log_probs = torch.zeros(len(batch.ids), dtype=torch.float32, device=batch.ids.device)
    for micro in micros:
        log_probs[micro.place[micro.answers]] = policy(micro)[0].float()
    return log_probs


@torch.no_grad()
def read_batch(
    policy: Policy,
    batch: Rollouts,
    micros: Sequence[MicroBatch],
    config: Config,
    schedule: GroupSchedule,
    *,
    everything: bool = False,
    progress: Callable[[int], object] = lambda tokens: None,
) -> TokenStats:
    """Runs the old-log-prob pass, and reads the rhythm from its attention calls: nothing is run twice.

    If no old log-probabilities are needed, the forward ends after the last layer that is read. If the strategy reads no
    rhythm either, no forward runs.

    Args:
        micros: the whole batch, in micro-batches.
        schedule: keeps the head groups and takes this pass as one step.
        everything: whether to read also what this run's training does not need.
    """
    reads_log_probs = everything or needs_old_log_probs(config)
    reads_rhythm = everything or config.credit.reads_attention
    if not reads_log_probs and not reads_rhythm:
        return TokenStats(None, None)
    log_probs, entropy = torch.zeros(2, len(batch.ids), dtype=torch.float32, device=batch.ids.device)
    listener = _Listener(policy.decoder, batch, config.credit, schedule) if reads_rhythm else None
    for micro in micros:
        listening = listener.read(micro) if listener and not micro.is_surplus else nullcontext()
        with listening, nullcontext() if reads_log_probs else listener.no_layer_after_the_last():
            new_log_probs, new_entropy = policy(micro, head=reads_log_probs, entropy=True)
        if micro.is_surplus:
            continue
        if reads_log_probs:
            answers = micro.place[micro.answers]
            log_probs[answers], entropy[answers] = new_log_probs.float(), new_entropy.float()
        progress(len(micro.place))
    stats = TokenStats(log_probs, entropy) if reads_log_probs else TokenStats(None, None)
    return listener.finish(stats) if listener else stats


class _Listener:
    """Collects the rhythm of a batch, one micro-batch at a time."""

    def __init__(self, decoder: nn.Module, batch: Rollouts, credit: CreditOptions, schedule: GroupSchedule):
        self.decoder, self.batch, self.credit, self.schedule = decoder, batch, credit, schedule
        self.waad, self.fai = torch.zeros(2, len(batch.ids), dtype=torch.float32, device=batch.ids.device)
        self.answer_lengths = batch.per_sequence(batch.response_mask.long())
        self.findings, self.most_bytes = [], 0

    @contextmanager
    def read(self, micro: MicroBatch) -> Iterator[None]:
        """Reads the rhythm from the forward of `micro` that runs in this block."""
        with collect(
            self.decoder,
            response_mask=self.batch.response_mask[micro.place][None],
            cu_seqlens=micro.bounds,
            groups=self.schedule.groups,
            **self.credit.collect_arguments,
        ) as collected:
            yield
        rhythm = collected.rhythm()
        self.waad[micro.place], self.fai[micro.place] = rhythm.waad[0], rhythm.fai[0]
        self.schedule.add(rhythm.spans, self.answer_lengths[micro.sequences])
        self.findings.append(collected.findings)
        tensors = (t for stats in collected.stats.values() for t in (*stats[:-1], *stats.more.values()))
        held = sum(t.nbytes for t in tensors if t is not None)
        self.most_bytes = max(self.most_bytes, held)

    @contextmanager
    def no_layer_after_the_last(self) -> Iterator[None]:
        """Lets a forward in this block end after the last layer that is read."""
        config = self.decoder.config
        count = config.num_hidden_layers
        config.num_hidden_layers = sampled_layers(count, self.credit.layers)[-1] + 1
        try:
            yield
        finally:
            config.num_hidden_layers = count

    def finish(self, stats: TokenStats) -> TokenStats:
        """Adds the rhythm to `stats`. Waits for a GPU here only, once all its work has been queued."""
        for findings in self.findings:
            findings.check()
        return stats._replace(
            rhythm=Rhythm(waad=self.waad[None], fai=self.fai[None]),
            drift=self.schedule.advance(),
            seconds=sum(findings.seconds for findings in self.findings),
            bytes=self.most_bytes,
        )
