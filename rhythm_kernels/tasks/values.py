"""Values of formulas, and whether two have the same: exact where they are rational, else to 50 digits and 100.

Two formulas without variables are equal if their exact values are, or else some 80 of their digits. Two with variables
are equal if they are so at points that are drawn in the same way every time, wherever the first is real. No
simplification, which can take for ever, is needed for that, and nothing is run as code.
"""

import math
import operator
import random
from collections.abc import Callable
from fractions import Fraction

import mpmath

from rhythm_kernels.tasks.formula import FUNCTIONS, SEVERAL, Node, is_infinite, symbols

MOST_BITS = 1 << 16  # of an exact number: 2006! has 19,093
LARGEST_ARGUMENT = 10**12  # of functions whose cost grows with their argument
DIGITS = 50
POINTS = 12


class Undefined(ValueError):
    """A formula without a value at a point."""


class TooLarge(Undefined):
    """A value that is too large to be computed in little time."""


def value(node: Node, point: dict[str, Fraction], *, is_exact: bool = False):
    """Returns a Fraction where the value is found to be rational, else a number of mpmath at the working precision.

    `is_exact` refuses a rational number that is too large for a Fraction.

    Raises:
        Undefined: the formula has no value at this point, or one that is too large.
        ArithmeticError, ValueError, TypeError: the same, found by Python or mpmath.
    """
    op, parts = node
    if op == "number":
        return parts[0]
    if op == "symbol":
        return mpmath.mpmathify(point[parts[0]])
    if op == "constant":
        return _constant(parts[0])
    name, arguments = (parts[0], parts[1:]) if op == "function" else (op, parts)
    values = [value(argument, point, is_exact=is_exact) for argument in arguments]
    if name in EXACT and all(isinstance(each, Fraction) for each in values):
        try:
            exact = EXACT[name](*values)
            if exact is not None and exact.numerator.bit_length() + exact.denominator.bit_length() > MOST_BITS:
                raise TooLarge
        except TooLarge:
            if is_exact:
                raise
        else:
            if exact is not None:
                return exact
    number = NUMERIC.get(name, lambda *values: _draw(name, values))(*map(mpmath.mpmathify, values))
    return number if mpmath.isfinite(number) else _undefined()


def value_at(node: Node, point: dict[str, Fraction], digits: int = DIGITS, *, is_exact: bool = False):
    """Returns the value of a formula to `digits` digits; None where there is none."""
    with mpmath.workdps(digits):
        try:
            return value(node, point, is_exact=is_exact)
        except (ArithmeticError, ValueError, TypeError):
            return None


def real_value(node: Node):
    """Returns the value of a formula without variables as `value` does; None where it is not real or too large."""
    number = None if symbols(node) else value_at(node, {}, is_exact=True)
    return None if number is None or mpmath.im(number) != 0 else number


def _undefined():
    raise Undefined


def _constant(name: str):
    values = {r"\pi": +mpmath.pi, "e": +mpmath.e, "i": mpmath.mpc(0, 1)}
    return values[name] if name in values else _undefined()


def _power(base: Fraction, power: Fraction) -> Fraction | None:
    if power.denominator != 1:
        is_small = abs(power.numerator) < 64 and base > 0
        return _root(base**power.numerator, Fraction(power.denominator)) if is_small else None
    if abs(base) == 1:
        return base if power.numerator % 2 else Fraction(1)
    if base == 0 and power == 0:
        return None
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(power) * bits > MOST_BITS and base != 0:
        raise TooLarge
    return base**power.numerator


def _root(radicand: Fraction, index: Fraction) -> Fraction | None:
    if index.denominator != 1 or not 2 <= index <= 64:
        return None
    if radicand < 0:
        root = _root(-radicand, index) if index % 2 else None
        return None if root is None else -root
    parts = radicand.numerator, radicand.denominator
    with mpmath.workprec(max(part.bit_length() for part in parts) + 10):
        roots = [int(mpmath.nint(mpmath.root(part, int(index)))) for part in parts]
    return Fraction(*roots) if all(root**index == part for root, part in zip(roots, parts)) else None


def _whole(combine: Callable[..., int], largest: float = math.inf, *, is_signed: bool = False) -> Callable:
    """Returns the rule of a function of whole numbers, which gives None for others."""

    def rule(*values: Fraction) -> Fraction | None:
        if any(each.denominator != 1 or (each < 0 and not is_signed) for each in values):
            return None
        return Fraction(combine(*map(int, values))) if values[0] <= largest else _too_large()

    return rule


def _too_large():
    raise TooLarge


def _within(number):
    return number if abs(number) <= LARGEST_ARGUMENT else _too_large()


def _numeric_power(base, power):
    if base == 0:
        return mpmath.mpf(0) if mpmath.re(power) > 0 else _undefined()
    _within(power * mpmath.log(abs(base)) / 1000)
    return mpmath.power(base, power)


