"""What does rhythm credit add to a step of TRL's GRPOTrainer?

    python -m benchmarks.trl_overhead [--tokens 1024] [--rounds 5] [--out benchmarks/results/trl-overhead-cpu]

SmolLM2-135M, fp32, gradient checkpointing as TRL has it by default; 2 sequences of --tokens tokens, a fifth of each the
prompt, one in a micro-batch. There are two ways to train on them. Each is run without credit (TRL's own trainer), with
coupled credit, and with coupled credit whose head groups are known from an earlier batch:

    loss      one optimizer step: TRL runs no old-log-prob pass, the statistics are read in the loss's own forward
    old pass  two optimizer steps: TRL runs an old-log-prob pass, and the statistics are read there

A run is one generation batch, from what was sampled to the last optimizer step; all runs share one model, one optimizer
with a learning rate of 0, and the same answers, made before. What sampling them takes is the same with and without
credit, so it is measured by itself, once a round, with transformers' generate: the whole step is the sum of the two.

Before anything is timed, at --check-tokens, the advantages that reach the loss must be those of eager attention maps in
fp64, in both ways, all but one token in `TIED`: there the two may order equal values differently.
"""

import argparse
import gc
import statistics
import tempfile
import time
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.measure import Measured, environment, extra_bytes, progress, ratios, write
from rhythm_kernels import reference

SEQUENCES, MICRO = 2, 1
TIED = 200
CREDITS = ("plain", "coupled", "groups")
WAYS = {  # of optimizer steps, and of micro-batches in each
    "loss": {"gradient_accumulation_steps": 2, "max_steps": 1},
    "old pass": {"gradient_accumulation_steps": 1, "max_steps": 2},
}
VARIANTS = [(way, credit) for way in WAYS for credit in CREDITS]


class Bench:
    """One model and its optimizer; each run makes a trainer for them, as a script does."""

    def __init__(self, folder: str):
        from rhythm_kernels.analysis import sources

        self.model, self.tokenizer = sources.load(device="cpu")
        self.weights = sources.smollm2_file().stem
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)
        self.folder = folder
        self.spans: Tensor | None = None  # of the first batch with credit

    def rollout(self, tokens: int) -> dict[str, list]:
        """Sequences of random tokens: what they are does not matter for time."""
        draw, low = torch.Generator().manual_seed(0), 100  # special tokens are the first ones
        ids = torch.randint(low, self.model.config.vocab_size, (SEQUENCES, tokens), generator=draw)
        cut = tokens // 5
        made = {"prompt_ids": ids[:1, :cut].expand(SEQUENCES, -1).tolist(), "completion_ids": ids[:, cut:].tolist()}
        return made | {"logprobs": [[-1.0] * (tokens - cut)] * SEQUENCES}

    def trainer(self, way: str, credit: str, tokens: int, sample: bool = False):
        import datasets
        from trl import GRPOConfig, GRPOTrainer

        from rhythm_kernels.integrations.trl import RhythmGRPOConfig, RhythmMixin

        class Recorded(GRPOTrainer):
            """What TRL made of the rewards, and what its loss was given."""

            def _generate_and_score_completions(self, inputs):
                self.batch = super()._generate_and_score_completions(inputs)
                return self.batch

            def _compute_loss(self, model, inputs):
                loss = super()._compute_loss(model, inputs)
                self.__dict__.setdefault("given", []).append({name: inputs[name] for name in inputs})
                return loss

        made = self.rollout(tokens)
        options = {} if credit == "plain" else {"credit_groups_every": 2 if credit == "groups" else 1}
        self.model.__dict__.pop("forward", None)  # that the last trainer put over the model's own
        config = (GRPOConfig if credit == "plain" else RhythmGRPOConfig)(
            output_dir=self.folder,
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=MICRO,
            steps_per_generation=SEQUENCES // MICRO,
            num_generations=SEQUENCES,
            max_completion_length=len(made["completion_ids"][0]),
            generation_kwargs={"min_new_tokens": len(made["completion_ids"][0])},
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **WAYS[way],
            **options,
        )
        kind = Recorded if credit == "plain" else type("Credited", (RhythmMixin, Recorded), {})
        trainer = kind(
            self.model,
            reward_funcs=lambda completion_ids, **_: [float(row % 2) for row in range(len(completion_ids))],
            args=config,
            train_dataset=datasets.Dataset.from_dict({"prompt": [self.tokenizer.decode(made["prompt_ids"][0])] * 8}),
            processing_class=self.tokenizer,
            optimizers=(self.optimizer, torch.optim.lr_scheduler.ConstantLR(self.optimizer)),
            rollout_func=None if sample else lambda prompts, trainer: made,
        )
        if credit == "groups":
            trainer._schedule.load_state_dict({"age": 1, "spans": self.spans})
        return trainer

    def run(self, way: str, credit: str, tokens: int):
        """(seconds of the optimizer steps of one generation batch, the trainer)."""
        from transformers import PrinterCallback, TrainerCallback

        moments = []

        class Clock(TrainerCallback):
            def on_step_begin(self, *_, **__):
                moments.append(-time.perf_counter())

            def on_step_end(self, *_, **__):
                moments.append(time.perf_counter())

        trainer = self.trainer(way, credit, tokens)
        trainer.add_callback(Clock())
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        if credit == "coupled":
            self.spans = trainer._schedule.state_dict()["spans"]
        return sum(moments), trainer

    def sample(self, tokens: int) -> float:
        """Seconds of sampling the answers."""
        trainer = self.trainer("loss", "plain", tokens, sample=True)
        prompts = [trainer.train_dataset[0]["prompt"]] * SEQUENCES
        begin = time.perf_counter()
        trainer._generate(prompts)
        return time.perf_counter() - begin


