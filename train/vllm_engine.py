"""Samples answers with vLLM inside the trainer's process: one engine a rank, on the rank's own GPU or on a CPU.

The names below are those of vLLM 0.32.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from rhythm_kernels.analysis.vllm_process import LEAST_TEMPERATURE, engine_options, import_vllm, undisturbed
from train.config import RunError
from train.rollout import Completion, Progress, Sampling

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
        with undisturbed(), warnings.catch_warnings(), self._taking_memory(ValueError):
            warnings.simplefilter("ignore")
            vllm = import_vllm()
            from vllm.platforms import current_platform

            self._llm = vllm.LLM(
                str(model_folder),
                **engine_options(),
                dtype=dtype,
                max_model_len=max_model_len,
                gpu_memory_utilization=gpu_memory_utilization,
                enable_sleep_mode=sleep_mode and not current_platform.is_cpu(),
                # "external_launcher" takes the process's LOCAL_RANK for its GPU and joins the process groups that are
                # there; with tensor_parallel_size 1 its engines share nothing after the start.
                distributed_executor_backend="external_launcher" if ranks > 1 else "uni",
                logprobs_mode="processed_logprobs",  # after the temperature
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
        if sampling.temperature is not None and not sampling.temperature >= LEAST_TEMPERATURE:
            raise ValueError(
                f"temperature must be at least {LEAST_TEMPERATURE}, or None for greedy, got {sampling.temperature}"
            )
        if self._is_asleep:
            raise RuntimeError("the engine is asleep: wake() first")
        if self._missing_weights:
            raise RuntimeError(f"{self._missing_weights}: sync() first")
        with undisturbed():
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
        with undisturbed(), _warnings_of(RELOAD) as records:
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
            with undisturbed():
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
        with undisturbed(), self._taking_memory(RuntimeError):
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
