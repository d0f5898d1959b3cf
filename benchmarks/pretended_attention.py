"""Computes on the CPU what operators give that torch has for a GPU alone, for a pretended CUDA device.

Each takes the arguments of its operator by name, and returns what it returns. Shapes: query [B, HQ, T, D], key and
value [B, H, S, D]; of variable-length attention [T, heads, D].
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    """q [B, HQ, T, D], k [B, HQ, S, D], fp32 -> [B, HQ, T, S]."""
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
    """The output of a fused operator, tokens before heads in memory, and its log-sum-exp [B, HQ, T]."""
    q, k, v = bound["query"], bound["key"], bound["value"]
    if bound.get("dropout_p"):
        raise NotImplementedError("attention with dropout on a pretended device")
    k, v = (_spread(x, q.shape[1]) for x in (k, v))
    scores = _scores(q.float(), k, bound.get("attn_bias"), bound.get("is_causal", False), bound.get("scale"))
    out = scores.softmax(-1).nan_to_num() @ v  # a row that sees nothing gives 0
    return out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2), scores.logsumexp(-1)


def _attend_backward(bound: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    given = bound["query"], bound["key"], bound["value"]
    q, (k, v) = given[0].float(), (_spread(x, given[0].shape[1]) for x in given[1:])
    grad, out = bound.get("grad_out", bound.get("grad_out_")).float(), bound["out"].float()
    scale = q.shape[-1] ** -0.5 if bound.get("scale") is None else bound["scale"]
    scores = _scores(q, k, bound.get("attn_bias"), bound.get("is_causal", False), scale)
    weights = scores.softmax(-1).nan_to_num()
    of_scores = weights * (grad @ v.mT - (grad * out).sum(-1, keepdim=True))
    grads = of_scores @ k * scale, of_scores.mT @ q * scale, weights.mT @ grad
    shared = [x.unflatten(1, (given_x.shape[1], -1)).sum(2) for x, given_x in zip(grads, given)]
    return tuple(x.to(given_x.dtype) for x, given_x in zip(shared, given))


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
    """Each sequence of a variable-length call as a call of its own, [1, heads, T, D]; and the bounds."""
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
    """query [T, HQ, D] -> out [T, HQ, D], lse [HQ, T]."""
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
"""Operators that torch has for a GPU alone, or for more dtypes: what computes them from their arguments by name."""
