"""Calls every op of the extension on many random inputs and holds the results against the definitions, exactly.

    python sanitized_ops.py FOLDER [OP]

FOLDER is where rhythm_kernels must come from: tests/test_sanitizers.py puts a library there that AddressSanitizer and
UndefinedBehaviorSanitizer watch, and what they see ends this process. With OP ("topq", "peaks", "credit") only that one
is called.
"""

import ctypes
import itertools
import random
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import rhythm_kernels
from rhythm_kernels import Rhythm, coupled_sets, find_peaks, reference, segment_topq, token_credit
from rhythm_kernels.credit import composed

THREADS = 4
SMALL, MEDIUM = (0, 1, 2, 3, 7, 31, 32, 33), (255, 256, 257)
LARGE = ((3, 8191), (64, 777), (2, 131072))  # enough for several threads
INF, NAN = float("inf"), float("nan")
TIED = (0.0, -0.0, 1.0, -1.0, 2.5)
ODD = (*TIED, INF, -INF, NAN, -NAN, 1e-45, -1e-45, 1e-40, -1e-40, 3.4028235e38, -3.4028235e38)
TAUS = (None, None, 0.0, -0.0, 0.1, 1.0, 1e-46, -1e-46, 1e300, -1e300, 3.5e38, -3.5e38, 3.4028235e38)


