"""Checks that an attention call can be collected, and says how closely its output must match the assumed map."""

import torch
from torch import Tensor

from rhythm_kernels.isolation import lowest_precision
from rhythm_kernels.listen.masks import packing_hint
from rhythm_kernels.listen.taps import Call, is_tensor_parallel
from rhythm_kernels.statistics.layout import Layout
from rhythm_kernels.statistics.probes import Rounding, rounding_of

UNKNOWN = ("position_bias", "indices", "block_indices")
"""Arguments of attention functions that change a map in a way that the statistics do not follow."""


def check_call(layer: int, call: Call, tokens: int, device: torch.device, query_heads: object) -> None:
    """Raises ValueError for a call whose shapes the statistics cannot take.

    Args:
        layer: named in the error.
        tokens, device: those of the decoder's input.
        query_heads: the number of query heads of the model's layers; not checked if it is not an int.
    """
    q, k, v = call.query, call.key, call.value
    if k.shape[2] != q.shape[2]:
        raise ValueError(
            f"collect needs a forward over whole sequences, got {q.shape[2]} queries and {k.shape[2]} keys in "
            f"layer {layer}: call the model without past_key_values; added or compressed keys cannot be collected"
        )
    if q.shape[2] != tokens or q.device != device:
        raise ValueError(
            f"collect needs layers that see the decoder's input as it is, {tokens} tokens on {device}, "
            f"got {q.shape[2]} tokens on {q.device} in layer {layer}"
        )
    if isinstance(query_heads, int) and q.shape[1] != query_heads:
        sharded = is_tensor_parallel(call.module)
        why = "layers of several sizes, and heads that another rank holds," if not sharded else "shards of heads"
        raise ValueError(
            f"collect needs layers with the model's {query_heads} query heads, got {q.shape[1]} in layer {layer}: "
            f"{why} cannot be collected"
        )
    expected = [q.shape[0], q.shape[2], q.shape[1], v.shape[3]]
    if v.shape[:3] != k.shape[:3] or list(call.out.shape) != expected:
        raise ValueError(
            f"collect checks what attention returns, [B, T, HQ, Dv] = {expected} in layer {layer} for q "
            f"{list(q.shape)}, k {list(k.shape)} and v {list(v.shape)}, got {list(call.out.shape)}"
        )


def output_of(call: Call) -> Tensor:
    """Returns the output of a call without dropout, [B, T, HQ, Dv]: the statistics describe the map before dropout."""
    if not call.kwargs.get("dropout"):
        return call.out
    with torch.no_grad():  # the output that the model got is random, so the function is called once more
        return call.attend(**call.kwargs | {"dropout": 0.0})[0]


def rounding_of_call(call: Call) -> Rounding:
    """Returns the rounding of a call under the settings in which it ran."""
    device, dtype = call.query.device.type, call.query.dtype
    dtypes = [dtype, call.out.dtype, *call.reader.dtypes]
    if torch.is_autocast_enabled(device):
        dtypes.append(torch.get_autocast_dtype(device))
    if dtype == torch.float32:
        # a factor in TF32 has the 11 bits of one in fp16
        dtypes += {"bf16": [torch.bfloat16], "tf32": [torch.float16]}.get(lowest_precision(device), [])
    coarsest = max(dtypes, key=lambda used: torch.finfo(used).eps)
    fused = bool(call.reader.dtypes) or call.beside is not None
    return rounding_of(dtype, lowered=coarsest, fused=fused, softcap=call.kwargs.get("softcap") is not None)


def hints_of(call: Call, layout: Layout) -> str:
    """Returns sentences that name what is unusual about a call, for the error of a mismatch."""
    hints = []
    if call.mask is None and any(begin or end < layout.rows.shape[1] for _, begin, end in layout.bounds):
        if layout.sequences == len(layout.rows):
            hints.append("There is padding, but the attention function was given no mask.")
    causal = call.kwargs.get("is_causal")
    if not (getattr(call.module, "is_causal", True) if causal is None else causal):
        hints.append("The layer is not causal.")
    unknown = [name for name in UNKNOWN if call.kwargs.get(name) is not None]
    if unknown:
        hints.append(f"Its attention function was given {', '.join(unknown)}, which the statistics do not know of.")
    return "".join(f" {hint}" for hint in hints) + packing_hint(layout)
