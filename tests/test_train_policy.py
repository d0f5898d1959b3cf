"""One forward of the policy against a plain computation, the sampler, and the pass that carries gradients."""

import pytest
import torch

from rhythm_kernels import GroupSchedule, collect
from train import rollout
from train.config import Credit, Model
from train.data import build_tokenizer
from train.loop import update_policy
from train.loss import group_advantages, token_log_probs
from train.policy import build_policy, old_log_prob_pass, token_logits
from train.presets import load_preset
from train.rollout import Rollouts, Sampling, TransformersEngine, micro_batches

PROMPTS = ["3 5 ? 8 >", "1 7 10 ? 2 >", "2 2 2 9 ? 30 >"]  # of three lengths: two of them are padded on the left


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def policy(tokenizer):
    torch.manual_seed(0)
    shape = Model(layers=3, hidden_size=32, heads=4, key_heads=2, head_size=8, mlp_size=64)
    return build_policy(shape, tokenizer, context=64)


def make_batch(policy, tokenizer, temperature: float | None = 1.0, length: int = 20) -> Rollouts:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return TransformersEngine(policy, tokenizer).generate(PROMPTS, 4, Sampling(length, temperature))


@pytest.fixture(scope="module")
def batch(policy, tokenizer):
    """Answers of different lengths; with random weights, some end by themselves when <eos> is made likely."""
    made = make_batch(policy, tokenizer)
    ids, eos = made.ids.clone(), tokenizer.eos_token_id
    response_mask, attention_mask = made.response_mask.clone(), made.attention_mask.clone()
    for row, cut in ((0, 12), (5, 9), (7, 16)):
        ids[row, cut] = eos
        ids[row, cut + 1 :] = tokenizer.pad_token_id
        response_mask[row, cut + 1 :] = False
        attention_mask[row, cut + 1 :] = 0
    finished = (ids == eos).any(-1)
    return made._replace(ids=ids, response_mask=response_mask, attention_mask=attention_mask, finished=finished)


def old_pass(policy, batch, *, size=5, schedule=None, temperature=1.0, **credit):
    return old_log_prob_pass(
        policy,
        batch,
        temperature=temperature,
        micro_batch_size=size,
        credit=Credit(**{"horizon": (2, 6), **credit}),
        schedule=schedule,
    )


