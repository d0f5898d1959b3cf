"""The problems of the studies: task files, sets of the trainer, tasks of reasoning-gym, and which answers are right."""

import json
import re
import sys
from types import SimpleNamespace

import pytest

from rhythm_kernels.analysis.problems import (
    Problem,
    final_answer,
    is_right,
    load_problems,
    paper_prompt,
    read_problems,
)
from rhythm_kernels.analysis.study import Study
from train.words import build_tokenizer

TOKENIZER = build_tokenizer()


# ---- files and their answers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, message",
    [
        (b"{", "line 3: not JSON in UTF-8"),
        (b"\xff", "line 3: not JSON in UTF-8"),
        (b"[" * 100_000, "line 3: not JSON in UTF-8"),
        (b"[1]", "line 3: must be an object, got list"),
        (b'{"text": "a"}', 'line 3: must have a "prompt" or a "question", got \'text\''),
        (b'{"prompt": "a", "question": "b"}', "line 3: must have"),
        (b'{"prompt": 7}', "line 3: prompt must be a text, got 7"),
        (b'{"question": " "}', "line 3: question must be a text"),
        (b'{"question": "\\ud800"}', "line 3: question is not Unicode text"),
        (b'{"question": "a", "answer": [1]}', "line 3: answer must be text or a number, got [1]"),
        (b'{"question": "a", "answer": "\\ud800"}', "line 3: answer is not Unicode text"),
        (b'{"question": "' + b"a" * 2**20 + b'"}', "line 3: longer than 1,048,576 bytes"),
    ],
    ids=range(12),
)
def test_a_bad_line_is_refused_by_its_number(tmp_path, line, message):
    path = tmp_path / "task.jsonl"
    path.write_bytes(b'{"prompt": "one"}\n\n' + line + b'\n{"question": "two"}\n')
    with pytest.raises(ValueError) as caught:
        read_problems(path)
    assert message in str(caught.value) and len(str(caught.value)) < 500


def test_files_with_fewer_and_without_problems(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text('{"prompt": "one", "answer": 1}\n{"question": "two"}')
    assert sorted(load_problems(str(path), 70, 0)) == [Problem("one", "1"), Problem("two", None)]
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "after a byte order mark"}')
    assert load_problems(str(path), 70, 0) == [Problem("after a byte order mark", None)]
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no problem"):
        load_problems(str(path), 70, 0)
    with pytest.raises(FileNotFoundError):
        load_problems(str(tmp_path / "absent"), 70, 0)


def test_gsm_problems_are_seeded():
    pytest.importorskip("reasoning_gym")
    problems = load_problems("gsm", 12, 0)
    assert problems == load_problems("gsm", 12, 0) and problems[:5] == load_problems("gsm", 5, 0)
    assert len(set(problems)) == 12 and not set(problems) & set(load_problems("gsm", 12, 1))
    assert all(problem.text.endswith("?") and is_right(problem, f"It is {problem.gold}.") for problem in problems)


def test_a_file_gives_a_seeded_draw_with_its_right_answers(tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    rows = [{"question": f"What is {n}?", "answer": f"It is <<{n}+0={n}>>{n}.\n#### {n:,}"} for n in range(995, 1045)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = load_problems(str(path), 20, 3)
    assert problems[:7] == load_problems(str(path), 7, 3) and problems != load_problems(str(path), 20, 4)
    assert len(set(problems)) == 20 and [p.text for p in problems] != sorted(p.text for p in problems)
    for problem in problems:
        number = int(problem.text[8:-1])
        assert problem.gold == f"{number:,}" and is_right(problem, rf"so \boxed{{{number}}}")
        assert not is_right(problem, f"{number + 1}") and not is_right(problem, "none")
    assert is_right(Problem("a", None), "1") is None


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"12 and \boxed{7} of 9", "7"),
        ("She pays $1,250.50.", "1,250.50"),
        ("from -3 to -4", "-4"),
        ("no number", None),
        (r"an open \boxed{5", "5"),
    ],
)
def test_the_final_answer_is_the_last_box_or_the_last_number(text, answer):
    assert final_answer(text) == answer


def test_a_prompt_of_the_papers_form():
    text = 'Tom has 3.5 kg. Ann has "two more"!  He has few? How many have both?'
    assert paper_prompt(text) == (
        "System: Please reason step by step, and put your final answer within \\boxed{}.\n"
        'Context: Tom has 3.5 kg. Ann has "two more"! He has few?\nQuestion: How many have both?\n'
    )
    assert paper_prompt("What is 2 + 2?").splitlines()[1:] == ["Question: What is 2 + 2?"]


