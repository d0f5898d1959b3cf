r"""The kinds of answers to maths, and when two are equal: only those of one kind are, and of a unit, if both have one.

The rules that leave room for taste:

- Exact numbers are compared exactly: 0.33 is not 1/3. An irrational gold also takes a decimal that gives at least
  SIGNIFICANT of its digits, rounded or cut. A decimal gold of at least ROUNDED digits also takes the fraction or the
  irrational number that rounds to it.
- A unit that only one side has is left out; two different units are unequal, and nothing is converted. 5\% is 0.05,
  and 5 where one side lacks the sign.
- Solutions may come as a list or a set, in any order; a tuple, an interval and a list of words keep theirs.
"""

from fractions import Fraction
from typing import NamedTuple

import mpmath

from rhythm_kernels.tasks import formula, values
from rhythm_kernels.tasks.formula import Node

SIGNIFICANT = 6  # digits of a decimal that stands for an irrational number
ROUNDED = 4  # digits of a decimal gold that a number without an end may round to


class Text(NamedTuple):
    words: str


class Quantity(NamedTuple):
    """A formula with the unit behind it; `written` is the decimal that it was given as, if any."""

    node: Node
    unit: str = ""
    written: str = ""


class Bracketed(NamedTuple):
    """A tuple or an interval. x > 3 is (3, inf) of the variable x, with the relation x > 3."""

    opening: str
    closing: str
    items: tuple
    variable: str = ""
    relation: "Relation | None" = None


class Several(NamedTuple):
    """Answers in any order: a list, a set or a union; repeats count in a list alone."""

    items: tuple
    is_set: bool = False


class Labelled(NamedTuple):
    """x = value; `is_name` says that x is a name, and no formula that an equation is about."""

    label: str
    value: tuple
    is_name: bool
    relation: "Relation | None" = None


class Relation(NamedTuple):
    """`difference` of both sides against 0; the sign is one of = < <= and !=."""

    sign: str
    difference: Node


class Numeral(NamedTuple):
    digits: str
    base: str


class Clock(NamedTuple):
    time: tuple[int, ...]
    half: str  # of the day: am, pm or neither


class Ratio(NamedTuple):
    parts: tuple[Node, ...]


class Rows(NamedTuple):
    """A matrix, or the lines of a definition by cases."""

    name: str
    rows: tuple


def equal(gold, given) -> bool:
    """Whether an answer equals the gold one; both are of one of the kinds above."""
    if isinstance(gold, Labelled) or isinstance(given, Labelled):
        return _equal_labelled(gold, given)
    if isinstance(gold, Quantity) and isinstance(given, Quantity):
        return _equal_quantities(gold, given)
    if {type(gold), type(given)} == {Ratio, Quantity}:
        ratio, number = (gold, given) if isinstance(gold, Ratio) else (given, gold)
        return len(ratio.parts) == 2 and not number.unit and values.same(Node("/", ratio.parts), number.node)
    if {type(gold), type(given)} == {Bracketed, Relation}:
        return _equal_relations(gold, given)
    if type(gold) is not type(given):
        return False
    if isinstance(gold, Bracketed):
        variables = {gold.variable, given.variable} - {""}
        return (
            (gold.opening, gold.closing) == (given.opening, given.closing)
            and len(variables) < 2
            and _equal_rows(gold.items, given.items)
        )
    if isinstance(gold, Several):
        return _equal_lists(gold, given)
    if isinstance(gold, Relation):
        factor = values.proportion(gold.difference, given.difference)
        return gold.sign == given.sign and (factor > 0 or (factor < 0 and gold.sign in ("=", "!=")))
    if isinstance(gold, Clock):
        return gold.time == given.time and gold.half in ("", given.half)
    if isinstance(gold, Ratio):
        pairs = zip(gold.parts[1:], given.parts[1:])
        return len(gold.parts) == len(given.parts) and all(
            values.same(Node("*", (gold.parts[0], other)), Node("*", (given.parts[0], one))) for one, other in pairs
        )
    if isinstance(gold, Rows):
        return (
            gold.name == given.name
            and len(gold.rows) == len(given.rows)
            and all(_equal_rows(*rows) for rows in zip(gold.rows, given.rows))
        )
    return gold == given


