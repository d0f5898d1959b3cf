"""The decisions of an answer: estimates against a chain whose values are known, and shares and areas by hand."""

import itertools
import math

import numpy as np
import pytest

from rhythm_kernels.analysis.decisions import Sampled, areas, by_tenth, decide, largest, oracle, ranks, shares

PAIRS = [np.array(pair) for pair in itertools.product(range(3), repeat=2)]


def binomial(tries: int, rate: np.ndarray, wins: np.ndarray) -> np.ndarray:
    ways = np.array([math.comb(tries, one) for one in wins])
    return ways * rate**wins * (1 - rate) ** (tries - wins)


# ---- estimates -------------------------------------------------------------------------------------------------------

OTHER = np.array([0.5, 0.0, 0.3, 0.02, 0.9, 0.1])
RATE = np.array([0.2, 0.0, 0.9, 0.1, 0.4, 1.0])
"""W of each token of an answer that ends solved: what its tokens decide follows."""


def chain() -> tuple[np.ndarray, np.ndarray]:
    """Returns the true (values, decisions) of that answer, from the definition."""
    values = [1.0]
    for other, rate in zip(OTHER[::-1], RATE[::-1]):
        values.insert(0, (1 - other) * values[0] + other * rate)
    return np.array(values), np.diff(values)


def sample(draw: np.random.Generator, tries: int) -> Sampled:
    count = np.where(OTHER > 0, tries, 0)
    return Sampled(True, OTHER, draw.binomial(count, RATE, (2, len(OTHER))), count)


def test_estimates_have_no_bias_on_a_chain_whose_values_are_known():
    values, decisions = chain()
    draw, count = np.random.default_rng(0), 20_000
    found = [decide(sample(draw, 3)) for _ in range(count)]

    def check(name: str, estimates: np.ndarray, truth: np.ndarray):
        error = estimates.std(0) / np.sqrt(count)
        assert (abs(estimates.mean(0) - truth) <= 4.5 * error + 1e-12).all(), name

    check("values", np.array([one.value for one in found]), values)
    check("decisions", np.array([one.decision for one in found]), decisions)
    squares = np.array([one.square for one in found])
    check("squares", squares, decisions**2)
    check("halves", np.array([one.rise + one.fall for one in found]), decisions**2)
    check("spread", np.array([one.spread for one in found]), values[0] * (1 - values[0]))
    errors = np.array([one.decision for one in found]) - decisions
    check("noise", errors**2 - [one.noise for one in found], 0 * decisions)
    plain = np.array([one.decision for one in found]) ** 2
    assert plain.mean(0)[4] > decisions[4] ** 2 + 20 * plain.std(0)[4] / np.sqrt(count), "nothing to take off"


def test_the_square_has_the_stated_variance_where_nothing_is_decided():
    """The value after the first token is 0.5, and so is that with another token."""
    draw, tries = np.random.default_rng(6), np.array([50, 50])
    rate = np.array([0.5, 0.0])
    found = [
        decide(Sampled(True, np.array([0.5, 0.5]), draw.binomial(tries, rate, (2, 2)), tries)) for _ in range(8000)
    ]
    noise = 0.5**2 * 0.25 / 100
    assert np.var([one.decision[0] for one in found]) == pytest.approx(noise, rel=0.06)
    assert np.var([one.square[0] for one in found]) == pytest.approx(2 * noise**2, rel=0.12)
    assert np.var([one.rise[0] + one.fall[0] for one in found]) == pytest.approx(4 * noise**2, rel=0.12)


def test_the_square_is_the_mean_over_all_halvings():
    outcomes = [[1, 0, 1, 1], [0, 1, 0, 0]]
    other = np.array([0.4, 0.7])
    halvings = [set(half) for half in itertools.combinations(range(4), 2)]
    products = []
    for chosen in itertools.product(halvings, repeat=2):
        wins = np.array(
            [
                [
                    sum(one[place] for place in range(4) if (place in half) == first)
                    for one, half in zip(outcomes, chosen)
                ]
                for first in (True, False)
            ]
        )
        found = decide(Sampled(False, other, wins, np.array([2, 2])))
        of_halves = [decide(Sampled(False, other, np.stack([half, half]), np.array([2, 2]))) for half in wins]
        products.append(of_halves[0].decision * of_halves[1].decision)
    np.testing.assert_allclose(np.mean(products, 0), found.square, rtol=1e-12)
    assert np.ptp([product[0] for product in products]) > 0.01


def test_signs_are_told_apart():
    draw = np.random.default_rng(1)
    _, decisions = chain()
    found = [decide(sample(draw, 400)) for _ in range(300)]
    rise, fall = (np.mean([getattr(one, name) for one in found], 0) for name in ("rise", "fall"))
    np.testing.assert_allclose(rise, np.where(decisions > 0, decisions**2, 0), atol=2e-3)
    np.testing.assert_allclose(fall, np.where(decisions < 0, decisions**2, 0), atol=2e-3)
    assert (decisions > 0.05).any() and (decisions < -0.05).any()


