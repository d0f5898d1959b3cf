"""Renders the page of `rhythm show`: one HTML file with its numbers and scripts, which needs no network.

The scripts in web/ draw the page from the data inside it. Text of a model or a user enters as JSON in which `<`, `>`
and `&` are escaped, and the scripts put it on the page as text. The page's content policy runs no other script.
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
from rhythm_kernels.analysis.sources import layer_names

WEB = Path(__file__).parent / "web"
SCRIPTS = ("base.js", "curves.js", "pointer.js", "text.js", "maps.js", "heads.js", "start.js")
"""The parts of the page's one script, in order; they share one scope."""
PREPLAN, ANCHORS, DOMINATED, INTRO, WAAD_PEAK, FAI_PEAK, RECEIVER_PEAK = (1 << bit for bit in range(7))
"""The bits of the page's `flags`: the sets that a token is in."""
LOCAL, GLOBAL, RECEIVER = 1, 2, 4
"""The bits of the page's `members`: the groups that a head is in."""


class ShownAnswer(NamedTuple):
    """An answer with all that the page, the figures and the files of numbers show."""

    reading: Reading
    texts: list[str]
    """The texts of the T tokens."""
    maps: list[MeanMaps]
    """The maps of all tokens, and those of the window."""
    model: str
    peak_quantile: float
    """Only values above this quantile of the answer can be peaks."""
    settings: dict[str, str]
    versions: dict[str, str]

    @property
    def prompt_tokens(self) -> int:
        """The number of tokens before the answer."""
        return int(self.reading.response.long().argmax())


def render(answer: ShownAnswer) -> str:
    """Returns the page as HTML; all text of a model or a user is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(_file("page.html.jinja"))
    js = '"use strict";\n(() => {\n' + "\n".join(_file(name) for name in SCRIPTS) + "})();\n"
    digest = base64.b64encode(hashlib.sha256(js.encode()).digest()).decode()
    reading = answer.reading
    return template.render(
        model=answer.model,
        layers=len(reading.layers),
        heads=reading.spans.shape[1],
        prompt_tokens=answer.prompt_tokens,
        answer_tokens=reading.tokens - answer.prompt_tokens,
        sampled=layer_names(reading.sampled, reading.layers),
        receivers=int(reading.receivers.sum()),
        peak_quantile=answer.peak_quantile,
        settings=answer.settings,
        versions=answer.versions,
        css=_file("page.css"),
        js=js,
        script_hash=f"sha256-{digest}",
        data=as_json(page_data(answer)),
    )


def as_json(data: dict) -> str:
    """Returns JSON in ASCII without `<`, `>` and `&`, so that it cannot end a script element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page_data(answer: ShownAnswer) -> dict:
    """Returns the data that the scripts read; arrays are little-endian fp32 or bytes in base64.

    For the answer's n tokens these are `values` (fp32 [n] each), `flags` (bytes of PREPLAN and so on) and `intro_back`
    (bytes: the tokens from a dominated anchor back to its intro, else 0). For the heads, [L, HQ], they are `spans` and
    `kurtosis` (fp32) and `members` (bytes of LOCAL and so on). A map has its rows up to the diagonal, in order.
    """
    reading, sets = answer.reading, answer.reading.sets
    response = reading.response
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
    for row, layer in enumerate(reading.sampled):
        groups = reading.groups.local_heads[row] * LOCAL + reading.groups.global_heads[row] * GLOBAL
        members[reading.layers.index(layer)] += groups
    return {
        "texts": answer.texts,
        "prompt_tokens": answer.prompt_tokens,
        "values": {name: _floats(x[response]) for name, x in values.items()},
        "flags": _bytes(flags[response]),
        "intro_back": _bytes(back[response]),
        "layers": reading.layers,
        "heads": reading.spans.shape[1],
        "sampled": reading.sampled,
        "spans": _floats(reading.spans),
        "kurtosis": _floats(reading.kurtosis),
        "members": _bytes(members),
        "maps": [_map(maps) for maps in answer.maps],
    }


def _file(name: str) -> str:
    return (WEB / name).read_text(encoding="utf-8")


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