def test_without_reasoning_gym_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match="pip install reasoning-gym, or give --task FILE.jsonl"):
        load_problems("gsm", 1, 0)


# ---- named tasks -----------------------------------------------------------------------------------------------------


def test_the_tiny_countdown_is_asked_and_verified_as_in_its_training(tmp_path):
    from train.config import Config
    from train.problems import Prompts
    from train.rollout import Completion
    from train.words import split_problems

    problems = split_problems(Config().words).held_out[:50]
    path = tmp_path / "held-out.jsonl"
    path.write_text("".join(problem.answer + "\n" for problem in problems))
    loaded = load_problems(f"words:{path}", 50, 0)
    assert {one.text for one in loaded} == {problem.prompt for problem in problems}
    assert [one.text for one in load_problems(f"words:{path}", 5, 0)] == [one.text for one in loaded[:5]]
    study = object.__new__(Study)
    study.args, study.tokenizer = SimpleNamespace(prompt_format="chat"), TOKENIZER
    prompts = Prompts(TOKENIZER, Config())
    for one in loaded:
        (problem,) = (problem for problem in problems if problem.prompt == one.text)
        assert study._encode(one) == prompts.encode(problem)
    study.silent = prompts.silent
    ids = [*TOKENIZER.encode("5 + 3 = 8 ! A 5 + 3"), TOKENIZER.eos_token_id]
    assert [study.words_of(ids)] == prompts.decode([Completion(ids, [], "stop")])
    path.write_text('{"numbers": [5, 3], "target": 8}')
    (small,) = load_problems(f"words:{path}", 1, 0)
    assert is_right(small, study.words_of(ids)) and not is_right(small, "A 5 - 3") and not is_right(small, "")


def test_tasks_of_reasoning_gym_have_their_own_score():
    pytest.importorskip("reasoning_gym")
    problems = load_problems("gym:chain_sum", 6, 0)
    assert [one.text for one in problems[:3]] == [one.text for one in load_problems("gym:chain_sum", 3, 0)]
    for one in problems:
        assert is_right(one, f"so it is \\boxed{{{one.gold}}}.") and is_right(one, f"the result is {one.gold}")
        assert not is_right(one, f"the result is {int(one.gold) + 1}") and not is_right(one, "")
    with pytest.raises(ValueError, match="gym:NAME must name a task of reasoning-gym, .* got 'chess'"):
        load_problems("gym:chess", 3, 0)


def test_tasks_of_reasoning_gym_take_options():
    pytest.importorskip("reasoning_gym")
    problems = load_problems("gym:chain_sum,min_terms=2,max_terms=2,max_digits=1", 20, 0)
    sums = [re.search(r"(\d+) ([+-]) (\d+) =$", one.text.strip()) for one in problems]
    assert all(sums) and all(int(one[1]) < 10 and int(one[3]) < 10 for one in sums)
    with pytest.raises(ValueError, match="gym:chain_sum takes OPTION=VALUE, one of allow_negation, .*, got 'terms=2'"):
        load_problems("gym:chain_sum,terms=2", 3, 0)
    with pytest.raises(ValueError, match="got 'seed=2'"):
        load_problems("gym:chain_sum,seed=2", 3, 0)
    with pytest.raises(ValueError, match="gym:chain_sum,max_terms=1 is refused by reasoning-gym: "):
        load_problems("gym:chain_sum,max_terms=1", 3, 0)


def test_sets_of_the_trainer_are_tasks(tmp_path):
    (tmp_path / "maths.jsonl").write_text(json.dumps({"problem": "One half?", "answer": "1/2"}) + "\n")
    (one,) = load_problems(f"maths:{tmp_path / 'maths.jsonl'}", 3, 0)
    assert one.is_whole and is_right(one, r"\boxed{\frac{1}{2}}") and not is_right(one, r"\boxed{2}")
    with pytest.raises(ValueError, match="line 1: numbers must be two or more integers from 0 up, got 7"):
        (tmp_path / "bad.jsonl").write_text('{"numbers": 7, "target": 8}\n')
        load_problems(f"words:{tmp_path / 'bad.jsonl'}", 3, 0)
