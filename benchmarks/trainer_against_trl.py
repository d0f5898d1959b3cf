"""How do whole training steps compare with those of TRL's GRPOTrainer?

    python -m benchmarks.trainer_against_trl [--completion 256] [--rounds 3] [--out benchmarks/results/trainer-trl-cpu]

Both trainers have the same model (SmolLM2-135M), prompts (Countdown, in its chat template), batch (2 problems with 4
answers each), lengths (nothing ends an answer before --completion tokens), reward, loss and machine. Both compute in
fp32 with gradient checkpointing, TRL's default, sample answers with transformers' generate, and take one optimizer step
a batch. Compared are, in turn and each in a process of its own in each round:

    trl       GRPOTrainer, micro-batches of 4 answers
    none      this trainer, micro-batches of as many tokens, --credit none
    coupled   this trainer, --credit coupled

The first step of a process is not counted. The benchmark reports nothing unless all variants saw the same number of
tokens. Memory is the peak of the resident set above what the process held when its trainer was made.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.measure import (
    environment,
    extra_bytes,
    heading,
    make_parser,
    markdown_table,
    median_and_range,
    progress,
    publish,
)

PROBLEMS, ANSWERS, MICRO = 2, 4, 4
PROMPT_TOKENS = 200  # more than any of these prompts has
VARIANTS = ("trl", "none", "coupled")


class Steps(NamedTuple):
    """The steps of one process, without the first."""

    seconds: list[float]
    """The time of each step."""
    tokens: int
    """The tokens of all prompts and answers."""
    extra_bytes: int

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / sum(self.seconds)


def reward_of(text: str) -> float:
    """Returns the share of digits, so that the rewards of a group differ."""
    return sum(character.isdigit() for character in text) / max(1, len(text))


def save_model(folder: Path) -> None:
    """Saves SmolLM2 and its tokenizer as from_pretrained reads them."""
    from rhythm_kernels.analysis.sources import load

    model, tokenizer = load(dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def questions(count: int) -> list[str]:
    from rhythm_kernels.tasks.countdown import from_row, generate_rows

    return [from_row(**row).prompt for row in generate_rows(count, 0)]


def run_trl(model: str, completion: int, steps: int, threads: int) -> Steps:
    import datasets
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(threads)
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in questions(PROBLEMS * steps)]
    moments: list[float] = []
    lengths: list[int] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            moments.append(time.perf_counter())

        def on_train_end(self, *_, **__):
            moments.append(time.perf_counter())

    def reward(prompts, completions, completion_ids, **_):
        lengths.append(sum(map(len, completion_ids)))
        return [reward_of(answer[0]["content"]) for answer in completions]

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            max_steps=steps,
            per_device_train_batch_size=MICRO,
            gradient_accumulation_steps=PROBLEMS * ANSWERS // MICRO,
            num_generations=ANSWERS,
            max_completion_length=completion,
            generation_kwargs={"min_new_tokens": completion},
            learning_rate=1e-6,
            loss_type="dapo",
            beta=0.0,
            gradient_checkpointing=True,
            shuffle_dataset=False,
            report_to=[],
            save_strategy="no",
            logging_steps=steps,
            disable_tqdm=True,
        )
        dataset = datasets.Dataset.from_list(rows)
        trainer = GRPOTrainer(model, reward_funcs=reward, args=config, train_dataset=dataset, callbacks=[Clock()])
        extra = extra_bytes(trainer.train, torch.device("cpu"))
    if lengths != [PROBLEMS * ANSWERS * completion] * steps:
        raise SystemExit(f"TRL made answers of {lengths} tokens, not {PROBLEMS * ANSWERS * completion} a step")
    seconds = [after - before for before, after in itertools.pairwise(moments)]
    prompts = [trainer.processing_class.apply_chat_template(row["prompt"], add_generation_prompt=True) for row in rows]
    prompt_tokens = sum(len(getattr(ids, "input_ids", ids)) for ids in prompts[PROBLEMS:])
    return Steps(seconds[1:], ANSWERS * prompt_tokens + sum(lengths[1:]), extra)


def run_ours(model: str, completion: int, steps: int, threads: int, credit: str) -> Steps:
    from rhythm_kernels.tasks import VERIFIERS, Problem
    from train.config import Config
    from train.loop import train_step
    from train.setup import open_run

    VERIFIERS["countdown"] = lambda text, answer: reward_of(text)
    asked = iter(questions(PROBLEMS * steps))
    seconds: list[float] = []
    tokens: list[float] = []
    config = Config().change(
        model=model,
        train_data="countdown",
        prompts_per_step=PROBLEMS,
        num_generations=ANSWERS,
        max_completion_length=completion,
        gradient_steps=1,
        gradient_checkpointing=True,
        micro_batch_tokens=MICRO * (completion + PROMPT_TOKENS),
        max_steps=steps,
        learning_rate=1e-6,
        credit=credit,
        seeds=(0,),
        threads=threads,
    )
    with tempfile.TemporaryDirectory() as folder, open_run(config, Path(folder)) as run:
        run.stream.take = lambda count: [Problem(next(asked), "", "countdown") for _ in range(count)]
        run.engine.stops = [run.policy.model.config.vocab_size]  # no token ends an answer
        sample = run.engine.generate
        run.engine.generate = lambda *args: [completion._replace(finish_reason="stop") for completion in sample(*args)]

        def all_steps():
            for number in range(1, steps + 1):
                began = time.perf_counter()
                tokens.append(train_step(run, number).metrics["num_tokens"])
                seconds.append(time.perf_counter() - began)

        extra = extra_bytes(all_steps, torch.device("cpu"))
    return Steps(seconds[1:], int(tokens[-1] - tokens[0]), extra)


def measure(variant: str, model: str, args: argparse.Namespace) -> Steps:
    """Runs a variant in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.trainer_against_trl", "--worker", variant, "--model", model]
    command += ["--completion", str(args.completion), "--steps", str(args.steps), "--threads", str(args.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{variant} failed: {done.stderr[-3000:]}")
    return Steps(*json.loads(done.stdout.splitlines()[-1]))


def table(measured: dict[str, list[Steps]]) -> str:
    rows = []
    memory = {name: statistics.median(run.extra_bytes for run in runs) for name, runs in measured.items()}
    for name, runs in measured.items():
        shares = [run.rate / trl.rate for run, trl in zip(runs, measured["trl"], strict=True)]
        rate = statistics.median(run.rate for run in runs)
        held = [f"{memory[name] / 2**20:,.0f} MiB", f"{memory[name] / memory['trl']:.2f}x"]
        rows.append([name, f"{rate:,.1f}", median_and_range(shares, 2), *held])
    return markdown_table(["", "tokens/s", "of `trl` (least, most)", "peak extra memory", "of `trl`"], rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--completion", type=int, default=256, help="tokens of each answer")
    parser.add_argument("--steps", type=int, default=4, help="steps of each process; the first is not counted")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json as well, after each round")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.worker:
        options = (args.model, args.completion, args.steps, args.threads)
        print(json.dumps(run_trl(*options) if args.worker == "trl" else run_ours(*options, args.worker)))
        return
    measured: dict[str, list[Steps]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder))
        for _ in progress(range(args.rounds), "against TRL"):
            for name in VARIANTS:
                measured[name].append(measure(name, folder, args))
            text = report(args, measured)
    print(text)


def report(args: argparse.Namespace, measured: dict[str, list[Steps]]) -> str:
    """Returns the report of whole rounds, after writing it where `--out` asks for it."""
    if len({run.tokens for runs in measured.values() for run in runs}) != 1:
        tokens = {name: runs[0].tokens for name, runs in measured.items()}
        raise SystemExit(f"the variants saw different numbers of tokens: {tokens}")
    where = environment() | {"threads": str(args.threads), "trl": metadata.version("trl")}
    rounds = len(measured["trl"])
    batch = f"{PROBLEMS} problems, {ANSWERS} answers each of {args.completion} tokens, micro-batches of {MICRO} answers"
    text = f"{heading(where)}\n\nSmolLM2-135M, fp32, gradient checkpointing; {batch}; medians of {rounds} rounds "
    text += f"in turn, of {args.steps - 1} steps each\n\n{table(measured)}\n"
    data = {**where, "completion": args.completion}
    data |= {name: [run._asdict() for run in runs] for name, runs in measured.items()}
    return publish(args.out, text, data)


if __name__ == "__main__":
    main()
