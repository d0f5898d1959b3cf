"""How much do the statistics launch on a GPU, and where does the host wait for it?

    TRITON_INTERPRET=1 python -m benchmarks.host_work [--out benchmarks/results/host-work]

The benchmark needs no GPU. A small model, a Qwen3 of six layers in fp16, runs on a pretended device
(`benchmarks/pretended_cuda/`), and the model's own launches and waits are subtracted. The launches of each sampled
layer are half the difference between four sampled layers and two. The other launches come once a forward.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.measure import environment, heading, make_parser, markdown_table, publish
from benchmarks.pretended_cuda import Wait, counted, pretended_cuda
from rhythm_kernels import GroupSchedule, HeadGroups, collect
from rhythm_kernels.listen import collector
from train.batch import Rollouts, micro_batches, pack
from train.config import Config, Model
from train.distributed import World
from train.loading import build_model
from train.policy import Policy
from train.presets import load_preset
from train.reading import Reader
from train.rollout import Completion
from train.update import update_policy
from train.words import build_tokenizer

LENGTHS = (40, 3, 57, 28)  # tokens of the packed sequences
TOKENS = sum(LENGTHS)
FEW, MANY = [1, 3], [1, 2, 3, 4]  # sampled layers
HEADS = 4
PROMPT = 5
NOT_OURS = ("benchmarks/", "rhythm_kernels/listen/taps.py")
"""The places of the model's own waits: their innermost line in the project is the one that calls the model."""


class Count(NamedTuple):
    """The launches and waits of one forward under `collect`, without the model's own."""

    check: int
    """Launches that hold a layer's output against its map."""
    launches: int
    """All launches."""
    waits: list[Wait]


class Launches(NamedTuple):
    """The launches of one way of collecting."""

    check: float
    """The launches of the check of a layer's output, for each layer."""
    statistics: float
    """The other launches for each layer."""
    forward: float
    """The launches once a forward: the sequences' bounds, the heads' groups, their mean."""


def make_policy(device: torch.device, attention: str) -> Policy:
    torch.manual_seed(0)
    shape = Model(layers=6, hidden_size=64, heads=HEADS, key_heads=2, head_size=16, mlp_size=64)
    model = build_model(shape, build_tokenizer(), context=2 * TOKENS).half().to(device)
    model.set_attn_implementation(attention)
    return Policy(model, 1.0).eval()


def packed_inputs(device: torch.device) -> dict[str, Tensor | int | bool]:
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    cuts = torch.tensor([0, *LENGTHS]).cumsum(0).int().to(device)
    bounds = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), cuts)
    longest = dict.fromkeys(("max_length_q", "max_length_k"), max(LENGTHS))
    ids = torch.arange(TOKENS)[None] % 20
    return {"input_ids": ids.to(device), "position_ids": positions.to(device), "use_cache": False, **bounds, **longest}


def one_sequence(device: torch.device) -> dict[str, Tensor | bool]:
    return {"input_ids": (torch.arange(TOKENS)[None] % 20).to(device), "use_cache": False}


def padded_inputs(device: torch.device) -> dict[str, Tensor | bool]:
    ids = torch.arange(3 * TOKENS).view(3, TOKENS) % 20
    mask = torch.arange(TOKENS) < torch.tensor([[TOKENS], [90], [7]])
    return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device), "use_cache": False}


# ---- a forward -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def count(decoder: nn.Module, inputs: dict, layers: list[int], groups: HeadGroups | None = None, **options) -> Count:
    """Counts one forward under `collect`, from its context to its rhythm."""
    with counted() as plain:
        decoder(**inputs)
    uncounted, checks = collector.probe_output, []

    def probe_output(*args, **_):
        with counted() as work:
            deviations = uncounted(*args)
        checks.append(work.launches.total())
        return deviations

    with patch.object(collector, "probe_output", probe_output), counted() as work:
        with collect(decoder, layers=layers, groups=groups, **options) as c:
            decoder(**inputs)
        c.rhythm()
    ours = [wait for wait in work.waits if not wait.where.startswith(NOT_OURS)]
    return Count(sum(checks), work.launches.total() - plain.launches.total(), ours)


def groups_of(layers: list[int]) -> HeadGroups:
    """Returns the first two heads of each layer as local heads, and the last one as global head."""
    head = torch.arange(HEADS).expand(len(layers), -1)
    return HeadGroups(head < 2, head == HEADS - 1)


def launches_of(decoder: nn.Module, inputs: dict, known: bool, **options) -> Launches:
    few, many = (
        count(decoder, inputs, layers, groups_of(layers) if known else None, **options) for layers in (FEW, MANY)
    )
    check = (many.check - few.check) / (len(MANY) - len(FEW))
    layer = (many.launches - few.launches) / (len(MANY) - len(FEW))
    return Launches(check, layer - check, few.launches - layer * len(FEW))


# ---- a step of the trainer -------------------------------------------------------------------------------------------


def make_batch(device: torch.device) -> Rollouts:
    prompts = [[1 + place % 15 for place in range(PROMPT)] for _ in range(2)]
    completions = [Completion([3] * (20 + 4 * row), [-1.0] * (20 + 4 * row), "stop") for row in range(8)]
    return pack(prompts, completions, 4, device)


