"""Forwards of random decoders with random inputs: a number is right, or the refusal names the true reason.

Right is what the attention function's own map gives (own_maps.py), for the sequences that the inputs mean. A refusal is
justified where that map is not the one that the layer's arguments say, or where the inputs contradict each other. CI
runs some hundred forwards; `pytest tests/test_collect_fuzz.py --forwards 10000` runs more.
"""

import itertools
import random
from collections import Counter
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
import transformers
from architectures import EXPERTS, LATENT
from flash_stand_in import flash_attention
from models import SIZES, dense_stats
from own_maps import OwnMaps, own_maps
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rhythm_kernels import HeadGroups, collect, reference

LAYERS = 3
WINDOW = {"sliding_window": 7}
FAMILIES = {
    "Llama": {},
    "Mistral": WINDOW,
    "Qwen3": WINDOW | {"head_dim": 8, "use_sliding_window": True, "max_window_layers": 1},
    "Gemma2": WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 30, "attn_logit_softcapping": 3.0},
    "GptOss": WINDOW | EXPERTS | {"head_dim": 8, "num_local_experts": 2},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 48, "dropout": 0.0},
    "DeepseekV3": LATENT,
}
IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "mine", "mine_of_flash")
"""The last two are transformers' functions under names that it makes no mask for."""


class Inputs(NamedTuple):
    kwargs: dict
    """The arguments of the model's forward."""
    segments: torch.Tensor
    """[B, T] int64: the sequence that each token is meant to belong to, -1 for padding."""
    contradiction: bool
    """Whether no one can say what is meant: packed rows in a batch, packed rows with padding."""
    what: str


