r"""Reads one formula of an answer, from normalised LaTeX and within bounds, as a tree.

A formula that is not understood to its last sign is `Unread`; nothing is skipped, and nothing is run as code.
"""

import re
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
GREEK = {
    r"\alpha", r"\beta", r"\gamma", r"\delta", r"\epsilon", r"\zeta", r"\eta", r"\theta", r"\iota", r"\kappa",
    r"\lambda", r"\mu", r"\nu", r"\xi", r"\rho", r"\sigma", r"\tau", r"\phi", r"\chi", r"\psi", r"\omega",
    r"\Gamma", r"\Delta", r"\Theta", r"\Lambda", r"\Xi", r"\Pi", r"\Sigma", r"\Phi", r"\Psi", r"\Omega", r"\ell",
}  # fmt: skip
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
    """`op` with its `parts`: nodes, or the value of a number, the name of a symbol or a function."""

    op: str
    parts: tuple


ZERO, ONE, TWO = (Node("number", (Fraction(value),)) for value in (0, 1, 2))


def read(text: str, plus_minus: int = 1) -> Node:
    r"""The formula of a normalised text; `plus_minus` says which sign \pm stands for, \mp for the other. Unread."""
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
        self.tokens, self.position, self.depth, self.bars = tokens, 0, 0, 0
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

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unread("it is nested too deeply")
        terms = []
        while not terms or self.peek() in self.signs:
            sign = 1
            while self.peek() in self.signs:
                sign *= self.signs[self.take().text]
            term = self.product()
            terms.append(term if sign > 0 else Node("-", (term,)))
        self.depth -= 1
        return terms[0] if len(terms) == 1 else Node("+", tuple(terms))

    def product(self, *, of_function: bool = False) -> Node:
        node = self.factor()
        while (text := self.peek()) and text not in self.signs:
            if text in ("*", "/", r"\times", r"\cdot"):
                if of_function:
                    break
                self.take()
                sign = 1
                while self.peek() in ("+", "-"):
                    sign *= self.signs[self.take().text]
                factor = self.factor()
                factor = factor if sign > 0 else Node("-", (factor,))
                node = Node("/" if text == "/" else "*", (node, factor))
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
        return token.text in ("(", "{", "[") or (token.text == "|" and self.bars == 0)

    def factor(self) -> Node:
        start = self.token
        node = self.base()
        while True:
            text = self.peek()
            if text == "^":
                self.take()
                node = Node("^", (node, self.exponent()))
                if self.peek() == "^":
                    raise Unread("two powers follow each other")
            elif text == "!":
                self.take()
                if self.peek() == "!":
                    raise Unread("!! is not read")
                node = Node("!", (node,))
            elif text == "%":
                self.take()
                node = Node("/", (node, Node("number", (Fraction(100),))))
            elif text == r"\deg":
                self.take()
                node = Node("*", (node, Node("/", (Node("constant", (r"\pi",)), Node("number", (Fraction(180),))))))
            else:
                break
        if self.peek() == "_" or (start.kind == "number" and self.peek() == "'"):
            raise Unread("a subscript or prime of something else than a letter")
        return node

    def exponent(self) -> Node:
        sign = 1
        while self.peek() in ("+", "-"):
            sign *= self.signs[self.take().text]
        node = self.base()  # TeX raises the first digit of 2^10 alone; whoever writes it means ten
        return node if sign > 0 else Node("-", (node,))

    def base(self) -> Node:
        token = self.take()
        if token.kind == "number":
            return self.number(token)
        if token.kind in ("letters", "word"):
            return self.symbol(token.text)
        if token.text in ("(", "{", "["):
            node = self.group({"(": ")", "{": "}", "[": "]"}[token.text])
            return node
        if token.text == "|":
            self.bars, bars = 1, self.bars
            node = self.sum()
            self.expect("|")
            self.bars = bars
            return Node("abs", (node,))
        if token.kind == "command":
            return self.command(token.text)
        raise Unread(f"{token.text!r} is not understood")

    def group(self, closing: str) -> Node:
        self.bars, bars = 0, self.bars
        node = self.sum()
        self.expect(closing)
        self.bars = bars
        return node

    def argument(self) -> Node:
        """What follows a command: a group, a single digit, letter or command."""
        token = self.token
        if token is None:
            raise Unread("an argument is missing")
        if token.text == "{":
            self.take()
            return self.group("}")
        if token.kind == "number" and len(token.text) > 1:
            if not token.text.isdigit():
                raise Unread("an argument without braces")
            self.tokens[self.position] = token._replace(text=token.text[1:], spaced=False)
            return Node("number", (Fraction(int(token.text[0])),))
        return self.base()

    def number(self, token: Token) -> Node:
        value = read_number(token.text)
        whole = token.text.isdigit()
        rest = self.tokens[self.position : self.position + 3]
        if whole and rest and rest[0].text == r"\frac":  # 1\frac12
            start = self.position
            self.take()
            upper, lower = self.argument(), self.argument()
            if upper.op == lower.op == "number":
                if not 0 < upper.parts[0] < lower.parts[0]:
                    raise Unread("a mixed number whose fraction is not below one")
                return Node("number", (value + upper.parts[0] / lower.parts[0],))
            self.position = start
        elif whole and [each.kind for each in rest[::2]] == ["number", "number"] and rest[1].text == "/":  # 1 1/2
            upper, lower = (read_number(each.text) for each in rest[::2])
            if not (rest[0].spaced and rest[0].text.isdigit() and rest[2].text.isdigit() and 0 < upper < lower):
                raise Unread("two numbers without a sign between them")
            self.position += 3
            return Node("number", (value + upper / lower,))
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

    def arguments(self, closing: str) -> list[Node]:
        self.bars, bars = 0, self.bars
        nodes = [self.sum()]
        while self.peek() == ",":
            self.take()
            nodes.append(self.sum())
        self.expect(closing)
        self.bars = bars
        return nodes

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
            if self.peek() == "(":
                self.take()
                return Node("root", (self.group(")"), index))
            token = self.token
            if token is not None and token.kind == "number" and token.spaced:  # as in √12
                return Node("root", (self.base(), index))
            return Node("root", (self.argument(), index))
        if name in ("lfloor", "lceil"):
            return Node(name, (self.group(f"\\r{name[1:]}"),))
        if name in FUNCTIONS:
            return self.function(name)
        raise Unread(f"{command} is not understood")

    def function(self, name: str) -> Node:
        power = base = None
        while self.peek() in ("^", "_"):
            if self.take().text == "^":
                power = self.exponent()
            else:
                base = self.argument()
        if base is not None and name != "log":
            raise Unread(f"a base of {name}")
        if self.peek() in ("(", "["):
            arguments = self.arguments({"(": ")", "[": "]"}[self.take().text])
        elif name in SEVERAL:
            raise Unread(f"{name} without its arguments")
        elif self.peek() == "{":
            self.take()
            arguments = [self.group("}")]
        else:
            sign = -1 if self.peek() == "-" else 1
            if sign < 0:
                self.take()
            argument = self.product(of_function=True)
            arguments = [argument if sign > 0 else Node("-", (argument,))]
        if len(arguments) > 1 and name not in SEVERAL:
            raise Unread(f"{name} of several arguments")
        if name == "log" and base is not None:
            node = Node("/", (Node("function", ("ln", *arguments)), Node("function", ("ln", base))))
        elif name in ("sin", "cos", "tan") and power == Node("-", (ONE,)):
            return Node("function", (f"arc{name}", *arguments))
        else:
            node = Node("function", (name, *arguments))
        return node if power is None else Node("^", (node, power))


def read_number(text: str) -> Fraction:
    r"""The exact value of `12`, `0.5`, `1e-5` or `0.1\overline{6}`; Unread for more than MOST_DIGITS digits."""
    if len(text) > MOST_DIGITS:
        raise Unread("a number is too long")
    written, _, period = text.partition(r"\overline")
    if period:
        digits = period.strip("{} ")
        if "." not in written:
            raise Unread("a period without a decimal point")
        places = len(written.partition(".")[2])
        start = Fraction(written if not written.endswith(".") else written[:-1])
        return start + Fraction(int(digits), (10 ** len(digits) - 1) * 10**places)
    mantissa, letter, power = text.lower().partition("e")
    if letter and len(power) > 5:
        raise Unread("a power of ten is too large")
    return Fraction(mantissa if not mantissa.endswith(".") else mantissa[:-1]) * Fraction(10) ** int(power or 0)


def symbols(node: Node) -> set[str]:
    """The variables of a formula, and the names of its unknown functions with a parenthesis."""
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
    """1 and -1 for the formulas that are plus and minus infinity, else 0."""
    if node.op == "-":
        return -is_infinite(node.parts[0])
    return int(node == Node("constant", (r"\infty",)))
