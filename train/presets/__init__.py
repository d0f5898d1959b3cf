"""Named settings: a file NAME.toml here says what differs from the defaults in train/config.py, and why.

`extends = "OTHER"` starts from the settings of another file. A file with an underscore is no preset by itself.
"""

import sys
from pathlib import Path

from train.config import BadSetting, Config

FOLDER = Path(__file__).parent
DEFAULT = "countdown-tiny"
PRESETS = [DEFAULT, *sorted(path.stem for path in FOLDER.glob("[a-z]*.toml") if path.stem != DEFAULT)]


def load_preset(name: str) -> Config:
    if name not in PRESETS:
        raise BadSetting(f"--preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return Config(preset=name).change(**_read(name))


def _read(name: str) -> dict:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    values = tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    return {**(_read(values.pop("extends")) if "extends" in values else {}), **values}
