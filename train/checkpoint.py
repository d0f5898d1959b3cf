"""Writes checkpoints that survive a kill at any moment, and restores runs from them to the bit.

    checkpoints/step-000025/
      trainer.json          step, config, state shared by all ranks; every tensor's shape, every file's size and CRC32
      rank-R.safetensors    rank R's random generators and other tensors of its own
      state/                parameters and optimizer state: each rank writes its shards, any number of ranks read them
      model/                the whole model and the tokenizer, for from_pretrained

A checkpoint is written under another name, flushed to the disk and renamed, so a folder `step-...` is complete.
Everything is safetensors and JSON; nothing is unpickled. All ranks must see the folder. A failure on one rank is raised
on all with the same message, so that none waits for the others forever.
"""

import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from train.config import RunError, flag_name
from train.distributed import weights_of, whole_weights

FORMAT = 1
RECORD, STATE, MODEL = "trainer.json", "state", "model"
UNFINISHED = "unfinished-"
FILE_BYTES = 2 << 30  # the most state that a rank puts into one file; DCP builds a file in memory
CHUNK_BYTES = 16 << 20

T = TypeVar("T")


class CheckpointError(RunError):
    """Raised if a checkpoint cannot be written, is damaged, or is another run's."""


class Checkpoint(NamedTuple):
    """Holds what `restore` returns: the step, and the arguments of `save_checkpoint` at that step."""

    step: int
    shared: dict
    own: dict[str, Tensor] | None
    """None on a rank that the saved run did not have; its random generators stay unchanged."""


def list_checkpoints(run: Path) -> list[Path]:
    """Returns the complete checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob("step-*")
    return sorted((path for path in folders if re.fullmatch(r"step-\d{6,}", path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def save_checkpoint(
    run: Path,
    step: int,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    tokenizer: PreTrainedTokenizerBase,
    *,
    shared: dict,
    own: dict[str, Tensor],
    config: dict,
    keep: int,
) -> Path:
    """Writes the checkpoint of `step`, removes all but the last `keep`, and returns the folder; every rank calls it.

    A complete checkpoint of that step is kept. Numbers in the optimizer's param_groups, such as the learning rate, are
    not saved.

    Args:
        shared, config: values that JSON can hold; rank 0's are written.
        own: each rank's own tensors.

    Raises:
        CheckpointError: it cannot be written. The unfinished folder is removed first.
    """
    folder = run / "checkpoints" / f"step-{step:06d}"
    unfinished = folder.with_name(UNFINISHED + folder.name)
    if _on_first_rank(folder.exists):
        return folder
    record = {"format": FORMAT, "step": step, "torch": torch.__version__, "config": config, "shared": shared}
    try:
        _on_first_rank(lambda: _make_room(unfinished))
        record["tensors"] = _on_all_ranks(lambda: _write_state(unfinished, model, optimizer, own))[0]
        _export(unfinished / MODEL, model, tokenizer)
        names = _on_first_rank(lambda: _files_in(unfinished))
        sums = _on_all_ranks(lambda: {name: _flush_and_sum(unfinished / name) for name in _my_share(names)})
        record["files"] = {name: size_and_crc for share in sums for name, size_and_crc in share.items()}
        record["world_size"] = len(sums)
        _on_first_rank(lambda: _publish(unfinished, folder, record))
    except CheckpointError as error:
        cause = str(error)
        raise CheckpointError(_on_first_rank(lambda: _clean_up(unfinished, folder, cause))) from error
    _on_first_rank(lambda: _prune(run, keep))
    return folder


def restore(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, *, config: dict) -> Checkpoint:
    """Restores parameters, optimizer state and random generators from a checkpoint; all ranks call it.

    Each file's size and CRC32, settings and the model's shapes and dtypes are checked before anything is changed.
    Tensors are copied into the model's own memory and into optimizer state created as by a first step, so that a
    resumed run repeats to the bit.

    Args:
        model, optimizer: built as at the run's start, on any number of ranks.
        config: the settings that must be those of the saved run; it may have others.

    Raises:
        CheckpointError: the checkpoint is damaged, or another run's.
    """
    rank, _ = _rank_and_world()
    record = _on_all_ranks(lambda: _verify(folder))[rank]
    tensors = {f"model/{name}": tensor for name, tensor in weights_of(model).items()}
    saved = {name: spec for name, spec in record["tensors"].items() if name.startswith("model/")}
    there = {name: value for name, value in record["config"].items() if name in config}
    _compare(folder, "other settings", _reprs(there), _reprs(config))
    _compare(folder, "another model", saved, _specs(tensors))
    _make_optimizer_state(model, optimizer, record["tensors"])
    tensors = _state(model, optimizer)
    _compare(folder, "another optimizer", record["tensors"], _specs(tensors))
    own = _on_all_ranks(lambda: _read_state(folder, tensors, rank if rank < record["world_size"] else None))[rank]
    return Checkpoint(record["step"], record["shared"], own)


# The state in a checkpoint


def _state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns the tensors model/NAME and optimizer/NAME/KEY, each with its sharding.

    The model's tensors come from `weights_of`: torch's get_model_state_dict names a tied weight twice, and it would be
    written twice.
    """
    state = {f"model/{name}": tensor for name, tensor in weights_of(model).items()}
    if optimizer.state:  # otherwise torch would create it, and leave Adam one step ahead
        for name, values in get_optimizer_state_dict(model, optimizer)["state"].items():
            state |= {f"optimizer/{name}/{key}": value for key, value in values.items()}
    return state


