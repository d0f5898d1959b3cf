"""A page of sample answers: every token tinted by its WAAD and FAI, the credited ones underlined."""

from pathlib import Path

import jinja2
import torch
from transformers import PreTrainedModel

from rhythm_kernels import GroupSchedule, token_credit
from train.config import Config
from train.data import Problem
from train.policy import credit_options, old_log_prob_pass
from train.rewards import countdown_reward
from train.rollout import Engine, Sampling

TEMPLATE = Path(__file__).with_name("samples.html.jinja")


def write_samples(path: Path, model: PreTrainedModel, engine: Engine, problems: list[Problem], config: Config):
    """Answers the first held-out problems, drawn from a generator of their own, and writes the page."""
    problems = problems[: config.run.sample_answers]
    answers = sample_answers(model, engine, problems, config) if problems else []
    path.write_text(render(answers, config), encoding="utf-8")


def sample_answers(model: PreTrainedModel, engine: Engine, problems: list[Problem], config: Config) -> list[dict]:
    """What the page shows of each problem's answer; heat is scaled to the answer's own maximum."""
    sampling = Sampling(config.rollout.max_completion_length, config.rollout.temperature)
    with torch.random.fork_rng():
        torch.manual_seed(config.run.seeds[0])
        batch = engine.generate([problem.prompt for problem in problems], 1, sampling)
    old = old_log_prob_pass(
        model,
        batch,
        temperature=config.rollout.temperature,
        micro_batch_size=config.grpo.micro_batch_size,
        credit=config.credit,
        schedule=GroupSchedule(),
    )
    gamma = token_credit(
        config.credit.credit,
        mask=batch.response_mask,
        rhythm=old.rhythm,
        entropy=old.entropy,
        seed=0,
        **credit_options(config.credit),
    )
    answers = []
    for row, problem in enumerate(problems):
        mask = batch.response_mask[row]
        words = engine.tokenizer.convert_ids_to_tokens(batch.ids[row, mask].tolist())
        finished = bool(batch.finished[row])
        columns = {
            "waad": old.rhythm.waad[row, mask],
            "fai": old.rhythm.fai[row, mask],
            "entropy": old.entropy[row, mask],
        }
        heats = {name: (values / values.max().clamp(min=1e-9)).tolist() for name, values in columns.items()}
        raw = {name: values.tolist() for name, values in columns.items()}
        factors = gamma[row, mask].tolist()
        answers.append(
            {
                "prompt": problem.prompt,
                "solved": finished and countdown_reward(batch.texts[row], *problem) == 1.0,
                "finished": finished,
                "tokens": [
                    {
                        "word": word,
                        "gamma": factors[i],
                        "heat": {name: heats[name][i] for name in heats},
                        "raw": {name: raw[name][i] for name in raw},
                    }
                    for i, word in enumerate(words)
                ],
            }
        )
    return answers


def render(answers: list[dict], config: Config) -> str:
    """The page, in one file; everything that a model or a user wrote is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(answers=answers, credit=config.credit, preset=config.preset)
