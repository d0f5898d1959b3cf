"""Tests the pretended GPU itself: what it refuses, counts and gives back."""

import pytest
import torch
from models import llama
from torch.utils.checkpoint import checkpoint

from benchmarks.pretended_cuda import Wait, counted, is_pretended, pretended_cuda
from rhythm_kernels import attention, isolation, segment_topq

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def device():
    with pretended_cuda() as device:
        yield device


MAKERS = {
    "tensor": lambda d: torch.tensor([1, 2], device=d),
    "as_tensor": lambda d: torch.as_tensor([1, 2], device=d),
    "arange": lambda d: torch.arange(2, device=d),
    "randn": lambda d: torch.randn(2, device=d, generator=torch.Generator(d)),
    "full": lambda d: torch.full((2,), 1.0, device=d),
    "zeros_like": lambda d: torch.zeros_like(torch.ones(2), device=d),
    "to": lambda d: torch.ones(2).to(d),
    "cuda": lambda d: torch.ones(2).cuda(),
    "new_zeros": lambda d: torch.ones(2, device=d).new_zeros(2),
    "new_tensor": lambda d: torch.ones(2, device=d).new_tensor([1, 2]),
    "view": lambda d: torch.ones(2, 1, device=d).view(2),
    "sum": lambda d: torch.ones(2, 2, device=d).sum(0),
}


@pytest.mark.parametrize("how", MAKERS)
@pytest.mark.parametrize("around", [torch.no_grad, lambda: isolation.isolated(torch.device("cuda"))])
def test_tensors_are_on_the_device_however_they_are_made(how, around, device):
    with around():
        tensor = MAKERS[how]("cuda")
    assert tensor.is_cuda and tensor.device == torch.device("cuda:0") and tensor.device.type == "cuda"
    assert tensor.shape == (2,) and tensor.cpu().device.type == "cpu"


def test_tensors_of_two_devices_do_not_meet(device):
    there, here = torch.ones(3, device=device), torch.ones(3)
    for mix in (torch.add, torch.dot, lambda x, y: torch.cat([x, y]), lambda x, y: torch.where(x > 0, x, y)):
        with pytest.raises(RuntimeError, match="two devices, cuda:0 and cpu"):
            mix(there, here)
    assert (there + torch.tensor(1.0)).tolist() == [2, 2, 2]  # a number may be on the CPU
    with pytest.raises(TypeError, match="can't convert"):
        there.numpy()


WAITS = {
    "reading a number": [lambda x: x[0].item(), lambda x: bool(x[0]), lambda x: int(x[0]), lambda x: f"{x[0].item()}"],
    "a copy to the host": [lambda x: x.tolist(), lambda x: x.cpu(), lambda x: torch.empty(4).copy_(x)],
    "a copy from the host": [
        lambda x: torch.ones(3).to("cuda"),
        lambda x: torch.tensor([1.0], device="cuda"),
        lambda x: x.copy_(torch.ones(4)),
        lambda x: x.__setitem__(0, 5),
    ],
    "a copy to pageable memory of the host": [lambda x: torch.empty(4).copy_(x, non_blocking=True)],
    "aten::nonzero": [lambda x: x.nonzero()],
    "aten::_unique2": [lambda x: x.unique()],
    "aten::repeat_interleave": [lambda x: x.repeat_interleave(x.long())],
    "aten::index by a mask": [lambda x: x[x > 1]],
    "aten::index by an index on the CPU": [lambda x: x[[0, 1]], lambda x: x[torch.arange(2)]],
    "aten::index_put_ by a mask": [lambda x: x.__setitem__(x > 1, x[0])],
    "torch.cuda.synchronize": [lambda x: torch.cuda.synchronize()],
    "Event.synchronize": [lambda x: torch.cuda.Event().synchronize()],
}


@pytest.mark.parametrize("what", WAITS)
def test_a_wait_of_the_host_is_counted_where_it_happens(what, device):
    x = torch.arange(4.0, device=device)
    for wait in WAITS[what]:
        with counted() as work:
            wait(x)
        assert [wait.what for wait in work.waits] == [what]
        assert all(wait.where.startswith("tests/test_pretended_cuda.py:") for wait in work.waits)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.to("cuda"),
        lambda x: x.clone().masked_fill_(x > 1, 0),
        lambda x: x.__setitem__(x > 1, 0),
        lambda x: x.__setitem__(slice(1), 5),
        lambda x: x[1:].sum() + 1,
        lambda x: x[x.long()],
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: torch.ones(3).pin_memory().to("cuda", non_blocking=True),
        lambda x: torch.ones(4).pin_memory().copy_(x, non_blocking=True),
        lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.long, device="cuda"), output_size=4),
        lambda x: torch.cuda.Event().record(),
    ],
)
def test_what_waits_for_nothing_is_no_wait(call, device):
    x = torch.arange(4.0, device=device)
    torch.cuda.set_sync_debug_mode("error")
    with counted() as work:
        call(x)
    assert work.waits == []


