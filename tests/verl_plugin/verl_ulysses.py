"""Passes of verl's engine whose ranks share each sequence, with a stand-in for flash attention's kernel."""

from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import verl_cases as cases
from flash_stand_in import flash_attention

import rhythm_kernels.integrations.verl as plugin
from rhythm_kernels.heads import group_heads

LENGTHS = [(5, 30), (9, 41), (3, 12), (7, 1), (2, 26), (11, 33), (6, 17), (1, 60)]
GROUPS = [group.flatten().tolist() for group in group_heads(torch.rand(1, 18, generator=torch.Generator().manual_seed(2)))]
PASSES: dict[str, dict] = {
    "own groups": {"request": {}},
    "one micro-batch": {"request": {}, "settings": {"max_token_len_per_gpu": 1000}},
    "fixed micro-batches": {"request": {}, "settings": {"use_dynamic_bsz": False}},
    "groups of the micro-batch": {"request": {"options": {"group_by": "batch"}}, "settings": {"use_dynamic_bsz": False}},
    "known groups": {"request": {"options": {"groups_every": 2}, "groups": GROUPS}},
    "rounded up": {"request": {}, "engine": {"pad_to_length": True, "pad_to_length_bucket": 33}},
    "FSDP1": {"request": {}, "engine": {"strategy": "fsdp"}},
    "without the block": {"request": None},
}


def engine_of(folder: Path, ranks: int, **config):
    engine = cases.make_engine(folder, ulysses_sequence_parallel_size=ranks, **config)
    engine.module.config._attn_implementation = "flash_attention_2"
    return engine


def passes(folder: Path, ranks: int) -> dict[str, dict[str, list]]:
    """Returns the output of each pass, nested fields as lists of rows, and the padding of each micro-batch."""
    with flash_attention():
        return {name: one_pass(folder, ranks, **form) for name, form in PASSES.items()}


def one_pass(folder: Path, ranks: int, request: dict | None, settings: dict = {}, engine: dict = {}) -> dict[str, list]:
    engine, padding = engine_of(folder, ranks, **engine), []
    prepare = engine.prepare_model_inputs

    def watching(micro_batch):
        inputs, arguments = prepare(micro_batch)
        padding.append(arguments["pad_size"])
        return inputs, arguments

    engine.prepare_model_inputs = watching
    output = cases.log_prob_pass(engine, cases.make_batch(cases.make_fields(LENGTHS), request, **settings))
    return {name: [row.clone() for row in rows.unbind()] for name, rows in output.items()} | {"padding": padding}
