"""RhythmGRPOConfig: its fields, flags and files; and the example script, which is made of them."""

import json
import runpy
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from train.presets import load_preset

pytest.importorskip("trl", reason="TRL is not installed", exc_type=ImportError)
from trl import GRPOConfig, GRPOTrainer, TrlParser
from trl_cases import make_config, make_model, reward

from rhythm_kernels.integrations.trl import RhythmGRPOConfig, RhythmGRPOTrainer, check_trl
from rhythm_kernels.options import CreditOptions

EXAMPLE = Path(__file__).parent.parent / "examples" / "trl_countdown.py"

pytestmark = pytest.mark.xdist_group("trl")


# ---- fields, flags, files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"credit": "couple"}, "credit must be one of"),
        ({"credit_top_fraction": 1.5}, "credit_top_fraction must be .*, got 1.5"),
        ({"credit_amplification": -1.0}, "credit_amplification must be"),
        ({"credit_shared_fraction": 2.0}, "credit_shared_fraction must be"),
        ({"credit_max_lookback": 0}, "credit_max_lookback must be"),
        ({"credit_preplan_fraction": 1.5}, "credit_preplan_fraction must be .*, got 1.5"),
        ({"credit_delta": "rise"}, "credit_delta must be one of absolute, drop, got 'rise'"),
        ({"credit_layers": 0}, "credit_layers must be at least 1, got 0"),
        ({"credit_layers": []}, "credit_layers must be"),
        ({"credit_window": 0}, "credit_window must be"),
        ({"credit_span_rows": 100}, "credit_span_rows must be a multiple of 64"),
        ({"credit_horizon": [9, 3]}, r"credit_horizon\[1\] must be"),
        (
            {"credit_local_fraction": 0.6, "credit_global_fraction": 0.6},
            "credit_local_fraction and credit_global_fraction must",
        ),
        ({"credit_group_by": "token"}, "credit_group_by must be"),
        ({"credit_groups_every": 0}, "credit_groups_every must be"),
        ({"credit_seed": -1}, "credit_seed must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_options_name_their_field(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **changes)


def test_a_wrong_type_names_its_field(tmp_path):
    with pytest.raises(TypeError, match="credit_horizon must be"):
        make_config(tmp_path, credit_horizon=[1, 2, 3])
    with pytest.raises(TypeError, match="credit_top_fraction must be a float"):
        make_config(tmp_path, credit_top_fraction="0.4")


def test_options_from_a_command_line(tmp_path):
    line = [
        "--output_dir",
        str(tmp_path),
        "--use_cpu",
        "--bf16",
        "False",
        "--credit",
        "global",
        "--credit_top_fraction",
        "0.2",
    ]
    line += ["--credit_preplan_fraction", "0.3", "--credit_delta", "drop"]
    line += ["--no_credit_largest", "--credit_horizon", "4", "--credit_layers", "1", "2", "--credit_span_rows", "none"]
    (config,) = TrlParser(RhythmGRPOConfig).parse_args_and_config(line)
    options = config.credit_options
    assert (options.strategy, options.top_fraction, options.largest) == ("global", 0.2, False)
    assert (options.preplan_fraction, options.delta) == (0.3, "drop")
    assert options.horizon == (4, None) and options.layers == (1, 2) and options.span_rows is None
    (config,) = TrlParser(RhythmGRPOConfig).parse_args_and_config(line[:5])
    assert config.credit_options == CreditOptions()  # the same defaults
    json.dumps(config.to_dict())


def test_options_survive_to_dict_and_yaml(tmp_path):
    options = {"credit": "coupled", "credit_tau_waad": 3.5, "credit_tau_delta": 0.25, "credit_largest": False}
    options |= {
        "credit_preplan_fraction": 0.3,
        "credit_delta": "drop",
        "credit_layers": [1, -1],
        "credit_horizon": [4, None],
        "credit_group_by": "batch",
        "credit_span_rows": 128,
    }
    config = make_config(tmp_path, **options)
    saved = json.loads(json.dumps(config.to_dict()))
    credit = {name: value for name, value in saved.items() if name.startswith("credit")}
    assert make_config(tmp_path, **credit).credit_options == config.credit_options
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump(credit | {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}))
    (read,) = TrlParser(RhythmGRPOConfig).parse_args_and_config(["--config", str(settings)])
    assert read.credit_options == config.credit_options
    changed = ["--config", str(settings), "--credit_tau_waad", "2", "--credit_layers", "all"]
    (read,) = TrlParser(RhythmGRPOConfig).parse_args_and_config(changed)
    assert (read.credit_tau_waad, read.credit_layers, read.credit_tau_delta) == (2.0, "all", 0.25)


def test_the_config_must_be_ours(tmp_path):
    config = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match="args must be a RhythmGRPOConfig"):
        RhythmGRPOTrainer(make_model(), reward_funcs=reward, args=config)