def test_noise_moves_no_decision_to_the_other_side_beyond_the_half():
    """A sign that one of two halves of 4 continuations tells wrongly counts as it is told, and never below 0."""
    draw, count = np.random.default_rng(7), 20_000
    other, rate = np.array([0.9, 0.9]), np.array([0.9, 0.6])  # both decisions are small beside their noise
    values = [1.0]
    for one in rate[::-1]:
        values.insert(0, 0.1 * values[0] + 0.9 * one)
    square, tries = np.diff(values) ** 2, np.array([2, 2])
    found = [decide(Sampled(True, other, draw.binomial(tries, rate, (2, 2)), tries)) for _ in range(count)]
    rise, fall = (np.array([getattr(one, name) for one in found]) for name in ("rise", "fall"))
    error = 4.5 * (rise + fall).std(0) / np.sqrt(count)
    assert (abs((rise + fall).mean(0) - square) < error).all()
    # the definition: what half of the continuations says of the sign, here by going through all its outcomes
    for t in (0, 1):
        halves = [one.decision[t] for one in (decide(Sampled(True, other, np.stack([w, w]), tries)) for w in PAIRS)]
        chance = [np.prod(binomial(2, rate, w)) for w in PAIRS]
        positive = sum(p * ((half > 0) + 0.5 * (half == 0)) for p, half in zip(chance, halves, strict=True))
        assert abs(rise.mean(0)[t] - positive * square[t]) < error[t] and 0.05 < positive < 0.95


def test_decisions_add_up_to_the_variance_of_the_reward():
    """A policy of coin flips: it must get the two planted tokens right, and nothing else matters."""
    draw, total, spread = np.random.default_rng(2), [], []
    for _ in range(4000):
        tokens = draw.random(6) < np.array([0.5, 0.6, 0.5, 0.5, 0.3, 0.5])  # whether each is the first of two
        solved = bool(tokens[1] and tokens[4])
        own = np.where(tokens, [0.5, 0.6, 0.5, 0.5, 0.3, 0.5], [0.5, 0.4, 0.5, 0.5, 0.7, 0.5])
        rate = np.full(6, 0.18)  # before the first decision
        rate[1] = 0.0 if tokens[1] else 0.3
        rate[2:4] = 0.3 * tokens[1]
        rate[4] = float(tokens[1] and not tokens[4])
        rate[5] = float(solved)
        tries = np.full(6, 4)
        found = decide(Sampled(solved, 1 - own, draw.binomial(tries, rate, (2, 6)), tries))
        total.append(found.square)
        spread.append(found.spread)
    mean = np.mean(total, 0)
    assert mean.sum() == pytest.approx(0.18 * 0.82, abs=0.01) and np.mean(spread) == pytest.approx(0.1476, abs=0.004)
    # 0.6 0.4 0.3^2 and, where the first is right, 0.3 0.7
    np.testing.assert_allclose(mean, [0, 0.0216, 0, 0, 0.126, 0], atol=0.006)


# ---- shares ----------------------------------------------------------------------------------------------------------


def decisions_of(square: list[float]):
    square = np.array(square)
    return decide(
        Sampled(True, np.zeros(len(square)), np.zeros((2, len(square)), int), np.zeros(len(square), int))
    )._replace(square=square, decision=np.sqrt(abs(square)), rise=square, fall=0 * square)


def test_shares_by_hand():
    found = shares(np.array([1.5, 1.0, 1.25, 1.0]), decisions_of([4.0, 1.0, 2.0, -1.0]), np.array([2.0, 2.0, 1.0, 0.0]))
    assert found["selected"] == 2 and found["tokens"] == 4
    assert found["square"] == 6 and found["square selected"] == 6 and found["square by chance"] == 3
    assert found["square credited"] == 0.5 * 4 + 0.25 * 2 and found["square credited by chance"] == 0.75 / 4 * 6
    assert found["rise selected"] == 6 and found["fall"] == 0
    # selected: one of two with the largest entropy, the next, and not the last
    assert found["square by chance at entropy"] == 0.5 * 5 + 2
    assert found["gain selected"] == pytest.approx(2 + np.sqrt(2))
    # 20 tokens, two in each tenth: half of the first is selected, and all of the last
    square = [3.0, 1.0] + [0.0] * 16 + [5.0, 5.0]
    gamma = np.array([1.5, 1.0] + [1.0] * 16 + [1.5, 1.5])
    found = shares(gamma, decisions_of(square), np.zeros(20))
    assert found["square by chance in tenths"] == 0.5 * 4 + 10 and found["square selected"] == 13
    assert by_tenth(np.array(square)).tolist() == [4.0] + [0.0] * 8 + [10.0]


def test_random_tokens_hold_what_chance_says():
    draw = np.random.default_rng(3)
    sums = {}
    for _ in range(3000):
        gamma = 1 + 0.5 * largest(draw.random(25), 0.4)
        for name, one in shares(gamma, decisions_of([*range(25)]), np.arange(25) % 7).items():
            sums[name] = sums.get(name, 0.0) + one
    assert sums["selected"] / sums["tokens"] == 0.4
    for chance in ("square by chance", "square by chance in tenths", "square by chance at entropy"):
        assert sums["square selected"] / sums[chance] == pytest.approx(1, abs=0.01)