def _numeric_root(base, index):
    if index == 0:
        return _undefined()
    if mpmath.im(base) == 0 and mpmath.re(base) < 0 and mpmath.im(index) == 0 and index % 2 == 1:
        return -_numeric_root(-base, index)
    return _numeric_power(base, 1 / index)


def _bounded(rule: Callable) -> Callable:
    return lambda *values: rule(*map(_within, values))


def _draw(name: str, values):
    """Returns a number for a function that is not known, f(x) or gcd(m, n): the same one for the same arguments."""
    digits = [mpmath.nstr(_within(each), 20) for each in values]
    return mpmath.mpf(random.Random(f"{name}{digits}").uniform(1, 3))


ANY: dict[str, Callable] = {
    "-": operator.neg, "+": lambda *terms: sum(terms), "*": operator.mul, "/": operator.truediv, "abs": abs,
    "max": max, "min": min,
}  # fmt: skip
EXACT: dict[str, Callable[..., Fraction | None]] = ANY | {
    "^": _power,
    "root": _root,
    "!": _whole(math.factorial, 5000),
    "binom": _whole(math.comb, 50_000),
    "lfloor": lambda number: Fraction(math.floor(number)),
    "lceil": lambda number: Fraction(math.ceil(number)),
    "gcd": _whole(math.gcd, is_signed=True),
    "lcm": _whole(math.lcm, is_signed=True),
}
NUMERIC: dict[str, Callable] = ANY | {
    "^": _numeric_power,
    "root": _numeric_root,
    "!": _bounded(mpmath.factorial),
    "binom": _bounded(mpmath.binomial),
    "lfloor": _bounded(mpmath.floor),
    "lceil": _bounded(mpmath.ceil),
    **{name: _bounded(getattr(mpmath, name.replace("arc", "a"))) for name in FUNCTIONS - SEVERAL},
    "ln": mpmath.log,
    # A bare log may be the natural or the common one, so it is neither: a multiple of it that nothing else is.
    "log": lambda number: mpmath.log(number) * _draw("log", ()),
}


def same(gold: Node, given: Node) -> bool:
    """Whether both formulas have the same value, at every point where the gold is real."""
    infinite = is_infinite(gold), is_infinite(given)
    if any(infinite):
        return infinite[0] == infinite[1]
    if gold == given:
        return True
    names = symbols(gold) | symbols(given)
    if not names:
        return _agree(gold, given, {}) is True
    drawn = points(names)
    real = [point for point in drawn if (number := value_at(gold, point)) is not None and mpmath.im(number) == 0]
    verdicts = [_agree(gold, given, point) for point in (real if len(real) >= 3 else drawn)]
    return False not in verdicts and verdicts.count(True) >= 3


def proportion(gold: Node, given: Node) -> int:
    """Returns the sign of a constant c that is not 0 with given = c gold; 0 if there is none."""
    names = symbols(gold)
    if not names or names != symbols(given):
        return 0
    pairs = [(value_at(gold, point), value_at(given, point)) for point in points(names)]
    with mpmath.workdps(DIGITS):
        ratios = [b / a for a, b in pairs if a is not None and b is not None and abs(a) > 1e-20]
        if len(ratios) < POINTS // 2 or abs(ratios[0]) < 1e-20 or mpmath.im(ratios[0]) != 0:
            return 0
        if any(abs(ratio - ratios[0]) > abs(ratios[0]) * mpmath.mpf(10) ** -20 for ratio in ratios):
            return 0
        return 1 if mpmath.re(ratios[0]) > 0 else -1


def points(names: set[str]) -> list[dict[str, Fraction]]:
    """Returns positive points, points of both signs and positive integers, a third each."""
    draw, drawn = random.Random(0), []
    for index in range(POINTS):
        drawn.append({})
        for name in sorted(names):
            number = Fraction(draw.randint(301, 3999), 1000)
            if index % 3 == 1:
                number *= draw.choice((-1, 1))
            drawn[-1][name] = number if index % 3 < 2 else Fraction(draw.randint(2, 9))
    return drawn


def _agree(gold: Node, given: Node, point: dict) -> bool | None:
    """Whether both are equal at a point, None where the gold has no value there.

    What differs by rounding alone differs less with more digits, however small the numbers are.
    """
    differences = []
    for digits in (DIGITS, 2 * DIGITS):
        a, b = value_at(gold, point, digits), value_at(given, point, digits)
        if a is None or b is None:
            return None if a is None else False
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return a == b
        with mpmath.workdps(digits):
            a, b = mpmath.mpmathify(a), mpmath.mpmathify(b)
            differences.append(abs(a - b))
            # Relative: 2^-99 and -2^-99 differ. A value that is 0 but for rounding is compared by the second test.
            tolerance = max(abs(a), abs(b)) * mpmath.mpf(10) ** -(digits - 20) if digits > DIGITS else 0
            if differences[-1] <= tolerance:
                return True
    return bool(differences[1] < differences[0] * mpmath.mpf(10) ** -(DIGITS // 2))
