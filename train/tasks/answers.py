r"""Whether an answer equals a gold one, by kind: each is read as a number with a unit, a formula, a tuple or interval, a
set or list, a relation, a numeral, a time of day, a matrix or a text, and only equal kinds are equal.

What is not understood is a text, equal to the same text alone. The rules that leave room for taste:

- Exact numbers are compared exactly: 0.33 is not 1/3. An irrational gold also takes a decimal that gives at least
  SIGNIFICANT of its digits, rounded or cut. A decimal gold with at least three digits also takes the fraction or the
  irrational number that rounds to it.
- A unit that only one side has is left out; two different units are unequal, and nothing is converted. 5\% is 0.05,
  and 5 where one side lacks the sign.
- Solutions may come as a list or a set, in any order; a tuple, an interval and a list of words keep theirs.
"""

import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import mpmath

from train.tasks import formula
from train.tasks.formula import Node, Unread
from train.tasks.forms import normalise

SIGNIFICANT = 6  # digits of a decimal that stands for an irrational number
MOST_ITEMS = 64  # of a list, set or tuple
DEEPEST = 6  # tuples within lists within sets


class Text(NamedTuple):
    words: str


class Quantity(NamedTuple):
    """A formula with the unit behind it; `written` is the decimal that it was given as, if it was one."""

    node: Node
    unit: str = ""
    written: str = ""


class Bracketed(NamedTuple):
    """A tuple or an interval: what is in brackets of two kinds. x > 3 is (3, inf) of the variable x."""

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


def same(gold: str, given: str) -> bool:
    """Whether an answer, as it was written, equals a gold one."""
    return any(_equal(one, other) for one in readings(gold) for other in readings(given))


@lru_cache(maxsize=4096)
def readings(text: str) -> tuple:
    """What a text can mean: its words, and the kind that it is read as; two where a comma can be one of thousands."""
    text = normalise(text)
    found = [Text(plain(text))] if plain(text) else []
    for variant in _variants(text):
        try:
            found.append(_read(variant, 0))
        except (Unread, RecursionError):
            continue
    if match := re.fullmatch(r"\\text\{\(?([A-J])\)?[.:]?\}[\s:]*(\S.*)", text):  # \textbf{(C)}\ 12
        found += [Text(match[1]), *(each for each in readings(match[2]) if not isinstance(each, Text))]
    return tuple(found)


def is_understood(text: str) -> bool:
    """Whether a text is more than words."""
    return any(not isinstance(each, Text) for each in readings(text))


def plain(text: str) -> str:
    """A normalised text as it is compared with another: without \\text{} and braces; words in lower case."""
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"([\^_])\{(\w)\}", r"\1\2", text)
    text = re.sub(r"\\(?:frac|binom)(?=\d\d)", lambda match: match[0] + " ", text)
    text = " ".join(text.split())
    text = re.sub(r"(?<![A-Za-z0-9\\])\s+|\s+(?![A-Za-z0-9])", "", text).rstrip(".,;")
    if match := re.fullmatch(r"\(?([A-Za-z])[).]?", text):
        return match[1]
    words = re.findall(r"(?<![A-Za-z\\])[A-Za-z]{2,}", text)
    is_prose = any(word.casefold() in ("yes", "no") or re.search("[a-z]{2}", word) for word in words)
    return text.casefold() if is_prose and not CHEMICAL.fullmatch(text) else text


CHEMICAL = re.compile(r"(?:[A-Z][a-z]?(?:_?\d+|_\{\d+\})?){2,}")
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d]|,\d)")


def _variants(text: str) -> Iterator[str]:
    """The text with the commas of thousands taken out, and with all commas as separators, where it can mean either."""
    merged = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    if merged == text:
        yield text
        return
    can_separate = not re.search(r",0\d", text) and not re.search(r",\s", text)
    in_brackets = any(sign in text for sign in "([") or r"\{" in text
    if not (in_brackets and can_separate):
        yield merged
    if can_separate:
        yield text


# --- reading ---------------------------------------------------------------------------------------------------------

