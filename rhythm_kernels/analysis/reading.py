"""Reads one sequence in one forward: the numbers of its tokens and of the model's heads.

Shapes: T tokens, C channels, V words, L layers of HQ query heads. R is the answer.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from rhythm_kernels.analysis.receivers import RECEIVERS, column_moments, counted_columns, receiver_heads
from rhythm_kernels.checks import check_int
from rhythm_kernels.credit.selection import find_peaks
from rhythm_kernels.credit.tokens import CoupledSets, coupled_sets, token_credit
from rhythm_kernels.listen.collect import collect
from rhythm_kernels.listen.taps import decoder_of, query_heads, softmax_layers
from rhythm_kernels.logits import logit_scale
from rhythm_kernels.signals import rhythm_of
from rhythm_kernels.tensor_checks import check_tensor
from rhythm_kernels.types import HeadGroups

TO_THE_END = (1, None)
"""The horizon of FAI, future attention influence, in the paper's analysis; credit has its own."""
MOST_LOGITS = 2**26  # logits held at once, 256 MiB in fp32


class Reading(NamedTuple):
    """The numbers that one forward gives about a sequence. All tensors are on the CPU."""

    ids: Tensor
    """[T] int64."""
    response: Tensor
    """[T] bool, R: the tokens of the answer."""
    waad: Tensor
    """[T] fp32, tokens: windowed average attention distance of the local heads (Eq. 9); 0 outside R."""
    fai: Tensor
    """[T] fp32: FAI of the global heads, from the next token to the last (Eq. 10 in the paper's analysis)."""
    credit_fai: Tensor
    """[T] fp32: FAI of the global heads, from 10 to 50 tokens later, which credit is computed from."""
    receiver_fai: Tensor
    """[T] fp32: FAI of the receiver heads, from the next token to the last; 0 without receiver heads."""
    entropy: Tensor
    """[T] fp32, nats: entropy of the policy's distribution of the token, at the temperature of `read`; 0 outside R."""
    waad_peaks: Tensor
    """[T] bool: the peaks of WAAD, as of FAI and receiver-head FAI below."""
    fai_peaks: Tensor
    receiver_peaks: Tensor
    sets: CoupledSets
    """[T] each: preplan tokens, anchors, dominated anchors, intros, and the intro of each dominated anchor."""
    gamma: Tensor
    """[T] fp32: the factor of each token's advantage under coupled credit."""
    layers: list[int]
    """The indices of all L layers with softmax attention."""
    spans: Tensor
    """[L, HQ] fp32, tokens: mean attention distance (Eq. 7)."""
    kurtosis: Tensor
    """[L, HQ] fp64: kurtosis of each head's columns."""
    receivers: Tensor
    """[L, HQ] bool; no head where the answer is too short to tell heads apart (`FEWEST_ROWS`)."""
    sampled: list[int]
    """The indices of the layers that WAAD and FAI are read in."""
    groups: HeadGroups
    """The local and the global heads of the sampled layers, [len(sampled), HQ] bool each."""

    @property
    def tokens(self) -> int:
        """The number of tokens, T."""
        return len(self.ids)


