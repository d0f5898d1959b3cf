"""Builds the parts of a run, restores them from the latest checkpoint, and saves them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rhythm_kernels import GroupSchedule, collect
from rhythm_kernels.analysis.vllm_process import check_installed
from rhythm_kernels.fit import knows_words, padding_token
from rhythm_kernels.weights import UNREADABLE, broken_weight
from train.checkpoint import list_checkpoints, restore, save_checkpoint
from train.config import BadSetting, Config, RunError, flag_name
from train.console import say
from train.data import ProblemStream, fingerprint
from train.distributed import World, sharing_ranks, whole_weights
from train.loading import check_packing, digest_of_policy, load_model, load_policy, short_answers
from train.metrics import MetricsLog
from train.policy import Policy
from train.problems import EvalSet, Prompts, check_fit, check_verifiers, load_task, stop_ids
from train.reading import read_batch
from train.rewards import Rewards
from train.rollout import Engine, TransformersEngine
from train.supervise import warm_start
from train.update import make_optimizer


@dataclass
class TrainingRun:
    config: Config
    folder: Path
    world: World
    policy: Policy
    reference: Policy | None
    """The first policy, if --beta weights the divergence from it; else None."""
    engine: Engine
    optimizer: torch.optim.Optimizer
    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts
    stream: ProblemStream
    evaluations: list[EvalSet]
    fingerprints: dict[str, str]
    """The number and a hash of the problems of each set, by the flag that names it."""
    reference_weights: str | None
    """A digest of the weights of the first policy, if --beta compares with it; else None."""
    schedule: GroupSchedule
    rewards: Rewards
    log: MetricsLog
    step: int
    """The step of the checkpoint from which the run continues, or 0."""
    is_new: bool
    num_tokens: int
    """Tokens of all answers so far and of their prompts, over all ranks."""

    @property
    def label(self) -> str:
        return f"[seed {self.config.run.seeds[0]}]"

    def say(self, line: str) -> None:
        if self.world.is_first:
            say(f"{self.label} {line}")

    def sync(self) -> None:
        """Gives the engine the policy's weights."""
        self.engine.sync(whole_weights(self.policy.model, getattr(torch, self.config.model.dtype)))

    def save(self, step: int) -> None:
        """Saves a checkpoint.

        Raises:
            RunError: a weight is NaN or infinite; the checkpoints before it stay.
        """
        broken = broken_weight(self.policy.model)
        if self.world.most(int(broken is not None)):
            raise RunError(
                f"the policy diverged by step {step}, with NaN or infinity in {broken or 'weights of another rank'}: "
                f"it is not saved; --learning-rate is {self.config.grpo.learning_rate:g}"
            )
        schedule = self.schedule.state_dict()
        spans = {} if schedule["spans"] is None else {"spans": schedule["spans"]}
        save_checkpoint(
            self.folder,
            step,
            self.policy.model,
            self.optimizer,
            self.tokenizer,
            shared={
                "stream": self.stream.state_dict(),
                "metrics_bytes": self.log.flush(),
                "num_tokens": self.num_tokens,
                "problems": self.fingerprints,
                "reference": self.reference_weights,
            },
            own={"age": torch.tensor(schedule["age"]), **spans},
            config=self.config.settings(),
            keep=self.config.run.save_total_limit,
        )


def check_ranks(config: Config, world: World) -> None:
    """Raises BadSetting for a number of ranks that cannot share an optimizer step evenly."""
    problems, answers = config.rollout.prompts_per_step // config.grpo.gradient_steps, config.rollout.num_generations
    fitting = sharing_ranks(config, problems * answers)
    if world.size not in fitting:
        shown = ", ".join(map(str, fitting))
        raise BadSetting(
            f"the ranks of torchrun must be {shown}, got {world.size}: they share the problems of an optimizer step, "
            f"{problems} (--prompts-per-step / --gradient-steps), or the {answers} answers to each"
        )


@contextmanager
def open_run(config: Config, folder: Path) -> Iterator[TrainingRun]:
    """Opens one seed's run in `folder`, new or continued; on leaving, closes its files and worker processes."""
    (seed,) = config.run.seeds
    torch.set_num_threads(max(1, config.run.threads))
    torch.manual_seed(seed)
    world = World.join(config.run.device)
    check_ranks(config, world)
    check_engine(config)
    task = load_task(config, world)
    check_verifiers([task.train, *(evaluation.problems for evaluation in task.evaluations)])
    given = config.model.model
    start = local_model(given, world) if given else str(warm_start(config, seed, task.train, world))
    with reading_model(start):
        tokenizer = load_tokenizer(start)
        prompts = Prompts(tokenizer, config, stop_ids(start, tokenizer))
        train, evaluations = prompts.fitting(task.train, "--train-data"), prompts.all_fitting(task.evaluations)
        check_fit(start, prompts, config)
        policy = load_policy(start, config, world)
        optimizer = make_optimizer(policy, config)  # of the shards: a forward leaves the outermost parameters gathered
        check_packing(policy, world)
    check_reading(policy, config, world)
    reference = load_policy(start, config, world, trains=False) if config.grpo.beta else None
    first, stream = None if reference is None else digest_of_policy(reference), ProblemStream(train, seed)
    fingerprints = {f"--train-data {config.data.train_data}": fingerprint(train)}
    fingerprints |= {f"--eval-data {held_out.name}": fingerprint(held_out.problems) for held_out in evaluations}
    schedule = GroupSchedule(**config.credit.schedule_arguments)
    step, metrics_bytes, num_tokens = 0, 0, 0
    checkpoints = list_checkpoints(folder)
    if checkpoints:
        fixed = {name: value for name, value in config.settings().items() if name not in config.may_change()}
        saved = restore(checkpoints[-1], policy.model, optimizer, config=fixed)
        check_same_problems(saved.shared.get("problems", fingerprints), fingerprints)  # older checkpoints have none
        if saved.shared.get("reference", first) != first:
            way = "" if given else "; bring the folder of --cache with the run"
            raise BadSetting(
                f"--beta compares with the policy that the run began with, but {start!r} holds other weights{way}"
            )
        stream.load_state_dict(saved.shared["stream"])
        if saved.own is not None:
            schedule.load_state_dict({"age": int(saved.own["age"]), "spans": saved.own.get("spans")})
        step, metrics_bytes = saved.step, saved.shared["metrics_bytes"]
        num_tokens = saved.shared.get("num_tokens", 0)  # older checkpoints do not have it

    with ExitStack() as opened:
        rewards = opened.enter_context(Rewards(config.data.reward_workers, config.data.reward_timeout))
        engine = load_engine(start, policy, prompts, config, world)
        opened.callback(engine.close)
        log = MetricsLog(folder, step, metrics_bytes, world)
        opened.callback(log.close)
        run = TrainingRun(
            config=config,
            folder=folder,
            world=world,
            policy=policy,
            reference=reference,
            engine=engine,
            optimizer=optimizer,
            tokenizer=tokenizer,
            prompts=prompts,
            stream=stream,
            evaluations=evaluations,
            fingerprints=fingerprints,
            reference_weights=first,
            schedule=schedule,
            rewards=rewards,
            log=log,
            step=step,
            is_new=not checkpoints,
            num_tokens=num_tokens,
        )
        if log.missing:
            run.say(log.missing)
        run.sync()
        yield run