def build(draw: random.Random, name: str, implementation: str):
    sizes = SIZES | {"num_hidden_layers": LAYERS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    cls = getattr(transformers, f"{name}ForCausalLM")
    heads = {"num_key_value_heads": draw.choice([1, 2, 3, 6])} if name not in ("OPT", "DeepseekV3") else {}
    config = cls.config_class(**sizes | FAMILIES[name] | heads)
    model = cls._from_config(config, attn_implementation="eager")
    model.config._attn_implementation = implementation  # set_attn_implementation would ask for a package
    return model.train(draw.random() < 0.3)


def draw_inputs(draw: random.Random, implementation: str) -> Inputs:
    what = draw.choice(["whole", "whole", "left", "right", "packed", "packed", "packed", "packed and padded"])
    several = draw.random() < (0.1 if what.startswith("packed") else 0.6)
    batch, tokens = draw.choice([2, 3]) if several else 1, draw.randint(1, 40)
    kwargs = {"input_ids": torch.randint(3, 61, (batch, tokens))}
    real = torch.ones(batch, tokens, dtype=torch.bool)
    cuts = [0, tokens]
    if what in ("left", "right", "packed and padded"):
        lengths = torch.tensor([[draw.randint(0 if what != "packed and padded" else 1, tokens)] for _ in range(batch)])
        position = torch.arange(tokens)
        real = position < lengths if what != "left" else position >= tokens - lengths
    if what == "whole" and draw.random() < 0.3:
        kwargs["position_ids"] = torch.arange(tokens).expand(draw.choice([1, batch]), -1)
    if what.startswith("packed"):
        cuts = sorted({0, tokens, *(draw.randint(0, tokens) for _ in range(draw.randint(1, 4)))})
        positions = torch.cat([torch.arange(end - begin) for begin, end in itertools.pairwise(cuts)])
        given = draw.choice(["positions", "positions", "bounds", "both", "bounds alone"])
        if given in ("positions", "both") or implementation not in ("flash_attention_2", "mine_of_flash"):
            kwargs["position_ids"] = positions.expand(batch, -1)
        if given != "positions":
            bounds = torch.tensor(cuts, dtype=torch.int32)
            longest = max(end - begin for begin, end in itertools.pairwise(cuts))
            kwargs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
            if given != "bounds alone":
                kwargs |= {"max_length_q": longest, "max_length_k": longest}
    mask = draw.choice(["none", "ones"]) if real.all() else "padding"
    if mask != "none":
        kwargs["attention_mask"] = real.to(draw.choice([torch.long, torch.bool, torch.float32, torch.int32]))
    if draw.random() < 0.7:
        kwargs["use_cache"] = draw.random() < 0.4
    packed = len(cuts) > 2
    segments = reference.segment_ids(batch, tokens, real)
    if packed and batch == 1:
        segments = reference.segment_ids(1, tokens, cu_seqlens=torch.tensor(cuts)).masked_fill(~real, -1)
    contradiction = (packed or "cu_seq_lens_q" in kwargs) and (batch > 1 or not bool(real.all()))
    return Inputs(kwargs, segments, contradiction, f"{what}, mask of {mask}")


def intended_map(call, segments: torch.Tensor, implementation: str) -> torch.Tensor:
    """Returns the map that the arguments of an attention function describe, [B, HQ, T, T] fp64."""
    names = {"scale": "scaling", "sliding_window": "sliding_window", "softcap": "softcap", "sinks": "s_aux"}
    options = {ours: call.kwargs.get(theirs) for ours, theirs in names.items()}
    if implementation == "sdpa":  # which drops them, and says so
        options |= {"softcap": None, "sinks": None}
    return reference.attention_map(call.query, call.key, segments, **options)[0]


def is_as_intended(own: OwnMaps, layers, inputs: Inputs, rows: torch.Tensor, implementation: str) -> bool:
    if implementation == "mine" and own.calls[layers[0]].kwargs.get("softcap") is not None:
        return False  # it is sdpa's, which drops the cap: its log-sum-exp says so also where a row has a single key
    for layer in layers:
        meant = intended_map(own.calls[layer], inputs.segments, implementation)
        off = (own.maps[layer].double() - meant).abs().amax(-1).masked_fill(~rows[:, None], 0.0)
        if not off.amax() < 1e-5:
            return False
    return True


def check_forward(seed: int, name: str) -> str:
    """Runs one forward; returns its outcome."""
    draw = random.Random(f"{name} {seed}")
    torch.manual_seed(draw.randrange(2**31))
    implementation = draw.choice(IMPLEMENTATIONS)
    if implementation == "sdpa" and name == "GptOss":  # transformers has none for it
        implementation = "eager"
    model = build(draw, name, implementation)
    if model.training and draw.random() < 0.5:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = draw_inputs(draw, implementation)
    shape = inputs.segments.shape
    rows = torch.rand(shape) < draw.choice([1.0, 1.0, 0.6, 0.2])
    if draw.random() < 0.4:
        rows &= torch.arange(shape[1]) >= draw.randint(0, shape[1])
    window, horizon = draw.choice([1, 4, 10]), draw.choice([(10, 50), (1, 6), (0, None), (3, None)])
    chosen = draw.choice([list(range(LAYERS)), [1], 5])
    options = {"window": window, "horizon": horizon, "response_mask": rows, "layers": chosen}
    if draw.random() < 0.2:
        count = 1 if isinstance(chosen, list) and len(chosen) == 1 else len(collect(model, layers=chosen).layers)
        local = torch.rand(count, 6) < 0.5
        options["groups"] = HeadGroups(local, ~local)
    grad = torch.no_grad() if draw.random() < 0.7 else nullcontext()

    with flash_attention(), grad:
        with own_maps(model) as own:
            model(**inputs.kwargs)
        rows = rows & (inputs.segments >= 0)
        layers = collect(model, layers=chosen).layers
        try:
            with collect(model, **options) as c:
                model(**inputs.kwargs)
            c.rhythm()
        except ValueError:
            if not inputs.contradiction and is_as_intended(own, layers, inputs, rows, implementation):
                raise
            return "contradiction" if inputs.contradiction else "refused"
    sequences = int(inputs.segments.max()) + 1 if shape[0] == 1 else shape[0]
    if not inputs.contradiction:
        assert c.layout.sequences >= sequences
    segments = c.layout.segments.masked_fill(c.layout.first > c.layout.last, -1)
    for layer in layers:
        exact = dense_stats(own.maps[layer], rows, segments, c.layout.sequences, window, horizon)
        stats = c.stats[layer]
        if "groups" in options:
            index = layers.index(layer)
            members = [group[index, :, None] for group in options["groups"]]
            exact = [(x * member).sum(1) for x, member in zip(exact, members)]
        for got, true in zip(stats, exact):
            torch.testing.assert_close(got.double(), true, rtol=3e-5, atol=3e-5)
    return f"right: {inputs.what}"


@pytest.fixture
def functions(monkeypatch):
    """Registers transformers' functions under other names, for which it makes no mask."""
    for name, function in (("mine", "sdpa"), ("mine_of_flash", "flash_attention_2")):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, name, ALL_ATTENTION_FUNCTIONS[function])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.slow
def test_a_number_is_right_or_refused(name, functions, pytestconfig, record_property):
    outcomes = Counter()
    forwards = pytestconfig.getoption("forwards") // len(FAMILIES)
    for seed in range(forwards):
        try:
            outcomes[check_forward(seed, name)] += 1
        except Exception as error:
            raise AssertionError(f"forward {seed} of {name}: {error}") from error
    record_property("outcomes", f"{name}: {dict(sorted(outcomes.items()))}")
    assert (outcomes["refused"] and any(what.startswith("right: packed") for what in outcomes)) or name in ("OPT",)