OPENERS = {"(": 1, "[": 1, "{": 1, r"\{": 1, r"\langle": 1, r"\lfloor": 1, r"\lceil": 1}
CLOSERS = {")": 1, "]": 1, "}": 1, r"\}": 1, r"\rangle": 1, r"\rfloor": 1, r"\rceil": 1}
PIECE = re.compile(r"\\begin\{\w+\*?\}|\\end\{\w+\*?\}|\\text\{[^{}]*\}|\\[A-Za-z]+|\\.|[A-Za-z]+|<=|>=|!=|\s+|.", re.DOTALL)
CONNECTOR = re.compile(r"(?:\\text\{ ?)?(?:,? ?)(and|or)(?: ?\})?", re.IGNORECASE)
RELATIONS = {
    "=": "=", r"\approx": "~", "<": "<", ">": ">", r"\leq": "<=", r"\geq": ">=", "<=": "<=", ">=": ">=", r"\neq": "!=",
    "!=": "!=", r"\in": "in", r"\equiv": "=",
}  # fmt: skip
REFUSED = (r"\notin", r"\subset", r"\subseteq", r"\setminus", r"\cap", r"\Rightarrow", r"\Leftrightarrow", r"\to")
REALS = {r"\mathbb{R}", "all real numbers", "all reals", "all real x"}
ROWS = re.compile(r"\\begin\{(\w+)\*?\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\*?\}", re.DOTALL)


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """The signs of a text, each with whether it is outside of all brackets."""
    depth = 0
    for match in PIECE.finditer(text):
        piece = match[0]
        depth -= piece in CLOSERS or piece.startswith(r"\end{")
        yield piece, depth == 0
        depth += piece in OPENERS or piece.startswith(r"\begin{")


