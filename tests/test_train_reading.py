"""A batch with a single optimizer step is read in the loss's own forward: what it learns and logs is that of a pass."""

import pytest
import torch
from train_cases import ALONE, all_micros, make_batch, make_policy, on_device, settings
from transformers import AttentionInterface

from benchmarks.pretended_cuda import counted, pretended_cuda
from rhythm_kernels import GroupSchedule, shape_advantages
from rhythm_kernels.listen.collector import Collector
from train.attention import packed_attention
from train.batch import micro_batches
from train.distributed import World
from train.loading import activation_checkpointing
from train.loss import Groups
from train.metrics import rollout_metrics
from train.reading import Reader, read_batch, read_log_probs
from train.update import answers_run, update_policy

SPREAD = torch.tensor([1.0, 0, 0, 1, 0, 0.5, 0, 0, 1, 0, 0, 0])
EQUAL = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0])  # the answers to the second problem have no advantage


@pytest.fixture(scope="module")
def batch():
    return make_batch(make_policy())


class Recorder(torch.optim.SGD):
    """Keeps the gradient and changes nothing."""

    def __init__(self, policy):
        super().__init__(policy.parameters(), lr=0.0)
        self.policy, self.taken = policy, []

    def step(self):
        self.taken += [parameter.grad.clone() for parameter in self.policy.parameters()]


def step(policy, batch, rewards, config, schedule, *, before: bool):
    """(gradient, metrics, tokens, gamma) of a step whose batch is read before the update, or where it may be read."""
    grpo, read_as = config.grpo, config.change(gradient_steps=3) if before else config
    groups = Groups.of(rewards, 4, 4, ALONE)
    advantages = groups.advantages(grpo.scale_rewards)[batch.sequence_of]
    reader = Reader(policy, batch, read_as, schedule, draw=3)
    rows = reader.rows_before(answers_run(batch, advantages, grpo))
    reader.read(micro_batches(batch, rows, grpo.micro_batch_tokens, ALONE))
    assert reader.credits_in_loss is not before
    if before:
        advantages = shape_advantages(advantages[None], reader.credit()[None])[0]
    reference = read_log_probs(make_policy(temperature=0.5), batch, all_micros(batch)) if grpo.beta else None
    recorder = Recorder(policy)
    metrics = update_policy(policy, recorder, batch, reader, advantages, config, ALONE, reference)
    tokens, gamma = reader.finish(), reader.credit()
    metrics |= rollout_metrics(batch, groups, tokens, gamma, config.credit, ALONE)
    return recorder.taken, metrics, tokens, gamma


def both_ways(policy, batch, rewards, schedules=(GroupSchedule, GroupSchedule), **changes):
    config = settings(**{"gradient_steps": 1, "credit": "coupled"} | changes)
    return (step(policy, batch, rewards, config, make(), before=b) for make, b in zip(schedules, (True, False)))


