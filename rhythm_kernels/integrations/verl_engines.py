"""Reads the attention rhythm in the old-log-prob pass of verl's engines, which run the model in its workers.

The FSDP engine runs a transformers model, and is told of the ranks that share each sequence (verl's Ulysses sequence
parallelism). The Megatron engine runs a GPTModel of megatron-core, in which the ranks that share it are found.

Shapes: B sequences of a micro-batch, n tokens in all of them, T the tokens of a row, L sampled layers, HQ query heads.
"""

import functools
import json
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rhythm_kernels.integrations.megatron_rows import collect_rows, valid_places
from rhythm_kernels.integrations.verl_config import BLOCK, make_options, megatron_ranks, sharing
from rhythm_kernels.listen.collect import collect
from rhythm_kernels.options import CreditOptions
from rhythm_kernels.ranks import Parallel, Ranks, together
from rhythm_kernels.types import HeadGroups, Rhythm

WAAD, FAI, SPANS = "rhythm_waad", "rhythm_fai", "rhythm_spans"
"""Nested fields of the batch: WAAD [B, prompt + response] fp32, tokens; FAI of the same shape, a probability; spans
[B, L HQ] fp32, tokens."""

_said: set[str] = set()


def say_once(text: str) -> None:
    """Prints a line to stdout, where Ray collects it; verl's loggers hide other packages' lines."""
    if text not in _said:
        _said.add(text)
        print(f"[rhythm_kernels] {text}", flush=True)


# ---- the FSDP engine -------------------------------------------------------------------------------------------------


def wrap_fsdp_step(forward_step: Callable) -> Callable:
    """Wraps `FSDPEngineWithLMHead.forward_step`: it adds the statistics to the output if the batch requests them."""

    @functools.wraps(forward_step)
    def with_rhythm(engine, micro_batch, loss_function, forward_only):
        from verl.utils.tensordict_utils import get_non_tensor_data
        from verl.utils.ulysses import get_ulysses_sequence_parallel_group

        request = get_non_tensor_data(micro_batch, BLOCK, None)
        if request is None or not forward_only:
            return forward_step(engine, micro_batch, loss_function, forward_only)
        packed = get_non_tensor_data(micro_batch, "use_remove_padding", True)
        group = get_ulysses_sequence_parallel_group()
        with together([] if group is None else [Ranks("Ulysses", group)]) as facts:
            facts["the block"] = request
            micro_batch = micro_batch.to(engine_device())
            arguments = _arguments(request, engine, micro_batch, {"Ulysses": engine.ulysses_sequence_parallel_size})
            lengths = micro_batch["input_ids"].offsets().diff()
            valid = valid_places(lengths, int(lengths.max()))
            rows = _response_rows(micro_batch, valid)
            arguments["response_mask"] = _packed_row(rows[valid], engine) if packed else rows
            if group is not None:
                arguments["parallel"] = Parallel(tokens=group, order="contiguous")
        with collect(engine.module, **arguments) as collector:
            loss, output = forward_step(engine, micro_batch, loss_function, forward_only)
        collector.check()
        places = (0, slice(int(lengths.sum()))) if packed else valid
        output["model_output"] |= _as_model_output(collector.rhythm(), places, lengths)
        return loss, output

    return with_rhythm


def _packed_row(response: Tensor, engine) -> Tensor:
    """Returns R as a row, [1, n + padding]: verl may round the packed length up, and then to the ranks' multiple."""
    rounded = len(response) + engine._get_packed_pad_size(len(response))
    rounded += -rounded % engine.ulysses_sequence_parallel_size
    return torch.nn.functional.pad(response, (0, rounded - len(response)))[None]


# ---- the Megatron engine ---------------------------------------------------------------------------------------------


_waiting: list[tuple[collect_rows, Tensor, list[dict]]] = []
"""In a stage of a pipeline, for each forward of the running schedule, in their order: what has read it, the lengths of
its sequences [B], and the model output that the statistics join, which only the last stage has. A process runs one
schedule at a time."""


def wrap_megatron_pass(forward_backward_batch: Callable) -> Callable:
    """Wraps `MegatronEngine.forward_backward_batch`: the ranks that share a model agree on the block before the pass.

    Later a rank that raises would leave the others waiting in the model. Nodes may have other versions of the package.
    """

    @functools.wraps(forward_backward_batch)
    def agreed(engine, data, loss_function, forward_only=False):
        from verl.utils.tensordict_utils import get_non_tensor_data

        request = get_non_tensor_data(data, BLOCK, None)
        if request is not None:
            with together(_ranks_of_model(engine)) as facts:
                facts["the block"] = request
                _read_request(request, engine)
                _check_order(engine)
        return forward_backward_batch(engine, data, loss_function, forward_only=forward_only)

    return agreed


def _ranks_of_model(engine) -> list[Ranks]:
    from megatron.core import parallel_state

    groups = {
        "tensor": parallel_state.get_tensor_model_parallel_group,
        "context": parallel_state.get_context_parallel_group,
        "pipeline": parallel_state.get_pipeline_model_parallel_group,
    }
    sizes = megatron_ranks(engine.engine_config)
    return [Ranks(f"{way} parallelism", group()) for way, group in groups.items() if sizes[way] > 1]


def _check_order(engine) -> None:
    """Raises ValueError for models whose tokens verl deals out to context parallel ranks in another order."""
    from verl.utils.megatron_utils import unwrap_model

    orders = {engine._get_context_parallel_layout(unwrap_model(part)) for part in engine.module}
    if engine.engine_config.context_parallel_size > 1 and orders != {"zigzag"}:
        raise ValueError(
            f"the block {BLOCK} needs tokens in zigzag order on the ranks of context parallelism, got "
            f"{', '.join(sorted(orders))}: set actor_rollout_ref.actor.megatron.context_parallel_size=1"
        )


