"""The verifier: right on right and wrong answers, and unmoved by whatever else a model writes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.config import Task
from train.data import SIGNS, attempts
from train.rewards import LONGEST_ANSWER, countdown_reward, evaluate, split_words

NUMBERS, TARGET = (1, 7, 10), 2


@pytest.mark.parametrize(
    "answer",
    ["( 10 - 1 ) - 7", "10 - 1 - 7", "10 - ( 1 + 7 )", "((10)-(7))-1", "  10-7-1  ", "( ( ( 10 - 1 - 7 ) ) )"],
)
def test_right_answers(answer):
    assert countdown_reward(f"10 + 1 = 11 , 11 + 7 = 18 x 10 - 1 = 9 , 9 - 7 = 2 ! A {answer}", NUMBERS, TARGET) == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param("10 - 7", id="a number left out"),
        pytest.param("10 - 7 - 1 + 1 - 1", id="a number used twice"),
        pytest.param("10 - 9 + 1", id="a number not given"),
        pytest.param("10 + 7 + 1", id="misses the target"),
        pytest.param("10 - 1 - 7 = 2", id="an equation"),
        pytest.param("10 - 1 - 7 A 10 - 1 - 7", id="two answers"),
        pytest.param("10 - 1 - 7 x", id="a word behind"),
        pytest.param("( 10 - 1 - 7", id="unclosed"),
        pytest.param("10 - 1 - 7 )", id="unopened"),
        pytest.param("10 1 - - 7", id="postfix"),
        pytest.param("- 7 - 1 + 10", id="unary minus"),
        pytest.param("10 - 1 - 7 -", id="open end"),
        pytest.param("10 - () 1 - 7", id="empty parentheses"),
        pytest.param("10 - ( 1 + 7", id="half open"),
        pytest.param("1 0 - 1 - 7", id="digits apart"),
        pytest.param("10 - 1 - ７", id="a digit of another script"),
        pytest.param("__import__('os').getcwd()", id="code"),
        pytest.param("10 ** 7 ** 1", id="a power"),
        pytest.param("", id="empty"),
    ],
)
def test_wrong_answers(answer):
    assert countdown_reward(f"A {answer}", NUMBERS, TARGET) == 0.0


def test_no_answer_scores_nothing():
    assert countdown_reward("10 - 1 - 7", NUMBERS, TARGET) == 0.0
    assert countdown_reward("", NUMBERS, TARGET) == 0.0


def test_division_is_exact_and_never_by_zero():
    assert countdown_reward("A 7 / 2 * 4", (2, 4, 7), 14) == 1.0
    assert countdown_reward("A 7 / 2 * 4", (2, 4, 7), 12) == 0.0
    assert countdown_reward("A 7 / ( 2 - 2 )", (2, 2, 7), 0) == 0.0


def test_precedence_and_associativity():
    assert evaluate(split_words("2 + 3 * 4 - 8 / 4 / 2")) == 13
    assert evaluate(split_words("20 - 5 - 3")) == 12
    assert evaluate(split_words("( 2 + 3 ) * 4")) == 20


@pytest.mark.parametrize("answer", ["(" * 10**5, "1" * 10**6, "1 + " * 10**5 + "1", ")" * 10**5, " " * 10**5])
def test_floods_are_wrong_at_once(answer):
    assert countdown_reward("A" + answer, NUMBERS, TARGET) == 0.0


def test_longest_answer_is_read():
    terms = (LONGEST_ANSWER + 1) // 2
    assert countdown_reward("A " + " + ".join(["1"] * terms), (1,) * terms, terms) == 1.0
    assert countdown_reward("A " + " + ".join(["1"] * (terms + 1)), (1,) * (terms + 1), terms + 1) == 0.0


@given(st.text())
def test_any_text_gets_a_reward(text):
    assert countdown_reward("A" + text, NUMBERS, TARGET) in (0.0, 1.0)


@given(st.lists(st.sampled_from([*SIGNS, "0", "1", "7", "10"]), max_size=40))
def test_any_words_get_a_reward(words):
    assert countdown_reward(" ".join(words), NUMBERS, TARGET) in (0.0, 1.0)


@given(st.lists(st.sampled_from(["+", "-", "*", "/", "(", ")", "1", "7", "10"]), max_size=12))
def test_values_are_those_of_arithmetic(words):
    """Where Python's own parser accepts the words, with no unary sign, power or call in them, both agree."""
    text = " ".join(words)
    value = evaluate(words) if words else None
    try:
        expected = eval(text, {"__builtins__": {}})  # nothing but the words above
    except (SyntaxError, TypeError, ZeroDivisionError):
        assert value is None
    else:
        if value is not None:
            assert float(value) == pytest.approx(expected)


@given(st.lists(st.integers(1, 20), min_size=2, max_size=4))
def test_every_attempt_is_verified_at_its_value(numbers):
    numbers = tuple(sorted(numbers))
    for attempt in attempts(numbers, Task().operators)[:50]:
        assert countdown_reward(f"A {attempt.expression}", numbers, attempt.value) == 1.0
        assert countdown_reward(f"A {attempt.expression}", numbers, attempt.value + 1) == 0.0
