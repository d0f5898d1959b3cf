"""Tests against the real verl, in an environment of its own; where verl is not installed nothing is collected."""

import importlib.metadata
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

try:
    importlib.metadata.version("verl")
except importlib.metadata.PackageNotFoundError:
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ |= {  # also of the processes that the tests start
        "VERL_USE_EXTERNAL_MODULES": "cpu_platform",
        "VERL_ENGINE_DEVICE": "cuda",  # the engine that is registered for a GPU
        "VERL_ENGINE_VENDOR": "nvidia",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    sys.path[:0] = [str(HERE), str(HERE.parent)]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A random Qwen3 with a tokenizer, saved."""
    import verl_cases

    return verl_cases.save_model(tmp_path_factory.mktemp("model"))
