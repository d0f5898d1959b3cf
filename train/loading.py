"""Builds a model from scratch or loads one onto the rank's device, in shards if there are several ranks."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import train.attention  # noqa: F401  registers "packed"
from rhythm_kernels.logits import logit_scale
from rhythm_kernels.weights import broken_weight, load_whole, weights_digest
from train.batch import MicroBatch, Rollouts, pack, take
from train.config import BadSetting, Config, Model
from train.distributed import World, shard, whole_weights
from train.policy import Policy
from train.rollout import Completion

SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p")  # names in a generation_config
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def build_model(shape: Model, tokenizer: PreTrainedTokenizerBase, context: int) -> PreTrainedModel:
    """Returns a Qwen3 in evaluation mode, with random weights from the global generator."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.mlp_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head_size,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    return Qwen3ForCausalLM(config).eval()


def load_model(folder: str | Path, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> PreTrainedModel:
    """Returns a saved model in evaluation mode, without dropout.

    Raises:
        BadSetting: a package is missing, or a weight is NaN or infinite.
        ValueError: those of `load_whole`.
    """
    try:
        model = load_whole(folder, dtype=dtype, attn_implementation=attention)
    except ImportError as error:
        what = f"--model {str(folder)!r} with --attention {attention}"
        raise BadSetting(f"{what} needs a package that is not installed: {error}") from error
    _let_it_be_saved(model)
    for parameter in model.parameters():
        # A mapped file may have an alignment that differs between processes, and with it the last bits of sums.
        parameter.data = parameter.data.clone()
    if name := broken_weight(model):
        raise BadSetting(f"--model must have finite weights, got {str(folder)!r}, whose {name} holds NaN or infinity")
    return _without_dropout(model).eval()


def digest_of_policy(policy: Policy) -> str:
    """Returns a digest of the policy's weights, the same on any number of ranks; all of them call it."""
    return weights_digest(whole_weights(policy.model, torch.float32))


def _let_it_be_saved(model: PreTrainedModel) -> None:
    """Leaves out of generation settings what makes transformers refuse to save them; the trainer reads none.

    Many models come with a temperature or a top_p and without do_sample: they generate greedily, and still do.
    """
    before = model.generation_config
    try:
        before.validate(strict=True)
    except ValueError:
        names = [*SPECIAL_TOKENS, *(SAMPLING if before.do_sample else ())]
        values = {name: getattr(before, name, None) for name in names}
        valid = {name: value for name, value in values.items() if not isinstance(value, int) or value >= 0}
        model.generation_config = GenerationConfig(**valid)


def _without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model


def load_policy(folder: str | Path, config: Config, world: World, *, trains: bool = True) -> Policy:
    """Returns the policy on this rank's device, with float32 parameters.

    They are sharded if there are several ranks or the policy computes in another dtype. The first rank reads the
    files and the others get their shards from it.
    """
    attention, dtype = config.model.attention, getattr(torch, config.model.dtype)
    loaded: list[PreTrainedModel] = []

    def read() -> None:
        loaded.append(load_model(folder, attention=attention))
        check_head(loaded[0])

    world.from_first(read)  # where it raises, the other ranks do too, and do not wait for shards
    if world.is_first:
        model = loaded.pop()
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(folder), dtype=torch.float32, attn_implementation=attention
            )
        _without_dropout(model).eval()
    model.config.dtype = dtype  # the dtype in which checkpoints export the model
    if config.model.gradient_checkpointing and trains:
        activation_checkpointing(model)
    policy = Policy(model, config.rollout.temperature).eval()
    if world.size > 1:
        _deal_out(policy, world, dtype)
    else:
        policy.to(world.device)
        if dtype != torch.float32:
            shard(policy, policy.decoder.layers, world, dtype)
    return policy.requires_grad_(trains)


def _deal_out(policy: Policy, world: World, dtype: torch.dtype) -> None:
    """Shards the policy and fills the shards, and the buffers that no file holds, from the first rank's model."""
    state = policy.model.state_dict() if world.is_first else {}
    buffers = [buffer.clone() for buffer in policy.model.buffers()] if world.is_first else []
    shard(policy, policy.decoder.layers, world, dtype)
    policy.to_empty(device=world.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(policy.model, state, options=options)
    for index, buffer in enumerate(policy.model.buffers()):
        if world.is_first:
            buffer.copy_(buffers[index])
        dist.broadcast(buffer, 0)


def activation_checkpointing(model: PreTrainedModel) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name in later versions
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raises BadSetting for a model whose logits are not those that `Policy` makes of its decoder's states."""
    ids = torch.arange(8)[None] % model.config.get_text_config().vocab_size
    attention = model.config._attn_implementation
    model.set_attn_implementation("sdpa" if attention == "packed" else attention)
    try:
        logits = model(ids, use_cache=False).logits
        hidden = getattr(model.get_decoder()(ids, use_cache=False), "last_hidden_state", None)
    finally:
        model.set_attn_implementation(attention)
    if hidden is None:  # transformers 5.19 returns the whole model as the decoder of Llama 4
        raise BadSetting(f"--model must have a decoder apart from its output layer, got {type(model).__name__}")
    made = logit_scale(model.config)(model.get_output_embeddings()(hidden).float())
    if not torch.allclose(logits.float(), made, rtol=1e-3, atol=1e-3):
        raise BadSetting(
            f"--model must have logits that are its output layer's, scaled or soft-capped as its config says, got "
            f"{type(model).__name__}: its log-probabilities would be wrong here"
        )


def short_answers(policy: Policy, world: World, first: int = 1) -> tuple[Rollouts, MicroBatch]:
    """Returns a batch of two answers of 15 tokens in one row, of which another `first` changes the first."""
    vocabulary = policy.model.config.get_text_config().vocab_size
    sequences = [[first * t % vocabulary for t in range(1, 17)], [t % vocabulary for t in range(16)]]
    answers = [Completion(ids[1:], [0.0] * 15, "stop") for ids in sequences]
    batch = pack([ids[:1] for ids in sequences], answers, 1, world.device)
    return batch, take(batch, [0, 1])


@torch.no_grad()
def check_packing(policy: Policy, world: World) -> None:
    """Raises BadSetting if an answer's log-probabilities depend on the sequence packed before it. All ranks call it.

    Attention of the training is kept inside a sequence; recurrent and convolution layers mostly are not.
    """
    # two rows that differ in their first sequence alone
    of_second = [policy(short_answers(policy, world, other)[1])[0][15:] for other in (1, 2)]
    # the same kernels run on the same shapes; only experts get other numbers of tokens, and may round otherwise
    dtype = str(policy.model.config.dtype).removeprefix("torch.")
    if not all(log_probs.isfinite().all() for log_probs in of_second):
        raise BadSetting(f"--model must give finite log-probabilities, got NaN or infinity with --dtype {dtype}")
    moved = (of_second[1] - of_second[0]).abs().max().item()
    if not moved <= (1e-3 if policy.model.config.dtype == torch.float32 else 0.1):
        raise BadSetting(
            f"--model must keep packed sequences apart, got {type(policy.model).__name__} with --attention "
            f"{policy.model.config._attn_implementation}: a log-probability moved by {moved:.2g} with another sequence "
            "before its own, as where layers carry a state along the row"
        )
