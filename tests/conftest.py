"""Runs every test on poisoned memory: torch.empty returns tensors full of NaN (or of the largest integer).

Fuzz tests draw new cases in each run. The header prints the seed, and --hypothesis-seed=SEED repeats the cases.
"""

import os
import random
import signal
from contextlib import ExitStack, nullcontext

import pytest
import torch
from packaging.version import Version

UNMARKED_SECONDS = 5.0
LEFT_OUT_OF_FAST = ("gpu", "hypothesis", "xdist_group", "slow")
"""The marks of tests that `make test-fast` leaves out."""

# A shell starts a background job with SIGINT ignored, and its processes inherit that: tests send each other SIGINT.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Triton decides at its import whether it interprets kernels on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    parser.addoption("--pretended-cuda", action="store_true", help="pretend that there is a GPU for tests marked gpu")
    parser.addoption("--forwards", type=int, default=420, help="forwards of random decoders in test_collect_fuzz.py")


def check_groups(config):
    """Refuses versions that send the tests of a group to several workers, without a word.

    Each worker would then set up what the group shares, which takes minutes and gigabytes.
    """
    if getattr(config.option, "dist", "no") == "loadgroup":
        import xdist

        if Version(pytest.__version__) >= Version("9.2") and Version(xdist.__version__) <= Version("3.8.0"):
            raise pytest.UsageError(
                f"pytest must be below 9.2 beside pytest-xdist 3.8, which does not find its groups then, got "
                f"{pytest.__version__} and {xdist.__version__}"
            )


@pytest.hookimpl(tryfirst=True)  # before hypothesis reads its option
def pytest_configure(config):
    check_groups(config)
    if config.option.pretended_cuda:  # test modules ask for the device when they are imported
        from benchmarks.pretended_cuda import pretended_cuda

        device = ExitStack()
        device.enter_context(pretended_cuda())
        config.add_cleanup(device.close)
    if getattr(config.option, "hypothesis_seed", "absent") is None:  # without hypothesis the option is absent
        from hypothesis import settings

        settings.register_profile("drawn anew", derandomize=False)  # hypothesis repeats its cases where CI is set
        settings.load_profile("drawn anew")
        config.option.hypothesis_seed = str(random.SystemRandom().randrange(10**9))


def pytest_collection_modifyitems(config, items):
    """Skips tests that a pretended GPU cannot run: those marked gpu(not_pretended="why")."""
    if config.option.pretended_cuda:
        for item in items:
            for mark in item.iter_markers("gpu"):
                if "not_pretended" in mark.kwargs:
                    item.add_marker(pytest.mark.skip(reason=f"not on a pretended GPU: {mark.kwargs['not_pretended']}"))


def pytest_report_header(config):
    seed = getattr(config.option, "hypothesis_seed", None)
    return None if seed is None else f"hypothesis seed: {seed}"


def pytest_terminal_summary(terminalreporter):
    """Prints what tests recorded with record_property("resources", text), and the slow tests without the mark."""
    reports = terminalreporter.stats.get("passed", [])
    for name, title in {
        "resources": "resources of compiled kernels",
        "outcomes": "forwards of random decoders",
    }.items():
        lines = [text for report in reports for key, text in report.user_properties if key == name]
        if lines:
            terminalreporter.section(title)
            terminalreporter.write_line("\n".join(lines))
    slow = [x for x in reports if x.duration > UNMARKED_SECONDS and x.keywords.keys().isdisjoint(LEFT_OUT_OF_FAST)]
    if slow:
        terminalreporter.section(f"tests over {UNMARKED_SECONDS:.0f} s without the mark slow")
        terminalreporter.write_line("\n".join(f"{report.duration:.0f} s {report.nodeid}" for report in slow))


def poisoned(make):
    def wrapped(*args, **kwargs):
        out = make(*args, **kwargs)
        memory = getattr(out, "held", out)  # a pretended device's values, so that the fill is no launch
        if isinstance(memory, torch.Tensor) and memory.device.type != "meta" and not memory.is_sparse:
            with torch.no_grad():
                if memory.dtype.is_floating_point:
                    memory.fill_(float("nan"))
                elif memory.dtype == torch.bool:
                    memory.fill_(True)
                elif not memory.dtype.is_complex:
                    memory.fill_(torch.iinfo(memory.dtype).max)
        return out

    return wrapped


@pytest.fixture(autouse=True)
def poison_uninitialized_memory(monkeypatch):
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def open_to_modes(monkeypatch):
    """Lets a dispatch mode of the test see the operators of the statistics, which turn all modes off."""
    from rhythm_kernels import isolation

    monkeypatch.setattr(isolation, "_disable_current_modes", nullcontext)
