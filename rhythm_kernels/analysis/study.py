"""The parts that the studies `rhythm couple`, `perturb` and `value` share: flags, the model's answers, the report."""

import argparse
import hashlib
import json
import math
import re
import shlex
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rhythm_kernels.analysis.bootstrap import LEVEL, Estimate
from rhythm_kernels.analysis.environment import environment, heading
from rhythm_kernels.analysis.problems import GSM, STEPS, Problem, is_right, load_problems, paper_prompt
from rhythm_kernels.analysis.resume import Log
from rhythm_kernels.analysis.rollouts import answer_prompts
from rhythm_kernels.analysis.sources import (
    DTYPES,
    SMOLLM2,
    check_alternatives,
    check_device,
    check_folder,
    check_ids,
    check_layers,
    check_length,
    check_logits,
    check_receivers,
    check_temperature,
    check_text,
    encode_prompt,
    end_tokens,
    folder_named,
    layer_names,
    load,
    parse_layers,
)
from rhythm_kernels.analysis.vllm_engine import VLLM
from rhythm_kernels.checks import check_choice, check_int
from rhythm_kernels.files import write_whole
from rhythm_kernels.listen.taps import decoder_of, softmax_layers
from rhythm_kernels.weights import weights_digest

PROMPT_FORMATS = ("paper", "chat")
SILENT = ("bos", "eos", "sep", "pad")
SHOWN_TEXT = 60  # characters of a problem that an error names
VERSION = 1  # Raise it when a line of a log comes to mean something else: no log of before then continues.


class Answer(NamedTuple):
    """A problem and the model's answer to it, as token ids."""

    index: int
    """The index of the problem."""
    prompt: list[int]
    tokens: list[int]
    """The model's answer, up to its end token or the limit."""


# ---- flags -----------------------------------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and shows the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parser_of(study: str, description: str, *, temperature: float, batch_size: int) -> argparse.ArgumentParser:
    """Returns a parser with the flags of every study and these defaults; each study adds its own."""
    parser = argparse.ArgumentParser(
        prog=f"rhythm {study}",
        description=description,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "model", nargs="?", default=SMOLLM2, help='a folder, a .gguf file, a name on the Hugging Face hub, or "smollm2"'
    )
    parser.add_argument(
        "--task",
        default=GSM,
        help='"gsm"; gym:NAME or gym:NAME,OPTION=VALUE,... for a task of reasoning-gym; a set of python -m train or '
        'SET:FILE.jsonl, such as countdown-test; or the path of a JSONL file with a "prompt" or a "question" in each '
        'line, and the right "answer" if it is known; GSM8K\'s files are such',
    )
    parser.add_argument("--problems", type=int, default=70, help="number of problems, drawn at random from a file")
    parser.add_argument(
        "--prompt-format",
        default="paper",
        choices=PROMPT_FORMATS,
        help="paper: the paper's plain text for a base model; chat: the model's chat template",
    )
    parser.add_argument(
        "--prompt-end",
        help=f'what a problem in the chat template ends with ("{STEPS}"); "" for nothing. Problems of a set of python '
        "-m train stay as they are",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of problems, sampling, shuffles and intervals")
    parser.add_argument(
        "--batch-size", type=int, default=batch_size, help="number of problems that are computed together"
    )
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="largest number of tokens of an answer")
    parser.add_argument(
        "--temperature", type=float, default=temperature, help="sampling temperature of the answers; 0: greedy"
    )
    parser.add_argument(
        "--layers",
        default="all",
        help="layers that WAAD and FAI are read in: all, a number of layers of the middle third (5 is what credit "
        "reads), or a list such as 10,13,15",
    )
    parser.add_argument("--device", default="auto", help="auto (cuda where torch finds a GPU), cpu, cuda or cuda:1")
    parser.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="dtype of the weights; auto: as saved, float32 on a CPU"
    )
    parser.add_argument(
        "--out",
        type=folder_named,
        help=f"folder to write into, {study}-MODEL if left out; a run that was killed continues from what it has there",
    )
    return parser


