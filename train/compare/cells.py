"""Names what is compared: the strategies of credit, and the ablations of the paper, by their presets."""

from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import NamedTuple

from rhythm_kernels.options import READS_ATTENTION, READS_FAI, READS_WAAD, STRATEGIES, CreditOptions, flat_name
from train.config import BadSetting, Config, flag_name
from train.flags import check_given
from train.presets import PREFIXES, PRESETS, load_preset, read_changes

BASELINE, RANDOM = "none", "random"
ABLATION = PREFIXES["the paper's ablations"]
CELLS: dict[str, dict[str, object]] = {
    **{strategy: {"credit": strategy} for strategy in STRATEGIES},
    **{
        name.removeprefix(ABLATION): {"credit": CreditOptions().strategy} | read_changes(name)
        for name in PRESETS
        if name.startswith(ABLATION)
    },
}
"""The settings of each cell. An ablation has those by which its preset differs from the one that it extends."""
BOTTOM = [f"bottom-{strategy}" for strategy in STRATEGIES if f"bottom-{strategy}" in CELLS]
TOP = sorted((name for name in CELLS if name.startswith("top-")), key=lambda name: CELLS[name]["credit_top_fraction"])
OF_CELLS = sorted({name for settings in CELLS.values() for name in settings})
_PLAIN = {name: value for name, value in Config().flat().items() if name in OF_CELLS}
_PER_CENT = f"{100 * _PLAIN['credit_top_fraction']:.0f} %"
OF_ATTENTION: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("credit_window", "credit_local_fraction"), READS_WAAD),
    **dict.fromkeys(("credit_horizon", "credit_global_fraction"), READS_FAI),
    **dict.fromkeys(("credit_layers", "credit_span_rows", "credit_group_by", "credit_groups_every"), READS_ATTENTION),
}
"""The strategies whose credit depends on each option of the statistics. All runs show these on pages of samples."""
LABELS = {
    "none": "GRPO",
    "random": "+ random credit",
    "entropy": "+ high-entropy credit",
    "local": "+ local-chunk credit",
    "global": "+ global-anchor credit",
    "coupled": "+ coupled rhythm credit",
}


def choose_cells(preset: str, names: Sequence[str], given: dict[str, object]) -> dict[str, Config]:
    """Returns the configuration of each cell, for all seeds; of two cells with the same settings the first alone.

    Raises:
        BadSetting: a cell has no such name, a setting is wrong, or a given one acts in none of the cells.
    """
    if unknown := [name for name in names if name not in CELLS]:
        raise BadSetting(f"--cells must be among {', '.join(CELLS)}, got {', '.join(unknown)}")
    cells: dict[str, Config] = {}
    for name in names:
        config = load_preset(preset).change(**{**given, **CELLS[name]})
        if config not in cells.values():
            cells[name] = config
    _check_given(given, list(cells.values()))
    return cells


def _check_given(given: Collection[str], configs: list[Config]) -> None:
    """Raises BadSetting for a given setting that has an effect in no cell."""
    for name in given:
        idle = []
        for config in configs:
            try:
                check_given([name], config)
            except BadSetting as error:
                idle.append(error)
        if len(idle) == len(configs):
            raise idle[0]


def name_cells(configs: Sequence[Config]) -> list[str]:
    """Returns the cell of each run.

    Other options in which the runs differ are added to its name. An option that a strategy does not read makes no
    difference, so it is neither compared nor named.
    """
    options = [flat_name(f.name) for f in fields(CreditOptions) if f.name != "seed"]
    flats = [{name: config.flat()[name] for name in options if reads(config, name)} for config in configs]
    differ = [name for name in options if len({str(flat[name]) for flat in flats if name in flat}) > 1]
    varying = [name for name in differ if name not in OF_CELLS]
    return [_name(flat, [name for name in varying if name in flat]) for flat in flats]


def reads(config: Config, name: str) -> bool:
    """Returns whether the credit of a run depends on an option, by its flat name."""
    try:
        check_given([name], config)
    except BadSetting:
        return False
    return config.credit.strategy in OF_ATTENTION.get(name, STRATEGIES)


def _name(flat: dict[str, object], varying: list[str]) -> str:
    own = {name: flat[name] for name in OF_CELLS if name in flat}
    for cell, settings in CELLS.items():
        if {name: (_PLAIN | settings)[name] for name in own} == own:
            return " ".join([cell, *(f"{flag_name(name)} {flat[name]}" for name in varying)])
    others = [name for name in own if name != "credit"] + varying
    return " ".join([flat["credit"], *(f"{flag_name(name)} {flat[name]}" for name in others)])


class Groups(NamedTuple):
    """Cells in the order of the paper: its strategies, and the cells of its two ablations."""

    strategies: list[str]
    bottom: list[str]
    top: list[str]

    @classmethod
    def of(cls, cells: Collection[str]) -> "Groups":
        bottom, top = ([cell for name in names for cell in cells if _plain(cell) == name] for names in (BOTTOM, TOP))
        others = [cell for cell in cells if cell not in (*bottom, *top)]
        order = {name: place for place, name in enumerate(STRATEGIES)}
        return cls(sorted(others, key=lambda cell: order[_plain(cell)]), bottom, top)

    @property
    def largest(self) -> list[str]:
        """The strategies that the ablations are variants of, for the largest values."""
        return [cell for cell in self.strategies if _plain(bottom_of(cell)) in BOTTOM]

    @property
    def baseline(self) -> list[str]:
        return [cell for cell in self.strategies if cell == BASELINE]


def bottom_of(cell: str) -> str:
    """Returns the name that a strategy's cell has where it takes the smallest values, with the same other options."""
    return f"bottom-{cell}"


def _plain(cell: str) -> str:
    return cell.partition(" ")[0]


def label(cell: str, is_ablation: bool = False) -> str:
    """Returns a cell's name in a table or a figure: as the paper's Tables 3 and 4 have it, or as its ablations do."""
    name, _, others = cell.partition(" ")
    text = LABELS.get(name, name)
    if is_ablation and name in ("global", "local", "coupled"):
        text = f"{name.capitalize()} (top {_PER_CENT})"
    elif name.startswith("bottom-"):
        text = f"{name.removeprefix('bottom-').capitalize()} (bottom {_PER_CENT})"
    elif name.startswith("top-"):
        text = f"Coupled (top {name.removeprefix('top-')} %)"
    return f"{text} {others}".strip()
