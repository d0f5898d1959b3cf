"""Rewards: a verifier that hangs, dies, raises or returns nonsense costs its own answer and nothing else."""

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rhythm_kernels.tasks import VERIFIERS, Problem
from rhythm_kernels.tasks.choice import from_row as choice_problem
from rhythm_kernels.tasks.countdown import from_row as countdown_problem
from rhythm_kernels.tasks.maths import from_row as maths_problem
from rhythm_kernels.tasks.words import Puzzle
from train.rewards import Rewards, Score, count_errors, describe_errors

MATHS = maths_problem("What is 2 + 3?", "5")


def loop_forever(completion, answer):
    while True:
        pass


def loop_in_c(completion, answer):
    return sum(itertools.repeat(0))  # never returns to Python, where a signal could be handled


def leave(completion, answer):
    os._exit(7)


def raise_error(completion, answer):
    raise KeyError(completion)


def return_nan(completion, answer):
    return float("nan")


def return_text(completion, answer):
    return "full marks"


def eat_memory(completion, answer):
    return len(bytearray(5 << 30))  # untouched pages: nothing but the limit objects


def raise_unspeakable(completion, answer):
    class Unspeakable(Exception):
        def __str__(self):
            raise RuntimeError

    raise Unspeakable


def torch_is_loaded(completion, answer):
    return float("torch" in sys.modules)


def end_by_a_signal_once(completion, answer):
    if not os.path.exists(answer):
        Path(answer).touch()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    return 1.0


@pytest.fixture(scope="module")
def rewards():
    with Rewards(workers=2, timeout=2.0) as rewards:
        yield rewards


