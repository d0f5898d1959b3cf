"""Computes on the CPU the operators that torch has for a GPU alone, and chooses among those for attention.

Each function takes the arguments of its operator by name and returns what the operator returns. Shapes: query
[B, HQ, T, D], key and value [B, H, S, D]. In variable-length attention all three are [T, heads, D].
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    """Returns the scores [B, HQ, T, S] of q [B, HQ, T, D] and k [B, HQ, S, D], all fp32."""
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores


def _spread(x: Tensor, heads: int) -> Tensor:
    return x.float().repeat_interleave(heads // x.shape[1], 1)


def _attend(bound: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Returns the output of a fused operator, tokens before heads in memory, and its log-sum-exp [B, HQ, T]."""
    q, k, v = bound["query"], bound["key"], bound["value"]
    if bound.get("dropout_p"):
        raise NotImplementedError("attention with dropout on a pretended device")
    k, v = (_spread(x, q.shape[1]) for x in (k, v))
    scores = _scores(q.float(), k, bound.get("attn_bias"), bound.get("is_causal", False), bound.get("scale"))
    out = scores.softmax(-1).nan_to_num() @ v  # a row that sees nothing gives 0
    return out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2), scores.logsumexp(-1)


def _attend_backward(bound: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    inputs = bound["query"], bound["key"], bound["value"]
    q, (k, v) = inputs[0].float(), (_spread(x, inputs[0].shape[1]) for x in inputs[1:])
    grad, out = bound.get("grad_out", bound.get("grad_out_")).float(), bound["out"].float()
    scale = q.shape[-1] ** -0.5 if bound.get("scale") is None else bound["scale"]
    scores = _scores(q, k, bound.get("attn_bias"), bound.get("is_causal", False), scale)
    weights = scores.softmax(-1).nan_to_num()
    score_grad = weights * (grad @ v.mT - (grad * out).sum(-1, keepdim=True))
    grads = score_grad @ k * scale, score_grad.mT @ q * scale, weights.mT @ grad
    return tuple(x.unflatten(1, (y.shape[1], -1)).sum(2).to(y.dtype) for x, y in zip(grads, inputs))


def _flash(bound):
    out, lse = _attend(bound)
    nothing, seed = torch.zeros(0), torch.zeros(2, dtype=torch.uint64)
    return out, lse, nothing, nothing, out.shape[2], bound["key"].shape[2], seed, nothing, nothing


def _efficient(bound):
    out, lse = _attend(bound)
    rows = lse.shape[-1] if bound["compute_log_sumexp"] else 0
    lse = torch.nn.functional.pad(lse[..., :rows], (0, -rows % 32), value=math.inf)
    return out, lse, torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)


def _efficient_backward(bound):
    return *_attend_backward(bound), None


def _cudnn(bound):
    out, lse = _attend(bound)
    nothing, seed = torch.zeros(0), torch.zeros((), dtype=torch.int64)
    lse = lse[..., None] if bound["compute_log_sumexp"] else nothing
    return out, lse, nothing, nothing, out.shape[2], bound["key"].shape[2], seed, seed, nothing


def _packed(bound: dict[str, Any]) -> tuple[Tensor, list[dict[str, Any]]]:
    """Returns the bounds of a variable-length call, and each sequence as a call of its own, [1, heads, T, D]."""
    left, right = bound.get("window_size") or (-1, -1)
    if right not in (-1, 0):
        raise NotImplementedError(f"a window of {right} tokens ahead")
    calls, cuts = [], bound["cu_seq_q"].tolist()
    for begin, end in itertools.pairwise(cuts):
        distance = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        hidden = ((distance < 0) & (bound["is_causal"] or right == 0)) | ((distance > left) & (left >= 0))
        names = [name for name in ("query", "key", "value", "grad_out", "out") if name in bound]
        call = {name: bound[name][begin:end].transpose(0, 1)[None] for name in names}
        call["attn_bias"] = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
        calls.append(call | {"scale": bound["scale"]})
    return cuts, calls


def _varlen(bound):
    """Returns the output [T, HQ, D], the log-sum-exp [HQ, T] and the random state."""
    cuts, calls = _packed(bound)
    if bound["max_q"] < max((end - begin for begin, end in itertools.pairwise(cuts)), default=0):
        raise ValueError(f"sequences {cuts} are longer than max_q {bound['max_q']}")
    results = [_attend(call) for call in calls]
    out = torch.cat([out[0].transpose(0, 1) for out, _ in results])
    return out, torch.cat([lse[0] for _, lse in results], -1), torch.zeros(2, dtype=torch.uint64)


def _varlen_backward(bound):
    results = [_attend_backward(call) for call in _packed(bound)[1]]
    return tuple(torch.cat([x[0].transpose(0, 1) for x in grads]) for grads in zip(*results))


def _histc(bound):
    return torch.histc(bound["self"].float(), bound["bins"], bound["min"], bound["max"]).to(bound["self"].dtype)


GPU_ONLY: dict[str, Callable[[dict[str, Any]], Any]] = {
    "aten::histc": _histc,
    "aten::_scaled_dot_product_flash_attention": _flash,
    "aten::_scaled_dot_product_flash_attention_backward": _attend_backward,
    "aten::_scaled_dot_product_efficient_attention": _efficient,
    "aten::_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "aten::_scaled_dot_product_cudnn_attention": _cudnn,
    "aten::_scaled_dot_product_cudnn_attention_backward": _attend_backward,
    "torch_attn::_varlen_attn": _varlen,
    "torch_attn::_varlen_attn_backward": _varlen_backward,
}
"""The functions by the names of their operators, which torch has for a GPU alone or for more dtypes there."""


def choose_attention(on_cpu: Callable) -> Callable:
    """Wraps torch's scaled_dot_product_attention: on the device it calls the operator that torch chooses on an H100."""

    def scaled_dot_product_attention(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        if not query.is_cuda:
            return on_cpu(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        aten, enabled, size = torch.ops.aten, torch.backends.cuda, max(query.shape[-1], value.shape[-1])
        shared, half = key.shape[1] != query.shape[1], query.dtype in (torch.float16, torch.bfloat16)
        if size % 8 == 0 and half and size <= 256 and enabled.cudnn_sdp_enabled():
            fused = aten._scaled_dot_product_cudnn_attention
        elif size % 8 == 0 and half and size <= 256 and attn_mask is None and enabled.flash_sdp_enabled():
            out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)
            return out[0]
        elif size % 4 == 0 and not shared and enabled.mem_efficient_sdp_enabled():
            fused = aten._scaled_dot_product_efficient_attention
        else:
            options = {"scale": scale, "enable_gqa": enable_gqa}
            return aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, **options
            )[0]
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        with_lse = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        return fused(query, key, value, attn_mask, with_lse, dropout_p, is_causal, scale=scale)[0]

    return scaled_dot_product_attention
