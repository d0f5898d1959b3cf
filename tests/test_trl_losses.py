"""The losses that rhythm credit goes into: TRL's own with each kind of ratio, and those of other trainers."""

import importlib
import pkgutil

import pytest
import torch
from packaging.version import Version
from transformers import Trainer

pytest.importorskip("trl", reason="TRL is not installed", exc_type=ImportError)
import datasets
import trl.experimental
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gmpo import GMPOTrainer
from trl_cases import (
    OLD_PASS,
    ONE_STEP,
    PROMPTS,
    TWO_LAYERS,
    WAYS,
    Recorder,
    Recording,
    assert_expected,
    assert_trained,
    make_config,
    make_trainer,
    run,
    weights_of,
)

from rhythm_kernels.integrations.trl import OLD, RhythmGRPOConfig, RhythmGRPOTrainer, RhythmMixin

pytestmark = pytest.mark.xdist_group("trl")

OFF_POLICY = {"num_iterations": 2, "max_steps": 4, **OLD_PASS}  # ratios that are not 1
GSPO = {"importance_sampling_level": "sequence_token"}
RATIO_LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "sapo", "cispo"]
if Version(trl.__version__) >= OLD:  # where luspo is not refused
    RATIO_LOSSES.append("luspo")


def one_a_time(way):
    """Micro-batches of one row."""
    factor = way["gradient_accumulation_steps"]
    return {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4 * factor, "steps_per_generation": 8}


# ---- GSPO-token ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("credit", ["coupled", "none"])
@pytest.mark.parametrize("loss_type", RATIO_LOSSES)
def test_gspo_token_is_gspo_where_all_tokens_have_one_advantage(tmp_path, loss_type, credit):
    options = {"loss_type": loss_type, "epsilon": 0.02, "epsilon_high": 5.0 if loss_type == "cispo" else 0.02}
    plain = {"kind": GRPOTrainer, "config": GRPOConfig, **options, **OFF_POLICY}
    wanted = weights_of(run(tmp_path, importance_sampling_level="sequence", **plain))
    changes = {"credit": credit, "credit_amplification": 1.0, **GSPO, **options, **OFF_POLICY, **TWO_LAYERS}
    for name, value in weights_of(run(tmp_path, RhythmGRPOTrainer, **changes)).items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-4)
    token = weights_of(run(tmp_path, **plain))
    assert max((value - wanted[name]).abs().max() for name, value in token.items()) > 2e-3


class LogProbs(GRPOTrainer):
    """Keeps the log-probs of each loss, with their gradients, and the inputs of the loss."""

    def __init__(self, *args, **named):
        self.kept = []
        super().__init__(*args, **named)

    def _get_per_token_logps_and_entropies(self, *args, **named):
        found = super()._get_per_token_logps_and_entropies(*args, **named)
        if found[0].requires_grad:
            found[0].retain_grad()
            self.log_probs = found[0]
        return found

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        mask = inputs["completion_mask"] * inputs["tool_mask"]
        old = dict(inputs).get("old_per_token_logps", self.log_probs.detach())
        self.kept.append((self.log_probs, old, inputs["advantages"], mask))
        return loss


class RhythmLogProbs(RhythmMixin, LogProbs):
    pass


@pytest.mark.parametrize("way", [OFF_POLICY, ONE_STEP], ids=["old pass", "loss"])
def test_gspo_token_gives_each_token_its_own_credit(tmp_path, way):
    """The paper's objective, written out, has the sequence's ratio, through which each token's gradient flows."""
    options = {"loss_type": "grpo", "epsilon": 0.05, "epsilon_high": 0.1, "max_grad_norm": 1e9}
    trainer = run(tmp_path, RhythmLogProbs, **options, **GSPO, **way, **TWO_LAYERS)
    assert len(trainer.kept) >= 4
    ratios = []
    for log_probs, old, advantages, mask in trainer.kept:
        own = log_probs.detach().double().requires_grad_()
        sequence = (((own - old) * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)).exp()
        ratio = sequence.detach() * (own - own.detach()).exp()
        ratios.append(sequence.detach())
        each = torch.min(ratio * advantages, ratio.clamp(0.95, 1.1) * advantages)
        loss = -((each * mask).sum(-1) / mask.sum(-1)).mean() / way["gradient_accumulation_steps"]
        (wanted,) = torch.autograd.grad(loss, own)
        torch.testing.assert_close(log_probs.grad, wanted.float(), rtol=1e-4, atol=1e-7)
        assert (advantages.max(-1).values > advantages.min(-1).values).any()  # credit makes a difference
    assert way is ONE_STEP or (torch.cat(ratios) - 1).abs().max() > 0.01


