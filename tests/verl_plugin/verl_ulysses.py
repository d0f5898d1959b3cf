"""Passes of verl's engine whose ranks share each sequence, for `ranks.on_ranks`."""

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import cpu_flash  # noqa: F401
import torch
import torch.distributed as dist
import verl_cases as cases
from ranks import Raised

import rhythm_kernels.integrations.verl_engines as plugin
from rhythm_kernels import HeadGroups, group_heads

LENGTHS = [
    [(5, 30), (9, 41), (3, 12), (7, 1), (2, 26), (11, 33)],
    [(4, 17), (6, 6), (13, 50), (1, 22), (8, 3), (2, 9)],
]
"""Prompt and response tokens of each sequence of the workers that share them."""


def known_groups() -> HeadGroups:
    return group_heads(torch.rand(1, 18, generator=torch.Generator().manual_seed(2)))


def request_of(options: dict, groups: HeadGroups | None = None) -> dict:
    flat = None if groups is None else [group.flatten().tolist() for group in groups]
    return {"options": options, "groups": flat}


FIXED = {"use_dynamic_bsz": False}
PASSES: dict[str, dict] = {
    "own groups": {},
    "fixed micro-batches": {"settings": FIXED},
    "groups of a micro-batch": {"request": request_of({"group_by": "batch"}), "settings": FIXED},
    "known groups": {"request": request_of({"groups_every": 2}, known_groups())},
    "packed lengths rounded up": {"engine": {"pad_to_length": True, "pad_to_length_bucket": 33}},
    "FSDP1": {"engine": {"strategy": "fsdp"}},
    "16 bits": {"engine": {"precision": "bf16"}, "settings": FIXED},
    "without the block": {"request": None},
    "fewer key heads than ranks": {"ranks": 4, "settings": FIXED},
}


def fields_of(name: str, place: int = 0) -> dict[str, torch.Tensor]:
    """Returns the sequences of a pass; place: that of the workers that share them among others."""
    return cases.make_fields(LENGTHS[place], seed=1 + place)


def passes(folders: dict[int, Path]) -> dict[str, dict[str, list]]:
    """Returns the output of each pass on four workers, of which two or all share each sequence.

    Args:
        folders: the model of each number of workers that share a sequence.
    """
    return {
        name: one_pass(folders[form.get("ranks", 2)], name, ranks=form.get("ranks", 2)) for name, form in PASSES.items()
    }


def one_pass(folder: Path, name: str, ranks: int, place: int | None = None) -> dict[str, list]:
    """Returns a pass's nested fields as lists of rows, its micro-batches' padding, and what was printed.

    Args:
        ranks: the number of workers that share each sequence.
        place: see `fields_of`; None for this worker's.
    """
    form, padding = PASSES[name], []
    place = dist.get_rank() // ranks if place is None else place
    config = {"ulysses_sequence_parallel_size": ranks, "attention": "flash_attention_2"} | form.get("engine", {})
    engine = cases.make_engine(folder, **config)
    prepare = engine.prepare_model_inputs

    def watching(micro_batch):
        inputs, arguments = prepare(micro_batch)
        padding.append(arguments["pad_size"])
        return inputs, arguments

    engine.prepare_model_inputs = watching
    batch = cases.make_batch(fields_of(name, place), form.get("request", {}), **form.get("settings", {}))
    with patch.object(plugin, "_said", set()):
        output = cases.log_prob_pass(engine, batch)
        said = list(plugin._said)
    return {name: [row.clone() for row in rows.unbind()] for name, rows in output.items()} | {
        "padding": padding,
        "said": said,
    }


def failures(folder: Path) -> dict[str, Raised | list]:
    """Returns what this rank of two that share each sequence has raised in each pass where one of them cannot go on.

    Of a pass that was not refused it returns the log-probs.
    """
    engine = cases.make_engine(folder, ulysses_sequence_parallel_size=2, attention="flash_attention_2")
    mine, fields = dist.get_rank() == 1, cases.make_fields(LENGTHS[0])
    raised = {}

    def attempt(name: str, request: dict | None, engine=engine) -> None:
        try:
            log_probs = cases.log_prob_pass(engine, cases.make_batch(fields, request))["log_probs"]
            raised[name] = [row.clone() for row in log_probs.unbind()]
        except Exception as error:
            raised[name] = Raised(type(error).__name__, str(error))

    with patch.object(plugin, "_response_rows", refusing if mine else plugin._response_rows):
        attempt("before the pass", {})
    attempt("other options", request_of({"window": 10 + mine}))
    attempt("an unknown option", request_of({"stratgey": "local"} if mine else {}))
    attempt("nothing", {})
    sdpa = cases.make_engine(folder, ulysses_sequence_parallel_size=2)
    attempt("without FlashAttention and block", None, sdpa)
    attempt("without FlashAttention", {}, sdpa)
    return raised


def refusing(*_) -> Callable:
    raise MemoryError("no memory is left")
