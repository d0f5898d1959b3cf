"""The state of rhythm credit in TRL's checkpoints: the spans of heads, the draws of random credit."""

import json

import pytest
import torch
from transformers.utils import logging

pytest.importorskip("trl", reason="TRL is not installed", exc_type=ImportError)
from trl_cases import ONE_STEP, TOKENIZER, TWO_LAYERS, make_trainer, weights_of

from rhythm_kernels.integrations import trl_state

pytestmark = pytest.mark.xdist_group("trl")


@pytest.mark.parametrize("changes", [{"credit_groups_every": 3}, {"credit": "random"}], ids=["groups", "random"])
def test_a_resumed_run_goes_on_to_the_bit(tmp_path, changes):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **changes, **TWO_LAYERS, **ONE_STEP}

    def answers(prompts, trainer):  # _step starts anew after a resume
        draw = torch.Generator().manual_seed(trainer.state.global_step)
        ids = [torch.randint(5, len(TOKENIZER), (12,), generator=draw).tolist() for _ in prompts]
        asked = [TOKENIZER.encode(prompt) for prompt in prompts]
        return {"prompt_ids": asked, "completion_ids": ids, "logprobs": [[-3.0] * 12] * len(ids)}

    whole = make_trainer(tmp_path / "whole", rollout_func=answers, **saving)
    whole.train()
    state = json.loads((tmp_path / "whole" / "checkpoint-2" / trl_state.STATE_FILE).read_text())
    assert (state["age"] == 2 and state["spans"] is not None) or changes == {"credit": "random"}
    resumed = make_trainer(tmp_path / "resumed", rollout_func=answers, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(value, whole.model.state_dict()[name]) for name, value in weights_of(resumed).items())
    assert whole._draws == resumed._draws == 8
    for mine, other in zip(whole._schedule.state_dict().values(), resumed._schedule.state_dict().values(), strict=True):
        assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other


def test_a_checkpoint_without_the_state_is_told_of(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2, **ONE_STEP)
    trainer.train()
    (tmp_path / "checkpoint-2" / trl_state.STATE_FILE).unlink()
    told = []
    monkeypatch.setattr(logging.get_logger(trl_state.__name__), "warning", told.append)
    resumed = make_trainer(tmp_path, max_steps=3, **ONE_STEP)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(told) == 1 and "is missing: the heads are ranked anew" in told[0]


def test_a_state_of_other_layers_is_not_used(tmp_path, monkeypatch):
    options = {"save_strategy": "steps", "save_steps": 2, "credit_groups_every": 8, **ONE_STEP}
    make_trainer(tmp_path, credit_layers=[1, 2], **options).train()
    told = []
    monkeypatch.setattr(logging.get_logger(trl_state.__name__), "warning", told.append)
    for layers, age in (([1, 2], 3), ([2, 3], 1)):
        resumed = make_trainer(tmp_path / "resumed", credit_layers=layers, **options | {"max_steps": 3})
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert resumed._schedule.state_dict()["age"] == age
    assert len(told) == 1 and "has the spans of layers [1, 2], not [2, 3]" in told[0]


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"age": 1}', '{"age": 1, "spans": [["x"]], "draws": 1, "layers": [1, 2]}', "[" * 100_000],
    ids=lambda text: text[:20],
)
def test_a_damaged_state_is_named(tmp_path, text):
    trainer = make_trainer(tmp_path, credit_layers=[1, 2])
    (tmp_path / trl_state.STATE_FILE).write_text(text)
    with pytest.raises(ValueError, match=f"{trl_state.STATE_FILE} must be what a checkpoint of rhythm credit holds"):
        trainer._load_optimizer_and_scheduler(str(tmp_path))
