"""Statistics under torch's own context parallelism: ring attention, each rank with two runs of every row."""

import pytest
import torch
import torch.distributed as dist
from accelerate.big_modeling import _attach_context_parallel_hooks
from ranks import on_ranks
from sharded import TOKENS, Row, build, watch_inputs
from test_parallel import check, compare, options_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn import functional

from rhythm_kernels import Parallel, collect

pytestmark = pytest.mark.xdist_group("ranks")


def flash_kernel(q, k, v, dropout=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    """Stands for the CUDA kernel that torch's ring attention calls: the output and the natural log-sum-exp."""
    scores = (q.double() @ k.double().mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    lse = scores.logsumexp(-1)
    out = ((scores - lse[..., None]).exp() @ v.double()).to(q.dtype)
    nothing = torch.tensor(0)
    return out, lse.float(), nothing, nothing, q.shape[2], k.shape[2], nothing, nothing, nothing


def scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Chooses the kernel of a GPU."""
    assert attn_mask is None
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]


def ring_of_torch():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    row = Row("zigzag")
    row.mask = None  # torch's ring attention knows no padding
    row.positions = torch.arange(TOKENS).expand(2, TOKENS)
    row.response = row.response.clone()
    model, whole = build("llama", num_key_value_heads=6), build("llama", num_key_value_heads=6)
    model.set_attn_implementation("sdpa")
    _attach_context_parallel_hooks(model)
    functional.scaled_dot_product_attention = scaled_dot_product_attention
    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_dot_product_flash_attention", flash_kernel, "CPU")
    options, seen = options_of(grouped=False), watch_inputs()
    ids, positions, response = row.ids.clone(), row.positions.clone(), row.response.clone()
    parts = {"buffers": [ids, positions, response], "buffer_seq_dims": [1, 1, 1]}
    with (
        torch.no_grad(),
        context_parallel(mesh, **parts),  # which cuts the buffers in place
        collect(model, response_mask=response, parallel=Parallel(tokens=mesh), **options) as c,
    ):
        model(ids, position_ids=positions, use_cache=False)
    assert torch.equal(c.own_tokens, row.own)
    return compare(c, row, list(seen), whole, options)


@pytest.mark.parametrize("size", [2, 4])
def test_ring_attention_of_torch(size):
    check(on_ranks(size, ring_of_torch))
