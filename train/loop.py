"""One training run, as the data flows. This is GRPO; what differs is that a token's credit follows the attention.

    problems -> answers -> rewards -> advantages, normalised in each problem's group
    ids -> old-log-prob pass, with the statistics of the same forward -> gamma -> shaped advantages -> clipped loss

Against plain GRPO: the old-log-prob pass collects WAAD and FAI from the attention it runs anyway; `token_credit` makes
a factor for every token of them; `shape_advantages` puts it on the positive advantages. No KL term, no entropy bonus.

    python -m train                                    # the default preset, two seeds side by side
    python -m train --credit none --seeds 0            # plain GRPO, one seed
"""

import time
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rhythm_kernels import GroupSchedule, shape_advantages, token_credit
from train.checkpoint import Position, list_checkpoints, load_policy, restore, save_checkpoint
from train.config import BadSetting, Config
from train.console import bar, say
from train.data import Problem, ProblemStream, build_tokenizer, split_problems
from train.evaluate import evaluate
from train.loss import group_advantages, grpo_loss, token_log_probs, token_weights
from train.metrics import MetricsLog, learning_warnings, rollout_metrics
from train.policy import RHYTHM_STRATEGIES, credit_options, old_log_prob_pass, token_logits
from train.rewards import countdown_reward
from train.rollout import Rollouts, Sampling, TransformersEngine, micro_batches
from train.samples import write_samples
from train.supervise import warm_start


def train(config: Config, folder: Path):
    """Trains one seed into `folder`, from its latest checkpoint if it has one."""
    (seed,) = config.run.seeds
    grpo, credit, rollout = config.grpo, config.credit, config.rollout
    device = torch.device(choose_device(config.run.device))
    torch.set_num_threads(max(1, config.run.threads))
    split, tokenizer = split_problems(config.task), build_tokenizer()

    done = list_checkpoints(folder)
    start_from = done[-1] if done else warm_start(config, seed, split.train, tokenizer, device)
    policy = load_policy(start_from, device)
    engine = TransformersEngine(policy, tokenizer)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=grpo.learning_rate, weight_decay=0.0, fused=True)
    stream = ProblemStream(split.train, seed)
    schedule = GroupSchedule(credit.groups_every)
    torch.manual_seed(seed)
    position = restore(done[-1], optimizer, stream, schedule) if done else Position(step=0, metrics_bytes=0)
    log = MetricsLog(folder, position)

    def save(step: int):
        now = Position(step, log.flush())
        save_checkpoint(folder, now, policy, tokenizer, optimizer, stream, schedule, keep=config.run.save_total_limit)

    if not done:
        before = evaluate(engine, split.held_out, config)
        log.write(0, before.metrics())
        say(f"[seed {seed}] before  sampled {before.sampled}  greedy {before.greedy}")
        save(0)

    sampling = Sampling(rollout.max_completion_length, rollout.temperature)
    warned: set[str] = set()
    steps = bar(range(position.step + 1, grpo.max_steps + 1), f"[seed {seed}] GRPO", "step")
    for step in steps:
        clock = Clock()
        set_learning_rate(optimizer, step, config)

        with clock("rollout"):
            problems = stream.take(rollout.prompts_per_step)
            batch = engine.generate([problem.prompt for problem in problems], rollout.num_generations, sampling)

        with clock("reward"):
            rewards = score(batch, problems, rollout.num_generations).to(device)
            advantages = group_advantages(rewards, rollout.num_generations, grpo.scale_rewards)  # [B]

        with clock("old_log_probs"):
            old = old_log_prob_pass(
                policy,
                batch,
                temperature=rollout.temperature,
                micro_batch_size=grpo.micro_batch_size,
                credit=credit,
                schedule=schedule if credit.credit in RHYTHM_STRATEGIES else None,
            )

        with clock("credit"):
            gamma = token_credit(
                credit.credit,
                mask=batch.response_mask,
                rhythm=old.rhythm,
                entropy=old.entropy,
                seed=seed * 1_000_003 + step,
                **credit_options(credit),
            )
            shaped = shape_advantages(advantages, gamma)  # [B, T]

        with clock("update"):
            update = update_policy(policy, optimizer, batch, old.log_probs, shaped, config)

        times = clock.metrics(statistics=old.statistics_seconds)
        metrics = rollout_metrics(batch, rewards, rollout.num_generations, old, gamma) | update | times
        metrics["learning_rate"] = optimizer.param_groups[0]["lr"]
        log.write(step, metrics)
        steps.set_postfix(reward=f"{metrics['reward']:.2f}", refresh=False)
        warnings = learning_warnings(metrics)
        for warning in sorted(warnings - warned):
            say(f"[seed {seed}] warning, step {step}: {warning}")
        warned = warnings
        if step % config.run.logging_steps == 0 or step == grpo.max_steps:
            say(f"[seed {seed}] {describe(step, metrics, config)}")
        if step % config.run.save_steps == 0 or step == grpo.max_steps:
            save(step)

    after = evaluate(engine, split.held_out, config)
    log.write(grpo.max_steps, after.metrics())
    log.close()
    say(f"[seed {seed}] after   sampled {after.sampled}  greedy {after.greedy}")
    write_samples(folder / "samples.html", policy, engine, split.held_out, config)


