"""Wraps a causal language model as the policy: computes log-probabilities of answers without holding all logits.

Shapes: n tokens in a packed row, m of them in answers, C channels, V tokens in the vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rhythm_kernels.logits import LogitScale, logit_scale
from train.batch import MicroBatch

PLAIN = LogitScale()
MOST_LOGITS = 2**26  # the most logits held at a time, 256 MiB in float32


class Policy(nn.Module):
    """A model and the temperature at which its tokens are drawn."""

    def __init__(self, model: PreTrainedModel, temperature: float):
        super().__init__()
        self.model, self.temperature = model, temperature

    @property
    def decoder(self) -> nn.Module:
        return self.model.get_decoder()

    def forward(
        self, micro: MicroBatch, *, head: bool = True, entropy: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns the log-probability of each token of the answers [m] and, if asked, the entropies [m] in nats.

        Without `head` only the decoder runs, so that its attention can be read, and both are None.
        """
        hidden = self.decoder(
            input_ids=micro.ids,
            position_ids=micro.position_ids,
            use_cache=False,
            cu_seq_lens_q=micro.cu_seqlens,
            cu_seq_lens_k=micro.cu_seqlens,
            sequence_bounds=micro.bounds,
            max_length_q=micro.longest,
            max_length_k=micro.longest,
        ).last_hidden_state[0]
        if not head:
            return None, None
        output = self.model.get_output_embeddings()
        return token_log_probs(
            hidden[micro.answers - 1],
            output.weight,
            output.bias,
            micro.ids[0, micro.answers],
            temperature=self.temperature,
            scale=logit_scale(self.model.config),
            entropy=entropy,
        )


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    *,
    temperature: float,
    scale: LogitScale = PLAIN,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Returns log-probabilities [m] and, if asked, entropies [m] in nats; float32 or wider.

    Logits are computed a few rows at a time, and again in the backward pass: [m, V] is never held.

    Args:
        hidden: [m, C], the states that predict `ids`.
        weight, bias: [V, C] and [V], those of the output layer.
        ids: [m] int64.
        scale: what the model does to the logits of its output layer.
    """

    def rows_log_probs(hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = linear(hidden, weight, bias)
        logits = scale(logits.to(torch.promote_types(logits.dtype, torch.float32))) / temperature
        log_sum = logits.logsumexp(-1)
        log_probs = logits.gather(-1, ids[:, None]).squeeze(-1) - log_sum
        if not entropy:
            return log_probs, None
        with torch.no_grad():
            all_log_probs = logits - log_sum[:, None]
            return log_probs, -(all_log_probs.exp() * all_log_probs).sum(-1)

    rows = max(1, MOST_LOGITS // weight.shape[0])
    grad = torch.is_grad_enabled()
    parts = [
        checkpoint(rows_log_probs, *part, use_reentrant=False) if grad else rows_log_probs(*part)
        for part in zip(hidden.split(rows), ids.split(rows), strict=True)
    ]
    log_probs, entropies = zip(*parts, strict=True)
    return torch.cat(log_probs), torch.cat(entropies) if entropy else None
