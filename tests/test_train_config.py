"""Flags: every one is read, and a bad value is refused by name, with what arrived, before anything runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import train
from rhythm_kernels import options
from train.__main__ import main
from train.config import BadSetting, Config, flag_name, settings_of
from train.flags import parse
from train.presets import KINDS, PRESETS, load_preset

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
        (["--eval-temperature", "-1"], "--eval-temperature must be at least 0, got -1.0"),
        (["--eval-temperature", "cold"], "--eval-temperature must be float, got 'cold'"),
        (
            ["--engine", "vllm", "--model", "m", "--eval-temperature", "0.001"],
            "--eval-temperature must be at least 0.01, got 0.001",
        ),
        (["--temperature", "1e-45"], "--temperature must be at least 0.01, got 1e-45"),
        (["--epsilon-high", "1e300"], "--epsilon-high must be at most 1000000.0, got 1e+300"),
        (["--reward-timeout", "1e10"], "--reward-timeout must be at most 86400.0, got 10000000000.0"),
        (["--sft-learning-rate", "1e300"], "--sft-learning-rate must be at most 1.0, got 1e+300"),
        (["--engine", "vllm", "--model", "m", "--temperature", "0.001"], "--temperature must be at least 0.01, got"),
        (["--adam-beta2", "1"], "--adam-beta2 must be below 1, got 1.0"),
        (["--peak-weight", "0"], "--peak-weight must be above 0 and finite, got 0.0"),
        (["--credit-delta", "rise"], "--credit-delta must be one of absolute, drop, got 'rise'"),
        (
            ["--credit-preplan-fraction", "2"],
            "--credit-preplan-fraction must be finite and between 0.0 and 1.0, got 2.0",
        ),
        (
            ["--credit", "global", "--credit-delta", "drop"],
            "--credit-delta would have no effect: only --credit local and",
        ),
        (
            ["--credit-tau-delta", "1", "--credit-preplan-fraction", "0.3"],
            "--credit-preplan-fraction would have no effect: only --credit local reads it, and coupled without",
        ),
        (
            ["--credit", "local", "--credit-top-fraction", "0.3", "--credit-preplan-fraction", "0.3"],
            "--credit-top-fraction would have no effect: with --credit local --credit-preplan-fraction takes its place",
        ),
        (
            ["--credit-local-fraction", "0"],
            "--credit-local-fraction must be above 0, so that coupled credit reads",
        ),
        (["--credit", "global", "--credit-global-fraction", "0"], "--credit-global-fraction must be above 0, so that"),
        (["--preset", "countdown-huge"], "--preset must be one of"),
        (["--preset", ""], "--preset must be one of"),
        (["--resume", "nowhere"], "--resume must be a run's folder, got 'nowhere'"),
        (["--resume", "nowhere", "--preset", "countdown-tiny"], "but also got --preset countdown-tiny"),
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
    taus = ["--credit-tau-waad", "2.5", "--credit-tau-delta", "0.25", "--credit-delta", "drop"]
    credit = parse([*taus, "--credit-shared-fraction", "0.3"])[0].credit
    assert (credit.tau_waad, credit.tau_delta, credit.delta, credit.shared_fraction) == (2.5, 0.25, "drop", 0.3)
    assert parse(["--credit", "local", "--credit-preplan-fraction", "0.3"])[0].credit.preplan_fraction == 0.3
    assert parse(["--engine", "vllm", "--model", "m", "--eval-temperature", "0"])[0].rollout.eval_temperature == 0
    config, folder = parse(["--max-steps", "7", "--seeds", "3", "4", "--no-credit-largest", "--beta", "1"])
    assert (config.grpo.max_steps, config.run.seeds, config.credit.largest) == (7, (3, 4), False)
    assert config.grpo.beta == 1.0 and folder is None
    assert config.preset == "countdown-tiny"


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", '"x"', "null", "{}", '{"preset": 1}', '{"preset": "countdown-tiny"}', "[" * 100_000],
    ids=lambda text: text[:30],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BadSetting, match="config.json is no configuration of a run: "):
        Config.load(tmp_path / "config.json")


@pytest.mark.parametrize("preset", PRESETS)
def test_configuration_comes_back_from_json(preset):
    config = load_preset(preset)
    assert Config.from_json(config.to_json()) == config


PAPER = {  # section 5.3.1
    "dtype": "bfloat16",
    "prompts_per_step": 64,
    "num_generations": 8,
    "gradient_steps": 16,
    "temperature": 1.0,
    "learning_rate": 1e-6,
    "warmup_steps": 0,
    "final_learning_rate": 1.0,
    "beta": 0.0,
    "loss_type": "grpo",
    "credit": "coupled",
    "credit_top_fraction": 0.4,
    "credit_amplification": 1.5,
    "credit_max_lookback": 3,
    "credit_largest": True,
    "credit_delta": "absolute",
    "credit_preplan_fraction": None,
    "credit_window": 10,
    "credit_horizon": (10, 50),
    "credit_layers": 5,
    "credit_span_rows": None,
}
OF_4B, OF_8B = ({"model": f"Qwen/Qwen3-{size}B-Base", "max_steps": steps} for size, steps in ((4, 500), (8, 600)))
MATHS = {"train_data": "dapo-math", "max_completion_length": 1024}
BOTTOM, LONG = {"credit_largest": False}, {"max_completion_length": 8192}
OF_THE_PAPER = {
    "countdown-4b": {**OF_4B, "train_data": "countdown", "max_completion_length": 1024},
    "crossthink-qa-8b": {**OF_8B, "train_data": "crossthink-qa", "max_completion_length": 1024},
    "maths-4b-1k": {**OF_4B, **MATHS},
    "maths-8b-1k": {**OF_8B, **MATHS},
    "maths-4b-8k": {**OF_4B, **MATHS, **LONG},
}
ABLATIONS = {
    **{f"ablation-bottom-{credit}": {"credit": credit, **BOTTOM} for credit in ("global", "local", "coupled")},
    **{f"ablation-top-{percent}": {"credit_top_fraction": percent / 100} for percent in (20, 40, 60, 80, 100)},
}
BEYOND = {
    "beyond-countdown-8b": {**OF_THE_PAPER["countdown-4b"], **OF_8B},
    "beyond-crossthink-qa-4b": {**OF_THE_PAPER["crossthink-qa-8b"], **OF_4B},
    "beyond-maths-8b-8k": {**OF_8B, **MATHS, **LONG},
}


def test_presets_are_the_papers_runs_its_ablations_and_what_lies_beyond(capsys):
    """Each has the paper's settings, and in an ablation what it changes; nothing else differs among them."""
    runs = {**OF_THE_PAPER, **{name: {**OF_8B, **MATHS, **changes} for name, changes in ABLATIONS.items()}, **BEYOND}
    assert {kind: set(names) for kind, names in KINDS.items()} == {
        "tiny": {"countdown-tiny", "countdown-study", "countdown-smoke"},
        "the paper's runs": set(OF_THE_PAPER),
        "the paper's ablations": set(ABLATIONS),
        "beyond the paper": set(BEYOND),
    }
    others = []
    for name, changes in runs.items():
        flat, expected = load_preset(name).flat(), {**PAPER, **changes}
        assert {setting: flat[setting] for setting in expected} == expected, name
        for setting in (*PAPER, *OF_8B, *MATHS, "max_prompt_length", "vllm_gpu_memory_utilization"):
            del flat[setting]
        others.append(flat)
    assert all(other == others[0] for other in others)
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    ablations = ", ".join(KINDS["the paper's ablations"])
    assert f"the paper's ablations: {ablations}; beyond the paper: beyond-countdown-8b" in shown


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


