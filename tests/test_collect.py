"""`collect` against transformers' own eager maps: every statistic, group and edge of the contract."""

import sys
from types import SimpleNamespace

import pytest
import torch
from models import SIZES, dense_rhythm, dense_stats, eager_maps, llama, qwen3
from stats_cases import StatsCase, assert_close_to_reference, tensors
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import GPT2Config, GPT2LMHeadModel, Llama4ForCausalLM, Llama4TextConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rhythm_kernels import AttentionStats, GroupStats, HeadGroups, Rhythm, collect, reference
from rhythm_kernels.listen import collector
from rhythm_kernels.listen.clock import Clock
from rhythm_kernels.listen.taps import layers_of
from rhythm_kernels.signals import rhythm_of
from rhythm_kernels.statistics.layout import make_layout

TOKENS = 70


@pytest.fixture(params=[llama, qwen3], ids=["llama", "qwen3"])
def make(request):
    torch.manual_seed(1)
    return request.param


def batch_inputs(side: str):
    torch.manual_seed(2)
    ids = torch.randint(0, 61, (3, TOKENS))
    position = torch.arange(TOKENS)
    lengths = torch.tensor([TOKENS, 41, 23])[:, None]
    real = position < lengths if side == "right" else position >= TOKENS - lengths
    response = real & (torch.rand(3, TOKENS) < 0.7)
    return ids, real, response


def close(got, expected, label):
    torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-5, msg=lambda text: f"{label}: {text}")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("group_by", ["sequence", "batch"])
def test_padded_batches(make, attention, side, group_by):
    model = make(attention)
    ids, real, response = batch_inputs(side)
    inputs = {"input_ids": ids, "attention_mask": real.long()}
    maps = eager_maps(model, **inputs)
    with torch.no_grad(), collect(model, response_mask=response, group_by=group_by) as c:
        model(**inputs)
    assert c.layers == reference.sampled_layers(6) == sorted(c.stats)
    segments = reference.segment_ids(3, TOKENS, real)
    for layer in c.layers:
        waad, fai, span = dense_stats(maps[layer], response, segments, 3)
        close(c.stats[layer].waad, waad, f"waad of layer {layer}")
        close(c.stats[layer].fai, fai, f"fai of layer {layer}")
        close(c.stats[layer].span, span, f"span of layer {layer}")
    rhythm = c.rhythm()
    waad, fai, groups = dense_rhythm(maps, c.layers, response, segments, 3, per_batch=group_by == "batch")
    close(rhythm.waad, waad, "waad")
    close(rhythm.fai, fai, "fai")
    for b, group in enumerate(groups):
        for got, expected in zip(rhythm.groups, group, strict=True):
            assert torch.equal(got[b] if group_by == "sequence" else got, expected)
    assert rhythm.spans.shape == ((3, 3, 6) if group_by == "sequence" else (3, 6))
    assert c.seconds > 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_sharp_attention_is_held_to_the_same_tolerance(make, attention, side, monkeypatch):
    """Eager's own maps are off by 1e-5 where scores are in the tens, so the reference is fp64 on the same q and k."""
    model = make(attention, initializer_range=0.3)
    ids, real, response = batch_inputs(side)
    calls = []
    real_run = collector.run_stats
    monkeypatch.setattr(collector, "run_stats", lambda *args: calls.append(args) or real_run(*args))
    with torch.no_grad(), collect(model, response_mask=response) as c:
        model(ids, attention_mask=real.long())
    for (q, k, lse, _, options, _), stats in zip(calls, c.stats.values(), strict=True):
        kwargs = {"scale": options.scale, "sliding_window": options.sliding_window, "need_span": True}
        kwargs |= {"attention_mask": real, "response_mask": response}
        case = StatsCase(q, k, kwargs if lse is None else kwargs | {"lse": lse})
        assert (lse is None) == (attention == "eager")
        assert_close_to_reference(stats, case)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_spans_are_read_from_a_sample_of_rows(make, attention, monkeypatch):
    """By default all rows of such short sequences are read."""
    model = make(attention)
    ids = torch.randint(0, 61, (2, 200), generator=torch.Generator().manual_seed(0))
    calls = []
    real_run = collector.run_stats
    monkeypatch.setattr(collector, "run_stats", lambda *args: calls.append(args) or real_run(*args))
    for options in ({"span_rows": 64}, {}):
        calls.clear()
        with torch.no_grad(), collect(model, **options) as c:
            model(ids)
        spans = c.rhythm().spans
        for i, (q, k, _, _, checked, _) in enumerate(calls):
            window = checked.sliding_window
            exact = reference.attention_stats(q, k, scale=checked.scale, sliding_window=window, **options).span
            torch.testing.assert_close(spans[:, i].double(), exact, rtol=1e-5, atol=1e-3)


