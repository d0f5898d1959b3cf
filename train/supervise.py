"""Trains the supervised warm start: the policy learns to search from demonstrations.

The result is cached under a hash of all that it depends on, so later runs start from it at once.
"""

import fcntl
import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rhythm_kernels.tasks import BadSet, Problem
from rhythm_kernels.tasks.sets import find_set
from rhythm_kernels.weights import broken_weight
from train.config import SHAPE, BadSetting, Config, RunError
from train.console import bar, say
from train.distributed import World
from train.loading import build_model
from train.words import build_tokenizer, demonstrate

# Raise it when a change here, in words.py or in build_model changes the weights for the same settings: cached warm
# starts are then not found. Comments and names do not matter.
VERSION = 1
BATCHES_PER_SORT = 16  # demonstrations are sorted by length over this many batches, which halves the padding


def warm_start_path(config: Config, seed: int) -> Path:
    """Returns the folder of this configuration's warm start, named by a hash of settings and versions."""
    shape = {name: getattr(config.model, name) for name in SHAPE}
    settings = [asdict(config.words), shape, asdict(config.demonstrations)]
    parts = [*settings, context_length(config), seed, VERSION, torch.__version__]
    if config.data.eval_data:  # whose problems it is not trained on
        parts.append([_contents(name) for name in config.data.eval_data])
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return Path(config.run.cache) / f"{config.preset}-{digest[:16]}"


def _contents(name: str) -> tuple[str, str | None]:
    """Returns what names the problems of a set: the kind and a hash of its file, or its own name."""
    try:
        _, file = find_set(name)
        return (name, None) if file is None else (name.partition(":")[0], hashlib.sha256(file.read_bytes()).hexdigest())
    except (OSError, BadSet):  # none that a run could read
        return name, None


def context_length(config: Config) -> int:
    """Returns the number of tokens in the longest prompt and completion of a run."""
    return config.words.numbers + 3 + config.rollout.max_completion_length


def warm_start(config: Config, seed: int, problems: list[Problem], world: World) -> Path:
    """Returns the folder of this seed's supervised model; the first rank trains it if it is missing."""
    folder = warm_start_path(config, seed)

    def find_or_make() -> None:
        if folder.exists():
            say(f"[seed {seed}] warm start found in {folder}")
            return
        with claim_warm_start(folder, config):
            if not folder.exists():  # another run may have made it while this one waited
                make_warm_start(folder, config, seed, problems, world.device)

    world.from_first(find_or_make)
    return folder


@contextmanager
def claim_warm_start(folder: Path, config: Config) -> Iterator[None]:
    """Locks a warm start for this process; waits while another one makes it, as runs side by side would."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.with_name(f"{folder.name}.lock"), "w")  # noqa: SIM115
    except OSError as error:
        raise BadSetting(f"--cache must be a folder to write in, got {config.run.cache!r}: {error.strerror}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_warm_start(folder: Path, config: Config, seed: int, problems: list[Problem], device: torch.device) -> None:
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(config.model, tokenizer, context_length(config)).to(device)
    loss = supervise(model, config, seed, problems, tokenizer)
    if name := broken_weight(model):
        rate = config.demonstrations.sft_learning_rate
        raise RunError(f"the warm start diverged, with NaN or infinity in {name}: --sft-learning-rate is {rate:g}")
    say(f"[seed {seed}] warm start: loss {loss:.3f} after {config.demonstrations.sft_steps} steps, kept in {folder}")
    unfinished = folder.with_name(f"{folder.name}.tmp")  # what a process left that was killed is written over
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise RunError(f"could not keep the warm start in --cache {config.run.cache!r}: {error}") from error


def supervise(
    model: PreTrainedModel, config: Config, seed: int, problems: list[Problem], tokenizer: PreTrainedTokenizerBase
) -> float:
    """Trains on the demonstrations' next tokens; returns the last step's loss."""
    steps, rate = config.demonstrations.sft_steps, config.demonstrations.sft_learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, fused=True)
    warm_up = max(1, steps // 20)
    rising = LinearLR(optimizer, 0.05, total_iters=warm_up)
    falling = CosineAnnealingLR(optimizer, max(1, steps - warm_up), eta_min=0.1 * rate)
    schedule = SequentialLR(optimizer, [rising, falling], milestones=[warm_up])
    batches = demonstration_batches(config, seed, problems, tokenizer)
    loss = torch.tensor(float("nan"))
    for step in (progress := bar(range(steps), f"[seed {seed}] supervised", "step")):
        batch = {name: tensor.to(model.device) for name, tensor in next(batches).items()}
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return loss.item()


def demonstration_batches(
    config: Config, seed: int, problems: list[Problem], tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, Tensor]]:
    """Yields, without end, input_ids, attention_mask and labels, each [B, T]; labels are the answers and their ends."""
    size, draw = config.demonstrations.sft_batch_size, random.Random(seed)
    while True:
        examples = []
        for problem in draw.choices(problems, k=BATCHES_PER_SORT * size):
            prompt = tokenizer.encode(problem.prompt)
            answer = tokenizer.encode(demonstrate(problem, config.words, draw))
            examples.append((prompt, [*answer, tokenizer.eos_token_id]))
        examples.sort(key=lambda example: len(example[1]))
        batches = [examples[start : start + size] for start in range(0, len(examples), size)]
        draw.shuffle(batches)
        yield from (_pad(batch, tokenizer.pad_token_id) for batch in batches)


def _pad(examples: list[tuple[list[int], list[int]]], pad: int) -> dict[str, Tensor]:
    ids = [torch.tensor(prompt + answer) for prompt, answer in examples]
    labels = [torch.tensor([-100] * len(prompt) + answer) for prompt, answer in examples]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }
