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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import Field, asdict, dataclass, field, fields, make_dataclass
from importlib import metadata
from pathlib import Path

import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import get_config_model_id

from rhythm_kernels.checks import check_int
from rhythm_kernels.credit.tokens import shape_advantages, token_credit
from rhythm_kernels.group_schedule import GroupDrift, GroupSchedule
from rhythm_kernels.integrations.metrics import credit_means, credit_sums
from rhythm_kernels.integrations.trl_loss import (
    LateInputs,
    Pass,
    StandIn,
    proof_inputs,
    prove_token_advantages,
    with_sequence_ratio,
    without_traces,
)
from rhythm_kernels.integrations.virtual_tokens import VirtualTokensCollector, virtual_tokens
from rhythm_kernels.listen.collect import Collector, collect
from rhythm_kernels.options import PREFIX, CreditOptions, flat_name, from_flat, read_text
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
OTHER_TOKENS = "the tokens that TRL will train on are not those that were read"
STATE_FILE = "rhythm_state.json"  # in a checkpoint's folder
GAMMA = "rhythm_gamma"
"""Field of a generation batch or a micro-batch whose credit has been read: [B, C] fp32."""
SEQUENCE_TOKEN = "sequence_token"
"""importance_sampling_level of GSPO-token: a sequence's ratio, and the gradient of each token."""
# Losses whose gradient reaches a token only through the ratio; the others multiply the token's own log-prob
THROUGH_RATIO = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "sapo")


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


AS_TEXTS = ("layers", "horizon")  # options of several types, which HfArgumentParser does not read


def _field(option: Field) -> tuple[str, type, Field]:
    """An option of `CreditOptions` as a field of a trainer's configuration, which HfArgumentParser makes a flag of."""
    metadata = {"help": option.metadata["help"].replace("%", "%%")}
    if "choices" in option.metadata:
        metadata["choices"] = list(option.metadata["choices"])
    kind = list[str] if option.name in AS_TEXTS else option.type
    default = list(option.default) if isinstance(option.default, tuple) else option.default
    given = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return flat_name(option.name), kind, field(metadata=metadata, **given)


CreditFields = make_dataclass("CreditFields", map(_field, fields(CreditOptions)))


