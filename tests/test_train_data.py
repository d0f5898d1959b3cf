"""Named sets, local files and the order in which problems are trained on."""

import gzip
import json

import pytest

from rhythm_kernels.tasks import BadSet, Problem, maths, sets
from rhythm_kernels.tasks.sets import HELD_OUT, SETS, TRAIN, drop_overlap, find_set, identify, load_set
from train.data import ProblemStream


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def test_stream_covers_each_epoch_and_continues_from_its_cursor():
    problems = [Problem(f"problem {index}", "[]", "maths") for index in range(23)]
    stream = ProblemStream(problems, seed=3)
    epoch = stream.take(len(problems))
    assert sorted(epoch) == sorted(problems)
    stream.take(5)
    copy = ProblemStream(problems, seed=3)
    copy.load_state_dict(stream.state_dict())
    assert copy.take(len(problems)) == stream.take(len(problems))
    assert ProblemStream(problems, seed=4).take(len(problems)) != epoch


@pytest.mark.slow
def test_generated_countdown_is_split_for_good():
    train, test = load_set("countdown"), load_set("countdown-test")
    assert (len(train), len(test)) == (TRAIN, HELD_OUT)
    asked = [identify(problem) for problem in train + test]
    assert len(set(asked)) == len(asked)
    assert load_set("countdown-test") == test


@pytest.mark.parametrize(
    "name, row, prompt, answer",
    [
        ("countdown", {"nums": [3, 1], "target": 4}, "3, 1", {"numbers": [1, 3], "target": 4}),
        ("words", {"numbers": [3, 1], "target": 4}, "1 3 ? 4 >", {"numbers": [1, 3], "target": 4}),
        ("tinyzero", {"nums": [4, 3, 2, 1], "target": 10}, "4, 3, 2, 1", {"numbers": [1, 2, 3, 4], "target": 10}),
        ("dapo-math", {"prompt": "How many?", "solution": "34"}, "How many?", ["34"]),
        ("aime24", {"problem": "Find n.", "answer": 33}, "Find n.", ["33"]),
        ("amc23", {"question": "Find n.", "answer": "27.0"}, "Find n.", ["27.0"]),
        ("maths", {"problem": "Find n.", "answer": ["1/2", "0.5"]}, "Find n.", ["1/2", "0.5"]),
        ("olympiadbench", {"question": "Solve.", "final_answer": ["$x=1$", "$x=2$"]}, "Solve.", ["x=1, x=2"]),
        (
            "olympiadbench",
            {"question": "Solve.", "final_answer": ["$1$"], "context": "Let n be even."},
            "Let n be even.\n\nSolve.",
            ["1"],
        ),
        ("choice", {"question": "Capital?", "options": ["Rome", "Oslo"], "answer": "Oslo"}, "B. Oslo", ("B", "Oslo")),
        (
            "crossthink-qa",
            {
                "prompt": [{"role": "user", "content": "Capital?\nA. Rome\nB. Oslo"}],
                "reward_model": {"ground_truth": "B", "style": "rule"},
            },
            "A. Rome",
            ("B", "Oslo"),
        ),
    ],
)
def test_rows_of_every_kind_make_problems(tmp_path, name, row, prompt, answer):
    if isinstance(answer, tuple):
        answer = dict(zip(("letter", "text"), answer))
    [problem] = load_set(f"{name}:{write(tmp_path / 'rows.jsonl', [row, chr(10)])}")
    assert prompt in problem.prompt and json.loads(problem.answer) == answer


