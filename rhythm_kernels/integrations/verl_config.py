"""Reads the block `rhythm` of verl's config, and refuses settings of verl under which a token would not get its credit.

The functions import verl and omegaconf when they are called, since verl loads the plug-in while it is imported itself.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import fields

from rhythm_kernels.options import CreditOptions

VERSIONS = ("0.9.1",)
BLOCK = "rhythm"
STRATEGIES = ("fsdp", "fsdp2", "megatron")
SEQUENCE_PARALLEL = (
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size",
    "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size",
)
"""The settings of the number of ranks that share each sequence; verl takes the first that is above 1."""
MEGATRON = "actor_rollout_ref.actor.megatron"
ATTENTION = "actor_rollout_ref.model.override_config.attn_implementation"
TOKEN_LOSSES = (
    "vanilla",
    "dppo_tv",
    "dppo_kl",
    "gspo",
    "sapo",
    "gpg",
    "clip_cov",
    "kl_cov",
    "dro",
    "cispo",
    "bypass_mode",
)
"""Policy losses that multiply each token's gradient by that token's own advantage."""
missing: list[str] = []
"""The functions that the plug-in would have wrapped and this verl does not have."""


def read_options(config: Mapping) -> CreditOptions | None:
    """Returns the options of verl's config; None if it has no block.

    Raises:
        TypeError, ValueError: a key is unknown, a value is wrong, or a setting of verl prevents reading the statistics.
        RuntimeError: the plug-in does not support this verl.
    """
    from omegaconf import OmegaConf

    block = config.get(BLOCK)
    if block is None:
        return None
    _check_version()
    if not OmegaConf.is_dict(block):
        raise TypeError(f"{BLOCK} must be a block of options, as in +{BLOCK}.strategy=coupled, got {block!r}")
    options = make_options(OmegaConf.to_container(block, resolve=True))
    _check_settings(config, options)
    return options


def _check_version() -> None:
    import verl

    fit = ", ".join(VERSIONS)
    if verl.__version__ not in VERSIONS:
        raise RuntimeError(f"the block {BLOCK} needs verl {fit}, got verl {verl.__version__}")
    if missing:
        raise RuntimeError(f"the block {BLOCK} needs verl {fit} as released; this one has no {', '.join(missing)}")


def make_options(block: dict) -> CreditOptions:
    """Returns the options of a block.

    Raises:
        TypeError, ValueError: a key is unknown, or a value is wrong.
    """
    known = [field.name for field in fields(CreditOptions)]
    unknown = sorted(set(block) - set(known))
    if unknown:
        raise ValueError(f"unknown keys in the block {BLOCK}: {', '.join(unknown)}; there are {', '.join(known)}")
    try:
        return CreditOptions(**block)
    except (TypeError, ValueError) as error:
        raise type(error)(f"in the block {BLOCK}: {error}") from error


def _check_settings(config: Mapping, options: CreditOptions) -> None:
    """Raises ValueError for a run whose old-log-prob pass the plug-in cannot read or would not see."""
    from omegaconf import OmegaConf

    select = functools.partial(OmegaConf.select, config)
    if not select("trainer.use_v1"):
        raise ValueError(f"the block {BLOCK} needs verl's V1 trainer: set trainer.use_v1=True")
    strategy = select("actor_rollout_ref.actor.strategy")
    if strategy not in STRATEGIES:
        raise ValueError(
            f"the block {BLOCK} needs the FSDP or the Megatron engine: set actor_rollout_ref.actor.strategy to "
            f"{', '.join(STRATEGIES)}, got {strategy}"
        )
    if options.strategy != "none":
        _check_loss(select)
    if not (options.reads_attention or options.reads_entropy):
        return
    if select("algorithm.rollout_correction.bypass_mode"):
        raise ValueError(
            f"{BLOCK}.strategy={options.strategy} is read in the old-log-prob pass, which bypass mode skips: "
            "set algorithm.rollout_correction.bypass_mode=False"
        )
    if options.reads_attention and strategy == "megatron":
        _check_megatron(select)
    elif options.reads_attention:
        _check_ulysses(select(ATTENTION), sequence_ranks(config)["Ulysses"])


def _check_megatron(select: Callable) -> None:
    """Raises ValueError for a run of the Megatron engine whose forward `collect` cannot read."""
    parts = select(f"{MEGATRON}.virtual_pipeline_model_parallel_size")
    if parts is not None:
        raise ValueError(
            f"the block {BLOCK} needs stages of one part each: set "
            f"{MEGATRON}.virtual_pipeline_model_parallel_size=null, got {parts}"
        )
    if select(f"{MEGATRON}.dynamic_context_parallel"):
        raise ValueError(
            f"the block {BLOCK} needs the same ranks for each sequence: set {MEGATRON}.dynamic_context_parallel=False"
        )


def _check_ulysses(attention: str | None, ranks: int) -> None:
    """Raises ValueError for attention that verl's Ulysses does not reach."""
    if ranks > 1 and attention is not None and "flash" not in attention:
        raise ValueError(
            f"the block {BLOCK} needs FlashAttention where {ranks} ranks share each sequence: set {ATTENTION} to "
            f"flash_attention_2, got {attention}; verl's Ulysses wraps no other, and each rank would attend to its own "
            "tokens alone"
        )


def _check_loss(select: Callable) -> None:
    """Raises ValueError for a run whose loss would not give each token its own advantage."""
    if select("algorithm.use_pf_ppo"):
        raise ValueError(
            f"the block {BLOCK} needs advantages in the order of their trajectories: set algorithm.use_pf_ppo=False; "
            "preference feedback draws trajectories anew, and verl's V1 trainer then writes their advantages to others"
        )
    loss = select("actor_rollout_ref.actor.policy_loss.loss_mode") or "vanilla"
    if loss not in TOKEN_LOSSES:
        raise ValueError(
            f"the block {BLOCK} needs a loss in which each token has its own advantage: set "
            f"actor_rollout_ref.actor.policy_loss.loss_mode to one of {', '.join(TOKEN_LOSSES)}, got {loss}"
        )
    if select("distillation.enabled") and not select("distillation.distillation_loss.use_task_rewards"):
        raise ValueError(
            f"the block {BLOCK} needs a loss that reads the advantages: set "
            "distillation.distillation_loss.use_task_rewards=True, without which verl's loss is that of distillation"
        )


def sequence_ranks(config: Mapping) -> dict[str, int]:
    """Returns how many ranks share each sequence of the actor, by the way in which they do."""
    from omegaconf import OmegaConf

    if OmegaConf.select(config, "actor_rollout_ref.actor.strategy") == "megatron":
        return megatron_ranks(OmegaConf.select(config, MEGATRON))
    sizes = [OmegaConf.select(config, name) or 1 for name in SEQUENCE_PARALLEL]
    return {"Ulysses": next((size for size in sizes if size > 1), 1)}


def megatron_ranks(engine_config: object) -> dict[str, int]:
    """Returns how many ranks share each sequence in a Megatron engine, by the way in which they do."""
    return {
        "tensor": engine_config.tensor_model_parallel_size,
        "context": engine_config.context_parallel_size,
        "pipeline": engine_config.pipeline_model_parallel_size,
    }


def sharing(ranks: dict[str, int]) -> str:
    """Returns what the printed lines say of ranks that share a sequence, by the way in which they do."""
    ways = {way: size for way, size in ranks.items() if size > 1}
    if not ways:
        return ""
    named = ", ".join(way if len(ways) == 1 else f"{way} {size}" for way, size in ways.items())
    return f"; {math.prod(ways.values())} ranks share each sequence ({named})"
