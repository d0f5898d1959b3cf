"""The optimizer steps: their gradient is that of the plain loss, whatever the micro-batches."""

import math

import pytest
import torch
from train_cases import ALONE, all_micros, make_batch, make_policy, on_device, settings

from benchmarks.pretended_cuda import counted, pretended_cuda
from rhythm_kernels import GroupSchedule
from train.distributed import World
from train.loss import Groups
from train.reading import Reader, read_log_probs
from train.update import make_optimizer, update_policy

REWARDS = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0])


@pytest.fixture(scope="module")
def policy():
    return make_policy()


@pytest.fixture(scope="module")
def batch(policy):
    return make_batch(policy)


@pytest.fixture(scope="module")
def old(policy, batch):
    """Has read the log-probabilities before an update."""
    reader = Reader(policy, batch, settings(credit="none"), GroupSchedule())
    reader.read(all_micros(batch))
    return reader


def spread(batch, per_answer):
    return per_answer[batch.sequence_of]


class Recorder(torch.optim.SGD):
    """Keeps each step's gradient and changes nothing."""

    def __init__(self, policy):
        super().__init__(policy.parameters(), lr=0.0)
        self.policy, self.taken = policy, []

    def step(self):
        self.taken.append([parameter.grad.clone() for parameter in self.policy.parameters()])


def forward(policy, batch):
    """Log-probabilities [N] with gradients, 0 in prompts, in one forward."""
    (micro,) = all_micros(batch, 10_000)
    log_probs, _ = policy(micro)
    return torch.zeros(len(batch.ids)).index_put((micro.place[micro.answers],), log_probs)


def check_gradient(policy, taken, loss):
    for got, want in zip(taken, torch.autograd.grad(loss, list(policy.parameters())), strict=True):
        assert torch.allclose(got, want, atol=1e-5 * want.abs().max().item() + 1e-7)


@pytest.mark.parametrize("tokens", [1, 60, 10_000])
def test_one_step_has_the_gradient_of_the_plain_loss(policy, batch, old, tokens):
    """Packing, micro-batches and leaving out answers without an advantage together change no gradient."""
    config = settings(gradient_steps=1, micro_batch_tokens=tokens, max_grad_norm=1e9)
    advantages = spread(batch, Groups.of(REWARDS, 4, 4, ALONE).advantages("group"))
    recorder = Recorder(policy)
    ran = []
    metrics = update_policy(policy, recorder, batch, old, advantages, config, ALONE, progress=ran.append)
    ratio = (forward(policy, batch) - old.log_probs).exp()
    loss = -(ratio * advantages)[batch.response_mask].sum() / batch.response_mask.sum()
    check_gradient(policy, recorder.taken[0], loss)
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["clip_ratio/low_mean"] == metrics["clip_ratio/high_mean"] == 0
    assert sum(ran) == sum(batch.lengths) - sum(batch.lengths[4:8])  # the second group's answers are all wrong
    assert not policy.training


