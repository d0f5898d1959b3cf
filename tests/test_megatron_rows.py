"""`collect_rows`, and the files of the pages of ROLL, NeMo-RL and slime, on tiny GPTModels in Megatron's own schedule.

A stand-in packs each micro-batch as the frameworks do: every sequence is padded to a multiple, the last one up to the
end of the row, and with context parallelism every rank has its two runs of each. slime's last one is padding alone.
"""

import contextlib
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch
from megatron_cases import FusedCore, cpu_for_cuda, fill_stage, gpt, megatron_groups, places, positions
from ranks import Raised, on_ranks, preload

from rhythm_kernels import token_credit
from rhythm_kernels.integrations import megatron
from rhythm_kernels.integrations.megatron_rows import collect_rows

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
pytestmark = pytest.mark.xdist_group("ranks")
preload("megatron_cases", "megatron.core.models.gpt")
PAGES = Path(__file__).parents[1] / "docs" / "frameworks"
LENGTHS = [[21, 40, 33], [17, 8, 40]]
"""The tokens of each row of two micro-batches, in rows of 40."""
PROMPTS = [[6, 11, 30], [3, 7, 12]]
WAYS = {
    "one": {},
    "context": {"context_parallel_size": 2},
    "pipeline": {"pipeline_model_parallel_size": 2},
}


class MicroBatch:
    """Rows of 40 tokens, padded on the right; what is behind each prompt is R, but for a hole."""

    padding_apart = False
    """Whether the padding behind a packed row is a sequence of its own."""

    def __init__(self, index: int):
        self.lengths, self.prompts = torch.tensor(LENGTHS[index]), torch.tensor(PROMPTS[index])
        place = torch.arange(40)
        self.valid = place < self.lengths[:, None]
        self.response = self.valid & (place >= self.prompts[:, None]) & (place != 15)
        drawn = torch.randint(0, 61, (3, 40), generator=torch.Generator().manual_seed(index))
        self.ids = drawn.masked_fill(~self.valid, 0)

    def inputs(self, packed: bool) -> dict:
        """Returns this rank's arguments of the model's forward."""
        from megatron.core import parallel_state
        from megatron.core.packed_seq_params import PackedSeqParams

        ranks, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
        if not packed:
            own = places([0, 40], ranks)[rank]
            return {"input_ids": self.ids[:, own], "position_ids": positions(self.ids)[:, own], "attention_mask": None}
        room = (self.lengths + 7) // 8 * 8
        if self.padding_apart:
            room = torch.cat([room, torch.tensor([16])])
        else:
            room[-1] += 16
        cuts = torch.nn.functional.pad(room.cumsum(0), (1, 0)).int()
        row = torch.cat([torch.nn.functional.pad(row, (0, 32))[:n] for row, n in zip(self.ids, room)])
        row = torch.nn.functional.pad(row, (0, int(cuts[-1]) - len(row)))
        params = PackedSeqParams("thd", cuts, cuts, cuts, cuts, max_seqlen_q=64, max_seqlen_kv=64)
        own = places(cuts.tolist(), ranks)[rank]
        ids, position_ids = row[None, own], torch.zeros(1, len(own), dtype=torch.long)
        return {"input_ids": ids, "position_ids": position_ids, "attention_mask": None, "packed_seq_params": params}


