"""The tasks' problems and verifiers: right on right and wrong answers, unmoved by whatever else a model writes."""

import hashlib
import json
import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from train_cases import ALONE
from transformers import AutoTokenizer

from rhythm_kernels.tasks import VERIFIERS, Problem, choice, countdown, maths
from rhythm_kernels.tasks.expression import LONGEST_EXPRESSION, evaluate, split_words
from rhythm_kernels.tasks.types import LONGEST_BOX, UnusableRow, last_boxed
from rhythm_kernels.tasks.words import Puzzle
from train.config import RunError, Words
from train.presets import PRESETS, load_preset
from train.supervise import VERSION, warm_start, warm_start_path
from train.words import LARGEST_NUMBER, SIGNS, attempts, build_tokenizer, demonstrate, split_problems

PUZZLE = Puzzle((1, 7, 10), 2)


def reward(problem: Problem, completion: str) -> float:
    return VERIFIERS[problem.verifier](completion, problem.answer)


def words_reward(completion: str, numbers=PUZZLE.numbers, target=PUZZLE.target) -> float:
    return reward(Puzzle(numbers, target).problem, completion)


def countdown_reward(answer: str) -> float:
    return reward(countdown.from_row([10, 1, 7], 2), f"<think>10 - 7 is 3</think>\n<answer>{answer}</answer>")


def test_puzzle_and_problem_are_the_same():
    assert PUZZLE.problem.prompt == "1 7 10 ? 2 >" and Puzzle.of(PUZZLE.problem) == PUZZLE


OF_WORDS = {name: load_preset(name).words for name in PRESETS if load_preset(name).data.train_data == "words"}


@pytest.mark.parametrize(
    "preset",
    [pytest.param(name, marks=pytest.mark.slow) if task.numbers > 3 else name for name, task in OF_WORDS.items()],
)
def test_no_number_multiset_is_on_both_sides(preset):
    task = load_preset(preset).words
    split = split_problems(task)
    train, held_out = ([Puzzle.of(problem) for problem in side] for side in split)
    assert len(set(held_out)) == len(held_out) == task.held_out
    assert len(set(train)) == len(train)
    assert {tuple(sorted(p.numbers)) for p in train}.isdisjoint(tuple(sorted(p.numbers)) for p in held_out)


def test_default_task_holds_out_enough():
    assert load_preset("countdown-tiny").words.held_out >= 1024


def test_problems_of_several_lengths_are_as_many_of_each():
    task = Words(numbers=3, fewest_numbers=2, largest=12, held_out=101, held_out_pool=2)
    split = split_problems(task)
    train, held_out = (Counter(len(Puzzle.of(problem).numbers) for problem in side) for side in split)
    assert held_out == {2: 50, 3: 51}
    assert set(train) == {2, 3} and train[3] == pytest.approx(train[2], rel=0.35)
    longer = Counter(Puzzle.of(problem).numbers for problem in split.train if len(Puzzle.of(problem).numbers) == 3)
    shorter = Counter(Puzzle.of(problem).numbers for problem in split.train if len(Puzzle.of(problem).numbers) == 2)
    assert max(longer.values()) <= max(shorter.values())  # targets of a multiset


def test_split_repeats():
    assert split_problems(Words()) == split_problems(Words())


def test_impossible_split_names_the_flag():
    with pytest.raises(ValueError, match="--held-out 5000"):
        split_problems(Words(largest=4, held_out=5000))


def test_attempts_by_hand():
    steps = {attempt.steps: attempt.value for attempt in attempts((2, 3), "+-*")}
    assert steps == {"3 + 2 = 5": 5, "3 - 2 = 1": 1, "3 * 2 = 6": 6}
    assert [a.steps for a in attempts((50, 60), "+-*/")] == ["60 - 50 = 10"]  # the others leave the tokens
    assert {a.expression for a in attempts((2, 2, 8), "/")} == {"( 8 / 2 ) / 2", "8 / ( 2 / 2 )"}


