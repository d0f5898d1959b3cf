"""Tiny GPTModels of megatron-core on a CPU, and what has to be replaced for want of CUDA."""

import contextlib
import functools
import inspect
import itertools
import re
import warnings
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LAYERS, HEADS, KEY_HEADS, HIDDEN, VOCABULARY = 6, 8, 4, 64, 61


class NoRngTracker:
    """Stands in for the tracker of CUDA's random states: dropout draws from the CPU's generator."""

    def is_initialized(self) -> bool:
        return False

    def fork(self, name: str | None = None):
        return contextlib.nullcontext()


@contextlib.contextmanager
def without_cuda() -> Iterator[None]:
    """Makes megatron-core run on a CPU inside this block. Some things of it have no other choice than CUDA."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one for each package that is not there
        from megatron.core import tensor_parallel
        from megatron.core.fusions import fused_softmax
        from megatron.core.models.common.embeddings import rotary_pos_embedding
        from megatron.core.tensor_parallel import layers, random
        from megatron.core.transformer import multi_latent_attention
        from megatron.core.transformer.torch_norm import WrappedTorchNorm

    with contextlib.ExitStack() as stack:

        def replace(owner: object, name: str, value: object) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        replace(torch.cuda, "current_device", lambda: "cpu")  # where buffers and rotary tables are made
        replace(torch.cuda, "synchronize", lambda *_: None)  # after the exchange of shapes between stages
        for module in (tensor_parallel, layers):
            replace(module, "get_cuda_rng_tracker", lambda *args, **kwargs: NoRngTracker())
        replace(random, "_get_all_rng_states", lambda: (torch.get_rng_state(),))  # recomputation sets them back
        replace(random, "_set_all_rng_states", torch.set_rng_state)
        replace(fused_softmax, "get_default_causal_mask", lambda tokens: _hidden(tokens, tokens, (tokens, 0)))
        replace(fused_softmax, "get_sliding_window_causal_mask", _hidden)
        replace(rotary_pos_embedding, "get_pos_emb_on_this_cp_rank", _own_positions)
        replace(multi_latent_attention, "HAVE_TE", False)  # it believes that Transformer Engine is there
        # torch's norms are refused with sequence parallelism, since their gradients need a sum over the ranks
        replace(WrappedTorchNorm, "__new__", lambda cls, hidden_size, eps, **_: nn.RMSNorm(hidden_size, eps))
        yield


class cpu_for_cuda(TorchFunctionMode):
    """A context in which tensors for "cuda" are made on the CPU: schedules count tokens there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return func(*args, **kwargs | ({"device": "cpu"} if kwargs.get("device") == "cuda" else {}))


def _own_positions(table: Tensor, dim: int, group) -> Tensor:
    """Returns the rows of a rotary table at the places of a rank's tokens."""
    return table.index_select(dim, places([0, table.shape[dim]], group.size())[group.rank()])


def _hidden(rows: int, keys: int, window: tuple[int, int]) -> Tensor:
    """Returns the keys that each row does not see, with so many keys before and behind it in its window."""
    ones = torch.ones(rows, keys, dtype=torch.bool)
    return ~ones.triu(keys - rows - window[0]).tril(keys - rows + window[1])


@contextlib.contextmanager
def megatron_groups(**sizes: int) -> Iterator[None]:
    """Sets up Megatron's groups on gloo, and takes them down; makes a group of one rank where there is none.

    Args:
        sizes: arguments of `initialize_model_parallel`.
    """
    alone = not dist.is_initialized()
    if alone:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with without_cuda():
            from megatron.core import parallel_state

            parallel_state.initialize_model_parallel(**sizes)
            try:
                yield
            finally:
                parallel_state.destroy_model_parallel()
    finally:
        if alone:
            dist.destroy_process_group()


