"""Values of formulas, and whether two have the same: exact where they are rational, else to 50 digits and 100.

Two formulas without variables are equal if their exact values are, or else some 80 of their digits. Two with variables
are equal if they are so at points that are drawn in the same way every time, wherever the first is real. No
simplification, which can take for ever, is needed for that, and nothing is run as code.
"""

import math
import random
from collections.abc import Callable
from fractions import Fraction
from functools import reduce

import mpmath

from rhythm_kernels.tasks.formula import FUNCTIONS, SEVERAL, Node, is_infinite, symbols

MOST_BITS = 1 << 16  # of an exact number: 2006! has 19,093
LARGEST_ARGUMENT = 10**12  # of functions whose cost grows with their argument
DIGITS = 50
POINTS = 12


class TooLarge(ValueError):
    """A value that is too large to be computed in little time."""


class Undefined(ValueError):
    """A formula without a value at a point."""


def exact(node: Node) -> Fraction | None:
    """The rational value of a formula, None where it has none or this does not find it; ArithmeticError, TooLarge."""
    op, parts = node
    if op == "number":
        return parts[0]
    if op in ("symbol", "constant", "function") and not (op == "function" and parts[0] in SEVERAL):
        return None
    values = [exact(part) for part in parts if isinstance(part, Node)]
    if any(value is None for value in values):
        return None
    rule = EXACT.get(op if op != "function" else parts[0])
    value = rule(*values) if rule else None
    if value is not None and value.numerator.bit_length() + value.denominator.bit_length() > MOST_BITS:
        raise TooLarge
    return value


def _power(base: Fraction, power: Fraction) -> Fraction | None:
    if power.denominator != 1:
        return (
            _root(base**power.numerator, Fraction(power.denominator))
            if abs(power.numerator) < 64 and base > 0
            else None
        )
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(power) * bits > MOST_BITS and abs(base) != 1 and base != 0:
        raise TooLarge
    if abs(base) == 1:
        return base if power.numerator % 2 else Fraction(1)
    if base == 0 and power == 0:
        return None
    return base**power.numerator


def _root(value: Fraction, index: Fraction) -> Fraction | None:
    if index.denominator != 1 or not 2 <= index <= 64:
        return None
    if value < 0:
        root = _root(-value, index) if index % 2 else None
        return None if root is None else -root
    degree, found = int(index), []
    for number in (value.numerator, value.denominator):
        root = math.isqrt(number) if degree == 2 else _integer_root(number, degree)
        if root**degree != number:
            return None
        found.append(root)
    return Fraction(*found)


