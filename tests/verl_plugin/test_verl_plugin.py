"""The plug-in's loading, and the trainer's side on verl's own methods."""

import importlib
import itertools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import verl_cases as cases
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import trainer_base
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu

import rhythm_kernels.integrations.verl as plugin
import rhythm_kernels.integrations.verl_config as verl_config
import rhythm_kernels.integrations.verl_engines as verl_engines
from rhythm_kernels import Rhythm, reference, shape_advantages, token_credit
from rhythm_kernels.group_schedule import GroupSchedule


def in_a_fresh_process(code: str, **environment: str) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("VERL_")} | environment
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


WRAPPED = """
import verl, sys
assert "verl.trainer.ppo.v1.trainer_base" not in sys.modules and "verl.workers" not in sys.modules
from verl.utils.config import validate_config
print(hasattr(validate_config, "__wrapped__"))
"""


@pytest.mark.parametrize(
    "environment, wrapped",
    [
        ({}, True),  # the entry point
        ({"VERL_USE_EXTERNAL_PLUGINS": "none"}, False),
        ({"VERL_USE_EXTERNAL_PLUGINS": "none", "VERL_USE_EXTERNAL_MODULES": "rhythm_kernels.integrations.verl"}, True),
    ],
    ids=["entry point", "switched off", "external module"],
)
def test_verl_loads_it(environment, wrapped):
    assert in_a_fresh_process(WRAPPED, **environment).split()[-1] == str(wrapped)


def test_every_place_is_wrapped_once():
    for module, paths in plugin.WRAPPED.items():
        for path in paths:
            found = importlib.import_module(module)
            for name in path.split("."):
                found = getattr(found, name)
            wrappers = (vars(plugin), vars(verl_engines))
            assert any(found.__globals__ is one for one in wrappers), path
            assert not any(found.__wrapped__.__globals__ is one for one in wrappers), path
    assert not verl_config.missing


class Store:
    """verl's transfer queue in this process, as far as the trainer's methods call it."""

    def __init__(self, fields: dict, keys: list[str]):
        self.fields, self.keys = fields, keys

    def kv_batch_get(self, keys, partition_id, select_fields):
        places = [self.keys.index(key) for key in keys]
        fields = {name: self.fields[name] for name in select_fields if name in self.fields}
        return tu.get_tensordict({name: rows_of(field, places) for name, field in fields.items()})

    def kv_batch_put(self, keys, partition_id, fields):
        for name, field in fields.items():
            rows = dict(zip(self.keys, self.fields[name].unbind())) if name in self.fields else {}
            rows |= zip(keys, field.unbind(), strict=True)
            self.fields[name] = cases.nested(rows[key] for key in self.keys)
        return KVBatchMeta(keys=keys, tags=[{}] * len(keys), partition_id=partition_id)


def rows_of(field: torch.Tensor | list, places: list[int]) -> torch.Tensor | list:
    if isinstance(field, list):
        return [field[place] for place in places]
    rows = field.unbind()
    return cases.nested(rows[place] for place in places)


class Workers:
    """The actor's worker group: verl's FSDP engine in this process, fed as the tqbridge feeds it."""

    def __init__(self, engine, store: Store):
        self.engine, self.store = engine, store

    def compute_log_prob(self, batch: KVBatchMeta) -> KVBatchMeta:
        fields = {name: value for name, value in self.store.fields.items() if isinstance(value, torch.Tensor)}
        self.store.fields |= cases.log_prob_pass(self.engine, cases.make_batch(fields, **batch.extra_info))
        return batch


UIDS = ["a", "a", "a", "b", "b", "b"]
SCORES = [1.0, 0.0, 0.5, 0.0, 1.0, 1.0]


@pytest.fixture
def run(model_folder, monkeypatch):
    """Returns a function that gives (trainer, store, batch) at the start of a step, from options of the block."""
    engine = cases.make_engine(model_folder)

    def start(*overrides):
        fields = cases.make_fields()
        scores = [torch.zeros(len(row)) for row in fields["responses"].unbind()]
        for row, score in zip(scores, SCORES):
            row[-1] = score
        fields["rm_scores"] = cases.nested(scores)
        fields["rollout_log_probs"] = cases.nested(-torch.rand(len(row)) for row in scores)
        keys = [f"{uid}_{place}_0" for place, uid in enumerate(UIDS)]
        store = Store(fields | {"uid": UIDS}, keys)
        monkeypatch.setattr(trainer_base, "tq", store)
        monkeypatch.setitem(sys.modules, "transfer_queue", store)
        trainer = object.__new__(PPOTrainerSync)
        trainer.config = cases.composed(*overrides)
        trainer.actor_rollout_wg, trainer.ref_in_actor = Workers(engine, store), True
        trainer.global_steps = 1
        return trainer, store, KVBatchMeta(keys=keys, tags=[{}] * len(keys), partition_id="train")

    return start


def padded(nested: torch.Tensor) -> torch.Tensor:
    return torch.nested.to_padded_tensor(nested, 0)


