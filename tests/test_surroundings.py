"""Tests that statistics and credit have the same bits whatever the program around them has set."""

import ast
import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from models import llama
from stats_cases import named
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import rhythm_kernels as rk
from rhythm_kernels.isolation import PRODUCTS, exact_products, graphs_of_their_own, isolated, lowest_precision

TOKENS = 70


def everything() -> dict[str, torch.Tensor]:
    """Returns the results of every public function, by name."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    def where(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") < 0.7

    q, k, v = random(2, 4, TOKENS, 16), random(2, 2, TOKENS, 16), random(2, 2, TOKENS, 16)
    cuts = torch.tensor([0, 20, 21, TOKENS], dtype=torch.int32, device="cpu")
    padding = torch.arange(TOKENS, device="cpu") >= torch.tensor([[0], [13]], device="cpu")
    sinks, heads = random(4), torch.tensor([True, False, True, False], device="cpu")
    results = {}
    for name, options in {
        "padded": {"attention_mask": padding, "response_mask": where(2, TOKENS)},
        "capped": {"softcap": 3.0, "sinks": sinks, "sliding_window": 9, "horizon": (1, None)},
    }.items():
        stats = rk.attention_stats(q, k, **options)
        results |= {f"{name} {field}": x for field, x in named(stats).items()}
        lse = stats.lse
        band = rk.attention_stats(q, k, lse=lse, need_span=False, **options)
        results |= {f"{name} band {field}": x for field, x in named(band).items()}
        for given in (None, lse):
            sums = rk.group_stats(q, k, heads, ~heads, lse=given, **options)
            results |= {f"{name} sums {given is None} {field}": x for field, x in named(sums).items()}
        results[f"{name} out"], _ = rk.attention(q, k, v, **options)
    packed = rk.attention_stats(q[:1], k[:1], cu_seqlens=cuts)
    results |= {f"packed {field}": x for field, x in named(packed).items()}

    spans = packed.span.view(3, 2, 2)
    groups = rk.group_heads(spans)
    results |= {"local": groups.local_heads, "global": groups.global_heads}
    schedule = rk.GroupSchedule(2)
    schedule.add(spans, torch.tensor([20, 1, 49], device="cpu"))
    schedule.advance()
    results["pooled"] = schedule.state_dict()["spans"]

    response_mask, waad, fai = where(2, TOKENS), random(2, TOKENS).abs() * 9, random(2, TOKENS).abs()
    rhythm = rk.Rhythm(waad, fai)
    for strategy in ("none", "random", "entropy", "local", "global", "coupled"):
        gamma = rk.token_credit(strategy, response_mask, rhythm, entropy=waad, seed=3)
        results |= {f"gamma {strategy}": gamma}
        one = {"response_mask": response_mask[:1], "rhythm": rk.Rhythm(waad[:1], fai[:1]), "entropy": waad[:1]}
        results[f"packed gamma {strategy}"] = rk.token_credit(strategy, cu_seqlens=cuts, seed=3, **one)
    results["shaped"] = rk.shape_advantages(random(2), gamma)
    results |= {f"sets {name}": x for name, x in rk.coupled_sets(response_mask, rhythm)._asdict().items()}
    results["peaks"], results["top"] = rk.find_peaks(waad, response_mask), rk.segment_topq(waad, response_mask, 0.3)
    return results


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def matmul_precision(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS = {
    "bf16 by default": lambda: default_dtype(torch.bfloat16),
    "fp16 by default": lambda: default_dtype(torch.float16),
    "fp64 by default": lambda: default_dtype(torch.float64),
    "medium precision": lambda: matmul_precision("medium"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "another device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_every_result_keeps_its_bits(name):
    expected = everything()
    with SURROUNDINGS[name]():
        got = everything()
    assert got.keys() == expected.keys()
    for key, x in expected.items():
        assert got[key].dtype == x.dtype and torch.equal(got[key], x), key


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [name for name in SURROUNDINGS if name != "autocast"])
def test_collect_keeps_its_bits(name, attention):
    """Autocast changes the model and its statistics, so it is left out.

    Medium precision may round the scores of the model's kernel. Its log-sum-exp is not read then, but computed. On some
    CPUs it rounds the model's products too. Then queries and keys keep their bits in the first layer alone, if its
    projections are left out.
    """
    torch.manual_seed(1)
    model, ids = llama(attention), torch.randint(0, 61, (2, TOKENS))
    mask = torch.arange(TOKENS) >= torch.tensor([[0], [20]])
    layers = {"layers": [0]} if name == "medium precision" else {}
    for module in model.modules() if layers else ():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda *_: torch.set_float32_matmul_precision("highest"))
            module.register_forward_hook(lambda *_: torch.set_float32_matmul_precision(precision))

    def collected(**options):
        with torch.no_grad(), rk.collect(model, response_mask=mask, **layers, **options) as c:
            model(ids, attention_mask=mask.long())
        return c.rhythm()

    precision = torch.get_float32_matmul_precision()
    expected = collected()
    with SURROUNDINGS[name]():
        precision = torch.get_float32_matmul_precision()
        got = collected()
        known = collected(groups=expected.groups)
    precision = torch.get_float32_matmul_precision()
    for rhythm in (got, known):
        assert rhythm.waad.dtype == torch.float32
    pairs = [(got.waad, expected.waad), (got.fai, expected.fai), (known.waad, collected(groups=expected.groups).waad)]
    for x, y in pairs:
        if name == "medium precision" and attention == "sdpa":
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(x, y)


def test_no_new_tensor_takes_the_default_device():
    """Scripts of the command line and the dense reference have a process of their own, and may."""
    makers = {"tensor", "as_tensor", "arange", "linspace", "zeros", "ones", "full", "empty", "eye", "rand", "randint"}
    package = Path(rk.__file__).parent
    files = [file for file in package.rglob("*.py") if file.parent.name != "analysis" and file.name != "reference.py"]
    calls = [(file.name, node) for file in files for node in ast.walk(ast.parse(file.read_text()))]
    made = [(name, call) for name, call in calls if isinstance(call, ast.Call) and _torch_function(call) in makers]
    assert len(made) > 50
    wrong = [f"{name}:{call.lineno}" for name, call in made if not {"device", None} & {k.arg for k in call.keywords}]
    assert not wrong


def _torch_function(call: ast.Call) -> str | None:
    """Returns the name of a call torch.NAME(...)."""
    named = isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name)
    return call.func.attr if named and call.func.value.id == "torch" else None


# ---- products of fp32 matrices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PRODUCTS)
def test_products_are_exact_inside_and_as_before_after(place):
    def setting():
        return torch._C._get_fp32_precision_getter(*place)

    with matmul_precision("medium"):
        before = setting()
        assert before in ("bf16", "tf32") and lowest_precision() == lowest_precision("cpu") == "bf16"
        assert lowest_precision("cuda") == "tf32"
        with isolated(torch.device("cpu")):
            assert setting() == "ieee" and lowest_precision() is None
        assert setting() == before
        with pytest.raises(ZeroDivisionError), exact_products():
            raise ZeroDivisionError
        assert setting() == before


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_torchs_older_setting_of_precision_can_be_read_inside(setting):
    """torch raises where it contradicts the newer ones. Another thread may read it, such as inductor's."""

    def seen():
        return torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32

    with matmul_precision(setting):
        before = seen(), [torch._C._get_fp32_precision_getter(*place) for place in PRODUCTS]
        with exact_products():
            assert seen() == ("highest", False) and lowest_precision() is None
        assert (seen(), [torch._C._get_fp32_precision_getter(*place) for place in PRODUCTS]) == before