def _integer_root(number: int, degree: int) -> int:
    low, high = 0, 1 << (number.bit_length() // degree + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= number else (low, middle - 1)
    return low


def _factorial(value: Fraction) -> Fraction | None:
    if value.denominator != 1 or value < 0:
        return None
    if value > 5000:
        raise TooLarge
    return Fraction(math.factorial(int(value)))


def _binomial(upper: Fraction, lower: Fraction) -> Fraction | None:
    if upper.denominator != 1 or lower.denominator != 1 or upper < 0 or lower < 0:
        return None
    if upper > 50_000:
        raise TooLarge
    return Fraction(math.comb(int(upper), int(lower)))


def _whole(combine: Callable[..., int]) -> Callable[..., Fraction | None]:
    def rule(*values: Fraction) -> Fraction | None:
        return Fraction(combine(*map(int, values))) if all(value.denominator == 1 for value in values) else None

    return rule


EXACT: dict[str, Callable[..., Fraction | None]] = {
    "-": lambda a: -a,
    "+": lambda *terms: sum(terms, Fraction(0)),
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "^": _power,
    "root": _root,
    "!": _factorial,
    "binom": _binomial,
    "abs": abs,
    "lfloor": lambda a: Fraction(math.floor(a)),
    "lceil": lambda a: Fraction(math.ceil(a)),
    "max": max,
    "min": min,
    "gcd": _whole(math.gcd),
    "lcm": _whole(math.lcm),
}


def value(node: Node, point: dict[str, Fraction]):
    """The value of a formula as mpmath has it, with the working precision; Undefined, TooLarge."""
    op, parts = node
    if op == "number":
        return mpmath.mpf(parts[0].numerator) / parts[0].denominator
    if op == "symbol":
        return mpmath.mpf(point[parts[0]].numerator) / point[parts[0]].denominator
    if op == "constant":
        return {r"\pi": +mpmath.pi, "e": +mpmath.e, "i": mpmath.mpc(0, 1)}.get(parts[0]) or _no_value()
    values = [value(part, point) for part in parts if isinstance(part, Node)]
    if op == "function":
        return _function(parts[0], values)
    if op in ("abs", "lfloor", "lceil", "!"):
        _within(values[0])
    found = NUMERIC[op](*values)
    return found if mpmath.isfinite(found) else _no_value()


def _no_value():
    raise Undefined


def _within(number):
    if abs(number) > LARGEST_ARGUMENT:
        raise TooLarge
    return number


def _numeric_power(base, power):
    if base == 0:
        return mpmath.mpf(0) if mpmath.re(power) > 0 else _no_value()
    _within(power * mpmath.log(abs(base)) / 1000)
    return mpmath.power(base, power)


def _numeric_root(base, index):
    if index == 0:
        return _no_value()
    if mpmath.im(base) == 0 and mpmath.re(base) < 0 and mpmath.im(index) == 0 and index % 2 == 1:
        return -_numeric_root(-base, index)
    return _numeric_power(base, 1 / index)


def _numeric_binomial(upper, lower):
    return mpmath.binomial(_within(upper), _within(lower))


NUMERIC: dict[str, Callable] = {
    "-": lambda a: -a,
    "+": lambda *terms: reduce(lambda a, b: a + b, terms),
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b if b != 0 else _no_value(),
    "^": _numeric_power,
    "root": _numeric_root,
    "!": lambda a: mpmath.factorial(a),
    "binom": _numeric_binomial,
    "abs": abs,
    "lfloor": lambda a: mpmath.floor(a),
    "lceil": lambda a: mpmath.ceil(a),
}


def _function(name: str, values: list):
    for number in values:
        _within(number) if name not in ("log", "ln") else None
    if name in ("max", "min"):
        if any(mpmath.im(number) != 0 for number in values):
            raise Undefined
        return (max if name == "max" else min)(values)
    if name in ("log", "ln"):
        # A bare log may be the natural or the common one, so it is neither: a multiple of it that nothing else is.
        return mpmath.log(values[0]) * (1 if name == "ln" else _draw("log", [])) if values[0] != 0 else _no_value()
    if name in FUNCTIONS - SEVERAL:
        rule = {"arcsin": "asin", "arccos": "acos", "arctan": "atan"}.get(name, name)
        found = getattr(mpmath, rule)(values[0])
        return found if mpmath.isfinite(found) else _no_value()
    return _draw(name, values)  # f(x), gcd(m, n): the same number for the same arguments


def _draw(name: str, values: list):
    digits = [mpmath.nstr(number, 20) for number in values]
    return mpmath.mpf(random.Random(f"{name}{digits}").uniform(1, 3))


def same(gold: Node, given: Node) -> bool:
    """Whether both formulas have the same value, at every point where the gold is real."""
    infinite = is_infinite(gold), is_infinite(given)
    if any(infinite):
        return infinite[0] == infinite[1]
    if gold == given:
        return True
    names = symbols(gold) | symbols(given)
    values = [_exact_or_none(node) for node in (gold, given)]
    if None not in values:
        return values[0] == values[1]
    if not names:
        return _agree(gold, given, {}) is True
    return _agree_at_points(gold, given, names)


def proportion(gold: Node, given: Node) -> int:
    """The sign of a constant c that is not 0 with given = c gold; 0 if there is none."""
    names = symbols(gold)
    if not names or names != symbols(given):
        return 0
    ratios = []
    for point in points(names):
        with mpmath.workdps(DIGITS):
            try:
                a, b = value(gold, point), value(given, point)
            except (ArithmeticError, Undefined, ValueError):
                continue
            if abs(a) > 1e-20:
                ratios.append(b / a)
    if len(ratios) < POINTS // 2 or abs(ratios[0]) < 1e-20 or mpmath.im(ratios[0]) != 0:
        return 0
    if any(abs(ratio - ratios[0]) > abs(ratios[0]) * mpmath.mpf(10) ** -20 for ratio in ratios):
        return 0
    return 1 if mpmath.re(ratios[0]) > 0 else -1


def number_of(node: Node):
    """The real value of a formula without variables to 50 digits; None where there is none."""
    if symbols(node):
        return None
    with mpmath.workdps(DIGITS):
        try:
            found = value(node, {})
        except (ArithmeticError, Undefined, ValueError):
            return None
        return found if mpmath.im(found) == 0 else None


def _exact_or_none(node: Node) -> Fraction | None:
    try:
        return exact(node)
    except (ArithmeticError, TooLarge):
        return None


def points(names: set[str]) -> list[dict[str, Fraction]]:
    """Positive points, points of both signs and positive integers, a third each."""
    draw, found = random.Random(0), []
    for index in range(POINTS):
        found.append({})
        for name in sorted(names):
            number = Fraction(draw.randint(301, 3999), 1000)
            if index % 3 == 1:
                number *= draw.choice((-1, 1))
            found[-1][name] = number if index % 3 < 2 else Fraction(draw.randint(2, 9))
    return found


def _agree_at_points(gold: Node, given: Node, names: set[str]) -> bool:
    drawn = points(names)
    real = [point for point in drawn if _is_real(gold, point)]
    agreed = 0
    for point in real if len(real) >= 3 else drawn:
        verdict = _agree(gold, given, point)
        if verdict is False:
            return False
        agreed += verdict is True
    return agreed >= 3


def _is_real(node: Node, point: dict) -> bool:
    with mpmath.workdps(DIGITS):
        try:
            return mpmath.im(value(node, point)) == 0
        except (ArithmeticError, Undefined, ValueError):
            return False


def _agree(gold: Node, given: Node, point: dict) -> bool | None:
    """Whether both are equal at a point, None where the gold has no value there.

    What differs by rounding alone differs less with more digits, however small the numbers are.
    """
    differences = []
    for digits in (DIGITS, 2 * DIGITS):
        with mpmath.workdps(digits):
            try:
                a = value(gold, point)
            except (ArithmeticError, Undefined, ValueError):
                return None
            try:
                b = value(given, point)
            except (ArithmeticError, Undefined, ValueError):
                return False
            difference = abs(a - b)
            if difference == 0:
                return True
            differences.append(difference)
            # Relative: 2^-99 and -2^-99 differ. A value that is 0 but for rounding is compared by the second test.
            if digits == 2 * DIGITS and difference <= max(abs(a), abs(b)) * mpmath.mpf(10) ** -(digits - 20):
                return True
    return bool(differences[1] < differences[0] * mpmath.mpf(10) ** -(DIGITS // 2))
