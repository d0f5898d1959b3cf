"""Defines every setting of a run in dataclasses; their fields are the command line's flags, in the same groups.

The field `prompts_per_step` is the flag `--prompts-per-step`. Its help and limits are beside its default, and
`Config.check` checks every value against them before anything runs. Settings of TRL's GRPOConfig keep its names.
"""

import json
from collections.abc import Collection, Iterator
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import get_args, get_origin

from rhythm_kernels.analysis.vllm_process import LEAST_TEMPERATURE
from rhythm_kernels.options import CreditOptions, flat_name, from_flat, read_text

MOST = 2**31 - 1  # for integers without their own limit: larger ones overflow in torch
MAY_CHANGE = (
    *("micro_batch_tokens", "gradient_checkpointing", "attention", "rollout_batch_size", "vllm_gpu_memory_utilization"),
    *("vllm_logp_tolerance", "reward_workers", "reward_timeout", "device", "threads", "cache"),
    *("save_steps", "save_total_limit", "logging_steps", "sample_answers", "peak_weight"),
)
"""Settings that may change when a run continues. They decide on memory, speed, waits and reports, and on what is
learned only by rounding and by which answers are drawn from the same policy."""


SHAPE = ("layers", "hidden_size", "heads", "key_heads", "head_size", "mlp_size")
"""Settings of a model from scratch."""


class BadSetting(ValueError):
    """A flag has a value that it cannot have; the message names the flag and shows the value."""


class RunError(RuntimeError):
    """A run cannot go on, for a reason that is not a fault of the program; the message says which."""


def flag(default, help: str, **limits):
    """Returns a field with its help. Limits, of each item of a tuple: `above`, `least`, `most`, `below`, `choices`."""
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class Data:
    """problems"""

    train_data: str = flag("words", "a named set or KIND:FILE.jsonl; words is the tiny Countdown, which is generated")
    eval_data: tuple[str, ...] = flag(
        (), "one or more named sets or KIND:FILE.jsonl; by default those that belong to the training set"
    )
    chat_template: bool = flag(True, "put problems into the chat template of the model, if it has one")
    max_prompt_length: int = flag(1024, "most tokens of a problem; longer ones are left out and counted", least=1)
    reward_workers: int = flag(2, "processes that verify maths answers", least=1)
    reward_timeout: float = flag(
        10.0, "seconds after which a verification is killed and scores 0", above=0, most=86_400.0
    )


@dataclass(frozen=True)
class Words:
    """the tiny Countdown (--train-data words)"""

    numbers: int = flag(3, "how many numbers a problem gives; 4 take minutes to enumerate", least=2, most=4)
    fewest_numbers: int | None = flag(
        None, "problems give from this many to --numbers, as many of each; by default --numbers", least=2, most=4
    )
    largest: int = flag(20, "the numbers are drawn from 1 to this", least=2, most=99)
    operators: str = flag("+-*", "signs that an answer may use", choices=("+-", "+-*", "+-*/"))
    held_out: int = flag(1024, "held-out problems; their multisets of numbers are not trained on", least=1)
    held_out_pool: int = flag(4, "the held-out multisets give this many times as many problems as are kept", least=1)


