"""Checkpoints that survive a kill at any moment, and that a run continues from as if nothing had happened.

A checkpoint is a folder `checkpoints/step-N` that transformers' Auto classes load, and beside the model `trainer.pt`
with what else the next step depends on. It is written under another name, flushed to the disk and renamed: a folder of
that name is complete. Nothing in it is unpickled.
"""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rhythm_kernels import GroupSchedule
from train.data import ProblemStream

STATE = "trainer.pt"


class Position(NamedTuple):
    """How far a run has come: steps done, and the bytes of metrics.jsonl written by then."""

    step: int
    metrics_bytes: int


def load_policy(folder: Path, device: torch.device) -> PreTrainedModel:
    """The saved model in the dtype it was saved in, its weights copied into memory of their own.

    Loaded weights may lie in a mapped file, at an alignment that another process would not have; results that repeat
    to the bit want the same alignment.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="sdpa")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.to(device).eval()


def save_checkpoint(
    run: Path,
    position: Position,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    problems: ProblemStream,
    schedule: GroupSchedule,
    *,
    keep: int,
) -> Path:
    folder = run / "checkpoints" / f"step-{position.step:06d}"
    if folder.exists():
        return folder
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    state = {
        "position": position._asdict(),
        "optimizer": optimizer.state_dict(),
        "problems": problems.state_dict(),
        "schedule": schedule.state_dict(),
        "cpu_generator": torch.get_rng_state(),
        "cuda_generators": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    torch.save(state, unfinished / STATE)
    for path in [*unfinished.iterdir(), unfinished]:
        _flush(path)
    unfinished.rename(folder)
    _flush(folder.parent)
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return folder


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def restore(
    folder: Path, optimizer: torch.optim.Optimizer, problems: ProblemStream, schedule: GroupSchedule
) -> Position:
    """Puts optimizer, data cursor, head groups and random generators back to where the checkpoint was made."""
    state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    problems.load_state_dict(state["problems"])
    schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["cpu_generator"])
    if state["cuda_generators"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_generators"])
    return Position(**state["position"])


def _flush(path: Path):
    """Has the disk hold what was written to a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
