"""The problems of a run: those to train on, those to evaluate on, and the tokens that the policy reads of one."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from transformers import GenerationConfig, PreTrainedTokenizerBase

from train.config import BadSetting, Config
from train.console import say
from train.distributed import World
from train.rollout import Completion
from train.tasks import Problem, words
from train.tasks.sets import drop_overlap, find_set, load_set


class EvalSet(NamedTuple):
    """Problems, each answered `answers` times; `temperature` None is greedy."""

    name: str
    """Without a slash, since metrics are named after it: of a file the set and its last part, math-500:mine."""
    problems: list[Problem]
    answers: int
    temperature: float | None


class Task(NamedTuple):
    train: list[Problem]
    evaluations: list[EvalSet]


def load_task(config: Config, world: World) -> Task:
    """What --train-data and --eval-data name; the tiny Countdown is evaluated by sampling and greedily."""
    tell = say if world.is_first else (lambda line: None)
    name, temperature = config.data.train_data, config.rollout.temperature
    if name == "words":
        train, held_out = words.split_problems(config.words)
        return Task(train, [EvalSet("sampled", held_out, 1, temperature), EvalSet("greedy", held_out, 1, None)])
    names = config.data.eval_data or find_set(name)[0].evaluate
    if not names:
        raise BadSetting(f"--eval-data must name what to evaluate on, since nothing belongs to --train-data {name}")
    evaluations = load_evaluations(names, temperature, tell)
    train, repeats = drop_overlap(load_set(name, tell), [problem for each in evaluations for problem in each.problems])
    if repeats:
        tell(f"{name}: {repeats} problems left out that are evaluated on")
    if not train:
        raise BadSetting(f"--train-data {name} holds no problem that is not evaluated on")
    return Task(train, evaluations)


def load_evaluations(
    names: Sequence[str], temperature: float | None, tell: Callable[[str], object] = say
) -> list[EvalSet]:
    found = []
    for name in names:
        named, file = find_set(name)
        label = name if file is None else f"{name.partition(':')[0]}:{file.stem}"
        found.append(EvalSet(label, load_set(name, tell), named.answers, temperature))
    return found


class Prompts:
    """Problems as token ids, as the policy reads them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: Config):
        self.tokenizer = tokenizer
        self.most = config.data.max_prompt_length
        self.as_chat = config.data.chat_template and tokenizer.chat_template is not None

    def encode(self, problem: Problem) -> list[int]:
        if not self.as_chat:
            return self.tokenizer.encode(problem.prompt)
        turn = [{"role": "user", "content": problem.prompt}]
        return self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)

    def decode(self, completions: Sequence[Completion]) -> list[str]:
        return self.tokenizer.batch_decode([each.ids for each in completions], skip_special_tokens=True)

    def words(self, ids: Sequence[int]) -> list[str]:
        """Each token's own text, for people to look at."""
        return [self.tokenizer.decode([token]) for token in ids]

    def all_fitting(self, evaluations: list[EvalSet]) -> list[EvalSet]:
        return [each._replace(problems=self.fitting(each.problems, each.name)) for each in evaluations]

    def fitting(self, problems: list[Problem], what: str) -> list[Problem]:
        """Those that are not longer than --max-prompt-length; says how many are."""
        kept = [problem for problem in problems if 0 < len(self.encode(problem)) <= self.most]
        if len(kept) < len(problems):
            say(f"{what}: {len(problems) - len(kept)} of {len(problems)} problems left out, over {self.most} tokens")
        if not kept:
            raise BadSetting(
                f"--max-prompt-length must let problems in, got {self.most}, which no problem of {what} fits"
            )
        return kept


def stop_ids(model: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those that the model's generation settings name."""
    try:
        named = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # the model has no such settings
        named = None
    found = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    if not found:
        raise BadSetting(f"--model must have a token that ends an answer, got {model}, whose tokenizer names none")
    return sorted(found)
