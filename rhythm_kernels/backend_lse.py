"""The log-sum-exp that a model's own attention kernel computes, read while the kernel runs.

Fused attention kernels keep the log-sum-exp of each row for a backward pass. `LseReader` is open around one call of a
layer's attention function and reads it from the operator below autograd: the operator runs as often as before, on the
same inputs.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rhythm_kernels.attention.layout import Layout
from rhythm_kernels.isolation import lowest_precision

ROW_PASS = "row pass"
"""The source of a log-sum-exp that the statistics compute themselves."""

# Operators whose second output is the natural log-sum-exp of each row, before dropout: [B, HQ, T] or, where the batch
# was unpadded into one row of tokens, [HQ, tokens]. Beside each, the argument that must be True for it to be computed.
# Devices that plug in _scaled_dot_product_fused_attention_overrideable do not promise to fill it.
FUSED_OPS: dict[str, str | None] = {
    # torch.nn.functional.scaled_dot_product_attention
    "aten::_scaled_dot_product_flash_attention_for_cpu": None,
    "aten::_scaled_dot_product_flash_attention": None,
    "aten::_scaled_dot_product_efficient_attention": "compute_log_sumexp",  # rows padded to a multiple of 32
    "aten::_scaled_dot_product_cudnn_attention": "compute_log_sumexp",  # [B, HQ, T, 1]
    "torch_attn::_varlen_attn": None,  # torch.nn.attention.varlen
    # FlashAttention 2 and 3, from PyPI or the Hugging Face hub
    "flash_attn::_flash_attn_forward": None,
    "flash_attn::_flash_attn_varlen_forward": None,
    "flash_attn::fwd": None,
    "flash_attn::varlen_fwd": None,
}


class _Call(NamedTuple):
    source: str
    lse: Tensor
    dtype: torch.dtype
    unpadded: bool
    has_sinks: bool


class LseReader(TorchDispatchMode):
    """Open around one call of an attention function; `lse` then has what the call's fused operator computed."""

    supports_higher_order_operators = True  # FlexAttention is one where it runs uncompiled

    def __init__(self, device: str | None = None):
        super().__init__()
        self._calls: list[_Call] = []
        self._rounds = lowest_precision(device) is not None  # products of fp32 factors, and so the scores

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The dtypes in which the fused operators of the call took their queries; empty if none ran."""
        return [call.dtype for call in self._calls]

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # what is compiled, as transformers' FlexAttention is, stays so

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.scaled_dot_product_attention.default:  # in inference mode it arrives whole
            with self:
                return func.decompose(*args, **kwargs)
        name = _name(func)
        if name not in FUSED_OPS:
            return func(*args, **kwargs)
        names = [argument.name for argument in func._schema.arguments]
        bound = {**dict(zip(names, args)), **kwargs}
        if FUSED_OPS[name] is not None:
            bound[FUSED_OPS[name]] = True
        out = func(**bound)
        query = bound[names[0]]
        has_sinks = bound.get("s_aux") is not None  # FlashAttention 3 of vLLM: the log-sum-exp includes them
        self._calls.append(_Call(func.name(), out[1], query.dtype, query.ndim == 3, has_sinks))
        return out

    def lse(
        self, query: Tensor, sinks: Tensor | None, layout: Layout, returned: Tensor | None = None
    ) -> tuple[Tensor | None, str]:
        """The log-sum-exp of the call, if it is that of the scores that the statistics compute, and its source.

        Args:
            query: [B, HQ, T, D], what the attention function was given.
            sinks: [HQ] fp32, of the layer.
            returned: [B, HQ, T], what transformers' FlexAttention returned beside its output: without sinks, rounded to
                the dtype of the values, so that only fp32 is of use.

        Returns:
            (lse [B, HQ, T] fp32, natural log, sinks included, anything in padding; the operator's name), or
            (None, "row pass"): no fused operator ran, or several that are not one for each packed sequence, the query
            was cast to another dtype for it, it left out the sinks, its output has another shape, it is of 16-bit
            inputs on a CPU, where torch rounds it, or of fp32 inputs that TF32 or bf16 products round.
        """
        shape = query.shape[:3]
        if query.dtype == torch.float32 and self._rounds:
            return None, ROW_PASS
        if returned is not None and returned.dtype == torch.float32 and returned.shape == shape:
            lse = returned.detach()
            return lse if sinks is None else torch.logaddexp(lse, sinks[:, None]), "flex_attention"
        # on a CPU, torch's kernel takes faster exponentials for 16-bit inputs, which its log-sum-exp shows
        precise = query.dtype == torch.float32 or not query.is_cpu
        fitting = all(call.dtype == query.dtype and (sinks is None or call.has_sinks) for call in self._calls)
        if self._calls and fitting and precise:
            lse = (
                _fitted(self._calls[0], shape, layout) if len(self._calls) == 1 else _joined(self._calls, shape, layout)
            )
            if lse is not None:
                return lse, self._calls[0].source
        return None, ROW_PASS


@cache
def _name(operator) -> str:
    """FlashAttention's operators have a namespace for each version and build: flash_attn_3, _flash_attn2_588b404."""
    namespace, _, name = operator.name().partition("::")
    return f"flash_attn::{name}" if "flash_attn" in namespace else operator.name()


def _joined(calls: list[_Call], shape: torch.Size, layout: Layout) -> Tensor | None:
    """Of a packed row whose sequences were computed one after another: [1, HQ, T]; None if the calls are others."""
    parts = [call.lse.detach().float() for call in calls]
    lengths = [end - begin for _, begin, end in layout.bounds]
    expected = [(1, shape[1], length) for length in lengths]
    if shape[0] != 1 or sum(lengths) != shape[2] or [tuple(part.shape) for part in parts] != expected:
        return None
    return torch.cat(parts, -1)


def _fitted(call: _Call, shape: torch.Size, layout: Layout) -> Tensor | None:
    """The call's log-sum-exp as [B, HQ, T] fp32, anything in padding; None if it has another size."""
    lse = call.lse.detach().float()
    if not call.unpadded:
        if lse.ndim == 4:
            lse = lse.squeeze(-1)
        lse = lse[..., : shape[2]]
        return lse if lse.shape == shape else None
    if lse.shape != (shape[1], sum(end - begin for _, begin, end in layout.bounds)):
        return None
    is_token = layout.first <= layout.last  # [B, T]; the tokens follow each other, batch row by batch row
    place = is_token.flatten().cumsum(0).sub(1).clamp(min=0)
    return lse[:, place].unflatten(1, is_token.shape).transpose(0, 1)
