"""The parts that the studies `rhythm couple` and `rhythm perturb` share: flags, the model's answers, the report."""

import argparse
import hashlib
import json
import math
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rhythm_kernels.analysis.bootstrap import LEVEL, Estimate
from rhythm_kernels.analysis.environment import environment
from rhythm_kernels.analysis.problems import GSM, load_problems
from rhythm_kernels.analysis.resume import Log
from rhythm_kernels.analysis.sources import (
    DTYPES,
    SMOLLM2,
    check_device,
    check_folder,
    check_ids,
    check_length,
    encode_prompt,
    generate,
    load,
)
from rhythm_kernels.checks import check_choice, check_float, check_int

FIRST_WEIGHTS = 64  # values of each parameter, which tell one checkpoint from another


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


def parser_of(study: str, description: str) -> argparse.ArgumentParser:
    """Returns a parser with the flags of every study; each study adds its own."""
    parser = argparse.ArgumentParser(
        prog=f"rhythm {study}",
        description=description,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "model", nargs="?", default=SMOLLM2, help='a folder, a name on the Hugging Face hub, or "smollm2"'
    )
    parser.add_argument(
        "--task", default=GSM, help='"gsm", or the path of a JSONL file with a "prompt" or a "question" in each line'
    )
    parser.add_argument("--problems", type=int, default=70, help="number of problems")
    parser.add_argument("--seed", type=int, default=0, help="seed of problems, sampling, shuffles and intervals")
    parser.add_argument("--batch-size", type=int, default=8, help="number of answers that are generated together")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="largest number of tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="sampling temperature of the answers; 0: greedy")
    parser.add_argument(
        "--layers", type=int, default=5, help="number of layers that WAAD and FAI are read in, of the middle third"
    )
    parser.add_argument("--device", default="auto", help="auto (cuda where torch finds a GPU), cpu, cuda or cuda:1")
    parser.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="dtype of the weights; auto: as saved, float32 on a CPU"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help=f"folder to write into, {study}-MODEL if left out; a run that was killed continues from what it has there",
    )
    return parser


def check_flags(args: argparse.Namespace, study: str) -> None:
    """Raises ValueError for values that argparse does not refuse, and fills in `out`."""
    for name in ("problems", "batch_size", "max_new_tokens", "layers"):
        check_int(f"--{name.replace('_', '-')}", getattr(args, name), 1)
    check_int("--seed", args.seed, 0, 2**63 - 1)
    check_float("--temperature", args.temperature, 0.0)
    check_choice("--dtype", args.dtype, list(DTYPES))
    check_device(args.device)
    if args.out is None:
        args.out = Path(f"{study}-{Path(args.model).name or 'model'}")


# ---- the run ---------------------------------------------------------------------------------------------------------


