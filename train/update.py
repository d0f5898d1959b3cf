"""The optimizer steps on one batch of rollouts."""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor

from train.batch import Rollouts, micro_batches
from train.config import Config, RunError
from train.distributed import World, whole
from train.loss import grpo_loss, sampler_correction, token_weights
from train.policy import Policy, TokenStats

METRICS = ("loss", "grad_norm", "clip_ratio/low_mean", "clip_ratio/high_mean", "approx_kl")


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
    totals = dict.fromkeys((*METRICS, "kl") if grpo.beta else METRICS, 0.0)
    on_policy = old.log_probs is None
    if on_policy:
        unknown = [torch.where(batch.response_mask, torch.nan, torch.zeros_like(batch.log_probs)) for _ in range(2)]
        old = old._replace(log_probs=unknown[0], entropy=unknown[1])
    counts = batch.finished if grpo.mask_truncated_completions else torch.ones_like(batch.finished)
    moves = counts if grpo.beta else counts & (batch.per_sequence(((advantages != 0) & batch.response_mask).long()) > 0)
    rows = list(range(len(batch.lengths)))  # whole groups in each share, since gradient_steps divides the problems
    size = len(rows) // grpo.gradient_steps
    shares = [rows[start : start + size] for start in range(0, len(rows), size)] * grpo.num_iterations
    with _training(policy):
        for share in shares:
            chosen = torch.zeros_like(counts)
            chosen[share] = counts[share]
            weights = token_weights(batch, chosen, grpo.loss_type, config.rollout.max_completion_length, world)
            learnable = [row for row, move in zip(share, moves[share].tolist(), strict=True) if move]
            micros = micro_batches(batch, learnable, grpo.micro_batch_tokens, world)
            sums = dict.fromkeys(totals, 0.0)
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
                for name, value in parts.items():
                    sums[name] += value.item()
            if micros:
                sums["grad_norm"] = _step(policy, optimizer, grpo.max_grad_norm) / world.size
            for name, value in sums.items():
                totals[name] += value / count
    summed = world.sum(torch.tensor(list(totals.values()), dtype=torch.float64)).tolist()
    return dict(zip(totals, summed, strict=True)), old


def _step(policy: Policy, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> float:
    """One optimizer step; the norm of its gradient before clipping."""
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
