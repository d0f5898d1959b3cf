"""Random cases for every backend of the statistics: the hypothesis strategy over all features of the contract.

Apart from stats_cases, which needs no hypothesis: a bare GPU machine may not have it.
"""

import torch
from hypothesis import strategies as st
from stats_cases import StatsCase, make_case

from rhythm_kernels.statistics.more import MORE

HEADS = ((1, 1), (2, 2), (2, 1), (4, 2), (3, 1))  # (HQ, H)
HEAD_SIZES = (1, 3, 16, 20, 32, 40, 80)


@st.composite
def stats_case(draw, max_tokens: int = 80, dtypes=(torch.float32, torch.float16)) -> StatsCase:
    """Every feature of the contract, alone and together."""
    query_heads, key_heads = draw(st.sampled_from(HEADS))
    kind = draw(st.sampled_from(("plain", "padded", "packed")))
    batch = 1 if kind == "packed" else draw(st.integers(1, 2))
    tokens = draw(st.integers(0, max_tokens))
    kwargs = {}
    if kind == "padded":
        kwargs["attention_mask"] = torch.zeros(batch, tokens, dtype=torch.int64)
        for b in range(batch):
            length = draw(st.integers(0, tokens))
            begin = draw(st.sampled_from((0, tokens - length)))
            kwargs["attention_mask"][b, begin : begin + length] = 1
    if kind == "packed":
        cuts = draw(st.lists(st.integers(0, tokens), max_size=4))
        kwargs["cu_seqlens"] = torch.tensor([0, *sorted(cuts), tokens], dtype=torch.int32)

    rows = draw(st.sampled_from(("all", "response", "holes", "few")))
    seed = draw(st.integers(0, 2**31 - 1))
    generator = torch.Generator().manual_seed(seed)
    if rows == "response":
        prompt = draw(st.integers(0, tokens))
        kwargs["response_mask"] = (torch.arange(tokens) >= prompt).expand(batch, tokens).clone()
    elif rows != "all":
        kwargs["response_mask"] = torch.rand(batch, tokens, generator=generator) < (0.6 if rows == "holes" else 0.03)

    lo = draw(st.integers(0, 12))
    kwargs["horizon"] = (lo, draw(st.none() | st.integers(lo, lo + 60)))
    kwargs["window"] = draw(st.sampled_from((1, 2, 10, 33, 256)))
    kwargs["sliding_window"] = draw(st.none() | st.integers(1, 40))
    kwargs["softcap"] = draw(st.none() | st.sampled_from((1.0, 20.0, 50.0)))
    kwargs["scale"] = draw(st.none() | st.sampled_from((0.0, 0.1, 1.0, -0.3)))
    if draw(st.booleans()):
        kwargs["sinks"] = 2 * torch.randn(query_heads, generator=generator)
    kwargs["more"] = draw(st.lists(st.sampled_from(MORE), max_size=3) | st.just(MORE))
    kwargs["first_keys"] = draw(st.sampled_from((1, 4, 30)))
    if "prefix_mass" in kwargs["more"]:
        sequences = len(kwargs["cu_seqlens"]) - 1 if kind == "packed" else batch
        kwargs["prefix_lengths"] = torch.randint(tokens + 2, [sequences], generator=generator)
    kwargs["need_span"] = draw(st.booleans())
    kwargs["span_rows"] = draw(st.sampled_from((None, 64, 128)))
    return make_case(
        (batch, query_heads, tokens, draw(st.sampled_from(HEAD_SIZES))),
        key_heads,
        dtype=draw(st.sampled_from(dtypes)),
        seed=seed,
        sharpness=draw(st.sampled_from((0.3, 1.0, 4.0))),
        order=draw(st.sampled_from(("heads outside", "heads inside", "slice"))),
        lse_given=draw(st.booleans()),
        **kwargs,
    )
