"""Saves and loads the state of rhythm credit in a TRL checkpoint; a resumed run repeats to the bit."""

import json
from pathlib import Path

import torch
from transformers.utils import logging

from rhythm_kernels.checks import check_int
from rhythm_kernels.group_schedule import GroupSchedule

logger = logging.get_logger(__name__)

STATE_FILE = "rhythm_state.json"
"""The file's name in a checkpoint's folder."""


def save_state(folder: Path, schedule: GroupSchedule, draws: int, layers: list[int] | None) -> None:
    """Writes the head groups, the number of draws so far, and the layers whose attention is read."""
    state = schedule.state_dict()
    spans = None if state["spans"] is None else state["spans"].tolist()  # fp32 to decimals and back is exact
    state |= {"spans": spans, "draws": draws, "layers": layers}
    (folder / STATE_FILE).write_text(json.dumps(state))


def load_state(folder: Path, schedule: GroupSchedule, draws: int, layers: list[int] | None) -> int:
    """Gives the schedule the head groups of a checkpoint, and returns the number of draws before it.

    If the file is missing, warns, returns `draws` and leaves the schedule unchanged. Also leaves it unchanged, with a
    warning, if the file has the spans of other layers.

    Raises:
        ValueError: the file does not hold such a state.
    """
    file = folder / STATE_FILE
    if not file.exists():
        logger.warning(f"{file} is missing: the heads are ranked anew at the first step")
        return draws
    try:
        state = json.loads(file.read_text())
        saved_layers, draws = state.pop("layers", layers), check_int("draws", state.pop("draws"), 0)
        state["spans"] = None if state["spans"] is None else torch.tensor(state["spans"], device="cpu")
        if saved_layers == layers:
            schedule.load_state_dict(state)
            return draws
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} must be what a checkpoint of rhythm credit holds: {error!r}") from error
    logger.warning(f"{file} has the spans of layers {saved_layers}, not {layers}: the heads are ranked anew")
    return draws
