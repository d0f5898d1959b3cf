"""The policy: how it is built, and what one forward says about each token of a batch."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import train.attention  # noqa: F401  registers "packed"
from rhythm_kernels import GroupDrift, GroupSchedule, Rhythm, collect, sampled_layers
from rhythm_kernels.fit import broken_weight
from train.batch import MicroBatch, Rollouts
from train.config import BadSetting, Config, Model
from train.distributed import World, shard

MOST_LOGITS = 2**26  # held at a time, 256 MiB in float32


class Policy(nn.Module):
    """A causal language model whose forward gives the log-probabilities of a packed row's answers, never its logits."""

    def __init__(self, model: PreTrainedModel, temperature: float):
        super().__init__()
        self.model, self.temperature = model, temperature

    @property
    def decoder(self) -> nn.Module:
        return self.model.get_decoder()

    def forward(
        self, micro: MicroBatch, *, head: bool = True, entropy: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """Log-probability of each token of the answers [m] and, if asked, the entropy in nats that it was drawn at."""
        hidden = self.decoder(
            input_ids=micro.ids,
            position_ids=micro.position_ids,
            use_cache=False,
            cu_seq_lens_q=micro.cu_seqlens,
            cu_seq_lens_k=micro.cu_seqlens,
            max_length_q=micro.longest,
            max_length_k=micro.longest,
        ).last_hidden_state[0]
        if not head:
            return None, None
        output = self.model.get_output_embeddings()
        chosen = micro.ids[0, micro.answers]
        return token_log_probs(
            hidden[micro.answers - 1], output.weight, output.bias, chosen, temperature=self.temperature, entropy=entropy
        )


def token_log_probs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, *, temperature: float, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """hidden [m, C], weight [V, C], bias [V], ids [m] -> log-probabilities [m], entropies [m]; float32 or wider.

    The logits of a few rows are made at a time, and again in the backward pass: [m, V] is never held.
    """

    def part(hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = linear(hidden, weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        total = logits.logsumexp(-1)
        log_probs = logits.gather(-1, ids[:, None]).squeeze(-1) - total
        if not entropy:
            return log_probs, None
        with torch.no_grad():
            rest = logits - total[:, None]
            return log_probs, -(rest.exp() * rest).sum(-1)

    rows = max(1, MOST_LOGITS // weight.shape[0])
    grad = torch.is_grad_enabled()
    parts = [
        checkpoint(part, *pair, use_reentrant=False) if grad else part(*pair)
        for pair in zip(hidden.split(rows), ids.split(rows), strict=True)
    ]
    log_probs, entropies = zip(*parts, strict=True)
    return torch.cat(log_probs), torch.cat(entropies) if entropy else None


class TokenStats(NamedTuple):
    """What a pass over the batch knows of its tokens; log_probs and entropy only where it ran the whole model."""

    log_probs: Tensor | None
    """[N] fp32, 0 in prompts."""
    entropy: Tensor | None
    """[N] fp32, nats, 0 in prompts."""
    rhythm: Rhythm | None = None
    """waad and fai, [1, N], where a strategy asks for it."""
    drift: GroupDrift | None = None
    """Of the head groups, where this pass was a calibration and not the first."""
    seconds: float = 0.0
    """Spent on the statistics."""
    bytes: int = 0
    """Most that the statistics of one micro-batch held."""


def needs_old_log_probs(config: Config) -> bool:
    """False where a batch has one optimizer step only: its own log-probabilities are then the old ones."""
    grpo = config.grpo
    return grpo.num_iterations * grpo.gradient_steps > 1 or config.credit.reads_entropy


@torch.no_grad()
def read_log_probs(policy: Policy, batch: Rollouts, micros: Sequence[MicroBatch]) -> Tensor:
    """[N] fp32 under a policy that is not trained; 0 in prompts."""
    found = torch.zeros(len(batch.ids), dtype=torch.float32, device=batch.ids.device)
    for micro in micros:
        log_probs, _ = policy(micro)
        found[micro.place[micro.answers]] = log_probs.float()
    return found


@torch.no_grad()
def read_batch(
    policy: Policy,
    batch: Rollouts,
    micros: Sequence[MicroBatch],
    config: Config,
    schedule: GroupSchedule,
    *,
    everything: bool = False,
    progress: Callable[[int], object] = lambda tokens: None,
) -> TokenStats:
    """The old-log-prob pass: log-probabilities and entropies under the policy and, in the same forward, its rhythm.

    Nothing is run twice: the statistics are read from the attention calls of this pass. Where no old log-probabilities
    are needed it ends after the last layer that is read, and without a strategy that reads the rhythm it does nothing.

    Args:
        micros: of the whole batch.
        schedule: has the head groups and takes this pass as one step.
        everything: also what this run's training does not need.
    """
    credit, log_probs = config.credit, everything or needs_old_log_probs(config)
    has_rhythm = everything or credit.reads_attention
    if not log_probs and not has_rhythm:
        return TokenStats(None, None)
    decoder, n = policy.decoder, len(batch.ids)
    count = decoder.config.num_hidden_layers
    layers = sampled_layers(count, credit.layers)
    found, entropy, waad, fai = torch.zeros(4, n, dtype=torch.float32, device=batch.ids.device)
    findings, most = [], 0
    rows = batch.per_sequence(batch.response_mask.long())
    for micro in micros:
        collected = None
        if has_rhythm and not micro.is_surplus:
            collected = collect(
                decoder,
                response_mask=batch.response_mask[micro.place][None],
                cu_seqlens=micro.bounds,
                groups=schedule.groups,
                **credit.collect_arguments,
            )
        with collected or nullcontext(), nullcontext() if log_probs else _ending_after(decoder, layers[-1]):
            chosen, entropies = policy(micro, head=log_probs, entropy=True)
        if micro.is_surplus:
            continue
        progress(len(micro.place))
        if log_probs:
            answers = micro.place[micro.answers]
            found[answers], entropy[answers] = chosen.float(), entropies.float()
        if collected:
            rhythm = collected.rhythm()
            waad[micro.place], fai[micro.place] = rhythm.waad[0], rhythm.fai[0]
            schedule.add(rhythm.spans, rows[micro.sequences])
            findings.append(collected.findings)
            most = max(most, sum(t.nbytes for stats in collected.stats.values() for t in stats if t is not None))
    known = (found, entropy) if log_probs else (None, None)
    if not has_rhythm:
        return TokenStats(*known)
    for each in findings:  # which wait for a GPU: only now, when all of its work is on the way
        each.check()
    seconds = sum(each.seconds for each in findings)
    return TokenStats(*known, Rhythm(waad=waad[None], fai=fai[None]), schedule.advance(), seconds, most)


@contextmanager
def _ending_after(decoder: nn.Module, layer: int):
    """A forward in this block runs the layers up to this one only."""
    count = decoder.config.num_hidden_layers
    decoder.config.num_hidden_layers = layer + 1
    try:
        yield
    finally:
        decoder.config.num_hidden_layers = count


def build_model(shape: Model, tokenizer: PreTrainedTokenizerBase, context: int) -> PreTrainedModel:
    """A Qwen3 with random weights from the global generator, in evaluation mode (it has no dropout)."""
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
    """A saved model, its weights in memory of their own, without dropout. BadSetting where a weight is no number.

    Loaded weights may lie in a mapped file, at an alignment that another process would not have; results that repeat
    to the bit want the same alignment.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    if name := broken_weight(model):
        raise BadSetting(f"--model must have finite weights, got {str(folder)!r}, whose {name} holds NaN or infinity")
    return _without_dropout(model).eval()


def _without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model


def load_policy(folder: str | Path, config: Config, world: World, *, trains: bool = True) -> Policy:
    """The policy on this rank's device, its float32 parameters sharded where there are several ranks or it computes in
    another dtype. The first rank reads the files, the others get their shards from it."""
    attention, dtype = config.model.attention, getattr(torch, config.model.dtype)
    if world.is_first:
        model = load_model(folder, attention=attention)
        check_head(model)
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(folder), dtype=torch.float32, attn_implementation=attention
            )
        _without_dropout(model).eval()
    model.config.dtype = dtype  # of what checkpoints export
    if config.model.gradient_checkpointing and trains:
        activation_checkpointing(model)
    policy = Policy(model, config.rollout.temperature).eval()
    if world.size == 1:
        policy.to(world.device)
        if dtype != torch.float32:
            shard(policy, policy.decoder.layers, world, dtype)
        return policy.requires_grad_(trains)
    state = model.state_dict() if world.is_first else {}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()} if world.is_first else {}
    shard(policy, policy.decoder.layers, world, dtype)
    policy.to_empty(device=world.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(policy.model, state, options=options)
    for name, buffer in policy.model.named_buffers():
        if world.is_first:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, 0)
    return policy.requires_grad_(trains)


def activation_checkpointing(model: PreTrainedModel) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name in later versions
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raises for a model whose logits are more than its output layer's, such as scaled or soft-capped ones."""
    ids = torch.arange(8)[None] % model.config.get_text_config().vocab_size
    attention = model.config._attn_implementation
    model.set_attn_implementation("sdpa" if attention == "packed" else attention)
    try:
        whole = model(ids, use_cache=False).logits
        hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state
    finally:
        model.set_attn_implementation(attention)
    plain = model.get_output_embeddings()(hidden)
    if not torch.allclose(whole.float(), plain.float(), rtol=1e-3, atol=1e-3):
        raise BadSetting(
            f"--model must have logits that are its output layer's alone, got {type(model).__name__}, which "
            "changes them (scaling or soft-capping): its log-probabilities would be wrong here"
        )
