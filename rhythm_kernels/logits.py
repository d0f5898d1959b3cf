"""Says what a model does to the logits of its output layer before it returns them."""

from typing import NamedTuple

from torch import Tensor

FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, Muse
DIVISOR = "logits_scaling"  # Granite, MiniCPM 3
SOFTCAP = "final_logit_softcapping"  # Gemma, nanochat


class LogitScale(NamedTuple):
    """logits -> softcap * tanh(factor * logits / softcap), or factor * logits without a softcap."""

    factor: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits if self.factor == 1 else self.factor * logits
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


def logit_scale(config) -> LogitScale:
    """Returns what the transformers configuration of a model asks for.

    The meaning of these settings is the model's own, and another model may read them otherwise (HyperCLOVA X multiplies
    where Granite divides). So a caller compares one row with the model's logits first.
    """
    config = config.get_text_config(decoder=True)
    factor = 1.0
    for name in FACTORS:
        factor *= getattr(config, name, None) or 1.0
    return LogitScale(factor / (getattr(config, DIVISOR, None) or 1.0), getattr(config, SOFTCAP, None))
