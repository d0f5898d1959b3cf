"""Writes a page of sampled answers: tokens are tinted by WAAD, FAI and entropy, and credited ones underlined.

WAAD is the windowed average attention distance, FAI the future attention influence.
"""

from pathlib import Path

import jinja2

from rhythm_kernels import GroupSchedule, token_credit
from rhythm_kernels.console import visible
from rhythm_kernels.files import write_whole
from train.batch import micro_batches, pack
from train.config import Config
from train.reading import read_batch
from train.rollout import Sampling
from train.setup import TrainingRun

TEMPLATE = Path(__file__).with_name("samples.html.jinja")
SHOWN = 1500  # tokens of a longer answer, two thirds of them from its beginning


def write_samples(run: TrainingRun, path: Path) -> None:
    """Answers the first problems of the first evaluation set and writes the page; every rank must call it."""
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
    schedule = GroupSchedule(**config.credit.schedule_arguments)
    tokens = read_batch(run.policy, batch, micros, config, schedule, everything=True)
    gamma = token_credit(
        config.credit.strategy,
        batch.response_mask[None],
        tokens.rhythm,
        entropy=tokens.entropy[None],
        cu_seqlens=batch.cu_seqlens,
        **config.credit.credit_arguments,
    )[0]
    scores = run.rewards.score(run.prompts.decode(completions), problems)
    if not world.is_first:
        return
    signals = {"waad": tokens.rhythm.waad[0], "fai": tokens.rhythm.fai[0], "entropy": tokens.entropy}
    answers, end = [], 0
    for problem, prompt, completion, score in zip(problems, prompts, completions, scores, strict=True):
        start = end + len(prompt)
        end = start + len(completion.ids)
        finished = completion.finish_reason == "stop"
        answers.append(
            {
                "prompt": problem.prompt,
                "verdict": "cut off" if not finished else "solved" if score.reward == 1 else "wrong",
                "words": run.prompts.words(completion.ids),
                "gamma": gamma[start:end].tolist(),
                "signals": {name: values[start:end].tolist() for name, values in signals.items()},
            }
        )
    write_whole(path, render(answers, config))


def render(answers: list[dict], config: Config) -> str:
    """Returns the page, in one file; everything that a model or a user wrote is escaped.

    An answer has its prompt and verdict and, for each token, words, gamma and the signals. A token's tint is its share
    of the answer's largest value.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["visible"] = visible
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    places = [_places(len(answer["words"])) for answer in answers]
    return template.render(answers=zip(answers, places), credit=config.credit, preset=config.preset)


def _places(count: int) -> list[int]:
    """Returns the indices of the tokens shown of an answer of `count` tokens."""
    head, tail = SHOWN - SHOWN // 3, SHOWN // 3
    return [place for place in range(count) if count <= SHOWN or place < head or place >= count - tail]
