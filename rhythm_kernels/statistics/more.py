"""The statistics that are computed where the argument `more` names them, and what all backends share of them.

Entropy and largest score need every key of a row and fall out of the row pass. A mass is read from its own keys alone,
given the log-sum-exp; in torch it falls out of the row pass too, where that runs. A column sum is FAI times the number
of its rows.

Shapes: B batch rows, T tokens, HQ query heads; S sequences.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from rhythm_kernels.checks import check_int
from rhythm_kernels.host import send
from rhythm_kernels.statistics.layout import Layout
from rhythm_kernels.statistics.options import Options
from rhythm_kernels.tensor_checks import at_hand, can_look, check_tensor

NEED_EVERY_KEY = ("row_entropy", "largest_score")
MASSES = ("first_mass", "prefix_mass", "self_mass")
MORE = (*NEED_EVERY_KEY, *MASSES, "column_sum")


def check_more(more: object, first_keys: object, prefix_lengths: object, grouped: bool = False) -> tuple[str, ...]:
    """Returns the names that are asked for, in the order of MORE, once each.

    Args:
        grouped: whether the statistics are sums over head groups.

    Raises:
        TypeError, ValueError: `more` is no collection of these names, or names one that has no sum over heads;
            first_keys or prefix_lengths [S] is wrong, or "prefix_mass" and prefix_lengths come without each other.
    """
    if isinstance(more, str) or not isinstance(more, Collection):
        raise TypeError(f"more must be a collection of names, got {type(more).__name__}: {more!r}")
    unknown = [name for name in more if name not in MORE]
    if unknown:
        raise ValueError(f"more must hold names among {', '.join(MORE)}, got {unknown[0]!r}")
    per_head = [name for name in NEED_EVERY_KEY if name in more]
    if grouped and per_head:
        raise ValueError(
            f"more must hold names among {', '.join(MORE[2:])} where head groups are given, got {per_head[0]!r}: it is "
            "not linear in the map, so a sum over heads is not that of the mean map; attention_stats has it per head"
        )
    check_int("first_keys", first_keys, 1)
    if prefix_lengths is not None:
        check_tensor("prefix_lengths", prefix_lengths, ["S"], [torch.int32, torch.int64])
    if ("prefix_mass" in more) != (prefix_lengths is not None):
        what = "None" if prefix_lengths is None else f"shape {list(prefix_lengths.shape)} and more={tuple(more)!r}"
        raise ValueError(f'prefix_lengths, int [S], and "prefix_mass" in more need each other, got {what}')
    return tuple(name for name in MORE if name in more)


def check_prefix_lengths(prefix_lengths: Tensor | None, layout: Layout) -> Tensor | None:
    """Returns the lengths, int [S], on the device of the layout.

    Raises:
        ValueError: they are not [S], on a third device, or one is below 0 where the host can see it.
    """
    if prefix_lengths is None:
        return None
    device = layout.rows.device
    check_tensor("prefix_lengths", prefix_lengths, [layout.sequences], [], at_hand(prefix_lengths, device))
    if can_look(prefix_lengths) and bool((prefix_lengths < 0).any()):
        raise ValueError(f"prefix_lengths must be at least 0, got {prefix_lengths.min().item()}")
    return send(prefix_lengths, device)


def with_more(
    options: Options, more: tuple[str, ...], first_keys: int, prefix_lengths: Tensor | None, layout: Layout
) -> Options:
    """Returns the options with what `check_more` returned; checks prefix_lengths against the layout."""
    lengths = check_prefix_lengths(prefix_lengths, layout)
    return options._replace(more=more, first_keys=min(first_keys, layout.rows.shape[1]), prefix_lengths=lengths)


def needs_every_key(options: Options) -> bool:
    """Returns whether a statistic that is asked for needs a row pass over all rows of R."""
    return any(name in options.more for name in NEED_EVERY_KEY)


def masses_of(options: Options) -> tuple[str, ...]:
    """Returns the names of the masses that are asked for."""
    return tuple(name for name in MASSES if name in options.more)


def column_sums(fai: Tensor, layout: Layout, options: Options) -> dict[str, Tensor]:
    """Returns the sums of the columns by their name, if they are asked for; fai: [B, HQ, T], or [B, T] of a group."""
    if "column_sum" not in options.more:
        return {}
    count = layout.rows_looking_back(options.horizon)
    return {"column_sum": fai * (count[:, None] if fai.ndim == 3 else count)}


def in_order(options: Options, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the values of the names that are asked for, in the order of MORE."""
    return {name: values[name] for name in options.more}