def test_packed_sequences(make):
    model = make("sdpa")
    torch.manual_seed(3)
    lengths = [20, 1, 33, 16]
    ids = torch.randint(0, 61, (1, sum(lengths)))
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    response = torch.rand(1, sum(lengths)) < 0.8
    maps = eager_maps(model, input_ids=ids, position_ids=position_ids, use_cache=False)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    segments = reference.segment_ids(1, sum(lengths), cu_seqlens=bounds)
    with torch.no_grad(), collect(model, response_mask=response, horizon=(1, None)) as c:
        model(input_ids=ids, position_ids=position_ids, use_cache=False)
    rhythm = c.rhythm()
    waad, fai, groups = dense_rhythm(maps, c.layers, response, segments, 4, horizon=(1, None))
    close(rhythm.waad, waad, "waad")
    close(rhythm.fai, fai, "fai")
    for s, group in enumerate(groups):
        assert torch.equal(rhythm.groups.local_heads[s], group.local_heads)
        assert torch.equal(rhythm.groups.global_heads[s], group.global_heads)
    assert rhythm.spans.shape == (4, 3, 6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("group_by", ["sequence", "batch"])
def test_given_groups_need_no_spans(make, attention, group_by):
    model = make(attention)
    ids, real, response = batch_inputs("left")
    maps = eager_maps(model, input_ids=ids, attention_mask=real.long())
    with torch.no_grad(), collect(model, response_mask=response, group_by=group_by) as first:
        model(ids, attention_mask=real)
    groups = first.rhythm().groups
    with torch.no_grad(), collect(model, response_mask=response, groups=groups) as second:
        model(ids, attention_mask=real)
    rhythm = second.rhythm()
    # only the band of each map is computed, and heads are summed within a layer: the same numbers, rounded elsewhere
    segments = reference.segment_ids(3, TOKENS, real)
    waad, fai, _ = dense_rhythm(maps, second.layers, response, segments, 3, per_batch=group_by == "batch")
    close(rhythm.waad, waad, "waad")
    close(rhythm.fai, fai, "fai")
    assert rhythm.spans is None and rhythm.groups is not groups
    assert all(torch.equal(*pair) for pair in zip(rhythm.groups, groups))
    assert second.lse_sources == first.lse_sources and list(second.lse_sources) == second.layers
    for index, (layer, stats) in enumerate(second.stats.items()):
        assert isinstance(stats, GroupStats) and layer == second.layers[index]
        exact = dense_stats(maps[layer], response, segments, 3)
        for found, heads, group in zip(stats, exact, groups, strict=False):
            members = group.expand(3, -1, -1)[:, index, :, None]
            close(found, (heads * members).sum(1), f"sums of layer {layer}")


def test_given_groups_of_packed_sequences(make):
    model = make("sdpa")
    torch.manual_seed(3)
    lengths = [20, 1, 33, 16]
    inputs = {
        "input_ids": torch.randint(0, 61, (1, sum(lengths))),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "use_cache": False,
    }
    with torch.no_grad(), collect(model) as first:
        model(**inputs)
    groups = first.rhythm().groups
    with torch.no_grad(), collect(model, groups=groups) as second:
        model(**inputs)
    close(second.rhythm().waad, first.rhythm().waad.double(), "waad")
    close(second.rhythm().fai, first.rhythm().fai.double(), "fai")
    wrong = collect(model, groups=HeadGroups(*(group[:3] for group in groups)))
    with pytest.raises(ValueError, match=r"groups.local_heads must have shape \[4, 3, 6\], got \[3, 3, 6\]"), wrong:
        model(**inputs)


def test_known_bounds_stand_for_what_the_forward_is_given(make):
    model = make("sdpa")
    torch.manual_seed(3)
    lengths = [20, 1, 33, 16]
    ids, positions = torch.randint(0, 61, (1, sum(lengths))), torch.cat([torch.arange(n) for n in lengths])[None]
    bounds = torch.tensor([0, *lengths]).cumsum(0)

    def forward(**options) -> Rhythm:
        with torch.no_grad(), collect(model, **options) as c:
            model(ids, position_ids=positions, use_cache=False)
        return c.rhythm()

    read = forward()
    for dtype in (torch.int32, torch.int64):
        known = forward(cu_seqlens=bounds.to(dtype))
        assert torch.equal(known.waad, read.waad) and torch.equal(known.fai, read.fai)
        assert torch.equal(known.spans, read.spans)
    for wrong, message in (
        (bounds[[0, 1, 2, 4]], "got layer 2, where token 54 of row 0 sees 1 tokens of 34"),
        (bounds[:-1], r"cu_seqlens must rise from 0 to T = 70, got \[0, 20, 21, 54\]"),
    ):
        with pytest.raises(ValueError, match=message):
            forward(cu_seqlens=wrong)
    for wrong, error, message in (
        ([0, 70], TypeError, "cu_seqlens must be a tensor, got list"),
        (bounds.float(), TypeError, "cu_seqlens must be torch.int32 or torch.int64, got torch.float32"),
        (bounds[None], ValueError, r"cu_seqlens must have shape \[S \+ 1\], got \[1, 5\]"),
        (bounds.to("meta"), ValueError, "cu_seqlens must be on cpu, got meta"),
    ):
        with pytest.raises(error, match=message):
            collect(model, cu_seqlens=wrong)
    padded, message = (
        (torch.arange(sum(lengths)) > 0)[None].long(),
        "packed sequences have no padding, .* with 1 masked",
    )
    with pytest.raises(ValueError, match=message), collect(model, cu_seqlens=bounds):
        model(ids, attention_mask=padded)


def test_a_span_that_is_nan_is_named_or_makes_its_sequence_nan(monkeypatch):
    layout = make_layout(2, 5, torch.device("cpu"))
    signal = torch.rand(2, 3, 5)
    stats = {0: AttentionStats(signal, signal, torch.tensor([[1.0, 2.0, 3.0], [1.0, torch.nan, 3.0]]), signal)}
    with pytest.raises(ValueError, match="spans must not hold NaN, got 1 of 6"):
        rhythm_of(stats, layout)
    monkeypatch.setattr(sys.modules["rhythm_kernels.signals"], "can_look", lambda tensor: False)  # as on a GPU
    for group_by, broken in (("sequence", [False, True]), ("batch", [True, True])):
        rhythm = rhythm_of(stats, layout, group_by=group_by)
        for found in (rhythm.waad, rhythm.fai):
            assert torch.equal(found.isnan(), torch.tensor(broken)[:, None].expand(2, 5))


def test_rhythm_of_sums_needs_their_groups():
    stats = {0: GroupStats(torch.ones(1, 5), torch.ones(1, 5))}
    layout = make_layout(1, 5, torch.device("cpu"))
    with pytest.raises(ValueError, match="groups must be those that the statistics were summed over, got None"):
        rhythm_of(stats, layout)
    local, empty = torch.tensor([[True, False, True]]), torch.zeros(1, 3, dtype=torch.bool)
    rhythm = rhythm_of(stats, layout, groups=HeadGroups(local, empty))
    assert (rhythm.waad == 0.5).all() and (rhythm.fai == 1).all()


def test_the_models_output_is_untouched_and_no_trace_is_left(make):
    for attention in ("sdpa", "eager"):
        model = make(attention)
        table, local = dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
        ids, real, _ = batch_inputs("left")
        plain = model(ids, attention_mask=real).logits
        with collect(model) as c:
            collected = model(ids, attention_mask=real).logits
        assert torch.equal(plain, collected) and collected.requires_grad
        assert not any(x.requires_grad for stats in c.stats.values() for x in tensors(stats))
        with pytest.raises(ZeroDivisionError), collect(model):
            raise ZeroDivisionError
        assert dict(ALL_ATTENTION_FUNCTIONS) == table and ALL_ATTENTION_FUNCTIONS._local_mapping == local
        assert not model.model._forward_pre_hooks


def test_an_error_inside_attention_leaves_no_trace(make, monkeypatch):
    model = make("sdpa")
    ids, real, _ = batch_inputs("left")
    plain = model(ids, attention_mask=real).logits
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError), collect(model) as c:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *args, **kwargs: 1 / 0)
        model(ids, attention_mask=real)
    assert not c.stats and not _get_current_dispatch_mode_stack() and not ALL_ATTENTION_FUNCTIONS._local_mapping
    assert torch.equal(model(ids, attention_mask=real).logits, plain)


