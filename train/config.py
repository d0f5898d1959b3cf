"""Every setting of a run: dataclasses whose fields are the command-line flags, in the same groups.

A field `prompts_per_step` is the flag `--prompts-per-step`. Its help text and limits stand beside its default, and
`Config.check` holds every value against them before anything runs. Where TRL's GRPOConfig has a setting, the name is
TRL's.
"""

import argparse
import json
import typing
from collections.abc import Collection, Iterator
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path

from rhythm_kernels.options import CreditOptions, flat_name, from_flat, read_text

MOST = 2**31 - 1  # of a whole number without a limit of its own: larger ones overflow somewhere behind the start


class BadSetting(ValueError):
    """A flag with a value that it cannot have; the message names it and shows what arrived."""


class RunError(RuntimeError):
    """A run cannot go on, for a reason that is not a fault of the program; the message says which."""


def flag(default, help: str, **limits):
    """A field with its help text; limits are `above`, `least`, `most` (numbers or each item of a tuple), `choices`."""
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class Data:
    """problems"""

    train_data: str = flag("words", "a named set or KIND:FILE.jsonl; words: the tiny Countdown, made here")
    eval_data: tuple[str, ...] = flag((), "the same, several; empty: those that --train-data holds out")
    chat_template: bool = flag(True, "put problems into the model's chat template, where its tokenizer has one")
    max_prompt_length: int = flag(1024, "tokens; a longer problem is left out and counted", least=1)
    reward_workers: int = flag(2, "processes that verify maths answers", least=1)
    reward_timeout: float = flag(10.0, "seconds, after which a verification is killed and scores 0", above=0)


@dataclass(frozen=True)
class Words:
    """the tiny Countdown (--train-data words)"""

    numbers: int = flag(3, "how many numbers a problem gives; 4 take minutes to enumerate", least=2, most=4)
    largest: int = flag(20, "the numbers are drawn from 1 to this", least=2, most=99)
    operators: str = flag("+-*", "signs that an answer may use", choices=("+-", "+-*", "+-*/"))
    held_out: int = flag(1024, "held-out problems, none of whose number multisets is trained on", least=1)
    held_out_pool: int = flag(4, "held-out multisets hold this many times as many problems as are kept", least=1)
    split_seed: int = flag(0, "seed of the split", least=0)


