"""Batches in verl's form, its real FSDP engine on a CPU, and the dense rhythm of each sequence."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import verl
from hydra import compose, initialize_config_dir
from models import SIZES, eager_maps, qwen3
from tensordict import TensorDict
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine import EngineRegistry

from rhythm_kernels import reference
from rhythm_kernels.heads import group_heads, sampled_layers

CONFIG = Path(verl.__file__).parent / "trainer" / "config"
EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "verl"
LENGTHS = [(5, 30), (9, 41), (3, 12), (7, 1), (2, 26), (11, 33)]
"""Prompt and response tokens of each sequence."""


@cache
def _compose(*overrides: str):
    with initialize_config_dir(str(CONFIG), version_base=None):
        return compose("ppo_trainer", overrides=["algorithm.adv_estimator=grpo", *overrides])


def composed(*overrides: str):
    """Returns verl's config with these overrides, a copy of one's own."""
    return deepcopy(_compose(*overrides))


def save_model(folder: Path, **sizes) -> Path:
    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    qwen3(**sizes).save_pretrained(folder)
    words = {f"t{i}": i for i in range(SIZES["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "t0")), pad_token="t0", eos_token="t1", unk_token="t0"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def write_countdown(folder: Path) -> Path:
    """Writes a few of the example's problems."""
    command = [sys.executable, str(EXAMPLES / "countdown.py"), "--out", str(folder), "--train", "24", "--test", "8"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def script_flags(folder: Path, script: str, *args: str, **env: str) -> list[str]:
    """Returns the arguments with which a run script of the examples calls Python."""
    python = folder / "python"
    python.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    python.chmod(0o755)
    command = ["bash", str(EXAMPLES / script), *args]
    ran = subprocess.run(command, env=os.environ | {"PYTHON": str(python)} | env, text=True, capture_output=True)
    assert ran.returncode == 0, ran.stderr
    return [line for line in ran.stdout.splitlines() if not line.startswith("waiting")]


def make_engine(
    folder: Path, strategy="fsdp2", *, packed=True, fused=False, lora=0, precision="fp32", attention="sdpa", **config
):
    """Returns the engine of verl's registry; world size 1 unless torch.distributed runs."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    engine = EngineRegistry.new(
        model_type="language_model",
        backend=strategy,
        model_config=HFModelConfig(
            path=str(folder),
            use_remove_padding=packed,
            use_fused_kernels=fused,
            lora_rank=lora,
            target_modules="all-linear",
            fused_kernel_options={"impl_backend": "torch"},
            override_config={"attn_implementation": attention},
        ),
        engine_config=FSDPEngineConfig(
            strategy=strategy,
            use_torch_compile=False,
            mixed_precision={"param_dtype": precision, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
            **config,
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def nested(rows) -> torch.Tensor:
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def make_fields(lengths=LENGTHS, seed: int = 1) -> dict[str, torch.Tensor]:
    """Returns the fields of a batch after verl's rollout; longer responses have a hole, like a tool's answer."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(SIZES["vocab_size"], (sum(pair),), generator=generator) for pair in lengths]
    masks = [torch.ones(response, dtype=torch.long) for _, response in lengths]
    for mask in masks:
        if len(mask) > 20:
            mask[8:14] = 0
    return {
        "input_ids": nested(rows),
        "position_ids": nested(torch.arange(len(row)) for row in rows),
        "prompts": nested(row[:prompt] for row, (prompt, _) in zip(rows, lengths)),
        "responses": nested(row[prompt:] for row, (prompt, _) in zip(rows, lengths)),
        "response_mask": nested(masks),
        "loss_mask": nested(masks),
    }


def make_batch(fields: dict[str, torch.Tensor], request: dict | None = None, **settings) -> TensorDict:
    """Returns the batch that a worker gets in a compute_log_prob call."""
    batch = TensorDict(fields, batch_size=len(fields["input_ids"]))
    defaults = {
        "temperature": 1.0,
        "calculate_entropy": True,
        "compute_loss": False,
        "use_remove_padding": True,
        "use_dynamic_bsz": True,
        "max_token_len_per_gpu": 64,
        "micro_batch_size_per_gpu": 2,
    }
    tu.assign_non_tensor(batch, **defaults | settings)
    if request is not None:
        tu.assign_non_tensor(batch, rhythm=json.dumps({"options": {}, "groups": None} | request))
    return batch


def log_prob_pass(engine, batch: TensorDict) -> dict[str, torch.Tensor]:
    with engine.eval_mode():
        return engine.infer_batch(batch, loss_function=None)["model_output"]


def response_rows(fields: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Returns R of each whole sequence, bool."""
    pairs = zip(fields["input_ids"].unbind(), fields["response_mask"].unbind())
    return [torch.cat([torch.zeros(len(ids) - len(mask)), mask]).bool() for ids, mask in pairs]


class Dense(NamedTuple):
    """The dense values of each sequence, fp64."""

    waad: list[torch.Tensor]  # [T]
    fai: list[torch.Tensor]  # [T]
    spans: list[torch.Tensor]  # [L HQ]


def dense_of_each(folder: Path, fields: dict[str, torch.Tensor], dtype=torch.float32, groups=None) -> Dense:
    """Computes each sequence alone, from eager attention's maps; head groups [1, L HQ] for all, or of its own spans."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=dtype).eval()
    layers = sampled_layers(model.config.num_hidden_layers)
    dense = Dense([], [], [])
    for ids, rows in zip(fields["input_ids"].unbind(), response_rows(fields)):
        maps = eager_maps(model, input_ids=ids[None], use_cache=False)
        segments = torch.zeros(1, len(ids), dtype=torch.long)
        heads = torch.cat([maps[layer].double() for layer in layers], 1)  # [1, L HQ, T, T]
        spans = reference.span(heads, rows[None], segments, 1)
        local_heads, global_heads = group_heads(spans) if groups is None else groups
        dense.waad.append(reference.waad(heads[local_heads].mean(0)[None, None], rows[None], 10)[0, 0])
        dense.fai.append(reference.fai(heads[global_heads].mean(0)[None, None], rows[None], segments, (10, 50))[0, 0])
        dense.spans.append(spans[0])
    return dense


def assert_rhythm(output, folder: Path, fields: dict[str, torch.Tensor], groups=None, atol: float = 2e-5) -> None:
    """Holds the rhythm of a model output against that of each sequence alone."""
    dense = dense_of_each(folder, fields, groups=groups)
    for name, wanted in (("rhythm_waad", dense.waad), ("rhythm_fai", dense.fai)):
        for index, (row, expected) in enumerate(zip(output[name].unbind(), wanted, strict=True)):
            error = (row.double() - expected).abs().max().item()
            assert error < atol, f"{name} of sequence {index}: off by {error}"
