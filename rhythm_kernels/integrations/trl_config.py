"""Extends TRL's GRPOConfig by the options of rhythm credit."""

from copy import copy
from dataclasses import Field, asdict, dataclass, field, fields, make_dataclass

from trl import GRPOConfig

from rhythm_kernels.options import PREFIX, CreditOptions, flat_name, from_flat, read_text

SEQUENCE_TOKEN = "sequence_token"
"""The importance_sampling_level of GSPO-token: the ratio of the sequence, with the gradient of each token."""
THROUGH_RATIO = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "sapo")
"""Losses whose gradient reaches a token only through the ratio; the others multiply the token's own log-prob."""
AS_TEXTS = ("layers", "horizon", "span_rows")
"""Options of several types, which HfArgumentParser cannot read: their flags take lists of strings."""


def _flat_field(option: Field) -> tuple[str, type, Field]:
    """Returns an option of `CreditOptions` as a field of a configuration, which HfArgumentParser makes a flag of."""
    metadata = {"help": option.metadata["help"].replace("%", "%%")}
    if "choices" in option.metadata:
        metadata["choices"] = list(option.metadata["choices"])
    if option.name not in AS_TEXTS:
        return flat_name(option.name), option.type, field(default=option.default, metadata=metadata)
    default = list(option.default) if isinstance(option.default, tuple) else option.default
    # HfArgumentParser reads the default of a list from its factory alone
    return flat_name(option.name), list[str], field(default_factory=lambda: copy(default), metadata=metadata)


CreditFields = make_dataclass("CreditFields", map(_flat_field, fields(CreditOptions)))


@dataclass
class RhythmGRPOConfig(CreditFields, GRPOConfig):
    """TRL's GRPOConfig with the options of `CreditOptions`: credit, credit_top_fraction, ..., credit_seed.

    They are also flags of HfArgumentParser and TrlParser: `--credit global --credit_layers all --credit_horizon 10 50`.

    Raises:
        TypeError, ValueError: an option has the wrong type or value, or conflicts with TRL's. The message starts with
            the field.
    """

    def __post_init__(self):
        super().__post_init__()
        for option in fields(CreditOptions):
            if option.name in AS_TEXTS:
                name = flat_name(option.name)
                setattr(self, name, read_text(option, getattr(self, name)))
        for name, value in asdict(self.credit_options).items():
            setattr(self, flat_name(name), list(value) if isinstance(value, tuple) else value)
        if self.credit != "none" and self.importance_sampling_level == "sequence" and self.loss_type in THROUGH_RATIO:
            raise ValueError(
                f"importance_sampling_level must be token where credit={self.credit} and loss_type={self.loss_type}, "
                "got sequence: the loss reaches all tokens through one ratio, so that each of them would get the "
                f"mean credit of its sequence; {SEQUENCE_TOKEN} (GSPO-token) keeps the sequence's ratio and gives each "
                "token its own credit"
            )
        if self.importance_sampling_level == SEQUENCE_TOKEN and self.loss_type == "vespo":
            raise ValueError(
                f"importance_sampling_level must be token where loss_type=vespo, got {SEQUENCE_TOKEN}: VESPO computes "
                "sequence weights of its own"
            )

    @property
    def credit_options(self) -> CreditOptions:
        """The options that these fields set."""
        return from_flat({name: value for name, value in vars(self).items() if name.startswith(PREFIX)})
