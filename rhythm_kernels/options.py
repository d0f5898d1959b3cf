"""The options of rhythm credit: flags, configuration fields and the docs' table come from this one list.

Loads no torch, so that a command line can show its help at once.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields

from rhythm_kernels.checks import check_bool, check_choice, check_float, check_horizon, check_int, check_span_rows

STRATEGIES = ("none", "random", "entropy", "local", "global", "coupled")
READS_WAAD = ("local", "coupled")
READS_FAI = ("global", "coupled")
READS_ATTENTION = ("local", "global", "coupled")
DELTAS = ("absolute", "drop")
GROUP_BY = ("sequence", "batch")
MAX_WINDOW = 256  # tokens
MOST_AMPLIFICATION = 1e37  # keeps every factor finite in fp32
SPAN_ROWS = 512  # benchmarks/results/span-sample.md
PREFIX = "credit"
LIST = ","  # a word that marks a list, which may have one item


def _option(default: object, help: str, **limits) -> Field:
    """Makes a field with its help; `limits` are arguments of `check_int` or `check_float`, or `choices`."""
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True, kw_only=True)
class CreditOptions:
    """The options of a run's credit, with the defaults of `collect` and `token_credit`.

    Raises:
        TypeError, ValueError: an option has the wrong type or value; the message begins with its name and "must".
    """

    strategy: str = _option("coupled", "what multiplies a token's positive advantage", choices=STRATEGIES)
    top_fraction: float = _option(0.4, "fraction of a response's tokens that is selected", minimum=0.0, maximum=1.0)
    amplification: float = _option(
        1.5, "factor of a selected token's advantage", minimum=0.0, maximum=MOST_AMPLIFICATION
    )
    shared_fraction: float = _option(
        0.5, "fraction of a dominated anchor's credit that moves to its intro", minimum=0.0, maximum=1.0
    )
    max_lookback: int = _option(3, "tokens before an anchor in which its intro may lie", minimum=1, maximum=2**63 - 1)
    largest: bool = _option(True, "select the largest values, or the smallest (the paper's ablation)")
    preplan_fraction: float | None = _option(
        None,
        "fraction of a response's tokens that is preplan tokens; by default top_fraction",
        minimum=0.0,
        maximum=1.0,
    )
    delta: str = _option(
        "absolute",
        "Delta is the absolute change of WAAD to the next token, or only a drop of it",
        choices=DELTAS,
    )
    tau_waad: float | None = _option(
        None, "largest WAAD of a dominated anchor, in tokens; by default the lower median of the response"
    )
    tau_delta: float | None = _option(
        None,
        "smallest Delta that comes before a dominated anchor, in tokens; by default the smallest of the preplan tokens",
    )
    layers: int | str | tuple[int, ...] = _option(
        5, "layers whose attention is read: a number of layers of the middle third, all, or a list of indices"
    )
    window: int = _option(10, "WAAD clips distances at this many tokens", minimum=1, maximum=MAX_WINDOW)
    horizon: tuple[int, int | None] = _option(
        (10, 50), "FAI counts attention from tokens between these two distances later; none as the second: to the end"
    )
    local_fraction: float = _option(0.3, "fraction of all heads that are local", minimum=0.0, maximum=1.0)
    global_fraction: float = _option(0.3, "fraction of all heads that are global", minimum=0.0, maximum=1.0)
    span_rows: int | None = _option(
        SPAN_ROWS, "rows of a response at most that the spans of a head are read from, a multiple of 64; none for all"
    )
    group_by: str = _option(
        "sequence", "rank heads by the spans of each sequence, or by those of the whole batch", choices=GROUP_BY
    )
    groups_every: int = _option(
        1, "steps that a ranking of the heads serves; above 1 all sequences share one in the steps between", minimum=1
    )
    seed: int = _option(0, "seed of the strategy random", minimum=0, maximum=2**32 - 1)

    def __post_init__(self):
        object.__setattr__(self, "layers", _check_layers(self.layers))
        object.__setattr__(self, "horizon", check_horizon(self.horizon))
        for option in fields(self):
            limits = {name: limit for name, limit in option.metadata.items() if name != "help"}
            _check(option, getattr(self, option.name), limits)
        if self.local_fraction + self.global_fraction > 1:
            raise ValueError(
                "local_fraction and global_fraction must leave disjoint groups, "
                f"got {self.local_fraction} and {self.global_fraction}"
            )
        for name, readers in (("local_fraction", READS_WAAD), ("global_fraction", READS_FAI)):
            if self.strategy in readers and getattr(self, name) == 0:
                raise ValueError(f"{name} must be above 0, so that {self.strategy} credit reads a head, got 0.0")

    @property
    def reads_attention(self) -> bool:
        """Whether the strategy needs the statistics of the policy's attention."""
        return self.strategy in READS_ATTENTION

    @property
    def reads_entropy(self) -> bool:
        """Whether the strategy needs the entropy of the policy's tokens."""
        return self.strategy == "entropy"

    @property
    def collect_arguments(self) -> dict[str, object]:
        """The arguments of `collect` that these options set."""
        names = ("window", "horizon", "span_rows", "group_by", "local_fraction", "global_fraction")
        layers = list(self.layers) if isinstance(self.layers, tuple) else self.layers
        return {"layers": layers, **self._of(names)}

    @property
    def schedule_arguments(self) -> dict[str, object]:
        """The arguments of `GroupSchedule` that these options set."""
        return {"every": self.groups_every, **self._of(("local_fraction", "global_fraction"))}

    @property
    def set_arguments(self) -> dict[str, object]:
        """The arguments of `coupled_sets` that these options set."""
        names = ("top_fraction", "max_lookback", "largest", "preplan_fraction", "delta", "tau_waad", "tau_delta")
        return self._of(names)

    @property
    def credit_arguments(self) -> dict[str, object]:
        """The arguments of `token_credit` that these options set, beside the strategy and the seed."""
        return {**self.set_arguments, **self._of(("amplification", "shared_fraction"))}

    def draw_seed(self, draw: int) -> int:
        """Returns the seed of `token_credit` for one call; `draw` counts the calls, so that each draws anew."""
        return (self.seed << 32) + draw % 2**32

    def _of(self, names: Sequence[str]) -> dict[str, object]:
        return {name: getattr(self, name) for name in names}


