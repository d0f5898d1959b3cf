"""One forward over one sequence, and all that it says of tokens and heads."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from rhythm_kernels.analysis.receivers import column_moments, counted_columns, receiver_heads
from rhythm_kernels.checks import check_int
from rhythm_kernels.credit.selection import find_peaks
from rhythm_kernels.credit.tokens import CoupledSets, coupled_sets, token_credit
from rhythm_kernels.listen.collect import collect
from rhythm_kernels.listen.taps import decoder_of, softmax_layers
from rhythm_kernels.signals import rhythm_of
from rhythm_kernels.tensor_checks import check_tensor
from rhythm_kernels.types import HeadGroups

TO_THE_END = (1, None)
"""The horizon of FAI in the paper's analysis; credit has its own."""
MOST_LOGITS = 2**26  # held at a time, 256 MiB in float32


class Reading(NamedTuple):
    """What a forward says about a sequence of T tokens, of which those of R are the answer. All on the CPU."""

    ids: Tensor
    """[T] int64."""
    response: Tensor
    """[T] bool, R."""
    waad: Tensor
    """[T] fp32, tokens, of the local heads (Eq. 9); 0 outside R."""
    fai: Tensor
    """[T] fp32, of the global heads, attention from the next token to the last (Eq. 10 in the paper's analysis)."""
    credit_fai: Tensor
    """[T] fp32, the same from 10 to 50 tokens later: what credit is made of."""
    receiver_fai: Tensor
    """[T] fp32, FAI to the end of the receiver heads' mean map; 0 where there are none."""
    entropy: Tensor
    """[T] fp32, nats: of the distribution that the token was drawn from; 0 outside R."""
    waad_peaks: Tensor
    """[T] bool."""
    fai_peaks: Tensor
    receiver_peaks: Tensor
    sets: CoupledSets
    """[T] each: T_loc, T_glob, D, I(D), and which token introduces which anchor."""
    gamma: Tensor
    """[T] fp32, coupled credit."""
    layers: list[int]
    """All L layers with softmax attention."""
    spans: Tensor
    """[L, HQ] fp32, tokens (Eq. 7)."""
    kurtosis: Tensor
    """[L, HQ] fp64, of each head's columns."""
    receivers: Tensor
    """[L, HQ] bool; none of an answer in which no token has rows enough behind it (`FEWEST_ROWS`)."""
    sampled: list[int]
    """The layers that WAAD and FAI come from."""
    groups: HeadGroups
    """Of the sampled layers, [l, HQ] bool."""

    @property
    def tokens(self) -> int:
        return len(self.ids)


@torch.no_grad()
def read(
    model: nn.Module,
    ids: Tensor,
    response: Tensor,
    *,
    layers: int | list[int] = 5,
    receivers: int = 16,
    min_quantile: float = 0.0,
) -> Reading:
    """Reads one sequence in one forward; memory grows with T, not with its square.

    Args:
        model: a transformers causal language model, in evaluation mode.
        ids: [T] int64, prompt and answer, on the model's device.
        response: [T] bool, R: the answer. The first token cannot be of it, nothing was drawn there.
        layers: as of `collect`, of WAAD and FAI. Spans and kurtosis are of all layers.
        receivers: how many heads of all layers are receiver heads.
        min_quantile: of `find_peaks`: peaks below this quantile of R do not count.

    Raises:
        TypeError, ValueError: wrong arguments, an empty R, a model that `collect` refuses.
    """
    check_tensor("ids", ids, ["T"], [torch.int64])
    check_tensor("response", response, [len(ids)], [torch.bool], ids.device)
    if not response.any() or response[0]:
        raise ValueError(
            f"response must have a token, and not the first, got {int(response.sum())} of {len(ids)}"
            f"{', the first among them' if response[:1].any() else ''}"
        )
    decoder = decoder_of(model)
    every = softmax_layers(decoder)
    heads = decoder.config.num_attention_heads
    check_int("receivers", receivers, 1, len(every) * heads)
    mask = response[None]
    with (
        collect(model, layers=layers, response_mask=mask) as credit,
        collect(model, layers=every, response_mask=mask, horizon=TO_THE_END) as whole,
    ):
        entropy = _entropies(model, ids, response)
    rhythm = credit.rhythm()
    groups = HeadGroups(*(group[0] for group in rhythm.groups))
    to_the_end = rhythm_of({layer: whole.stats[layer] for layer in credit.layers}, whole.layout, groups=groups)

    stats = [whole.stats[layer] for layer in every]
    columns = counted_columns(mask, TO_THE_END[0])
    kurtosis = torch.cat([column_moments(each.fai, columns).kurtosis for each in stats])  # [L, HQ]
    chosen, receiver_fai = torch.zeros(kurtosis.shape, dtype=torch.bool), torch.zeros(len(ids), device=ids.device)
    if columns.any():  # else nothing tells one head from another
        chosen = receiver_heads(kurtosis, receivers)
        members = [each.fai[0][row.to(ids.device)] for each, row in zip(stats, chosen, strict=True)]
        receiver_fai = torch.cat(members).mean(0)

    def peaks(signal: Tensor) -> Tensor:
        return find_peaks(signal[None], mask, min_quantile=min_quantile)[0]

    sets = coupled_sets(mask, rhythm)
    found = Reading(
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
        sets=CoupledSets(*(each[0].cpu() for each in sets)),
        gamma=token_credit("coupled", mask, rhythm)[0],
        layers=every,
        spans=torch.cat([each.span for each in stats]),
        kurtosis=kurtosis,
        receivers=chosen,
        sampled=credit.layers,
        groups=HeadGroups(*(group.cpu() for group in groups)),
    )
    return found._replace(**{name: x.cpu() for name, x in found._asdict().items() if isinstance(x, Tensor)})


def _entropies(model: nn.Module, ids: Tensor, response: Tensor) -> Tensor:
    """[T] fp32, nats, of what each token of R was drawn from at temperature 1; runs the model's one forward."""
    hidden = []
    hook = decoder_of(model).register_forward_hook(lambda _, args, output: hidden.append(output[0]))
    try:
        last = model(ids[None], use_cache=False, logits_to_keep=1).logits[0, -1].float()
    finally:
        hook.remove()
    places = response.nonzero().flatten()
    output = model.get_output_embeddings()
    near = max(1e-3, 4 * torch.finfo(output.weight.dtype).eps)  # 16-bit logits may round to a neighbour
    if not torch.allclose(
        _logits(model, output, hidden[0][0, -1:])[0], last, rtol=near, atol=near * float(last.abs().amax())
    ):
        raise ValueError(
            f"model must have logits that are its output layer's, scaled or soft-capped as its config says, got "
            f"{type(model).__name__}"
        )
    entropy = torch.zeros(len(ids), dtype=torch.float32, device=ids.device)
    for part in places.split(max(1, MOST_LOGITS // output.weight.shape[0])):
        log_probs = _logits(model, output, hidden[0][0, part - 1]).log_softmax(-1)
        entropy[part] = -(log_probs.exp() * log_probs).sum(-1)
    return entropy


def _logits(model: nn.Module, output: nn.Module, hidden: Tensor) -> Tensor:
    """[n, C] -> [n, V] fp32."""
    logits = linear(hidden, output.weight, output.bias).float()
    config = model.config.get_text_config()
    logits = logits * (getattr(config, "logit_scale", None) or 1.0)  # Cohere
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