class Case(NamedTuple):
    waad: Tensor
    """[B, T] fp32, any bits; also the values of the selection ops."""
    fai: Tensor
    mask: Tensor
    """[B, T] bool."""
    cuts: Tensor | None
    """int32 [S + 1]: packed sequences, B = 1."""

    def sequences(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Returns (waad, fai, mask) of all rows, or of each packed sequence alone."""
        if self.cuts is None:
            return [self[:3]]
        return [tuple(x[:, a:b] for x in self[:3]) for a, b in itertools.pairwise(self.cuts.tolist())]


# ---- inputs ----------------------------------------------------------------------------------------------------------


def draw_signal(rng: random.Random, shape: tuple[int, int]) -> Tensor:
    kind = rng.choice(["normal", "tied", "equal", "odd", "any bits"])
    if kind == "normal":
        return torch.randn(shape)
    if kind == "equal":
        return torch.tensor(rng.choice(ODD)).repeat(shape)
    if kind == "any bits":
        return torch.randint(-(2**31), 2**31, shape).int().view(torch.float32)
    choices = torch.tensor(TIED if kind == "tied" else ODD)
    return choices[torch.randint(len(choices), shape)]


def draw_layout(rng: random.Random, x: Tensor) -> Tensor:
    """Returns the same content in other strides."""
    kind = rng.choice(["contiguous", "transposed", "strided", "inside"])
    if kind == "transposed":
        return x.T.contiguous().T
    if kind == "strided":
        return torch.stack([x, x], -1).flatten(1)[:, ::2]
    if kind == "inside":
        return torch.nn.functional.pad(x, (3, 2, 1, 1))[1:-1, 3 : 3 + x.shape[1]]
    return x


def draw_cuts(rng: random.Random, tokens: int) -> Tensor:
    """Draws cu_seqlens, also with empty sequences, and for no tokens with none at all."""
    inner = sorted(rng.randint(0, tokens) for _ in range(rng.randint(0, 6)))
    return torch.tensor([0, *inner, tokens] if tokens or rng.random() < 0.5 else [0], dtype=torch.int32)


def draw_case(rng: random.Random, shape: tuple[int, int], finite: bool) -> Case:
    waad, fai = draw_signal(rng, shape), draw_signal(rng, shape)
    if finite:
        waad, fai = waad.nan_to_num(0.5), fai.nan_to_num(0.5)
    density = rng.choice([0.0, 0.5, 0.9, 1.0])
    mask, cuts = torch.rand(shape) < density, None
    if rng.random() < 0.4:
        waad, fai, mask = (x.reshape(1, -1) for x in (waad, fai, mask))
        cuts = draw_cuts(rng, mask.shape[1])
    return Case(*(draw_layout(rng, x) for x in (waad, fai, mask)), cuts)


def draw_share(rng: random.Random) -> float:
    return rng.choice([0.0, 0.4, 0.7, 1.0, rng.random()])


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_same(got: tuple, want: tuple) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def defined(case: Case, function) -> Tensor:
    """Returns the results of a function of rows on each sequence alone."""
    return torch.cat([case.mask[:, :0], *(function(*rows) for rows in case.sequences())], -1)


def check_topq(rng: random.Random, case: Case, small: bool) -> None:
    q, largest = draw_share(rng), rng.random() < 0.5
    arguments = (case.waad, case.mask, case.cuts, q, largest)
    check_same(torch.ops.rhythm_kernels.segment_topq(*arguments), composed.segment_topq(*arguments))
    if small:
        got = segment_topq(case.waad, case.mask, q, largest=largest, cu_seqlens=case.cuts, backend="extension")
        want = defined(case, lambda values, _, mask: reference.segment_topq(values, mask, q, largest))
        check_same((got,), (want,))


def check_peaks(rng: random.Random, case: Case, small: bool) -> None:
    p = draw_share(rng)
    arguments = (case.waad, case.mask, case.cuts, p)
    check_same((torch.ops.rhythm_kernels.find_peaks(*arguments),), (composed.find_peaks(*arguments),))
    if small:
        got = find_peaks(case.waad, case.mask, min_quantile=p, cu_seqlens=case.cuts, backend="extension")
        want = defined(case, lambda values, _, mask: reference.find_peaks(values, mask, p))
        check_same((got,), (want,))


def check_credit(rng: random.Random, case: Case, small: bool) -> None:
    ops, q, amplification, largest = (
        torch.ops.rhythm_kernels,
        draw_share(rng),
        rng.choice([0.0, 1.5, 1e37]),
        rng.random() < 0.5,
    )
    k = rng.choice([1, 2, 3, 8, *([case.mask.shape[1] + 1, 2**40] if small else [])])  # `composed` takes k steps
    shared_fraction, taus = rng.choice([0.0, 0.3, 1.0]), (rng.choice(TAUS), rng.choice(TAUS))
    drops, of_preplan = rng.random() < 0.5, draw_share(rng)
    for with_sets in (True, False):
        arguments = (*case, q, of_preplan, amplification, shared_fraction, k, largest, drops, *taus, with_sets)
        check_same(ops.coupled_credit(*arguments), composed.coupled_credit(*arguments))
    for of_delta in (True, False):
        arguments = (case.waad, case.mask, case.cuts, of_delta, drops, q, amplification, largest)
        check_same(ops.topq_credit(*arguments), composed.topq_credit(*arguments))
    if small and all((x.isfinite() | ~case.mask).all() for x in case[:2]):
        k = min(k, case.mask.shape[1] + 1)  # `reference` takes k steps
        coupled = {"max_lookback": k, "tau_waad": taus[0], "tau_delta": taus[1]}
        coupled |= {"preplan_fraction": rng.choice([None, of_preplan]), "delta": "drop" if drops else "absolute"}
        check_strategies(
            case,
            {
                "top_fraction": q,
                "amplification": amplification,
                "largest": largest,
                "shared_fraction": shared_fraction,
                **coupled,
            },
        )
        check_sets(case, {"top_fraction": q, "largest": largest, **coupled})


def check_strategies(case: Case, options: dict) -> None:
    inputs = {"response_mask": case.mask, "rhythm": Rhythm(*case[:2]), "entropy": case.fai, "cu_seqlens": case.cuts}
    draw = torch.rand(case.mask.shape, generator=torch.Generator().manual_seed(5))
    of_draw = case._replace(waad=draw)
    for strategy in ("none", "local", "global", "entropy", "coupled", "random"):
        got = token_credit(strategy, seed=5, backend="extension", **inputs, **options)
        want = defined(
            of_draw if strategy == "random" else case,
            lambda w, f, m, s=strategy: reference.gamma(s, m, w, f, entropy=f, draw=w, **options),
        )
        check_same((got,), (want.float(),))


def check_sets(case: Case, options: dict) -> None:
    got = coupled_sets(case.mask, Rhythm(*case[:2]), cu_seqlens=case.cuts, backend="extension", **options)
    for i, name in enumerate(("anchors", "dominated", "intros")):
        want = defined(case, lambda w, f, m, i=i: reference.coupled_sets(w, f, m, **options)[i])
        check_same((getattr(got, name),), (want,))


def check_refusals() -> None:
    """Errors leave the library as C++ exceptions."""
    values, mask, cuts = torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool), torch.tensor([0, 2, 1, 3]).int()
    ops = torch.ops.rhythm_kernels
    for call in (
        lambda: ops.segment_topq(values, mask, cuts, 0.4, True),
        lambda: ops.find_peaks(values[0], mask, None, 0.4),
        lambda: ops.topq_credit(values.double(), mask, None, True, False, 0.4, 1.5, True),
        lambda: ops.coupled_credit(values, values, mask, None, 0.4, 0.4, 1.5, 0.5, 0, True, False, None, None, True),
    ):
        try:
            call()
        except ValueError:
            continue
        raise AssertionError("not refused")


# ---- all of them -----------------------------------------------------------------------------------------------------

CHECKS = {"topq": check_topq, "peaks": check_peaks, "credit": check_credit}


def shapes(rng: random.Random):
    for _ in range(1000):
        yield rng.randint(0, 3), rng.choice(SMALL)
    for _ in range(30):
        yield rng.randint(1, 2), rng.choice(MEDIUM)
    yield from LARGE * 3


def main(folder: str, only: str | None = None) -> None:
    library = Path(rhythm_kernels._C.__file__)
    assert library.parent.parent == Path(folder), library
    assert hasattr(ctypes.CDLL(None), "__asan_init"), "the sanitizer's runtime is not loaded"
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    rng = random.Random(0)
    checks = [check for name, check in CHECKS.items() if only in (None, name)]
    for shape in shapes(rng):
        case = draw_case(rng, shape, finite=rng.random() < 0.6)
        for check in checks:
            check(rng, case, small=shape[1] <= max(MEDIUM))
    check_refusals()
    print("all as defined")


if __name__ == "__main__":
    main(*sys.argv[1:])