def _split(text: str, separates: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """The parts of a text between the separators outside of all brackets, and those."""
    parts, separators = [""], []
    for piece, is_outside in _pieces(text):
        if is_outside and separates(piece):
            separators.append(piece)
            parts.append("")
        else:
            parts[-1] += piece
    return [part.strip() for part in parts], separators


def _read(text: str, depth: int):
    text = text.strip()
    if not text or depth > DEEPEST:
        raise Unread("it is empty or nested too deeply")
    if match := re.fullmatch(r"\\text\{([^{}]*)\}", text):
        text = match[1].strip()
    if text in REALS:
        infinity = Node("constant", (r"\infty",))
        return Bracketed("(", ")", (Quantity(Node("-", (infinity,))), Quantity(infinity)))
    if match := ROWS.fullmatch(text):
        return _read_rows(match[1], match[2], depth)
    if any(piece in REFUSED for piece, _ in _pieces(text)):
        raise Unread("a relation that is not read")
    if _is_prose(text):
        return Text(plain(text))
    parts, separators = _split(text, lambda piece: piece in ",;" or CONNECTOR.fullmatch(piece) is not None)
    parts = [part for part in parts if part]
    if separators:
        if not parts or len(parts) > MOST_ITEMS:
            raise Unread("no list, or too long a one")
        items = [_read_item(part, depth) for part in parts]
        if any(isinstance(item, Bracketed) and item.variable for item in items) and any(
            "and" in separator.casefold() or separator == "," for separator in separators
        ):
            raise Unread("inequalities that hold at once")
        return _several(items) if len(items) > 1 else items[0]
    parts, separators = _split(text, lambda piece: piece == r"\cup")
    if separators:
        return Several(tuple(_read(part, depth + 1) for part in parts), is_set=True)
    parts, signs = _split(text, lambda piece: piece in RELATIONS)
    if signs:
        return _read_relation(parts, [RELATIONS[sign] for sign in signs], depth)
    return _read_one(text, depth)


def _read_item(text: str, depth: int):
    try:
        return _read(text, depth + 1)
    except Unread:
        if formula_like := re.search(r"[\\=<>^_{}]", re.sub(r"\\text\{[^{}]*\}", "", text)):
            raise Unread(f"{formula_like[0]!r} within a text") from None
        return Text(plain(text))


def _several(items: list):
    """A list, without the names of its parts where all have the same: x = 1, x = 2."""
    flat = []
    for item in items:  # x = \pm 1, 3
        inner = item.value if isinstance(item, Labelled) else item
        flat += inner.items if isinstance(inner, Several) and not inner.is_set else [item]
    names = {re.sub(r"[_'].*", "", item.label) for item in flat if isinstance(item, Labelled)}
    if len(names) == 1 and (isinstance(flat[0], Labelled)):
        flat = [item.value if isinstance(item, Labelled) else item for item in flat]
    return Several(tuple(flat))


def _read_relation(sides: list[str], signs: list[str], depth: int):
    if "~" in signs:  # x = 2\sqrt{2} \approx 2.83: what is exact counts
        first = signs.index("~")
        if first == 0 and _is_name(sides[0]):
            signs[0] = "="
        sides, signs = sides[: signs.index("~") + 1] if "~" in signs else sides, [s for s in signs if s != "~"]
        if not signs:
            return _read(sides[0], depth + 1)
        signs = signs[: len(sides) - 1]
    if signs == ["in"]:
        return Labelled(plain(sides[0]), _read(sides[1], depth + 1), is_name=True)
    if set(signs) == {"="}:
        return _read_equation(sides, depth)
    if "in" in signs or "=" in signs:
        raise Unread("a chain of different relations")
    nodes = [formula.read(side) for side in sides]
    if len(nodes) == 2:
        return _interval(nodes, signs) or _relation(signs[0], *nodes)
    found = _interval(nodes, signs)
    if found is None:
        raise Unread("a chain of inequalities")
    return found


def _relation(sign: str, left: Node, right: Node) -> Relation:
    if sign in (">", ">="):
        left, right, sign = right, left, sign.replace(">", "<")
    return Relation(sign, Node("+", (left, Node("-", (right,)))))


def _interval(nodes: list[Node], signs: list[str]) -> Bracketed | None:
    """x > 3, 3 < x and 1 < x <= 2 as intervals; None for all others."""
    if signs[0] in (">", ">="):
        if any(sign not in (">", ">=") for sign in signs):
            return None
        nodes, signs = nodes[::-1], [sign.replace(">", "<") for sign in signs[::-1]]
    elif any(sign not in ("<", "<=") for sign in signs):
        return None
    infinity = Node("constant", (r"\infty",))
    if len(nodes) == 2 and nodes[0].op == "symbol":
        nodes, signs = [Node("-", (infinity,)), *nodes], ["<", *signs]
    elif len(nodes) == 2 and nodes[1].op == "symbol":
        nodes, signs = [*nodes, infinity], [*signs, "<"]
    if len(nodes) != 3 or nodes[1].op != "symbol":
        return None
    low, variable, high = nodes
    if formula.symbols(low) or formula.symbols(high):
        return None
    brackets = "(" if signs[0] == "<" else "[", ")" if signs[1] == "<" else "]"
    relation = None
    if formula.is_infinite(low):
        relation = _relation(signs[1], variable, high)
    elif formula.is_infinite(high):
        relation = _relation(signs[0], low, variable)
    return Bracketed(*brackets, (Quantity(low), Quantity(high)), variable.parts[0], relation)


def _is_name(text: str) -> bool:
    """Whether a side of an equation only names what the other is: x, x_1, f(x), AB, (x, y), \\text{Area}."""
    if re.search(r"\\text\{|[A-Za-z]{4,}", text) and not re.search(r"[-+*/\d]", text):
        return True
    text = re.sub(r"\\(?:angle|triangle|overline|vec|hat|bar|det|Pr|mathbb|mathcal|cos|sin|tan|deg)(?![A-Za-z])", " ", text)
    return bool(re.fullmatch(r"[|({\s]*(?:\\?[A-Za-z]+'*(?:_(?:\w|\{[^{}]*\}))?[\s,;]*)+(?:\([^()=]*\))?[|)}\s]*", text))


def _read_equation(sides: list[str], depth: int):
    first, last = sides[0], sides[-1]
    if len(sides) == 2 and not _is_name(first) and (_is_name(last) or _is_constant(first)):
        first, last = last, first  # 5 = x
    is_name = _is_name(first)
    between = sides[1:-1] if len(sides) > 2 else []
    value = _read(last, depth + 1)
    left = _formula_or_none(first)
    right = value.node if isinstance(value, Quantity) else None
    if left is not None and not formula.symbols(left) and not is_name:  # 2 + 3 = 5
        between = [first, *between]
    for side in between:
        other = _read(side, depth + 1)
        if not (_equal(other, value) or _equal(value, other)):
            raise Unread("sides that are not equal")
    if first in between:
        return value
    if left is None and not is_name:
        raise Unread("a side that is neither a name nor a formula")
    relation = None if left is None or right is None else _relation("=", left, right)
    return Labelled(plain(first), value, is_name, relation)


def _is_constant(text: str) -> bool:
    node = _formula_or_none(text)
    return node is not None and not formula.symbols(node)


def _formula_or_none(text: str) -> Node | None:
    try:
        return formula.read(text)
    except Unread:
        return None


def _read_one(text: str, depth: int):
    """What has no list, union or relation outside of its brackets."""
    if text in (r"\emptyset", "empty set", "the empty set"):
        return Several((), is_set=True)
    for opening, closing in ((r"\{", r"\}"), ("(", ")"), ("(", "]"), ("[", ")"), ("[", "]"), (r"\langle", r"\rangle")):
        if text.startswith(opening) and text.endswith(closing) and _encloses(text):
            inside = text[len(opening) : -len(closing)].strip()
            if opening == r"\{":
                return _read_set(inside, depth)
            items, separators = _split(inside, lambda piece: piece in ",;")
            if separators:
                if len(items) > MOST_ITEMS:
                    raise Unread("too long a tuple")
                brackets = ("(", ")") if opening == r"\langle" else (opening, closing)
                return Bracketed(*brackets, tuple(_read_item(item, depth) for item in items))
            if (opening, closing) == ("(", ")") and not re.fullmatch(r"[A-Z]", inside):
                return _read(inside, depth + 1)
    if match := re.fullmatch(r"\(?([0-9A-Z]+)\)?_\s*\{?\s*\(?(?:\\text\{)?(\d+|[a-z]{3,7})\}?\)?\s*\}?", text):
        base = BASES.get(match[2], match[2])
        if base.isdigit() and (match[1].isdigit() or int(base) > 10) and re.search(r"\d", match[1]):
            return Numeral(match[1].lstrip("0") or "0", base)
    if match := re.fullmatch(r"([0-9A-Z]+) ?(?:\\text\{)? ?(?:in )?base ?\}? ?(\d+)\}?", text):
        return Numeral(match[1].lstrip("0") or "0", match[2])
    bare = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    if match := re.fullmatch(r"(\d{1,2}):(\d\d)(?::(\d\d))?\s*(?:([ap])\.? ?m\.?)?", bare, re.IGNORECASE):
        return Clock(tuple(int(part) for part in match.groups()[:3] if part), (match[4] or "").lower())
    if re.fullmatch(r"\d+\s*(?:[-]\s*\d+|/\s*\d+\s*/\s*\d+|-\s*\d+\s*-\s*\d+)", text):  # a range, a date
        return Text(plain(text))
    parts, separators = _split(text, lambda piece: piece == ":")
    if separators:
        return Ratio(tuple(formula.read(part) for part in parts))
    bare = re.sub(r"\{(\d+)\}", r"\1", bare).replace(" _", "_")
    if CHEMICAL.fullmatch(bare) and (re.search(r"\d", bare) or not bare.isupper()):
        return Text(bare.replace("_", ""))
    return _read_quantity(text, depth)


BASES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9",
         "ten": "10", "twelve": "12", "sixteen": "16"}  # fmt: skip