# ---- flat names in the settings of a run -----------------------------------------------------------------------------


def flat_name(option: str) -> str:
    """Returns an option's name among the settings of a whole run: credit for the strategy, else credit_OPTION."""
    return PREFIX if option == "strategy" else f"{PREFIX}_{option}"


def from_flat(settings: Mapping[str, object]) -> CreditOptions:
    """Makes the options from settings under their flat names; other settings are not read.

    Raises:
        TypeError, ValueError: those of `CreditOptions`, with the flat name.
    """
    flat = {option.name: flat_name(option.name) for option in fields(CreditOptions)}
    options = {name: settings[setting] for name, setting in flat.items() if setting in settings}
    try:
        return CreditOptions(**options)
    except (TypeError, ValueError) as error:
        names, must, what = str(error).partition(" must ")
        flat_names = re.sub(r"\w+", lambda word: flat.get(word[0], word[0]), names)
        raise type(error)(flat_names + must + what) from None


def read_text(option: Field, value: object) -> object:
    """Reads an option's value from text or from a list of texts; returns anything else as it is.

    Text that does not name a value of the option is returned too, for `CreditOptions` to refuse.
    """
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, (list, tuple)) or not words or not all(isinstance(word, str) for word in words):
        return value
    split = [word for text in words for word in text.replace(",", " ").split()]
    if option.name == "layers" and any("," in text for text in words):
        split.append(LIST)
    try:
        return _READERS.get(option.name, _READERS.get(type(option.default), _read_word))(split)
    except (ValueError, KeyError):
        return value


def _read_word(words: list[str]) -> str:
    (word,) = words
    return word


def _read_number(kind: type) -> Callable[[list[str]], object]:
    return lambda words: kind(_read_word(words))


def _read_bool(words: list[str]) -> bool:
    return {"true": True, "false": False}[_read_word(words).lower()]


def _read_or_none(words: list[str]) -> float | None:
    return None if _is_none(words) else float(_read_word(words))


def _read_count(words: list[str]) -> int | None:
    return None if _is_none(words) else _read_number(int)(words)


def _is_none(words: list[str]) -> bool:
    return [word.lower() for word in words] == ["none"]


def _read_layers(words: list[str]) -> int | str | tuple[int, ...]:
    """Reads "all", a count of layers, or a list of indices; a list of one has a comma: "10,"."""
    if words == ["all"]:
        return "all"
    numbers = [int(word) for word in words if word != LIST]
    return numbers[0] if len(words) == 1 else tuple(numbers)


def _read_horizon(words: list[str]) -> tuple[int | None, ...]:
    lo, *hi = words
    return (int(lo), *(None if _is_none([word]) else int(word) for word in hi or ["none"]))


_READERS = {
    "layers": _read_layers,
    "horizon": _read_horizon,
    "span_rows": _read_count,
    "preplan_fraction": _read_or_none,
    "tau_waad": _read_or_none,
    "tau_delta": _read_or_none,
    int: _read_number(int),
    float: _read_number(float),
    bool: _read_bool,
}


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check(option: Field, value: object, limits: dict) -> None:
    name, kind = option.name, type(option.default)
    if "choices" in limits:
        check_choice(name, value, limits["choices"])
    elif kind is bool:
        check_bool(name, value)
    elif name == "span_rows":
        check_span_rows(value)
    elif name == "preplan_fraction" or name.startswith("tau_"):
        if value is not None:
            check_float(name, value, **limits)
    elif kind is float:
        check_float(name, value, **limits)
    elif kind is int and name != "layers":
        check_int(name, value, **limits)


def _check_layers(layers: object) -> int | str | tuple[int, ...]:
    if isinstance(layers, str) and layers == "all":
        return layers
    indices = [layers] if isinstance(layers, int) else layers
    is_list = isinstance(indices, Sequence) and not isinstance(indices, str)
    if not is_list or any(isinstance(index, bool) or not isinstance(index, int) for index in indices):
        raise TypeError(f'layers must be "all", an int or a list of layer indices, got {layers!r}')
    if isinstance(layers, int):
        return check_int("layers", layers, 1)
    if not layers:
        raise ValueError('layers must be "all", an int or a list of layer indices, got an empty list')
    if len(set(layers)) < len(layers):
        raise ValueError(f"layers must be different, got {[*layers]}")
    return tuple(check_int("layers", layer, -(2**31)) for layer in layers)
