"""Checkpoints of two ranks: each continues to the bit, on any number of ranks, and a failure on one is one on all."""

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_train_checkpoint import (
    CONFIG,
    assert_equal,
    build,
    files_of_at_most,
    flip,
    no_space,
    save,
    step,
    values,
)
from transformers import AutoModelForCausalLM

import train.checkpoint
from train.checkpoint import CheckpointError, list_checkpoints, restore
from train.distributed import whole_weights


class Full:
    """A weight that does not fit."""

    def cpu(self):
        raise MemoryError("no room")


def of_two(rank: int, folder: Path):
    """Runs on each of the two ranks of test_two_ranks."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model, optimizer = build(0, sharded=True, tie_word_embeddings=True)
    torch.manual_seed(rank)  # other tokens on each rank
    step(model, optimizer, 2)
    with torch.no_grad():
        model(torch.zeros(1, 3, dtype=torch.long))  # leaves the root's parameters gathered
    saved = save(folder / "run", 2, model, optimizer, own={"rank": torch.tensor(rank)})
    at_2 = values(model, optimizer)
    if rank == 0:
        torch.save(at_2, folder / "at-2.pt")
    step(model, optimizer, 2)
    want, draw = values(model, optimizer), torch.rand(3)

    again, other = build(1, sharded=True, tie_word_embeddings=True)
    torch.manual_seed(5)
    checkpoint = restore(saved, again, other, config=CONFIG)
    assert checkpoint.step == 2 and checkpoint.own["rank"] == rank
    step(again, other, 2)
    assert_equal(values(again, other), want)
    assert torch.equal(torch.rand(3), draw)

    alone = folder / "alone" / "checkpoints" / "step-000007"
    generator = torch.get_rng_state()
    checkpoint = restore(alone, again, other, config=CONFIG)
    assert checkpoint.own == ({} if rank == 0 else None)
    assert torch.equal(torch.get_rng_state(), generator) == (rank == 1)
    assert_equal(values(again, other), torch.load(folder / "alone.pt"))

    full = files_of_at_most(10_000) if rank == 1 else nullcontext()  # fails alone, and the other must not wait for it
    with full, pytest.raises(CheckpointError, match="rank 1: OSError: .* File too large; .*from step-000002"):
        save(folder / "run", 4, model, optimizer)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:  # holds the whole model, which all ranks gather
            patch.setattr(
                "train.checkpoint.whole_weights", lambda *args: ((n, Full()) for n, _ in whole_weights(*args))
            )
        with pytest.raises(CheckpointError, match="rank 0: MemoryError: no room; .*from step-000002"):
            save(folder / "run", 4, model, optimizer)
    if rank == 1:
        train.checkpoint.save_file = no_space
    with pytest.raises(CheckpointError, match="rank 1: OSError: .* No space left on device; .*from step-000002"):
        save(folder / "run", 4, model, optimizer)
    assert [path.name for path in (folder / "run" / "checkpoints").iterdir()] == ["step-000002"]
    name = "state/shard-00002-model-00001-of-00001.safetensors"
    if rank == 1:
        shutil.copytree(saved, folder / "damaged" / "checkpoints" / "step-000002")
        flip(folder / "damaged" / "checkpoints" / "step-000002" / name)
    dist.barrier()
    with pytest.raises(CheckpointError, match=f"is damaged: {name} has another CRC32"):
        restore(folder / "damaged" / "checkpoints" / "step-000002", again, other, config=CONFIG)
    os._exit(0)  # gloo's threads may still hold tensors, and abort an interpreter that ends before they let go


@pytest.mark.slow
def test_two_ranks(tmp_path):
    """FSDP2: two ranks continue bit for bit, read what one wrote and the other way round, and fail together."""
    model, optimizer = build(3, tie_word_embeddings=True)
    step(model, optimizer, 2)
    save(tmp_path / "alone", 7, model, optimizer)
    torch.save(values(model, optimizer), tmp_path / "alone.pt")
    mp.spawn(of_two, (tmp_path,), nprocs=2)

    (folder,) = list_checkpoints(tmp_path / "run")
    checkpoint = restore(folder, model, optimizer, config=CONFIG)
    assert checkpoint.own["rank"] == 0
    want = torch.load(tmp_path / "at-2.pt")
    assert_equal(values(model, optimizer), want)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert_equal(dict(loaded.named_parameters()), {name: want[name] for name, _ in loaded.named_parameters()})
    assert json.loads((folder / "model" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