def test_log_probs_are_those_of_each_row_alone(policy, batch):
    """Against one unpadded forward a row: padding, positions and alignment all have to be right."""
    stats = old_pass(policy, batch)
    for row in range(len(batch.ids)):
        real = batch.attention_mask[row].bool()
        ids = batch.ids[row, real][None]
        with torch.no_grad():
            plain = policy(input_ids=ids).logits[0].log_softmax(-1)
        expected = plain[:-1].gather(-1, ids[0, 1:, None]).squeeze(-1)
        response = batch.response_mask[row, real][1:]
        got = stats.log_probs[row, batch.response_mask[row]]
        assert torch.allclose(got, expected[response], atol=2e-5)
        entropy = -(plain.exp() * plain).sum(-1)[:-1][response]
        assert torch.allclose(stats.entropy[row, batch.response_mask[row]], entropy, atol=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree(policy, tokenizer, temperature):
    made = make_batch(policy, tokenizer, temperature)
    stats = old_pass(policy, made, temperature=temperature)
    assert torch.allclose(stats.log_probs[made.response_mask], made.log_probs[made.response_mask], atol=2e-5)


def test_greedy_takes_the_likeliest_token(policy, tokenizer):
    made = make_batch(policy, tokenizer, temperature=None)
    logits = token_logits(policy, made.ids, made.attention_mask)
    assert made.ids[:, 1:][made.response_mask[:, 1:]].equal(logits[:, :-1].argmax(-1)[made.response_mask[:, 1:]])


def test_stages_drop_finished_answers_and_change_nothing_else(policy, tokenizer, monkeypatch):
    calls = []
    engine = TransformersEngine(policy, tokenizer)
    monkeypatch.setattr(engine, "_continue", lambda ids, *rest: calls.append(len(ids)) or once(ids, *rest))
    once = TransformersEngine(policy, tokenizer)._continue
    monkeypatch.setattr(rollout, "STAGE", 5)
    torch.manual_seed(1)
    made = engine.generate(PROMPTS, 20, Sampling(42, 1.0))
    assert calls[0] == 60 > calls[-1] >= (~made.finished).sum() > 0 and calls == sorted(calls, reverse=True)
    assert len(calls) == 9 and made.ids.shape[1] == made.attention_mask.shape[1] == 7 + 42
    lengths = made.response_mask.sum(-1)
    assert lengths[~made.finished].eq(42).all() and lengths[made.finished].min() < 42
    last = made.ids.gather(1, (made.attention_mask * torch.arange(49)).amax(-1, keepdim=True))[:, 0]
    assert torch.equal(last == tokenizer.eos_token_id, made.finished)
    gap = (old_pass(policy, made).log_probs - made.log_probs)[made.response_mask]
    assert gap.abs().max() < 2e-5
    staged = engine.generate(PROMPTS, 1, Sampling(42, None))
    monkeypatch.setattr(rollout, "STAGE", 42)
    whole = engine.generate(PROMPTS, 1, Sampling(42, None))
    assert staged.texts == whole.texts and torch.equal(staged.ids, whole.ids)


def test_groups_are_adjacent_and_masks_mark_the_answers(policy, tokenizer):
    made = make_batch(policy, tokenizer)
    for row, (ids, mask) in enumerate(zip(made.ids, made.attention_mask.bool() & ~made.response_mask, strict=True)):
        assert tokenizer.decode(ids[mask]) == PROMPTS[row // 4]
    assert made.finished.equal(((made.ids == tokenizer.eos_token_id) & made.response_mask).any(-1))
    lengths = made.response_mask.sum(-1)
    assert lengths[~made.finished].eq(20).all() and lengths.ge(1).all()


def test_micro_batches_cover_every_row_and_token(batch):
    seen = []
    for rows, width in micro_batches(batch, torch.arange(len(batch.ids)), 5):
        assert len(rows) <= 5 and batch.attention_mask[rows, width:].sum() == 0
        seen += rows.tolist()
    assert sorted(seen) == list(range(len(batch.ids)))
    assert list(micro_batches(batch, torch.arange(0), 5)) == []


def collect_whole(policy, batch, **options):
    """The rhythm of the batch in one forward."""
    with collect(policy, layers=[0, 1, 2], horizon=(2, 6), response_mask=batch.response_mask, **options) as collected:
        token_logits(policy, batch.ids, batch.attention_mask)
    return collected.rhythm()


@pytest.mark.parametrize("size", [1, 5, 64])
def test_rhythm_does_not_depend_on_the_micro_batch(policy, batch, size):
    got = old_pass(policy, batch, size=size, schedule=GroupSchedule()).rhythm
    expected = collect_whole(policy, batch)
    assert torch.allclose(got.waad, expected.waad, atol=1e-4)
    assert torch.allclose(got.fai, expected.fai, atol=1e-5)
    assert got.waad[~batch.response_mask].eq(0).all()


@pytest.mark.parametrize("size", [5, 64])
def test_groups_of_a_calibration_serve_the_next_steps(policy, batch, monkeypatch, size):
    """Three steps, of which the first and the third compute spans; the second, of other answers, is given groups."""
    spans, schedule, add = [], GroupSchedule(every=2), GroupSchedule.add
    monkeypatch.setattr(GroupSchedule, "add", lambda self, *given: spans.append(given[0]) or add(self, *given))
    few = batch._replace(**{name: getattr(batch, name)[:3] for name in ("ids", "attention_mask", "response_mask")})

    def step(batch):
        spans.clear()
        stats = old_pass(policy, batch, size=size, schedule=schedule, groups_per="batch")
        return stats, [span is not None for span in spans]

    first, computed = step(batch)
    whole = collect_whole(policy, batch, groups_per="batch")
    assert all(computed) and len(computed) == -(-12 // size) and first.drift is None
    assert all(map(torch.equal, schedule.groups, whole.groups))
    second, computed = step(few)
    expected = collect_whole(policy, few, groups=whole.groups)
    assert not any(computed) and second.drift is None and schedule.groups is None
    assert torch.allclose(second.rhythm.waad, expected.waad, atol=1e-4)
    assert torch.allclose(second.rhythm.fai, expected.fai, atol=1e-5)
    own = collect_whole(policy, few, groups_per="batch")
    assert not torch.allclose(own.waad, expected.waad, atol=1e-2)  # their own groups are others
    third, computed = step(few)
    assert all(computed) and -1 < third.drift.spearman < 1
    assert all(map(torch.equal, schedule.groups, own.groups))


def test_collecting_changes_no_log_prob(policy, batch):
    plain, collected = old_pass(policy, batch), old_pass(policy, batch, schedule=GroupSchedule())
    assert plain.log_probs.equal(collected.log_probs) and plain.entropy.equal(collected.entropy)
    assert plain.rhythm is None and plain.statistics_seconds == 0 and collected.statistics_seconds > 0


def test_ratio_is_one_before_the_first_update(policy, batch):
    stats = old_pass(policy, batch)
    log_probs = token_log_probs(token_logits(policy, batch.ids, batch.attention_mask), batch.ids)
    assert log_probs.requires_grad
    assert torch.allclose((log_probs - stats.log_probs)[batch.response_mask].exp(), torch.tensor(1.0), atol=1e-5)


def test_update_has_the_gradient_of_the_plain_loss(policy, tokenizer, batch):
    """Micro-batches, sorting, trimming and leaving out rows of zero advantage together change no gradient."""
    config = load_preset("countdown-smoke").change(
        prompts_per_step=3, num_generations=4, gradient_steps=1, micro_batch_size=5, max_grad_norm=1e9
    )
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0])
    advantages = group_advantages(rewards, 4, "group")[:, None].expand(batch.ids.shape)
    stats = old_pass(policy, batch)

    taken = []

    class Recorder(torch.optim.SGD):
        def step(self):
            taken.append([parameter.grad.clone() for parameter in policy.parameters()])

    metrics = update_policy(policy, Recorder(policy.parameters(), lr=0.0), batch, stats.log_probs, advantages, config)
    log_probs = token_log_probs(token_logits(policy, batch.ids, batch.attention_mask), batch.ids)
    ratio = (log_probs - stats.log_probs).exp()
    loss = -(ratio * advantages)[batch.response_mask].sum() / batch.response_mask.sum()
    expected = torch.autograd.grad(loss, list(policy.parameters()))
    for got, want in zip(taken[0], expected, strict=True):
        assert torch.allclose(got, want, atol=1e-5 * want.abs().max().item() + 1e-7)
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["clip_ratio/low_mean"] == metrics["clip_ratio/high_mean"] == 0


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_each_gradient_step_averages_over_its_own_share(policy, batch, loss_type):
    """With a learning rate of 0 the reported loss is the mean over the shares, each computed by itself."""
    config = load_preset("countdown-smoke").change(
        prompts_per_step=3, num_generations=4, gradient_steps=3, micro_batch_size=3, loss_type=loss_type
    )
    advantages = torch.randn(len(batch.ids), generator=torch.Generator().manual_seed(0))
    advantages = advantages[:, None].expand(batch.ids.shape)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    old = old_pass(policy, batch).log_probs
    metrics = update_policy(policy, optimizer, batch, old, advantages, config)
    losses = []
    for rows in torch.arange(len(batch.ids)).split(4):
        mask = batch.response_mask[rows].float()
        per_token = -advantages[rows] * mask  # the ratio is 1
        per_answer = per_token.sum(-1)
        losses.append(
            {
                "dapo": per_token.sum() / mask.sum(),
                "grpo": (per_answer / mask.sum(-1)).mean(),
                "dr_grpo": per_answer.mean() / config.rollout.max_completion_length,
            }[loss_type].item()
        )
    assert metrics["loss"] == pytest.approx(sum(losses) / 3, abs=1e-4)


def test_no_advantage_no_step(policy, batch):
    class Refuses(torch.optim.SGD):
        def step(self):
            raise AssertionError("stepped without a gradient")

    config = load_preset("countdown-smoke").change(prompts_per_step=3, num_generations=4, gradient_steps=3)
    zeros = torch.zeros(batch.ids.shape)
    metrics = update_policy(policy, Refuses(policy.parameters(), lr=1.0), batch, zeros, zeros, config)
    assert set(metrics.values()) == {0.0}


def test_nan_never_reaches_the_weights(policy, batch):
    """A GPU's credit says NaN where a CPU's raises."""
    config = load_preset("countdown-smoke").change(prompts_per_step=3, num_generations=4, gradient_steps=3)
    before = [p.clone() for p in policy.parameters()]
    advantages = torch.ones(batch.ids.shape)
    advantages[0, batch.response_mask[0]] = torch.nan
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    with pytest.raises(RuntimeError, match="non-finite"):
        update_policy(policy, optimizer, batch, old_pass(policy, batch).log_probs, advantages, config)
    policy.zero_grad()
    assert all(torch.equal(p, kept) for p, kept in zip(policy.parameters(), before))


def test_policy_comes_back_from_its_folder(policy, batch, tmp_path):
    from train.checkpoint import load_policy

    policy.save_pretrained(tmp_path)
    loaded = load_policy(tmp_path, torch.device("cpu"))
    assert not loaded.training
    with torch.no_grad():
        same = [token_logits(model, batch.ids, batch.attention_mask) for model in (policy, loaded)]
    assert torch.equal(*same)