def test_areas_by_hand():
    square = [9.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    best = areas(np.arange(10)[::-1], decisions_of(square))
    assert best["pairs"] == best["pairs right"] == 9
    assert best["square ranked"] / best["square"] == pytest.approx(0.9 * 0.95 + 0.1 * 0.75)
    worst = areas(np.arange(10), decisions_of(square))
    assert worst["pairs right"] == 0 and worst["square ranked"] / worst["square"] == pytest.approx(
        0.9 * 0.05 + 0.1 * 0.25
    )
    flat = areas(np.zeros(10), decisions_of(square))
    assert flat["pairs right"] / flat["pairs"] == 0.5 and flat["square ranked"] / flat["square"] == 0.5
    assert areas(np.zeros(1), decisions_of([1.0]))["pairs right"] == 0
    assert ranks(np.array([5.0, 1.0, 5.0, 7.0])).tolist() == [0.5, 0.125, 0.5, 0.875]


def test_tokens_that_decide_alike_are_no_earlier_ones():
    nothing = areas(np.arange(20), decisions_of([0.0] * 20))
    assert nothing["pairs"] == nothing["pairs right"] == 0
    alike = [areas(signal, decisions_of([1.0] * 20)) for signal in (np.arange(20), -np.arange(20))]
    assert all(one["pairs"] == 36 and one["pairs right"] == pytest.approx(18) for one in alike)
    one_and_ties = decisions_of([1.0, *[0.0] * 19])  # one of the two is any of the nineteen
    assert areas(-np.arange(20), one_and_ties)["pairs right"] == pytest.approx(18 + 9)
    assert areas(np.arange(20), one_and_ties)["pairs right"] == pytest.approx(9)


def test_noise_moves_the_area_of_the_top_tenth_and_not_that_of_the_decisions():
    """The signal is the certainty of a token. Planted decisions have nothing to do with it, and noise has."""
    draw, count = np.random.default_rng(4), 40
    sums = []
    for _ in range(1500):
        other = np.where(np.arange(count) % 2, 0.6, 0.2)
        size = np.zeros(count)
        size[draw.choice(count, 4, replace=False)] = 0.1
        rate = 0.5 - size / other  # V stays near 0.5, and a planted token raises it by 0.1
        tries = np.full(count, 4)
        found = decide(Sampled(True, other, draw.binomial(tries, np.clip(rate, 0, 1), (2, count)), tries))
        found = found._replace(decision=size + draw.normal(0, 1, count) * 0.3 * other, square=size**2)
        noisy = found._replace(square=found.decision**2 - (0.3 * other) ** 2)
        sums.append([*areas(other, noisy).values()])
    square, ranked, pairs, right = np.sum(sums, 0)
    assert ranked / square == pytest.approx(0.5, abs=0.03) and right / pairs > 0.65


def test_the_oracle_selects_the_planted_tokens():
    other = np.full(20, 0.5)
    rate = np.linspace(0.45, 0.5, 20)
    rate[[3, 11]] = 0.0, 0.1
    draw, sums = np.random.default_rng(5), {}
    for _ in range(200):
        tries = np.full(20, 30)
        sampled = Sampled(True, other, draw.binomial(tries, rate, (2, 20)), tries)
        for name, one in oracle(sampled, 0.1, np.zeros(20)).items():
            sums[name] = sums.get(name, 0.0) + one
    values = [1.0]
    for one in rate[::-1]:
        values.insert(0, (values[0] + one) / 2)
    square = np.diff(values) ** 2
    best = np.sort(square)[-2:].sum() / square.sum()
    assert sums["selected"] == 200 * 2
    assert 0.6 * best < sums["square selected"] / sums["square"] < best + 0.01


def test_the_oracle_selects_within_each_tenth_where_that_is_held_equal():
    """Every other token decides much: the best of each tenth hold as much over chance as the best of all."""
    count = 40
    other = np.full(count, 0.02)
    rate = np.where(np.arange(count) % 2, 0.0, 1.0)
    tries = np.full(count, 50)
    sums = oracle(Sampled(True, other, np.stack([tries * rate] * 2), tries), 0.25, np.arange(count))
    values = [1.0]
    for one in rate[::-1]:
        values.insert(0, 0.98 * values[0] + 0.02 * one)
    square = np.diff(values) ** 2
    for name in ("in tenths", "at entropy"):  # four tokens each, of which the one that decides most is selected
        best = square.reshape(10, 4).max(1)
        assert sums[f"square selected {name}"] == pytest.approx(best.sum(), rel=1e-9)
        assert sums[f"square by chance {name}"] == pytest.approx(square.sum() / 4, rel=1e-9)
    assert sums["square selected"] == pytest.approx(np.sort(square)[-10:].sum(), rel=1e-9)
