"""How much time and memory does rhythm credit add to a step of TRL's GRPOTrainer?

    python -m benchmarks.trl_overhead [--tokens 1024] [--rounds 5] [--out benchmarks/results/trl-overhead-cpu]

The model is SmolLM2-135M in fp32 with gradient checkpointing, TRL's default. The batch has 2 sequences of --tokens
tokens, one in a micro-batch; a fifth of each is the prompt. Compared are three credits: `plain` (TRL's own trainer),
`coupled`, and `groups` (coupled credit with head groups known from an earlier batch), in two ways of training:

    loss      one optimizer step: TRL runs no old-log-prob pass, the statistics are read in the loss's own forward
    old pass  two optimizer steps: TRL runs an old-log-prob pass, and the statistics are read there

A run is one generation batch, from the sampled answers to the last optimizer step. All runs share one model, one
optimizer with a learning rate of 0, and the same answers. Sampling them takes the same time with and without credit, so
it is timed by itself, once a round, with transformers' generate. The whole step is the sum of the two.

Nothing is timed before a check at --check-tokens: in both ways the advantages that reach the loss must be those of
eager attention maps in fp64, except for one token in `TIED`, where the two may order equal values differently.
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

from benchmarks.measure import (
    Measured,
    environment,
    extra_bytes,
    heading,
    make_parser,
    markdown_table,
    median_and_range,
    progress,
    publish,
    ratios,
)
from rhythm_kernels import reference

SEQUENCES, MICRO = 2, 1
TIED = 200
CREDITS = ("plain", "coupled", "groups")
WAYS = {  # micro-batches of an optimizer step, and optimizer steps
    "loss": {"gradient_accumulation_steps": 2, "max_steps": 1},
    "old pass": {"gradient_accumulation_steps": 1, "max_steps": 2},
}
VARIANTS = [(way, credit) for way in WAYS for credit in CREDITS]


class Bench:
    """One model and its optimizer. Each run makes a trainer for them, as a script does."""

    def __init__(self, folder: str):
        from rhythm_kernels.analysis import sources

        self.model, self.tokenizer = sources.load(device="cpu")
        self.weights = sources.smollm2_file().stem
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)
        self.folder = folder
        self.spans: Tensor | None = None  # the spans of the last batch with coupled credit

    def rollout(self, tokens: int) -> dict[str, list]:
        """Returns sequences of random tokens, whose values do not matter for time."""
        generator, first_plain_id = torch.Generator().manual_seed(0), 100  # special tokens have the first ids
        ids = torch.randint(first_plain_id, self.model.config.vocab_size, (SEQUENCES, tokens), generator=generator)
        cut = tokens // 5
        return {
            "prompt_ids": ids[:1, :cut].expand(SEQUENCES, -1).tolist(),
            "completion_ids": ids[:, cut:].tolist(),
            "logprobs": [[-1.0] * (tokens - cut)] * SEQUENCES,
        }

    def trainer(self, way: str, credit: str, tokens: int, sample: bool = False):
        import datasets
        from trl import GRPOConfig, GRPOTrainer

        from rhythm_kernels.integrations.trl import RhythmGRPOConfig, RhythmMixin

        class Recorded(GRPOTrainer):
            """Keeps the batch that TRL scored, and the inputs of its loss in `loss_inputs`."""

            def _generate_and_score_completions(self, inputs):
                self.batch = super()._generate_and_score_completions(inputs)
                return self.batch

            def _compute_loss(self, model, inputs):
                loss = super()._compute_loss(model, inputs)
                self.__dict__.setdefault("loss_inputs", []).append({name: inputs[name] for name in inputs})
                return loss

        rollout = self.rollout(tokens)
        options = {} if credit == "plain" else {"credit_groups_every": 2 if credit == "groups" else 1}
        self.model.__dict__.pop("forward", None)  # the last trainer put its own over the model's
        config = (GRPOConfig if credit == "plain" else RhythmGRPOConfig)(
            output_dir=self.folder,
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=MICRO,
            steps_per_generation=SEQUENCES // MICRO,
            num_generations=SEQUENCES,
            max_completion_length=len(rollout["completion_ids"][0]),
            generation_kwargs={"min_new_tokens": len(rollout["completion_ids"][0])},
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
            train_dataset=datasets.Dataset.from_dict({"prompt": [self.tokenizer.decode(rollout["prompt_ids"][0])] * 8}),
            processing_class=self.tokenizer,
            optimizers=(self.optimizer, torch.optim.lr_scheduler.ConstantLR(self.optimizer)),
            rollout_func=None if sample else lambda prompts, trainer: rollout,
        )
        if credit == "groups":
            trainer._schedule.load_state_dict({"age": 1, "spans": self.spans})
        return trainer

    def run(self, way: str, credit: str, tokens: int):
        """Returns the seconds of one generation batch's optimizer steps, and the trainer."""
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
        """Returns the seconds that sampling the answers takes."""
        trainer = self.trainer("loss", "plain", tokens, sample=True)
        prompts = [trainer.train_dataset[0]["prompt"]] * SEQUENCES
        begin = time.perf_counter()
        trainer._generate(prompts)
        return time.perf_counter() - begin