def check_flags(args: argparse.Namespace, study: str) -> None:
    """Raises ValueError for values that argparse does not refuse, and fills in `out`."""
    for name in ("problems", "batch_size", "max_new_tokens"):
        check_int(f"--{name.replace('_', '-')}", getattr(args, name), 1)
    args.layers = parse_layers(args.layers)
    check_choice("--prompt-format", args.prompt_format, PROMPT_FORMATS)
    if args.prompt_end is None:
        args.prompt_end = STEPS if args.prompt_format == "chat" else ""
    elif args.prompt_format != "chat":
        raise ValueError(f"--prompt-end is read with --prompt-format chat alone, got {args.prompt_end!r}")
    check_text("--prompt-end", args.prompt_end)
    check_int("--seed", args.seed, 0, 2**63 - 1)
    check_temperature(args.temperature)
    check_choice("--dtype", args.dtype, list(DTYPES))
    check_device(args.device)
    if args.out is None:
        args.out = Path(f"{study}-{Path(args.model).name.removesuffix('.gguf') or 'model'}")


# ---- the run ---------------------------------------------------------------------------------------------------------


class Study:
    """A model, its problems, and the log of its answers and their measurements. Used as a context manager."""

    def __init__(self, name: str, args: argparse.Namespace, also: Sequence[str] = ()):
        """Loads the model and the problems, and opens the log.

        A log continues with more or fewer problems; every other flag that it depends on must stay the same.

        Args:
            name: the study, "couple", "perturb" or "value".
            args: its flags, checked.
            also: the study's own flags that its log depends on, beside the common ones.

        Raises:
            ValueError, OSError: the problems, the model or the log cannot be used.
        """
        self.name, self.args = name, args
        check_folder(args.out)
        self.problems = _problems_of(args)
        if args.prompt_end not in ("", STEPS) and all(problem.is_whole for problem in self.problems):
            raise ValueError(f"--prompt-end is not read with --task {args.task}, whose problems say how to answer")
        chat = args.prompt_format == "chat"
        self.model, self.tokenizer = load(args.model, device=args.device, dtype=DTYPES[args.dtype], chat=chat)
        self.layers = check_layers(self.model, args.layers)
        if "receivers" in args:
            args.receivers = check_receivers(self.model, args.receivers)
        self.ends = end_tokens(self.model)
        if "alternatives" in args:
            check_alternatives(self.model, self.ends | set(self.tokenizer.all_special_ids), args.alternatives)
        self.silent = self.ends | {getattr(self.tokenizer, f"{name}_token_id") for name in SILENT}
        self.prompts = [self._encode(problem) for problem in self.problems]
        _check_prompts(self.model, self.tokenizer, self.problems, self.prompts, args.max_new_tokens)
        check_logits(self.model, self.prompts[0])
        common = ("model", "task", "seed", "prompt_format", "prompt_end", "batch_size")
        common += ("max_new_tokens", "temperature", "layers")
        self.settings = {name: getattr(args, name) for name in (*common, *also)} | {
            "weights": weights_digest(self.model.named_parameters()),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "ends": sorted(self.ends),
            "version": VERSION,
        }
        self.log = Log(args.out / "log.jsonl", f"rhythm {name}", self.settings)
        self._vllm: VLLM | None = None

    def _encode(self, problem: Problem) -> list[int]:
        chat = self.args.prompt_format == "chat"
        if problem.is_whole:
            return encode_prompt(self.tokenizer, problem.text, chat=chat)
        text = problem.text + self.args.prompt_end if chat else paper_prompt(problem.text)
        return encode_prompt(self.tokenizer, text, chat=chat)

    def __enter__(self) -> "Study":
        return self

    def __exit__(self, *_) -> None:
        if self._vllm is not None:
            self._vllm.close()
        self.log.close()

    @property
    def vllm(self) -> VLLM | None:
        """vLLM with the study's model, loaded when it is first needed; None where transformers samples."""
        args = self.args
        if self._vllm is None and getattr(args, "engine", None) == "vllm":
            self._vllm = VLLM(
                args.model,
                ends=sorted(self.ends),
                max_model_len=max(map(len, self.prompts)) + args.max_new_tokens,
                dtype=self.model.dtype,
                memory=args.vllm_memory,
                seed=args.seed,
            )
        return self._vllm

    def measured(self, measure: Callable[[list[Answer]], list[dict[str, Any]]]) -> tuple[list[Answer], list[dict]]:
        """Returns the answers, and what `measure` returns for each batch of them, both from the log where it has them.

        The batches do not depend on where a run was stopped.
        """
        answers, results = [], []
        with tqdm(total=len(self.prompts), desc="problems", unit="problem") as bar:
            for begin in range(0, len(self.prompts), self.args.batch_size):
                prompts = self.prompts[begin : begin + self.args.batch_size]
                # with more problems, a last batch that was short gets a new key
                key = f"answers from {begin} {digest_of(prompts)}"
                generated = self.log.once(key, partial(self._generate, prompts, begin))
                indices = range(begin, begin + len(prompts))
                batch = [Answer(*each) for each in zip(indices, prompts, generated, strict=True)]
                golds = [self.problems[index].gold for index in indices]  # of a file that may have been corrected
                key = f"measured from {begin} {digest_of(prompts, generated, golds)}"
                results += self.log.once(key, partial(measure, batch))
                answers += batch
                bar.update(len(batch))
        return answers, results

    def _generate(self, prompts: list[list[int]], begin: int) -> list[list[int]]:
        args = self.args
        if self.vllm is not None:
            rooms = [args.max_new_tokens] * len(prompts)
            return self.vllm.complete(prompts, rooms, temperature=args.temperature, work=f"answers from {begin}")
        with (
            self.seeded(begin),
            tqdm(total=args.max_new_tokens, desc="answers", unit="token", leave=False) as bar,
        ):
            return answer_prompts(
                self.model,
                self.tokenizer,
                prompts,
                max_new_tokens=args.max_new_tokens,
                temperature=args.temperature,
                progress=bar.update,
            )

    @contextmanager
    def seeded(self, work: object) -> Iterator[None]:
        """Gives a piece of work its own seed, so that a resumed run draws the same, and restores torch's generators."""
        with torch.random.fork_rng([self.model.device] if self.model.device.type == "cuda" else []):
            torch.manual_seed(int(hashlib.sha256(f"{self.args.seed} {work}".encode()).hexdigest()[:15], 16))
            yield

    def text_of(self, tokens: list[int]) -> str:
        """Returns the text of tokens, with the special ones."""
        return self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    def words_of(self, tokens: list[int]) -> str:
        """Returns the text of an answer without the tokens that begin, end or pad it, which a verifier reads."""
        return self.text_of([token for token in tokens if token not in self.silent])

    def ended(self, answer: Answer) -> bool:
        """Whether the model ended the answer itself; the limit has cut off the others."""
        return answer.tokens[-1] in self.ends

    def described(self, answers: list[Answer]) -> str:
        """Returns sentences on the study: the layers it read, how many answers are cut off, and how many are right."""
        there = softmax_layers(decoder_of(self.model))
        layers = f"WAAD and FAI are those of {layer_names(self.layers, there)}"
        if self.layers != there:
            layers += f" of {len(there)}"
        cut = sum(not self.ended(answer) for answer in answers)
        text = f"{layers}. {cut} of {len(answers)} answers were cut off after {self.args.max_new_tokens:,} tokens"
        right = [is_right(self.problems[a.index], self.words_of(a.tokens)) for a in answers]
        known = [one for one in right if one is not None]
        return text + f", and {sum(known)} of {len(known)} end in the right result." * bool(known) + "." * (not known)


