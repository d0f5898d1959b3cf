r"""Reads one formula of an answer, from normalised LaTeX and within bounds, as a tree.

A formula that is not understood to its last sign is `Unread`; nothing is skipped, and nothing is run as code.
"""

import re
from collections.abc import Callable, Collection
from fractions import Fraction
from typing import NamedTuple

LONGEST = 400  # tokens
DEEPEST = 40  # nested groups
MOST_DIGITS = 1000  # of a number that is written out
CONSTANTS = {r"\pi", "e", "i", r"\infty"}
FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "log", "ln", "exp",
    "max", "min", "gcd", "lcm",
}  # fmt: skip
SEVERAL = {"max", "min", "gcd", "lcm"}  # functions of several arguments
GREEK_NAMES = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau phi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
)
GREEK = {f"\\{name}" for name in [*GREEK_NAMES.split(" "), "ell"]}
APPLIED = set("fghFGHPQL")  # letters that are functions where a parenthesis follows; other letters are factors
TOKEN = re.compile(
    r"(?P<space>\s+)|(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:\\overline\s*\{\d+\}|[eE][+-]?\d+(?![\d.A-Za-z]))?)"
    r"|(?P<command>\\(?:[A-Za-z]+|[{}|]))|(?P<letters>[A-Za-z]+)|(?P<sign>[-+*/^_!%'(){}\[\]|,])",
    re.ASCII,
)


class Unread(ValueError):
    """A text that is no formula of this kind."""


class Token(NamedTuple):
    kind: str
    text: str
    spaced: bool = False  # whether space is before it


class Node(NamedTuple):
    """An operation `op` on its `parts`: nodes, or the value of a number, the name of a symbol or a function."""

    op: str
    parts: tuple


ZERO, ONE, TWO = (Node("number", (Fraction(value),)) for value in (0, 1, 2))
INFINITY = Node("constant", (r"\infty",))
FACTORS = {  # written behind a number
    "%": Node("number", (Fraction(1, 100),)),
    r"\deg": Node("/", (Node("constant", (r"\pi",)), Node("number", (Fraction(180),)))),
}
CLOSING = {"(": ")", "{": "}", "[": "]"}


def read(text: str, plus_minus: int = 1) -> Node:
    r"""Returns the formula of a normalised text, or raises Unread; `plus_minus` is the sign that \pm stands for."""
    reader = Reader(split(text), plus_minus)
    node = reader.sum()
    if reader.token is not None:
        raise Unread(f"{reader.token.text!r} is not understood")
    return node


def split(text: str) -> list[Token]:
    tokens, position, spaced = [], 0, False
    while position < len(text):
        match = TOKEN.match(text, position)
        if match is None or len(tokens) > LONGEST:
            raise Unread("it is too long" if match else f"{text[position]!r} is not understood")
        position, kind = match.end(), match.lastgroup
        if kind == "space":
            spaced = True
            continue
        if kind == "letters":
            tokens += _words(match[0], spaced)
        elif kind == "number" and _is_euler(match[0]):  # 2e-1 is two times e, less one
            position = match.start() + re.match(r"[\d.]+", match[0]).end()
            tokens.append(Token("number", text[match.start() : position], spaced))
        else:
            tokens.append(Token(kind, match[0], spaced))
        spaced = False
    return tokens


def _is_euler(number: str) -> bool:
    mantissa, letter, power = number.partition("e")
    plain_power = len(power.lstrip("+-")) == 1 and power[:1] in "+-"
    return bool(letter) and mantissa != "1" and "." not in mantissa and plain_power


def _words(letters: str, spaced: bool) -> list[Token]:
    """Functions and constants by name; single letters; AB, No and abcd as one symbol, since a word is no product."""
    if letters in FUNCTIONS or letters in ("pi", "sqrt", "infinity", "inf"):
        name = {"infinity": "infty", "inf": "infty"}.get(letters, letters)
        return [Token("command", f"\\{name}", spaced)]
    if len(letters) > 1 and (len(letters) > 3 or not letters.islower()):
        return [Token("word", letters, spaced)]
    return [Token("letters", letter, spaced and index == 0) for index, letter in enumerate(letters)]


