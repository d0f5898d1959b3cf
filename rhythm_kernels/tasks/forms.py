r"""One spelling for the many of an answer: `**12**`, `\dfrac{1}{2}`, `x²`, `1\,000`, `The answer is $5$.`

Only spelling is touched here. Two answers that mean different things stay different: \text{} stays, and so do digits,
signs, letters and their case.
"""

import re
import unicodedata

from rhythm_kernels.tasks.formula import FUNCTIONS, GREEK_NAMES
from rhythm_kernels.tasks.types import closing_brace

SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "∙": r"\cdot ",
    "∗": "*", "÷": "/", "⁄": "/", "∕": "/", "√": r"\sqrt ", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]", "∞": r"\infty ",
    "≤": r"\leq ", "⩽": r"\leq ", "≥": r"\geq ", "⩾": r"\geq ", "≠": r"\neq ", "≈": r"\approx ", "≡": r"\equiv ",
    "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in ", "°": r"^\circ ",
    "º": r"^\circ ", "′": "'", "″": "''", "’": "'", "…": r"\ldots ", "⟨": r"\langle ", "⟩": r"\rangle ",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "∣": "|", "‖": r"\| ", "∶": ":", "％": "%",
    "µ": r"\mu ",
}  # fmt: skip
GREEK = {}
for name in [*GREEK_NAMES.split(" "), "pi"]:
    case = "SMALL" if name.islower() else "CAPITAL"
    letter = unicodedata.lookup(f"GREEK {case} LETTER {name.upper().replace('LAMBDA', 'LAMDA')}")
    GREEK[letter] = f"\\{name} "
RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n"))
LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-"))
RENAMED = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom", "le": "leq", "ge": "geq",
    "leqslant": "leq", "geqslant": "geq", "ne": "neq", "varnothing": "emptyset", "empty": "emptyset", "degree": "deg ",
    "lbrace": "{", "rbrace": "}", "lbrack": "[", "rbrack": "]", "vert": "|", "lvert": "|", "rvert": "|", "mid": "|",
    "lVert": r"\|", "rVert": r"\|", "Vert": r"\|", "infin": "infty", "lparen": "(", "rparen": ")", "bmod": "pmod",
    "mod": "pmod", "ast": "*", "div": "/", "colon": ":", "lt": "<", "gt": ">", "dots": "ldots", "cdots": "ldots",
    "textdegree": "deg ", "thickapprox": "approx", "simeq": "approx", "approxeq": "approx", "iff": "Leftrightarrow",
    "varphi": "phi", "varepsilon": "epsilon", "vartheta": "theta", "R": r"mathbb{R}", "prime": "'", "arctg": "arctan",
    "tg": "tan", "ctg": "cot", "textdollar": "$", "euro": "€", "pounds": "£", "imath": "i",
}  # fmt: skip
BARE = {"{", "}", r"\|", "$"}  # of RENAMED's values: those that keep their backslash
DROPPED = re.compile(
    r"\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits|nolimits|mathstrut|strut|"
    r"nonumber|notag|mathop|mathord|mathrel|normalsize|large|Large|boldmath|therefore|phantom\{[^{}]*\}|"
    r"tag\*?\{[^{}]*\}|label\{[^{}]*\})(?![A-Za-z])"
)
SPACE = re.compile(
    r"(?<!\\)\\(?:[,;:>]|[ \t\n]|(?:q?quad|enspace|enskip|thinspace|medspace|thickspace|space)(?![A-Za-z])"
    r"|hspace\*?\{[^{}]*\})|~"
)
TEXT_FONT = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|md|up|normal)?|mbox|hbox|textsc)\s*(?=\{)")
MATHS_FONT = re.compile(
    r"\\(?:math(?:rm|bf|it|sf|tt|normal)|operatorname\*?|boldsymbol|bm|pmb|emph)(?![A-Za-z])\s*"
    r"(?:\{([^{}]*)\}|([A-Za-z0-9]))"
)
NAMES = FUNCTIONS | {"det"}
FUNCTION_NAME = re.compile(rf"\\text\s*\{{({'|'.join(NAMES)})\}}")
MARKDOWN = re.compile(r"(\*\*|__|\*|`+)(?=\S)(.+?)(?<=\S)\1", re.DOTALL)
OPENING = re.compile(
    r"(?:(?:so|thus|hence|therefore|then)\b,?\s*)?"
    r"(?:(?:the\s+|our\s+)?(?:final\s+|correct\s+|required\s+|desired\s+)?(?:answer|result|solution|value)s?"
    r"(?:\s+(?:is|are|equals)\b\s*:?|\s*[:=])|answer\s*:)\s*(?=\S)",
    re.IGNORECASE,
)
NESTED_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")


def normalise(text: str) -> str:
    """Returns `text` in one spelling, without what surrounds an answer; `\\$` is a dollar, `\\deg` a degree."""
    text = _letters(text)
    text = _unwrap(text)
    text = re.sub(r"(\d)\s*\\[,:;!]\s*(?=\d{3}(?!\d))", r"\1,", text)  # thousands apart by a thin space
    text = re.sub(r"(\d)\{,\}(?=\d{3}(?!\d))", r"\1,", text)
    text = re.sub(r"(\d)\{[,.]\}(?=\d)", r"\1.", text)  # a decimal comma
    text = text.replace(r"\left<", r"\langle ").replace(r"\right>", r"\rangle ")
    text = DROPPED.sub("", text.replace(r"\!", ""))
    text = SPACE.sub(" ", text)
    text = TEXT_FONT.sub(r"\\text", text)
    text = MATHS_FONT.sub(_font, text)
    text = FUNCTION_NAME.sub(r"\\\1 ", text)
    text = re.sub(r"\\([A-Za-z]+)", _rename, text)
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))", r"\\deg ", text)
    text = re.sub(r"\^\s*\{\s*\\deg\s*\}", r"\\deg ", text)
    text = re.sub(r"\^\s*\{\s*('+)\s*\}|\^\s*('+)", r"\1\2", text)
    text = text.replace(r"\%", "%").replace(r"\#", "#").replace(r"\&", "&")
    text = re.sub(
        r"\\text\s*\{([^{}]*)\}",
        lambda match: rf"\text{{{' '.join(match[1].split())}}}" if match[1].strip() else " ",
        text,
    )
    text = re.sub(r"(?<![\d,.])(\d{1,3}(?: \d{3})+)(?![\d,])", lambda match: match[1].replace(" ", ","), text)
    if (match := re.match(r"\\text\{([^{}]*)\}\s*(?=\S)", text)) and OPENING.sub("", f"{match[1]} .") == ".":
        text = text[match.end() :]
    text = " ".join(text.split())
    return _trim(text)