def test_two_models_at_once():
    torch.manual_seed(4)
    models = [llama("eager"), qwen3("eager"), llama("sdpa")]
    ids, real, response = batch_inputs("right")
    alone = []
    for model in models:
        with torch.no_grad(), collect(model, response_mask=response) as c:
            model(ids, attention_mask=real)
        alone.append(c.rhythm())
    contexts = [collect(model, response_mask=response) for model in models]
    for context in contexts:
        context.__enter__()
    for model in models:
        with torch.no_grad():
            model(ids, attention_mask=real)
    for context in contexts:  # closed in the order of opening, not nested
        context.__exit__(None, None, None)
    for context, expected in zip(contexts, alone, strict=True):
        assert torch.equal(context.rhythm().waad, expected.waad)
    sources = [set(context.lse_sources.values()) for context in contexts]
    eager = "row pass: eager runs no operator that is known"
    assert sources == [{eager}, {eager}, {"aten::_scaled_dot_product_flash_attention_for_cpu"}]
    assert "eager" not in ALL_ATTENTION_FUNCTIONS and not ALL_ATTENTION_FUNCTIONS._local_mapping


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_records_once(make, reentrant):
    model = make("sdpa").train()
    ids, real, response = batch_inputs("right")

    def gradients(**options):
        model.zero_grad()
        with collect(model, response_mask=response, **options) as c:
            loss = model(ids, attention_mask=real, use_cache=False).logits.float().logsumexp(-1).mean()
            recorded = dict(c.stats)
            loss.backward()
        assert all(c.stats[layer] is recorded[layer] for layer in c.layers) and len(c.lse_sources) == len(c.layers)
        return c.rhythm(), [x.grad for x in model.parameters()]

    plain, plain_grads = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for options in ({}, {"groups": plain.groups}):
        rhythm, grads = gradients(**options)
        close(rhythm.fai, plain.fai.double(), "fai")
        for got, expected in zip(grads, plain_grads, strict=True):
            torch.testing.assert_close(got, expected)


