"""Finds what inputs a model takes: how many positions, which token ids, and whether its tokenizer knows words.

A language model does not check these itself. Positions beyond its limit silently give wrong numbers. A token id beyond
its embedding rows raises an indexing error or, on a GPU, leaves the device unusable.
"""

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


def padding_token(tokenizer, config) -> int:
    """Returns a token to pad with that the model has a row for: the tokenizer's own, or 0.

    Any token will do, since padding is masked. A padding token that was added to a tokenizer often has no row.
    """
    own = tokenizer.pad_token_id
    return own if own is not None and own < embedding_rows(config) else 0


def knows_words(tokenizer) -> bool:
    """Returns False for the empty tokenizer that transformers makes for some models in a folder without one."""
    return len(tokenizer) > len(set(tokenizer.all_special_ids))