def _encloses(text: str) -> bool:
    """Whether the bracket that a text begins with closes at its end."""
    outside = [is_outside for _, is_outside in _pieces(text)]
    return not any(outside[1:-1])


def _read_set(inside: str, depth: int) -> Several:
    if not inside:
        return Several((), is_set=True)
    items, _ = _split(inside, lambda piece: piece in ",;")
    if len(items) > MOST_ITEMS or any(piece in (":", "|") and out for piece, out in _pieces(inside)):
        raise Unread("a set by its rule, or too large a one")
    found: list = []
    for item in (_read_item(item, depth) for item in items):
        for each in item.items if isinstance(item, Several) and not item.is_set else (item,):
            if not any(_equal(each, other) for other in found):
                found.append(each)
    return Several(tuple(found), is_set=True)


def _read_rows(name: str, body: str, depth: int) -> Rows:
    name = {"bmatrix": "matrix", "pmatrix": "matrix", "smallmatrix": "matrix", "array": "matrix"}.get(name, name)
    rows = []
    for line in re.split(r"\\\\(?:\[[^\]]*\])?|\\cr", body):
        cells = _split(line, lambda piece: piece == "&")[0]
        if any(cells):
            rows.append(tuple(_read_cell(cell, depth) for cell in cells))
    if not rows or sum(map(len, rows)) > MOST_ITEMS:
        raise Unread("no matrix, or too large a one")
    return Rows(name, tuple(rows))


