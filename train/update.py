"""Makes the optimizer steps on one batch of rollouts.

On a GPU the host runs ahead of the device through all micro-batches of an optimizer step, and waits once: for the norm
of the gradient, before the weights change.
Shapes: N tokens in the batch, B answers, m tokens in the answers of a micro-batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from rhythm_kernels import shape_advantages
from train.batch import MicroBatch, Rollouts, micro_batches
from train.config import GRPO, Config, RunError
from train.distributed import World, whole
from train.loss import grpo_loss, sampler_correction, token_weights
from train.policy import Policy
from train.reading import Reader

OF_TOKENS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "approx_kl")  # metrics that `grpo_loss` always returns


def make_optimizer(policy: Policy, config: Config) -> torch.optim.AdamW:
    """Returns the policy's AdamW: on a GPU the fused one, whose step holds no copy of the second moments.

    On a CPU it is torch's loop over the parameters, which holds a copy of one of them.
    """
    grpo, parameters = config.grpo, [*policy.parameters()]
    fused = parameters[0].device.type == "cuda"
    options = {"lr": grpo.learning_rate, "weight_decay": grpo.weight_decay, "eps": grpo.adam_epsilon, "fused": fused}
    return torch.optim.AdamW(parameters, betas=(grpo.adam_beta1, grpo.adam_beta2), **options)


def update_policy(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batch: Rollouts,
    reader: Reader,
    advantages: Tensor,
    config: Config,
    world: World,
    reference_log_probs: Tensor | None = None,
    *,
    progress: Callable[[int], object] = lambda tokens: None,
) -> dict[str, float]:
    """Makes `gradient_steps` optimizer steps on equal shares of the batch, `num_iterations` times.

    Args:
        reader: has the old log-probabilities, or reads them in the loss's own forward.
        advantages: [N], shaped by the credit, unless the reader knows the credit only after the loss's own forward.
        reference_log_probs: [N].

    Returns:
        Metrics of all ranks: loss and gradient norm are means over the optimizer steps, the others over the tokens that
        ran. Where none ran these are left out.
    """
    grpo = config.grpo
    steps = _split(batch, advantages, config, world) * grpo.num_iterations
    names = (*OF_TOKENS, "kl") if grpo.beta else OF_TOKENS
    sums = torch.zeros(1 + len(names), dtype=torch.float64, device=batch.ids.device)  # of the loss and of the metrics
    norms, tokens_run = 0.0, 0
    with _training(policy):
        for counted, micros in steps:
            weights = token_weights(batch, counted, grpo.loss_type, config.rollout.max_completion_length, world)
            for micro in micros:
                log_probs = reader.forward(micro)
                if micro.is_surplus:
                    (0.0 * log_probs.sum()).backward()
                    continue
                tokens = micro.place[micro.answers]
                shaped = advantages[tokens]
                if reader.credits_in_loss:
                    shaped = shape_advantages(shaped[None], reader.credit(micro)[micro.answers][None])[0]
                loss, metrics = _loss(log_probs, tokens, batch, reader, shaped, weights, reference_log_probs, grpo)
                (loss * world.size).backward()  # gradients are averaged over the ranks
                sums += torch.stack([loss.detach(), *(metrics[name] for name in names)]).double()
                tokens_run += len(tokens)
                progress(len(micro.place))
            if micros:
                reader.check()
                norms += _step(policy, optimizer, grpo.max_grad_norm) / world.size
    known_here = [sums.new_full((1,), value) for value in (norms, tokens_run)]
    loss, *of_tokens, norms, tokens_run = world.sum(torch.cat([sums, *known_here])).tolist()
    means = {name: value / tokens_run for name, value in zip(names, of_tokens, strict=True)} if tokens_run else {}
    return {"loss": loss / len(steps), **means, "grad_norm": norms / len(steps)}


def answers_run(batch: Rollouts, advantages: Tensor, grpo: GRPO) -> list[bool]:
    """Returns for each answer whether the update runs it; advantages [N].

    Answers whose advantages are all 0 have no gradient: they count in the loss's denominator and are not run.
    """
    counted = _counted(batch, grpo)
    has_advantage = batch.per_sequence(((advantages != 0) & batch.response_mask).long()) > 0
    return (counted if grpo.beta else counted & has_advantage).tolist()  # the divergence pulls at every answer


def _counted(batch: Rollouts, grpo: GRPO) -> Tensor:
    """Returns the answers over which the loss is averaged, [B] bool."""
    return batch.finished if grpo.mask_truncated_completions else torch.ones_like(batch.finished)


class _OptimizerStep(NamedTuple):
    counted: Tensor
    """[B] bool: the answers over which the loss is averaged."""
    micros: list[MicroBatch]
    """The micro-batches with the answers that have a gradient."""


def _split(batch: Rollouts, advantages: Tensor, config: Config, world: World) -> list[_OptimizerStep]:
    """Splits the batch into equal shares of whole groups, one for each optimizer step of a pass."""
    grpo = config.grpo
    counted, runs = _counted(batch, grpo), answers_run(batch, advantages, grpo)
    size = len(runs) // grpo.gradient_steps  # whole groups, since gradient_steps divides the problems
    steps = []
    for start in range(0, len(runs), size):
        share = slice(start, start + size)
        counted_here = torch.zeros_like(counted)
        counted_here[share] = counted[share]
        rows = [row for row in range(len(runs))[share] if runs[row]]
        steps.append(_OptimizerStep(counted_here, micro_batches(batch, rows, grpo.micro_batch_tokens, world)))
    return steps


def _loss(
    log_probs: Tensor,
    tokens: Tensor,
    batch: Rollouts,
    reader: Reader,
    advantages: Tensor,
    weights: Tensor,
    reference_log_probs: Tensor | None,
    grpo: GRPO,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns `grpo_loss` of one micro-batch.

    log_probs and advantages are [m], those of the batch's `tokens` [m]; the other tensors are [N].
    """
    old_log_probs, correction = reader.log_probs[tokens], None
    if grpo.vllm_importance_sampling_correction:
        correction = sampler_correction(old_log_probs, batch.log_probs[tokens], grpo.vllm_importance_sampling_cap)
    return grpo_loss(
        log_probs,
        old_log_probs,
        advantages,
        weights[tokens],
        epsilon=grpo.epsilon,
        epsilon_high=grpo.epsilon_high,
        correction=correction,
        reference_log_probs=None if reference_log_probs is None else reference_log_probs[tokens],
        beta=grpo.beta,
    )


def _step(policy: Policy, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> float:
    """Makes one optimizer step and returns the norm of its gradient before clipping, for which the host waits.

    Raises:
        RunError: the norm is not finite, for example after a NaN signal; the weights stay unchanged.
    """
    norm = whole(torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)).item()
    if not norm < float("inf"):
        raise RunError(f"the gradient is non-finite (norm {norm}): no step was made")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


@contextmanager
def _training(policy: Policy) -> Iterator[None]:
    """Puts the policy into training mode, so that activations are checkpointed; it has no dropout."""
    policy.train()
    try:
        yield
    finally:
        policy.eval()