def test_gspo_token_in_an_evaluation_is_gspo(tmp_path):
    asked = datasets.Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
    losses = []
    for kind, config, level in (
        (GRPOTrainer, GRPOConfig, "sequence"),
        (RhythmGRPOTrainer, RhythmGRPOConfig, "sequence_token"),
    ):
        options = {"importance_sampling_level": level, "eval_dataset": asked, **OLD_PASS}
        changes = {"per_device_eval_batch_size": 4, "num_generations_eval": 2}
        losses.append(make_trainer(tmp_path, kind, config=config, **options, **changes).evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_what_a_sequence_ratio_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"got sequence: .* sequence_token \(GSPO-token\) keeps the sequence's ratio"):
        make_config(tmp_path, importance_sampling_level="sequence")
    with pytest.raises(ValueError, match="must be token where loss_type=vespo, got sequence_token"):
        make_config(tmp_path, loss_type="vespo", **GSPO)


def test_a_level_that_is_set_behind_the_config_is_refused(tmp_path):
    config = make_config(tmp_path, **ONE_STEP)
    config.importance_sampling_level = "sequence"
    trainer = make_trainer(tmp_path, **ONE_STEP)
    trainer.importance_sampling_level = config.importance_sampling_level
    with pytest.raises(RuntimeError, match=r"GRPOTrainer._compute_loss must take advantages \[B, C\]"):
        trainer.train()


# ---- losses of other trainers ----------------------------------------------------------------------------------------


