r"""The unit behind a number: `12\text{ cm}^2`, `\$3 million`, `90^\circ`, `50\%`, `3 \pmod 7`, `5th`."""

import re
from fractions import Fraction
from typing import NamedTuple

WORD = r"(?:\\text\{[^{}]*\}|(?<![A-Za-z\\])[A-Za-z]{2,}\.?)"
UNIT = re.compile(
    rf"(?P<head>.*?(?:[\d)}}!|]|\\pi))\s*(?P<unit>{WORD}(?:\s*(?:{WORD}|/\s*[A-Za-z]+|\^\s*\{{?-?\d\}}?|\\cdot))*)",
    re.DOTALL,
)
MODULUS = re.compile(
    r"(?P<head>.*?)[\s(]*(?:\\pmod|(?:\\text\{)? ?\(?mod\b)\s*\}?\s*\{?\s*(?P<number>\w+)\s*\}?[\s)}]*"
)
ORDINAL = re.compile(r"(.*\d)\s*(?:\^\s*\{?\s*)?(?:\\text\{ ?)?(?:st|nd|rd|th) ?\}?\s*\}?")
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
SHORT_UNITS = {
    "cm", "mm", "km", "ft", "in", "yd", "mi", "kg", "mg", "lb", "lbs", "oz", "ml", "mL", "min", "hr", "hrs", "sec",
    "deg", "rad", "sq", "mph", "kph", "Hz", "kHz", "Pa", "kPa", "mol", "eV", "kW", "MW", "USD", "men", "of", "per",
}  # fmt: skip
SCALES = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
}  # fmt: skip
NO_UNITS = {
    "or", "and", "to", "not", "no", "nor", "is", "are", "was", "be", "if", "else", "mod", "base", "odd", "even",
    "positive", "negative", "approximately", "about", "roughly", "more", "less", "greater", "than", "fewer", "most",
    "least", "between", "only", "at", "with", "without", "except", "but", "am", "pm", "all", "none", "neither",
    "both", "prime", "composite", "rational", "irrational", "undefined", "infinite", "infinity", "half", "quarter",
    "third", "true", "false", "yes", "for", "where", "when", "by", "over", "from", "real", "complex", "imaginary",
    "increasing", "decreasing", "maximum", "minimum", "otherwise", "squared", "choose", "plus", "minus", "times",
    "divided", "equals", "what", "which", "that", "it", "this", "hundredth", "thousandth", "tenth", "factorial",
    "remainder",
}  # fmt: skip


class Measured(NamedTuple):
    """The text before a unit, the unit in one spelling, and the factor of words such as million."""

    head: str
    unit: str = ""
    factor: Fraction = Fraction(1)


def split_unit(text: str) -> Measured:
    """Returns a normalised text without its unit, and the unit; the whole text where it has none."""
    sign = "-" if text.startswith("-") else ""
    unit = ""
    for symbol, name in CURRENCIES.items():
        if text[len(sign) :].lstrip().startswith(symbol):
            text, unit = sign + text[len(sign) :].lstrip()[len(symbol) :].strip(), name
        elif text.endswith(symbol):
            text, unit = text[: -len(symbol)].strip(), name
    if match := MODULUS.fullmatch(text):
        return Measured(match["head"].strip(), f"mod {match['number']}")
    if match := ORDINAL.fullmatch(text):
        return Measured(match[1], "th")
    if (match := DEGREES.fullmatch(text)) and not TRIGONOMETRIC.search(match[1]):
        return Measured(match[1], f"deg{match[2]}")
    if text.endswith("%"):
        return Measured(text[:-1].rstrip(), "%")
    if (match := UNIT.fullmatch(text)) and (found := _spell(match["unit"])) is not None:
        factor, words = found
        return Measured(match["head"].strip(), f"{unit}{words}", factor)
    return Measured(text, unit)


def _spell(text: str) -> tuple[Fraction, str] | None:
    """Returns the factor of a number (a million) and the unit in one spelling; None for words that are no unit."""
    plain_words = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    if r"\text" not in text and any(
        len(w) < 4 and w not in SHORT_UNITS for w in re.findall(r"(?<!/)\b[A-Za-z]+", text)
    ):
        return None
    words = re.findall(r"[A-Za-z]+|/|\^\s*\{?\s*-?\d|\S", plain_words.replace(r"\cdot", " ").replace("}", ""))
    names, factor = [], Fraction(1)
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
    is_compact = "/" in joined or any(name.startswith("^") for name in joined)
    return factor, ("" if is_compact else " ").join(joined)