def _problems_of(args: argparse.Namespace) -> list[Problem]:
    """Returns the problems of --task, which every error names."""
    try:
        return load_problems(args.task, args.problems, args.seed)
    except OSError as error:
        raise ValueError(
            f"--task must be {GSM}, gym:NAME, a set of problems or a file to read, got {args.task!r}: "
            f"{error.strerror or error}"
        ) from error
    except ValueError as error:
        raise ValueError(f"--task {error}") from error


def digest_of(*values: Any) -> str:
    """Returns a digest of values that JSON can hold."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]


def _check_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    prompts: list[list[int]],
    new_tokens: int,
) -> None:
    for problem, prompt in zip(problems, prompts, strict=True):
        name = f"the problem {shortened(problem.text)!r}"
        if not prompt:
            raise ValueError(f"{name} has no token")
        got = f"{len(prompt)} tokens and {new_tokens} new ones"
        check_length(model, len(prompt) + new_tokens, name, got)
        check_ids(model, tokenizer, prompt, name)


def shortened(text: str) -> str:
    """Returns the beginning of a problem's text, which tells it from others where a seed draws their order."""
    return text if len(text) <= SHOWN_TEXT else f"{text[:SHOWN_TEXT]}..."


# ---- the report ------------------------------------------------------------------------------------------------------

