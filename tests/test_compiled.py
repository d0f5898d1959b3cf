"""`collect` on models under torch.compile: statistics inside a context, and whole graphs outside of it."""

import pytest
import torch
import torch._dynamo.testing
from architectures import ARCHITECTURES, SIZES
from test_architectures import TOKENS, padded

from rhythm_kernels import collect

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("by_layer", [False, True], ids=["whole", "by layer"])
def test_a_compiled_model_runs_as_before_after_a_context(by_layer):
    """A graph that was made inside a context, in pieces, is not taken outside of it."""
    torch._dynamo.reset()
    model, ran = ARCHITECTURES["Llama"].build("sdpa"), []

    def backend(graph, _):
        return lambda *inputs: (ran.append(graph), graph.forward(*inputs))[1]

    for layer in model.model.layers if by_layer else ():
        layer.compile(backend=backend)
    called = model if by_layer else torch.compile(model, backend=backend)
    inputs = {"input_ids": torch.randint(3, 61, (2, TOKENS)), "use_cache": False}

    def graphs_run() -> list:
        ran.clear()
        with torch.no_grad():
            called(**inputs)
        return [*ran]

    before = graphs_run()
    assert len(before) == (SIZES["num_hidden_layers"] if by_layer else 1)
    inside = []
    for _ in range(3):
        with collect(called) as c:
            inside.append(graphs_run())
        assert c.rhythm().waad.any() and graphs_run() == before
    assert len(inside[0]) > len(before) and inside[0] == inside[1] == inside[2]
    torch._dynamo.reset()


def test_compiled_model():
    """A compiled model breaks its graph at the attention calls while a context is open, and only then."""
    model = ARCHITECTURES["Llama"].build("sdpa")
    inputs, real = padded("left")
    inputs["use_cache"] = False
    with torch.no_grad(), collect(model, response_mask=real) as c:
        model(**inputs)
    expected = c.rhythm()
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=graphs)
    with torch.no_grad():
        plain = compiled(**inputs).logits
        made = []
        for _ in range(4):
            with collect(compiled, response_mask=real) as c:
                assert torch.equal(compiled(**inputs).logits, plain)
            assert torch.equal(c.rhythm().fai, expected.fai)
            assert torch.equal(compiled(**inputs).logits, plain)
            made.append(graphs.frame_count)
        assert made[1:] == [made[1]] * 3  # what was compiled with and without a context is kept
        torch._dynamo.reset()
        whole = torch.compile(model, backend=graphs, fullgraph=True)
        refused = pytest.raises(torch._dynamo.exc.Unsupported, match="compile the model without fullgraph=True")
        with refused, collect(whole):
            whole(**inputs)
        assert torch.equal(whole(**inputs).logits, plain)
    torch._dynamo.reset()
