"""What the studies have in common: their flags, the answers that they look at, and their report."""

import argparse
import hashlib
import json
import math
import platform
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rhythm_kernels
from rhythm_kernels.analysis.bootstrap import LEVEL, Estimate
from rhythm_kernels.analysis.problems import GSM, load_problems
from rhythm_kernels.analysis.resume import Log
from rhythm_kernels.analysis.sources import (
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

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FIRST_WEIGHTS = 64  # of each parameter, that tell one checkpoint from another


class Answer(NamedTuple):
    index: int
    """Of the problem."""
    prompt: list[int]
    tokens: list[int]
    """The model's answer, to its end or as far as it was let."""


# ---- flags -----------------------------------------------------------------------------------------------------------


def parser_of(study: str, description: str) -> argparse.ArgumentParser:
    """The flags of every study; each adds its own."""
    parser = argparse.ArgumentParser(
        prog=f"rhythm {study}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", nargs="?", default=SMOLLM2, help="folder or name on the Hugging Face hub")
    parser.add_argument("--task", default=GSM, help='"gsm", or FILE.jsonl with a "prompt" or "question" in each line')
    parser.add_argument("--problems", type=int, default=70)
    parser.add_argument("--seed", type=int, default=0, help="of problems, sampling, shuffles and intervals")
    parser.add_argument("--batch-size", type=int, default=8, help="answers generated together")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the answers; 0 is greedy")
    parser.add_argument("--layers", type=int, default=5, help="that WAAD and FAI are sampled from")
    parser.add_argument("--device", default="auto", help="of torch; auto: cuda where there is one")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: float32 on a CPU, else the weights' own")
    parser.add_argument("--out", type=Path, help=f"folder that a killed run goes on from; {study}-MODEL if left out")
    return parser


def check_flags(args: argparse.Namespace, study: str) -> None:
    """Raises ValueError for what argparse lets through, and fills in `out`."""
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
    """A model, its problems, and the log of what it has answered. Use it as a context; `answers` does the work."""

    def __init__(self, name: str, args: argparse.Namespace, also: Sequence[str] = (), longer: int = 0):
        """Loads the model and the problems, and opens the log.

        The log goes on with more or fewer problems, but for no other flag that it depends on.

        Args:
            also: flags of the study that its log depends on, beside the common ones.
            longer: tokens that may follow an answer's end.

        Raises: ValueError, OSError: of the problems, the model, or the log.
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
        self.log.__exit__()

    def measured(self, measure) -> list[dict[str, Any]]:
        """The result of each problem, in their order: of the log, or `measure(answer)` of what is not there yet."""
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
    """The model's answer to each prompt, generated in batches that do not depend on where a run was stopped."""
    for begin in range(0, len(prompts), args.batch_size):
        part = prompts[begin : begin + args.batch_size]
        key = f"answers from {begin} {digest_of(part)}"  # another last batch, of more problems, is not this one
        made = log.once(key, partial(_generate, model, tokenizer, part, args, begin))
        for index, (prompt, tokens) in enumerate(zip(part, made, strict=True), begin):
            yield Answer(index, prompt, tokens)


def _generate(model, tokenizer, prompts: list[list[int]], args: argparse.Namespace, begin: int) -> list[list[int]]:
    on = [model.device] if model.device.type == "cuda" else []
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    with torch.random.fork_rng(on), tqdm(total=args.max_new_tokens, desc="answers", unit="token", leave=False) as bar:
        # each batch draws from its own seed: a resumed run draws the same
        torch.manual_seed(int(hashlib.sha256(f"{args.seed} {begin}".encode()).hexdigest()[:15], 16))
        return generate(model, tokenizer, prompts, progress=bar.update, **options)


def digest_of(*values: Any) -> str:
    """Of what JSON can hold."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]


def _check_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], new: int
) -> None:
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise ValueError(f"problem {number} has no token")
        check_length(model, len(prompt) + new, f"problem {number}", f"{len(prompt)} tokens and {new} new ones")
        check_ids(model, tokenizer, prompt, f"problem {number}")


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """Of the names, shapes and first values of all parameters: another checkpoint has another."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        first = weight.flatten()[:FIRST_WEIGHTS].float().tolist()
        digest.update(f"{name} {list(weight.shape)} {first}\n".encode())
    return digest.hexdigest()[:16]


# ---- the report ------------------------------------------------------------------------------------------------------


def versions(device: torch.device) -> dict[str, str]:
    """Device, versions, and the commit where the package is in a checkout of its own."""
    on_gpu = device.type == "cuda"
    found = {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "rhythm_kernels": metadata.version("rhythm_kernels"),
    }
    root = Path(rhythm_kernels.__file__).resolve().parent.parent
    if _git(root, "rev-parse", "--show-toplevel") == str(root):
        # results are written while others are still made
        dirty = _git(root, "status", "--porcelain", "--", ".", ":!benchmarks/results")
        found["commit"] = _git(root, "rev-parse", "--short", "HEAD") + ("-dirty" if dirty else "")
    return found


def _git(root: Path, *command: str) -> str:
    """What git says of a folder; empty without git or a checkout."""
    try:
        whole = ("git", "-C", str(root), *command)
        return subprocess.run(whole, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def command_of(study: str, arguments: Sequence[str]) -> str:
    return shlex.join(["rhythm", study, *arguments])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(estimate: Estimate, spec: str = ".3f") -> str:
    """A number with its interval."""
    if math.isnan(estimate.value):
        return "–"
    return f"{estimate.value:{spec}} [{estimate.low:{spec}}, {estimate.high:{spec}}]"


INTERVALS = f"In brackets: {LEVEL:.0%} intervals of a bootstrap over problems."


def write_report(out: Path, text: str, data: dict[str, Any]) -> None:
    """report.md and report.json, each whole or not at all; NaN becomes null."""
    contents = {"report.md": text, "report.json": json.dumps(without_nan(data), indent=1, allow_nan=False) + "\n"}
    for name, content in contents.items():
        unfinished = out / f"{name}.unfinished"
        unfinished.write_text(content, encoding="utf-8")
        unfinished.replace(out / name)


def without_nan(data: Any) -> Any:
    if isinstance(data, Estimate):
        return without_nan(data._asdict())
    if isinstance(data, dict):
        return {key: without_nan(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [without_nan(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