@dataclass
class RhythmGRPOConfig(CreditFields, GRPOConfig):
    """TRL's GRPOConfig with the options of `CreditOptions`: credit, credit_top_fraction, ..., credit_seed.

    They are also flags of HfArgumentParser and TrlParser: `--credit global --credit_layers all --credit_horizon 10 50`.

    Raises:
        TypeError, ValueError: an option of the wrong type or value, or one that does not go with TRL's own, when it is
            made; the message starts with the field.
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


def _check_order(cls: type) -> None:
    """Raises TypeError where the mixin would not come before a GRPOTrainer."""
    if not issubclass(cls, GRPOTrainer):
        raise TypeError(f"{RhythmMixin.__name__} needs a GRPOTrainer after it, {cls.__name__} is none")
    if cls.__mro__.index(RhythmMixin) > cls.__mro__.index(GRPOTrainer):
        raise TypeError(f"{cls.__name__} must name {RhythmMixin.__name__} before its trainer, which else ignores it")


class RhythmMixin:
    """Adds rhythm credit to a GRPOTrainer that stands after it: class Mine(RhythmMixin, MyGRPOTrainer).

    Training alone is credited: an evaluation sees the advantages as they are. With credit="none" nothing is done.

    Raises:
        TypeError: args is not a RhythmGRPOConfig, or no GRPOTrainer stands after the mixin.
        ValueError: the attention of this model, or of layers that the config names, cannot be read.
        RuntimeError: in training, where a batch would have gone on without its credit, or a loss of another trainer
            does not take the advantages of tokens.
    """

    # a trainer may be made without __init__
    _credit = CreditOptions(strategy="none")
    _sequence_ratios = False
    _pass: Pass | None = None
    _layers: list[int] | None = None
    """The layers whose attention is read."""
    _draws = 0
    _is_proven = False
    """Whether the loss takes the advantages of tokens."""
    _is_reached = False
    """Whether the loss of this micro-batch has come through the mixin."""
    _statistics_seconds = 0.0  # of this optimizer step

    def __init_subclass__(cls, **named):
        super().__init_subclass__(**named)
        if issubclass(cls, Trainer):
            _check_order(cls)

    def __init__(self, model, reward_funcs=None, args=None, *others, **named):
        _check_order(type(self))
        args = self._default_config(model) if args is None else args
        if not isinstance(args, RhythmGRPOConfig):
            raise TypeError(f"args must be a RhythmGRPOConfig, which has the credit options, got {type(args).__name__}")
        self._credit = args.credit_options
        self._schedule = GroupSchedule(**self._credit.schedule_arguments)
        self._start_pool()
        super().__init__(model, reward_funcs, args, *others, **named)
        if args.importance_sampling_level == SEQUENCE_TOKEN:
            self._sequence_ratios = True
            self.importance_sampling_level = "token"  # what TRL's loss does with the old log-probs that it is given
        if self._credit.reads_attention:  # a model or layers that cannot be read are refused before anything runs
            virtual_tokens(self.model)
            self._layers = collect(self.model, **self._credit.collect_arguments).layers

    def _default_config(self, model) -> RhythmGRPOConfig:
        """TRL's own default, with the credit's."""
        owner = _owner("__init__", type(self))
        if owner is not GRPOTrainer:
            raise TypeError(f"args must be a RhythmGRPOConfig, got None: {owner.__name__} may have defaults of its own")
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return RhythmGRPOConfig(f"{name.split('/')[-1]}-GRPO")

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
    def _reading(self, new: Pass) -> Iterator[None]:
        """Inside, `new` is waited for."""
        self._pass = new
        try:
            yield
        finally:
            self._pass = None

    def _generate(self, prompts):
        made = super()._generate(prompts)
        if self._pass is not None:  # from here on; what a rollout runs is not the pass
            self._pass = Pass(self.model, tool_mask=made[2])  # lists of 0 and 1, or None
        return made

    def _generate_and_score_completions(self, inputs):
        if not (self._is_credited() and self._runs_old_pass()):
            output = super()._generate_and_score_completions(inputs)
            if self._is_credited() and "old_per_token_logps" in output:
                raise RuntimeError("TRL ran an old-log-prob pass that was not expected, so it was not read")
            return output
        with self._reading(Pass(self.model, is_open=False)):
            output = super()._generate_and_score_completions(inputs)
            read = self._pass
        if read.gamma is None or "old_per_token_logps" not in output:
            raise RuntimeError("TRL was expected to run an old-log-prob pass of the policy, and ran none")
        if not torch.equal(_ids_of(output), read.ids) or not torch.equal(_mask_of(output).bool(), read.mask):
            raise RuntimeError(OTHER_TOKENS)
        self._finish(read)
        self._end_generation_batch()
        return output | {GAMMA: read.gamma}  # a row for each sequence: shuffled and split with the rest

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **others
    ):
        def run(compute_entropy):
            return super(RhythmMixin, self)._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size=batch_size,
                compute_entropy=compute_entropy,
                **others,
            )

        read = self._pass
        is_read = read is not None and read.is_of(model, input_ids)
        if isinstance(read, StandIn):
            model = read.model_for(is_read, logits_to_keep)
        if not is_read:
            return run(compute_entropy)
        if not read.reads or read.gamma is not None:
            found = run(compute_entropy)
            read.log_probs = found[0].detach()
            return found
        read.ids = input_ids
        read.mask = _completion_mask(attention_mask[:, -logits_to_keep:], read.tool_mask)
        if self._credit.reads_attention:
            whole = torch.cat([torch.zeros_like(attention_mask[:, :-logits_to_keep]).bool(), read.mask], 1)
            with _Readings(self._credit, model, whole, self._schedule.groups) as read.readings:
                found = run(compute_entropy)
            read.rhythm = read.readings.rhythm(logits_to_keep)
        else:
            found = run(compute_entropy or self._credit.reads_entropy)
        draw = self._draws * self.accelerator.num_processes + self.accelerator.process_index
        entropy = found[1] if self._credit.reads_entropy else None
        read.gamma = token_credit(
            self._credit.strategy,
            read.mask,
            read.rhythm,
            entropy=entropy,
            seed=self._credit.draw_seed(draw),
            **self._credit.credit_arguments,
        )
        read.log_probs = found[0].detach()
        self._draws += 1
        return found

    # ---- the loss ----------------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs):
        self._is_reached = True
        if not self._is_credited():
            uncredited = Pass(model, _ids_of(inputs), reads=False) if self._sequence_ratios else None
            return self._loss_with(model, inputs, uncredited)
        if GAMMA not in inputs and "old_per_token_logps" in inputs:
            raise RuntimeError(f"the batch has lost {GAMMA}, the credit that was read in TRL's old-log-prob pass")
        if not self._is_proven:
            self._prove_loss(model, inputs)
        # from the old-log-prob pass, or an earlier iteration over this micro-batch; else it is read in the loss's own
        read = Pass(model, _ids_of(inputs), inputs.get("tool_mask"), gamma=inputs.get(GAMMA))
        loss = self._loss_with(model, inputs, read, lambda: shape_advantages(inputs["advantages"], read.gamma))
        if GAMMA not in inputs:
            inputs[GAMMA] = read.gamma
            self._finish(read)
            if (self._step + 1) % self._generate_every == 0:
                self._end_generation_batch()
        return loss

    def _loss_with(self, model, inputs, read: Pass | None, advantages: Callable[[], Tensor] | None = None) -> Tensor:
        """The loss of the trainer after the mixin, with these advantages in place of its own."""
        late = {}
        if advantages is not None and read.gamma is not None:
            inputs = inputs | {"advantages": advantages()}
        elif advantages is not None:
            late["advantages"] = advantages
        if self._sequence_ratios and "old_per_token_logps" in inputs:
            old, mask = inputs["old_per_token_logps"], _mask_of(inputs)
            late["old_per_token_logps"] = lambda: with_sequence_ratio(read.log_probs, old, mask)
        if not late:
            return super()._compute_loss(model, inputs)
        late_inputs = LateInputs(inputs, late, read)
        with self._reading(read):
            loss = super()._compute_loss(model, late_inputs)
        if late_inputs.untaken:
            names = ", ".join(sorted(late_inputs.untaken))
            raise RuntimeError(f"the loss did not take its {names} from its inputs: it was computed with others")
        if read.mask is not None and not torch.equal(_mask_of(late_inputs).bool(), read.mask):
            raise RuntimeError(OTHER_TOKENS)
        return loss

    def _prove_loss(self, model, inputs) -> None:
        """Raises where the loss is not known to take the advantages of tokens, and does not.

        TRL's own with token ratios is known. Others are computed five times, with log-probs of no model, on a copy of
        the trainer: no forward is run, and neither metrics nor random states change.
        """
        owner = _owner("_compute_loss", type(self))
        if owner is not GRPOTrainer or self.importance_sampling_level != "token":
            trainer, device = without_traces(self), self.accelerator.device
            inputs, log_probs = proof_inputs(inputs)

            def gradient(advantages: Tensor) -> Tensor:
                leaf = log_probs.clone().requires_grad_()
                gamma = leaf.detach() if GAMMA in inputs else None  # whether advantages are there before the pass
                stand_in = StandIn(model, _ids_of(inputs), reads=False, gamma=gamma, leaf=leaf)
                devices = [device] if device.type == "cuda" else []
                with torch.random.fork_rng(devices), torch.enable_grad(), trainer._reading(stand_in):
                    loss = trainer._loss_with(model, inputs, stand_in, lambda: advantages)
                    (found,) = torch.autograd.grad(loss, leaf, allow_unused=True)
                return torch.zeros_like(leaf) if found is None else found

            prove_token_advantages(f"{owner.__name__}._compute_loss", gradient, log_probs)
        self._is_proven = True

    @classmethod
    def get_gamma_weights(cls, advantages, *others, **named):
        """VESPO's weight of each sequence, [B, 1], by the sign of its advantage, which credit leaves to all tokens."""
        signs = advantages >= 0
        of_sequence = advantages[:, :1] if (signs == signs[:, :1]).all() else advantages
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
            state |= {"spans": spans, "draws": self._draws, "layers": self._layers}
            folder.joinpath(STATE_FILE).write_text(json.dumps(state))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self._credit.strategy == "none":
            return
        file = Path(checkpoint, STATE_FILE)
        if not file.exists():
            logger.warning(f"{file} is missing: the heads are ranked anew at the first step")
            return
        try:
            state = json.loads(file.read_text())
            layers, self._draws = state.pop("layers", self._layers), check_int("draws", state.pop("draws"), 0)
            state["spans"] = None if state["spans"] is None else torch.tensor(state["spans"])
            if layers == self._layers:
                self._schedule.load_state_dict(state)
                return
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} must be what a checkpoint of rhythm credit holds: {error!r}") from error
        logger.warning(f"{file} has the spans of layers {layers}, not {self._layers}: the heads are ranked anew")

    # ---- metrics -----------------------------------------------------------------------------------------------------

    def _finish(self, read: Pass) -> None:
        """What a pass leaves behind: metrics over all ranks, spans for the head groups, the time it took.

        Raises: ValueError: a layer did not attend as its statistics assume.
        """
        if read.readings is not None:
            read.readings.check()
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
        self._is_reached = False
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._is_credited() and not self._is_reached:
            raise RuntimeError(
                f"{type(self).__name__} computed its loss without {RhythmMixin.__name__}._compute_loss, and so without "
                "credit: a loss of your own belongs to a trainer class that stands after the mixin"
            )
        if self._credit.reads_attention and self._step % self.current_gradient_accumulation_steps == 0:
            self._metrics["train"]["rhythm/statistics_seconds"].append(self._statistics_seconds)
            self._statistics_seconds = 0.0
        return loss


