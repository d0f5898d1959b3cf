"""The embedded engine: what it samples, and the log-probabilities that it says it had."""

from contextlib import nullcontext

import pytest
import torch
from train_cases import ALONE, PROMPTS, TOKENIZER, all_micros, encode, engine_of, make_policy, sample

from train import rollout
from train.batch import pack
from train.reading import read_log_probs
from train.rollout import Sampling

EOS = TOKENIZER.eos_token_id


@pytest.fixture(scope="module")
def policy():
    return make_policy()


def trained_log_probs(policy, completions):
    """The trainer's log-probabilities of these answers to PROMPTS."""
    batch = pack(encode(PROMPTS), completions, len(completions) // len(PROMPTS), ALONE.device)
    return batch, read_log_probs(policy, batch, all_micros(batch))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree(temperature):
    policy = make_policy(temperature=temperature)
    batch, log_probs = trained_log_probs(policy, sample(policy, temperature=temperature))
    torch.testing.assert_close(log_probs, batch.log_probs, rtol=0, atol=2e-5)


def test_sampling_follows_the_probabilities(policy):
    """Holds the first tokens of 3,000 answers to one prompt against the policy's own distribution."""
    prompt = encode(PROMPTS)[0]
    made = engine_of(policy, batch_size=1000).generate([prompt], 3000, Sampling(1, 0.5, 7))
    policy.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = (policy.model(torch.tensor([prompt])).logits[0, -1] / 0.5).softmax(-1)
    policy.model.set_attn_implementation("packed")
    counts = torch.bincount(torch.tensor([each.ids[0] for each in made]), minlength=len(expected))
    error = (counts - 3000 * expected) / (3000 * expected).sqrt()
    assert (error**2).sum() < 115 + 6 * (2 * 115) ** 0.5  # chi-squared of 114 degrees, six deviations


def test_greedy_takes_the_likeliest_token(policy):
    completions = sample(policy, temperature=None)
    policy.model.set_attn_implementation("sdpa")
    for prompt, made in zip(encode(PROMPTS), completions[::4]):
        with torch.no_grad():
            logits = policy.model(torch.tensor([prompt + made.ids])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == made.ids
        chosen = logits.log_softmax(-1).amax(-1)
        torch.testing.assert_close(chosen, torch.tensor(made.log_probs), rtol=0, atol=2e-5)
    policy.model.set_attn_implementation("packed")


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_the_models_own_generation_settings_change_no_answer(temperature):
    """transformers would take them for whatever a call leaves open; the loss knows nothing of them."""
    policy = make_policy()
    expected = sample(policy, temperature=temperature)
    policy.model.generation_config.update(repetition_penalty=1.5, min_p=0.9, no_repeat_ngram_size=1)
    assert sample(policy, temperature=temperature) == expected and policy.model.generation_config.min_p == 0.9


def test_stages_drop_finished_answers_and_change_nothing_else(policy, monkeypatch):
    calls = []
    engine = engine_of(policy)
    once = engine_of(policy)._continue
    monkeypatch.setattr(engine, "_continue", lambda ids, *rest: calls.append(len(ids)) or once(ids, *rest))
    monkeypatch.setattr(rollout, "STAGE", 5)
    done = []
    made = engine.generate(encode(PROMPTS), 20, Sampling(42, 1.0, 1), lambda *counts: done.append(counts))
    finished = [each for each in made if each.finish_reason == "stop"]
    assert calls[0] == 60 > calls[-1] >= 60 - len(finished) > 0 and calls == sorted(calls, reverse=True)
    assert len(calls) == 9
    assert {len(each.ids) for each in made if each.finish_reason == "length"} == {42}
    assert all(each.ids[-1] == EOS and EOS not in each.ids[:-1] for each in finished)
    assert all(len(each.ids) == len(each.log_probs) for each in made)
    assert tuple(map(sum, zip(*done))) == (60, sum(len(each.ids) for each in made))
    batch, log_probs = trained_log_probs(policy, made)
    torch.testing.assert_close(log_probs, batch.log_probs, rtol=0, atol=2e-5)
    staged = engine.generate(encode(PROMPTS), 1, Sampling(42, None))
    monkeypatch.setattr(rollout, "STAGE", 42)
    assert [each.ids for each in engine.generate(encode(PROMPTS), 1, Sampling(42, None))] == [x.ids for x in staged]


def test_the_same_seed_gives_the_same_answers_and_disturbs_no_other_draw(policy):
    state = torch.get_rng_state()
    first, second = sample(policy), sample(policy)
    assert first == second and torch.equal(torch.get_rng_state(), state)
    assert engine_of(policy).generate(encode(PROMPTS), 4, Sampling(20, 1.0, 2)) != first
    assert policy.model.config._attn_implementation == "packed"


def test_every_stop_token_ends_an_answer(policy):
    """A stop token that is likely: the first one to come is the last of its answer."""
    stops = [EOS, *range(60, 90)]
    made = sample(policy, stops=stops)
    assert all(each.finish_reason == "stop" for each in made)
    assert all(each.ids[-1] in stops and not set(each.ids[:-1]) & set(stops) for each in made)


def test_batches_of_the_engine_keep_the_order(policy):
    greedy = sample(policy, temperature=None)
    assert [each.ids for each in sample(policy, temperature=None, batch_size=5)] == [each.ids for each in greedy]
    assert [each.ids for each in greedy[::4]] != [each.ids for each in greedy[1::4]] or greedy[0] != greedy[4]


def test_a_copy_takes_the_policys_weights(policy):
    copy = make_policy("sdpa")
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.mul_(0.5)
    engine = engine_of(copy, is_copy=True)
    before = engine.generate(encode(PROMPTS), 2, Sampling(20, 1.0, 1))
    engine.sync((name, parameter.detach().clone()) for name, parameter in policy.model.named_parameters())
    after = engine.generate(encode(PROMPTS), 2, Sampling(20, 1.0, 1))
    assert before != after == engine_of(policy).generate(encode(PROMPTS), 2, Sampling(20, 1.0, 1))


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_attention_without_copies_gives_the_answers_of_sdpa(policy, monkeypatch, temperature):
    used = set()
    watch = policy.model.register_forward_pre_hook(lambda model, _: used.add(model.config._attn_implementation))
    made = sample(policy, temperature=temperature)
    assert used == {"rhythm_grouped"} and policy.model.config._attn_implementation == "packed"
    monkeypatch.setattr(rollout, "grouped_decoding", lambda model: nullcontext())
    expected = sample(policy, temperature=temperature)
    watch.remove()
    assert used == {"rhythm_grouped", "sdpa"}
    assert [each.ids for each in made] == [each.ids for each in expected]
    for each, other in zip(made, expected, strict=True):
        torch.testing.assert_close(torch.tensor(each.log_probs), torch.tensor(other.log_probs), rtol=0, atol=2e-5)
