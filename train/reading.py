"""Reads a batch: log-probabilities, entropies and, from the attention of the same forward, the rhythm of its tokens.

A batch with several optimizer steps is read in a pass before them. With a single one, the loss's own forward is that of
the policy that sampled, and is read in place of the pass.
Shapes: N tokens in the batch, n in a micro-batch, m of them in answers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from rhythm_kernels import GroupDrift, GroupSchedule, Rhythm, collect, token_credit
from train.batch import MicroBatch, Rollouts
from train.config import Config
from train.policy import Policy


class TokenStats(NamedTuple):
    """Holds the values of a batch's tokens."""

    log_probs: Tensor
    """[N] fp32, 0 in prompts, NaN in answers that the model's head has not run on."""
    entropy: Tensor
    """[N] fp32, nats, the same."""
    rhythm: Rhythm | None = None
    """WAAD (windowed average attention distance) and FAI (future attention influence), [1, N], if the strategy reads
    them."""
    drift: GroupDrift | None = None
    """The drift of the head groups, if this step was a calibration after the first."""
    seconds: float = 0.0
    """Seconds spent on the statistics."""
    bytes: int = 0
    """The most memory that the statistics of one micro-batch held."""


@torch.no_grad()
def read_log_probs(policy: Policy, batch: Rollouts, micros: Sequence[MicroBatch]) -> Tensor:
    """Returns [N] fp32 under a policy that is not trained; 0 in prompts."""
    log_probs = torch.zeros(len(batch.ids), dtype=torch.float32, device=batch.ids.device)
    for micro in micros:
        log_probs[micro.place[micro.answers]] = policy(micro)[0].float()
    return log_probs


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
    """Reads the whole batch, in these micro-batches, before any update; the arguments are those of `Reader`."""
    reader = Reader(policy, batch, config, schedule, everything=everything)
    reader.read(micros, progress)
    return reader.finish()


