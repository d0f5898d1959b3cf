"""Loads a model's weights whole, finds those that are no numbers, and tells those of two checkpoints apart."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn

UNREADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError, SafetensorError, StrictDataclassError)
"""What transformers raises for files of a model that it cannot read, or that hold something else than it expects."""

DIGESTED = 4096  # numbers of a weight


def load_whole(name: str | Path, **options) -> nn.Module:
    """Returns a causal language model that transformers loads, with every weight of it from the checkpoint.

    transformers draws weights that a checkpoint lacks at random, and goes on with a warning. It also goes on without
    generation settings that are no JSON, and an answer would not end where they say.

    Args:
        options: those of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ValueError: the checkpoint lacks a weight, or holds one of another shape.
        ImportError, or one of `UNREADABLE`: those of `from_pretrained`.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    if (Path(name) / "generation_config.json").exists():
        GenerationConfig.from_pretrained(name)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    except RuntimeError as error:
        if "mismatched" not in str(error):
            raise
        raise ValueError("a weight has another shape than its configuration says; transformers lists them") from error
    if missing := sorted(found["missing_keys"]):
        others = f" and {len(missing) - 1} more weights" if len(missing) > 1 else ""
        raise ValueError(f"its checkpoint lacks {missing[0]}{others}")
    return model


@torch.no_grad()
def broken_weight(model: nn.Module) -> str | None:
    """Returns the name of the first parameter that holds NaN or infinity, None if all are finite.

    Of a sharded parameter this rank's shard is looked at.
    """
    for name, parameter in model.named_parameters():
        shard = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if not shard.is_floating_point():
            continue
        if shard.dtype.itemsize == 1:  # torch does not tell whether an 8-bit float is finite
            shard = shard.float()
        if not shard.isfinite().all():
            return name
    return None


def weights_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Returns a digest of names, shapes, dtypes and some thousand numbers of every weight, spread over all of it."""
    digest = hashlib.sha256()
    for name, weight in weights:
        step = weight.numel() // DIGESTED | 1  # odd: an even one may be a row's length, and meet one column alone
        some = weight.detach().flatten()[::step]
        digest.update(f"{name} {[*weight.shape]} {weight.dtype}\n".encode())
        digest.update(some.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