def test_attempts_stay_within_the_vocabulary():
    for numbers in [(13, 17, 20), (1, 1, 1), (2, 5, 9, 20)]:
        for attempt in attempts(numbers, "+-*/"):
            assert all(int(word) <= LARGEST_NUMBER for word in attempt.steps.split() if word.isdigit())


def test_demonstrations_are_right_unless_they_give_up():
    config, draw = load_preset("countdown-tiny"), random.Random(0)
    for problem in draw.sample(split_problems(config.words).train, 300):
        text = demonstrate(problem, config.words, draw)
        assert reward(problem, text) == ("!" in text)
        assert text.count("!") <= 1 and ("!" in text or "x A" in text)


def test_demonstrations_follow_their_odds():
    task, draw = Words(), random.Random(0)
    problem = split_problems(task).train[0]
    only_two = {"odds": (0.0, 0.0, 1.0), "give_up": 0.0}
    assert all(demonstrate(problem, task, draw, **only_two).count("x") == 2 for _ in range(20))
    always = {"odds": (0.0, 1.0), "give_up": 1.0}
    assert all("!" not in demonstrate(problem, task, draw, **always) for _ in range(20))


def test_a_warm_start_is_kept_under_its_settings_and_the_version_of_its_code(monkeypatch):
    """Comments and names of the code do not count: no file is read."""
    config = load_preset("countdown-smoke")
    paths = [warm_start_path(config, 0), warm_start_path(config, 1), warm_start_path(config.change(sft_steps=3), 0)]
    monkeypatch.setattr("builtins.open", None)
    monkeypatch.setattr("io.open", None)
    assert warm_start_path(config, 0) == paths[0]
    monkeypatch.setattr("train.supervise.VERSION", VERSION + 1)
    assert len({*paths, warm_start_path(config, 0)}) == 4


def test_a_warm_start_knows_what_is_held_out_and_not_how_its_attention_runs(tmp_path):
    """Its problems are those that are not evaluated on; a run may go on with another attention."""
    config, held_out = load_preset("countdown-smoke"), tmp_path / "held-out.jsonl"
    held_out.write_text('{"numbers": [1, 7, 10], "target": 2}\n')
    evaluated = config.change(eval_data=(f"words:{held_out}",))
    paths = [warm_start_path(config, 0), warm_start_path(evaluated, 0)]
    held_out.write_text('{"numbers": [1, 7, 10], "target": 3}\n')
    assert len({*paths, warm_start_path(evaluated, 0)}) == 3
    for changes in ({"attention": "sdpa"}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"}):
        assert warm_start_path(config.change(**changes), 0) == paths[0]
    absent = [config.change(eval_data=(name,)) for name in ("words:absent.jsonl", "absent")]
    assert all(warm_start_path(one, 0) for one in absent)


def test_a_warm_start_that_diverges_is_not_kept(tmp_path, monkeypatch):
    def diverge(model, *_) -> float:
        model.model.norm.weight.data[0] = torch.nan
        return 1.0

    monkeypatch.setattr("train.supervise.supervise", diverge)
    config = load_preset("countdown-smoke").change(cache=str(tmp_path))
    with pytest.raises(RunError, match="diverged, with NaN or infinity in model.norm.weight: --sft-learning-rate is"):
        warm_start(config, 0, split_problems(config.words).train, ALONE)
    assert not list(tmp_path.glob("*/model.safetensors"))


def test_demonstrations_are_those_of_the_version():
    """Where other demonstrations are meant: raise VERSION in train/supervise.py, and change both numbers here."""
    config, draw = load_preset("countdown-tiny"), random.Random(0)
    problems = draw.sample(split_problems(config.words).train, 300)
    texts = [f"{problem.prompt} {demonstrate(problem, config.words, draw)}" for problem in problems]
    assert (VERSION, hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]) == (1, "07341c1697bc89ab")


