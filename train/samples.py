"""Pages of sample answers: every token tinted by its WAAD, FAI and entropy, the credited ones underlined."""

from pathlib import Path

import jinja2
import torch
from torch import Tensor

from rhythm_kernels import GroupSchedule, token_credit
from rhythm_kernels.tasks import Problem
from train.batch import Rollouts, micro_batches, pack
from train.config import Config
from train.reading import TokenStats, read_batch
from train.rollout import Sampling
from train.setup import TrainingRun

TEMPLATE = Path(__file__).with_name("samples.html.jinja")
SHOWN = 1500  # tokens of a longer answer, two thirds of them from its beginning


def write_held_out_samples(run: TrainingRun, path: Path) -> None:
    """Answers the first problems of the first evaluation and writes the page, with WAAD and FAI."""
    config, world = run.config, run.world
    problems = run.evaluations[0].problems[: config.run.sample_answers]
    if not problems:
        return
    prompts = [run.prompts.encode(problem) for problem in problems]
    sampling = Sampling(config.rollout.max_completion_length, config.rollout.temperature, config.run.seeds[0])
    run.engine.wake()
    completions = run.engine.generate(prompts, 1, sampling)
    run.engine.sleep()
    batch = pack(prompts, completions, 1, world.device)
    micros = micro_batches(batch, range(len(problems)), config.grpo.micro_batch_tokens, world)
    old = read_batch(run.policy, batch, micros, config, GroupSchedule(), everything=True)
    gamma = token_credit(
        config.credit.strategy,
        batch.response_mask[None],
        old.rhythm,
        entropy=old.entropy[None],
        cu_seqlens=batch.cu_seqlens,
        **config.credit.credit_arguments,
    )[0]
    texts = run.prompts.decode(completions)
    rewards = torch.tensor([score.reward for score in run.rewards.score(texts, problems)]) * batch.finished.cpu()
    if world.is_first:
        write_samples(path, batch, old, gamma, rewards, problems, run)


def write_samples(
    path: Path,
    batch: Rollouts,
    tokens: TokenStats,
    gamma: Tensor,
    rewards: Tensor,
    problems: list[Problem],
    run: TrainingRun,
) -> None:
    """The page of the first answers of a batch, each with its problem."""
    signals = {"entropy": tokens.entropy} if tokens.entropy is not None else {}
    if tokens.rhythm is not None:
        signals = {"waad": tokens.rhythm.waad[0], "fai": tokens.rhythm.fai[0], **signals}
    bounds, answers = batch.cu_seqlens.tolist(), []
    for row, problem in enumerate(problems[: run.config.run.sample_answers]):
        here = slice(bounds[row], bounds[row + 1])
        mask = batch.response_mask[here]
        columns = {name: values[here][mask].nan_to_num().tolist() for name, values in signals.items()}
        answers.append(
            {
                "prompt": problem.prompt,
                "reward": float(rewards[row]),
                "finished": bool(batch.finished[row]),
                "words": run.prompts.words(batch.ids[here][mask].tolist()),
                "gamma": gamma[here][mask].tolist(),
                "signals": columns,
            }
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(answers, run.config), encoding="utf-8")


def render(answers: list[dict], config: Config) -> str:
    """The page, in one file; everything that a model or a user wrote is escaped.

    An answer has prompt, reward, finished and, for each token, words, gamma and one or more signals, whose tint is the
    share of the answer's largest value.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(answers=[_shown(answer) for answer in answers], credit=config.credit, preset=config.preset)


def _shown(answer: dict) -> dict:
    count = len(answer["words"])
    places = list(range(count))
    if count > SHOWN:
        places = places[: 2 * SHOWN // 3] + places[count - SHOWN // 3 :]
    largest = {name: max([*values, 1e-9]) for name, values in answer["signals"].items()}
    tokens = [
        {
            "word": answer["words"][t].replace("\n", "⏎"),
            "gamma": answer["gamma"][t],
            "heat": {name: max(0.0, values[t] / largest[name]) for name, values in answer["signals"].items()},
            "raw": {name: values[t] for name, values in answer["signals"].items()},
        }
        for t in places
    ]
    gap = {"at": 2 * SHOWN // 3, "tokens": count - len(places)} if count > SHOWN else None
    return answer | {"tokens": tokens, "count": count, "gap": gap}