def test_a_thread_that_leaves_does_not_change_the_products_of_another():
    inside, leave, after = threading.Event(), threading.Event(), []

    def other():
        with exact_products():
            inside.set()
            leave.wait()
        after.append(lowest_precision())

    with matmul_precision("medium"):
        thread = threading.Thread(target=other)
        thread.start()
        inside.wait()
        with exact_products():
            leave.set()
            thread.join()
            assert after == [None] and lowest_precision() is None
        assert lowest_precision() == "bf16"


# ---- graphs of torch.compile -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode, would_warn", [(False, False), (False, True), (True, False), (True, True)])
def test_the_setting_that_tells_graphs_apart_is_as_before_after(mode, would_warn):
    def setting():
        return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()

    def hold():
        with graphs_of_their_own():
            inside.set()
            leave.wait()

    torch._C._set_deterministic_algorithms(mode, warn_only=would_warn)
    try:
        inside, leave = threading.Event(), threading.Event()
        thread = threading.Thread(target=hold)
        thread.start()
        inside.wait()
        with graphs_of_their_own():
            assert setting() == (mode, would_warn if mode else not would_warn)
            leave.set()
            thread.join()
            assert setting() == (mode, would_warn if mode else not would_warn)
        assert setting() == (mode, would_warn)
        with graphs_of_their_own():
            torch._C._set_deterministic_algorithms(not mode, warn_only=would_warn)
        assert setting() == (not mode, would_warn)
    finally:
        torch._C._set_deterministic_algorithms(False, warn_only=False)


# ---- dispatch modes --------------------------------------------------------------------------------------------------


