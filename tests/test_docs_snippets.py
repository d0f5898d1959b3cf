"""The python blocks of docs/frameworks/any.md run as they stand, one after the other, and say what is true."""

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).resolve().parent.parent / "docs" / "frameworks" / "any.md"


@pytest.fixture(scope="module")
def names():
    found: dict[str, object] = {}
    for block in re.finditer(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE):
        line = PAGE.read_text()[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(PAGE), "exec"), found)
    return found


@pytest.mark.slow
def test_the_passes_agree(names):
    assert torch.equal(names["gamma"], names["gamma_now"])
    assert torch.equal(names["gamma"], names["unpacked"])
    assert not names["gamma_now"].requires_grad and names["model"].model.embed_tokens.weight.grad is not None


def test_a_token_keeps_its_own_gamma_when_the_trainer_shifts(names):
    inside = names["response"][:, 1:]
    assert torch.equal(names["shaped_shifted"][inside], names["per_token"][:, 1:][inside])
    assert names["shaped_shifted"][~inside].eq(0).all()


@pytest.mark.parametrize("row", range(3))
def test_gamma_is_that_of_the_sequence_alone(names, row):
    kept = names["attention_mask"][row].bool()
    mask = names["response"][row, kept][None]
    with torch.no_grad(), names["collect"](names["model"], response_mask=mask) as c:
        names["model"](names["ids"][row, kept][None])
    alone = names["token_credit"]("coupled", response_mask=mask, rhythm=c.rhythm())
    assert torch.equal(names["gamma"][row, kept], alone[0])


def test_the_groups_serve_the_steps_between(names):
    assert names["schedule"].groups.local_heads.any() and names["drift"] is None
    assert names["rhythm"].spans is None
