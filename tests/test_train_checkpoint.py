"""Checkpoints: bit-equal on one process and on two, whole after a kill at any moment, and clear when they fail."""

import errno
import json
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import train.checkpoint
from train.checkpoint import CheckpointError, list_checkpoints, restore, save_checkpoint
from train.distributed import whole

CONFIG = {"learning_rate": 0.1, "misses": [0.9, 0.99]}
SHARED = {"cursor": [3, 1], "metrics_bytes": 12345}


def tokenizer():
    words = Tokenizer(WordLevel({"<pad>": 0, "one": 1, "two": 2}, unk_token="<pad>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")


def build(seed: int, *, sharded: bool = False, dtype: torch.dtype = torch.float32, fused: bool = True, **sizes):
    """A tiny model and its AdamW. Vocabulary 61 and key heads of 16: two ranks get unequal shards."""
    torch.manual_seed(seed)
    model = llama(
        **{"num_hidden_layers": 1, "hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1} | sizes
    )
    model.to(dtype)
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, fused=fused)


def step(model, optimizer, times: int = 1):
    """Optimizer steps on tokens drawn from torch's generator, so that they show where that stands."""
    for _ in range(times):
        ids = torch.randint(61, (2, 9))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def save(run: Path, at: int, model, optimizer, *, own=None, keep: int = 9, config=CONFIG) -> Path:
    own = {} if own is None else own
    return save_checkpoint(run, at, model, optimizer, tokenizer(), shared=SHARED, own=own, config=config, keep=keep)


def values(model, optimizer) -> dict[str, torch.Tensor]:
    """Whole tensors of all that training changes."""
    state = model.state_dict(keep_vars=True)
    names = {id(tensor): name for name, tensor in state.items()}
    for parameter, kept in optimizer.state.items():
        state |= {f"{names[id(parameter)]} {key}": value for key, value in kept.items()}
    return {name: whole(value.detach()).clone() for name, value in state.items()}


def assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]):
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []
    assert all(got[name].dtype == want[name].dtype for name in want)


@pytest.fixture
def saved(tmp_path):
    """A run with checkpoints of steps 25 and 50."""
    model, optimizer = build(0)
    for at in (25, 50):
        step(model, optimizer)
        save(tmp_path, at, model, optimizer, own={"mine": torch.arange(3)})
    return tmp_path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fused": False},
        {"tie_word_embeddings": True},
        {"dtype": torch.bfloat16},
    ],
    ids=["fused", "foreach", "tied", "bfloat16"],
)
def test_training_continues_bit_for_bit(tmp_path, options):
    model, optimizer = build(0, **options)
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)  # has no optimizer state
    step(model, optimizer, 3)
    own = {"scalar": torch.tensor(2.5), "mask": torch.tensor([True, False]), "none": torch.zeros(0, 3)}
    folder = save(tmp_path, 3, model, optimizer, own=own)
    step(model, optimizer, 3)
    end = torch.rand(3)

    again, other = build(1, **options)
    again.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    places = [parameter.data_ptr() for parameter in again.parameters()]
    checkpoint = restore(folder, again, other, config=CONFIG)
    assert (checkpoint.step, checkpoint.shared) == (3, SHARED)
    assert_equal(checkpoint.own, own)
    assert [parameter.data_ptr() for parameter in again.parameters()] == places
    moments = [value for state in other.state.values() for value in state.values()]
    assert all(value.data_ptr() % 64 == 0 for value in moments)  # where torch's allocator puts them, not a mapped file
    assert all(parameter.grad is None for parameter in again.parameters())
    assert other.param_groups[0]["lr"] == 0.01 and frozen not in optimizer.state
    step(again, other, 3)
    assert_equal(values(again, other), values(model, optimizer))
    assert torch.equal(torch.rand(3), end)


def test_a_checkpoint_before_the_first_step(tmp_path):
    model, optimizer = build(0)
    folder = save(tmp_path, 0, model, optimizer)
    step(model, optimizer, 2)
    again, other = build(1)
    step(again, other)  # state that is not the checkpoint's
    restore(folder, again, other, config=CONFIG)
    assert not other.state
    step(again, other, 2)
    assert_equal(values(again, other), values(model, optimizer))


def test_state_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(train.checkpoint, "FILE_BYTES", 10_000)
    model, optimizer = build(0)
    step(model, optimizer)
    folder = save(tmp_path, 1, model, optimizer)
    assert len(list((folder / "state").iterdir())) > 3
    again, other = build(1)
    restore(folder, again, other, config=CONFIG)
    assert_equal(values(again, other), values(model, optimizer))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_users_load_the_model(tmp_path, tied):
    """In the config's dtype, though it is trained in float32; training goes on in float32."""
    model, optimizer = build(0, tie_word_embeddings=tied)
    model.config.dtype = torch.bfloat16
    for at in (1, 2):  # save_pretrained sets the config's dtype to the parameters'
        folder = save(tmp_path, at, model, optimizer) / "model"
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        assert loaded.dtype == torch.bfloat16 and type(loaded) is type(model)
        assert_equal(dict(loaded.named_parameters()), {n: p.bfloat16() for n, p in model.named_parameters()})
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert AutoTokenizer.from_pretrained(folder)("two one").input_ids == [2, 1]
    assert model.dtype == torch.float32 and model.config.dtype == torch.bfloat16