class Study:
    """A model, its problems, and the log of its answers and their measurements. Used as a context manager."""

    def __init__(self, name: str, args: argparse.Namespace, also: Sequence[str] = (), longer: int = 0):
        """Loads the model and the problems, and opens the log.

        A log continues with more or fewer problems; every other flag that it depends on must stay the same.

        Args:
            name: the study, "couple" or "perturb".
            args: its flags, checked.
            also: the study's own flags that its log depends on, beside the common ones.
            longer: the number of tokens that may follow an answer's end.

        Raises:
            ValueError, OSError: the problems, the model or the log cannot be used.
        """
        self.name, self.args = name, args
        check_folder(args.out)
        texts = load_problems(args.task, args.problems, args.seed)
        self.model, self.tokenizer = load(args.model, device=args.device, dtype=DTYPES[args.dtype])
        self.prompts = [encode_prompt(self.tokenizer, text) for text in texts]
        _check_prompts(self.model, self.tokenizer, self.prompts, args.max_new_tokens + longer)
        common = ("model", "task", "seed", "batch_size", "max_new_tokens", "temperature", "layers")
        self.settings = {name: getattr(args, name) for name in (*common, *also)} | {
            "weights": weights_digest(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
        }
        self.log = Log(args.out / "log.jsonl", f"rhythm {name}", self.settings)

    def __enter__(self) -> "Study":
        return self

    def __exit__(self, *_) -> None:
        self.log.close()

    def measured(self, measure) -> list[dict[str, Any]]:
        """Returns the result of each problem in order, from the log or from `measure(answer)`."""
        results = []
        with tqdm(total=len(self.prompts), desc="problems", unit="problem") as bar:
            for answer in answers(self.log, self.model, self.tokenizer, self.prompts, self.args):
                key = f"problem {answer.index} {digest_of(answer.prompt, answer.tokens)}"
                results.append(self.log.once(key, partial(measure, answer)))
                bar.update()
        return results


def answers(
    log: Log,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    args: argparse.Namespace,
) -> Iterator[Answer]:
    """Yields the model's answer to each prompt; the batches do not depend on where a run was stopped."""
    for begin in range(0, len(prompts), args.batch_size):
        batch = prompts[begin : begin + args.batch_size]
        key = (
            f"answers from {begin} {digest_of(batch)}"  # with more problems, a last batch that was short gets a new key
        )
        generated = log.once(key, partial(_generate, model, tokenizer, batch, args, begin))
        for index, (prompt, tokens) in enumerate(zip(batch, generated, strict=True), begin):
            yield Answer(index, prompt, tokens)


def _generate(model, tokenizer, prompts: list[list[int]], args: argparse.Namespace, begin: int) -> list[list[int]]:
    devices = [model.device] if model.device.type == "cuda" else []
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    with (
        torch.random.fork_rng(devices),
        tqdm(total=args.max_new_tokens, desc="answers", unit="token", leave=False) as bar,
    ):
        # each batch has its own seed, so that a resumed run samples the same answers
        torch.manual_seed(int(hashlib.sha256(f"{args.seed} {begin}".encode()).hexdigest()[:15], 16))
        return generate(model, tokenizer, prompts, progress=bar.update, **options)


def digest_of(*values: Any) -> str:
    """Returns a digest of values that JSON can hold."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]


def _check_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], new_tokens: int
) -> None:
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise ValueError(f"problem {number} has no token")
        got = f"{len(prompt)} tokens and {new_tokens} new ones"
        check_length(model, len(prompt) + new_tokens, f"problem {number}", got)
        check_ids(model, tokenizer, prompt, f"problem {number}")


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """Returns a digest of the names, shapes and first values of all parameters, which differs between checkpoints."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        first = weight.flatten()[:FIRST_WEIGHTS].float().tolist()
        digest.update(f"{name} {list(weight.shape)} {first}\n".encode())
    return digest.hexdigest()[:16]


# ---- the report ------------------------------------------------------------------------------------------------------

INTERVALS = f"Brackets are {LEVEL:.0%} intervals of a bootstrap over problems."


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
    described = ", ".join(f"{name} {value}" for name, value in where.items())
    text = "\n".join(f"{part}\n" for part in (f"# {title}", f"    {command}", *map(_fold, (described, *paragraphs))))
    return text, {"command": command, "versions": where, "settings": study.settings, **numbers}


def _fold(paragraph: str) -> str:
    """Returns a paragraph of Markdown in lines of at most 120 columns, a table as it is."""
    if paragraph.startswith("|"):
        return paragraph
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(estimate: Estimate, spec: str = ".3f") -> str:
    """Returns a number with its interval in brackets, or a dash where the number is not defined."""
    if math.isnan(estimate.value):
        return "–"
    return f"{estimate.value:{spec}} [{estimate.low:{spec}}, {estimate.high:{spec}}]"


def write_report(out: Path, text: str, data: dict[str, Any]) -> None:
    """Writes report.md and report.json, each whole or not at all, and prints the report; NaN becomes null."""
    contents = {"report.md": text, "report.json": json.dumps(without_nan(data), indent=1, allow_nan=False) + "\n"}
    for name, content in contents.items():
        unfinished = out / f"{name}.unfinished"
        unfinished.write_text(content, encoding="utf-8")
        unfinished.replace(out / name)
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
