"""Samples tokens with vLLM, which computes the keys and values of a prefix once for all its continuations.

The names below are those of vLLM 0.32.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from rhythm_kernels.analysis.vllm_process import check_installed, engine_options, import_vllm, undisturbed


class VLLM:
    """Samples from one model, in this process."""

    def __init__(
        self,
        model: str,
        *,
        ends: Sequence[int],
        max_model_len: int,
        dtype: torch.dtype,
        memory: float,
        seed: int,
    ):
        """Loads the model.

        Args:
            model: a folder, or a name on the Hugging Face hub.
            ends: the tokens that end an answer.
            max_model_len: the most tokens of a sequence with its continuation.
            memory: the share of a GPU's memory for the weights and the cache.
            seed: that of the study.

        Raises:
            ImportError: vLLM is not installed.
        """
        self.ends, self.seed = list(ends), seed
        with undisturbed():
            self.llm = import_vllm().LLM(
                model,
                **engine_options(),
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=max_model_len,
                gpu_memory_utilization=memory,
                enable_prefix_caching=True,
            )

    def complete(
        self, prompts: list[list[int]], new_tokens: Sequence[int], *, temperature: float, work: str
    ) -> list[list[int]]:
        """Returns the tokens after each prompt, up to the end of the answer (included) or its number of new tokens.

        Nothing follows where that number is 0. Each prompt has a seed of its own, from the study's, the name of the
        work and its place; two batches may still round differently.
        """
        from vllm import SamplingParams

        grown: list[list[int]] = [[] for _ in prompts]
        going = [place for place, count in enumerate(new_tokens) if count > 0]
        if not going:
            return grown
        params = [
            SamplingParams(
                max_tokens=new_tokens[place],
                temperature=temperature,
                seed=_seed_of(self.seed, work, place),
                stop_token_ids=self.ends,
                detokenize=False,
            )
            for place in going
        ]
        with undisturbed():
            outputs = self.llm.generate([{"prompt_token_ids": prompts[place]} for place in going], params)
        for place, output in zip(going, outputs, strict=True):
            (one,) = output.outputs
            if one.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"vLLM ended a text after {len(one.token_ids)} tokens with {one.finish_reason!r}")
            grown[place] = list(one.token_ids)
        return grown

    def close(self) -> None:
        """Frees its memory."""
        self.llm.llm_engine.engine_core.shutdown()


def check_vllm(model: str) -> None:
    """Raises ValueError where vLLM cannot sample what a study asks for, ImportError where it is not installed."""
    if not (Path(model).is_dir() or "/" in model) or Path(model).suffix == ".gguf":
        raise ValueError(f"--engine vllm needs a folder or a name on the Hugging Face hub as the model, got {model!r}")
    check_installed()


def _seed_of(seed: int, work: str, place: int) -> int:
    digest = hashlib.sha256(f"{seed} {work} {place}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # vLLM takes 63 bits
