"""Reads the log-sum-exp that a model's own attention kernel computes, while the kernel runs.

Fused attention kernels keep the log-sum-exp of each row for a backward pass. `LseReader` wraps one call of a layer's
attention function and reads it from the operator below autograd. The operator runs as often as before, on the same
inputs, and its output keeps its bits:

- Flash attention, torch's and FlashAttention 2 and 3, always computes the log-sum-exp: the call stays as it is.
- SDPA's memory-efficient kernel is the same binary with and without it, and writes it after the output.
- cuDNN builds another execution plan for it, with an engine of its choice, so that the output need not keep its bits.
  Without gradients only a reader that `asks` has it computed. With gradients the model itself does.
- FlexAttention returns it, since transformers asks for it.

Only operators with a known name and output shape are read. Eager attention has no such operator. Neither has
FlashAttention 4 (flash_attn.cute): it launches its kernels itself, and computes no log-sum-exp without gradients. If
torch runs FlashAttention 3 or 4 in place of its own, the operators are torch's.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rhythm_kernels.isolation import lowest_precision
from rhythm_kernels.statistics.layout import Layout

EFFICIENT = "aten::_scaled_dot_product_efficient_attention"

# Operators whose second output is the natural log-sum-exp of each row, before dropout: [B, HQ, T] or, where the batch
# was unpadded into one row of tokens, [HQ, tokens]. The value names the argument that must be True to compute it.
# Devices that plug in _scaled_dot_product_fused_attention_overrideable do not promise to fill it.
FUSED_OPS: dict[str, str | None] = {
    # torch.nn.functional.scaled_dot_product_attention
    "aten::_scaled_dot_product_flash_attention_for_cpu": None,
    "aten::_scaled_dot_product_flash_attention": None,
    EFFICIENT: "compute_log_sumexp",  # rows padded to a multiple of 32
    "aten::_scaled_dot_product_cudnn_attention": "compute_log_sumexp",  # [B, HQ, T, 1]
    "torch_attn::_varlen_attn": None,  # torch.nn.attention.varlen
    # FlashAttention 2 and 3, from PyPI or the Hugging Face hub
    "flash_attn::_flash_attn_forward": None,
    "flash_attn::_flash_attn_varlen_forward": None,
    "flash_attn::fwd": None,
    "flash_attn::varlen_fwd": None,
}


def row_pass(why: str) -> str:
    """Returns the source of a log-sum-exp that the statistics compute themselves, for a reason of a few words."""
    return f"row pass: {why}"


class _Call(NamedTuple):
    source: str
    lse: Tensor | None
    """None if it was not requested of the operator."""
    dtype: torch.dtype
    unpadded: bool
    has_sinks: bool

    def reason_against(self, query: Tensor, sinks: Tensor | None) -> str | None:
        """Returns why this call's log-sum-exp cannot be that of the scores of q and k; None if it can."""
        if self.dtype != query.dtype:
            return f"{_short(query.dtype)} queries were cast to {_short(self.dtype)}"
        if sinks is not None and not self.has_sinks:
            return "the operator was not given the sinks"
        if self.lse is None:
            return "asking the operator for it may change its output"
        if query.is_cpu and query.dtype != torch.float32:
            return "exponentials of 16 bits on a CPU are coarse"  # torch's kernel approximates them
        return None


