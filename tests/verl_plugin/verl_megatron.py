"""Passes of verl's Megatron engine on a CPU, on ranks that share a GPTModel of megatron-core.

The engine is verl's own class, with the model, the configuration and the groups in place. Its `initialize` is left out:
it needs Transformer Engine and Megatron-Bridge to make the model, and CUDA.
"""

from types import SimpleNamespace
from unittest.mock import patch

import megatron_cases as megatron
import torch
import torch.distributed as dist
import verl_cases as cases

import rhythm_kernels.integrations.verl_engines as plugin
from rhythm_kernels import HeadGroups, group_heads
from rhythm_kernels.heads import sampled_layers
from rhythm_kernels.integrations.megatron import collect

LENGTHS = [
    [(5, 30), (9, 41), (3, 12), (7, 1), (2, 26), (11, 33), (4, 18), (6, 22)],
    [(13, 50), (4, 17), (8, 3), (1, 22), (6, 6), (2, 9), (30, 40), (3, 5)],
]
"""Prompt and response tokens of each sequence, of the first and the second replica of the model."""
LAYERS = 6


def known_groups() -> HeadGroups:
    drawn = torch.rand(len(sampled_layers(LAYERS)), megatron.HEADS, generator=torch.Generator().manual_seed(2))
    return group_heads(drawn)


def request_of(groups: HeadGroups | None = None, **options) -> dict:
    return {"options": options, "groups": groups and [group.flatten().tolist() for group in groups]}


FIXED = {"use_dynamic_bsz": False}
ROWS = {"use_remove_padding": False}
BUCKET = {"pad_to_length": True, "pad_to_length_bucket": 40}
TWO, FOUR = {"tensor_model_parallel_size": 2}, {"tensor_model_parallel_size": 4}
CONTEXT, STAGES = {"context_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
REPLICAS = {"data_parallel_size": 2}
PASSES: dict[str, dict] = {
    "packed": {},
    "rows": {"engine": ROWS},
    "rows of their own lengths": {"engine": ROWS | {"pad_bshd_to_minibatch_max": False}, "settings": FIXED},
    "packed lengths rounded up": {"engine": BUCKET, "settings": FIXED},
    "known groups": {"request": request_of(known_groups(), groups_every=2)},
    "groups of a micro-batch": {"request": request_of(group_by="batch"), "settings": FIXED},
    "fused log-probs": {"engine": {"use_fused_kernels": True}, "settings": {"use_fused_kernels": True}},
    "without the block": {"request": None},
}
SHARED: dict[str, tuple[str, dict]] = {
    "tensor": ("packed", TWO),
    "tensor, rows": ("rows", TWO),
    "tensor, packed lengths rounded up": ("packed lengths rounded up", TWO),
    "tensor, without the block": ("without the block", TWO),
    "context": ("packed", CONTEXT),
    "context, rows": ("rows", CONTEXT),
    "context, known groups": ("known groups", CONTEXT),
    "pipeline": ("packed", STAGES),
    "pipeline, rows": ("rows", STAGES),
    "pipeline, known groups": ("known groups", STAGES),
    "pipeline, fused log-probs": ("fused log-probs", STAGES),
    "pipeline, groups of a micro-batch": ("groups of a micro-batch", STAGES),
    "pipeline, without the block": ("without the block", STAGES),
    "four tensor": ("packed", FOUR),
    "tensor and context": ("packed", TWO | CONTEXT),
    "context and pipeline": ("rows", CONTEXT | STAGES),
    "tensor and pipeline": ("known groups", TWO | STAGES),
    "tensor, two replicas": ("packed", TWO | REPLICAS),
    "pipeline, two replicas": ("packed", STAGES | REPLICAS),
}
"""The pass that ranks share, and how."""


def ranks_of(sizes: dict[str, int]) -> int:
    return torch.Size(sizes.values()).numel()


def make_engine(sizes: dict[str, int], **config):
    """Returns verl's engine around a random GPTModel, whose weights are the same whatever the number of ranks."""
    from megatron.core import parallel_state
    from verl.models.mcore.model_forward_fused import patch_fused_forward
    from verl.workers.config import McoreEngineConfig
    from verl.workers.engine.megatron import MegatronEngineWithLMHead

    stage, stages = parallel_state.get_pipeline_model_parallel_rank(), sizes.get("pipeline_model_parallel_size", 1)
    sharing = {"sequence_parallel": sizes.get("tensor_model_parallel_size", 1) > 1, "batch_p2p_comm": False}
    made = {
        "core": megatron.FusedCore,
        "num_layers": LAYERS,
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
    } | sharing
    model = megatron.gpt(stages=(stage == 0, stage == stages - 1), **made)
    if stages > 1:
        megatron.fill_stage(model, megatron.gpt(pipeline_model_parallel_size=1, **made))
    engine = MegatronEngineWithLMHead.__new__(MegatronEngineWithLMHead)
    parallel = {name: size for name, size in sizes.items() if name not in REPLICAS}
    engine.engine_config = McoreEngineConfig(**parallel, **config)
    text = SimpleNamespace(num_attention_heads=megatron.HEADS)
    engine.model_config = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"], get_text_config=lambda: text),
        tokenizer=SimpleNamespace(pad_token_id=0),
        mtp=SimpleNamespace(enable=False),
    )
    engine.module, engine.tf_config, engine.enable_routing_replay, engine.mode = [model], model.config, False, None
    if engine.engine_config.use_fused_kernels:
        patch_fused_forward(model)
    engine._is_offload_param = engine._is_offload_optimizer = False
    return engine