def score(batch: Rollouts, problems: list[Problem], n: int) -> Tensor:
    """[B]: 1 for a finished answer that solves its problem, else 0."""
    asked = [problem for problem in problems for _ in range(n)]
    answers = zip(batch.texts, batch.finished.tolist(), asked, strict=True)
    return torch.tensor([countdown_reward(text, *problem) if ended else 0.0 for text, ended, problem in answers])


def update_policy(
    policy: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: Rollouts,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Config,
) -> dict[str, float]:
    """`gradient_steps` optimizer steps on equal shares of the batch, `num_iterations` times; returns mean metrics.

    Answers whose advantage is 0 throughout have no gradient: they count in the loss's denominator and are not run.
    """
    grpo, rollout = config.grpo, config.rollout
    totals = dict.fromkeys(("loss", "grad_norm", "clip_ratio/low_mean", "clip_ratio/high_mean", "approx_kl"), 0.0)
    count = grpo.num_iterations * grpo.gradient_steps
    share = len(batch.ids) // grpo.gradient_steps  # whole groups, since gradient_steps divides prompts_per_step
    for rows in torch.arange(len(batch.ids)).split(share) * grpo.num_iterations:
        mask = torch.zeros_like(batch.response_mask)
        mask[rows] = batch.response_mask[rows]
        weights = token_weights(mask, grpo.loss_type, rollout.max_completion_length)
        learnable = rows[(advantages[rows] * batch.response_mask[rows]).ne(0).any(-1).cpu()]
        for micro, width in micro_batches(batch, learnable, grpo.micro_batch_size):
            ids = batch.ids[micro, :width]
            logits = token_logits(policy, ids, batch.attention_mask[micro, :width], rollout.temperature)
            loss, parts = grpo_loss(
                token_log_probs(logits, ids),
                old_log_probs[micro, :width],
                advantages[micro, :width],
                weights.of(micro, width),
                epsilon=grpo.epsilon,
                epsilon_high=grpo.epsilon_high,
            )
            loss.backward()
            for name, value in (parts | {"loss": loss.detach()}).items():
                totals[name] += value.item() / count
        if len(learnable):
            # NaN, as in the credit of a signal that is not finite, ends the run before it reaches the weights
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), grpo.max_grad_norm, error_if_nonfinite=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            totals["grad_norm"] += norm.item() / count
    return totals


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, config: Config):
    """Linear warm-up, then linear decay to the final share; `step` counts from 1."""
    grpo = config.grpo
    left = 1 - (step - 1) / max(1, grpo.max_steps)
    decay = grpo.final_learning_rate + (1 - grpo.final_learning_rate) * left
    for group in optimizer.param_groups:
        group["lr"] = grpo.learning_rate * min(1.0, step / (grpo.warmup_steps + 1)) * decay


def choose_device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise BadSetting("--device must be one that is there, got 'cuda' where torch finds no CUDA device")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def describe(step: int, metrics: dict[str, float], config: Config) -> str:
    return (
        f"step {step}/{config.grpo.max_steps}  reward {metrics['reward']:.3f}  "
        f"length {metrics['completions/mean_length']:.1f}  cut off {metrics['completions/clipped_ratio']:.1%}  "
        f"entropy {metrics['entropy']:.3f}  {metrics['step_time']:.2f} s, "
        f"statistics {metrics['rhythm/statistics_share']:.1%} of it"
    )


class Clock:
    """Wall-clock seconds of one step's phases. On a GPU a phase ends when its work is done."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str):
        began = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] = time.perf_counter() - began

    def metrics(self, statistics: float) -> dict[str, float]:
        total = sum(self.seconds.values())
        shares = {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}
        shares |= {"time/statistics": statistics, "rhythm/statistics_share": statistics / total}
        return shares | {"step_time": total}
