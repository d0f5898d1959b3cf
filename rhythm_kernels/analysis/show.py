"""Shows the rhythm of an answer: writes a page that needs no network, the same figures as PNG, and the numbers.

    rhythm show smollm2 --prompt "A box holds 12 pencils. Sara buys 3 boxes. How many pencils does she have?"
    rhythm show Qwen/Qwen3-0.6B --prompt-file problem.txt --max-new-tokens 2000 --window 400:900
    rhythm show smollm2 --prompt "2 + 2 =" --response "2 + 2 is 4."      # an answer that is given
    rhythm show Qwen/Qwen3-4B-Base --example paper                       # the paper's Fig. 2

The page shows two numbers per token of the answer, which are read from the model's own attention: the windowed average
attention distance (WAAD), how far back the local heads look, and the future attention influence (FAI), how much
attention later tokens pay to the token in the global heads. It also shows entropy, mean attention maps, and how far
each head looks back. The maps of --window are of single tokens. The command runs three forwards over the sequence.
Memory grows with the number of tokens, not with its square.
"""

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from rhythm_kernels.analysis import figures, page
from rhythm_kernels.analysis.environment import package_versions
from rhythm_kernels.analysis.maps import mean_maps
from rhythm_kernels.analysis.page import ShownAnswer
from rhythm_kernels.analysis.problems import JEWELS, is_right, paper_prompt
from rhythm_kernels.analysis.reading import Reading, read
from rhythm_kernels.analysis.receivers import FEWEST_ROWS, RECEIVERS
from rhythm_kernels.analysis.sources import (
    DTYPES,
    SMOLLM2,
    check_device,
    check_folder,
    check_ids,
    check_layers,
    check_length,
    check_logits,
    check_receivers,
    check_temperature,
    check_text,
    encode_prompt,
    end_tokens,
    folder_named,
    generate,
    ids_of,
    layer_names,
    load,
    parse_layers,
    sequence_of,
)
from rhythm_kernels.checks import check_int
from rhythm_kernels.files import write_whole
from rhythm_kernels.options import CreditOptions

MOST_WINDOW = 1024  # tokens of a map without bins: the two maps take 6 MB of the page
PEAK_QUANTILE = 0.6
"""Only peaks among the largest 40 % of the answer's values are shown, the fraction that credit selects."""
EXAMPLES = ("paper",)
EXAMPLE_ANSWERS = 8
"""The answers of the paper's example; the shortest right one is shown (A.1)."""
EXAMPLE_TEMPERATURE = 0.7  # section 4.1


class Request(NamedTuple):
    """The command's arguments, after the checks that need no model."""

    model: str
    prompt: str | None
    """None: the paper's example."""
    response: str | None
    max_new_tokens: int
    temperature: float
    seed: int
    layers: int | str | list[int]
    receivers: int | None
    """None is RECEIVERS, or all heads of a model with fewer."""
    window: tuple[int, int] | None
    """None is the answer, or its first MOST_WINDOW tokens."""
    out: Path
    device: str
    dtype: str


def main(arguments: list[str] | None = None) -> None:
    """Runs `rhythm show`.

    Raises:
        ValueError: an argument has a wrong value; raised before the model is loaded where that is possible.
        OSError: there is no such model or file.
    """
    show(parse(arguments))


