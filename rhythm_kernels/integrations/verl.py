"""Adds rhythm credit to verl's trainer: a plug-in for verl 0.9.1, switched on by the block `rhythm` of its config.

    python -m verl.trainer.main_ppo ... +rhythm.strategy=coupled

verl imports this module in each of its processes: by the entry point of the group `verl.plugins`, or because
VERL_USE_EXTERNAL_MODULES names it. The import wraps some functions of verl's modules, each once its module has been
imported. If the config has no such block, they do as before.

The block goes to the workers with the call that computes the old log-probs, in the batch's extra_info. There the
engine's forward runs inside `collect` (`verl_engines.py`). WAAD (windowed average attention distance), FAI (future
attention influence) and the heads' spans join the log-probs in the model output, which verl puts in the batch's order
and carries back. They are of whole sequences, and the same on all ranks that share them. The trainer multiplies the
advantages.
"""

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from types import ModuleType

import torch
from torch import Tensor

from rhythm_kernels.credit.tokens import shape_advantages, token_credit
from rhythm_kernels.group_schedule import GroupSchedule
from rhythm_kernels.integrations.metrics import credit_means, credit_sums
from rhythm_kernels.integrations.verl_config import BLOCK, missing, read_options, sequence_ranks, sharing
from rhythm_kernels.integrations.verl_engines import (
    FAI,
    SPANS,
    WAAD,
    say_once,
    wrap_fsdp_step,
    wrap_megatron_pass,
    wrap_megatron_step,
    wrap_schedules,
)
from rhythm_kernels.options import CreditOptions
from rhythm_kernels.types import Rhythm

SIGNALS = (WAAD, FAI)


class TrainerCredit:
    """The credit of one run in the trainer's process.

    Args:
        options: read from the config.
        ranks: how many workers share each sequence, by the way in which they do.
    """

    def __init__(self, options: CreditOptions, ranks: dict[str, int]):
        self.options = options
        self.schedule = GroupSchedule(**options.schedule_arguments)
        settings = ", ".join(f"{name} {value}" for name, value in asdict(options).items())
        say_once(f"rhythm credit is on: {settings}{sharing(ranks)}")

    def request(self) -> str:
        """Returns the text that tells the workers the options and the head groups."""
        groups = self.schedule.groups
        groups = None if groups is None else [group.flatten().tolist() for group in groups]
        return json.dumps({"options": asdict(self.options), "groups": groups})

    def end_pass(self, spans: Tensor | None, tokens: Tensor | None) -> dict[str, float]:
        """Ends a step, and returns metrics of the groups' drift.

        Args:
            spans: [B, L HQ], in tokens, if the step ranks heads; else None.
            tokens: [B], the number of response tokens of each row; None without spans.
        """
        if spans is not None:
            self.schedule.add(spans[tokens > 0][:, None], tokens[tokens > 0])  # verl's padding rows have no response
        drift = self.schedule.advance()
        return {f"rhythm/groups_{name}": value for name, value in drift._asdict().items()} if drift else {}

    def shape(
        self, advantages: Tensor, response_mask: Tensor, signals: dict[str, Tensor], step: int
    ) -> tuple[Tensor, dict[str, float]]:
        """Returns the shaped advantages [B, T], and metrics.

        Args:
            step: the trainer's global step, from which random credit draws: a resumed run goes on with new draws.
            advantages: [B, T].
            response_mask: [B, T] bool, R.
            signals: the signals that the strategy reads, [B, T] each, by the name of their field.
        """
        rhythm = Rhythm(signals[WAAD], signals[FAI]) if self.options.reads_attention else None
        gamma = token_credit(
            self.options.strategy,
            response_mask,
            rhythm,
            entropy=signals.get("entropy"),
            seed=self.options.draw_seed(step),
            **self.options.credit_arguments,
        )
        sums = credit_sums(gamma, response_mask, self.options, rhythm)
        return shape_advantages(advantages, gamma), credit_means({name: total.item() for name, total in sums.items()})


def credit_of(trainer) -> TrainerCredit | None:
    """Returns the credit of a `PPOTrainer`, created at the first call; None if its config has no block."""
    if BLOCK not in trainer.__dict__:
        options = read_options(trainer.config)
        trainer.__dict__[BLOCK] = None if options is None else TrainerCredit(options, sequence_ranks(trainer.config))
    return trainer.__dict__[BLOCK]


def wrap_trainer_init(init: Callable) -> Callable:
    """Wraps `PPOTrainer.__init__`: it refuses a wrong block."""

    @functools.wraps(init)
    def with_check(trainer, *args, **kwargs):
        init(trainer, *args, **kwargs)
        credit_of(trainer)

    return with_check


def wrap_old_log_prob(compute_old_log_prob: Callable) -> Callable:
    """Wraps `PPOTrainer._compute_old_log_prob`: it asks the workers for the statistics too."""

    @functools.wraps(compute_old_log_prob)
    def with_request(trainer, batch, metrics):
        credit = credit_of(trainer)
        if credit is None or not credit.options.reads_attention:
            return compute_old_log_prob(trainer, batch, metrics)
        request_batch = batch
        request_batch.extra_info[BLOCK] = credit.request()
        try:
            batch = compute_old_log_prob(trainer, request_batch, metrics)
        finally:
            del request_batch.extra_info[BLOCK]  # the reference's and the critic's passes must not be read
        spans = tokens = None
        if credit.schedule.groups is None:
            fields = _get(batch, [SPANS, "response_mask"])
            spans, tokens = torch.stack(fields[SPANS].unbind()), _pad(fields["response_mask"]).bool().sum(-1)
        metrics.update(credit.end_pass(spans, tokens))
        return batch

    return with_request