def _specs(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}" for name, value in tensors.items()}


def _make_optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, saved: Iterable[str]):
    """Creates the optimizer's state of the saved parameters as in training."""
    stepped = {name.split("/")[1] for name in saved if name.startswith("optimizer/")}
    optimizer.state.clear()
    if stepped:
        get_optimizer_state_dict(model, optimizer)  # creates it, by a step with gradients and learning rate of 0
    for name, parameter in model.named_parameters():
        if name not in stepped:
            optimizer.state.pop(parameter, None)


# Writing


def _make_room(unfinished: Path):
    for leftover in unfinished.parent.glob(f"{UNFINISHED}*"):
        shutil.rmtree(leftover)
    unfinished.mkdir(parents=True)


def _write_state(
    unfinished: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, own: dict[str, Tensor]
) -> dict[str, str]:
    rank, world = _rank_and_world()
    state = _state(model, optimizer)
    files, filled = {}, 0
    for name, tensor in state.items():
        filled += tensor.numel() * tensor.element_size()
        files[name] = 1 + filled // (FILE_BYTES * world)
    writer = dcp.HuggingFaceStorageWriter(unfinished / STATE, fqn_to_index_mapping=files, save_distributed=True)
    with _one_process_is_fine():
        dcp.save(state, storage_writer=writer)
    kept = {f"own/{name}": tensor.detach().cpu().clone() for name, tensor in own.items()}
    kept["generator/cpu"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        kept["generator/cuda"] = torch.cuda.get_rng_state()
    save_file(kept, unfinished / f"rank-{rank}.safetensors")
    return _specs(state)


def _export(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    """Writes the model in its config's dtype. Rank 0 holds it whole on the CPU, the others one weight at a time."""
    config, dtype = model.config, model.config.dtype or model.dtype
    weights, failure = {}, None
    for name, weight in whole_weights(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype):
        if _rank_and_world()[0] == 0 and failure is None:
            try:
                weights[name] = weight.cpu()
            except (RuntimeError, MemoryError) as error:  # raised below: the other ranks wait for the weights to come
                failure = error
                weights.clear()

    def write():
        if failure is not None:
            raise failure
        try:
            model.save_pretrained(folder, state_dict=weights)
        finally:
            config.dtype = dtype  # save_pretrained sets it to the parameters'
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    _on_first_rank(write)


def _publish(unfinished: Path, folder: Path, record: dict):
    (unfinished / RECORD).write_text(json.dumps(record | {"crc32": _sum_of(record)}, indent=1) + "\n")
    for path in (unfinished / RECORD, unfinished / STATE, unfinished / MODEL, unfinished):
        _flush(path)
    unfinished.rename(folder)
    _flush(folder.parent)
    _flush(folder.parent.parent)


def _clean_up(unfinished: Path, folder: Path, cause: str) -> str:
    """Removes what was written, and returns the message that says so."""
    run = folder.parent.parent
    free = shutil.disk_usage(run).free
    shutil.rmtree(unfinished, ignore_errors=True)
    left = f"its rest is left in {unfinished}" if unfinished.exists() else "its rest was removed"
    complete = list_checkpoints(run)
    there = f"--resume would continue from {complete[-1].name}" if complete else "there is no complete checkpoint yet"
    return f"could not write checkpoint {folder}: {cause}; {free / 2**30:.1f} GiB were free there; {left}; {there}"


def _prune(run: Path, keep: int):
    for old in list_checkpoints(run)[:-keep]:
        doomed = old.rename(old.with_name(UNFINISHED + old.name))  # so that it never looks complete while half removed
        shutil.rmtree(doomed)


# Reading


def _verify(folder: Path) -> dict:
    """Returns the record after checking it and this rank's share of the files."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
        form = record["format"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(folder, RECORD, f"cannot be read ({type(error).__name__}: {error})") from error
    if form != FORMAT:
        raise _damaged(folder, RECORD, f"has format {form!r}, and this version reads {FORMAT}")
    if record.pop("crc32", None) != _sum_of(record):
        raise _damaged(folder, RECORD, "has another CRC32 than when it was written")
    files = record["files"]
    for name in _my_share(files):
        path, (size, crc) = folder / name, files[name]
        if not path.is_file():
            raise _damaged(folder, name, "is missing")
        if path.stat().st_size != size:
            raise _damaged(folder, name, f"has {path.stat().st_size} bytes, and {size} were written")
        if _crc32(path) != crc:
            raise _damaged(folder, name, "has another CRC32 than when it was written")
    for path in (folder / STATE).iterdir():
        if f"{STATE}/{path.name}" not in files:  # DCP would read it as one more shard
            raise _damaged(folder, f"{STATE}/{path.name}", "was not written with it")
    return record


def _damaged(folder: Path, name: str, what: str) -> CheckpointError:
    older = [path.name for path in list_checkpoints(folder.parent.parent) if step_of(path) < step_of(folder)]
    offer = f"remove that folder to continue from {older[-1]}" if older else "there is no older one to continue from"
    return CheckpointError(f"checkpoint {folder} is damaged: {name} {what}; {offer}")


def _compare(folder: Path, what: str, there: dict[str, str], here: dict[str, str]):
    changed = [
        f"{name} {there.get(name, 'absent')} there, {here.get(name, 'absent')} here"
        for name in there | here
        if there.get(name) != here.get(name)
    ]
    if changed:
        more = f"; and {len(changed) - 10} more" if len(changed) > 10 else ""
        raise CheckpointError(f"checkpoint {folder} is of {what}: {'; '.join(changed[:10])}{more}")


def _read_state(folder: Path, tensors: dict[str, Tensor], rank: int | None) -> dict[str, Tensor] | None:
    """Fills `tensors`; on a rank of the saved run also restores its generators and returns its own tensors."""
    with _one_process_is_fine():
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(folder / STATE))
    if rank is None:
        return None
    kept = load_file(folder / f"rank-{rank}.safetensors")
    torch.set_rng_state(kept["generator/cpu"])
    if "generator/cuda" in kept and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(kept["generator/cuda"])
    return {name.removeprefix("own/"): value.clone() for name, value in kept.items() if name.startswith("own/")}


# Ranks


def _rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def _on_all_ranks(work: Callable[[], T]) -> list[T]:
    """Runs `work` on every rank; returns all results, or raises the first failing rank's error on every rank."""
    rank, world = _rank_and_world()
    result = failure = error = None
    try:
        result = work()
    except (Exception, CheckpointException) as caught:
        error, failure = caught, _failure(caught, rank, world)
    outcomes = [(result, failure)]
    if world > 1:
        outcomes *= world
        dist.all_gather_object(outcomes, (result, failure))
    for _, failure in outcomes:
        if failure:
            raise CheckpointError(failure) from error
    return [result for result, _ in outcomes]


def _on_first_rank(work: Callable[[], T]) -> T:
    """Runs `work` on rank 0; returns its result, or raises its error, on every rank."""
    return _on_all_ranks(lambda: work() if _rank_and_world()[0] == 0 else None)[0]


def _failure(error: BaseException, rank: int, world: int) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, CheckpointException):  # from DCP: the same on all ranks, with each rank's failure
        rank, (error, _) = next(iter(error.failures.items()))
    where = f"rank {rank}: " if world > 1 else ""
    return f"{where}{type(error).__name__}: {error}"


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


# Files


def _files_in(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _my_share(names: Iterable[str]) -> list[str]:
    """Returns the files whose CRC32 this rank computes."""
    rank, world = _rank_and_world()
    return sorted(names)[rank::world]


def _flush(path: Path):
    """Waits until the disk holds the contents of a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flush_and_sum(path: Path) -> tuple[int, int]:
    _flush(path)
    return path.stat().st_size, _crc32(path)


def _crc32(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc


def _sum_of(record: dict) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _reprs(settings: dict) -> dict[str, str]:
    return {flag_name(name): repr(value) for name, value in settings.items()}