@torch.no_grad()
def dense_gamma(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """gamma [B, C] of the coupled strategy, from whole eager maps in fp64."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    cut = batch["prompt_ids"].shape[1]
    rows = torch.arange(ids.shape[1]).expand_as(ids) >= cut
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    maps = model(ids, output_attentions=True).attentions
    model.set_attn_implementation(implementation)
    gammas = []
    for b in range(len(ids)):
        row, segment = rows[b : b + 1], torch.zeros_like(ids[b : b + 1])
        of_layers = [maps[layer][b : b + 1].double() for layer in reference.sampled_layers(len(maps))]
        groups = reference.group_heads(torch.cat([reference.span(one, row, segment, 1) for one in of_layers]))
        waad = torch.cat([reference.waad(one, row) for one in of_layers])[groups.local_heads].mean(0)
        fai = torch.cat([reference.fai(one, row, segment) for one in of_layers])[groups.global_heads].mean(0)
        gammas.append(reference.gamma("coupled", row, waad[None], fai[None])[:, cut:])
    return torch.cat(gammas)


def check(bench: Bench, tokens: int) -> int:
    """How many tokens the two order differently; SystemExit if anything is wrong."""
    most = 0
    for way in WAYS:
        _, trainer = bench.run(way, "coupled", tokens)
        batch = trainer.batch
        wanted = reference.shape_advantages(batch["advantages"], dense_gamma(bench.model, batch))
        of_row = {tuple(row.tolist()): advantages for row, advantages in zip(batch["completion_ids"], wanted)}
        rows = [pair for given in trainer.given for pair in zip(given["completion_ids"], given["advantages"])]
        off = sum(((of_row[tuple(ids.tolist())] - got).abs() > 1e-5).sum().item() for ids, got in rows)
        if len(rows) != SEQUENCES or off * TIED > wanted.numel():
            raise SystemExit(f"{way}: {off} of {wanted.numel()} advantages are not the dense ones: nothing is timed")
        most = max(most, off)
    return most


def measure(bench: Bench, tokens: int, rounds: int) -> tuple[dict[str, Measured], list[float]]:
    """Of each variant the training part, and what sampling took in each round; one round before them warms up."""
    seconds: dict[str, list[float]] = {f"{way}, {credit}": [] for way, credit in VARIANTS}
    extra: dict[str, list[int]] = {name: [] for name in seconds}
    sampling = []
    for i in progress(range(-1, rounds), "TRL"):
        sampled = bench.sample(tokens) if i >= 0 else 0.0
        for way, credit in VARIANTS:
            gc.collect()
            taken = []
            held = extra_bytes(lambda: taken.append(bench.run(way, credit, tokens)[0]), torch.device("cpu"))  # noqa: B023
            if i >= 0:
                seconds[f"{way}, {credit}"] += taken
                extra[f"{way}, {credit}"].append(held)
        sampling += [sampled] if i >= 0 else []
    found = {
        name: Measured(statistics.median(taken), tuple(taken), int(statistics.median(extra[name])))
        for name, taken in seconds.items()
    }
    return found, sampling


def whole(part: Measured, sampling: list[float]) -> Measured:
    samples = tuple(taken + sampled for taken, sampled in zip(part.samples, sampling, strict=True))
    return part._replace(seconds=statistics.median(samples), samples=samples)


def table(found: dict[str, Measured], sampling: list[float]) -> str:
    lines = ["| | training part | of plain (least, most) | whole step | of plain (least, most) | peak extra memory |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, part in found.items():
        base = found[name.split(", ")[0] + ", plain"]
        cells = []
        for mine, other in ((part, base), (whole(part, sampling), whole(base, sampling))):
            each = ratios(mine, other)
            cells += [
                f"{mine.seconds:.2f} s",
                f"{statistics.median(each):.3f}x ({min(each):.3f}, {max(each):.3f})",
            ]
        lines.append(f"| {name} | {' | '.join(cells)} | {part.extra_bytes / 2**20:,.0f} MiB |")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="of each sequence, prompt and answer")
    parser.add_argument("--check-tokens", type=int, default=256, help="of the check against eager maps")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json as well")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(folder)
        off = check(bench, args.check_tokens)
        found, sampling = measure(bench, args.tokens, args.rounds)
    where = environment() | {"trl": metadata.version("trl")}
    text = ", ".join(f"{name} {value}" for name, value in where.items())
    text += (
        f"\n\nSmolLM2-135M ({bench.weights}), fp32, gradient checkpointing; {SEQUENCES} sequences of {args.tokens:,} "
    )
    text += f"tokens, micro-batches of {MICRO}; medians of {args.rounds} interleaved rounds; sampling took "
    text += (
        f"{statistics.median(sampling):.1f} s; {off} of {SEQUENCES * args.check_tokens:,} tokens credited otherwise "
    )
    text += f"than by eager maps\n\n{table(found, sampling)}\n"
    if args.out is not None:
        data = {"tokens": args.tokens, "weights": bench.weights, "sampling": sampling, "off": off}
        write(args.out, text, where | data | {name: part._asdict() for name, part in found.items()})
    print(text)


if __name__ == "__main__":
    main()