def _letters(text: str) -> str:
    """Returns `text` with LaTeX for the signs of unicode; digits of other scripts are what NFKC makes of them."""
    text = re.sub(f"[{''.join(RAISED)}]+", lambda match: f"^{{{''.join(map(RAISED.get, match[0]))}}}", text)
    text = re.sub(f"[{''.join(LOWERED)}]+", lambda match: f"_{{{''.join(map(LOWERED.get, match[0]))}}}", text)
    text = re.sub("[¼-¾⅐-⅞]", _vulgar, text)
    text = "".join(SYMBOLS.get(letter) or GREEK.get(letter) or letter for letter in text)
    return unicodedata.normalize("NFKC", text)


def _vulgar(match: re.Match) -> str:
    upper, _, lower = unicodedata.normalize("NFKC", match[0]).partition("⁄")
    return rf"\frac{{{upper}}}{{{lower}}}"


def _unwrap(text: str) -> str:
    """Returns `text` without markdown, math delimiters and boxes around it, and without words that announce it."""
    before = None
    while before != text:
        before, text = text, text.strip()
        if match := MARKDOWN.fullmatch(text):
            text = match[2]
        text = re.sub(r"\\[()\[\]]", lambda match: " ", text) if re.match(r"\\[(\[]", text) else text
        dollars = len(re.findall(r"(?<!\\)\$", text))
        if dollars % 2 == 0:
            text = re.sub(r"(?<!\\)\$", " ", text)
        elif dollars == 1:
            text = re.sub(r"(?<!\\)\$(?=\s*-?[\d.])", r"\\$", text)
        text = OPENING.sub("", text, count=1) if OPENING.match(text) else text
        if (match := NESTED_BOX.match(text)) and closing_brace(text, match.end()) == len(text) - 1:
            text = text[match.end() : -1]
    return text


def _font(match: re.Match) -> str:
    inside = (match[1] if match[1] is not None else match[2]).strip()
    if inside in NAMES:
        return rf"\{inside} "
    if re.fullmatch(r"[A-Za-z]{2,}[A-Za-z ./]*", inside):
        return rf"\text{{{inside}}}"
    return f" {inside} " if inside else " "


def _rename(match: re.Match) -> str:
    name = RENAMED.get(match[1], match[1])
    if name in BARE:
        return rf"\{name}" if name != r"\|" else name
    return name if name != match[1] and not name.strip()[:1].isalpha() else rf"\{name}"


def _trim(text: str) -> str:
    """Returns `text` without full stops, commas and line breaks at its end, and without = or ≈ before it."""
    before = None
    while before != text:
        before = text
        text = re.sub(r"^(?:=|:|\\approx(?![A-Za-z])|\\implies(?![A-Za-z])|\\Rightarrow(?![A-Za-z]))\s*", "", text)
        text = re.sub(r"(?:(?<!\.)\.|[,;:]|\\\\|\\)$", "", text).strip()
    return text