@pytest.mark.parametrize("credit", ["local", "global", "coupled", "entropy"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_the_same_operations_give_the_same_bits(batch, credit, loss_type):
    """One micro-batch of all answers: gradients, metrics, log-probs, rhythm, gamma and spans are equal to the bit."""
    schedules = [GroupSchedule(), GroupSchedule()]
    make = [lambda schedule=schedule: schedule for schedule in schedules]
    changes = {"credit": credit, "loss_type": loss_type, "micro_batch_tokens": 10_000}
    before, inside = both_ways(make_policy(), batch, SPREAD, make, **changes)
    assert all(map(torch.equal, inside[0], before[0])) and any(gradient.any() for gradient in inside[0])
    assert inside[1] == before[1]
    assert inside[2].log_probs.equal(before[2].log_probs) and inside[2].entropy.equal(before[2].entropy)
    assert inside[3].equal(before[3]) and (inside[3] != 1).any()
    if credit != "entropy":
        assert inside[2].rhythm.waad.equal(before[2].rhythm.waad) and inside[2].rhythm.fai.equal(before[2].rhythm.fai)
        spans = [schedule.state_dict()["spans"] for schedule in schedules]
        assert spans[0].equal(spans[1])


def assert_near(inside, before):
    for got, want in zip(inside[0], before[0], strict=True):
        assert torch.allclose(got, want, atol=1e-5 * want.abs().max().item() + 1e-7)
    assert inside[1] == pytest.approx(before[1], rel=1e-4, abs=1e-5)
    assert inside[3].equal(before[3])
    torch.testing.assert_close(inside[2].rhythm.waad, before[2].rhythm.waad, rtol=0, atol=1e-4)
    torch.testing.assert_close(inside[2].rhythm.fai, before[2].rhythm.fai, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 60])
@pytest.mark.parametrize("attention", ["packed", "sdpa", "eager"])
def test_micro_batches_change_only_the_rounding(batch, tokens, attention):
    before, inside = both_ways(make_policy(attention), batch, SPREAD, micro_batch_tokens=tokens)
    assert_near(inside, before)


@pytest.mark.parametrize(
    "changes",
    [
        {"beta": 0.1},
        {"vllm_importance_sampling_correction": True},
        {"mask_truncated_completions": True},
        {"scale_rewards": "batch", "loss_type": "dr_grpo"},
        {"credit_tau_waad": 2.0, "credit_layers": 1},
    ],
)
def test_answers_that_the_update_leaves_out_are_read_before_it(batch, changes):
    """All metrics of attention are those of the whole batch, and so are the spans; entropies are of the answers run."""
    before, inside = both_ways(make_policy(), batch, EQUAL, **changes)
    ran = inside[2].log_probs.isfinite() & batch.response_mask
    assert ran.any() and ran.equal(batch.response_mask) == ("beta" in changes)
    torch.testing.assert_close(inside[2].log_probs[ran], before[2].log_probs[ran], rtol=0, atol=1e-5)
    torch.testing.assert_close(inside[2].entropy[ran], before[2].entropy[ran], rtol=0, atol=1e-5)
    of_run = ("entropy", "sampling/", "rhythm/entropy")
    for metrics in (before[1], inside[1]):
        for name in [name for name in metrics if name.startswith(of_run)]:
            del metrics[name]
    assert_near(inside, before)


def test_entropy_credit_reads_the_entropy_of_all_answers(batch):
    before, inside = both_ways(make_policy(), batch, EQUAL, credit="entropy")
    assert inside[1] == pytest.approx(before[1], rel=1e-4, abs=1e-5) and inside[3].equal(before[3])
    assert inside[2].entropy.isfinite().all()


def test_the_drift_of_spans_is_that_of_the_whole_batch(batch):
    """Two steps, the second of other answers."""
    policy, other = make_policy(), make_batch(make_policy(), length=12)
    schedules = [GroupSchedule(), GroupSchedule()]
    make = [lambda schedule=schedule: schedule for schedule in schedules]
    list(both_ways(policy, batch, EQUAL, make))
    before, inside = both_ways(policy, other, EQUAL, make)
    assert inside[2].drift == before[2].drift and -1 < inside[2].drift.spearman < 1
    torch.testing.assert_close(*(schedule.state_dict()["spans"] for schedule in schedules), rtol=1e-5, atol=0)


def test_known_groups_are_read_in_the_loss_and_a_calibration_before_it(batch):
    """A calibration ranks the heads by all answers of a micro-batch, also by those without an advantage."""
    policy, changes = make_policy(), {"gradient_steps": 1, "credit_group_by": "batch", "credit_groups_every": 2}
    config, schedule, twin = settings(credit="coupled", **changes), GroupSchedule(every=2), GroupSchedule(every=2)
    reader = Reader(policy, batch, config, schedule)
    assert not reader.credits_in_loss and reader.rows_before([False] * 12) == [*range(12)]
    reader.read(all_micros(batch))
    whole = read_batch(policy, batch, all_micros(batch), config.change(gradient_steps=3), twin)
    assert reader.finish().rhythm.waad.equal(whole.rhythm.waad)
    before, inside = both_ways(policy, batch, SPREAD, (lambda: twin, lambda: schedule), **changes)
    assert_near(inside, before)
    assert schedule.groups is None and inside[2].drift is None


@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_recomputed_activations_are_read_once(batch, attention, monkeypatch):
    """Gradient checkpointing changes no bit, and the statistics of each layer are computed once a micro-batch."""
    measured, measure = [], Collector.measure

    def count(self, layer, *arguments):
        measured.append(layer)
        return measure(self, layer, *arguments)

    kept, recomputing = make_policy(attention), make_policy(attention)
    activation_checkpointing(recomputing.model)
    ran = []
    for index, layer in enumerate(recomputing.decoder.layers):
        layer.self_attn.register_forward_hook(lambda *_, index=index: ran.append(index))
    _, expected = both_ways(kept, batch, SPREAD, credit_layers="all")
    monkeypatch.setattr(Collector, "measure", count)
    config = settings(gradient_steps=1, credit="coupled", credit_layers="all")
    got = step(recomputing, batch, SPREAD, config, GroupSchedule(), before=False)
    micros = len(micro_batches(batch, range(12), config.grpo.micro_batch_tokens, ALONE))
    assert measured == [0, 1, 2] * micros and len(ran) == 2 * len(measured)
    assert all(map(torch.equal, got[0], expected[0])) and got[1] == expected[1]


def shifted(module, query, key, value, mask, **options):
    """Attends otherwise than its map says."""
    out, weights = packed_attention(module, query, key, value, mask, **options)
    return out * 1.05, weights


needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a device that is there need not be pretended")


@needs_no_gpu
@pytest.mark.slow
def test_the_host_waits_for_no_micro_batch(batch):
    """Statistics and credit of the loss's forward are queued; the host looks at the check once, before the norm."""
    config, ran = settings(gradient_steps=1, credit="coupled", credit_layers=[0], micro_batch_tokens=30), []
    with pretended_cuda():
        there, world, policy = on_device(batch, "cuda"), World(0, 1, torch.device("cuda", 0)), make_policy().to("cuda")
        reader, optimizer = Reader(policy, there, config, GroupSchedule()), torch.optim.SGD(policy.parameters(), lr=0.0)
        advantages = (there.sequence_of < 3).float()
        with counted() as work:
            update_policy(policy, optimizer, there, reader, advantages, config, world, progress=ran.append)
    assert len(ran) == 3
    functions = [wait.where.split(" in ")[-1] for wait in work.waits]
    assert functions == ["answers_run", *["fetch"] * 3, "_step", "update_policy"], work.waits


@needs_no_gpu
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.slow)])
def test_a_map_that_is_not_the_models_is_refused_before_weights_change(batch, device, monkeypatch):
    """On a CPU the forward refuses it, on a GPU the check before the optimizer step."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "packed", shifted)

    class Refuses(torch.optim.SGD):
        def step(self):
            raise AssertionError("stepped with wrong statistics")

    def run(policy, batch, world):
        config, ran = settings(gradient_steps=1, credit="coupled", credit_layers=[0]), []
        reader = Reader(policy, batch, config, GroupSchedule())
        advantages = (batch.sequence_of < 2).float()  # kernels are interpreted, so few answers are run
        optimizer = Refuses(policy.parameters(), lr=1.0)
        with pytest.raises(ValueError, match="layer 0 does not attend as collect assumes"):
            update_policy(policy, optimizer, batch, reader, advantages, config, world, progress=ran.append)
        return ran

    if device == "cpu":
        assert not run(make_policy(), batch, ALONE)
    else:
        with pretended_cuda():
            assert run(make_policy().to("cuda"), on_device(batch, "cuda"), World(0, 1, torch.device("cuda", 0)))
