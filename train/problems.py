"""The problems of a run: those to train on, those to evaluate on, and the tokens that the policy reads of one."""

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from rhythm_kernels.fit import embedding_rows, most_positions
from rhythm_kernels.tasks import BadSet, Problem
from rhythm_kernels.tasks.sets import drop_overlap, find_set, load_set
from train import words
from train.config import BadSetting, Config
from train.console import say
from train.distributed import World
from train.rewards import BOUNDED
from train.rollout import Completion


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


@contextmanager
def reading_sets() -> Iterator[None]:
    """Makes a set that does not load a setting that is refused."""
    try:
        yield
    except BadSet as error:
        raise BadSetting(str(error)) from error


@reading_sets()
def load_task(config: Config, world: World) -> Task:
    """What --train-data and --eval-data name; the tiny Countdown is evaluated by sampling and greedily, unless told."""
    tell = say if world.is_first else (lambda line: None)
    name = config.data.train_data
    if name == "words":
        problems, held_out = words.split_problems(config.words)
        if not config.data.eval_data:
            return Task(problems, in_both_ways(held_out, config))
    evaluations = load_evaluations(names_to_evaluate(config), config.rollout.temperature, tell)
    if name != "words":
        problems = load_set(name, tell)
    train, repeats = drop_overlap(problems, [problem for each in evaluations for problem in each.problems])
    if repeats:
        tell(f"{name}: {repeats} problems left out that are evaluated on")
    if not train:
        raise BadSetting(f"--train-data {name} holds no problem that is not evaluated on")
    return Task(train, evaluations)


@reading_sets()
def load_held_out(config: Config, world: World) -> list[EvalSet]:
    """What a run of these settings is evaluated on; what it trains on is not loaded."""
    if config.data.train_data == "words" and not config.data.eval_data:
        return in_both_ways(words.split_problems(config.words)[1], config)
    tell = say if world.is_first else (lambda line: None)
    return load_evaluations(names_to_evaluate(config), config.rollout.temperature, tell)


def in_both_ways(held_out: list[Problem], config: Config) -> list[EvalSet]:
    return [EvalSet("sampled", held_out, 1, config.rollout.temperature), EvalSet("greedy", held_out, 1, None)]


def names_to_evaluate(config: Config) -> Sequence[str]:
    """--eval-data, or the sets that belong to --train-data."""
    name = config.data.train_data
    names = config.data.eval_data or find_set(name)[0].evaluate
    if not names:
        raise BadSetting(f"--eval-data must name what to evaluate on, since nothing belongs to --train-data {name}")
    return names


@reading_sets()
def load_evaluations(
    names: Sequence[str], temperature: float | None, tell: Callable[[str], object] = say
) -> list[EvalSet]:
    """The sets, under names of their own: metrics and columns are called after them."""
    labels = [label_of(name) for name in names]
    for label, count in Counter(labels).items():
        if count > 1:
            same = ", ".join(name for name, other in zip(names, labels) if other == label)
            raise BadSetting(f"--eval-data must be sets of different names, got {same}, which are all called {label}")
    answers = [find_set(name)[0].answers for name in names]
    return [EvalSet(label, load_set(name, tell), n, temperature) for label, name, n in zip(labels, names, answers)]


def label_of(name: str) -> str:
    _, file = find_set(name)
    return name if file is None else f"{name.partition(':')[0]}:{file.stem}"


def check_verifiers(sets: Sequence[Sequence[Problem]]) -> None:
    """ModuleNotFoundError where the answers to these problems need a package that is not here, before any is given."""
    maths = any(problem.verifier not in BOUNDED for problems in sets for problem in problems)
    if maths and importlib.util.find_spec("math_verify") is None:
        raise ModuleNotFoundError("No module named 'math_verify'", name="math_verify")


class Prompts:
    """Problems as token ids, as the policy reads them, and its answers as the text that is verified."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: Config, stops: Sequence[int] = ()):
        """`stops` are the tokens that end an answer, beside the tokenizer's own."""
        self.tokenizer = tokenizer
        self.most = config.data.max_prompt_length
        self.as_chat = config.data.chat_template and tokenizer.chat_template is not None
        self.ends = {tokenizer.eos_token_id, tokenizer.sep_token_id, *stops} - {None}
        self.silent = self.ends | {tokenizer.bos_token_id, tokenizer.pad_token_id}
        self.longest, self.largest_id = 0, 0
        """Of the problems that fit: tokens of a prompt, and a token's id."""

    def encode(self, problem: Problem) -> list[int]:
        if self.as_chat:
            return self._encode_turn(problem.prompt)
        ids = self.tokenizer.encode(problem.prompt)
        while ids and ids[-1] in self.ends:  # some tokenizers end every text: the answer would begin behind the end
            ids.pop()
        return ids

    def _encode_turn(self, text: str) -> list[int]:
        turn = [{"role": "user", "content": text}]
        try:
            return self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # whatever the template, which is a program, raises
            raise BadSetting(
                f"the model's chat template does not take a problem ({type(error).__name__}: {error}); "
                "--no-chat-template leaves it out"
            ) from error

    def decode(self, completions: Sequence[Completion]) -> list[str]:
        """The answers without what ends, begins or pads them; other special tokens, such as tags, are their text."""
        said = [[token for token in each.ids if token not in self.silent] for each in completions]
        return self.tokenizer.batch_decode(said, skip_special_tokens=False)

    def words(self, ids: Sequence[int]) -> list[str]:
        """Each token's own text, for people to look at."""
        return [self.tokenizer.decode([token]) for token in ids]

    def all_fitting(self, evaluations: list[EvalSet]) -> list[EvalSet]:
        return [each._replace(problems=self.fitting(each.problems, each.name)) for each in evaluations]

    def fitting(self, problems: list[Problem], what: str) -> list[Problem]:
        """Those that are not longer than --max-prompt-length; says how many are."""
        kept, empty = [], 0
        for problem in problems:
            ids = self.encode(problem)
            empty += not ids
            if 0 < len(ids) <= self.most:
                kept.append(problem)
                self.longest, self.largest_id = max(self.longest, len(ids)), max(self.largest_id, *ids)
        if len(kept) + empty < len(problems):
            over = len(problems) - len(kept) - empty
            say(f"{what}: {over} of {len(problems)} problems left out, over {self.most} tokens")
        if empty:
            say(f"{what}: {empty} of {len(problems)} problems left out, without a token")
        if empty == len(problems):
            raise BadSetting(f"{what} must hold problems that the model's tokenizer knows, got none with a token")
        if not kept:
            raise BadSetting(
                f"--max-prompt-length must let problems in, got {self.most}, which no problem of {what} fits"
            )
        return kept


def check_fit(model: str, prompts: Prompts, config: Config) -> None:
    """BadSetting where the prompts, with an answer, do not go into the model: too few positions, or rows for tokens."""
    shape, answer = AutoConfig.from_pretrained(model), config.rollout.max_completion_length
    most, rows = most_positions(shape), embedding_rows(shape)
    if most is not None and prompts.longest + answer > most:
        raise BadSetting(
            f"--max-completion-length must leave a sequence within the model's {most} positions, got {answer} after "
            f"the {prompts.longest} tokens of the longest problem; --max-prompt-length leaves long ones out"
        )
    if prompts.largest_id >= rows:
        token = prompts.tokenizer.convert_ids_to_tokens(prompts.largest_id)
        raise BadSetting(
            f"--model must have a row for every token of the problems, got {rows} rows, and the token {token!r} with "
            f"id {prompts.largest_id}: its tokenizer is another model's, or an added token has no row"
        )


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