@torch.no_grad()
def dense_gamma(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Computes gamma [B, C] of the coupled strategy from whole eager maps in fp64. C counts completion tokens."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    cut = batch["prompt_ids"].shape[1]
    response_mask = torch.arange(ids.shape[1]).expand_as(ids) >= cut
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    maps = model(ids, output_attentions=True).attentions
    model.set_attn_implementation(implementation)
    gammas = []
    for b in range(len(ids)):
        mask, segments = response_mask[b : b + 1], torch.zeros_like(ids[b : b + 1])
        layer_maps = [maps[layer][b : b + 1].double() for layer in reference.sampled_layers(len(maps))]
        groups = reference.group_heads(torch.cat([reference.span(x, mask, segments, 1) for x in layer_maps]))
        waad = torch.cat([reference.waad(x, mask) for x in layer_maps])[groups.local_heads].mean(0)
        fai = torch.cat([reference.fai(x, mask, segments) for x in layer_maps])[groups.global_heads].mean(0)
        gammas.append(reference.gamma("coupled", mask, waad[None], fai[None])[:, cut:])
    return torch.cat(gammas)


def check(bench: Bench, tokens: int) -> int:
    """Returns the number of tokens whose advantages differ from the dense ones.

    Raises: SystemExit if there are too many.
    """
    most = 0
    for way in WAYS:
        _, trainer = bench.run(way, "coupled", tokens)
        batch = trainer.batch
        wanted = reference.shape_advantages(batch["advantages"], dense_gamma(bench.model, batch))
        wanted_by_ids = {tuple(ids.tolist()): advantages for ids, advantages in zip(batch["completion_ids"], wanted)}
        rows = [pair for x in trainer.loss_inputs for pair in zip(x["completion_ids"], x["advantages"])]
        off = sum(((wanted_by_ids[tuple(ids.tolist())] - got).abs() > 1e-5).sum().item() for ids, got in rows)
        if len(rows) != SEQUENCES or off * TIED > wanted.numel():
            raise SystemExit(f"{way}: {off} of {wanted.numel()} advantages are not the dense ones: nothing is timed")
        most = max(most, off)
    return most


def measure(bench: Bench, tokens: int, rounds: int) -> tuple[dict[str, Measured], list[float]]:
    """Returns the training part of each variant, and the seconds of sampling in each round. One round warms up."""
    seconds: dict[str, list[float]] = {f"{way}, {credit}": [] for way, credit in VARIANTS}
    extra: dict[str, list[int]] = {name: [] for name in seconds}
    sampling = []
    for i in progress(range(-1, rounds), "TRL"):
        if i >= 0:
            sampling.append(bench.sample(tokens))
        for way, credit in VARIANTS:
            gc.collect()
            run_seconds: list[float] = []

            def run(way=way, credit=credit, run_seconds=run_seconds) -> None:
                run_seconds.append(bench.run(way, credit, tokens)[0])

            run_bytes = extra_bytes(run, torch.device("cpu"))
            if i >= 0:
                seconds[f"{way}, {credit}"] += run_seconds
                extra[f"{way}, {credit}"].append(run_bytes)
    measured = {
        name: Measured(statistics.median(samples), tuple(samples), int(statistics.median(extra[name])))
        for name, samples in seconds.items()
    }
    return measured, sampling


def whole_step(training: Measured, sampling: list[float]) -> Measured:
    samples = tuple(trained + sampled for trained, sampled in zip(training.samples, sampling, strict=True))
    return training._replace(seconds=statistics.median(samples), samples=samples)


def table(measured: dict[str, Measured], sampling: list[float]) -> str:
    share = "of plain (least, most)"
    rows = []
    for name, training in measured.items():
        plain = measured[name.split(", ")[0] + ", plain"]
        cells = []
        for mine, other in ((training, plain), (whole_step(training, sampling), whole_step(plain, sampling))):
            cells += [f"{mine.seconds:.2f} s", median_and_range(ratios(mine, other))]
        rows.append([name, *cells, f"{training.extra_bytes / 2**20:,.0f} MiB"])
    return markdown_table(["", "training part", share, "whole step", share, "peak extra memory"], rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of each sequence, prompt and answer")
    parser.add_argument("--check-tokens", type=int, default=256, help="tokens in the check against eager maps")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json as well")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(folder)
        off = check(bench, args.check_tokens)
        measured, sampling = measure(bench, args.tokens, args.rounds)
    where = environment() | {"trl": metadata.version("trl")}
    what = f"SmolLM2-135M ({bench.weights}), fp32, gradient checkpointing; {SEQUENCES} sequences of {args.tokens:,} "
    what += f"tokens, micro-batches of {MICRO}; medians of {args.rounds} interleaved rounds; sampling took "
    what += (
        f"{statistics.median(sampling):.1f} s; {off} of {SEQUENCES * args.check_tokens:,} tokens have another credit "
    )
    what += "than by eager maps"
    data = {**where, "tokens": args.tokens, "weights": bench.weights, "sampling": sampling, "off": off}
    data |= {name: m._asdict() for name, m in measured.items()}
    print(publish(args.out, f"{heading(where)}\n\n{what}\n\n{table(measured, sampling)}\n", data))


if __name__ == "__main__":
    main()
