"""One of two ranks of `test_two_ranks_that_shard_the_model`: python -m verl_two_ranks MODEL FOLDER."""

import os
import sys
from pathlib import Path

import torch
import verl_cases as cases


def main() -> None:
    model, folder, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    engine = cases.make_engine(model)
    output = cases.log_prob_pass(engine, cases.make_batch(cases.make_fields(cases.LENGTHS[rank::2], seed=rank), {}))
    torch.save(output, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
