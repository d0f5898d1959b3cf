"""Defines the command line of a run: a flag for every setting, and which flags have no effect with the others."""

import argparse
import textwrap
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path

from rhythm_kernels.options import READS_WAAD, CreditOptions
from train.config import (
    MAY_CHANGE,
    SHAPE,
    BadSetting,
    Config,
    Demonstrations,
    Words,
    differences,
    flag_name,
    settings_of,
)
from train.presets import KINDS, PRESETS, load_preset

OF_WORDS = [f.name for f in fields(Words)]
FROM_SCRATCH = [*SHAPE, *(f.name for f in fields(Demonstrations))]
OF_VLLM, OF_TRANSFORMERS = ["vllm_gpu_memory_utilization"], ["rollout_batch_size"]
OF_CORRECTION, CORRECTION = ["vllm_importance_sampling_cap"], "--vllm-importance-sampling-correction"
SELECTS = ["credit_top_fraction", "credit_amplification", "credit_largest"]
COUPLES = ["credit_shared_fraction", "credit_max_lookback", "credit_tau_waad", "credit_tau_delta"]
ACT_WHERE = (
    (OF_WORDS, lambda c: c.data.train_data == "words", "it is of the tiny Countdown, --train-data words"),
    (FROM_SCRATCH, lambda c: not c.model.model, "--model names a trained model"),
    (OF_VLLM, lambda c: c.rollout.engine == "vllm", "the answers do not come from --engine vllm"),
    (OF_TRANSFORMERS, lambda c: c.rollout.engine == "transformers", "it is of --engine transformers"),
    (OF_CORRECTION, lambda c: c.grpo.vllm_importance_sampling_correction, f"it caps the weights of {CORRECTION}"),
    (SELECTS, lambda c: c.credit.strategy != "none", "--credit none selects no token"),
    (COUPLES, lambda c: c.credit.strategy == "coupled", "only --credit coupled reads it"),
    (["credit_delta"], lambda c: c.credit.strategy in READS_WAAD, f"only --credit {' and '.join(READS_WAAD)} read it"),
    (
        ["credit_preplan_fraction"],
        lambda c: c.credit.strategy == "local" or (c.credit.strategy == "coupled" and c.credit.tau_delta is None),
        "only --credit local reads it, and coupled without --credit-tau-delta",
    ),
    (
        ["credit_top_fraction"],
        lambda c: c.credit.strategy != "local" or c.credit.preplan_fraction is None,
        "with --credit local --credit-preplan-fraction takes its place",
    ),
)
"""(settings, whether a configuration reads them, why not), for the settings that are not always read."""


def parse(arguments: list[str] | None) -> tuple[Config, Path | None]:
    """Returns the checked configuration of a run, and its folder if --resume names one, whose settings are changed."""
    values = vars(build_parser().parse_args(arguments))
    preset, resume = values.pop("preset"), values.pop("resume")
    if resume is None:
        config = load_preset(PRESETS[0] if preset is None else preset).change(**values)
        check_given(values, config)
        return config, None
    if preset:
        raise BadSetting(f"--resume continues a run with its own settings, but also got --preset {preset}")
    path = Path(resume) / "config.json"
    if not path.is_file():
        raise BadSetting(f"--resume must be a run's folder, got {resume!r}, which has no config.json")
    saved = Config.load(path)
    config = saved.change(**values)
    if wrong := differences(saved, config, saved.may_change()):
        raise BadSetting(
            f"--resume continues a run with its own settings, but got {'; '.join(wrong)}; these may change: "
            f"{', '.join(map(flag_name, MAY_CHANGE))}, and --max-steps where --final-learning-rate is 1"
        )
    check_given(values, config)
    return config, Path(resume)


class WholeNames(argparse.HelpFormatter):
    """Breaks no name at its hyphens."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train",
        usage="python -m train [--preset NAME | --resume FOLDER] [flags]",
        description="Trains a language model with group relative policy optimization (GRPO). The credit of a token "
        "follows the model's attention: WAAD is the windowed average attention distance of a token, FAI its future "
        "attention influence, Delta the change of WAAD to the next token. Brackets hold the value of a "
        "flag that neither the command nor the preset sets.",
        formatter_class=WholeNames,
        argument_default=argparse.SUPPRESS,  # only what was given comes out
        allow_abbrev=False,
    )
    kinds = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in KINDS.items())
    parser.add_argument("--preset", default=None, help=f"{kinds}. The default is {PRESETS[0]}")
    text = "continue the run in this folder; flags that do not decide what is learned may be given anew"
    parser.add_argument("--resume", default=None, metavar="FOLDER", help=text)
    add_flags(parser, Config().flat())
    return parser


def add_flags(parser: argparse.ArgumentParser, names: Collection[str]) -> None:
    """Adds a flag for each of these settings, in the groups of the configuration."""
    for _, group in Config().groups():
        settings = {name: f for name, f in settings_of(group).items() if name in names}
        title = "token credit" if isinstance(group, CreditOptions) else type(group).__doc__
        section = parser.add_argument_group(title) if settings else None
        for name, f in settings.items():
            text = f.metadata["help"].replace("%", "%%")
            if f.type is bool:
                section.add_argument(flag_name(name), action=argparse.BooleanOptionalAction, help=text)
                continue
            several = isinstance(f.default, tuple) or name == "credit_layers"
            default = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
            shown = text if default in ("", None) else f"{text} [{default}]"
            metavar = "N" if several else " ".join(f.metadata.get("choices", [name.upper()]))
            nargs = "+" if several else None
            section.add_argument(flag_name(name), help=shown, metavar=metavar, nargs=nargs)


def check_given(given: Collection[str], config: Config) -> None:
    """Raises BadSetting for a given flag that has no effect with the other settings."""
    for names, acts, reason in ACT_WHERE:
        idle = [flag_name(name) for name in names if name in given]
        if idle and not acts(config):
            raise BadSetting(f"{', '.join(idle)} would have no effect: {reason}")