def wrap_megatron_step(forward_step: Callable) -> Callable:
    """Wraps `MegatronEngineWithLMHead.forward_step`: it reads the statistics if the batch requests them."""

    @functools.wraps(forward_step)
    def with_rhythm(engine, batch_iter, model, logits_processor_func, postprocess_micro_batch_func):
        from verl.utils.tensordict_utils import get_non_tensor_data

        micro_batch = next(batch_iter)
        request = get_non_tensor_data(micro_batch, BLOCK, None)
        arguments = (iter([micro_batch]), model, logits_processor_func, postprocess_micro_batch_func)
        if request is None:
            return forward_step(engine, *arguments)
        micro_batch = micro_batch.to(engine_device())
        ranks, lengths = megatron_ranks(engine.engine_config), micro_batch["input_ids"].offsets().diff()
        options = _arguments(request, engine, micro_batch, ranks)
        response = _response_rows(micro_batch, valid_places(lengths, int(lengths.max())))
        with collect_rows(model, response, lengths, **options) as collector:
            out, postprocess = forward_step(engine, *arguments)
        if ranks["pipeline"] == 1:
            added = _megatron_output(collector, lengths)
            return out, _followed(postprocess, lambda model_output: model_output.update(added))
        _waiting.append((collector, lengths, []))
        return out, _followed(postprocess, _waiting[-1][2].append)

    return with_rhythm


def _followed(postprocess: Callable, then: Callable[[dict], None]) -> Callable:
    """Returns a function that does what a schedule's `postprocess` does, and then something with the model output."""

    def both(out: Tensor) -> tuple:
        *loss, output = postprocess(out)
        then(output["model_output"])
        return *loss, output

    return both


def wrap_schedules(get_schedule: Callable) -> Callable:
    """Wraps Megatron's `get_forward_backward_func`: a pipeline's statistics are added when all forwards have run.

    A stage cannot wait for the next one inside its own forward.
    """

    @functools.wraps(get_schedule)
    def get(*args, **kwargs):
        schedule = get_schedule(*args, **kwargs)

        @functools.wraps(schedule)
        def run(*args, **kwargs):
            _waiting.clear()
            try:
                outputs = schedule(*args, **kwargs)
                for collector, lengths, model_outputs in _waiting:
                    added = _megatron_output(collector, lengths)  # all stages make it together
                    for model_output in model_outputs:
                        model_output |= added
                return outputs
            finally:
                _waiting.clear()

        return run

    return get


def _megatron_output(collector: collect_rows, lengths: Tensor) -> dict[str, Tensor]:
    rhythm = collector.rhythm_of_rows()
    collector.check()
    return _as_model_output(rhythm, collector.valid, lengths)


# ---- both ------------------------------------------------------------------------------------------------------------


def engine_device() -> int | torch.device:
    from verl.utils.device import get_device_id

    return get_device_id()


def _arguments(request: str, engine, micro_batch: Mapping, ranks: dict[str, int]) -> dict:
    """Returns the arguments of `collect` for a micro-batch, without R.

    Args:
        request: what the trainer asks for.
        ranks: how many ranks share each sequence, by the way in which they do.
    """
    _check_text(micro_batch["position_ids"])
    options, groups = _read_request(request, engine)
    say_once(f"reads the attention rhythm in the old-log-prob pass, for {options.strategy} credit{sharing(ranks)}")
    return options.collect_arguments | {"groups": groups}


def _read_request(request: str, engine) -> tuple[CreditOptions, HeadGroups | None]:
    asked = json.loads(request)
    return make_options(asked["options"]), _groups_of(asked["groups"], engine)


def _check_text(position_ids: Tensor) -> None:
    if position_ids.dim() != 2:
        raise ValueError(
            f"the block {BLOCK} needs text, got position ids with {position_ids.dim()} dimensions, as models of images "
            "and text have"
        )


def _response_rows(micro_batch: Mapping, valid: Tensor) -> Tensor:
    """Returns R in right-padded rows, [B, T] bool, from nested response masks, each at the end of its sequence.

    Args:
        valid: which places of the rows are tokens, of that shape.
    """
    lengths, mask = micro_batch["input_ids"].offsets().diff(), micro_batch["response_mask"]
    behind = valid & ~valid_places(lengths - mask.offsets().diff(), valid.shape[1])
    return torch.zeros_like(behind).masked_scatter_(behind, mask.values().bool())


def _groups_of(groups: list[list[bool]] | None, engine) -> HeadGroups | None:
    """Returns the groups [L, HQ] of two flat lists, one item for each head of the sampled layers."""
    if groups is None:
        return None
    heads = engine.model_config.hf_config.get_text_config().num_attention_heads
    return HeadGroups(*(torch.tensor(group, device="cpu").view(-1, heads) for group in groups))


def _as_model_output(rhythm: Rhythm, places: object, lengths: Tensor) -> dict[str, Tensor]:
    """Returns the nested tensors that join verl's model output, a row for each sequence.

    Args:
        places: an index of the tokens of all sequences in WAAD and FAI.
        lengths: [B], the number of tokens of each sequence.
    """
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    output = {
        name: torch.nested.nested_tensor_from_jagged(signal[places], offsets)
        for name, signal in ((WAAD, rhythm.waad), (FAI, rhythm.fai))
    }
    if rhythm.spans is not None:
        spans = rhythm.spans  # [B, L, HQ], verl's padding the last sequence; or [L, HQ] for the pass
        spans = spans[: len(lengths)] if spans.ndim == 3 else spans.expand(len(lengths), -1, -1)
        output[SPANS] = torch.nested.as_nested_tensor(list(spans.flatten(1)), layout=torch.jagged)
    return output