def parse(arguments: list[str] | None = None) -> Request:
    """Returns the arguments, checked."""
    parser = argparse.ArgumentParser(
        prog="rhythm show", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", nargs="?", default=SMOLLM2, help='a folder, a name on the Hugging Face hub, or "smollm2" (the default)'
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the prompt; the user's turn where the model has a chat template")
    prompt.add_argument("--prompt-file", type=Path, help="a text file with the prompt, in UTF-8")
    prompt.add_argument(
        "--example",
        choices=EXAMPLES,
        help=f"paper: the problem of the paper's Fig. 2 in its plain text, and the shortest right one of "
        f"{EXAMPLE_ANSWERS} answers",
    )
    response = parser.add_mutually_exclusive_group()
    response.add_argument("--response", help="the answer to show; the model's own if left out")
    response.add_argument("--response-file", type=Path, help="a text file with the answer, in UTF-8")
    parser.add_argument("--max-new-tokens", type=int, default=300, help="largest length of the answer (300)")
    parser.add_argument(
        "--temperature",
        type=float,
        help=f"sampling temperature of the answer; 0: greedy (0, and {EXAMPLE_TEMPERATURE} with --example)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (0)")
    parser.add_argument(
        "--layers",
        default="all",
        help="layers that WAAD, FAI and the sets are read in: all, a number of the middle third (5 is what credit "
        "reads), or a list such as 10,13,15 (all)",
    )
    parser.add_argument(
        "--receivers",
        type=int,
        help=f"number of receiver heads: those whose attention falls on the fewest tokens ({RECEIVERS})",
    )
    parser.add_argument(
        "--window",
        help="BEGIN:END, a range of tokens whose attention maps are also shown token by token (the answer)",
    )
    parser.add_argument(
        "--out", type=folder_named, default=Path("rhythm-show"), help="the folder to write into (rhythm-show)"
    )
    parser.add_argument("--device", default="auto", help="auto (cuda where torch finds a GPU), cpu, cuda or cuda:1")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="dtype of the weights; auto: as saved, float32 on a CPU"
    )
    given = parser.parse_args(arguments)
    if given.example and (given.response is not None or given.response_file is not None):
        parser.error("argument --example: not allowed with a response, since the model answers it")
    temperature = given.temperature
    if temperature is None:
        temperature = EXAMPLE_TEMPERATURE if given.example else 0.0
    return Request(
        model=given.model,
        prompt=_text("prompt", given.prompt, given.prompt_file),
        response=_text("response", given.response, given.response_file),
        max_new_tokens=check_int("--max-new-tokens", given.max_new_tokens, 1),
        temperature=check_temperature(temperature),
        seed=check_int("--seed", given.seed, 0, 2**63 - 1),
        layers=parse_layers(given.layers),
        receivers=None if given.receivers is None else check_int("--receivers", given.receivers, 1),
        window=None if given.window is None else _window(given.window),
        out=given.out,
        device=_device(given.device),
        dtype=given.dtype,
    )


def show(request: Request) -> ShownAnswer:
    """Loads the model, reads its answer, writes the folder and prints a summary."""
    check_folder(request.out)
    times = _Times()
    is_example = request.prompt is None
    with times("load"):
        model, tokenizer = load(request.model, device=request.device, dtype=DTYPES[request.dtype], chat=not is_example)
    text = paper_prompt(JEWELS.text) if is_example else request.prompt
    prompt = encode_prompt(tokenizer, text, chat=not is_example)
    if not prompt:
        raise ValueError("--prompt must have a token, got none")
    given = None
    if request.response is not None:
        given = ids_of(tokenizer, request.response, add_special_tokens=False)
        if not given:
            raise ValueError(f"--response must have a token, got {request.response!r}")
    _check_length(model, len(prompt), request, given)
    check_ids(model, tokenizer, prompt, "--prompt")
    check_ids(model, tokenizer, given or [], "--response")
    check_layers(model, request.layers)
    receivers = check_receivers(model, request.receivers)
    if given is None:
        check_logits(model, prompt)
    with times("answer"):
        answer = given if given is not None else _answer(model, tokenizer, prompt, request)
    window = request.window or (len(prompt), len(prompt) + min(MOST_WINDOW, len(answer)))
    ids, response, texts = sequence_of(tokenizer, prompt, answer, model.device)
    begin, end = window
    if end > len(ids):
        raise ValueError(f"--window must end at most at {len(ids)}, the number of tokens, got {end}")
    with times("statistics"):
        reading = read(model, ids, response, layers=request.layers, receivers=receivers, min_quantile=PEAK_QUANTILE)
    with times("maps"):
        of_window = {"begin": begin, "end": end, "bins": end - begin}
        maps = [mean_maps(model, ids[None], reading.sampled, reading.groups, **place) for place in ({}, of_window)]
    shown = ShownAnswer(
        reading,
        texts,
        maps,
        _name(request),
        PEAK_QUANTILE,
        _settings(model, request, reading),
        package_versions(),
    )
    with times("page and figures"):
        files = write(shown, request.out)
    print("\n".join([*summary(shown), f"seconds   {times}", *(f"wrote     {file}" for file in files)]))
    return shown


