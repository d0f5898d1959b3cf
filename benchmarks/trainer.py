"""How much time and memory does rhythm credit add to a training step at a long context?

    python -m benchmarks.trainer [--model NAME] [--tokens 8192] [--rounds 3] [--out benchmarks/results/trainer-cpu]

The step is one GRPO micro-step on one sequence by the trainer's own functions: old-log-prob pass, statistics, credit,
loss, backward pass, optimizer step, with gradient checkpointing. An eighth of the tokens is the prompt, the rest the
answer. WAAD is the windowed average attention distance, FAI the future attention influence. Compared are:

    none      --credit none
    coupled   --credit coupled: spans and head groups of this batch, as in the paper
    groups    --credit coupled --credit-group-by batch --credit-groups-every n, in a step between two calibrations
    paper     none, and a separate forward of the same model in eager attention. It keeps the maps of the five sampled
              layers, and WAAD, FAI and spans are computed from them. It takes minutes, so --paper-rounds counts its
              rounds

On a GPU the model computes in bfloat16 and keeps float32 parameters, as in the trainer. The largest model that fits is
qwen3-4b without `paper`, whose maps do not fit beside it.

Nothing is timed before a check at --check-tokens, where maps are cheap. The old log-probabilities of all variants must
have the same bits. WAAD and FAI of `coupled` and `groups` must be the dense ones of `paper` to `EXACT` of the largest
value (in bfloat16, where eager rounds scores, to `ROUNDED`).

The collector's own clock says what the statistics take, which may be less than two rounds differ by.

The files are written after each round. An interrupt (SIGINT) ends the run with exit code 130.

benchmarks/trainer_against_trl.py compares the whole trainer with TRL's.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.attention import EXACT, ROUNDED
from benchmarks.forward import MODELS, load
from benchmarks.measure import (
    Measured,
    environment,
    heading,
    interleave_long,
    make_parser,
    markdown_table,
    median_and_range,
    publish,
    ratios,
    says_when_interrupted,
)
from rhythm_kernels import GroupSchedule, Rhythm, shape_advantages, token_credit
from rhythm_kernels.heads import sampled_layers
from rhythm_kernels.signals import rhythm_of
from rhythm_kernels.statistics.layout import make_layout
from rhythm_kernels.types import AttentionStats
from train.batch import Rollouts, micro_batches, pack
from train.config import Config
from train.distributed import World, shard
from train.loading import activation_checkpointing
from train.policy import Policy
from train.reading import Reader, TokenStats
from train.rollout import Completion
from train.update import make_optimizer, update_policy

LEARNING_RATE = 0.0  # AdamW does its usual work, and each round finds the same weights


def make_policy(name: str, dtype: torch.dtype, device: torch.device) -> tuple[Policy, str]:
    """Returns the policy with gradient checkpointing, and says where its weights are from."""
    model, weights = load(name, torch.float32, device)
    model.set_attn_implementation("packed")
    activation_checkpointing(model)
    policy = Policy(model, 1.0).eval()
    if dtype != torch.float32:
        shard(policy, policy.decoder.layers, World(0, 1, device), dtype)
    return policy, weights


def make_config(tokens: int, **changes) -> Config:
    fixed = {"model": "-", "prompts_per_step": 2, "num_generations": 2, "gradient_steps": 1, "num_iterations": 2}
    sizes = {"max_completion_length": tokens, "micro_batch_tokens": tokens}
    return Config().change(**fixed, **sizes, **changes)


def make_batch(vocabulary: int, tokens: int, device: torch.device) -> Rollouts:
    ids = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    cut = tokens // 8
    answer = Completion(ids[cut:], [-10.0] * (tokens - cut), "stop")
    return pack([ids[:cut]], [answer], 1, device)


class MicroStep:
    """The variants on one policy and batch. Each returns the statistics of the tokens from before its update.

    `credit` holds options of credit by their flat names, for the variants that have credit.
    """

    def __init__(self, policy: Policy, tokens: int, device: torch.device, **credit):
        model = policy.model
        self.policy, self.world = policy, World(0, 1, device)
        self.batch = make_batch(model.config.vocab_size, tokens, device)
        self.plain, self.coupled = make_config(tokens, credit="none"), make_config(tokens, credit="coupled", **credit)
        self.kept = self.coupled.change(credit_group_by="batch", credit_groups_every=2)
        self.optimizer = make_optimizer(self.policy, self.plain)
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE
        self.layers = sampled_layers(model.config.num_hidden_layers, self.coupled.credit.layers)
        self.micros = micro_batches(self.batch, [0], tokens, self.world)
        self.read(self.kept, schedule := GroupSchedule(2))
        self.calibrated = schedule.state_dict()

    def read(self, config: Config, schedule: GroupSchedule) -> tuple[Reader, TokenStats]:
        reader = Reader(self.policy, self.batch, config, schedule)
        reader.read(self.micros)
        return reader, reader.finish()

    def update(self, reader: Reader, rhythm: Rhythm | None, config: Config) -> None:
        gamma = token_credit(
            config.credit.strategy,
            self.batch.response_mask[None],
            rhythm,
            cu_seqlens=self.batch.cu_seqlens,
            **config.credit.credit_arguments,
        )
        advantages = shape_advantages(torch.ones_like(gamma), gamma)[0]
        one = config.change(num_iterations=1)
        update_policy(self.policy, self.optimizer, self.batch, reader, advantages, one, self.world)

    def none(self) -> TokenStats:
        reader, old = self.read(self.plain, GroupSchedule())
        self.update(reader, None, self.plain)
        return old

    def with_spans(self) -> TokenStats:
        reader, old = self.read(self.coupled, GroupSchedule())
        self.update(reader, old.rhythm, self.coupled)
        return old

    def with_groups(self) -> TokenStats:
        schedule = GroupSchedule(2)
        schedule.load_state_dict(self.calibrated)
        reader, old = self.read(self.kept, schedule)
        self.update(reader, old.rhythm, self.kept)
        return old

    def paper(self) -> TokenStats:
        reader, old = self.read(self.plain, GroupSchedule())
        rhythm = self.eager_rhythm()
        self.update(reader, rhythm, self.coupled)
        return old._replace(rhythm=rhythm)

    @torch.no_grad()
    def eager_rhythm(self) -> Rhythm:
        """Computes the rhythm from the maps of the sampled layers, [1, HQ, T, T] each, kept until the forward ends."""
        model, maps = self.policy.model, {}
        hooks = [
            model.get_decoder()
            .layers[layer]
            .self_attn.register_forward_hook(lambda module, args, out, layer=layer: maps.__setitem__(layer, out[1]))
            for layer in self.layers
        ]
        model.set_attn_implementation("eager")
        try:
            self.policy(self.micros[0], head=False)
        finally:
            model.set_attn_implementation("packed")
            for hook in hooks:
                hook.remove()
        response_mask = self.batch.response_mask[None]
        stats = {layer: dense_stats(maps.pop(layer), response_mask, self.coupled) for layer in self.layers}
        layout = make_layout(1, response_mask.shape[1], response_mask.device, response_mask)
        return rhythm_of(stats, layout)


def dense_stats(maps: Tensor, response_mask: Tensor, config: Config) -> AttentionStats:
    """Computes WAAD, FAI and span of maps [1, HQ, T, T], one head at a time to hold little beside them.

    Args:
        response_mask: [1, T] bool
    """
    tokens, (lo, hi) = response_mask.shape[1], config.credit.horizon
    position = torch.arange(tokens, device=response_mask.device)
    distance = (position[:, None] - position).clamp(min=0).float()
    clipped = distance.clamp(max=config.credit.window)
    in_horizon = ((distance >= lo) & (distance <= hi) & response_mask[0][:, None]).float()
    count = in_horizon.sum(0).clamp(min=1)
    waad, fai, span = [], [], []
    for head in maps[0]:
        waad.append((head * clipped).sum(-1) * response_mask[0])
        fai.append((head * in_horizon).sum(0) / count)
        span.append((head * distance).sum(-1)[response_mask[0]].mean())
    return AttentionStats(torch.stack(waad)[None], torch.stack(fai)[None], torch.stack(span)[None], lse=None)


def check(step: MicroStep, allowed: float) -> float:
    """Returns the largest error of the rhythm, in units of its largest value.

    Raises: SystemExit if log-probabilities or signals are wrong.
    """
    plain, dense = step.none(), step.paper()
    worst = 0.0
    for name, token_stats in (("coupled", step.with_spans()), ("groups", step.with_groups())):
        if not torch.equal(plain.log_probs, token_stats.log_probs):
            raise SystemExit(f"collecting changed the log-probabilities of {name}: nothing is timed")
        for signal in ("waad", "fai"):
            got, want = getattr(token_stats.rhythm, signal), getattr(dense.rhythm, signal)
            error = ((got - want).abs().max() / want.abs().max()).item()
            if not error <= allowed:
                raise SystemExit(
                    f"{signal} of {name} is off by {error:.1e}, allowed are {allowed:.1e}: nothing is timed"
                )
            worst = max(worst, error)
    return worst


def timed(run: Callable[[], TokenStats], seconds: list[float]) -> Callable[[], None]:
    """Returns the variant, which then adds what the collector's own clock says of its statistics to `seconds`."""
    return lambda: seconds.append(run().seconds)


