"""Named settings: a file NAME.toml here says what differs from the defaults in train/config.py, and why.

`extends = "OTHER"` starts from the settings of another file. A file with an underscore is no preset by itself. A name
says what a preset is: `ablation-` of the paper's, `beyond-` a run that the paper does not have; other models of 4B and
8B are the paper's runs.
"""

import sys
from pathlib import Path

from train.config import BadSetting, Config

FOLDER = Path(__file__).parent
TINY = ["countdown-tiny", "countdown-study", "countdown-smoke"]  # the first is the default
PREFIXES = {"the paper's ablations": "ablation-", "beyond the paper": "beyond-"}
NAMES = sorted(path.stem for path in FOLDER.glob("[!_]*.toml") if path.stem not in TINY)
KINDS = {
    "tiny": TINY,
    "the paper's runs": [name for name in NAMES if not name.startswith(tuple(PREFIXES.values()))],
    **{kind: [name for name in NAMES if name.startswith(prefix)] for kind, prefix in PREFIXES.items()},
}
"""The names of the presets by their kinds."""
PRESETS = [name for names in KINDS.values() for name in names]


def load_preset(name: str) -> Config:
    if name not in PRESETS:
        raise BadSetting(f"--preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return Config(preset=name).change(**_read(name))


def read_changes(name: str) -> dict[str, object]:
    """Returns the settings in which a preset differs from the one that it extends, or from the defaults."""
    return {name: value for name, value in _read_file(name).items() if name != "extends"}


def _read(name: str) -> dict:
    extended = _read_file(name).get("extends")
    return {**(_read(extended) if extended else {}), **read_changes(name)}


def _read_file(name: str) -> dict:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    return tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
