"""Rhythm credit in TRL's GRPOTrainer: the advantages [B] of a batch become [B, T] before its loss reads them.

    from rhythm_kernels.integrations.trl import RhythmGRPOConfig, RhythmGRPOTrainer  # in place of TRL's

    config = RhythmGRPOConfig(..., credit="coupled")
    trainer = RhythmGRPOTrainer(..., args=config)

No forward is added. Where TRL runs its old-log-prob pass (several iterations, generation and optimizer steps that are
not aligned, vLLM with importance sampling), the statistics are read there. Where it does not, the policy that sampled
is the one of the loss's own forward, and they are read in that, before the loss reads the advantages.
"""

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from rhythm_kernels.collect import Collector
from rhythm_kernels.credit import shape_advantages
from rhythm_kernels.group_schedule import GroupDrift
from rhythm_kernels.integrations.options import CreditOptions, credit_means, credit_sums
from rhythm_kernels.types import HeadGroups, Rhythm

logger = logging.get_logger(__name__)

FIRST, BEYOND = Version("1.15"), Version("1.17")  # of TRL
USED = {  # what the mixin overrides, with the parameters that it counts on
    "_generate": ("self", "prompts"),
    "_generate_and_score_completions": ("self", "inputs"),
    "_get_per_token_logps_and_entropies": (
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
    ),
    "_compute_loss": ("self", "model", "inputs"),
    "get_gamma_weights": ("advantages",),
    "_save_checkpoint": ("self", "model", "trial"),
    "_load_optimizer_and_scheduler": ("self", "checkpoint"),
}
STATE_FILE = "rhythm_state.json"  # in a checkpoint's folder
CREDITED = "rhythm_credited"  # marks a micro-batch whose advantages are shaped
# Losses whose gradient reaches a token only through the ratio; the others multiply the token's own log-prob
THROUGH_RATIO = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "sapo")
# options that are checked together, and the option of each field
OPTION_OF = (
    {"credit": "strategy"},
    {"credit_q": "q"},
    {"credit_amp": "amp"},
    {"credit_alpha": "alpha"},
    {"credit_k": "k"},
    {"credit_largest": "largest"},
    {"credit_window": "window"},
    {"credit_horizon": "horizon"},
    {"credit_local": "local", "credit_global": "global_"},
    {"credit_groups_per": "groups_per"},
    {"credit_groups_every": "groups_every"},
    {"credit_seed": "seed"},
)


def check_trl(version: str, trainer: type) -> None:
    """Raises ImportError where this TRL is not one that the mixin was written for."""
    fits = f"rhythm_kernels.integrations.trl needs trl >= {FIRST}, < {BEYOND}"
    if not FIRST <= Version(version) < BEYOND:
        raise ImportError(f"{fits}, got {version}")
    for name, needed in USED.items():
        method = getattr(trainer, name, None)
        found = () if method is None else tuple(inspect.signature(method).parameters)
        if found[: len(needed)] != needed:
            raise ImportError(
                f"{fits}, whose {trainer.__name__}.{name} takes ({', '.join(needed)}); "
                f"in this one, {version}, it {'takes (' + ', '.join(found) + ')' if found else 'is missing'}"
            )


check_trl(metadata.version("trl"), GRPOTrainer)