INTERVALS = f"Brackets are {LEVEL:.0%} intervals of a bootstrap over problems."


def check_room(args: argparse.Namespace, tokens: int) -> None:
    """Raises ValueError if no answer can have the tokens that are needed to measure one."""
    if args.max_new_tokens < tokens:
        raise ValueError(
            f"--max-new-tokens must be at least {tokens}, the tokens that are needed to measure an answer, "
            f"got {args.max_new_tokens}"
        )


def too_short(tokens: int) -> ValueError:
    """Returns the error of a study in which every answer is too short to be measured."""
    return ValueError(
        f"no answer has {tokens} tokens, which are needed to measure one: give more --max-new-tokens, or other problems"
    )


def report_of(
    study: Study, arguments: Sequence[str], title: str, paragraphs: Sequence[str], numbers: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Returns (report.md, the data of report.json): the command, the environment, and what the study adds."""
    command = shlex.join(["rhythm", study.name, *arguments])
    where = environment(study.model.device)
    parts = (f"# {title}", folded(command), *map(_fold, (heading(where), *paragraphs)))
    text = "\n".join(f"{part}\n" for part in parts)
    return text, {"command": command, "versions": where, "settings": study.settings, "layers": study.layers, **numbers}


def folded(command: str) -> str:
    """Returns a shell command as a block of code in Markdown, broken between its words into lines of 120 columns."""
    first, *words = map(shlex.quote, shlex.split(command))
    lines = [f"    {first}"]
    for word in words:
        if len(lines[-1]) + len(word) > 117:  # with a space before the word, and " \\" after it
            lines[-1] += " \\"
            lines.append(f"        {word}")
        else:
            lines[-1] += f" {word}"
    return "\n".join(lines)


def _fold(paragraph: str) -> str:
    """Returns a paragraph of Markdown in lines of at most 120 columns, a table and a block of code as they are."""
    if paragraph.startswith(("|", "```")):
        return paragraph
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False)


def quoted(text: str) -> str:
    """Returns a model's text as a block of code in lines of at most 100 characters.

    Its fence is longer than any run of backticks in the text.
    """
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    lines = [part for line in text.split("\n") for part in _cut(line)]
    return "\n".join([f"{fence}text", *lines, fence])


def _cut(line: str) -> list[str]:
    """Returns a line in parts of at most 100 characters; a shorter one stays as it is, spaces at its ends included."""
    return [line] if len(line) <= 100 else textwrap.wrap(line, 100, replace_whitespace=False)


def shown(number: Estimate | float, spec: str = ".3f") -> str:
    """Returns a number, an estimate with its interval in brackets if it has one, or a dash where it is not defined."""
    if isinstance(number, Estimate):
        interval = f" [{number.low:{spec}}, {number.high:{spec}}]"
        return shown(number.value, spec) + interval * (not math.isnan(number.low))
    return "–" if math.isnan(number) else f"{number:{spec}}"


def write_report(out: Path, text: str, data: dict[str, Any]) -> None:
    """Writes report.md and report.json, each whole or not at all, and prints the report; NaN becomes null."""
    contents = {"report.md": text, "report.json": json.dumps(without_nan(data), indent=1, allow_nan=False) + "\n"}
    for name, content in contents.items():
        write_whole(out / name, content)
    print(text)
    print(f"{out / 'report.md'}, {out / 'report.json'}, {out / 'figure.png'}")


def without_nan(data: Any) -> Any:
    """Returns the data with null in place of NaN and infinity, and estimates as dicts."""
    if isinstance(data, Estimate):
        return without_nan(data._asdict())
    if isinstance(data, dict):
        return {key: without_nan(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [without_nan(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