@pytest.mark.parametrize("preset", ["countdown-tiny", "countdown-smoke"])
def test_every_word_is_one_token(preset):
    config, tokenizer, draw = load_preset(preset), build_tokenizer(), random.Random(0)
    for problem in draw.choices(split_problems(config.words).train, k=300):
        text = f"{problem.prompt} {demonstrate(problem, config.words, draw)}"
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and len(ids) == len(text.split())
        # the prompt, the answer and its end of sequence fit the context
        assert len(ids) + 1 <= config.words.numbers + 3 + config.rollout.max_completion_length
    assert tokenizer.unk_token_id is None


def test_tokenizer_comes_back_from_its_folder(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "1 7 10 ? 2 > 10 - 1 = 9 , 9 - 7 = 2 ! A ( 10 - 1 ) - 7"
    assert loaded.encode(text) == tokenizer.encode(text) and loaded.decode(loaded.encode(text)) == text
    assert (loaded.pad_token, loaded.eos_token, loaded.padding_side) == ("<pad>", "<eos>", "left")
    assert len(loaded) == len(tokenizer)


@pytest.mark.parametrize(
    "answer",
    ["( 10 - 1 ) - 7", "10 - 1 - 7", "10 - ( 1 + 7 )", "((10)-(7))-1", "  10-7-1  ", "( ( ( 10 - 1 - 7 ) ) )"],
)
def test_right_expressions(answer):
    assert words_reward(f"10 + 1 = 11 , 11 + 7 = 18 x 10 - 1 = 9 , 9 - 7 = 2 ! A {answer}") == 1.0
    assert countdown_reward(answer) == 1.0


WRONG_EXPRESSIONS = [
    pytest.param("10 - 7", id="a number left out"),
    pytest.param("10 - 7 - 1 + 1 - 1", id="a number used twice"),
    pytest.param("10 - 9 + 1", id="a number not given"),
    pytest.param("10 + 7 + 1", id="misses the target"),
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
]


@pytest.mark.parametrize("answer", WRONG_EXPRESSIONS)
def test_wrong_expressions(answer):
    assert words_reward(f"A {answer}") == 0.0
    assert countdown_reward(answer) == 0.0


@pytest.mark.parametrize("completion", ["10 - 1 - 7", "", "A 10 - 1 - 7 A 10 - 1 - 7", "A 10 - 1 - 7 = 2"])
def test_words_want_one_bare_expression(completion):
    assert words_reward(completion) == 0.0


@pytest.mark.parametrize(
    "completion, right",
    [
        ("<answer>10 - 1 - 7 = 2</answer>", True),
        ("<answer>10 - 1 - 7 = 02 \n</answer>", True),
        ("<answer>10</answer> no: <answer>10-1-7</answer> done", True),
        ("<answer>10-1-7</answer> and <answer>", True),
        ("<answer>10-1-7</answer> no: <answer>10</answer>", False),
        ("<answer>10 - 1 - 7 = 3</answer>", False),
        ("<answer>10 - 1 - 7 = 2 = 2</answer>", False),
        ("<answer>2 = 10 - 1 - 7</answer>", False),
        ("<answer>10 - 1 - 7 = two</answer>", False),
        ("<answer>so 10 - 1 - 7</answer>", False),
        ("10 - 1 - 7", False),
        ("</answer>10 - 1 - 7<answer>", False),
        ("<answer>10 - 1 - 7", False),
    ],
)
def test_countdown_reads_the_last_answer(completion, right):
    assert reward(countdown.from_row([10, 1, 7], 2), completion) == float(right)


def test_division_is_exact_and_never_by_zero():
    assert words_reward("A 7 / 2 * 4", (2, 4, 7), 14) == 1.0
    assert words_reward("A 7 / 2 * 4", (2, 4, 7), 12) == 0.0
    assert words_reward("A 7 / ( 2 - 2 )", (2, 2, 7), 0) == 0.0


def test_precedence_and_associativity():
    assert evaluate(split_words("2 + 3 * 4 - 8 / 4 / 2")) == 13
    assert evaluate(split_words("20 - 5 - 3")) == 12
    assert evaluate(split_words("( 2 + 3 ) * 4")) == 20


@pytest.mark.parametrize(
    "flood",
    ["(" * 10**5, "1" * 10**6, "1 + " * 10**5 + "1", ")" * 10**5, " " * 10**5, "{" * 10**5, r"\boxed{" * 10**5],
    ids=lambda text: text[:7],
)
def test_floods_are_wrong_at_once(flood):
    assert words_reward("A" + flood) == countdown_reward(flood) == 0.0
    assert reward(choice.from_row("Which?\nA. this\nB. that", "B"), rf"\boxed{{{flood}}}") == 0.0


def test_longest_expression_is_read():
    terms = (LONGEST_EXPRESSION + 1) // 2
    assert words_reward("A " + " + ".join(["1"] * terms), (1,) * terms, terms) == 1.0
    assert words_reward("A " + " + ".join(["1"] * (terms + 1)), (1,) * (terms + 1), terms + 1) == 0.0


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
    for attempt in attempts(numbers, Words().operators)[:50]:
        assert words_reward(f"A {attempt.expression}", numbers, attempt.value) == 1.0
        assert words_reward(f"A {attempt.expression}", numbers, attempt.value + 1) == 0.0


def test_generated_countdown_is_solvable_and_distinct():
    rows = list(countdown.generate_rows(300, seed=1))
    assert len({(*sorted(row["nums"]), row["target"]) for row in rows}) == 300
    assert list(countdown.generate_rows(300, seed=1)) == rows != list(countdown.generate_rows(300, seed=2))
    for row in rows[:25]:
        assert row["target"] in countdown.TARGETS and is_solvable(row["nums"], row["target"])


def is_solvable(values, target) -> bool:
    """By trying everything; independent of how the problem was made."""
    if len(values) == 1:
        return abs(values[0] - target) < 1e-9
    for i, j in ((i, j) for i in range(len(values)) for j in range(len(values)) if i != j):
        rest = [value for index, value in enumerate(values) if index not in (i, j)]
        a, b = values[i], values[j]
        if any(is_solvable([*rest, value], target) for value in (a + b, a - b, a * b, *([a / b] if b else []))):
            return True
    return False


OPTIONS = "What is the capital?\nA. Rome\n(B) Oslo\nC. Bonn."


@pytest.mark.parametrize(
    "boxed",
    [
        "B",
        "(B)",
        "B.",
        "b",
        r"\text{B}",
        r"\textbf{(B)}",
        "$B$",
        "B. Oslo",
        "(B) oslo",
        r"\text{B) Oslo.}",
        "Oslo",
        "OSLO",
    ],
)
def test_right_choices(boxed):
    assert reward(choice.from_row(OPTIONS, "B"), rf"\boxed{{A}}, no: \boxed{{{boxed}}}.") == 1.0
    assert reward(choice.from_row(OPTIONS, "Oslo"), rf"\boxed{{{boxed}}}") == 1.0


@pytest.mark.parametrize("boxed", ["A", "(C)", "B. Rome", "A. Oslo", "BB", "A or B", "Rome", "", "Oslo Rome"])
def test_wrong_choices(boxed):
    assert reward(choice.from_row(OPTIONS, "B"), rf"\boxed{{B}}, no: \boxed{{{boxed}}}") == 0.0


@pytest.mark.parametrize("answer", ["$x$ {", "} or {", "$$", "w" * 2001])
def test_choice_that_nothing_earns_is_left_out(answer):
    with pytest.raises(UnusableRow, match="the answer"):
        choice.from_row("Who?", answer)


def test_choice_without_options_compares_the_words():
    problem = choice.from_row("Who found radium?", "Marie Curie")
    assert "the answer, and nothing else," in problem.prompt
    assert reward(problem, r"\boxed{\text{marie  curie}}") == 1.0
    assert reward(problem, r"\boxed{Pierre Curie}") == 0.0 == reward(problem, "Marie Curie")
    assert reward(choice.from_row("Which vitamin?", "B"), r"\boxed{B}") == 1.0


def test_letter_counts_where_its_option_is_not_read():
    problem = choice.from_row("Which?\nA. this\nB - that", "B")
    assert reward(problem, r"\boxed{(B)}") == 1.0 and reward(problem, r"\boxed{A}") == 0.0


def test_choice_whose_options_are_letters():
    problem = choice.from_row("Which vitamin?", "B", ["D", "A"])  # the letter wins: option B is vitamin A
    assert json.loads(problem.answer) == {"letter": "B", "text": "A"}
    assert reward(problem, r"\boxed{B}") == 1.0 and reward(problem, r"\boxed{A}") == 0.0


@pytest.mark.parametrize(
    "gold, given",
    [
        ("5", "5"),
        ("033", "33"),
        ("27.0", "27"),
        (r"\frac{1}{2}", "0.5"),
        (r"$\frac{1}{2n+2}$", r"\dfrac{1}{2(n+1)}"),
        (["x=1", "x=2"], "2"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"\left(3, \frac{\pi}{2}\right)", r"(3, \pi/2)"),
        ("[-2,7]", r"x \in [-2,7]"),
        ("5", "5.00"),
    ],
)
def test_right_maths(gold, given):
    problem = maths.from_row("Find it.", gold)
    assert reward(problem, rf"First \boxed{{-1}}, then \boxed{{{given}}}.") == 1.0


@pytest.mark.parametrize(
    "gold, completion",
    [
        ("5", r"\boxed{6}"),
        ("5", "The answer is 5"),
        ("5", r"\boxed{5} or rather \boxed{6}"),
        ("5", r"\boxed{5, 6}"),
        ("5", r"\boxed{}"),
        ("5", r"\boxed{5"),
        ("(1, 2)", r"\boxed{(2, 1)}"),
    ],
)
def test_wrong_maths(gold, completion):
    assert reward(maths.from_row("Find it.", gold), completion) == 0.0


def test_parts_of_an_answer_are_all_wanted():
    problem = maths.from_row_of_parts("Solve.", ["$x=1$", "$x=2$"])
    assert reward(problem, r"\boxed{2, 1}") == reward(problem, r"\boxed{x = 1, x = 2}") == 1.0
    assert reward(problem, r"\boxed{1}") == reward(problem, r"\boxed{1, 2, 3}") == 0.0


@pytest.mark.parametrize(
    "text, content",
    [
        (r"\boxed{5}", "5"),
        (r"\boxed{\frac{1}{2}} is it", r"\frac{1}{2}"),
        (r"\boxed{1} \boxed{ 2 }", "2"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{5", None),
        (r"\boxed 5", "5"),
        (r"\boxed -12.", "-12"),
        (r"\boxed {5}", "5"),
        (r"\boxed{4}, no: \fbox{5}", "5"),
        (r"\boxed", None),
        (r"\boxed \quad", None),
        (r"\boxed{5\}", None),
        ("5", None),
        (r"\boxed{" + "1" * LONGEST_BOX + "}", "1" * LONGEST_BOX),
        (r"\boxed{" + "1" * (LONGEST_BOX + 1) + "}", None),
    ],
    ids=lambda value: str(value)[:24],
)
def test_last_box(text, content):
    assert last_boxed(text) == content


PIECES = st.sampled_from(
    [*SIGNS, "0", "1", "7", "10", "<answer>", "</answer>", r"\boxed{", "}", "{", "\\", "$", r"\text{"]
)


@given(st.one_of(st.text(), st.lists(PIECES, max_size=40).map(" ".join)))
def test_any_text_gets_a_reward(text):
    problems = [
        PUZZLE.problem,
        countdown.from_row([10, 1, 7], 2),
        choice.from_row(OPTIONS, "B"),
        choice.from_row("Who?", "$x$ {}"),
    ]
    for problem in problems:
        for completion in (text, f"A{text}", f"<answer>{text}</answer>", rf"\boxed{{{text}}}"):
            assert reward(problem, completion) in (0.0, 1.0)
