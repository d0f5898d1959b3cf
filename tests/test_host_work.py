"""Tests the work around the kernels on a GPU: few launches a layer, and no wait of the host inside a pass."""

import pytest
import torch

from benchmarks.host_work import LENGTHS, HostWork, make_policy, measure, packed_inputs, report
from benchmarks.pretended_cuda import pretended_cuda
from rhythm_kernels import collect

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def counts() -> HostWork:
    with pretended_cuda(interprets=False) as device:
        return measure(device)


def test_a_layer_takes_few_launches(counts):
    for name, launches in counts.launches.items():
        assert 0 < launches.check <= 3, name
        assert 0 < launches.statistics <= 4, name


@pytest.mark.parametrize(
    "which, most", [("one sequence", 60), ("packed", 62), ("one sequence with a response mask", 92)]
)
def test_a_forward_takes_few_launches_beside_its_layers(counts, which, most):
    """The tables of a layout are made from its bounds, and dozens of steps on the device only where R must be read."""
    assert 0 < counts.launches[f"known groups, {which}, row pass"].forward <= most


def test_a_forward_with_known_bounds_is_not_waited_for(counts):
    assert not counts.forwards["packed, bounds known to the host"]


def test_a_forward_is_waited_for_once_to_read_its_sequences(counts):
    assert len(counts.forwards["packed, bounds on the device"]) == 1
    padded = counts.forwards["padded, a mask [B, T] and one [B, 1, T, T]"]
    assert len(padded) == 3 and sum("in window_of" in wait.where for wait in padded) == 1


def test_no_pass_of_the_trainer_is_waited_for_between_its_micro_batches(counts):
    for name, waits in counts.passes.items():
        steps = name.count("two optimizer steps")  # for the norm of each step's gradient
        assert len(waits.between) == steps, (name, waits.between)


def test_the_report_names_each_place(counts):
    text = report({"device": "none"}, counts)
    for wait in counts.forwards["packed, bounds on the device"]:
        assert wait.where in text


@pytest.mark.parametrize("moved, is_sound", [(0, True), (1, False)], ids=["right", "off by one"])
def test_known_bounds_are_checked_without_a_wait(moved, is_sound):
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    bounds[1:-2] += moved
    with pretended_cuda() as device, torch.no_grad():
        decoder, inputs = make_policy(device, "packed").decoder, packed_inputs(device)
        with collect(decoder, layers=[2], cu_seqlens=bounds) as c:
            decoder(**inputs)
        rhythm = c.rhythm()
        for signal in (rhythm.waad.cpu(), rhythm.fai.cpu()):
            assert signal.isfinite().all() if is_sound else signal.isnan().all()
        if is_sound:
            c.findings.check()
            return
        with pytest.raises(ValueError, match="layer 2 does not attend as collect assumes: the output of token 43"):
            c.findings.check()
