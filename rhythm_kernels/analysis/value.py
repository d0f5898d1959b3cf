"""Tests whether credit lands where the answer is decided: a judge of the strategies for any model and verified task.

The value of a prefix is the probability that a sampled continuation of it ends in a solved answer. What a token decides
is the value with it less the value before it. The command estimates both along the model's own answers, from
continuations in which each token in turn is replaced by another one, drawn from the model. It says what share of the
decisions lies on the tokens that each credit strategy selects, against chance.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rhythm_kernels.analysis.problems import is_right
from rhythm_kernels.analysis.reading import read
from rhythm_kernels.analysis.rollouts import Row, continue_rows
from rhythm_kernels.analysis.sources import token_texts
from rhythm_kernels.analysis.study import Answer, Study, check_flags, parser_of, shortened, write_report
from rhythm_kernels.analysis.value_choices import choices_of, compare_choices, gammas_of
from rhythm_kernels.analysis.value_figure import draw
from rhythm_kernels.analysis.value_judge import judge
from rhythm_kernels.analysis.value_page import page
from rhythm_kernels.analysis.value_report import report
from rhythm_kernels.analysis.value_tables import tables_of
from rhythm_kernels.analysis.vllm_engine import check_vllm
from rhythm_kernels.checks import check_choice, check_float, check_int
from rhythm_kernels.files import write_whole

ENGINES = ("transformers", "vllm")
LEAST = 1e-5
"""A token whose alternatives have a smaller probability gets no continuation: it decides less than that."""


def measured(study: Study, answers: list[Answer]) -> list[dict[str, Any]]:
    """Reads answers, and continues each with every token replaced; returns signals and counts, to be judged later."""
    with study.seeded(f"continuations from {answers[0].index}"):
        return _measured(study, answers)


@torch.no_grad()
def _measured(study: Study, answers: list[Answer]) -> list[dict[str, Any]]:
    model, args = study.model, study.args
    results, caches, rows, halves = [], [], [], []
    for number, answer in enumerate(answers):
        begin, count = len(answer.prompt), len(answer.tokens)
        ids = torch.tensor(answer.prompt + answer.tokens, device=model.device)
        response = torch.arange(len(ids), device=ids.device) >= begin
        reading = read(model, ids, response, layers=args.layers, temperature=args.temperature)
        output = model(ids[None, :-1], use_cache=True, logits_to_keep=count)
        caches.append(output.past_key_values if study.vllm is None else None)
        logits = output.logits[0].float() / args.temperature
        other, alternatives = draw_others(logits, ids[begin:], args.continuations)
        for t, tokens in enumerate(alternatives):
            rows += [Row(number, begin + t, token, args.max_new_tokens - t - 1) for token in tokens]
            halves += [half for half in (0, 1) for _ in tokens[::2]]
        signals = {"waad": reading.waad, "fai": reading.credit_fai, "entropy": reading.entropy}
        results.append(
            {
                "solved": solved(study, answer.index, answer.tokens),
                "other": other,
                "tries": [len(tokens) // 2 for tokens in alternatives],
                "wins": [[0] * count, [0] * count],
                "text": token_texts(study.tokenizer, ids.tolist())[begin:],
                **{name: signal[begin:].tolist() for name, signal in signals.items()},
            }
        )
    sequences = [answer.prompt + answer.tokens for answer in answers]
    continued = _continued(study, sequences, caches, rows, answers[0].index)
    verdicts: dict[tuple[int, ...], bool] = {}
    for row, half, tokens in zip(rows, halves, continued, strict=True):
        answer = answers[row.sequence]
        t = row.position - len(answer.prompt)
        whole = (answer.index, *answer.tokens[:t], row.token, *tokens)
        if whole not in verdicts:
            verdicts[whole] = solved(study, answer.index, list(whole[1:]))
        results[row.sequence]["wins"][half][t] += verdicts[whole]
    return results


def draw_others(logits: Tensor, own: Tensor, most: int) -> tuple[list[float], list[list[int]]]:
    """Draws tokens in place of an answer's own, from the policy's distribution without the own token.

    Args:
        logits: [n, V] fp32, at the temperature of the answer.
        own: [n], the answer's tokens.
        most: the number of draws at a token of probability 0; one of probability p gets (1 - p) times as many, an even
            number from 4 up, which spends continuations where they take away the most noise.

    Returns:
        The probability of any other token in place of each, [n], and the tokens drawn, none where it is below LEAST.
    """
    without = logits.scatter(1, own[:, None], -torch.inf)
    others = (without.logsumexp(-1) - logits.logsumexp(-1)).exp().tolist()
    tokens: list[list[int]] = []
    for probability, row in zip(others, without, strict=True):
        draws = 2 * max(2, round(most * probability / 2))
        tokens.append(torch.multinomial(row.softmax(-1), draws, True).tolist() if probability >= LEAST else [])
    return [one if drawn else 0.0 for one, drawn in zip(others, tokens, strict=True)], tokens


def _continued(
    study: Study, sequences: list[list[int]], caches: list, rows: list[Row], first: int
) -> Iterator[list[int]]:
    """Yields the continuation of each row."""
    if study.vllm is not None:
        prompts = [[*sequences[row.sequence][: row.position], row.token] for row in rows]
        rooms = [0 if row.token in study.ends else row.new_tokens for row in rows]
        work = f"continuations from {first}"
        yield from study.vllm.complete(prompts, rooms, temperature=study.args.temperature, work=work)
        return
    size = study.args.rollout_batch_size
    with tqdm(total=len(rows), desc="continuations", unit="continuation", leave=False) as bar:
        for begin in range(0, len(rows), size):
            part = rows[begin : begin + size]
            temperature = study.args.temperature
            yield from continue_rows(study.model, study.tokenizer, sequences, caches, part, temperature=temperature)
            bar.update(len(part))


def solved(study: Study, index: int, tokens: list[int]) -> bool:
    """Whether an answer ends by itself, and right; as in the training, one that is cut off earns nothing."""
    return tokens[-1] in study.ends and bool(is_right(study.problems[index], study.words_of(tokens)))


def main(arguments: list[str]) -> None:
    """Runs `rhythm value`: generates answers, continues them from every token, and writes the report."""
    parser = parser_of("value", __doc__, temperature=1.0, batch_size=8)
    parser.set_defaults(prompt_format="chat", layers="5")
    parser.add_argument(
        "--continuations",
        type=int,
        default=64,
        help="number of continuations at a token of probability 0; at one of probability p it is (1 - p) times as "
        "many, at least 4",
    )
    parser.add_argument(
        "--rollout-batch-size", type=int, default=512, help="number of continuations that are computed together"
    )
    parser.add_argument(
        "--top-fraction", type=float, default=0.4, help="fraction of an answer's tokens that a strategy selects"
    )
    parser.add_argument(
        "--choices",
        action="store_true",
        help="also compare other choices of the options of credit (window, horizon, layers and so on) on these answers",
    )
    parser.add_argument(
        "--engine",
        default=ENGINES[0],
        choices=ENGINES,
        help="what samples; vllm takes a folder or a name on the hub, and batches all continuations itself",
    )
    parser.add_argument(
        "--vllm-memory",
        type=float,
        help="fraction of a GPU's memory for vLLM (0.5); the model that reads the signals needs some beside it",
    )
    args = parser.parse_args(arguments)
    check_flags(args, "value")
    check_choice("--engine", args.engine, ENGINES)
    if args.vllm_memory is None:
        args.vllm_memory = 0.5
    elif args.engine != "vllm":
        raise ValueError(f"--vllm-memory would have no effect with --engine {args.engine}, got {args.vllm_memory}")
    elif check_float("--vllm-memory", args.vllm_memory, 0.0, 1.0) == 0:
        raise ValueError("--vllm-memory must be above 0, got 0.0")
    check_int("--continuations", args.continuations, 4)
    check_int("--rollout-batch-size", args.rollout_batch_size, 1)
    if check_float("--top-fraction", args.top_fraction, 0.0, 1.0) == 0:
        raise ValueError("--top-fraction must be above 0, since a strategy that selects nothing is GRPO, got 0.0")
    if args.temperature == 0:
        raise ValueError("--temperature must be above 0, since continuations are sampled, got 0.0")
    if args.engine == "vllm":
        check_vllm(args.model)
    with Study("value", args, also=["continuations", "rollout_batch_size", "engine"]) as study:
        unknown = next((one for one in study.problems if is_right(one, "") is None), None)
        if unknown is not None:
            name = shortened(unknown.text)
            raise ValueError(f"--task must give the right answer to every problem, got none to {name!r}")
        generated, results = study.measured(partial(measured, study))
    answers = [judge(result, index, args.top_fraction) for index, result in enumerate(results)]
    rows = []
    if args.choices:
        choices = choices_of(study)
        rows = compare_choices(answers, choices, gammas_of(study, generated, choices), args.seed)
    tables = tables_of(answers, args.top_fraction, args.seed)
    text, data = report(tables, generated, study, arguments, rows)
    draw(tables, answers, args.out / "figure.png")
    write_whole(args.out / "answers.html", page(answers, study.problems, args.model))
    write_report(args.out, text, data)