def test_the_last_are_kept(tmp_path):
    model, optimizer = build(0)
    for at in (8, 999_999, 1_000_000, 9):
        save(tmp_path, at, model, optimizer, keep=3)
    names = [folder.name for folder in list_checkpoints(tmp_path)]
    assert names == ["step-000009", "step-999999", "step-1000000"]
    record = (tmp_path / "checkpoints" / names[0] / "trainer.json").stat()
    save(tmp_path, 9, model, optimizer, keep=3)  # is there: left as it is
    assert (tmp_path / "checkpoints" / names[0] / "trainer.json").stat() == record
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == sorted(names)


def test_nothing_is_unpickled(saved, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    folder = list_checkpoints(saved)[-1]
    restore(folder, *build(1), config=CONFIG)
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors"}


def test_the_generator_of_a_gpu(tmp_path, monkeypatch):
    """It is saved and put back where CUDA is in use; played here without a GPU."""
    model, optimizer = build(0)
    put_back = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.arange(16, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", put_back.append)
    restore(save(tmp_path, 1, model, optimizer), model, optimizer, config=CONFIG)
    assert len(put_back) == 1 and torch.equal(put_back[0], torch.arange(16, dtype=torch.uint8))


def test_the_disk_has_everything_before_the_folder_has_its_name(tmp_path, monkeypatch):
    flushed, renamed = [], []
    fsync, rename = os.fsync, Path.rename

    def recorded(handle):
        flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def check(path, target):
        renamed.append({path, *path.rglob("*")} - set(flushed))
        flushed.clear()
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(Path, "rename", check)
    folder = save(tmp_path, 1, *build(0))
    assert renamed == [set()]
    assert {folder.parent, tmp_path} <= set(flushed)


def in_child(work) -> int:
    """The exit status of `work` in a forked process; 0 if it returned."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # the parent's OpenMP threads are not there
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_nothing(tmp_path):
    """SIGKILL before each operation on the file system in turn, pruning included: a good checkpoint is always there."""
    run = tmp_path / "run"
    model, optimizer = build(0)
    step(model, optimizer)
    save(run, 1, model, optimizer)
    before = values(model, optimizer)
    step(model, optimizer)
    after = values(model, optimizer)

    def save_until(last: int):
        seen = 0

        def hook(event, args):
            nonlocal seen
            writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
                seen += 1
                if seen == last:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        save(run, 2, model, optimizer, keep=1)

    found = []
    for last in range(1, 200):
        shutil.copytree(run, tmp_path / "kept")
        status = in_child(lambda last=last: save_until(last))
        complete = list_checkpoints(run)
        again, other = build(1)
        for folder in complete:
            newest = restore(folder, again, other, config=CONFIG).step
            assert_equal(values(again, other), before if newest == 1 else after)
        found.append((newest, len(complete)))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        save(run, 3, model, optimizer, keep=2)  # removes what was left
        assert {path.name for path in (run / "checkpoints").iterdir()} == {p.name for p in list_checkpoints(run)}
        shutil.rmtree(run)
        (tmp_path / "kept").rename(run)
    assert status == 0 and len(found) > 20
    assert sorted(set(found)) == [(1, 1), (2, 1), (2, 2)]


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def files_of_at_most(size: int):
    """Lets no file outgrow `size` bytes: a disk that is full for this process. Python ignores the signal that comes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "limit, patched, cause",
    [
        (20_000, None, "OSError: [Errno 27] File too large"),
        (300_000, None, "SafetensorError: Error while serializing: I/O error: File too large"),
        (10**6, "transformers.PreTrainedModel.save_pretrained", "OSError: [Errno 28] No space left on device"),
        (10**6, "train.checkpoint._publish", "OSError: [Errno 28] No space left on device"),
    ],
    ids=["state", "rank", "model", "record"],
)
def test_a_full_disk(saved, monkeypatch, limit, patched, cause):
    """The unfinished files go, the message says all that helps, and the older checkpoint and the next save work."""
    model, optimizer = build(0)
    step(model, optimizer)
    own = {"large": torch.zeros(100_000)}
    with monkeypatch.context() as patch, files_of_at_most(limit), pytest.raises(CheckpointError) as caught:
        if patched:
            patch.setattr(patched, no_space)
        save(saved, 75, model, optimizer, own=own)
    folder = saved / "checkpoints" / "step-000075"
    assert str(caught.value).startswith(f"could not write checkpoint {folder}: {cause}")
    assert re.search(
        r"; \d+\.\d GiB were free there; its rest was removed; --resume would continue from step-000050$",
        str(caught.value),
    )
    assert sorted(path.name for path in folder.parent.iterdir()) == ["step-000025", "step-000050"]
    assert restore(list_checkpoints(saved)[-1], *build(1), config=CONFIG).step == 50
    assert restore(save(saved, 75, model, optimizer, own=own), *build(1), config=CONFIG).step == 75


def test_a_failure_of_the_first_save(tmp_path):
    model, optimizer = build(0)
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="NotADirectoryError|FileExistsError") as caught:
        save(tmp_path, 1, model, optimizer)
    assert "there is no complete checkpoint yet" in str(caught.value)