def wrap_advantage(compute_advantage: Callable) -> Callable:
    """Wraps `PPOTrainer._compute_advantage`: it multiplies the positive advantages by gamma."""

    @functools.wraps(compute_advantage)
    def with_credit(trainer, batch, metrics):
        batch = compute_advantage(trainer, batch, metrics)
        credit = credit_of(trainer)
        if credit is None:
            return batch
        names = SIGNALS if credit.options.reads_attention else ("entropy",) if credit.options.reads_entropy else ()
        fields = _get(batch, ["advantages", "response_mask", *names])
        nested_mask = fields["response_mask"]
        signals = {name: _pad(_response_part(fields[name], nested_mask)) for name in names}
        advantages, response_mask = _pad(fields["advantages"]), _pad(nested_mask).bool()
        shaped, new_metrics = credit.shape(advantages, response_mask, signals, trainer.global_steps)
        metrics.update(new_metrics)
        return _put(batch, {"advantages": shaped}, nested_mask)

    return with_credit


def _get(batch, names: list[str]) -> dict[str, Tensor]:
    """Returns fields of a batch in verl's transfer queue, nested."""
    import transfer_queue

    fields = transfer_queue.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
    lacking = set(names) - set(fields.keys())
    if lacking:
        raise RuntimeError(
            f"the batch has no {', '.join(sorted(lacking))}: the plug-in must be installed where the workers run too, "
            "and the old-log-prob pass must be that of the FSDP or the Megatron engine"
        )
    return {name: fields[name] for name in names}


def _put(batch, padded: dict[str, Tensor], nested_mask: Tensor):
    """Puts fields into verl's transfer queue, without their padding, and returns the batch that has them."""
    import transfer_queue
    from tensordict import TensorDict
    from verl.workers.utils.padding import response_to_nested

    nested = {name: response_to_nested(value, nested_mask) for name, value in padded.items()}
    output = TensorDict(nested, batch_size=len(batch))
    return transfer_queue.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=output)


def _response_part(nested: Tensor, nested_mask: Tensor) -> Tensor:
    """Returns the response's part of a nested signal [B, prompt + response].

    verl stores log-probs one token earlier; signals are stored at their own tokens.
    """
    parts = [row[len(row) - len(mask) :] for row, mask in zip(nested.unbind(), nested_mask.unbind(), strict=True)]
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


def _pad(nested: Tensor) -> Tensor:
    return torch.nested.to_padded_tensor(nested, 0)


def wrap_validate(validate_config: Callable) -> Callable:
    """Wraps `validate_config`: it refuses a wrong block in the driver, before anything starts."""

    @functools.wraps(validate_config)
    def with_block(config, *args, **kwargs):
        validate_config(config, *args, **kwargs)
        read_options(config)

    return with_block


def wrap_other_trainer(start: Callable) -> Callable:
    """Wraps a method that each of verl's other trainers calls before it starts workers: it refuses the block."""

    @functools.wraps(start)
    def without_block(trainer, *args, **kwargs):
        if trainer.config.get(BLOCK) is not None:
            raise ValueError(f"the block {BLOCK} needs verl's V1 trainer, got {type(trainer).__name__}")
        return start(trainer, *args, **kwargs)

    return without_block


WRAPPED = {
    "verl.utils.config": {"validate_config": wrap_validate},
    "verl.workers.engine.fsdp.transformer_impl": {"FSDPEngineWithLMHead.forward_step": wrap_fsdp_step},
    "verl.workers.engine.megatron.transformer_impl": {
        "MegatronEngine.forward_backward_batch": wrap_megatron_pass,
        "MegatronEngineWithLMHead.forward_step": wrap_megatron_step,
        "get_forward_backward_func": wrap_schedules,
    },
    "verl.trainer.ppo.v1.trainer_base": {
        "PPOTrainer.__init__": wrap_trainer_init,
        "PPOTrainer._compute_old_log_prob": wrap_old_log_prob,
        "PPOTrainer._compute_advantage": wrap_advantage,
    },
    "verl.trainer.ppo.ray_trainer": {"RayPPOTrainer.init_workers": wrap_other_trainer},
    "verl.experimental.separation.ray_trainer": {"SeparateRayPPOTrainer._init_resource_pools": wrap_other_trainer},
}


def _wrap(module: ModuleType) -> None:
    """Wraps the functions of a module that WRAPPED names. If one is missing, a run with a block is refused."""
    for path, wrapper in WRAPPED[module.__name__].items():
        *parents, name = path.split(".")
        owner = functools.reduce(lambda outer, part: getattr(outer, part, None), parents, module)
        if not callable(getattr(owner, name, None)):
            missing.append(f"{module.__name__}.{path}")
        else:
            setattr(owner, name, wrapper(getattr(owner, name)))


class _WrapAfterImport(MetaPathFinder):
    """Wraps verl's modules after their import: importing them here would be slow and circular.

    wrapt's post-import hooks would do the same in fewer lines. But verl silently drops a plug-in whose import fails, so
    without wrapt a run would go on without its credit.
    """

    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target) if name in WRAPPED else None
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_wrap(module):
                load(module)
                _wrap(module)

            spec.loader.exec_module = load_and_wrap
        return spec


def install() -> None:
    """Wraps verl's modules once: imported ones now, the others after their import."""
    if any(isinstance(finder, _WrapAfterImport) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _WrapAfterImport())
    for name in WRAPPED:
        if name in sys.modules:
            _wrap(sys.modules[name])


install()
