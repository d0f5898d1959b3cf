"""The options of credit are checked when they are made, read from text, and passed on under their functions' names."""

import inspect
from dataclasses import fields

import numpy as np
import pytest

from rhythm_kernels import CreditOptions, GroupSchedule, collect, coupled_sets, token_credit
from rhythm_kernels.options import flat_name, from_flat, read_text

OPTIONS = {option.name: option for option in fields(CreditOptions)}


def arguments(function) -> dict[str, object]:
    """Returns the defaults of a function's arguments by their names."""
    return {name: argument.default for name, argument in inspect.signature(function).parameters.items()}


@pytest.mark.parametrize(
    "given, function",
    [
        ("collect_arguments", collect),
        ("schedule_arguments", GroupSchedule.__init__),
        ("set_arguments", coupled_sets),
        ("credit_arguments", token_credit),
    ],
)
def test_names_and_defaults_are_those_of_the_functions(given, function):
    options = getattr(CreditOptions(), given)
    defaults = arguments(function)
    assert options == {name: defaults[name] for name in options}


def test_every_option_reaches_a_function():
    options = CreditOptions()
    reached = {*options.collect_arguments, *options.schedule_arguments, *options.credit_arguments, "strategy", "seed"}
    assert reached - {"every"} | {"groups_every"} == set(OPTIONS)


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("strategy", "local", "local"),
        ("top_fraction", "0.2", 0.2),
        ("max_lookback", "7", 7),
        ("largest", "False", False),
        ("tau_waad", "2.5", 2.5),
        ("tau_waad", "none", None),
        ("preplan_fraction", "0.3", 0.3),
        ("preplan_fraction", "none", None),
        ("delta", "drop", "drop"),
        ("layers", "all", "all"),
        ("layers", "3", 3),
        ("layers", ["3", "-1"], (3, -1)),
        ("layers", "3,4", (3, 4)),
        ("layers", "3,", (3,)),
        ("layers", ["-1,"], (-1,)),
        ("span_rows", "128", 128),
        ("span_rows", ["none"], None),
        ("horizon", ["4", "20"], (4, 20)),
        ("horizon", "4 none", (4, None)),
        ("horizon", "4", (4, None)),
    ],
)
def test_text_is_read(name, text, value):
    read = read_text(OPTIONS[name], text)
    assert read == value and type(read) is type(value)
    assert getattr(CreditOptions(**{name: read}), name) == value


@pytest.mark.parametrize(
    "name, value",
    [
        ("strategy", "couple"),
        ("top_fraction", "much"),
        ("top_fraction", float("nan")),
        ("amplification", -1.0),
        ("max_lookback", 0),
        ("largest", 1),
        ("largest", "perhaps"),
        ("tau_delta", float("inf")),
        ("preplan_fraction", 1.5),
        ("preplan_fraction", "few"),
        ("delta", "rise"),
        ("layers", "some"),
        ("layers", ()),
        ("layers", (1, 1)),
        ("layers", 0),
        ("window", 257),
        ("span_rows", 100),
        ("span_rows", "few"),
        ("horizon", (3, 2)),
        ("horizon", "1 2 3"),
        ("group_by", "token"),
        ("seed", -1),
    ],
)
def test_bad_values_are_refused_under_the_name_that_they_were_given_by(name, value):
    with pytest.raises((TypeError, ValueError), match=rf"^{name}\b"):
        CreditOptions(**{name: read_text(OPTIONS[name], value)})
    with pytest.raises((TypeError, ValueError), match=rf"^{flat_name(name)}\b"):
        from_flat({flat_name(name): read_text(OPTIONS[name], value), "other": 1})


def test_groups_are_disjoint():
    with pytest.raises(ValueError, match="must leave disjoint groups, got 0.6 and 0.5"):
        CreditOptions(local_fraction=0.6, global_fraction=0.5)
    with pytest.raises(ValueError, match="^credit_local_fraction and credit_global_fraction must leave"):
        from_flat({"credit_local_fraction": 0.6, "credit_global_fraction": 0.5})


def test_layers_may_not_be_an_array():
    with pytest.raises(TypeError, match='^layers must be "all", an int or a list of layer indices, got array'):
        CreditOptions(layers=np.array([1, 2]))
