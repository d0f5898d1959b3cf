"""Reads the rhythm of a model whose heads lie on several ranks, by transformers' plan of tensor parallelism.

    torchrun --nproc-per-node 2 examples/two_ranks.py                            # a tiny random model, on CPUs too
    torchrun --nproc-per-node 2 examples/two_ranks.py --model Qwen/Qwen3-0.6B --text "17 * 23 = 391"

`collect` finds the ranks in the model's weights. The rhythm has the same bits on every rank.
"""

import argparse
import os
import tempfile

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, Qwen3Config
from transformers.distributed import DistributedConfig

from rhythm_kernels import collect, token_credit

TEXT = "Tom has 12 pens. He buys 3 boxes of 4 pens. So he has 12 + 12 = 24 pens."


def load(name: str | None, plan: DistributedConfig):
    """Returns (model, tokenizer) for a name or path of transformers, or else a tiny random model that reads bytes."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, distributed_config=plan), AutoTokenizer.from_pretrained(name)
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
    tiny = AutoModelForCausalLM.from_config(Qwen3Config(vocab_size=384, num_key_value_heads=2, head_dim=24, **sizes))
    with tempfile.TemporaryDirectory() as folder:
        tiny.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan), ByT5Tokenizer(extra_ids=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a name or path of transformers; a tiny random model if left out")
    parser.add_argument("--text", default=TEXT)
    args = parser.parse_args()
    # transformers begins torch.distributed
    model, tokenizer = load(args.model, DistributedConfig(tp_size=int(os.environ["WORLD_SIZE"]), tp_plan="auto"))
    ids = tokenizer(args.text, return_tensors="pt").input_ids.to(model.device)
    with torch.no_grad(), collect(model) as c:
        model(ids)
    gamma = token_credit("coupled", torch.ones_like(ids, dtype=torch.bool), c.rhythm())
    own = c.stats[c.layers[0]].waad.shape[1]
    if dist.get_rank() == 0:
        print(f"{own} of {model.config.num_attention_heads} heads on each of {dist.get_world_size()} ranks")
        raised = [tokenizer.decode(token) for token, factor in zip(ids[0], gamma[0]) if factor > 1]
        print(f"credit raises {len(raised)} of {ids.shape[1]} tokens: {' '.join(map(repr, raised))}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