def flip(path: Path, at: float = 0.7):
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


def rewrite(path: Path, old: str, new: str):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


STATE = "state/shard-00001-model-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    "name, harm, says",
    [
        (STATE, flip, "has another CRC32"),
        (STATE, lambda path: flip(path, 0.001), "has another CRC32"),
        ("rank-0.safetensors", flip, "has another CRC32"),
        ("model/model.safetensors", flip, "has another CRC32"),
        (STATE, lambda path: os.truncate(path, path.stat().st_size - 1), r"has \d+ bytes, and \d+ were written"),
        ("model/config.json", lambda path: os.truncate(path, 0), "has 0 bytes"),
        (STATE, Path.unlink, "is missing"),
        ("rank-0.safetensors", Path.unlink, "is missing"),
        ("state/shard-00009.safetensors", lambda path: path.write_bytes(b"more"), "was not written with it"),
        ("trainer.json", Path.unlink, "cannot be read"),
        ("trainer.json", lambda path: os.truncate(path, 100), "cannot be read"),
        ("trainer.json", lambda path: path.write_bytes(b"\xff\xfe\x00"), "cannot be read"),
        ("trainer.json", lambda path: path.write_text("[]"), "cannot be read"),
        ("trainer.json", lambda path: path.write_text("{}"), "cannot be read"),
        ("trainer.json", lambda path: path.write_text("[" * 100_000), "cannot be read"),
        ("trainer.json", lambda path: rewrite(path, '"step": 50', '"step": 58'), "has another CRC32"),
        ("trainer.json", lambda path: rewrite(path, '"format": 1', '"format": 9'), "has format 9, .* reads 1"),
    ],
)
def test_damage_is_found(saved, name, harm, says):
    older, newest = list_checkpoints(saved)
    harm(newest / name)
    model, optimizer = build(1)
    before = values(model, optimizer)
    with pytest.raises(CheckpointError, match=f"is damaged: {name} {says}") as caught:
        restore(newest, model, optimizer, config=CONFIG)
    assert str(newest) in str(caught.value)
    assert str(caught.value).endswith("remove that folder to continue from step-000025")
    assert_equal(values(model, optimizer), before)
    shutil.rmtree(newest)
    assert restore(older, model, optimizer, config=CONFIG).step == 25


def test_damage_with_no_older_checkpoint(saved):
    older, newest = list_checkpoints(saved)
    flip(older / STATE)
    with pytest.raises(CheckpointError, match="step-000025 is damaged.*there is no older one to continue from"):
        restore(older, *build(1), config=CONFIG)


def test_other_settings_are_named(saved):
    now = {"learning_rate": 0.2, "misses": [0.9, 0.99], "new": True}
    with pytest.raises(CheckpointError) as caught:
        restore(list_checkpoints(saved)[-1], *build(1), config=now)
    assert str(caught.value).endswith(
        "step-000050 is of other settings: --learning-rate 0.1 there, 0.2 here; --new absent there, True here"
    )


@pytest.mark.parametrize(
    "options, says",
    [
        ({"vocab_size": 67}, r"model/lm_head.weight float32 \[61, 24\] there, float32 \[67, 24\] here"),
        ({"dtype": torch.bfloat16}, r"embed_tokens.weight float32 \[61, 24\] there, bfloat16 \[61, 24\] here"),
        ({"num_hidden_layers": 2}, r"layers.1.mlp.up_proj.weight absent there, float32 \[64, 24\] here"),
        ({"tie_word_embeddings": True}, r"model/lm_head.weight float32 \[61, 24\] there, absent here"),
    ],
    ids=["shape", "dtype", "more", "fewer"],
)
def test_another_model_is_named(saved, options, says):
    model, optimizer = build(1, **options)
    before = values(model, optimizer)
    with pytest.raises(CheckpointError, match=f"step-000050 is of another model: .*{says}"):
        restore(list_checkpoints(saved)[-1], model, optimizer, config=CONFIG)
    assert_equal(values(model, optimizer), before)


def test_another_optimizer_is_named(saved):
    model, _ = build(1)
    with pytest.raises(
        CheckpointError, match=r"of another optimizer: .*/exp_avg float32 \[61, 24\] there, absent here"
    ):
        restore(list_checkpoints(saved)[-1], model, torch.optim.SGD(model.parameters(), momentum=0.9), config=CONFIG)
