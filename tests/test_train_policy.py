"""One forward of the policy against a plain computation, and the passes that read a batch."""

import pytest
import torch
from architectures import ARCHITECTURES
from train_cases import ALONE, TOKENIZER, all_micros, encode, make_batch, make_policy, sample, settings

import train.policy
from rhythm_kernels import GroupSchedule, collect
from train.batch import pack
from train.distributed import World, weights_of, whole, whole_weights
from train.loading import check_head, check_packing, load_model, load_policy
from train.policy import Policy, token_log_probs
from train.reading import Reader, read_batch, read_log_probs
from train.setup import open_run


@pytest.fixture(scope="module")
def policy():
    return make_policy()


@pytest.fixture(scope="module")
def batch(policy):
    return make_batch(policy)


def read(policy, batch, *, tokens=60, schedule=None, **changes):
    config = settings(credit="coupled", **changes)
    return read_batch(policy, batch, all_micros(batch, tokens), config, schedule or GroupSchedule())


def plain(policy, batch, temperature=1.0):
    """(log-probs, entropies) [N] from one unpadded forward a sequence, with all its logits."""
    log_probs, entropy = torch.zeros(2, len(batch.ids))
    policy.model.set_attn_implementation("sdpa")
    for begin, end in zip(batch.cu_seqlens.tolist(), batch.cu_seqlens[1:].tolist()):
        ids = batch.ids[begin:end]
        with torch.no_grad():
            rows = (policy.model(ids[None]).logits[0] / temperature).log_softmax(-1)[:-1]
        log_probs[begin + 1 : end] = rows.gather(-1, ids[1:, None]).squeeze(-1)
        entropy[begin + 1 : end] = -(rows.exp() * rows).sum(-1)
    policy.model.set_attn_implementation("packed")
    return log_probs * batch.response_mask, entropy * batch.response_mask


