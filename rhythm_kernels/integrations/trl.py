"""Adds rhythm credit to TRL's GRPOTrainer: a batch's advantages [B] become [B, T] before its loss reads them.

    from rhythm_kernels.integrations.trl import RhythmGRPOConfig, RhythmGRPOTrainer  # in place of TRL's

    config = RhythmGRPOConfig(..., credit="coupled")
    trainer = RhythmGRPOTrainer(..., args=config)

No forward is added. TRL runs an old-log-prob pass for several iterations, for generation and optimizer steps that are
not aligned, and for vLLM with importance sampling: then that pass gives the statistics. Otherwise the sampling policy
also runs the loss's forward, which gives the statistics before the loss reads the advantages.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from unittest.mock import patch

import torch
from packaging.version import Version
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.trainer.utils import get_config_model_id

from rhythm_kernels.credit.tokens import shape_advantages, token_credit
from rhythm_kernels.group_schedule import GroupSchedule
from rhythm_kernels.integrations.metrics import credit_means, credit_sums
from rhythm_kernels.integrations.trl_config import SEQUENCE_TOKEN, RhythmGRPOConfig
from rhythm_kernels.integrations.trl_loss import (
    LateInputs,
    StandIn,
    proof_inputs,
    prove_token_advantages,
    with_sequence_ratio,
    without_traces,
)
from rhythm_kernels.integrations.trl_pass import Pass, Readings, completion_mask, ids_of, mask_of
from rhythm_kernels.integrations.trl_state import load_state, save_state
from rhythm_kernels.integrations.virtual_tokens import virtual_tokens
from rhythm_kernels.listen.collect import collect
from rhythm_kernels.options import CreditOptions

FIRST, BEYOND = Version("1.8"), Version("1.17")  # the versions of TRL from FIRST to before BEYOND
OLD = Version("1.14")  # before it, two losses did not take the advantages of tokens
WITHOUT = "1.14"  # its pass calls the layers of the model past the model's own forward
USED = {  # the methods that the mixin overrides, with the parameters that it relies on
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
GAMMA = "rhythm_gamma"
"""Field of a generation batch or a micro-batch whose credit has been read: [B, C] fp32."""


def check_trl(version: str, trainer: type) -> None:
    """Raises ImportError if the mixin does not support this TRL."""
    fits = f"rhythm_kernels.integrations.trl needs trl >= {FIRST}, < {BEYOND} and not {WITHOUT}"
    if not FIRST <= Version(version) < BEYOND or Version(version).release[:2] == Version(WITHOUT).release:
        raise ImportError(f"{fits}, got {version}")
    for name, needed in USED.items():
        method = getattr(trainer, name, None)
        takes = () if method is None else tuple(inspect.signature(method).parameters)
        if takes[: len(needed)] != needed:
            raise ImportError(
                f"{fits}, whose {trainer.__name__}.{name} takes ({', '.join(needed)}); "
                f"in this one, {version}, it {'takes (' + ', '.join(takes) + ')' if takes else 'is missing'}"
            )


check_trl(metadata.version("trl"), GRPOTrainer)


def _check_order(cls: type) -> None:
    """Raises TypeError if the mixin does not come before a GRPOTrainer."""
    if not issubclass(cls, GRPOTrainer):
        raise TypeError(f"{RhythmMixin.__name__} needs a GRPOTrainer after it, {cls.__name__} is none")
    if cls.__mro__.index(RhythmMixin) > cls.__mro__.index(GRPOTrainer):
        raise TypeError(f"{cls.__name__} must name {RhythmMixin.__name__} before its trainer, which else ignores it")


class RhythmMixin:
    """Adds rhythm credit to the GRPOTrainer that follows it: class Mine(RhythmMixin, MyGRPOTrainer).

    Only training is credited: evaluation uses the plain advantages. With credit="none" the mixin changes nothing.

    Raises:
        TypeError: args is not a RhythmGRPOConfig, or no GRPOTrainer follows the mixin.
        ValueError: the attention of this model, or of layers that the config names, cannot be read.
        RuntimeError: in training, a batch would have lost its credit, or another trainer's loss does not take the
            advantages of tokens.
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
        if Version(metadata.version("trl")) < OLD:
            _check_old_losses(args)
        self._schedule = GroupSchedule(**self._credit.schedule_arguments)
        self._start_pool()
        super().__init__(model, reward_funcs, args, *others, **named)
        if self._credit.strategy != "none":
            _check_ranks(getattr(self.accelerator, "parallelism_config", None))
        if args.importance_sampling_level == SEQUENCE_TOKEN:
            self._sequence_ratios = True
            self.importance_sampling_level = "token"  # TRL's loss then takes ratios to the old log-probs it is given
        if self._credit.reads_attention:  # refuses a model or layers that cannot be read before anything runs
            virtual_tokens(self.model)
            self._layers = collect(self.model, **self._credit.collect_arguments).layers

    def _default_config(self, model) -> RhythmGRPOConfig:
        """Returns the default configuration of TRL and of the credit."""
        owner = _owner("__init__", type(self))
        if owner is not GRPOTrainer:
            raise TypeError(f"args must be a RhythmGRPOConfig, got None: {owner.__name__} may have defaults of its own")
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return RhythmGRPOConfig(f"{name.split('/')[-1]}-GRPO")

    # ---- where the credit is read ------------------------------------------------------------------------------------

    def _is_credited(self) -> bool:
        """Returns whether the current batch gets credit."""
        return self._credit.strategy != "none" and self.model.training  # TRL's own test of training

    @property
    def _generate_every(self) -> int:
        """The number of micro-batches for which one generation batch is used."""
        return self.args.steps_per_generation * self.num_iterations

    def _runs_old_pass(self) -> bool:
        """Returns whether TRL runs an old-log-prob pass, by TRL's own condition."""
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        return corrected or self.args.gradient_accumulation_steps % self._generate_every != 0

    @contextmanager
    def _reading(self, awaited: Pass) -> Iterator[None]:
        """Opens a context that waits for this pass."""
        self._pass = awaited
        try:
            yield
        finally:
            self._pass = None

    def _generate(self, prompts):
        generated = super()._generate(prompts)
        if self._pass is not None:  # only now: a pass that a rollout runs is another one
            self._pass = Pass(self.model, tool_mask=generated[2])  # lists of 0 and 1, or None
        return generated

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
        if not torch.equal(ids_of(output), read.ids) or not torch.equal(mask_of(output).bool(), read.response_mask):
            raise RuntimeError(OTHER_TOKENS)
        self._finish(read)
        self._end_generation_batch()
        return output | {GAMMA: read.gamma}  # a row for each sequence, so that TRL shuffles and splits it with the rest

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
            outputs = run(compute_entropy)
            read.log_probs = outputs[0].detach()
            return outputs
        read.ids = input_ids
        read.response_mask = completion_mask(attention_mask[:, -logits_to_keep:], read.tool_mask)
        if self._credit.reads_attention:
            of_prompt = torch.zeros_like(attention_mask[:, :-logits_to_keep]).bool()
            whole = torch.cat([of_prompt, read.response_mask], 1)
            with Readings(self._credit, model, whole, self._schedule.groups) as read.readings:
                outputs = run(compute_entropy)
            read.rhythm = read.readings.rhythm(logits_to_keep)
        else:
            outputs = run(compute_entropy or self._credit.reads_entropy)
        draw = self._draws * self.accelerator.num_processes + self.accelerator.process_index
        read.gamma = token_credit(
            self._credit.strategy,
            read.response_mask,
            read.rhythm,
            entropy=outputs[1] if self._credit.reads_entropy else None,
            seed=self._credit.draw_seed(draw),
            **self._credit.credit_arguments,
        )
        read.log_probs = outputs[0].detach()
        self._draws += 1
        return outputs

    # ---- the loss ----------------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs):
        self._is_reached = True
        if not self._is_credited():
            uncredited = Pass(model, ids_of(inputs), reads=False) if self._sequence_ratios else None
            return self._loss_with(model, inputs, uncredited)
        if GAMMA not in inputs and "old_per_token_logps" in inputs:
            raise RuntimeError(f"the batch has lost {GAMMA}, the credit that was read in TRL's old-log-prob pass")
        if not self._is_proven:
            self._prove_loss(model, inputs)
        # the old-log-prob pass or an earlier iteration over this micro-batch has read it; else the loss's own pass does
        read = Pass(model, ids_of(inputs), inputs.get("tool_mask"), gamma=inputs.get(GAMMA))
        loss = self._loss_with(model, inputs, read, lambda: shape_advantages(inputs["advantages"], read.gamma))
        if GAMMA not in inputs:
            inputs[GAMMA] = read.gamma
            self._finish(read)
        if not self._runs_old_pass() and (self._step + 1) % self._generate_every == 0:
            self._end_generation_batch()
        return loss

    def _loss_with(self, model, inputs, read: Pass | None, advantages: Callable[[], Tensor] | None = None) -> Tensor:
        """Returns the loss of the trainer after the mixin, with these advantages in place of its own."""
        late = {}
        if advantages is not None and read.gamma is not None:
            inputs = inputs | {"advantages": advantages()}
        elif advantages is not None:
            late["advantages"] = advantages
        if self._sequence_ratios and "old_per_token_logps" in inputs:
            old, mask = inputs["old_per_token_logps"], mask_of(inputs)
            late["old_per_token_logps"] = lambda: with_sequence_ratio(read.log_probs, old, mask)
        if not late:
            return super()._compute_loss(model, inputs)
        late_inputs = LateInputs(inputs, late, read)
        with self._reading(read):
            loss = super()._compute_loss(model, late_inputs)
        if late_inputs.untaken:
            names = ", ".join(sorted(late_inputs.untaken))
            raise RuntimeError(f"the loss did not take its {names} from its inputs: it was computed with others")
        if read.response_mask is not None and not torch.equal(mask_of(late_inputs).bool(), read.response_mask):
            raise RuntimeError(OTHER_TOKENS)
        return loss

    def _prove_loss(self, model, inputs) -> None:
        """Raises RuntimeError if the loss does not take the advantages of tokens.

        TRL's loss with token ratios is known to. Any other is computed five times on a copy of the trainer, with
        made-up log-probs: no forward runs, and neither metrics nor random states change.
        """
        owner = _owner("_compute_loss", type(self))
        if owner is not GRPOTrainer or self.importance_sampling_level != "token":
            trainer, device = without_traces(self), self.accelerator.device
            inputs, log_probs = proof_inputs(inputs)

            def gradient(advantages: Tensor) -> Tensor:
                leaf = log_probs.clone().requires_grad_()
                gamma = leaf.detach() if GAMMA in inputs else None  # with gamma, advantages are known before the pass
                stand_in = StandIn(model, ids_of(inputs), reads=False, gamma=gamma, leaf=leaf)
                devices = [device] if device.type == "cuda" else []
                with torch.random.fork_rng(devices), torch.enable_grad(), trainer._reading(stand_in), without_model():
                    loss = trainer._loss_with(model, inputs, stand_in, lambda: advantages)
                    (of_leaf,) = torch.autograd.grad(loss, leaf, allow_unused=True)
                return torch.zeros_like(leaf) if of_leaf is None else of_leaf

            prove_token_advantages(f"{owner.__name__}._compute_loss", gradient, log_probs)
        self._is_proven = True

    @classmethod
    def get_gamma_weights(cls, advantages, *others, **named):
        """Returns VESPO's weight of each sequence, [B, 1], by its advantage's sign, which credit does not change."""
        signs = advantages >= 0
        of_sequence = advantages[:, :1] if (signs == signs[:, :1]).all() else advantages
        return super().get_gamma_weights(of_sequence, *others, **named)

    # ---- head groups -------------------------------------------------------------------------------------------------

    def _start_pool(self) -> None:
        self._spans: Tensor | float = 0.0
        """[L, HQ] fp64: the sum of spans times tokens of R over this rank's part of the generation batch."""
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
                return  # the calibration waits for a token to train on
            self._schedule.add(spans[None] / tokens, tokens)
        drift = self._schedule.advance()
        for name, value in (drift._asdict() if drift else {}).items():
            self._metrics["train"][f"rhythm/groups_{name}"].append(value)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.args.should_save and self._credit.strategy != "none":
            folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            save_state(folder, self._schedule, self._draws, self._layers)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._credit.strategy != "none":
            self._draws = load_state(Path(checkpoint), self._schedule, self._draws, self._layers)

    # ---- metrics -----------------------------------------------------------------------------------------------------

    def _finish(self, read: Pass) -> None:
        """Stores the results of a pass: metrics over all ranks, spans for the head groups, seconds.

        Raises:
            ValueError: a layer did not attend as its statistics assume.
        """
        if read.readings is not None:
            read.readings.check()
        sums = credit_sums(read.gamma, read.response_mask, self._credit, read.rhythm)
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
    """TRL's GRPOTrainer with rhythm credit; takes the same arguments, with a RhythmGRPOConfig as `args`."""