def test_other_versions_of_trl_are_refused():
    check_trl("1.16.0", GRPOTrainer)
    for version in ("1.14.0", "1.17.0", "0.20.0"):
        with pytest.raises(ImportError, match=f"needs trl >= 1.8, < 1.17 and not 1.14, got {version}"):
            check_trl(version, GRPOTrainer)

    class Changed(GRPOTrainer):
        def _compute_loss(self, model, batch):
            pass

    with pytest.raises(ImportError, match=r"Changed._compute_loss takes \(self, model, inputs\); in this one, 1.16.0"):
        check_trl("1.16.0", Changed)
    with pytest.raises(ImportError, match="is missing"):
        check_trl("1.16.0", object)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_liger_kernel": True}, "use_liger_kernel must be False before trl 1.14, got True"),
        ({"loss_type": "luspo", "importance_sampling_level": "sequence_token"}, "loss_type must not be luspo before"),
        (
            {"loss_type": "luspo", "importance_sampling_level": "sequence_token", "credit": "none"},
            "loss_type must not be luspo before trl 1.14, whose mean over tokens counts padding",
        ),
    ],
    ids=range(3),
)
def test_losses_of_older_versions_are_refused(tmp_path, monkeypatch, options, message):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.8.0" if name == "trl" else real(name))
    config = make_config(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        RhythmGRPOTrainer(make_model(), reward_funcs=reward, args=config)


# ---- the example -----------------------------------------------------------------------------------------------------

TRIAL = [
    "--use_cpu",
    "--bf16",
    "false",
    "--max_steps",
    "2",
    "--save_steps",
    "2",
    "--problems",
    "8",
    "--num_generations",
    "4",
]
TRIAL += ["--steps_per_generation", "1", "--max_completion_length", "24", "--report_to", "none", "--logging_steps", "1"]
UNDONE = {
    "from rhythm_kernels.integrations.trl import RhythmGRPOConfig, RhythmGRPOTrainer": "from trl import GRPOConfig, "
    "GRPOTrainer",
    "    parser = TrlParser((Options, RhythmGRPOConfig))": "    parser = TrlParser((Options, GRPOConfig))",
    "    trainer = RhythmGRPOTrainer(": "    trainer = GRPOTrainer(",
}


def plain_version(source: str) -> str:
    """Returns the example without rhythm credit, with its changed lines undone."""
    lines = source.splitlines()
    assert sum(line.endswith("  # rhythm") for line in lines) == len(UNDONE) == 3
    return "\n".join(UNDONE[line.removesuffix("  # rhythm")] if line.endswith("  # rhythm") else line for line in lines)


def save_byte_model(folder):
    """Saves a tiny model that reads any text, a byte a token, in a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<eos>", "<pad>", *alphabet])}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    config = make_model().config
    config.vocab_size, config.eos_token_id, config.pad_token_id = len(tokenizer), 0, 1
    config.max_position_embeddings = 1024
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_example(file, model, folder, monkeypatch, *more):
    """Runs the example, and returns the metrics of its steps."""
    monkeypatch.setattr(sys, "argv", [str(file), "--model", str(model), "--output_dir", str(folder), *TRIAL, *more])
    monkeypatch.setattr(sys, "path", [*sys.path])
    runpy.run_path(str(file), run_name="__main__")
    state = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())
    return [record for record in state["log_history"] if "loss" in record]


def test_the_example_and_its_plain_version_run(tmp_path, monkeypatch):
    save_byte_model(tmp_path / "model")
    mine = run_example(EXAMPLE, tmp_path / "model", tmp_path / "run", monkeypatch)
    assert len(mine) == 2 and all(record["rhythm/gamma_mean"] > 1 for record in mine)

    plain = tmp_path / "plain.py"
    plain.write_text(plain_version(EXAMPLE.read_text()))
    assert "rhythm_kernels.integrations" not in plain.read_text() and "Rhythm" not in plain.read_text()
    other = run_example(plain, tmp_path / "model", tmp_path / "plain", monkeypatch)
    assert len(other) == 2 and not any(name.startswith("rhythm/") for name in other[0])
    uncredited = run_example(EXAMPLE, tmp_path / "model", tmp_path / "none", monkeypatch, "--credit", "none")
    assert [record["grad_norm"] for record in uncredited] == [record["grad_norm"] for record in other]


def test_the_defaults_of_the_example_are_the_papers(tmp_path, monkeypatch):
    example = runpy.run_path(str(EXAMPLE))
    paper = RhythmGRPOConfig(**example["DEFAULTS"] | {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False})
    preset = load_preset("countdown-4b")
    rows = 8 * paper.per_device_train_batch_size * paper.gradient_accumulation_steps  # of a step, over eight processes
    assert rows * preset.grpo.gradient_steps == preset.rollout.prompts_per_step * preset.rollout.num_generations
    assert paper.steps_per_generation == preset.grpo.gradient_steps * paper.gradient_accumulation_steps
    assert paper.max_steps == preset.grpo.max_steps * preset.grpo.gradient_steps
    assert (paper.loss_type, paper.learning_rate) == (preset.grpo.loss_type, preset.grpo.learning_rate)
    assert paper.max_completion_length == preset.rollout.max_completion_length