class Seen(TorchDispatchMode):
    """Counts the operators that run in its block."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_model_alone():
    torch.manual_seed(1)
    model, ids = llama("sdpa"), torch.randint(0, 61, (2, TOKENS))
    with torch.no_grad(), Seen() as plain:
        model(ids)
    with torch.no_grad(), rk.collect(model) as c, Seen() as seen:
        model(ids)
    assert seen.count == plain.count and c.rhythm().waad.any()


@pytest.mark.parametrize("saved", ["mm", "bmm", "_scaled_dot_product_flash_attention_for_cpu", "mul"])
def test_selective_checkpointing_recomputes_the_same(saved):
    """Selective checkpointing keeps results in a queue for each operator, which the statistics must not enter."""
    torch.manual_seed(1)
    model, ids = llama("sdpa").train(), torch.randint(0, 61, (2, TOKENS))
    layers, operators = model.model.layers, getattr(torch.ops.aten, saved)

    def policy(_, func, *args, **kwargs):
        kept = func in (getattr(operators, name) for name in operators.overloads())
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts():
        return create_selective_checkpoint_contexts(policy)

    def gradients(selective, collected):
        model.zero_grad()
        plain = [layer.forward for layer in layers]
        for layer in layers if selective else ():

            def run(*args, forward=layer.forward, **kwargs):
                return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

            layer.forward = run
        with rk.collect(model) if collected else nullcontext():
            model(ids, use_cache=False).logits.float().logsumexp(-1).mean().backward()
        for layer, forward in zip(layers, plain):
            layer.forward = forward
        return [x.grad for x in model.parameters()]

    expected = gradients(False, False)
    for got, exact in zip(gradients(True, True), expected, strict=True):
        torch.testing.assert_close(got, exact)


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_a_context_belongs_to_the_thread_that_opened_it():
    torch.manual_seed(1)
    model, ids = llama("sdpa"), torch.randint(0, 61, (2, TOKENS))
    with torch.no_grad(), rk.collect(model) as c:
        model(ids)
    expected = c.rhythm()

    def others_forward():
        with torch.no_grad():
            model(ids.flip(-1))

    def run(thread):
        thread.start()
        thread.join()

    def others_context():
        with torch.no_grad(), rk.collect(model) as theirs:
            model(ids)
        rhythms.append(theirs.rhythm())

    rhythms = []
    with torch.no_grad(), rk.collect(model) as c:
        run(threading.Thread(target=others_forward))
        assert not c.stats
        model(ids)
        run(threading.Thread(target=others_forward))
        run(threading.Thread(target=others_context))
    for rhythm in (c.rhythm(), *rhythms):
        assert torch.equal(rhythm.waad, expected.waad) and torch.equal(rhythm.fai, expected.fai)


def test_a_context_belongs_to_its_own_forward():
    """A second model with the same layers is not collected, neither before nor after."""
    torch.manual_seed(1)
    model, ids = llama("sdpa"), torch.randint(0, 61, (2, TOKENS))
    other = llama("sdpa")
    other.model.layers = model.model.layers
    with torch.no_grad(), rk.collect(model) as alone:
        model(ids)
    with torch.no_grad(), rk.collect(model) as c:
        other(ids.flip(-1))
        model(ids)
        other(ids.flip(-1))
    assert torch.equal(c.rhythm().waad, alone.rhythm().waad)


# ---- devices ---------------------------------------------------------------------------------------------------------


class OnMps(torch.Tensor):
    """A tensor that says it is on a device without float64."""

    device = torch.device("mps")


def on_mps(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype).as_subclass(OnMps)


@pytest.mark.parametrize(
    "call",
    [
        lambda: rk.attention_stats(on_mps(1, 2, 4, 8), on_mps(1, 2, 4, 8)),
        lambda: rk.group_heads(on_mps(2, 4)),
        lambda: rk.GroupSchedule().add(on_mps(1, 2, 4), torch.tensor([3])),
        lambda: rk.token_credit("entropy", response_mask=on_mps(1, 4, dtype=torch.bool), entropy=on_mps(1, 4)),
        lambda: rk.segment_topq(on_mps(1, 4), on_mps(1, 4, dtype=torch.bool), 0.4),
        lambda: rk.find_peaks(on_mps(1, 4), on_mps(1, 4, dtype=torch.bool)),
    ],
)
def test_a_device_without_float64_is_refused_by_name(call):
    with pytest.raises(ValueError, match="must be on a device that has float64, .* got mps"):
        call()


def test_a_model_on_a_device_without_float64_is_refused_before_its_first_layer():
    model = llama("sdpa")
    refused = pytest.raises(ValueError, match="model's inputs must be on a device that has float64, .* got mps")
    with torch.no_grad(), refused, rk.collect(model) as c:
        c.decoder(inputs_embeds=on_mps(1, 4, 48))
