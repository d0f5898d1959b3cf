"""Trains with GRPO and rhythm credit in a plain loop, with transformers alone.

    python examples/plain_loop.py                                       # a tiny random model, seconds on a CPU
    python examples/plain_loop.py --model Qwen/Qwen3-0.6B --learning-rate 1e-6 --new-tokens 128

Rhythm credit raises the advantage of the tokens that the model's attention marks as important. The reward is the share
of digits in the answer, which any model can learn within a few steps.

Shapes: B answers, T tokens of a prompt and its answer. R, the response mask, is True on the tokens of the answer.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, GenerationConfig, Qwen3Config

from rhythm_kernels import collect, shape_advantages, token_credit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS = ["Count to nine: ", "The first ten primes are ", "My telephone number: ", "Today's date is "]


def load(name: str | None):
    """Returns (model, tokenizer) for a name or path of transformers, or else a tiny random model that reads bytes."""
    if name is not None:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)  # 16 bits round small updates away
        # No penalties and no min_p: the answers are those of the policy that the loss computes.
        model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
        return model.to(DEVICE), AutoTokenizer.from_pretrained(name, padding_side="left")
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = Qwen3Config(vocab_size=259, num_key_value_heads=2, head_dim=24, pad_token_id=0, eos_token_id=1, **sizes)
    return AutoModelForCausalLM.from_config(config).eval().to(DEVICE), ByT5Tokenizer(extra_ids=0, padding_side="left")


def reward(answer: str) -> float:
    """Returns the share of digits."""
    return sum(character in "0123456789" for character in answer) / max(len(answer), 1)


def train(model, tokenizer, args):
    """Yields (mean reward, gamma [B, T], response mask [B, T]) after each step; gamma multiplies the advantages."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    ends = torch.tensor(model.generation_config.eos_token_id, device=DEVICE)
    for _ in range(args.steps):
        # Answers: several per prompt. Prompts are padded on the left, so that all answers begin at the same position.
        has_begin = tokenizer.bos_token is not None  # without one, special tokens would end the prompt
        prompts = tokenizer(PROMPTS, return_tensors="pt", padding=True, add_special_tokens=has_begin).to(DEVICE)
        ids = model.generate(
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask,
            num_return_sequences=args.answers,
            max_new_tokens=args.new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
        )  # [B, T]
        prompt = prompts.attention_mask.repeat_interleave(args.answers, 0).bool()
        answers = ids[:, prompt.shape[1] :]
        ended = torch.isin(answers, ends).int()
        live = ended.cumsum(1) - ended == 0  # up to and including the first end token
        attention_mask = torch.cat([prompt, live], 1)
        response = torch.cat([torch.zeros_like(prompt), live], 1)  # R, [B, T]

        # Advantages: each reward minus the mean reward of its prompt's answers, over their standard deviation.
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        rewards = torch.tensor([reward(text) for text in texts], device=DEVICE).view(-1, args.answers)
        spread = rewards.std(1, keepdim=True) + 1e-4
        advantages = ((rewards - rewards.mean(1, keepdim=True)) / spread).flatten()  # [B]

        # The loss's own forward, in which the statistics are read. gamma is needed only after it, so a batch with one
        # update needs no other pass. With several updates per batch, this block is the old-log-prob pass: run it once
        # under torch.no_grad(), keep gamma and the log-probs, and run a forward without collect in each update.
        with collect(model, response_mask=response) as c:
            logits = model(ids, attention_mask=attention_mask.long(), use_cache=False).logits
        gamma = token_credit("coupled", response, c.rhythm())  # [B, T]
        per_token = shape_advantages(advantages, gamma)  # [B, T]

        # Token t is predicted at t - 1. The ratio to the sampling policy is 1 here, its gradient is that of log p.
        log_probs = logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        ratio = (log_probs - log_probs.detach()).exp()
        is_answer = response[:, 1:]
        loss = -(ratio * per_token[:, 1:])[is_answer].sum() / is_answer.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield rewards.mean().item(), gamma, response


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a name or path of a transformers model; a tiny random one if left out")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (20)")
    parser.add_argument("--answers", type=int, default=8, help="answers per prompt (8)")
    parser.add_argument("--new-tokens", type=int, default=32, help="largest length of an answer (32)")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="learning rate of AdamW (0.005)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the model and the sampling (0)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model, tokenizer = load(args.model)
    for step, (mean, gamma, response) in enumerate(train(model, tokenizer, args), 1):
        raised = (gamma[response] > 1).float().mean()
        print(f"step {step}  reward {mean:.3f}  gamma > 1 on {raised:.0%} of the tokens")


if __name__ == "__main__":
    main()