class RhythmGRPOTrainer(RhythmMixin, GRPOTrainer):
    """TRL's GRPOTrainer with rhythm credit: same arguments, with a RhythmGRPOConfig as `args`."""


class _Readings:
    """The statistics of each forward of a model inside the context: one pass, in chunks of its rows."""

    def __init__(self, credit: CreditOptions, model: nn.Module, mask: Tensor, groups: HeadGroups | None):
        self.credit, self.model, self.groups = credit, model, groups
        self.mask = mask  # [B, P + C] bool, R
        self.virtual = virtual_tokens(model)
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
        if self.virtual:
            options = self.credit.collect_arguments | {"groups": self.groups, "backend": "auto"}
            collector = VirtualTokensCollector(model, self.virtual, part, **options)
        else:
            collector = collect(model, response_mask=part, groups=self.groups, **self.credit.collect_arguments)
        self._open = collector.__enter__()

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

    def check(self) -> None:
        """Raises ValueError where a layer did not attend as its statistics assume; a GPU is waited for."""
        for collector in self._collectors:
            collector.check()

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


def _owner(name: str, cls: type) -> type:
    """The class after the mixin whose method this is."""
    after = cls.__mro__[cls.__mro__.index(RhythmMixin) + 1 :]
    return next(base for base in after if name in vars(base))


def _ids_of(batch) -> Tensor:
    """[B, P + C]."""
    return torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)


def _mask_of(batch) -> Tensor:
    """[B, C] of 0 and 1: what TRL trains on."""
    mask = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


def _completion_mask(valid: Tensor, tool_mask: Tensor | list[list[int]] | None) -> Tensor:
    """R [B, C] bool: completion tokens that are valid and, with tools, not a tool's. `valid` [B, C] of 0 and 1."""
    mask = valid.bool()
    if tool_mask is None:
        return mask
    if not isinstance(tool_mask, Tensor):
        padded = torch.ones(mask.shape, dtype=torch.bool)  # TRL counts what a mask is too short for as the model's
        for row, made in zip(padded, tool_mask, strict=True):
            row[: len(made)] = torch.tensor(made, dtype=torch.bool)
        tool_mask = padded.to(mask.device)
    return mask & tool_mask.bool()