def model_of_stage(**sizes):
    from megatron.core import parallel_state

    stage, stages = parallel_state.get_pipeline_model_parallel_rank(), sizes.get("pipeline_model_parallel_size", 1)
    made = {"core": FusedCore, "variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}
    model = gpt(stages=(stage == 0, stage == stages - 1), batch_p2p_comm=False, **made)
    if stages > 1:
        fill_stage(model, gpt(pipeline_model_parallel_size=1, **made))
    return model


def of_page(name: str) -> dict:
    """Returns what the file of a page defines."""
    text = (PAGES / name).read_text()
    defined: dict = {}
    exec(re.search(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[1], defined)
    return defined


class Roll:
    """Gives the file of ROLL's page what it reads of the strategy and of a micro-batch."""

    def __init__(self):
        self.page = of_page("roll.md")
        self.strategy = SimpleNamespace(worker_config=SimpleNamespace(name="actor_train"))

    def collect(self, model, batch: MicroBatch, name: str = "forward_func_log_probs", **meta_info):
        fields = {"response_mask": batch.response.long(), "attention_mask": batch.valid.long()}
        data = SimpleNamespace(batch=fields, meta_info=meta_info)
        return self.page["collect"](self.strategy, model, data, SimpleNamespace(__name__=name))

    def add_gamma(self, results) -> None:
        self.page["add_gamma"](self.strategy, results)

    first = 1
    """The token of the first factor."""


class LogprobsPostProcessor:
    pass


class Nemo:
    """Gives the file of NeMo-RL's page what it reads of a micro-batch."""

    def __init__(self):
        self.page = of_page("nemo-rl.md")

    def collect(self, model, batch: MicroBatch, post_processing_fn=LogprobsPostProcessor):
        fields = {"token_mask": batch.response.float(), "input_lengths": batch.lengths}
        microbatch = SimpleNamespace(data_dict=fields, input_ids=batch.ids)
        return self.page["collect"](model, microbatch, post_processing_fn())

    def add_gamma(self, results) -> None:
        self.page["add_gamma"](results)

    first = 0


class Slime:
    """Gives the file of slime's page what it reads of a micro-batch, whose answers keep the order of the rows."""

    def __init__(self):
        self.page, self.batches = of_page("slime.md"), []

    def collect(self, model, batch: MicroBatch):
        batch.padding_apart = True
        inputs = batch.inputs(packed=True)
        kept = [row[start:end] for row, start, end in zip(batch.response, batch.prompts, batch.lengths, strict=True)]
        fields = {
            "tokens": inputs["input_ids"],
            "packed_seq_params": inputs["packed_seq_params"],
            "total_lengths": batch.lengths.tolist(),
            "response_lengths": [len(row) for row in kept],
            "loss_masks": [row.float() for row in kept],
        }
        self.batches.append(batch)
        return self.page["collect"](model, fields, SimpleNamespace(__name__="get_log_probs_and_entropy"), "")

    def add_gamma(self, results) -> None:
        cp_utils = ModuleType("slime.backends.megatron_utils.cp_utils")
        cp_utils.slice_log_prob_with_cp = lambda x, total, length: x  # slime's keeps a rank's part
        with mock.patch.dict(sys.modules, {cp_utils.__name__: cp_utils}):
            assert self.page["with_gamma"](results) is results
        for batch, result in zip(self.batches, results):
            rows = torch.ones(batch.ids.shape)
            for row, gamma, start in zip(rows, result["gamma"], batch.prompts, strict=True):
                row[start : start + len(gamma)] = gamma
            result["gamma"] = rows
        self.batches.clear()

    first = 0


FRAMEWORKS = {"roll": Roll, "nemo-rl": Nemo, "slime": Slime}


def gammas(framework: str, way: str, packed: bool) -> list[torch.Tensor]:
    """Returns the factors of each micro-batch of a schedule; an empty list in stages before the last."""
    with megatron_groups(**WAYS[way]), cpu_for_cuda(), torch.no_grad():
        from megatron.core.pipeline_parallel import get_forward_backward_func

        model, page = model_of_stage(**WAYS[way]), FRAMEWORKS[framework]()

        def forward_step(batches, model):
            batch = next(batches)
            with page.collect(model, batch):
                out = model(**batch.inputs(packed))
            return out, lambda out: (out.sum(), {})

        run = get_forward_backward_func()
        sizes = {"num_microbatches": 2, "seq_length": 40, "micro_batch_size": 3, "forward_only": True}
        batches = iter([MicroBatch(0), MicroBatch(1)])
        for _ in range(2):  # nothing of the first pass is left
            results = run(forward_step_func=forward_step, data_iterator=batches, model=model, **sizes)
            page.add_gamma(results)
            batches = iter([MicroBatch(0), MicroBatch(1)])
        return [result["gamma"] for result in results]


def gammas_of_rows_alone() -> list[torch.Tensor]:
    """Returns the factors of each micro-batch from each row alone, without padding."""
    with megatron_groups(), torch.no_grad():
        model, gammas = model_of_stage(), []
        for batch in (MicroBatch(0), MicroBatch(1)):
            gammas.append(torch.ones(3, 40))
            for row, length in enumerate(batch.lengths):
                ids, response = batch.ids[row : row + 1, :length], batch.response[row : row + 1, :length]
                with megatron.collect(model, response_mask=response) as c:
                    model(ids, positions(ids), None)
                gammas[-1][row, :length] = token_credit("coupled", response, c.rhythm())[0]
        return gammas


@pytest.fixture(scope="module")
def wanted():
    [returned] = on_ranks(1, gammas_of_rows_alone)
    assert not isinstance(returned, Raised), returned.args[2]
    return returned


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("framework", "packed"),
    [("roll", True), ("roll", False), ("nemo-rl", True), ("nemo-rl", False), ("slime", True)],
    ids=["ROLL, packed", "ROLL, padded", "NeMo-RL, packed", "NeMo-RL, padded", "slime"],
)
def test_the_file_of_a_page_gives_each_row_the_factors_that_it_has_alone(wanted, framework, way, packed):
    returned = on_ranks(2 if WAYS[way] else 1, gammas, framework, way, packed)
    for rank, result in enumerate(returned):
        assert not isinstance(result, Raised), result.args[2]
        if way == "pipeline" and rank == 0:
            assert result == []
            continue
        for gamma, expected in zip(result, wanted, strict=True):
            assert torch.equal(gamma, expected[:, FRAMEWORKS[framework].first :])
            assert gamma.ne(1).any()


def test_other_passes_are_not_read():
    roll, batch, slime = Roll(), MicroBatch(0), of_page("slime.md")["collect"]
    for context in (
        roll.collect(None, batch, name="forward_func_train"),
        roll.collect(None, batch, disable_adapter=True),
        Nemo().collect(None, batch, post_processing_fn=SimpleNamespace),
        slime(None, {}, SimpleNamespace(__name__="get_values"), ""),
        slime(None, {}, SimpleNamespace(__name__="get_log_probs_and_entropy"), "ref_"),
    ):
        assert isinstance(context, contextlib.nullcontext)
    roll.strategy.worker_config.name = "reference"
    assert isinstance(roll.collect(None, batch), contextlib.nullcontext)
    assert "rhythm" not in vars(roll.strategy)


# ---- bad input -------------------------------------------------------------------------------------------------------


def of_wrong_rows(packed: bool, lengths: list[int], real: list[int] | None = None) -> None:
    with megatron_groups(), torch.no_grad():
        model, batch = model_of_stage(), MicroBatch(0)
        inputs = batch.inputs(packed)
        if real is not None:
            inputs["packed_seq_params"].cu_seqlens_q = torch.tensor([0, *real]).cumsum(0).int()
        with collect_rows(model, torch.zeros(len(lengths), 40).bool(), torch.tensor(lengths)):
            model(**inputs)


def test_lengths_that_reach_into_known_padding_are_refused():
    [raised] = on_ranks(1, of_wrong_rows, True, [22, 40, 33], [21, 40, 33])
    assert raised.args[1] == "the model must get 3 rows of lengths [22, 40, 33], got room for [21, 40, 33]"


def of_one_rank(lengths: torch.Tensor) -> None:
    with megatron_groups(tensor_model_parallel_size=2):
        import torch.distributed as dist

        collect_rows(model_of_stage(), torch.zeros(3, 40).bool(), lengths[dist.get_rank() :])


def test_wrong_arguments_of_one_rank_are_raised_on_all():
    own, other = on_ranks(2, of_one_rank, torch.tensor([1, 2, 3]))[::-1]
    assert own.args[0] == "ValueError" and other.args[0] == "Disagreement" and "lengths must" in other.args[1]


@pytest.mark.parametrize(
    ("packed", "lengths", "got"),
    [
        (True, [25, 40, 33], [24, 40, 56]),
        (True, [21, 40], [24, 40, 56]),
        (False, [21, 40, 33, 5], [40, 40, 40]),
    ],
)
def test_a_forward_of_other_rows_is_refused(packed, lengths, got):
    [raised] = on_ranks(1, of_wrong_rows, packed, lengths)
    assert raised.args[:2] == (
        "ValueError",
        f"the model must get {len(lengths)} rows of lengths {lengths}, got room for {got}",
    )


def of_wrong_arguments(mask: torch.Tensor, lengths: torch.Tensor) -> None:
    with megatron_groups():
        collect_rows(model_of_stage(), mask, lengths)


@pytest.mark.parametrize(
    ("mask", "lengths", "message"),
    [
        (torch.ones(3, 40), torch.tensor([1, 2, 3]), "response_mask must"),
        (torch.ones(40).bool(), torch.tensor([1]), "response_mask must"),
        (torch.ones(3, 40).bool(), torch.tensor([1, 2]), "lengths must"),
        (torch.ones(3, 40).bool(), torch.tensor([1.0, 2.0, 3.0]), "lengths must"),
        (torch.ones(2, 40).bool(), torch.tensor([40, 41]), "lengths must be from 0 to 40, got [40, 41]"),
        (torch.zeros(2, 40).bool(), torch.tensor([40, -1]), "lengths must be from 0 to 40, got [40, -1]"),
        (torch.ones(2, 40).bool(), torch.tensor([40, 33]), "response_mask must be False behind a row's length, got R"),
    ],
)
def test_wrong_arguments_are_named(mask, lengths, message):
    [raised] = on_ranks(1, of_wrong_arguments, mask, lengths)
    assert raised.args[1].startswith(message), raised.args[2]