def table(measured: dict[str, Measured], seconds: dict[str, list[float]]) -> str:
    base, rows = measured["none"], []
    for name, m in measured.items():
        shares = ratios(m, base) if len(m.samples) == len(base.samples) else [m.seconds / base.seconds]
        memory = [f"{m.extra_bytes / 2**20:,.0f} MiB", f"{m.extra_bytes / base.extra_bytes:.3f}x"]
        share = f"{median(seconds[name]) / m.seconds:.2%}" if any(seconds.get(name, ())) else "-"
        rows.append([name, f"{m.seconds:.1f} s", median_and_range(shares), share, *memory])
    head = ["", "time", "of `none` (least, most)", "statistics, by their clock", "peak extra memory", "of `none`"]
    return markdown_table(head, rows)


def report(
    args: argparse.Namespace,
    where: dict[str, str],
    weights: str,
    dtype: torch.dtype,
    error: float,
    seconds: dict[str, list[float]],
    measured: dict[str, Measured],
) -> str:
    """Returns the report, after writing it where `--out` asks for it."""
    paper_rounds = len(measured["paper"].samples) if "paper" in measured else 0
    rounds = f"medians of {len(measured['none'].samples)} interleaved rounds, {paper_rounds} of the paper's way"
    what = f"{args.model}, {args.tokens:,} tokens ({weights}), {str(dtype).removeprefix('torch.')}"
    text = f"{heading(where)}\n\n{what}, gradient checkpointing; {rounds}; largest error of the rhythm "
    text += f"{error:.1e} of its largest value, at {args.check_tokens:,} tokens\n\n{table(measured, seconds)}\n"
    data = {**where, "model": args.model, "weights": weights, "tokens": args.tokens, "error": error}
    data["statistics_seconds"] = seconds
    return publish(args.out, text, data | {name: m._asdict() for name, m in measured.items()})


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", choices=MODELS, help="default: smollm2-135m, on a GPU qwen3-1.7b")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the sequence, prompt and answer")
    parser.add_argument("--check-tokens", type=int, default=1024, help="tokens in the check against eager maps")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    parser.add_argument("--paper-rounds", type=int, default=1, help="timed rounds of the paper's way; 0 leaves it out")
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json as well, after each round")
    args = parser.parse_args(arguments)
    args.model = args.model or ("qwen3-1.7b" if args.device == "cuda" else "smollm2-135m")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    device = torch.device(args.device)
    dtype, allowed = (torch.bfloat16, ROUNDED) if device.type == "cuda" else (torch.float32, EXACT)
    with says_when_interrupted(args.out):
        policy, weights = make_policy(args.model, dtype, device)
        # the dense formula takes all rows for its spans
        error = check(MicroStep(policy, args.check_tokens, device, credit_span_rows=None), allowed)
        step = MicroStep(policy, args.tokens, device)
        runs = {"none": step.none, "coupled": step.with_spans, "groups": step.with_groups, "paper": step.paper}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        variants = {name: timed(run, seconds[name]) for name, run in runs.items()}
        eager = {"paper": variants.pop("paper")}
        report_so_far = partial(report, args, environment(device), weights, dtype, error, seconds)
        label = f"{args.model}, {args.tokens:,} tokens"
        measured = interleave_long(variants, args.rounds, label, device, after_round=report_so_far)
        if args.paper_rounds:
            measured |= interleave_long(
                eager,
                args.paper_rounds,
                f"{label}, eager",
                device,
                after_round=lambda paper: report_so_far(measured | paper),
            )
        text = report_so_far(measured)
    print(text)


if __name__ == "__main__":
    main()
