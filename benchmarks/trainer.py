"""What does rhythm credit add to a training step at a long context?

    python -m benchmarks.trainer [--model NAME] [--tokens 8192] [--rounds 3] [--out benchmarks/results/trainer-cpu]

One GRPO micro-step on one sequence by the trainer's own functions: old-log-prob pass, statistics, credit, loss,
backward pass, optimizer step, with gradient checkpointing. An eighth of the tokens is the prompt, the rest the answer.
Variants:

    none      --credit none
    coupled   --credit coupled: spans and head groups of this batch, as in the paper
    groups    --credit coupled --groups-every n, in a step between two calibrations
    paper     none, and a separate forward of the same model in eager attention, whose maps of the five sampled layers
              are kept, with WAAD, FAI and spans taken from them; in --paper-rounds, since it takes minutes

On a GPU the model computes in bfloat16 and keeps float32 parameters, as the trainer has it; the largest that fits is
qwen3-4b, without `paper`, whose maps do not fit beside it.

Before anything is timed, at --check-tokens, where maps are cheap: the old log-probabilities of all variants must have
the same bits, and WAAD and FAI of `coupled` and `groups` be the dense ones of `paper` to `EXACT` of the largest value
(in bfloat16, where eager rounds scores, to `ROUNDED`).

The files are written after each round; an interrupt (SIGINT) ends the run with exit code 130.

How the trainer as a whole compares with TRL's is asked by benchmarks/trainer_against_trl.py.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.attention import EXACT, ROUNDED
from benchmarks.forward import MODELS, load
from benchmarks.measure import Measured, environment, interleave_long, ratios, says_when_interrupted, write
from rhythm_kernels import GroupSchedule, Rhythm, shape_advantages, token_credit
from rhythm_kernels.heads import sampled_layers
from rhythm_kernels.signals import rhythm_of
from rhythm_kernels.statistics.layout import make_layout
from rhythm_kernels.types import AttentionStats
from train.batch import Rollouts, micro_batches, pack
from train.config import Config
from train.distributed import World, shard
from train.policy import Policy, TokenStats, activation_checkpointing, read_batch
from train.rollout import Completion
from train.update import make_optimizer, update_policy

LEARNING_RATE = 0.0  # AdamW works as always, and each round finds the same weights


def make_policy(name: str, dtype: torch.dtype, device: torch.device) -> tuple[Policy, str]:
    """(policy, where its weights are from), with gradient checkpointing."""
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
    """The variants on one policy and batch; each returns what it found before its update."""

    def __init__(self, policy: Policy, tokens: int, device: torch.device):
        model = policy.model
        self.policy, self.world = policy, World(0, 1, device)
        self.batch = make_batch(model.config.vocab_size, tokens, device)
        self.plain, self.coupled = make_config(tokens, credit="none"), make_config(tokens, credit="coupled")
        self.kept = make_config(tokens, credit="coupled", credit_group_by="batch", credit_groups_every=2)
        self.optimizer = make_optimizer(self.policy, self.plain)
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE
        self.layers = sampled_layers(model.config.num_hidden_layers, self.coupled.credit.layers)
        self.micros = micro_batches(self.batch, [0], tokens, self.world)
        read_batch(self.policy, self.batch, self.micros, self.kept, schedule := GroupSchedule(2))
        self.calibrated = schedule.state_dict()

    def update(self, old: TokenStats, rhythm: Rhythm | None, config: Config) -> None:
        gamma = token_credit(
            config.credit.strategy,
            self.batch.response_mask[None],
            rhythm,
            cu_seqlens=self.batch.cu_seqlens,
            **config.credit.credit_arguments,
        )
        advantages = shape_advantages(torch.ones_like(gamma), gamma)[0]
        one = config.change(num_iterations=1)
        update_policy(self.policy, self.optimizer, self.batch, old, advantages, one, self.world)

    def none(self) -> TokenStats:
        old = read_batch(self.policy, self.batch, self.micros, self.plain, GroupSchedule())
        self.update(old, None, self.plain)
        return old

    def with_spans(self) -> TokenStats:
        old = read_batch(self.policy, self.batch, self.micros, self.coupled, GroupSchedule())
        self.update(old, old.rhythm, self.coupled)
        return old

    def with_groups(self) -> TokenStats:
        schedule = GroupSchedule(2)
        schedule.load_state_dict(self.calibrated)
        old = read_batch(self.policy, self.batch, self.micros, self.kept, schedule)
        self.update(old, old.rhythm, self.kept)
        return old

    def paper(self) -> TokenStats:
        old = read_batch(self.policy, self.batch, self.micros, self.plain, GroupSchedule())
        rhythm = self.eager_rhythm()
        self.update(old, rhythm, self.coupled)
        return old._replace(rhythm=rhythm)

    @torch.no_grad()
    def eager_rhythm(self) -> Rhythm:
        """From the maps of the sampled layers, [1, HQ, T, T] each, kept until the forward is over."""
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
        rows = self.batch.response_mask[None]
        stats = {layer: dense_stats(maps.pop(layer), rows, self.coupled) for layer in self.layers}
        layout = make_layout(1, rows.shape[1], rows.device, rows)
        return rhythm_of(stats, layout)


def dense_stats(attention: Tensor, rows: Tensor, config: Config) -> AttentionStats:
    """WAAD, FAI and span of whole maps [1, HQ, T, T], a head at a time so that little is held beside them."""
    tokens, (lo, hi) = rows.shape[1], config.credit.horizon
    position = torch.arange(tokens, device=rows.device)
    distance = (position[:, None] - position).clamp(min=0).float()
    near = distance.clamp(max=config.credit.window)
    looks = ((distance >= lo) & (distance <= hi) & rows[0][:, None]).float()
    count = looks.sum(0).clamp(min=1)
    waad, fai, span = [], [], []
    for head in attention[0]:
        waad.append((head * near).sum(-1) * rows[0])
        fai.append((head * looks).sum(0) / count)
        span.append((head * distance).sum(-1)[rows[0]].mean())
    return AttentionStats(torch.stack(waad)[None], torch.stack(fai)[None], torch.stack(span)[None], lse=None)


def check(step: MicroStep, allowed: float) -> float:
    """The largest error of the rhythm in units of its largest value; SystemExit if anything is wrong."""
    plain, dense = step.none(), step.paper()
    worst = 0.0
    for name, found in (("coupled", step.with_spans()), ("groups", step.with_groups())):
        if not torch.equal(plain.log_probs, found.log_probs):
            raise SystemExit(f"collecting changed the log-probabilities of {name}: nothing is timed")
        for signal in ("waad", "fai"):
            got, want = getattr(found.rhythm, signal), getattr(dense.rhythm, signal)
            error = ((got - want).abs().max() / want.abs().max()).item()
            if not error <= allowed:
                raise SystemExit(
                    f"{signal} of {name} is off by {error:.1e}, allowed are {allowed:.1e}: nothing is timed"
                )
            worst = max(worst, error)
    return worst


def table(measured: dict[str, Measured]) -> str:
    lines = ["| | time | of `none` (least, most) | peak extra memory | of `none` |", "|---|---|---|---|---|"]
    base = measured["none"]
    for name, m in measured.items():
        each = ratios(m, base) if len(m.samples) == len(base.samples) else [m.seconds / base.seconds]
        share = f"{statistics.median(each):.3f}x ({min(each):.3f}, {max(each):.3f})"
        memory = f"{m.extra_bytes / 2**20:,.0f} MiB | {m.extra_bytes / base.extra_bytes:.3f}x"
        lines.append(f"| {name} | {m.seconds:.1f} s | {share} | {memory} |")
    return "\n".join(lines)


def report(
    args: argparse.Namespace,
    where: dict[str, str],
    weights: str,
    dtype: torch.dtype,
    error: float,
    measured: dict[str, Measured],
) -> str:
    """Writes what `--out` asks for, and returns the text."""
    head = ", ".join(f"{name} {value}" for name, value in where.items())
    of_paper = len(measured["paper"].samples) if "paper" in measured else 0
    rounds = f"medians of {len(measured['none'].samples)} interleaved rounds, {of_paper} of the paper's way"
    what = f"{args.model}, {args.tokens:,} tokens ({weights}), {str(dtype).removeprefix('torch.')}"
    text = f"{head}\n\n{what}, gradient checkpointing; {rounds}; largest error of the rhythm "
    text += f"{error:.1e} of its largest value, at {args.check_tokens:,} tokens\n\n{table(measured)}\n"
    if args.out is not None:
        said = {"model": args.model, "weights": weights, "tokens": args.tokens, "error": error}
        write(args.out, text, {**where, **said, **{name: m._asdict() for name, m in measured.items()}})
    return text


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", choices=MODELS, help="default: smollm2-135m, on a GPU qwen3-1.7b")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--check-tokens", type=int, default=1024, help="of the check against eager maps")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    parser.add_argument("--paper-rounds", type=int, default=1, help="timed rounds of the paper's way; 0: not measured")
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
        error = check(MicroStep(policy, args.check_tokens, device), allowed)
        step = MicroStep(policy, args.tokens, device)
        tell = partial(report, args, environment(device), weights, dtype, error)
        what = f"{args.model}, {args.tokens:,} tokens"
        variants: dict[str, Callable] = {"none": step.none, "coupled": step.with_spans, "groups": step.with_groups}
        measured = interleave_long(variants, args.rounds, what, device, after_round=tell)
        if args.paper_rounds:
            measured |= interleave_long(
                {"paper": step.paper},
                args.paper_rounds,
                f"{what}, eager",
                device,
                after_round=lambda of_paper: tell(measured | of_paper),
            )
        text = tell(measured)
    print(text)


if __name__ == "__main__":
    main()