class Reader:
    """Reads the tokens of a batch, one micro-batch at a time, and computes their credit.

    With a single optimizer step, `forward` reads what `rows_before` leaves out. The credit of a response depends on
    that response alone, unless this step ranks the heads by the spans of all sequences of a forward: then the rhythm is
    read before, since the update leaves answers out.

    Args:
        schedule: keeps the head groups and takes this batch as one step.
        draw: the seed of the strategy "random".
        everything: whether to read also what this run's training does not need, in `read`.
    """

    def __init__(
        self,
        policy: Policy,
        batch: Rollouts,
        config: Config,
        schedule: GroupSchedule,
        draw: int = 0,
        *,
        everything: bool = False,
    ):
        self.policy, self.batch, self.options, self.schedule, self.draw = policy, batch, config.credit, schedule, draw
        self.reads_rhythm = everything or self.options.reads_attention
        self.has_one_step = not everything and config.grpo.num_iterations * config.grpo.gradient_steps == 1
        """Whether the loss's own log-probabilities are the old ones."""
        is_local = self.options.group_by == "sequence" or schedule.groups is not None
        reads_credit = self.options.reads_entropy or (self.reads_rhythm and is_local)
        self.credits_in_loss = self.has_one_step and reads_credit
        """Whether the credit of a micro-batch is known only after the loss's own forward."""
        self.log_probs = torch.where(batch.response_mask, torch.nan, 0.0)
        self.entropy = self.log_probs.clone()
        self.waad, self.fai = torch.zeros(2, len(batch.ids), dtype=torch.float32, device=batch.ids.device)
        self.answer_lengths = batch.per_sequence(batch.response_mask.long())
        self.findings, self.unchecked, self.most_bytes = [], [], 0

    def rows_before(self, runs: Sequence[bool]) -> list[int]:
        """Returns the answers to read before the update, of which `runs` says what it runs.

        Where the loss's own forward gives the credit, they are the others, so that metrics and head groups are those of
        the whole batch.
        """
        if self.credits_in_loss:
            return [row for row, is_run in enumerate(runs) if not is_run]
        return [] if self.has_one_step and not self.reads_rhythm else [*range(len(runs))]

    @torch.no_grad()
    def read(self, micros: Sequence[MicroBatch], progress: Callable[[int], object] = lambda tokens: None) -> None:
        """Runs forwards without gradients. Without the head they end after the last layer that is read.

        Waits for a GPU at the end only, once all their work has been queued.
        """
        head = not self.has_one_step or self.options.reads_entropy
        if not head and not self.reads_rhythm:
            return
        for micro in micros:
            self._run(micro, self.reads_rhythm, head)
            if not micro.is_surplus:
                progress(len(micro.place))
        self.check()

    def forward(self, micro: MicroBatch) -> Tensor:
        """Runs the loss's own forward and returns log-probabilities [m]; with a single optimizer step, reads it too."""
        if not self.has_one_step:
            return self.policy(micro)[0]
        return self._run(micro, self.reads_rhythm and self.credits_in_loss, True)

    def credit(self, micro: MicroBatch | None = None) -> Tensor:
        """Returns gamma of a micro-batch [n], or of the whole batch [N], from what has been read."""
        whole = slice(None), self.batch.cu_seqlens
        place, cu_seqlens = whole if micro is None else (micro.place, micro.cu_seqlens)
        return token_credit(
            self.options.strategy,
            self.batch.response_mask[place][None],
            Rhythm(self.waad[place][None], self.fai[place][None]) if self.reads_rhythm else None,
            entropy=self.entropy[place][None],
            seed=self.draw,
            cu_seqlens=cu_seqlens,
            **self.options.credit_arguments,
        )[0]

    def check(self) -> None:
        """Raises if a layer did not attend as its statistics assume; waits for a GPU if something is new."""
        for findings in self.unchecked:
            findings.check()
        self.unchecked.clear()

    def finish(self) -> TokenStats:
        """Ends the step of the head groups, and returns what has been read. Waits for a GPU."""
        stats = TokenStats(self.log_probs, self.entropy)
        if not self.reads_rhythm:
            return stats
        return stats._replace(
            rhythm=Rhythm(waad=self.waad[None], fai=self.fai[None]),
            drift=self.schedule.advance(),
            seconds=sum(findings.seconds for findings in self.findings),
            bytes=self.most_bytes,
        )

    def _run(self, micro: MicroBatch, rhythm: bool, head: bool) -> Tensor | None:
        """Runs a micro-batch, reads it, and returns the log-probabilities [m] with their gradients."""
        listening = self._listening(micro) if rhythm and not micro.is_surplus else nullcontext()
        with listening, nullcontext() if head else self._no_layer_after_the_last():
            log_probs, entropy = self.policy(micro, head=head, entropy=head)
        if head and not micro.is_surplus:
            tokens = micro.place[micro.answers]
            self.log_probs[tokens], self.entropy[tokens] = log_probs.detach().float(), entropy.float()
        return log_probs

    @contextmanager
    def _listening(self, micro: MicroBatch) -> Iterator[None]:
        """Reads the rhythm from the forward of `micro` that runs in this block, but not from its recomputation."""
        with collect(
            self.policy.decoder,
            response_mask=self.batch.response_mask[micro.place][None],
            cu_seqlens=torch.tensor(micro.bounds),
            groups=self.schedule.groups,
            **self.options.collect_arguments,
        ) as collected:
            yield
        rhythm = collected.rhythm()
        self.waad[micro.place], self.fai[micro.place] = rhythm.waad[0], rhythm.fai[0]
        self.schedule.add(rhythm.spans, self.answer_lengths[micro.sequences])
        self.findings.append(collected.findings)
        self.unchecked.append(collected.findings)
        tensors = (t for stats in collected.stats.values() for t in (*stats[:-1], *stats.more.values()))
        held = sum(t.nbytes for t in tensors if t is not None)
        self.most_bytes = max(self.most_bytes, held)

    @contextmanager
    def _no_layer_after_the_last(self) -> Iterator[None]:
        """Lets a forward in this block end after the last layer that is read."""
        config = self.policy.decoder.config
        count = config.num_hidden_layers
        config.num_hidden_layers = collect(self.policy.decoder, layers=self.options.layers).layers[-1] + 1
        try:
            yield
        finally:
            config.num_hidden_layers = count