@dataclass
class RhythmGRPOConfig(GRPOConfig):
    """TRL's GRPOConfig with the credit options; they are also flags of HfArgumentParser and TrlParser.

    Raises:
        TypeError, ValueError: an option of the wrong type or value, or one that does not go with TRL's own, when it is
            made; the message starts with the field.
    """

    credit: str = field(
        default="coupled",
        metadata={
            "help": "What multiplies a token's positive advantage.",
            "choices": ["none", "random", "entropy", "local", "global", "coupled"],
        },
    )
    credit_q: float = field(default=0.4, metadata={"help": "Share of a response's tokens that is selected."})
    credit_amp: float = field(default=1.5, metadata={"help": "Factor of a selected token."})
    credit_alpha: float = field(
        default=0.5, metadata={"help": "Share of a dominated anchor's credit that moves to its opening."}
    )
    credit_k: int = field(default=3, metadata={"help": "Tokens before an anchor in which its opening may lie."})
    credit_largest: bool = field(
        default=True, metadata={"help": "Select the largest values, or the smallest (the paper's ablation)."}
    )
    credit_sampled_layers: int = field(
        default=5, metadata={"help": "How many layers of the middle third have their attention read."}
    )
    credit_layer_indices: list[int] | None = field(
        default=None, metadata={"help": "The indices of the layers that are read, in place of credit_sampled_layers."}
    )
    credit_window: int = field(default=10, metadata={"help": "WAAD clips distances at this many tokens."})
    credit_horizon: list[int] = field(
        default_factory=lambda: [10, 50],
        metadata={"help": "FAI counts attention from so many tokens later to so many; one number: to the end."},
    )
    credit_local: float = field(default=0.3, metadata={"help": "Share of all heads that are local."})
    credit_global: float = field(default=0.3, metadata={"help": "Share of all heads that are global."})
    credit_groups_per: str = field(
        default="sequence",
        metadata={
            "help": "Rank heads by each sequence's own spans, or by those of all rows of a forward.",
            "choices": ["sequence", "batch"],
        },
    )
    credit_groups_every: int = field(
        default=1,
        metadata={
            "help": "Generation batches that a ranking of the heads serves; above 1 it is that of all sequences of one."
        },
    )
    credit_seed: int = field(default=0, metadata={"help": "Seed of credit=random."})

    def __post_init__(self):
        super().__post_init__()
        for fields in OPTION_OF:
            self._check(", ".join(fields), **{option: self._value(name) for name, option in fields.items()})
        indices = self.credit_layer_indices is not None
        self._check("credit_layer_indices" if indices else "credit_sampled_layers", layers=self._layers())
        if self.credit != "none" and self.importance_sampling_level == "sequence" and self.loss_type in THROUGH_RATIO:
            raise ValueError(
                f"importance_sampling_level must be token where credit={self.credit} and loss_type={self.loss_type}, "
                "got sequence: the loss reaches all tokens through one ratio, so that each of them would get the "
                "mean credit of its sequence"
            )

    def _value(self, name: str):
        value = getattr(self, name)
        if name == "credit_horizon" and isinstance(value, (list, tuple)) and len(value) == 1:
            return (value[0], None)
        return value

    def _layers(self):
        return self.credit_sampled_layers if self.credit_layer_indices is None else self.credit_layer_indices

    def _check(self, fields: str, **options) -> None:
        try:
            CreditOptions(**options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{fields}: {error}") from None

    @property
    def credit_options(self) -> CreditOptions:
        options = {option: self._value(name) for fields in OPTION_OF for name, option in fields.items()}
        return CreditOptions(layers=self._layers(), **options)


class RhythmMixin:
    """Adds rhythm credit to a GRPOTrainer that stands after it: class Mine(RhythmMixin, MyGRPOTrainer).

    Training alone is credited: an evaluation sees the advantages as they are. With credit="none" nothing is done.

    Raises:
        TypeError: args is not a RhythmGRPOConfig.
        ValueError: the attention of this model, or of layers that the config names, cannot be read.
        RuntimeError: in training, where a batch would have gone on without its credit.
    """

    def __init__(self, model, reward_funcs=None, args=None, *others, **named):
        if not isinstance(args, RhythmGRPOConfig):
            raise TypeError(f"args must be a RhythmGRPOConfig, which has the credit options, got {type(args).__name__}")
        self._credit = args.credit_options
        self._schedule = self._credit.schedule()
        self._pass: _Pass | None = None
        self._draws = 0
        self._statistics_seconds = 0.0  # of this optimizer step
        self._start_pool()
        super().__init__(model, reward_funcs, args, *others, **named)
        if self._credit.reads_attention:  # a model or layers that cannot be read are refused before anything runs
            self._credit.collect(self.model, torch.ones(1, 1, dtype=torch.bool))

    # ---- where the credit is read ------------------------------------------------------------------------------------

    def _is_credited(self) -> bool:
        return self._credit.strategy != "none" and self.model.training  # TRL's own sign of training

    @property
    def _generate_every(self) -> int:
        """Micro-batches that a generation batch serves."""
        return self.args.steps_per_generation * self.num_iterations

    def _runs_old_pass(self) -> bool:
        """TRL's own condition."""
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        return corrected or self.args.gradient_accumulation_steps % self._generate_every != 0

    @contextmanager
    def _reading(self, new: "_Pass") -> Iterator["_Pass"]:
        """Inside, the first log-prob pass of new.model is `new`."""
        self._pass = new
        try:
            yield new
        finally:
            self._pass = None

    def _generate(self, prompts):
        made = super()._generate(prompts)
        if self._pass is not None:
            self._pass.tool_mask = made[2]  # lists of 0 and 1, or None
        return made

    def _generate_and_score_completions(self, inputs):
        if not (self._is_credited() and self._runs_old_pass()):
            output = super()._generate_and_score_completions(inputs)
            if self._is_credited() and "old_per_token_logps" in output:
                raise RuntimeError("TRL ran an old-log-prob pass that was not expected, so it was not read")
            return output
        with self._reading(_Pass(self.model)) as read:
            output = super()._generate_and_score_completions(inputs)
        if read.gamma is None or "old_per_token_logps" not in output:
            raise RuntimeError("TRL was expected to run an old-log-prob pass of the policy, and ran none")
        mask = output["completion_mask"]
        mask = mask * output["tool_mask"] if "tool_mask" in output else mask
        if not torch.equal(mask.bool(), read.mask):
            raise RuntimeError("the tokens that TRL will train on are not those that were read")
        self._finish(read)
        self._end_generation_batch()
        # a row for each sequence: shuffled and split with the rest
        return output | {"advantages": shape_advantages(output["advantages"], read.gamma)}

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, **options):
        run = super()._get_per_token_logps_and_entropies
        read = self._pass
        if read is None or read.gamma is not None or model is not read.model:
            return run(model, input_ids, attention_mask, logits_to_keep, **options)
        read.mask = _completion_mask(attention_mask[:, -logits_to_keep:], read.tool_mask)
        if self._credit.reads_entropy:
            options["compute_entropy"] = True
        if self._credit.reads_attention:
            whole = torch.cat([torch.zeros_like(attention_mask[:, :-logits_to_keep]).bool(), read.mask], 1)
            with _Readings(self._credit, model, whole, self._schedule.groups) as read.readings:
                found = run(model, input_ids, attention_mask, logits_to_keep, **options)
            read.rhythm = read.readings.rhythm(logits_to_keep)
        else:
            found = run(model, input_ids, attention_mask, logits_to_keep, **options)
        draw = self._draws * self.accelerator.num_processes + self.accelerator.process_index
        entropy = found[1] if self._credit.reads_entropy else None
        read.gamma = self._credit.gamma(read.mask, rhythm=read.rhythm, entropy=entropy, draw=draw)
        self._draws += 1
        return found

    def _compute_loss(self, model, inputs):
        # where there was an old-log-prob pass, it was read; CREDITED is set if an earlier iteration read this one's
        if not self._is_credited() or "old_per_token_logps" in inputs or CREDITED in inputs:
            return super()._compute_loss(model, inputs)
        with self._reading(_Pass(model, inputs.get("tool_mask"))) as read:
            late = _LateAdvantages(inputs, read)
            loss = super()._compute_loss(model, late)
        if not late.taken:
            raise RuntimeError("the loss did not take its advantages from its inputs: it was computed without credit")
        inputs |= {"advantages": late["advantages"], CREDITED: True}
        self._finish(read)
        if (self._step + 1) % self._generate_every == 0:
            self._end_generation_batch()
        return loss

    def get_gamma_weights(self, advantages, *others, **named):
        """VESPO's weight of each sequence, [B, 1], by the sign of its advantage, which credit leaves to all tokens."""
        of_sequence = advantages[:, :1] if self._is_credited() else advantages
        return super().get_gamma_weights(of_sequence, *others, **named)

    # ---- head groups -------------------------------------------------------------------------------------------------

    def _start_pool(self) -> None:
        self._spans: Tensor | float = 0.0
        """[L, HQ] fp64: spans times tokens of R, summed over this rank's part of the generation batch."""
        self._tokens: Tensor | int = 0

    def _end_generation_batch(self) -> None:
        if not self._credit.reads_attention:
            return
        if self._schedule.groups is None:
            pooled = torch.cat([self._spans.flatten(), self._tokens.double().flatten()])
            pooled = self.accelerator.reduce(pooled, reduction="sum")  # so that all ranks have the same groups
            spans, tokens = pooled[:-1].view_as(self._spans), pooled[-1:].long()
            self._start_pool()
            if not tokens.item():
                return  # the calibration is put off until there is a token to train on
            self._schedule.add(spans[None] / tokens, tokens)
        drift: GroupDrift | None = self._schedule.advance()
        for name, value in (drift._asdict() if drift else {}).items():
            self._metrics["train"][f"groups/{name}"].append(value)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.args.should_save and self._credit.strategy != "none":
            state = self._schedule.state_dict()
            spans = None if state["spans"] is None else state["spans"].tolist()  # fp32 to decimals and back is exact
            folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            folder.joinpath(STATE_FILE).write_text(json.dumps(state | {"spans": spans, "draws": self._draws}))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self._credit.strategy == "none":
            return
        file = Path(checkpoint, STATE_FILE)
        if not file.exists():
            logger.warning(f"{file} is missing: the heads are ranked anew at the first step")
            return
        state = json.loads(file.read_text())
        self._draws = state.pop("draws")
        spans = None if state["spans"] is None else torch.tensor(state["spans"])
        self._schedule.load_state_dict(state | {"spans": spans})

    # ---- metrics -----------------------------------------------------------------------------------------------------

    def _finish(self, read: "_Pass") -> None:
        """What a pass leaves behind: metrics over all ranks, spans for the head groups, the time it took."""
        sums = credit_sums(read.gamma, read.mask, read.rhythm)
        totals = self.accelerator.reduce(torch.stack([*sums.values()]), reduction="sum").tolist()
        for name, value in credit_means(dict(zip(sums, totals, strict=True))).items():
            self._metrics["train"][name].append(value)
        if read.readings is not None:
            self._statistics_seconds += read.readings.seconds
            if self._schedule.groups is None:
                spans, tokens = read.readings.pooled_spans()
                self._spans, self._tokens = self._spans + spans, self._tokens + tokens

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._credit.reads_attention and self._step % self.current_gradient_accumulation_steps == 0:
            self._metrics["train"]["rhythm/statistics_seconds"].append(self._statistics_seconds)
            self._statistics_seconds = 0.0
        return loss