class Reader:
    """Recursive descent over tokens: sums of products of factors, each with its powers."""

    def __init__(self, tokens: list[Token], plus_minus: int):
        self.tokens, self.position, self.depth, self.in_bars = tokens, 0, 0, False
        self.signs = {"+": 1, "-": -1, r"\pm": plus_minus, r"\mp": -plus_minus}

    @property
    def token(self) -> Token | None:
        return self.tokens[self.position] if self.position < len(self.tokens) else None

    def peek(self) -> str:
        return self.token.text if self.token is not None else ""

    def take(self) -> Token:
        token = self.token
        if token is None:
            raise Unread("it ends too early")
        self.position += 1
        return token

    def expect(self, text: str):
        if self.take().text != text:
            raise Unread(f"{text!r} is missing")

    def signed(self, read: Callable[[], Node], signs: Collection[str] = ("+", "-")) -> Node:
        """Returns what `read` reads behind any signs, negated if they say so."""
        sign = 1
        while self.peek() in signs:
            sign *= self.signs[self.take().text]
        node = read()
        return node if sign > 0 else Node("-", (node,))

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unread("it is nested too deeply")
        terms = [self.signed(self.product, self.signs)]
        while self.peek() in self.signs:
            terms.append(self.signed(self.product, self.signs))
        self.depth -= 1
        return terms[0] if len(terms) == 1 else Node("+", tuple(terms))

    def product(self, *, of_function: bool = False) -> Node:
        node = self.factor()
        while (text := self.peek()) and text not in self.signs:
            if text in ("*", "/", r"\times", r"\cdot"):
                if of_function:
                    break
                self.take()
                node = Node("/" if text == "/" else "*", (node, self.signed(self.factor)))
            elif self.starts_factor(of_function):
                node = Node("*", (node, self.factor()))
            else:
                break
        return node

    def starts_factor(self, of_function: bool) -> bool:
        token = self.token
        if token.kind in ("letters", "word"):
            return True
        if token.kind == "number":
            raise Unread(f"the number {token.text} follows without a sign")
        if token.kind == "command":
            name = token.text[1:]
            is_function = name in FUNCTIONS
            known = name in ("frac", "sqrt", "binom", "lfloor", "lceil") or token.text in CONSTANTS | GREEK
            return (is_function and not of_function) or known
        return token.text in ("(", "{", "[") or (token.text == "|" and not self.in_bars)

    def factor(self) -> Node:
        start = self.token
        node = self.base()
        while (text := self.peek()) in ("^", "!", *FACTORS):
            self.take()
            if text == "^":
                # TeX raises the first digit of 2^10 alone; whoever writes it means ten.
                node = Node("^", (node, self.signed(self.base)))
            elif text == "!":
                node = Node("!", (node,))
            else:
                node = Node("*", (node, FACTORS[text]))
            if text in ("^", "!") and self.peek() == text:
                raise Unread(f"{text} follows {text}")
        if self.peek() == "_" or (start.kind == "number" and self.peek() == "'"):
            raise Unread("a subscript or prime of something else than a letter")
        return node

    def base(self) -> Node:
        token = self.take()
        if token.kind == "number":
            return self.number(token)
        if token.kind in ("letters", "word"):
            return self.symbol(token.text)
        if token.text in CLOSING:
            return self.group(CLOSING[token.text])
        if token.text == "|":
            return Node("abs", (self.group("|"),))
        if token.kind == "command":
            return self.command(token.text)
        raise Unread(f"{token.text!r} is not understood")

    def arguments(self, closing: str) -> list[Node]:
        outer, self.in_bars = self.in_bars, closing == "|"
        nodes = [self.sum()]
        while self.peek() == ",":
            self.take()
            nodes.append(self.sum())
        self.expect(closing)
        self.in_bars = outer
        return nodes

    def group(self, closing: str) -> Node:
        nodes = self.arguments(closing)
        if len(nodes) > 1:
            raise Unread("a list within a formula")
        return nodes[0]

    def argument(self) -> Node:
        """Returns what follows a command: a group, a single digit, letter or command."""
        token = self.token
        if token is not None and token.kind == "number" and len(token.text) > 1:
            if not token.text.isdigit():
                raise Unread("an argument without braces")
            first, rest = token._replace(text=token.text[0]), token._replace(text=token.text[1:], spaced=False)
            self.tokens[self.position : self.position + 1] = [first, rest]
            return Node("number", (read_number(self.take().text),))
        return self.base()

    def number(self, token: Token) -> Node:
        value, start = read_number(token.text), self.position
        rest = self.tokens[start : start + 3]
        if token.text.isdigit() and self.peek() == r"\frac":  # 1\frac12
            self.take()
            upper, lower = self.argument(), self.argument()
            if upper.op == lower.op == "number":
                return _mixed(value, upper.parts[0], lower.parts[0])
            self.position = start
        elif token.text.isdigit() and [each.kind for each in rest[::2]] == ["number"] * 2 and rest[1].text == "/":
            if not (rest[0].spaced and rest[0].text.isdigit() and rest[2].text.isdigit()):  # 1 1/2
                raise Unread("two numbers without a sign between them")
            self.position += 3
            return _mixed(value, read_number(rest[0].text), read_number(rest[2].text))
        return Node("number", (value,))

    def symbol(self, name: str) -> Node:
        if name in CONSTANTS and self.peek() not in ("_", "'"):
            return Node("constant", (name,))
        while self.peek() in ("_", "'"):
            sign = self.take().text
            name += sign if sign == "'" else f"_{self.subscript()}"
        if name[0] in APPLIED and self.peek() == "(" and len(re.sub(r"_.*|'", "", name)) == 1:
            self.take()
            return Node("function", (name, *self.arguments(")")))
        return Node("symbol", (name,))

    def subscript(self) -> str:
        token = self.take()
        if token.text != "{":
            return token.text
        inside, depth = [], 1
        while True:
            text = self.take().text
            depth += (text == "{") - (text == "}")
            if depth == 0:
                return "".join(inside)
            inside.append(text)

    def command(self, command: str) -> Node:
        name = command[1:]
        if command in CONSTANTS or command in GREEK:
            return self.symbol(command)
        if name == "frac":
            return Node("/", (self.argument(), self.argument()))
        if name == "binom":
            return Node("binom", (self.argument(), self.argument()))
        if name == "sqrt":
            index = TWO
            if self.peek() == "[":
                self.take()
                index = self.group("]")
            token = self.token
            is_plain = token is not None and (token.text == "(" or (token.kind == "number" and token.spaced))  # √12
            return Node("root", (self.base() if is_plain else self.argument(), index))
        if name in ("lfloor", "lceil"):
            return Node(name, (self.group(f"\\r{name[1:]}"),))
        if name in FUNCTIONS:
            return self.function(name)
        raise Unread(f"{command} is not understood")

    def function(self, name: str) -> Node:
        power = base = None
        while self.peek() in ("^", "_"):
            if self.take().text == "^":
                power = self.signed(self.base)
            else:
                base = self.argument()
        if base is not None and name != "log":
            raise Unread(f"a base of {name}")
        if self.peek() in CLOSING:
            arguments = self.arguments(CLOSING[self.take().text])
        else:
            arguments = [self.signed(lambda: self.product(of_function=True))]
        if (len(arguments) > 1) != (name in SEVERAL):
            raise Unread(f"{name} of {len(arguments)} arguments")
        node = Node("function", (name, *arguments))
        if base is not None:
            node = Node("/", tuple(Node("function", ("ln", each)) for each in (*arguments, base)))
        elif name in ("sin", "cos", "tan") and power == Node("-", (ONE,)):
            return Node("function", (f"arc{name}", *arguments))
        return node if power is None else Node("^", (node, power))


