"""The words of a text, and how many of them two texts share."""

import re

WORD = re.compile(r"[0-9]+(?:[.,][0-9]+)*|[^\W_0-9]+")
"""Matches letters or a number; numbers are content in the answer to a problem. An apostrophe splits a word."""

_LISTED = """
a about above after again against all also am an and any are as at be because been before being below between both but
by can could d did do does doing don down during each few for from further get gets got had has have having he her
here hers him his how i if in into is it its itself just let like ll m may me might more most must my no nor not now
of off on once one only or other our ours out over own re s same shall she should so some such t than that the their
theirs them then there these they this those through thus to too under until up upon us ve very was we were what when
where which while who whom whose why will with would you your yours
"""
STOP_WORDS = frozenset(_LISTED.split())
"""English function words, and the parts that an apostrophe splits them into; "one" is included, "1" is not."""


def all_words(text: str, *, begun: bool = False) -> frozenset[str]:
    """Returns the lowercased words of a text between white space, with the punctuation that they carry.

    The paper speaks of content words and does not define them. This rule comes close to the four similarities that it
    prints (tests/paper_words.json). Lists of stop words come less close.

    Args:
        begun: the text continues another one, so a text that begins without white space begins inside a word, which
            does not count.
    """
    words = text.lower().split()
    return frozenset(words[1:] if begun and not text[:1].isspace() else words)


def content_words(text: str, *, begun: bool = False) -> frozenset[str]:
    """Returns the lowercased words of a text that are not stop words.

    Args:
        begun: the text continues another one, so its first letters may be the end of a word and do not count.
    """
    words = WORD.finditer(text.lower())
    return frozenset(word[0] for word in words if not (begun and word.start() == 0)) - STOP_WORDS


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """Returns the words in both over the words in either, 0 to 1; 1 for two empty sets, which do not differ."""
    union = first | second
    return len(first & second) / len(union) if union else 1.0