def _read_cell(text: str, depth: int):
    text = re.sub(r"^(?:\\text\{ ?(?:if|for|when) ?\}|(?:if|for|when)\b)\s*|[,.;]$", "", text.rstrip(",. ")).strip()
    text = re.sub(r"^\\text\{ ?(?:if|for|when) ", r"\\text{", text)
    if re.fullmatch(r"(?:\\text\{)? ?(?:otherwise|else) ?\}?", text):
        return Text("otherwise")
    try:
        return _read(text, depth + 1)
    except Unread:
        return Text(plain(text))


# --- numbers and units -----------------------------------------------------------------------------------------------

WORD = r"(?:\\text\{[^{}]*\}|(?<![A-Za-z\\])[A-Za-z]{2,}\.?)"
UNIT = re.compile(rf"(?P<head>.*?(?:[\d)}}!|]|\\pi))\s*(?P<unit>{WORD}(?:\s*(?:{WORD}|/\s*[A-Za-z]+|\^\s*\{{?-?\d\}}?|\\cdot))*)", re.DOTALL)
MODULUS = re.compile(r"(?P<head>.*?)[\s(]*(?:\\pmod|(?:\\text\{)? ?\(?mod\b)\s*\}?\s*\{?\s*(?P<number>\w+)\s*\}?[\s)}]*")
DEGREES = re.compile(r"(.*?)\s*\\deg\s*(?:\\text\{)?\s*([CFK]?)\s*\}?")
TRIGONOMETRIC = re.compile(r"\\?(?:sin|cos|tan|cot|sec|csc)")
CURRENCIES = {r"\$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee"}
SYNONYMS = {
    "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm", "meter": "m", "metre": "m",
    "kilometer": "km", "kilometre": "km", "inche": "in", "inch": "in", "foot": "ft", "feet": "ft", "yard": "yd",
    "mile": "mi", "sec": "s", "second": "s", "minute": "min", "mins": "min", "hour": "h", "hr": "h", "hrs": "h",
    "gram": "g", "kilogram": "kg", "milligram": "mg", "liter": "l", "litre": "l", "L": "l", "milliliter": "ml",
    "millilitre": "ml", "mL": "ml", "degree": "deg", "percent": "%", "percentage": "%", "pct": "%", "usd": "dollar",
    "buck": "dollar", "pound": "lb", "lbs": "lb", "ounce": "oz", "radian": "rad", "sq": "square", "cubed": "^3",
    "people": "person", "mph": "mi/h", "kph": "km/h", "kmh": "km/h", "men": "man", "women": "woman",
}  # fmt: skip
SHORT_UNITS = frozenset(
    "cm mm km ft in yd mi kg mg lb lbs oz ml mL min hr hrs sec deg rad sq mph kph Hz kHz Pa kPa mol eV kW MW USD men of per".split()
)
SCALES = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
}  # fmt: skip
NO_UNITS = frozenset(
    "or and to not no nor is are was be if else mod base odd even positive negative approximately about roughly more less "
    "greater than fewer most least between only at with without except but am pm all none neither both prime composite "
    "rational irrational undefined infinite infinity half quarter third true false yes for where when by over from real "
    "complex imaginary increasing decreasing maximum minimum otherwise squared choose plus minus times divided equals "
    "what which that it this hundredth thousandth tenth factorial remainder".split()
)


def _is_prose(text: str) -> bool:
    """Whether it is words that a formula would take for products of letters: `n is odd`, `No`, `Evelyn`."""
    bare = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    bare = ROWS.sub(" ; ", bare)
    bare = re.sub(r"\\[A-Za-z]+", " ; ", bare.replace(r"\pi", "1"))
    if re.fullmatch(r"[A-Za-z]{2,}", bare.strip()):
        return bare.strip() not in formula.FUNCTIONS | {"pi", "infinity", "inf"}
    bare = re.sub(r"\b(?:and|or)\b", " , ", bare, flags=re.IGNORECASE)
    return bool(re.search(r"(?<![A-Za-z\d])(?:[A-Za-z]{2,} +[A-Za-z]+|[A-Za-z] +[A-Za-z]{2,})", bare)) and not re.search(
        r"[\d)}!%=] *[A-Za-z]{2,} *[A-Za-z ]*$", bare
    )