def write(shown: ShownAnswer, folder: Path) -> list[Path]:
    """Writes the page, the figures, reading.npz (all numbers) and reading.json (texts, settings); returns the paths."""
    paths = [folder / "index.html", folder / "reading.json", folder / "reading.npz"]
    write_whole(paths[0], page.render(shown))
    about = {
        "model": shown.model,
        "settings": shown.settings,
        "versions": shown.versions,
        "prompt_tokens": shown.prompt_tokens,
        "tokens": shown.reading.tokens,
        "layers": shown.reading.layers,
        "sampled": shown.reading.sampled,
        "texts": shown.texts,
    }
    write_whole(paths[1], json.dumps(about, indent=1))
    np.savez_compressed(paths[2], **arrays(shown))
    return [*paths, *figures.write(shown, folder)]


def arrays(shown: ShownAnswer) -> dict[str, np.ndarray]:
    """Returns every number by name.

    The names are the fields of `Reading`; sets_* and groups_* for the fields of its parts; map_local and map_global for
    the maps of all tokens, map_bounds for their (begin, end, tokens in a bin); and window_* for those of the window.
    """
    reading = shown.reading
    numbers = {name: x for name, x in reading._asdict().items() if isinstance(x, Tensor)}
    numbers |= {f"sets_{name}": x for name, x in reading.sets._asdict().items()}
    numbers |= {f"groups_{name.removesuffix('_heads')}": x for name, x in reading.groups._asdict().items()}
    for name, maps in zip(("map", "window"), shown.maps):
        bounds = torch.tensor([maps.begin, maps.end, maps.bin])
        numbers |= {f"{name}_local": maps.local_map, f"{name}_global": maps.global_map, f"{name}_bounds": bounds}
    return {name: x.numpy() for name, x in numbers.items()}


def summary(shown: ShownAnswer) -> list[str]:
    """Returns a few lines about the answer."""
    reading, sets = shown.reading, shown.reading.sets
    rows = [reading.layers.index(layer) for layer in reading.sampled]
    local_span, global_span = (reading.spans[rows][group].mean() for group in reading.groups)
    answer = reading.tokens - shown.prompt_tokens
    lines = [
        f"model     {shown.model}, {len(reading.layers)} layers of {reading.spans.shape[1]} heads",
        f"layers    {layer_names(reading.sampled, reading.layers)}: WAAD, FAI and the sets are read in these",
        f"tokens    {shown.prompt_tokens} of prompt, {answer} of answer",
        f"spans     local heads look {local_span:.1f} tokens back, global heads {global_span:.1f}",
    ]
    signals = (("WAAD", reading.waad, reading.waad_peaks), ("FAI", reading.fai, reading.fai_peaks))
    for name, values, peaks in signals:
        highest = [t for t in values.masked_fill(~peaks, -1).argsort(descending=True).tolist() if peaks[t]][:5]
        words = ", ".join(f"{shown.texts[t]!r} ({t})" for t in highest)
        line = f"{name:9} {values[reading.response].mean():.3g} on average, {int(peaks.sum())} peaks"
        lines.append(line + f", highest at {words}" * bool(highest))
    lines.append(
        f"coupled   {int(sets.preplan.sum())} preplan tokens, {int(sets.anchors.sum())} anchors, of which "
        f"{int(sets.dominated.sum())} are dominated, {int(sets.intros.sum())} intros"
    )
    return lines


# ---- the arguments ---------------------------------------------------------------------------------------------------


