r"""Reads answers, as models and people write them, as one of the kinds of kinds.py, and compares them.

An answer that is not understood to its last sign is a text, equal to the same text alone. Nothing is evaluated as
code, and the size of everything is bounded.
"""

import re
from collections.abc import Callable, Iterator
from functools import lru_cache

from rhythm_kernels.tasks import formula, kinds
from rhythm_kernels.tasks.forms import normalise
from rhythm_kernels.tasks.formula import INFINITY, Node, Unread
from rhythm_kernels.tasks.units import split_unit

MOST_ITEMS = 64  # of a list, set or tuple
DEEPEST = 6  # tuples within lists within sets


def same(gold: str, given: str) -> bool:
    """Whether an answer, as it was written, equals a gold one."""
    return any(kinds.equal(one, other) for one in readings(gold) for other in readings(given))


@lru_cache(maxsize=4096)
def readings(text: str) -> tuple:
    """Returns what a text can mean: its words, and the kind it is read as; two where a comma has two uses."""
    text = normalise(text)
    found = [kinds.Text(plain(text))] if plain(text) else []
    for variant in _variants(text):
        try:
            found.append(_read(variant, 0))
        except (Unread, RecursionError):
            continue
    if match := re.fullmatch(r"\\text\{\(?([A-J])\)?[.:]?\}[\s:]*(\S.*)", text):  # \textbf{(C)}\ 12
        found += [kinds.Text(match[1]), *(each for each in readings(match[2]) if not isinstance(each, kinds.Text))]
    return tuple(found)


def is_understood(text: str) -> bool:
    """Whether a text is more than words."""
    return any(not isinstance(each, kinds.Text) for each in readings(text))


def plain(text: str) -> str:
    """Returns a normalised text as it is compared with another: without \\text{} and braces; words in lower case."""
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
    """Yields the text without the commas of thousands, and with all commas as separators, where it can mean either."""
    merged = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    if re.search(r"\d,0\d", merged):  # 1,00 is neither a number nor a list
        return
    if merged == text:
        yield text
        return
    can_separate = not re.search(r",0\d", text) and not re.search(r",\s", text)
    in_brackets = any(sign in text for sign in "([") or r"\{" in text
    if not (in_brackets and can_separate):
        yield merged
    if can_separate:
        yield text


