"""The optimizer steps on one batch of rollouts.

On a GPU the host runs ahead of the device through all micro-batches of an optimizer step, and waits once: for the norm
of the gradient, before the weights change.
"""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor

from train.batch import Rollouts, micro_batches
from train.config import Config, RunError
from train.distributed import World, whole
from train.loss import grpo_loss, sampler_correction, token_weights
from train.policy import Policy
from train.reading import TokenStats

SUMS = ("loss", "clip_ratio/low_mean", "clip_ratio/high_mean", "approx_kl")  # of the parts of `grpo_loss`


def make_optimizer(policy: Policy, config: Config) -> torch.optim.AdamW:
    """The policy's AdamW: on a GPU the fused one, whose step holds no copy of the second moments.

    On a CPU it is torch's loop over the parameters, which holds a copy of one of them.
    """
    grpo, parameters = config.grpo, [*policy.parameters()]
    fused = parameters[0].device.type == "cuda"
    return torch.optim.AdamW(parameters, lr=grpo.learning_rate, weight_decay=grpo.weight_decay, fused=fused)


def update_policy(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batch: Rollouts,
    old: TokenStats,
    advantages: Tensor,
    config: Config,
    world: World,
    reference_log_probs: Tensor | None = None,
    *,
    progress: Callable[[int], object] = lambda tokens: None,
) -> tuple[dict[str, float], TokenStats]:
    """`gradient_steps` optimizer steps on equal shares of the batch, `num_iterations` times.

    Answers whose advantage is 0 throughout have no gradient: they count in the loss's denominator and are not run.

    Args:
        old: without log-probabilities where there is one step only, whose own they are.
        advantages, reference_log_probs: [N].

    Returns:
        Mean metrics over all ranks; and `old`, with the log-probabilities and entropies of the tokens that were run
        (NaN for others) if it had none.
    """
    grpo = config.grpo
    count = grpo.num_iterations * grpo.gradient_steps
    names = (*SUMS, "kl") if grpo.beta else SUMS
    totals, mean_norm = torch.zeros(len(names), dtype=torch.float64, device=batch.ids.device), 0.0
    on_policy = old.log_probs is None
    if on_policy:
        unknown = [torch.where(batch.response_mask, torch.nan, torch.zeros_like(batch.log_probs)) for _ in range(2)]
        old = old._replace(log_probs=unknown[0], entropy=unknown[1])
    counts = batch.finished if grpo.mask_truncated_completions else torch.ones_like(batch.finished)
    moves = counts if grpo.beta else counts & (batch.per_sequence(((advantages != 0) & batch.response_mask).long()) > 0)
    learnable = [row for row, move in enumerate(moves.tolist()) if move]
    size = len(moves) // grpo.gradient_steps  # whole groups in each share, since gradient_steps divides the problems
    shares = [range(start, start + size) for start in range(0, len(moves), size)]
    micros_of = [
        micro_batches(batch, [row for row in learnable if row in share], grpo.micro_batch_tokens, world)
        for share in shares
    ]
    with _training(policy):
        for share, micros in [*zip(shares, micros_of, strict=True)] * grpo.num_iterations:
            chosen = torch.zeros_like(counts)
            chosen[share.start : share.stop] = counts[share.start : share.stop]
            weights = token_weights(batch, chosen, grpo.loss_type, config.rollout.max_completion_length, world)
            sums = torch.zeros_like(totals)
            for micro in micros:
                log_probs, entropy = policy(micro, entropy=on_policy)
                if micro.is_surplus:
                    (0.0 * log_probs.sum()).backward()
                    continue
                answers = micro.place[micro.answers]
                if on_policy:
                    old.log_probs[answers], old.entropy[answers] = log_probs.detach().float(), entropy.float()
                before = old.log_probs[answers]
                corrected = grpo.vllm_importance_sampling_correction
                loss, parts = grpo_loss(
                    log_probs,
                    before,
                    advantages[answers],
                    weights[answers],
                    epsilon=grpo.epsilon,
                    epsilon_high=grpo.epsilon_high,
                    correction=sampler_correction(before, batch.log_probs[answers], grpo.vllm_importance_sampling_cap)
                    if corrected
                    else None,
                    reference_log_probs=None if reference_log_probs is None else reference_log_probs[answers],
                    beta=grpo.beta,
                )
                (loss * world.size).backward()  # gradients are averaged over the ranks
                progress(len(micro.place))
                sums += torch.stack([parts[name] for name in names]).double()
            totals += sums / count
            if micros:
                mean_norm += _step(policy, optimizer, grpo.max_grad_norm) / world.size / count
    summed = world.sum(torch.cat([totals, totals.new_full((1,), mean_norm)])).tolist()
    return dict(zip((*names, "grad_norm"), summed, strict=True)), old


def _step(policy: Policy, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> float:
    """One optimizer step; the norm of its gradient before clipping, for which it waits."""
    norm = whole(torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)).item()
    if not norm < float("inf"):
        # as from the credit of a signal that is not finite: it ends the run before it reaches the weights
        raise RunError(f"the gradient is non-finite (norm {norm}): no step was made")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


@contextmanager
def _training(policy: Policy):
    """Only in training mode are activations checkpointed; there is no dropout."""
    policy.train()
    try:
        yield
    finally:
        policy.eval()