@dataclass(frozen=True)
class Model:
    """model"""

    model: str = flag("", "folder or hub name of a model; by default a Qwen3 from scratch, of the shape below")
    dtype: str = flag("float32", "type to compute in; parameters are float32", choices=("float32", "bfloat16"))
    attention: str = flag(
        "packed",
        "attention of the training; packed is one kernel call for a batch of sequences, the others are transformers'",
        choices=("packed", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"),
    )
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass")
    layers: int = flag(4, "decoder layers", least=1)
    hidden_size: int = flag(128, "width of the residual stream", least=1)
    heads: int = flag(4, "query heads", least=1)
    key_heads: int = flag(2, "key heads; they divide --heads", least=1)
    head_size: int = flag(32, "channels of a head, an even number", least=2)
    mlp_size: int = flag(256, "width of the MLP", least=1)


@dataclass(frozen=True)
class Demonstrations:
    """supervised warm start of a model from scratch, cached"""

    sft_steps: int = flag(2000, "optimizer steps", least=0)
    sft_batch_size: int = flag(32, "demonstrations in a step", least=1)
    sft_learning_rate: float = flag(2e-3, "AdamW's largest learning rate; it decays to a tenth", above=0, most=1.0)


@dataclass(frozen=True)
class Rollout:
    """rollouts"""

    engine: str = flag("transformers", "library that samples the answers", choices=("transformers", "vllm"))
    prompts_per_step: int = flag(32, "problems in a step, over all ranks", least=1)
    num_generations: int = flag(8, "answers to each problem; rewards are compared within this group", least=2)
    max_completion_length: int = flag(64, "most tokens of an answer", least=1)
    temperature: float = flag(1.0, "temperature of the sampling and of all log-probabilities", above=0)
    eval_temperature: float | None = flag(
        None, "temperature of the evaluations, 0 for greedy; by default that of the sampling", least=0
    )
    rollout_batch_size: int = flag(256, "answers that --engine transformers samples at a time", least=1)
    vllm_gpu_memory_utilization: float = flag(0.5, "share of a GPU's memory that vLLM takes", above=0, most=1)
    vllm_logp_tolerance: float = flag(
        0.05, "largest mean gap of the sampler's and the trainer's log-probabilities, in nats", above=0
    )


@dataclass(frozen=True)
class GRPO:
    """GRPO"""

    max_steps: int = flag(150, "rollout batches to train on", least=0)
    learning_rate: float = flag(2e-4, "learning rate of AdamW", above=0, most=1.0)
    weight_decay: float = flag(0.0, "weight decay of AdamW", least=0)
    adam_beta1: float = flag(0.9, "AdamW's decay of the mean gradient", least=0, below=1)
    adam_beta2: float = flag(0.999, "AdamW's decay of the mean squared gradient", least=0, below=1)
    adam_epsilon: float = flag(1e-8, "AdamW's term beside the root of the mean square", above=0)
    warmup_steps: int = flag(5, "steps of linear warm-up", least=0)
    final_learning_rate: float = flag(
        0.1,
        "the learning rate falls linearly towards this share, which the step after the last would have",
        least=0,
        most=1,
    )
    max_grad_norm: float = flag(1.0, "the gradient is scaled down to this norm", above=0)
    epsilon: float = flag(0.2, "lower clip of the probability ratio: 1 - epsilon", above=0, most=1)
    epsilon_high: float = flag(0.2, "upper clip of the probability ratio: 1 + epsilon_high", above=0, most=1e6)
    beta: float = flag(0.0, "weight of the KL divergence from the first policy; above 0 keeps a copy of it", least=0)
    loss_type: str = flag(
        "dapo",
        "what the sum over the tokens of an optimizer step is divided by; dapo: the number of tokens; grpo: the number "
        "of answers, after a mean over each answer; dr_grpo: the number of answers times --max-completion-length",
        choices=("dapo", "grpo", "dr_grpo"),
    )
    scale_rewards: str = flag(
        "group",
        "divide advantages by the standard deviation of the group, of the batch, or by nothing",
        choices=("group", "batch", "none"),
    )
    mask_truncated_completions: bool = flag(
        False, "leave answers that were cut off out of the loss; their reward is 0 and counts in their group's mean"
    )
    vllm_importance_sampling_correction: bool = flag(
        False, "weight each token by min(cap, p_trainer / p_sampler), its probabilities, with either engine"
    )
    vllm_importance_sampling_cap: float = flag(2.0, "the cap of that correction", above=0, most=1e6)
    num_iterations: int = flag(1, "passes over a rollout batch", least=1)
    gradient_steps: int = flag(
        2,
        "optimizer steps in a pass; they divide --prompts-per-step, and ranks share the problems of a step evenly, or "
        "the answers to each",
        least=1,
    )
    micro_batch_tokens: int = flag(
        4096, "most tokens in one forward, prompts included; a longer sequence goes alone", least=1
    )


@dataclass(frozen=True)
class Run:
    """the run"""

    output: str = flag("", "folder of the run; by default runs/PRESET-CREDIT-TIME")
    seeds: tuple[int, ...] = flag(
        (0, 1), "seeds, one run for each, side by side; only one under torchrun or in train.evaluate", least=0
    )
    device: str = flag("auto", "device of the run; auto is cuda if there is one", choices=("auto", "cpu", "cuda"))
    threads: int = flag(0, "CPU threads of each training run; 0 shares the cores among the seeds", least=0)
    cache: str = flag("runs/cache", "folder in which warm starts are kept")
    eval_steps: int = flag(0, "steps between evaluations; 0: only before and after the run", least=0)
    peak_weight: float = flag(
        0.2, "weight of a new best score in the moving average of the peak (the paper's alpha in A.2)", above=0, most=1
    )
    save_steps: int = flag(25, "steps between checkpoints", least=1)
    save_total_limit: int = flag(2, "checkpoints kept", least=1)
    logging_steps: int = flag(10, "steps between console lines", least=1)
    sample_answers: int = flag(16, "sampled answers on the page that each evaluation writes; 0: no page", least=0)


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

    def flat(self) -> dict[str, object]:
        """Returns every setting by the name of its flag."""
        groups = [group for _, group in self.groups()]
        return {name: getattr(group, f.name) for group in groups for name, f in settings_of(group).items()}

    def change(self, **values) -> "Config":
        """Returns a checked copy in which these settings are changed; texts are read as on the command line."""
        if unknown := sorted(set(values) - set(self.flat())):
            raise BadSetting(f"no such flag: {', '.join(map(flag_name, unknown))}")
        return replace(self, **{name: _change(group, values) for name, group in self.groups()}).check()

    def check(self) -> "Config":
        flat = self.flat()

        def require(holds: bool, name: str, demand: str, *beside: str) -> None:
            if not holds:
                others = "".join(f", with {flag_name(other)} {flat[other]}" for other in beside)
                raise BadSetting(f"{flag_name(name)} must {demand}, got {flat[name]!r}{others}")

        for name, group in self.groups():
            for f in fields(group) if name != "credit" else ():  # CreditOptions has checked itself
                value = flat[f.name]
                for item in value if isinstance(value, tuple) else (value,):
                    for holds, demand in _limits(f, item):
                        require(holds, f.name, demand)
        model, rollout, credit, seeds = self.model, self.rollout, self.credit, self.run.seeds
        from_scratch = not model.model
        require(model.heads % model.key_heads == 0, "key_heads", "divide --heads", "heads")
        require(model.head_size % 2 == 0, "head_size", "be even")
        even = rollout.prompts_per_step % self.grpo.gradient_steps == 0
        require(even, "gradient_steps", "divide --prompts-per-step", "prompts_per_step")
        whole_batch = credit.groups_every == 1 or credit.group_by == "batch"
        require(whole_batch, "credit_group_by", "be batch where groups serve later steps", "credit_groups_every")
        require(not from_scratch or self.data.train_data == "words", "model", "be given where problems are read")
        transformers = rollout.engine == "transformers"
        require(not from_scratch or transformers, "engine", "be transformers for a model from scratch")
        for name in ("temperature", "eval_temperature"):
            is_sampled = bool(flat[name])  # neither None nor 0, which is greedy
            require(not is_sampled or flat[name] >= LEAST_TEMPERATURE, name, f"be at least {LEAST_TEMPERATURE}")
        fewest = self.words.fewest_numbers
        require(fewest is None or fewest <= self.words.numbers, "fewest_numbers", "be at most --numbers", "numbers")
        require(len(set(seeds)) == len(seeds) > 0, "seeds", "be different numbers, at least one")
        return self

    def settings(self) -> dict[str, object]:
        """Returns the settings on which a run's results depend: all but its folder and those of `MAY_CHANGE`."""
        results = {name: value for name, value in self.flat().items() if name not in (*MAY_CHANGE, "output")}
        return json.loads(json.dumps(results))

    def may_change(self) -> tuple[str, ...]:
        """Returns the settings that may change when this run continues; --max-steps where no learning rate has it."""
        return (*MAY_CHANGE, "max_steps") if self.grpo.final_learning_rate == 1 else MAY_CHANGE

    def to_json(self) -> str:
        return json.dumps({"preset": self.preset, **self.flat()}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Config":
        flat = json.loads(text)
        if not isinstance(flat, dict):
            raise BadSetting(f"it must be an object, got {type(flat).__name__}")
        config = cls(preset=flat.pop("preset"))
        if missing := sorted(set(config.flat()) - set(flat)):
            raise BadSetting(f"the saved configuration lacks {', '.join(map(flag_name, missing))}")
        return config.change(**flat)

    @classmethod
    def load(cls, path: Path) -> "Config":
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise BadSetting(f"{path} is no configuration of a run: {error}") from error


def flag_name(setting: str) -> str:
    return "--" + setting.replace("_", "-")


def differences(there: Config, now: Config, but: Collection[str] = ()) -> list[str]:
    """Returns a text for each setting in which a saved configuration differs, without those named in `but`."""
    saved, given = there.flat(), now.flat()
    return [
        f"{flag_name(name)} {saved[name]!r} there, {given[name]!r} now"
        for name in given
        if name not in but and saved[name] != given[name]
    ]


def settings_of(group: object) -> dict[str, Field]:
    """Returns the fields of a group by the names of their settings; credit's seed is the run's own."""
    if isinstance(group, CreditOptions):
        return {flat_name(f.name): f for f in fields(group) if f.name != "seed"}
    return {f.name: f for f in fields(group)}


def _change(group: object, values: dict[str, object]) -> object:
    """Returns a copy of a group with its settings in `values` replaced."""
    settings = {name: f for name, f in settings_of(group).items() if name in values}
    if not isinstance(group, CreditOptions):
        return replace(group, **{name: _read(f, values[name]) for name, f in settings.items()})
    before = {name: getattr(group, f.name) for name, f in settings_of(group).items()}
    try:
        return from_flat(before | {name: read_text(f, values[name]) for name, f in settings.items()})
    except (TypeError, ValueError) as error:
        name, _, rest = str(error).partition(" ")
        raise BadSetting(f"{flag_name(name)} {rest}") from error


def _limits(f: Field, item) -> Iterator[tuple[bool, str]]:
    """Yields, for each limit of a field, whether the value meets it, and what it demands."""
    limits = f.metadata
    if item is None:
        return
    if "choices" in limits:
        yield item in limits["choices"], f"be one of {', '.join(limits['choices'])}"
    if "above" in limits:
        yield limits["above"] < item < float("inf"), f"be above {limits['above']} and finite"
    if "least" in limits:
        yield limits["least"] <= item < float("inf"), f"be at least {limits['least']}"
    if "below" in limits:
        yield item < limits["below"], f"be below {limits['below']}"
    most = limits.get("most", MOST if type(item) is int else None)
    if most is not None:
        yield item <= most, f"be at most {most}"


def _read(f: Field, value):
    """Returns `value` as the type of its field: it comes from a flag's text, from TOML or JSON, or from Python."""
    several, of_type = get_origin(f.type) is tuple, get_args(f.type)  # (str, ...) or (float, None), else empty
    kind = of_type[0] if of_type else f.type
    if type(None) in of_type and value in (None, "none"):
        return None
    try:
        if not several:
            return _read_one(kind, value)
        items = value.replace(",", " ").split() if isinstance(value, str) else value
        return tuple(_read_one(kind, item) for item in items)
    except (TypeError, ValueError, KeyError):
        raise BadSetting(f"{flag_name(f.name)} must be {kind.__name__}{'s' * several}, got {value!r}") from None


def _read_one(kind: type, item):
    if isinstance(item, str) and kind is not str:
        item = {"true": True, "false": False}[item.lower()] if kind is bool else kind(item)
    elif kind is float and type(item) is int:
        item = float(item)
    if type(item) is not kind:
        raise TypeError
    return item