def gpt(*, core: type | None = None, seed: int = 0, spec: dict | None = None, stages: tuple = (True, True), **options):
    """Returns a random GPTModel like a small Llama, with the weights of one rank whatever the number of ranks.

    Args:
        core: a class in place of DotProductAttention.
        spec: arguments of `get_gpt_layer_local_spec`.
        stages: whether the model has the embedding, and the output layer.
        options: fields of TransformerConfig, or of MLATransformerConfig with `multi_latent_attention`.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    spec = get_gpt_layer_local_spec(normalization="RMSNorm", **(spec or {}))
    if core is not None:
        spec.submodules.self_attention.submodules.core_attention = core
    defaults = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_query_groups": KEY_HEADS,
        "ffn_hidden_size": 96,
        "use_cpu_initialization": True,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "pipeline_dtype": torch.float32,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": nn.functional.silu,
        "add_bias_linear": False,
        "bias_dropout_fusion": False,
        "init_method_std": 0.15,  # far from uniform attention; scores stay below 10
    }
    make = MLATransformerConfig if options.get("multi_latent_attention") else TransformerConfig
    torch.manual_seed(seed)
    model = GPTModel(
        make(**defaults | options),
        spec,
        vocab_size=VOCABULARY + 3,
        max_sequence_length=256,
        position_embedding_type="rope",
        pre_process=stages[0],
        post_process=stages[1],
    )
    return model.eval()


class FusedCore(nn.Module):
    """Stands in for TEDotProductAttention: its arguments and shapes, with torch's fused attention inside.

    Context parallelism is done by gathering: the output is right, and each rank keeps its own part.
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, **_):
        super().__init__()
        self.config, self.attention_dropout = config, config.attention_dropout
        self.scale, self.qkv_format = softmax_scale, "sbhd"

    def forward(
        self,
        query,
        key,
        value,
        attention_mask,
        attn_mask_type,
        attention_bias=None,
        packed_seq_params=None,
        num_splits=None,
    ):
        from megatron.core import parallel_state

        group = parallel_state.get_context_parallel_group()
        if packed_seq_params is None:
            cuts = [0, query.shape[0] * group.size()]
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))  # [B, T, H, D]
        else:
            cuts = packed_seq_params.cu_seqlens_q_padded
            cuts = (packed_seq_params.cu_seqlens_q if cuts is None else cuts).tolist()
            query, key, value = (x[None] for x in (query, key, value))
        order = places(cuts, group.size())
        own, back = order[group.rank()], torch.cat(order).argsort()
        whole = [x if group.size() == 1 else _gathered(x, group)[:, back] for x in (query, key, value)]
        dropout = self.attention_dropout if self.training else 0.0
        parts = [
            nn.functional.scaled_dot_product_attention(
                *(x[:, begin:end].transpose(1, 2) for x in whole),
                dropout_p=dropout,
                is_causal=True,
                scale=self.scale,
                enable_gqa=True,
            )
            for begin, end in itertools.pairwise(cuts)
        ]
        out = torch.cat(parts, 2).transpose(1, 2)[:, own].flatten(2)  # [B, T of this rank, HQ D]
        return out.transpose(0, 1).contiguous() if packed_seq_params is None else out[0]


def places(cuts: list[int], size: int) -> list[Tensor]:
    """Returns the place of each token of each rank in the whole row, as Megatron cuts every sequence."""
    order = [[] for _ in range(size)]
    for begin, end in itertools.pairwise(cuts):
        runs = torch.arange(begin, end).chunk(2 * size) if size > 1 else [torch.arange(begin, end)]
        for rank in range(size):
            order[rank] += [runs[rank], runs[-1 - rank]] if size > 1 else runs
    return [torch.cat(own) for own in order]


def _gathered(x: Tensor, group) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    return torch.cat(parts, 1)


class Watched:
    """The q and k [B, H, T, D] that each layer's core attention of a model gets, by layer."""

    def __init__(self, model):
        self.inputs: dict[int, tuple[Tensor, Tensor]] = {}
        for module in model.modules():
            if hasattr(module, "core_attention"):
                watch = functools.partial(self._watch, module.layer_number - 1)
                module.core_attention.register_forward_pre_hook(watch, with_kwargs=True)

    def _watch(self, layer, core, args, kwargs) -> None:
        given = inspect.signature(core.forward).bind(*args, **kwargs).arguments
        q, k = (x if x.ndim == 4 else x[:, None] for x in (given["query"], given["key"]))
        self.inputs[layer] = q.detach().permute(1, 2, 0, 3), k.detach().permute(1, 2, 0, 3)


def fill_stage(model, full) -> None:
    """Copies the weights of a full model into a stage of a pipeline, whose layers count from 0 again."""
    weights = full.state_dict()
    first = model.decoder.layers[0].layer_number - 1
    names = {name: re.sub(r"(?<=layers\.)\d+", lambda n: str(int(n[0]) + first), name) for name in model.state_dict()}
    model.load_state_dict({name: weights[source] for name, source in names.items()})


def positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]).expand_as(ids)