@pytest.mark.parametrize(
    "name, rows, message",
    [
        ("words", [{"numbers": [3, 5], "target": 8}, {"numbers": [3], "target": 3}], "line 2: numbers must be two or"),
        ("words", [{"numbers": [3, -5], "target": 8}], "numbers must be two or more integers from 0 up, got [3, -5]"),
        ("words", [{"numbers": [3, 5], "target": "8"}], "target must be an integer, got '8'"),
        ("maths", [{"problem": "?", "answer": "1"}, {"problem": "?"}], "line 2: no column 'answer', the row has"),
        ("dapo-math", [{"prompt": "?", "answer": "1"}], "line 1: no column 'solution'"),
        ("crossthink-qa", [{"prompt": "?", "reward_model": "B"}], "no column 'reward_model.ground_truth'"),
        ("maths", [{"problem": ["?"], "answer": "1"}], "line 1: the question must be text, got ['?']"),
        ("maths", [{"problem": "?", "answer": {"a": 1}}], "must be text or a number, got {'a': 1}"),
        ("countdown", [{"nums": [1, "2"], "target": 3}], "nums must be two or more integers"),
        ("countdown", [{"nums": [1, 2], "target": True}], "target must be an integer, got True"),
        ("choice", [{"question": "?", "options": [1, 2], "answer": "A"}], "options must be"),
        ("maths", ["{'problem': 1}\n"], "line 1: no JSON"),
        ("maths", ["[" * 10**5 + "\n"], "line 1: no JSON"),
        ("maths", ["[1]\n"], "line 1: a row must be an object with columns, got [1]"),
        ("maths", [], "holds no problems"),
        (
            "maths",
            [{"problem": "ok", "answer": 1}, {"problem": "a\ud800b", "answer": 1}],
            "line 2: half of a surrogate",
        ),
        ("maths", [{"problem": "?", "answer": "\udfff"}], "line 1: half of a surrogate"),
        ("choice", [{"question": "?", "options": ["a", "b\udc00"], "answer": "a"}], "line 1: half of a surrogate"),
        ("maths", ['{"problem": "?", "answer": ' + "1" * 5000 + "}\n"], "line 1: no JSON"),
        ("countdown", ['{"nums": [1, NaN], "target": 3}\n'], "nums must be two or more integers"),
        ("gsm8k", [{"problem": "?", "answer": "#### 1"}], "no column 'question'"),
    ],
)
def test_bad_file_is_named_with_its_line(tmp_path, name, rows, message):
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(BadSet) as error:
        load_set(f"{name}:{path}")
    assert message in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    "name, message",
    [
        ("chess", "must be one of countdown, "),
        ("my.jsonl", "named with the set whose columns it has: maths:my.jsonl"),
        ("maths", "'maths' needs a file: maths:FILE.jsonl"),
        ("words", "'words' needs a file: words:FILE.jsonl"),
        ("aime24:", "'aime24:' needs a file"),
        ("maths:/nowhere/my.jsonl", "/nowhere/my.jsonl"),
    ],
)
def test_unknown_set_is_refused(name, message):
    with pytest.raises(BadSet) as error:
        load_set(name)
    assert message in str(error.value)


ROWS = b'{"problem": "1 + 1 is?", "answer": 2}\n{"problem": "\xc3\xa4\\ud83d\\ude00?", "answer": 1e-5}\n'


@pytest.mark.parametrize(
    "name, content",
    [
        ("rows.jsonl", ROWS),
        ("rows.jsonl", b"\xef\xbb\xbf" + ROWS),
        ("rows.jsonl", ROWS.replace(b"\n", b"\r\n")),
        ("rows.jsonl.gz", gzip.compress(ROWS)),
        ("rows.jsonl", gzip.compress(b"\xef\xbb\xbf" + ROWS)),
    ],
    ids=["plain", "byte order mark", "lines of Windows", "gzip", "gzip by another name"],
)
def test_file_loads_however_it_is_stored(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    problems = load_set(f"maths:{tmp_path / name}")
    assert [json.loads(problem.answer) for problem in problems] == [["2"], ["0.00001"]]
    assert problems[1].prompt.startswith("ä\N{GRINNING FACE}?")


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(ROWS)[:-12],
        gzip.compress(ROWS)[:20] + b"\0" * 40,
        ROWS.replace(b"is", b"\xff"),
        ROWS.decode().encode("utf-16"),
    ],
    ids=["cut gzip", "broken gzip", "Latin-1", "UTF-16"],
)
def test_broken_file_is_named(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadSet) as error:
        load_set(f"maths:{path}")
    assert str(path) in str(error.value)


def test_answers_out_of_reach_are_counted_with_the_first_of_them(tmp_path):
    golds = [
        "5",
        "?",
        float("nan"),
        float("inf"),
        "3 + 2. #### 5",
        "The answer is 5.",
        r"\frac{1}{2",
        "x^2",
        1e16,
        "No",
    ]
    said = []
    path = write(
        tmp_path / "rows.jsonl", [{"problem": f"{index}?", "answer": gold} for index, gold in enumerate(golds)]
    )
    problems = load_set(f"maths:{path}", said.append)
    assert [json.loads(problem.answer)[0] for problem in problems] == [
        "5", "5", "The answer is 5.", "x^2", "10000000000000000", "No",
    ]  # fmt: skip
    assert len(said) == 1 and "4 of 10 rows left out, the first" in said[0]
    assert f"{path}, line 2: the answer '?' says nothing" in said[0]