def cross_entropy(hidden, weight, labels, temperature, *_) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands in for verl's fused kernel: returns the log-probs of the labels, and the entropies."""
    log_probs = (hidden.flatten(0, -2) @ weight.T / temperature).log_softmax(-1)
    return log_probs.gather(1, labels.flatten()[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(1)


def groups_of(sizes: dict[str, int]):
    """Sets up Megatron's groups of these sizes; it makes replicas of the model of the ranks that are left."""
    return megatron.megatron_groups(**{name: size for name, size in sizes.items() if name not in REPLICAS})


def fields_of(replica: int) -> dict[str, torch.Tensor]:
    return cases.make_fields(LENGTHS[replica], seed=1 + replica)


def one_pass(name: str, sizes: dict[str, int], replica: int | None = None) -> dict[str, list] | None:
    """Returns a pass's nested fields as lists of rows, what was printed, and the lengths in each micro-batch.

    Stages before the last have None.

    Args:
        replica: that whose sequences it takes; None for this rank's.
    """
    from megatron.core import parallel_state
    from verl.models.mcore import model_forward_fused as fused

    form = PASSES[name]
    with (
        groups_of(sizes),
        megatron.cpu_for_cuda(),
        patch.object(plugin, "_said", set()),
        patch.object(fused, "linear_cross_entropy", cross_entropy),
    ):
        engine = make_engine(sizes, **form.get("engine", {}))
        batch = cases.make_batch(
            fields_of(parallel_state.get_data_parallel_rank() if replica is None else replica),
            form.get("request", {}),
            **{"max_token_len_per_gpu": 90} | form.get("settings", {}),
        )
        seen, prepare = [], engine.prepare_model_inputs

        def watching(micro_batch):
            seen.append(micro_batch["input_ids"].offsets().diff().tolist())
            return prepare(micro_batch)

        engine.prepare_model_inputs = watching
        with engine.eval_mode():
            output = engine.infer_batch(batch, loss_function=None)
        assert not plugin._waiting
        if not parallel_state.is_pipeline_last_stage():
            assert output == {}
            return None
        output = output["model_output"]
        rows = {field: [row.clone() for row in rows.unbind()] for field, rows in output.items()}
        return rows | {"said": list(plugin._said), "micro-batches": seen}


def shared_passes(names: list[str]) -> dict[str, dict[str, list] | None]:
    return {name: one_pass(*SHARED[name]) for name in names}


def alone(groups: HeadGroups | None) -> dict[str, list]:
    """Returns the rhythm of each sequence alone, in a row without padding, by `megatron.collect`."""
    fields, rhythms = fields_of(0), []
    with megatron.megatron_groups():
        model = make_engine({}).module[0].eval()
        for ids, response in zip(fields["input_ids"].unbind(), cases.response_rows(fields), strict=True):
            with torch.no_grad(), collect(model, response_mask=response[None], groups=groups) as c:
                model(ids[None], megatron.positions(ids[None]), None)
            rhythms.append(c.rhythm())
    rows = {name: [getattr(rhythm, name)[0] for rhythm in rhythms] for name in ("waad", "fai")}
    return rows | {"spans": [rhythm.spans for rhythm in rhythms]}


def failing(sizes: dict[str, int], how: str) -> None:
    """Runs a pass in which the last rank cannot go on, and then one without the block."""
    with megatron.megatron_groups(**sizes), megatron.cpu_for_cuda():
        engine, broken = make_engine(sizes), dist.get_rank() == dist.get_world_size() - 1
        fields = fields_of(0)
        options = {"window": 10 + (broken and how == "options")} | ({"widnow": 3} if broken and how == "key" else {})
        if how == "order":
            engine._get_context_parallel_layout = lambda model: "contiguous"
        if broken and how == "mask":
            fields |= {"response_mask": cases.nested(torch.zeros_like(row) for row in fields["response_mask"].unbind())}
        if broken and how == "scale":
            engine.tf_config.softmax_scale = 0.7  # not that of the core, which exists already
        with engine.eval_mode():
            try:
                engine.infer_batch(cases.make_batch(fields, request_of(**options)), loss_function=None)
            finally:
                assert not plugin._waiting
                if how == "options":
                    engine.infer_batch(cases.make_batch(fields), loss_function=None)
