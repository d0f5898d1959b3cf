"""The three public calls on the Triton backend, on a GPU or in Triton's interpreter, and their check against fp64."""

import torch
from stats_cases import (
    StatsCase,
    assert_attention_close,
    assert_close_to_reference,
    assert_groups_close,
    make_groups,
    make_values,
    moved,
    named,
)

from rhythm_kernels import attention, attention_stats, group_stats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.float16  # the interpreter's tl.dot is wrong for bf16


def on_device(x):
    """Returns a copy of a tensor on the device, in the same memory order; anything else as it is."""
    return moved(x, DEVICE)


def on_cpu(stats):
    fields = (None if x is None else x.cpu() for x in stats[:-1])
    return type(stats)(*fields, {name: x.cpu() for name, x in stats.more.items()})


def run(case: StatsCase):
    kwargs = {name: on_device(x) for name, x in case.kwargs.items()}
    return on_cpu(attention_stats(on_device(case.q), on_device(case.k), **kwargs, backend="triton"))


def run_groups(case: StatsCase, local_heads, global_heads):
    kwargs = {name: on_device(x) for name, x in case.group_options().items()}
    inputs = [on_device(x) for x in (case.q, case.k, local_heads, global_heads)]
    return on_cpu(group_stats(*inputs, **kwargs, backend="triton"))


def run_attention(case: StatsCase, v):
    kwargs = {name: on_device(x) for name, x in case.options("lse").items()}
    out, stats = attention(*(on_device(x) for x in (case.q, case.k, v)), **kwargs, backend="triton")
    return out.cpu(), on_cpu(stats)


CALLS = ("statistics", "groups", "attention")


def outputs(call: str, case: StatsCase) -> dict[str, torch.Tensor]:
    """Returns a call's results for each token by name, each [B, ..., T]."""
    if call == "statistics":
        return {name: x for name, x in named(run(case)).items() if name != "span"}
    if call == "groups":
        is_local = torch.arange(case.q.shape[1]) % 2 == 0
        return named(run_groups(case, is_local, ~is_local))
    out, stats = run_attention(case, make_values(case, 20))
    return {"out": out.movedim(2, -1), "waad": stats.waad, "fai": stats.fai, "lse": stats.lse}


def check(call: str, case: StatsCase, seed: int = 0) -> None:
    """Checks a call against the fp64 reference. The seed decides the groups, and v with its head size and order."""
    if call == "statistics":
        assert_close_to_reference(run(case), case)
    elif call == "groups":
        groups = make_groups(case, seed, per_sequence=seed % 2 == 0)
        assert_groups_close(run_groups(case, *groups), case, *groups)
    else:
        v = make_values(case, (16, 5, 40, 32)[seed % 4], seed, ("heads inside", "slice", "heads outside")[seed % 3])
        assert_attention_close(*run_attention(case, v), case, v)
