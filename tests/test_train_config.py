"""Flags: every one is read, and a bad value is refused by name, with what arrived, before anything runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import train
from rhythm_kernels import options
from train.__main__ import main
from train.config import Config, flag_name, settings_of
from train.flags import parse
from train.presets import PRESETS, load_preset

SOURCES = Path(train.__file__).parent


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--credit", "attention"], "--credit must be one of none, random, entropy, local, global, coupled"),
        (["--credit-top-fraction", "1.5"], "--credit-top-fraction must be finite and between 0.0 and 1.0, got 1.5"),
        (["--learning-rate", "0"], "--learning-rate must be above 0 and finite, got 0.0"),
        (["--learning-rate", "nan"], "--learning-rate must be above 0 and finite, got nan"),
        (["--learning-rate", "fast"], "--learning-rate must be float, got 'fast'"),
        (["--max-steps", "1.5"], "--max-steps must be int, got '1.5'"),
        (["--num-generations", "1"], "--num-generations must be at least 2, got 1"),
        (["--gradient-steps", "3"], "--gradient-steps must divide --prompts-per-step, got 3"),
        (["--key-heads", "3"], "--key-heads must divide --heads, got 3, with --heads 4"),
        (["--head-size", "7"], "--head-size must be even, got 7"),
        (["--credit-horizon", "50", "10"], "--credit-horizon[1] must be at least 50, got 10"),
        (["--credit-span-rows", "100"], "--credit-span-rows must be a multiple of 64, or None for all rows, got 100"),
        (["--credit-horizon", "1", "2", "3"], "--credit-horizon must be (lo, hi) in tokens"),
        (["--credit-groups-every", "0"], "--credit-groups-every must be at least 1, got 0"),
        (
            ["--preset", "countdown-smoke", "--credit-groups-every", "3"],
            "--credit-group-by must be batch where groups serve later steps, got 'sequence'",
        ),
        (["--seeds", "1", "1"], "--seeds must be different numbers, at least one, got (1, 1)"),
        (["--seeds", "18446688743710"], "--seeds must be at most 2147483647, got (18446688743710,)"),
        (["--credit-window", "999"], "--credit-window must be between 1 and 256, got 999"),
        (["--credit-layers", "some"], '--credit-layers must be "all", an int or a list of layer indices'),
        (["--credit-tau-waad", "low"], "--credit-tau-waad must be a float"),
        (["--model", "m", "--layers", "3"], "--layers would have no effect: --model names a trained model"),
        (["--model", "m", "--sft-steps", "1"], "--sft-steps would have no effect: --model names a trained model"),
        (["--train-data", "tinyzero", "--model", "m", "--largest", "9"], "--largest would have no effect"),
        (["--vllm-gpu-memory-utilization", "0.3"], "would have no effect: the answers do not come from --engine vllm"),
        (
            ["--engine", "vllm", "--model", "m", "--rollout-batch-size", "8"],
            "--rollout-batch-size would have no effect",
        ),
        (["--vllm-importance-sampling-cap", "3"], "--vllm-importance-sampling-cap would have no effect"),
        (
            ["--credit", "none", "--credit-amplification", "2"],
            "--credit-amplification would have no effect: --credit none selects no token",
        ),
        (["--credit", "local", "--credit-shared-fraction", "0.3"], "--credit-shared-fraction would have no effect"),
        (["--preset", "countdown-huge"], "--preset must be one of"),
        (["--resume", "nowhere"], "--resume must be a run's folder, got 'nowhere'"),
        (["--resume", "nowhere", "--max-steps", "3"], "but also got --max-steps"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_values_are_refused_by_name(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(flags)
    assert main(flags) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_python_callers_get_the_same_errors():
    with pytest.raises(ValueError, match=re.escape("--epsilon must be above 0 and finite, got -0.2")):
        Config().change(epsilon=-0.2)
    with pytest.raises(ValueError, match=re.escape("--credit-largest must be a bool, got int: 1")):
        Config().change(credit_largest=1)
    with pytest.raises(ValueError, match=re.escape("no such flag: --epsilom")):
        Config().change(epsilom=0.2)


def test_flags_reach_their_fields():
    config, folder = parse(["--max-steps", "7", "--seeds", "3", "4", "--no-credit-largest", "--beta", "1"])
    assert (config.grpo.max_steps, config.run.seeds, config.credit.largest) == (7, (3, 4), False)
    assert config.grpo.beta == 1.0 and folder is None
    assert config.preset == "countdown-tiny"


@pytest.mark.parametrize("preset", PRESETS)
def test_configuration_comes_back_from_json(preset):
    config = load_preset(preset)
    assert Config.from_json(config.to_json()) == config


def test_no_field_name_occurs_twice():
    names = [name for _, group in Config().groups() for name in settings_of(group)]
    assert len(names) == len(set(names))


def test_every_flag_is_read():
    code = "".join(path.read_text() for path in SOURCES.rglob("*.py") if path.name != "config.py")
    code += (SOURCES / "samples.html.jinja").read_text()
    code += Path(options.__file__).read_text()
    unread = [
        flag_name(name)
        for _, group in Config().groups()
        for name, f in settings_of(group).items()
        if not re.search(rf'\.{f.name}\b|"{f.name}"', code)
    ]
    assert not unread


def without_torch(module: str, *flags: str) -> subprocess.CompletedProcess:
    program = f"import sys; sys.modules['torch'] = None; from train.{module} import main; sys.exit(main({flags!r}))"
    return subprocess.run([sys.executable, "-c", program], cwd=SOURCES.parent, capture_output=True, text=True)


@pytest.mark.parametrize("module, flag", [("__main__", "--credit"), ("evaluate", "--eval-data")])
def test_help_needs_no_torch(module, flag):
    done = without_torch(module, "--help")
    assert done.returncode == 0 and flag in done.stdout


@pytest.mark.parametrize("module, flags", [("__main__", ()), ("evaluate", ("m", "--eval-data", "aime24"))])
def test_a_missing_package_is_told_in_one_line(module, flags):
    done = without_torch(module, *flags)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "pip install torch" in done.stderr
