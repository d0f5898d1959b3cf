"""Countdown for verl: problems as parquet files, and the reward.

    python examples/verl/countdown.py --out ~/data/countdown     # train.parquet and test.parquet
    python -m verl.trainer.main_ppo ... reward.custom_reward_function.path=examples/verl/countdown.py

Problems are made on the spot from a seed. verl calls `compute_score` for each answer, in its reward workers.
"""

import argparse
from pathlib import Path

from rhythm_kernels.tasks.countdown import from_row, generate_rows, verify

SOURCE = "countdown"


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> float:
    """1.0 if the last <answer> uses every number once and equals the target, else 0.0."""
    if data_source != SOURCE:
        raise ValueError(f"this reward is of {SOURCE}, got a problem of {data_source!r}")
    return verify(solution_str, ground_truth)


def to_verl(row: dict, index: int) -> dict:
    """{nums, target} -> a row as verl's dataset reads it."""
    problem = from_row(**row)
    return {
        "data_source": SOURCE,
        "prompt": [{"role": "user", "content": problem.prompt}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": problem.answer},
        "extra_info": {"index": index},
    }


def main() -> None:
    import pandas as pd

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder of train.parquet and test.parquet")
    parser.add_argument("--train", type=int, default=20_000, help="problems to train on")
    parser.add_argument("--test", type=int, default=512, help="problems held out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = [to_verl(row, index) for index, row in enumerate(generate_rows(args.train + args.test, args.seed))]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows[: args.train]), ("test", rows[args.train :])):
        pd.DataFrame(part).to_parquet(args.out / f"{name}.parquet")
        print(f"{args.out / name}.parquet: {len(part)} problems")


if __name__ == "__main__":
    main()