def response_part(nested: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return padded(cases.nested(row[-len(part) :] for row, part in zip(nested.unbind(), mask.unbind())))


def grpo(mask: torch.Tensor) -> torch.Tensor:
    scores = torch.tensor(SCORES).view(2, 3)
    normal = (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-6)
    return normal.flatten()[:, None] * mask


@pytest.mark.parametrize("strategy", ["none", "random", "entropy", "local", "global", "coupled"])
def test_advantages_of_a_step(run, model_folder, strategy):
    trainer, store, batch = run(f"+rhythm.strategy={strategy}", "+rhythm.top_fraction=0.3")
    metrics = {}
    batch = trainer._compute_old_log_prob(batch, metrics)
    batch = trainer._compute_advantage(batch, metrics)

    mask = padded(store.fields["response_mask"]).bool()
    rhythm = None
    if strategy in ("local", "global", "coupled"):
        cases.assert_rhythm(store.fields, model_folder, store.fields)
        rhythm = Rhythm(*(response_part(store.fields[name], store.fields["response_mask"]) for name in plugin.SIGNALS))
    entropy, step = padded(store.fields["entropy"]), trainer.global_steps
    gamma = token_credit(strategy, mask, rhythm, entropy=entropy, top_fraction=0.3, seed=step)
    torch.testing.assert_close(padded(store.fields["advantages"]), shape_advantages(grpo(mask), gamma))
    assert metrics["rhythm/gamma_mean"] == pytest.approx(gamma[mask].mean().item())
    assert metrics["rhythm/credited_share"] == pytest.approx((gamma[mask] != 1).double().mean().item())
    assert ("rhythm/waad_mean" in metrics) == ("rhythm/preplan_rises" in metrics) == (rhythm is not None)
    if rhythm is not None:
        preplan = reference.preplan(rhythm.waad, mask, 0.3)
        rises = (reference.rises(rhythm.waad, mask) & preplan).sum() / preplan.sum()
        assert 0 < metrics["rhythm/preplan_rises"] == pytest.approx(rises.item())
    assert all(isinstance(value, float) for name, value in metrics.items() if name.startswith("rhythm/"))


def test_rows_that_are_dropped_and_reordered_after_the_pass_keep_their_credit(run):
    """A row's key leads to its signals and its advantages. No part of verl 0.9.1 does this between the two."""
    trainer, store, batch = run("+rhythm.strategy=coupled")
    batch = trainer._compute_old_log_prob(batch, {})
    trainer._compute_advantage(batch, {})
    wanted = store.fields["advantages"].unbind()
    trainer._compute_advantage(KVBatchMeta(keys=[batch.keys[row] for row in (5, 3, 4)], tags=[{}] * 3), {})
    found = store.fields["advantages"].unbind()
    assert any((row > 1.4 * row[row > 0].min()).any() for row in found[3:] if (row > 0).any())  # some are credited
    for row in (3, 4, 5):
        assert found[row] is not wanted[row]
        torch.testing.assert_close(found[row], wanted[row])


def test_thresholds_of_the_block_reach_the_credit(run):
    credits = []
    for thresholds in ({}, {"tau_waad": 1e6, "tau_delta": 0.0}, {"delta": "drop", "preplan_fraction": 0.05}):
        overrides = [f"+rhythm.{name}={value}" for name, value in thresholds.items()]
        trainer, store, batch = run("+rhythm.strategy=coupled", "+rhythm.top_fraction=0.3", *overrides)
        trainer._compute_advantage(trainer._compute_old_log_prob(batch, {}), {})
        mask = store.fields["response_mask"]
        rhythm = Rhythm(*(response_part(store.fields[name], mask) for name in plugin.SIGNALS))
        gamma = token_credit("coupled", padded(mask).bool(), rhythm, top_fraction=0.3, **thresholds)
        torch.testing.assert_close(padded(store.fields["advantages"]), shape_advantages(grpo(padded(mask)), gamma))
        credits.append(gamma)
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(credits, 2))


def test_without_a_block_verl_is_as_it_was(run, monkeypatch):
    monkeypatch.setattr(plugin, "shape_advantages", None)
    trainer, store, batch = run()
    metrics = {}
    batch = trainer._compute_advantage(trainer._compute_old_log_prob(batch, metrics), metrics)
    assert not [name for name in (*store.fields, *metrics) if "rhythm" in name]
    mask = padded(store.fields["response_mask"])
    torch.testing.assert_close(padded(store.fields["advantages"]), grpo(mask))