class Reinforce(Recorder):
    """Takes both forms of advantages, and has metrics of its own."""

    def _compute_loss(self, model, inputs):
        mask = inputs["completion_mask"] * inputs["tool_mask"]
        log_probs, entropies, _ = self._pass_of(model, inputs)
        advantages = inputs["advantages"]
        advantages = advantages[:, None] if advantages.ndim == 1 else advantages
        self._metrics["train"]["mine"].append(torch.rand(()).item() + entropies.mean().item())
        self.losses.append((len(self.generations) - 1, {name: inputs[name] for name in inputs}))
        return -(self.weigh(advantages, log_probs, mask) * mask).sum() / mask.sum()

    def _pass_of(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        valid = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        # by position, as TRL takes them too
        return self._get_per_token_logps_and_entropies(model, ids, valid, inputs["completion_ids"].shape[1], None, True)

    def weigh(self, advantages, log_probs, mask):
        return advantages * log_probs


class MeanOfSequence(Reinforce):
    def weigh(self, advantages, log_probs, mask):
        return (advantages * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True) * log_probs


class FirstOfSequence(Reinforce):
    def weigh(self, advantages, log_probs, mask):
        return advantages[:, :1] * log_probs


class Normalized(Reinforce):
    def weigh(self, advantages, log_probs, mask):
        return advantages / advantages.norm() * log_probs


class Shifted(Reinforce):
    def weigh(self, advantages, log_probs, mask):
        return advantages.expand_as(log_probs).roll(5, 1) * log_probs


class Signs(Reinforce):
    def weigh(self, advantages, log_probs, mask):
        return advantages.sign() * log_probs


class OffPolicyMean(Reinforce):
    """Right where the ratio is 1."""

    def weigh(self, advantages, log_probs, mask):
        change = log_probs.detach() - log_probs.detach().roll(1, 1)
        return torch.where(change.abs() > 0.05, advantages.mean(), advantages) * log_probs


class PerSequence(Reinforce):
    """Takes only [B], as GMPO does."""

    def _compute_loss(self, model, inputs):
        log_probs, *_ = self._pass_of(model, inputs)
        return -(log_probs.mean(-1) * inputs["advantages"]).mean()


@WAYS
def test_a_loss_of_ones_own_that_takes_token_advantages_is_credited(tmp_path, way):
    trainer = make_trainer(tmp_path, type("Mine", (RhythmMixin, Reinforce), {}), **TWO_LAYERS, **way)
    before = weights_of(trainer)
    trainer.train()
    assert_expected(trainer)
    assert_trained(trainer, before)


@WAYS
@pytest.mark.parametrize("sizes", ["four rows", "one row", "rows as tokens", "one token"])
@pytest.mark.parametrize(
    "base",
    [GMPOTrainer, MeanOfSequence, FirstOfSequence, Normalized, Shifted, Signs, OffPolicyMean, PerSequence],
    ids=lambda base: base.__name__,
)
def test_a_loss_that_does_not_give_tokens_their_own_advantage_is_refused(tmp_path, base, way, sizes):
    lengths = {"rows as tokens": 4, "one token": 1}

    def answers(prompts, trainer):
        draw = torch.Generator().manual_seed(trainer._step)
        length = lengths.get(sizes, 11)
        ids = [torch.randint(5, 20, (length,), generator=draw).tolist() for _ in prompts]
        logprobs = [[-3.0] * length] * len(ids)
        mask = [[1] * length] * len(ids)
        return {"prompt_ids": [[7, 8, 9]] * len(ids), "completion_ids": ids, "logprobs": logprobs, "env_mask": mask}

    changes = one_a_time(way) if sizes == "one row" else way
    kind = type("Mixed", (RhythmMixin, base), {})
    trainer = make_trainer(tmp_path, kind, rollout_func=answers, credit="random", max_steps=1, **changes)
    before = weights_of(trainer)
    name = next(cls for cls in base.__mro__ if "_compute_loss" in vars(cls)).__name__
    with pytest.raises(RuntimeError, match=rf"{name}._compute_loss must take advantages \[B, C\], and multiply each"):
        trainer.train()
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())


def test_the_proof_leaves_no_trace(tmp_path):
    """Weights, metrics and random states are those of a run that believes the loss."""
    kind, found = type("Mine", (RhythmMixin, Reinforce), {}), []
    for believed in (False, True):
        trainer = make_trainer(tmp_path, kind, **TWO_LAYERS, **ONE_STEP)
        trainer._is_proven = believed
        trainer.train()
        timeless = [
            {name: value for name, value in record.items() if "time" not in name and "second" not in name}
            for record in trainer.state.log_history
        ]
        found.append((weights_of(trainer), timeless[:2], torch.get_rng_state(), trainer.forwards, len(trainer.losses)))
    (weights, log, state, forwards, losses), (others, other_log, other_state, other_forwards, _) = found
    assert all(torch.equal(value, others[name]) for name, value in weights.items())
    assert log == other_log and torch.equal(state, other_state)
    assert forwards == other_forwards and losses == 4