def _equal_rows(gold: tuple, given: tuple) -> bool:
    return len(gold) == len(given) and all(equal(one, other) for one, other in zip(gold, given))


def _equal_labelled(gold, given) -> bool:
    """Whether x = 5 equals x = 5 or 5, and y = 2x + 3 the same line in another form."""
    if isinstance(gold, Labelled) and isinstance(given, Labelled):
        if gold.is_name and given.is_name and gold.label == given.label:
            return equal(gold.value, given.value)
    elif isinstance(gold, Labelled) and not isinstance(given, Relation):
        return gold.is_name and equal(gold.value, given)
    elif isinstance(given, Labelled) and not isinstance(gold, Relation):
        return equal(gold, given.value)
    if isinstance(gold, Labelled) and gold.is_name and isinstance(gold.value, Quantity):
        if not formula.symbols(gold.value.node):
            return False  # 2x = 10 is not solved
    return _equal_relations(gold, given)


def _equal_relations(gold, given) -> bool:
    one, other = (getattr(kind, "relation", kind) for kind in (gold, given))
    return one is not None and other is not None and equal(one, other)


def _equal_lists(gold: Several, given: Several) -> bool:
    if len(gold.items) != len(given.items):
        return False
    in_order = any(isinstance(item, Text) for item in gold.items) and not gold.is_set
    named = [all(isinstance(item, Labelled) for item in each.items) and bool(each.items) for each in (gold, given)]
    if in_order or named[0] != named[1]:
        return _equal_rows(gold.items, given.items)
    left = list(given.items)
    for item in gold.items:
        match = next((index for index, other in enumerate(left) if equal(item, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def _equal_quantities(gold: Quantity, given: Quantity) -> bool:
    if gold.unit == given.unit:
        return _equal_numbers(gold, given)
    if gold.unit and given.unit:
        return False
    if "%" not in (gold.unit, given.unit):
        return _equal_numbers(gold, given)
    hundredth = Node("number", (Fraction(1, 100),))
    if gold.unit:
        return _equal_numbers(gold, given) or values.same(Node("*", (gold.node, hundredth)), given.node)
    if values.same(gold.node, Node("*", (given.node, hundredth))):
        return True
    size = values.real_value(gold.node)  # 0.5 may be a half as well as half a percent, 25 is more likely a percentage
    return size is not None and abs(size) > 1 and _equal_numbers(gold, given)


def _equal_numbers(gold: Quantity, given: Quantity) -> bool:
    if values.same(gold.node, given.node):
        return True
    if formula.symbols(gold.node) or formula.symbols(given.node):
        return False
    if given.written and not gold.written:
        return _stands_for(given.written, gold.node, SIGNIFICANT, cut=True)
    if gold.written and not given.written:
        return _stands_for(gold.written, given.node, ROUNDED, cut=False)
    return False


def _stands_for(decimal: str, node: Node, least: int, *, cut: bool) -> bool:
    """Whether a decimal of at least `least` digits is an endless number, rounded or, with `cut`, cut off.

    With `cut` the number must be irrational: a fraction has an exact form.
    """
    digits = decimal.lstrip("+-").replace(".", "").lstrip("0")
    if len(digits if cut else digits.rstrip("0")) < least:
        return False
    number = values.real_value(node)
    if number is None or (isinstance(number, Fraction) and (cut or _terminates(number))):
        return False
    with mpmath.workdps(values.DIGITS):
        step = mpmath.mpf(10) ** -len(decimal.partition(".")[2])
        stated, number = mpmath.mpf(decimal), mpmath.mpmathify(number)
        is_cut = cut and 0 <= abs(number) - abs(stated) < step and (number > 0) == (stated > 0)
        return bool(abs(number - stated) <= step / 2 or is_cut)


def _terminates(fraction: Fraction) -> bool:
    return pow(10, fraction.denominator.bit_length(), fraction.denominator) == 0
