"""Finds the tokens that end an answer, for the trainer and for the studies alike."""


def ends_of_text(settings, tokenizer) -> set[int]:
    """Returns the tokens that end a text: the tokenizer's, and those of a model's generation settings, if it has any.

    Args:
        settings: a transformers GenerationConfig, or None.
        tokenizer: a transformers tokenizer.

    Raises:
        ValueError: the settings name something else than tokens.
    """
    named = None if settings is None else settings.eos_token_id
    ends = [] if named is None else named if isinstance(named, list) else [named]
    if not all(type(end) is int for end in ends):
        raise ValueError(f"eos_token_id must be a token's number or a list of such, got {named!r}")
    return {tokenizer.eos_token_id, *ends} - {None}


def end_of_turn(tokenizer) -> set[int]:
    """Returns the special token that the chat template writes right after an assistant's message, if there is one.

    It need not be the model's end of a text: Qwen3-Base ends texts with <|endoftext|>, and its template turns with
    <|im_end|>. An answer would otherwise go on to the length limit.
    """
    turns = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # a template is a program and can raise anything, and may take no assistant's message
        return set()
    _, answer, after = text.rpartition("ANSWER")
    first = tokenizer.encode(after.lstrip(), add_special_tokens=False)[:1] if answer else []
    special = {token for token, known in tokenizer.added_tokens_decoder.items() if known.special}
    special |= set(tokenizer.all_special_ids)
    begins = {tokenizer.bos_token_id, tokenizer.unk_token_id} - {tokenizer.eos_token_id}  # these end nothing
    return set(first) & special - begins
