"""One page of an answer's rhythm: a file that holds its numbers and needs no network.

The page is drawn by page.js from the data inside it. What a model or a user wrote only enters as JSON, whose `<` are
escaped, and page.js puts it on the page as text; the page's own policy runs no other script.
"""

import base64
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import jinja2
import torch
from torch import Tensor

from rhythm_kernels.analysis.maps import MeanMaps
from rhythm_kernels.analysis.reading import Reading

FOLDER = Path(__file__).parent
PREPLAN, ANCHORS, DOMINATED, INTRO, WAAD_PEAK, FAI_PEAK, RECEIVER_PEAK = (1 << bit for bit in range(7))
"""What a token is, in the page's `flags`."""
LOCAL, GLOBAL, RECEIVER = 1, 2, 4
"""What a head is, in the page's `members`."""


class ShownAnswer(NamedTuple):
    """What the page, the figures and the files of numbers are made of."""

    reading: Reading
    texts: list[str]
    """Of each of the T tokens."""
    maps: list[MeanMaps]
    """Of all tokens, and of a window if one was asked for."""
    model: str
    peak_quantile: float
    """Peaks are among the values above this quantile of the answer."""
    settings: dict[str, str]
    versions: dict[str, str]

    @property
    def prompt_tokens(self) -> int:
        return int(self.reading.response.long().argmax())


def render(answer: ShownAnswer) -> str:
    """The page, in one file; everything that a model or a user wrote is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string((FOLDER / "page.html.jinja").read_text(encoding="utf-8"))
    js = (FOLDER / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(js.encode()).digest()).decode()
    reading = answer.reading
    return template.render(
        model=answer.model,
        layers=len(reading.layers),
        heads=reading.spans.shape[1],
        prompt_tokens=answer.prompt_tokens,
        answer_tokens=reading.tokens - answer.prompt_tokens,
        sampled=reading.sampled,
        receivers=int(reading.receivers.sum()),
        peak_quantile=answer.peak_quantile,
        settings=answer.settings,
        versions=answer.versions,
        css=(FOLDER / "page.css").read_text(encoding="utf-8"),
        js=js,
        script_hash=f"sha256-{digest}",
        data=as_json(page_data(answer)),
    )


def as_json(data: dict) -> str:
    """JSON that ends no script element and reads the same as JavaScript: ASCII, without <, > and &."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page_data(answer: ShownAnswer) -> dict:
    """What page.js reads; arrays are little-endian fp32 or bytes in base64.

    For the answer's n tokens: values (fp32 [n] each), flags (a byte each, such as PREPLAN) and intro_back (a byte each,
    tokens from a dominated anchor back to its intro, else 0). Of the heads, [L, HQ]: spans and kurtosis (fp32), members
    (a byte each, LOCAL and so on). Of each map the rows up to the diagonal, one after another.
    """
    reading, sets = answer.reading, answer.reading.sets
    here = reading.response
    flags = (
        sets.preplan * PREPLAN
        + sets.anchors * ANCHORS
        + sets.dominated * DOMINATED
        + sets.intros * INTRO
        + reading.waad_peaks * WAAD_PEAK
        + reading.fai_peaks * FAI_PEAK
        + reading.receiver_peaks * RECEIVER_PEAK
    )
    position = torch.arange(reading.tokens)
    back = torch.where(sets.intro_of >= 0, position - sets.intro_of, 0)
    values = {
        "waad": reading.waad,
        "fai": reading.fai,
        "credit_fai": reading.credit_fai,
        "entropy": reading.entropy,
        "receiver": reading.receiver_fai,
        "gamma": reading.gamma,
    }
    members = reading.receivers * RECEIVER
    for place, layer in enumerate(reading.sampled):
        row = reading.groups.local_heads[place] * LOCAL + reading.groups.global_heads[place] * GLOBAL
        members[reading.layers.index(layer)] += row
    return {
        "texts": answer.texts,
        "prompt_tokens": answer.prompt_tokens,
        "values": {name: _floats(x[here]) for name, x in values.items()},
        "flags": _bytes(flags[here]),
        "intro_back": _bytes(back[here]),
        "layers": reading.layers,
        "heads": reading.spans.shape[1],
        "sampled": reading.sampled,
        "spans": _floats(reading.spans),
        "kurtosis": _floats(reading.kurtosis),
        "members": _bytes(members),
        "maps": [_map(each) for each in answer.maps],
    }


def _map(maps: MeanMaps) -> dict:
    bins = len(maps.local_map)
    row, column = torch.tril_indices(bins, bins)
    return {
        "begin": maps.begin,
        "end": maps.end,
        "bin": maps.bin,
        "bins": bins,
        "local": _floats(maps.local_map[row, column]),
        "global": _floats(maps.global_map[row, column]),
    }


def _floats(x: Tensor) -> str:
    return base64.b64encode(x.detach().cpu().float().contiguous().numpy().astype("<f4").tobytes()).decode()


def _bytes(x: Tensor) -> str:
    return base64.b64encode(x.detach().cpu().to(torch.uint8).contiguous().numpy().tobytes()).decode()
