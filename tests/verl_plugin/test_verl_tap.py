"""The statistics that verl's FSDP engine takes in its old-log-prob pass, against whole maps of each sequence."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
import verl_cases as cases
from transformers import Qwen3ForCausalLM

import rhythm_kernels.integrations.verl as plugin
import rhythm_kernels.integrations.verl_engines as verl_engines
from rhythm_kernels.heads import group_heads


@pytest.fixture(scope="module")
def engines(model_folder):
    made = {}

    def engine(strategy="fsdp2", **config):
        key = (strategy, *sorted(config.items()))
        if key not in made:
            made[key] = cases.make_engine(model_folder, strategy, **config)
        return made[key]

    return engine


FORMS = {
    "packed, dynamic micro-batches": {},
    "packed, fixed micro-batches": {"use_dynamic_bsz": False},
    "packed, one micro-batch": {"max_token_len_per_gpu": 1000},
    "padded, dynamic micro-batches": {"use_remove_padding": False},
    "padded, fixed micro-batches": {"use_remove_padding": False, "use_dynamic_bsz": False},
}


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp"])
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_dense_rhythm_and_leaves_the_log_probs(engines, model_folder, form, strategy):
    engine, fields = engines(strategy, packed=FORMS[form].get("use_remove_padding", True)), cases.make_fields()
    without = cases.log_prob_pass(engine, cases.make_batch(fields, **FORMS[form]))
    output = cases.log_prob_pass(engine, cases.make_batch(fields, {}, **FORMS[form]))
    assert without.keys() == {"log_probs", "entropy"}
    for name in without:
        assert torch.equal(output[name].offsets(), without[name].offsets())
        assert torch.equal(output[name].values(), without[name].values()), name
    cases.assert_rhythm(output, model_folder, fields)


def test_the_micro_batches_are_several_and_reordered(engines, monkeypatch):
    """The test above needs this: in one micro-batch, in order, it would not see a wrong order."""
    engine, fields = engines(), cases.make_fields()
    seen = []
    forward_step = type(engine).forward_step

    def spy(self, micro_batch, *args, **kwargs):
        seen.append(micro_batch["input_ids"].offsets().diff().tolist())
        return forward_step(self, micro_batch, *args, **kwargs)

    monkeypatch.setattr(type(engine), "forward_step", spy)
    cases.log_prob_pass(engine, cases.make_batch(fields, {}))
    lengths = [sum(pair) for pair in cases.LENGTHS]
    assert len(seen) > 2
    order = list(itertools.chain.from_iterable(seen))
    assert sorted(order) == sorted(lengths)
    assert order != lengths


def test_a_packed_length_that_verl_rounds_up(engines, model_folder):
    engine, fields = engines(pad_to_length=True, pad_to_length_bucket=32), cases.make_fields()
    output = cases.log_prob_pass(engine, cases.make_batch(fields, {}))
    cases.assert_rhythm(output, model_folder, fields)
    assert len(output["rhythm_spans"].unbind()) == len(cases.LENGTHS)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_a_micro_batch_without_a_response_token(engines, packed):
    """verl makes one of the rows that it pads a batch with."""
    engine, fields = engines(packed=packed), cases.make_fields([(9, 1)])
    fields["response_mask"] = cases.nested([torch.zeros(1, dtype=torch.long)])
    output = cases.log_prob_pass(engine, cases.make_batch(fields, {}, use_remove_padding=packed))
    for name in plugin.SIGNALS:
        assert torch.equal(output[name].values(), torch.zeros(10)), name


def test_fused_log_probs(engines, model_folder, monkeypatch):
    """verl's fused kernels replace the head of the model, not its attention."""
    fields = cases.make_fields()
    with monkeypatch.context() as patch:
        patch.setattr(Qwen3ForCausalLM, "forward", Qwen3ForCausalLM.forward)  # verl sets it for all models
        engine = engines("fsdp", fused=True)
        output = cases.log_prob_pass(engine, cases.make_batch(fields, {}, use_fused_kernels=True))
    cases.assert_rhythm(output, model_folder, fields)