def test_waits_raise_where_torch_is_told_so(device):
    x = torch.ones(2, device=device)
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation: reading a number"):
        x.sum().item()
    torch.cuda.set_sync_debug_mode("warn")
    with pytest.warns(UserWarning, match="called a synchronizing CUDA operation: a copy to the host"):
        x.cpu()
    torch.cuda.synchronize()  # torch does not report it


def test_launches_are_counted_by_name(device):
    x = torch.ones(4, 4, device=device)
    with counted() as work:
        torch.empty(3, device=device)
        y = x.view(16)[2:].unflatten(0, (2, 7)).T
        y.mul_(2).add(1)
        torch.zeros(2, device=device)
        x[:0].sum(1)
        x.to("cpu", non_blocking=True)
    assert work.launches == {"aten::mul_": 1, "aten::add": 1, "aten::zero_": 1, "memcpy": 1}


def test_kernels_take_tensors_of_the_device_alone(device):
    q = torch.randn(1, 2, 20, 16, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    with counted() as work:
        out, stats = attention(q.cuda(), q.cuda(), q.cuda())
    assert work.launches["forward_kernel"] == 1 and work.launches["band_kernel"] == 1
    want, exact = attention(q, q, q, backend="torch")
    torch.testing.assert_close(out.cpu().float(), want.float(), rtol=0, atol=0.02)
    torch.testing.assert_close(stats.waad.cpu(), exact.waad, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="needs q on a GPU, got q on cpu"):
        attention(q, q, q, backend="triton")


def test_selection_is_one_launch_of_the_extension(device):
    values, mask = torch.rand(2, 9), torch.ones(2, 9, dtype=torch.bool)
    with counted() as work:
        got = segment_topq(values.cuda(), mask.cuda(), 0.4)
    assert work.launches == {"memcpy": 2, "rhythm_kernels::segment_topq": 1}
    assert torch.equal(got.cpu(), segment_topq(values, mask, 0.4))


@pytest.mark.parametrize(
    "attention, dtype", [("eager", torch.float32), ("sdpa", torch.float32), ("sdpa", torch.bfloat16)]
)
def test_a_model_has_the_gradients_that_it_has_on_a_cpu(attention, dtype, device):
    def gradients(place):
        torch.manual_seed(0)
        model = llama(attention, tie_word_embeddings=True, num_hidden_layers=2).to(place, dtype)
        mask = torch.arange(12, device=place) >= torch.tensor([[0], [5]]).to(place)
        ids = (torch.arange(24) * 7 % 61).view(2, 12).to(place)
        hidden = checkpoint(model.model, ids, attention_mask=mask, use_reentrant=False).last_hidden_state
        (model.lm_head(hidden).float() * mask[..., None]).square().sum().backward()
        assert model.lm_head.weight is model.model.embed_tokens.weight
        return [x.grad.float().cpu() for x in model.parameters()]

    for here, there in zip(gradients("cpu"), gradients(device), strict=True):
        assert (here - there).norm() <= (1e-5 if dtype == torch.float32 else 0.05) * here.norm()


def test_an_optimizer_steps_in_place(device):
    model = llama(num_hidden_layers=1).to(device)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.arange(6, device=device)[None]).logits.sum().backward()
    with counted() as work:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert work.launches["aten::_foreach_addcdiv_"] == 1  # all parameters at once
    assert all((p != old).any() for p, old in zip(model.parameters(), before, strict=True) if p.grad.abs().sum() > 0)


def test_memory_is_that_of_tensors_that_are_alive(device):
    before = torch.cuda.memory_allocated()
    x = torch.empty(1000, device=device)
    views = x[:10], x.view(10, 100)
    assert torch.cuda.memory_allocated() - before == 4000
    torch.cuda.reset_peak_memory_stats()
    y = x + 1
    del x, y
    assert torch.cuda.memory_allocated() - before == 4000
    del views
    assert torch.cuda.memory_allocated() == before and torch.cuda.max_memory_allocated() - before == 8000


def test_the_process_is_as_before():
    names = ("tensor", "Generator")
    before = [getattr(torch, name) for name in names], dict(vars(torch.cuda)), torch.nn.functional.__dict__.copy()
    with pretended_cuda():
        assert is_pretended() and torch.cuda.is_available()
        assert isinstance(torch.Generator("cuda"), torch.Generator)
    assert not is_pretended() and not torch.cuda.is_available()
    assert before == ([getattr(torch, name) for name in names], dict(vars(torch.cuda)), vars(torch.nn.functional))
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        torch.ones(2, device="cuda")
    x = torch.ones(2, requires_grad=True)
    x.sum().backward()
    assert x.grad.tolist() == [1, 1]


def test_counts_of_contexts_inside_each_other(device):
    with counted() as outer:
        with counted() as inner:
            torch.ones(2, device=device).tolist()
        torch.ones(2, device=device)
    assert inner.launches["aten::fill_"] == 1 and outer.launches["aten::fill_"] == 2
    assert [type(wait) for wait in outer.waits] == [Wait] and outer.waits == inner.waits
