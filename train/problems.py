"""Loads the problems for training and evaluation, and turns them into the policy's token ids."""

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from rhythm_kernels.fit import embedding_rows, most_positions
from rhythm_kernels.stops import end_of_turn, ends_of_text
from rhythm_kernels.tasks import BadSet, Problem
from rhythm_kernels.tasks.sets import SETS, drop_overlap, find_set, load_set
from rhythm_kernels.tasks.types import shorten
from train import words
from train.config import BadSetting, Config
from train.console import say
from train.distributed import World
from train.rewards import BOUNDED
from train.rollout import Completion


class EvalSet(NamedTuple):
    """Problems, each answered `answers` times at a temperature; None is greedy."""

    name: str
    """The name in the metrics, without a slash: a set from a file is named by set and file, as in math-500:mine."""
    problems: list[Problem]
    answers: int
    temperature: float | None


class Task(NamedTuple):
    train: list[Problem]
    evaluations: list[EvalSet]


@contextmanager
def reading_sets(flag: str) -> Iterator[None]:
    """Turns the error of a set that does not load into BadSetting, which names the flag."""
    try:
        yield
    except BadSet as error:
        raise BadSetting(f"{flag}: {error}") from error


@reading_sets("--train-data")
def load_task(config: Config, world: World) -> Task:
    """Loads --train-data and --eval-data; removes evaluation problems from the training problems."""
    name, tell = config.data.train_data, _teller(world)
    check_trains(name)
    evaluations = load_held_out(config, world)
    problems = words.split_problems(config.words).train if name == "words" else load_set(name, tell)
    train, repeats = drop_overlap(problems, [problem for held_out in evaluations for problem in held_out.problems])
    if repeats:
        tell(f"{name}: {repeats} problems left out that are evaluated on")
    if not train:
        raise BadSetting(f"--train-data {name} holds no problem that is not evaluated on")
    return Task(train, evaluations)


def check_trains(name: str) -> None:
    """Raises BadSetting for a named set that is to evaluate on; a file may be trained on, whatever its columns."""
    if name == "words":
        return
    source, file = find_set(name)
    if file is None and not source.evaluate:
        to_train = ", ".join(["words", *(key for key, known in SETS.items() if known.evaluate)])
        raise BadSetting(
            f"--train-data must be a set to train on, got {name}, which is to evaluate on; to train on are {to_train}, "
            f"and files: {name}:FILE.jsonl"
        )


@reading_sets("--eval-data")
def load_held_out(config: Config, world: World) -> list[EvalSet]:
    """Loads --eval-data, or the sets that belong to --train-data; the tiny Countdown has a sampled and a greedy set."""
    name, rollout = config.data.train_data, config.rollout
    temperature = (rollout.temperature if rollout.eval_temperature is None else rollout.eval_temperature) or None
    if name == "words" and not config.data.eval_data:
        held_out = words.split_problems(config.words).held_out
        sampled = [EvalSet("sampled", held_out, 1, temperature)] if temperature else []
        return [*sampled, EvalSet("greedy", held_out, 1, None)]
    names = config.data.eval_data or find_set(name)[0].evaluate
    if not names:
        raise BadSetting(f"--eval-data must name what to evaluate on, since nothing belongs to --train-data {name}")
    return load_evaluations(names, temperature, _teller(world))


@reading_sets("--eval-data")
def load_evaluations(
    names: Sequence[str], temperature: float | None, tell: Callable[[str], object] = say
) -> list[EvalSet]:
    """Loads the sets under distinct names, which appear in their metrics; greedily one answer a problem is all."""
    sets = {name: find_set(name) for name in names}
    labels = [name if sets[name][1] is None else f"{name.partition(':')[0]}:{sets[name][1].stem}" for name in names]
    for label, count in Counter(labels).items():
        if count > 1:
            same = ", ".join(name for name, other in zip(names, labels) if other == label)
            raise BadSetting(f"--eval-data must be sets of different names, got {same}, which are all called {label}")
    return [
        EvalSet(label, load_set(name, tell), sets[name][0].answers if temperature else 1, temperature)
        for label, name in zip(labels, names)
    ]


def _teller(world: World) -> Callable[[str], object]:
    return say if world.is_first else lambda line: None