def check_reading(policy: Policy, config: Config, world: World) -> None:
    """Raises BadSetting if the policy's attention cannot be read as the options of credit say. All ranks call it.

    The page of sample answers shows it whatever the credit is.
    """
    if not config.credit.reads_attention and not config.run.sample_answers:
        return
    way = "" if config.credit.reads_attention else "; --sample-answers 0 leaves out the page that shows the attention"
    try:
        collect(policy.decoder, layers=config.credit.collect_arguments["layers"])
    except (TypeError, ValueError) as error:
        raise BadSetting(f"--credit-layers: {error}{way}") from error
    batch, micro = short_answers(policy, world)
    try:
        read_batch(policy, batch, [micro], config, GroupSchedule(**config.credit.schedule_arguments), everything=True)
    except (TypeError, ValueError) as error:
        name = type(policy.model).__name__
        raise BadSetting(
            f"--model must have attention that can be read with these flags of credit, got {name}: {error}{way}"
        ) from error


def check_same_problems(before: dict[str, str], now: dict[str, str]) -> None:
    """Raises BadSetting if a set holds other problems than at the run's start, or in another order."""
    for flag, problems in now.items():
        if (then := before.get(flag)) != problems:
            raise BadSetting(f"{flag} must hold the problems with which the run began, {then}, got {problems}")


def local_model(name: str, world: World) -> str:
    """Returns the folder of a model: the name itself, or that of the hub's files, downloaded if they are missing."""
    if Path(name).is_dir():
        return name
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def download() -> str:
        try:
            return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"])
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise BadSetting(
                f"--model must be a folder or a model on the Hugging Face hub, got {name!r}: {error}"
            ) from error

    world.from_first(download)  # one rank downloads; the others on its machine find the files
    return download()


@contextmanager
def reading_model(name: str) -> Iterator[None]:
    """Turns the errors of reading a model's files in this block into BadSetting for --model."""
    try:
        yield
    except BadSetting:
        raise
    except UNREADABLE as error:
        raise BadSetting(f"--model must be a language model that transformers loads, got {name!r}: {error}") from error


@contextmanager
def enough_memory(config: Config, *flags: str) -> Iterator[None]:
    """Turns running out of memory in this block into RunError, which names these flags and that of the engine."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        of_engine = "vllm_gpu_memory_utilization" if config.rollout.engine == "vllm" else "rollout_batch_size"
        given = " and ".join(f"{flag_name(name)} {config.flat()[name]}" for name in (*flags, of_engine))
        raise RunError(f"out of memory with {given}, of which less takes less memory: {error}") from error


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not knows_words(tokenizer):
        raise BadSetting(f"--model must come with its tokenizer, got {folder!r}, which holds none")
    return tokenizer


def check_engine(config: Config) -> None:
    """Raises ModuleNotFoundError if the package of --engine is not installed."""
    if config.rollout.engine == "vllm":
        check_installed()


def load_engine(start: str, policy: Policy | None, prompts: Prompts, config: Config, world: World) -> Engine:
    """Returns the engine that --engine names; transformers' samples from the policy, or a copy if it is sharded."""
    rollout = config.rollout
    if rollout.engine == "vllm":
        from train.vllm_engine import VLLMEngine  # imports vllm

        return VLLMEngine(
            start,
            stop_ids=prompts.stops,
            max_model_len=prompts.longest + rollout.max_completion_length,  # `check_fit` has checked it
            dtype=config.model.dtype,
            gpu_memory_utilization=rollout.vllm_gpu_memory_utilization,
            sleep_mode=True,
        )
    is_copy = policy is None or world.size > 1 or config.model.dtype != "float32"
    model = policy.model if policy is not None else None
    if is_copy:
        with reading_model(start):
            model = load_model(start, dtype=getattr(torch, config.model.dtype)).to(world.device)
    pad = padding_token(prompts.tokenizer, model.config)
    return TransformersEngine(
        model, stops=prompts.stops, pad=pad, batch_size=rollout.rollout_batch_size, is_copy=is_copy
    )