def _read_quantity(text: str, depth: int):
    unit, factor = "", Fraction(1)
    sign = "-" if text.startswith("-") else ""
    for symbol, name in CURRENCIES.items():
        if text[len(sign) :].lstrip().startswith(symbol):
            text, unit = sign + text[len(sign) :].lstrip()[len(symbol) :].strip(), name
        elif text.endswith(symbol):
            text, unit = text[: -len(symbol)].strip(), name
    if match := MODULUS.fullmatch(text):
        text, unit = match["head"].strip(), f"mod {match['number']}"
    elif match := re.fullmatch(r"(.*\d)\s*(?:\^\s*\{?\s*)?(?:\\text\{ ?)?(?:st|nd|rd|th) ?\}?\s*\}?", text):
        text, unit = match[1], "th"
    elif (match := DEGREES.fullmatch(text)) and not TRIGONOMETRIC.search(match[1]):
        text, unit = match[1], f"deg{match[2]}"
    elif match := re.fullmatch(r"(.*?)\s*%", text, re.DOTALL):
        text, unit = match[1], "%"
    elif (match := UNIT.fullmatch(text)) and (found := _unit(match["unit"])) is not None:
        factor, words = found
        text, unit = match["head"].strip(), f"{unit}{words}"
    if r"\text" in text:
        raise Unread("words within a formula")
    if r"\pm" in text or r"\mp" in text:
        both = [Quantity(formula.read(text, sign), unit) for sign in (1, -1)]
        return Several(tuple(both))
    node = formula.read(text)
    if (unit or factor != 1) and formula.symbols(node):
        raise Unread("a unit behind a variable")
    if factor != 1:
        return Quantity(Node("*", (Node("number", (factor,)), node)), unit)
    written = text.replace(" ", "")
    return Quantity(node, unit, written if re.fullmatch(r"[-+]?\d*\.\d+", written) else "")


def _unit(text: str) -> tuple[Fraction, str] | None:
    """The factor of a number (a million) and the unit in one spelling; None for words that are no unit."""
    plain_words = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    if r"\text" not in text and any(len(w) < 4 and w not in SHORT_UNITS for w in re.findall(r"(?<!/)\b[A-Za-z]+", text)):
        return None
    words, factor = re.findall(r"[A-Za-z]+|/|\^\s*\{?\s*-?\d|\S", plain_words.replace(r"\cdot", " ").replace("}", "")), Fraction(1)
    names: list[str] = []
    for word in words:
        key = word if len(word) < 4 else word.casefold()
        if key.casefold() in NO_UNITS or len(words) > 8:
            return None
        if key in SCALES and not names:
            factor *= SCALES[key]
            continue
        if key == "per":
            key = "/"
        if len(key) > 3 and key.endswith("s") and not key.endswith("ss"):
            key = key[:-1]
        names.append(SYNONYMS.get(key, re.sub(r"[\s{]", "", key)))
    joined = []
    power = ""
    for name in names:
        if name in ("square", "cubic"):
            power = "^2" if name == "square" else "^3"
        elif name not in (".", "-"):
            joined.append(name + power)
            power = ""
    return factor, "".join(joined) if "/" in joined or any(name.startswith("^") for name in joined) else " ".join(joined)


# --- comparing -------------------------------------------------------------------------------------------------------