def test_wrappers_and_bare_decoders(make):
    model = make("sdpa")
    ids, real, response = batch_inputs("left")
    wrapper = torch.nn.ModuleDict({"policy": model})
    results = []
    for target, call in ((model, model), (model.model, model.model), (wrapper, model)):
        with torch.no_grad(), collect(target, response_mask=response) as c:
            call(ids, real)
        results.append(c.rhythm().fai)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


class Visits(dict):
    """The children of a module, which count how often they are listed."""

    count = 0

    def values(self):
        self.count += 1
        return super().values()

    def items(self):
        self.count += 1
        return super().items()


@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "wrapped"])
def test_a_context_visits_each_module_of_the_model_once(wrapped):
    """The host needs time for each walk, in which a GPU may have nothing to do."""
    model = qwen3()
    outer = torch.nn.Sequential(torch.nn.Sequential(model)) if wrapped else model
    for module in outer.modules():
        module._modules = Visits(module._modules)
    collect(outer)
    inside = {name: module._modules.count for name, module in model.model.named_modules()}
    # named_modules itself has visited each once more
    assert len(inside) > 80 and max(inside.values()) == 2, inside
    around = [
        module._modules.count for module in outer.modules() if all(module is not x for x in model.model.modules())
    ]
    assert sum(around) < 20


@pytest.mark.parametrize("change", ["remove", "replace", "wrap"])
def test_layers_that_change_between_two_contexts_are_found(change):
    model, other = qwen3(), qwen3()
    before = collect(model, layers="all")
    layers = model.model.layers
    assert before.layers == list(range(6))
    if change == "remove":
        del layers[2]
    elif change == "replace":
        layers[2] = other.model.layers[2]
    else:
        layers[2].self_attn = torch.nn.Sequential(layers[2].self_attn)
    after = collect(model, layers="all")
    assert after.layers == list(range(len(layers)))
    own = [
        layer.self_attn[0] if isinstance(layer.self_attn, torch.nn.Sequential) else layer.self_attn for layer in layers
    ]
    assert list(layers_of(model.model).attention.values()) == own


def test_a_stage_of_a_pipeline_is_refused():
    """It would look like a hybrid with fewer softmax layers."""
    from transformers.distributed.pipeline_parallel import PipelineIdentityLayer

    model = llama()
    for layer in (0, 1, 2):
        model.model.layers[layer] = PipelineIdentityLayer()
    with pytest.raises(ValueError, match="all its layers on one rank, got 3 that pipeline parallelism put on others"):
        collect(model)


def test_positions_of_one_row_may_come_without_a_batch():
    model = GPT2LMHeadModel._from_config(GPT2Config(n_embd=24, n_layer=3, n_head=3, vocab_size=61)).eval()
    ids = batch_inputs("left")[0][:1]
    with torch.no_grad(), collect(model) as c:
        model(ids, position_ids=torch.arange(TOKENS))
    with torch.no_grad(), collect(model) as again:
        model(ids, position_ids=torch.arange(TOKENS)[None])
    assert torch.equal(c.rhythm().waad, again.rhythm().waad)


def test_the_clock_is_that_of_the_models_gpu(monkeypatch):
    streams = []
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: SimpleNamespace(record=streams.append))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    clock = Clock()
    clock.device = torch.device("cuda:1")
    with clock:
        pass
    assert streams == ["the stream of cuda:1"] * 2