def test_lora(engines, model_folder):
    """The adapters are new, and change nothing."""
    engine, fields = engines(lora=4), cases.make_fields()
    cases.assert_rhythm(cases.log_prob_pass(engine, cases.make_batch(fields, {})), model_folder, fields)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_given_head_groups_serve_every_sequence(engines, model_folder, packed):
    engine, fields = engines(packed=packed), cases.make_fields()
    calibration = cases.log_prob_pass(engine, cases.make_batch(fields, {}, use_remove_padding=packed))
    spans = torch.stack(calibration["rhythm_spans"].unbind())
    dense = cases.dense_of_each(model_folder, fields)
    torch.testing.assert_close(spans.double(), torch.stack(dense.spans), atol=2e-5, rtol=0)

    groups = group_heads(spans.mean(0)[None])
    request = {"options": {"groups_every": 2}, "groups": [group.flatten().tolist() for group in groups]}
    output = cases.log_prob_pass(engine, cases.make_batch(fields, request, use_remove_padding=packed))
    assert "rhythm_spans" not in output
    cases.assert_rhythm(output, model_folder, fields, groups=groups)


def test_in_16_bits_it_is_as_close_as_eager_attention(engines, model_folder):
    """verl's default precision is 16 bits. Its autocast does not round the statistics themselves."""
    engine, fields = engines(precision="bf16"), cases.make_fields()
    output = cases.log_prob_pass(engine, cases.make_batch(fields, {}))
    exact, eager = cases.dense_of_each(model_folder, fields), cases.dense_of_each(model_folder, fields, torch.bfloat16)
    for name, wanted, rounded in (("rhythm_waad", exact.waad, eager.waad), ("rhythm_fai", exact.fai, eager.fai)):
        found = output[name].values().double()
        wanted, rounded = torch.cat(wanted), torch.cat(rounded)
        assert (found - wanted).abs().max() <= 2 * (rounded - wanted).abs().max(), name


def test_nothing_is_read_that_was_not_asked_for(engines, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("collect was opened")

    monkeypatch.setattr(verl_engines, "collect", refuse)
    engine, fields = engines(), cases.make_fields()
    assert cases.log_prob_pass(engine, cases.make_batch(fields)).keys() == {"log_probs", "entropy"}


def test_an_update_is_not_read(engines, monkeypatch):
    monkeypatch.setattr(verl_engines, "collect", None)
    engine, batch = engines(), cases.make_batch(cases.make_fields(), {}, global_batch_size=6)

    def loss(model_output, data, dp_group):
        assert model_output.keys() == {"log_probs", "entropy"}
        return model_output["log_probs"].values().sum() * 0, {}

    with engine.train_mode():
        engine.forward_backward_batch(batch, loss)
        engine.optimizer_zero_grad()


def test_what_the_pass_refuses(engines):
    engine, fields = engines(), cases.make_fields()
    with pytest.raises(ValueError, match="unknown keys in the block rhythm: stratgey; there are strategy"):
        cases.log_prob_pass(engine, cases.make_batch(fields, {"options": {"stratgey": "local"}}))
    with pytest.raises(ValueError, match="needs text, got position ids with 3 dimensions"):
        verl_engines._check_text(torch.zeros(len(cases.LENGTHS), 4, 9))


def test_two_ranks_that_shard_the_model(model_folder, tmp_path):
    """Each rank has its own sequences; weights are gathered layer by layer."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "verl_two_ranks", str(model_folder), str(tmp_path)],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        text, _ = rank.communicate(timeout=120)
        assert rank.returncode == 0, text[-3000:]
    for rank in range(2):
        fields = cases.make_fields(cases.LENGTHS[rank::2], seed=rank)
        cases.assert_rhythm(torch.load(tmp_path / f"{rank}.pt", weights_only=False), model_folder, fields)
