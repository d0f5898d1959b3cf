"""Problems, their split, demonstrations and the tokenizer."""

import random

import pytest
from transformers import AutoTokenizer

from train.config import Demonstrations, Task
from train.data import LARGEST_NUMBER, ProblemStream, attempts, build_tokenizer, demonstrate, split_problems
from train.presets import PRESETS, load_preset
from train.rewards import countdown_reward
from train.supervise import context_length


@pytest.mark.parametrize("preset", PRESETS)
def test_no_number_multiset_is_on_both_sides(preset):
    task = load_preset(preset).task
    split = split_problems(task)
    assert len(set(split.held_out)) == len(split.held_out) == task.held_out
    assert len(set(split.train)) == len(split.train)
    assert {tuple(sorted(p.numbers)) for p in split.train}.isdisjoint(tuple(sorted(p.numbers)) for p in split.held_out)


def test_default_task_holds_out_enough():
    assert load_preset("countdown-tiny").task.held_out >= 1024


def test_split_repeats_and_follows_its_seed():
    assert split_problems(Task()) == split_problems(Task())
    assert split_problems(Task()).held_out != split_problems(Task(split_seed=1)).held_out


def test_impossible_split_names_the_flag():
    with pytest.raises(ValueError, match="--held-out 5000"):
        split_problems(Task(largest=4, held_out=5000))


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
    for problem in draw.sample(split_problems(config.task).train, 300):
        text = demonstrate(problem, config.task, config.demonstrations, draw)
        assert countdown_reward(text, *problem) == ("!" in text)
        assert text.count("!") <= 1 and ("!" in text or "x A" in text)


def test_demonstrations_follow_their_odds():
    task, draw = Task(), random.Random(0)
    problem = split_problems(task).train[0]
    only_two = Demonstrations(misses=(0.0, 0.0, 1.0), give_up=0.0)
    assert all(demonstrate(problem, task, only_two, draw).count("x") == 2 for _ in range(20))
    always = Demonstrations(misses=(0.0, 1.0), give_up=1.0)
    assert all("!" not in demonstrate(problem, task, always, draw) for _ in range(20))


@pytest.mark.parametrize("preset", PRESETS)
def test_prompts_and_demonstrations_fit_the_context(preset):
    config, tokenizer, draw = load_preset(preset), build_tokenizer(), random.Random(0)
    for problem in draw.choices(split_problems(config.task).train, k=300):
        text = demonstrate(problem, config.task, config.demonstrations, draw)
        ids = tokenizer.encode(f"{problem.prompt} {text}")
        assert tokenizer.decode(ids) == f"{problem.prompt} {text}"
        assert tokenizer.unk_token_id is None and len(ids) == len(f"{problem.prompt} {text}".split())
        assert len(ids) < context_length(config)


def test_tokenizer_comes_back_from_its_folder(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "1 7 10 ? 2 > 10 - 1 = 9 , 9 - 7 = 2 ! A ( 10 - 1 ) - 7"
    assert loaded.encode(text) == tokenizer.encode(text) and loaded.decode(loaded.encode(text)) == text
    assert (loaded.pad_token, loaded.eos_token, loaded.padding_side) == ("<pad>", "<eos>", "left")
    assert len(loaded) == len(tokenizer)


def test_stream_covers_each_epoch_and_continues_from_its_cursor():
    problems = split_problems(load_preset("countdown-smoke").task).train
    stream = ProblemStream(problems, seed=3)
    epoch = stream.take(len(problems))
    assert sorted(epoch) == sorted(problems)
    stream.take(5)
    copy = ProblemStream(problems, seed=3)
    copy.load_state_dict(stream.state_dict())
    assert copy.take(len(problems)) == stream.take(len(problems))
    assert ProblemStream(problems, seed=4).take(len(problems)) != epoch