def _text(name: str, given: str | None, file: Path | None) -> str | None:
    if file is not None:
        try:
            given = file.read_text(encoding="utf-8-sig").removesuffix("\n")  # editors end a file with a line break
        except UnicodeDecodeError as error:
            raise ValueError(f"--{name}-file must be UTF-8, got {file}: {error}") from None
        except OSError as error:
            raise ValueError(f"--{name}-file must be a file to read, got {file}: {error.strerror}") from None
        name = f"{name}-file"
    if given is None:
        return None
    if not given:
        raise ValueError(f"--{name} must not be empty")
    return check_text(f"--{name}", given)


def _window(given: str) -> tuple[int, int]:
    try:
        begin, end = (int(part) for part in given.split(":"))
    except ValueError:
        raise ValueError(f"--window must be BEGIN:END, two numbers of tokens, got {given!r}") from None
    if not 0 <= begin < end:
        raise ValueError(f"--window must begin at 0 or later and before its end, got {given!r}")
    if end - begin > MOST_WINDOW:
        raise ValueError(f"--window must have at most {MOST_WINDOW} tokens, got {given!r}, {end - begin} tokens")
    return begin, end


def _device(given: str) -> str:
    check_device(given)
    return given


def _check_length(model: nn.Module, prompt: int, request: Request, given: list[int] | None) -> None:
    name, answer = ("--max-new-tokens", request.max_new_tokens) if given is None else ("--response", len(given))
    check_length(model, prompt + answer, name, f"{answer} tokens after {prompt} of prompt")
    if request.window is not None and request.window[1] > prompt + answer:
        raise ValueError(f"--window must end at most at {prompt + answer} tokens, got {request.window[1]}")


# ---- the answer ------------------------------------------------------------------------------------------------------


def _answer(model: nn.Module, tokenizer, prompt: list[int], request: Request) -> list[int]:
    """Returns the model's answer; to the example the shortest right one of several, or else the shortest."""
    count = EXAMPLE_ANSWERS if request.prompt is None else 1
    torch.manual_seed(request.seed)
    with tqdm(total=request.max_new_tokens, unit="tok", desc="answer", leave=False) as bar:
        answers = generate(
            model,
            tokenizer,
            [prompt] * count,
            max_new_tokens=request.max_new_tokens,
            temperature=request.temperature,
            progress=bar.update,
        )
    if count == 1:
        return answers[0]
    ended = [answer for answer in answers if answer[-1] in end_tokens(model)]
    right = [answer for answer in ended if is_right(JEWELS, tokenizer.decode(answer))]
    print(
        f"answers   {count}, of which {len(ended)} came to their end and {len(right)} are right; the shortest is shown"
    )
    return min(right or ended or answers, key=len)


def _name(request: Request) -> str:
    return "SmolLM2-135M-Instruct" if request.model == SMOLLM2 else request.model


def _settings(model: nn.Module, request: Request, reading: Reading) -> dict[str, str]:
    generated = f"at most {request.max_new_tokens} tokens, temperature {request.temperature:g}, seed {request.seed}"
    credit = CreditOptions()
    return {
        "model": request.model,
        "weights": f"{str(model.dtype).removeprefix('torch.')} on {model.device.type}",
        "attention": str(model.config._attn_implementation),
        "answer": generated if request.response is None else "given",
        "statistics": f"WAAD: window of {credit.window} tokens; FAI: from 1 token later to the end of the answer; FAI "
        f"{credit.horizon[0]}-{credit.horizon[1]}, sets and gamma: coupled credit, top_fraction {credit.top_fraction}, "
        f"amplification {credit.amplification}, shared_fraction {credit.shared_fraction}, max_lookback "
        f"{credit.max_lookback}",
        "receiver heads": f"{int(reading.receivers.sum())} of {reading.receivers.numel()}{_too_short(reading)}",
    }


def _too_short(reading: Reading) -> str:
    """Returns a warning where the answer is too short to tell heads apart."""
    return f": only an answer of more than {FEWEST_ROWS} tokens tells which" * (not reading.receivers.any())


class _Times:
    """Measures the seconds of each part of the command."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str):
        self.name = name
        return self

    def __enter__(self) -> None:
        self.begin = time.perf_counter()

    def __exit__(self, *_) -> None:
        self.seconds[self.name] = time.perf_counter() - self.begin

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
