"""Runs verl's own training on a CPU, with fixed answers: python -m cpu_run FOLDER OVERRIDE...

`run_ppo`, its task runner, trainer, Ray workers with the FSDP engine, and transfer queue are verl's. There is no
inference engine: answers of fixed lengths are drawn from a seed, one too few. FOLDER gets, for each step, what the
update of the actor is given, and the metrics.
"""

import sys
from pathlib import Path

import numpy as np
import ray
import torch
import verl  # noqa: F401  before its parts: it loads the plug-ins
from hydra import compose, initialize_config_dir
from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config
from verl_cases import CONFIG

LENGTHS = [(5, 30), (9, 41), (3, 12), (7, 1), (2, 26), (11, 33), (4, 22), (6, 17)]
"""Prompt and response tokens of each answer, in turn."""
FIELDS = ["uid", "input_ids", "response_mask", "rm_scores", "old_log_probs", "entropy", "advantages"]
RHYTHM = ["rhythm_waad", "rhythm_fai"]


class FixedAnswers:
    """Stands for AgentLoopManagerTQ: puts answers into the transfer queue as it does."""

    def __init__(self, config):
        self.config = config

    @classmethod
    def create(cls, config, **_):
        return cls(config)

    def generate_sequences(self, prompts) -> None:
        import transfer_queue as tq
        from verl.utils.tensordict_utils import list_of_dict_to_tensordict

        step, count = prompts["global_steps"], self.config.actor_rollout_ref.rollout.n
        keys, rows, tags = [], [], []
        for place, uid in enumerate(prompts["uid"]):
            answers = count - (place == 0)  # as if one had failed
            for session in range(answers):
                number = place * count + session
                prompt, response = LENGTHS[number % len(LENGTHS)]
                keys.append(f"{uid}_{session}_0")
                rows.append(self._answer(uid, prompt, response, seed=1000 * step + number))
                length = {"prompt_len": prompt, "response_len": response, "seq_len": prompt + response}
                steps = dict.fromkeys(("global_steps", "min_global_steps", "max_global_steps"), step)
                tags.append({"status": "success"} | length | steps)
        tq.kv_batch_put(keys=keys, partition_id="train", fields=list_of_dict_to_tensordict(rows), tags=tags)
        finished = [{"status": "finished"}] * len(prompts["uid"])
        tq.kv_batch_put(keys=list(prompts["uid"]), partition_id="train", tags=finished)

    @staticmethod
    def _answer(uid: str, prompt: int, response: int, seed: int) -> dict:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(61, (prompt + response,), generator=generator)
        mask = torch.ones(response, dtype=torch.long)
        if response > 20:
            mask[8:14] = 0  # as of a tool's answer
        scores = torch.zeros(response)
        scores[-1] = float(torch.rand(1, generator=generator))
        return {
            "uid": uid,
            "prompts": ids[:prompt],
            "responses": ids[prompt:],
            "input_ids": ids,
            "position_ids": torch.arange(len(ids)),
            "response_mask": mask,
            "loss_mask": mask,
            "rm_scores": scores,
            "rollout_log_probs": -4 * torch.rand(response, generator=generator),
            "num_turns": 2,
        }


def register_trainer(folder: Path) -> None:
    from verl.trainer.ppo.v1 import trainer_base
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    RolloutReplicaRegistry.register("fixed", lambda: None)

    @trainer_base.register_trainer("cpu")
    class CPUTrainer(trainer_base.PPOTrainer):
        """PPOTrainerSync without replicas of an inference engine; keeps the batches that it trains on."""

        _enable_hybrid_replicas = False

        def on_step_end(self):
            pass

        def on_sample_end(self):
            pass

        def _update_actor(self, batch, metrics):
            import transfer_queue as tq

            names = FIELDS + (RHYTHM if self.config.get("rhythm") else [])
            data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
            found = {name: list(data[name]) if name == "uid" else list(data[name].unbind()) for name in names}
            batch = super()._update_actor(batch, metrics)
            kept = {name: float(value) for name, value in metrics.items() if np.ndim(value) == 0}
            torch.save({"batch": found, "metrics": kept}, folder / f"step{self.global_steps}.pt")
            return batch


@ray.remote
class Runner(TaskRunnerV1.__ray_metadata__.modified_class):
    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, config):
        register_trainer(self.folder)
        super().run(config)


class RunnerIn:
    """`run_ppo` calls `.remote()` without arguments."""

    def __init__(self, folder: Path):
        self.folder = folder

    def remote(self):
        return Runner.remote(self.folder)


def main() -> None:
    with initialize_config_dir(str(CONFIG), version_base=None):
        config = compose("ppo_trainer", overrides=sys.argv[2:])
    validate_config(config, need_reference_policy(config), need_critic(config))
    run_ppo(config, RunnerIn(Path(sys.argv[1])))
    ray.shutdown()


if __name__ == "__main__":
    main()