def check_verifiers(sets: Sequence[Sequence[Problem]]) -> None:
    """Raises ModuleNotFoundError if verifying an answer needs a package that is missing."""
    maths = any(problem.verifier not in BOUNDED for problems in sets for problem in problems)
    if maths and importlib.util.find_spec("math_verify") is None:
        raise ModuleNotFoundError("No module named 'math_verify'", name="math_verify")


class Prompts:
    """Turns problems into the token ids that the policy reads, and its answers into the text that is verified."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: Config, stops: Sequence[int] = ()):
        """`stops` are the tokens that end a text of the model; the end of an assistant's turn is added to them."""
        self.tokenizer = tokenizer
        self.most = config.data.max_prompt_length
        self.as_chat = config.data.chat_template and tokenizer.chat_template is not None
        self.stops = sorted({*stops, *(end_of_turn(tokenizer) if self.as_chat else ())})
        """The tokens that end an answer."""
        self.ends = {tokenizer.eos_token_id, tokenizer.sep_token_id, *self.stops} - {None}
        self.silent = self.ends | {tokenizer.bos_token_id, tokenizer.pad_token_id}
        self.longest, self.largest_id = 0, 0
        """The most tokens of a prompt that fits, and the largest id of its tokens."""

    def encode(self, problem: Problem) -> list[int]:
        if self.as_chat:
            return self._encode_turn(problem.prompt)
        try:
            ids = self.tokenizer.encode(problem.prompt)
        except Exception as error:  # tokenizers raises no narrower one; that of the tiny Countdown has no other words
            raise BadSetting(
                f"the model's tokenizer cannot read the problem {shorten(problem.prompt)}: {error}"
            ) from error
        while ids and ids[-1] in self.ends:  # some tokenizers end every text, so the answer would begin after the end
            ids.pop()
        return ids

    def _encode_turn(self, text: str) -> list[int]:
        turn = [{"role": "user", "content": text}]
        try:
            return self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # a template is a program and can raise anything
            raise BadSetting(
                f"the model's chat template does not take a problem ({type(error).__name__}: {error}); "
                "--no-chat-template leaves it out"
            ) from error

    def decode(self, completions: Sequence[Completion]) -> list[str]:
        """Returns the answers' text without the tokens that begin, end or pad it; tags such as <think> belong to it."""
        ids = [[token for token in completion.ids if token not in self.silent] for completion in completions]
        return self.tokenizer.batch_decode(ids, skip_special_tokens=False)

    def words(self, ids: Sequence[int]) -> list[str]:
        """Returns the text of each token, for people to look at."""
        return [self.tokenizer.decode([token]) for token in ids]

    def all_fitting(self, evaluations: list[EvalSet]) -> list[EvalSet]:
        return [set_._replace(problems=self.fitting(set_.problems, set_.name)) for set_ in evaluations]

    def fitting(self, problems: list[Problem], what: str) -> list[Problem]:
        """Returns the problems that are not longer than --max-prompt-length, and says how many are left out."""
        kept, empty = [], 0
        for problem in problems:
            ids = self.encode(problem)
            empty += not ids
            if 0 < len(ids) <= self.most:
                kept.append(problem)
                self.longest, self.largest_id = max(self.longest, len(ids)), max(self.largest_id, *ids)
        if long := len(problems) - len(kept) - empty:
            say(f"{what}: {long} of {len(problems)} problems left out, over {self.most} tokens")
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
    """Raises BadSetting for prompts with answers beyond the model's positions, and for token ids that it lacks."""
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
    if not any(0 <= stop < rows for stop in prompts.stops):
        raise BadSetting(
            f"--model must have a row for a token that ends an answer, got {rows} rows, and the ends {prompts.stops}"
        )


def stop_ids(model: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens that end a text: the tokenizer's, and those of the model's generation settings."""
    try:
        settings = GenerationConfig.from_pretrained(model)
    except OSError:  # it has none, and transformers makes them from the configuration
        settings = GenerationConfig.from_model_config(AutoConfig.from_pretrained(model))
    stops = ends_of_text(settings, tokenizer)
    if not stops:
        raise BadSetting(f"--model must have a token that ends a text, got {model}, whose tokenizer names none")
    return sorted(stops)
