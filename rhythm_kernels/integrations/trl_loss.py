"""Prepares the inputs of a TRL trainer's loss, and proves that it takes the advantages of tokens.

Shapes: B rows of a micro-batch, C tokens of the longest completion.
"""

import copy
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from rhythm_kernels.integrations.trl_pass import Pass

OF_TOKENS = (
    "completion_ids",
    "completion_mask",
    "tool_mask",
    "old_per_token_logps",
    "ref_per_token_logps",
    "sampling_per_token_logps",
    "importance_sampling_ratio",
)
"""Fields [B, C] of TRL's micro-batches."""
FACTORS = ("completion_mask", "tool_mask", "importance_sampling_ratio")
"""Fields by which TRL multiplies a token's loss."""
TOLERANCE = 1e-3
"""Largest error of a gradient in the proof, as a share of the largest gradient."""


@dataclass
class StandIn(Pass):
    """A pass that runs no model: its log-probs are `leaf`."""

    leaf: Tensor = field(kw_only=True)

    def model_for(self, is_read: bool, completion: int) -> Callable:
        """Returns a function for TRL's pass to call in place of a model.

        It returns the rows of `leaf` one after another, or log-probs of -1 if the pass is another one.
        """
        begin = 0

        def model(input_ids: Tensor, **_) -> SimpleNamespace:
            nonlocal begin
            rows, begin = len(input_ids), begin + len(input_ids)
            part = self.leaf[begin - rows : begin] if is_read else self.leaf.new_full((rows, completion), -1.0)
            return SimpleNamespace(log_probs=part, entropy=torch.ones_like(part), aux_loss=torch.zeros_like(part[0, 0]))

        return model


class LateInputs(dict):
    """A micro-batch with fields that can be read only after the log-prob pass of the loss."""

    def __init__(self, inputs: Mapping, late: dict[str, Callable[[], Tensor]], read: Pass):
        super().__init__(inputs)
        self._late, self._read = late, read
        self.untaken = set(late)

    def __getitem__(self, key):
        if key not in self._late:
            return super().__getitem__(key)
        if self._read.log_probs is None:
            raise RuntimeError(f"the loss asked for its {key} before the log-prob pass that they depend on")
        self.untaken.discard(key)
        return self._late[key]()

    def get(self, key, default=None):
        return self[key] if key in self else default  # noqa: SIM401


def with_sequence_ratio(log_probs: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """Returns old log-probs [B, C] that turn a loss of token ratios into that of GSPO-token (arXiv 2507.18071).

    A token's ratio to them has the value of its sequence's ratio, the geometric mean over R, and the gradient of the
    token's own log-prob.

    Args:
        log_probs: [B, C], the policy's, without a gradient.
        old: [B, C], the sampling policy's.
        mask: [B, C] of 0 and 1, R.
    """
    mean = ((log_probs - old) * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1.0)
    return log_probs - mean


def proof_inputs(inputs: Mapping) -> tuple[dict, Tensor]:
    """Returns a micro-batch and log-probs [B, C] for the proof.

    All tokens of its completions are trained on, and each has two or more. The log-probs are near the old ones, so that
    ratios differ from one token to the next.
    """
    inputs = dict(inputs)
    rows, width = inputs["completion_ids"].shape
    if width == 1:  # a single token cannot show whether it gets its own advantage
        wide = {name: inputs[name].repeat(1, 8) for name in OF_TOKENS if name in inputs}
        inputs, width = inputs | wide, 8
    trained = {name: torch.ones_like(inputs[name]) for name in FACTORS if name in inputs}
    old = inputs.get("old_per_token_logps")
    old = torch.full((rows, width), -1.0, device=inputs["completion_ids"].device) if old is None else old.float()
    place = torch.arange(width, device=old.device) + torch.arange(rows, device=old.device)[:, None]
    return inputs | trained, old + 0.1 * torch.sin(place.float())


def prove_token_advantages(name: str, gradient: Callable[[Tensor], Tensor], like: Tensor) -> None:
    """Raises if a loss does not multiply each token's gradient by that token's own advantage.

    The advantages differ: if they were equal, a loss that averages them over a sequence would pass.

    Args:
        name: the name of the loss, for the error.
        gradient: advantages [B] or [B, C] -> the gradient of the loss by the log-probs, [B, C].
        like: a tensor [B, C].

    Raises:
        RuntimeError: the loss does not take advantages [B, C], has other gradients, or could not be tried.
    """
    rows, width = like.shape
    token, row = torch.arange(width, device=like.device), torch.arange(rows, device=like.device)[:, None]
    weights = 1 + (0.6180340 * token + 0.4142136 * row) % 1  # no two tokens have the same
    refusal = (
        f"{name} must take advantages [B, C], and multiply each token's gradient by that token's own: rhythm credit "
        "has no meaning in another loss; leave the mixin out, or set credit=none"
    )

    def measured(advantages: Tensor) -> Tensor:
        try:
            return gradient(advantages)
        except Exception as wrong:
            raised = f"it raised {type(wrong).__name__}: {wrong}"
            if advantages.ndim == 1:
                raise RuntimeError(f"{name} could not be tried: with log-probs of no model {raised}") from wrong
            raise RuntimeError(f"{refusal}. Given [B, C], {raised}") from wrong

    rest = measured(like.new_zeros(rows))  # the part that does not depend on the advantages, such as a KL term
    is_reached = False
    for sign in (1.0, -1.0):
        wanted = weights * (measured(like.new_full((rows,), sign)) - rest)
        error = (measured(sign * weights) - rest - wanted).abs().max()
        largest = wanted.abs().max()
        if not error <= TOLERANCE * largest:  # NaN too
            raise RuntimeError(f"{refusal}. Given [B, C], the gradients of its tokens were others")
        is_reached |= bool(largest > 0)
    if not is_reached:
        raise RuntimeError(f"{refusal}. Its gradient does not depend on the advantages")


def without_traces(trainer):
    """Returns a copy of a trainer whose fields and containers may be changed; models and other objects are shared."""
    twin = copy.copy(trainer)
    for name, value in vars(trainer).items():
        if name != "_buffered_inputs":  # shared too: it is a generation batch, which may be large
            twin.__dict__[name] = _copied(value)
    return twin


def _copied(value):
    if isinstance(value, Tensor):
        return value if isinstance(value, nn.Parameter) else value.clone()
    if not isinstance(value, (dict, list, set, deque)):
        return value
    twin = copy.copy(value)
    if isinstance(twin, dict):
        twin.update({key: _copied(item) for key, item in value.items()})
    elif isinstance(twin, (list, deque)):
        for index, item in enumerate(value):
            twin[index] = _copied(item)
    return twin
