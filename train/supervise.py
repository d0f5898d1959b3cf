"""The supervised warm start: the policy learns from search demonstrations until it can search by itself.

The result is cached under a hash of everything that made it, so that every later run starts from it at once.
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rhythm_kernels.tasks import Problem
from train import loading, words
from train.config import BadSetting, Config
from train.console import bar, say
from train.distributed import World
from train.loading import build_model
from train.words import build_tokenizer, demonstrate

BATCHES_PER_SORT = 16  # demonstrations are sorted by length over this many batches, which halves the padding


def warm_start_path(config: Config, seed: int) -> Path:
    """Where this configuration's warm start lies, by a hash of its settings and of the code that it goes through."""
    code = "".join(Path(file).read_text(encoding="utf-8") for file in (words.__file__, loading.__file__, __file__))
    parts = [
        asdict(config.words),
        asdict(config.model),
        asdict(config.demonstrations),
        context_length(config),
        seed,
        code,
    ]
    digest = hashlib.sha256(json.dumps([*parts, torch.__version__]).encode()).hexdigest()
    return Path(config.run.cache) / f"{config.preset}-{digest[:16]}"


def context_length(config: Config) -> int:
    """Tokens in the longest prompt and completion of a run."""
    return config.words.numbers + 3 + config.rollout.max_completion_length


def warm_start(config: Config, seed: int, problems: list[Problem], world: World) -> Path:
    """The folder of this seed's supervised model, trained now by the first rank unless it is there already."""
    folder = warm_start_path(config, seed)
    if world.is_first:
        if folder.exists():
            say(f"[seed {seed}] warm start found in {folder}")
        else:
            make_warm_start(folder, config, seed, problems, world.device)
    world.barrier()
    return folder


def make_warm_start(folder: Path, config: Config, seed: int, problems: list[Problem], device: torch.device) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder.parent):  # before the training, not after it
            pass
    except OSError as error:
        raise BadSetting(f"--cache must be a folder to write in, got {config.run.cache!r}: {error.strerror}") from error
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(config.model, tokenizer, context_length(config)).to(device)
    loss = supervise(model, config, seed, problems, tokenizer)
    say(f"[seed {seed}] warm start: loss {loss:.3f} after {config.demonstrations.sft_steps} steps, kept in {folder}")
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    try:
        unfinished.rename(folder)
    except OSError:  # another run made the same one meanwhile
        shutil.rmtree(unfinished)


def supervise(
    model: PreTrainedModel, config: Config, seed: int, problems: list[Problem], tokenizer: PreTrainedTokenizerBase
) -> float:
    """Next-token training on demonstrations' answers; returns the last steps' mean loss."""
    style = config.demonstrations
    optimizer = torch.optim.AdamW(model.parameters(), lr=style.sft_learning_rate, weight_decay=0.01, fused=True)
    warm_up = max(1, style.sft_steps // 20)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=warm_up),
            torch.optim.lr_scheduler.CosineAnnealingLR(
                optimizer, max(1, style.sft_steps - warm_up), eta_min=0.1 * style.sft_learning_rate
            ),
        ],
        milestones=[warm_up],
    )
    batches = demonstration_batches(config, seed, problems, tokenizer)
    steps = bar(range(style.sft_steps), f"[seed {seed}] supervised", "step")
    recent = float("nan")
    for step in steps:
        ids, attention_mask, target_mask = (tensor.to(model.device) for tensor in next(batches))
        labels = ids.masked_fill(target_mask == 0, -100)
        loss = model(input_ids=ids, attention_mask=attention_mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 20 == 0 or step == style.sft_steps - 1:
            recent = loss.item()
            steps.set_postfix(loss=f"{recent:.3f}", refresh=False)
    return recent


def demonstration_batches(
    config: Config, seed: int, problems: list[Problem], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless (ids, attention_mask, target_mask), each [B, T]; targets are the answer and its end of sequence."""
    style, draw = config.demonstrations, random.Random(seed)
    while True:
        examples = []
        for problem in draw.choices(problems, k=BATCHES_PER_SORT * style.sft_batch_size):
            prompt = tokenizer.encode(problem.prompt)
            answer = tokenizer.encode(demonstrate(problem, config.words, style, draw))
            examples.append((prompt, [*answer, tokenizer.eos_token_id]))
        examples.sort(key=lambda example: len(example[1]))
        size = style.sft_batch_size
        batches = [examples[start : start + size] for start in range(0, len(examples), size)]
        draw.shuffle(batches)
        yield from (_pad(batch, tokenizer.pad_token_id) for batch in batches)


def _pad(examples: list[tuple[list[int], list[int]]], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    width = max(len(prompt) + len(answer) for prompt, answer in examples)
    ids = torch.full((len(examples), width), pad)
    attention_mask, target_mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(examples):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        attention_mask[row, :end] = 1
        target_mask[row, len(prompt) : end] = 1
    return ids, attention_mask, target_mask
