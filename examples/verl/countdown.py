"""Makes Countdown problems as parquet files for verl, and gives verl the reward.

    python examples/verl/countdown.py --out ~/data/countdown     # train.parquet and test.parquet
    python -m verl.trainer.main_ppo ... reward.custom_reward_function.path=examples/verl/countdown.py

Problems are generated from a seed. verl calls `compute_score` for each answer, in its reward workers.
"""

import argparse
from pathlib import Path

from rhythm_kernels.tasks.countdown import from_row, generate_rows, verify

SOURCE = "countdown"


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> float:
    """Returns 1.0 if the last <answer> uses every number once and equals the target, else 0.0."""
    if data_source != SOURCE:
        raise ValueError(f"this reward is of {SOURCE}, got a problem of {data_source!r}")
    return verify(solution_str, ground_truth)


def to_verl(row: dict, index: int) -> dict:
    """Returns a problem {nums, target} as a row of verl's dataset."""
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
    parser.add_argument(
        "--out", type=Path, required=True, help="the folder to write train.parquet and test.parquet into"
    )
    parser.add_argument("--train", type=int, default=20_000, help="number of problems to train on (20000)")
    parser.add_argument("--test", type=int, default=512, help="number of held-out problems (512)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the problems (0)")
    args = parser.parse_args()
    rows = [to_verl(row, index) for index, row in enumerate(generate_rows(args.train + args.test, args.seed))]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows[: args.train]), ("test", rows[args.train :])):
        pd.DataFrame(part).to_parquet(args.out / f"{name}.parquet")
        print(f"{args.out / name}.parquet: {len(part)} problems")


if __name__ == "__main__":
    main()