OPENERS = {"(": 1, "[": 1, "{": 1, r"\{": 1, r"\langle": 1, r"\lfloor": 1, r"\lceil": 1}
CLOSERS = {")": 1, "]": 1, "}": 1, r"\}": 1, r"\rangle": 1, r"\rfloor": 1, r"\rceil": 1}
PIECE = re.compile(
    r"\\begin\{\w+\*?\}|\\end\{\w+\*?\}|\\text\{[^{}]*\}|\\[A-Za-z]+|\\.|[A-Za-z]+|<=|>=|!=|\s+|.", re.DOTALL
)
CONNECTOR = re.compile(r"(?:\\text\{ ?)?(?:,? ?)(and|or)(?: ?\})?", re.IGNORECASE)
RELATIONS = {
    "=": "=", r"\approx": "~", "<": "<", ">": ">", r"\leq": "<=", r"\geq": ">=", "<=": "<=", ">=": ">=", r"\neq": "!=",
    "!=": "!=", r"\in": "in", r"\equiv": "=",
}  # fmt: skip
REFUSED = (r"\notin", r"\subset", r"\subseteq", r"\setminus", r"\cap", r"\Rightarrow", r"\Leftrightarrow", r"\to")
REALS = {r"\mathbb{R}", "all real numbers", "all reals", "all real x"}
ROWS = re.compile(r"\\begin\{(\w+)\*?\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\*?\}", re.DOTALL)


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Yields the signs of a text, each with whether it is outside of all brackets."""
    depth = 0
    for match in PIECE.finditer(text):
        piece = match[0]
        depth -= piece in CLOSERS or piece.startswith(r"\end{")
        yield piece, depth == 0
        depth += piece in OPENERS or piece.startswith(r"\begin{")


def _split(text: str, separates: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """Returns the parts of a text between the separators outside of all brackets, and those separators."""
    parts, separators = [""], []
    for piece, is_outside in _pieces(text):
        if is_outside and separates(piece):
            separators.append(piece)
            parts.append("")
            if len(parts) > MOST_ITEMS:
                raise Unread("too many parts")
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
        return kinds.Bracketed("(", ")", (kinds.Quantity(Node("-", (INFINITY,))), kinds.Quantity(INFINITY)))
    if match := ROWS.fullmatch(text):
        return _read_rows(match[1], match[2], depth)
    if any(piece in REFUSED for piece, _ in _pieces(text)):
        raise Unread("a relation that is not read")
    if _is_prose(text):
        return kinds.Text(plain(text))
    parts, separators = _split(text, lambda piece: piece in ",;" or CONNECTOR.fullmatch(piece) is not None)
    parts = [part for part in parts if part]
    if separators:
        if not parts:
            raise Unread("no list")
        items = [_read_item(part, depth) for part in parts]
        if any(isinstance(item, kinds.Bracketed) and item.variable for item in items) and any(
            "and" in separator.casefold() or separator == "," for separator in separators
        ):
            raise Unread("inequalities that hold at once")
        return _several(items) if len(items) > 1 else items[0]
    parts, separators = _split(text, lambda piece: piece == r"\cup")
    if separators:
        return kinds.Several(tuple(_read(part, depth + 1) for part in parts), is_set=True)
    parts, signs = _split(text, lambda piece: piece in RELATIONS)
    if signs:
        return _read_relation(parts, [RELATIONS[sign] for sign in signs], depth)
    return _read_one(text, depth)


def _read_item(text: str, depth: int):
    try:
        return _read(text, depth + 1)
    except Unread:
        if re.search(r"[\\=<>^_{}]", re.sub(r"\\text\{[^{}]*\}", "", text)):
            raise
        return kinds.Text(plain(text))


def _several(items: list):
    """Returns a list, without the names of its parts where all have the same: x = 1, x = 2."""
    flat = []
    for item in items:  # x = \pm 1, 3
        inner = item.value if isinstance(item, kinds.Labelled) else item
        flat += inner.items if isinstance(inner, kinds.Several) and not inner.is_set else [item]
    names = {re.sub(r"[_'].*", "", item.label) for item in flat if isinstance(item, kinds.Labelled)}
    if len(names) == 1 and isinstance(flat[0], kinds.Labelled):
        flat = [item.value if isinstance(item, kinds.Labelled) else item for item in flat]
    return kinds.Several(tuple(flat))


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
        return kinds.Labelled(plain(sides[0]), _read(sides[1], depth + 1), is_name=True)
    if set(signs) == {"="}:
        return _read_equation(sides, depth)
    if "in" in signs or "=" in signs:
        raise Unread("a chain of different relations")
    nodes = [formula.read(side) for side in sides]
    if len(nodes) == 2:
        return _interval(nodes, signs) or _relation(signs[0], *nodes)
    interval = _interval(nodes, signs)
    if interval is None:
        raise Unread("a chain of inequalities")
    return interval


def _relation(sign: str, left: Node, right: Node) -> kinds.Relation:
    if sign in (">", ">="):
        left, right, sign = right, left, sign.replace(">", "<")
    return kinds.Relation(sign, Node("+", (left, Node("-", (right,)))))


def _interval(nodes: list[Node], signs: list[str]) -> kinds.Bracketed | None:
    """Returns x > 3, 3 < x and 1 < x <= 2 as intervals; None for all others."""
    if signs[0] in (">", ">="):
        if any(sign not in (">", ">=") for sign in signs):
            return None
        nodes, signs = nodes[::-1], [sign.replace(">", "<") for sign in signs[::-1]]
    elif any(sign not in ("<", "<=") for sign in signs):
        return None
    if len(nodes) == 2 and nodes[0].op == "symbol":
        nodes, signs = [Node("-", (INFINITY,)), *nodes], ["<", *signs]
    elif len(nodes) == 2 and nodes[1].op == "symbol":
        nodes, signs = [*nodes, INFINITY], [*signs, "<"]
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
    return kinds.Bracketed(*brackets, (kinds.Quantity(low), kinds.Quantity(high)), variable.parts[0], relation)


def _is_name(text: str) -> bool:
    """Whether a side of an equation only names what the other is: x, x_1, f(x), AB, (x, y), \\text{Area}."""
    if re.search(r"\\text\{|[A-Za-z]{4,}", text) and not re.search(r"[-+*/^!?\d]", text):
        return True
    if _is_constant(text):  # e and \pi
        return False
    text = re.sub(
        r"\\(?:angle|triangle|overline|vec|hat|bar|det|Pr|mathbb|mathcal|cos|sin|tan|deg)(?![A-Za-z])", " ", text
    )
    return bool(re.fullmatch(r"[|({\s]*(?:\\?[A-Za-z]'*(?:_(?:\w|\{[^{}]*\}))?[\s,;]*)+(?:\([^()=]*\))?[|)}\s]*", text))


def _read_equation(sides: list[str], depth: int):
    first, last = sides[0], sides[-1]
    if len(sides) == 2 and not _is_name(first) and (_is_name(last) or _is_constant(first)):
        first, last = last, first  # 5 = x
    is_name = _is_name(first)
    between = sides[1:-1] if len(sides) > 2 else []
    value = _read(last, depth + 1)
    left = _formula_or_none(first)
    right = value.node if isinstance(value, kinds.Quantity) else None
    if left is not None and not formula.symbols(left) and not is_name:  # 2 + 3 = 5
        between = [first, *between]
    for side in between:
        other = _read(side, depth + 1)
        if not (kinds.equal(other, value) or kinds.equal(value, other)):
            raise Unread("sides that are not equal")
    if first in between:
        return value
    if left is None and not is_name:
        raise Unread("a side that is neither a name nor a formula")
    if not is_name and right is not None and (len(formula.symbols(left)) == 1 or right == formula.ZERO):
        return _relation("=", left, right)  # 2x = 5 is not solved, and so is not 5; a + b = 5 may be what is asked for
    relation = None if left is None or right is None else _relation("=", left, right)
    return kinds.Labelled(plain(first), value, is_name, relation)


def _is_constant(text: str) -> bool:
    node = _formula_or_none(text)
    return node is not None and not formula.symbols(node)


def _formula_or_none(text: str) -> Node | None:
    try:
        return formula.read(text)
    except Unread:
        return None


def _read_one(text: str, depth: int):
    """Reads a text without a list, union or relation outside of its brackets."""
    if text in (r"\emptyset", "empty set", "the empty set"):
        return kinds.Several((), is_set=True)
    for opening, closing in ((r"\{", r"\}"), ("(", ")"), ("(", "]"), ("[", ")"), ("[", "]"), (r"\langle", r"\rangle")):
        if text.startswith(opening) and text.endswith(closing) and _encloses(text):
            inside = text[len(opening) : -len(closing)].strip()
            if opening == r"\{":
                return _read_set(inside, depth)
            items, separators = _split(inside, lambda piece: piece in ",;")
            if separators:
                brackets = ("(", ")") if opening == r"\langle" else (opening, closing)
                return kinds.Bracketed(*brackets, tuple(_read_item(item, depth) for item in items))
            if (opening, closing) == ("(", ")") and not re.fullmatch(r"[A-Z]", inside):
                return _read(inside, depth + 1)
    if match := re.fullmatch(r"\(?([0-9A-Z]+)\)?_\s*\{?\s*\(?(?:\\text\{)?(\d+|[a-z]{3,7})\}?\)?\s*\}?", text):
        base = BASES.get(match[2], match[2])
        if base.isdigit() and (match[1].isdigit() or int(base) > 10) and re.search(r"\d", match[1]):
            return kinds.Numeral(match[1].lstrip("0") or "0", base)
    if match := re.fullmatch(r"([0-9A-Z]+) ?(?:\\text\{)? ?(?:in )?base ?\}? ?(\d+)\}?", text):
        return kinds.Numeral(match[1].lstrip("0") or "0", match[2])
    bare = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    if match := re.fullmatch(r"(\d{1,2}):(\d\d)(?::(\d\d))?\s*(?:([ap])\.? ?m\.?)?", bare, re.IGNORECASE):
        return kinds.Clock(tuple(int(part) for part in match.groups()[:3] if part), (match[4] or "").lower())
    if re.fullmatch(r"\d+\s*(?:[-]\s*\d+|/\s*\d+\s*/\s*\d+|-\s*\d+\s*-\s*\d+)", text):  # a range, a date
        return kinds.Text(plain(text))
    parts, separators = _split(text, lambda piece: piece == ":")
    if separators:
        return kinds.Ratio(tuple(formula.read(part) for part in parts))
    bare = re.sub(r"\{(\d+)\}", r"\1", bare).replace(" _", "_")
    if CHEMICAL.fullmatch(bare) and (re.search(r"\d", bare) or not bare.isupper()):
        return kinds.Text(bare.replace("_", ""))
    return _read_quantity(text)


BASES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9",
         "ten": "10", "twelve": "12", "sixteen": "16"}  # fmt: skip


def _encloses(text: str) -> bool:
    """Whether the bracket that a text begins with closes at its end."""
    outside = [is_outside for _, is_outside in _pieces(text)]
    return not any(outside[1:-1])


def _read_set(inside: str, depth: int) -> kinds.Several:
    if not inside:
        return kinds.Several((), is_set=True)
    items, _ = _split(inside, lambda piece: piece in ",;")
    if any(piece in (":", "|") and is_outside for piece, is_outside in _pieces(inside)):
        raise Unread("a set by its rule")
    found: list = []
    for item in (_read_item(item, depth) for item in items):
        for each in item.items if isinstance(item, kinds.Several) and not item.is_set else (item,):
            if not any(kinds.equal(each, other) for other in found):
                found.append(each)
    return kinds.Several(tuple(found), is_set=True)


def _read_rows(name: str, body: str, depth: int) -> kinds.Rows:
    name = {"bmatrix": "matrix", "pmatrix": "matrix", "smallmatrix": "matrix", "array": "matrix"}.get(name, name)
    rows = []
    for line in re.split(r"\\\\(?:\[[^\]]*\])?|\\cr", body):
        cells = _split(line, lambda piece: piece == "&")[0]
        if any(cells):
            rows.append(tuple(_read_cell(cell, depth) for cell in cells))
    if not rows or sum(map(len, rows)) > MOST_ITEMS:
        raise Unread("no matrix, or too large a one")
    return kinds.Rows(name, tuple(rows))


def _read_cell(text: str, depth: int):
    text = re.sub(r"^(?:\\text\{ ?(?:if|for|when) ?\}|(?:if|for|when)\b)\s*|[,.;]$", "", text.rstrip(",. ")).strip()
    text = re.sub(r"^\\text\{ ?(?:if|for|when) ", r"\\text{", text)
    if re.fullmatch(r"(?:\\text\{)? ?(?:otherwise|else) ?\}?", text):
        return kinds.Text("otherwise")
    try:
        return _read(text, depth + 1)
    except Unread:
        return kinds.Text(plain(text))


def _is_prose(text: str) -> bool:
    """Whether it is words that a formula would take for products of letters: `n is odd`, `No`, `Evelyn`."""
    bare = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    bare = ROWS.sub(" ; ", bare)
    bare = re.sub(r"\\[A-Za-z]+", " ; ", bare.replace(r"\pi", "1"))
    if re.fullmatch(r"[A-Za-z]{2,}", bare.strip()):
        return bare.strip() not in formula.FUNCTIONS | {"pi", "infinity", "inf"}
    bare = re.sub(r"\b(?:and|or)\b", " , ", bare, flags=re.IGNORECASE)
    return bool(
        re.search(r"(?<![A-Za-z\d])(?:[A-Za-z]{2,} +[A-Za-z]+|[A-Za-z] +[A-Za-z]{2,})", bare)
    ) and not re.search(r"[\d)}!%=] *[A-Za-z]{2,} *[A-Za-z ]*$", bare)


def _read_quantity(text: str):
    head, unit, factor = split_unit(text)
    if r"\text" in head:
        raise Unread("words within a formula")
    if r"\pm" in head or r"\mp" in head:
        return kinds.Several(tuple(kinds.Quantity(formula.read(head, sign), unit) for sign in (1, -1)))
    node = formula.read(head)
    if (unit or factor != 1) and formula.symbols(node):
        raise Unread("a unit behind a variable")
    if factor != 1:
        return kinds.Quantity(Node("*", (Node("number", (factor,)), node)), unit)
    written = head.replace(" ", "")
    return kinds.Quantity(node, unit, written if re.fullmatch(r"[-+]?\d*\.\d+", written) else "")