@dataclass(frozen=True)
class Model:
    """model"""

    model: str = flag("", "a transformers model, folder or hub name; empty: a Qwen3 from scratch, as shaped below")
    dtype: str = flag("float32", "of arithmetic; parameters are kept in float32", choices=("float32", "bfloat16"))
    attention: str = flag(
        "packed",
        "of training; packed: one kernel call over a batch of sequences, the others are transformers' own",
        choices=("packed", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"),
    )
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass")
    layers: int = flag(4, "decoder layers", least=1)
    hidden_size: int = flag(128, "width of the residual stream", least=1)
    heads: int = flag(4, "query heads", least=1)
    key_heads: int = flag(2, "key heads, a divisor of --heads", least=1)
    head_size: int = flag(32, "channels of a head, even", least=2)
    mlp_size: int = flag(256, "width of the MLP", least=1)


@dataclass(frozen=True)
class Demonstrations:
    """supervised warm start of a model from scratch, cached"""

    misses: tuple[float, ...] = flag((0.35, 0.3, 0.2, 0.15), "odds of 0, 1, 2, ... misses before the hit", least=0)
    give_up: float = flag(0.25, "share of the searches with a miss that end with it as the answer", least=0, most=1)
    sft_steps: int = flag(2000, "optimizer steps", least=0)
    sft_batch_size: int = flag(32, "demonstrations a step", least=1)
    sft_learning_rate: float = flag(2e-3, "AdamW, warmed up and then decayed to a tenth", above=0)


@dataclass(frozen=True)
class Rollout:
    """rollouts"""

    engine: str = flag("transformers", "what samples the answers", choices=("transformers", "vllm"))
    prompts_per_step: int = flag(32, "problems a step, over all ranks", least=1)
    num_generations: int = flag(8, "answers to each problem, the group that rewards are compared in", least=2)
    max_completion_length: int = flag(64, "tokens an answer may take", least=1)
    temperature: float = flag(1.0, "of sampling; log-probabilities are taken at it", above=0)
    rollout_batch_size: int = flag(256, "answers that the transformers engine samples at a time", least=1)
    vllm_gpu_memory_utilization: float = flag(0.5, "share of a GPU's memory that vLLM takes", above=0, most=1)
    vllm_enable_sleep_mode: bool = flag(True, "vLLM gives its memory to the update; on a GPU only")
    vllm_logp_tolerance: float = flag(
        0.05, "largest mean gap, in nats, of sampler and trainer after the first weight sync", above=0
    )


@dataclass(frozen=True)
class GRPO:
    """GRPO"""

    max_steps: int = flag(150, "rollout batches to train on", least=0)
    learning_rate: float = flag(2e-4, "AdamW", above=0)
    weight_decay: float = flag(0.0, "AdamW", least=0)
    warmup_steps: int = flag(5, "steps of linear warm-up", least=0)
    final_learning_rate: float = flag(0.1, "share of the learning rate left at the last step", least=0, most=1)
    max_grad_norm: float = flag(1.0, "the gradient is scaled down to this norm", above=0)
    epsilon: float = flag(0.2, "lower clip of the probability ratio: 1 - epsilon", above=0, most=1)
    epsilon_high: float = flag(0.2, "upper clip of the probability ratio: 1 + epsilon_high", above=0)
    beta: float = flag(0.0, "weight of the KL divergence from the first policy; above 0 keeps a copy of it", least=0)
    loss_type: str = flag(
        "dapo",
        "dapo: mean over tokens; grpo: mean over answers of their mean; dr_grpo: sum over a constant",
        choices=("dapo", "grpo", "dr_grpo"),
    )
    scale_rewards: str = flag(
        "group",
        "divide advantages by the deviation of the group, of the batch, or not",
        choices=("group", "batch", "none"),
    )
    mask_truncated_completions: bool = flag(False, "leave answers that were cut off out of the loss")
    vllm_importance_sampling_correction: bool = flag(
        False, "weight tokens by the trainer's over the sampler's probability, whichever the engine"
    )
    vllm_importance_sampling_cap: float = flag(2.0, "largest such weight", above=0)
    num_iterations: int = flag(1, "passes over a rollout batch", least=1)
    gradient_steps: int = flag(2, "optimizer steps a pass, a divisor of --prompts-per-step", least=1)
    micro_batch_tokens: int = flag(
        4096, "tokens in one forward, prompts included; a longer sequence goes alone", least=1
    )


@dataclass(frozen=True)
class Run:
    """the run"""

    output: str = flag("", "folder of the run; by default runs/PRESET-CREDIT-TIME")
    seeds: tuple[int, ...] = flag((0, 1), "one training run each, side by side; one seed under torchrun", least=0)
    device: str = flag("auto", "auto is cuda where there is one", choices=("auto", "cpu", "cuda"))
    threads: int = flag(0, "CPU threads of each training run; 0 shares the cores among the seeds", least=0)
    cache: str = flag("runs/cache", "folder of warm starts, by a hash of what made them")
    eval_steps: int = flag(0, "steps between evaluations; 0: before and after only", least=0)
    eval_batch_size: int = flag(256, "answers in one evaluation batch", least=1)
    save_steps: int = flag(25, "steps between checkpoints", least=1)
    save_total_limit: int = flag(2, "checkpoints kept", least=1)
    logging_steps: int = flag(10, "steps between console lines", least=1)
    sample_steps: int = flag(0, "steps between pages of sampled answers; 0: after the run only", least=0)
    sample_answers: int = flag(16, "answers on a page", least=0)


@dataclass(frozen=True)
class Config:
    preset: str = "countdown-tiny"
    data: Data = Data()
    words: Words = Words()
    model: Model = Model()
    demonstrations: Demonstrations = Demonstrations()
    rollout: Rollout = Rollout()
    grpo: GRPO = GRPO()
    credit: CreditOptions = field(default_factory=CreditOptions)
    run: Run = Run()

    def groups(self) -> Iterator[tuple[str, object]]:
        return ((f.name, getattr(self, f.name)) for f in fields(self) if f.name != "preset")

    def change(self, **values) -> "Config":
        """A checked copy with these fields changed, wherever they live; strings are parsed as on the command line."""
        unknown = set(values) - {name for _, group in self.groups() for name in settings_of(group)}
        if unknown:
            raise BadSetting(f"no such flag: {', '.join(flag_name(name) for name in sorted(unknown))}")
        changed = {}
        for name, group in self.groups():
            changed[name] = _change(group, values)
        return replace(self, **changed).check()

    def check(self) -> "Config":
        for name, group in self.groups():
            for f in fields(group) if name != "credit" else ():  # which has checked itself
                _check_limits(f, getattr(group, f.name))
        model, rollout, grpo, credit, run = self.model, self.rollout, self.grpo, self.credit, self.run
        _require(model.heads % model.key_heads == 0, "key_heads", "divide --heads", model.key_heads, heads=model.heads)
        _require(model.head_size % 2 == 0, "head_size", "be even", model.head_size)
        _require(sum(self.demonstrations.misses) > 0, "misses", "hold a positive odd", self.demonstrations.misses)
        _require(
            rollout.prompts_per_step % grpo.gradient_steps == 0,
            "gradient_steps",
            "divide --prompts-per-step",
            grpo.gradient_steps,
            prompts_per_step=rollout.prompts_per_step,
        )
        _require(
            credit.groups_every == 1 or credit.group_by == "batch",
            "credit_group_by",
            "be batch where groups serve later steps",
            credit.group_by,
            credit_groups_every=credit.groups_every,
        )
        _require(bool(model.model) or self.data.train_data == "words", "model", "be given where problems are read", "")
        _require(
            bool(model.model) or rollout.engine == "transformers",
            "engine",
            "be transformers for a model from scratch",
            rollout.engine,
        )
        _require(len(set(run.seeds)) == len(run.seeds) > 0, "seeds", "be different numbers, at least one", run.seeds)
        return self

    def settings(self) -> dict[str, object]:
        """What the results of a run depend on, flat: all but where it writes and how it reports."""
        only_here = {f.name for f in fields(Run)} - {"seeds", "eval_steps"}
        return json.loads(json.dumps({name: value for name, value in self.flat().items() if name not in only_here}))

    def flat(self) -> dict[str, object]:
        """Every setting by the name of its flag."""
        groups = [group for _, group in self.groups()]
        return {name: getattr(group, f.name) for group in groups for name, f in settings_of(group).items()}

    def to_json(self) -> str:
        return json.dumps({"preset": self.preset, **self.flat()}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Config":
        flat = json.loads(text)
        config = cls(preset=flat.pop("preset"))
        missing = set(config.flat()) - set(flat)
        if missing:
            raise BadSetting(f"the saved configuration lacks {', '.join(map(flag_name, sorted(missing)))}")
        return config.change(**flat)

    @classmethod
    def load(cls, path: Path) -> "Config":
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (ValueError, AttributeError, KeyError) as error:
            raise BadSetting(f"{path} is no configuration of a run: {error}") from error


def settings_of(group: object) -> dict[str, Field]:
    """The fields of a group by the names of their settings; a run draws with its own seeds."""
    if isinstance(group, CreditOptions):
        return {flat_name(f.name): f for f in fields(group) if f.name != "seed"}
    return {f.name: f for f in fields(group)}


def _change(group: object, values: dict[str, object]) -> object:
    """A copy of a group with what `values` has of its settings."""
    settings = {name: f for name, f in settings_of(group).items() if name in values}
    if not isinstance(group, CreditOptions):
        return replace(group, **{name: _parse(f, values[name]) for name, f in settings.items()})
    before = {name: getattr(group, f.name) for name, f in settings_of(group).items()}
    try:
        return from_flat(before | {name: read_text(f, values[name]) for name, f in settings.items()})
    except (TypeError, ValueError) as error:
        name, _, rest = str(error).partition(" ")
        raise BadSetting(f"{flag_name(name)} {rest}") from error


def flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, names: Collection[str]) -> None:
    """A flag for each of these fields, in their groups."""
    for _, group in Config().groups():
        mine = {name: f for name, f in settings_of(group).items() if name in names}
        title = "token credit" if isinstance(group, CreditOptions) else type(group).__doc__
        section = parser.add_argument_group(title) if mine else None
        for name, f in mine.items():
            text = f.metadata["help"].replace("%", "%%")
            if f.type is bool:
                section.add_argument(flag_name(name), action=argparse.BooleanOptionalAction, help=text)
                continue
            several = isinstance(f.default, tuple) or name == "credit_layers"
            shown = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
            metavar = "N" if several else " ".join(f.metadata["choices"]) if "choices" in f.metadata else name.upper()
            section.add_argument(
                flag_name(name), help=f"{text} [{shown}]", metavar=metavar, nargs="+" if several else None
            )


def check_given(given: Collection[str], config: Config) -> None:
    """BadSetting for a flag that was given and that nothing reads, as the other settings are."""
    for names, acts, where in ACTS_WHERE:
        idle = [name for name in names if name in given]
        if idle and not acts(config):
            raise BadSetting(f"{', '.join(map(flag_name, idle))} would have no effect: {where}")


def _names_of(group: type) -> list[str]:
    return [f.name for f in fields(group)]


SHAPE = ("layers", "hidden_size", "heads", "key_heads", "head_size", "mlp_size")
ACTS_WHERE = (
    (_names_of(Words), lambda c: c.data.train_data == "words", "it is of the tiny Countdown, --train-data words"),
    ([*SHAPE, *_names_of(Demonstrations)], lambda c: not c.model.model, "--model names a trained model"),
    (
        ["vllm_gpu_memory_utilization", "vllm_enable_sleep_mode"],
        lambda c: c.rollout.engine == "vllm",
        "the answers do not come from --engine vllm",
    ),
    (["rollout_batch_size"], lambda c: c.rollout.engine == "transformers", "it is of --engine transformers"),
    (
        ["vllm_importance_sampling_cap"],
        lambda c: c.grpo.vllm_importance_sampling_correction,
        "it caps the weights of --vllm-importance-sampling-correction",
    ),
    (
        ["credit_top_fraction", "credit_amplification", "credit_largest"],
        lambda c: c.credit.strategy != "none",
        "--credit none selects no token",
    ),
    (
        ["credit_shared_fraction", "credit_max_lookback", "credit_tau_waad", "credit_tau_delta"],
        lambda c: c.credit.strategy == "coupled",
        "only --credit coupled reads it",
    ),
)
"""(fields, whether they act, why not), for those that do not always."""


def _require(holds: bool, name: str, demand: str, value, **beside):
    if not holds:
        others = "".join(f", with {flag_name(key)} {other}" for key, other in beside.items())
        raise BadSetting(f"{flag_name(name)} must {demand}, got {value!r}{others}")


def _check_limits(f: Field, value):
    limits = f.metadata
    for item in value if isinstance(value, tuple) else (value,):
        if "choices" in limits:
            _require(item in limits["choices"], f.name, f"be one of {', '.join(limits['choices'])}", value)
        if "above" in limits:
            _require(limits["above"] < item < float("inf"), f.name, f"be above {limits['above']} and finite", value)
        if "least" in limits:
            _require(limits["least"] <= item < float("inf"), f.name, f"be at least {limits['least']}", value)
        most = limits.get("most", MOST if type(item) is int else None)
        if most is not None:
            _require(item <= most, f.name, f"be at most {most}", value)


def _parse(f: Field, value):
    """`value` as the field's type: from a command-line string, from JSON, or from Python."""
    if typing.get_origin(f.type) is tuple:
        kind = typing.get_args(f.type)[0]
        items = value.replace(",", " ").split() if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise _wrong_type(f, value)
        return tuple(_parse_one(f, kind, item, value) for item in items)
    return _parse_one(f, f.type, value, value)


def _parse_one(f: Field, kind: type, item, value):
    if kind is bool and isinstance(item, str) and item.lower() in ("true", "false"):
        return item.lower() == "true"
    if isinstance(item, str) and kind in (int, float):
        try:
            return kind(item)
        except ValueError:
            raise _wrong_type(f, value) from None
    if kind is float and type(item) is int:
        return float(item)
    if type(item) is not kind:
        raise _wrong_type(f, value)
    return item


def _wrong_type(f: Field, value) -> BadSetting:
    several = typing.get_origin(f.type) is tuple
    kind = typing.get_args(f.type)[0] if several else f.type
    return BadSetting(f"{flag_name(f.name)} must be {kind.__name__}{'s' if several else ''}, got {value!r}")