class RhythmGRPOTrainer(RhythmMixin, GRPOTrainer):
    """TRL's GRPOTrainer with rhythm credit: same arguments, with a RhythmGRPOConfig as `args`."""


@dataclass
class _Pass:
    """A log-prob pass of the policy that is to be read: of this model, the next one."""

    model: nn.Module
    tool_mask: Tensor | list[list[int]] | None = None
    mask: Tensor | None = None
    """[B, C] bool, R: completion tokens that are trained on."""
    gamma: Tensor | None = None
    """[B, C] fp32, once the pass is done."""
    rhythm: Rhythm | None = None
    """waad and fai [B, C]."""
    readings: "_Readings | None" = None


class _LateAdvantages(dict):
    """A micro-batch whose advantages are there once its pass has been read, shaped."""

    def __init__(self, inputs: dict, read: _Pass):
        super().__init__(inputs)
        self.read, self.taken = read, False

    def __getitem__(self, key):
        value = super().__getitem__(key)
        if key != "advantages":
            return value
        if self.read.gamma is None:
            raise RuntimeError("the loss asked for the advantages before the log-prob pass that their credit is of")
        self.taken = True
        return shape_advantages(value, self.read.gamma)

    def get(self, key, default=None):
        return self[key] if key in self else default  # noqa: SIM401