def test_gsm8k_takes_what_is_behind_the_marks(tmp_path):
    row = {"question": "How many clips?", "answer": "She sold 48/2 = <<48/2=24>>24 in May.\n#### 1,072"}
    [problem] = load_set(f"gsm8k:{write(tmp_path / 'rows.jsonl', [row])}")
    assert json.loads(problem.answer) == ["1,072"] and maths.verify(r"\boxed{1072}", problem.answer) == 1.0


def test_repeats_are_told(tmp_path):
    rows = [
        {"problem": "Find n.", "answer": 1},
        {"problem": "Find  N.", "answer": 2},
        {"problem": "Find m.", "answer": 1},
    ]
    said = []
    assert len(load_set(f"maths:{write(tmp_path / 'rows.jsonl', rows)}", said.append)) == 3
    assert len(said) == 1 and "1 of 3 problems repeat another, 1 of the questions with other answers" in said[0]
    assert len(load_set(f"maths:{write(tmp_path / 'rows.jsonl', rows[1:])}", said.append)) == 2 and len(said) == 1


def test_unusable_rows_are_counted(tmp_path):
    rows = [
        {"question": "?", "options": ["Rome", "Oslo"], "answer": "Bonn"},
        {"question": "?", "options": ["Rome", "Oslo"], "answer": "Rome"},
        {"question": "?", "options": ["Rome", "Oslo"], "answer": None},
    ]
    said = []
    assert len(load_set(f"choice:{write(tmp_path / 'rows.jsonl', rows)}", said.append)) == 1
    assert len(said) == 1 and "2 of 3 rows left out, the first" in said[0] and "'Bonn' is none of" in said[0]


def test_hub_sets_load_through_datasets(tmp_path, monkeypatch):
    """A folder stands in for the hub, which the tests cannot reach; the library and the split are the real ones."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub" / "test.jsonl", [{"question": "Find n.", "answer": "27"}] * 2)
    name = SETS["amc23"]
    monkeypatch.setitem(
        SETS, "amc23", sets.ProblemSet(name.build, name.columns, (), (str(tmp_path / "hub"), None, "test"))
    )
    assert [json.loads(problem.answer) for problem in load_set("amc23")] == [["27"], ["27"]]
    gone = (str(tmp_path / "nowhere"), None, "test")
    monkeypatch.setitem(SETS, "amc23", sets.ProblemSet(name.build, name.columns, (), gone))
    with pytest.raises(BadSet, match="amc23:FILE.jsonl"):
        load_set("amc23")


def test_set_that_is_split_here_has_no_problem_on_both_sides(monkeypatch):
    rows = [{"nums": [number, number + 1, 2, 3], "target": 10} for number in range(700)]
    rows += [{"nums": row["nums"][::-1], "target": 10} for row in rows[:50]] + [{"nums": [1, 2, 3], "target": 6}]
    monkeypatch.setattr(sets, "_rows_of_hub", lambda *_: ((f"row {index}", row) for index, row in enumerate(rows)))
    said = []
    train, test = load_set("tinyzero", said.append), load_set("tinyzero-test")
    assert len(test) == HELD_OUT and len(train) == 700 - HELD_OUT
    assert len({identify(problem) for problem in train + test}) == 700
    assert len(said) == 2
    assert "tinyzero: 1 of 751 rows left out" in said[0] and "it gives 3 numbers, not 4" in said[0]
    assert said[1] == "tinyzero: 50 of 750 problems left out as repeats of others"


def test_overlap_is_dropped_and_counted():
    train = [Problem("Find  n.", "[]", "maths"), Problem("Find m.", "[]", "maths")]
    assert drop_overlap(train, [Problem("find n.", "[1]", "maths")]) == (train[1:], 1)
    assert drop_overlap(train, []) == (train, 0)


def test_table_is_consistent():
    for name, found in SETS.items():
        assert all(not SETS[held_out].evaluate for held_out in found.evaluate)
        assert find_set(f"{name}:x.jsonl")[0] is found
    assert {name for name, found in SETS.items() if found.answers == 16} == {"aime24", "aime25"}