def _equal(gold, given) -> bool:
    """Of two kinds, where the first is the gold one's."""
    if isinstance(gold, Labelled) or isinstance(given, Labelled):
        return _equal_labelled(gold, given)
    if isinstance(gold, Quantity) and isinstance(given, Quantity):
        return _equal_quantities(gold, given)
    if isinstance(gold, Ratio) and isinstance(given, Quantity) or isinstance(gold, Quantity) and isinstance(given, Ratio):
        ratio, number = (gold, given) if isinstance(gold, Ratio) else (given, gold)
        return len(ratio.parts) == 2 and not number.unit and formula.same(Node("/", ratio.parts), number.node)
    if isinstance(gold, Bracketed) and isinstance(given, Relation):
        return gold.relation is not None and _equal(gold.relation, given)
    if isinstance(gold, Relation) and isinstance(given, Bracketed):
        return given.relation is not None and _equal(gold, given.relation)
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
        found = formula.proportion(gold.difference, given.difference)
        return gold.sign == given.sign and (found > 0 or (found < 0 and gold.sign in ("=", "!=")))
    if isinstance(gold, Clock):
        return gold.time == given.time and gold.half in ("", given.half)
    if isinstance(gold, Ratio):
        pairs = zip(gold.parts[1:], given.parts[1:])
        return len(gold.parts) == len(given.parts) and all(
            formula.same(Node("*", (gold.parts[0], other)), Node("*", (given.parts[0], one))) for one, other in pairs
        )
    if isinstance(gold, Rows):
        return (
            gold.name == given.name
            and len(gold.rows) == len(given.rows)
            and all(_equal_rows(*rows) for rows in zip(gold.rows, given.rows))
        )
    return gold == given


def _equal_rows(gold: tuple, given: tuple) -> bool:
    return len(gold) == len(given) and all(_equal(one, other) for one, other in zip(gold, given))


def _equal_labelled(gold, given) -> bool:
    if not isinstance(given, Labelled):
        return gold.is_name and _equal(gold.value, given)
    if not isinstance(gold, Labelled):
        if isinstance(gold, Relation):
            return given.relation is not None and _equal(gold, given.relation)
        return _equal(gold, given.value)
    if gold.is_name and given.is_name and gold.label == given.label:
        return _equal(gold.value, given.value)
    if gold.relation is None or given.relation is None:
        return False
    is_solved = gold.is_name and isinstance(gold.value, Quantity) and not formula.symbols(gold.value.node)
    return not is_solved and _equal(gold.relation, given.relation)


def _equal_lists(gold: Several, given: Several) -> bool:
    if len(gold.items) != len(given.items):
        return False
    in_order = any(isinstance(item, Text) for item in gold.items) and not gold.is_set
    named = [all(isinstance(item, Labelled) for item in each.items) and bool(each.items) for each in (gold, given)]
    if in_order or named[0] != named[1]:
        return _equal_rows(gold.items, given.items)
    left = list(given.items)
    for item in gold.items:
        match = next((index for index, other in enumerate(left) if _equal(item, other)), None)
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
        return _equal_numbers(gold, given) and "pm" not in (gold.unit, given.unit)
    hundredth = Node("number", (Fraction(1, 100),))
    if gold.unit:
        return _equal_numbers(gold, given) or formula.same(Node("*", (gold.node, hundredth)), given.node)
    if formula.same(gold.node, Node("*", (given.node, hundredth))):
        return True
    size = formula.number_of(gold.node)  # 0.5 may be a half as well as half a percent, 25 is more likely a percentage
    return size is not None and abs(size) > 1 and _equal_numbers(gold, given)


def _equal_numbers(gold: Quantity, given: Quantity) -> bool:
    if formula.same(gold.node, given.node):
        return True
    if formula.symbols(gold.node) or formula.symbols(given.node):
        return False
    if given.written and not gold.written:
        return _stands_for(given.written, gold.node, SIGNIFICANT, cut=True)
    if gold.written and not given.written:
        return _stands_for(gold.written, given.node, 3, cut=False)
    return False


def _stands_for(decimal: str, node: Node, least: int, *, cut: bool) -> bool:
    """Whether a decimal of at least `least` digits is a number without an end, rounded or, with `cut`, cut off.

    With `cut` the number must be irrational: a fraction has an exact form.
    """
    digits = decimal.lstrip("+-").replace(".", "").lstrip("0")
    if len(digits if cut else digits.rstrip("0")) < least:
        return False
    try:
        fraction = formula.exact(node)
    except (ArithmeticError, formula.TooLarge):
        return False
    if fraction is not None and (cut or _terminates(fraction)):
        return False
    number = formula.number_of(node)
    if number is None:
        return False
    with mpmath.workdps(formula.DIGITS):
        step = mpmath.mpf(10) ** -len(decimal.partition(".")[2])
        stated = mpmath.mpf(decimal)
        is_cut = cut and 0 <= abs(number) - abs(stated) < step and (number > 0) == (stated > 0)
        return bool(abs(number - stated) <= step / 2 or is_cut)


def _terminates(fraction: Fraction) -> bool:
    rest = fraction.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1
