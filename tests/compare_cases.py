"""Made-up runs of four steps, as `train.compare` finds them."""

import json
from pathlib import Path

from train.compare.cells import CELLS
from train.config import Config
from train.launch import write_config
from train.metrics import FILE
from train.presets import load_preset
from train.solve_rates import Evaluation, SolveRate

STEPS = (0, 2, 4)


def settings(**changes) -> Config:
    return load_preset("countdown-smoke").change(eval_steps=2, **changes)


def make_run(folder: Path, config: Config, seed: int, sampled=(0.1, 0.3, 0.2), greedy=(0.4, 0.4, 0.5)) -> Path:
    """Writes the folder of a finished run of four steps, whose evaluations have these solve rates."""
    write_config(config.change(seeds=(seed,), output=str(folder)), folder)
    records = []
    for step, of_step in zip(STEPS, zip(sampled, greedy, strict=True), strict=True):
        if step:
            both = [(step - 1, 0.2, 30.0, 0.5), (step, 0.4 + seed / 10, 20.0 + seed, 0.25)]
            names = ("step", "reward", "completions/mean_length", "completions/clipped_ratio")
            records += [dict(zip(names, values, strict=True)) for values in both]
        rates = [SolveRate(solved, 0.9, 0.01, 16) for solved in of_step]
        records.append({"step": step, **Evaluation(dict(zip(("sampled", "greedy"), rates, strict=True))).metrics()})
    (folder / FILE).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def make_grid(out: Path, gains: dict[str, list[float]], **changes) -> list[Path]:
    """Writes runs of these cells whose last sampled rate is 0.2 + 0.01 seed, and a gain for each seed above it."""
    return [
        make_run(out / cell / f"seed-{seed}", settings(**changes, **CELLS[cell]), seed,
                 sampled=(0.1, 0.15, 0.2 + 0.01 * seed + gain))
        for cell, of_cell in gains.items()
        for seed, gain in enumerate(of_cell)
    ]  # fmt: skip