class Waits(NamedTuple):
    """The host's waits in a pass over micro-batches."""

    between: list[Wait]
    """The waits between the first micro-batch and the last."""
    around: list[Wait]
    """The waits before the first micro-batch and after the last."""


def waits_of(run: Callable[[Callable[[int], None]], object]) -> Waits:
    marks: list[int] = []
    with counted() as work:
        run(lambda tokens: marks.append(len(work.waits)))
    if len(marks) < 3:
        raise ValueError(f"a pass must have at least three micro-batches, got {len(marks)}")
    first, last = marks[0], marks[-1]
    return Waits(work.waits[first:last], work.waits[:first] + work.waits[last:])


def trainer_waits(device: torch.device) -> dict[str, Waits]:
    policy, batch, world = make_policy(device, "packed"), make_batch(device), World(0, 1, device)
    config: Config = load_preset("countdown-smoke").change(
        prompts_per_step=2, num_generations=4, gradient_steps=1, num_iterations=2, micro_batch_tokens=60
    )
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, eps=1.0)  # a smaller eps is 0 in fp16
    advantages = torch.ones(len(batch.ids), device=device)
    readers = []

    def read(schedule: GroupSchedule) -> Waits:
        def run(progress) -> None:
            micros = micro_batches(batch, range(len(batch.lengths)), config.grpo.micro_batch_tokens, world)
            readers.append(Reader(policy, batch, config, schedule))
            readers[-1].read(micros, progress)
            readers[-1].finish()

        return waits_of(run)

    def update(progress) -> None:
        update_policy(policy, optimizer, batch, readers[-1], advantages, config, world, progress=progress)

    schedule = GroupSchedule(2)
    return {
        "old log-probs, spans of each sequence": read(GroupSchedule(1)),
        "old log-probs, a calibration": read(schedule),
        "old log-probs, known groups": read(schedule),
        "update of two optimizer steps": waits_of(update),
    }


# ---- the report ------------------------------------------------------------------------------------------------------


class HostWork(NamedTuple):
    """The results by their names in the report."""

    launches: dict[str, Launches]
    forwards: dict[str, list[Wait]]
    """The waits of forwards under `collect`."""
    passes: dict[str, Waits]
    """The waits of the trainer's passes."""


def measure(device: torch.device) -> HostWork:
    packed, padded = make_policy(device, "packed").decoder, make_policy(device, "sdpa").decoder
    inputs, batch, bounds = packed_inputs(device), padded_inputs(device), torch.tensor([0, *LENGTHS]).cumsum(0)
    one, response_mask = one_sequence(device), (torch.arange(TOKENS)[None] >= PROMPT).to(device)
    launches = {}
    for name, known in (("spans", False), ("known groups", True)):
        launches[f"{name}, packed, log-sum-exp of the model"] = launches_of(packed, inputs, known)
        launches[f"{name}, packed, row pass"] = launches_of(packed, inputs, known, lse="own")
        launches[f"{name}, padded, row pass"] = launches_of(padded, batch, known)
        launches[f"{name}, one sequence, row pass"] = launches_of(padded, one, known)
        masked = launches_of(padded, one, known, response_mask=response_mask)
        launches[f"{name}, one sequence with a response mask, row pass"] = masked
    forwards = {
        "packed, bounds known to the host": count(packed, inputs, FEW, cu_seqlens=bounds).waits,
        "packed, bounds on the device": count(packed, inputs, FEW).waits,
        "padded, a mask [B, T] and one [B, 1, T, T]": count(padded, batch, FEW).waits,
    }
    return HostWork(launches, forwards, trainer_waits(device))


def report(where: dict[str, str], counts: HostWork) -> str:
    launches = [[name, f"{x.check:g}", f"{x.statistics:g}", f"{x.forward:g}"] for name, x in counts.launches.items()]
    forwards = [[name, str(len(waits))] for name, waits in counts.forwards.items()]
    passes = [[name, str(len(x.between)), str(len(x.around))] for name, x in counts.passes.items()]
    all_waits = [*counts.forwards.values(), *(part for x in counts.passes.values() for part in x)]
    places = sorted({f"- {wait.where}: {wait.what}" for waits in all_waits for wait in waits})
    parts = [
        heading({name: value for name, value in where.items() if name != "threads"}),
        "Launches on a GPU:",
        markdown_table(["collect", "the check, a layer", "the statistics, a layer", "once a forward"], launches),
        "Waits of the host for the device in a forward under `collect`:",
        markdown_table(["forward", "waits"], forwards),
        "In a pass of the trainer:",
        markdown_table(["pass", "between the first micro-batch and the last", "around"], passes),
        "Where the host waits:",
        "\n".join(places),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json as well")
    args = parser.parse_args()
    with pretended_cuda(interprets=False) as device:
        counts = measure(device)
    where = environment()
    print(publish(args.out, report(where, counts), where | counts._asdict()))


if __name__ == "__main__":
    main()
