"""A tiny random model in a folder and problems for it, on which the studies of rhythm_kernels/analysis are tested."""

import json
from pathlib import Path

import torch
from transformers import ByT5Tokenizer, Qwen3Config, Qwen3ForCausalLM

SIZES = {
    "vocab_size": 259,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # so that it has preferences
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def tiny_model(**sizes) -> Qwen3ForCausalLM:
    """Returns a random Qwen3 over bytes, in evaluation mode."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES | sizes)).eval()


def run(main, arguments: list[str]) -> str | None:
    """Runs a study; returns the message of an error of the caller, or None."""
    try:
        main(arguments)
    except (ValueError, TypeError, OSError) as error:
        return str(error)
    return None


def tiny_folder(folder: Path) -> Path:
    """Saves the model and a tokenizer that reads bytes in a folder, and returns it."""
    tiny_model().save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    return folder


def problem_file(path: Path, count: int) -> Path:
    """Writes a task file of `count` problems and returns its path."""
    path.write_text("".join(json.dumps({"question": f"What is {n} times {n + 3}?"}) + "\n" for n in range(count)))
    return path


def cut_places(content: bytes) -> list[int]:
    """Returns where a kill may have cut a log of two batches of two problems.

    The places are the start, inside of answers, between answers and what was measured, and inside of that.
    """
    lines = content.splitlines(keepends=True)  # settings, answers, measured, answers, measured
    starts = [sum(map(len, lines[:number])) for number in range(len(lines))]
    return [0, starts[3] + 9, starts[4], len(content) - 1]


def kept_batches(content: bytes) -> int:
    """Returns the number of measured batches in a log that was cut anywhere."""
    return sum(b'"key": "measured' in line and line.endswith(b"\n") for line in content.splitlines(keepends=True))