@pytest.mark.parametrize(
    "verifier, error",
    [
        (loop_forever, "timed out"),
        pytest.param(loop_in_c, "timed out", marks=pytest.mark.slow),
        (leave, "worker died: exit code 7"),
        (raise_error, "KeyError: 'text'"),
        (return_nan, "ValueError: the verifier returned nan"),
        (return_text, "ValueError: could not convert string to float: 'full marks'"),
        (eat_memory, "MemoryError: "),
        (raise_unspeakable, "Unspeakable"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_failure_costs_its_own_answer_only(rewards, monkeypatch, verifier, error):
    monkeypatch.setitem(VERIFIERS, "bad", verifier)
    bad, began = Problem("", "", "bad"), time.monotonic()
    scores = rewards.score([r"\boxed{5}", "text", r"\boxed{6}", r"\boxed{5}"], [MATHS, bad, MATHS, MATHS])
    assert scores == [Score(1.0), Score(0.0, error), Score(0.0), Score(1.0)]
    assert count_errors(scores) == 1 and describe_errors(scores) == f"{error} (1)"
    assert time.monotonic() - began < 30


def test_a_signal_to_the_whole_job_costs_no_answer(rewards, monkeypatch, tmp_path):
    monkeypatch.setitem(VERIFIERS, "ended", end_by_a_signal_once)
    problems = [MATHS, Problem("", str(tmp_path / "there"), "ended"), MATHS]
    assert rewards.score([r"\boxed{5}", "", r"\boxed{6}"], problems) == [Score(1.0), Score(1.0), Score(0.0)]


def test_reasons_of_errors_are_counted():
    scores = [Score(0.0, "timed out"), Score(1.0), Score(0.0, "MemoryError: "), Score(0.0, "timed out")]
    assert describe_errors(scores) == "timed out (2), MemoryError:  (1)"
    assert describe_errors([Score(1.0), Score(0.0)]) == ""


def test_workers_load_no_torch(rewards, monkeypatch):
    monkeypatch.setitem(VERIFIERS, "torch", torch_is_loaded)
    assert rewards.score([""], [Problem("", "", "torch")]) == [Score(0.0)]


def test_tasks_and_rewards_import_without_torch():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import rhythm_kernels.tasks.sets, train.rewards\n"
        "rhythm_kernels.tasks.sets.load_set('countdown-test')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_bounded_verifiers_need_no_process():
    before = multiprocessing.active_children()
    problems = [
        Puzzle((1, 7, 10), 2).problem,
        countdown_problem([7, 1, 10], 2),
        choice_problem("Which?\nA. this\nB. that", "B"),
    ]
    with Rewards(workers=1, timeout=1.0) as rewards:
        right = rewards.score(["A 10 - 1 - 7", "<answer>10-1-7</answer>", r"\boxed{B}"], problems)
        wrong = rewards.score(["A 10 + 1 - 7", "<answer>10-7</answer>", r"\boxed{A}"], problems)
        assert multiprocessing.active_children() == before
    assert right == [Score(1.0)] * 3 and wrong == [Score(0.0)] * 3


def test_exception_of_a_bounded_verifier_is_an_error(monkeypatch):
    monkeypatch.setitem(VERIFIERS, "words", raise_error)
    with Rewards(workers=1, timeout=1.0) as rewards:
        assert rewards.score(["text"], [Puzzle((1,), 1).problem]) == [Score(0.0, "KeyError: 'text'")]


def test_workers_killed_between_batches_are_replaced():
    with Rewards(workers=1, timeout=5.0) as rewards:
        others = set(multiprocessing.active_children())
        assert rewards.score([r"\boxed{5}"], [MATHS]) == [Score(1.0)]
        for process in set(multiprocessing.active_children()) - others:
            os.kill(process.pid, signal.SIGKILL)
        assert rewards.score([r"\boxed{5}", r"\boxed{6}"], [MATHS] * 2) == [Score(1.0), Score(0.0)]
        mine = set(multiprocessing.active_children()) - others
    assert mine and not mine & set(multiprocessing.active_children())


def test_order_and_progress_of_many(rewards):
    texts = [rf"so \boxed{{{number}}}" for number in range(40)]
    problems = [maths_problem("?", number if number % 2 else number + 1) for number in range(40)]
    counts = []
    scores = rewards.score(texts, problems, progress=counts.append)
    assert [score.reward for score in scores] == [float(number % 2) for number in range(40)]
    assert sum(counts) == 40


def test_wrong_calls_are_refused():
    with Rewards(workers=1, timeout=1.0) as rewards:
        with pytest.raises(ValueError, match="got 1 texts and 0 problems"):
            rewards.score(["text"], [])
        with pytest.raises(ValueError, match="got 'chess'"):
            rewards.score(["text"], [Problem("", "", "chess")])
        assert rewards.score([], []) == []
    with pytest.raises(ValueError, match="got 0 and 1.0"):
        Rewards(workers=0, timeout=1.0)


NASTY = {
    "tower of powers": "9^{9^{9^9}}",
    "huge power": "10^{10^{10}}",
    "huge factorial": "100000000!",
    "many digits": "1" * 1900,
    "open parentheses": "(" * 900,
    "deep braces": "{" * 900 + "}" * 900,
    "deep roots": r"\sqrt{" * 300 + "5" + "}" * 300,
    "long product": r"\prod_{i=1}^{10^9} i",
    "integral": r"\int_0^{10^9} e^{x^{x}} dx",
    "wide matrix": r"\begin{pmatrix}" + "1&" * 500 + r"1\end{pmatrix}",
    "emoji": "\\text{\N{GRINNING FACE}} \ud83d",
    "code": "__import__('os')._exit(1)",
    "nul": "\0" * 100,
}


def test_nasty_maths_ends_in_time(rewards):
    began = time.monotonic()
    scores = rewards.score([rf"\boxed{{{text}}}" for text in NASTY.values()], [MATHS] * len(NASTY))
    assert scores == [Score(0.0)] * len(NASTY)
    tower = r"\boxed{\sum_{k=1}^{n} 9^{9^{9^9}}}"  # sums go to sympy, which is lost in this one
    assert rewards.score([tower], [maths_problem("?", r"\sum_{k=1}^{n} k")]) == [Score(0.0, "timed out")]
    assert time.monotonic() - began < 90
    assert rewards.score([r"\boxed{5}"], [MATHS]) == [Score(1.0)]


LATEX = st.lists(
    st.sampled_from([*"0159xi+-*/^_={}()[]|,.;%$&!<> ", r"\frac{1}", r"\sqrt", r"\pi", r"\cup", r"\infty", r"\text{"]),
    max_size=30,
).map("".join)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.text(max_size=200), LATEX), min_size=1, max_size=12))
def test_any_maths_gets_a_reward_in_time(rewards, texts):
    began = time.monotonic()
    answer = maths_problem("?", "x^2 + 1").answer
    scores = rewards.score([rf"\boxed{{{text}}}" for text in texts], [Problem("", answer, "maths")] * len(texts))
    assert all(score.reward in (0.0, 1.0) and score.error in (None, "timed out") for score in scores)
    assert time.monotonic() - began < 6 * len(texts) + 10


def test_gold_without_meaning_is_an_error(rewards):
    [score] = rewards.score([r"\boxed{5}"], [Problem("", json.dumps([r"\boxed{}"]), "maths")])
    assert score.reward == 0.0 and "says nothing" in score.error