class LseReader(TorchDispatchMode):
    """A context around one call of an attention function, after which `lse` has the log-sum-exp of its fused operator.

    Args:
        device: the device type of the call; if None, the precision of fp32 products on all devices counts.
        attention: the name of the attention implementation, for reasons.
        asks: whether to request it also of operators whose output may then change in its last bits.
    """

    supports_higher_order_operators = True  # FlexAttention is one where it runs uncompiled

    def __init__(self, device: str | None = None, attention: str = "attention", *, asks: bool = False):
        super().__init__()
        self._calls: list[_Call] = []
        self._rounds = lowest_precision(device) is not None  # whether scores of fp32 q and k are rounded
        self._attention, self._asks = attention, asks

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The dtypes in which the fused operators of the call took their queries; empty if none ran."""
        return [call.dtype for call in self._calls]

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # so that compiled functions, such as transformers' FlexAttention, stay compiled

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the tap is kept out of Dynamo already, and torch's own guard takes some 10 us an operator

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.scaled_dot_product_attention.default:  # inference mode does not decompose it
            with self:
                return func.decompose(*args, **kwargs)
        name = _name(func)
        if name not in FUSED_OPS:
            return func(*args, **kwargs)
        switch, names = FUSED_OPS[name], _argument_names(func)
        bound = {**dict(zip(names, args)), **kwargs}
        query = bound[names[0]]
        if switch is not None and (self._asks or _keeps_output(name, query)):
            bound[switch] = True
        out = func(*args, **kwargs) if switch is None else func(**bound)
        lse = out[1] if switch is None or bound[switch] else None
        has_sinks = bound.get("s_aux") is not None  # FlashAttention 3 of vLLM: the log-sum-exp includes them
        self._calls.append(_Call(func.name(), lse, query.dtype, query.ndim == 3, has_sinks))
        return out

    def lse(
        self, query: Tensor, sinks: Tensor | None, layout: Layout, returned: Tensor | None = None
    ) -> tuple[Tensor | None, str]:
        """Returns the call's log-sum-exp, if it is that of the scores that the statistics compute, and its source.

        Args:
            query: [B, HQ, T, D], the argument of the attention function.
            sinks: [HQ] fp32, of the layer.
            returned: [B, HQ, T], the log-sum-exp that transformers' FlexAttention returned beside its output: without
                sinks, and rounded to the dtype of the values, so only fp32 is used. (The FLASH backend of torch
                2.11 returns another unit, and takes 16 bits only.)

        Returns:
            (lse [B, HQ, T] fp32, natural log, sinks included, anything in padding; the operator's name), or
            (None, "row pass: " and the reason). The reasons: no known operator ran; several ran, but not one
            for each packed sequence; the query was cast to another dtype; the operator left out the sinks, or was not
            asked; its log-sum-exp has another shape; inputs have 16 bits on a CPU, where torch approximates it; inputs
            are fp32, and TF32 or bf16 products round the scores.
        """
        shape = query.shape[:3]
        if query.dtype == torch.float32 and self._rounds:
            return None, row_pass("fp32 products are rounded to TF32 or bf16")
        if returned is not None:
            if returned.dtype != torch.float32:
                return None, row_pass(f"{self._attention} rounds it to {_short(returned.dtype)}")
            if returned.shape != shape:
                return None, row_pass(f"its shape is {list(returned.shape)}")
            lse = returned.detach()
            return lse if sinks is None else torch.logaddexp(lse, sinks[:, None]), "flex_attention"
        if not self._calls:
            return None, row_pass(f"{self._attention} runs no operator that is known")
        for call in self._calls:
            why = call.reason_against(query, sinks)
            if why is not None:
                return None, row_pass(why)
        if len(self._calls) > 1:
            lse, why = _joined(self._calls, shape, layout), f"{len(self._calls)} calls are not one a packed sequence"
        else:
            lse, why = _fitted(self._calls[0], shape, layout), f"its shape is {list(self._calls[0].lse.shape)}"
        return (None, row_pass(why)) if lse is None else (lse, self._calls[0].source)


def _keeps_output(name: str, query: Tensor) -> bool:
    """Returns whether an operator's output keeps its bits when its log-sum-exp is requested."""
    # without it, the kernel swaps heads and rows for a single query with expanded keys; AMD's kernel is another
    return name == EFFICIENT and query.shape[2] > 1 and torch.version.hip is None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _name(operator) -> str:
    """Returns an operator's name in FUSED_OPS.

    FlashAttention's operators have a namespace for each version and build: flash_attn_3, _flash_attn2_588b404.
    """
    namespace, _, name = operator.name().partition("::")
    return f"flash_attn::{name}" if "flash_attn" in namespace else operator.name()


@cache
def _argument_names(operator) -> list[str]:
    return [argument.name for argument in operator._schema.arguments]


def _joined(calls: list[_Call], shape: torch.Size, layout: Layout) -> Tensor | None:
    """Returns [1, HQ, T] if there was one call for each sequence of a packed row, else None."""
    parts = [call.lse for call in calls]
    lengths = [end - begin for _, begin, end in layout.bounds]
    expected = [(1, shape[1], length) for length in lengths]
    if shape[0] != 1 or sum(lengths) != shape[2] or [tuple(part.shape) for part in parts] != expected:
        return None
    return torch.cat(parts, -1).detach().float()


def _fitted(call: _Call, shape: torch.Size, layout: Layout) -> Tensor | None:
    """Returns the call's log-sum-exp as [B, HQ, T] fp32, anything in padding; None if it has another size."""
    lse = call.lse.detach().float()
    if not call.unpadded:
        if lse.ndim == 4:
            lse = lse.squeeze(-1)
        lse = lse[..., : shape[2]]
        return lse if lse.shape == shape else None
    tokens = sum(end - begin for _, begin, end in layout.bounds)
    if lse.shape != (shape[1], tokens):
        return None
    if tokens < layout.rows.numel():  # the tokens follow each other, batch row by batch row
        lse = lse[:, layout.keep("places of tokens", lambda: _places(layout))]
    return lse.unflatten(1, layout.rows.shape).transpose(0, 1)


def _places(layout: Layout) -> Tensor:
    """Returns the index of each token among all tokens without padding, [B T] int64; anything in padding."""
    is_token = layout.first <= layout.last
    return is_token.flatten().cumsum(0).sub(1).clamp(min=0)
