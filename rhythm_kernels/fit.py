"""Checks that a model fits its inputs: enough positions, a row for each token id, weights that are there and numbers.

A language model does not check these itself. Positions beyond its limit silently give wrong numbers. A token id beyond
its embedding rows raises an indexing error or, on a GPU, leaves the device unusable.
"""

from pathlib import Path

import torch
from torch import nn

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
STRETCHED = ("linear", "dynamic")  # rotary embeddings whose factor max_position_embeddings does not include


def most_positions(config) -> int | None:
    """Returns the number of positions that a transformers configuration allows, None if it names no limit.

    Learned positions are the rows of a table. Rotary positions reach the configured length times the
    scaling factor. A sliding window does not limit positions.
    """
    config = config.get_text_config(decoder=True)
    limits = (getattr(config, name, None) for name in POSITIONS)
    most = next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)
    if most is None:
        return None
    scalings = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [scaling for scaling in scalings.values() if isinstance(scaling, dict)]
    scalings = [scalings] if "rope_type" in scalings else by_layer_type
    reached = [most]
    for scaling in scalings:
        factor, kind = scaling.get("factor") or 1.0, scaling.get("rope_type")
        if kind in STRETCHED:
            reached.append(int(most * factor))
        elif kind == "yarn":
            reached.append(int(scaling.get("original_max_position_embeddings", 0) * factor))
    return max(reached)


def embedding_rows(config) -> int:
    """Returns the number of token ids that a transformers configuration gives its model."""
    return config.get_text_config(decoder=True).vocab_size


def knows_words(tokenizer) -> bool:
    """Returns False for the empty tokenizer that transformers makes for some models in a folder without one."""
    return len(tokenizer) > len(set(tokenizer.all_special_ids))


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
        if shard.is_floating_point() and not shard.isfinite().all():
            return name
    return None