@pytest.mark.parametrize("file", ["docs/how-to/train.md", "docs/paper.md", "train/loop.py"])
def test_the_ranks_of_a_documented_command_can_share_its_preset(file):
    text = (Path(__file__).parent.parent / file).read_text(encoding="utf-8")
    commands = re.findall(r"--nproc-per-node (\d+) -m train --preset ([\w-]+)", text)
    assert commands
    for ranks, preset in commands:
        config = load_preset(preset)
        assert config.rollout.prompts_per_step % (config.grpo.gradient_steps * int(ranks)) == 0, (ranks, preset)


def parameters_of(hidden: int, mlp: int, embeddings: int) -> int:
    """Returns the number of parameters of a Qwen3 with 36 layers, and 32 query and 8 key heads of 128 channels."""
    attention = 2 * hidden * (32 + 8) * 128 + 2 * 128  # q and o, k and v, and the norms of a head
    layer = attention + 3 * hidden * mlp + 2 * hidden
    return embeddings * 151_936 * hidden + 36 * layer + hidden


def test_the_documented_memory_is_that_of_the_presets():
    """Bytes a parameter: 12 in rollouts, 16 in updates, 14 on the disk; and vLLM's share of 85 GB."""
    page = " ".join((Path(__file__).parent.parent / "docs/how-to/train.md").read_text(encoding="utf-8").split())
    shapes = {"4B": (2560, 9728, 1), "8B": (4096, 12288, 2)}  # the 4B model ties its embeddings
    presets = {"4B": ("maths-4b-1k", "maths-4b-8k"), "8B": ("maths-8b-1k", "beyond-maths-8b-8k")}
    card = 85.0

    def cell(gigabytes: float) -> str:
        return f"{gigabytes:.0f}" + (": too much" if gigabytes > card else "")

    for size, shape in shapes.items():
        billions = parameters_of(*shape) / 1e9
        shares = [load_preset(name).rollout.vllm_gpu_memory_utilization for name in presets[size]]
        for ranks in (1, 2, 4, 8):
            rollouts = [cell(12 * billions / ranks + share * card) for share in shares]
            first = f"Qwen3-{size}, {billions:.2f} billion parameters |" if ranks == 1 else "| |"
            assert f"{first} {ranks} | {' | '.join(rollouts)} | {cell(16 * billions / ranks)} |" in page
        assert f"{14 * billions:.0f} GB for the {size} model" in page and f"{3 * 14 * billions:.0f} GB" in page
        least = 12 * billions / (1 if size == "4B" else 2) + 0.35 * card
        assert f"{size} model take {least:.0f} GB on one" in page or f"{size} model {least:.0f} GB on two" in page
