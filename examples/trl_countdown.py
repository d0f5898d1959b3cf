"""Trains a model on Countdown with TRL's GRPO and rhythm credit.

    python examples/trl_countdown.py --model Qwen/Qwen3-4B-Base
    accelerate launch --num_processes 8 examples/trl_countdown.py --model Qwen/Qwen3-4B-Base --use_vllm

Only the three lines that end in `# rhythm` differ from plain GRPO. Every field of the config is a flag, such as
--credit_top_fraction 0.2, --credit_delta drop or --learning_rate 2e-6. To try it on a CPU, with a small model:

    python examples/trl_countdown.py --model PATH --use_cpu --bf16 false --max_steps 2 --problems 8 \\
        --num_generations 4 --steps_per_generation 1 --max_completion_length 32 --report_to none
"""

from dataclasses import dataclass, field

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import TrlParser

from rhythm_kernels.integrations.trl import RhythmGRPOConfig, RhythmGRPOTrainer  # rhythm
from rhythm_kernels.tasks.countdown import from_row, generate_rows, verify

# The paper's settings on eight processes: 500 batches of 64 problems with 8 answers each, in 16 steps of 32 answers
DEFAULTS = {
    "output_dir": "runs/trl-countdown",
    "loss_type": "grpo",
    "num_generations": 8,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 16,
    "max_completion_length": 1024,
    "max_steps": 8000,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "constant",  # and no warm-up
    "save_steps": 320,
}


@dataclass
class Options:
    """The flags of this script, beside those of the config."""

    model: str = field(metadata={"help": "A transformers model: a folder, or a name on the hub."})
    problems: int = field(default=20_000, metadata={"help": "Number of problems to train on."})
    problem_seed: int = field(default=0, metadata={"help": "Seed of the problems."})


def make_dataset(options: Options, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Returns the columns prompt and answer; prompts are messages where the tokenizer has a chat template."""
    problems = [from_row(**row) for row in generate_rows(options.problems, options.problem_seed)]
    prompts = [problem.prompt for problem in problems]
    if tokenizer.chat_template is not None:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return Dataset.from_dict({"prompt": prompts, "answer": [problem.answer for problem in problems]})


def solved(completions, answer, **_) -> list[float]:
    """Returns the reward of each completion: 1 for a right expression in <answer> tags, else 0."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [verify(text, right) for text, right in zip(texts, answer, strict=True)]


def main() -> None:
    parser = TrlParser((Options, RhythmGRPOConfig))  # rhythm
    parser.set_defaults(**DEFAULTS)
    options, config = parser.parse_args_and_config()
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    trainer = RhythmGRPOTrainer(  # rhythm
        model=options.model,
        reward_funcs=solved,
        args=config,
        train_dataset=make_dataset(options, tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
