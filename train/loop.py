"""Trains one run, in the order of its data flow, with GRPO whose token credit follows attention.

    problems -> answers -> rewards -> advantages, normalised in each problem's group
    ids -> old-log-prob pass, with the statistics of the same forward -> gamma -> shaped advantages -> clipped loss

Three things are added to plain GRPO. The old-log-prob pass reads WAAD (windowed average attention distance) and FAI
(future attention influence) from the attention that it runs anyway; `token_credit` makes a factor for every token from
them; `shape_advantages` multiplies the positive advantages by it. With a single optimizer step a batch there is no such
pass: then the loss's own forward is read.

    python -m train                                    # the tiny preset, two seeds side by side
    torchrun --nproc-per-node 4 -m train --preset maths-4b-8k                  # one run on four GPUs
"""

from pathlib import Path
from typing import NamedTuple

import torch

from rhythm_kernels import shape_advantages
from train.batch import micro_batches, pack
from train.config import Config, RunError
from train.console import Phases, bar
from train.loss import Groups
from train.metrics import UNVERIFIED, is_evaluated, learning_warnings, memory_metrics, rollout_metrics
from train.reading import Reader, read_log_probs
from train.rewards import Score, count_errors, describe_errors
from train.rollout import Sampling
from train.samples import write_samples
from train.setup import TrainingRun, open_run
from train.solve_rates import evaluate
from train.stop import Stopped, asked, held
from train.update import answers_run, update_policy


class Step(NamedTuple):
    """The results of one step."""

    metrics: dict[str, float]
    scores: list[Score]
    """One score for each answer, with the reason if it could not be verified."""


def train(config: Config, folder: Path):
    """Trains one seed into `folder`, from its latest checkpoint if it has one."""
    grpo, report = config.grpo, config.run
    with open_run(config, folder) as run:
        if run.is_new:
            assess(run, 0, "before")
            run.save(0)
        elif is_due(report.eval_steps, run.step, grpo.max_steps) and not run.world.from_first(
            lambda: is_evaluated(folder, run.step)
        ):
            assess(run, run.step, f"step {run.step}")  # it was the last step, whose evaluation follows its checkpoint
        warned: set[str] = set()
        numbers = range(run.step + 1, grpo.max_steps + 1)
        with held():
            for number in (steps := bar(numbers, f"{run.label} GRPO", "step", disable=not run.world.is_first)):
                try:
                    step = train_step(run, number)
                except Stopped:
                    run.save(number - 1)
                    raise
                run.log.write(number, step.metrics)
                steps.set_postfix(reward=f"{step.metrics['reward']:.2f}", refresh=False)
                warned = warn(run, number, step, warned)
                if number % report.logging_steps == 0 or number == grpo.max_steps:
                    run.say(describe(number, step.metrics, config))
                if is_due(report.eval_steps, number, grpo.max_steps):
                    assess(run, number, f"step {number}")
                stop = run.world.most(asked())  # all ranks stop after the same step
                if number % report.save_steps == 0 or number == grpo.max_steps or stop:
                    run.save(number)
                if stop:
                    raise Stopped(stop)
        assess(run, grpo.max_steps, "after")