@pytest.mark.parametrize("tokens", [1, 60, 10_000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_each_sequence_alone(batch, tokens, temperature):
    policy = make_policy(temperature=temperature)
    stats = read(policy, batch, tokens=tokens)
    log_probs, entropy = plain(policy, batch, temperature)
    torch.testing.assert_close(stats.log_probs, log_probs, rtol=0, atol=2e-5)
    torch.testing.assert_close(stats.entropy, entropy, rtol=0, atol=2e-5)
    again = read_log_probs(policy, batch, all_micros(batch, tokens))
    assert torch.equal(again, stats.log_probs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformers_own_attention_gives_the_same(policy, batch, attention):
    packed, other = read(policy, batch), read(make_policy(attention), batch)
    torch.testing.assert_close(other.log_probs, packed.log_probs, rtol=0, atol=2e-5)
    torch.testing.assert_close(other.rhythm.waad, packed.rhythm.waad, rtol=0, atol=1e-4)
    torch.testing.assert_close(other.rhythm.fai, packed.rhythm.fai, rtol=0, atol=1e-5)


@pytest.mark.parametrize("vocabulary", [1, 7, 1021, 5003])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_chunked_head_is_the_whole_one(vocabulary, bias, monkeypatch):
    """At odd vocabulary sizes, with gradients, in chunks of 1, 3 and all rows."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(10, 24, requires_grad=True), torch.randn(vocabulary, 24, requires_grad=True)
    offset = torch.randn(vocabulary, requires_grad=True) if bias else None
    ids, upstream = torch.randint(vocabulary, (10,)), torch.randn(10)
    inputs = [x for x in (hidden, weight, offset) if x is not None]
    rows = (torch.nn.functional.linear(hidden, weight, offset) / 0.7).log_softmax(-1)
    expected = rows.gather(-1, ids[:, None]).squeeze(-1)
    gradients = torch.autograd.grad((expected * upstream).sum(), inputs)
    for most in (1, 3 * vocabulary, 10**9):
        monkeypatch.setattr(train.policy, "MOST_LOGITS", most)
        got, entropy = token_log_probs(hidden, weight, offset, ids, temperature=0.7, entropy=True)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(entropy, -(rows.exp() * rows).sum(-1).detach())
        assert not entropy.requires_grad
        for mine, other in zip(torch.autograd.grad((got * upstream).sum(), inputs), gradients, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_head_never_holds_all_logits(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple) else (out,):
                largest = max(largest, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    monkeypatch.setattr(train.policy, "MOST_LOGITS", 4 * 997)
    hidden, weight = torch.randn(200, 8, requires_grad=True), torch.randn(997, 8, requires_grad=True)
    with Sizes():
        log_probs, _ = token_log_probs(hidden, weight, None, torch.randint(997, (200,)), temperature=1.0)
        log_probs.sum().backward()
    assert largest <= 2 * 4 * 997  # of 200 x 997


def collect_whole(policy, batch, **options):
    """The rhythm of the batch in one forward."""
    (micro,) = all_micros(batch, 10_000)
    order = micro.place.argsort()
    assert order.equal(torch.arange(len(order)))
    with (
        torch.no_grad(),
        collect(
            policy.model, layers=[0, 1, 2], horizon=(2, 6), response_mask=batch.response_mask[None], **options
        ) as found,
    ):
        policy(micro)
    return found.rhythm()


@pytest.mark.parametrize("tokens", [1, 60, 10_000])
def test_rhythm_does_not_depend_on_the_micro_batch(policy, batch, tokens):
    got = read(policy, batch, tokens=tokens).rhythm
    expected = collect_whole(policy, batch)
    assert torch.allclose(got.waad, expected.waad, atol=1e-4)
    assert torch.allclose(got.fai, expected.fai, atol=1e-5)
    assert got.waad[0, ~batch.response_mask].eq(0).all()


@pytest.mark.parametrize("tokens", [60, 10_000])
def test_groups_of_a_calibration_serve_the_next_steps(policy, batch, monkeypatch, tokens):
    """Three steps, of which the first and the third compute spans; the second, of other answers, is given groups."""
    spans, schedule, add = [], GroupSchedule(every=2), GroupSchedule.add
    monkeypatch.setattr(GroupSchedule, "add", lambda self, *given: spans.append(given[0]) or add(self, *given))
    few = pack(encode(["3 5 ? 8 >"]), sample(policy, n=3)[:3], 3, ALONE.device)

    def step(batch):
        spans.clear()
        stats = read(policy, batch, tokens=tokens, schedule=schedule, credit_group_by="batch", credit_groups_every=2)
        return stats, [span is not None for span in spans]

    first, computed = step(batch)
    whole = collect_whole(policy, batch, group_by="batch")
    assert all(computed) and len(computed) == len(all_micros(batch, tokens)) and first.drift is None
    assert all(map(torch.equal, schedule.groups, whole.groups))
    second, computed = step(few)
    expected = collect_whole(policy, few, groups=whole.groups)
    assert not any(computed) and second.drift is None and schedule.groups is None
    assert torch.allclose(second.rhythm.waad, expected.waad, atol=1e-4)
    assert torch.allclose(second.rhythm.fai, expected.fai, atol=1e-5)
    third, computed = step(few)
    assert all(computed) and -1 < third.drift.spearman < 1


def test_collecting_changes_no_log_prob(policy, batch):
    micros = all_micros(batch)
    without = read_batch(policy, batch, micros, settings(credit="none"), GroupSchedule())
    collected = read(policy, batch)
    assert without.log_probs.equal(collected.log_probs) and without.entropy.equal(collected.entropy)
    assert without.rhythm is None and without.seconds == without.bytes == 0
    assert collected.seconds > 0 and collected.bytes > 0


@pytest.mark.parametrize(
    ("changes", "before"),
    [
        ({"gradient_steps": 3}, "all"),
        ({"gradient_steps": 1, "num_iterations": 2}, "all"),
        ({"gradient_steps": 3, "credit": "none"}, "all"),
        ({"gradient_steps": 1}, "others"),
        ({"gradient_steps": 1, "credit": "entropy"}, "others"),
        ({"gradient_steps": 1, "credit": "none"}, "none"),
        ({"gradient_steps": 1, "credit": "random"}, "none"),
        ({"gradient_steps": 1, "credit_group_by": "batch"}, "all"),
        ({"gradient_steps": 1, "credit_group_by": "batch", "credit_groups_every": 2}, "all"),
    ],
)
def test_only_what_the_loss_cannot_give_is_read_before_it(policy, batch, changes, before):
    """Others are the answers that the update does not run. A step with known groups has nothing to rank."""
    config, schedule = settings(**{"credit": "coupled"} | changes), GroupSchedule(every=2)
    runs = [row % 3 > 0 for row in range(12)]
    rows = {"all": [*range(12)], "others": [0, 3, 6, 9], "none": []}
    assert Reader(policy, batch, config, schedule).rows_before(runs) == rows[before]
    read(policy, batch, schedule=schedule, credit_group_by="batch", credit_groups_every=2)
    known = Reader(policy, batch, config, schedule)
    assert known.rows_before(runs) == rows["others" if "credit_group_by" in changes else before]


def test_then_the_forward_ends_after_the_last_sampled_layer():
    """Layers 3 to 6 of nine are sampled; the rhythm is that of the whole pass, to the bit."""
    policy = make_policy(layers=9)
    batch = make_batch(policy)
    called = []
    for index, layer in enumerate(policy.decoder.layers):
        layer.register_forward_hook(lambda *_, index=index: called.append(index))
    head = policy.model.lm_head.register_forward_hook(lambda *_: called.append("head"))
    short = read(policy, batch, tokens=10_000, gradient_steps=1, credit_layers=5)
    assert called == list(range(7))
    assert short.log_probs.isnan().equal(batch.response_mask) and short.entropy.isnan().equal(batch.response_mask)
    head.remove()
    whole = read(policy, batch, tokens=10_000, gradient_steps=3, credit_layers=5)
    assert called[7:] == list(range(9)) and policy.decoder.config.num_hidden_layers == 9
    assert short.rhythm.waad.equal(whole.rhythm.waad) and short.rhythm.fai.equal(whole.rhythm.fai)
    nothing = read_batch(policy, batch, all_micros(batch), settings(gradient_steps=1, credit="none"), GroupSchedule())
    assert nothing.rhythm is None and len(called) == 16


def test_policy_comes_back_from_its_folder(policy, batch, tmp_path):
    policy.model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load_policy(str(tmp_path), settings(), ALONE)
    assert not loaded.training and loaded.model.config._attn_implementation == "packed"
    (micro,) = all_micros(batch, 10_000)
    assert torch.equal(loaded(micro)[0], policy(micro)[0])
    frozen = load_policy(str(tmp_path), settings(), ALONE, trains=False)
    assert not frozen(micro)[0].requires_grad


def test_gradient_checkpointing_changes_no_gradient(policy, batch, tmp_path):
    policy.model.save_pretrained(tmp_path)
    (micro,) = all_micros(batch, 10_000)
    gradients, calls = [], []
    for checkpointing in (False, True):
        loaded = load_policy(str(tmp_path), settings(gradient_checkpointing=checkpointing), ALONE).train()
        loaded.decoder.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
        loaded(micro)[0].sum().backward()
        gradients.append([parameter.grad for parameter in loaded.parameters()])
    assert len(calls) == 3 and all(map(torch.equal, *gradients))


SCALED = {
    "Cohere": {"logit_scale": 0.25},
    "Gemma2": {"final_logit_softcapping": 2.0},
    "Granite": {"logits_scaling": 3.0},
}


@pytest.mark.parametrize("name", SCALED)
def test_logits_that_are_scaled_behind_the_head_are_the_models_own(name, batch):
    model = ARCHITECTURES[name].build("sdpa", vocab_size=len(TOKENIZER), **SCALED[name])
    (micro,) = all_micros(batch, 10_000)
    check_head(model)
    log_probs, entropies = Policy(model, 0.7).eval()(micro, entropy=True)
    expected = [values[micro.answers] for values in plain(Policy(model, 0.7), batch, 0.7)]
    torch.testing.assert_close((log_probs, entropies), tuple(expected), rtol=1e-5, atol=1e-5)


def test_logits_that_are_made_otherwise_are_refused():
    ignores, changes = (ARCHITECTURES["Llama"].build("sdpa") for _ in range(2))
    check_head(changes)
    ignores.config.logits_scaling = 3.0  # HyperCLOVA X multiplies by it, say
    changes.register_forward_hook(lambda _, args, output: setattr(output, "logits", 2 * output.logits))
    for model in (ignores, changes):
        with pytest.raises(ValueError, match="--model must have logits that are its output layer's, scaled.*Llama"):
            check_head(model)


@pytest.mark.parametrize(
    "settings, kept",
    [
        ('{"top_p": 0.8, "temperature": 0.7}', {"do_sample": False, "top_p": None}),  # it is greedy, and stays so
        ('{"temperature": 0.0}', {"do_sample": False, "temperature": None}),
        ('{"do_sample": true, "top_p": 0.8, "length_penalty": 0.8}', {"do_sample": True, "top_p": 0.8}),
        ('{"num_beams": 1, "early_stopping": true}', {"early_stopping": None}),
        ('{"do_sample": true, "top_p": 0.8, "pad_token_id": -1}', {"top_p": 0.8, "pad_token_id": None}),
        ('{"do_sample": true, "top_p": 0.8, "output_scores": true}', {"do_sample": True, "top_p": 0.8}),
    ],
)
def test_a_model_whose_generation_settings_cannot_be_saved_is_mended(tmp_path, settings, kept):
    make_policy().model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(settings[:-1] + ', "eos_token_id": [1, 4]}')
    load_model(tmp_path / "model").save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again").generation_config
    assert {name: getattr(again, name) or (False if name == "do_sample" else None) for name in kept} == kept
    assert again.eos_token_id == [1, 4]


def test_a_model_that_shows_no_decoder_is_refused():
    with pytest.raises(ValueError, match="--model must have a decoder apart from its output layer, got Llama4For"):
        check_head(ARCHITECTURES["Llama4"].build("sdpa"))


@pytest.mark.parametrize("name", ["FalconH1", "Lfm2", "OPT", "Qwen3_5"])
def test_a_model_that_does_not_keep_packed_sequences_apart_is_refused(name):
    """Recurrent and convolution layers go on from one sequence into the next; so do transformers' masks of OPT."""
    model = ARCHITECTURES[name].build("sdpa")
    model.config.dtype = torch.float32
    with pytest.raises(
        ValueError, match=f"--model must keep packed sequences apart, got {name}.* with --attention sdpa"
    ):
        check_packing(Policy(model, 1.0).eval(), ALONE)


@pytest.mark.parametrize("attention", ["packed", "sdpa", "eager"])
def test_a_model_that_keeps_packed_sequences_apart_is_taken(attention):
    policy = make_policy(attention)
    policy.model.config.dtype = torch.float32
    check_packing(policy, ALONE)


def test_a_policy_whose_log_probabilities_are_not_finite_is_refused():
    policy = make_policy("packed")
    policy.model.config.dtype = torch.float32
    policy.model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="--model must give finite log-probabilities, got NaN .* with --dtype float32"):
        check_packing(policy, ALONE)


def test_a_run_begins_with_the_check_of_packed_sequences(policy, tmp_path, monkeypatch):
    def refuse(*_):
        raise ZeroDivisionError

    policy.model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("train.setup.check_packing", refuse)
    config = settings(model=str(tmp_path / "model"), output=str(tmp_path))
    with pytest.raises(ZeroDivisionError), open_run(config.change(seeds=(0,)), tmp_path / "run"):
        pass


def test_bfloat16_computes_in_bfloat16_and_keeps_float32(policy, batch, tmp_path):
    policy.model.save_pretrained(tmp_path)
    loaded = load_policy(str(tmp_path), settings(dtype="bfloat16"), ALONE)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    seen = []
    loaded.decoder.layers[0].mlp.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    (micro,) = all_micros(batch, 10_000)
    log_probs, _ = loaded(micro)
    assert seen == [torch.bfloat16] and log_probs.dtype == torch.float32
    assert 0 < (log_probs - policy(micro)[0]).abs().max() < 0.2
    log_probs.sum().backward()
    assert {parameter.grad.dtype for parameter in loaded.parameters()} == {torch.float32}
    before = {name: whole(tensor).clone() for name, tensor in weights_of(loaded.model).items()}
    with torch.no_grad():
        loaded(micro)  # leaves FSDP's root gathered, rounded
    for name, tensor in whole_weights(loaded.model, torch.float32):
        assert torch.equal(tensor, before[name]), name
        assert not torch.equal(tensor, tensor.bfloat16().float()) or "norm" in name
    World.leave()