@torch.no_grad()
def read(
    model: nn.Module,
    ids: Tensor,
    response: Tensor,
    *,
    layers: int | str | list[int] = "all",
    receivers: int | None = None,
    min_quantile: float = 0.0,
    temperature: float = 1.0,
) -> Reading:
    """Reads one sequence in one forward; memory grows with T, not with its square.

    Args:
        model: a transformers causal language model, in evaluation mode.
        ids: [T] int64, prompt and answer, on the model's device.
        response: [T] bool, R: the answer. It must not hold the first token, which was not drawn from the model.
        layers: the layers that WAAD and FAI are read in, as in `collect`. Spans and kurtosis are of all layers.
        receivers: the number of receiver heads among the heads of all layers; by default 16, or all of fewer.
        min_quantile: peaks below this quantile of R do not count, as in `find_peaks`.
        temperature: the one that the entropies are taken at.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value, R is empty, or `collect` refuses the model.
    """
    check_tensor("ids", ids, ["T"], [torch.int64])
    check_tensor("response", response, [len(ids)], [torch.bool], ids.device)
    if not response.any() or response[0]:
        raise ValueError(
            f"response must have a token, and not the first, got {int(response.sum())} of {len(ids)}"
            f"{', the first among them' if response[:1].any() else ''}"
        )
    decoder = decoder_of(model)
    all_layers = softmax_layers(decoder)
    heads = query_heads(decoder)
    receivers = min(RECEIVERS, len(all_layers) * heads) if receivers is None else receivers
    check_int("receivers", receivers, 1, len(all_layers) * heads)
    mask = response[None]
    with (
        collect(model, layers=layers, response_mask=mask, span_rows=None) as credit,
        collect(model, layers=all_layers, response_mask=mask, span_rows=None, horizon=TO_THE_END) as whole,
    ):
        entropy = _entropies(model, ids, response, temperature)
    rhythm = credit.rhythm()
    groups = HeadGroups(*(group[0] for group in rhythm.groups))
    to_the_end = rhythm_of({layer: whole.stats[layer] for layer in credit.layers}, whole.layout, groups=groups)

    stats = [whole.stats[layer] for layer in all_layers]
    columns = counted_columns(mask, TO_THE_END[0])
    kurtosis = torch.cat([column_moments(layer.fai, columns).kurtosis for layer in stats])  # [L, HQ]
    is_receiver = torch.zeros(kurtosis.shape, dtype=torch.bool)
    receiver_fai = torch.zeros(len(ids), device=ids.device)
    if columns.any():  # else nothing tells one head from another
        is_receiver = receiver_heads(kurtosis, receivers)
        members = [layer.fai[0][row.to(ids.device)] for layer, row in zip(stats, is_receiver, strict=True)]
        receiver_fai = torch.cat(members).mean(0)

    def peaks(signal: Tensor) -> Tensor:
        return find_peaks(signal[None], mask, min_quantile=min_quantile)[0]

    sets = coupled_sets(mask, rhythm)
    reading = Reading(
        ids=ids,
        response=response,
        waad=rhythm.waad[0],
        fai=to_the_end.fai[0],
        credit_fai=rhythm.fai[0],
        receiver_fai=receiver_fai,
        entropy=entropy,
        waad_peaks=peaks(rhythm.waad[0]),
        fai_peaks=peaks(to_the_end.fai[0]),
        receiver_peaks=peaks(receiver_fai),
        sets=CoupledSets(*(members[0].cpu() for members in sets)),
        gamma=token_credit("coupled", mask, rhythm)[0],
        layers=all_layers,
        spans=torch.cat([layer.span for layer in stats]),
        kurtosis=kurtosis,
        receivers=is_receiver,
        sampled=credit.layers,
        groups=HeadGroups(*(group.cpu() for group in groups)),
    )
    return reading._replace(**{name: x.cpu() for name, x in reading._asdict().items() if isinstance(x, Tensor)})


def _entropies(model: nn.Module, ids: Tensor, response: Tensor, temperature: float) -> Tensor:
    """Runs the model's one forward and returns `Reading.entropy`."""
    hidden = []
    hook = decoder_of(model).register_forward_hook(lambda _, args, output: hidden.append(output[0]))
    try:
        last = model(ids[None], use_cache=False, logits_to_keep=1).logits[0, -1].float()
    finally:
        hook.remove()
    if not hidden[0].isfinite().all():
        raise ValueError(
            f"model must have finite states, got NaN or infinity from {type(model).__name__} in {hidden[0].dtype}"
        )
    positions = response.nonzero().flatten()
    output = model.get_output_embeddings()
    tolerance = max(1e-3, 4 * torch.finfo(output.weight.dtype).eps)  # 16-bit logits may round differently
    scale = logit_scale(model.config)

    def logits_of(hidden: Tensor) -> Tensor:
        return scale(linear(hidden, output.weight, output.bias).float())

    recomputed = logits_of(hidden[0][0, -1])
    if not torch.allclose(recomputed, last, rtol=tolerance, atol=tolerance * float(last.abs().amax())):
        raise ValueError(
            f"model must have logits that are its output layer's, scaled or soft-capped as its config says, got "
            f"{type(model).__name__}"
        )
    entropy = torch.zeros(len(ids), dtype=torch.float32, device=ids.device)
    for part in positions.split(max(1, MOST_LOGITS // output.weight.shape[0])):
        log_probs = logits_of(hidden[0][0, part - 1]).div(temperature).log_softmax(-1)
        entropy[part] = -(log_probs.exp() * log_probs).sum(-1)
    return entropy
