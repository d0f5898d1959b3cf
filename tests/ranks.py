"""Runs a function on several ranks of gloo, each a process, and gives what each returned or raised."""

import datetime
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist

SECONDS = 120
"""After which ranks that wait for each other count as hanging."""

SECONDS_BEHIND = 20
"""After which the others hang where one has raised."""

# one process imports the libraries, and the ranks are copies of it
_context = multiprocessing.get_context("forkserver")
_preloaded = ["ranks", "rhythm_kernels.listen.collect", "models"]


def preload(*modules: str) -> None:
    """Lets the process that ranks are copied from import these modules too; before its first use."""
    _preloaded.extend(modules)
    _context.set_forkserver_preload(_preloaded)


preload()


class Raised(Exception):
    """Holds an error that a rank has raised: its type's name, its message, and its traceback."""


def on_ranks(size: int, function: Callable, *args) -> list:
    """Returns function(*args) of every rank, in a group of `size`; a `Raised` where it raised.

    Args:
        function: at the top of a module; what it returns can be pickled.
    """
    with tempfile.TemporaryDirectory() as folder:
        ends = [_context.Pipe() for _ in range(size)]
        processes = [
            _context.Process(target=_rank, args=(rank, size, folder, ends[rank][1], function, args), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        returned: list = [None] * size
        pipes = {own: rank for rank, (own, _) in enumerate(ends)}
        until = time.monotonic() + SECONDS
        try:
            while pipes:
                ready = multiprocessing.connection.wait(list(pipes), until - time.monotonic())
                assert ready, f"ranks {sorted(pipes.values())} of {size} hang; the others returned {returned}"
                for pipe in ready:
                    returned[pipes[pipe]] = pipe.recv()
                    if isinstance(returned[pipes.pop(pipe)], Raised):
                        until = min(until, time.monotonic() + SECONDS_BEHIND)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return returned


def _rank(rank: int, size: int, folder: str, pipe, function: Callable, args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=SECONDS - 10)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timeout)
    try:
        result = function(*args)
    except Exception as error:
        result = Raised(type(error).__name__, str(error), traceback.format_exc())
    pipe.send(result)
    if not isinstance(result, Raised):
        pipe.recv()  # until it is killed: a rank that ends earlier closes its connections to the others