def test_what_cannot_be_collected_is_refused():
    model = llama()
    ids, real, response = batch_inputs("left")
    with collect(model) as c:
        model(ids)
        with pytest.raises(RuntimeError, match="one forward"):
            model(ids)
    with pytest.raises(RuntimeError, match="no forward ran"):
        collect(model).rhythm()
    with pytest.raises(RuntimeError, match="open already"), c, c:
        pass
    cache = model(ids, use_cache=True).past_key_values
    with (
        pytest.raises(ValueError, match="got past_key_values of 70 tokens: run one over prompt and answer"),
        collect(model),
    ):
        model(ids[:, :1], attention_mask=torch.ones(3, 71), past_key_values=cache)
    with pytest.raises(RuntimeError, match="generate runs one for each token"), collect(model):
        model.generate(ids, max_new_tokens=3, min_new_tokens=3)
    two = torch.nn.ModuleDict({"critic": llama(), "actor": model})
    with pytest.raises(ValueError, match="model must hold one decoder, got LlamaModel and LlamaModel: give"):
        collect(two)
    assert collect(torch.nn.ModuleDict({"actor": model, "the same": model})).decoder is model.model
    with pytest.raises(ValueError, match=r"attention_mask as \[B, T\], got \[3, 1, 70, 70\]"), collect(model):
        model(ids, attention_mask=torch.ones(3, 1, TOKENS, TOKENS, dtype=torch.bool))
    with pytest.raises(ValueError, match="row 0 has a hole"), collect(model):
        model(ids, attention_mask=(torch.arange(TOKENS) != 5).expand(3, -1).long())
    with pytest.raises(ValueError, match="B = 3 with position_ids that restart"), collect(model):
        model(ids, position_ids=(torch.arange(TOKENS) % 30).expand(3, -1))
    with pytest.raises(ValueError, match="pass use_cache=False"), collect(model):
        model(ids[:1], position_ids=(torch.arange(TOKENS) % 30)[None])
    chunks = Llama4TextConfig(
        **SIZES, head_dim=8, attention_chunk_size=16, num_local_experts=2, intermediate_size_mlp=64
    )
    chunked = Llama4ForCausalLM._from_config(chunks, attn_implementation="sdpa").eval()
    with pytest.raises(ValueError, match="layer 2, where token 16 of row 0 sees 1 tokens of 17"), collect(chunked):
        chunked(ids)
    short = collect(model, response_mask=response[:, :9])
    with pytest.raises(ValueError, match=r"response_mask must have shape \[3, 70\], got \[3, 9\]"), short:
        model(ids)
    with pytest.raises(TypeError, match="response_mask must be torch.bool, got torch.int64"):
        collect(model, response_mask=response.long())
    with pytest.raises(ValueError, match="layers must be between -6 and 5, got 6"):
        collect(model, layers=[6])
    with pytest.raises(ValueError, match="group_by must be one of sequence, batch, got 'token'"):
        collect(model, group_by="token")
    groups = HeadGroups(torch.ones(2, 6, dtype=torch.bool), torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"groups.local_heads must have shape \[3, 6\], got \[2, 6\]"):
        collect(model, groups=groups)
    with pytest.raises(TypeError, match="groups must be HeadGroups, got tuple"):
        collect(model, groups=(1, 2))
    with pytest.raises(TypeError, match="groups.local_heads must be a tensor, got NoneType"):
        collect(model, groups=HeadGroups(None, None))
    with pytest.raises(ValueError, match=r"groups.local_heads must have shape \[3, 6\], got \[\]"):
        collect(model, groups=HeadGroups(torch.tensor(True), torch.tensor(True)))
    with pytest.raises(ValueError, match="needs input_ids or inputs_embeds, got neither"), collect(model):
        model(attention_mask=torch.ones(3, TOKENS))
    with pytest.raises(ValueError, match="attention_mask must hold only 0 and 1, got -1"), collect(model):
        model(ids, attention_mask=torch.where(torch.arange(TOKENS) < 5, -1, 1).expand(3, -1))
    with pytest.raises(ValueError, match="window must be between 1 and 256, got 0"):
        collect(model, window=0)
    with pytest.raises(TypeError, match=r"horizon must be \(lo, hi\) in tokens, .* got 50"):
        collect(model, horizon=50)
    with pytest.raises(TypeError, match="model must be a transformers model, got str"):
        collect("llama")
    with pytest.raises(ValueError, match="layers go through the attention interface .*, got Linear"):
        collect(torch.nn.Linear(2, 2))