def _check_old_losses(args: RhythmGRPOConfig) -> None:
    """Raises ValueError for a loss that did not take the advantages of tokens before `OLD`."""
    if args.loss_type == "luspo" and (
        args.importance_sampling_level == SEQUENCE_TOKEN or args.credit_options.strategy != "none"
    ):
        raise ValueError(f"loss_type must not be luspo before trl {OLD}, whose mean over tokens counts padding")
    if args.use_liger_kernel and args.credit_options.strategy != "none":
        raise ValueError(
            f"use_liger_kernel must be False before trl {OLD}, got True: Liger's loss there has one advantage a "
            "sequence and no log-prob pass"
        )


def _check_ranks(config) -> None:
    """Raises ValueError if accelerate gives several ranks the same batch: its `ParallelismConfig`, or None."""
    sizes = {name: getattr(config, name, 1) for name in ("tp_size", "cp_size", "sp_size")}
    shared = [f"{name}={size}" for name, size in sizes.items() if size > 1]
    if shared:
        raise ValueError(
            f"parallelism_config must leave tp_size, cp_size and sp_size at 1, got {', '.join(shared)}: TRL's GRPO "
            "samples answers of its own on every rank, and takes them for answers to different prompts"
        )


@contextmanager
def without_model() -> Iterator[None]:
    """Lets TRL's pass take what a `StandIn` returns in place of a model, which differs between versions of TRL."""

    def run(trainer, model, input_ids, *_, **__):
        found = model(input_ids)
        return found.log_probs, found.entropy, found.aux_loss

    with patch.object(GRPOTrainer, "_get_per_token_logps_and_entropies", run):
        yield


def _owner(name: str, cls: type) -> type:
    """Returns the class after the mixin that defines this method."""
    after = cls.__mro__[cls.__mro__.index(RhythmMixin) + 1 :]
    return next(base for base in after if name in vars(base))