class _Readings:
    """The statistics of each forward of a model inside the context: one pass, in chunks of its rows."""

    def __init__(self, credit: CreditOptions, model: nn.Module, mask: Tensor, groups: HeadGroups | None):
        self.credit, self.model, self.groups = credit, model, groups
        self.mask = mask  # [B, P + C] bool, R
        self.rows = 0  # that the forwards so far have had
        self._collectors: list[Collector] = []
        self._rhythms: list[Rhythm] = []
        self._open: Collector | None = None

    def __enter__(self) -> "_Readings":
        self._hooks = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after),
        ]
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()
        self._close()

    def _close(self) -> None:
        if self._open is not None:
            self._open.__exit__()
            self._open = None

    def _before(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        rows = len(kwargs["input_ids"])
        part = self.mask[self.rows : self.rows + rows]
        self.rows += rows
        self._open = self.credit.collect(model, part, self.groups).__enter__()

    def _after(self, *_) -> None:
        collector = self._open
        self._close()
        self._collectors.append(collector)
        self._rhythms.append(collector.rhythm())
        collector.stats.clear()  # [B, HQ, T] of each layer

    def rhythm(self, completion: int) -> Rhythm:
        """waad and fai of the last `completion` tokens of all rows, [B, C]."""
        if self.rows != len(self.mask):
            raise RuntimeError(f"the log-prob pass ran over {self.rows} of {len(self.mask)} rows")
        waad, fai = (torch.cat(parts)[:, -completion:] for parts in list(zip(*self._rhythms, strict=True))[:2])
        return Rhythm(waad, fai)

    @property
    def seconds(self) -> float:
        """Time in the statistics; on a GPU this waits for them."""
        return sum(collector.seconds for collector in self._collectors)

    def pooled_spans(self) -> tuple[Tensor, Tensor]:
        """(spans times tokens of R, summed over sequences, [L, HQ] fp64; tokens of R, 0-dim int64) of a calibration."""
        total, start = 0.0, 0
        for each in self._rhythms:
            rows = len(each.waad)
            tokens = self.mask[start : start + rows].sum(-1)
            # [L, HQ] is one ranking of all rows of a forward
            total = total + (each.spans.double() * tokens[:, None, None]).sum(0)
            start += rows
        return total, self.mask.sum()


def _completion_mask(valid: Tensor, tool_mask: Tensor | list[list[int]] | None) -> Tensor:
    """R [B, C] bool: completion tokens that are valid and, with tools, not a tool's. `valid` [B, C] of 0 and 1."""
    mask = valid.bool()
    if tool_mask is None:
        return mask
    if not isinstance(tool_mask, Tensor):
        padded = torch.zeros(mask.shape, dtype=torch.bool)
        for row, made in zip(padded, tool_mask, strict=True):
            row[: len(made)] = torch.tensor(made, dtype=torch.bool)
        tool_mask = padded.to(mask.device)
    return mask & tool_mask.bool()
