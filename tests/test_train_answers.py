"""Answers to maths by kind: what is right pays, however it is written, and what is wrong does not."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rhythm_kernels.tasks import answers, formula, maths
from rhythm_kernels.tasks.forms import normalise
from rhythm_kernels.tasks.types import UnusableRow


def read_pairs():
    kind = ""
    for line in (Path(__file__).parent / "answers.txt").read_text(encoding="utf-8").splitlines()[1:]:
        if line.startswith("# "):
            kind = line[2:]
        elif line:
            sign, pair = line.split(" ", 1)
            gold, answer = pair.split(" ~~ ")
            yield pytest.param(gold, answer, sign == "=", id=f"{kind}: {pair}".encode("ascii", "replace").decode())


PAIRS = list(read_pairs())
GOLDS = list(dict.fromkeys(pair.values[0] for pair in PAIRS))


def pays(gold: str, answer: str) -> bool:
    return maths.verify(rf"So \boxed{{{answer}}}.", json.dumps([gold])) == 1.0


@pytest.mark.parametrize("gold, answer, is_right", PAIRS)
def test_pair(gold, answer, is_right):
    assert pays(gold, answer) == is_right


def test_every_gold_of_the_table_can_be_earned():
    for gold in GOLDS:
        maths.from_row("Find it.", gold)


@pytest.mark.parametrize("letter", ["x", "k", "A", r"\theta "])
def test_shifted_formulas_are_wrong(letter):
    """A formula and the same one plus a little, however small the formula is."""
    for shape in ("@", "2@+1", r"\frac{1}{@}", r"\sqrt{@}", "10^{-30} @", "e^{@}", "@^3-@"):
        text = shape.replace("@", letter)
        for other in (text, f"{text} + 0", f"2({text}) - ({text})"):
            assert pays(text, other)
        for other in (f"{text} + 10^{{-40}}", f"-({text})", f"1.000001({text})"):
            assert not pays(text, other)


@settings(deadline=None)
@given(st.fractions(), st.fractions())
def test_fractions_are_compared_exactly(one, other):
    def write(value):
        return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"

    assert pays(str(one), write(one)) and pays(write(one), f"-{write(-one)}".replace("--", ""))
    assert pays(write(one), write(other)) == (one == other)


@settings(deadline=None)
@given(st.decimals(-(10**9), 10**9, places=6), st.integers(-9, 9))
def test_decimals_are_compared_exactly(value, shift):
    gold, other = format(value, "f"), format(value + shift, "f")
    assert pays(gold, other) == (shift == 0)
    assert pays(gold, rf"{gold} \cdot 10^0") and pays(gold, f"{gold}0")


@settings(deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=2, max_size=6), st.randoms())
def test_order_counts_in_tuples_and_not_in_lists(numbers, draw):
    shuffled = draw.sample(numbers, len(numbers))
    gold, given = (", ".join(map(str, each)) for each in (numbers, shuffled))
    assert pays(gold, given) and pays(rf"\{{{gold}\}}", rf"\{{{given}\}}")
    assert pays(f"({gold})", f"({given})") == (numbers == shuffled)
    assert not pays(f"({gold})", gold) and not pays(gold, f"({gold})")


@settings(deadline=None)
@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz", min_size=4, max_size=9), st.randoms())
def test_anagrams_are_wrong(word, draw):
    other = "".join(draw.sample(word, len(word)))
    for template in ("@", r"\text{@}", "n is @", r"n \text{ is @}", "@, @"):
        gold, given = (template.replace("@", each) for each in (word, other))
        assert pays(gold, given) == (word == other)


@pytest.mark.parametrize(
    "words", [(r"\text{ one}", r"\text{ two}"), (r"\mathrm{ left}", r"\mathrm{ right}"), ("+1", "")], ids=str
)
@pytest.mark.parametrize("head", ["n", "x^2", "3", r"\frac{1}{2}", "(1, 2)", "x = 4"])
def test_what_follows_a_formula_counts(head, words):
    assert not pays(f"{head}{words[0]}", f"{head}{words[1]}")


@pytest.mark.parametrize(
    "text",
    [
        "9^{9^{9^9}}",
        "10^{10^{10}}",
        "100000000!",
        r"\binom{10^9}{10^8}",
        r"\sin(10^{10^{9}})",
        r"\lfloor 10^{10^{9}} \rfloor",
        "1" * 1900,
        "0." + "1" * 1900,
        "1e999999999",
        "1e-999999999",
        "x^{" * 300 + "x" + "}" * 300,
        "(" * 900 + ")" * 900,
        r"\sqrt{" * 300 + "5" + "}" * 300,
        "1,2," * 450,
        "(" + "1,2," * 450 + "3)",
        r"\{" + "1,2," * 450 + r"3\}",
        r"\frac1" * 300,
        "|" * 1000,
        "**" * 900,
        "$" * 1900,
        r"\text{" * 300,
        r"\pm" * 300 + "1",
        "x!" * 500,
        r"f(" * 300 + "1" + ")" * 300,
        "a_{" * 300 + "1" + "}" * 300,
        " " * 1900,
        "5 " + "a " * 900,
        r"\begin{pmatrix}" + "1&" * 500 + r"1\end{pmatrix}",
        r"\left(" * 300 + r"\right)" * 300,
        "5 cm" + "^2" * 500,
        "A" * 1000 + "! = 5",
        "x_1, " * 300 + "? = 5",
        "x = " * 400 + "5 = 4",
        "6 = " * 400 + "5",
        "1 " + "a" * 1900 + "?",
        "," * 1900,
        "(mod " * 300,
        r"\text{a} " * 200 + "5?",
        "5 " + r"\text{cm} " * 150 + "?",
        r"\{" + ",".join(f"x^{index}" for index in range(60)) + r"\}",
        "1:" * 900 + "1",
        "x<" * 600 + "x",
        "A" * 1900,
        "5" + r"\, 000" * 300,
        "0.\\overline{" + "3" * 1800 + "}",
    ],
    ids=lambda text: text[:16],
)
def test_floods_are_compared_at_once(text):
    """Nothing here is left to the clock of the reward workers: what does not end hangs this test."""
    for gold in ("5", "x^2 + 1", "(1, 2)", r"\text{Evelyn}", r"\{1, 2\}", "2^{0.5}"):
        assert not pays(gold, text)
    answers.same(text, text)


SIGNS = (
    r"0 1 5 9 x i n e A + - * / ^ _ = { } ( ) [ ] | , . ; : % $ & ! < > ' \ \frac \frac12 \sqrt \pi \cup \infty \text{"
)
COMMANDS = r"\pm \{ \} \left( \right) cm ^\circ \begin{pmatrix} \end{pmatrix} \\ 10,000 and \approx \leq \in \emptyset"
PIECES = st.sampled_from([" ", *SIGNS.split(" "), *COMMANDS.split(" ")])


@settings(deadline=None)
@given(st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=25).map("".join)), st.sampled_from(GOLDS))
def test_any_text_is_compared_and_equals_itself(text, gold):
    assert answers.same(gold, text) in (True, False) and answers.same(text, gold) in (True, False)
    if normalise(text) and answers.plain(normalise(text)):
        assert answers.same(text, text)


def test_nothing_is_evaluated():
    for code in ("__import__('os')._exit(1)", "exec('1')", "().__class__", "lambda: 5", "5 if 1 else 0"):
        assert not pays("5", code)


def test_reading_fails_on_what_it_does_not_know():
    for text in ("", "1 +", "2 3", r"\unknown{5}", "5 @ 3", r"\frac{1}", "(1", "x^2^3", "3!!", r"1\frac{5}{3}"):
        with pytest.raises(formula.Unread):
            formula.read(text)


@pytest.mark.parametrize(
    "answer, gold",
    [
        (1e-5, "0.00001"),
        (1e16, "10000000000000000"),
        (2.5, "2.5"),
        (-3e-7, "-0.0000003"),
        (12, "12"),
        ("3 apples and 2 pears make 5.\n#### 5", "5"),
        ("It is 1,200. #### 1,200", "1,200"),
        ("#### -3", "-3"),
        (r"So $x = 5$, and the answer is $\boxed{5}$.", "5"),
        ("$5$", "5"),
    ],
)
def test_gold_is_what_can_be_earned(answer, gold):
    problem = maths.from_row("Find it.", answer)
    assert json.loads(problem.answer) == [gold]
    assert maths.verify(rf"\boxed{{{gold}}}", problem.answer) == 1.0


@pytest.mark.parametrize(
    "answer, reason",
    [
        (float("nan"), "the answer nan is no number"),
        (float("-inf"), "the answer -inf is no number"),
        ("NaN", "says nothing"),
        ("?", "says nothing"),
        ("...", "says nothing"),
        ("The work ends here. ####", "the answer after #### is empty"),
        (r"\frac{1}{2", "cannot be earned"),
        ("} 5 {", "cannot be earned"),
        ("1" * 2001, "2001 characters"),
        ("First we add the apples and then we take away the pears that were eaten", "prose of"),
        ("(" * 100_000, "100000 characters"),
        (["5", "?"], "says nothing"),
        ([], "the answer is empty"),
    ],
)
def test_gold_that_nothing_earns_is_left_out(answer, reason):
    with pytest.raises(UnusableRow) as error:
        maths.from_row("Find it.", answer)
    assert reason in str(error.value)


def test_all_parts_are_wanted_with_their_thousands():
    problem = maths.from_row_of_parts("q", ["100", "200"])
    rewards = {text: maths.verify(rf"\boxed{{{text}}}", problem.answer) for text in ("100,200", "200, 100", "100")}
    assert rewards == {"100,200": 1.0, "200, 100": 1.0, "100": 0.0}