def test_tokens_that_verl_rejects_are_not_credited(run):
    """Rollout correction takes tokens out of the response mask, after the statistics were read."""
    limit = "algorithm.rollout_correction.rollout_rs_threshold='0.3_3'"
    trainer, store, batch = run("+rhythm.strategy=global", "algorithm.rollout_correction.rollout_rs=token_k1", limit)
    before = padded(store.fields["response_mask"]).bool()
    trainer._compute_advantage(trainer._compute_old_log_prob(batch, {}), {})
    mask = padded(store.fields["response_mask"]).bool()
    assert mask.sum() < before.sum()
    rhythm = Rhythm(fai=response_part(store.fields["rhythm_fai"], store.fields["response_mask"]))
    gamma = token_credit("global", mask, rhythm)
    advantages = padded(store.fields["advantages"])
    assert torch.equal(advantages[~mask], torch.zeros_like(advantages[~mask]))
    positive = mask & (advantages > 0)
    ratio = advantages / torch.where(positive, advantages / gamma, 1)
    torch.testing.assert_close(ratio[positive], gamma[positive])


def test_the_references_pass_is_not_read(run):
    """LoRA makes it a call of the same method of the same workers."""
    trainer, store, asked = run("+rhythm.strategy=coupled")
    returned = trainer._compute_old_log_prob(asked, {})
    for name in plugin.SIGNALS:
        del store.fields[name]
    for batch in (asked, returned):
        trainer._compute_ref_log_prob(batch, {})
        assert "ref_log_prob" in store.fields and "rhythm_waad" not in store.fields


def test_a_pass_that_fails_leaves_no_request(run, monkeypatch):
    trainer, _, batch = run("+rhythm.strategy=coupled")
    monkeypatch.setattr(trainer.actor_rollout_wg, "compute_log_prob", lambda batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer._compute_old_log_prob(batch, {})
    assert plugin.BLOCK not in batch.extra_info


def test_workers_without_the_plugin(run, monkeypatch):
    trainer, _, batch = run("+rhythm.strategy=coupled")
    engine = type(trainer.actor_rollout_wg.engine)
    monkeypatch.setattr(engine, "forward_step", engine.forward_step.__wrapped__)
    with pytest.raises(RuntimeError, match="no rhythm_spans: the plug-in must be installed where"):
        trainer._compute_old_log_prob(batch, {})


def test_head_groups_that_serve_two_steps(run, model_folder):
    trainer, store, batch = run("+rhythm.strategy=coupled", "+rhythm.groups_every=2")
    metrics = {}
    trainer._compute_old_log_prob(batch, metrics)
    spans = torch.stack(store.fields.pop("rhythm_spans").unbind())
    tokens = torch.tensor([int(mask.sum()) for mask in store.fields["response_mask"].unbind()])
    pooled = GroupSchedule(2)
    pooled.add(spans[:, None], tokens)
    pooled.advance()

    trainer._compute_old_log_prob(batch, metrics)
    assert "rhythm_spans" not in store.fields
    cases.assert_rhythm(store.fields, model_folder, store.fields, groups=pooled.groups)
    assert "rhythm/groups_spearman" not in metrics

    trainer._compute_old_log_prob(batch, metrics)  # ranks again: the same weights, the same groups
    assert metrics["rhythm/groups_spearman"] == pytest.approx(1)
    assert metrics["rhythm/groups_local_overlap"] == metrics["rhythm/groups_global_overlap"] == 1


def test_padding_rows_of_verl_do_not_count():
    credit = plugin.TrainerCredit(verl_config.make_options({"groups_every": 2}), {})
    spans = torch.rand(3, 30)
    spans[2] = float("nan")
    credit.end_pass(spans, torch.tensor([4, 2, 0]))
    wanted = (spans[0] * 4 + spans[1] * 2) / 6
    torch.testing.assert_close(credit.schedule.state_dict()["spans"], wanted[None])


def test_random_draws_differ_from_step_to_step():
    credit = plugin.TrainerCredit(verl_config.make_options({"strategy": "random"}), {})
    mask = torch.ones(2, 50, dtype=torch.bool)
    first, second, again = (credit.shape(torch.ones(2, 50), mask, {}, step)[0] for step in (1, 2, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, again), "a resumed run draws at a step what a whole run draws there"


def test_it_says_once_that_it_is_on(capsys, monkeypatch):
    monkeypatch.setattr(verl_engines, "_said", set())
    for _ in range(2):
        plugin.credit_of(SimpleNamespace(config=cases.composed("+rhythm.strategy=local")))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith(
        "[rhythm_kernels] rhythm credit is on: strategy local, top_fraction 0.4"
    )
    assert lines[0].endswith("groups_every 1, seed 0")


@pytest.mark.parametrize(
    ("overrides", "shared"),
    [
        (
            ["actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=4"],
            "4 ranks share each sequence (Ulysses)",
        ),
        (
            [
                "model_engine=megatron",
                "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=4",
                "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=2",
            ],
            "8 ranks share each sequence (tensor 4, pipeline 2)",
        ),
    ],
)
def test_it_says_what_is_shared(capsys, monkeypatch, overrides, shared):
    monkeypatch.setattr(verl_engines, "_said", set())
    plugin.credit_of(SimpleNamespace(config=cases.composed("+rhythm.strategy=local", *overrides)))
    assert capsys.readouterr().out.endswith(f"; {shared}\n")
