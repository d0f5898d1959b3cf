"""The example scripts run unchanged, at a tiny size."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ByT5Tokenizer, Qwen3Config, Qwen3ForCausalLM

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(script: str, *args: str, **environment: str) -> str:
    command = [sys.executable, str(EXAMPLES / script), *args]
    settings = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_on_ranks(ranks: int, script: str) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, str(EXAMPLES / script)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("tiny"))


def save_model(folder: Path, **options) -> str:
    """Writes what from_pretrained reads, a random Qwen3 over bytes, and returns its folder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 6, "num_key_value_heads": 2}
    config = Qwen3Config(
        vocab_size=259, num_hidden_layers=6, head_dim=16, eos_token_id=1, pad_token_id=0, **sizes | options
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    return str(folder)


def test_the_plain_loop_credits_tokens_and_learns():
    out = run("plain_loop.py", "--steps", "8", "--new-tokens", "24")
    steps = re.findall(r"^step (\d+)  reward ([\d.]+)  gamma > 1 on (\d+)% of the tokens$", out, re.MULTILINE)
    assert [int(step) for step, *_ in steps] == list(range(1, 9)), out
    rewards = [float(reward) for _, reward, _ in steps]
    assert rewards[-1] > rewards[0] + 0.05  # 0.06 to 0.25 or so
    assert all(30 <= int(share) <= 60 for *_, share in steps)  # top_fraction is 0.4, and the intros are added


def test_the_plain_loop_takes_a_saved_model(tiny):
    assert "step 1  reward 0." in run("plain_loop.py", "--model", tiny, "--steps", "1", "--new-tokens", "12")


def test_two_ranks_share_the_heads():
    out = run_on_ranks(2, "two_ranks.py")
    assert re.search(r"^2 of 4 heads on each of 2 ranks$", out, re.MULTILINE), out
    raised, tokens = map(int, re.search(r"^credit raises (\d+) of (\d+) tokens", out, re.MULTILINE).groups())
    assert tokens == 73 and 0.3 * tokens < raised < 0.7 * tokens


def test_look_at_rhythm_prints_and_draws(tiny, tmp_path):
    picture = tmp_path / "rhythm.png"
    out = run(
        "look_at_rhythm.py", "--model", tiny, "--prompt", "Two pens: ", "--new-tokens", "24", "--out", str(picture)
    )
    assert "local heads look" in out and "\033[48;2;" in out
    for name in ("WAAD", "FAI", "gamma"):
        assert re.search(rf"^{name}, [\d.e-]+ to [\d.e-]+$", out, re.MULTILINE), out
    assert_drawn(picture)


def test_look_at_rhythm_takes_an_answer_and_prints_without_colours(tiny, tmp_path):
    picture, answer = tmp_path / "rhythm.png", "7 pens and $2, so 9."
    out = run("look_at_rhythm.py", "--model", tiny, "--response", answer, "--out", str(picture), NO_COLOR="1")
    assert "\033[" not in out and out.splitlines().count(answer) == 3
    assert_drawn(picture)


def test_prune_cache_answers_from_three_caches(tmp_path):
    sharp = save_model(tmp_path, initializer_range=0.15)  # far from uniform attention, in which all tokens are alike
    prompt = "Two pens cost $3 and a cap costs $4; what do six pens and a cap cost?"
    options = ("--model", sharp, "--prompt", prompt, "--keep", "30", "--window", "8", "--new-tokens", "12")
    out = run("prune_cache.py", *options)
    parts = re.findall(
        r"^--- (.*): (\d+) of (\d+) tokens, mean log-prob of the first answer (-[\d.]+)\n(.*)$", out, re.M
    )
    tokens = len(prompt)  # a token a byte
    assert [part[:3] for part in parts] == [
        ("the whole cache", str(tokens), str(tokens)),
        ("SnapKV", "30", str(tokens)),
        ("at random", "30", str(tokens)),
    ], out
    assert len({part[3] for part in parts}) == 3, "each cache has its own probabilities"

    model, tokenizer = Qwen3ForCausalLM.from_pretrained(sharp).eval(), ByT5Tokenizer.from_pretrained(sharp)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert parts[0][4] == tokenizer.decode(expected[0, tokens:], skip_special_tokens=True).strip()

    other = run("prune_cache.py", *options, "--seed", "1")
    assert out.split("---")[:3] == other.split("---")[:3] and out.split("---")[3] != other.split("---")[3]


def test_prune_cache_names_a_window_that_is_too_large(tiny):
    command = [sys.executable, str(EXAMPLES / "prune_cache.py"), "--model", tiny, "--keep", "8", "--window", "9"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "0 < --window < --keep < tokens of the prompt, got 9, 8 and" in done.stderr


def assert_drawn(picture: Path):
    """Checks that a picture has lines and bars on white."""
    pixels = np.asarray(Image.open(picture).convert("L"))
    assert pixels.shape[0] > 300 and 0.005 < (pixels < 200).mean() < 0.5