def _mixed(whole: Fraction, upper: Fraction, lower: Fraction) -> Node:
    if not 0 < upper < lower:
        raise Unread("a mixed number whose fraction is not below one")
    return Node("number", (whole + upper / lower,))


def read_number(text: str) -> Fraction:
    r"""Returns the exact value of `12`, `0.5`, `1e-5` or `0.1\overline{6}`; raises Unread where it is too long."""
    written, _, period = text.partition(r"\overline")
    if len(text) > MOST_DIGITS or len(written.lower().partition("e")[2]) > 5:
        raise Unread("a number is too long")
    if not period:
        return Fraction(written)
    if "." not in written:
        raise Unread("a period without a decimal point")
    digits, places = period.strip("{} "), len(written.partition(".")[2])
    return Fraction(written) + Fraction(int(digits), (10 ** len(digits) - 1) * 10**places)


def symbols(node: Node) -> set[str]:
    """Returns the variables of a formula, and the names of its unknown functions with a parenthesis."""
    found, left = set(), [node]
    while left:
        op, parts = left.pop()
        if op == "symbol":
            found.add(parts[0])
        elif op == "function" and parts[0] not in FUNCTIONS:
            found.add(f"{parts[0]}(")
        left += [part for part in parts if isinstance(part, Node)]
    return found


def is_infinite(node: Node) -> int:
    """Returns 1 and -1 for the formulas that are plus and minus infinity, else 0."""
    if node.op == "-":
        return -is_infinite(node.parts[0])
    return int(node == INFINITY)