def test_its_own_log_probs_are_the_old_ones_of_a_single_step(policy, batch, old):
    config = settings(gradient_steps=1, max_grad_norm=1e9, credit="none")
    advantages = spread(batch, Groups.of(REWARDS, 4, 4, ALONE).advantages("group"))
    with_old, alone = Recorder(policy), Recorder(policy)
    update_policy(policy, with_old, batch, old, advantages, config, ALONE)
    found = Reader(policy, batch, config, GroupSchedule())
    update_policy(policy, alone, batch, found, advantages, config, ALONE)
    for got, want in zip(alone.taken[0], with_old.taken[0], strict=True):
        assert torch.allclose(got, want, atol=1e-5 * want.abs().max().item() + 1e-7)
    known = found.log_probs.isfinite()
    assert torch.equal(known, ~torch.isin(batch.sequence_of, torch.arange(4, 8)) | ~batch.response_mask)
    torch.testing.assert_close(found.log_probs[known], old.log_probs[known], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.entropy[known], old.entropy[known], rtol=0, atol=1e-5)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_each_gradient_step_averages_over_its_own_share(policy, batch, old, loss_type):
    """Under a learning rate of 0 the reported loss is the mean over the shares, each computed by itself."""
    config = settings(micro_batch_tokens=50, loss_type=loss_type)
    per_answer = torch.randn(12, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    metrics = update_policy(policy, optimizer, batch, old, spread(batch, per_answer), config, ALONE)
    tokens = batch.per_sequence(batch.response_mask.float())
    losses = []
    for rows in torch.arange(12).split(4):
        total = -per_answer[rows] * tokens[rows]  # the ratio is 1
        losses.append(
            {
                "dapo": total.sum() / tokens[rows].sum(),
                "grpo": (total / tokens[rows]).mean(),
                "dr_grpo": total.mean() / config.rollout.max_completion_length,
            }[loss_type].item()
        )
    assert metrics["loss"] == pytest.approx(sum(losses) / 3, abs=1e-4)


def test_truncated_answers_can_be_left_out(policy, batch, old):
    config = settings(gradient_steps=1, mask_truncated_completions=True, max_grad_norm=1e9)
    advantages = spread(batch, torch.ones(12))
    recorder = Recorder(policy)
    update_policy(policy, recorder, batch, old, advantages, config, ALONE)
    counted = batch.response_mask & batch.finished[batch.sequence_of]
    assert 0 < counted.sum() < batch.response_mask.sum()
    ratio = (forward(policy, batch) - old.log_probs).exp()
    check_gradient(policy, recorder.taken[0], -ratio[counted].sum() / counted.sum())


def test_divergence_and_sampler_correction_reach_the_gradient(policy, batch, old):
    """The reference is another policy; where no advantage differs from 0 its pull is all there is."""
    other = make_policy(temperature=0.5)
    reference = read_log_probs(other, batch, all_micros(batch))
    mask, count = batch.response_mask, batch.response_mask.sum()
    config = settings(gradient_steps=1, beta=0.1, max_grad_norm=1e9)
    recorder = Recorder(policy)
    metrics = update_policy(policy, recorder, batch, old, torch.zeros(len(batch.ids)), config, ALONE, reference)
    away = (reference - forward(policy, batch))[mask]
    check_gradient(policy, recorder.taken[0], 0.1 * (away.exp() - away - 1).sum() / count)
    assert metrics["kl"] == pytest.approx((away.exp() - away - 1).mean().item(), rel=1e-3)

    config = settings(gradient_steps=1, vllm_importance_sampling_correction=True, max_grad_norm=1e9)
    sampler = batch.log_probs - torch.linspace(-1, 1, len(batch.ids)) * mask
    recorder, shifted = Recorder(policy), batch._replace(log_probs=sampler)
    update_policy(policy, recorder, shifted, old, spread(batch, torch.ones(12)), config, ALONE)
    weight = (old.log_probs - sampler).exp().clamp(max=2.0)
    ratio = (forward(policy, batch) - old.log_probs).exp()
    check_gradient(policy, recorder.taken[0], -(weight * ratio)[mask].sum() / count)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_metrics_of_tokens_are_means_over_the_tokens_that_ran(policy, batch, old, loss_type):
    """Whatever the loss weighs: all are clipped. The answers to the second problem have no advantage and do not run."""
    config = settings(micro_batch_tokens=60, loss_type=loss_type, num_iterations=2)
    advantages = spread(batch, torch.tensor([1.0] * 4 + [0.0] * 4 + [-1.0] * 4))
    shift = torch.where(batch.sequence_of < 4, -1.0, 1.0) * batch.response_mask  # ratios of e and of 1 / e
    reader = Reader(policy, batch, settings(credit="none"), GroupSchedule())
    reader.log_probs = old.log_probs + shift
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    metrics = update_policy(policy, optimizer, batch, reader, advantages, config, ALONE)
    tokens = batch.per_sequence(batch.response_mask.double())
    high = (tokens[:4].sum() / (tokens[:4].sum() + tokens[8:].sum())).item()
    assert metrics["clip_ratio/high_mean"] == pytest.approx(high)
    assert metrics["clip_ratio/low_mean"] == pytest.approx(1 - high)
    assert metrics["approx_kl"] == pytest.approx(high * (math.e - 2) + (1 - high) * math.exp(-1), rel=1e-4)


def test_no_advantage_no_step(policy, batch, old):
    class Refuses(torch.optim.SGD):
        def step(self):
            raise AssertionError("stepped without a gradient")

    zeros, optimizer = torch.zeros(len(batch.ids)), Refuses(policy.parameters(), lr=1.0)
    metrics = update_policy(policy, optimizer, batch, old, zeros, settings(), ALONE)
    assert metrics == {"loss": 0.0, "grad_norm": 0.0}


def test_nan_never_reaches_the_weights(policy, batch, old):
    """A GPU's credit says NaN where a CPU's raises."""
    before = [p.clone() for p in policy.parameters()]
    advantages = torch.ones(len(batch.ids))
    advantages[batch.response_mask.nonzero()[0]] = torch.nan
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    with pytest.raises(RuntimeError, match="the gradient is non-finite"):
        update_policy(policy, optimizer, batch, old, advantages, settings(), ALONE)
    policy.zero_grad()
    assert all(torch.equal(p, kept) for p, kept in zip(policy.parameters(), before))
    assert not policy.training


needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a device that is there need not be pretended")


@needs_no_gpu
def test_an_optimizer_step_on_a_gpu_holds_no_copy():
    """Beside parameters, gradients and moments, of which it makes none anew."""
    with pretended_cuda():
        policy = make_policy().to("cuda")
        optimizer = make_optimizer(policy, settings(weight_decay=0.1))
        for parameter in policy.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()  # makes the moments
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.step()
        extra = torch.cuda.max_memory_allocated() - before
    assert extra < max(parameter.nbytes for parameter in policy.parameters())


@needs_no_gpu
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("several", [False, True])
def test_the_host_waits_once_an_optimizer_step(batch, loss_type, several):
    """For the norm of the gradient; once before for the answers that are run, and once at the end for the metrics."""
    config = settings(
        micro_batch_tokens=60,
        gradient_steps=3 if several else 1,
        num_iterations=2 if several else 1,
        beta=0.1,
        loss_type=loss_type,
        vllm_importance_sampling_correction=True,
        credit="none",
    )
    ran = []
    with pretended_cuda():
        there, world = on_device(batch, "cuda"), World(0, 1, torch.device("cuda", 0))
        policy = make_policy().to("cuda")
        optimizer = make_optimizer(policy, config)
        reader = Reader(policy, there, config, GroupSchedule())
        if several:
            reader.log_probs = there.log_probs
        advantages = torch.ones_like(there.log_probs)
        with counted() as work:
            update_policy(
                policy, optimizer, there, reader, advantages, config, world, there.log_probs, progress=ran.append
            )
    steps = 3 * 2 if several else 1
    assert len(ran) > steps
    functions = [wait.where.split(" in ")[-1] for wait in work.waits]
    assert functions == ["answers_run", *["_step"] * steps, "update_policy"], work.waits


def test_the_settings_of_adamw_reach_it():
    config = settings(adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, weight_decay=0.1, learning_rate=1e-3)
    (group,) = make_optimizer(make_policy(), config).param_groups
    assert (group["betas"], group["eps"], group["weight_decay"], group["lr"]) == ((0.8, 0.95), 1e-6, 0.1, 1e-3)