def train_step(run: TrainingRun, number: int) -> Step:
    """Makes one step, from problems to an updated policy; `number` counts from 1.

    Raises:
        Stopped: a signal may have ended verifications; the run is as it was before the step.
    """
    config, world = run.config, run.world
    rollout, grpo = config.rollout, config.grpo
    phase = Phases(f"{run.label} step {number}", shown=world.is_first)
    draw, n = world.draw(config.run.seeds[0], number), rollout.num_generations
    set_learning_rate(run.optimizer, number, config)

    cursor = run.stream.state_dict()
    problems = run.stream.take(rollout.prompts_per_step)
    copies = world.share([problem for problem in problems for _ in range(n)], grpo.gradient_steps)
    here = min(n, len(copies) // grpo.gradient_steps)  # answers to a problem: other ranks may have the rest of them
    with phase("rollout", len(copies), "answer") as advance:
        prompts = [run.prompts.encode(problem) for problem in copies[::here]]
        sampling = Sampling(rollout.max_completion_length, rollout.temperature, draw)
        run.engine.wake()
        completions = run.engine.generate(prompts, here, sampling, advance)
        run.engine.sleep()
        batch = pack(prompts, completions, here, world.device)  # B answers, N tokens in one row

    with phase("reward", len(copies), "answer") as advance:
        texts = run.prompts.decode(completions)
        scores = run.rewards.score(texts, copies, advance)
        if (stop := world.most(asked())) and world.most(count_errors(scores)):
            run.stream.load_state_dict(cursor)
            raise Stopped(stop)
        rewards = torch.tensor([score.reward for score in scores], dtype=torch.float32, device=world.device)
        groups = Groups.of(rewards * batch.finished, n, here, world)
        advantages = groups.advantages(grpo.scale_rewards)[batch.sequence_of]  # [N]

    with phase("old log-probs", len(batch.ids), "token") as advance:
        reader = Reader(run.policy, batch, config, run.schedule, draw)
        before = reader.rows_before(answers_run(batch, advantages, grpo))
        reader.read(micro_batches(batch, before, grpo.micro_batch_tokens, world), advance)  # WAAD and FAI too
        reference = None
        if run.reference:
            micros = micro_batches(batch, range(len(copies)), grpo.micro_batch_tokens, world)
            reference = read_log_probs(run.reference, batch, micros)

    with phase("credit"):
        if not reader.credits_in_loss:
            advantages = shape_advantages(advantages[None], reader.credit()[None])[0]

    with phase("update", len(batch.ids) * grpo.num_iterations, "token") as advance:
        update = update_policy(
            run.policy, run.optimizer, batch, reader, advantages, config, world, reference, progress=advance
        )
        tokens, gamma = reader.finish(), reader.credit()

    with phase("weight sync"):
        run.sync()

    metrics = rollout_metrics(batch, groups, tokens, gamma, config.credit, world) | update
    metrics |= phase.metrics(tokens.seconds) | memory_metrics(tokens, world.device)
    errors, answers = world.sum(torch.tensor([count_errors(scores), len(scores)], dtype=torch.float64)).tolist()
    metrics |= {"rewards/errors": int(errors), "rewards/error_share": errors / answers}
    metrics |= {"learning_rate": run.optimizer.param_groups[0]["lr"]}
    metrics["tokens_per_second"] = metrics["num_tokens"] / metrics["step_time"]
    run.num_tokens += int(metrics["num_tokens"])
    metrics["num_tokens"] = run.num_tokens  # of all steps, as in TRL
    return Step(metrics, scores)


def is_due(every: int, step: int, last: int) -> bool:
    """Returns True at every `every`-th step except the last, which is always evaluated; never if `every` is 0."""
    return every > 0 and step % every == 0 and step < last


def assess(run: TrainingRun, step: int, when: str):
    """Evaluates the policy, and writes a page of its answers."""
    evaluation = evaluate(run.engine, run.evaluations, run.prompts, run.rewards, run.config, run.world)
    run.log.write(step, evaluation.metrics())
    run.say(f"{when:7} {evaluation}")
    write_samples(run, run.folder / "samples" / f"step-{step:06d}.html")


def warn(run: TrainingRun, step: int, done: Step, before: set[str]) -> set[str]:
    """Returns this step's warnings and prints those that the step before did not have.

    Raises:
        RunError: the sampler's policy differs from the trainer's.
    """
    metrics = done.metrics
    gap, most = metrics.get("sampling/sampling_logp_difference/mean", 0.0), run.config.rollout.vllm_logp_tolerance
    if gap > most and step <= run.step + 2:  # the second of them is the first after a weight sync
        raise RunError(
            f"sampler and trainer disagree: log-probabilities differ by {gap:.4f} nats on average at step {step}, "
            f"--vllm-logp-tolerance allows {most}. The engine does not have the policy's weights, or rounds otherwise"
        )
    warnings = learning_warnings(metrics)
    if gap > most:
        warnings.add("the gap of sampler and trainer is above --vllm-logp-tolerance")
    for warning in sorted(warnings - before):
        reasons = f": {describe_errors(done.scores)}" if warning == UNVERIFIED and count_errors(done.scores) else ""
        run.say(f"warning, step {step}: {warning}{reasons}")
    return warnings


def describe(step: int, metrics: dict[str, float], config: Config) -> str:
    entropy = f"entropy {metrics['entropy']:.3f}  " if "entropy" in metrics else ""
    unverified = f"NOT VERIFIED {metrics['rewards/errors']}  " if metrics["rewards/errors"] else ""
    return (
        f"step {step}/{config.grpo.max_steps}  reward {metrics['reward']:.3f}  {unverified}"
        f"length {metrics['completions/mean_length']:.1f}  cut off {metrics['completions/clipped_ratio']:.1%}  "
        f"{entropy}{metrics['step_time']:.2f} s, {metrics['tokens_per_second']:,.0f} tok/s, "
        f"statistics {metrics['rhythm/statistics_share']:.1%} of it"
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, config: Config):
    """Warms up linearly, then decays linearly towards the final share, which the step after the last would have.

    `step` counts from 1.
    """
    grpo = config.grpo
    left = 1 - (step - 1) / max(1, grpo.max_steps)
    decay = grpo.final_learning_rate + (1 - grpo.final_learning_rate) * left
    for group in optimizer.param_groups:
        group["lr"] = grpo.learning_rate * min(1.0, step / (grpo.warmup_steps + 1)) * decay