def test_a_loss_above_the_mixin_must_come_through_it(tmp_path):
    def own(self, model, inputs):
        log_probs, *_ = Reinforce._pass_of(self, model, inputs)
        return -log_probs.mean()

    def whole(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return own(self, model, inputs)

    def scaled(self, model, inputs):
        return 2 * super(type(self), self)._compute_loss(model, inputs)

    for way in (OLD_PASS, ONE_STEP):
        for methods in ({"_compute_loss": own}, {"compute_loss": whole}):
            trainer = make_trainer(tmp_path, type("Above", (RhythmGRPOTrainer,), methods), **way)
            with pytest.raises(RuntimeError, match="Above computed its loss without RhythmMixin._compute_loss"):
                trainer.train()
        trainer = run(tmp_path, type("Scaled", (Recording,), {"_compute_loss": scaled}), **TWO_LAYERS, **way)
        assert_expected(trainer)


@WAYS
def test_advantages_of_ones_own_are_credited(tmp_path, way):
    """A class above the mixin may compute advantages anew: credit multiplies what the loss would have had."""

    def anew(self, inputs):
        output = super(type(self), self)._generate_and_score_completions(inputs)
        output["advantages"] = self.generations[-1][1]["advantages"] = output["advantages"].abs() + 1
        return output

    kind = type("Anew", (Recording,), {"_generate_and_score_completions": anew})
    assert_expected(run(tmp_path, kind, **TWO_LAYERS, **way))


def test_a_mask_that_the_loss_changes_is_refused(tmp_path):
    class Fewer(Recorder):
        def _compute_loss(self, model, inputs):
            inputs["completion_mask"] = inputs["completion_mask"].clone()
            loss = super()._compute_loss(model, inputs)
            inputs["completion_mask"][0, 1] = 0
            return loss

    class FewerTools(Recorder):
        def _compute_loss(self, model, inputs):
            inputs["tool_mask"] = inputs["tool_mask"].clone()
            inputs["tool_mask"][:, 0] = 0
            return super()._compute_loss(model, inputs)

    for base in (Fewer, FewerTools):
        trainer = make_trainer(tmp_path, type("Mixed", (RhythmMixin, base), {}), **TWO_LAYERS, **ONE_STEP)
        with pytest.raises(RuntimeError, match="are not those that were read"):
            trainer.train()


def test_a_batch_that_loses_its_credit_is_refused(tmp_path):
    def without(self, inputs):
        output = super(type(self), self)._generate_and_score_completions(inputs)
        return {name: value for name, value in output.items() if "rhythm" not in name}

    kind = type("Loses", (Recording,), {"_generate_and_score_completions": without})
    trainer = make_trainer(tmp_path, kind, **OLD_PASS)
    with pytest.raises(RuntimeError, match="the batch has lost rhythm_gamma"):
        trainer.train()


# ---- TRL's other trainers --------------------------------------------------------------------------------------------


def experimental_trainers() -> dict[str, type]:
    found = {}
    for module in pkgutil.iter_modules(trl.experimental.__path__):
        if module.name == "openreward":  # an environment; needs its package
            continue
        package = importlib.import_module(f"trl.experimental.{module.name}")
        for name in dir(package):
            if name.endswith("Trainer") and isinstance(getattr(package, name), type):
                found[name] = getattr(package, name)
    return found


@pytest.mark.skipif(Version(trl.__version__) < OLD, reason="its experimental trainers need another vLLM")
def test_every_experimental_trainer_is_refused_or_proven():
    """Only GMPO's is a GRPOTrainer, and its loss is refused. The others are refused at once, since they are none."""
    trainers = experimental_trainers()
    assert {"A2POTrainer", "AsyncGRPOTrainer", "GMPOTrainer", "SDFTTrainer", "SDPOTrainer", "TPOTrainer"} < set(
        trainers
    )
    assert [name for name, kind in trainers.items() if issubclass(kind, GRPOTrainer)] == ["GMPOTrainer"]
    for name, kind in {**trainers, "RLOOTrainer": trl.RLOOTrainer}.items():
        if kind is not GMPOTrainer:
            with pytest.raises(TypeError, match=f"RhythmMixin needs a GRPOTrainer after it, Mixed{name} is none"):
                type(f"Mixed{name}", (RhythmMixin, kind), {})


def test_the_mixin_comes_before_its_trainer():
    with pytest.raises(TypeError, match="Late must name RhythmMixin before its trainer"):
        type("Late", (Recorder, RhythmMixin), {})
    with pytest.raises(TypeError, match="needs a GRPOTrainer after it"):
        type("Base", (RhythmMixin, Trainer), {})
    alone = type("Alone", (RhythmMixin,), {})  # a mixin in turn
    assert issubclass(type("Good", (alone, GRPOTrainer), {}), RhythmMixin)
    with pytest.raises(TypeError, match="needs a GRPOTrainer after it"):
        alone(None)
