#!/usr/bin/env bash
# Trains Qwen3-4B-Base on Countdown with GRPO and rhythm credit, in verl 0.9.1, on one node with eight GPUs.
#
#   bash examples/verl/one_node.sh                       # any flag of verl or of the block `rhythm` may follow:
#   bash examples/verl/one_node.sh +rhythm.delta=drop trainer.logger='[console,wandb]'
#   STRATEGY=none bash examples/verl/one_node.sh         # the same run without credit
#   bash examples/verl/one_node.sh --cfg job             # prints the config and ends
#
# Needs verl 0.9.1 with vLLM or SGLang and FlashAttention, installed as verl's manual says. Then run in the same
# environment, on every node: pip install --no-build-isolation --no-deps PATH_OF_THIS_REPOSITORY
#
# Untested on a GPU. The tests load these flags with verl's config and run three steps of verl's trainer on a CPU, with
# a tiny model, tiny batches and fixed answers. Batch sizes and token budgets are meant for 80 GB and may need tuning.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHON=${PYTHON:-python3}
MODEL=${MODEL:-Qwen/Qwen3-4B-Base}
DATA=${DATA:-$HOME/data/countdown}             # with two nodes: a folder that both share
RUNS=${RUNS:-$HOME/runs/verl-countdown}        # the same
STRATEGY=${STRATEGY:-coupled}
NODES=${NODES:-1}
GPUS=${GPUS:-8}                                # per node

[ -e "$DATA/test.parquet" ] || "$PYTHON" "$HERE/countdown.py" --out "$DATA"

# 64 problems with 8 answers each in 16 optimizer steps, on-policy sampling at T = 1, no KL and no entropy term
flags=(
  algorithm.adv_estimator=grpo
  algorithm.use_kl_in_reward=False

  data.train_files="$DATA/train.parquet"
  data.val_files="$DATA/test.parquet"
  data.train_batch_size=64
  data.max_prompt_length=512
  data.max_response_length=1024
  data.filter_overlong_prompts=True
  reward.custom_reward_function.path="$HERE/countdown.py"

  actor_rollout_ref.model.path="$MODEL"
  actor_rollout_ref.model.use_remove_padding=True
  actor_rollout_ref.model.enable_gradient_checkpointing=True

  actor_rollout_ref.actor.strategy=fsdp2
  actor_rollout_ref.actor.optim.lr=1e-6
  actor_rollout_ref.actor.optim.weight_decay=0
  actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean   # as the presets of train/ and the example for TRL
  actor_rollout_ref.actor.ppo_mini_batch_size=4        # problems: 32 answers
  actor_rollout_ref.actor.use_dynamic_bsz=True
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384
  actor_rollout_ref.actor.use_kl_loss=False
  actor_rollout_ref.actor.entropy_coeff=0

  actor_rollout_ref.rollout.name=vllm
  actor_rollout_ref.rollout.n=8
  actor_rollout_ref.rollout.temperature=1.0
  actor_rollout_ref.rollout.tensor_model_parallel_size=1
  actor_rollout_ref.rollout.gpu_memory_utilization=0.6
  actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True
  actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=16384

  trainer.nnodes="$NODES"
  trainer.n_gpus_per_node="$GPUS"
  trainer.total_epochs=15
  trainer.total_training_steps=500
  trainer.test_freq=20
  trainer.save_freq=20
  trainer.logger='[console,tensorboard]'
  trainer.project_name=rhythm
  trainer.experiment_name="countdown-$STRATEGY"
  trainer.default_local_dir="$RUNS/$STRATEGY"

  +rhythm.strategy="$STRATEGY"                         # asks for rhythm credit
)

exec "$PYTHON" -m verl.trainer.main_ppo "${flags[@]}" "$@"
