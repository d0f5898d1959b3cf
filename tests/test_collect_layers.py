"""Which layers are read: removed, repeated and reordered ones, attention of one's own, copies, recomputed models."""

import copy
import sys
import warnings

import pytest
import torch
from collect_cases import assert_right, ids_of, refused
from models import llama
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rhythm_kernels import collect, sampled_layers
from rhythm_kernels.listen.taps import layers_of


def test_layers_are_counted_as_they_run():
    """Layers are removed, repeated, reordered, merged, with the configuration kept in step and not."""
    for kept in ([0, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 1, 1, 2, 2, 2, 3], [2, 2, 2]):
        for in_step in (True, False):
            torch.manual_seed(1)
            model = llama("sdpa")
            model.model.layers = torch.nn.ModuleList(model.model.layers[index] for index in kept)
            if in_step or len(kept) > 6:
                model.config.num_hidden_layers = len(kept)
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # it is no hybrid
                c = assert_right(model, input_ids=ids_of(2), use_cache=False)
            assert c.layers == sampled_layers(len(kept))


def test_layers_that_do_not_run_are_named_as_such():
    torch.manual_seed(1)
    model = llama("sdpa")
    model.model.layers[3].forward = lambda hidden_states, **kwargs: hidden_states
    with torch.no_grad(), collect(model) as c:
        model(ids_of())
    with pytest.raises(RuntimeError, match=r"no statistics of layers \[3\]: the forward did not call their attention"):
        c.rhythm()


def test_a_forward_that_fails_did_run():
    model = llama("sdpa")
    model.model.layers[0].forward = lambda hidden_states, **kwargs: 1 / 0
    with torch.no_grad(), pytest.raises(ZeroDivisionError), collect(model) as c:
        model(ids_of())
    with pytest.raises(RuntimeError, match="the forward did not call their attention, or failed"):
        c.rhythm()


def test_a_subclass_of_an_attention_is_one():
    from transformers.models.llama.modeling_llama import LlamaAttention

    class Louder(LlamaAttention):
        def forward(self, *args, **kwargs):
            out, maps = super().forward(*args, **kwargs)
            return 1.1 * out, maps

    class Different(LlamaAttention):
        """This is no softmax attention."""

        def forward(self, hidden_states, *args, **kwargs):
            return hidden_states.cumsum(1), None

    torch.manual_seed(1)
    model = llama("sdpa")
    for layer in model.model.layers[::2]:
        layer.self_attn.__class__ = Louder
    assert_right(model, input_ids=ids_of(2))
    model.model.layers[1].self_attn.__class__ = Different
    assert list(layers_of(model.model).attention) == [0, 2, 3, 4, 5]
    with pytest.warns(UserWarning, match="only 5 of its 6 layers have a causal attention map"):
        assert_right(model, input_ids=ids_of(2))


def test_layers_that_run_more_often_than_they_stand_there_are_refused():
    """In a loop over all layers, or where a layer calls its attention twice, no map is known to be the layer's."""
    torch.manual_seed(1)
    model = llama("sdpa")
    attention = model.model.layers[2].self_attn
    once = attention.forward
    attention.forward = lambda *args, **kwargs: once(*args, **kwargs) and once(*args, **kwargs)
    message = "run as often as they stand in the decoder, got call 2 of .* layer 2"
    with torch.no_grad(), refused(message), collect(model, layers=[3]):
        model(ids_of(), use_cache=False)


def test_several_attentions_of_a_layer_are_counted_one_by_one():
    class Pair(torch.nn.Module):
        def __init__(self, layer, second):
            super().__init__()
            self.self_attn, self.second = layer.self_attn, second
            self.mlp, self.norm = layer.mlp, layer.input_layernorm

        def forward(self, hidden_states, **kwargs):
            for attention in (self.self_attn, self.second):
                hidden_states = hidden_states + attention(hidden_states=self.norm(hidden_states), **kwargs)[0]
            return hidden_states + self.mlp(hidden_states)

    torch.manual_seed(1)
    model = llama("sdpa")
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList(Pair(layers[i], layers[i + 1].self_attn) for i in (0, 2, 4))
    assert assert_right(model, input_ids=ids_of(2), use_cache=False).layers == sampled_layers(6)


def test_an_attention_keeps_the_eager_function_that_it_names():
    """It is that of a base class where its own file has another. Other towers of a model have theirs."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    module = sys.modules[__name__]
    module.eager_attention_forward = lambda *args, **kwargs: 1 / 0

    class Mine(LlamaAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    try:
        torch.manual_seed(1)
        model = llama("eager")
        plain = model(ids_of(2)).logits
        for layer in model.model.layers:
            layer.self_attn.__class__ = Mine
        with torch.no_grad(), collect(model, layers=[2]):
            assert torch.equal(model(ids_of(2)).logits, plain)
    finally:
        del module.eager_attention_forward
    from transformers.models.llama4 import modeling_llama4

    from rhythm_kernels.listen.taps import _eager_function

    assert _eager_function(modeling_llama4.Llama4VisionAttention) is modeling_llama4.vision_eager_attention_forward
    assert _eager_function(modeling_llama4.Llama4TextAttention) is modeling_llama4.eager_attention_forward


def test_an_entry_that_another_tool_puts_back_does_no_harm():
    torch.manual_seed(1)
    model, table = llama("sdpa"), ALL_ATTENTION_FUNCTIONS
    plain = model(ids_of()).logits
    with torch.no_grad(), collect(model):
        inside = table["sdpa"]
        table["sdpa"] = lambda *args, **kwargs: inside(*args, **kwargs)
        model(ids_of())
    table["sdpa"] = inside  # after the context has ended
    for _ in range(2):
        with torch.no_grad(), collect(model) as c:
            assert torch.equal(model(ids_of()).logits, plain)
        assert c.rhythm().waad.any()
    assert "sdpa" not in table._local_mapping
    with torch.no_grad(), collect(model):
        del table["sdpa"]
    assert torch.equal(model(ids_of()).logits, plain)


def test_a_copy_made_inside_is_not_collected_from():
    torch.manual_seed(1)
    model = llama("sdpa")
    with torch.no_grad(), collect(model) as c:
        other = copy.deepcopy(model)
        other(ids_of())
        model(ids_of())
    expected = assert_right(model, input_ids=ids_of()).rhythm()
    assert torch.equal(c.rhythm().waad, expected.waad)
    other(ids_of()), other(ids_of())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_whole_model_that_is_recomputed_inside_the_context(reentrant):
    torch.manual_seed(1)
    model = llama("sdpa").train()
    embeds = model.get_input_embeddings()(ids_of(2)).detach().requires_grad_()

    def run(embeds):
        return model(inputs_embeds=embeds, use_cache=False).logits

    with collect(model) as c:
        checkpoint(run, embeds, use_reentrant=reentrant).logsumexp(-1).mean().backward()
    assert torch.equal(c.rhythm().waad, assert_right(model, inputs_embeds=embeds, use_cache=False).rhythm().waad)


def test_removed_heads_are_not_called_shards():
    torch.manual_seed(1)
    model = llama("sdpa")
    attention = model.model.layers[2].self_attn
    attention.q_proj = torch.nn.Linear(48, 32, bias=False)
    attention.o_proj = torch.nn.Linear(32, 48, bias=False)
    attention.num_key_value_groups = 2
    message = "the model's 6 query heads, got 4 in layer 2: layers of several sizes, and heads that another rank holds"
    with torch.no_grad(), refused(message), collect(model):
        model(ids_of())
