"""Loads a model's weights whole, finds those that are no numbers, and tells those of two checkpoints apart."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

DIGESTED = 4096  # numbers of a weight


def load_whole(name: str | Path, **options) -> nn.Module:
    """Returns a causal language model that transformers loads, of which the checkpoint holds every weight.

    transformers draws weights that a checkpoint lacks at random, and goes on with a warning.

    Args:
        options: those of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ValueError: the checkpoint lacks a weight, or holds one of another shape.
        OSError, ValueError, ImportError: those of `from_pretrained`.
    """
    from transformers import AutoModelForCausalLM

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
        some = weight.detach().flatten()[:: max(1, weight.numel() // DIGESTED)]
        digest.update(f"{name} {[*weight.shape]} {weight.dtype}\n".encode())
        digest.update(some.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
